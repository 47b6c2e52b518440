//! One attempt: one POST over ureq, every timeout and limit set, and what came of it.
//!
//! The addresses of a destination are judged where ureq asks for them, so that what was judged is
//! what is dialled: no second look-up can give another answer.
//!
//! Not here: whether a failed attempt is tried again ([`super::schedule`]), and what the app is
//! told of it.

use std::cell::Cell;
use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ureq::http::{Uri, header};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, NextTimeout, TcpConnector, Transport,
};
use ureq::{Agent, Timeout};
use uuid::Uuid;

use super::addresses::{Destination, Forbidden, Rules, bare};
use super::signature::SigningKey;
use super::tls::{self, TlsConnector, Trust};
use crate::dial;

/// Looking a name up may take this long.
pub const RESOLVE: Duration = Duration::from_secs(5);
/// Connecting, TLS handshake included, may take this long.
pub const CONNECT: Duration = Duration::from_secs(5);
/// ureq's own buffers are eight times as large, for downloads that this program never makes.
const BUFFER: usize = 16 * 1024;
/// A response head larger than this is an error, not a reason to use memory. With a limit that
/// the buffer cannot pass, ureq would take it for a connection that was closed.
const RESPONSE_HEAD: usize = BUFFER - 1;

/// The most addresses of a name that ureq has room for.
const MOST_ADDRESSES: usize = 16;

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
    /// The header `Retry-After`, as it was sent.
    pub retry_after: Option<String>,
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
    /// Whether a connection stood, so that the export itself may be the cause.
    pub connected: bool,
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
    /// The certificate is not valid yet. It is this machine's clock that is wrong, more likely: one
    /// without a battery has to be told the time after each start.
    TlsTooEarly,
    /// A step took longer than it may.
    Timeout,
    /// The connection ended before a response.
    Closed,
    /// What came back was not HTTP/1.
    Protocol,
    /// The name stands for an address that nothing may be sent to.
    ForbiddenAddress,
    /// The URL is plain `http`, and the address is not in an allowed network.
    ForbiddenHttp,
    /// There is nothing to send: the payload is no longer in the store.
    Lost,
}

impl Kind {
    /// The word for it on the wire and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Tls | Self::TlsTooEarly => "tls",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Protocol => "protocol",
            Self::ForbiddenAddress => "forbidden_address",
            Self::ForbiddenHttp => "forbidden_http",
            Self::Lost => "lost",
        }
    }
}

/// What every attempt is made with.
#[derive(Debug)]
pub struct Settings {
    /// How long a whole attempt may take, the response's body included.
    pub timeout: Duration,
    /// How many bytes are kept of a response's body.
    pub max_response: usize,
    /// Which addresses may be sent to.
    pub rules: Rules,
    /// Which certificates are trusted.
    pub trust: Trust,
    /// What exports are signed with, if they are.
    pub signing_key: Option<SigningKey>,
}

/// Makes attempts, and keeps connections to destinations open between them for a while.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    timeout: Duration,
    max_response: usize,
    signing_key: Option<SigningKey>,
}

impl Client {
    /// A client that looks names up as the system does.
    pub fn new(settings: Settings) -> Self {
        Self::with_names(settings, SystemNames)
    }

    /// A client that has `names` look names up.
    pub fn with_names(settings: Settings, names: impl Resolver) -> Self {
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
            .timeout_resolve(Some(RESOLVE))
            .timeout_connect(Some(CONNECT))
            .input_buffer_size(BUFFER)
            .output_buffer_size(BUFFER)
            .max_response_header_size(RESPONSE_HEAD)
            .max_idle_connections(4)
            .max_idle_connections_per_host(1)
            .build();
        let connector = Begin
            .chain(TcpConnector::default())
            .chain(TlsConnector::new(trust))
            .chain(ListenOn);
        let resolver = JudgingResolver { names, rules };
        let agent = Agent::with_parts(config, connector, resolver);
        Self {
            agent,
            timeout,
            max_response,
            signing_key,
        }
    }

    /// POSTs `payload` once and reads the response. Blocks, for the attempt's timeout at most.
    ///
    /// A kept connection that the destination has closed in the meantime says nothing about the
    /// destination, so such a failure leads to another try on the next connection, until one is
    /// new. The export's id goes along as `webhook-id`, by which a receiver can drop a repeat.
    pub fn post(&self, id: Uuid, destination: &Destination, payload: &[u8]) -> Outcome {
        let started = Instant::now();
        loop {
            STEP.set(Step::Begun);
            let left = self.timeout.saturating_sub(started.elapsed());
            match self.post_once(id, destination, payload, left) {
                Ok(answer) => return Outcome::Answered(answer),
                Err(ureq::Error::Io(error))
                    if STEP.get() == Step::Resolved && is_closed(&error) => {}
                Err(error) => return Outcome::Failed(self.explain(&error, destination)),
            }
        }
    }

    fn post_once(
        &self,
        id: Uuid,
        destination: &Destination,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<Answer, ureq::Error> {
        let id = id.to_string();
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
            retry_after,
        })
    }

    /// Puts a failed attempt into words.
    fn explain(&self, error: &ureq::Error, destination: &Destination) -> Failure {
        let host = destination.authority();
        let step = STEP.get();
        let whole = format!("{} s", self.timeout.as_secs_f64());
        let (kind, message) = match error {
            ureq::Error::HostNotFound => (
                Kind::Dns,
                format!("no address found for {host}: check the name, and this box's connection"),
            ),
            ureq::Error::Other(other) => explain_look_up(other.as_ref(), host),
            ureq::Error::Timeout(Timeout::Resolve) => (
                Kind::Timeout,
                format!("looking up {host} took over {} s", RESOLVE.as_secs()),
            ),
            ureq::Error::Timeout(Timeout::Connect) if step == Step::Connected => (
                Kind::Timeout,
                format!(
                    "{host} did not finish the TLS handshake within {} s",
                    CONNECT.as_secs()
                ),
            ),
            ureq::Error::Timeout(Timeout::Connect) => (
                Kind::Timeout,
                format!("connecting to {host} took over {} s", CONNECT.as_secs()),
            ),
            ureq::Error::Timeout(_) => (
                Kind::Timeout,
                format!("{host} did not answer within {whole}"),
            ),
            ureq::Error::Rustls(error) => (tls::kind(error), tls::explain(error, host)),
            ureq::Error::Tls(reason) => (Kind::Tls, format!("TLS with {host} failed: {reason}")),
            ureq::Error::Io(error) => match tls::cause(error) {
                Some(error) => (tls::kind(error), tls::explain(error, host)),
                None if step == Step::Connecting => (Kind::Connect, refusal(error, host)),
                None if is_closed(error) => (
                    Kind::Closed,
                    format!("{host} closed the connection before it answered"),
                ),
                None => (
                    Kind::Closed,
                    format!("the connection to {host} broke: {error}"),
                ),
            },
            ureq::Error::ConnectionFailed => (Kind::Connect, format!("no connection to {host}")),
            ureq::Error::LargeResponseHeader(..) => (
                Kind::Protocol,
                format!("{host} answered with a head over {RESPONSE_HEAD} bytes"),
            ),
            _ => (
                Kind::Protocol,
                format!("what {host} answered is not HTTP/1.1"),
            ),
        };
        let connected = matches!(step, Step::Resolved | Step::Connected);
        Failure {
            kind,
            message,
            connected,
        }
    }
}

/// Puts into words what a resolver of ours has ended an attempt for.
fn explain_look_up(error: &(dyn std::error::Error + 'static), host: &str) -> (Kind, String) {
    if let Some(forbidden) = error.downcast_ref::<Forbidden>() {
        let kind = match forbidden {
            Forbidden::Plain(_) => Kind::ForbiddenHttp,
            Forbidden::Network(..) | Forbidden::Itself(_) => Kind::ForbiddenAddress,
        };
        return (kind, format!("nothing is sent to {host}: {forbidden}"));
    }
    if error.is::<io::Error>() {
        return (Kind::Dns, format!("looking up {host} failed: {error}"));
    }
    (
        Kind::Protocol,
        format!("the attempt at {host} failed: {error}"),
    )
}

fn refusal(error: &io::Error, host: &str) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            format!("connection refused by {host}: nothing listens there")
        }
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            format!("{host} cannot be reached from here: {error}")
        }
        _ => format!("no connection to {host}: {error}"),
    }
}

/// How far an attempt has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It has begun: the name is looked up and judged.
    Begun,
    /// The addresses are judged. Nothing more is noted of an attempt on a kept connection.
    Resolved,
    /// A new connection is being made.
    Connecting,
    /// The new connection stands; TLS, if any, comes next.
    Connected,
}

thread_local! {
    /// How far the attempt of this thread has come; ureq makes all of it on the caller's thread.
    pub static STEP: Cell<Step> = const { Cell::new(Step::Begun) };
}

/// The start of the connector chain, which ureq runs only when no kept connection will do.
#[derive(Debug)]
struct Begin;

impl Connector for Begin {
    type Out = ();

    fn connect(
        &self,
        _: &ConnectionDetails<'_>,
        chained: Option<()>,
    ) -> Result<Option<()>, ureq::Error> {
        STEP.set(Step::Connecting);
        Ok(chained)
    }
}

/// The end of the connector chain. A destination may answer before it has read all of a request,
/// and close: too large, say. ureq gives up at the write that fails then; this lets it go on to
/// the answer, if there is one.
#[derive(Debug)]
struct ListenOn;

impl<In: Transport> Connector<In> for ListenOn {
    type Out = Listening<In>;

    fn connect(
        &self,
        _: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(chained.map(|inner| Listening { inner, deaf: false }))
    }
}

/// See [`ListenOn`].
#[derive(Debug)]
struct Listening<T> {
    inner: T,
    /// Whether the peer takes nothing more.
    deaf: bool,
}

impl<T: Transport> Transport for Listening<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        if self.deaf {
            return Ok(());
        }
        match self.inner.transmit_output(amount, timeout) {
            Err(ureq::Error::Io(error)) if is_closed(&error) => {
                self.deaf = true;
                Ok(())
            }
            other => other,
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        !self.deaf && self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

/// Looks a destination up and lets its addresses pass only if all of them may be sent to.
#[derive(Debug)]
pub struct JudgingResolver<R> {
    names: R,
    rules: Rules,
}

impl<R: Resolver> Resolver for JudgingResolver<R> {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = match literal(uri) {
            // A look-up takes a thread, which costs more than a whole local POST.
            Some(address) => {
                let mut found = self.empty();
                found.push(address);
                found
            }
            None => self.names.resolve(uri, config, timeout)?,
        };
        let encrypted = uri.scheme_str() == Some("https");
        for address in found.iter() {
            self.rules
                .judge(*address, encrypted, is_own)
                .map_err(|forbidden| ureq::Error::Other(forbidden.into()))?;
        }
        STEP.set(Step::Resolved);
        Ok(found)
    }
}

/// Looks names up as the system does. ureq's own resolver ends the process where there is no thread
/// for that.
#[derive(Debug)]
struct SystemNames;

impl Resolver for SystemNames {
    fn resolve(
        &self,
        uri: &Uri,
        _: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let addresses = dial::look_up(host, port(uri), *timeout.after);
        let addresses = addresses.map_err(|error| match error.kind() {
            ErrorKind::TimedOut => ureq::Error::Timeout(timeout.reason),
            // There was no thread for it.
            ErrorKind::WouldBlock => ureq::Error::Other(error.into()),
            // The system reports a missing name as an error like any other.
            _ => ureq::Error::HostNotFound,
        })?;
        let mut found = self.empty();
        // As many as there is room for; no others are dialled.
        for address in addresses.into_iter().take(MOST_ADDRESSES) {
            found.push(address);
        }
        if found.is_empty() {
            return Err(ureq::Error::HostNotFound);
        }
        Ok(found)
    }
}

/// The address that a URL names by itself, without a look-up.
fn literal(uri: &Uri) -> Option<SocketAddr> {
    let ip: IpAddr = bare(uri.host()?).parse().ok()?;
    Some(SocketAddr::new(ip, port(uri)))
}

fn port(uri: &Uri) -> u16 {
    let default = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    uri.port_u16().unwrap_or(default)
}

/// Whether an address is one of this machine's: only those can be bound to.
pub fn is_own(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
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
        };
        assert_eq!(
            format!("{:?}", Outcome::Answered(answer)),
            "Answered(Answer(200, 7 bytes))"
        );
    }
}
