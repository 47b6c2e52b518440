//! Connections to tiny_http: a fixed number, opened one at a time when the service starts.
//!
//! tiny_http may never serve a connection when several arrive at once, and stops accepting for good when it
//! gets no descriptor or thread. So all links are opened while nothing else is going on, each after the one
//! before has been answered. After that a link only carries requests, one behind the other: their answers come
//! another way (see `waits`), and none through tiny_http.
//!
//! A link that breaks means that tiny_http is dead. The service is of no use without it and cannot recover,
//! so the process ends with an error in the log.
//!
//! Not here: the requests, and who has sent them.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

/// How many links there are. More would gain nothing: each is in use only while a request is sent, and a thread
/// of tiny_http that finds the next request waiting need not sleep in between.
const LINKS: usize = 4;
/// How long a request may wait for a link.
const TURN: Duration = Duration::from_secs(10);
/// How long tiny_http may take to answer the request that proves a link, even on a machine that is booting.
const PROOF: Duration = Duration::from_secs(30);
/// The request that proves a link. No connection waits for its answer.
const QUESTION: &[u8] = b"GET /status HTTP/1.1\r\n\r\n";
/// The end of its answer, which has no body.
const END: &[u8] = b"\r\n\r\n";

/// All links to one tiny_http.
pub struct Links {
    links: [Mutex<UnixStream>; LINKS],
    /// Which one to wait for when all are in use.
    next: AtomicUsize,
    /// Set when tiny_http is about to stop, which breaks the links.
    closing: AtomicBool,
}

impl Links {
    /// Opens all links to the tiny_http that listens at `path`, and waits for an answer on each.
    ///
    /// # Errors
    /// A link cannot be opened, or is not answered.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut links = Vec::with_capacity(LINKS);
        for _ in 0..LINKS {
            links.push(Mutex::new(open(path)?));
        }
        Ok(Self {
            links: links.try_into().expect("as many as there are to be"),
            next: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
        })
    }

    /// From now on links are allowed to break.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Sends a request. Blocks until tiny_http has taken it, without a limit: a slow disk can hold up its
    /// readers, and half a request would make the link useless. Waits at most ten seconds for a link.
    ///
    /// # Errors
    /// `ErrorKind::TimedOut`: the service does not keep up, and the request was not sent. Any other: the
    /// service is stopping.
    ///
    /// # Panics
    /// tiny_http is dead although [`Links::close`] was not called. That ends the process.
    pub fn send(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut link = self.free().ok_or(ErrorKind::TimedOut)?;
        let sent = write(&mut link, head, body);
        if let Err(error) = &sent
            && !self.closing.load(Ordering::Acquire)
        {
            dead(error);
        }
        sent
    }

    /// The first link that is not in use. The later ones sleep while there is little to do.
    fn free(&self) -> Option<MutexGuard<'_, UnixStream>> {
        let free = self.links.iter().find_map(Mutex::try_lock);
        free.or_else(|| {
            // Relaxed: the numbers only have to differ.
            let next = self.next.fetch_add(1, Ordering::Relaxed) % LINKS;
            self.links[next].try_lock_for(TURN)
        })
    }
}

fn dead(error: &io::Error) -> ! {
    log::error!(reason:% = error; "a connection to tiny_http broke");
    panic!("a connection to tiny_http broke");
}

/// Opens a link and waits for the answer to a first request.
fn open(path: &Path) -> io::Result<UnixStream> {
    let mut link = UnixStream::connect(path)?;
    link.set_read_timeout(Some(PROOF))?;
    link.write_all(QUESTION)?;
    let mut answer = Vec::new();
    while !answer.ends_with(END) {
        let mut bytes = [0; 256];
        match link.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => answer.extend_from_slice(&bytes[..read]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(link)
}

fn write(link: &mut UnixStream, head: &[u8], body: &[u8]) -> io::Result<()> {
    let sent = loop {
        match link.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            sent => break sent?,
        }
    };
    if sent < head.len() {
        link.write_all(&head[sent..])?;
    }
    link.write_all(&body[sent.saturating_sub(head.len())..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;
    use tempfile::TempDir;

    const EMPTY: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";
    const REQUEST: &[u8] = b"POST / HTTP/1.1\r\n\r\n";

    /// Acts as tiny_http: reads this many requests without a body on each link, and answers the first.
    fn links(requests: usize) -> (TempDir, Links) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    for number in 0..requests {
                        let mut text = Vec::new();
                        while !text.ends_with(END) {
                            let mut byte = [0];
                            stream.read_exact(&mut byte).unwrap();
                            text.extend(byte);
                        }
                        if number == 0 {
                            stream.write_all(EMPTY).unwrap();
                        }
                    }
                });
            }
        });
        let links = Links::open(&path).unwrap();
        (folder, links)
    }

    /// Sends requests until a link breaks.
    fn break_links(links: &Links) -> io::Error {
        loop {
            if let Err(error) = links.send(REQUEST, b"") {
                return error;
            }
        }
    }

    #[test]
    fn requests_do_not_wait_for_the_answers_of_earlier_ones() {
        let (_folder, links) = links(usize::MAX);
        for _ in 0..1000 {
            links.send(REQUEST, b"").unwrap();
        }
    }

    #[test]
    fn while_a_link_is_in_use_the_others_serve() {
        let (_folder, links) = links(usize::MAX);
        let _in_use: Vec<_> = (1..LINKS).map(|_| links.free().unwrap()).collect();
        links.send(REQUEST, b"").unwrap();
    }

    #[test]
    #[should_panic(expected = "a connection to tiny_http broke")]
    fn a_link_that_breaks_ends_the_process() {
        break_links(&links(2).1);
    }

    #[test]
    fn links_that_break_while_the_service_stops_are_no_harm() {
        let (_folder, links) = links(2);
        links.close();
        assert_ne!(break_links(&links).kind(), ErrorKind::TimedOut);
    }
}
