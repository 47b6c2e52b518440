//! A client's connection, plain or with TLS.
//!
//! Not here: which deadline is for what (`connection`).

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use rustls::server::{Accepted, AcceptedAlert, Acceptor};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::socket::Socket;

/// A connection to a client.
pub enum Wire {
    /// HTTP without TLS.
    Plain(Socket),
    /// HTTPS.
    Tls(Box<StreamOwned<ServerConnection, Socket>>),
}

impl Wire {
    /// Makes the TLS handshake if there is a `config`. Calls `begun` when the client's first message is
    /// complete. Blocks until the socket's deadline.
    ///
    /// # Errors
    /// The client leaves, takes too long, or the handshake fails. A client that speaks plain HTTP to a
    /// TLS port gets [`Wire::Plain`] with `ErrorKind::InvalidInput`.
    pub fn accept(
        socket: Socket,
        config: Option<Arc<ServerConfig>>,
        begun: impl FnOnce(),
    ) -> Result<Self, (Self, io::Error)> {
        match config {
            None => Ok(Self::Plain(socket)),
            Some(config) => Self::accept_tls(socket, config, begun),
        }
    }

    // Not inlined: a thread keeps as much of its stack as it has used once, and what a handshake takes would be
    // part of every connection's for as long as it lives.
    #[inline(never)]
    fn accept_tls(
        mut socket: Socket,
        config: Arc<ServerConfig>,
        begun: impl FnOnce(),
    ) -> Result<Self, (Self, io::Error)> {
        match socket.peek() {
            Ok(Some(TLS_HANDSHAKE)) => {}
            Ok(Some(_)) => return Err((Self::Plain(socket), ErrorKind::InvalidInput.into())),
            Ok(None) => return Err((Self::Plain(socket), ErrorKind::UnexpectedEof.into())),
            Err(error) => return Err((Self::Plain(socket), error)),
        }
        let accepted = match client_hello(&mut socket) {
            Ok(accepted) => accepted,
            Err(error) => return Err((Self::Plain(socket), error)),
        };
        begun();
        let connection = match accepted.into_connection(config) {
            Ok(connection) => connection,
            Err(refused) => {
                let error = alert(refused, &mut socket);
                return Err((Self::Plain(socket), error));
            }
        };
        let mut stream = Box::new(StreamOwned::new(connection, socket));
        match stream.conn.complete_io(&mut stream.sock) {
            Ok(_) if !stream.conn.is_handshaking() => Ok(Self::Tls(stream)),
            Ok(_) => Err((Self::Tls(stream), ErrorKind::UnexpectedEof.into())),
            Err(error) => Err((Self::Tls(stream), error)),
        }
    }

    /// Everything that is read or written from now on must be over by then.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.socket().set_deadline(deadline);
    }

    /// The socket below TLS.
    pub fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    /// Tells the client that nothing more will be sent. Errors no longer matter.
    pub fn end(&mut self) {
        if let Self::Tls(stream) = self {
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
        self.socket().end();
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buffer),
            // An end of stream without close_notify is an error to rustls, to guard against truncation.
            // A request states its own length, so here it is just the end.
            Self::Tls(stream) => match stream.read(buffer) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(0),
                read => read,
            },
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// Reads the message with which a client begins a TLS handshake.
fn client_hello(socket: &mut Socket) -> io::Result<Accepted> {
    let mut acceptor = Acceptor::default();
    loop {
        if acceptor.read_tls(socket)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok(accepted),
            Ok(None) => {}
            Err(refused) => return Err(alert(refused, socket)),
        }
    }
}

/// Tells the client why the handshake failed. It does not matter whether that arrives.
fn alert((error, mut alert): (rustls::Error, AcceptedAlert), socket: &mut Socket) -> io::Error {
    let _ = alert.write_all(socket);
    io::Error::new(ErrorKind::InvalidData, error)
}

/// The content type of a handshake record, with which every TLS connection begins (RFC 8446,
/// section 5.1).
const TLS_HANDSHAKE: u8 = 22;
