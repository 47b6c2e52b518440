//! `check URL`: a dry run of an attempt, step by step, with the same code and rules. It sends no request.
//!
//! Not here: attempts themselves ([`crate::delivery::attempt`]).

use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::token::paths;
use crate::auth::{Denial, Key, Macaroon};
use crate::config::CheckArgs;
use crate::delivery::addresses::Rules;
use crate::delivery::attempt::{explain_look_up, refusal};
use crate::delivery::connect::is_own;
use crate::delivery::tls::{self, Trust};
use crate::destination::Destination;
use crate::dial::{self, Late, Names};
use crate::socket::Socket;

/// How long all steps together may take: as long as an attempt by default.
const LIMIT: Duration = Duration::from_secs(30);

/// One step and its result.
#[derive(Serialize)]
struct Finding {
    step: &'static str,
    ok: bool,
    message: String,
}

/// Checks a destination and prints one line for each step. Blocks for at most half a minute. True if an
/// export could be delivered there now.
///
/// # Errors
/// The output cannot be written, or the CA file cannot be used.
pub fn check(arguments: &CheckArgs) -> Result<bool, String> {
    let trust = arguments
        .destinations
        .trust()
        .map_err(|error| error.to_string())?;
    let rules = arguments.rules().map_err(|error| error.to_string())?;
    let mut findings = follow(&arguments.url, &rules, &trust);
    if let Some(token) = &arguments.token {
        let (name, key) = arguments.issuer().map_err(|error| error.to_string())?;
        let verdict = judge(token, key.as_ref(), name, &arguments.url, SystemTime::now());
        let ok = verdict.is_ok();
        let message = verdict.unwrap_or_else(|denial| denial.explained());
        let step = "token";
        findings.insert(0, Finding { step, ok, message });
    }
    let ok = findings.iter().all(|finding| finding.ok);
    print(&arguments.url, &findings, ok, arguments.json).map_err(|error| error.to_string())?;
    Ok(ok)
}

fn print(url: &str, findings: &[Finding], ok: bool, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        #[derive(Serialize)]
        struct Report<'a> {
            url: &'a str,
            ok: bool,
            steps: &'a [Finding],
        }
        serde_json::to_writer(
            &mut out,
            &Report {
                url,
                ok,
                steps: findings,
            },
        )?;
        return writeln!(out);
    }
    for Finding { step, ok, message } in findings {
        writeln!(
            out,
            "{:<4}  {step:<11}  {message}",
            if *ok { "ok" } else { "FAIL" }
        )?;
    }
    Ok(())
}

/// Whether an app's token allows exports to this URL, and on which paths.
fn judge(
    token: &str,
    key: Option<&Key>,
    name: &str,
    url: &str,
    now: SystemTime,
) -> Result<String, Denial> {
    let macaroon = Macaroon::read(token)?;
    if key.is_some_and(|key| !macaroon.is_signed_by(key)) {
        return Err(Denial::Forged);
    }
    let paths = paths(&macaroon, name, Some(url), now)?;
    let doubt = match key {
        Some(_) => "",
        None => "; its signature was not checked: give the secret with --secret or EXPORT_SECRET",
    };
    Ok(format!(
        "it allows exports to this URL with POST {paths}{doubt}"
    ))
}

/// Takes the steps in order, up to the first that fails.
fn follow(url: &str, rules: &Rules, trust: &Trust) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |step, result: Result<String, String>| {
        let ok = result.is_ok();
        let message = result.unwrap_or_else(|error| error);
        findings.push(Finding { step, ok, message });
        ok
    };
    let destination = match Destination::parse(url) {
        Ok(destination) => destination,
        Err(error) => {
            note("url", Err(format!("it {error}")));
            return findings;
        }
    };
    note(
        "url",
        Ok(format!("{} is well formed", destination.origin())),
    );
    let (host, port) = destination.host_and_port();
    let encrypted = destination.is_encrypted();
    let deadline = Instant::now() + LIMIT;
    let names = Names::default();
    let addresses = match names.look_up(host, port, deadline) {
        Ok(found) => found,
        Err(error) => {
            note("look-up", Err(explain_look_up(error, host)));
            return findings;
        }
    };
    note(
        "look-up",
        Ok(format!("{host} has {} address(es)", addresses.len())),
    );
    let mut permitted = true;
    for address in &addresses {
        let verdict = rules.judge(*address, encrypted, is_own);
        permitted &= note(
            "address",
            verdict
                .map(|()| format!("{} may be sent to", address.ip()))
                .map_err(|error| error.to_string()),
        );
    }
    if !permitted {
        return findings;
    }
    let late = |until| {
        let late = names.late(host, port, until);
        if let Late::All(all) = &late {
            for address in all {
                rules
                    .judge(*address, encrypted, is_own)
                    .map_err(|error| Obstacle::Forbidden(error.to_string()))?;
            }
        }
        Ok(late)
    };
    let connected = dial::connect(&addresses, deadline, late).and_then(|stream| {
        stream
            .peer_addr()
            .map(|address| (stream, address))
            .map_err(Obstacle::from)
    });
    let (stream, address) = match connected {
        Ok(connected) => connected,
        Err(Obstacle::Forbidden(message)) => {
            note("address", Err(message));
            return findings;
        }
        Err(Obstacle::Failed(error)) => {
            note("connection", Err(refusal(&error, destination.authority())));
            return findings;
        }
    };
    note("connection", Ok(format!("{address} answers")));
    if encrypted {
        note("certificate", handshake(stream, deadline, host, trust));
    }
    findings
}

/// Why no connection was made.
enum Obstacle {
    /// An address that arrived late may not be sent to.
    Forbidden(String),
    Failed(io::Error),
}

impl From<io::Error> for Obstacle {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn handshake(
    stream: TcpStream,
    deadline: Instant,
    host: &str,
    trust: &Trust,
) -> Result<String, String> {
    let agreed = tls::handshake(trust, host, Socket::new(Arc::new(stream), deadline));
    let stream = agreed.map_err(|error| match tls::cause(&error) {
        Some(cause) => tls::explain(cause, host),
        None => format!("the TLS handshake with {host} failed: {error}"),
    })?;
    Ok(
        match tls::expiry(trust, &stream.conn, host).map(tls::date) {
            Some(day) => format!("certificate of {host} is good until {day}"),
            None => format!("certificate of {host} is good"),
        },
    )
}
