//! Reads what the page shows, and what of the status comes from the ledger.
//!
//! Not here: the queries (`store`), how it is shown ([`super::page`]), and who may see it ([`super::access`]).

use std::time::SystemTime;

use super::page::{self, Query, Range, View};
use super::records::{self, Wrong};
use super::report::{Attention, Head, Rows, Status, Totals};
use super::{Owner, api};
use crate::answer::Response;
use crate::export::DAY;
use crate::exports::store::Error;
use crate::exports::store::evidence::{Evidence, hex};
use crate::exports::store::flows::{Day, Flow, Part, Refusals};
use crate::gate::framing::Request;

/// The days whose mean is a usual day, and which the table of flows sums up.
const DAYS: i64 = 30;
/// Flows, reasons of refusals and rows on one page.
const FLOWS: usize = 50;
const REFUSALS: usize = 20;
const ROWS: u64 = 50;
/// New destinations that the status lists.
const NEW: usize = 100;

/// What the ledger has for one page.
#[derive(Default)]
struct Read {
    flows: Vec<Flow>,
    flows_total: u64,
    parts: Vec<Part>,
    refusals: Vec<Refusals>,
    rows: Rows,
    wrong_filter: Option<String>,
}

/// The page that a request asks for. Blocks for reading the store.
pub fn page(owner: &Owner, request: &Request, now: SystemTime) -> Response {
    let query = request
        .target()
        .split_once('?')
        .map_or("", |(_, query)| query);
    let query = Query::parse(query);
    let evidence = owner.exports.evidence();
    // The same as programs are told; a part that could not be read is missing in it.
    let status = api::status(owner, evidence.as_ref().ok(), now);
    let read = match evidence.and_then(|evidence| read(&evidence, &query, status.now)) {
        Ok(read) => read,
        Err(reason) => Read {
            wrong_filter: Some(format!("The ledger cannot be read: {reason}.")),
            ..Read::default()
        },
    };
    let authority = request.header("Host").unwrap_or("this box");
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let body = page::render(&View {
        query: &query,
        host,
        apps_url: owner.url(owner.apps).trim_end_matches('/'),
        status: &status,
        flows: &read.flows,
        flows_total: read.flows_total,
        parts: &read.parts,
        refusals: &read.refusals,
        rows: &read.rows,
        wrong_filter: read.wrong_filter.as_deref(),
    });
    Response {
        status: 200,
        headers: vec![
            ("Content-Type", "text/html; charset=utf-8".into()),
            (
                "Content-Security-Policy",
                page::content_security_policy().into(),
            ),
        ],
        body,
        refused: None,
    }
}

fn read(evidence: &Evidence, query: &Query, now: i64) -> Result<Read, Error> {
    let today = now.div_euclid(DAY);
    let (flows, flows_total) = evidence.flows(today + 1 - DAYS, today, FLOWS)?;
    let start = query.range.start(now);
    let (_, span) = query.range.bars();
    let parts = match query.range {
        Range::Day => evidence.parts_by_rows(start, span)?,
        Range::Month | Range::Year => evidence.parts_by_days(start, span / DAY)?,
    };
    let mut read = Read {
        flows,
        flows_total,
        parts,
        refusals: evidence.refusals(now.saturating_sub(7 * DAY), REFUSALS)?,
        ..Read::default()
    };
    match records::rows(evidence, query, ROWS, now) {
        Ok(rows) => read.rows = rows,
        Err(Wrong::Query(what)) => read.wrong_filter = Some(what),
        Err(Wrong::Store(error)) => return Err(error),
    }
    Ok(read)
}

/// Adds to the status what comes from the ledger. Blocks for reading the store.
pub fn add_ledger(evidence: &Evidence, status: &mut Status) {
    let today = status.now.div_euclid(DAY);
    if let Ok((day, usual)) = evidence.day_and_usual(today, DAYS) {
        (status.today, status.usual) = (totals(day), totals(usual));
        status.attention.extend(given_up(status.today.failed));
    }
    if let Ok(new) = evidence.new_destinations(today + 1 - DAYS, NEW) {
        status.new_destinations = new;
    }
    let oldest = evidence.oldest().ok().flatten();
    // The sums are older than the rows, and may be many.
    let since = oldest.map_or(today, |at| at.div_euclid(DAY));
    if let Ok((rows, bytes)) = evidence.size(since) {
        (status.ledger.rows, status.store.ledger_bytes) = (rows, bytes);
    }
    status.ledger.first_at = oldest;
    if let Ok(Some((seq, hash))) = evidence.head() {
        let hash = hex(&hash);
        status.ledger.head = Some(Head { seq, hash });
    }
}

/// What to say of exports that ended today without an answer: nothing waits for them any longer, so that nothing else
/// would show it.
fn given_up(failed: u64) -> Option<Attention> {
    let text = match failed {
        0 => return None,
        1 => "1 export of today was given up, and has not arrived".to_owned(),
        more => format!("{more} exports of today were given up, and have not arrived"),
    };
    Some(Attention {
        kind: "given_up",
        text: format!("{text}: the ledger says why."),
        act: None,
    })
}

fn totals(day: Day) -> Totals {
    Totals {
        bytes_out: day.amount.bytes_out,
        exports: day.exports,
        delivered: day.amount.delivered,
        failed: day.amount.failed,
        destinations: day.destinations,
        refused: day.refused,
    }
}
