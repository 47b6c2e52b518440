//! One attempt: one POST over ureq, every timeout and limit set, and what came of it.
//!
//! Not here: whether a failed attempt is tried again, and what the app is told of it.

use std::cell::Cell;
use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ureq::http::{Uri, header};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, DefaultConnector, NextTimeout};
use ureq::{Agent, Timeout};
use uuid::Uuid;

use super::addresses::Destination;

/// Looking a name up may take this long.
const RESOLVE: Duration = Duration::from_secs(5);
/// Connecting, TLS handshake included, may take this long.
const CONNECT: Duration = Duration::from_secs(5);
/// A whole attempt, the response's body included, may take this long.
const ATTEMPT: Duration = Duration::from_secs(30);
/// ureq's own buffers are eight times as large, for downloads that this program never makes.
const BUFFER: usize = 16 * 1024;
/// A response head larger than this is an error, not a reason to use memory.
const RESPONSE_HEAD: usize = 32 * 1024;

const USER_AGENT: &str = concat!("export-service/", env!("CARGO_PKG_VERSION"));

/// What one attempt led to.
#[derive(Debug)]
pub enum Outcome {
    /// The destination answered, with whatever status.
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
    /// Whether the body went on past the limit, or broke off before its end.
    pub truncated: bool,
}

impl fmt::Debug for Answer {
    /// Without the body, which is the app's business alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answer({}, {} bytes)", self.status, self.body.len())
    }
}

/// Why there was no response.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong, for programs.
    pub kind: Kind,
    /// What went wrong, for people: which host, why. Holds no path, query, payload or token.
    pub message: String,
}

/// The step at which an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The name has no address.
    Dns,
    /// No connection came about.
    Connect,
    /// The TLS handshake failed: most often the certificate.
    Tls,
    /// A step took longer than it may.
    Timeout,
    /// The connection ended before a response.
    Closed,
    /// What came back was not HTTP/1.
    Protocol,
}

impl Kind {
    /// The word for it on the wire and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Protocol => "protocol",
        }
    }
}

/// Makes attempts, and keeps connections to destinations open between them for a while.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    max_response: usize,
}

impl Client {
    /// A client that keeps at most `max_response` bytes of each response's body.
    pub fn new(max_response: usize) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .user_agent(USER_AGENT)
            .timeout_global(Some(ATTEMPT))
            .timeout_resolve(Some(RESOLVE))
            .timeout_connect(Some(CONNECT))
            .input_buffer_size(BUFFER)
            .output_buffer_size(BUFFER)
            .max_response_header_size(RESPONSE_HEAD)
            .max_idle_connections(4)
            .max_idle_connections_per_host(1)
            .build();
        let connector = MarkFresh.chain(DefaultConnector::default());
        Self {
            agent: Agent::with_parts(config, connector, AddressResolver::default()),
            max_response,
        }
    }

    /// POSTs `payload` once and reads the response. Blocks, for half a minute at the most.
    ///
    /// A kept connection that the destination has closed in the meantime says nothing about the
    /// destination, so such a failure leads to another try on the next connection, until one is
    /// new. The export's id goes along as `webhook-id`, by which a receiver can drop a repeat.
    pub fn post(&self, id: Uuid, destination: &Destination, payload: &[u8]) -> Outcome {
        loop {
            FRESH.set(false);
            match self.post_once(id, destination, payload) {
                Ok(answer) => return Outcome::Answered(answer),
                Err(ureq::Error::Io(error)) if !FRESH.get() && is_closed(&error) => {}
                Err(error) => return Outcome::Failed(explain(&error, destination)),
            }
        }
    }

    fn post_once(
        &self,
        id: Uuid,
        destination: &Destination,
        payload: &[u8],
    ) -> Result<Answer, ureq::Error> {
        let response = self
            .agent
            .post(destination.as_str())
            .header(header::CONTENT_TYPE, "application/json")
            .header("webhook-id", id.to_string())
            .send(payload)?;
        let status = response.status().as_u16();
        let mut body = Vec::new();
        // One byte more than is kept tells a body of exactly the limit from a longer one. The
        // status has arrived by now, so a body that breaks off is an answer cut short.
        let read = response
            .into_body()
            .into_reader()
            .take(self.max_response as u64 + 1)
            .read_to_end(&mut body);
        let truncated = read.is_err() || body.len() > self.max_response;
        body.truncate(self.max_response);
        Ok(Answer {
            status,
            body,
            truncated,
        })
    }
}

thread_local! {
    /// Whether the attempt under way on this thread opened a connection of its own.
    static FRESH: Cell<bool> = const { Cell::new(false) };
}

/// The start of the connector chain, which ureq runs only when no kept connection will do.
#[derive(Debug)]
struct MarkFresh;

impl Connector for MarkFresh {
    type Out = ();

    fn connect(
        &self,
        _: &ConnectionDetails<'_>,
        chained: Option<()>,
    ) -> Result<Option<()>, ureq::Error> {
        FRESH.set(true);
        Ok(chained)
    }
}

/// Takes literal addresses as they are; ureq's own resolver starts a thread per look-up, which
/// is what it takes to time a look-up, but four times the cost of a whole local POST.
#[derive(Debug, Default)]
struct AddressResolver {
    names: DefaultResolver,
}

impl Resolver for AddressResolver {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let literal = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        if let Ok(address) = literal.unwrap_or(host).parse::<IpAddr>() {
            let default = if uri.scheme_str() == Some("https") {
                443
            } else {
                80
            };
            let mut found = self.empty();
            found.push(SocketAddr::new(address, uri.port_u16().unwrap_or(default)));
            return Ok(found);
        }
        match self.names.resolve(uri, config, timeout) {
            // The system's look-up reports a missing name as an I/O error like any other.
            Err(ureq::Error::Io(_)) => Err(ureq::Error::HostNotFound),
            other => other,
        }
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
            | ErrorKind::NotConnected
    )
}

/// Puts a failed attempt into words.
fn explain(error: &ureq::Error, destination: &Destination) -> Failure {
    let host = destination.authority();
    let (kind, message) = match error {
        ureq::Error::HostNotFound => (
            Kind::Dns,
            format!("no address found for {host}: check the name and this box's DNS"),
        ),
        ureq::Error::Timeout(Timeout::Resolve) => (
            Kind::Timeout,
            format!("looking up {host} took over {} s", RESOLVE.as_secs()),
        ),
        ureq::Error::Timeout(Timeout::Connect) => (
            Kind::Timeout,
            format!("connecting to {host} took over {} s", CONNECT.as_secs()),
        ),
        ureq::Error::Timeout(_) => (
            Kind::Timeout,
            format!("{host} did not answer within {} s", ATTEMPT.as_secs()),
        ),
        ureq::Error::Io(error) if is_closed(error) => (
            Kind::Closed,
            format!("{host} closed the connection before it answered"),
        ),
        ureq::Error::Io(error) if error.kind() == ErrorKind::ConnectionRefused => (
            Kind::Connect,
            format!("connection refused by {host}: nothing listens there"),
        ),
        // This is how rustls reports through a socket that a peer or its certificate is bad.
        ureq::Error::Io(error) if error.kind() == ErrorKind::InvalidData => {
            (Kind::Tls, format!("TLS with {host} failed: {}", error))
        }
        ureq::Error::Io(error) => (Kind::Connect, format!("no connection to {host}: {error}")),
        ureq::Error::ConnectionFailed => (Kind::Connect, format!("no connection to {host}")),
        ureq::Error::Rustls(error) => (Kind::Tls, format!("TLS with {host} failed: {error}")),
        ureq::Error::Tls(reason) => (Kind::Tls, format!("TLS with {host} failed: {reason}")),
        ureq::Error::LargeResponseHeader(..) => (
            Kind::Protocol,
            format!("{host} answered with a head over {RESPONSE_HEAD} bytes"),
        ),
        _ => (
            Kind::Protocol,
            format!("what {host} answered is not HTTP/1.1"),
        ),
    };
    Failure { kind, message }
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
        };
        assert_eq!(
            format!("{:?}", Outcome::Answered(answer)),
            "Answered(Answer(200, 7 bytes))"
        );
    }
}
