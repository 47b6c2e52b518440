//! A socket with one deadline for all that is read and written.
//!
//! A deadline is a moment, not a time for each byte: a peer that sends or takes one byte a second gains
//! nothing by it.
//!
//! Not here: which deadline is for what.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};

/// By how much a deadline may be overrun, so that a timeout that is set already can stay: setting
/// one for every read would cost as much as the read.
const SLACK: Duration = Duration::from_millis(100);

/// A socket whose every read and write fails with `ErrorKind::TimedOut` once its deadline is over.
#[derive(Debug)]
pub struct Socket {
    stream: Arc<TcpStream>,
    deadline: Instant,
    /// What the kernel has been told.
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

    /// From now on everything must be over at this moment.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    /// Whether the peer has neither sent anything that was not read nor closed the connection. Does not
    /// block.
    pub fn is_quiet(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        recv(&*self.stream, &mut [0_u8; 1], flags) == Err(rustix::io::Errno::AGAIN)
    }

    /// Whether the peer has closed its side, or the connection is broken, whatever is still to be
    /// read. Does not block.
    pub fn is_left(&self) -> bool {
        let mut socket = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        let now = Timespec::default();
        poll(&mut socket, Some(&now)).is_ok_and(|left| left > 0)
    }

    /// The byte that will be read next; none at the end. Blocks until it is there.
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

    /// Says that nothing more will be written. An error says that the peer has gone, which is no news
    /// by then.
    pub fn end(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        // The kernel takes zero for no limit, and counts in microseconds.
        Ok(left.max(Duration::from_millis(1)))
    }
}

/// Whether a timeout that is set already will do: it does not overrun by much, and does not
/// wake the thread for nothing too often.
fn will_do(timeout: Duration, left: Duration) -> bool {
    timeout <= left + SLACK && timeout >= left / 2
}

/// Whether a time limit was reached.
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
