//! The worker: takes an export, makes one attempt, hands over what came of it, and repeats.
//!
//! Exactly one thread runs this. Results go to the store without waiting for their commit.
//!
//! Not here: how a POST is made ([`super::attempt`]) and how a result is kept (`exports`).

use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crossbeam_channel::{Receiver, select_biased};
use ureq::http::StatusCode;

use super::attempt::{Answer, Client, Failure, Kind, Outcome};
use crate::exports::{Exports, ExtResponse, FailureReport, Queued};
use crate::logging::millis;

/// Delivers what comes through `queue`, oldest first, until `stop` is dropped. The attempt under
/// way then is still finished.
pub fn run(queue: &Receiver<Queued>, stop: &Receiver<()>, exports: &Exports, client: &Client) {
    loop {
        select_biased! {
            recv(stop) -> _ => return,
            recv(queue) -> queued => match queued {
                Ok(queued) => deliver(&queued, exports, client),
                Err(_) => return,
            },
        }
    }
}

fn deliver(queued: &Queued, exports: &Exports, client: &Client) {
    let Queued { id, destination } = queued;
    let payload = exports.begin(*id);
    log::trace!(id:%, destination = destination.origin(); "attempt");
    let started = Instant::now();
    let outcome = client.post(*id, destination, &payload);
    let ms = millis(started.elapsed());
    let sent = payload.len();
    let response = match outcome {
        Outcome::Answered(answer) => {
            log::info!(
                id:%, destination = destination.origin(), bytes = sent, status = answer.status,
                response_bytes = answer.body.len(), ms; "delivered"
            );
            answered(answer)
        }
        Outcome::Failed(failure) => {
            log::warn!(
                id:%, destination = destination.origin(), bytes = sent, kind = failure.kind.name(),
                reason = failure.message.as_str(), ms; "failed"
            );
            failed(failure)
        }
    };
    exports.settle(*id, &response);
}

fn answered(answer: Answer) -> ExtResponse {
    let (body, body_base64) = match String::from_utf8(answer.body) {
        Ok(text) => (text, None),
        Err(error) if answer.truncated => cut_text(error),
        Err(error) => (String::new(), Some(STANDARD.encode(error.as_bytes()))),
    };
    ExtResponse {
        body,
        body_base64,
        truncated: answer.truncated,
        ..ExtResponse::with_status(answer.status, reason(answer.status))
    }
}

/// A cut may fall inside a character: text whose only flaw is its last character is text still.
fn cut_text(error: std::string::FromUtf8Error) -> (String, Option<String>) {
    let flaw = error.utf8_error();
    let bytes = error.into_bytes();
    match str::from_utf8(&bytes[..flaw.valid_up_to()]) {
        Ok(text) if flaw.error_len().is_none() => (text.to_owned(), None),
        _ => (String::new(), Some(STANDARD.encode(&bytes))),
    }
}

fn failed(failure: Failure) -> ExtResponse {
    let status = match failure.kind {
        Kind::Timeout => 504,
        Kind::Dns | Kind::Connect | Kind::Tls | Kind::Closed | Kind::Protocol => 502,
    };
    ExtResponse {
        error: Some(FailureReport {
            kind: failure.kind.name(),
            message: failure.message,
            attempts: 1,
        }),
        ..ExtResponse::with_status(status, reason(status))
    }
}

/// The registered reason phrase: HTTP clients do not pass on the one that was sent.
fn reason(status: u16) -> &'static str {
    StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or("Unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(body: &[u8], truncated: bool) -> (String, Option<String>) {
        let response = answered(Answer {
            status: 200,
            body: body.to_vec(),
            truncated,
        });
        (response.body, response.body_base64)
    }

    #[test]
    fn text_stays_text_and_anything_else_goes_in_base64() {
        assert_eq!(body("grün".as_bytes(), false), ("grün".into(), None));
        assert_eq!(
            body(b"\xff\x00", false),
            (String::new(), Some("/wA=".into()))
        );
    }

    #[test]
    fn text_cut_inside_a_character_loses_that_character_only() {
        assert_eq!(body(b"gr\xc3", true), ("gr".into(), None));
        assert_eq!(body(b"gr\xc3", false), (String::new(), Some("Z3LD".into())));
        assert_eq!(
            body(b"\xff gr\xc3", true),
            (String::new(), Some("/yBncsM=".into()))
        );
    }

    #[test]
    fn timeouts_are_504_and_other_failures_502() {
        let response = |kind| {
            failed(Failure {
                kind,
                message: String::new(),
            })
            .status_code
        };
        assert_eq!(response(Kind::Timeout), 504);
        assert_eq!(response(Kind::Connect), 502);
    }
}
