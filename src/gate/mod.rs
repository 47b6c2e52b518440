//! What stands between the network and tiny_http, which trusts its clients.
//!
//! A connection has a thread of its own with a small stack. It reads one whole request, bounded and
//! under deadlines, sends it on in one spelling over a link to tiny_http's private socket, waits for the
//! answer in `waits`, and writes that to the client. So tiny_http sees only whole and well-formed
//! requests, one at a time on each link, and whoever answers never waits for a slow client.
//!
//! What tiny_http 0.12 does to a server that lets clients at it, each seen, none to be mended from a
//! handler, and tested in `tests/hostile.rs`:
//!
//! - A body that nobody reads is read when its request is dropped, into as much memory as its length
//!   announces: a large number occupies a thread for as long, a huge one aborts the process.
//! - A header line may be of any length, and is kept.
//! - After one failed `accept`, or one thread that could not be started, it never accepts again.
//! - It sets no timeouts: an idle connection costs a thread, and a slow body one of those who answer.
//! - Of many connections at once it may forget some, as it miscounts its idle threads.
//! - A client that resets its connection makes one of its threads panic.
//! - Pipelined requests can stop everybody who answers, and its queue of requests has no bound.
//! - A length that is no number counts as none, so that the body is read as the next request; and any
//!   `Transfer-Encoding` counts as chunked.
//! - TLS handshakes are made on the thread that accepts, with a rustls that spins on an early
//!   close_notify (RUSTSEC-2024-0336).
//! - It leaves Nagle's algorithm on, which costs 40 ms for each larger answer on a kept connection, and
//!   panics at a weight of NaN in `TE`.
//!
//! Not here: what a request asks for and whether it may (`routes`).

mod connection;
pub mod framing;
mod links;
pub mod slots;
pub mod tls;
mod wire;

use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::socket::is_timeout;
use crate::threads::{self, Thread};
use crate::waits::Waits;
use links::Links;
use slots::{Limits, Slots};
use tls::Identity;

/// How long accepting must have gone well to be called well.
const SETTLED: Duration = Duration::from_secs(10);
/// How long accepting pauses when it goes on failing. Each time a connection is closed, so this is
/// also what gives those that have just come the time to send their request.
const PAUSE: Duration = Duration::from_millis(10);

/// How often it is seen whether newcomers that wait for a slot can have one.
const LOOK: Duration = Duration::from_millis(10);

/// The stack of a connection's thread, in bytes: a TLS handshake needs most.
const STACK: usize = 256 * 1024;
/// Connections that may wait to be accepted; a flood of them is soon over.
const BACKLOG: i32 = 1024;
/// Connections that may be accepted and wait for a slot, if there are descriptors enough. Beyond
/// that none is accepted, of whichever address.
const NEWCOMERS: u64 = 1024;
/// Descriptors for everything but connections that have a place: the store, links, attempts, spares,
/// connections without a place.
const OTHER_DESCRIPTORS: u64 = 512 + slots::BESIDE as u64;

/// How connections are treated.
#[derive(Debug)]
pub struct Settings {
    /// How many there may be.
    pub limits: Limits,
    /// The largest request body in bytes.
    pub max_body: usize,
    /// The certificate; without one it is plain HTTP.
    pub identity: Option<Arc<Identity>>,
}

impl Settings {
    /// What URLs of this service begin with.
    pub fn scheme(&self) -> &'static str {
        match self.identity {
            Some(_) => "https",
            None => "http",
        }
    }
}

/// A listener and its connections.
pub struct Gate {
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    accepting: Thread,
}

struct Shared {
    slots: Arc<Slots>,
    /// How many may wait for a slot.
    max_newcomers: usize,
    links: Links,
    waits: Arc<Waits>,
    max_body: usize,
    identity: Option<Arc<Identity>>,
}

impl Gate {
    /// Lets connections in, and passes their requests on to the tiny_http that listens at `inside`. They
    /// are answered through `waits`.
    ///
    /// # Errors
    /// Where tiny_http is not there, or the listener is of no use.
    pub fn open(
        listener: TcpListener,
        inside: &Path,
        waits: Arc<Waits>,
        settings: Settings,
    ) -> io::Result<Self> {
        let mut limits = settings.limits;
        let (connections, max_newcomers) = possible_connections(limits.connections);
        limits.connections = connections;
        rustix::net::listen(&listener, BACKLOG)?;
        let shared = Arc::new(Shared {
            slots: Slots::new(limits),
            max_newcomers,
            links: Links::open(inside)?,
            waits,
            max_body: settings.max_body,
            identity: settings.identity,
        });
        let listener = Arc::new(listener);
        let (incoming, welcoming) = (listener.clone(), shared.clone());
        let accepting = threads::spawn("gate", move || welcoming.accept_all(&incoming));
        Ok(Self {
            listener,
            shared,
            accepting,
        })
    }

    /// Lets nobody in any more, and closes all connections that have no whole request.
    pub fn close(&self) {
        // First, since tiny_http stops after this.
        self.shared.links.close();
        self.shared.slots.close();
        // Wakes the thread in `accept`; where it fails, that thread ends with the process.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    /// Waits until the requests under way are answered, for so long at most.
    pub fn drain(self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.accepting.ends_within(limit);
        self.shared.slots.wait_until_free(deadline);
    }
}

/// How many connections there can be with the descriptors that the process may have, after it
/// has asked for as many as it needs, and how many newcomers beside them.
fn possible_connections(wanted: usize) -> (usize, usize) {
    let needed = wanted as u64 + OTHER_DESCRIPTORS;
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX).min(needed + NEWCOMERS);
    let mut current = limit.current.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: Some(most),
        maximum: limit.maximum,
    };
    if current < most && setrlimit(Resource::Nofile, raised).is_ok() {
        current = most;
    }
    let to_usize = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    if current >= needed {
        let left = (current - needed).clamp(1, NEWCOMERS);
        return (wanted, to_usize(left));
    }
    let possible = current.saturating_sub(OTHER_DESCRIPTORS).max(1);
    log::warn!(
        possible, wanted, descriptors = current;
        "fewer connections than --max-connections: raise the limit of open files (ulimit -n)"
    );
    (to_usize(possible), 1)
}

impl Shared {
    fn accept_all(self: &Arc<Self>, listener: &TcpListener) {
        let (mut last_failure, mut failures_in_a_row) = (None::<Instant>, 0);
        loop {
            // Not at the first that goes well: while something is lacking the two alternate.
            let is_over = |at: &mut Instant| at.elapsed() >= SETTLED;
            if last_failure.take_if(is_over).is_some() {
                log::info!("accepting connections again");
            }
            match self.welcome().and_then(|()| self.accept(listener)) {
                Ok(()) => failures_in_a_row = 0,
                Err(_) if self.slots.is_closing() => return,
                // None came.
                Err(error) if is_timeout(&error) => failures_in_a_row = 0,
                // The client has gone before its turn came.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if last_failure.replace(Instant::now()).is_none() {
                        log::error!(
                            reason:% = error;
                            "cannot accept connections: trying again, and closing some if it lasts"
                        );
                    }
                    // Descriptors, threads or memory are lacking, perhaps for a moment only.
                    if failures_in_a_row > 0 {
                        self.slots.evict_one();
                        thread::sleep(PAUSE);
                    }
                    failures_in_a_row += 1;
                }
            }
        }
    }

    /// Has the next connection stand in line, unless too many do. Blocks until one comes, but only
    /// for a moment while others stand there.
    fn accept(&self, listener: &TcpListener) -> io::Result<()> {
        let limit = match self.slots.newcomers() {
            0 => SETTLED,
            newcomers if newcomers < self.max_newcomers => LOOK,
            _ => {
                thread::sleep(LOOK);
                return Ok(());
            }
        };
        set_socket_timeout(listener, Timeout::Recv, Some(limit))?;
        let (stream, client) = listener.accept()?;
        // An answer is written at once: nothing is gained by waiting for more of it.
        let _ = stream.set_nodelay(true);
        self.slots.line_up(Arc::new(stream), client);
        Ok(())
    }

    /// Gives a slot and a thread to each newcomer that can have a slot now.
    ///
    /// # Errors
    /// Where there is no thread: that newcomer is in line again.
    fn welcome(self: &Arc<Self>) -> io::Result<()> {
        while let Some((slot, stream, client)) = self.slots.admit(Instant::now()) {
            let (shared, socket) = (self.clone(), stream.clone());
            // With a name, as all threads of ours: a panic in it must not go unnoticed.
            thread::Builder::new()
                .name("connection".into())
                .stack_size(STACK)
                .spawn(move || connection::run(&shared, slot, socket, client))
                .inspect_err(|_| self.slots.line_up(stream, client))
                .map_err(|error| {
                    io::Error::other(format!("no thread for a connection: {error}"))
                })?;
        }
        Ok(())
    }
}
