//! What a client is told: responses and refusals. [`Refusal`] is the one place where an error becomes an
//! HTTP status.
//!
//! Not here: deciding whether a request is refused (`routes`, `gate`), and writing an answer (`gate`).

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::auth::Denial;
use crate::auth::secret::Missing;
use crate::destination::BadUrl;
use crate::export::{self, State, View};

/// How soon a client may retry after a 429 or 503, in seconds.
const RETRY_AFTER: u32 = 5;

/// The same if there were only too many connections or large requests.
const RETRY_AFTER_BUSY: u32 = 1;

/// Why a request is not carried out.
#[derive(Debug, PartialEq)]
pub enum Refusal {
    /// The path is not one of the three.
    NoSuchPath,
    /// The path does not have this method, but these.
    Method(&'static str),
    /// There is no key yet for checking tokens.
    NoSecret(Missing),
    /// There is no token, or it does not cover the request.
    Denied(Denial),
    /// The body is not as it must be. The text says which part, and how.
    Malformed(Cow<'static, str>),
    /// The body is larger than this many bytes.
    TooLarge(usize),
    /// The client closed its side before the whole body had arrived.
    Incomplete,
    /// It is not HTTP/1.1, or is ambiguous. The text says where.
    BadRequest(&'static str),
    /// The client took too long to send the request.
    Slow,
    /// It should have a body, and does not say how long that is.
    LengthRequired,
    /// Its body is compressed, or encoded in another way.
    ContentEncoding,
    /// It has an expectation other than `100-continue`.
    Expectation,
    /// Its request line and headers are too large, or there are too many headers.
    HeadTooLarge,
    /// It needs something that is not implemented. The text says what.
    NotImplemented(&'static str),
    /// Its HTTP version is not served.
    Version,
    /// There are too many connections, or too many large requests at a time.
    Busy,
    /// The service is stopping.
    Stopping,
    /// The service has taken the request and did not answer.
    Unanswered,
    /// `exports` has refused it.
    Export(export::Error),
}

impl From<Denial> for Refusal {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl From<BadUrl> for Refusal {
    fn from(bad: BadUrl) -> Self {
        Self::Malformed(format!("`uri` {bad}").into())
    }
}

impl Refusal {
    /// The HTTP status, and the code in the error body. Listed in full, so that a new reason does not
    /// compile until someone has decided what callers see.
    pub fn status(&self) -> (u16, &'static str) {
        match self {
            Self::NoSuchPath => (404, "no_such_path"),
            Self::Method(_) => (405, "method_not_allowed"),
            Self::NoSecret(_) => (503, "no_secret"),
            Self::Denied(_) => (401, "unauthorized"),
            Self::Malformed(_) => (400, "malformed"),
            Self::TooLarge(_) => (413, "too_large"),
            Self::Incomplete => (400, "incomplete"),
            Self::BadRequest(_) => (400, "bad_request"),
            Self::Slow => (408, "too_slow"),
            Self::LengthRequired => (411, "length_required"),
            Self::ContentEncoding => (415, "unsupported_encoding"),
            Self::Expectation => (417, "expectation_failed"),
            Self::HeadTooLarge => (431, "head_too_large"),
            Self::NotImplemented(_) => (501, "not_implemented"),
            Self::Version => (505, "http_version"),
            Self::Busy => (503, "busy"),
            Self::Stopping => (503, "stopping"),
            Self::Unanswered => (503, "unanswered"),
            Self::Export(export::Error::NotFound) => (404, "no_such_export"),
            Self::Export(export::Error::KeyReused) => (409, "idempotency_conflict"),
            Self::Export(export::Error::Overloaded) => (503, "overloaded"),
            Self::Export(export::Error::DiskFull) => (503, "disk_full"),
            Self::Export(export::Error::Storage) => (503, "storage_failed"),
            Self::Export(export::Error::TooMany(_)) => (429, "too_many_pending"),
            Self::Export(export::Error::StoreFull) => (503, "store_full"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchPath => f.write_str("there are POST /export, POST /lp/export and GET /status"),
            Self::Method(allow) => write!(f, "this path takes {allow} only"),
            Self::NoSecret(Missing(reason)) => write!(
                f,
                "there is no secret to check tokens with yet, since {reason}: try again later"
            ),
            Self::Denied(denial) => denial.fmt(f),
            Self::Malformed(what) => f.write_str(what),
            Self::TooLarge(limit) => {
                write!(f, "the body has more than {limit} bytes: send less, or raise --max-body")
            }
            Self::Incomplete => f.write_str("the body ended before its announced length"),
            Self::BadRequest(what) | Self::NotImplemented(what) => f.write_str(what),
            Self::Slow => f.write_str("the request took too long to arrive: send it at once"),
            Self::LengthRequired => {
                f.write_str("Content-Length is missing: say how long the body is, or send it in chunks")
            }
            Self::ContentEncoding => f.write_str(
                "no Content-Encoding is known here, like gzip: send the JSON as it is, and leave the header out",
            ),
            Self::Expectation => f.write_str("the only expectation known here is 100-continue"),
            Self::HeadTooLarge => {
                f.write_str("the request line and headers have more than 16 KiB, or more than 64 headers")
            }
            Self::Version => f.write_str("this service speaks HTTP/1.1 and HTTP/1.0"),
            Self::Busy => f.write_str(
                "too many connections or large requests at a time: try again soon, and keep fewer open",
            ),
            Self::Stopping => f.write_str(
                "the service is stopping and has not taken this request: try again once it is back",
            ),
            Self::Unanswered => f.write_str(
                "the service did not answer: try again, with an Idempotency-Key so that nothing is sent twice",
            ),
            Self::Export(export::Error::NotFound) => f.write_str(
                "no export with this id belongs to this token and uri: it may have expired",
            ),
            Self::Export(export::Error::KeyReused) => f.write_str(
                "this Idempotency-Key was used for other data to this destination: use a new key for a new export",
            ),
            Self::Export(export::Error::Overloaded) => {
                f.write_str("the disk does not keep up with submissions: try again later")
            }
            Self::Export(export::Error::DiskFull) => f.write_str(
                "the disk is full, so nothing new is accepted: try again later, or free some space",
            ),
            Self::Export(export::Error::TooMany(pending)) => write!(
                f,
                "{pending} exports of this token's identifier, or of this address if that is empty, to this \
                 destination are not finished yet: \
                 wait for some, or raise --max-pending"
            ),
            Self::Export(export::Error::StoreFull) => f.write_str(
                "the store has reached --max-store: wait until exports are delivered and results \
                 expire, or raise it",
            ),
            Self::Export(export::Error::Storage) => f.write_str(
                "the store cannot be used, the service's log says why: try again later",
            ),
        }
    }
}

/// A response, ready to be written.
#[derive(Default)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// Headers in addition to those that every response has.
    pub headers: Vec<(&'static str, Cow<'static, str>)>,
    /// The whole body.
    pub body: String,
    /// The code of the error, if it is one.
    pub refused: Option<&'static str>,
}

/// The answer to `GET /status`.
pub fn status() -> Response {
    Response {
        status: 200,
        headers: vec![("Content-Type", "text/plain; charset=utf-8".into())],
        body: "active".into(),
        refused: None,
    }
}

/// The answer to `GET /ui`: a page without data, for people who open the apps' port in their browser.
pub fn ui() -> Response {
    let text = |value: &'static str| value.into();
    Response {
        status: 200,
        headers: vec![
            ("Content-Type", text("text/html; charset=utf-8")),
            (
                "Content-Security-Policy",
                text("default-src 'none'; frame-ancestors 'none'"),
            ),
            ("X-Content-Type-Options", text("nosniff")),
        ],
        body: UI.into(),
        refused: None,
    }
}

const UI: &str = "\
<!DOCTYPE html>
<html lang=\"en\">
<head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>export-service</title></head>
<body>
<h1>export-service</h1>
<p>This port is for apps. What left your box is shown elsewhere:</p>
<ul>
<li>On the box, <code>export-service status</code> says whether all is well. In a container:
<code>docker exec NAME /export-service status</code></li>
<li>For a page in the browser, start the service with <code>--admin 127.0.0.1:8081</code>. Then
<code>export-service link</code> prints its address and what to log in with.</li>
</ul>
</body>
</html>
";

/// The answer to a submission or a poll.
pub fn view(view: &View) -> Response {
    #[derive(Serialize)]
    struct Body<'a> {
        id: &'a str,
        state: State,
        ext_response: ExtResponse<'a>,
        #[serde(flatten, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure<'a>>,
    }
    #[derive(Serialize)]
    #[serde(untagged)]
    enum ExtResponse<'a> {
        Result(&'a RawValue),
        None {},
    }
    #[derive(Serialize)]
    struct Failure<'a> {
        attempts: u32,
        last_error: &'a RawValue,
        #[serde(skip_serializing_if = "Option::is_none")]
        next_attempt_in: Option<f64>,
    }
    let response = view.response.as_deref();
    let seconds = |wait: Duration| (wait.as_secs_f64() * 10.0).ceil() / 10.0;
    json(
        200,
        &Body {
            id: view
                .id
                .hyphenated()
                .encode_lower(&mut Uuid::encode_buffer()),
            state: view.state,
            ext_response: response.map_or(ExtResponse::None {}, ExtResponse::Result),
            failure: view.last_error.as_deref().map(|last_error| Failure {
                attempts: view.attempts,
                last_error,
                next_attempt_in: view.next_attempt_in.map(seconds),
            }),
        },
    )
}

/// The answer to a refused request.
pub fn refusal(refusal: &Refusal) -> Response {
    #[derive(Serialize)]
    struct Body {
        error: Details,
    }
    #[derive(Serialize)]
    struct Details {
        code: &'static str,
        message: String,
    }
    let (status, code) = refusal.status();
    let mut response = json(
        status,
        &Body {
            error: Details {
                code,
                message: match refusal {
                    // What differs is for the client and not for the log.
                    Refusal::Denied(denial) => denial.explained(),
                    _ => refusal.to_string(),
                },
            },
        },
    );
    response.refused = Some(code);
    match refusal {
        Refusal::Method(allow) => response.headers.push(("Allow", (*allow).into())),
        // RFC 9110, section 12.5.3.
        Refusal::ContentEncoding => {
            response
                .headers
                .push(("Accept-Encoding", "identity".into()));
        }
        Refusal::Denied(_) => {
            for challenge in [
                "Bearer realm=\"export-service\"",
                "Basic realm=\"export-service\"",
            ] {
                response
                    .headers
                    .push(("WWW-Authenticate", challenge.into()));
            }
        }
        _ if matches!(status, 429 | 503) => {
            let seconds = match refusal {
                Refusal::Busy => RETRY_AFTER_BUSY,
                _ => RETRY_AFTER,
            };
            let seconds = seconds.to_string();
            response.headers.push(("Retry-After", seconds.into()));
        }
        _ => {}
    }
    response
}

fn json(status: u16, body: &impl Serialize) -> Response {
    // Structs of strings and of valid JSON: this cannot fail.
    let mut body = serde_json::to_string(body).expect("a response serialises");
    // Separates the answer from a shell's prompt or a script's next line.
    body.push('\n');
    Response {
        status,
        headers: vec![("Content-Type", "application/json".into())],
        body,
        refused: None,
    }
}
