//! Asks a service on this machine over the socket in its data folder.
//!
//! Not here: what is asked for (`status`, `link`, acts), and the other end ([`crate::owner`]).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::owner::SOCKET;

/// How long an answer may take: an act waits for a commit, which on a bad SD card takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends one request to the service that uses this data folder. A `body` is JSON. Blocks for a minute at most.
/// Returns the status and the answer's body.
///
/// # Errors
/// Nothing answers. The text says what to do.
pub fn ask(
    folder: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> Result<(u16, String), String> {
    let socket = folder.join(SOCKET);
    exchange(&socket, method, path, body).map_err(|error| {
        format!(
            "nothing answers on {}: {error}; is the service running, as this user, and with this --data-dir? \
             (if systemd runs it: sudo export-service-ctl)",
            socket.display()
        )
    })
}

fn exchange(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> io::Result<(u16, String)> {
    let body = body.map_or_else(String::new, Value::to_string);
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
    status
        .zip(body.map(str::to_owned))
        .ok_or_else(|| io::Error::other("the answer broke off"))
}
