//! The clients: connections that ask, and threads that make them ask all the time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Response, Status};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::Value;

use crate::support::PATIENCE;

/// Answered by every server here, and used to see that it serves.
const STATUS: &[u8] = b"GET /status HTTP/1.1\r\nHost: bench\r\n\r\n";

/// TCP or TLS.
trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// A connection that is kept.
pub struct Client {
    stream: Box<dyn Stream>,
    arrived: Vec<u8>,
}

impl Client {
    /// Sends a request, and returns the body of the answer, which must be 200.
    pub fn ask(&mut self, request: &[u8]) -> String {
        self.send(request);
        self.answer()
    }

    pub fn send(&mut self, request: &[u8]) {
        self.stream.write_all(request).unwrap();
    }

    /// Waits for the answer to what was sent.
    pub fn answer(&mut self) -> String {
        let mut piece = [0; 4096];
        loop {
            if let Some((status, body)) = self.parse() {
                assert_eq!(status, 200, "{body}");
                return body;
            }
            let read = self.stream.read(&mut piece).unwrap();
            assert!(read > 0, "closed after {} bytes", self.arrived.len());
            self.arrived.extend_from_slice(&piece[..read]);
        }
    }

    /// The status and the body of the answer, once it has arrived.
    fn parse(&mut self) -> Option<(u16, String)> {
        let mut headers = [EMPTY_HEADER; 16];
        let mut response = Response::new(&mut headers);
        let Status::Complete(head) = response.parse(&self.arrived).unwrap() else {
            return None;
        };
        let status = response.code.unwrap();
        let end = head + content_length(response.headers);
        let body = String::from_utf8_lossy(self.arrived.get(head..end)?).into_owned();
        self.arrived.drain(..end);
        Some((status, body))
    }
}

/// What a head says of its body; 0 if nothing.
pub fn content_length(headers: &[httparse::Header<'_>]) -> usize {
    let mut found = headers.iter();
    let found = found.find(|header| header.name.eq_ignore_ascii_case("content-length"));
    found.map_or(0, |header| {
        str::from_utf8(header.value).unwrap().parse().unwrap()
    })
}

/// Where a server listens.
#[derive(Clone)]
pub struct Server {
    pub address: SocketAddr,
    /// What its clients trust, if it speaks TLS.
    pub trust: Option<Arc<ClientConfig>>,
}

impl Server {
    /// A connection that has had a round trip.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn try_client(&self) -> std::io::Result<Client> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let stream: Box<dyn Stream> = match &self.trust {
            None => Box::new(stream),
            Some(trust) => {
                let name = ServerName::try_from("localhost").unwrap();
                let client = ClientConnection::new(trust.clone(), name).unwrap();
                Box::new(StreamOwned::new(client, stream))
            }
        };
        let arrived = Vec::new();
        let mut client = Client { stream, arrived };
        client.ask(STATUS);
        Ok(client)
    }

    pub fn client(&self) -> Client {
        self.try_client().unwrap()
    }

    /// This many connections, opened one by one: tiny_http loses some of those that arrive all at once.
    pub fn clients(&self, count: usize) -> Vec<Client> {
        (0..count).map(|_| self.client()).collect()
    }
}

/// A request that asks for the status.
pub fn status() -> Vec<u8> {
    STATUS.to_vec()
}

/// A request that submits an export of some 50 bytes.
pub fn submission(path: &str, token: &str, url: &str, number: usize) -> Vec<u8> {
    let body = format!(r#"{{"uri":"{url}","data":{}}}"#, payload(number));
    post(path, token, &body)
}

/// The payload of the export with this number.
pub fn payload(number: usize) -> String {
    format!(r#"{{"number":"{number:08}","text":"01234567890123456"}}"#)
}

/// A request that polls an export.
pub fn poll(path: &str, token: &str, id: &str) -> Vec<u8> {
    post(path, token, &format!(r#"{{"id":"{id}"}}"#))
}

fn post(path: &str, token: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: bench\r\nX-Api-Key: {token}\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// A member of a JSON object that is a string.
pub fn member(json: &str, name: &str) -> String {
    let json: Value = serde_json::from_str(json).unwrap();
    json[name].as_str().unwrap().to_owned()
}

/// When a load ends.
#[derive(Clone, Copy)]
pub enum Until {
    Elapsed(Duration),
    Count(usize),
}

/// What was done under load.
pub struct Work {
    pub operations: usize,
    pub wall: Duration,
    /// The time that half of the operations took at most.
    pub p50: Duration,
    /// The time that 99 of 100 took at most.
    pub p99: Duration,
}

impl Work {
    /// Work of which only the end was seen.
    pub fn unseen(operations: usize, wall: Duration) -> Self {
        Self {
            operations,
            wall,
            p50: Duration::ZERO,
            p99: Duration::ZERO,
        }
    }
}

/// The value that this part of all values does not exceed.
pub fn percentile<T: Copy + Ord>(values: &mut [T], part: f64) -> T {
    values.sort_unstable();
    values[((values.len() - 1) as f64 * part).round() as usize]
}

/// Has each worker work all the time, on a thread of its own if there are several. `work` is told the number
/// of the operation.
pub fn drive<W: Send>(
    workers: &mut [W],
    until: Until,
    work: impl Fn(&mut W, usize) + Sync,
) -> Work {
    let next = AtomicUsize::new(0);
    let started = Instant::now();
    let work_on = |worker: &mut W| {
        let mut took = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let more = match until {
                Until::Elapsed(time) => started.elapsed() < time,
                Until::Count(count) => number < count,
            };
            if !more {
                return took;
            }
            let began = Instant::now();
            work(worker, number);
            took.push(began.elapsed());
        }
    };
    let mut took = match workers {
        // A thread that has ended no longer shows what it has used.
        [worker] => work_on(worker),
        workers => thread::scope(|scope| {
            let threads = workers.iter_mut();
            let threads: Vec<_> = threads
                .map(|worker| scope.spawn(|| work_on(worker)))
                .collect();
            let took = threads.into_iter().map(|thread| thread.join().unwrap());
            took.flatten().collect()
        }),
    };
    Work {
        operations: took.len(),
        wall: started.elapsed(),
        p50: percentile(&mut took, 0.5),
        p99: percentile(&mut took, 0.99),
    }
}
