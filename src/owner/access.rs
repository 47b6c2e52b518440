//! Who may do what on the owner's port; pure, but for the count of failed logins.
//!
//! A token always, on loopback too: this service itself can be told to POST there. Beyond that a browser is
//! guarded against pages that it shows beside this one, which may send requests here with the owner's stored
//! password: by the name in `Host` (DNS rebinding), and by where an act comes from (cross-site forms).
//!
//! Not here: which paths there are (`routes`), and the Unix socket, on which everything is allowed.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use ureq::http::uri::Authority;

use crate::auth::caveats;
use crate::auth::{Denial, Key, Macaroon, Need};
use crate::routes;

/// The headers of every answer. The page has its own `Content-Security-Policy`.
pub const HEADERS: [(&str, &str); 5] = [
    CONTENT_SECURITY_POLICY,
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
];
/// The policy of an answer that is not meant to be shown.
pub const CONTENT_SECURITY_POLICY: (&str, &str) = (
    "Content-Security-Policy",
    "default-src 'none'; frame-ancestors 'none'",
);

/// Why a request of the owner is not carried out.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// `Host` is not a name of this box. Cut to a length that can be shown.
    Host(String),
    /// There is no token.
    NoToken,
    /// The token is not the owner's, or no longer valid.
    Token(Denial),
    /// The token is the owner's, and does not allow this request.
    NotAllowed(Denial),
    /// Too many tokens from this client were wrong.
    TooManyLogins,
    /// A page of another site asks for an act.
    CrossSite,
    /// An act that is not JSON.
    NotJson,
    /// There is no such path.
    NoSuchPath,
    /// The path has only these methods.
    Method(&'static str),
}

impl Refused {
    /// The HTTP status, and the code in the error body.
    pub fn status(&self) -> (u16, &'static str) {
        match self {
            Self::Host(_) => (421, "unknown_host"),
            Self::NoToken | Self::Token(_) => (401, "unauthorized"),
            Self::NotAllowed(_) => (403, "not_allowed"),
            Self::TooManyLogins => (429, "too_many_logins"),
            Self::CrossSite => (403, "cross_site"),
            Self::NotJson => (415, "not_json"),
            Self::NoSuchPath => (404, "no_such_path"),
            Self::Method(_) => (405, "method_not_allowed"),
        }
    }
}

impl Refused {
    /// The reason with what differs, for the one who sent the request. `Display`, for the log, leaves that out.
    pub fn explained(&self) -> String {
        match self {
            Self::Token(Denial::Expired(difference)) => format!(
                "the token has expired: {difference}; `export-service link` prints a new one"
            ),
            Self::NotAllowed(Denial::Unmet(need, difference)) => format!(
                "{difference}: use one without the caveat `{}`, which `export-service link` prints",
                need.name()
            ),
            Self::NotAllowed(Denial::Unknown(difference)) => format!(
                "this token has the caveat {difference}, and only `path`, `method` and `time <` ever hold here: \
                 `export-service link` prints one without"
            ),
            _ => self.to_string(),
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) if host.is_empty() => f.write_str(
                "the request does not say by which name it reached this box: send a Host header",
            ),
            Self::Host(host) => write!(
                f,
                "{host} is not known as a name of this box: open it by its IP address, or start the service \
                 with --admin-host {host}"
            ),
            Self::NoToken => f.write_str(
                "the owner's token is missing: `export-service link` prints one, which is the user name \
                 here, without a password, or the Bearer token",
            ),
            Self::Token(Denial::Expired(_)) => {
                f.write_str("the token has expired: `export-service link` prints a new one")
            }
            Self::Token(_) => f.write_str(
                "this is not a token of this box's owner, which apps' tokens never are: `export-service \
                 link` prints one",
            ),
            Self::NotAllowed(Denial::Unmet(need, _)) => write!(
                f,
                "the `{}` caveat of this token does not allow this: use one without it, which \
                 `export-service link` prints",
                need.name()
            ),
            Self::NotAllowed(_) => f.write_str(
                "this token has a caveat other than `path`, `method` and `time <`, which never holds here: \
                 `export-service link` prints one without",
            ),
            Self::TooManyLogins => f.write_str(
                "too many wrong tokens from this address: try again in a minute, with one that \
                 `export-service link` prints",
            ),
            Self::CrossSite => f.write_str(
                "this came from a page of another site, which must not act here: use this box's own page",
            ),
            Self::NotJson => f.write_str("an act is a JSON object: send Content-Type: application/json"),
            Self::NoSuchPath => f.write_str("there is no such page here"),
            Self::Method(allow) => write!(f, "this path takes {allow} only"),
        }
    }
}

/// The names by which this box may be addressed, beside its IP addresses and `localhost`.
#[derive(Clone, Debug, Default)]
pub struct Hosts {
    /// Those that were given for this.
    given: Vec<String>,
    /// This service's own name, by which other containers know it.
    own: String,
}

/// The longest name that is shown in a refusal, in characters.
const LONGEST_NAME: usize = 64;

impl Hosts {
    /// These names and the service's own, in any case, without a port.
    pub fn new(given: Vec<String>, own: String) -> Self {
        Self { given, own }
    }

    /// The first name that was given.
    pub fn first(&self) -> Option<&str> {
        self.given.first().map(String::as_str)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let given = self.given.iter().chain([&self.own]);
        // An empty name would be that of a request without one.
        given.map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Whether a request with this `Host` header was meant for this box. A name that somebody else owns may
    /// stand for any address, so that his pages count as of the same site (DNS rebinding).
    ///
    /// # Errors
    /// [`Refused::Host`].
    pub fn check(&self, host: Option<&str>) -> Result<(), Refused> {
        let authority = host.and_then(|host| Authority::try_from(host).ok());
        let name = authority.as_ref().map_or("", Authority::host);
        // A name may end with the dot of the root.
        let plain = name.strip_suffix('.').unwrap_or(name);
        let literal = plain.trim_start_matches('[').trim_end_matches(']');
        let known = literal.parse::<IpAddr>().is_ok()
            || plain.eq_ignore_ascii_case("localhost")
            || self.names().any(|known| known.eq_ignore_ascii_case(plain));
        match known {
            true => Ok(()),
            false => Err(Refused::Host(name.chars().take(LONGEST_NAME).collect())),
        }
    }
}

/// Checks the owner's token in this `Authorization` header. All its caveats must hold; none is required.
///
/// # Errors
/// There is none, it is not signed with `key`, or it does not allow this request.
pub fn authorize(
    authorization: Option<&str>,
    key: &Key,
    (method, path): (&str, &str),
    now: SystemTime,
) -> Result<(), Refused> {
    let token = routes::credentials(authorization).map_err(|denial| match denial {
        Denial::NoToken => Refused::NoToken,
        denial => Refused::Token(denial),
    })?;
    // A browser's dialog that was confirmed without a name.
    if token.is_empty() {
        return Err(Refused::NoToken);
    }
    let macaroon = Macaroon::read(&token).map_err(Refused::Token)?;
    if !macaroon.is_signed_by(key) {
        return Err(Refused::Token(Denial::Forged));
    }
    // HEAD is GET without the body.
    let method = if method == "HEAD" { "GET" } else { method };
    caveats::check_owner(&macaroon, method, path, now).map_err(|denial| match denial {
        Denial::Unmet(Need::Method | Need::Path, _) | Denial::Unknown(_) => {
            Refused::NotAllowed(denial)
        }
        denial => Refused::Token(denial),
    })
}

/// The headers that say where a request comes from.
#[derive(Clone, Copy, Default)]
pub struct Origin<'a> {
    /// `Host`.
    pub host: Option<&'a str>,
    /// `Origin`.
    pub origin: Option<&'a str>,
    /// `Sec-Fetch-Site`, which browsers send to HTTPS and to this machine only.
    pub site: Option<&'a str>,
    /// `Content-Type`.
    pub content_type: Option<&'a str>,
}

/// Whether an act was sent by this box's own page, or by a program that is no browser. A form of another site
/// cannot send JSON, and a script only after this port has allowed it, which it never does.
///
/// # Errors
/// It was not.
pub fn check_act(from: &Origin<'_>) -> Result<(), Refused> {
    let same = match (from.site, from.origin) {
        (Some(site), _) => site.eq_ignore_ascii_case("same-origin"),
        (None, Some(origin)) => {
            let name = origin
                .strip_prefix("https://")
                .or_else(|| origin.strip_prefix("http://"));
            name.zip(from.host)
                .is_some_and(|(name, host)| name.eq_ignore_ascii_case(host))
        }
        (None, None) => true,
    };
    if !same {
        return Err(Refused::CrossSite);
    }
    let kind = from.content_type.unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    match kind.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(Refused::NotJson),
    }
}

/// Wrong tokens that one client may send in a [`WINDOW`].
const MOST_FAILURES: u32 = 10;
/// How long failed logins are counted together.
const WINDOW: Duration = Duration::from_secs(60);
/// How many clients are remembered.
const MOST_CLIENTS: usize = 256;

/// The failed logins of the last minute, by client. A right token is never refused for the wrong ones before
/// it: behind a port mapping all clients have one address, and an app could lock the owner out.
#[derive(Debug, Default)]
pub struct Logins(HashMap<IpAddr, Failures>);

#[derive(Clone, Copy, Debug)]
struct Failures {
    since: Instant,
    count: u32,
}

impl Logins {
    /// Counts a wrong token. False if there were too many from this client in the minute before.
    pub fn fail(&mut self, client: IpAddr, now: Instant) -> bool {
        let is_over = |failures: &Failures| failures.since + WINDOW <= now;
        if self.0.len() >= MOST_CLIENTS && !self.0.contains_key(&client) {
            self.0.retain(|_, failures| !is_over(failures));
            if self.0.len() >= MOST_CLIENTS {
                // More addresses at once than any home has: they share the limit.
                return false;
            }
        }
        let new = Failures {
            since: now,
            count: 0,
        };
        let failures = self.0.entry(client).or_insert(new);
        if is_over(failures) {
            *failures = new;
        }
        failures.count = failures.count.saturating_add(1);
        failures.count <= MOST_FAILURES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Difference;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    fn key() -> Key {
        Key::derive(b"owner")
    }

    fn bearer(key: &Key, caveats: &[&str]) -> String {
        let caveats = caveats.iter().map(|&caveat| caveat.to_owned());
        let token = Macaroon::mint(key, "owner", caveats).to_v1().unwrap();
        format!("Bearer {token}")
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn allowed(caveats: &[&str], method: &str, path: &str) -> Result<(), Refused> {
        let token = bearer(&key(), caveats);
        authorize(Some(&token), &key(), (method, path), at(1000)).map_err(|refused| match refused {
            Refused::Token(denial) => Refused::Token(denial.plain()),
            Refused::NotAllowed(denial) => Refused::NotAllowed(denial.plain()),
            refused => refused,
        })
    }

    #[test]
    fn what_differs_is_said_to_the_owner_and_not_in_the_log() {
        for (caveat, words) in [
            (
                "method = GET",
                "this token is good for method GET, and this is a POST: use one without the caveat `method`, \
                 which `export-service link` prints",
            ),
            (
                "path = /metrics",
                "this token is good for path /metrics, and the request went to /: use one without the caveat \
                 `path`, which `export-service link` prints",
            ),
            (
                "time < 1000",
                "the token has expired: it was good until 1970-01-01T00:16:40Z, and it is \
                 1970-01-01T00:16:40Z here; `export-service link` prints a new one",
            ),
            (
                "destination = https://a.example/",
                "this token has the caveat `destination = https://a.example/`, and only `path`, `method` and \
                 `time <` ever hold here: `export-service link` prints one without",
            ),
        ] {
            let token = bearer(&key(), &[caveat]);
            let refused = authorize(Some(&token), &key(), ("POST", "/"), at(1000)).unwrap_err();
            assert_eq!(refused.explained(), words);
            for quoted in ["GET", "/metrics", "1970", "a.example"] {
                assert!(!refused.to_string().contains(quoted), "{refused}");
            }
        }
    }

    #[test]
    fn a_token_without_caveats_allows_everything_and_each_caveat_takes_something_away() {
        assert_eq!(allowed(&[], "POST", "/api/pause"), Ok(()));
        let read_only = ["method = GET"];
        assert_eq!(allowed(&read_only, "GET", "/api/status"), Ok(()));
        assert_eq!(allowed(&read_only, "HEAD", "/"), Ok(()));
        let refused = allowed(&read_only, "POST", "/api/pause");
        let unmet = |need| {
            Err(Refused::NotAllowed(Denial::Unmet(
                need,
                Difference::default(),
            )))
        };
        assert_eq!(refused, unmet(Need::Method));
        let metrics = ["method = GET", "path = /metrics"];
        assert_eq!(allowed(&metrics, "GET", "/metrics"), Ok(()));
        assert_eq!(allowed(&metrics, "GET", "/api/status"), unmet(Need::Path));
        assert_eq!(allowed(&["path = /api/*"], "GET", "/api/status"), Ok(()));
        assert_eq!(allowed(&["time < 1001"], "GET", "/"), Ok(()));
        let expired = allowed(&["time < 1000"], "GET", "/");
        assert_eq!(
            expired,
            Err(Refused::Token(Denial::Expired(Difference::default())))
        );
    }

    #[test]
    fn a_caveat_of_another_kind_never_holds() {
        for caveat in [
            "target = export-service",
            "destination = https://a.example/",
            "colour = red",
            "",
        ] {
            let refused = allowed(&[caveat], "GET", "/");
            assert_eq!(
                refused,
                Err(Refused::NotAllowed(Denial::Unknown(Difference::default())))
            );
        }
    }

    #[test]
    fn a_token_of_another_key_is_none_of_the_owners() {
        let caveats = [
            "target = export-service",
            "method = GET",
            "path = *",
            "destination = *",
        ];
        for caveats in [&[][..], &caveats] {
            let token = bearer(&Key::derive(b"the apps' secret"), caveats);
            let refused = authorize(Some(&token), &key(), ("GET", "/"), at(0));
            assert_eq!(refused, Err(Refused::Token(Denial::Forged)));
        }
        for none in [None, Some("Bearer "), Some("Basic Og=="), Some("Digest x")] {
            let refused = authorize(none, &key(), ("GET", "/"), at(0));
            assert_eq!(refused, Err(Refused::NoToken), "{none:?}");
        }
        let refused = authorize(Some("Bearer nonsense"), &key(), ("GET", "/"), at(0));
        assert_eq!(refused, Err(Refused::Token(Denial::Unreadable)));
    }

    #[test]
    fn only_names_of_this_box_are_hosts() {
        let hosts = Hosts::new(vec!["box.lan".to_owned()], "me".to_owned());
        for known in [
            "127.0.0.1",
            "127.0.0.1:8081",
            "192.168.1.5:8081",
            "[::1]",
            "[::1]:8081",
            "localhost:8081",
            "LocalHost",
            "box.lan",
            "BOX.LAN:8081",
            "box.lan.",
            "me:8081",
        ] {
            assert_eq!(hosts.check(Some(known)), Ok(()), "{known}");
        }
        for other in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "box.lan.evil.example:8081",
            "a.localhost",
            "lan",
            "",
        ] {
            assert!(hosts.check(Some(other)).is_err(), "{other}");
        }
        assert!(hosts.check(None).is_err());
        let long = format!("{}.example", "a".repeat(200));
        let refused = hosts.check(Some(&long)).unwrap_err();
        assert_eq!(refused, Refused::Host("a".repeat(64)));
        let message = hosts.check(Some("evil.example:81")).unwrap_err();
        assert!(message.to_string().contains("--admin-host evil.example"));
    }

    #[test]
    fn an_act_comes_from_this_boxs_page_or_from_no_browser() {
        let json = Origin {
            host: Some("box:8081"),
            content_type: Some("application/json"),
            ..Origin::default()
        };
        let act = |site, origin| {
            check_act(&Origin {
                site,
                origin,
                ..json
            })
        };
        assert_eq!(act(None, None), Ok(()));
        assert_eq!(act(Some("same-origin"), None), Ok(()));
        assert_eq!(act(Some("same-origin"), Some("http://box:8081")), Ok(()));
        assert_eq!(act(None, Some("https://box:8081")), Ok(()));
        for (site, origin) in [
            (Some("cross-site"), None),
            (Some("same-site"), None),
            (Some("none"), None),
            (Some("cross-site"), Some("http://box:8081")),
            (None, Some("http://evil.example")),
            (None, Some("http://box:8080")),
            (None, Some("null")),
            (None, Some("box:8081")),
            (None, Some("")),
        ] {
            assert_eq!(
                act(site, origin),
                Err(Refused::CrossSite),
                "{site:?} {origin:?}"
            );
        }
        for (content_type, expected) in [
            (Some("application/json; charset=utf-8"), Ok(())),
            (Some("Application/JSON"), Ok(())),
            (Some("text/plain"), Err(Refused::NotJson)),
            (
                Some("application/x-www-form-urlencoded"),
                Err(Refused::NotJson),
            ),
            (Some("text/plain; application/json"), Err(Refused::NotJson)),
            (None, Err(Refused::NotJson)),
        ] {
            let from = Origin {
                content_type,
                ..json
            };
            assert_eq!(check_act(&from), expected, "{content_type:?}");
        }
    }

    #[test]
    fn ten_wrong_tokens_a_minute_and_no_more_of_any_client() {
        let mut logins = Logins::default();
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let now = Instant::now();
        let tried: Vec<_> = (0..12).map(|_| logins.fail(one, now)).collect();
        assert_eq!(tried.iter().filter(|ok| **ok).count(), 10);
        assert!(!logins.fail(one, now + WINDOW - Duration::from_secs(1)));
        assert!(logins.fail(other, now));
        assert!(logins.fail(one, now + WINDOW));
    }

    #[test]
    fn many_clients_take_a_bounded_amount_of_memory() {
        let mut logins = Logins::default();
        let now = Instant::now();
        for number in 0..10_000_u32 {
            logins.fail(IpAddr::from(number.to_be_bytes()), now);
        }
        assert_eq!(logins.0.len(), MOST_CLIENTS);
        let late = IpAddr::from([10, 0, 0, 1]);
        assert!(!logins.fail(late, now));
        assert!(logins.fail(late, now + WINDOW));
        assert_eq!(logins.0.len(), 1);
    }

    proptest! {
        #[test]
        fn nothing_that_a_client_sends_makes_the_checks_panic(text in ".{0,60}", more in ".{0,60}") {
            let _ = Hosts::default().check(Some(&text));
            let _ = authorize(Some(&text), &key(), (&more, &text), at(0));
            let _ = check_act(&Origin { host: Some(&more), origin: Some(&text), site: None, content_type: Some(&more) });
        }
    }
}
