//! Reads what the owner is told of what waits.
//!
//! Not here: the state of the queues, which memory has (`exports::queues`).

use std::collections::HashMap;
use std::path::Path;

use rusqlite::{OpenFlags, OptionalExtension};
use uuid::Uuid;

use super::acts::QueueName;
use super::opening::connect;
use super::{Error, Reader};
use crate::export::{Millis, QueueId};
use crate::ledger::who;

/// With more exports to add up than this, reading all rows in their order is faster than following the index.
const BY_INDEX: usize = 20_000;

/// The first export of a queue that is not finished.
pub struct First {
    /// Its public id.
    pub id: Uuid,
    /// When it was accepted, in running time.
    pub accepted_at: Millis,
    /// The same in Unix milliseconds.
    pub accepted_at_by_clock: i64,
}

impl Reader {
    /// Opens the store at this path, beside the other readers.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        Ok(Self {
            connection,
            writes: false,
        })
    }

    /// The labels of all senders that have one.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn labels(&self) -> Result<HashMap<String, String>, Error> {
        let mut statement = self.connection.prepare("SELECT who, label FROM labels")?;
        let labels = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(labels.collect::<Result<_, _>>()?)
    }

    /// Whose exports a queue has, and where they go.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn queue_name(&self, id: QueueId) -> Result<Option<QueueName>, Error> {
        let sql = "SELECT owner, peer, destination FROM queues WHERE id = ?";
        let mut statement = self.connection.prepare_cached(sql)?;
        let name = statement.query_row([id], |row| {
            Ok(QueueName {
                id,
                who: who(&row.get::<_, Vec<u8>>(0)?, &row.get::<_, String>(1)?),
                url: row.get(2)?,
            })
        });
        Ok(name.optional()?)
    }

    /// The first export of a queue that is not finished.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn first_unfinished(&self, queue: QueueId) -> Result<Option<First>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, running_at, accepted_at FROM exports
             WHERE queue = ? AND finished_at IS NULL ORDER BY turn LIMIT 1",
        )?;
        let first = statement.query_row([queue], |row| {
            Ok(First {
                id: row.get(0)?,
                accepted_at: row.get(1)?,
                accepted_at_by_clock: row.get(2)?,
            })
        });
        Ok(first.optional()?)
    }

    /// The bytes of the payloads of all exports that are not finished, of which there are about this many.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn waiting_bytes(&self, unfinished: usize) -> Result<u64, Error> {
        let sql = match unfinished {
            0..=BY_INDEX => {
                "SELECT coalesce(sum(length(payload)), 0)
                 FROM exports INDEXED BY unfinished WHERE finished_at IS NULL"
            }
            _ => {
                "SELECT coalesce(sum(length(payload)), 0)
                 FROM exports NOT INDEXED WHERE finished_at IS NULL"
            }
        };
        let bytes = self
            .connection
            .query_row(sql, [], |row| row.get::<_, i64>(0))?;
        Ok(bytes.unsigned_abs())
    }
}
