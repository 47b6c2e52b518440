//! Connections to tiny_http: kept, opened one at a time, each proven before it is used.
//!
//! tiny_http stops accepting for good when it does not get a descriptor or a thread, and it can
//! forget a connection when several come at once. So a link is opened only where there is room
//! for all that tiny_http needs, and the next one once this one has answered. A service whose
//! tiny_http is deaf is of no use and does not get well: the process ends, saying so.
//!
//! Not here: what the requests are, and who has sent them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use httparse::{EMPTY_HEADER, Status};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long tiny_http may take to answer. A long poll takes a minute at most, and a commit
/// seconds, on a bad SD card.
const ANSWER: Duration = Duration::from_secs(120);
/// How long it may take to answer the request that proves a link, and that twice.
const PROOF: Duration = Duration::from_secs(10);
/// How long a request waits for a link where another cannot be opened.
const SHORTAGE: Duration = Duration::from_secs(5);
/// What proves a link.
const QUESTION: &[u8] = b"GET /status HTTP/1.1\r\n\r\n";
/// Socket pairs that can be had before a link is opened. tiny_http needs two descriptors and we
/// one; the rest is for what other threads open meanwhile.
const SPARE_PAIRS: usize = 4;
/// Threads that can be had before a link is opened. tiny_http needs one; the system may still count
/// one or the other of these when they have ended.
const SPARE_THREADS: usize = 4;
/// Links that are kept however long they are not used.
const KEPT: usize = 8;
/// How long the others are kept.
const UNUSED: Duration = Duration::from_secs(10);
/// What is read of an answer at first, in bytes; most are smaller.
const FIRST_READ: usize = 1024;
/// What is read of it at once when it is larger.
const READ: usize = 64 * 1024;
/// The most headers of an answer, which are the service's own.
const MAX_HEADERS: usize = 16;

/// All links to one tiny_http.
pub struct Links {
    path: PathBuf,
    /// The last one used is at the back and is used again first.
    idle: Mutex<VecDeque<Link>>,
    /// Something was added to `idle`.
    returned: Condvar,
    /// Held while a link is opened.
    opening: Mutex<()>,
    /// tiny_http is about to stop, and then it is right that it does not answer.
    closing: AtomicBool,
}

/// A connection to tiny_http.
pub struct Link {
    socket: UnixStream,
    used: Instant,
}

impl Links {
    /// Links to the tiny_http that listens at `path`, with one of them open and proven.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let links = Self {
            path,
            idle: Mutex::default(),
            returned: Condvar::new(),
            opening: Mutex::default(),
            closing: AtomicBool::new(false),
        };
        let first = links.take()?;
        links.give_back(first);
        Ok(links)
    }

    /// From now on it is no harm if tiny_http does not answer.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// A link for one request. Blocks while others are opened, and where there are not descriptors
    /// or threads enough for another, until one is given back.
    ///
    /// # Errors
    /// Where none is, for five seconds.
    ///
    /// # Panics
    /// Where tiny_http does not answer, unless it is to close; that ends the process.
    pub fn take(&self) -> io::Result<Link> {
        let deadline = Instant::now() + SHORTAGE;
        loop {
            let error = match self.idle_or_new() {
                Err(error) => error,
                link => return link,
            };
            let mut idle = self.idle.lock();
            if idle.is_empty() && self.returned.wait_until(&mut idle, deadline).timed_out() {
                return Err(error);
            }
        }
    }

    fn idle_or_new(&self) -> io::Result<Link> {
        if let Some(link) = self.idle.lock().pop_back() {
            return Ok(link);
        }
        let _opening = self.hold_opening();
        // Another may have come back while this thread waited for its turn.
        if let Some(link) = self.idle.lock().pop_back() {
            return Ok(link);
        }
        make_sure_of_room()?;
        match Link::open(&self.path) {
            Ok(link) => Ok(link),
            Err(error) if is_shortage(&error) || self.closing.load(Ordering::Acquire) => Err(error),
            Err(error) => deaf(&error),
        }
    }

    /// Keeps a link whose answer was read to its end.
    pub fn give_back(&self, mut link: Link) {
        link.used = Instant::now();
        self.idle.lock().push_back(link);
        self.returned.notify_one();
    }

    /// Closes links that nobody has used for a while, but for a few: each costs a thread.
    pub fn close_unused(&self) {
        let mut idle = self.idle.lock();
        while idle.len() > KEPT
            && idle
                .front()
                .is_some_and(|link| link.used.elapsed() > UNUSED)
        {
            idle.pop_front();
        }
    }

    /// Closes the links that are not in use but one, to free descriptors.
    pub fn close_idle(&self) {
        self.idle.lock().truncate(1);
    }

    /// Sees whether tiny_http still answers, and ends the process if not. Blocks for a moment.
    pub fn prove(&self) {
        let _opening = self.hold_opening();
        if make_sure_of_room().is_ok()
            && let Err(error) = Link::open(&self.path)
            && !is_shortage(&error)
            && !self.closing.load(Ordering::Acquire)
        {
            deaf(&error);
        }
    }

    /// While this is held no link is opened: whoever starts a thread then takes away none that
    /// tiny_http has been made sure of.
    pub fn hold_opening(&self) -> MutexGuard<'_, ()> {
        self.opening.lock()
    }
}

/// Fails where tiny_http would not get what it needs for another connection.
fn make_sure_of_room() -> io::Result<()> {
    let mut pairs = Vec::with_capacity(SPARE_PAIRS);
    for _ in 0..SPARE_PAIRS {
        pairs.push(UnixStream::pair()?);
    }
    let (running, ended) = bounded::<()>(0);
    let mut threads = Vec::with_capacity(SPARE_THREADS);
    for _ in 0..SPARE_THREADS {
        let ended = ended.clone();
        // They are all there at the same time: each waits until `running` is dropped.
        threads.push(thread::Builder::new().spawn(move || ended.recv())?);
    }
    drop(running);
    // As long as they are on their way out they still count.
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// Whether something was lacking that may be there again later.
pub fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let lacking = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    lacking
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
        || error.kind() == ErrorKind::OutOfMemory
}

fn deaf(error: &io::Error) -> ! {
    log::error!(reason:% = error; "tiny_http does not answer any more");
    panic!("tiny_http does not answer");
}

impl Link {
    fn open(path: &PathBuf) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_write_timeout(Some(PROOF))?;
        socket.set_read_timeout(Some(PROOF))?;
        let mut link = Self {
            socket,
            used: Instant::now(),
        };
        (&link.socket).write_all(QUESTION)?;
        // A second time, in case that the whole machine stood still.
        let answer = match link.answer(false) {
            Err(error) if is_timeout(&error) => link.answer(false)?,
            answer => answer?,
        };
        if !answer.starts_with(b"HTTP/1.1 200 ") {
            return Err(io::Error::other("it does not say that it is active"));
        }
        link.socket.set_write_timeout(Some(ANSWER))?;
        link.socket.set_read_timeout(Some(ANSWER))?;
        Ok(link)
    }

    /// Sends a request. Blocks until tiny_http has taken it.
    ///
    /// # Errors
    /// Where the link is broken; it must not be given back then.
    pub fn send(&mut self, mut head: Vec<u8>, body: Vec<u8>) -> io::Result<()> {
        if body.len() > FIRST_READ {
            self.socket.write_all(&head)?;
            return self.socket.write_all(&body);
        }
        head.extend_from_slice(&body);
        self.socket.write_all(&head)
    }

    /// Returns the whole answer to what was sent, as bytes. Blocks for as long as the service
    /// takes, two minutes at most.
    ///
    /// # Errors
    /// Where the link is broken; it must not be given back then.
    pub fn answer(&mut self, is_head: bool) -> io::Result<Vec<u8>> {
        let mut answer = Vec::new();
        let mut length = None;
        while length.is_none_or(|length| answer.len() < length) {
            let old = answer.len();
            let room = length.map_or(FIRST_READ, |length| READ.min(length - old));
            answer.resize(old + room, 0);
            let read = match self.socket.read(&mut answer[old..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                read => read?,
            };
            answer.truncate(old + read);
            if length.is_none() {
                length = answer_length(&answer, is_head)?;
                let missing = length.unwrap_or(0).saturating_sub(answer.len());
                answer.reserve_exact(missing);
            }
        }
        if length != Some(answer.len()) {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(answer)
    }
}

/// How long the answer is that begins like this, head and body together; none as long as its
/// head is not whole.
fn answer_length(bytes: &[u8], is_head: bool) -> io::Result<Option<usize>> {
    let invalid = || io::Error::from(ErrorKind::InvalidData);
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    let Status::Complete(head) = parsed.parse(bytes).map_err(|_| invalid())? else {
        return Ok(None);
    };
    if is_head {
        return Ok(Some(head));
    }
    let length = parsed
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("Content-Length"))
        .and_then(|header| str::from_utf8(header.value).ok()?.parse::<usize>().ok())
        .ok_or_else(invalid)?;
    Ok(Some(head + length))
}

/// Whether a time limit was reached.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
