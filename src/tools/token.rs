//! `token`: mints a macaroon like the arbiter's.
//!
//! Not here: what a macaroon is ([`crate::auth`]).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::auth::Macaroon;
use crate::config::TokenArgs;
use crate::destination::Destination;

/// The beginning of the last year that RFC 3339 can write, since the Unix epoch.
const YEAR_9999: Duration = Duration::from_secs(253_370_764_800);

/// Mints the token that the arguments describe. Like the arbiter's, it is in format v1 without a location.
///
/// # Errors
/// What is missing or wrong in the arguments.
pub fn token(arguments: &TokenArgs, now: SystemTime) -> Result<String, String> {
    let (name, key) = arguments.signer().map_err(|error| error.to_string())?;
    let url = &arguments.destination;
    Destination::parse(url).map_err(|error| format!("--destination {url}: it {error}"))?;
    let mut caveats = vec![
        format!("path = {}", arguments.path),
        format!("method = {}", arguments.method),
        format!("target = {name}"),
        format!("destination = {url}"),
    ];
    if !arguments.path.starts_with(['/', '*']) {
        return Err(format!(
            "--path {}: no request has a path like that: begin it with a slash, like /lp/export",
            arguments.path
        ));
    }
    if let Some(expires) = arguments.expires {
        caveats.push(expiry(expires, now)?);
    }
    Macaroon::mint(&key, &arguments.id, caveats)
        .to_v1()
        .ok_or_else(|| "the token would be too long: give a shorter --id or --path".into())
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
    let end = now
        .checked_add(expires)
        .filter(|end| *end < UNIX_EPOCH + YEAR_9999);
    let end = end.ok_or("--expires lies beyond the year 9999, which RFC 3339 cannot write")?;
    Ok(format!("time < {}", humantime::format_rfc3339_seconds(end)))
}
