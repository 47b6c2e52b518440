//! A client of the service: HTTPS on a connection that is kept, at its own pace.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::process::Process;
use crate::support::{self, PATIENCE, Service};

/// What a slow client writes at once, and how long it waits after it.
const SLOW_WRITE: (usize, Duration) = (1000, Duration::from_millis(100));
/// The same for reading.
const SLOW_READ: (usize, Duration) = (32 * 1024, Duration::from_millis(100));

pub type Tls = StreamOwned<ClientConnection, TcpStream>;

pub struct Response {
    pub status: u16,
    pub body: String,
}

impl Response {
    /// The code of an error, or nothing.
    pub fn code(&self) -> String {
        let json: serde_json::Value = serde_json::from_str(&self.body).unwrap_or_default();
        json["error"]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}

/// Connects from an address of this machine.
pub fn tcp(from: [u8; 4], to: SocketAddr) -> io::Result<TcpStream> {
    let stream = support::connect(from, to)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Connects with TLS. The certificate may be renewed at any time, so its CA is read again.
pub fn tls(from: [u8; 4], process: &Process) -> io::Result<Tls> {
    let trust = process.identity.trust()?;
    let name = ServerName::from(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST));
    let session = ClientConnection::new(trust, name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(session, tcp(from, process.address)?);
    stream.conn.complete_io(&mut stream.sock)?;
    Ok(stream)
}

/// A connection that is made when it is needed.
pub struct Client {
    from: [u8; 4],
    slow: bool,
    stream: Option<BufReader<Tls>>,
}

impl Client {
    pub fn new(from: [u8; 4], slow: bool) -> Self {
        Self {
            from,
            slow,
            stream: None,
        }
    }

    /// Whether the next request uses a connection that the service may have closed meanwhile.
    pub fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    pub fn close(&mut self) {
        self.stream = None;
    }

    /// Makes one request. After an error the connection is closed.
    pub fn ask(&mut self, process: &Process, request: &[u8]) -> io::Result<Response> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => BufReader::with_capacity(SLOW_READ.0, tls(self.from, process)?),
        };
        let pieces = if self.slow {
            SLOW_WRITE.0
        } else {
            request.len()
        };
        for piece in request.chunks(pieces) {
            stream.get_mut().write_all(piece)?;
            stream.get_mut().flush()?;
            if self.slow {
                thread::sleep(SLOW_WRITE.1);
            }
        }
        let (response, keep) = read(&mut stream, self.slow)?;
        if keep {
            self.stream = Some(stream);
        }
        Ok(response)
    }
}

/// Reads a response. Returns whether the connection can be used again.
pub fn read(stream: &mut impl BufRead, slow: bool) -> io::Result<(Response, bool)> {
    let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let (mut status, mut length, mut keep) = (None, None, true);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        if !line.ends_with("\r\n") {
            return Err(broken("broken off in the head"));
        }
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if status.is_none() {
            status = line.split(' ').nth(1).and_then(|text| text.parse().ok());
        } else if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().ok();
        } else if line == "connection: close" {
            keep = false;
        }
    }
    let (Some(status), Some(length)) = (status, length) else {
        return Err(broken("no status or no length"));
    };
    let mut body = vec![0; length];
    for piece in body.chunks_mut(if slow { SLOW_READ.0 } else { length.max(1) }) {
        stream.read_exact(piece)?;
        if slow {
            thread::sleep(SLOW_READ.1);
        }
    }
    let body = String::from_utf8(body).map_err(|_| broken("not UTF-8"))?;
    Ok((Response { status, body }, keep))
}

/// A POST of JSON.
pub fn post(path: &str, token: &str, key: Option<&str>, body: &str) -> Vec<u8> {
    let mut headers = vec![("X-Api-Key", token), ("Connection", "keep-alive")];
    headers.extend(key.map(|key| ("Idempotency-Key", key)));
    Service::written("POST", path, &headers, body.as_bytes())
}

/// Reads until the peer closes. False if it has not within the time that the stream allows.
pub fn is_closed(stream: &mut impl Read) -> bool {
    let mut piece = [0; 4096];
    loop {
        match stream.read(&mut piece) {
            Ok(1..) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                return false;
            }
            Ok(0) | Err(_) => return true,
        }
    }
}
