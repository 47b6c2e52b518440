//! Parses bytes into whole requests by HTTP/1.1's framing (RFC 9112); no sockets.
//!
//! Anything ambiguous is refused: two framings, odd lengths, lines that end with LF alone. What passes is
//! written out again from its parts, so that tiny_http cannot read it as a different request.
//!
//! Not here: deadlines and connections (`connection`), and what a request asks for (`routes`).

use std::fmt::Write as _;
use std::io::{self, Read};
use std::mem;

use httparse::{EMPTY_HEADER, Status};
use ureq::http::Uri;
use ureq::http::uri::Authority;

use crate::answer::Refusal;
use crate::server::CONNECTION;

/// The largest request line and headers together, in bytes; also the largest trailer section.
pub const MAX_HEAD: usize = 16 * 1024;
/// The most headers, and the most trailers.
const MAX_HEADERS: usize = 64;
/// The longest line that gives a chunk's size, its extensions included, in bytes.
const MAX_CHUNK_LINE: usize = 256;
/// The memory that a chunked body takes at first, in bytes.
const FIRST_STEP: usize = 16 * 1024;
/// The most bytes that are read at once.
const READ: usize = 4 * 1024;

/// The headers that are used of an app's request. No others are passed on.
const PASSED: &[&str] = &["X-Api-Key", "Authorization", "Idempotency-Key"];
/// The headers that are used of a request of the owner.
const OF_OWNER: &[&str] = &[
    "Host",
    "Authorization",
    "Content-Type",
    "Origin",
    "Sec-Fetch-Site",
];

/// One whole request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    head: Head,
    body: Vec<u8>,
}

impl Request {
    /// The method, a token (RFC 9110, section 5.6.2).
    pub fn method(&self) -> &str {
        &self.head.method
    }

    /// The path and query.
    pub fn target(&self) -> &str {
        &self.head.target
    }

    /// The path without its query.
    pub fn path(&self) -> &str {
        let target = self.target();
        target.split_once('?').map_or(target, |(path, _)| path)
    }

    /// The value of a header, by its usual spelling. None if it is absent, or not among those that are kept:
    /// see [`Framer::new`] and [`Framer::of_owner`].
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut kept = self.head.passed.iter();
        let found = kept.find(|(kept, _)| *kept == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The body, without its framing.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Moves the body, without its framing, out of the request. [`Request::normalised_head`] has to be called
    /// first, as it states the body's length.
    pub fn take_body(&mut self) -> Vec<u8> {
        mem::take(&mut self.body)
    }

    /// Whether the client wants to send another request after this one.
    pub fn keeps_alive(&self) -> bool {
        self.head.keep_alive
    }

    /// Whether the request is HTTP/1.0, so that the client has to be told if its connection stays open.
    pub fn is_old(&self) -> bool {
        self.head.old
    }

    /// The head as it is passed on: in canonical form, with only the headers that the service uses, and the
    /// number of the connection that waits for the answer.
    pub fn normalised_head(&self, connection: u64) -> Vec<u8> {
        let Head {
            method,
            target,
            passed,
            ..
        } = &self.head;
        let values: usize = passed.iter().map(|(_, value)| 32 + value.len()).sum();
        let mut head = String::with_capacity(128 + target.len() + values);
        // Writing to a String cannot fail.
        let _ = write!(
            head,
            "{method} {target} HTTP/1.1\r\n{CONNECTION}: {connection}\r\n"
        );
        for (name, value) in passed {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        let _ = write!(head, "Content-Length: {}\r\n\r\n", self.body.len());
        head.into_bytes()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Head {
    method: String,
    target: String,
    passed: Vec<(&'static str, String)>,
    framing: Framing,
    keep_alive: bool,
    old: bool,
    expects_continue: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
}

impl Framing {
    /// How many bytes of memory a body takes after this many have arrived. For a chunked one, whose length is
    /// unknown, that is a power of two, so that it grows in few steps.
    fn memory(&self, so_far: usize, max_body: usize) -> usize {
        match self {
            Self::Length(length) => *length,
            Self::Chunked => so_far
                .max(FIRST_STEP)
                .checked_next_power_of_two()
                .map_or(max_body, |step| step.min(max_body)),
        }
    }
}

/// How much of the next request has arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Idle,
    /// A part of its head.
    Head,
    /// Its head, and not all of its body. After the next read the body takes at most this many bytes of
    /// memory: its whole length if that was announced, else what has arrived, and some more.
    Body(usize),
}

/// Splits a connection's bytes into requests.
pub struct Framer {
    max_body: usize,
    /// The headers that requests keep.
    kept: &'static [&'static str],
    /// Bytes that have arrived and are not parsed yet.
    buffer: Vec<u8>,
    /// How much of the buffer was searched for the end of a head.
    searched: usize,
    body: Option<Body>,
    /// Whether the client waits for `100 Continue`.
    awaits_continue: bool,
}

struct Body {
    head: Head,
    content: Vec<u8>,
    decoder: Decoder,
}

impl Framer {
    /// A framer for one connection of an app, whose bodies may have at most this many bytes.
    pub fn new(max_body: usize) -> Self {
        Self::keeping(PASSED, max_body)
    }

    /// The same for a connection of the owner, whose requests keep other headers: `Host`, `Authorization`,
    /// `Content-Type`, `Origin` and `Sec-Fetch-Site`.
    pub fn of_owner(max_body: usize) -> Self {
        Self::keeping(OF_OWNER, max_body)
    }

    fn keeping(kept: &'static [&'static str], max_body: usize) -> Self {
        Self {
            max_body,
            kept,
            buffer: Vec::new(),
            searched: 0,
            body: None,
            awaits_continue: false,
        }
    }

    /// How much of the next request has arrived, as of the last [`Framer::take`].
    pub fn phase(&self) -> Phase {
        match &self.body {
            Some(body) => {
                let soon = body.content.len() + self.buffer.len() + READ;
                Phase::Body(body.head.framing.memory(soon, self.max_body))
            }
            // A CR may be half of an empty line, which is ignored.
            None if matches!(self.buffer[..], [] | [b'\r']) => Phase::Idle,
            None => Phase::Head,
        }
    }

    /// Whether the next request is a HEAD, as far as it has arrived. Then even a refusal has no body.
    pub fn is_head(&self) -> bool {
        match &self.body {
            Some(body) => body.head.method == "HEAD",
            None => self.buffer.starts_with(b"HEAD "),
        }
    }

    /// True once for each request whose client has sent no body yet and waits to be told
    /// `100 Continue` (RFC 9110, section 10.1.1).
    pub fn takes_continue(&mut self) -> bool {
        mem::take(&mut self.awaits_continue)
    }

    /// Reads once and returns how many bytes there were, 0 at the end. Blocks as `source` does.
    ///
    /// # Errors
    /// Those of `source`.
    pub fn read_from(&mut self, source: &mut impl Read) -> io::Result<usize> {
        let old = self.buffer.len();
        self.buffer.resize(old + READ, 0);
        let read = source.read(&mut self.buffer[old..]);
        self.buffer.truncate(old + *read.as_ref().unwrap_or(&0));
        read
    }

    /// Takes the next whole request from what was read, if there is one.
    ///
    /// # Errors
    /// Why the request is refused. The connection has to be closed then, since it is unknown where the next
    /// request would begin.
    pub fn take(&mut self) -> Result<Option<Request>, Refusal> {
        if self.body.is_none() {
            let Some(head) = self.next_head()? else {
                return Ok(None);
            };
            let decoder = match head.framing {
                Framing::Length(length) => Decoder::Length(length),
                Framing::Chunked => Decoder::Size,
            };
            self.awaits_continue =
                head.expects_continue && self.buffer.is_empty() && !decoder.is_done();
            self.body = Some(Body {
                head,
                content: Vec::new(),
                decoder,
            });
        }
        if let Some(body) = &mut self.body {
            if !self.buffer.is_empty() {
                self.awaits_continue = false;
            }
            // Not all at once: memory is taken for what has arrived, not for what was announced.
            let soon = body.content.len() + self.buffer.len();
            let most = body.head.framing.memory(soon, self.max_body);
            let soon = soon.min(most);
            if body.content.capacity() < soon {
                let room = (2 * soon).min(most) - body.content.len();
                body.content.reserve_exact(room);
            }
            let used = body
                .decoder
                .feed(&self.buffer, &mut body.content, self.max_body)?;
            self.buffer.drain(..used);
        }
        if self.buffer.is_empty() {
            // An idle connection holds no memory.
            self.buffer = Vec::new();
        }
        let whole = self.body.take_if(|body| body.decoder.is_done());
        Ok(whole.map(|body| Request {
            head: body.head,
            body: body.content,
        }))
    }

    fn next_head(&mut self) -> Result<Option<Head>, Refusal> {
        if self.searched == 0 {
            // Empty lines before a request are ignored (RFC 9112, section 2.2).
            let pairs = self.buffer.chunks_exact(2);
            let empty = 2 * pairs.take_while(|pair| pair == b"\r\n").count();
            self.buffer.drain(..empty);
            match self.buffer.first() {
                // Perhaps half of another empty line.
                Some(b'\r') if self.buffer.len() == 1 => return Ok(None),
                Some(first) if !first.is_ascii_graphic() => {
                    return Err(malformed(
                        "this is not an HTTP request: if it is TLS, use http:// here",
                    ));
                }
                _ => {}
            }
        }
        let end = end_of_lines(&self.buffer, self.searched)?;
        self.searched = self.buffer.len();
        if end.unwrap_or(self.buffer.len()) > MAX_HEAD {
            return Err(Refusal::HeadTooLarge);
        }
        let Some(end) = end else {
            return Ok(None);
        };
        let head = read_head(&self.buffer[..end], self.kept, self.max_body)?;
        self.buffer.drain(..end);
        self.searched = 0;
        Ok(Some(head))
    }
}

fn malformed(what: &'static str) -> Refusal {
    Refusal::BadRequest(what)
}

/// Where a block of lines ends with an empty one, at `from` or later. Every line has to end with CRLF. A
/// lone LF would be allowed (RFC 9112, section 2.2), but not every parser takes it for a line end.
fn end_of_lines(bytes: &[u8], from: usize) -> Result<Option<usize>, Refusal> {
    for (at, _) in bytes
        .iter()
        .enumerate()
        .skip(from)
        .filter(|(_, byte)| **byte == b'\n')
    {
        let until = &bytes[..=at];
        if !until.ends_with(b"\r\n") {
            return Err(malformed("a line ends with LF alone: end each with CRLF"));
        }
        if until.ends_with(b"\r\n\r\n") || until == b"\r\n" {
            return Ok(Some(at + 1));
        }
    }
    Ok(None)
}

fn read_head(bytes: &[u8], kept: &[&'static str], max_body: usize) -> Result<Head, Refusal> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(bytes) {
        Ok(Status::Complete(length)) if length == bytes.len() => {}
        Ok(_) => return Err(malformed("the request line or a header is not HTTP")),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::HeadTooLarge),
        Err(httparse::Error::Version) => return Err(version(bytes)),
        Err(httparse::Error::HeaderName) => {
            return Err(malformed(
                "a header's name is not one: no spaces in it or before its colon, and no folded lines",
            ));
        }
        Err(httparse::Error::HeaderValue) => {
            return Err(malformed("a header's value has control characters in it"));
        }
        Err(_) => return Err(malformed("the request line or a header is not HTTP")),
    }
    // The parser has succeeded, so all three are present.
    let method = parsed.method.unwrap_or_default();
    let old = parsed.version == Some(0);
    let mut head = Head {
        method: method.to_owned(),
        target: target(method, parsed.path.unwrap_or_default())?,
        passed: Vec::new(),
        framing: Framing::Length(0),
        keep_alive: !old,
        old,
        expects_continue: false,
    };

    let (mut length, mut encoding, mut host) = (None, None, None);
    let (mut close, mut keep_alive, mut encoded) = (false, false, false);
    for header in parsed.headers.iter() {
        let (name, value) = (header.name, header.value.trim_ascii());
        let once = |seen: bool| {
            if seen {
                return Err(malformed("a header that may be there once is there twice"));
            }
            Ok(())
        };
        if let Some(&name) = kept.iter().find(|kept| name.eq_ignore_ascii_case(kept)) {
            once(head.passed.iter().any(|(seen, _)| *seen == name))?;
            let value = str::from_utf8(value).ok().filter(|text| text.is_ascii());
            let value = value.ok_or(malformed(
                "X-Api-Key, Authorization, Idempotency-Key or another header that is used here has \
                 characters outside ASCII",
            ))?;
            head.passed.push((name, value.to_owned()));
        }
        if name.eq_ignore_ascii_case("Content-Length") {
            once(length.replace(value).is_some())?;
        } else if name.eq_ignore_ascii_case("Transfer-Encoding") {
            once(encoding.replace(value).is_some())?;
        } else if name.eq_ignore_ascii_case("Content-Encoding") {
            let codings = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            let is_none =
                |coding: &[u8]| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity");
            encoded |= !codings.into_iter().all(is_none);
        } else if name.eq_ignore_ascii_case("Host") {
            once(host.replace(value).is_some())?;
        } else if name.eq_ignore_ascii_case("Expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Refusal::Expectation);
            }
            // HTTP/1.0 does not know it (RFC 9110, section 10.1.1).
            head.expects_continue = !old;
        } else if name.eq_ignore_ascii_case("Connection") {
            let options = || value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            close |= options().any(|option| option.eq_ignore_ascii_case(b"close"));
            keep_alive |= options().any(|option| option.eq_ignore_ascii_case(b"keep-alive"));
        }
    }
    head.keep_alive = !close && (keep_alive || !old);

    match host {
        None if !old => return Err(malformed("the Host header is missing")),
        Some(host) if !host.is_empty() => {
            let named = Authority::try_from(host).ok();
            if named.is_none_or(|authority| authority.as_str().contains('@')) {
                return Err(malformed("the Host header is not a host"));
            }
        }
        _ => {}
    }
    head.framing = match (length, encoding) {
        (Some(_), Some(_)) => {
            return Err(malformed(
                "there are Content-Length and Transfer-Encoding: send one of them",
            ));
        }
        (Some(length), None) => Framing::Length(content_length(length, max_body)?),
        (None, Some(_)) if old => {
            return Err(malformed("HTTP/1.0 has no Transfer-Encoding"));
        }
        (None, Some(encoding)) => {
            chunked(encoding)?;
            Framing::Chunked
        }
        // These methods are about their body, which would be lost if its length was forgotten.
        (None, None) if matches!(method, "POST" | "PUT" | "PATCH") => {
            return Err(Refusal::LengthRequired);
        }
        (None, None) => Framing::Length(0),
    };
    if encoded {
        return Err(Refusal::ContentEncoding);
    }
    Ok(head)
}

/// Distinguishes an HTTP version that is not served from what is not HTTP at all.
fn version(head: &[u8]) -> Refusal {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let version = match [words.next(), words.next(), words.next(), words.next()] {
        [Some(_), Some(target), Some(version), None] if !target.is_empty() => version,
        _ => b"",
    };
    match version.strip_prefix(b"HTTP/") {
        Some([major, b'.', minor]) if major.is_ascii_digit() && minor.is_ascii_digit() => {
            Refusal::Version
        }
        _ => malformed("the request line is not METHOD TARGET HTTP/1.1"),
    }
}

/// The path and query of a request target (RFC 9112, section 3.2).
fn target(method: &str, target: &str) -> Result<String, Refusal> {
    if method == "CONNECT" {
        return Err(Refusal::NotImplemented("CONNECT is for proxies"));
    }
    if !target.is_ascii() || target.contains('#') {
        return Err(malformed(
            "the request target has characters that must be percent-encoded",
        ));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok(target.to_owned());
    }
    // What clients send to a proxy, and every server must take (section 3.2.2).
    let absolute = target.parse::<Uri>().ok().filter(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri
                .authority()
                .is_some_and(|authority| !authority.as_str().contains('@'))
    });
    let path = absolute.as_ref().and_then(Uri::path_and_query);
    match path {
        // Displayed, it begins with a slash even where the URL has no path.
        Some(path) => Ok(path.to_string()),
        None => Err(malformed("the request target is neither a path nor a URL")),
    }
}

fn content_length(value: &[u8], max_body: usize) -> Result<usize, Refusal> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(malformed("Content-Length is not a number"));
    }
    // Only digits: what does not fit into a number is too large as well.
    let length = str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok());
    length
        .filter(|length| *length <= max_body)
        .ok_or(Refusal::TooLarge(max_body))
}

/// Accepts `chunked` and nothing else (RFC 9112, sections 6.1 and 6.3).
fn chunked(value: &[u8]) -> Result<(), Refusal> {
    let codings = || {
        value
            .split(|byte| *byte == b',')
            .map(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"chunked"))
    };
    match (codings().filter(|is| *is).count(), codings().next_back()) {
        (1, Some(true)) if codings().count() == 1 => Ok(()),
        (1, Some(true)) => Err(Refusal::NotImplemented(
            "a Transfer-Encoding other than chunked is not known here",
        )),
        _ => Err(malformed(
            "Transfer-Encoding does not end with chunked, once: nobody knows where the body ends",
        )),
    }
}

/// Decodes a body's framing, piece by piece.
#[derive(Debug, PartialEq, Eq)]
enum Decoder {
    /// This many bytes of a body of known length are missing.
    Length(usize),
    /// The line with the next chunk's size.
    Size,
    /// This many bytes of a chunk are missing.
    Chunk(usize),
    /// The line end after a chunk.
    ChunkEnd,
    /// The trailer section after the last chunk.
    Trailers,
    /// The body is complete.
    Done,
}

impl Decoder {
    fn is_done(&self) -> bool {
        matches!(self, Self::Done | Self::Length(0))
    }

    /// Moves what it can from `input` to `content`. Returns how many bytes of `input` it has used.
    fn feed(
        &mut self,
        input: &[u8],
        content: &mut Vec<u8>,
        max_body: usize,
    ) -> Result<usize, Refusal> {
        let mut used = 0;
        loop {
            let rest = &input[used..];
            match self {
                Self::Done => return Ok(used),
                Self::Length(missing) | Self::Chunk(missing) => {
                    let taken = rest.len().min(*missing);
                    content.extend_from_slice(&rest[..taken]);
                    used += taken;
                    *missing -= taken;
                    if *missing > 0 || matches!(self, Self::Length(_)) {
                        return Ok(used);
                    }
                    *self = Self::ChunkEnd;
                }
                Self::ChunkEnd => match rest {
                    [b'\r', b'\n', ..] => {
                        used += 2;
                        *self = Self::Size;
                    }
                    [] | [b'\r'] => return Ok(used),
                    _ => return Err(malformed("a chunk is longer than its size says")),
                },
                Self::Size => {
                    let Some((line, size)) = chunk_size(rest)? else {
                        return Ok(used);
                    };
                    used += line;
                    *self = match usize::try_from(size) {
                        Ok(0) => Self::Trailers,
                        Ok(size) if size <= max_body - content.len() => Self::Chunk(size),
                        _ => return Err(Refusal::TooLarge(max_body)),
                    };
                }
                Self::Trailers => {
                    let end = end_of_lines(rest, 0)?;
                    if end.unwrap_or(rest.len()) > MAX_HEAD {
                        return Err(Refusal::HeadTooLarge);
                    }
                    let Some(end) = end else {
                        return Ok(used);
                    };
                    let mut trailers = [EMPTY_HEADER; MAX_HEADERS];
                    match httparse::parse_headers(&rest[..end], &mut trailers) {
                        // Trailers are not used, and may be dropped (RFC 9110, section 6.5.1).
                        Ok(Status::Complete((length, _))) if length == end => used += end,
                        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::HeadTooLarge),
                        _ => return Err(malformed("a trailer is not a header")),
                    }
                    *self = Self::Done;
                }
            }
        }
    }
}

/// The first line's length and the chunk size in it, once the line is complete.
fn chunk_size(bytes: &[u8]) -> Result<Option<(usize, u64)>, Refusal> {
    let bad = Err(malformed(
        "a chunk's size is not a line with a hexadecimal number",
    ));
    let end = bytes.iter().position(|byte| *byte == b'\n');
    let length = end.map_or(bytes.len(), |end| end + 1);
    if length > MAX_CHUNK_LINE {
        return bad;
    }
    let Some(end) = end else {
        return Ok(None);
    };
    // The parser below takes an empty line for a zero, and any byte in an extension.
    let (Some(first), Some(text)) = (bytes.first(), bytes[..end].strip_suffix(b"\r")) else {
        return bad;
    };
    let control = |byte: &u8| byte.is_ascii_control() && *byte != b'\t';
    if !first.is_ascii_hexdigit() || text.iter().any(control) {
        return bad;
    }
    match httparse::parse_chunk_size(&bytes[..length]) {
        Ok(Status::Complete((used, size))) if used == length => Ok(Some((length, size))),
        _ => bad,
    }
}
