//! Copies what can be read of a database, damaged or of an earlier release, into a new one. A bad page
//! costs the exports that are on it, and no others.
//!
//! Not here: replacing the old file ([`super::opening`]).

use std::collections::HashMap;

use rusqlite::types::{Value, ValueRef};
use rusqlite::{CachedStatement, Connection, params, params_from_iter};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::ledger::with_body;
use super::reading::value;
use super::{Error, schema};
use crate::export::{ExtResponse, FailureReport, Millis, QueueId, to_json};

/// This many row numbers behind a damaged page are tried one by one before the steps get longer. A page
/// has only a few rows, but rows between them may have been deleted.
const SMALL_STEPS: u32 = 4096;

/// How one version of the tables is read.
struct Layout {
    /// The columns of [`Head`]: those before an export's large columns, which identify it.
    head: &'static str,
    /// The columns of [`Rest`]. Exports with the same position are in the order of the second one.
    rest: &'static str,
    /// A query for owner, destination, failures, next attempt, failing since, last error, peer, the
    /// end of its last pause, and the number if that stays the same.
    queues: &'static str,
    /// The same from an index of the table, which is on other pages.
    queues_by_index: Option<&'static str>,
    /// A query for the running time, if this version counted it.
    running: Option<&'static str>,
    /// The factor by which positions are multiplied. In older versions, exports that were moved behind the
    /// same one shared its position; this makes room for different ones.
    spread: i64,
}

const FIRST: Layout = Layout {
    head: "id, owner, destination, NULL, seq, 0, NULL, NULL",
    rest: "coalesce(turn, seq), moved_at, accepted_at, 0, attempts, NULL, finished_at,
        idempotency_key, fingerprint, last_error, response, payload",
    // Waits were stored by the wall clock, which may have been wrong at the time.
    queues: "SELECT owner, destination, failures,
            min(max(max(coalesce(next_attempt_at, 0)) - unixepoch() * 1000, 0), 3600000), 0,
            last_error, '', 0, NULL
        FROM exports NOT INDEXED WHERE failures > 0 AND finished_at IS NULL
        GROUP BY owner, destination",
    queues_by_index: None,
    running: None,
    spread: 1 << 24,
};

const SECOND: Layout = Layout {
    rest: "coalesce(turn, seq), moved_at, accepted_at, running_at,
        attempts, first_moved_at, finished_at, idempotency_key, fingerprint, last_error, response, payload",
    queues: "SELECT owner, destination, failures, next_attempt_at, failing_since, last_error, '', 0, NULL
        FROM queues",
    running: Some("SELECT millis FROM running"),
    ..FIRST
};

const THIRD: Layout = Layout {
    head: "id, NULL, NULL, queue, turn, accepted_at, running_at, finished_at",
    rest: "turn, NULL, accepted_at, running_at, attempts, first_moved_at, finished_at,
        idempotency_key, fingerprint, last_error, response, payload",
    queues:
        "SELECT owner, destination, failures, next_attempt_at, failing_since, last_error, '', 0, id
        FROM queues",
    queues_by_index: Some(
        "SELECT owner, destination, 0, 0, 0, NULL, '', 0, id FROM queues
            INDEXED BY sqlite_autoindex_queues_1",
    ),
    running: SECOND.running,
    spread: 1,
};

const CURRENT: Layout = Layout {
    queues: "SELECT owner, destination, failures, next_attempt_at, failing_since, last_error, peer,
            resumed_at, id
        FROM queues",
    queues_by_index: Some(
        "SELECT owner, destination, 0, 0, 0, NULL, peer, 0, id FROM queues
            INDEXED BY sqlite_autoindex_queues_1",
    ),
    ..THIRD
};

/// The tables that earlier versions lack. They are copied row by row as far as they can be read, from the
/// first row on and from the last one back: name, columns, and the columns of the key.
const OTHERS: [(&str, &str, &str); 4] = [
    (
        "day_sums",
        "day, who, destination, exports, attempts, delivered, failed, bytes_out, bytes_in, rows, row_bytes",
        "day, who, destination",
    ),
    ("pauses", "subject, since, until", "rowid"),
    ("labels", "who, label", "rowid"),
    ("destinations", "name, first_at, seen_at", "rowid"),
];

/// Counts are limited to this, so that one that was changed by hand is not taken for damage.
const MOST: i64 = u32::MAX as i64;

/// What came of the rows.
#[derive(Default)]
pub struct Copied {
    /// How many were copied whole.
    pub whole: u64,
    /// Those copied without their payload or result, which are lost.
    pub damaged: Vec<Uuid>,
    /// Those of which only the id could be read. They were not copied.
    pub gone: Vec<Uuid>,
    /// The running time.
    pub running: Millis,
    /// Whether anything was damaged, if only an index.
    damage: bool,
}

impl Layout {
    fn spread_out(&self, turn: i64) -> i64 {
        turn.clamp(0, schema::LAST_TURN / self.spread) * self.spread
    }
}

impl Copied {
    /// Whether nothing was found damaged.
    pub fn is_whole(&self) -> bool {
        !self.damage
    }

    /// None for what cannot be read because of damage, which is noted.
    fn undamaged<T>(&mut self, result: Result<T, Error>) -> Result<Option<T>, Error> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Error::Damaged) => {
                self.damage = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Copies everything that can be read. `from` has tables of this version, `to` has empty ones of the
/// current one. `running` is the running time as far as it is known.
///
/// # Errors
/// Something other than damage prevents the copy: no export may be given up for that.
pub fn copy(
    from: &Connection,
    version: i32,
    to: &Connection,
    running: Millis,
) -> Result<Copied, Error> {
    let layout = match version {
        1 => &FIRST,
        2 => &SECOND,
        3 => &THIRD,
        schema::VERSION => &CURRENT,
        _ => return Err(Error::Damaged),
    };
    let mut copying = Copying {
        from,
        to,
        layout,
        running,
        queues: HashMap::new(),
        moved: Vec::new(),
        copied: Copied::default(),
    };
    copying.queues()?;
    copying.exports()?;
    copying.order_moved()?;
    copying.separate()?;
    copying.count()?;
    copying.running()?;
    copying.name_gone()?;
    if version == schema::VERSION {
        copying.ledger()?;
        copying.others()?;
    }
    Ok(copying.copied)
}

/// An export's columns before its large ones.
struct Head {
    id: Uuid,
    owner: Option<Vec<u8>>,
    destination: Option<String>,
    queue: Option<QueueId>,
    turn: i64,
    accepted_at: i64,
    running_at: Option<i64>,
    finished_at: Option<i64>,
}

/// The columns of [`Layout::rest`]. All but the second are written after the row's number, id and queue.
type Rest = [Value; COLUMNS];
const COLUMNS: usize = 12;
const TURN: usize = 0;
const ACCEPTED_AT: usize = 2;
const RUNNING_AT: usize = 3;
const ATTEMPTS: usize = 4;
const FINISHED_AT: usize = 6;
const KEY: usize = 7;
const FINGERPRINT: usize = 8;
const LAST_ERROR: usize = 9;
const RESPONSE: usize = 10;
const PAYLOAD: usize = 11;

struct Copying<'a> {
    from: &'a Connection,
    to: &'a Connection,
    layout: &'a Layout,
    running: Millis,
    /// How many exports of each known queue were copied.
    queues: HashMap<QueueId, i64>,
    /// Position, order among those at the same position, and row number of the exports that were moved.
    moved: Vec<(i64, i64, i64)>,
    copied: Copied,
}

impl Copying<'_> {
    fn queues(&mut self) -> Result<(), Error> {
        for sql in [Some(self.layout.queues), self.layout.queues_by_index] {
            let Some(sql) = sql else { continue };
            let copied = self.queues_from(sql);
            self.copied.undamaged(copied)?;
        }
        Ok(())
    }

    fn queues_from(&mut self, sql: &str) -> Result<(), Error> {
        let mut statement = self.from.prepare(sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let error: Option<String> = row.get(5)?;
            let error = error.filter(|text| serde_json::from_str::<&RawValue>(text).is_ok());
            let inserted = self
                .to
                .prepare_cached(
                    "INSERT OR IGNORE INTO queues (owner, destination, failures, next_attempt_at,
                         failing_since, last_error, peer, resumed_at, id)
                     VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                )?
                .execute(params![
                    row.get::<_, Vec<u8>>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, i64>(2)?.clamp(0, MOST),
                    row.get::<_, i64>(3)?,
                    row.get::<_, i64>(4)?,
                    error,
                    row.get::<_, String>(6)?,
                    row.get::<_, i64>(7)?,
                    row.get::<_, Option<QueueId>>(8)?
                ])?;
            if inserted > 0 {
                self.queues.insert(self.to.last_insert_rowid(), 0);
            }
        }
        Ok(())
    }

    fn exports(&mut self) -> Result<(), Error> {
        let mut at = i64::MIN;
        while let Some(seq) = self.next(&EXPORTS, at)? {
            let head = self.head(seq);
            if let Some(head) = self.copied.undamaged(head)? {
                let rest = self.rest(seq);
                let rest = self.copied.undamaged(rest)?;
                self.insert(seq, head, rest)?;
            }
            match seq.checked_add(1) {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Copies the rows of the ledger that can be read. A row that is missing then breaks the chain, which tells
    /// that it is.
    fn ledger(&mut self) -> Result<(), Error> {
        let mut at = i64::MIN;
        while let Some(seq) = self.next(&LEDGER, at)? {
            let copied = self.copy_row(
                "ledger",
                with_body!("seq, ", ", body_hash, hash"),
                "WHERE seq = ?",
                [seq],
            );
            self.copied.undamaged(copied)?;
            match seq.checked_add(1) {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(())
    }

    fn others(&mut self) -> Result<(), Error> {
        for (table, columns, key) in OTHERS {
            for order in ["ASC", "DESC"] {
                let key = key.replace(',', &format!(" {order},"));
                let rest = format!("ORDER BY {key} {order}");
                let copied = self.copy_row(table, columns, &rest, []);
                if self.copied.undamaged(copied)?.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Copies the rows that this query finds, up to the first that cannot be read.
    fn copy_row(
        &self,
        table: &str,
        columns: &str,
        rest: &str,
        parameters: impl rusqlite::Params,
    ) -> Result<(), Error> {
        let select = format!("SELECT {columns} FROM {table} NOT INDEXED {rest}");
        let count = columns.split(',').count();
        let marks = vec!["?"; count].join(", ");
        let insert = format!("INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})");
        let mut statement = self.from.prepare_cached(&select)?;
        let mut rows = statement.query(parameters)?;
        while let Some(row) = rows.next()? {
            let values = (0..count).map(|at| row.get::<_, Value>(at));
            let values = values.collect::<Result<Vec<_>, _>>()?;
            self.to
                .prepare_cached(&insert)?
                .execute(params_from_iter(values))?;
        }
        Ok(())
    }

    /// The first row number at or behind `from` that can be found.
    fn next(&mut self, table: &Table, from: i64) -> Result<Option<i64>, Error> {
        let connection = self.from;
        let find = |from| find(connection, table, from);
        if let Some(found) = self.copied.undamaged(find(from))? {
            return Ok(found);
        }
        let (mut bad, mut step, mut tried) = (from.max(0), 1_i64, 0);
        let mut found = loop {
            let Some(at) = bad.checked_add(step) else {
                return Ok(None);
            };
            if let Some(found) = self.copied.undamaged(find(at))? {
                break (at, found);
            }
            bad = at;
            tried += 1;
            if tried > SMALL_STEPS {
                step = step.saturating_mul(2);
            }
        };
        // Look for rows that a long step has skipped.
        while found.0 - bad > 1 {
            let middle = bad + (found.0 - bad) / 2;
            match self.copied.undamaged(find(middle))? {
                Some(earlier) => found = (middle, earlier),
                None => bad = middle,
            }
        }
        Ok(found.1)
    }

    fn head(&self, seq: i64) -> Result<Head, Error> {
        let mut statement = self.select(self.layout.head)?;
        let mut rows = statement.query([seq])?;
        let row = rows.next()?.ok_or(Error::Damaged)?;
        Ok(Head {
            id: uuid(row.get_ref(0)?).ok_or(Error::Damaged)?,
            owner: row.get(1)?,
            destination: row.get(2)?,
            queue: row.get(3)?,
            turn: self.layout.spread_out(row.get(4)?),
            accepted_at: row.get(5)?,
            running_at: row.get(6)?,
            finished_at: row.get(7)?,
        })
    }

    /// The rest of a row, if this program can have written it.
    fn rest(&self, seq: i64) -> Result<Rest, Error> {
        let mut statement = self.select(self.layout.rest)?;
        let mut rows = statement.query([seq])?;
        let row = rows.next()?.ok_or(Error::Damaged)?;
        let mut rest = [const { Value::Null }; COLUMNS];
        for (at, value) in rest.iter_mut().enumerate() {
            *value = row.get(at)?;
        }
        if let Value::Integer(turn) = &mut rest[TURN] {
            *turn = self.layout.spread_out(*turn);
        }
        if let Value::Integer(attempts) = &mut rest[ATTEMPTS] {
            *attempts = (*attempts).clamp(0, MOST);
        }
        // A damaged row may have values that the tables do not take.
        let [
            turn,
            _,
            accepted_at,
            running_at,
            attempts,
            first_moved_at,
            finished_at,
            ..,
        ] = &rest;
        let is_integer = |value: &&Value| matches!(value, Value::Integer(_));
        let is_sound = [turn, accepted_at, running_at, attempts]
            .iter()
            .all(is_integer)
            && [first_moved_at, finished_at]
                .iter()
                .all(|value| is_integer(value) || **value == Value::Null)
            && matches!(rest[KEY], Value::Text(_) | Value::Null)
            && matches!(rest[FINGERPRINT], Value::Blob(_) | Value::Null)
            && matches!(rest[PAYLOAD], Value::Blob(_) | Value::Null);
        if !is_sound {
            return Err(Error::Damaged);
        }
        let is_json = |value: &Value| match value {
            Value::Text(text) => serde_json::from_str::<&RawValue>(text).is_ok(),
            _ => false,
        };
        if rest[FINISHED_AT] == Value::Null {
            rest[RESPONSE] = Value::Null;
        } else if !is_json(&rest[RESPONSE]) {
            return Err(Error::Damaged);
        }
        if !is_json(&rest[LAST_ERROR]) {
            rest[LAST_ERROR] = Value::Null;
        }
        Ok(rest)
    }

    fn select(&self, columns: &str) -> Result<CachedStatement<'_>, Error> {
        let sql = format!("SELECT {columns} FROM exports NOT INDEXED WHERE seq = ?");
        Ok(self.from.prepare_cached(&sql)?)
    }

    /// Writes a row, unless there is one with its id, number or key.
    fn insert(&mut self, seq: i64, head: Head, rest: Option<Rest>) -> Result<(), Error> {
        let Some(queue) = self.queue(&head)? else {
            self.copied.damage = true;
            return Ok(());
        };
        let is_whole = rest.is_some();
        let rest = rest.unwrap_or_else(|| lost(&head, self.running));
        let finished = rest[FINISHED_AT] != Value::Null;
        let [turn, moved_at, rest @ ..] = rest;
        if let (Value::Integer(turn), Value::Integer(moved_at), false) =
            (&turn, &moved_at, finished)
        {
            self.moved.push((*turn, *moved_at, seq));
        }
        let id = Value::Blob(head.id.into_bytes().into());
        let row = [seq.into(), id, queue.into(), turn];
        let inserted = self
            .to
            .prepare_cached(
                "INSERT OR IGNORE INTO exports (seq, id, queue, turn, accepted_at, running_at,
                     attempts, first_moved_at, finished_at, idempotency_key, fingerprint, last_error,
                     response, payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )?
            .execute(params_from_iter(row.into_iter().chain(rest)))?;
        if inserted > 0 {
            *self.queues.entry(queue).or_default() += 1;
            match is_whole {
                true => self.copied.whole += 1,
                false => self.copied.damaged.push(head.id),
            }
        }
        Ok(())
    }

    /// The new number of an export's queue. None if nothing is known of the queue.
    fn queue(&mut self, head: &Head) -> Result<Option<QueueId>, Error> {
        if let Some(queue) = head.queue {
            return Ok(self.queues.contains_key(&queue).then_some(queue));
        }
        let (Some(owner), Some(destination)) = (&head.owner, &head.destination) else {
            return Ok(None);
        };
        let sql = "SELECT id FROM queues WHERE owner = ? AND destination = ? AND peer = ''";
        if let Some(queue) = value(self.to, sql, params![owner, destination])? {
            return Ok(Some(queue));
        }
        self.to
            .prepare_cached("INSERT INTO queues (owner, destination) VALUES (?, ?)")?
            .execute(params![owner, destination])?;
        Ok(Some(self.to.last_insert_rowid()))
    }

    fn order_moved(&mut self) -> Result<(), Error> {
        self.moved.sort_unstable();
        let mut before = i64::MIN;
        for (turn, _, seq) in &self.moved {
            // Right before them is the export behind which they were moved.
            before = (*turn).max(before).saturating_add(1);
            self.to
                .prepare_cached("UPDATE exports SET turn = ? WHERE seq = ?")?
                .execute([before, *seq])?;
        }
        Ok(())
    }

    /// Numbers all exports that wait if two of a queue have the same position, or one has none behind it: only
    /// one of them would be found, or no new one. This program never wrote such positions.
    fn separate(&self) -> Result<(), Error> {
        let strange = "SELECT 1 FROM exports WHERE finished_at IS NULL
            GROUP BY queue, turn HAVING count(*) > 1 OR turn > ? LIMIT 1";
        if value::<i64>(self.to, strange, [schema::LAST_TURN])?.is_some() {
            self.to.execute(
                "UPDATE exports SET turn = place
                 FROM (SELECT seq AS numbered, row_number() OVER (ORDER BY turn, seq) AS place
                       FROM exports WHERE finished_at IS NULL)
                 WHERE seq = numbered",
                [],
            )?;
        }
        Ok(())
    }

    /// Stores how many exports each queue has, and deletes queues that have none.
    fn count(&self) -> Result<(), Error> {
        for (queue, exports) in &self.queues {
            self.to
                .prepare_cached("UPDATE queues SET exports = ? WHERE id = ?")?
                .execute(params![exports, queue])?;
        }
        self.to
            .execute("DELETE FROM queues WHERE exports = 0", [])?;
        Ok(())
    }

    fn running(&mut self) -> Result<(), Error> {
        let stored = match self.layout.running {
            Some(sql) => self
                .from
                .query_row(sql, [], |row| row.get(0))
                .map_err(Error::from),
            None => Ok(0),
        };
        let latest = match self.copied.undamaged(stored)? {
            Some(stored) => stored,
            None => {
                let rows = "SELECT coalesce(max(max(running_at, coalesce(first_moved_at, 0))), 0) FROM exports";
                self.to.query_row(rows, [], |row| row.get(0))?
            }
        };
        self.copied.running = self.running.max(latest);
        self.to
            .execute("UPDATE running SET millis = ?", [self.copied.running])?;
        Ok(())
    }

    /// Notes the ids of exports whose rows could not be read. The index of ids is on other pages.
    fn name_gone(&mut self) -> Result<(), Error> {
        if !self.copied.damage {
            return Ok(());
        }
        let named = self.ids_that_are_gone();
        self.copied.undamaged(named)?;
        Ok(())
    }

    fn ids_that_are_gone(&mut self) -> Result<(), Error> {
        let mut statement = self
            .from
            .prepare("SELECT id FROM exports INDEXED BY sqlite_autoindex_exports_1 ORDER BY id")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            if let Some(id) = uuid(row.get_ref(0)?) {
                let sql = "SELECT 1 FROM exports WHERE id = ?";
                if value::<i64>(self.to, sql, [id])?.is_none() {
                    self.copied.gone.push(id);
                }
            }
        }
        Ok(())
    }
}

/// How rows of a table are found by their number, without an index, which may be damaged too.
struct Table {
    behind: &'static str,
    exactly: &'static str,
    before: &'static str,
    last: &'static str,
}

macro_rules! table {
    ($name:literal) => {
        Table {
            behind: concat!(
                "SELECT seq FROM ",
                $name,
                " NOT INDEXED WHERE seq >= ? ORDER BY seq LIMIT 1"
            ),
            exactly: concat!("SELECT seq FROM ", $name, " NOT INDEXED WHERE seq = ?"),
            before: concat!(
                "SELECT seq FROM ",
                $name,
                " NOT INDEXED WHERE seq < ? ORDER BY seq DESC LIMIT 1"
            ),
            last: concat!(
                "SELECT seq FROM ",
                $name,
                " NOT INDEXED ORDER BY seq DESC LIMIT 1"
            ),
        }
    };
}

const EXPORTS: Table = table!("exports");
const LEDGER: Table = table!("ledger");

/// The first row number at or behind `from`. A row whose number is damaged seems to be elsewhere; to believe
/// that would skip all rows in between.
fn find(connection: &Connection, table: &Table, from: i64) -> Result<Option<i64>, Error> {
    let ask = |sql, number| value::<i64>(connection, sql, [number]);
    let found = ask(table.behind, from)?;
    if found == Some(from) {
        return Ok(found);
    }
    let before = match found {
        Some(found) => {
            if found < from || ask(table.exactly, found)?.is_none() {
                return Err(Error::Damaged);
            }
            ask(table.before, found)
        }
        None => value(connection, table.last, []),
    };
    match before {
        Ok(Some(before)) if before >= from => Err(Error::Damaged),
        // Where rows before it are damaged, this one need not be.
        Ok(_) | Err(Error::Damaged) => Ok(found),
        Err(error) => Err(error),
    }
}

/// The rest of a row that cannot be read. An export that was finished stays so, with `lost` for a result.
/// Another one has no payload, by which the worker finds that it is lost.
fn lost(head: &Head, running: Millis) -> Rest {
    let mut rest = [const { Value::Null }; COLUMNS];
    rest[TURN] = head.turn.into();
    rest[ACCEPTED_AT] = head.accepted_at.into();
    rest[RUNNING_AT] = head.running_at.unwrap_or(running).into();
    rest[ATTEMPTS] = 0.into();
    if let Some(finished_at) = head.finished_at {
        let result = ExtResponse {
            error: Some(FailureReport {
                kind: "lost".into(),
                message: "the result was damaged in the store".into(),
                attempts: 0,
            }),
            ..ExtResponse::with_status(502, "Bad Gateway")
        };
        rest[FINISHED_AT] = finished_at.into();
        rest[RESPONSE] = Value::Text(to_json(&result).get().into());
    }
    rest
}

/// An id as any version of the tables stores it.
fn uuid(stored: ValueRef<'_>) -> Option<Uuid> {
    match stored {
        ValueRef::Text(text) => Uuid::try_parse_ascii(text).ok(),
        ValueRef::Blob(bytes) => Uuid::from_slice(bytes).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::sync::LazyLock;

    /// More than one level of pages.
    const ROWS: i64 = 400;
    const PAGE: usize = 4096;
    /// The first byte of a page with a table's rows (SQLite's file format, section 1.6).
    const TABLE_LEAF: u8 = 13;

    /// A file of the current version with finished and unfinished exports.
    static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exports.db");
        let mut connection = Connection::open(&path).unwrap();
        schema::create(&mut connection).unwrap();
        connection
            .execute_batch(&format!(
                "INSERT INTO queues (owner, destination, exports) VALUES (x'61', 'https://a.example/', {ROWS});
                 WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < {ROWS})
                 INSERT INTO exports (id, queue, turn, accepted_at, running_at, finished_at, response, payload)
                 SELECT randomblob(16), 1, n, n, n, iif(n % 3, NULL, n), iif(n % 3, NULL, '{{}}'),
                     iif(n % 3, zeroblob(n), NULL)
                 FROM n;"
            ))
            .unwrap();
        connection.close().unwrap();
        fs::read(path).unwrap()
    });

    /// Copies a file with these bytes. None if it cannot even be opened.
    fn copied(bytes: &[u8]) -> Option<Copied> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exports.db");
        fs::write(&path, bytes).unwrap();
        let from = Connection::open(&path).unwrap();
        let mut to = Connection::open_in_memory().unwrap();
        schema::create(&mut to).unwrap();
        copy(&from, schema::VERSION, &to, 0).ok()
    }

    #[test]
    fn a_whole_file_is_copied_whole() {
        let copied = copied(&WHOLE).unwrap();
        assert!(copied.is_whole());
        assert_eq!(copied.whole, ROWS.unsigned_abs());
    }

    #[test]
    fn pages_that_stand_where_others_should_be_are_not_copied_for_ever() {
        let leaves: Vec<_> = (PAGE..WHOLE.len())
            .step_by(PAGE)
            .filter(|at| WHOLE[*at] == TABLE_LEAF && WHOLE[at + 4] >= 3)
            .collect();
        for run in leaves.windows(4) {
            let mut bytes = WHOLE.clone();
            // A search for the rows of the third page goes on to the fourth.
            bytes.copy_within(run[0]..run[0] + PAGE, run[2]);
            bytes.copy_within(run[0]..run[0] + PAGE, run[3]);
            let copied = copied(&bytes).expect("only damage");
            assert!(copied.whole < ROWS.unsigned_abs());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn a_copy_of_a_file_with_any_damage_ends(
            damage in proptest::collection::vec((PAGE..WHOLE.len(), any::<u8>()), 1..30),
        ) {
            let mut bytes = WHOLE.clone();
            for (at, byte) in damage {
                bytes[at] = byte;
            }
            // What it finds, and whether that works, is another matter.
            let _ = copied(&bytes);
        }
    }
}
