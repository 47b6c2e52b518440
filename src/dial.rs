//! From a name to its addresses, and from addresses to a connection, each under a limit.
//!
//! Not here: which addresses may be dialled (`delivery`), and attempts, whose connections are ureq's.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use crate::threads;

/// The least that each of several addresses is given.
const LEAST: Duration = Duration::from_millis(100);

/// The addresses of a host, by the system's look-up. That has no limit of its own, so it has a
/// thread to itself, which ends some time later where it is not waited for. Blocks for `limit` at
/// the most.
///
/// # Errors
/// Those of the look-up; `ErrorKind::TimedOut`; `ErrorKind::WouldBlock` where the system has no
/// thread to give.
pub fn look_up(host: &str, port: u16, limit: Duration) -> io::Result<Vec<SocketAddr>> {
    let (sender, found) = bounded(1);
    let name = (host.to_owned(), port);
    threads::try_spawn("look-up", move || {
        let addresses = name.to_socket_addrs().map(Vec::from_iter);
        // Nobody may be waiting any more.
        let _ = sender.send(addresses);
    })?;
    found
        .recv_timeout(limit)
        .map_err(|_| io::Error::from(ErrorKind::TimedOut))?
}

/// Connects to the first of these addresses that lets it. Blocks for `limit` and a moment at the
/// most, which the addresses share, so that a dead one does not use up all of it.
///
/// # Errors
/// The last address's, or that there is none.
pub fn connect(addresses: &[SocketAddr], limit: Duration) -> io::Result<TcpStream> {
    let deadline = Instant::now() + limit;
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for (at, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        if at > 0 && left.is_zero() {
            break;
        }
        let share = u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
        match TcpStream::connect_timeout(address, (left / share).max(LEAST)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
