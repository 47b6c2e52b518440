//! A ZeroMQ REQ socket with CURVE, as far as one arbiter needs it. [`Client`] turns bytes into bytes without
//! a socket. [`Connection`] carries them over TCP, each step under a deadline.
//!
//! The protocol is ZMTP 3.0 (RFC 23 of rfc.zeromq.org) with CurveZMQ (RFC 26), heartbeats of ZMTP 3.1
//! (RFC 37), and keys written in Z85 (RFC 32). Where these leave a choice, this follows libzmq 4.3:
//!
//! - its greeting never says that it is a server, so that field is ignored;
//! - a MESSAGE is an ordinary frame, not a command. Its content has flags of its own, by which PING and
//!   PONG are commands.
//!
//! Not here: the request and the meaning of its answer (`super`, `zest`).

use std::convert::Infallible;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{IpAddr, TcpStream};
use std::str::FromStr;
use std::time::{Duration, Instant};

use crypto_box::aead::Aead;
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use rustls::crypto::ring;

use crate::dial::{self, Names};

/// How long looking the arbiter's address up may take: a silent name server must leave time for the next one.
const LOOK_UP: Duration = Duration::from_secs(30);
/// How long connecting to it may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long everything from the greeting to READY may take.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// How long the answer to a request may take. Each request creates a new secret, so after giving up on a slow
/// arbiter the next request would void the one that it is about to send.
const ANSWER: Duration = Duration::from_secs(30);
/// How often the arbiter is sent a PING.
const PING_EVERY: Duration = Duration::from_secs(15);
/// How long the PONG may take. A restart ends the connection; this is for a loss that shows in no other way.
/// It is long because an arbiter that names no instance counts as restarted then, which voids all tokens.
const PONG: Duration = Duration::from_secs(30);

/// The length of keys in bytes.
pub const KEY: usize = 32;
/// How many random bytes a [`Client`] needs.
pub const RANDOM: usize = 2 * KEY + VOUCH_NONCE;
/// The random part of a vouch's nonce.
const VOUCH_NONCE: usize = 16;
/// How many bytes encryption adds to a text.
const TAG: usize = 16;
/// The length of a greeting (RFC 23).
const GREETING: usize = 64;
/// The longest frame that is accepted. An answer of the arbiter has a few hundred bytes.
const LONGEST_FRAME: usize = 64 * 1024;
/// The longest context of a PING that its PONG repeats (RFC 37).
const LONGEST_CONTEXT: usize = 16;

/// Flag of a frame and of a MESSAGE's content: the next one belongs to it.
const MORE: u8 = 1;
/// Flag of a frame: its length has eight bytes.
const LONG: u8 = 2;
/// Flag of a frame: it is a command.
const COMMAND: u8 = 4;
/// Flag of a MESSAGE's content: it is a command. It differs from that of a frame.
const INNER_COMMAND: u8 = 2;

/// Decodes a key in Z85 (RFC 32). `None` if the text is not Z85, or not of a key's length.
pub fn key_of_z85(text: &str) -> Option<[u8; KEY]> {
    const ALPHABET: &[u8; 85] =
        b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
    let mut key = [0; KEY];
    let (groups, rest) = text.as_bytes().as_chunks::<5>();
    if !rest.is_empty() || groups.len() * 4 != KEY {
        return None;
    }
    for (bytes, group) in key.chunks_exact_mut(4).zip(groups) {
        let mut number = 0_u32;
        for digit in group {
            let value = ALPHABET.iter().position(|letter| letter == digit)?;
            // 85^5 is a little over 2^32, so five digits can say too much.
            number = number.checked_mul(85)?.checked_add(value as u32)?;
        }
        bytes.copy_from_slice(&number.to_be_bytes());
    }
    Some(key)
}

/// The address at which the arbiter listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
}

impl FromStr for Endpoint {
    type Err = ();

    /// Reads a ZeroMQ endpoint: `tcp://HOST:PORT`, with brackets around an IPv6 address.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, port) = text
            .strip_prefix("tcp://")
            .and_then(|address| address.rsplit_once(':'))
            .ok_or(())?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        let good = match bare {
            Some(address) => address.parse::<IpAddr>().is_ok(),
            None => !host.is_empty() && host.bytes().all(plain),
        };
        let port = port.parse().ok().filter(|&port| good && port != 0);
        Ok(Self {
            host: host.to_owned(),
            port: port.ok_or(())?,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            return write!(f, "[{}]:{}", self.host, self.port);
        }
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// The steps of a connection, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Looking up the address of the arbiter's name.
    LookUp,
    /// Connecting to it.
    Connect,
    /// Our greeting, and the arbiter's in return.
    Greeting,
    /// HELLO, which only the owner of the expected key can read, and WELCOME.
    Hello,
    /// INITIATE, which tells the arbiter who asks, and READY.
    Initiate,
    /// A request and its answer.
    Request,
    /// Holding the connection, with a PING from time to time.
    Hold,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LookUp => "look-up",
            Self::Connect => "connection",
            Self::Greeting => "greeting",
            Self::Hello => "HELLO",
            Self::Initiate => "INITIATE",
            Self::Request => "request",
            Self::Hold => "PING",
        })
    }
}

/// What went wrong in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The system reported an error.
    Failed(String),
    /// Its deadline passed.
    Late,
    /// The arbiter closed or reset the connection.
    Closed,
    /// The arbiter said ERROR, with the status that ZAP (RFC 27) gave, if any.
    Refused(Option<u16>),
    /// What arrived cannot be decrypted with the expected key.
    Sealed,
    /// What arrived is not what was expected. The text says what it is instead.
    Unexpected(&'static str),
}

/// Why there is no connection, or it was lost. As text, it also says what to check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The step that failed.
    pub step: Step,
    /// Why it failed.
    pub cause: Cause,
}

impl Error {
    /// The reason as apps may see it: without addresses and files.
    pub fn public_reason(&self) -> &'static str {
        match (&self.cause, self.step) {
            (_, Step::LookUp | Step::Connect) => "the arbiter cannot be reached",
            (Cause::Refused(_), _) => "the arbiter refuses this service",
            (Cause::Closed, Step::Hello) | (Cause::Sealed, _) => {
                "the arbiter has another key than this service was told"
            }
            (Cause::Closed | Cause::Failed(_), _) => "the arbiter closed the connection",
            (Cause::Late, _) => "the arbiter did not answer in time",
            (Cause::Unexpected(_), _) => "the arbiter's answer cannot be understood",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let step = self.step;
        match &self.cause {
            Cause::Failed(reason) => write!(f, "the {step} failed: {reason}")?,
            Cause::Late => write!(f, "no answer to the {step} in time")?,
            Cause::Closed => write!(f, "the arbiter closed the connection at the {step}")?,
            Cause::Refused(Some(status)) => {
                write!(f, "the arbiter answered the {step} with ERROR {status}")?;
            }
            Cause::Refused(None) => write!(f, "the arbiter answered the {step} with ERROR")?,
            Cause::Sealed => write!(f, "the answer to the {step} cannot be opened")?,
            Cause::Unexpected(what) => write!(f, "the answer to the {step} {what}")?,
        }
        match (step, &self.cause) {
            (Step::LookUp | Step::Connect, _) => {
                f.write_str("; check that the arbiter runs, and --arbiter")
            }
            (Step::Greeting, _) => {
                f.write_str("; check that it is the arbiter which listens at --arbiter")
            }
            (Step::Hello, Cause::Closed | Cause::Sealed) => f.write_str(
                "; check that ZMQ_PUBLIC_KEY is this arbiter's key, and restart \
                              this service after a change",
            ),
            (Step::Initiate, Cause::Closed | Cause::Refused(_)) => {
                f.write_str("; check whom the arbiter's access rules (ZAP) admit")
            }
            (Step::Request | Step::Hold, Cause::Closed) => {
                f.write_str("; it has probably been restarted")
            }
            _ => f.write_str("; the arbiter's own log may say more"),
        }
    }
}

/// The protocol of one connection on the client's side, without a socket. Received bytes go in with
/// [`Client::receive`], and bytes to send come out of [`Client::take_output`]. It begins with the greeting
/// and makes the handshake by itself.
pub struct Client {
    step: Step,
    server: PublicKey,
    /// The permanent key pair in CurveZMQ's sense. It is as new as the other, since no arbiter knows this
    /// service by it.
    permanent: SecretKey,
    /// The transient key pair, of this connection alone.
    transient: SecretKey,
    vouch_nonce: [u8; VOUCH_NONCE],
    /// The key that everything after WELCOME is encrypted with.
    session: Option<SalsaBox>,
    /// The counters in the nonces of what was last sent and received.
    sent: u64,
    received: u64,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The frames of an answer so far; `None` while nothing was asked.
    answer: Option<Vec<Vec<u8>>>,
    answered: Option<Vec<u8>>,
    ponged: bool,
}

impl Client {
    /// A client of the arbiter with this key, whose greeting is ready to be sent. `random` must never be used
    /// twice.
    pub fn new(server: [u8; KEY], random: &[u8; RANDOM]) -> Self {
        let part = |from: usize| {
            let mut key = [0; KEY];
            key.copy_from_slice(&random[from..from + KEY]);
            SecretKey::from_bytes(key)
        };
        let mut vouch_nonce = [0; VOUCH_NONCE];
        vouch_nonce.copy_from_slice(&random[2 * KEY..]);
        Self {
            step: Step::Greeting,
            server: PublicKey::from_bytes(server),
            permanent: part(0),
            transient: part(KEY),
            vouch_nonce,
            session: None,
            sent: 0,
            received: 0,
            input: Vec::new(),
            output: greeting().to_vec(),
            answer: None,
            answered: None,
            ponged: false,
        }
    }

    /// The step that the connection has reached.
    pub fn step(&self) -> Step {
        self.step
    }

    /// Whether requests can be made.
    pub fn is_ready(&self) -> bool {
        matches!(self.step, Step::Request | Step::Hold)
    }

    /// The bytes to send now.
    pub fn take_output(&mut self) -> Vec<u8> {
        mem::take(&mut self.output)
    }

    /// Takes received bytes, in pieces of any size. Buffers less than one frame of the longest kind. After an
    /// error the client is useless.
    ///
    /// # Errors
    /// The first thing that a genuine arbiter would not send.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), Cause> {
        self.input.extend_from_slice(bytes);
        let input = mem::take(&mut self.input);
        let mut rest = &input[..];
        if self.step == Step::Greeting {
            let Some((greeting, after)) = rest.split_first_chunk() else {
                check_signature(rest)?;
                self.input = input;
                return Ok(());
            };
            check_greeting(greeting)?;
            rest = after;
            self.step = Step::Hello;
            let hello = self.hello()?;
            self.send_frame(COMMAND, &hello);
        }
        while let Some(frame) = Frame::first(rest)? {
            self.take_frame(frame.flags, frame.body)?;
            rest = &rest[frame.length..];
        }
        self.input = rest.to_vec();
        Ok(())
    }

    /// Sends a request. An answer to an earlier one is no longer waited for.
    pub fn request(&mut self, request: &[u8]) {
        self.step = Step::Request;
        self.answer = Some(Vec::new());
        self.answered = None;
        // An empty frame separates a REQ socket's addresses, of which there are none, from the request
        // (RFC 28).
        self.send_message(MORE, &[]);
        self.send_message(0, request);
    }

    /// The answer to the request, once it has arrived.
    pub fn take_answer(&mut self) -> Option<Vec<u8>> {
        self.answered.take()
    }

    /// Sends a PING. It has no time to live, so that a service that was only suspended for a while does not
    /// lose its connection.
    pub fn ping(&mut self) {
        self.step = Step::Hold;
        self.ponged = false;
        self.send_message(INNER_COMMAND, b"\x04PING\0\0");
    }

    /// Some if a PONG has arrived since the last PING or call.
    pub fn take_pong(&mut self) -> Option<()> {
        mem::take(&mut self.ponged).then_some(())
    }

    fn take_frame(&mut self, flags: u8, body: &[u8]) -> Result<(), Cause> {
        if let Some(reason) = body.strip_prefix(b"\x05ERROR") {
            // The reason is a status of ZAP after its length. Nothing else that a peer says is
            // repeated.
            let status = reason.get(1..4).and_then(|digits| {
                let text = str::from_utf8(digits).ok()?;
                text.parse().ok()
            });
            return Err(Cause::Refused(status));
        }
        let handshake = flags & (COMMAND | MORE) == COMMAND;
        match self.step {
            Step::Hello if handshake => self.take_welcome(body),
            Step::Initiate if handshake => self.take_ready(body),
            Step::Request | Step::Hold => self.take_message(body),
            _ => Err(Cause::Unexpected("is no command of the handshake")),
        }
    }

    fn hello(&mut self) -> Result<Vec<u8>, Cause> {
        let count = self.count();
        let sealed = seal(
            &SalsaBox::new(&self.server, &self.transient),
            &counted(b"CurveZMQHELLO---", count),
            &[0; 64],
        )?;
        let mut hello = b"\x05HELLO\x01\0".to_vec();
        // Padding, so that the answer is no larger than the request.
        hello.extend_from_slice(&[0; 72]);
        hello.extend_from_slice(self.transient.public_key().as_bytes());
        hello.extend_from_slice(&count.to_be_bytes());
        hello.extend_from_slice(&sealed);
        Ok(hello)
    }

    fn take_welcome(&mut self, body: &[u8]) -> Result<(), Cause> {
        let nonce_and_box = body
            .strip_prefix(b"\x07WELCOME")
            .and_then(|rest| rest.split_first_chunk::<16>())
            .filter(|(_, sealed)| sealed.len() == KEY + COOKIE + TAG);
        let (nonce, sealed) = nonce_and_box.ok_or(Cause::Unexpected("is no WELCOME"))?;
        let key = SalsaBox::new(&self.server, &self.transient);
        let welcome = open(&key, &random_nonce(b"WELCOME-", nonce), sealed)?;
        let (server, cookie) = welcome
            .split_first_chunk::<KEY>()
            .ok_or(Cause::Unexpected("is no WELCOME"))?;
        let server = PublicKey::from_bytes(*server);
        let session = SalsaBox::new(&server, &self.transient);
        let initiate = self.initiate(&server, cookie, &session)?;
        self.session = Some(session);
        self.step = Step::Initiate;
        self.send_frame(COMMAND, &initiate);
        Ok(())
    }

    fn initiate(
        &mut self,
        server: &PublicKey,
        cookie: &[u8],
        session: &SalsaBox,
    ) -> Result<Vec<u8>, Cause> {
        let vouch = [
            *self.transient.public_key().as_bytes(),
            *self.server.as_bytes(),
        ];
        let vouch = seal(
            &SalsaBox::new(server, &self.permanent),
            &random_nonce(b"VOUCH---", &self.vouch_nonce),
            vouch.as_flattened(),
        )?;
        let count = self.count();
        let nonce = counted(b"CurveZMQINITIATE", count);
        let permanent = self.permanent.public_key();
        let content = [
            &permanent.as_bytes()[..],
            &self.vouch_nonce,
            &vouch,
            b"\x0bSocket-Type\0\0\0\x03REQ\x08Identity\0\0\0\0",
        ];
        let sealed = seal(session, &nonce, &content.concat())?;
        Ok([b"\x08INITIATE", cookie, &count.to_be_bytes(), &sealed].concat())
    }

    fn take_ready(&mut self, body: &[u8]) -> Result<(), Cause> {
        let sealed = body
            .strip_prefix(b"\x05READY")
            .ok_or(Cause::Unexpected("is no READY"))?;
        let metadata = self.open_counted(b"CurveZMQREADY---", sealed)?;
        let kind =
            socket_type(&metadata).ok_or(Cause::Unexpected("does not say its socket type"))?;
        if !matches!(kind, b"REP" | b"ROUTER") {
            return Err(Cause::Unexpected(
                "is of a socket that takes no requests: neither REP nor ROUTER",
            ));
        }
        self.step = Step::Hold;
        Ok(())
    }

    fn take_message(&mut self, body: &[u8]) -> Result<(), Cause> {
        let sealed = body
            .strip_prefix(b"\x07MESSAGE")
            .ok_or(Cause::Unexpected("is no MESSAGE"))?;
        let content = self.open_counted(b"CurveZMQMESSAGES", sealed)?;
        let (&flags, content) = content
            .split_first()
            .ok_or(Cause::Unexpected("is an empty MESSAGE"))?;
        if flags & INNER_COMMAND != 0 {
            if let Some(ping) = content.strip_prefix(b"\x04PING") {
                let context = ping.get(2..).unwrap_or_default();
                let context = &context[..context.len().min(LONGEST_CONTEXT)];
                self.send_message(INNER_COMMAND, &[b"\x04PONG", context].concat());
            } else if content.starts_with(b"\x04PONG") {
                self.ponged = true;
            }
            // Other commands are for other kinds of sockets, and are ignored.
            return Ok(());
        }
        // Like libzmq, drops what is not waited for.
        let Some(frames) = &mut self.answer else {
            return Ok(());
        };
        frames.push(content.to_vec());
        match (frames.len(), flags & MORE != 0) {
            (1, true) if content.is_empty() => Ok(()),
            (2, false) => {
                self.answered = self.answer.take().and_then(|mut frames| frames.pop());
                Ok(())
            }
            _ => Err(Cause::Unexpected(
                "has not the two frames of a reply: an empty one, and one with the answer",
            )),
        }
    }

    /// Decrypts what follows its nonce's counter. A counter that does not grow is refused, as it means that
    /// somebody repeats an earlier message.
    fn open_counted(&mut self, prefix: &[u8; 16], sealed: &[u8]) -> Result<Vec<u8>, Cause> {
        let (count, sealed) = sealed
            .split_first_chunk()
            .ok_or(Cause::Unexpected("is cut off"))?;
        let count = u64::from_be_bytes(*count);
        if count <= self.received {
            return Err(Cause::Unexpected("repeats an earlier one"));
        }
        // There is a session from WELCOME on, and nothing with a counter arrives before.
        let session = self.session.as_ref().ok_or(Cause::Sealed)?;
        let opened = open(session, &counted(prefix, count), sealed)?;
        self.received = count;
        Ok(opened)
    }

    fn send_message(&mut self, flags: u8, content: &[u8]) {
        let count = self.count();
        let Some(session) = &self.session else {
            return;
        };
        let nonce = counted(b"CurveZMQMESSAGEC", count);
        // Only a text of 256 GiB would be too long to encrypt.
        if let Ok(sealed) = seal(session, &nonce, &[&[flags], content].concat()) {
            let message = [b"\x07MESSAGE", &count.to_be_bytes()[..], &sealed].concat();
            self.send_frame(0, &message);
        }
    }

    fn send_frame(&mut self, flags: u8, body: &[u8]) {
        match u8::try_from(body.len()) {
            Ok(length) => self.output.extend_from_slice(&[flags, length]),
            Err(_) => {
                self.output.push(flags | LONG);
                let length = body.len() as u64;
                self.output.extend_from_slice(&length.to_be_bytes());
            }
        }
        self.output.extend_from_slice(body);
    }

    fn count(&mut self) -> u64 {
        self.sent += 1;
        self.sent
    }
}

/// The length of the cookie in a WELCOME, which the client sends back unchanged.
const COOKIE: usize = 96;

/// A nonce with a counter.
fn counted(prefix: &[u8; 16], count: u64) -> [u8; 24] {
    let mut nonce = [0; 24];
    nonce[..16].copy_from_slice(prefix);
    nonce[16..].copy_from_slice(&count.to_be_bytes());
    nonce
}

/// A nonce with random bytes.
fn random_nonce(prefix: &[u8; 8], random: &[u8; 16]) -> [u8; 24] {
    let mut nonce = [0; 24];
    nonce[..8].copy_from_slice(prefix);
    nonce[8..].copy_from_slice(random);
    nonce
}

fn seal(key: &SalsaBox, nonce: &[u8; 24], text: &[u8]) -> Result<Vec<u8>, Cause> {
    key.encrypt(nonce.into(), text).map_err(|_| Cause::Sealed)
}

fn open(key: &SalsaBox, nonce: &[u8; 24], sealed: &[u8]) -> Result<Vec<u8>, Cause> {
    key.decrypt(nonce.into(), sealed).map_err(|_| Cause::Sealed)
}

/// The greeting of a client that speaks ZMTP 3.0 with CURVE.
fn greeting() -> [u8; GREETING] {
    let mut greeting = [0; GREETING];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..17].copy_from_slice(b"CURVE");
    greeting
}

/// Checks the first ten bytes, or as many as have arrived, so that what is not ZMTP is noticed at once and
/// not after the deadline.
fn check_signature(start: &[u8]) -> Result<(), Cause> {
    let strange = |(index, byte): (usize, &u8)| match index {
        0 => *byte != 0xff,
        9 => *byte & 1 == 0,
        _ => false,
    };
    if start.iter().enumerate().any(strange) {
        return Err(Cause::Unexpected("is not that of ZeroMQ"));
    }
    Ok(())
}

fn check_greeting(greeting: &[u8; GREETING]) -> Result<(), Cause> {
    check_signature(greeting)?;
    if greeting[10] < 3 {
        return Err(Cause::Unexpected("is of a version before ZMTP 3"));
    }
    if greeting[12..32] != *b"CURVE\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        return Err(Cause::Unexpected("names another security than CURVE"));
    }
    Ok(())
}

/// A frame that has arrived.
struct Frame<'a> {
    flags: u8,
    body: &'a [u8],
    /// Its length, including its head.
    length: usize,
}

impl<'a> Frame<'a> {
    /// The first frame of what has arrived, once it is complete.
    fn first(input: &'a [u8]) -> Result<Option<Self>, Cause> {
        let Some((&flags, rest)) = input.split_first() else {
            return Ok(None);
        };
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(Cause::Unexpected("is no frame of ZMTP 3"));
        }
        let (length, head) = if flags & LONG == 0 {
            (rest.first().copied().map(u64::from), 2)
        } else {
            let length = rest.first_chunk().copied();
            (length.map(u64::from_be_bytes), 9)
        };
        let Some(length) = length else {
            return Ok(None);
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|&length| length <= LONGEST_FRAME)
            .ok_or(Cause::Unexpected("is longer than any of an arbiter"))?;
        let length = head + length;
        Ok(input.get(head..length).map(|body| Self {
            flags,
            body,
            length,
        }))
    }
}

/// The property Socket-Type of READY's metadata (RFC 23: length and name, length and value).
fn socket_type(mut metadata: &[u8]) -> Option<&[u8]> {
    let mut found = None;
    while let Some((&length, rest)) = metadata.split_first() {
        let (name, rest) = rest.split_at_checked(length.into())?;
        let (&length, rest) = rest.split_first_chunk()?;
        let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
        let (value, rest) = rest.split_at_checked(length)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            found = Some(value);
        }
        metadata = rest;
    }
    found
}

/// A connection to the arbiter, after its handshake.
pub struct Connection {
    stream: TcpStream,
    client: Client,
}

impl Connection {
    /// Connects and makes the handshake. Blocks for at most `LOOK_UP`, `CONNECT` and `HANDSHAKE` together.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open(endpoint: &Endpoint, server: [u8; KEY]) -> Result<Self, Error> {
        let failed = |step, cause: &dyn fmt::Display| Error {
            step,
            cause: Cause::Failed(format!("{endpoint}: {cause}")),
        };
        let names = Names::default();
        let (host, port) = (&*endpoint.host, endpoint.port);
        let addresses = names
            .look_up(host, port, Instant::now() + LOOK_UP)
            .map_err(|error| failed(Step::LookUp, &error))?;
        let late = |until| Ok::<_, io::Error>(names.late(host, port, until));
        let stream = dial::connect(&addresses, Instant::now() + CONNECT, late)
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .map_err(|error| failed(Step::Connect, &error))?;
        let mut random = [0; RANDOM];
        ring::default_provider()
            .secure_random
            .fill(&mut random)
            .map_err(|_| failed(Step::Connect, &"the system gives no random bytes"))?;
        let mut connection = Self {
            stream,
            client: Client::new(server, &random),
        };
        let deadline = Instant::now() + HANDSHAKE;
        connection.until(deadline, |client| client.is_ready().then_some(()))?;
        Ok(connection)
    }

    /// Makes a request and waits for the answer, for at most `ANSWER`.
    ///
    /// # Errors
    /// Why there is none. The connection is useless then.
    pub fn ask(&mut self, request: &[u8]) -> Result<Vec<u8>, Error> {
        self.client.request(request);
        self.until(Instant::now() + ANSWER, Client::take_answer)
    }

    /// Holds the connection until it is lost, and returns why. An arbiter that has answered one PING must
    /// answer all. One that never does has a ZeroMQ before 4.2, and its loss shows only when the connection
    /// is closed.
    pub fn hold(&mut self) -> Error {
        let mut answers = false;
        loop {
            let started = Instant::now();
            self.client.ping();
            match self.until(started + PONG, Client::take_pong) {
                Ok(()) => {
                    log::trace!("the arbiter has answered a PING");
                    answers = true;
                }
                Err(error) if error.cause == Cause::Late && !answers => {}
                Err(error) => return error,
            }
            match self.until(started + PING_EVERY, |_| None::<Infallible>) {
                Err(error) if error.cause == Cause::Late => {}
                Err(error) => return error,
                Ok(never) => match never {},
            }
        }
    }

    /// Sends and receives until `done` returns something or `deadline` passes.
    fn until<T>(
        &mut self,
        deadline: Instant,
        mut done: impl FnMut(&mut Client) -> Option<T>,
    ) -> Result<T, Error> {
        let mut buffer = [0; 4096];
        loop {
            let output = self.client.take_output();
            let read = send(&mut self.stream, &output, deadline)
                .and_then(|()| receive(&mut self.stream, &mut buffer, deadline));
            let result = match read {
                // Checked before the clock: after the process was suspended, the answer may be there
                // although the deadline has passed.
                Ok(length) => self.client.receive(&buffer[..length]),
                Err(cause) => Err(cause),
            };
            let step = self.client.step();
            result.map_err(|cause| Error { step, cause })?;
            if let Some(found) = done(&mut self.client) {
                return Ok(found);
            }
            if Instant::now() >= deadline {
                let cause = Cause::Late;
                return Err(Error { step, cause });
            }
        }
    }
}

/// The time left until `deadline`, but not zero, which would mean no timeout.
fn left(deadline: Instant) -> Option<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    Some(left.max(Duration::from_millis(1)))
}

fn send(stream: &mut TcpStream, mut bytes: &[u8], deadline: Instant) -> Result<(), Cause> {
    while !bytes.is_empty() {
        stream.set_write_timeout(left(deadline)).map_err(cause)?;
        match stream.write(bytes) {
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(cause(error)),
        }
        if !bytes.is_empty() && Instant::now() >= deadline {
            return Err(Cause::Late);
        }
    }
    Ok(())
}

/// Waits for bytes to arrive. 0 if a signal interrupted the wait.
fn receive(stream: &mut TcpStream, into: &mut [u8], deadline: Instant) -> Result<usize, Cause> {
    stream.set_read_timeout(left(deadline)).map_err(cause)?;
    match stream.read(into) {
        Ok(0) => Err(Cause::Closed),
        Ok(length) => Ok(length),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
        Err(error) => Err(cause(error)),
    }
}

fn cause(error: io::Error) -> Cause {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Cause::Late,
        ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe => {
            Cause::Closed
        }
        _ => Cause::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text and the bytes of RFC 32, repeated to the length of a key.
    #[test]
    fn z85_is_read_as_the_rfc_writes_it() {
        let bytes = [0x86, 0x4f, 0xd2, 0x6f, 0xb5, 0x59, 0xf7, 0x5b].repeat(4);
        assert_eq!(key_of_z85(&"HelloWorld".repeat(4)).unwrap()[..], bytes);
    }

    #[test]
    fn what_is_no_key_in_z85_is_none() {
        let zeros = "0".repeat(40);
        assert_eq!(key_of_z85(&zeros), Some([0; KEY]));
        for wrong in [
            "",
            &zeros[1..],
            &format!("{zeros}0"),
            &format!("{zeros}00000"),
            &zeros.replacen('0', "\"", 1),
            &zeros.replacen("00", "é", 1),
            &zeros.replacen("00000", "#####", 1),
        ] {
            assert_eq!(key_of_z85(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_endpoint_is_tcp_with_a_host_and_a_port() {
        for (text, shown) in [
            ("tcp://arbiter:4444", "arbiter:4444"),
            ("tcp://127.0.0.1:1", "127.0.0.1:1"),
            ("tcp://[::1]:4444", "[::1]:4444"),
            ("tcp://my_box-2.local:65535", "my_box-2.local:65535"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), shown);
        }
        for wrong in [
            "",
            "arbiter:4444",
            "ipc://arbiter:4444",
            "tcp://arbiter",
            "tcp://:4444",
            "tcp://arbiter:0",
            "tcp://arbiter:65536",
            "tcp://*:4444",
            "tcp://[arbiter]:4444",
            "tcp://::1:4444",
            "tcp://a/b:4444",
        ] {
            assert_eq!(wrong.parse::<Endpoint>(), Err(()), "{wrong}");
        }
    }

    fn client() -> Client {
        Client::new([9; KEY], &[7; RANDOM])
    }

    #[test]
    fn what_does_not_speak_zeromq_with_curve_is_known_by_its_greeting() {
        let mut null = greeting();
        null[12..17].copy_from_slice(b"NULL\0");
        let mut old = greeting();
        old[10] = 1;
        for (bytes, words) in [
            (&b"H"[..], "not that of ZeroMQ"),
            (b"HTTP/1.1 400 Bad Request\r\n", "not that of ZeroMQ"),
            (b"\xff\0\0\0\0\0\0\0\0\0", "not that of ZeroMQ"),
            (&old, "before ZMTP 3"),
            (&null, "another security than CURVE"),
        ] {
            let cause = client().receive(bytes).unwrap_err();
            let step = Step::Greeting;
            let message = Error { step, cause }.to_string();
            assert!(
                message.contains(words) && message.contains("--arbiter"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_frame_too_long_is_refused_by_its_head_alone() {
        let mut client = client();
        client.receive(&greeting()).unwrap();
        let head = [&[COMMAND | LONG][..], &u64::MAX.to_be_bytes()].concat();
        assert!(matches!(client.receive(&head), Err(Cause::Unexpected(_))));
    }

    #[test]
    fn an_error_command_is_told_with_its_status_and_nothing_else() {
        for (command, status) in [
            (&b"\x05ERROR\x03400"[..], Some(400)),
            (b"\x05ERROR\0", None),
            (b"\x05ERROR\x06s3cret", None),
            (b"\x05ERROR", None),
        ] {
            let mut client = client();
            client.receive(&greeting()).unwrap();
            let frame = [&[COMMAND, command.len() as u8], command].concat();
            assert_eq!(client.receive(&frame), Err(Cause::Refused(status)));
        }
    }

    #[test]
    fn hello_is_as_long_as_curvezmq_has_it_and_follows_the_greeting() {
        let mut client = client();
        assert_eq!(client.take_output(), greeting());
        client.receive(&greeting()[..30]).unwrap();
        assert!(client.take_output().is_empty());
        client.receive(&greeting()[30..]).unwrap();
        let output = client.take_output();
        assert_eq!(output.len(), 2 + 200);
        assert!(output.starts_with(b"\x04\xc8\x05HELLO\x01\0"));
    }

    proptest! {
        #[test]
        fn any_key_survives_z85(key: [u8; KEY]) {
            const DIGITS: &[u8] =
                b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
            let mut text = String::new();
            for chunk in key.chunks_exact(4) {
                let number = u32::from_be_bytes(chunk.try_into().unwrap());
                for power in [85_u32.pow(4), 85_u32.pow(3), 85 * 85, 85, 1] {
                    text.push(char::from(DIGITS[(number / power % 85) as usize]));
                }
            }
            prop_assert_eq!(key_of_z85(&text), Some(key));
        }

        #[test]
        fn no_text_makes_the_z85_reader_panic(text: String) {
            let _ = key_of_z85(&text);
        }

        #[test]
        fn no_bytes_make_the_handshake_panic(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..9),
        ) {
            let mut client = client();
            client.receive(&greeting()).unwrap();
            for piece in pieces {
                let _ = client.receive(&piece);
            }
            prop_assert!(!client.is_ready());
        }
    }
}
