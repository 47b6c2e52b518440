//! The whole life of a connection: the handshake, its requests with their answers one after the other, and
//! its end.
//!
//! Not here: which connection is evicted to make room for another ([`super::admission`]), and what a
//! request is ([`super::framing`]).

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ureq::http::StatusCode;

use super::framing::{Framer, Phase, Request};
use super::links::Links;
use super::memory::{Refused, Reservation};
use super::permit::{Closing, Permit};
use super::wire::Wire;
use super::{Handler, Service, Shared};
use crate::answer::{self, Refusal, Response};
use crate::logging;
use crate::socket::Socket;
use crate::waits::Wait;

/// How long a client may take for its TLS handshake, and for a head, from its first byte.
const HEAD: Duration = Duration::from_secs(10);
/// How long it may take for a body, from the end of the head.
const BODY: Duration = Duration::from_secs(30);
/// How long it may be idle before a request.
const IDLE: Duration = Duration::from_secs(60);
/// How long it may take to read an answer.
const ANSWER: Duration = Duration::from_secs(30);
/// How old a connection may become. Then it is closed after an answer, or when it is idle.
const LIFE: Duration = Duration::from_secs(60 * 60);
/// How long a client has to read the last answer before the socket is closed. Closing at once, with
/// something unread, would reset the connection and could destroy the answer.
const LINGER: Duration = Duration::from_secs(2);
/// How long each remaining step of an evicted connection may take, and lingering while the service stops.
const HURRY: Duration = Duration::from_millis(100);
/// Bodies and answers of up to this many bytes are not counted: there is memory for one of these for each
/// connection.
const SMALL: usize = 16 * 1024;
/// How long a handshake may take on a connection that is only going to be rejected.
const REJECTION: Duration = Duration::from_secs(2);
/// How long the service may take to answer. A long poll takes at most a minute, a commit on a bad SD card
/// seconds.
const SERVICE: Duration = Duration::from_secs(120);
/// How often a connection that waits for an answer checks that its client is still there.
const LOOK: Duration = Duration::from_millis(1500);

/// Serves a connection until it ends.
pub fn run(shared: &Shared, permit: Permit, stream: Arc<TcpStream>, client: SocketAddr) {
    let born = Instant::now();
    let _connected = shared.metrics.connections.enter();
    // Its time begins only now, as its thread could not read before.
    permit.begin(born);
    let handshake = if permit.is_rejected() {
        REJECTION
    } else {
        HEAD
    };
    let socket = Socket::new(stream, born + handshake);
    let config = shared.identity.as_ref().map(|identity| identity.config());
    let begun = || permit.begin_handshake(Instant::now());
    let (wire, failed) = match Wire::accept(socket, config, begun) {
        Ok(wire) => (wire, None),
        Err((wire, error)) => (wire, Some(error)),
    };
    let mut connection = Connection {
        shared,
        wire,
        framer: shared.framer(),
        service: match &shared.service {
            Service::Pool(links, waits) => Serving::Pool(links, waits.enter(client)),
            Service::Here(handler) => Serving::Here(handler),
        },
        client,
        life: born + LIFE,
        memory: shared.memory.part(&permit),
        permit,
    };
    match failed {
        // Before its request: that would not be read.
        None if connection.permit.is_rejected() => connection.refuse(None, &Refusal::Busy),
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

struct Connection<'a> {
    shared: &'a Shared,
    wire: Wire,
    framer: Framer,
    service: Serving<'a>,
    client: SocketAddr,
    /// When it is to end; a request that is being answered then is the last.
    life: Instant,
    memory: Reservation<'a>,
    /// Dropped last, when the descriptor and the memory are free for the next connection.
    permit: Permit,
}

/// By whom a connection's requests are served.
enum Serving<'a> {
    /// By the pool, which answers through the second.
    Pool(&'a Links, Wait),
    /// On the connection's own thread.
    Here(&'a Handler),
}

/// Why a connection ends.
enum End {
    /// No answer: the client left, was idle for too long, or was closed.
    Silent,
    /// The client is told why.
    Refused(Refusal),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Refused> for Refusal {
    fn from(_: Refused) -> Self {
        Self::Busy
    }
}

impl From<Closing> for Refusal {
    fn from(_: Closing) -> Self {
        Self::Stopping
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
            let response = match self.answer(&mut request) {
                Ok(response) => response,
                Err(End::Silent) => return self.end(),
                Err(End::Refused(refusal)) => return self.refuse(Some(&request), &refusal),
            };
            let now = Instant::now();
            let stays = self.permit.send(now) && request.keeps_alive() && now < self.life;
            let persistence = match (stays, request.is_old()) {
                (true, false) => "",
                (true, true) => "Connection: keep-alive\r\n",
                (false, _) => "Connection: close\r\n",
            };
            let head_only = request.method() == "HEAD";
            let written = self.write(response, persistence, head_only);
            if written.is_err() || !stays {
                return self.linger();
            }
        }
    }

    /// Reads the next whole request.
    fn read(&mut self) -> Result<Request, End> {
        let mut seen = Phase::Idle;
        let mut hurried = false;
        let mut deadline =
            self.set_deadline(IDLE.min(self.life.saturating_duration_since(Instant::now())));
        loop {
            if let Some(request) = self.framer.take()? {
                return Ok(request);
            }
            let phase = self.framer.phase();
            if phase != seen {
                match (&phase, &seen) {
                    (Phase::Head, _) => deadline = self.set_deadline(HEAD),
                    (Phase::Body(_), Phase::Idle | Phase::Head) => {
                        deadline = self.set_deadline(BODY);
                    }
                    // A chunked body has grown: the deadline stays.
                    (Phase::Body(_), Phase::Body(_)) | (Phase::Idle, _) => {}
                }
                if let Phase::Body(bytes) = phase
                    && bytes > SMALL
                {
                    self.memory.grow(bytes, deadline).map_err(Refusal::from)?;
                }
                if self.framer.takes_continue() {
                    self.permit.send(Instant::now());
                    let leave = self.wire.write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
                    leave
                        .and_then(|()| self.wire.flush())
                        .map_err(|_| End::Silent)?;
                    self.permit.receive();
                }
                seen = phase;
            }
            // What has arrived may still be a whole request, which takes little time to read.
            if self.permit.is_evicted() && !hurried {
                hurried = true;
                self.set_deadline(HURRY);
            }
            match (self.framer.read_from(&mut self.wire), &seen) {
                (Ok(0) | Err(_), Phase::Head | Phase::Body(_)) if self.permit.is_evicted() => {
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

    /// Has the request served, and waits for its answer.
    fn answer(&mut self, request: &mut Request) -> Result<Response, End> {
        let _served = self.shared.metrics.connections_served.enter();
        let (links, wait) = match &self.service {
            Serving::Pool(links, wait) => (links, wait),
            Serving::Here(handler) => {
                self.permit.serve().map_err(Refusal::from)?;
                return Ok(handler(request, self.client));
            }
        };
        let head = request.normalised_head(wait.number());
        let body = request.take_body();
        self.permit.serve().map_err(Refusal::from)?;
        wait.ask();
        let sent = links.send(&head, &body);
        // A long poll must not hold memory for what it has sent.
        drop((head, body));
        self.memory.release();
        sent.map_err(|_| Refusal::Busy)?;
        let mut left = false;
        let answer = wait.answer(SERVICE, LOOK, || {
            // After an eviction, which shuts down reading, every client seems to have left.
            left = !self.permit.is_last() && self.wire.socket().is_left();
            !left
        });
        match answer {
            Some(response) => Ok(response),
            None if left => Err(End::Silent),
            None => {
                log::warn!("a request was not answered");
                Err(Refusal::Unanswered.into())
            }
        }
    }

    fn write(&mut self, response: Response, persistence: &str, head_only: bool) -> io::Result<()> {
        // Before it is sent: whoever has the answer finds it counted.
        if let Some(code) = response.refused {
            self.shared.metrics.refuse(self.client.ip(), code);
        }
        let answer = to_bytes(response, persistence, head_only);
        if answer.len() > SMALL {
            self.memory.hold(answer.len());
        }
        self.set_deadline(ANSWER);
        self.wire.write_all(&answer)?;
        self.wire.flush()?;
        self.memory.release();
        self.permit.receive();
        Ok(())
    }

    fn refuse(&mut self, request: Option<&Request>, refusal: &Refusal) {
        let (method, target) =
            request.map_or(("-", "-"), |request| (request.method(), request.target()));
        let head_only = request.map_or(self.framer.is_head(), |_| method == "HEAD");
        let refusal = match refusal {
            // Connections that are evicted then do not make room for others.
            Refusal::Busy if self.shared.common.is_closing() => &Refusal::Stopping,
            refusal => refusal,
        };
        logging::refused(method, target, refusal.status(), refusal, self.client);
        // What was read is no longer needed, and must not take memory while the connection lingers.
        self.framer = self.shared.framer();
        self.memory.release();
        self.permit.send(Instant::now());
        // If this fails, the client has left.
        let mut response = answer::refusal(refusal);
        let more = self.shared.refusal_headers.iter();
        response
            .headers
            .extend(more.map(|(name, value)| (*name, Cow::Borrowed(*value))));
        let _ = self.write(response, "Connection: close\r\n", head_only);
        self.linger();
    }

    fn end(&mut self) {
        let linger = if self.shared.common.is_closing() {
            HURRY
        } else {
            LINGER
        };
        self.set_deadline(linger);
        self.wire.end();
    }

    /// Ends the connection and waits a moment for the client to close its side.
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

    /// Sets the deadline of the next step, sooner than asked for if the connection was evicted, since
    /// newcomers wait for its end.
    fn set_deadline(&mut self, time: Duration) -> Instant {
        let time = if self.permit.is_evicted() {
            time.min(HURRY)
        } else {
            time
        };
        let deadline = Instant::now() + time;
        self.wire.set_deadline(deadline);
        deadline
    }
}

/// An answer as it is written to the client. `persistence` is its Connection header with its line end, or
/// empty.
pub fn to_bytes(response: Response, persistence: &str, head_only: bool) -> Vec<u8> {
    let reason = StatusCode::from_u16(response.status)
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or_default();
    let mut text = String::with_capacity(256 + response.body.len());
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "HTTP/1.1 {} {reason}\r\nServer: export-service\r\nDate: {}\r\n{persistence}",
        response.status,
        httpdate::fmt_http_date(SystemTime::now()),
    );
    for (name, value) in &response.headers {
        let _ = write!(text, "{name}: {value}\r\n");
    }
    let _ = write!(text, "Content-Length: {}\r\n\r\n", response.body.len());
    if !head_only {
        text.push_str(&response.body);
    }
    text.into_bytes()
}
