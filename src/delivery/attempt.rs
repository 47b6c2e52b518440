//! One attempt: one POST over ureq under one deadline, and its outcome.
//!
//! Not here: looking the destination up and connecting ([`super::connect`]), whether a failed export is tried
//! again ([`super::retry`]), and the result that the app reads ([`super::worker`]).

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ureq::Agent;
use ureq::http::header;
use uuid::Uuid;

use super::addresses::{Forbidden, Rules};
use super::connect::{self, Dialler, Judge, JudgingResolver, LookUp, Step, is_closed};
use super::response::NotHttp;
use super::signature::SigningKey;
use super::tls::{self, Trust};
use crate::destination::Destination;
use crate::dial::{LookUpError, Names};
use crate::memory::{Budget, Reservation};

/// Bytes that all bodies being read may take together, unless twice the limit of one body is more.
const BODIES: usize = 16 * 1024 * 1024;
/// Bodies of up to this many bytes are not counted: there is memory for one of these for each attempt.
const SMALL: usize = 64 * 1024;
/// The most bytes of a body that are read at once.
const READ: usize = 16 * 1024;

const USER_AGENT: &str = concat!("export-service/", env!("CARGO_PKG_VERSION"));

/// The outcome of one attempt.
#[derive(Debug)]
pub enum Outcome {
    /// The destination answered, with any status.
    Answered(Answer),
    /// There was no HTTP response.
    Failed(Failure),
}

/// A destination's response.
pub struct Answer {
    /// The HTTP status, 100 to 999.
    pub status: u16,
    /// The body, up to the limit.
    pub body: Vec<u8>,
    /// Whether the body exceeded the limit, or broke off before its end.
    pub truncated: bool,
    /// The header `Retry-After`, unparsed.
    pub retry_after: Option<String>,
    /// The body's part of the memory that all bodies share.
    pub memory: Option<Reservation>,
}

impl fmt::Debug for Answer {
    /// Leaves the body out, which is private.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({}, {} bytes)", self.status, self.body.len())
    }
}

/// Why there was no response.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong, for programs.
    pub kind: Kind,
    /// What went wrong, for people: which host, and why. Has no path, query, payload or token.
    pub message: String,
    /// Whether there was a connection, so that the export itself may be the cause.
    pub connected: bool,
}

/// The step at which an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The name has no address.
    Dns,
    /// No connection was made.
    Connect,
    /// The TLS handshake failed: most often the certificate.
    Tls,
    /// The attempt's deadline passed.
    Timeout,
    /// The connection ended before a response.
    Closed,
    /// The answer was not HTTP/1.
    Protocol,
    /// The name has an address that nothing may be sent to.
    ForbiddenAddress,
    /// The URL is plain `http`, and the address is not in an allowed network.
    ForbiddenHttp,
    /// There is nothing to send: the payload is no longer in the store.
    Lost,
}

impl Kind {
    /// Its name in results and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Protocol => "protocol",
            Self::ForbiddenAddress => "forbidden_address",
            Self::ForbiddenHttp => "forbidden_http",
            Self::Lost => "lost",
        }
    }
}

/// The settings of a [`Client`].
#[derive(Debug)]
pub struct Settings {
    /// How long a whole attempt may take, the response's body included.
    pub timeout: Duration,
    /// How many bytes of a response's body are stored.
    pub max_response: usize,
    /// Which addresses may be sent to.
    pub rules: Rules,
    /// Which certificates are trusted.
    pub trust: Trust,
    /// The key that exports are signed with, if they are signed.
    pub signing_key: Option<SigningKey>,
}

/// Makes attempts, and reuses connections to destinations.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    timeout: Duration,
    max_response: usize,
    bodies: Budget,
    signing_key: Option<SigningKey>,
}

impl Client {
    /// A client that looks names up as the system does.
    pub fn new(settings: Settings) -> Self {
        Self::with_names(settings, Names::default())
    }

    /// A client that looks names up with `names`.
    pub fn with_names(settings: Settings, names: impl LookUp) -> Self {
        let Settings {
            timeout,
            max_response,
            rules,
            trust,
            signing_key,
        } = settings;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .user_agent(USER_AGENT)
            .max_idle_connections(16)
            .max_idle_connections_per_host(1)
            .build();
        let judge = Arc::new(Judge { names, rules });
        let resolver = JudgingResolver(judge.clone());
        let agent = Agent::with_parts(config, Dialler { judge, trust }, resolver);
        Self {
            agent,
            timeout,
            max_response,
            // One body may exceed the budget, by up to its limit.
            bodies: Budget::new(BODIES.max(2 * max_response) - max_response),
            signing_key,
        }
    }

    /// POSTs `payload` once and reads the response. Blocks for at most the attempt's timeout.
    ///
    /// If the destination has closed an idle connection in the meantime, that says nothing about the
    /// destination, so the POST is repeated on the next connection, until one is new. The export's id is
    /// sent as `webhook-id`, by which a receiver can drop a repeat.
    pub fn post(&self, id: Uuid, destination: &Destination, payload: &[u8]) -> Outcome {
        let started = Instant::now();
        loop {
            connect::begin();
            match self.post_once(id, destination, payload, started + self.timeout) {
                Ok(answer) => return Outcome::Answered(answer),
                Err(ureq::Error::Io(error))
                    if connect::step() == Step::Judged && is_closed(&error) => {}
                Err(error) => return Outcome::Failed(self.explain(&error, destination)),
            }
        }
    }

    fn post_once(
        &self,
        id: Uuid,
        destination: &Destination,
        payload: &[u8],
        deadline: Instant,
    ) -> Result<Answer, ureq::Error> {
        let id = id.to_string();
        let timeout = deadline.saturating_duration_since(Instant::now());
        let mut request = self
            .agent
            .post(destination.as_str())
            .config()
            .timeout_global(Some(timeout))
            .build()
            .header(header::CONTENT_TYPE, "application/json")
            .header("webhook-id", &id);
        if let Some(key) = &self.signing_key {
            let since = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            request = request
                .header("webhook-timestamp", since.as_secs())
                .header("webhook-signature", key.sign(&id, since.as_secs(), payload));
        }
        let response = request.send(payload)?;
        let status = response.status().as_u16();
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let mut source = response.into_body().into_reader();
        let (mut body, mut memory) = (Vec::new(), self.bodies.part());
        let whole = self.read_body(&mut source, &mut body, &mut memory, deadline);
        Ok(Answer {
            status,
            body,
            truncated: !whole,
            retry_after,
            memory: Some(memory),
        })
    }

    /// Reads a body up to the limit. True if that is all of it. If it breaks off, the answer counts
    /// nevertheless, as its status has arrived.
    fn read_body(
        &self,
        source: &mut impl Read,
        body: &mut Vec<u8>,
        memory: &mut Reservation,
        deadline: Instant,
    ) -> bool {
        let mut piece = [0; READ];
        loop {
            let read = match source.read(&mut piece) {
                Ok(0) => return true,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return false,
            };
            let room = self.max_response - body.len();
            let length = body.len() + read.min(room);
            if length > body.capacity() {
                // In steps, so that a body takes no more memory than is reserved. Most are a few bytes.
                let step = body.len().min(SMALL);
                let capacity = (body.len() + step).max(length).min(self.max_response);
                if capacity > SMALL && !memory.grow(capacity, deadline) {
                    return false;
                }
                body.reserve_exact(capacity - body.len());
            }
            body.extend_from_slice(&piece[..read.min(room)]);
            if read > room {
                return false;
            }
        }
    }

    /// Kind and message of a failed attempt.
    fn explain(&self, error: &ureq::Error, destination: &Destination) -> Failure {
        let host = destination.authority();
        let step = connect::step();
        let (kind, message) = match error {
            ureq::Error::Other(other) => explain_other(other.as_ref(), host),
            ureq::Error::Timeout(_) => (
                Kind::Timeout,
                format!(
                    "{} within {} s",
                    late(step, host),
                    self.timeout.as_secs_f64()
                ),
            ),
            ureq::Error::Io(error) => match tls::cause(error) {
                Some(error) => (Kind::Tls, tls::explain(error, host)),
                None if step == Step::Connecting => (Kind::Connect, refusal(error, host)),
                None if is_closed(error) && step == Step::Handshaking => (
                    Kind::Closed,
                    format!("{host} closed the connection during the TLS handshake"),
                ),
                None if is_closed(error) => (
                    Kind::Closed,
                    format!("{host} closed the connection before it answered"),
                ),
                None if step == Step::Handshaking => {
                    (Kind::Tls, format!("TLS with {host} failed: {error}"))
                }
                None => (
                    Kind::Closed,
                    format!("the connection to {host} broke: {error}"),
                ),
            },
            _ => (
                Kind::Protocol,
                format!("the attempt at {host} failed: {error}"),
            ),
        };
        Failure {
            kind,
            message,
            connected: matches!(step, Step::Judged | Step::Connected),
        }
    }
}

/// What did not happen in time.
fn late(step: Step, host: &str) -> String {
    match step {
        Step::LookingUp => format!("no name server said what address {host} has"),
        Step::Connecting => format!("no connection to {host} came about"),
        Step::Handshaking => format!("{host} did not finish the TLS handshake"),
        Step::Judged | Step::Connected => format!("{host} did not answer"),
    }
}

/// Kind and message of an error that our own parts of ureq's transport have returned.
fn explain_other(error: &(dyn std::error::Error + 'static), host: &str) -> (Kind, String) {
    if let Some(forbidden) = error.downcast_ref::<Forbidden>() {
        let kind = match forbidden {
            Forbidden::Plain(_) => Kind::ForbiddenHttp,
            Forbidden::Network(..) | Forbidden::Itself(_) => Kind::ForbiddenAddress,
        };
        return (kind, format!("nothing is sent to {host}: {forbidden}"));
    }
    if let Some(error) = error.downcast_ref::<LookUpError>() {
        return (Kind::Dns, explain_look_up(*error, host));
    }
    if error.is::<NotHttp>() {
        return (
            Kind::Protocol,
            format!("what {host} answered is not HTTP/1.1"),
        );
    }
    (
        Kind::Protocol,
        format!("the attempt at {host} failed: {error}"),
    )
}

/// Why a look-up failed, and what to do about it.
pub fn explain_look_up(error: LookUpError, host: &str) -> String {
    match error {
        LookUpError::NoAddress => {
            format!("no address found for {host}: check the name")
        }
        LookUpError::NoAnswer | LookUpError::TooSlow => format!(
            "no address found for {host}, since {error}: check this box's connection and its name servers"
        ),
        LookUpError::NoThread => format!("looking up {host} failed: {error}"),
    }
}

/// Why no connection was made, and what that means.
pub fn refusal(error: &io::Error, host: &str) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            format!("connection refused by {host}: nothing listens there")
        }
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            format!("{host} cannot be reached from here: {error}")
        }
        ErrorKind::PermissionDenied => {
            format!("a router or firewall does not let connections to {host} pass: {error}")
        }
        _ => format!("no connection to {host}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_bodies_nor_paths_show_in_debug() {
        let answer = Answer {
            status: 200,
            body: b"private".to_vec(),
            truncated: false,
            retry_after: None,
            memory: None,
        };
        assert_eq!(
            format!("{:?}", Outcome::Answered(answer)),
            "Answered(Answer(200, 7 bytes))"
        );
    }
}
