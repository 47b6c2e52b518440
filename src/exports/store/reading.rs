//! Reads from the store while the service runs.
//!
//! Not here: what is read at the start ([`super::opening`]).

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Error;
use crate::export::{Millis, QueueId};
use crate::ledger::who;

/// What a poll reads of an export.
pub struct Stored {
    /// The queue it waits in, or waited in.
    pub queue: QueueId,
    /// The identifier of the macaroon it came with.
    pub owner: Vec<u8>,
    /// Its URL.
    pub destination: String,
    /// How often it was tried.
    pub attempts: u32,
    /// `kind` and `message` of its last failed attempt.
    pub last_error: Option<Arc<RawValue>>,
    /// The `ext_response` object, if it is finished.
    pub response: Option<Arc<RawValue>>,
}

/// An export that waits in its queue.
pub struct Queued {
    /// Its row.
    pub seq: i64,
    /// Its public id.
    pub id: Uuid,
    /// Its position in its queue.
    pub turn: i64,
    /// Its sender's name: see [`crate::ledger::who`].
    pub who: String,
    /// Its URL.
    pub destination: String,
    /// When it was accepted, in running time.
    pub accepted_at: Millis,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was first moved to the end of its queue, in running time.
    pub first_moved_at: Option<Millis>,
    /// `kind` and `message` of its last failed attempt.
    pub last_error: Option<Arc<RawValue>>,
    /// None if it was removed by hand, or not asked for.
    pub payload: Option<Vec<u8>>,
}

/// A connection that reads, or makes checkpoints, for one thread at a time.
pub struct Reader {
    pub(super) connection: Connection,
    /// Whether it was opened to write, which checkpoints need.
    pub(super) writes: bool,
}

/// The columns of a [`Queued`] except its payload.
macro_rules! queued {
    ($rest:literal) => {
        concat!(
            "SELECT seq, exports.id, turn, destination, running_at, attempts, first_moved_at,
                 exports.last_error, owner, peer ",
            $rest
        )
    };
}

impl Reader {
    /// Looks an export up by its public id.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn find(&self, id: Uuid) -> Result<Option<Stored>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT queue, owner, destination, attempts, exports.last_error, response
             FROM exports JOIN queues ON queues.id = queue WHERE exports.id = ?",
        )?;
        let mut rows = statement.query([id])?;
        rows.next()?.map(|row| stored(row)).transpose()
    }

    /// The first export of a queue behind the position `after`, with its payload.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn next(&self, queue: QueueId, after: i64) -> Result<Option<Queued>, Error> {
        let mut statement = self.connection.prepare_cached(queued!(
            ", payload FROM exports JOIN queues ON queues.id = queue
             WHERE queue = ? AND turn > ? AND finished_at IS NULL ORDER BY turn LIMIT 1"
        ))?;
        let mut rows = statement.query(params![queue, after])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        let queued = queued(row)?;
        Ok(Some(Queued {
            payload: row.get(10)?,
            ..queued
        }))
    }

    /// When the oldest of all exports without a result was accepted, in Unix milliseconds. Looks at the first
    /// exports of each queue.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn oldest_accepted(&self) -> Result<Option<i64>, Error> {
        // As in `oldest`, it is the first of its queue, or one that was moved.
        let mut statement = self.connection.prepare_cached(
            "WITH firsts (at, moved_at) AS (SELECT
                 (SELECT accepted_at FROM exports WHERE queue = queues.id AND finished_at IS NULL
                  ORDER BY turn LIMIT 1),
                 (SELECT accepted_at FROM exports INDEXED BY moved WHERE queue = queues.id
                  AND finished_at IS NULL AND first_moved_at IS NOT NULL ORDER BY running_at LIMIT 1)
                 FROM queues)
             SELECT min(min(at, coalesce(moved_at, at))) FROM firsts",
        )?;
        Ok(statement.query_row([], |row| row.get(0))?)
    }

    /// The oldest of a queue's exports behind the position `after`, without its payload, and whether it
    /// is the first of them.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn oldest(&self, queue: QueueId, after: i64) -> Result<Option<(Queued, bool)>, Error> {
        let read = |sql| {
            let mut statement = self.connection.prepare_cached(sql)?;
            let mut rows = statement.query(params![queue, after])?;
            rows.next()?.map(|row| queued(row)).transpose()
        };
        // Exports that were never moved are in order of age, so the oldest is the first one or one that
        // was moved.
        let first: Result<_, Error> = read(queued!(
            "FROM exports JOIN queues ON queues.id = queue
             WHERE queue = ? AND turn > ? AND finished_at IS NULL ORDER BY turn LIMIT 1"
        ));
        let moved: Result<_, Error> = read(queued!(
            "FROM exports INDEXED BY moved JOIN queues ON queues.id = queue
             WHERE queue = ? AND turn > ? AND finished_at IS NULL AND first_moved_at IS NOT NULL
             ORDER BY running_at LIMIT 1"
        ));
        Ok(match (first?, moved?) {
            (Some(first), Some(moved)) if moved.accepted_at < first.accepted_at => {
                Some((moved, false))
            }
            (first, _) => first.map(|first| (first, true)),
        })
    }
}

/// Reads the columns of `queued!`.
fn queued(row: &Row<'_>) -> Result<Queued, Error> {
    Ok(Queued {
        seq: row.get(0)?,
        id: row.get(1)?,
        turn: row.get(2)?,
        who: {
            let text = row.get_ref(9)?.as_str().map_err(|_| Error::Damaged)?;
            who(row.get_ref(8)?.as_blob().map_err(|_| Error::Damaged)?, text)
        },
        destination: row.get(3)?,
        accepted_at: row.get(4)?,
        attempts: row.get(5)?,
        first_moved_at: row.get(6)?,
        last_error: json(row.get(7)?)?,
        payload: None,
    })
}

/// Reads columns in this order: queue, owner, destination, attempts, last_error, response.
pub(super) fn stored(row: &Row<'_>) -> Result<Stored, Error> {
    Ok(Stored {
        queue: row.get(0)?,
        owner: row.get(1)?,
        destination: row.get(2)?,
        attempts: row.get(3)?,
        last_error: json(row.get(4)?)?,
        response: json(row.get(5)?)?,
    })
}

/// Checks that a column holds JSON.
pub(super) fn json(text: Option<String>) -> Result<Option<Arc<RawValue>>, Error> {
    let parsed = text.map(RawValue::from_string).transpose();
    Ok(parsed.map_err(|_| Error::Damaged)?.map(Arc::from))
}

/// The first value of a query's first row, if there is one.
pub(super) fn value<T: rusqlite::types::FromSql>(
    connection: &Connection,
    sql: &str,
    parameters: impl rusqlite::Params,
) -> Result<Option<T>, Error> {
    let mut statement = connection.prepare_cached(sql)?;
    Ok(statement
        .query_row(parameters, |row| row.get(0))
        .optional()?)
}
