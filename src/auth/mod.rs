//! Authorisation: what a token grants.
//!
//! [`authorize`] reads the macaroon, checks its signature and then its caveats. Whether the granted
//! destinations cover an export is checked later, when the export is known.
//!
//! Not here: finding the token in a request (`routes`), and the status of a denial (`answer`).

pub mod caveats;
pub mod macaroon;
pub mod secret;

use std::fmt;
use std::time::SystemTime;

pub use caveats::{Grant, Request};
pub use macaroon::{Key, Macaroon};

/// Checks a token against the request that it came with. Does no I/O. `now` is compared with `time < T`
/// caveats.
///
/// # Errors
/// The first reason why the token does not cover the request.
pub fn authorize(
    token: &str,
    key: &Key,
    request: &Request<'_>,
    now: SystemTime,
) -> Result<Grant, Denial> {
    let macaroon = Macaroon::read(token)?;
    if !macaroon.is_signed_by(key) {
        return Err(Denial::Forged);
    }
    caveats::check(&macaroon, request, now)
}

/// One of the four caveats without which no token is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// `target = NAME`: which service the token is for.
    Target,
    /// `method = METHOD`: which HTTP method it allows.
    Method,
    /// `path = PATH`: which endpoint it allows.
    Path,
    /// `destination = URL`: where it lets data go.
    Destination,
}

impl Need {
    /// The caveat's name in a token.
    pub fn name(self) -> &'static str {
        match self {
            Self::Target => "target",
            Self::Method => "method",
            Self::Path => "path",
            Self::Destination => "destination",
        }
    }
}

/// What a caveat asks for and what it met instead. Only for the one who sent the token: it may hold a URL
/// with a password in it, so that neither `Debug` nor the log shows it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Difference(String);

impl fmt::Debug for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Difference(hidden)")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a token was refused. `Display` is for the log: it quotes nothing of the token. [`Denial::explained`] is
/// for the one who sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// The request carried no token at all.
    NoToken,
    /// The token is in none of the three macaroon formats.
    Unreadable,
    /// The token has a third-party caveat, which this service cannot discharge.
    ThirdParty,
    /// The signature does not match: the token was signed with another secret, or changed.
    Forged,
    /// A caveat that every token must have is missing.
    Missing(Need),
    /// A caveat does not hold for this request.
    Unmet(Need, Difference),
    /// The time of a `time <` caveat is over.
    Expired(Difference),
    /// The value of a `time <` caveat is not a time. Refused, so that a mistyped expiry does not mean never.
    UnreadableTime(Difference),
    /// The token has a caveat that this service does not know, so it cannot hold.
    Unknown(Difference),
}

impl Denial {
    /// The reason with what differs, for the one who sent the token. Its caveats are read only after its
    /// signature was checked, so nothing of a forged one is explained.
    pub fn explained(&self) -> String {
        match self {
            Self::Unmet(need, difference) => format!(
                "{difference}: ask for a token whose `{}` caveat allows it",
                need.name()
            ),
            Self::Expired(difference) => format!(
                "the token has expired: {difference}; ask for a new one, or set the clock that is wrong"
            ),
            Self::UnreadableTime(difference) => {
                format!("the token's caveat {difference} holds no time that can be read: {TIMES}")
            }
            Self::Unknown(difference) => format!(
                "the token has the caveat {difference}, which this service does not know, so that it can \
                 never hold: ask for a token without it"
            ),
            Self::NoToken
            | Self::Unreadable
            | Self::ThirdParty
            | Self::Forged
            | Self::Missing(_) => self.to_string(),
        }
    }
}

/// Which times a `time <` caveat may hold.
const TIMES: &str = "ask for one with RFC 3339 like 2030-01-31T08:00:00Z, or with Unix seconds (not \
                     milliseconds) before the year 10000";

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoToken => f.write_str(
                "no token: send the macaroon in X-Api-Key, as Bearer, or as the user name of Basic auth",
            ),
            Self::Unreadable => f.write_str(
                "the token is not a macaroon (libmacaroons v1, v2 or v2 JSON): check that it was copied whole",
            ),
            Self::ThirdParty => f.write_str(
                "the token has a third-party caveat, which this service refuses: ask for a token without one",
            ),
            Self::Forged => f.write_str(
                "the token's signature does not match: it was changed, or minted with another secret; ask for a new one",
            ),
            Self::Missing(need) => write!(
                f,
                "the token has no `{0}` caveat: ask for one with target, method, path and destination",
                need.name()
            ),
            Self::Unmet(need, _) => write!(
                f,
                "the token's `{}` caveat does not allow this request: ask for a token that does",
                need.name()
            ),
            Self::Expired(_) => {
                f.write_str("the token has expired, by its `time <` caveat: ask for a new one")
            }
            Self::UnreadableTime(_) => write!(
                f,
                "the token's `time <` caveat holds no time that can be read: {TIMES}"
            ),
            Self::Unknown(_) => f.write_str(
                "the token has a caveat that this service does not know, so it can never hold",
            ),
        }
    }
}

#[cfg(test)]
impl Denial {
    /// The same without what differs.
    pub fn plain(self) -> Self {
        let none = Difference::default();
        match self {
            Self::Unmet(need, _) => Self::Unmet(need, none),
            Self::Expired(_) => Self::Expired(none),
            Self::UnreadableTime(_) => Self::UnreadableTime(none),
            Self::Unknown(_) => Self::Unknown(none),
            denial => denial,
        }
    }
}
