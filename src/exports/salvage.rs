//! Copies out of a damaged database what can still be read: a page that went bad costs the exports
//! that are on it, and no others.
//!
//! Not here: which file takes the place of which ([`super::store`]).

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, params, params_from_iter};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::store::Error;

/// Every column, in the order of the row copied; the first three are in front of the payload.
const COLUMNS: &str = "id, owner, destination, seq, payload, accepted_at, finished_at, response,
    attempts, last_error, turn, moved_at, idempotency_key, fingerprint, running_at, first_moved_at";
const COUNT: usize = 16;
const RESPONSE: usize = 7;
const LAST_ERROR: usize = 9;

/// So many numbers behind a damaged page are tried one by one, before the steps get longer: a page
/// has a few rows, but those between may have been deleted.
const SMALL_STEPS: u32 = 4096;

/// What became of the rows.
#[derive(Default)]
pub struct Salvaged {
    /// Copied whole.
    pub whole: u64,
    /// Copied without their payload or result: they will be finished as lost.
    pub damaged: Vec<Uuid>,
    /// Known by their id alone, and not copied.
    pub gone: Vec<String>,
}

/// Copies everything that can be read. `to` has empty tables. `running` is the running time as far as it
/// is known.
///
/// # Errors
/// Where something other than damage is in the way: nothing is to be given up for that.
pub fn copy(from: &Connection, to: &Connection, running: i64) -> Result<Salvaged, Error> {
    let mut salvaged = Salvaged::default();
    let mut at = i64::MIN;
    let mut latest = running;
    while let Some(seq) = next(from, at)? {
        match row(from, seq).and_then(|row| check(row).ok_or(Error::Damaged)) {
            Ok(row) => {
                if insert(to, row)? {
                    salvaged.whole += 1;
                }
            }
            Err(Error::Damaged) => {
                if let Some(id) = beginning(from, to, seq, running)? {
                    salvaged.damaged.push(id);
                }
            }
            Err(error) => return Err(error),
        }
        match seq.checked_add(1) {
            Some(next) => at = next,
            None => break,
        }
    }
    undamaged(queues(from, to))?;
    let stored = from.query_row("SELECT millis FROM running", [], |row| row.get::<_, i64>(0));
    if let Some(stored) = undamaged(stored.map_err(Error::from))? {
        latest = latest.max(stored);
    } else {
        let rows = "SELECT coalesce(max(max(running_at, coalesce(moved_at, 0))), 0) FROM exports";
        latest = latest.max(to.query_row(rows, [], |row| row.get(0))?);
    }
    to.execute("UPDATE running SET millis = ?", [latest])?;
    undamaged(name_gone(from, to, &mut salvaged.gone))?;
    Ok(salvaged)
}

/// `None` for what cannot be read because of damage.
fn undamaged<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Error::Damaged) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first row that can be found at or behind `from`.
fn next(connection: &Connection, from: i64) -> Result<Option<i64>, Error> {
    let find = |from: i64| -> Result<Option<i64>, Error> {
        let sql = "SELECT seq FROM exports NOT INDEXED WHERE seq >= ? ORDER BY seq LIMIT 1";
        let mut statement = connection.prepare_cached(sql)?;
        Ok(statement.query_row([from], |row| row.get(0)).optional()?)
    };
    if let Some(found) = undamaged(find(from))? {
        return Ok(found);
    }
    let (mut bad, mut step, mut tried) = (from.max(0), 1_i64, 0);
    let mut found = loop {
        let Some(at) = bad.checked_add(step) else {
            return Ok(None);
        };
        if let Some(found) = undamaged(find(at))? {
            break (at, found);
        }
        bad = at;
        tried += 1;
        if tried > SMALL_STEPS {
            step = step.saturating_mul(2);
        }
    };
    // What a long step has left out.
    while found.0 - bad > 1 {
        let middle = bad + (found.0 - bad) / 2;
        match undamaged(find(middle))? {
            Some(earlier) => found = (middle, earlier),
            None => bad = middle,
        }
    }
    Ok(found.1)
}

fn row(connection: &Connection, seq: i64) -> Result<Vec<Value>, Error> {
    let sql = format!("SELECT {COLUMNS} FROM exports NOT INDEXED WHERE seq = ?");
    let mut statement = connection.prepare_cached(&sql)?;
    let row = statement.query_row([seq], |row| (0..COUNT).map(|at| row.get(at)).collect())?;
    Ok(row)
}

/// The row, if it is one that this program can have written.
fn check(mut row: Vec<Value>) -> Option<Vec<Value>> {
    let Value::Text(id) = &row[0] else {
        return None;
    };
    id.parse::<Uuid>().ok()?;
    let sound = |value: &Value| match value {
        Value::Text(text) => serde_json::from_str::<&RawValue>(text).is_ok(),
        value => *value == Value::Null,
    };
    if !sound(&row[RESPONSE]) {
        return None;
    }
    if !sound(&row[LAST_ERROR]) {
        row[LAST_ERROR] = Value::Null;
    }
    Some(row)
}

/// False where a row with its id, number or key is there already.
fn insert(to: &Connection, row: Vec<Value>) -> Result<bool, Error> {
    let values = ["?"; COUNT].join(", ");
    let sql = format!("INSERT OR IGNORE INTO exports ({COLUMNS}) VALUES ({values})");
    let inserted = to.prepare_cached(&sql)?.execute(params_from_iter(row))?;
    Ok(inserted > 0)
}

/// Copies what is in front of a row's payload, if that can be read.
fn beginning(
    from: &Connection,
    to: &Connection,
    seq: i64,
    running: i64,
) -> Result<Option<Uuid>, Error> {
    let mut statement = from
        .prepare_cached("SELECT id, owner, destination FROM exports NOT INDEXED WHERE seq = ?")?;
    type Beginning = (String, Vec<u8>, String);
    let read = statement.query_row([seq], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    let read: Option<Beginning> = undamaged(read.map_err(Error::from))?;
    let Some((id, owner, destination)) = read else {
        return Ok(None);
    };
    let Ok(parsed) = id.parse() else {
        return Ok(None);
    };
    let inserted = to
        .prepare_cached(
            "INSERT OR IGNORE INTO exports (seq, id, owner, destination, accepted_at, running_at)
             VALUES (?, ?, ?, ?, 0, ?)",
        )?
        .execute(params![seq, id, owner, destination, running])?;
    Ok((inserted > 0).then_some(parsed))
}

fn queues(from: &Connection, to: &Connection) -> Result<(), Error> {
    let mut statement = from.prepare(
        "SELECT owner, destination, failures, next_attempt_at, failing_since, last_error FROM queues",
    )?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let error: Option<String> = row.get(5)?;
        let error = error.filter(|text| serde_json::from_str::<&RawValue>(text).is_ok());
        to.prepare_cached("INSERT OR IGNORE INTO queues VALUES (?, ?, ?, ?, ?, ?)")?
            .execute(params![
                row.get::<_, Vec<u8>>(0)?,
                row.get::<_, String>(1)?,
                row.get::<_, i64>(2)?,
                row.get::<_, i64>(3)?,
                row.get::<_, i64>(4)?,
                error
            ])?;
    }
    Ok(())
}

/// The index of ids is on other pages than the rows.
fn name_gone(from: &Connection, to: &Connection, gone: &mut Vec<String>) -> Result<(), Error> {
    let mut statement =
        from.prepare("SELECT id FROM exports INDEXED BY sqlite_autoindex_exports_1 ORDER BY id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let id: String = row.get(0)?;
        let known = to
            .prepare_cached("SELECT 1 FROM exports WHERE id = ?")?
            .exists([&id])?;
        if !known && id.parse::<Uuid>().is_ok() {
            gone.push(id);
        }
    }
    Ok(())
}
