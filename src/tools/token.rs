//! `token`: mints a macaroon like the arbiter's, or says what one is good for.
//!
//! Not here: what a macaroon is, and what its caveats mean ([`crate::auth`]).

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Read};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::auth::caveats::{self, meaning, path_matches};
use crate::auth::{Denial, Macaroon, Need, Request};
use crate::config::TokenArgs;
use crate::destination::Destination;
use crate::gate::framing::MAX_HEAD;
use crate::logging;
use crate::unseen::escaped;

/// The beginning of the last year that RFC 3339 can write, since the Unix epoch.
const YEAR_9999: Duration = Duration::from_secs(253_370_764_800);

/// The paths that want a token.
const PATHS: [&str; 2] = ["/lp/export", "/export"];
/// The method that they take.
const METHOD: &str = "POST";

/// No request could carry a token of this length in its head, in bytes.
const LONGEST: usize = MAX_HEAD - 1024;

/// Mints the token that the arguments describe, or describes the one that they show. Blocks for reading
/// standard input if that is where the token is.
///
/// # Errors
/// What is missing or wrong in the arguments.
pub fn token(arguments: &TokenArgs, now: SystemTime) -> Result<String, String> {
    match arguments.show.as_deref() {
        None => mint(arguments, now),
        Some("") => show(&read(io::stdin().lock())?, arguments, now),
        Some(token) => show(token, arguments, now),
    }
}

/// Like the arbiter's, the token is in format v1 without a location.
fn mint(arguments: &TokenArgs, now: SystemTime) -> Result<String, String> {
    let (name, key) = arguments.signer().map_err(|error| error.to_string())?;
    let url = arguments.destination();
    let (path, method) = (&arguments.path, &arguments.method);
    Destination::parse(url).map_err(|error| format!("--destination {url}: it {error}"))?;
    if !path.starts_with(['/', '*']) {
        return Err(format!(
            "--path {path}: no request has a path like that: begin it with a slash, like /lp/export"
        ));
    }
    if !PATHS.iter().any(|served| path_matches(path, served)) {
        return Err(format!(
            "--path {path}: nobody could use the token, since exports have the paths /lp/export and /export: \
             give one of them, or '*' for both"
        ));
    }
    if !method.eq_ignore_ascii_case(METHOD) {
        return Err(format!(
            "--method {method}: nobody could use the token, since exports are sent and polled with POST: leave \
             --method out"
        ));
    }
    let mut caveats = vec![
        format!("path = {path}"),
        format!("method = {METHOD}"),
        format!("target = {name}"),
        format!("destination = {url}"),
    ];
    if let Some(expires) = arguments.expires {
        caveats.push(expiry(expires, now)?);
    }
    let minted = Macaroon::mint(&key, &arguments.id, caveats);
    let token = minted
        .to_v1()
        .filter(|token| token.len() < LONGEST)
        .ok_or("the token would be too long for a request: give a shorter --id or --destination")?;
    if url.contains('*') {
        logging::print(format!(
            "export-service: warning: --destination {url}: the token allows exports to exactly this URL: its * \
             stands for nothing else; mint a token for each URL\n"
        ));
    }
    Ok(token)
}

/// Reads the text of a token.
fn read(input: impl Read) -> Result<String, String> {
    if io::stdin().is_terminal() {
        logging::print("paste the token, and end it with Ctrl-D in a line of its own\n".into());
    }
    let mut text = String::new();
    let read = input.take(MAX_HEAD as u64).read_to_string(&mut text);
    read.map_err(|error| format!("the token on standard input cannot be read: {error}"))?;
    Ok(text)
}

/// What a token is good for, in lines; never its signature.
fn show(token: &str, arguments: &TokenArgs, now: SystemTime) -> Result<String, String> {
    let (name, key) = arguments.issuer().map_err(|error| error.to_string())?;
    let macaroon = Macaroon::read(token.trim()).map_err(|denial| denial.explained())?;
    let genuine = key.map(|key| macaroon.is_signed_by(&key));
    let identifier = match macaroon.identifier() {
        [] => "none: exports belong to the address that they come from".into(),
        identifier => escaped(&String::from_utf8_lossy(identifier)),
    };
    let signature = match genuine {
        Some(true) => "made with this secret",
        Some(false) => "not made with this secret, or the token was changed since",
        None => "not checked: give the secret in EXPORT_SECRET",
    };
    let good_for = match paths(&macaroon, name, None, now) {
        _ if genuine == Some(false) => format!("nothing: {}", Denial::Forged),
        Ok(paths) => format!("exports with {METHOD} {paths}"),
        Err(denial) => format!("nothing: {}", denial.explained()),
    };
    let caveats: Vec<_> = macaroon
        .caveats()
        .map(|caveat| {
            (
                escaped(&String::from_utf8_lossy(caveat)),
                meaning(caveat, now),
            )
        })
        .collect();
    let width = caveats.iter().map(|(text, _)| text.chars().count()).max();
    let width = width.unwrap_or(0).min(60);
    let mut lines = format!(
        "format      {}\nidentifier  {identifier}\n",
        macaroon.format()
    );
    for (caveat, meaning) in caveats {
        // A string takes any text.
        let _ = writeln!(lines, "caveat      {caveat:<width$}  {meaning}");
    }
    let _ = write!(lines, "signature   {signature}\ngood for    {good_for}");
    Ok(lines)
}

/// The paths with which a token allows exports to this URL, or to the one that it names itself.
///
/// # Errors
/// Why it allows none.
pub(super) fn paths(
    macaroon: &Macaroon,
    name: &str,
    url: Option<&str>,
    now: SystemTime,
) -> Result<String, Denial> {
    let allows = |path| {
        let request = Request {
            target: name,
            method: METHOD,
            path,
        };
        let grant = caveats::check(macaroon, &request, now)?;
        grant.check(url.unwrap_or_else(|| grant.destination()))?;
        Ok(path)
    };
    match PATHS.map(allows) {
        // A token for one path fails on the other for that reason, which is not the one to tell.
        [Err(Denial::Unmet(Need::Path, _)), Err(denial)] | [Err(denial), Err(_)] => Err(denial),
        some => Ok(some.into_iter().flatten().collect::<Vec<_>>().join(" and ")),
    }
}

/// The caveat of a token that is good for this long, from `--expires`.
///
/// # Errors
/// No time at all, or one that lies too far ahead.
pub fn expiry(expires: Duration, now: SystemTime) -> Result<String, String> {
    if expires.is_zero() {
        return Err(
            "--expires is 0, so nobody could use the token: give some time, like 1h".into(),
        );
    }
    // Written in whole seconds: the next, or a short time would be over at once.
    let end = now
        .checked_add(expires)
        .and_then(|end| end.checked_add(Duration::from_nanos(999_999_999)))
        .filter(|end| *end < UNIX_EPOCH + YEAR_9999);
    let end = end.ok_or("--expires lies beyond the year 9999, which RFC 3339 cannot write")?;
    Ok(format!("time < {}", humantime::format_rfc3339_seconds(end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_no_less_than_what_was_asked_for() {
        let now = UNIX_EPOCH + Duration::from_millis(1_900);
        let caveat = |millis| expiry(Duration::from_millis(millis), now).unwrap();
        assert_eq!(caveat(50), "time < 1970-01-01T00:00:02Z");
        assert_eq!(caveat(100), "time < 1970-01-01T00:00:02Z");
        assert_eq!(caveat(300), "time < 1970-01-01T00:00:03Z");
    }
}
