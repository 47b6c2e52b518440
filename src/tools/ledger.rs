//! `ledger`: what left the box, from the file itself, beside a running service or without one.
//!
//! Not here: reading the file ([`crate::exports::store::evidence`]).

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::config::LedgerArgs;
use crate::export::DAY;
use crate::exports::store::evidence::{self, By, Evidence, Filter, Total, Verdict, hex};
use crate::ledger::Hash;
use crate::logging;
use crate::owner::filter::{Asked, filter, millis};
use crate::owner::records::{CSV_HEAD, csv, time, totals};
use crate::unseen::Shown;

/// Rows that are shown if `--limit` does not say.
const ROWS: u64 = 50;
/// How often `--follow` looks for new rows.
const LOOK: Duration = Duration::from_secs(1);
/// After this many rows, `--verify` says how far it is.
const PROGRESS: i64 = 20_000;

/// Why it did not print what was asked for.
pub enum Failure {
    /// The arguments make no sense.
    Usage(String),
    /// The ledger cannot be read, or the output not written.
    Failed(String),
}

/// Prints what the arguments ask for. Blocks for as long as that takes, with `--follow` for good. Returns the exit
/// code.
///
/// # Errors
/// The text says what is wrong.
pub fn ledger(arguments: &LedgerArgs, now: SystemTime) -> Result<u8, Failure> {
    let remembered = match arguments.head.as_deref() {
        None | Some("") => None,
        Some(text) => Some(head(text).ok_or_else(|| {
            Failure::Usage(format!(
                "--head {}: give what --head printed once, like 17:3f9a…, together with --verify",
                text.escape_debug()
            ))
        })?),
    };
    if remembered.is_some() && !arguments.verify {
        let message = "--head SEQ:HASH goes with --verify; --head alone prints the present one";
        return Err(Failure::Usage(message.into()));
    }
    let wanted = filter(
        &Asked {
            since: &arguments.since,
            until: &arguments.until,
            who: &arguments.who,
            destination: &arguments.destination,
            outcome: match (arguments.failed, arguments.refused) {
                (true, _) => "failed",
                (false, true) => "refused",
                (false, false) => "",
            },
            id: &arguments.id,
        },
        millis(now),
    )
    .map_err(|what| Failure::Usage(format!("--{what}")))?;
    let evidence = Evidence::open(arguments.folder()).map_err(Failure::Failed)?;
    let done = if arguments.verify {
        verify(&evidence, remembered)
    } else if arguments.head.is_some() {
        print_head(&evidence)
    } else if let Some(by) = &arguments.summary {
        let by = match by.as_str() {
            "week" => By::Week,
            "who" => By::Who,
            "destination" => By::Destination,
            _ => By::Day,
        };
        summary(&evidence, by, &wanted, arguments.json)
    } else {
        rows(&evidence, wanted, arguments)
    };
    match done {
        // Whoever reads the output has seen enough.
        Err(Stop::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        Err(Stop::Output(error)) => Err(Failure::Failed(format!("cannot print: {error}"))),
        Err(Stop::Store(error)) => Err(Failure::Failed(format!("cannot read the ledger: {error}"))),
        Ok(code) => Ok(code),
    }
}

/// Why printing ended early.
enum Stop {
    Output(io::Error),
    Store(crate::exports::store::Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<crate::exports::store::Error> for Stop {
    fn from(error: crate::exports::store::Error) -> Self {
        Self::Store(error)
    }
}

/// A remembered head: number and hash.
fn head(text: &str) -> Option<(i64, Hash)> {
    let (seq, digits) = text.split_once(':')?;
    let mut hash = [0; 32];
    if digits.len() != 2 * hash.len() || !digits.is_ascii() {
        return None;
    }
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).ok()?;
    }
    Some((seq.parse().ok()?, hash))
}

fn print_head(evidence: &Evidence) -> Result<u8, Stop> {
    let (seq, hash) = evidence.head()?.unwrap_or_default();
    writeln!(io::stdout(), "{seq}:{}", hex(&hash))?;
    Ok(0)
}

fn verify(evidence: &Evidence, remembered: Option<(i64, Hash)>) -> Result<u8, Stop> {
    let is_terminal = io::stderr().is_terminal();
    let verdict = evidence.verify(remembered, |seq| {
        if is_terminal && seq % PROGRESS == 0 {
            let _ = write!(io::stderr(), "\rrow {seq}");
        }
    })?;
    if is_terminal {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    let (text, code) = match verdict {
        Verdict::Whole {
            rows,
            emptied,
            first,
            head: (seq, hash),
        } => (
            format!(
                "whole: {rows} rows from {first} to {seq}, {emptied} of them pruned or forgotten; head {seq}:{}",
                hex(&hash)
            ),
            0,
        ),
        Verdict::Broken(seq, what) => (format!("broken at row {seq}: {what}"), 1),
        Verdict::TooOld(first) => (
            format!("the remembered head is older than the first row that is kept, {first}"),
            3,
        ),
    };
    writeln!(io::stdout(), "{text}")?;
    Ok(code)
}

fn summary(evidence: &Evidence, by: By, wanted: &Filter, as_json: bool) -> Result<u8, Stop> {
    let found = totals(evidence, by, wanted.since, wanted.until)?;
    let mut out = io::stdout().lock();
    if as_json {
        for total in &found {
            serde_json::to_writer(&mut out, total).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        return Ok(0);
    }
    let key = |total: &Total| match (total.day, &total.who, &total.destination) {
        (Some(day), ..) => time(day.saturating_mul(DAY))[..10].to_owned(),
        (None, Some(name), _) | (None, None, Some(name)) => Shown(name).to_string(),
        (None, None, None) => String::new(),
    };
    let head = [
        "",
        "exports",
        "attempts",
        "delivered",
        "failed",
        "bytes out",
        "bytes in",
    ];
    let lines = found.iter().map(|total| {
        let numbers = [
            total.exports,
            total.attempts,
            total.delivered,
            total.failed,
            total.bytes_out,
            total.bytes_in,
        ];
        let numbers = numbers.map(|number| number.to_string());
        std::iter::once(key(total)).chain(numbers).collect()
    });
    write!(out, "{}", table(&head, lines, 1))?;
    Ok(0)
}

fn rows(evidence: &Evidence, mut wanted: Filter, arguments: &LedgerArgs) -> Result<u8, Stop> {
    let limit = arguments.limit.unwrap_or(ROWS);
    let mut found = Vec::new();
    evidence.rows(&wanted, false, limit, |row| {
        found.push(row);
        true
    })?;
    // The newest at the bottom, as in a log.
    found.reverse();
    let mut out = io::stdout().lock();
    let last = evidence.head()?.map_or(0, |(seq, _)| seq);
    print(&mut out, &found, arguments, true)?;
    if arguments.limit.is_none() && found.len() as u64 == limit {
        out.flush()?;
        logging::print(format!("these are the newest {limit}: more with --limit\n"));
    }
    if !arguments.follow {
        return Ok(0);
    }
    wanted.after = Some(last);
    loop {
        out.flush()?;
        thread::sleep(LOOK);
        found.clear();
        evidence.rows(&wanted, true, u64::MAX, |row| {
            found.push(row);
            true
        })?;
        if let Some(row) = found.last() {
            wanted.after = Some(row.seq);
            print(&mut out, &found, arguments, false)?;
        }
    }
}

fn print(
    out: &mut impl Write,
    rows: &[evidence::Shown],
    arguments: &LedgerArgs,
    with_head: bool,
) -> io::Result<()> {
    if arguments.json {
        for row in rows {
            serde_json::to_writer(&mut *out, row)?;
            writeln!(out)?;
        }
        return Ok(());
    }
    if arguments.csv {
        let mut text = String::new();
        if with_head {
            text.push_str(CSV_HEAD);
        }
        for row in rows {
            csv(&mut text, row);
        }
        return out.write_all(text.as_bytes());
    }
    const HEAD: [&str; 8] = [
        "row",
        "time (UTC)",
        "who",
        "destination",
        "outcome",
        "bytes",
        "ms",
        "",
    ];
    let lines = rows.iter().map(|row| {
        let text = |text: &Option<String>| Shown(text.as_deref().unwrap_or_default()).to_string();
        let who = match &row.label {
            Some(label) => format!("{} ({})", Shown(label), text(&row.who)),
            None => text(&row.who),
        };
        let number =
            |number: Option<i64>| number.map_or_else(String::new, |number| number.to_string());
        let outcome = match (row.event.as_str(), &row.outcome) {
            ("attempt", Some(outcome)) => Shown(outcome).to_string(),
            (event, Some(outcome)) => format!("{event}: {}", Shown(outcome)),
            (event, None) => event.to_owned(),
        };
        let mut rest = text(&row.note);
        if let Some(attempt) = row
            .attempt
            .filter(|attempt| *attempt > 1 && row.event == "attempt")
        {
            let _ = write!(rest, "attempt {attempt}");
        }
        vec![
            row.seq.to_string(),
            time(row.at)[..19].replace('T', " "),
            who,
            text(&row.destination),
            outcome,
            number(row.bytes_out),
            number(row.ms),
            rest,
        ]
    });
    let head: &[&str] = if with_head { &HEAD } else { &[] };
    write!(out, "{}", table(head, lines, usize::MAX))
}

/// Columns as wide as their widest cell. Those from `right` on are numbers, which are aligned to the right.
fn table(head: &[&str], lines: impl Iterator<Item = Vec<String>>, right: usize) -> String {
    let head: Vec<_> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let lines: Vec<_> = std::iter::once(head)
        .filter(|head| !head.is_empty())
        .chain(lines)
        .collect();
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |at: usize| {
        let cells = lines.iter().filter_map(|line| line.get(at));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        let mut out = String::new();
        for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let gap = if at == 0 { "" } else { "  " };
            // A String takes any text.
            let _ = match at >= right {
                true => write!(out, "{gap}{cell:>width$}"),
                false => write!(out, "{gap}{cell:<width$}"),
            };
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}
