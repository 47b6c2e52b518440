//! Connections to tiny_http: a fixed number, opened one at a time when the service starts.
//!
//! tiny_http can forget a connection when several come at once, and stops accepting for good when it
//! does not get a descriptor or a thread. So all that are ever needed are opened while nothing else is going
//! on, each after the one before has been answered. A link is used for the moment of sending a request: its
//! answer comes another way (see `waits`), and tiny_http's own, which is empty, is read by the next
//! user.
//!
//! A link that breaks means that tiny_http is dead. A service without it is of no use and does not get
//! well: the process ends, saying so.
//!
//! Not here: what the requests are, and who has sent them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::socket::is_timeout;

/// How many links there are. More make nothing faster: each is in use for as long as tiny_http reads a
/// request.
const LINKS: usize = 8;
/// How long a request waits until it can be sent.
const TURN: Duration = Duration::from_secs(10);
/// How long tiny_http may take to answer the request that proves a link, on a machine that has just
/// been started too.
const PROOF: Duration = Duration::from_secs(30);
/// What proves a link. Nobody waits for its answer.
const QUESTION: &[u8] = b"GET /status HTTP/1.1\r\n\r\n";
/// What ends tiny_http's own answer, which has no body.
const END: &[u8] = b"\r\n\r\n";
/// A body up to this many bytes is sent together with its head.
const SMALL: usize = 16 * 1024;

/// All links to one tiny_http.
pub struct Links {
    /// The one that was used longest ago is at the front: tiny_http is done with it before the others.
    free: Mutex<VecDeque<Link>>,
    returned: Condvar,
    /// tiny_http is about to stop, and then it is right that links break.
    closing: AtomicBool,
}

/// A connection to tiny_http.
struct Link {
    socket: UnixStream,
    /// What was read of an answer that is not whole yet; none where none is expected.
    answer: Option<Vec<u8>>,
}

impl Links {
    /// Opens all links to the tiny_http that listens at `path`, and sees that each is answered.
    ///
    /// # Errors
    /// Where one cannot be opened, or is not answered.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut free = VecDeque::with_capacity(LINKS);
        for _ in 0..LINKS {
            let mut link = Link {
                socket: UnixStream::connect(path)?,
                answer: None,
            };
            link.socket.set_read_timeout(Some(TURN))?;
            link.send(QUESTION, &[])?;
            link.read_answer(Instant::now() + PROOF)?;
            free.push_back(link);
        }
        Ok(Self {
            free: Mutex::new(free),
            returned: Condvar::new(),
            closing: AtomicBool::new(false),
        })
    }

    /// From now on it is no harm if a link breaks.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Sends a request. Blocks until tiny_http has taken it, for some seconds at the most.
    ///
    /// # Errors
    /// `ErrorKind::TimedOut`: the service does not keep up, and the request was not sent. Any other while
    /// it stops.
    ///
    /// # Panics
    /// Where tiny_http is dead, unless it is to close; that ends the process.
    pub fn send(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + TURN;
        let mut free = self.free.lock();
        let mut link = loop {
            if let Some(link) = free.pop_front() {
                break link;
            }
            if self.returned.wait_until(&mut free, deadline).timed_out() {
                return Err(ErrorKind::TimedOut.into());
            }
        };
        drop(free);
        let sent = link
            .read_answer(deadline)
            .and_then(|()| link.send(head, body));
        match &sent {
            Err(error) if error.kind() != ErrorKind::TimedOut => {
                if !self.closing.load(Ordering::Acquire) {
                    dead(error);
                }
            }
            // Where time was over, not a byte was sent: the link is as it was.
            _ => {
                self.free.lock().push_back(link);
                self.returned.notify_one();
            }
        }
        sent
    }
}

fn dead(error: &io::Error) -> ! {
    log::error!(reason:% = error; "a connection to tiny_http broke");
    panic!("a connection to tiny_http broke");
}

impl Link {
    /// Blocks until tiny_http has taken it, however long a disk holds up those who read it there: half a
    /// request would be worse than none.
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.answer = Some(Vec::new());
        if body.len() > SMALL {
            self.socket.write_all(head)?;
            return self.socket.write_all(body);
        }
        self.socket.write_all(&[head, body].concat())
    }

    /// Reads the empty answer to the request before, if there was one.
    fn read_answer(&mut self, deadline: Instant) -> io::Result<()> {
        let Some(answer) = &mut self.answer else {
            return Ok(());
        };
        let mut bytes = [0; 256];
        while !answer.ends_with(END) {
            if Instant::now() >= deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => answer.extend_from_slice(&bytes[..read]),
                Err(error) if is_timeout(&error) || error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.answer = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;
    use std::thread;
    use tempfile::TempDir;

    const EMPTY: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

    /// Plays tiny_http: reads so many requests without a body on each link, and answers all but the
    /// last.
    fn links(requests: usize) -> (TempDir, Arc<Links>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    for number in 1..=requests {
                        let mut text = Vec::new();
                        while !text.ends_with(END) {
                            let mut byte = [0];
                            stream.read_exact(&mut byte).unwrap();
                            text.extend(byte);
                        }
                        if number < requests {
                            stream.write_all(EMPTY).unwrap();
                        }
                    }
                });
            }
        });
        (folder, Arc::new(Links::open(&path).unwrap()))
    }

    const REQUEST: &[u8] = b"POST / HTTP/1.1\r\n\r\n";

    #[test]
    fn a_link_is_free_again_before_its_request_is_answered() {
        let (_folder, links) = links(3);
        for _ in 0..LINKS {
            links.send(REQUEST, b"").unwrap();
        }
        assert_eq!(links.free.lock().len(), LINKS);
    }

    #[test]
    #[should_panic(expected = "a connection to tiny_http broke")]
    fn a_link_that_breaks_ends_the_process() {
        let (_folder, links) = links(2);
        for _ in 0..2 * LINKS {
            links.send(REQUEST, b"").unwrap();
        }
    }

    #[test]
    fn links_that_break_while_the_service_stops_are_no_harm() {
        let (_folder, links) = links(2);
        links.close();
        let broken = (0..2 * LINKS).find_map(|_| links.send(REQUEST, b"").err());
        assert!(broken.is_some());
    }
}
