//! A socket with one deadline for everything that is read and written.
//!
//! A deadline is a point in time, not a timeout for each byte, so a peer that sends or takes one byte a
//! second gains nothing.
//!
//! Not here: which deadline is for what.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};

/// By how much a deadline may be overrun, so that a timeout that is already set can stay: setting one for
/// every read would cost as much as the read.
const SLACK: Duration = Duration::from_millis(100);

/// A socket whose reads and writes fail with `ErrorKind::TimedOut` once its deadline has passed.
#[derive(Debug)]
pub struct Socket {
    stream: Arc<TcpStream>,
    deadline: Instant,
    /// The timeouts that were last set.
    read_timeout: Duration,
    write_timeout: Duration,
}

impl Socket {
    /// A socket with a first deadline.
    pub fn new(stream: Arc<TcpStream>, deadline: Instant) -> Self {
        Self {
            stream,
            deadline,
            read_timeout: Duration::MAX,
            write_timeout: Duration::MAX,
        }
    }

    /// Everything that is read or written from now on must be over by then.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Whether there is nothing to read and the peer has not closed the connection. Does not block.
    pub fn is_quiet(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        recv(&*self.stream, &mut [0_u8; 1], flags) == Err(rustix::io::Errno::AGAIN)
    }

    /// Whether the peer has closed its side or the connection is broken, even if there is still something to
    /// read. Does not block.
    pub fn is_left(&self) -> bool {
        let mut socket = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        let now = Timespec::default();
        poll(&mut socket, Some(&now)).is_ok_and(|left| left > 0)
    }

    /// The byte that will be read next. None at the end. Blocks until it arrives, or the deadline passes.
    ///
    /// # Errors
    /// Those of a read.
    pub fn peek(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        self.stream.set_read_timeout(Some(self.left()?))?;
        match self.stream.peek(&mut byte) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(byte[0])),
            Err(error) if is_timeout(&error) => Err(ErrorKind::TimedOut.into()),
            Err(error) => Err(error),
        }
    }

    /// Tells the peer that nothing more will be written. An error means that the peer has left, and is
    /// ignored.
    pub fn end(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        // The kernel counts in microseconds, and takes zero for no limit.
        Ok(left.max(Duration::from_millis(1)))
    }
}

/// Whether a timeout that is already set will do: it neither overruns the deadline by much, nor wakes the
/// thread too often for nothing.
fn will_do(timeout: Duration, left: Duration) -> bool {
    timeout <= left + SLACK && timeout >= left / 2
}

/// Whether an error means that a timeout was reached.
pub fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.left()?;
            if !will_do(self.read_timeout, left) {
                self.stream.set_read_timeout(Some(left))?;
                self.read_timeout = left;
            }
            match (&*self.stream).read(buffer) {
                Err(error) if is_timeout(&error) || error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let left = self.left()?;
            if !will_do(self.write_timeout, left) {
                self.stream.set_write_timeout(Some(left))?;
                self.write_timeout = left;
            }
            match (&*self.stream).write(bytes) {
                Err(error) if is_timeout(&error) || error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
