//! `sink`: a small destination to try things with.
//!
//! Not here: anything that the service itself runs.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::config::SinkArgs;
use crate::threads;

/// The largest body that a sink reads, in bytes.
const LARGEST: u64 = 64 * 1024 * 1024;
/// Threads, and so requests that a sink serves at once.
const SINK_THREADS: usize = 8;

/// Listens on 127.0.0.1, prints each request and answers with its body. Returns only if that fails.
///
/// # Errors
/// The port cannot be bound, or the output cannot be written.
pub fn sink(arguments: &SinkArgs) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port))?;
    writeln!(
        io::stdout(),
        "listening on http://{}/",
        listener.local_addr()?
    )?;
    let server = tiny_http::Server::from_listener(listener, None).map_err(io::Error::other)?;
    let server = Arc::new(server);
    let (status, delay) = (arguments.status, arguments.delay);
    for number in 1..SINK_THREADS {
        let server = server.clone();
        threads::spawn(&format!("sink-{number}"), move || {
            let _ = answer_all(&server, status, delay);
        });
    }
    answer_all(&server, status, delay)
}

fn answer_all(server: &tiny_http::Server, status: u16, delay: Duration) -> io::Result<()> {
    loop {
        let mut request = server.recv()?;
        let mut body = Vec::new();
        if request
            .as_reader()
            .take(LARGEST)
            .read_to_end(&mut body)
            .is_err()
        {
            continue;
        }
        let id = request
            .headers()
            .iter()
            .find(|header| header.field.equiv("webhook-id"));
        let id = id.map_or("-", |header| header.value.as_str());
        let mut line =
            format!("{} {} webhook-id={id} ", request.method(), request.url()).into_bytes();
        line.extend_from_slice(&body);
        line.push(b'\n');
        io::stdout().write_all(&line)?;
        thread::sleep(delay);
        let response = tiny_http::Response::from_data(body).with_status_code(status);
        // The client may have left in the meantime: what counts is that the body has arrived.
        let _ = request.respond(response);
    }
}
