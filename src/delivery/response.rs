//! Rewrites a destination's response into a canonical form; pure.
//!
//! ureq's parser is stricter than servers are: it accepts no headers on a 100, no folded lines, at most a
//! hundred headers, and twenty bytes for the line with a chunk's size. But a destination that answers has the
//! data, so its answer must be understood. So [`Reader`] is as lenient as curl, and writes what ureq can
//! parse: a head with the headers that this program uses, and the body re-chunked, whatever its framing was.
//! A body that ends by its framing gets a last chunk; one that breaks off does not.
//!
//! Not here: sockets ([`super::connect`]), and what the answer means ([`super::attempt`]).

use std::fmt;
use std::io::Write as _;
use std::mem;

/// Bytes that head, trailers and interim responses may have together.
const MOST_HEAD: usize = 300 * 1024;
/// Bytes of a line that are used. The rest is read and ignored.
const MOST_LINE: usize = 8 * 1024;
/// The longest `Retry-After` that is passed on.
const MOST_RETRY_AFTER: usize = 128;
/// The most digits of a chunk's size: those of a 64-bit number.
const MOST_DIGITS: usize = 16;

/// The answer is not HTTP/1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotHttp;

impl std::error::Error for NotHttp {}

impl fmt::Display for NotHttp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is not HTTP/1.1")
    }
}

/// Reads one response, in pieces of any size. Buffers at most one line of it.
#[derive(Debug)]
pub struct Reader {
    part: Part,
    line: Vec<u8>,
    /// Bytes of lines so far, including those that were ignored.
    head_bytes: usize,
    status: u16,
    old: bool,
    headers: Headers,
}

#[derive(Debug, PartialEq)]
enum Part {
    Status,
    Headers,
    Body(Framing),
    /// The last byte was read.
    Done,
    /// The rest cannot be read, or has not arrived. It is a response nevertheless.
    Broken,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Framing {
    Length(u64),
    UntilClose,
    /// In the line with a chunk's size.
    Size,
    Chunk(u64),
    /// In the line end behind a chunk.
    ChunkEnd,
    Trailers,
}

/// What is used of a head.
#[derive(Debug, Default)]
struct Headers {
    /// The latest header, which a folded line may continue.
    last: Option<(String, Vec<u8>)>,
    length: Option<Result<u64, ()>>,
    chunked: bool,
    /// The body has a transfer coding other than chunked, which is not supported.
    coded: bool,
    close: bool,
    keep_alive: bool,
    retry_after: Option<String>,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader for the response to a request that is not a HEAD.
    pub fn new() -> Self {
        Self {
            part: Part::Status,
            line: Vec::new(),
            head_bytes: 0,
            status: 0,
            old: false,
            headers: Headers::default(),
        }
    }

    /// Whether not a byte of it has arrived.
    pub fn is_new(&self) -> bool {
        self.part == Part::Status && self.head_bytes == 0
    }

    /// Whether its last byte was read.
    pub fn is_done(&self) -> bool {
        self.part == Part::Done
    }

    /// Whether there is nothing more to read of it.
    pub fn is_over(&self) -> bool {
        matches!(self.part, Part::Done | Part::Broken)
    }

    /// Parses bytes and appends the canonical form to `out`. Returns how many bytes it has used: all of
    /// them, unless the response ends before.
    ///
    /// # Errors
    /// The response does not begin as HTTP/1 does. After the status line nothing is an error.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, NotHttp> {
        let mut used = 0;
        while used < input.len() && !self.is_over() {
            let rest = &input[used..];
            used += match self.part {
                Part::Body(Framing::Length(left)) => self.take(rest, left, Framing::Length, out),
                Part::Body(Framing::Chunk(left)) => self.take(rest, left, Framing::Chunk, out),
                Part::Body(Framing::UntilClose) => {
                    write_chunk(rest, out);
                    rest.len()
                }
                _ => self.take_line(rest, out)?,
            };
        }
        Ok(used)
    }

    /// Notes that no more bytes will arrive: the peer has closed its side (`in_order`), the connection broke,
    /// or the deadline has passed. Appends what follows from that to `out`. False if there is no response.
    pub fn end(&mut self, in_order: bool, out: &mut Vec<u8>) -> bool {
        match self.part {
            Part::Status => {
                let line = mem::take(&mut self.line);
                if self.read_status(&line).is_err() || self.is_interim() {
                    return false;
                }
                self.break_off(out);
            }
            Part::Headers if self.is_interim() => return false,
            Part::Headers => self.break_off(out),
            Part::Body(Framing::UntilClose) if in_order => self.finish(out),
            Part::Body(_) => self.part = Part::Broken,
            Part::Done | Part::Broken => {}
        }
        true
    }

    fn take(
        &mut self,
        rest: &[u8],
        left: u64,
        framing: fn(u64) -> Framing,
        out: &mut Vec<u8>,
    ) -> usize {
        let length = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
        write_chunk(&rest[..length], out);
        let left = left - length as u64;
        match framing(left) {
            Framing::Length(0) => self.finish(out),
            Framing::Chunk(0) => self.part = Part::Body(Framing::ChunkEnd),
            more => self.part = Part::Body(more),
        }
        length
    }

    /// Takes a line, or as much of it as has arrived.
    fn take_line(&mut self, rest: &[u8], out: &mut Vec<u8>) -> Result<usize, NotHttp> {
        let end = rest.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(rest.len(), |end| end + 1);
        let room = MOST_LINE.saturating_sub(self.line.len());
        self.line
            .extend_from_slice(&rest[..end.unwrap_or(used).min(room)]);
        self.head_bytes += used;
        if self.part == Part::Status && !may_be_status(&self.line) {
            return Err(NotHttp);
        }
        if self.head_bytes > MOST_HEAD {
            match self.part {
                Part::Headers if !self.is_interim() => self.break_off(out),
                Part::Status | Part::Headers => return Err(NotHttp),
                _ => self.part = Part::Broken,
            }
            return Ok(used);
        }
        if end.is_some() {
            let mut line = mem::take(&mut self.line);
            line.pop_if(|last| *last == b'\r');
            self.read_line(&line, out)?;
        }
        Ok(used)
    }

    fn read_line(&mut self, line: &[u8], out: &mut Vec<u8>) -> Result<(), NotHttp> {
        match self.part {
            // Some servers send an extra line end after a body.
            Part::Status if line.is_empty() => {}
            Part::Status => {
                self.read_status(line)?;
                self.part = Part::Headers;
            }
            Part::Headers if line.is_empty() => self.begin_body(out),
            Part::Headers => self.headers.read(line),
            Part::Body(Framing::Size) => match chunk_size(line) {
                Some(0) => self.part = Part::Body(Framing::Trailers),
                Some(size) => {
                    self.part = Part::Body(Framing::Chunk(size));
                    // Lines count only until some of the body arrives.
                    self.head_bytes = 0;
                }
                None => self.part = Part::Broken,
            },
            Part::Body(Framing::ChunkEnd) if line.is_empty() => {
                self.part = Part::Body(Framing::Size);
            }
            Part::Body(Framing::ChunkEnd) => self.part = Part::Broken,
            Part::Body(Framing::Trailers) if line.is_empty() => self.finish(out),
            _ => {}
        }
        Ok(())
    }

    fn read_status(&mut self, line: &[u8]) -> Result<(), NotHttp> {
        let (status, old) = status_of(line).ok_or(NotHttp)?;
        self.status = status;
        self.old = old;
        Ok(())
    }

    fn begin_body(&mut self, out: &mut Vec<u8>) {
        self.headers.flush();
        if self.is_interim() {
            self.headers = Headers::default();
            self.part = Part::Status;
            return;
        }
        if self.has_no_body() {
            self.write_head(true, out);
            return self.finish(out);
        }
        let framing = if self.headers.chunked {
            Framing::Size
        } else {
            match self.headers.length {
                Some(Ok(length)) => Framing::Length(length),
                Some(Err(())) => return self.break_off(out),
                None => Framing::UntilClose,
            }
        };
        self.write_head(false, out);
        self.part = Part::Body(framing);
        if framing == Framing::Length(0) {
            self.finish(out);
        }
    }

    /// Whether this is an interim response, which the final one follows (RFC 9110, section 15.2).
    fn is_interim(&self) -> bool {
        matches!(self.status, 100 | 102..200)
    }

    fn has_no_body(&self) -> bool {
        matches!(self.status, 101 | 204 | 304)
    }

    /// Ends the response by its framing.
    fn finish(&mut self, out: &mut Vec<u8>) {
        if self.headers.coded && !self.has_no_body() {
            self.part = Part::Broken;
            return;
        }
        if !self.has_no_body() {
            out.extend_from_slice(b"0\r\n\r\n");
        }
        self.part = Part::Done;
    }

    /// Ends a head whose rest cannot be read: what is known by now is the response.
    fn break_off(&mut self, out: &mut Vec<u8>) {
        self.headers.flush();
        self.headers.close = true;
        self.write_head(false, out);
        self.part = Part::Broken;
    }

    fn write_head(&self, empty: bool, out: &mut Vec<u8>) {
        // Writing to a Vec cannot fail.
        let _ = write!(out, "HTTP/1.1 {} -\r\n", self.status);
        if let Some(value) = &self.headers.retry_after {
            let _ = write!(out, "Retry-After: {value}\r\n");
        }
        let Headers {
            length,
            chunked,
            close,
            keep_alive,
            ..
        } = self.headers;
        let ends_by_itself = empty || chunked || length.is_some();
        if close || self.old && !keep_alive || !ends_by_itself || self.status == 101 {
            out.extend_from_slice(b"Connection: close\r\n");
        }
        if !empty {
            out.extend_from_slice(b"Transfer-Encoding: chunked\r\n");
        }
        out.extend_from_slice(b"\r\n");
    }
}

impl Headers {
    fn read(&mut self, line: &[u8]) {
        if line.starts_with(b" ") || line.starts_with(b"\t") {
            // A folded line (RFC 9112, section 5.2).
            if let Some((_, value)) = &mut self.last {
                value.push(b' ');
                value.extend_from_slice(line.trim_ascii());
                value.truncate(MOST_LINE);
            }
            return;
        }
        self.flush();
        // A line without a colon is not a header, and is ignored.
        let mut parts = line.splitn(2, |byte| *byte == b':');
        if let (Some(name), Some(value)) = (parts.next(), parts.next()) {
            let name = String::from_utf8_lossy(name.trim_ascii()).to_ascii_lowercase();
            self.last = Some((name, value.trim_ascii().to_owned()));
        }
    }

    /// Evaluates the latest header, which is complete now.
    fn flush(&mut self) {
        let Some((name, value)) = self.last.take() else {
            return;
        };
        let options = || value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        let has = |option: &str| options().any(|one| one.eq_ignore_ascii_case(option.as_bytes()));
        match &*name {
            "content-length" => {
                for one in options() {
                    let length = content_length(one);
                    self.length = match self.length {
                        Some(before) if before != length => Some(Err(())),
                        _ => Some(length),
                    };
                }
            }
            "transfer-encoding" => {
                self.chunked |= has("chunked");
                let undone = |one: &[u8]| {
                    [&b"chunked"[..], b"identity", b""]
                        .iter()
                        .any(|known| one.eq_ignore_ascii_case(known))
                };
                self.coded |= !options().all(undone);
            }
            "connection" => {
                self.close |= has("close");
                self.keep_alive |= has("keep-alive");
            }
            "retry-after" => {
                let text = str::from_utf8(&value).ok();
                let plain = |text: &&str| {
                    text.len() <= MOST_RETRY_AFTER
                        && text
                            .bytes()
                            .all(|byte| byte == b' ' || byte.is_ascii_graphic())
                };
                self.retry_after = text.filter(plain).map(str::to_owned);
            }
            _ => {}
        }
    }
}

/// Whether a status line can begin like this, apart from empty lines and spaces before it.
fn may_be_status(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    let known = line.len().min(5);
    line[..known] == b"HTTP/"[..known]
}

/// The status in a status line, and whether the version is HTTP/1.0. The reason phrase may be missing, and
/// the version may be one that was not asked for.
fn status_of(line: &[u8]) -> Option<(u16, bool)> {
    let line = line.trim_ascii_start().strip_prefix(b"HTTP/")?;
    let blank = line.iter().position(u8::is_ascii_whitespace)?;
    let (version, rest) = line.split_at(blank);
    let old = match version {
        b"1.0" => true,
        b"1.1" | b"2" | b"2.0" | b"3" => false,
        _ => return None,
    };
    let (digits, rest) = rest.trim_ascii_start().split_first_chunk::<3>()?;
    if rest.first().is_some_and(|byte| !byte.is_ascii_whitespace()) {
        return None;
    }
    let status: u16 = str::from_utf8(digits).ok()?.parse().ok()?;
    (digits.iter().all(u8::is_ascii_digit) && status >= 100).then_some((status, old))
}

fn content_length(text: &[u8]) -> Result<u64, ()> {
    let digits = str::from_utf8(text)
        .ok()
        .filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    digits.and_then(|text| text.parse().ok()).ok_or(())
}

/// The size in the line before a chunk. Extensions are ignored, however long they are.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let line = line.trim_ascii_start();
    let digits = line
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    if !(1..=MOST_DIGITS).contains(&digits) {
        return None;
    }
    u64::from_str_radix(str::from_utf8(&line[..digits]).ok()?, 16).ok()
}

fn write_chunk(data: &[u8], out: &mut Vec<u8>) {
    if !data.is_empty() {
        // Writing to a Vec cannot fail.
        let _ = write!(out, "{:x}\r\n", data.len());
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How a connection ends in the tests.
    #[derive(Clone, Copy, PartialEq)]
    enum End {
        Open,
        Fin,
        Reset,
    }

    /// Feeds a response in pieces of this many bytes. Returns status, body and whether it is complete; none
    /// if it was not a response.
    fn read(input: &[u8], piece: usize, end: End) -> Option<(u16, Vec<u8>, bool)> {
        let (mut reader, mut out) = (Reader::new(), Vec::new());
        let mut rest = input;
        while !rest.is_empty() && !reader.is_over() {
            let length = piece.min(rest.len());
            let used = reader.feed(&rest[..length], &mut out).ok()?;
            rest = &rest[used..];
        }
        if !reader.is_over() && (end == End::Open || !reader.end(end == End::Fin, &mut out)) {
            return None;
        }
        let text = out.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
        let head = str::from_utf8(&out[..text]).unwrap();
        let status = head[9..12].parse().unwrap();
        let mut body = Vec::new();
        let mut rest = &out[text..];
        while !rest.is_empty() {
            let line = rest.iter().position(|byte| *byte == b'\r').unwrap();
            let size = usize::from_str_radix(str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            body.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 4 + size..];
            if size == 0 {
                assert!(rest.is_empty());
            }
        }
        Some((status, body, reader.is_done()))
    }

    fn whole(body: &str) -> Option<(u16, Vec<u8>, bool)> {
        Some((200, body.into(), true))
    }

    fn cut(body: &str) -> Option<(u16, Vec<u8>, bool)> {
        Some((200, body.into(), false))
    }

    #[test]
    fn what_the_world_sends_is_read() {
        let many = format!(
            "HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok",
            "X: y\r\n".repeat(500)
        );
        let long = format!(
            "HTTP/1.1 200 OK\r\nX: {}\r\nContent-Length: 2\r\n\r\nok",
            "y".repeat(100_000)
        );
        let extension = format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;{}\r\nok\r\n0\r\n\r\n",
            "e".repeat(500)
        );
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 \r\nContent-Length:2\r\n\r\nok",
            "HTTP/1.0 200 OK\nContent-Length: 2\n\nok",
            "HTTP/1.1\t200  Fine \r\ncontent-LENGTH :  2 \r\n\r\nok",
            "\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/2 200\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 100 Continue\r\nVia: 1.1 proxy\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 100 Continue\r\nContent-Length: 7\r\n\r\nHTTP/1.1 103 X\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\tc\r\nContent-Length:\r\n 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nB\u{e4}d N\u{e4}me: \u{1}\r\n: x\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nok",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;an-extension-of-many=letters\r\no\r\n1 \r\nk\r\n0;x\r\nTrailer: y\r\n\r\n",
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n0002\nok\n0\n\n",
            &many,
            &long,
            &extension,
        ] {
            for piece in [1, 2, 7, 100_000] {
                assert_eq!(
                    read(text.as_bytes(), piece, End::Open),
                    whole("ok"),
                    "{text:.200}"
                );
            }
        }
        for text in [
            "HTTP/1.1 204 No\r\n\r\n",
            "HTTP/1.1 304 No\r\nContent-Length: 7\r\n\r\n",
            "HTTP/1.1 101 No\r\nUpgrade: x\r\n\r\n",
        ] {
            let (_, body, done) = read(text.as_bytes(), 3, End::Open).unwrap();
            assert!(body.is_empty() && done, "{text}");
        }
    }

    #[test]
    fn a_body_without_length_is_whole_only_when_the_peer_has_said_so() {
        let text = b"HTTP/1.1 200 OK\r\n\r\nok";
        assert_eq!(read(text, 5, End::Fin), whole("ok"));
        assert_eq!(read(text, 5, End::Reset), cut("ok"));
    }

    #[test]
    fn after_the_status_line_nothing_is_an_error_any_more() {
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "y".repeat(400_000));
        for text in [
            "HTTP/1.1 200 OK",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\nX: y",
            "HTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\nX: y\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n",
            &endless,
        ] {
            for end in [End::Fin, End::Reset] {
                assert_eq!(read(text.as_bytes(), 1000, end), cut(""), "{text:.100}");
            }
        }
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhalf",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalfmore\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhalf",
        ] {
            assert_eq!(read(text.as_bytes(), 9, End::Fin), cut("half"), "{text}");
        }
    }

    #[test]
    fn what_is_not_http_is_told_at_its_first_bytes() {
        for text in [
            "\u{1}garbage",
            "SSH-2.0-x\r\n",
            "HTTP/1.2 200 OK\r\n",
            "HTTP/1.1 20 OK\r\n",
            "HTTP/1.1 2000 OK\r\n",
            "HTTP/1.1 099 OK\r\n",
            "HTTP/1.1 +20 OK\r\n",
            "HTTP/1.1 OK\r\n",
            "<html>",
        ] {
            assert_eq!(read(text.as_bytes(), 100, End::Fin), None, "{text}");
        }
        for text in [
            "",
            "HTTP/1.1 20",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 100 Continue",
            "HTTP/1.1 100 Continue\r\nX: y\r\n",
        ] {
            assert_eq!(read(text.as_bytes(), 100, End::Fin), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            input in "HTTP/1\\.1 [12]0[0-4] [a-z]{0,3}\r?\n(([A-Za-z-]{1,9}|Content-Length|Transfer-Encoding) ?: ?([0-9]|chunked|x)\r?\n( [a-z]\r\n)?){0,4}\r\n([0-4]\r\n|[a-z\r\n]{0,9}){0,5}",
            piece in 1_usize..9,
            fin in any::<bool>(),
        ) {
            let end = if fin { End::Fin } else { End::Reset };
            let all = read(input.as_bytes(), usize::MAX, end);
            prop_assert_eq!(read(input.as_bytes(), piece, end), all);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(input in proptest::collection::vec(any::<u8>(), 0..300), piece in 1_usize..50) {
            let _ = read(&input, piece, End::Fin);
            let _ = read(&[b"HTTP/1.1 200 OK\r\n", &input[..]].concat(), piece, End::Reset);
        }

        #[test]
        fn a_body_comes_out_as_it_went_in(body in proptest::collection::vec(any::<u8>(), 0..3000), piece in 1_usize..2000) {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let lengthy = [head.as_bytes(), &body, b"junk"].concat();
            prop_assert_eq!(read(&lengthy, piece, End::Open), Some((200, body.clone(), true)));
            let mut chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for part in body.chunks(piece) {
                chunked.extend(format!("{:X};a=b\r\n", part.len()).bytes());
                chunked.extend(part);
                chunked.extend(b"\r\n");
            }
            chunked.extend(b"0\r\n\r\n");
            prop_assert_eq!(read(&chunked, piece, End::Open), Some((200, body, true)));
        }
    }
}
