//! ureq's way to a destination: a look-up whose addresses are checked, a connection to one of them, TLS,
//! and the answer in a form that ureq can parse.
//!
//! A destination's addresses are judged by the rules at every attempt, when ureq asks for them, so that only
//! judged addresses are dialled. An idle connection is reused only if its peer is among the addresses just
//! judged, so that a name that moves is followed.
//!
//! Not here: the request and its outcome ([`super::attempt`]), and parsing an answer ([`super::response`]).

use std::cell::RefCell;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

use super::addresses::Rules;
use super::response::Reader;
use super::tls::{self, Trust};
use crate::destination::bare;
use crate::dial::{self, Late, LookUpError, Names};
use crate::socket::Socket;

/// The most bytes that are sent or read at once.
const BUFFER: usize = 16 * 1024;

/// Longer than any attempt takes.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How far an attempt has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Step {
    /// The name is being looked up, and its addresses judged.
    #[default]
    LookingUp,
    /// The addresses may be sent to. An attempt on a reused connection gets no further than this.
    Judged,
    /// A new connection is being made.
    Connecting,
    /// The TLS handshake on the new connection is under way.
    Handshaking,
    /// The new connection can be used.
    Connected,
}

/// The progress of this thread's attempt.
#[derive(Default)]
struct Progress {
    step: Step,
    judged: Vec<SocketAddr>,
    peer: Option<SocketAddr>,
}

thread_local! {
    /// Thread-local, as ureq makes all of an attempt on the caller's thread, and cannot pass values from the
    /// resolver to the connector.
    static PROGRESS: RefCell<Progress> = RefCell::default();
}

/// Notes that an attempt begins on this thread.
pub fn begin() {
    PROGRESS.with_borrow_mut(|progress| {
        progress.step = Step::LookingUp;
        progress.peer = None;
    });
}

/// How far this thread's attempt has come.
pub fn step() -> Step {
    PROGRESS.with_borrow(|progress| progress.step)
}

/// The address that this thread's attempt has a connection to, new or reused. None if it has none.
pub fn peer() -> Option<SocketAddr> {
    PROGRESS.with_borrow(|progress| progress.peer)
}

fn set_peer(peer: SocketAddr) {
    PROGRESS.with_borrow_mut(|progress| progress.peer = Some(peer));
}

fn set_step(step: Step) {
    PROGRESS.with_borrow_mut(|progress| progress.step = step);
}

/// Says which addresses a host has, as [`Names::look_up`] does.
pub trait LookUp: fmt::Debug + Send + Sync + 'static {
    /// The addresses of a host, with this port. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// Why there is none.
    fn look_up(
        &self,
        host: &str,
        port: u16,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, LookUpError>;

    /// The addresses that have arrived since. Blocks until `until` at most.
    fn late(&self, host: &str, port: u16, until: Instant) -> Late;
}

impl LookUp for Names {
    fn look_up(
        &self,
        host: &str,
        port: u16,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, LookUpError> {
        Names::look_up(self, host, port, deadline)
    }

    fn late(&self, host: &str, port: u16, until: Instant) -> Late {
        Names::late(self, host, port, until)
    }
}

/// Looks a destination's addresses up, and returns them only if all of them may be sent to.
#[derive(Debug)]
pub struct Judge<L> {
    /// Looks names up.
    pub names: L,
    /// Which addresses may be sent to.
    pub rules: Rules,
}

impl<L: LookUp> Judge<L> {
    fn look_up(&self, uri: &Uri, timeout: NextTimeout) -> Result<Vec<SocketAddr>, ureq::Error> {
        let (host, port) = host_and_port(uri);
        let found = self.names.look_up(host, port, deadline(timeout));
        let found = found.map_err(|error| match error {
            LookUpError::TooSlow => ureq::Error::Timeout(timeout.reason),
            error => ureq::Error::Other(error.into()),
        })?;
        self.judge(uri, &found)?;
        Ok(found)
    }

    fn late(&self, uri: &Uri, until: Instant) -> Result<Late, ureq::Error> {
        let (host, port) = host_and_port(uri);
        let late = self.names.late(host, port, until);
        if let Late::All(all) = &late {
            self.judge(uri, all)?;
        }
        Ok(late)
    }

    fn judge(&self, uri: &Uri, addresses: &[SocketAddr]) -> Result<(), ureq::Error> {
        for address in addresses {
            self.rules
                .judge(*address, is_encrypted(uri), is_own)
                .map_err(|forbidden| ureq::Error::Other(forbidden.into()))?;
        }
        Ok(())
    }
}

fn is_encrypted(uri: &Uri) -> bool {
    uri.scheme_str() == Some("https")
}

fn host_and_port(uri: &Uri) -> (&str, u16) {
    let default = if is_encrypted(uri) { 443 } else { 80 };
    let port = uri.port_u16().unwrap_or(default);
    (bare(uri.host().unwrap_or_default()), port)
}

/// Tells ureq a destination's addresses, if they may be sent to.
#[derive(Debug)]
pub struct JudgingResolver<L>(pub Arc<Judge<L>>);

impl<L: LookUp> Resolver for JudgingResolver<L> {
    fn resolve(
        &self,
        uri: &Uri,
        _: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.0.look_up(uri, timeout)?;
        // ureq has room for a few and needs to see one. The dialler knows all of them.
        let mut seen = self.empty();
        seen.push(*found.first().ok_or(ureq::Error::HostNotFound)?);
        PROGRESS.with_borrow_mut(|progress| {
            progress.step = Step::Judged;
            progress.judged = found;
        });
        Ok(seen)
    }
}

/// Whether an address is one of this machine's.
pub fn is_own(ip: IpAddr) -> bool {
    // Only a machine's own addresses can be bound to, unless the system is set to allow any.
    ip.is_loopback()
        || UdpSocket::bind((ip, 0)).is_ok() && (!any_can_be_bound_to(ip) || has_interface(ip))
}

fn any_can_be_bound_to(ip: IpAddr) -> bool {
    let family = if ip.is_ipv4() { "ipv4" } else { "ipv6" };
    let setting = fs::read_to_string(format!("/proc/sys/net/{family}/ip_nonlocal_bind"));
    setting.is_ok_and(|setting| setting.trim() != "0")
}

/// Whether a network interface has this address. True if the system does not say.
fn has_interface(ip: IpAddr) -> bool {
    match if_addrs::get_if_addrs() {
        Ok(interfaces) => interfaces.iter().any(|interface| interface.ip() == ip),
        Err(_) => true,
    }
}

fn deadline(timeout: NextTimeout) -> Instant {
    // Every attempt has its own limit; this only keeps the sum in range.
    Instant::now() + (*timeout.after).min(LONGEST)
}

/// Makes new connections, which ureq asks for only if no idle one can be used.
#[derive(Debug)]
pub struct Dialler<L> {
    /// Judges addresses that arrive late.
    pub judge: Arc<Judge<L>>,
    /// Which certificates are trusted.
    pub trust: Trust,
}

impl<L: LookUp> Connector for Dialler<L> {
    type Out = Exchange;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Exchange>, ureq::Error> {
        let NextTimeout { reason, .. } = details.timeout;
        let deadline = deadline(details.timeout);
        let in_time = |error| match error {
            ureq::Error::Io(error) if error.kind() == ErrorKind::TimedOut => {
                ureq::Error::Timeout(reason)
            }
            error => error,
        };
        set_step(Step::Connecting);
        let host = bare(details.uri.host().unwrap_or_default());
        let judged = PROGRESS.with_borrow(|progress| progress.judged.clone());
        let late = |until| self.judge.late(details.uri, until);
        let stream = dial::connect(&judged, deadline, late).map_err(in_time)?;
        stream.set_nodelay(true)?;
        let peer = stream.peer_addr()?;
        set_peer(peer);
        let socket = Socket::new(Arc::new(stream), deadline);
        let wire = if details.needs_tls() {
            set_step(Step::Handshaking);
            let stream =
                tls::handshake(&self.trust, host, socket).map_err(|error| in_time(error.into()))?;
            Wire::Tls(Box::new(stream))
        } else {
            Wire::Plain(socket)
        };
        set_step(Step::Connected);
        Ok(Some(Exchange::new(wire, peer)))
    }
}

/// A connection to a destination, with TLS or without.
enum Wire {
    Plain(Socket),
    Tls(Box<StreamOwned<ClientConnection, Socket>>),
}

impl Wire {
    fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            // An end without close_notify is an error (`UnexpectedEof`), as it must be here: anybody on
            // the way may have cut off the rest.
            Self::Tls(stream) => stream.read(buffer),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.write_all(bytes),
            Self::Tls(stream) => stream.write_all(bytes).and_then(|()| stream.flush()),
        }
    }
}

/// A connection on which ureq sends requests and reads answers, one at a time.
pub struct Exchange {
    wire: Wire,
    peer: SocketAddr,
    output: Vec<u8>,
    /// Bytes that have arrived and were not parsed yet.
    arrived: Vec<u8>,
    reader: Reader,
    /// The answer in ureq's form, which ureq has read up to `read`.
    answer: Vec<u8>,
    read: usize,
    /// Whether ureq could use some of what it saw last.
    progress: bool,
    /// The peer has closed its receiving side. It may have answered before it had read all of the request,
    /// for example that it is too large.
    peer_stopped_reading: bool,
}

impl Exchange {
    fn new(wire: Wire, peer: SocketAddr) -> Self {
        Self {
            wire,
            peer,
            output: Vec::new(),
            arrived: Vec::new(),
            reader: Reader::new(),
            answer: Vec::new(),
            read: 0,
            progress: false,
            peer_stopped_reading: false,
        }
    }

    /// Parses what has arrived. True if that gives ureq something to read.
    fn digest(&mut self) -> Result<bool, ureq::Error> {
        self.answer.drain(..self.read);
        self.read = 0;
        let before = self.answer.len();
        let used = self
            .reader
            .feed(&self.arrived, &mut self.answer)
            .map_err(|error| ureq::Error::Other(error.into()))?;
        self.arrived.drain(..used);
        Ok(self.answer.len() > before)
    }
}

impl Transport for Exchange {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        if self.reader.is_done() {
            self.reader = Reader::new();
        }
        if self.peer_stopped_reading {
            return Ok(());
        }
        self.wire.socket().set_deadline(deadline(timeout));
        match self.wire.write_all(&self.output[..amount]) {
            Err(error) if is_closed(&error) => {
                self.peer_stopped_reading = true;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                Err(ureq::Error::Timeout(timeout.reason))
            }
            written => Ok(written?),
        }
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.wire.socket().set_deadline(deadline(timeout));
        loop {
            if self.digest()? {
                return Ok(true);
            }
            if self.reader.is_over() {
                return match self.reader.is_done() {
                    true => Ok(false),
                    false => Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                };
            }
            let old = self.arrived.len();
            self.arrived.resize(old + BUFFER, 0);
            let read = self.wire.read(&mut self.arrived[old..]);
            self.arrived.truncate(old + *read.as_ref().unwrap_or(&0));
            let in_order = matches!(read, Ok(0));
            match read {
                Ok(length) if length > 0 => {}
                // What has arrived by now is the answer.
                _ if self.reader.end(in_order, &mut self.answer) => {
                    if self.read < self.answer.len() {
                        return Ok(true);
                    }
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    return Err(ureq::Error::Timeout(timeout.reason));
                }
                read => return Ok(read? > 0),
            }
        }
    }

    fn is_open(&mut self) -> bool {
        let is_idle =
            self.reader.is_done() && self.arrived.is_empty() && !self.peer_stopped_reading;
        let judged = PROGRESS.with_borrow(|progress| progress.judged.contains(&self.peer));
        let is_open = is_idle && judged && self.wire.socket().is_quiet();
        if is_open {
            set_peer(self.peer);
        }
        is_open
    }

    fn is_tls(&self) -> bool {
        matches!(self.wire, Wire::Tls(_))
    }
}

impl Buffers for Exchange {
    fn output(&mut self) -> &mut [u8] {
        self.output.resize(BUFFER, 0);
        &mut self.output
    }

    fn input(&self) -> &[u8] {
        &self.answer[self.read..]
    }

    /// Not used: `digest` writes what ureq reads.
    fn input_append_buf(&mut self) -> &mut [u8] {
        &mut []
    }

    fn input_appended(&mut self, _: usize) {}

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        self.read = (self.read + amount).min(self.answer.len());
    }

    /// Only a request body of unknown length would need a temporary buffer, and ours have a known one.
    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        self.output.resize(BUFFER, 0);
        (&mut [], &mut self.output)
    }

    fn can_use_input(&self) -> bool {
        !self.input().is_empty() && self.progress
    }
}

impl fmt::Debug for Exchange {
    /// Shows nothing of what is sent or read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exchange({})", self.peer)
    }
}

/// Whether an error means that the peer has closed the connection.
pub fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
            | ErrorKind::NotConnected
    )
}
