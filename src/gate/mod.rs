//! Protects tiny_http, which trusts its clients, from the network.
//!
//! Each connection has a thread with a small stack. It reads one whole request, bounded and under
//! deadlines, rewrites it in one canonical form, and sends it over a link to tiny_http's private socket.
//! It waits for the answer in `waits`, and writes that to the client. So tiny_http sees only whole and
//! well-formed requests, one at a time on each link, and no answering thread waits for a slow client.
//!
//! The owner's port is a gate as well. Its requests are served on the connections' own threads, without
//! tiny_http.
//!
//! The faults of tiny_http 0.12 when it is exposed to clients. All were reproduced, none can be prevented
//! in a handler, and `tests/hostile.rs` tests that they cannot be reached:
//!
//! - A body that the handler does not read is read when its request is dropped, into as much memory as its
//!   length announces. A large length occupies a thread, a huge one aborts the process.
//! - A header line may have any length, and is held in memory.
//! - After one failed `accept` or thread start, it never accepts again.
//! - It sets no timeouts: an idle connection costs a thread, and a slow body one of the pool's.
//! - If many connections arrive at once it may never serve some, as it miscounts its idle threads.
//! - A client that resets its connection makes one of its threads panic.
//! - Pipelined requests can block the whole pool, and its queue of requests is unbounded.
//! - A `Content-Length` that is not a number counts as none, so that the body is read as the next request;
//!   and any `Transfer-Encoding` counts as chunked.
//! - TLS handshakes run on the thread that accepts, with a rustls that spins on an early close_notify
//!   (RUSTSEC-2024-0336).
//! - It leaves Nagle's algorithm on, which costs 40 ms for each larger answer on a persistent connection.
//! - It panics at a weight of NaN in `TE`.
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
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::answer::Response;
use crate::metrics::Metrics;
use crate::socket::is_timeout;
use crate::threads;
use crate::waits::Waits;
use admission::Admission;
pub use admission::Limits;
pub use connection::to_bytes;
use framing::{Framer, Request};
use links::Links;
use memory::Memory;
use permit::Common;
use tls::Identity;

/// How long accepting must work without a failure before it is logged as working again.
const STEADY: Duration = Duration::from_secs(10);
/// The pause after repeated failures to accept. A connection is evicted each time, so this also gives new
/// ones the time to send their request.
const PAUSE: Duration = Duration::from_millis(10);

/// Connections that are accepted before the next look at whether there is room for them.
const BATCH: usize = 64;
/// How often to look whether there is room for newcomers in line.
const LOOK: Duration = Duration::from_millis(10);

/// The stack of a connection's thread, in bytes: a TLS handshake needs most.
const STACK: usize = 256 * 1024;
/// The listener's backlog: connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Accepted connections that may stand in line, if there are enough descriptors. Beyond that none is
/// accepted from any address.
const NEWCOMERS: u64 = 1024;
/// Descriptors for everything except admitted connections: the store, links, attempts, rejected
/// connections, and a reserve.
const OTHER_DESCRIPTORS: u64 = 512 + admission::REJECTED as u64;

/// Serves a request of the client at this address. May block. It runs on the connection's own thread, which
/// has a small stack, 256 KiB.
pub type Handler = Arc<dyn Fn(&Request, SocketAddr) -> Response + Send + Sync>;

/// By whom the requests of a listener are served.
pub enum Serve<'a> {
    /// By the tiny_http that listens on this socket and answers through `waits`. A part of the process's file
    /// descriptors is kept for other things, and only the rest is for connections.
    Pool(&'a Path, Arc<Waits>),
    /// By a function, on the connections' own threads. Of the headers only those of
    /// [`Framer::of_owner`] are there. The gate's own refusals have these headers too.
    Here(Handler, &'static [(&'static str, &'static str)]),
}

/// [`Serve`], for the connections.
enum Service {
    Pool(Links, Arc<Waits>),
    Here(Handler),
}

/// The limits and the certificate of a listener.
#[derive(Debug)]
pub struct Settings {
    /// How many connections there may be.
    pub limits: Limits,
    /// Bytes that the large bodies and answers of all connections may take together.
    pub memory: usize,
    /// The largest request body in bytes.
    pub max_body: usize,
    /// The certificate. None means plain HTTP.
    pub identity: Option<Arc<Identity>>,
}

impl Settings {
    /// The scheme of this service's URLs.
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
    /// Disconnected once nothing is accepted and no connection is left. Nothing is ever sent.
    ended: Receiver<()>,
}

/// Shared by all connections.
struct Shared {
    common: Arc<Common>,
    memory: Memory,
    service: Service,
    /// Added to the gate's own refusals.
    refusal_headers: &'static [(&'static str, &'static str)],
    max_body: usize,
    identity: Option<Arc<Identity>>,
    metrics: Arc<Metrics>,
}

impl Shared {
    /// A framer for a new connection.
    fn framer(&self) -> Framer {
        match self.service {
            Service::Pool(..) => Framer::new(self.max_body),
            Service::Here(_) => Framer::of_owner(self.max_body),
        }
    }
}

/// The state of the thread that accepts.
struct Accepting {
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    admission: Admission,
    /// How many newcomers may stand in line.
    max_newcomers: usize,
}

impl Gate {
    /// Starts to accept connections, and has their requests served. Counts connections and refused requests
    /// in `metrics`.
    ///
    /// # Errors
    /// tiny_http does not answer, or the listener cannot be used.
    pub fn open(
        listener: TcpListener,
        serve: Serve<'_>,
        settings: Settings,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        let mut limits = settings.limits;
        let (connections, max_newcomers) = match serve {
            Serve::Pool(..) => possible_connections(limits.connections),
            // Few: they come out of what is kept for other things.
            Serve::Here(..) => (limits.connections, limits.connections),
        };
        limits.connections = connections;
        let (service, refusal_headers) = match serve {
            Serve::Pool(socket, waits) => (Service::Pool(Links::open(socket)?, waits), &[][..]),
            Serve::Here(handler, headers) => (Service::Here(handler), headers),
        };
        rustix::net::listen(&listener, BACKLOG)?;
        listener.set_nonblocking(true)?;
        let common = Common::new(Instant::now());
        let shared = Arc::new(Shared {
            common: common.clone(),
            memory: Memory::new(settings.memory),
            service,
            refusal_headers,
            max_body: settings.max_body,
            identity: settings.identity,
            metrics,
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

    /// Accepts no more connections, serves no more requests, and closes all connections without one. Does
    /// not block.
    pub fn close(&self) {
        self.shared.common.close();
        // Wakes the thread in `accept`. If this fails, that thread ends with the process.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }

    /// Waits until all requests are answered and all connections have ended, but not beyond `deadline`.
    /// tiny_http may stop after that.
    pub fn drain(self, deadline: Instant) {
        let _ = self.ended.recv_deadline(deadline);
        if let Service::Pool(links, _) = &self.shared.service {
            links.close();
        }
    }
}

/// How many connections, and how many newcomers besides, the limit of open files allows. Raises that limit
/// first, as far as it is needed and allowed.
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
            // Not at the first success: while resources are short, successes and failures alternate.
            let is_over = |at: &mut Instant| at.elapsed() >= STEADY;
            if last_failure.take_if(is_over).is_some() {
                log::info!("accepting connections again");
            }
            match self.welcome().and_then(|()| self.accept()) {
                Ok(()) => failures_in_a_row = 0,
                // The listener was closed.
                Err(_) if self.shared.common.is_closing() => {}
                // No more are waiting.
                Err(error) if is_timeout(&error) => failures_in_a_row = 0,
                // The client left before it was accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if last_failure.replace(Instant::now()).is_none() {
                        log::error!(
                            reason:% = error;
                            "cannot accept connections: trying again, and closing some if it lasts"
                        );
                    }
                    // Descriptors, threads or memory are short, perhaps only for a moment.
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

    /// Accepts connections and puts them in line, unless too many are there. Blocks until one arrives, but
    /// only briefly while others stand in line.
    fn accept(&mut self) -> io::Result<()> {
        let limit = match self.admission.newcomers() {
            0 => STEADY,
            newcomers if newcomers < self.max_newcomers => LOOK,
            _ => {
                thread::sleep(LOOK);
                return Ok(());
            }
        };
        let mut listener = [PollFd::new(&*self.listener, PollFlags::IN)];
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        match poll(&mut listener, Some(&limit)) {
            // A signal interrupted this thread.
            Err(Errno::INTR) => return Ok(()),
            polled => polled?,
        };
        // Several at once, because after each batch all connections are looked at.
        for _ in 0..BATCH {
            if self.admission.newcomers() >= self.max_newcomers {
                break;
            }
            let (stream, client) = self.listener.accept()?;
            // An answer is written in one piece: delaying it for more gains nothing.
            let _ = stream.set_nodelay(true);
            self.admission
                .line_up(Arc::new(stream), client, Instant::now());
        }
        Ok(())
    }

    /// Gives a permit and a thread to each newcomer that there is room for, and evicts connections to make
    /// room for the others.
    ///
    /// # Errors
    /// No thread could be started. That newcomer is in line again.
    fn welcome(&mut self) -> io::Result<()> {
        if self.admission.newcomers() == 0 {
            return Ok(());
        }
        self.admission.look();
        while let Some((permit, newcomer)) = self.admission.admit() {
            let (shared, socket) = (self.shared.clone(), newcomer.socket.clone());
            let client = newcomer.address;
            // Threads of ours have a name: a panic in one ends the process.
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
