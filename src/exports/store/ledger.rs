//! The ledger's tables: rows are appended in the commits that happen anyway, summed up by day, and pruned when
//! there are too many.
//!
//! Rows are numbered without a gap. One that is pruned or forgotten loses its body and leaves its body's hash,
//! so that the chain can still be verified; a row of the same commit says how many those were. The oldest go
//! whole, after `--ledger-retention`, and the last of these stays as the chain's beginning.
//!
//! Not here: what a row says and how the chain is made ([`crate::ledger`]), and reading it for the owner
//! ([`super::evidence`]).

use std::collections::HashMap;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, Row, ToSql, Transaction, params};

use super::reading::value;
use super::{Error, Store};
use crate::export::DAY;
use crate::ledger::{
    Entry, Event, FIELDS, Field, Hash, ORIGIN, STUB, Sent, body_hash, link, row_size,
};

/// Rows that one commit prunes or forgets: a few milliseconds.
const STEP: i64 = 512;
/// Rows that one commit looks at for those to prune.
const WINDOW: i64 = 8192;
/// Rows of one sender in a minute that are written one by one while the ledger is full. The others are folded
/// into one for each destination and outcome, or a sender that never stops would push all others out.
const ROWS_A_MINUTE: u32 = 4;
const MINUTE: i64 = 60_000;

/// The sender under which refused requests are summed up, whoever sent them: they may come from any number of
/// addresses, which together must not push out what others did.
const REFUSED: &str = "refused requests";

/// The columns of a row's body, in the order in which they are hashed, between two literals.
macro_rules! with_body {
    ($before:literal, $after:literal) => {
        concat!(
            $before,
            "at, event, export, who, destination, address, bytes_out, bytes_in, digest, outcome, ms, attempt, note",
            $after
        )
    };
}
pub(super) use with_body;

/// How much of the ledger is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes that all rows together may take.
    pub size: u64,
    /// Milliseconds after which a row goes.
    pub retention: i64,
}

/// What memory holds of the ledger.
pub(super) struct Ledger {
    limits: Limits,
    /// The last row's number and the hash up to it.
    head: (i64, Hash),
    /// The number of the first row.
    first: i64,
    /// How many rows with a body each sender has, and all together.
    rows: HashMap<String, i64>,
    bodies: i64,
    /// Bytes that those take, about.
    bytes: i64,
    /// Rows are pruned from here on, for each sender.
    cursors: HashMap<String, i64>,
    /// While the ledger is full: the current minute, the rows in it by sender, and what was folded.
    minute: i64,
    in_minute: HashMap<String, u32>,
    folds: HashMap<FoldKey, Fold>,
}

/// Sender, destination and outcome.
type FoldKey = (String, String, String);

/// Rows that are written as one.
#[derive(Default)]
struct Fold {
    rows: u64,
    bytes_out: u64,
    bytes_in: u64,
}

/// What a commit adds to one row of `day_sums`.
#[derive(Default)]
struct Sum {
    exports: i64,
    attempts: i64,
    delivered: i64,
    failed: i64,
    bytes_out: i64,
    bytes_in: i64,
    rows: i64,
    row_bytes: i64,
}

impl Ledger {
    pub(super) fn empty() -> Self {
        Self {
            limits: Limits {
                size: u64::MAX,
                retention: i64::MAX,
            },
            head: (0, ORIGIN),
            first: 1,
            rows: HashMap::new(),
            bodies: 0,
            bytes: 0,
            cursors: HashMap::new(),
            minute: 0,
            in_minute: HashMap::new(),
            folds: HashMap::new(),
        }
    }

    /// Reads the head, and the counts from the sums, which are far fewer than the rows.
    pub(super) fn load(&mut self, connection: &Connection) -> Result<(), Error> {
        let last = "SELECT seq, hash FROM ledger WHERE hash IS NOT NULL ORDER BY seq DESC LIMIT 1";
        let head = connection
            .prepare(last)?
            .query_map([], |row| Ok((row.get(0)?, row.get::<_, Vec<u8>>(1)?)))?
            .next()
            .transpose()?;
        self.head = match head {
            Some((seq, hash)) => (seq, hash.try_into().map_err(|_| Error::Damaged)?),
            None => (0, ORIGIN),
        };
        // Rows behind the last hash are there only if somebody has put them there. They must not be in the way.
        let last: Option<Option<i64>> = value(connection, "SELECT max(seq) FROM ledger", [])?;
        if let Some(last) = last.flatten().filter(|last| *last > self.head.0) {
            self.head.0 = last;
        }
        let first: Option<Option<i64>> = value(connection, "SELECT min(seq) FROM ledger", [])?;
        self.first = first.flatten().unwrap_or(self.head.0 + 1);
        self.rows.clear();
        (self.bodies, self.bytes) = (0, 0);
        let mut statement = connection.prepare(
            "SELECT who, sum(rows), sum(row_bytes) FROM day_sums GROUP BY who HAVING sum(rows) <> 0",
        )?;
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let rows = row.get(1)?;
            self.rows.insert(row.get(0)?, rows);
            self.bodies += rows;
            self.bytes += row.get::<_, i64>(2)?;
        }
        Ok(())
    }

    /// Bytes that all rows take, about.
    pub(super) fn size(&self) -> u64 {
        let stubs = self.head.0 + 1 - self.first - self.bodies;
        to_u64(self.bytes) + to_u64(stubs) * STUB
    }

    fn is_full(&self) -> bool {
        self.size() >= self.limits.size / 8 * 7
    }

    /// The sender with the most rows.
    fn largest(&self) -> Option<&str> {
        let named = self.rows.iter().filter(|(who, _)| !who.is_empty());
        let largest = named.max_by_key(|(_, rows)| **rows);
        largest.map(|(who, _)| who.as_str())
    }

    /// Whether a row is folded: the ledger is full, its sender has the most rows, and had its part of this minute.
    fn folds(&mut self, entry: &Entry) -> bool {
        let minute = entry.at.div_euclid(MINUTE);
        if minute != self.minute {
            self.minute = minute;
            self.in_minute.clear();
        }
        if entry.event != Event::Attempt || !self.is_full() || self.largest() != Some(&entry.who) {
            return false;
        }
        let rows = self.in_minute.entry(entry.who.clone()).or_default();
        *rows += 1;
        *rows > ROWS_A_MINUTE
    }
}

impl Sum {
    fn count(&mut self, entry: &Entry) {
        if let Some(sent) = &entry.attempt {
            self.attempts += 1;
            self.exports += i64::from(sent.attempt == 1);
            self.bytes_out += to_i64(sent.bytes_out);
            self.bytes_in += to_i64(sent.bytes_in);
        }
        match entry.delivered {
            Some(true) => self.delivered += 1,
            Some(false) => self.failed += 1,
            None => {}
        }
    }
}

/// What one transaction does to the ledger. Memory learns of it when it is committed.
pub(super) struct Appending {
    head: (i64, Hash),
    first: i64,
    /// By day, sender and destination, which are looked up far more often than added.
    sums: HashMap<i64, HashMap<String, HashMap<String, Sum>>>,
    buffer: Vec<u8>,
    /// What was folded, and whether what was folded before was written.
    folded: Vec<(FoldKey, Fold)>,
    unfolded: bool,
    cursor: Option<(String, i64)>,
    appended: usize,
}

impl Appending {
    pub(super) fn new(ledger: &Ledger) -> Self {
        Self {
            head: ledger.head,
            first: ledger.first,
            sums: HashMap::new(),
            buffer: Vec::new(),
            folded: Vec::new(),
            unfolded: false,
            cursor: None,
            appended: 0,
        }
    }

    /// Appends a row and counts it, or only counts it if it is folded.
    pub(super) fn record(
        &mut self,
        transaction: &Transaction<'_>,
        ledger: &mut Ledger,
        entry: &Entry,
    ) -> Result<(), Error> {
        if ledger.folds(entry) {
            self.sum(entry).count(entry);
            let sent = entry.attempt.as_ref();
            let key = (
                entry.who.clone(),
                entry.destination.clone(),
                entry.outcome.clone(),
            );
            self.folded.push((
                key,
                Fold {
                    rows: 1,
                    bytes_out: sent.map_or(0, |sent| sent.bytes_out),
                    bytes_in: sent.map_or(0, |sent| sent.bytes_in),
                },
            ));
            return Ok(());
        }
        self.append(transaction, entry)?.count(entry);
        Ok(())
    }

    /// Appends a row, and returns the sum that it belongs to.
    fn append(&mut self, transaction: &Transaction<'_>, entry: &Entry) -> Result<&mut Sum, Error> {
        let fields = entry.fields();
        let seq = self.head.0 + 1;
        let hash = link(&self.head.1, seq, &body_hash(&fields, &mut self.buffer));
        let mut statement = transaction.prepare_cached(with_body!(
            "INSERT INTO ledger (",
            ", seq, hash) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        ))?;
        for (at, field) in fields.iter().enumerate() {
            statement.raw_bind_parameter(at + 1, field)?;
        }
        statement.raw_bind_parameter(FIELDS + 1, seq)?;
        statement.raw_bind_parameter(FIELDS + 2, hash)?;
        statement.raw_execute()?;
        self.head = (seq, hash);
        self.appended += 1;
        let size = to_i64(row_size(&fields));
        let sum = self.sum(entry);
        sum.rows += 1;
        sum.row_bytes += size;
        Ok(sum)
    }

    fn sum(&mut self, entry: &Entry) -> &mut Sum {
        let who = match entry.event {
            Event::Refused => REFUSED,
            _ => &entry.who,
        };
        self.sum_of(entry.at, who, &entry.destination)
    }

    fn sum_of(&mut self, at: i64, who: &str, destination: &str) -> &mut Sum {
        let day = self.sums.entry(at.div_euclid(DAY)).or_default();
        if !day.contains_key(who) {
            day.insert(who.to_owned(), HashMap::new());
        }
        // It is there by now.
        let senders = day.get_mut(who).expect("a sender's sums");
        if !senders.contains_key(destination) {
            senders.insert(destination.to_owned(), Sum::default());
        }
        senders.get_mut(destination).expect("a destination's sum")
    }

    /// All sums with their day, sender and destination.
    fn all_sums(&self) -> impl Iterator<Item = (i64, &str, &str, &Sum)> {
        self.sums.iter().flat_map(|(day, senders)| {
            senders.iter().flat_map(move |(who, destinations)| {
                let sums = destinations.iter();
                sums.map(move |(destination, sum)| (*day, who.as_str(), destination.as_str(), sum))
            })
        })
    }

    /// Writes what was folded in minutes that are over, or all of it.
    fn unfold(
        &mut self,
        transaction: &Transaction<'_>,
        ledger: &Ledger,
        at: i64,
        all: bool,
    ) -> Result<(), Error> {
        if self.unfolded
            || ledger.folds.is_empty()
            || !all && at.div_euclid(MINUTE) == ledger.minute
        {
            return Ok(());
        }
        self.unfolded = true;
        for ((who, destination, outcome), fold) in &ledger.folds {
            let entry = Entry {
                who: who.clone(),
                destination: destination.clone(),
                outcome: outcome.clone(),
                attempt: Some(Sent {
                    address: String::new(),
                    bytes_out: fold.bytes_out,
                    bytes_in: fold.bytes_in,
                    digest: None,
                    ms: 0,
                    attempt: 0,
                }),
                note: format!("{} more like this", fold.rows),
                ..Entry::new(Event::Attempt, at)
            };
            self.append(transaction, &entry)?;
        }
        Ok(())
    }

    /// Takes the bodies of some rows of the sender that has the most, if the ledger has become too large.
    fn prune(
        &mut self,
        transaction: &Transaction<'_>,
        ledger: &Ledger,
        at: i64,
    ) -> Result<(), Error> {
        // Rows without a body take most of it: they go once they are old, and what others did stays.
        if to_u64(ledger.bytes) < ledger.limits.size / 2 {
            return Ok(());
        }
        let added: i64 = self.all_sums().map(|(.., sum)| sum.row_bytes).sum();
        if ledger.size().saturating_add_signed(added) <= ledger.limits.size {
            return Ok(());
        }
        let Some(who) = ledger.largest().map(str::to_owned) else {
            return Ok(());
        };
        let after = ledger
            .cursors
            .get(&who)
            .copied()
            .unwrap_or(0)
            .max(ledger.first - 1);
        let until = after.saturating_add(WINDOW);
        let rows = transaction
            .prepare_cached(with_body!(
                "SELECT seq, ",
                "
                 FROM ledger WHERE seq > ?1 AND seq <= ?2 AND iif(event = 'refused', ?4, who) = ?3
                     AND event NOT IN ('pruned', 'forget', 'expired') LIMIT ?5"
            ))?
            .query_map(params![after, until, who, REFUSED, STEP], |row| {
                Ok(Body::of(row, 1))
            })?
            .collect::<Result<Vec<_>, _>>()?;
        let rows = rows.into_iter().collect::<Result<Vec<_>, _>>()?;
        let next = match rows.last() {
            Some(last) if to_i64(rows.len() as u64) == STEP => last.seq,
            // Back to the beginning once all were looked at.
            _ if until >= self.head.0 => 0,
            _ => until,
        };
        self.cursor = Some((who, next));
        if rows.is_empty() {
            return Ok(());
        }
        for row in &rows {
            self.blank(transaction, row)?;
        }
        self.append(
            transaction,
            &Entry {
                count: rows.len() as u64,
                note: format!("{} rows, as the ledger is full", rows.len()),
                ..Entry::new(Event::Pruned, at)
            },
        )?;
        Ok(())
    }

    /// Takes a row's body and leaves the body's hash.
    fn blank(&mut self, transaction: &Transaction<'_>, row: &Body) -> Result<(), Error> {
        let fields = row.fields();
        transaction
            .prepare_cached(
                "UPDATE ledger SET at = NULL, event = NULL, export = NULL, who = NULL, destination = NULL,
                     address = NULL, bytes_out = NULL, bytes_in = NULL, digest = NULL, outcome = NULL,
                     ms = NULL, attempt = NULL, note = NULL, hash = NULL, body_hash = ?
                 WHERE seq = ?",
            )?
            .execute(params![body_hash(&fields, &mut self.buffer), row.seq])?;
        let size = to_i64(row_size(&fields));
        let [Field::Integer(at), ..] = fields else {
            return Ok(());
        };
        let who = match row.text(EVENT) == Event::Refused.name() {
            true => REFUSED,
            false => row.text(WHO),
        };
        let sum = self.sum_of(at, who, row.text(DESTINATION));
        sum.rows -= 1;
        sum.row_bytes -= size;
        Ok(())
    }

    /// Finishes what belongs into the same commit.
    pub(super) fn finish(
        &mut self,
        transaction: &Transaction<'_>,
        ledger: &mut Ledger,
        at: i64,
    ) -> Result<(), Error> {
        self.unfold(transaction, ledger, at, false)?;
        if self.appended > 0 {
            self.prune(transaction, ledger, at)?;
        }
        if self.sums.is_empty() {
            return Ok(());
        }
        // Nearly always the row is there, and this is cheaper than an insertion that becomes an update.
        let mut update = transaction.prepare_cached(
            "UPDATE day_sums SET exports = exports + ?4, attempts = attempts + ?5,
                 delivered = delivered + ?6, failed = failed + ?7, bytes_out = bytes_out + ?8,
                 bytes_in = bytes_in + ?9, rows = rows + ?10, row_bytes = row_bytes + ?11
             WHERE day = ?1 AND who = ?2 AND destination = ?3",
        )?;
        for (day, who, destination, sum) in self.all_sums() {
            let values = params![
                day,
                who,
                destination,
                sum.exports,
                sum.attempts,
                sum.delivered,
                sum.failed,
                sum.bytes_out,
                sum.bytes_in,
                sum.rows,
                sum.row_bytes
            ];
            if update.execute(values)? == 0 {
                transaction
                    .prepare_cached(
                        "INSERT INTO day_sums VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    )?
                    .execute(values)?;
            }
        }
        Ok(())
    }
}

impl Ledger {
    /// Notes what was committed.
    pub(super) fn committed(&mut self, done: Appending) {
        self.head = done.head;
        self.first = done.first;
        for (_, who, _, sum) in done.all_sums() {
            self.bytes += sum.row_bytes;
            self.bodies += sum.rows;
            match self.rows.get_mut(who) {
                Some(rows) => *rows += sum.rows,
                None => {
                    self.rows.insert(who.to_owned(), sum.rows);
                }
            }
        }
        self.rows.retain(|_, rows| *rows > 0);
        if done.unfolded {
            self.folds.clear();
        }
        for (key, one) in done.folded {
            let fold = self.folds.entry(key).or_default();
            fold.rows += one.rows;
            fold.bytes_out += one.bytes_out;
            fold.bytes_in += one.bytes_in;
        }
        if let Some((who, at)) = done.cursor {
            self.cursors.insert(who, at);
        }
    }
}

/// A stored row with its body.
pub(super) struct Body {
    pub seq: i64,
    values: Vec<rusqlite::types::Value>,
}

/// Positions in a body.
const EVENT: usize = 1;
pub(super) const WHO: usize = 3;
pub(super) const DESTINATION: usize = 4;

impl Body {
    /// Reads the number from the first column and the body from `at` on.
    pub fn of(row: &Row<'_>, at: usize) -> Result<Self, Error> {
        let values = (at..at + FIELDS).map(|at| row.get(at));
        Ok(Self {
            seq: row.get(0)?,
            values: values.collect::<Result<_, _>>()?,
        })
    }

    /// The body as it is hashed.
    pub fn fields(&self) -> [Field<'_>; FIELDS] {
        use rusqlite::types::Value;
        std::array::from_fn(|at| match &self.values[at] {
            Value::Null => Field::Null,
            Value::Integer(number) => Field::Integer(*number),
            Value::Text(text) => Field::Text(text),
            Value::Blob(bytes) => Field::Blob(bytes),
            // The tables are strict and have no such column.
            Value::Real(_) => Field::Null,
        })
    }

    /// A text of the body; empty if it is null.
    pub fn text(&self, at: usize) -> &str {
        match &self.values[at] {
            rusqlite::types::Value::Text(text) => text,
            _ => "",
        }
    }
}

impl ToSql for Field<'_> {
    fn to_sql(&self) -> Result<ToSqlOutput<'_>, rusqlite::Error> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Blob(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

impl Store {
    /// Sets how much of the ledger is kept. Without this, all of it is.
    pub fn limit_ledger(&mut self, limits: Limits) {
        self.ledger.limits = limits;
    }

    /// Bytes that the ledger takes, about.
    pub fn ledger_size(&self) -> u64 {
        self.ledger.size()
    }

    /// The number of the ledger's last row, and the hash of the chain up to it.
    pub fn ledger_head(&self) -> (i64, Hash) {
        self.ledger.head
    }

    /// Whether rows were folded that are not written yet.
    pub fn has_unwritten_counts(&self) -> bool {
        !self.ledger.folds.is_empty()
    }

    /// Appends rows in a commit of their own, with all that is only counted so far. `now` is in Unix milliseconds.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn record(&mut self, entries: &[Entry], now: i64) -> Result<(), Error> {
        let at = now.saturating_add(self.clock_offset);
        self.change_ledger(|appending, transaction, ledger| {
            for entry in entries {
                appending.record(transaction, ledger, entry)?;
            }
            appending.unfold(transaction, ledger, at, true)?;
            appending.finish(transaction, ledger, at)
        })
    }

    /// Deletes some rows that are older than the retention. True if there may be more. `now` is in Unix
    /// milliseconds.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn expire_ledger(&mut self, now: i64) -> Result<bool, Error> {
        let at = now.saturating_add(self.clock_offset);
        let limit = at.saturating_sub(self.ledger.limits.retention);
        // Far fewer than there may be: stubs before them do not count.
        let size = self.ledger.size();
        let stubs_only =
            size > self.ledger.limits.size && self.ledger.bytes.unsigned_abs() < size / 2;
        let first = self.ledger.first;
        let mut last = None;
        {
            let mut statement = self.connection.prepare_cached(
                "SELECT seq, at FROM ledger WHERE seq >= ? AND at IS NOT NULL ORDER BY seq LIMIT ?",
            )?;
            let mut rows = statement.query(params![first, STEP])?;
            while let Some(row) = rows.next()?
                && (row.get::<_, i64>(1)? <= limit || stubs_only)
            {
                last = Some(row.get(0)?);
            }
        }
        let Some(last) = last else {
            return Ok(false);
        };
        self.change_ledger(|appending, transaction, ledger| {
            let rows = transaction
                .prepare_cached(with_body!(
                    "SELECT seq, ",
                    ", hash
                     FROM ledger WHERE seq <= ? AND at IS NOT NULL"
                ))?
                .query_map([last], |row| {
                    Ok((Body::of(row, 1), row.get::<_, Vec<u8>>(14)?))
                })?
                .collect::<Result<Vec<_>, _>>()?;
            for (row, hash) in rows {
                let row = row?;
                appending.blank(transaction, &row)?;
                if row.seq == last {
                    transaction.execute(
                        "UPDATE ledger SET hash = ? WHERE seq = ?",
                        params![hash, last],
                    )?;
                }
            }
            transaction.execute("DELETE FROM ledger WHERE seq < ?", [last])?;
            appending.first = last;
            appending.append(
                transaction,
                &Entry {
                    count: to_u64(last),
                    note: format!("all rows up to {last}, as they were old"),
                    ..Entry::new(Event::Expired, at)
                },
            )?;
            appending.finish(transaction, ledger, at)
        })?;
        Ok(true)
    }

    /// Takes the bodies of rows behind `after` whose sender and destination `matches`, and their names out of the
    /// sums. Returns where to go on; None at the end. `now` is in Unix milliseconds.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn forget_rows(
        &mut self,
        after: i64,
        matches: impl Fn(&str, &str) -> bool,
        now: i64,
    ) -> Result<Option<i64>, Error> {
        let at = now.saturating_add(self.clock_offset);
        let until = after.saturating_add(WINDOW);
        let head = self.ledger.head.0;
        self.change_ledger(|appending, transaction, ledger| {
            let rows = transaction
                .prepare_cached(with_body!(
                    "SELECT seq, ",
                    "
                     FROM ledger WHERE seq > ? AND seq <= ? AND at IS NOT NULL"
                ))?
                .query_map([after, until], |row| Ok(Body::of(row, 1)))?
                .collect::<Result<Vec<_>, _>>()?;
            let mut removed = 0;
            for row in rows {
                let row = row?;
                if matches(row.text(WHO), row.text(DESTINATION)) {
                    appending.blank(transaction, &row)?;
                    removed += 1;
                }
            }
            if removed > 0 {
                appending.append(
                    transaction,
                    &Entry {
                        count: removed,
                        note: format!("{removed} rows, as the owner asked"),
                        ..Entry::new(Event::Forget, at)
                    },
                )?;
            }
            appending.finish(transaction, ledger, at)?;
            if until >= head {
                forget_sums(transaction, &matches)?;
            }
            Ok(())
        })?;
        Ok((until < head).then_some(until))
    }

    /// Changes tables past this program.
    #[cfg(test)]
    pub fn tamper(&self, sql: &str) {
        self.connection.execute_batch(sql).unwrap();
    }

    pub(super) fn change_ledger(
        &mut self,
        change: impl FnOnce(&mut Appending, &Transaction<'_>, &mut Ledger) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let transaction = self.connection.transaction()?;
        let mut appending = Appending::new(&self.ledger);
        change(&mut appending, &transaction, &mut self.ledger)?;
        transaction.commit()?;
        self.ledger.committed(appending);
        Ok(())
    }
}

/// Moves what is summed up under these names to the name `forgotten`.
fn forget_sums(
    transaction: &Transaction<'_>,
    matches: &impl Fn(&str, &str) -> bool,
) -> Result<(), Error> {
    let names = transaction
        .prepare("SELECT DISTINCT who, destination FROM day_sums")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<Vec<(String, String)>, _>>()?;
    for (who, destination) in names {
        if !matches(&who, &destination) || who == "forgotten" {
            continue;
        }
        transaction.execute(
            "INSERT INTO day_sums
             SELECT day, 'forgotten', 'forgotten', exports, attempts, delivered, failed, bytes_out, bytes_in, rows,
                 row_bytes
             FROM day_sums WHERE who = ? AND destination = ?
             ON CONFLICT DO UPDATE SET exports = exports + excluded.exports,
                 attempts = attempts + excluded.attempts, delivered = delivered + excluded.delivered,
                 failed = failed + excluded.failed, bytes_out = bytes_out + excluded.bytes_out,
                 bytes_in = bytes_in + excluded.bytes_in, rows = rows + excluded.rows,
                 row_bytes = row_bytes + excluded.row_bytes",
            params![who, destination],
        )?;
        transaction.execute(
            "DELETE FROM day_sums WHERE who = ? AND destination = ?",
            params![who, destination],
        )?;
    }
    Ok(())
}

fn to_i64(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn to_u64(number: i64) -> u64 {
    number.max(0).unsigned_abs()
}
