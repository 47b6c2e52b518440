//! What is read from the store while the service runs.
//!
//! Not here: what is read at its start ([`super::opening`]).

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Error;
use crate::export::{Millis, QueueId};

/// An export as it is found in the store.
pub struct Stored {
    /// Its queue.
    pub queue: QueueId,
    /// The identifier of the macaroon it came with.
    pub owner: Vec<u8>,
    /// Where it goes or went.
    pub destination: String,
    /// How often it was tried.
    pub attempts: u32,
    /// Why its last attempt failed.
    pub last_error: Option<Arc<RawValue>>,
    /// Its result, if it is finished.
    pub response: Option<Arc<RawValue>>,
}

/// An export that waits in its queue.
pub struct Queued {
    /// Its row.
    pub seq: i64,
    /// Its public id.
    pub id: Uuid,
    /// Its position.
    pub turn: i64,
    /// Where it goes.
    pub destination: String,
    /// When it was accepted, in running time.
    pub accepted_at: Millis,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was first moved to the end of its queue, in running time.
    pub first_moved_at: Option<Millis>,
    /// Why its last attempt failed.
    pub last_error: Option<Arc<RawValue>>,
    /// What goes to its destination; none where somebody took it away, or it was not asked for.
    pub payload: Option<Vec<u8>>,
}

/// A connection for one thread at a time.
pub struct Reader {
    pub(super) connection: Connection,
    /// Whether it makes checkpoints.
    pub(super) writes: bool,
}

/// The columns of a [`Queued`], but for its payload.
macro_rules! queued {
    ($rest:literal) => {
        concat!(
            "SELECT seq, exports.id, turn, destination, running_at, attempts, first_moved_at,
                 exports.last_error ",
            $rest
        )
    };
}

impl Reader {
    /// Looks an export up.
    ///
    /// # Errors
    /// Where the store cannot be read.
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
    /// Where the store cannot be read.
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
            payload: row.get(8)?,
            ..queued
        }))
    }

    /// The oldest of a queue's exports behind the position `after`, without its payload, and whether it
    /// is the first of them.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn oldest(&self, queue: QueueId, after: i64) -> Result<Option<(Queued, bool)>, Error> {
        let read = |sql| {
            let mut statement = self.connection.prepare_cached(sql)?;
            let mut rows = statement.query(params![queue, after])?;
            rows.next()?.map(|row| queued(row)).transpose()
        };
        // Those that were never moved are in the order of their age, and behind one that was moved
        // stand only younger ones: so it is the first, or one of those that were moved.
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

/// What one of the statements above has read.
fn queued(row: &Row<'_>) -> Result<Queued, Error> {
    Ok(Queued {
        seq: row.get(0)?,
        id: row.get(1)?,
        turn: row.get(2)?,
        destination: row.get(3)?,
        accepted_at: row.get(4)?,
        attempts: row.get(5)?,
        first_moved_at: row.get(6)?,
        last_error: json(row.get(7)?)?,
        payload: None,
    })
}

/// An export from columns in this order: queue, owner, destination, attempts, last_error, response.
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

/// JSON as it stands in a row.
pub(super) fn json(text: Option<String>) -> Result<Option<Arc<RawValue>>, Error> {
    let parsed = text.map(RawValue::from_string).transpose();
    Ok(parsed.map_err(|_| Error::Damaged)?.map(Arc::from))
}

/// The only value of a query that may have none.
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
