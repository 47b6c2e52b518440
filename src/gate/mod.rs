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

mod admission;
mod connection;
pub mod framing;
mod links;
mod memory;
mod permit;
pub mod tls;
mod wire;

use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::socket::is_timeout;
use crate::threads;
use crate::waits::Waits;
use admission::Admission;
pub use admission::Limits;
use links::Links;
use memory::Memory;
use permit::Common;
use tls::Identity;

/// How long accepting must have gone well to be called well.
const SETTLED: Duration = Duration::from_secs(10);
/// How long accepting pauses when it goes on failing. Each time a connection is evicted, so this is
/// also what gives those that have just come the time to send their request.
const PAUSE: Duration = Duration::from_millis(10);

/// Connections that are accepted before it is seen whether there is room for them.
const BATCH: usize = 64;
/// How often it is seen whether there is room for newcomers that stand in line.
const LOOK: Duration = Duration::from_millis(10);

/// The stack of a connection's thread, in bytes: a TLS handshake needs most.
const STACK: usize = 256 * 1024;
/// Connections that may wait to be accepted; a flood of them is soon over.
const BACKLOG: i32 = 1024;
/// Connections that may be accepted and stand in line, if there are descriptors enough. Beyond
/// that none is accepted, of whichever address.
const NEWCOMERS: u64 = 1024;
/// Descriptors for everything but connections that are served: the store, links, attempts, spares,
/// connections that are rejected.
const OTHER_DESCRIPTORS: u64 = 512 + admission::REJECTED as u64;

/// How connections are treated.
#[derive(Debug)]
pub struct Settings {
    /// How many there may be.
    pub limits: Limits,
    /// Bytes of large bodies and answers, of all connections together.
    pub memory: usize,
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
    /// Disconnected once nothing is accepted and no connection is left; nothing is ever sent.
    ended: Receiver<()>,
}

/// What connections share.
struct Shared {
    common: Arc<Common>,
    memory: Memory,
    links: Links,
    waits: Arc<Waits>,
    max_body: usize,
    identity: Option<Arc<Identity>>,
}

/// What the thread that accepts has.
struct Accepting {
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    admission: Admission,
    /// How many may stand in line.
    max_newcomers: usize,
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
        listener.set_nonblocking(true)?;
        let common = Common::new(Instant::now());
        let shared = Arc::new(Shared {
            common: common.clone(),
            memory: Memory::new(settings.memory),
            links: Links::open(inside)?,
            waits,
            max_body: settings.max_body,
            identity: settings.identity,
        });
        let listener = Arc::new(listener);
        let (open, ended) = bounded(0);
        let accepting = Accepting {
            listener: listener.clone(),
            shared: shared.clone(),
            admission: Admission::new(limits, common, open),
            max_newcomers,
        };
        threads::spawn("gate", move || accepting.run());
        Ok(Self {
            listener,
            shared,
            ended,
        })
    }

    /// Lets nobody in any more, begins no more requests, and closes all connections that have none.
    pub fn close(&self) {
        self.shared.common.close();
        // Wakes the thread in `accept`; where it fails, that thread ends with the process.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    /// Waits until the requests under way are answered and all connections have ended, until `deadline`
    /// at most. After it tiny_http may stop.
    pub fn drain(self, deadline: Instant) {
        let _ = self.ended.recv_deadline(deadline);
        self.shared.links.close();
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

impl Accepting {
    fn run(mut self) {
        let (mut last_failure, mut failures_in_a_row) = (None::<Instant>, 0);
        while !self.shared.common.is_closing() {
            // Not at the first that goes well: while something is lacking the two alternate.
            let is_over = |at: &mut Instant| at.elapsed() >= SETTLED;
            if last_failure.take_if(is_over).is_some() {
                log::info!("accepting connections again");
            }
            match self.welcome().and_then(|()| self.accept()) {
                Ok(()) => failures_in_a_row = 0,
                // It may be that it is closed.
                Err(_) if self.shared.common.is_closing() => {}
                // No more have come.
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
                        self.admission.evict_one();
                        self.shared.memory.wake();
                        thread::sleep(PAUSE);
                    }
                    failures_in_a_row += 1;
                }
            }
        }
        self.admission.close();
        self.shared.memory.wake();
    }

    /// Has the connections that have come stand in line, unless too many do. Blocks until one comes, but
    /// only for a moment while others stand there.
    fn accept(&mut self) -> io::Result<()> {
        let limit = match self.admission.newcomers() {
            0 => SETTLED,
            newcomers if newcomers < self.max_newcomers => LOOK,
            _ => {
                thread::sleep(LOOK);
                return Ok(());
            }
        };
        let mut listener = [PollFd::new(&*self.listener, PollFlags::IN)];
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut listener, Some(&limit)) {
            // A signal came to this thread.
            Err(Errno::INTR) => return Ok(()),
            polled => polled?,
        };
        // Several at once: for each time there is a look at all connections where they come as a crowd.
        for _ in 0..BATCH {
            if self.admission.newcomers() >= self.max_newcomers {
                break;
            }
            let (stream, client) = self.listener.accept()?;
            // An answer is written at once: nothing is gained by waiting for more of it.
            let _ = stream.set_nodelay(true);
            self.admission
                .line_up(Arc::new(stream), client, Instant::now());
        }
        Ok(())
    }

    /// Gives a permit and a thread to each newcomer that can have one now, and sees that there will be
    /// room for the others.
    ///
    /// # Errors
    /// Where there is no thread: that newcomer is in line again.
    fn welcome(&mut self) -> io::Result<()> {
        if self.admission.newcomers() == 0 {
            return Ok(());
        }
        self.admission.look();
        while let Some((permit, newcomer)) = self.admission.admit() {
            let (shared, socket) = (self.shared.clone(), newcomer.socket.clone());
            let client = newcomer.address;
            // With a name, as all threads of ours: a panic in it must not go unnoticed.
            let started = thread::Builder::new()
                .name("connection".into())
                .stack_size(STACK)
                .spawn(move || connection::run(&shared, permit, socket, client));
            if let Err(error) = started {
                self.admission.put_back(newcomer);
                let reason = format!("no thread for a connection: {error}");
                return Err(io::Error::other(reason));
            }
        }
        if self.admission.make_room(Instant::now()) {
            self.shared.memory.wake();
        }
        Ok(())
    }
}
