//! Writes to the store while the service runs.
//!
//! Not here: when that happens (`exports::writer`).

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, Row, Transaction, named_params, params};

use super::folder::beside;
use super::ledger::{Appending, Ledger};
use super::opening::{BUSY, MEMORY};
use super::reading::{stored, value};
use super::{Change, Effect, Error, ExportUpdate, IdempotencyKey, NewExport, QueueUpdate};
use super::{ORDINARY_WAL, ORDINARY_WAL_PAGES, Reader, Report, Store};
use crate::export::{self, Millis, QueueId};

/// A commit also stores the running time when this many milliseconds of it have passed.
const RUNNING_STEP: Millis = 10_000;

/// Expired rows that one transaction deletes: a few milliseconds even on an SD card.
const EXPIRY_STEP: u32 = 100;

impl Store {
    /// Writes all of `changes` in one transaction and returns the effect of each, in order. `has_room`
    /// decides on each new export that is not a repeat. It is passed the export, its queue if that exists,
    /// and how many of these changes were added to that queue so far. `now` is in Unix milliseconds,
    /// `running` is the running time. Blocks until the disk has everything, which is what a 200 to an app
    /// means.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn commit(
        &mut self,
        changes: &[Change<'_>],
        now: i64,
        running: Millis,
        has_room: impl FnMut(&NewExport, Option<QueueId>, usize) -> Result<(), export::Error>,
    ) -> Result<Vec<Effect>, Error> {
        let failing = |change: &Change<'_>| {
            matches!(change, Change::Report(report)
                if matches!(report.queue_update, QueueUpdate::Failing(..)))
        };
        // After a restart, waits are counted from the running time that was stored with them.
        let save = running - self.running >= RUNNING_STEP || changes.iter().any(failing);
        let mut writing = Writing {
            transaction: self.connection.transaction()?,
            clock_offset: self.clock_offset,
            last_turn: self.last_turn,
            added: HashMap::new(),
            appending: Appending::new(&self.ledger),
            ledger: &mut self.ledger,
            has_room,
        };
        let mut effects = Vec::with_capacity(changes.len());
        for change in changes {
            effects.push(match change {
                Change::Accept(export) => writing.accept(export)?,
                Change::Report(report) => writing.report(report, now)?,
            });
        }
        for (queue, added) in &writing.added {
            writing
                .transaction
                .prepare_cached("UPDATE queues SET exports = exports + ? WHERE id = ?")?
                .execute(params![i64::try_from(*added).unwrap_or(i64::MAX), queue])?;
        }
        if save {
            save_running(&writing.transaction, running)?;
        }
        let Writing {
            transaction,
            last_turn,
            mut appending,
            ledger,
            ..
        } = writing;
        appending.finish(&transaction, ledger, now.saturating_add(self.clock_offset))?;
        transaction.commit()?;
        ledger.committed(appending);
        self.last_turn = last_turn;
        if save {
            self.running = running;
        }
        Ok(effects)
    }

    /// Stores the running time.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn save_running(&mut self, running: Millis) -> Result<(), Error> {
        save_running(&self.connection, running)?;
        self.running = running;
        Ok(())
    }

    /// Whether the WAL is so long that it should be restarted.
    pub fn is_wal_long(&self) -> bool {
        self.wal_pages.load(Ordering::Relaxed) >= ORDINARY_WAL_PAGES
    }

    /// How many bytes exports and results take on disk. Free pages of the file do not count. The WAL counts
    /// as far as it is longer than usual: it grows while another process stays in a read transaction.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn size(&self) -> Result<u64, Error> {
        let pages = self
            .connection
            .prepare_cached(
                "SELECT (page_count - freelist_count) * page_size
                 FROM pragma_page_count, pragma_freelist_count, pragma_page_size",
            )?
            .query_row([], |row| row.get::<_, i64>(0))?;
        Ok(pages.unsigned_abs().saturating_add(self.counted_wal()))
    }

    /// How many bytes of the WAL count: see [`Store::size`].
    pub fn counted_wal(&self) -> u64 {
        wal_size(&self.path).saturating_sub(ORDINARY_WAL)
    }

    /// Deletes some exports that were finished at or before `limit` (Unix milliseconds), and queues that
    /// have none left. Returns how many, and when the oldest one left was finished.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn expire(&mut self, limit: i64) -> Result<(usize, Option<i64>), Error> {
        let limit = limit.saturating_add(self.clock_offset);
        let oldest = "SELECT min(finished_at) FROM exports WHERE finished_at NOT NULL";
        let read_oldest = |connection: &Connection| {
            value::<Option<i64>>(connection, oldest, []).map(Option::flatten)
        };
        let mut deleted = 0;
        if read_oldest(&self.connection)?.is_some_and(|finished| finished <= limit) {
            let transaction = self.connection.transaction()?;
            deleted = expire_step(&transaction, limit)?;
            transaction.commit()?;
        }
        let oldest = read_oldest(&self.connection)?;
        Ok((
            deleted,
            oldest.map(|oldest| oldest.saturating_sub(self.clock_offset)),
        ))
    }

    /// By how many milliseconds the wall clock is known to be ahead of the process's count.
    pub fn clock_offset(&self) -> i64 {
        self.clock_offset
    }

    /// Notes that the wall clock was set forward by this many milliseconds, or back if negative: moves the
    /// times of exports and pauses stored since the process started, and those to come. Results that now lie in the future
    /// count as finished now, or they would expire too late. `started` and `now` are as the process counts
    /// them.
    ///
    /// # Errors
    /// The store cannot be written. Then everything is as it was, and can be tried again.
    pub fn clock_was_set(&mut self, started: i64, now: i64, by: i64) -> Result<(), Error> {
        let (from, to) = (started + self.clock_offset, now + self.clock_offset);
        let transaction = self.connection.transaction()?;
        transaction.execute(
            "UPDATE exports SET
                 accepted_at = accepted_at + iif(accepted_at BETWEEN :from AND :to, :by, 0),
                 finished_at = finished_at + iif(finished_at BETWEEN :from AND :to, :by, 0)
             WHERE accepted_at BETWEEN :from AND :to OR finished_at BETWEEN :from AND :to",
            named_params! { ":from": from, ":to": to, ":by": by },
        )?;
        transaction.execute(
            "UPDATE exports SET finished_at = :now WHERE finished_at > :now",
            [to.saturating_add(by)],
        )?;
        transaction.execute(
            "UPDATE pauses SET since = since + ?3, until = until + ?3 WHERE since BETWEEN ?1 AND ?2",
            [from, to, by],
        )?;
        transaction.commit()?;
        self.clock_offset += by;
        Ok(())
    }

    /// See [`Reader::truncate_wal`]. True for a database in memory, which has no WAL.
    ///
    /// # Errors
    /// The store cannot be written; nothing is lost by that.
    pub fn truncate_wal(&mut self) -> Result<bool, Error> {
        if self.path.starts_with(MEMORY) {
            return Ok(true);
        }
        truncate_wal(&self.connection)
    }

    /// Whether there is a WAL: true for a file.
    pub fn has_wal(&self) -> bool {
        !self.path.starts_with(MEMORY)
    }
}

impl Reader {
    /// Copies the WAL into the database and truncates it, as it holds erased payloads until then. False if
    /// another connection that reads or writes is in the way, which is not waited for.
    ///
    /// # Errors
    /// The store cannot be written; nothing is lost by that.
    pub fn truncate_wal(&self) -> Result<bool, Error> {
        truncate_wal(&self.connection)
    }

    /// Copies as much of the WAL into the database as other connections allow, without blocking them. True
    /// if that was all of it: then the next commit restarts the WAL.
    ///
    /// # Errors
    /// The store cannot be written; nothing is lost by that.
    pub fn checkpoint(&self) -> Result<bool, Error> {
        let passive = "PRAGMA wal_checkpoint(PASSIVE)";
        let pages = |row: &Row<'_>| Ok((row.get::<_, i64>(1)?, row.get::<_, i64>(2)?));
        let (length, moved) = self.connection.query_row(passive, [], pages)?;
        Ok(length == moved)
    }
}

/// The size of a database's WAL file in bytes, which may be more than its contents.
pub fn wal_size(database: &Path) -> u64 {
    let wal = fs::metadata(beside(database, "-wal"));
    wal.map_or(0, |wal| wal.len())
}

fn truncate_wal(connection: &Connection) -> Result<bool, Error> {
    connection.busy_timeout(Duration::ZERO)?;
    let truncate = "PRAGMA wal_checkpoint(TRUNCATE)";
    let busy = connection.query_row(truncate, [], |row| row.get::<_, bool>(0));
    connection.busy_timeout(BUSY)?;
    match busy {
        Ok(busy) => Ok(!busy),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn expire_step(transaction: &Transaction<'_>, limit: i64) -> Result<usize, Error> {
    let expired = transaction
        .prepare_cached("SELECT seq, queue FROM exports WHERE finished_at <= ? LIMIT ?")?
        .query_map(params![limit, EXPIRY_STEP], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?
        .collect::<Result<Vec<(i64, QueueId)>, _>>()?;
    delete(transaction, &expired)?;
    Ok(expired.len())
}

/// Deletes finished exports by row and queue, and queues that have none left.
pub(super) fn delete(
    transaction: &Transaction<'_>,
    exports: &[(i64, QueueId)],
) -> Result<(), Error> {
    let mut delete = transaction.prepare_cached("DELETE FROM exports WHERE seq = ?")?;
    let mut count =
        transaction.prepare_cached("UPDATE queues SET exports = exports - 1 WHERE id = ?")?;
    let mut forget =
        transaction.prepare_cached("DELETE FROM queues WHERE id = ? AND exports <= 0")?;
    for (seq, queue) in exports {
        delete.execute([seq])?;
        count.execute([queue])?;
        forget.execute([queue])?;
    }
    Ok(())
}

/// A transaction that changes are written to.
struct Writing<'a, R> {
    transaction: Transaction<'a>,
    clock_offset: i64,
    last_turn: i64,
    /// How many exports this transaction has added to each queue.
    added: HashMap<QueueId, usize>,
    appending: Appending,
    ledger: &'a mut Ledger,
    has_room: R,
}

impl<R> Writing<'_, R>
where
    R: FnMut(&NewExport, Option<QueueId>, usize) -> Result<(), export::Error>,
{
    fn accept(&mut self, export: &NewExport) -> Result<Effect, Error> {
        let NewExport { owner, peer, .. } = export;
        let destination = export.destination.as_str();
        let sql = "SELECT id FROM queues WHERE owner = ? AND destination = ? AND peer = ?";
        let queue = value(&self.transaction, sql, params![owner, destination, peer])?;
        if let Some(key) = &export.key
            && let Some(earlier) = self.earlier(owner, destination, key)?
        {
            return Ok(earlier);
        }
        let added = queue.and_then(|queue| self.added.get(&queue));
        if let Err(why) = (self.has_room)(export, queue, added.copied().unwrap_or(0)) {
            return Ok(Effect::NoRoom(why));
        }
        let queue = match queue {
            Some(queue) => queue,
            None => {
                self.transaction
                    .prepare_cached(
                        "INSERT INTO queues (owner, destination, peer) VALUES (?, ?, ?)",
                    )?
                    .execute(params![owner, destination, peer])?;
                self.transaction.last_insert_rowid()
            }
        };
        let turn = self.next_turn();
        self.transaction
            .prepare_cached(
                "INSERT INTO exports (id, queue, turn, accepted_at, running_at, idempotency_key,
                     fingerprint, payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            )?
            .execute(params![
                export.id,
                queue,
                turn,
                export.accepted_at.saturating_add(self.clock_offset),
                export.running,
                export.key.as_ref().map(|key| &key.key),
                export.key.as_ref().map(|key| key.fingerprint),
                export.payload,
            ])?;
        *self.added.entry(queue).or_default() += 1;
        Ok(Effect::Written(queue))
    }

    /// The effect of a submission whose key was used before by the same owner for the same destination, perhaps
    /// from another address. None for a new key.
    fn earlier(
        &self,
        owner: &[u8],
        destination: &str,
        key: &IdempotencyKey,
    ) -> Result<Option<Effect>, Error> {
        let mut statement = self.transaction.prepare_cached(
            "SELECT queue, owner, destination, attempts, exports.last_error, response, exports.id,
                 fingerprint
             FROM queues JOIN exports ON queue = queues.id
             WHERE owner = ? AND destination = ? AND idempotency_key = ?",
        )?;
        let mut rows = statement.query(params![owner, destination, key.key])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        // None if somebody has removed it: then no submission can be known to be the same.
        let fingerprint: Option<Vec<u8>> = row.get(7)?;
        Ok(Some(
            match fingerprint.as_deref() == Some(&key.fingerprint) {
                true => Effect::Repeat(row.get(6)?, stored(row)?),
                false => Effect::Conflict,
            },
        ))
    }

    fn next_turn(&mut self) -> i64 {
        self.last_turn = self.last_turn.saturating_add(1);
        self.last_turn
    }

    fn report(&mut self, report: &Report, now: i64) -> Result<Effect, Error> {
        for entry in &report.entries {
            self.appending
                .record(&self.transaction, self.ledger, entry)?;
        }
        match &report.update {
            ExportUpdate::Finished { response, .. } => {
                self.transaction
                    .prepare_cached(
                        "UPDATE exports SET payload = NULL, finished_at = ?, response = ?
                         WHERE seq = ? AND id = ?",
                    )?
                    .execute(params![
                        now.saturating_add(self.clock_offset),
                        response.get(),
                        report.seq,
                        report.id
                    ])?;
            }
            ExportUpdate::Rescheduled {
                attempts,
                error,
                to_end,
                first_moved_at,
            } => {
                let turn = to_end.then(|| self.next_turn());
                self.transaction
                    .prepare_cached(
                        "UPDATE exports SET attempts = ?, last_error = ?, first_moved_at = ?,
                             turn = coalesce(?, turn)
                         WHERE seq = ? AND id = ?",
                    )?
                    .execute(params![
                        attempts,
                        error.get(),
                        first_moved_at,
                        turn,
                        report.seq,
                        report.id
                    ])?;
            }
        }
        let (backoff, error) = match &report.queue_update {
            QueueUpdate::AsBefore => return Ok(Effect::Written(report.queue)),
            QueueUpdate::Recovered => (export::Backoff::default(), None),
            QueueUpdate::Failing(backoff, error) => (*backoff, Some(error.get())),
        };
        self.transaction
            .prepare_cached(
                "UPDATE queues SET failures = ?, next_attempt_at = ?, failing_since = ?, last_error = ?
                 WHERE id = ?",
            )?
            .execute(params![
                backoff.failures,
                backoff.not_before,
                backoff.failing_since,
                error,
                report.queue
            ])?;
        Ok(Effect::Written(report.queue))
    }
}

pub(super) fn save_running(
    connection: &Connection,
    running: Millis,
) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("UPDATE running SET millis = ?")?
        .execute([running])?;
    Ok(())
}
