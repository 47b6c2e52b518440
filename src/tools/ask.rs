//! Asks a service on this machine over the socket in its data folder, and shows text from outside.
//!
//! Not here: what is asked for (`status`, `link`, acts), and the other end ([`crate::owner`]).

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::owner::SOCKET;
use crate::unseen::is_unseen;

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
            "nothing answers on {}: {error}; is the service running, as this user, and with this --data-dir?",
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

/// The longest text from outside that is shown, in characters.
const LONGEST: usize = 200;

/// Text that an app or a destination has chosen, for a terminal: control characters and those that change the
/// direction of others or take no room are written as `\u{…}`, and a long text is cut.
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars().take(LONGEST) {
            write_visibly(f, character)?;
        }
        match self.0.chars().count() {
            0..=LONGEST => Ok(()),
            length => write!(f, "… ({length} characters)"),
        }
    }
}

/// The whole of a text that holds some from outside, in the same way.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        // A string takes any text.
        let _ = write_visibly(&mut escaped, character);
    }
    escaped
}

fn write_visibly(to: &mut impl fmt::Write, character: char) -> fmt::Result {
    match is_unseen(character) {
        true => write!(to, "{}", character.escape_unicode()),
        false => to.write_char(character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_cannot_change_what_a_terminal_shows() {
        let shown = |text: &str| Shown(text).to_string();
        assert_eq!(shown("hooks.example.com #3f9a"), "hooks.example.com #3f9a");
        assert_eq!(shown("a\u{1b}[2J\r\nb"), "a\\u{1b}[2J\\u{d}\\u{a}b");
        assert_eq!(shown("\u{202e}gpj"), "\\u{202e}gpj");
        assert_eq!(shown("å😀"), "å😀");
        let long = shown(&"x".repeat(1_000_000));
        assert!(long.ends_with("x… (1000000 characters)") && long.len() < 300);
    }
}
