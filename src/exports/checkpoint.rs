//! The thread that moves what SQLite's write-ahead log holds into the database, beside the one that
//! writes: when the log has become long, and a while after a write, as payloads stay in it until then.
//!
//! Not here: what a checkpoint is ([`super::store`]).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use parking_lot::{Mutex, MutexGuard};

use super::store::{self, ORDINARY_LOG, Reader, Store};

/// The log is emptied so long after the first write to it.
const AGE: Duration = Duration::from_secs(5);
/// How long until it is tried again, where somebody who reads the store was in the way.
const BUSY: Duration = Duration::from_secs(5);
/// The same for a log that is long, and grows.
const BUSY_AND_LONG: Duration = Duration::from_secs(1);
/// How long until it is tried again after an error, and until somebody who reads is warned of.
const LONG: Duration = Duration::from_secs(60);

/// What the thread shares with the one that writes.
pub struct Checkpoint {
    /// Has a connection of its own.
    pub(super) reader: Mutex<Reader>,
    /// Held during a commit, and while the last of the log is moved: so neither has to try again.
    commits: Mutex<()>,
    database: PathBuf,
    wrote: AtomicBool,
    long: AtomicBool,
    wake: Sender<()>,
    woken: Receiver<()>,
}

impl Checkpoint {
    /// Opens the connection.
    ///
    /// # Errors
    /// Where the file cannot be opened once more.
    pub fn new(store: &Store) -> Result<Self, store::Error> {
        let (wake, woken) = bounded(1);
        Ok(Self {
            reader: Mutex::new(store.checkpointer()?),
            commits: Mutex::new(()),
            database: store.path().to_owned(),
            wrote: AtomicBool::new(false),
            long: AtomicBool::new(false),
            wake,
            woken,
        })
    }

    /// No checkpoint gets into the way of a commit while this is held. Blocks while one does.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.commits.lock()
    }

    /// Something was written, and the log is long now or is not. Does not block.
    pub fn wrote(&self, is_long: bool) {
        let first = !self.wrote.swap(true, Ordering::Relaxed);
        let long = is_long && !self.long.swap(true, Ordering::Relaxed);
        if first || long {
            // Where it is full, the thread is about to look.
            let _ = self.wake.try_send(());
        }
    }

    /// What the thread runs, until `stop` is dropped.
    pub fn run(&self, stop: &Receiver<()>) {
        let mut plan = Plan {
            // What an earlier run has left.
            empty_at: Some(Instant::now()),
            shorten_at: None,
            held_up: None,
        };
        loop {
            let next = plan.empty_at.into_iter().chain(plan.shorten_at).min();
            let timer = next.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
            select! {
                recv(self.woken) -> _ => {}
                recv(timer) -> _ => {}
                recv(stop) -> _ => return,
            }
            let now = Instant::now();
            if self.wrote.load(Ordering::Relaxed) {
                // From the first write on, not the last: under steady traffic it is emptied too.
                plan.empty_at.get_or_insert(now + AGE);
            }
            if self.long.load(Ordering::Relaxed) {
                plan.shorten_at.get_or_insert(now);
            }
            if plan.shorten_at.is_some_and(|at| at <= now) {
                plan.shorten_at = self.shorten();
            }
            if plan.empty_at.is_some_and(|at| at <= now) {
                plan.empty_at = self.empty(&mut plan.held_up);
            }
        }
    }

    /// Has the next commit begin the log anew. Returns when to try again.
    fn shorten(&self) -> Option<Instant> {
        let reader = self.reader.lock();
        let moved = reader.checkpoint().and_then(|_| {
            // What was written meanwhile is little.
            let _commits = self.hold();
            reader.checkpoint()
        });
        match moved {
            Ok(true) => {
                self.long.store(false, Ordering::Relaxed);
                None
            }
            Ok(false) => Some(Instant::now() + BUSY_AND_LONG),
            Err(error) => {
                say_that_it_failed(&error);
                Some(Instant::now() + LONG)
            }
        }
    }

    /// Empties the log. Returns when to try again.
    fn empty(&self, held_up: &mut Option<HeldUp>) -> Option<Instant> {
        let reader = self.reader.lock();
        self.wrote.store(false, Ordering::Relaxed);
        let emptied = reader.checkpoint().and_then(|_| {
            let _commits = self.hold();
            reader.empty_log()
        });
        match emptied {
            Ok(true) => {
                *held_up = None;
                self.long.store(false, Ordering::Relaxed);
                None
            }
            Ok(false) => {
                log::debug!("somebody reads the store, its log is emptied later");
                self.warn_of_reader(held_up);
                Some(Instant::now() + BUSY)
            }
            Err(error) => {
                say_that_it_failed(&error);
                Some(Instant::now() + LONG)
            }
        }
    }

    /// Once, until the log has been emptied.
    fn warn_of_reader(&self, held_up: &mut Option<HeldUp>) {
        let now = Instant::now();
        let held_up = held_up.get_or_insert(HeldUp {
            since: now,
            warned: false,
        });
        let bytes = store::log_size(&self.database);
        if !held_up.warned && (now >= held_up.since + LONG || bytes > ORDINARY_LOG) {
            held_up.warned = true;
            log::warn!(
                bytes, file:% = self.database.display();
                "SQLite's log cannot be emptied while somebody else reads the store, keeps the payloads \
                 of finished exports, and counts against --max-store: end what has the file open"
            );
        }
    }
}

struct Plan {
    empty_at: Option<Instant>,
    shorten_at: Option<Instant>,
    held_up: Option<HeldUp>,
}

/// Somebody who reads the store keeps the log from being emptied.
struct HeldUp {
    since: Instant,
    warned: bool,
}

fn say_that_it_failed(error: &store::Error) {
    log::warn!(reason:% = error; "cannot empty the store's log");
}
