//! The small tools for a person at the keyboard: mint a token, be a destination, ask for health.
//!
//! Not here: the service itself.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ureq::tls::TlsConfig;

use crate::auth::Macaroon;
use crate::config::{HealthcheckArgs, SinkArgs, TokenArgs};
use crate::destination::Destination;
use crate::threads;

/// The largest body a sink reads, in bytes.
const LARGEST: u64 = 64 * 1024 * 1024;
/// Connections that a sink serves at once.
const SINK_THREADS: usize = 8;
/// From the Unix epoch to the beginning of the last year that RFC 3339 can write.
const YEAR_9999: Duration = Duration::from_secs(253_370_764_800);
/// How long a health check may take.
const HEALTH: Duration = Duration::from_secs(3);

/// Mints the token that the arguments describe, in the shape of the arbiter's: v1, no location.
///
/// # Errors
/// What is missing or wrong, for the person who typed it.
pub fn token(arguments: &TokenArgs, now: SystemTime) -> Result<String, String> {
    let (name, key) = arguments.signer().map_err(|error| error.to_string())?;
    let url = &arguments.destination;
    Destination::parse(url).map_err(|error| format!("--destination {url}: it {error}"))?;
    let mut caveats = vec![
        format!("path = {}", arguments.path),
        format!("method = {}", arguments.method),
        format!("target = {name}"),
        format!("destination = {url}"),
    ];
    if !arguments.path.starts_with(['/', '*']) {
        return Err(format!(
            "--path {}: no request has a path like that: begin it with a slash, like /lp/export",
            arguments.path
        ));
    }
    if arguments.expires.is_some_and(|expires| expires.is_zero()) {
        return Err(
            "--expires is 0, so nobody could use the token: give some time, like 1h".into(),
        );
    }
    if let Some(expires) = arguments.expires {
        let end = now
            .checked_add(expires)
            .filter(|end| *end < UNIX_EPOCH + YEAR_9999);
        let end = end.ok_or("--expires lies beyond the year 9999, which RFC 3339 cannot write")?;
        caveats.push(format!("time < {}", humantime::format_rfc3339_seconds(end)));
    }
    Macaroon::mint(&key, &arguments.id, caveats)
        .to_v1()
        .ok_or_else(|| "the token would be too long: give a shorter --id or --path".into())
}

/// Listens on 127.0.0.1, prints each request that arrives and answers with its body. Returns
/// only where that fails.
///
/// # Errors
/// Where the port cannot be had, or nobody reads what is printed.
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
        // The service may have gone away in the meantime: what counts is that the body arrived.
        let _ = request.respond(response);
    }
}

/// Asks the service at this address for its status, from the same machine. Blocks for three seconds
/// at the most.
///
/// # Errors
/// What was asked and what came back instead of `active`.
pub fn healthcheck(arguments: &HealthcheckArgs) -> Result<(), String> {
    let address = arguments.address();
    let local = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let scheme = if arguments.is_tls() { "https" } else { "http" };
    let url = format!(
        "{scheme}://{}/status",
        SocketAddr::new(local, address.port())
    );
    // The certificate is for the name that clients use. Nothing secret is said, and whoever could
    // listen in its stead on this machine could also end the service.
    let tls = TlsConfig::builder().disable_verification(true).build();
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(HEALTH))
        .proxy(None)
        .tls_config(tls)
        .build();
    let body = ureq::Agent::new_with_config(config)
        .get(&url)
        .call()
        .and_then(|mut response| response.body_mut().read_to_string())
        .map_err(|error| format!("{url}: {error}; is the service running, on this port, and with this --tls-pem or --secrets-dir?"))?;
    if body == "active" {
        Ok(())
    } else {
        Err(format!("{url} does not say that it is active"))
    }
}
