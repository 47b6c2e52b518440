//! A Unix socket in the data folder for commands on this machine, served by one thread, one request at a time.
//!
//! Only this user and root may open it, so it needs no token. Each connection carries one request.
//!
//! Not here: what the requests ask for (`routes`).

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{HEADERS, MAX_BODY};
use crate::answer::{self, Response};
use crate::gate;
use crate::gate::framing::{Framer, Request};
use crate::socket::is_timeout;
use crate::threads::{self, Thread};

/// The socket's name in the data folder.
pub const FILE: &str = "owner.sock";
/// How long a client may take to send its request, and to read its answer. The next one waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);
/// The pause after a failure to accept, when descriptors are short.
const PAUSE: Duration = Duration::from_millis(100);
/// Connections that may wait for the one that is served.
const BACKLOG: i32 = 16;

/// The socket, and the thread that serves it.
pub struct Listener {
    listener: Arc<UnixListener>,
    stopping: Arc<AtomicBool>,
    thread: Thread,
    path: PathBuf,
}

impl Listener {
    /// Makes the socket in a folder that nobody else uses, and serves requests on it.
    ///
    /// # Errors
    /// Why there can be no socket there.
    pub fn open(
        folder: &Path,
        serve: impl Fn(&Request) -> Response + Send + 'static,
    ) -> Result<Self, String> {
        let path = folder.join(FILE);
        let address = SocketAddrUnix::new(&path).map_err(|_| {
            "its path is longer than a socket's may be: choose a shorter --data-dir".to_owned()
        })?;
        let listener = bind(&path, &address).map_err(|error| error.to_string())?;
        let listener = Arc::new(listener);
        let stopping = Arc::new(AtomicBool::new(false));
        let (accepting, stop) = (listener.clone(), stopping.clone());
        let thread = threads::spawn("owner", move || {
            while !stop.load(Ordering::SeqCst) {
                match accepting.accept() {
                    Ok((stream, _)) => {
                        if let Err(error) = answer(&stream, &serve) {
                            log::debug!(reason:% = error; "the owner's client left");
                        }
                    }
                    Err(_) if stop.load(Ordering::SeqCst) => {}
                    Err(error) => {
                        log::warn!(reason:% = error; "cannot accept on the owner's socket");
                        thread::sleep(PAUSE);
                    }
                }
            }
        });
        Ok(Self {
            listener,
            stopping,
            thread,
            path,
        })
    }

    /// Serves no more requests, and waits for the one that is being served, but not beyond `deadline`.
    pub fn stop(self, deadline: Instant) {
        self.stopping.store(true, Ordering::SeqCst);
        // Wakes the thread in `accept`. If this fails, that thread ends with the process.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        // One that is left over is replaced at the next start.
        let _ = fs::remove_file(&self.path);
        self.thread
            .ends_within(deadline.saturating_duration_since(Instant::now()));
    }
}

/// A listener that only this user can connect to.
fn bind(path: &Path, address: &SocketAddrUnix) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, address)?;
    // Before it listens: nobody can have connected yet.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn answer(stream: &UnixStream, serve: &impl Fn(&Request) -> Response) -> io::Result<()> {
    let mut stream = Timed {
        stream,
        deadline: Instant::now() + PATIENCE,
    };
    let mut framer = Framer::of_owner(MAX_BODY);
    let (response, head_only) = loop {
        match framer.take() {
            Ok(Some(request)) => break (serve(&request), request.method() == "HEAD"),
            Ok(None) => {}
            Err(refusal) => {
                let mut response = answer::refusal(&refusal);
                let more = HEADERS.iter().map(|(name, value)| (*name, (*value).into()));
                response.headers.extend(more);
                break (response, framer.is_head());
            }
        }
        if framer.takes_continue() {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        if framer.read_from(&mut stream)? == 0 {
            return Ok(());
        }
    };
    stream.deadline = Instant::now() + PATIENCE;
    stream.write_all(&gate::to_bytes(
        response,
        "Connection: close\r\n",
        head_only,
    ))
}

/// A stream with one deadline for everything that is read and written.
struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        // The kernel takes zero for no limit.
        Ok(Some(left.max(Duration::from_millis(1))))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(self.left()?)?;
            match self.stream.read(buffer) {
                Err(error) if is_timeout(&error) || error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.stream.set_write_timeout(self.left()?)?;
            match self.stream.write(bytes) {
                Err(error) if is_timeout(&error) || error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
