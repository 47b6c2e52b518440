//! From a request of the owner to its answer: which paths there are, and what is checked before each.
//!
//! Not here: the checks themselves ([`super::access`]), and what the answers hold ([`super::api`]).

use std::borrow::Cow;
use std::time::{Instant, SystemTime};

use serde::Serialize;
use serde_json::json;

use super::access::{self, HEADERS, Origin, Refused};
use super::filter::millis;
use super::records::{self, Wrong};
use super::{Client, Owner, api, reading};
use crate::answer::Response;
use crate::exports::acts::Act;
use crate::exports::store::evidence::Evidence;
use crate::gate::framing::Request;
use crate::logging;
use crate::metrics;

/// What the owner's token must be in, for a browser's dialog.
const CHALLENGE: &str =
    "Basic realm=\"export-service link prints the user name\", charset=\"UTF-8\"";
/// How soon a client may try to log in again, in seconds.
const LOGIN_AFTER: &str = "60";
/// How soon it may try again what is not possible now.
const RETRY_AFTER: &str = "5";

/// Serves one request. Blocks for reading the store, and for an act until it is committed.
pub fn serve(
    owner: &Owner,
    request: &Request,
    client: Client,
    now: SystemTime,
    monotonic: Instant,
) -> Response {
    let mut response = answer(owner, request, client, now, monotonic).unwrap_or_else(|refused| {
        if let Client::Remote(address) = client {
            let (method, target) = (request.method(), request.target());
            logging::refused(method, target, refused.status(), &refused, address);
        }
        refusal(&refused)
    });
    if response.status == 503 {
        response.headers.push(("Retry-After", RETRY_AFTER.into()));
    }
    for (name, value) in HEADERS {
        if response.headers.iter().all(|(own, _)| *own != name) {
            response.headers.push((name, value.into()));
        }
    }
    response
}

fn answer(
    owner: &Owner,
    request: &Request,
    client: Client,
    now: SystemTime,
    monotonic: Instant,
) -> Result<Response, Refused> {
    let (method, path) = (request.method(), request.path());
    if let Client::Remote(address) = client {
        owner.hosts.check(request.header("Host"))?;
        if !is_open(path) {
            let authorization = request.header("Authorization");
            let checked = access::authorize(authorization, &owner.key, (method, path), now);
            if let Err(refused @ Refused::Token(_)) = checked {
                let client = address.ip().to_canonical();
                let may_try = owner.logins.lock().fail(client, monotonic);
                return Err(if may_try {
                    refused
                } else {
                    Refused::TooManyLogins
                });
            }
            checked?;
        }
    }
    let reads = || match method {
        "GET" | "HEAD" => Ok(()),
        _ => Err(Refused::Method("GET, HEAD")),
    };
    match path {
        "/" => reads().map(|()| reading::page(owner, request, now)),
        "/livez" => reads().map(|()| word(200, "alive")),
        "/readyz" => reads().map(|()| match owner.secret.key() {
            Ok(_) => word(200, "ready"),
            Err(_) => word(503, "waiting"),
        }),
        "/metrics" => reads().map(|()| Response {
            headers: vec![("Content-Type", metrics::CONTENT_TYPE.into())],
            ..text(200, api::metrics(owner))
        }),
        "/api/ledger" => reads().map(|()| records(owner, request, now, records::ledger)),
        "/api/sums" => reads().map(|()| records(owner, request, now, records::sums)),
        "/api/status" => reads().map(|()| {
            let evidence = owner.exports.evidence().ok();
            json_of(200, &api::status(owner, evidence.as_ref(), now))
        }),
        path => match path.strip_prefix("/api/") {
            Some(name) if Act::NAMES.contains(&name) => match method {
                "POST" => {
                    if let Client::Remote(_) = client {
                        access::check_act(&origin(request))?;
                    }
                    Ok(act(owner, name, request.body()))
                }
                _ => Err(Refused::Method("POST")),
            },
            _ => Err(Refused::NoSuchPath),
        },
    }
}

fn origin(request: &Request) -> Origin<'_> {
    Origin {
        host: request.header("Host"),
        origin: request.header("Origin"),
        site: request.header("Sec-Fetch-Site"),
        content_type: request.header("Content-Type"),
    }
}

/// Carries an act out. Blocks until it is committed.
fn act(owner: &Owner, name: &str, body: &[u8]) -> Response {
    match Act::read(name, body).and_then(|act| owner.exports.act(act)) {
        Ok(acted) => {
            // Without what it is about, which may be a URL with a password in it.
            log::info!(act = name; "the owner acts");
            json_of(200, &acted)
        }
        Err(error) => {
            let (status, code) = error.status();
            json_of(status, &error_body(code, &error.to_string()))
        }
    }
}

/// Answers with rows that `find` finds. Blocks for reading the store.
fn records(
    owner: &Owner,
    request: &Request,
    now: SystemTime,
    find: impl FnOnce(&Evidence, &str, i64) -> Result<records::Answer, Wrong>,
) -> Response {
    let query = request
        .target()
        .split_once('?')
        .map_or("", |(_, query)| query);
    let evidence = owner.exports.evidence().map_err(Wrong::Store);
    match evidence.and_then(|evidence| find(&evidence, query, millis(now))) {
        Ok((body, kind)) => Response {
            status: 200,
            headers: vec![("Content-Type", kind.into())],
            body,
            refused: None,
        },
        Err(Wrong::Query(what)) => json_of(400, &error_body("malformed", &what)),
        Err(Wrong::Store(error)) => {
            log::error!(reason:% = error; "cannot read the ledger");
            let message = "the ledger cannot be read, the service's log says why: try again later";
            json_of(503, &error_body("storage_failed", message))
        }
    }
}

fn error_body(code: &str, message: &str) -> serde_json::Value {
    json!({ "error": { "code": code, "message": message } })
}

/// Whether a path needs no token: for load balancers and container engines, which tell nobody anything.
fn is_open(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz")
}

fn word(status: u16, word: &str) -> Response {
    text(status, format!("{word}\n"))
}

fn text(status: u16, body: String) -> Response {
    Response {
        status,
        headers: vec![("Content-Type", "text/plain; charset=utf-8".into())],
        body,
        refused: None,
    }
}

fn json_of(status: u16, body: &impl Serialize) -> Response {
    // Structs of strings and numbers always serialise.
    let body = serde_json::to_string(body).unwrap_or_default();
    Response {
        status,
        headers: vec![("Content-Type", "application/json".into())],
        body: format!("{body}\n"),
        refused: None,
    }
}

fn refusal(refused: &Refused) -> Response {
    let (status, code) = refused.status();
    let mut response = json_of(status, &error_body(code, &refused.explained()));
    let header = match refused {
        Refused::NoToken | Refused::Token(_) => Some(("WWW-Authenticate", CHALLENGE)),
        Refused::Method(allow) => Some(("Allow", *allow)),
        Refused::TooManyLogins => Some(("Retry-After", LOGIN_AFTER)),
        _ => None,
    };
    let header = header.map(|(name, value)| (name, Cow::Borrowed(value)));
    response.headers.extend(header);
    response
}
