//! Connections to tiny_http: a fixed number, opened one at a time when the service starts.
//!
//! tiny_http may never serve a connection when several arrive at once, and stops accepting for good when it
//! gets no descriptor or thread. So all links are opened while nothing else is going on, each after the one
//! before has been answered. A link is used only while a request is sent: the answer comes another way (see
//! `waits`), and tiny_http's own, which is empty, is read by the link's next user.
//!
//! A link that breaks means that tiny_http is dead. The service is of no use without it and cannot recover,
//! so the process ends with an error in the log.
//!
//! Not here: the requests, and who has sent them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::socket::is_timeout;

/// How many links there are. More would gain nothing, as each is in use only while tiny_http reads a
/// request.
const LINKS: usize = 8;
/// How long a request may wait for a link.
const TURN: Duration = Duration::from_secs(10);
/// How long tiny_http may take to answer the request that proves a link, even on a machine that is booting.
const PROOF: Duration = Duration::from_secs(30);
/// The request that proves a link. No connection waits for its answer.
const QUESTION: &[u8] = b"GET /status HTTP/1.1\r\n\r\n";
/// The end of tiny_http's own answer, which has no body.
const END: &[u8] = b"\r\n\r\n";
/// A body of up to this many bytes is sent together with its head.
const SMALL: usize = 16 * 1024;

/// All links to one tiny_http.
pub struct Links {
    /// The least recently used one is at the front: tiny_http is done with it before the others.
    free: Mutex<VecDeque<Link>>,
    returned: Condvar,
    /// Set when tiny_http is about to stop, which breaks the links.
    closing: AtomicBool,
}

/// A connection to tiny_http.
struct Link {
    socket: UnixStream,
    /// What was read of an incomplete answer. None if none is expected.
    answer: Option<Vec<u8>>,
}

impl Links {
    /// Opens all links to the tiny_http that listens at `path`, and waits for an answer on each.
    ///
    /// # Errors
    /// A link cannot be opened, or is not answered.
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

    /// From now on links are allowed to break.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Sends a request. Blocks until tiny_http has taken it. Waits at most ten seconds for a link.
    ///
    /// # Errors
    /// `ErrorKind::TimedOut`: the service does not keep up, and the request was not sent. Any other: the
    /// service is stopping.
    ///
    /// # Panics
    /// tiny_http is dead although [`Links::close`] was not called. That ends the process.
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
            // After a timeout the link is as it was, as not a byte was sent.
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
    /// Blocks without a limit until tiny_http has taken the request: a slow disk can hold up its readers, and
    /// half a request would make the link useless.
    fn send(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        self.answer = Some(Vec::new());
        if body.len() > SMALL {
            self.socket.write_all(head)?;
            return self.socket.write_all(body);
        }
        self.socket.write_all(&[head, body].concat())
    }

    /// Reads the empty answer to the previous request, if there was one.
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

    /// Acts as tiny_http: reads this many requests without a body on each link, and answers all but the last.
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
