//! Tells systemd how far the start or the stop is: the protocol of sd_notify(3).
//!
//! Not here: when there is something to tell (`main`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// How long a message may wait for room in systemd's queue.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sends assignments like `READY=1`, one on each line, to the socket that `NOTIFY_SOCKET` named: a path, or `@`
/// and an abstract name. Does nothing without one; what cannot be sent is only logged. Blocks for at most a
/// second.
pub fn tell(socket: Option<&OsStr>, assignments: &str) {
    let Some(socket) = socket else {
        return;
    };
    if let Err(error) = send(socket, assignments) {
        log::warn!(socket:% = socket.display(), reason:% = error; "cannot tell systemd");
    }
}

fn send(socket: &OsStr, assignments: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(socket),
    }?;
    let sender = UnixDatagram::unbound()?;
    sender.set_write_timeout(Some(PATIENCE))?;
    sender.send_to_addr(assignments.as_bytes(), &address)?;
    Ok(())
}
