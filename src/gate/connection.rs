//! The whole life of a connection: its handshake, one request after the other, each with its answer,
//! and its end.
//!
//! Not here: which connection makes room for another ([`super::slots`]), and what a request is
//! ([`super::framing`]).

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ureq::http::StatusCode;

use super::Shared;
use super::framing::{Framer, Phase, Request};
use super::slots::{self, Slot};
use super::wire::Wire;
use crate::answer::{self, Refusal, Response};
use crate::logging;
use crate::socket::Socket;
use crate::waits::Wait;

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
/// How long a client has to read the last answer before the connection is gone. Closing at once
/// with something unread would take the answer away from it.
const LINGER: Duration = Duration::from_secs(2);
/// How long a connection that was closed to make room has for each step to its end.
const HURRY: Duration = Duration::from_millis(100);
/// Bodies and answers up to this many bytes are not counted: all connections together have room
/// for theirs.
const SMALL: usize = 16 * 1024;
/// How long a handshake may take of one that is let in only to be turned away.
const TURNING_AWAY: Duration = Duration::from_secs(2);
/// How long the service may take to answer. A long poll takes a minute at most, and a commit seconds,
/// on a bad SD card.
const SERVICE: Duration = Duration::from_secs(120);
/// How often a connection that waits for the service looks whether its client is still there.
const LOOK: Duration = Duration::from_millis(1500);

/// Serves a connection until it ends.
pub fn run(shared: &Shared, mut slot: Slot, stream: Arc<TcpStream>, client: SocketAddr) {
    let born = Instant::now();
    // Until now nothing could be read from it.
    slot.begin();
    let handshake = if slot.is_turned_away() {
        TURNING_AWAY
    } else {
        HEAD
    };
    let socket = Socket::new(stream, born + handshake);
    let config = shared.identity.as_ref().map(|identity| identity.config());
    let (wire, failed) = match Wire::accept(socket, config, || slot.begin_handshake()) {
        Ok(wire) => (wire, None),
        Err((wire, error)) => (wire, Some(error)),
    };
    let mut connection = Connection {
        shared,
        slot,
        wire,
        framer: Framer::new(shared.max_body),
        wait: shared.waits.enter(),
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

struct Connection<'a> {
    shared: &'a Shared,
    slot: Slot,
    wire: Wire,
    framer: Framer,
    wait: Wait,
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
            let response = match self.pass_on(&mut request) {
                Ok(response) => response,
                Err(End::Silent) => return self.end(),
                Err(End::Refused(refusal)) => return self.refuse(Some(&request), &refusal),
            };
            let stays =
                self.slot.wait().is_ok() && request.keeps_alive() && Instant::now() < self.life;
            let persistence = match (stays, request.is_old()) {
                (true, false) => "",
                (true, true) => "Connection: keep-alive\r\n",
                (false, _) => "Connection: close\r\n",
            };
            let head_only = request.method() == "HEAD";
            let written = self.write(&to_bytes(response, persistence, head_only));
            if written.is_err() || !stays {
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
    fn pass_on(&mut self, request: &mut Request) -> Result<Response, End> {
        let head = request.normalised_head(self.client, self.wait.number());
        let body = request.take_body();
        self.slot.serve().map_err(Refusal::from)?;
        self.wait.ask();
        let sent = self.shared.links.send(&head, &body);
        // A long poll is not to keep the memory of what it has sent.
        drop((head, body));
        self.slot.release();
        sent.map_err(|_| Refusal::Busy)?;
        let mut left = false;
        let answer = self.wait.answer(SERVICE, LOOK, || {
            left = self.wire.socket().is_left();
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
        let _ = self.write(&to_bytes(
            answer::refusal(refusal),
            "Connection: close\r\n",
            head_only,
        ));
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

/// An answer as it is written to the client, with what is said of the connection.
fn to_bytes(response: Response, persistence: &str, head_only: bool) -> Vec<u8> {
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
