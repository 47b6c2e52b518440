//! What each caveat asks for, as pure functions over a request and the time.
//!
//! Every caveat must hold, whoever added it, and one that is not known never does. Four must be
//! there: the arbiter leaves the destination out when an app asks it to, and a token without one
//! could send anywhere.
//!
//! Not here: whether the macaroon that holds them is genuine ([`super::macaroon`]).

use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Denial, Macaroon, Need};

/// The parts of a request that caveats speak about.
pub struct Request<'a> {
    /// This service's own name, `DATABOX_LOCAL_NAME`.
    pub target: &'a str,
    /// The HTTP method, in any case.
    pub method: &'a str,
    /// The path without its query.
    pub path: &'a str,
}

/// What a genuine token with all its caveats met lets its holder do.
pub struct Grant {
    owner: Vec<u8>,
    destinations: Vec<String>,
}

impl Grant {
    /// The macaroon's identifier, which with the destination says whose an export is.
    pub fn owner(&self) -> &[u8] {
        &self.owner
    }

    /// Whether data may go to exactly this URL. With two different destination caveats the
    /// answer is always no, since both have to hold.
    pub fn allows(&self, destination: &str) -> bool {
        self.destinations
            .iter()
            .all(|allowed| allowed == destination)
    }
}

/// Checks every caveat but the destinations, which are collected for [`Grant::allows`].
///
/// # Errors
/// The first caveat that does not hold, or else the first of the four that is missing.
pub fn check(macaroon: &Macaroon, request: &Request<'_>, now: SystemTime) -> Result<Grant, Denial> {
    let (mut target, mut method, mut path) = (false, false, false);
    let mut destinations = Vec::new();
    for caveat in macaroon.caveats() {
        let text = str::from_utf8(caveat).map_err(|_| Denial::Unknown)?;
        if let Some(name) = text.strip_prefix("target = ") {
            hold(name == request.target, Denial::Unmet(Need::Target))?;
            target = true;
        } else if let Some(name) = text.strip_prefix("method = ") {
            hold(
                name.eq_ignore_ascii_case(request.method),
                Denial::Unmet(Need::Method),
            )?;
            method = true;
        } else if let Some(pattern) = text.strip_prefix("path = ") {
            hold(
                path_matches(pattern, request.path),
                Denial::Unmet(Need::Path),
            )?;
            path = true;
        } else if let Some(url) = text.strip_prefix("destination = ") {
            destinations.push(url.to_owned());
        } else if let Some(limit) = text.strip_prefix("time < ") {
            hold(is_before(now, limit), Denial::Expired)?;
        } else {
            return Err(Denial::Unknown);
        }
    }
    hold(target, Denial::Missing(Need::Target))?;
    hold(method, Denial::Missing(Need::Method))?;
    hold(path, Denial::Missing(Need::Path))?;
    hold(!destinations.is_empty(), Denial::Missing(Need::Destination))?;
    Ok(Grant {
        owner: macaroon.identifier().to_vec(),
        destinations,
    })
}

fn hold(holds: bool, otherwise: Denial) -> Result<(), Denial> {
    if holds { Ok(()) } else { Err(otherwise) }
}

fn path_matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => path == pattern,
    }
}

/// Whether `now` is before `limit`, given in RFC 3339 or as whole Unix seconds. A limit that is
/// neither is never before: a token must not outlive a mistyped expiry.
fn is_before(now: SystemTime, limit: &str) -> bool {
    if limit.bytes().all(|byte| byte.is_ascii_digit())
        && let Ok(seconds) = limit.parse::<u64>()
    {
        return now
            .duration_since(UNIX_EPOCH)
            .is_ok_and(|since| since.as_secs() < seconds);
    }
    OffsetDateTime::parse(limit, &Rfc3339).is_ok_and(|limit| OffsetDateTime::from(now) < limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Key;
    use proptest::prelude::*;
    use std::time::Duration;

    const FULL: [&str; 4] = [
        "target = export-service",
        "method = POST",
        "path = /export",
        "destination = https://a.example/in",
    ];

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn checked(caveats: &[&str], path: &str, now: SystemTime) -> Result<Grant, Denial> {
        let caveats = caveats.iter().map(|&caveat| caveat.to_owned());
        let macaroon = Macaroon::mint(&Key::derive(b"k"), "me", caveats);
        let request = Request {
            target: "export-service",
            method: "POST",
            path,
        };
        check(&macaroon, &request, now)
    }

    fn denial(caveats: &[&str]) -> Option<Denial> {
        checked(caveats, "/export", at(0)).err()
    }

    #[test]
    fn the_four_caveats_together_grant_their_one_destination() {
        let grant = checked(&FULL, "/export", at(0)).ok().unwrap();
        assert!(grant.allows("https://a.example/in"));
        assert!(!grant.allows("https://a.example/in/"));
        assert!(!grant.allows("https://b.example/in"));
        assert_eq!(grant.owner(), b"me");
    }

    #[test]
    fn each_of_the_four_is_required() {
        let needs = [Need::Target, Need::Method, Need::Path, Need::Destination];
        for (leave_out, need) in needs.into_iter().enumerate() {
            let mut caveats = FULL.to_vec();
            caveats.remove(leave_out);
            assert_eq!(denial(&caveats), Some(Denial::Missing(need)));
        }
    }

    #[test]
    fn a_caveat_that_does_not_hold_denies_even_beside_one_that_does() {
        for (extra, need) in [
            ("target = other", Need::Target),
            ("target =  export-service", Need::Target),
            ("method = GET", Need::Method),
            ("path = /lp/export", Need::Path),
            ("path = /export/*", Need::Path),
        ] {
            let caveats = [&FULL[..], &[extra]].concat();
            assert_eq!(denial(&caveats), Some(Denial::Unmet(need)), "{extra}");
        }
    }

    #[test]
    fn an_unknown_caveat_never_holds() {
        for extra in [
            "",
            "colour = red",
            "target=export-service",
            "Target = export-service",
            "time > 0",
        ] {
            let caveats = [&FULL[..], &[extra]].concat();
            assert_eq!(denial(&caveats), Some(Denial::Unknown), "{extra}");
        }
    }

    #[test]
    fn two_different_destinations_allow_none() {
        let caveats = [&FULL[..], &["destination = https://b.example/"]].concat();
        let grant = checked(&caveats, "/export", at(0)).ok().unwrap();
        assert!(!grant.allows("https://a.example/in"));
        assert!(!grant.allows("https://b.example/"));
    }

    #[test]
    fn methods_compare_without_case_and_a_star_matches_the_rest_of_a_path() {
        let caveats = [
            "target = export-service",
            "method = post",
            "path = /lp/*",
            "destination = d",
        ];
        assert!(checked(&caveats, "/lp/export", at(0)).is_ok());
        assert!(checked(&caveats, "/export", at(0)).is_err());
    }

    #[test]
    fn an_expiry_holds_until_its_second_in_both_notations() {
        for limit in [
            "1700000000",
            "2023-11-14T22:13:20Z",
            "2023-11-15T00:13:20+02:00",
        ] {
            let expiry = format!("time < {limit}");
            let caveats = [&FULL[..], &[expiry.as_str()]].concat();
            assert!(
                checked(&caveats, "/export", at(1_699_999_999)).is_ok(),
                "{limit}"
            );
            let late = checked(&caveats, "/export", at(1_700_000_000)).err();
            assert_eq!(late, Some(Denial::Expired), "{limit}");
        }
    }

    #[test]
    fn an_expiry_that_cannot_be_read_never_holds() {
        for limit in [
            "",
            "tomorrow",
            "-1",
            "+5",
            "99999999999999999999999",
            "2023-11-14",
            "1e12",
        ] {
            assert!(!is_before(at(0), limit), "{limit}");
        }
    }

    proptest! {
        #[test]
        fn no_expiry_makes_the_reader_panic(limit in ".{0,40}", now in 0_u64..1 << 40) {
            let _ = is_before(at(now), &limit);
        }
    }
}
