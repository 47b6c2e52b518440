//! `GET /api/ledger` and `GET /api/sums`: rows of the ledger and sums of them, as JSON or CSV.
//!
//! Not here: who may ask ([`super::access`]), and finding rows ([`crate::exports::store::evidence`]).

use std::fmt::Write as _;

use serde::Serialize;

use super::filter::{Asked, filter};
use super::page::Query;
use super::report::Rows;
use crate::export::DAY;
use crate::exports::store::Error;
use crate::exports::store::evidence::{By, Evidence, Shown, Total};

/// Rows that one answer has if it does not say, and at most.
const ROWS: u64 = 50;
const MOST_ROWS: u64 = 1000;

/// What was answered: a body, and its type.
pub type Answer = (String, &'static str);

/// Why there is no answer.
pub enum Wrong {
    /// The query cannot be read. The text says what, and what to do.
    Query(String),
    /// The store cannot be read.
    Store(Error),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

const JSON: &str = "application/json";
const CSV: &str = "text/csv; charset=utf-8";

#[derive(Serialize)]
struct Sums {
    rows: Vec<Total>,
}

/// Rows of the ledger, the newest first. `now` is in Unix milliseconds.
///
/// # Errors
/// The query cannot be read, or the store.
pub fn ledger(evidence: &Evidence, query: &str, now: i64) -> Result<Answer, Wrong> {
    let limit = match parameter(query, "limit") {
        None | Some("") => ROWS,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=MOST_ROWS).contains(limit))
            .ok_or_else(|| Wrong::Query(format!("limit: give a number from 1 to {MOST_ROWS}")))?,
    };
    let is_csv = match parameter(query, "format") {
        None | Some("" | "json") => false,
        Some("csv") => true,
        Some(_) => return Err(Wrong::Query("format: give csv or json".into())),
    };
    let asked = Query::parse(query);
    // Ignored, it would show the newest rows again, to a program that asks for older ones.
    if asked.before.is_none() && parameter(query, "before").is_some_and(|text| !text.is_empty()) {
        let what = "before: give the `next` of an earlier answer, a number";
        return Err(Wrong::Query(what.into()));
    }
    let found = rows(evidence, &asked, limit, now)?;
    if is_csv {
        let mut text = String::from(CSV_HEAD);
        for row in &found.rows {
            csv(&mut text, row);
        }
        return Ok((text, CSV));
    }
    Ok((json(&found), JSON))
}

/// The newest rows that a query asks for, at most `limit`. `now` is in Unix milliseconds.
///
/// # Errors
/// The query cannot be read, or the store.
pub fn rows(evidence: &Evidence, query: &Query, limit: u64, now: i64) -> Result<Rows, Wrong> {
    let asked = Asked {
        since: &query.since,
        until: &query.until,
        who: &query.who,
        destination: &query.destination,
        outcome: &query.outcome,
        id: &query.id,
    };
    let mut wanted = filter(&asked, now).map_err(Wrong::Query)?;
    wanted.before = query.before;
    let mut rows = Vec::new();
    // One more shows that there are more.
    evidence.rows(&wanted, false, limit + 1, |row| {
        rows.push(row);
        true
    })?;
    let mut next = None;
    if rows.len() as u64 > limit {
        rows.pop();
        next = rows.last().map(|row| row.seq);
    }
    Ok(Rows { rows, next })
}

/// Sums of attempts by day, week, sender or destination. `now` is in Unix milliseconds.
///
/// # Errors
/// The query cannot be read, or the store.
pub fn sums(evidence: &Evidence, query: &str, now: i64) -> Result<Answer, Wrong> {
    let by = match parameter(query, "by") {
        None | Some("" | "day") => By::Day,
        Some("week") => By::Week,
        Some("who") => By::Who,
        Some("destination") => By::Destination,
        Some(_) => {
            let what = "by: give day, week, who or destination";
            return Err(Wrong::Query(what.into()));
        }
    };
    let asked = Query::parse(query);
    let times = Asked {
        since: &asked.since,
        until: &asked.until,
        ..Asked::default()
    };
    let wanted = filter(&times, now).map_err(Wrong::Query)?;
    let rows = totals(evidence, by, wanted.since, wanted.until)?;
    Ok((json(&Sums { rows }), JSON))
}

/// Sums from the day of one time to that of another, both in Unix milliseconds and both days included.
///
/// # Errors
/// The store cannot be read.
pub fn totals(
    evidence: &Evidence,
    by: By,
    since: Option<i64>,
    until: Option<i64>,
) -> Result<Vec<Total>, Error> {
    let since = since.map_or(i64::MIN, |at| at.div_euclid(DAY));
    let until = until.map_or(i64::MAX, |at| (at - 1).div_euclid(DAY) + 1);
    evidence.sums(by, since, until)
}

/// A parameter of a query that needs no decoding.
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find_map(|(key, value)| (key == name).then_some(value))
}

fn json(value: &impl Serialize) -> String {
    // Structs of strings and numbers always serialise.
    let mut text = serde_json::to_string(value).unwrap_or_default();
    text.push('\n');
    text
}

/// The first line of a CSV file (RFC 4180).
pub const CSV_HEAD: &str = "seq,time,event,export,who,label,destination,address,bytes_out,bytes_in,digest,outcome,\
    ms,attempt,note\r\n";

/// Appends a row as a line of CSV.
pub fn csv(text: &mut String, row: &Shown) {
    let number = |number: Option<i64>| number.map_or_else(String::new, |number| number.to_string());
    // A String takes any text.
    let _ = write!(text, "{},{},", row.seq, time(row.at));
    let words = [
        Some(&row.event),
        row.export.as_ref(),
        row.who.as_ref(),
        row.label.as_ref(),
        row.destination.as_ref(),
        row.address.as_ref(),
    ];
    for word in words {
        let _ = write!(text, "{},", quoted(word.map_or("", String::as_str)));
    }
    let _ = write!(
        text,
        "{},{},{},{},{},{},{}\r\n",
        number(row.bytes_out),
        number(row.bytes_in),
        row.digest.as_deref().unwrap_or_default(),
        quoted(row.outcome.as_deref().unwrap_or_default()),
        number(row.ms),
        number(row.attempt),
        quoted(row.note.as_deref().unwrap_or_default())
    );
}

/// A field of CSV. What a spreadsheet would take for a formula gets an apostrophe before it, since names come from
/// apps.
fn quoted(text: &str) -> String {
    let is_formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let guard = if is_formula { "'" } else { "" };
    match is_formula || text.contains([',', '"', '\r', '\n']) {
        true => format!("\"{guard}{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

/// A time as in RFC 3339.
pub fn time(at: i64) -> String {
    let at = u64::try_from(at).unwrap_or(0);
    // The last one that can be written.
    let at = at.min(253_402_300_799_000);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(at);
    humantime::format_rfc3339_millis(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spreadsheet_takes_no_name_for_a_formula() {
        let row = Shown {
            seq: 7,
            at: 1_795_686_123_456,
            event: "attempt".into(),
            who: Some("=HYPERLINK(\"http://a.example\")".into()),
            destination: Some("a.example #0001".into()),
            bytes_out: Some(10),
            note: Some("a,b\r\n".into()),
            ..Shown::default()
        };
        let mut text = String::new();
        csv(&mut text, &row);
        assert_eq!(
            text,
            "7,2026-11-26T09:42:03.456Z,attempt,,\"'=HYPERLINK(\"\"http://a.example\"\")\",,a.example #0001,,10,,,,,,\
             \"a,b\r\n\"\r\n"
        );
        let columns = |line: &str| line.split(',').count();
        let mut plain = String::new();
        csv(&mut plain, &Shown::default());
        assert_eq!(columns(CSV_HEAD), columns(&plain));
    }
}
