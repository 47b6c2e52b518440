//! What stands between the network and tiny_http, which trusts its clients.
//!
//! A connection has a thread of its own with a small stack. It reads one whole request, bounded and
//! under deadlines, sends it on in one spelling over a link to tiny_http's private socket, reads the
//! whole answer, and writes that to the client. So tiny_http sees only whole and well-formed
//! requests, one at a time on each link, and whoever answers there never waits for a slow client.
//!
//! Not here: what a request asks for and whether it may (`routes`).

pub mod framing;
mod links;
pub mod slots;
pub mod tls;
mod wire;

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use ureq::http::StatusCode;

use crate::logging;
use crate::routes::{self, Refusal};
use crate::threads::{self, Thread};
use framing::{Framer, Phase, Request};
use links::{Links, is_timeout};
use slots::{Limits, Slot, Slots};
use tls::Identity;
use wire::{Socket, Wire};

/// How long a client may take for its TLS handshake, and for a head from its first byte.
const HEAD: Duration = Duration::from_secs(10);
/// How long it may take for a body, from the end of the head.
const BODY: Duration = Duration::from_secs(30);
/// How long it may be idle before a request.
const IDLE: Duration = Duration::from_secs(60);
/// How long it may take to read an answer.
const ANSWER: Duration = Duration::from_secs(30);
/// How old a connection may become: then it is closed after an answer, or when it is idle.
const LIFE: Duration = Duration::from_secs(60 * 60);
/// How long a handshake may take of one that is let in only to be turned away.
const TURNING_AWAY: Duration = Duration::from_secs(2);
/// How long a client has to read the last answer before the connection is gone. Closing at once
/// with something unread would take the answer away from it.
const LINGER: Duration = Duration::from_secs(2);
/// How long a connection that was closed to make room has for each step to its end.
const HURRY: Duration = Duration::from_millis(100);
/// How often links that nobody uses any more are looked for, and how long accepting must have gone
/// well to be called well.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
/// How long accepting pauses when it goes on failing. Each time a connection is closed, so this is
/// also what gives those that have just come the time to send their request.
const PAUSE: Duration = Duration::from_millis(10);

/// How often it is seen whether newcomers that wait for a slot can have one.
const LOOK: Duration = Duration::from_millis(10);

/// Bodies and answers up to this many bytes are not counted: all connections together have room
/// for theirs.
const SMALL: usize = 16 * 1024;
/// The stack of a connection's thread, in bytes: a TLS handshake needs most.
const STACK: usize = 256 * 1024;
/// Connections that may wait to be accepted; a flood of them is soon over.
const BACKLOG: i32 = 1024;
/// Connections that may be accepted and wait for a slot, if there are descriptors enough. Beyond
/// that none is accepted, of whichever address.
const NEWCOMERS: u64 = 1024;
/// Descriptors that a connection needs with its link: the client's, ours to tiny_http, two there.
const DESCRIPTORS: u64 = 4;
/// Descriptors for everything else: the store, attempts, spares, connections without a place.
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
    max_body: usize,
    identity: Option<Arc<Identity>>,
}

impl Gate {
    /// Lets connections in, and passes their requests on to the tiny_http that listens at `inside`.
    ///
    /// # Errors
    /// Where tiny_http is not there, or the listener is of no use.
    pub fn open(listener: TcpListener, inside: PathBuf, settings: Settings) -> io::Result<Self> {
        let mut limits = settings.limits;
        let (connections, max_newcomers) = possible_connections(limits.connections);
        limits.connections = connections;
        rustix::net::listen(&listener, BACKLOG)?;
        let shared = Arc::new(Shared {
            slots: Slots::new(limits),
            max_newcomers,
            links: Links::open(inside)?,
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
    let needed = wanted as u64 * DESCRIPTORS + OTHER_DESCRIPTORS;
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
    let possible = (current.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS).max(1);
    log::warn!(
        possible, wanted, descriptors = current;
        "fewer connections than --max-connections: raise the limit of open files (ulimit -n)"
    );
    (to_usize(possible), 1)
}

impl Shared {
    fn accept_all(self: &Arc<Self>, listener: &TcpListener) {
        let mut last_look = Instant::now();
        let (mut last_failure, mut failures_in_a_row) = (None::<Instant>, 0);
        loop {
            if last_look.elapsed() >= HOUSEKEEPING {
                self.links.close_unused();
                last_look = Instant::now();
            }
            // Not at the first that goes well: while something is lacking the two alternate.
            let is_over = |at: &mut Instant| at.elapsed() >= HOUSEKEEPING;
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
                    // Descriptors, threads or memory are lacking. Perhaps that is over at once: to
                    // open a link, more is taken for a moment than is needed.
                    drop(self.links.hold_opening());
                    self.links.close_idle();
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
            0 => HOUSEKEEPING,
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
            let _opening = self.links.hold_opening();
            // With a name, as all threads of ours: a panic in it must not go unnoticed.
            thread::Builder::new()
                .name("connection".into())
                .stack_size(STACK)
                .spawn(move || shared.serve(slot, socket, client))
                .inspect_err(|_| self.slots.line_up(stream, client))
                .map_err(|error| {
                    io::Error::other(format!("no thread for a connection: {error}"))
                })?;
        }
        Ok(())
    }

    /// The whole life of a connection.
    fn serve(&self, mut slot: Slot, stream: Arc<TcpStream>, client: SocketAddr) {
        let born = Instant::now();
        // Until now nothing could be read from it.
        slot.begin();
        let handshake = if slot.is_turned_away() {
            TURNING_AWAY
        } else {
            HEAD
        };
        let socket = Socket::new(stream, born + handshake);
        let config = self.identity.as_ref().map(|identity| identity.config());
        let (wire, failed) = match Wire::accept(socket, config, || slot.begin_handshake()) {
            Ok(wire) => (wire, None),
            Err((wire, error)) => (wire, Some(error)),
        };
        let mut connection = Connection {
            shared: self,
            slot,
            wire,
            framer: Framer::new(self.max_body),
            client,
            life: born + LIFE,
        };
        match failed {
            // It need not send what is not going to be read.
            None if connection.slot.is_turned_away() => connection.refuse(None, &Refusal::Busy),
            None => connection.serve(),
            Some(error) if error.kind() == ErrorKind::InvalidInput => {
                connection.refuse(
                    None,
                    &Refusal::BadRequest("this port speaks TLS: use https://"),
                );
            }
            Some(error) => logging::of_clients(|| {
                log::info!(client:% = client, reason:% = error; "TLS handshake failed");
            }),
        }
    }
}

struct Connection<'a> {
    shared: &'a Shared,
    slot: Slot,
    wire: Wire,
    framer: Framer,
    client: SocketAddr,
    /// When it is to end, after the answer to its last request.
    life: Instant,
}

/// Why a connection ends.
enum End {
    /// There is nobody to tell: the client left, was idle for too long, or was closed.
    Silent,
    /// The client is told.
    Refused(Refusal),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<slots::Evicted> for Refusal {
    fn from(_: slots::Evicted) -> Self {
        Self::Busy
    }
}

impl Connection<'_> {
    fn serve(&mut self) {
        loop {
            let mut request = match self.read() {
                Ok(request) => request,
                Err(End::Silent) => return self.end(),
                Err(End::Refused(refusal)) => return self.refuse(None, &refusal),
            };
            let mut answer = match self.pass_on(&mut request) {
                Ok(answer) => answer,
                Err(refusal) => return self.refuse(Some(&request), &refusal),
            };
            let stays =
                self.slot.wait().is_ok() && request.keeps_alive() && Instant::now() < self.life;
            match (stays, request.is_old()) {
                (true, false) => {}
                (true, true) => add_header(&mut answer, "Connection: keep-alive\r\n"),
                (false, _) => add_header(&mut answer, "Connection: close\r\n"),
            }
            let written = self.write(&answer);
            if written.is_err() || !stays {
                drop(answer);
                return self.linger();
            }
        }
    }

    /// Reads the next whole request.
    fn read(&mut self) -> Result<Request, End> {
        let mut seen = Phase::Idle;
        let mut hurried = false;
        self.set_deadline(IDLE.min(self.life.saturating_duration_since(Instant::now())));
        loop {
            if let Some(request) = self.framer.take()? {
                return Ok(request);
            }
            let phase = self.framer.phase();
            if phase != seen {
                match phase {
                    Phase::Idle => {}
                    Phase::Head => {
                        self.set_deadline(HEAD);
                    }
                    Phase::Body(bytes) => {
                        let deadline = self.set_deadline(BODY);
                        if bytes > SMALL {
                            self.slot.keep(bytes, deadline).map_err(Refusal::from)?;
                        }
                        if self.framer.takes_continue() {
                            // Cut off or not, there is one more thing to send.
                            let _ = self.slot.wait();
                            let leave = self.wire.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
                            leave
                                .and_then(|()| self.wire.flush())
                                .map_err(|_| End::Silent)?;
                            self.slot.listen();
                        }
                    }
                }
                seen = phase;
            }
            // What has arrived may still be a whole request, but not for ever.
            if self.slot.is_cut_off() && !hurried {
                hurried = true;
                self.set_deadline(HURRY);
            }
            match (self.framer.read_from(&mut self.wire), &seen) {
                (Ok(0) | Err(_), Phase::Head | Phase::Body(_)) if self.slot.is_cut_off() => {
                    return Err(Refusal::Busy.into());
                }
                (Ok(0), Phase::Body(_)) => return Err(Refusal::Incomplete.into()),
                (Ok(0), _) => return Err(End::Silent),
                (Ok(_), _) => {}
                (Err(error), Phase::Head | Phase::Body(_))
                    if error.kind() == ErrorKind::TimedOut =>
                {
                    return Err(Refusal::Slow.into());
                }
                (Err(_), _) => return Err(End::Silent),
            }
        }
    }

    /// Has a request answered by the service.
    fn pass_on(&mut self, request: &mut Request) -> Result<Vec<u8>, Refusal> {
        let head = request.normalised_head(self.client);
        let body = request.take_body();
        self.slot.serve()?;
        let mut link = self.shared.links.take().map_err(|error| {
            log::warn!(reason:% = error; "no connection to tiny_http: it will be tried again");
            Refusal::Busy
        })?;
        let sent = link.send(head, body);
        // A long poll is not to keep the memory of what it has sent.
        self.slot.release();
        match sent.and_then(|()| link.answer(request.method() == "HEAD")) {
            Ok(answer) => {
                self.shared.links.give_back(link);
                Ok(answer)
            }
            Err(error) => {
                log::warn!(reason:% = error; "a request was not answered");
                drop(link);
                self.shared.links.prove();
                Err(Refusal::Unanswered)
            }
        }
    }

    fn write(&mut self, answer: &[u8]) -> io::Result<()> {
        if answer.len() > SMALL {
            self.slot.keep_anyway(answer.len());
        }
        self.set_deadline(ANSWER);
        self.wire.write_all(answer)?;
        self.wire.flush()?;
        self.slot.release();
        self.slot.listen();
        Ok(())
    }

    fn refuse(&mut self, request: Option<&Request>, refusal: &Refusal) {
        let (method, target) =
            request.map_or(("-", "-"), |request| (request.method(), request.target()));
        let head_only = request.map_or(self.framer.is_head(), |_| method == "HEAD");
        let refusal = match refusal {
            // What is closed then is not closed to make room.
            Refusal::Busy if self.shared.slots.is_closing() => &Refusal::Stopping,
            refusal => refusal,
        };
        let client = self.client.to_string();
        logging::refused(method, target, refusal.status(), refusal, &client);
        // What it has sent is of no use any more, and is not to be kept while it lingers.
        self.framer = Framer::new(self.shared.max_body);
        // Where one of these fails the client or the service has gone: there is nobody to tell.
        let _ = self.slot.wait();
        let _ = self.write(&refused(refusal, head_only));
        self.linger();
    }

    fn end(&mut self) {
        self.set_deadline(LINGER);
        self.wire.end();
    }

    /// Ends it and waits until the client has closed its side too, for a moment.
    fn linger(&mut self) {
        self.end();
        let mut unread = [0; 1024];
        while self
            .wire
            .socket()
            .read(&mut unread)
            .is_ok_and(|read| read > 0)
        {}
    }

    /// Gives the client so long from now for what comes next, or less where others wait for this
    /// connection to be gone.
    fn set_deadline(&mut self, time: Duration) -> Instant {
        let time = if self.slot.is_leaving() {
            time.min(HURRY)
        } else {
            time
        };
        let deadline = Instant::now() + time;
        self.wire.set_deadline(deadline);
        deadline
    }
}

/// Puts a header at the beginning of an answer.
fn add_header(answer: &mut Vec<u8>, header: &str) {
    let status_line = answer.windows(2).position(|bytes| bytes == b"\r\n");
    let at = status_line.map_or(answer.len(), |end| end + 2);
    answer.splice(at..at, header.bytes());
}

/// A refusal as it is written to the client, the last thing on its connection. To a HEAD it has no
/// body, but the length that there would be (RFC 9110, section 9.3.2).
fn refused(refusal: &Refusal, head_only: bool) -> Vec<u8> {
    let response = routes::refusal(refusal);
    let reason = StatusCode::from_u16(response.status)
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or_default();
    let mut text = format!(
        "HTTP/1.1 {} {reason}\r\nServer: export-service\r\nDate: {}\r\nConnection: close\r\n",
        response.status,
        httpdate::fmt_http_date(SystemTime::now()),
    );
    for (name, value) in &response.headers {
        // Writing to a String cannot fail.
        let _ = write!(text, "{name}: {value}\r\n");
    }
    let body = if head_only { "" } else { &response.body };
    let _ = write!(
        text,
        "Content-Length: {}\r\n\r\n{body}",
        response.body.len()
    );
    text.into_bytes()
}
