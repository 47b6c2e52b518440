//! Threads of our own, in which a panic ends the process.
//!
//! Not here: threads of libraries. tiny_http's panic when a client resets its connection, which must end
//! nothing.

use std::io;
use std::panic;
use std::process;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

/// The exit code after a panic: an internal error, as sysexits.h has it.
pub const EXIT_PANIC: i32 = 70;

/// A thread that was started.
pub struct Thread {
    /// Disconnected when the thread ends. Nothing is ever sent.
    ended: Receiver<()>,
}

impl Thread {
    /// Waits for the thread to end, for at most `limit`. False if it did not.
    pub fn ends_within(&self, limit: Duration) -> bool {
        self.ended.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
    }
}

/// Starts a thread that the service cannot do without. Its name marks it as one of ours: see
/// [`exit_on_panic`].
///
/// # Panics
/// The system cannot start a thread. That ends the process, at its start: all of these threads are started
/// before the first request.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Thread {
    try_spawn(name, run).unwrap_or_else(|error| {
        log::error!(name, reason:% = error; "cannot start a thread");
        panic!("cannot start a thread");
    })
}

/// Starts a thread that the service can do without for the moment. It has a name like the others.
///
/// # Errors
/// The system cannot start a thread.
pub fn try_spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    let (running, ended) = bounded(0);
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            run();
            drop(running);
        })?;
    Ok(Thread { ended })
}

/// From now on a panic in a thread that has a name ends the process with [`EXIT_PANIC`], so that it does not
/// go on without its worker or its store. What was accepted is on disk. Libraries do not name their threads;
/// their panics are only logged at debug level. `at_last` runs before the end, to flush the log.
pub fn exit_on_panic(at_last: fn()) {
    panic::set_hook(Box::new(move |info| {
        let at = info
            .location()
            .map_or_else(String::new, ToString::to_string);
        // A message that is a literal is safe to show; one made at run time may quote data.
        let reason = info
            .payload()
            .downcast_ref::<&str>()
            .copied()
            .unwrap_or("(not shown)");
        match thread::current().name() {
            Some(name) => {
                log::error!(thread = name, at = at.as_str(), reason; "panic, leaving");
                at_last();
                process::exit(EXIT_PANIC);
            }
            None => log::debug!(at = at.as_str(), reason; "a library's thread panicked"),
        }
    }));
}
