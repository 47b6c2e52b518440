//! Checks caveats against a request and the time; pure.
//!
//! Every caveat must hold, whoever added it, and an unknown one never does. Four are required: the arbiter
//! leaves the destination out if an app asks it to, and a token without one could send anywhere.
//!
//! Not here: whether the macaroon is genuine ([`super::macaroon`]).

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Denial, Difference, Macaroon, Need};
use crate::unseen::Shown;

/// The parts of a request that caveats are about.
pub struct Request<'a> {
    /// This service's own name, `DATABOX_LOCAL_NAME`.
    pub target: &'a str,
    /// The HTTP method, in any case.
    pub method: &'a str,
    /// The path without its query.
    pub path: &'a str,
}

/// What a genuine token whose caveats all hold permits.
pub struct Grant {
    owner: Vec<u8>,
    destinations: Vec<String>,
}

impl Grant {
    /// The macaroon's identifier, which owns exports.
    pub fn owner(&self) -> &[u8] {
        &self.owner
    }

    /// Checks that data may be sent to exactly this URL.
    ///
    /// # Errors
    /// The first destination caveat that is another one.
    pub fn check(&self, destination: &str) -> Result<(), Denial> {
        match self.other_than(destination) {
            None => Ok(()),
            Some(allowed) => Err(unmet(
                Need::Destination,
                format_args!(
                    "this token is good for exports to {}, and this one goes to {}",
                    Shown(allowed),
                    Shown(destination)
                ),
            )),
        }
    }

    /// The first URL that its token names.
    pub fn destination(&self) -> &str {
        self.destinations.first().map_or("", String::as_str)
    }

    /// Whether data may be sent to exactly this URL. With two different destination caveats the answer is
    /// always no, since both have to hold.
    pub fn allows(&self, destination: &str) -> bool {
        self.other_than(destination).is_none()
    }

    fn other_than(&self, destination: &str) -> Option<&String> {
        self.destinations.iter().find(|url| *url != destination)
    }
}

/// Checks all caveats except the destinations, which are collected for [`Grant::allows`].
///
/// # Errors
/// The first caveat that does not hold, else the first of the four that is missing.
pub fn check(macaroon: &Macaroon, request: &Request<'_>, now: SystemTime) -> Result<Grant, Denial> {
    let (mut target, mut method, mut path) = (false, false, false);
    let mut destinations = Vec::new();
    for caveat in macaroon.caveats() {
        let text = text(caveat)?;
        if let Some(name) = text.strip_prefix("target = ") {
            if name != request.target {
                return Err(unmet(
                    Need::Target,
                    format_args!(
                        "this token is good for the service {}, and this one is {}",
                        Shown(name),
                        Shown(request.target)
                    ),
                ));
            }
            target = true;
        } else if let Some(url) = text.strip_prefix("destination = ") {
            destinations.push(url.to_owned());
        } else {
            match general(text, request.method, request.path, now)? {
                General::Method => method = true,
                General::Path => path = true,
                General::Time => {}
            }
        }
    }
    for (is_there, need) in [
        (target, Need::Target),
        (method, Need::Method),
        (path, Need::Path),
        (!destinations.is_empty(), Need::Destination),
    ] {
        if !is_there {
            return Err(Denial::Missing(need));
        }
    }
    Ok(Grant {
        owner: macaroon.identifier().to_vec(),
        destinations,
    })
}

/// Checks all caveats of a token of the box's owner. None is required, and none has to do with exports.
///
/// # Errors
/// The first caveat that does not hold.
pub fn check_owner(
    macaroon: &Macaroon,
    method: &str,
    path: &str,
    now: SystemTime,
) -> Result<(), Denial> {
    for caveat in macaroon.caveats() {
        general(text(caveat)?, method, path, now)?;
    }
    Ok(())
}

/// The caveats that both kinds of tokens may have.
enum General {
    Method,
    Path,
    Time,
}

/// Which of them this is, if it holds.
fn general(text: &str, method: &str, path: &str, now: SystemTime) -> Result<General, Denial> {
    if let Some(name) = text.strip_prefix("method = ") {
        if name.eq_ignore_ascii_case(method) {
            return Ok(General::Method);
        }
        let name = Shown(name);
        let difference =
            format_args!("this token is good for method {name}, and this is a {method}");
        Err(unmet(Need::Method, difference))
    } else if let Some(pattern) = text.strip_prefix("path = ") {
        if path_matches(pattern, path) {
            return Ok(General::Path);
        }
        let (pattern, path) = (Shown(pattern), Shown(path));
        let difference =
            format_args!("this token is good for path {pattern}, and the request went to {path}");
        Err(unmet(Need::Path, difference))
    } else if let Some(limit) = text.strip_prefix("time < ") {
        let end = moment(limit).ok_or_else(|| Denial::UnreadableTime(quoted(text)))?;
        if since_epoch(now) < end {
            return Ok(General::Time);
        }
        let (end, now) = (date(end), date(since_epoch(now)));
        let difference = format!("it was good until {end}, and it is {now} here");
        Err(Denial::Expired(Difference(difference)))
    } else {
        Err(Denial::Unknown(quoted(text)))
    }
}

fn text(caveat: &[u8]) -> Result<&str, Denial> {
    str::from_utf8(caveat).map_err(|_| Denial::Unknown(quoted(&String::from_utf8_lossy(caveat))))
}

fn unmet(need: Need, difference: fmt::Arguments<'_>) -> Denial {
    Denial::Unmet(need, Difference(difference.to_string()))
}

fn quoted(caveat: &str) -> Difference {
    Difference(format!("`{}`", Shown(caveat)))
}

/// Says in words what a caveat means and, if it is about time, what that is at `now`.
pub fn meaning(caveat: &[u8], now: SystemTime) -> String {
    let text = String::from_utf8_lossy(caveat);
    if let Some(name) = text.strip_prefix("target = ") {
        format!("for the service named {}", Shown(name))
    } else if let Some(name) = text.strip_prefix("method = ") {
        format!("for {} requests", Shown(name))
    } else if let Some(pattern) = text.strip_prefix("path = ") {
        match pattern.strip_suffix('*') {
            Some("") => "for every path".into(),
            Some(start) => format!("for paths that begin with {}", Shown(start)),
            None => "for this path".into(),
        }
    } else if let Some(url) = text.strip_prefix("destination = ") {
        match url.contains('*') {
            true => "for exports to exactly this URL: its * stands for nothing else".into(),
            false => "for exports to exactly this URL".into(),
        }
    } else if let Some(limit) = text.strip_prefix("time < ") {
        let Some(end) = moment(limit) else {
            return "never holds: this is no time that can be read".into();
        };
        let left = end - since_epoch(now);
        // There are 20,000 years between the two at most.
        let seconds = u64::try_from(left.abs() / NANOS).unwrap_or(u64::MAX);
        let unit = match seconds {
            ..3600 => 1,
            3600..86_400 => 60,
            _ => 3600,
        };
        let span = humantime::format_duration(Duration::from_secs(seconds - seconds % unit));
        match left > 0 {
            true => format!("until {}, for another {span}", date(end)),
            false => format!("expired {span} ago, at {}", date(end)),
        }
    } else {
        "never holds: this service does not know it".into()
    }
}

/// Whether a request with this path can meet the caveat `path = PATTERN`.
pub fn path_matches(pattern: &str, path: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => path.starts_with(start),
        None => path == pattern,
    }
}

/// The first Unix second after the year 9999. No expiry is that late: such a number must be in milliseconds,
/// and would make a token valid for 55,000 years.
const YEAR_10000: u64 = 253_402_300_800;
const NANOS: i128 = 1_000_000_000;

/// Parses a time in RFC 3339 or in Unix seconds, to nanoseconds since 1970. Rounds up, so that a time in
/// whole nanoseconds is before the result exactly if it is before the text's.
fn moment(text: &str) -> Option<i128> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if !is_number(seconds) || !is_number(fraction) {
        let moment = OffsetDateTime::parse(text, &Rfc3339).ok()?;
        return Some(moment.unix_timestamp_nanos());
    }
    let seconds: u64 = seconds.parse().ok()?;
    if seconds >= YEAR_10000 {
        return None;
    }
    let (nanos, rest) = fraction.split_at(fraction.len().min(9));
    let nanos: i128 = format!("{nanos:0<9}").parse().ok()?;
    let rest = rest.bytes().any(|digit| digit != b'0');
    Some(i128::from(seconds) * NANOS + nanos + i128::from(rest))
}

/// A time in nanoseconds since 1970 as people read it, in whole seconds.
fn date(nanos: i128) -> String {
    OffsetDateTime::from_unix_timestamp(i64::try_from(nanos.div_euclid(NANOS)).unwrap_or(i64::MAX))
        .ok()
        .and_then(|date| date.format(&Rfc3339).ok())
        .unwrap_or_else(|| "a time beyond the year 9999".into())
}

/// A time in nanoseconds since 1970.
fn since_epoch(moment: SystemTime) -> i128 {
    let nanos = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
    match moment.duration_since(UNIX_EPOCH) {
        Ok(since) => nanos(since),
        Err(before) => -nanos(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Key;
    use proptest::prelude::*;

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
        granted(caveats, path, now).map_err(Denial::plain)
    }

    fn granted(caveats: &[&str], path: &str, now: SystemTime) -> Result<Grant, Denial> {
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
            assert_eq!(
                denial(&caveats),
                Some(Denial::Unmet(need, Difference::default())),
                "{extra}"
            );
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
            assert_eq!(
                denial(&caveats),
                Some(Denial::Unknown(Difference::default())),
                "{extra}"
            );
        }
    }

    /// Why a token with this caveat besides does not allow an export to `destination`.
    fn denied(caveat: &str, destination: &str, now: SystemTime) -> Denial {
        let caveats = [&FULL[..], &[caveat]].concat();
        let granted = granted(&caveats, "/export", now);
        let denial = granted.and_then(|grant| grant.check(destination));
        denial.err().unwrap()
    }

    fn explained(caveat: &str, now: SystemTime) -> String {
        denied(caveat, "https://a.example/in", now).explained()
    }

    #[test]
    fn what_differs_is_said_in_the_tokens_words_and_the_requests() {
        let late = at(1_700_000_002);
        for (caveat, words) in [
            (
                "path = /lp/export",
                "this token is good for path /lp/export, and the request went to /export: ask for a token \
                 whose `path` caveat allows it",
            ),
            (
                "method = GET",
                "this token is good for method GET, and this is a POST: ask for a token whose `method` caveat \
                 allows it",
            ),
            (
                "target = other",
                "this token is good for the service other, and this one is export-service: ask for a token \
                 whose `target` caveat allows it",
            ),
            (
                "destination = https://b.example/",
                "this token is good for exports to https://b.example/, and this one goes to \
                 https://a.example/in: ask for a token whose `destination` caveat allows it",
            ),
            (
                "time < 1700000000.5",
                "the token has expired: it was good until 2023-11-14T22:13:20Z, and it is \
                 2023-11-14T22:13:22Z here; ask for a new one, or set the clock that is wrong",
            ),
            (
                "time < never",
                "the token's caveat `time < never` holds no time that can be read: ask for one with RFC 3339 \
                 like 2030-01-31T08:00:00Z, or with Unix seconds (not milliseconds) before the year 10000",
            ),
            (
                "colour = \u{1b}[31mred",
                "the token has the caveat `colour = \\u{1b}[31mred`, which this service does not know, so \
                 that it can never hold: ask for a token without it",
            ),
        ] {
            assert_eq!(explained(caveat, late), words);
        }
        let long = explained(&format!("path = /{}", "x".repeat(100_000)), late);
        assert!(long.len() < 600, "{long}");
    }

    #[test]
    fn what_goes_to_the_log_quotes_no_caveat() {
        let url = "https://hooks.example/password";
        for caveat in [
            format!("destination = {url}"),
            format!("path = {url}"),
            format!("method = {url}"),
            format!("target = {url}"),
            format!("time < {url}"),
            url.to_owned(),
        ] {
            let denial = denied(&caveat, "https://a.example/password", at(0));
            assert!(denial.explained().contains("password"));
            assert!(
                !format!("{denial} {denial:?}").contains("password"),
                "{caveat}"
            );
        }
    }

    #[test]
    fn each_caveat_has_a_meaning_in_words() {
        let now = at(1_700_000_000);
        for (caveat, words) in [
            (
                "target = export-service",
                "for the service named export-service",
            ),
            ("method = POST", "for POST requests"),
            ("path = *", "for every path"),
            ("path = /lp/*", "for paths that begin with /lp/"),
            ("path = /lp/export", "for this path"),
            (
                "destination = https://a.example/",
                "for exports to exactly this URL",
            ),
            (
                "destination = https://a.example/*",
                "for exports to exactly this URL: its * stands for nothing else",
            ),
            (
                "time < 1700003661",
                "until 2023-11-14T23:14:21Z, for another 1h 1m",
            ),
            (
                "time < 1700176399",
                "until 2023-11-16T23:13:19Z, for another 2days",
            ),
            (
                "time < 2023-11-14T22:13:18Z",
                "expired 2s ago, at 2023-11-14T22:13:18Z",
            ),
            (
                "time < 1700000000",
                "expired 0s ago, at 2023-11-14T22:13:20Z",
            ),
            (
                "time < soon",
                "never holds: this is no time that can be read",
            ),
            ("colour = red", "never holds: this service does not know it"),
        ] {
            assert_eq!(meaning(caveat.as_bytes(), now), words, "{caveat}");
        }
        assert_eq!(
            meaning(b"\xff", now),
            "never holds: this service does not know it"
        );
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
            assert_eq!(
                late,
                Some(Denial::Expired(Difference::default())),
                "{limit}"
            );
        }
    }

    #[test]
    fn an_expiry_that_cannot_be_read_never_holds_and_is_not_called_over() {
        for limit in [
            "",
            "tomorrow",
            "-1",
            "+5",
            " 5",
            "5 ",
            "5.",
            ".5",
            ".",
            "5.5.5",
            "5,5",
            "5.-5",
            "0x5",
            "1_700_000_000",
            "\u{ff15}",
            "99999999999999999999999",
            // What Date.now() says: milliseconds.
            "1700000000000",
            "1700000000000.5",
            "253402300800",
            "253402300800.0",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "10000-01-01T00:00:00Z",
            "1e12",
            "Infinity",
            "NaN",
        ] {
            let expiry = format!("time < {limit}");
            let caveats = [&FULL[..], &[expiry.as_str()]].concat();
            assert_eq!(
                denial(&caveats),
                Some(Denial::UnreadableTime(Difference::default())),
                "{limit}"
            );
        }
        assert_ne!(
            Denial::UnreadableTime(Difference::default()).to_string(),
            Denial::Expired(Difference::default()).to_string()
        );
    }

    #[test]
    fn the_last_times_of_the_year_9999_can_be_read() {
        let last = at(253_402_300_799);
        for (limit, holds) in [
            ("253402300799", false),
            ("253402300799.9", true),
            ("9999-12-31T23:59:59Z", false),
            ("9999-12-31T23:59:59.999999999Z", true),
            ("9999-12-31T23:59:59-23:59", true),
        ] {
            let expiry = format!("time < {limit}");
            let caveats = [&FULL[..], &[expiry.as_str()]].concat();
            let late = checked(&caveats, "/export", last).err();
            assert_eq!(
                late,
                (!holds).then_some(Denial::Expired(Difference::default())),
                "{limit}"
            );
        }
    }

    #[test]
    fn fractions_of_a_second_count_in_both_notations() {
        let now = at(1_700_000_000) + Duration::from_millis(500);
        for (limit, holds) in [
            ("1700000000.5", false),
            ("1700000000.500000000", false),
            ("1700000000.50000000000000000000000000001", true),
            ("1700000000.500000001", true),
            ("1700000000.51", true),
            ("1700000000.499999999999", false),
            ("1700000000", false),
            ("1700000001", true),
            ("001700000000.6", true),
            ("2023-11-14T22:13:20.5Z", false),
            ("2023-11-14T22:13:20.500000001Z", true),
            ("2023-11-14T23:13:20.6+01:00", true),
            ("2023-11-14T22:13:20Z", false),
        ] {
            assert_eq!(
                moment(limit).map(|end| since_epoch(now) < end),
                Some(holds),
                "{limit}"
            );
        }
    }

    #[test]
    fn a_clock_before_1970_is_before_every_expiry() {
        let now = UNIX_EPOCH - Duration::from_secs(5);
        assert!(since_epoch(now) < moment("0").unwrap());
        assert!(since_epoch(now) > moment("1969-12-31T23:59:54Z").unwrap());
    }

    proptest! {
        #[test]
        fn no_expiry_makes_the_reader_panic(limit in ".{0,40}", now in any::<u32>()) {
            let expiry = format!("time < {limit}");
            let caveats = [&FULL[..], &[expiry.as_str()]].concat();
            let _ = checked(&caveats, "/export", at(now.into()));
            let _ = meaning(expiry.as_bytes(), at(now.into()));
        }

        #[test]
        fn every_time_that_can_be_read_can_be_told(
            limit in any::<u64>(),
            now in -300_000_000_000_i64..300_000_000_000,
        ) {
            let now = match now {
                0.. => at(now.unsigned_abs()),
                _ => UNIX_EPOCH - Duration::from_secs(now.unsigned_abs()),
            };
            for limit in [limit % YEAR_10000, limit] {
                let expiry = format!("time < {limit}");
                let caveats = [&FULL[..], &[expiry.as_str()]].concat();
                let _ = checked(&caveats, "/export", now);
                let _ = meaning(expiry.as_bytes(), now);
            }
        }

        #[test]
        fn unix_seconds_are_compared_exactly(
            seconds in 0_u64..253_402_300_800,
            fraction in "([0-9]{1,20})?",
            earlier in -2_i64..=2,
            nanos in prop_oneof![Just(0_u32), Just(999_999_999), 0..1_000_000_000_u32],
            same in any::<bool>(),
        ) {
            let padded = format!("{fraction:0<20}");
            let nanos = if same { padded[..9].parse().unwrap() } else { nanos };
            let now_seconds = seconds.saturating_add_signed(earlier);
            let now = at(now_seconds) + Duration::from_nanos(nanos.into());
            let limit = if fraction.is_empty() {
                seconds.to_string()
            } else {
                format!("{seconds}.{fraction}")
            };
            // The same numbers, as digits of one length.
            let holds = format!("{now_seconds:0>20}{nanos:0>9}{:0<11}", "")
                < format!("{seconds:0>20}{padded}");
            prop_assert_eq!(since_epoch(now) < moment(&limit).unwrap(), holds);
        }

        #[test]
        fn both_notations_mean_the_same(seconds in 0_u64..253_402_300_800, nanos in 0_u32..1_000_000_000) {
            let end = at(seconds) + Duration::from_nanos(nanos.into());
            let text = humantime::format_rfc3339_nanos(end).to_string();
            prop_assert_eq!(moment(&text), moment(&format!("{seconds}.{nanos:0>9}")));
            prop_assert_eq!(moment(&text), Some(since_epoch(end)));
        }

        #[test]
        fn seconds_beyond_the_year_9999_are_never_read(seconds in 253_402_300_800_u64.., fraction in "(\\.[0-9]{1,9})?") {
            prop_assert_eq!(moment(&format!("{seconds}{fraction}")), None);
        }
    }
}
