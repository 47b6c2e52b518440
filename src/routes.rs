//! Turns a request into a command: what it asks for, and whether that is allowed; no sockets.
//!
//! Not here: what a client is told ([`crate::answer`]), receiving requests (`server`), and carrying commands
//! out (`exports`).

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use crate::answer::Refusal;
use crate::auth::secret::Secret;
use crate::auth::{self, Denial, Grant};
use crate::destination::Destination;
use crate::export;
use crate::exports::{Query, Submission};

/// How long a long poll waits if it does not say: the Go client library gives up after 10 s.
const DEFAULT_WAIT: Duration = Duration::from_secs(5);
/// The longest that a long poll waits.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The deepest nesting of a payload that is accepted: destinations' parsers commonly fail beyond it.
const DEEPEST: usize = 128;
/// Credentials of Basic auth are standard base64 (RFC 7617).
const BASIC: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The parts of a request that decide about it.
#[derive(Default)]
pub struct Request<'a> {
    /// The method, in upper case.
    pub method: &'a str,
    /// The request target: path and query.
    pub target: &'a str,
    /// The header `X-Api-Key`.
    pub api_key: Option<&'a str>,
    /// The header `Authorization`.
    pub authorization: Option<&'a str>,
    /// The header `Idempotency-Key`.
    pub idempotency_key: Option<&'a str>,
    /// The whole body.
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// The target up to its query.
    pub fn path(&self) -> &'a str {
        self.target
            .split_once('?')
            .map_or(self.target, |(path, _)| path)
    }

    fn query(&self) -> &'a str {
        self.target.split_once('?').map_or("", |(_, query)| query)
    }
}

/// What a token is checked against.
pub struct Policy {
    /// This service's name, which a token's `target` must be.
    pub name: String,
    /// Holds the root key of all tokens, once there is one.
    pub secret: Arc<Secret>,
}

/// What an allowed request asks for.
pub enum Command {
    /// Say that the service is running.
    Status,
    /// Say where the owner looks.
    Ui,
    /// Accept a new export, and answer when it is finished or after this long.
    Submit(Submission, Duration),
    /// Show an export, and answer when it is finished or after this long.
    Poll(Query, Duration),
}

/// Decides what a request asks for, and whether that is allowed. Tokens expire by `now`.
///
/// # Errors
/// The first reason to refuse it, in this order: path, method, no key, token, body, destination.
pub fn command(
    request: &Request<'_>,
    policy: &Policy,
    now: SystemTime,
) -> Result<Command, Refusal> {
    let wait = match request.path() {
        "/status" if matches!(request.method, "GET" | "HEAD") => return Ok(Command::Status),
        "/ui" if matches!(request.method, "GET" | "HEAD") => return Ok(Command::Ui),
        "/status" | "/ui" => return Err(Refusal::Method("GET, HEAD")),
        "/export" | "/lp/export" if request.method != "POST" => {
            return Err(Refusal::Method("POST"));
        }
        "/export" => Duration::ZERO,
        "/lp/export" => wait(request.query()),
        _ => return Err(Refusal::NoSuchPath),
    };
    let subject = auth::Request {
        target: &policy.name,
        method: request.method,
        path: request.path(),
    };
    let key = policy.secret.key().map_err(Refusal::NoSecret)?;
    let grant = auth::authorize(&token(request)?, &key, &subject, now)?;
    let body = read_body(request.body)?;
    match body.id.as_deref() {
        None | Some("") => Ok(Command::Submit(submission(request, body, &grant)?, wait)),
        Some(id) => {
            let id = id
                .parse()
                .map_err(|_| Refusal::Export(export::Error::NotFound))?;
            let destination = body.uri.map(Cow::into_owned);
            Ok(Command::Poll(
                Query {
                    id,
                    grant,
                    destination,
                },
                wait,
            ))
        }
    }
}

/// The token's text, wherever the request carries it.
fn token<'a>(request: &Request<'a>) -> Result<Cow<'a, str>, Denial> {
    if let Some(token) = request.api_key {
        return Ok(token.trim().into());
    }
    credentials(request.authorization)
}

/// The token in an `Authorization` header: of Bearer, or the user name of Basic.
///
/// # Errors
/// [`Denial::NoToken`], or [`Denial::Unreadable`] if it is not the base64 of text.
pub fn credentials(authorization: Option<&str>) -> Result<Cow<'_, str>, Denial> {
    let (scheme, credentials) = authorization
        .and_then(|value| value.trim().split_once(' '))
        .ok_or(Denial::NoToken)?;
    let credentials = credentials.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(credentials.into());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(Denial::NoToken);
    }
    let decoded = BASIC.decode(credentials).map_err(|_| Denial::Unreadable)?;
    let mut user = String::from_utf8(decoded).map_err(|_| Denial::Unreadable)?;
    // The user name ends at the first colon (RFC 7617), except that a v2 JSON token is full of
    // them: `curl -u "$TOKEN:"` puts one more behind it.
    let end = if user.starts_with('{') {
        user.rfind(':')
    } else {
        user.find(':')
    };
    user.truncate(end.unwrap_or(user.len()));
    Ok(user.into())
}

/// `timeout=SECONDS` of a query; anything but a plain decimal number means the default.
fn wait(query: &str) -> Duration {
    let seconds = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("timeout="))
        .filter(|text| {
            text.bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.')
        })
        .and_then(|text| text.parse::<f64>().ok());
    match seconds {
        // Digits can say infinity, and min() caps that too.
        Some(seconds) => Duration::from_secs_f64(seconds.min(LONGEST_WAIT.as_secs_f64())),
        None => DEFAULT_WAIT,
    }
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    uri: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

fn read_body(body: &[u8]) -> Result<Body<'_>, Refusal> {
    const SHAPE: &str =
        "the body must be a JSON object with `id` and `uri` as strings and each field once";
    // serde takes an array for a struct too, by the order of its fields.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(Refusal::Malformed(SHAPE.into()));
    }
    serde_json::from_slice(body).map_err(|error| {
        if error.is_data() {
            malformed_at(SHAPE, &error)
        } else {
            not_json("the body is not valid JSON", body, &error)
        }
    })
}

/// Byte order marks, which editors and PowerShell write and which are invisible: in UTF-8, and in UTF-16 of
/// both byte orders.
const BYTE_ORDER_MARKS: [&[u8]; 3] = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"];

/// Says that a text is not JSON, and why if the reason is invisible.
fn not_json(what: &str, text: &[u8], error: &serde_json::Error) -> Refusal {
    let before = text.split_inclusive(|byte| *byte == b'\n');
    let line: usize = before
        .take(error.line().saturating_sub(1))
        .map(<[u8]>::len)
        .sum();
    // A column is the number of the offending byte, from 1.
    let at = line + error.column().saturating_sub(1);
    let rest = text.get(at..).unwrap_or_default();
    if BYTE_ORDER_MARKS.iter().any(|mark| rest.starts_with(mark)) {
        let what = format!("{what}: there is a byte order mark (BOM), send UTF-8 without one");
        return malformed_at(&what, error);
    }
    malformed_at(what, error)
}

/// Leaves serde_json's own message out, which may quote a value.
fn malformed_at(what: &str, error: &serde_json::Error) -> Refusal {
    let (line, column) = (error.line(), error.column());
    Refusal::Malformed(format!("{what}; see line {line}, column {column}").into())
}

fn submission(request: &Request<'_>, body: Body<'_>, grant: &Grant) -> Result<Submission, Refusal> {
    let url = body.uri.ok_or(Refusal::Malformed(
        "`uri` is missing: it says where a new export goes".into(),
    ))?;
    let destination = Destination::parse(&url)?;
    grant.check(&url)?;
    let data = body.data.ok_or(Refusal::Malformed(
        "`data` is missing: it is what a new export sends".into(),
    ))?;
    Ok(Submission {
        owner: grant.owner().to_vec(),
        destination,
        payload: payload(data)?.into_owned().into_bytes(),
        idempotency_key: request.idempotency_key.map(idempotency_key).transpose()?,
    })
}

/// The exact text to send for `data`, after checking that it is JSON. It is never parsed into values and
/// written again, which would change numbers, escapes and the order of keys.
fn payload(data: &RawValue) -> Result<Cow<'_, str>, Refusal> {
    let text = match data.get().as_bytes().first() {
        Some(b'{' | b'[') => Cow::Borrowed(data.get()),
        Some(b'"') => {
            let text: String = serde_json::from_str(data.get())
                .map_err(|error| malformed_at("`data` is not valid text", &error))?;
            serde_json::from_str::<IgnoredAny>(&text).map_err(|error| {
                let what = "`data` is a string, but what it holds is not valid JSON";
                not_json(what, text.as_bytes(), &error)
            })?;
            Cow::Owned(text)
        }
        _ => {
            return Err(Refusal::Malformed(
                "`data` must be a string holding JSON text, a JSON object or an array".into(),
            ));
        }
    };
    if deepest(&text) > DEEPEST {
        return Err(Refusal::Malformed(
            format!("`data` is nested more than {DEEPEST} levels deep").into(),
        ));
    }
    Ok(text)
}

/// How deep valid JSON is nested. serde_json skips values without recursion, so it has no limit of its own
/// here.
fn deepest(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn idempotency_key(value: &str) -> Result<String, Refusal> {
    let value = value.trim();
    if !(1..=255).contains(&value.len()) || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Refusal::Malformed(
            "Idempotency-Key must be 1 to 255 visible ASCII characters".into(),
        ));
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::refusal;
    use crate::auth::{Key, Macaroon};
    use proptest::prelude::*;

    const URL: &str = "https://a.example/in";

    fn policy() -> Policy {
        Policy {
            name: "export-service".into(),
            secret: Arc::new(Secret::given(Key::derive(b"secret"))),
        }
    }

    fn minted(destination: &str) -> String {
        let caveats = [
            "target = export-service".to_owned(),
            "method = POST".to_owned(),
            "path = *".to_owned(),
            format!("destination = {destination}"),
        ];
        Macaroon::mint(&Key::derive(b"secret"), "me", caveats)
            .to_v1()
            .unwrap()
    }

    fn decided(target: &str, body: &str) -> Result<Command, Refusal> {
        let token = minted(URL);
        let request = Request {
            method: "POST",
            target,
            api_key: Some(&token),
            body: body.as_bytes(),
            ..Request::default()
        };
        command(&request, &policy(), SystemTime::now())
    }

    fn sent(data: &str) -> Result<String, Refusal> {
        match decided("/export", &format!(r#"{{"uri":"{URL}","data":{data}}}"#)) {
            Ok(Command::Submit(submission, _)) => {
                Ok(String::from_utf8(submission.payload).unwrap())
            }
            Ok(_) => panic!("not a submission"),
            Err(refusal) => Err(refusal),
        }
    }

    #[test]
    fn without_a_secret_only_requests_that_need_a_token_are_put_off() {
        let policy = Policy {
            secret: Arc::new(Secret::awaited()),
            ..policy()
        };
        let code = |method, target| {
            let request = Request {
                method,
                target,
                ..Request::default()
            };
            let refused = command(&request, &policy, SystemTime::now()).err()?;
            Some((refused.status(), refusal(&refused).headers))
        };
        assert!(code("GET", "/status").is_none());
        assert_eq!(code("GET", "/export").unwrap().0.0, 405);
        for target in ["/export", "/lp/export?timeout=9"] {
            let (status, headers) = code("POST", target).unwrap();
            assert_eq!(status, (503, "no_secret"));
            assert!(headers.contains(&("Retry-After", "5".into())));
        }
    }

    #[test]
    fn payloads_go_out_exactly_as_they_came() {
        for json in [
            r#"{"z":1.0,"a":1e400,"n":12345678901234567890,"m":-0.0}"#,
            r#"{ "b" : [ 1 , 2 ] ,  "a":"\u00e9\/é\ud83d\ude00" }"#,
            r#"[1.10,1E+2,"\"]}"]"#,
            r#"{"a":1,"a":2}"#,
            "{}",
            "[]",
        ] {
            assert_eq!(sent(json).unwrap(), json);
            let quoted = serde_json::to_string(json).unwrap();
            assert_eq!(sent(&quoted).unwrap(), json, "as a string");
        }
        assert_eq!(sent(r#"" {\n\"a\": 1}\t""#).unwrap(), " {\n\"a\": 1}\t");
        assert_eq!(sent(r#""17""#).unwrap(), "17");
    }

    #[test]
    fn data_that_is_not_json_text_is_refused() {
        for data in [
            "1",
            "true",
            "null",
            r#""""#,
            r#""hello""#,
            r#""{\"a\":}""#,
            r#""\ud800""#,
            r#""1 2""#,
        ] {
            assert!(matches!(sent(data), Err(Refusal::Malformed(_))), "{data}");
        }
    }

    #[test]
    fn nesting_is_limited_and_brackets_in_strings_do_not_count() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(sent(&nested(128)).is_ok());
        for bomb in [nested(129), nested(400_000), format!("{:?}", nested(129))] {
            assert!(matches!(sent(&bomb), Err(Refusal::Malformed(_))));
        }
        let brackets = format!(r#"["\"{}"]"#, "[".repeat(500));
        assert_eq!(sent(&brackets).unwrap(), brackets);
    }

    #[test]
    fn refusals_do_not_quote_what_was_sent() {
        for body in [
            r#"{"id":"s3cret""#,
            r#"{"id":{"s3cret":1}}"#,
            r#"{"uri":"s3cret"}"#,
            r#"["s3cret"]"#,
        ] {
            let refusal = decided("/export", body).err().unwrap();
            assert!(!refusal.to_string().contains("s3cret"), "{refusal}");
            assert_eq!(refusal.status().0, 400);
        }
    }

    #[test]
    fn a_body_that_is_no_object_is_refused_even_where_it_holds_the_same() {
        let fields = format!(r#"["","{URL}",{{}}]"#);
        for body in [fields.as_str(), "[]", "null", "17", r#""x""#, ""] {
            let refusal = decided("/export", body).err().unwrap();
            assert_eq!(refusal.status().0, 400, "{body}");
        }
        assert!(decided("/export", &format!(" \n{{\"uri\":\"{URL}\",\"data\":[]}} ")).is_ok());
    }

    #[test]
    fn an_absent_null_or_empty_id_is_a_new_export_and_any_other_a_poll() {
        for id in ["", r#""id":"","#, r#""id":null,"#] {
            let body = format!(r#"{{{id}"uri":"{URL}","data":{{}},"extra":[1]}}"#);
            assert!(
                matches!(decided("/export", &body), Ok(Command::Submit(..))),
                "{id}"
            );
        }
        let poll = r#"{"id":"01890a5d-ac96-774b-bcce-b302099a8057"}"#;
        assert!(matches!(decided("/export", poll), Ok(Command::Poll(..))));
        let unknown = decided("/export", r#"{"id":"no uuid"}"#).err();
        assert_eq!(unknown, Some(Refusal::Export(export::Error::NotFound)));
    }

    #[test]
    fn a_new_export_needs_a_good_uri_that_the_token_allows() {
        let refusal = |body: &str| decided("/export", body).err().unwrap().status().0;
        assert_eq!(refusal(r#"{"data":{}}"#), 400);
        assert_eq!(
            refusal(r#"{"uri":"https://a.example/in#x","data":{}}"#),
            400
        );
        assert_eq!(refusal(r#"{"uri":"https://b.example/in","data":{}}"#), 401);
        assert_eq!(refusal(&format!(r#"{{"uri":"{URL}"}}"#)), 400);
    }

    #[test]
    fn the_long_poll_timeout_is_decimal_seconds_with_a_default_and_a_cap() {
        for (query, millis) in [
            ("", 5_000),
            ("timeout=0", 0),
            ("timeout=2.5", 2_500),
            ("a=b&timeout=1", 1_000),
            ("timeout=", 5_000),
            ("timeout=abc", 5_000),
            ("timeout=-1", 5_000),
            ("timeout=inf", 5_000),
            ("timeout=1e1", 5_000),
            ("timeout=1.2.3", 5_000),
            ("timeout=.", 5_000),
            ("timeout=61", 60_000),
            (&format!("timeout={}", "9".repeat(400)), 60_000),
        ] {
            assert_eq!(wait(query), Duration::from_millis(millis), "{query:.20}");
        }
    }

    #[test]
    fn the_token_is_found_in_each_of_its_places() {
        let basic = |user: &str| format!("Basic {}", BASIC.encode(user));
        for (value, expected) in [
            ("Bearer abc".to_owned(), Ok("abc")),
            ("bearer  abc ".to_owned(), Ok("abc")),
            (basic("abc:"), Ok("abc")),
            (basic("abc:password"), Ok("abc")),
            (basic("abc"), Ok("abc")),
            (basic(r#"{"v":2}:"#), Ok(r#"{"v":2}"#)),
            ("Basic !!".to_owned(), Err(Denial::Unreadable)),
            ("Digest abc".to_owned(), Err(Denial::NoToken)),
            ("abc".to_owned(), Err(Denial::NoToken)),
        ] {
            let request = Request {
                authorization: Some(&value),
                ..Request::default()
            };
            assert_eq!(token(&request).as_deref(), expected.as_deref(), "{value}");
        }
        assert_eq!(token(&Request::default()), Err(Denial::NoToken));
        let both = Request {
            api_key: Some("k"),
            authorization: Some("Bearer b"),
            ..Request::default()
        };
        assert_eq!(token(&both).as_deref(), Ok("k"));
    }

    #[test]
    fn idempotency_keys_are_visible_ascii_of_a_limited_length() {
        assert!(idempotency_key("a-1").is_ok());
        assert!(idempotency_key(&"k".repeat(255)).is_ok());
        for bad in ["", "a b", "é", &"k".repeat(256)] {
            assert!(idempotency_key(bad).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decided("/export", &String::from_utf8_lossy(&body));
        }

        #[test]
        fn any_json_object_is_sent_as_it_stands(
            members in proptest::collection::vec((".{0,8}", "-?[1-9][0-9]{0,30}(\\.[0-9]{1,9})?"), 0..6),
        ) {
            let members: Vec<_> = members
                .iter()
                .map(|(key, number)| format!("{} :{number}", serde_json::to_string(key).unwrap()))
                .collect();
            let json = format!("{{{}}}", members.join(" , "));
            prop_assert_eq!(sent(&json).unwrap(), json.clone());
            prop_assert_eq!(sent(&serde_json::to_string(&json).unwrap()).unwrap(), json);
        }
    }
}
