//! The destination: it answers 200 at once, or as often as it is allowed to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Request, Status};

use crate::load::content_length;
use crate::support::PATIENCE;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A destination whose every path is one of a service's queues.
pub struct Sink {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    answers: Mutex<Answers>,
    changed: Condvar,
    /// How long it waits before each answer.
    delay: Duration,
}

struct Answers {
    /// How many more may be given.
    allowed: usize,
    given: usize,
    last: Last,
}

/// The last answer that was given.
#[derive(Clone)]
pub struct Last {
    /// When, just before it was written.
    pub at: Instant,
    /// The path and the `webhook-id` of its request.
    pub path: String,
    pub id: String,
}

impl Sink {
    /// A destination that gives this many answers, until it may give more.
    pub fn start_at(address: SocketAddr, allowed: usize, delay: Duration) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let last = Last {
            at: Instant::now(),
            path: String::new(),
            id: String::new(),
        };
        let shared = Arc::new(Shared {
            answers: Mutex::new(Answers {
                allowed,
                given: 0,
                last,
            }),
            changed: Condvar::new(),
            delay,
        });
        let sink = Self {
            address,
            shared: shared.clone(),
        };
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared) = (stream.unwrap(), shared.clone());
                thread::spawn(move || shared.serve(stream));
            }
        });
        sink
    }

    /// A destination that holds every request until it may answer.
    pub fn held() -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), 0, Duration::ZERO)
    }

    /// A destination that answers everything, after a delay.
    pub fn open(delay: Duration) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), usize::MAX, delay)
    }

    pub fn url(&self, queue: usize) -> String {
        format!("http://{}/{queue}", self.address)
    }

    /// Allows this many more answers.
    pub fn allow(&self, more: usize) {
        self.shared.answers.lock().unwrap().allowed += more;
        self.shared.changed.notify_all();
    }

    /// How many answers it has given.
    pub fn given(&self) -> usize {
        self.shared.answers.lock().unwrap().given
    }

    /// Waits until it has given this many answers, and returns the last one.
    pub fn wait_for(&self, given: usize) -> Last {
        let answers = self.shared.answers.lock().unwrap();
        let (answers, timeout) = self
            .shared
            .changed
            .wait_timeout_while(answers, PATIENCE, |answers| answers.given < given)
            .unwrap();
        let so_far = answers.given;
        assert!(!timeout.timed_out(), "only {so_far} of {given} arrived");
        answers.last.clone()
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) {
        // If it fails, so does the first read.
        let _ = stream.set_nodelay(true);
        let (mut arrived, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            if let Some((end, path, id)) = parse(&arrived) {
                arrived.drain(..end);
                self.wait();
                thread::sleep(self.delay);
                let at = Instant::now();
                if stream.write_all(ANSWER).is_err() {
                    return;
                }
                self.note(Last { at, path, id });
                continue;
            }
            match stream.read(&mut piece) {
                Ok(read @ 1..) => arrived.extend_from_slice(&piece[..read]),
                _ => return,
            }
        }
    }

    /// Waits until one more answer is allowed.
    fn wait(&self) {
        let answers = self.answers.lock().unwrap();
        let mut answers = self
            .changed
            .wait_while(answers, |answers| answers.allowed == 0)
            .unwrap();
        answers.allowed -= 1;
    }

    fn note(&self, last: Last) {
        let mut answers = self.answers.lock().unwrap();
        answers.given += 1;
        answers.last = last;
        drop(answers);
        self.changed.notify_all();
    }
}

/// The length, the path and the id of the first request, once it has arrived.
fn parse(arrived: &[u8]) -> Option<(usize, String, String)> {
    let mut headers = [EMPTY_HEADER; 16];
    let mut request = Request::new(&mut headers);
    let Ok(Status::Complete(head)) = request.parse(arrived) else {
        return None;
    };
    let end = head + content_length(request.headers);
    let path = request.path?.to_owned();
    let mut id = request.headers.iter();
    let id = id.find(|header| header.name.eq_ignore_ascii_case("webhook-id"));
    let id = id.map_or("".into(), |header| String::from_utf8_lossy(header.value));
    (arrived.len() >= end).then(|| (end, path, id.into_owned()))
}
