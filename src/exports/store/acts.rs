//! What the owner's acts read and write. Each change is committed with the ledger's rows of it.
//!
//! Not here: which changes an act makes (`exports::acts`).

use std::collections::HashSet;
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::reading::value;
use super::writing::save_running;
use super::{Error, Store};
use crate::export::{Millis, QueueId};
use crate::ledger::{Entry, who};

/// Rows that one commit of an act changes: a few milliseconds, for which submissions wait.
pub const STEP: usize = 100;
/// Rows that one commit of an act looks at for those to delete.
const WINDOW: i64 = 2_000;

/// Something that is paused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pause {
    /// What is paused: see `exports::acts::subject`.
    pub subject: String,
    /// Unix milliseconds by the wall clock.
    pub since: i64,
    /// The same. None: until it is resumed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}

/// Whose exports a queue has, and where they go.
pub struct QueueName {
    /// The queue.
    pub id: QueueId,
    /// The sender's name.
    pub who: String,
    /// The destination's URL.
    pub url: String,
}

/// An export as an act finds it.
pub struct Found {
    /// The queue it is in.
    pub queue: QueueId,
    /// Its sender's name.
    pub who: String,
    /// Its destination's URL.
    pub url: String,
    /// Whether it has a result.
    pub is_finished: bool,
    /// What is sent. None if that is gone.
    pub payload: Option<Vec<u8>>,
}

/// An export that waits, and can be cancelled.
pub struct Waiting {
    /// Its row.
    pub seq: i64,
    /// Its public id.
    pub id: Uuid,
    /// How often it was tried.
    pub attempts: u32,
}

/// The pauses in force.
///
/// # Errors
/// The store cannot be read.
pub(super) fn pauses(connection: &Connection) -> Result<Vec<Pause>, Error> {
    let mut statement =
        connection.prepare_cached("SELECT subject, since, until FROM pauses ORDER BY since")?;
    let pauses = statement.query_map([], |row| {
        Ok(Pause {
            subject: row.get(0)?,
            since: row.get(1)?,
            until: row.get(2)?,
        })
    })?;
    Ok(pauses.collect::<Result<_, _>>()?)
}

impl Store {
    /// The pauses in force.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn pauses(&self) -> Result<Vec<Pause>, Error> {
        pauses(&self.connection)
    }

    /// The names of all queues.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn queue_names(&self) -> Result<Vec<QueueName>, Error> {
        let sql = "SELECT id, owner, peer, destination FROM queues";
        let mut statement = self.connection.prepare_cached(sql)?;
        let names = statement.query_map([], |row| {
            Ok(QueueName {
                id: row.get(0)?,
                who: who(&row.get::<_, Vec<u8>>(1)?, &row.get::<_, String>(2)?),
                url: row.get(3)?,
            })
        })?;
        Ok(names.collect::<Result<_, _>>()?)
    }

    /// The sender that has this label.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn labelled(&self, label: &str) -> Result<Option<String>, Error> {
        let sql = "SELECT who FROM labels WHERE label = ?";
        value(&self.connection, sql, [label])
    }

    /// Whether anything was counted for a sender of this name, or it has a label.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn has_sender(&self, who: &str) -> Result<bool, Error> {
        let sql = "SELECT EXISTS (SELECT 1 FROM labels WHERE who = ?1)
            OR EXISTS (SELECT 1 FROM day_sums WHERE who = ?1 AND attempts + delivered + failed > 0)";
        Ok(value(&self.connection, sql, [who])?.unwrap_or(false))
    }

    /// The names of all destinations that were ever sent to, as far as they are remembered.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn destination_names(&self) -> Result<Vec<String>, Error> {
        let sql = "SELECT name FROM destinations UNION
            SELECT destination FROM day_sums
            WHERE attempts + delivered + failed > 0 AND destination <> 'forgotten'";
        let mut statement = self.connection.prepare_cached(sql)?;
        let names = statement.query_map([], |row| row.get(0))?;
        Ok(names.collect::<Result<_, _>>()?)
    }

    /// Looks an export up, with its payload if `payload`.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn find(&self, id: Uuid, payload: bool) -> Result<Option<Found>, Error> {
        let sql = "SELECT queue, owner, peer, destination, finished_at IS NOT NULL, iif(?2, payload, NULL)
            FROM exports JOIN queues ON queues.id = queue WHERE exports.id = ?1";
        let mut statement = self.connection.prepare_cached(sql)?;
        let found = statement.query_row(params![id, payload], |row| {
            Ok(Found {
                queue: row.get(0)?,
                who: who(&row.get::<_, Vec<u8>>(1)?, &row.get::<_, String>(2)?),
                url: row.get(3)?,
                is_finished: row.get(4)?,
                payload: row.get(5)?,
            })
        });
        Ok(found.optional()?)
    }

    /// The position behind which exports that are accepted from now on will stand.
    pub fn last_turn(&self) -> i64 {
        self.last_turn
    }

    /// Up to [`STEP`] unfinished exports of a queue from behind one position up to another, or only the one with
    /// this id.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn waiting(
        &self,
        queue: QueueId,
        after: i64,
        until: i64,
        only: Option<Uuid>,
    ) -> Result<Vec<Waiting>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT seq, id, attempts FROM exports
             WHERE queue = ? AND turn > ? AND turn <= ? AND finished_at IS NULL
                 AND (?4 IS NULL OR id = ?4) ORDER BY turn LIMIT ?5",
        )?;
        let step = i64::try_from(STEP).unwrap_or(i64::MAX);
        let waiting = statement.query_map(params![queue, after, until, only, step], |row| {
            Ok(Waiting {
                seq: row.get(0)?,
                id: row.get(1)?,
                attempts: row.get(2)?,
            })
        })?;
        Ok(waiting.collect::<Result<_, _>>()?)
    }

    /// Adds a pause, or changes its end if it is in force already.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn pause(&mut self, pause: &Pause, entry: &Entry) -> Result<(), Error> {
        self.change(std::slice::from_ref(entry), |transaction| {
            transaction.execute(
                "INSERT INTO pauses VALUES (?, ?, ?)
                 ON CONFLICT DO UPDATE SET until = excluded.until",
                params![pause.subject, pause.since, pause.until],
            )?;
            Ok(())
        })
    }

    /// Removes a pause. These queues, which it held, are resumed at this running time.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn resume(
        &mut self,
        subject: &str,
        queues: &[QueueId],
        running: Millis,
        entry: &Entry,
    ) -> Result<(), Error> {
        self.change(std::slice::from_ref(entry), |transaction| {
            transaction.execute("DELETE FROM pauses WHERE subject = ?", [subject])?;
            let mut resume =
                transaction.prepare_cached("UPDATE queues SET resumed_at = ? WHERE id = ?")?;
            for queue in queues {
                resume.execute(params![running, queue])?;
            }
            // A running time that is stored is never later than the one that was.
            Ok(save_running(transaction, running)?)
        })?;
        self.running = running;
        Ok(())
    }

    /// Finishes exports of a queue without an attempt, each with its own result. With `forget_backoff` the queue has
    /// none left. `now` is in Unix milliseconds.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn cancel(
        &mut self,
        queue: QueueId,
        cancelled: &[(Waiting, Arc<RawValue>)],
        forget_backoff: bool,
        entries: &[Entry],
        now: i64,
    ) -> Result<(), Error> {
        let at = now.saturating_add(self.clock_offset);
        self.change(entries, |transaction| {
            for (export, response) in cancelled {
                transaction
                    .prepare_cached(
                        "UPDATE exports SET payload = NULL, finished_at = ?, response = ?
                         WHERE seq = ? AND id = ?",
                    )?
                    .execute(params![at, response.get(), export.seq, export.id])?;
            }
            if forget_backoff {
                transaction.execute(
                    "UPDATE queues SET failures = 0, next_attempt_at = 0, failing_since = 0,
                         last_error = NULL
                     WHERE id = ?",
                    [queue],
                )?;
            }
            Ok(())
        })
    }

    /// Deletes results of these queues, from behind this row on. Returns how many, and where to go on; None at the
    /// end.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn delete_results(
        &mut self,
        queues: &HashSet<QueueId>,
        after: i64,
    ) -> Result<(usize, Option<i64>), Error> {
        let transaction = self.connection.transaction()?;
        let (mut seen, mut last, mut found) = (0, after, Vec::new());
        {
            let mut statement = transaction.prepare_cached(
                "SELECT seq, queue, finished_at IS NOT NULL FROM exports
                 WHERE seq > ? ORDER BY seq LIMIT ?",
            )?;
            let mut rows = statement.query(params![after, WINDOW])?;
            while found.len() < STEP
                && let Some(row) = rows.next()?
            {
                seen += 1;
                last = row.get(0)?;
                let queue = row.get(1)?;
                if row.get(2)? && queues.contains(&queue) {
                    found.push((last, queue));
                }
            }
        }
        super::writing::delete(&transaction, &found)?;
        let is_end = seen < WINDOW && found.len() < STEP;
        transaction.commit()?;
        Ok((found.len(), (!is_end).then_some(last)))
    }

    /// Names a sender; an empty label takes its name away.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn label(&mut self, who: &str, label: &str, entry: &Entry) -> Result<(), Error> {
        self.change(std::slice::from_ref(entry), |transaction| {
            match label {
                "" => transaction.execute("DELETE FROM labels WHERE who = ?", [who])?,
                label => transaction.execute(
                    "INSERT INTO labels VALUES (?, ?)
                     ON CONFLICT DO UPDATE SET label = excluded.label",
                    [who, label],
                )?,
            };
            Ok(())
        })
    }

    /// Notes that the owner knows these destinations.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn seen(&mut self, names: &[String], entries: &[Entry]) -> Result<(), Error> {
        self.change(entries, |transaction| {
            for (name, entry) in names.iter().zip(entries) {
                transaction.execute(
                    "INSERT INTO destinations VALUES (?1, ?2, ?2)
                     ON CONFLICT DO UPDATE SET seen_at = excluded.seen_at",
                    params![name, entry.at],
                )?;
            }
            Ok(())
        })
    }

    /// Removes labels of senders and names of destinations that match.
    ///
    /// # Errors
    /// Nothing was written.
    pub fn forget_names(
        &mut self,
        matches: impl Fn(&str, &str) -> bool,
        entry: &Entry,
    ) -> Result<(), Error> {
        self.change(std::slice::from_ref(entry), |transaction| {
            for (select, delete, is_sender) in [
                (
                    "SELECT who FROM labels",
                    "DELETE FROM labels WHERE who = ?",
                    true,
                ),
                (
                    "SELECT name FROM destinations",
                    "DELETE FROM destinations WHERE name = ?",
                    false,
                ),
            ] {
                let names = transaction
                    .prepare_cached(select)?
                    .query_map([], |row| row.get(0))?
                    .collect::<Result<Vec<String>, _>>()?;
                let is_meant = |name: &str| match is_sender {
                    true => matches(name, ""),
                    false => matches("", name),
                };
                for name in names.iter().filter(|name| is_meant(name)) {
                    transaction.execute(delete, [name])?;
                }
            }
            Ok(())
        })
    }

    /// Makes a change and appends rows to the ledger, in one commit.
    fn change(
        &mut self,
        entries: &[Entry],
        change: impl FnOnce(&Transaction<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let at = entries.first().map_or(0, |entry| entry.at);
        self.change_ledger(|appending, transaction, ledger| {
            change(transaction)?;
            for entry in entries {
                appending.record(transaction, ledger, entry)?;
            }
            appending.finish(transaction, ledger, at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exports::store::Place;
    use crate::ledger::Event;

    #[test]
    fn a_pause_of_this_run_moves_with_the_clock_and_an_older_one_does_not() {
        let mut store = Store::open(&Place::Memory).unwrap();
        let pause = |subject: &str, since, until| Pause {
            subject: subject.into(),
            since,
            until,
        };
        let entry = Entry::new(Event::Pause, 0);
        store
            .pause(&pause("all", 500, Some(5_000)), &entry)
            .unwrap();
        store
            .pause(&pause("who:me", 1_500, Some(2_500)), &entry)
            .unwrap();
        store.clock_was_set(1_000, 2_000, 90_000).unwrap();
        let expected = [
            pause("all", 500, Some(5_000)),
            pause("who:me", 91_500, Some(92_500)),
        ];
        assert_eq!(store.pauses().unwrap(), expected);
        // Another end for the one that is in force.
        store.pause(&pause("all", 3_000, None), &entry).unwrap();
        assert_eq!(store.pauses().unwrap()[0], pause("all", 500, None));
    }

    #[test]
    fn only_results_of_the_queues_that_are_meant_are_deleted_in_steps() {
        let mut store = Store::open(&Place::Memory).unwrap();
        store.tamper(
            "INSERT INTO queues (id, owner, destination, exports) VALUES (1, x'01', 'a', 300), (2, x'02', 'a', 300);
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 600)
             INSERT INTO exports (id, queue, turn, accepted_at, running_at, finished_at)
             SELECT cast(i AS BLOB), 1 + i % 2, i, 0, 0, iif(i <= 500, 0, NULL) FROM n;",
        );
        let (mut deleted, mut steps, mut after) = (0, 0, Some(i64::MIN));
        while let Some(from) = after {
            let step = store.delete_results(&HashSet::from([2]), from).unwrap();
            assert!(step.0 <= STEP);
            (deleted, steps, after) = (deleted + step.0, steps + 1, step.1);
        }
        assert_eq!((deleted, steps), (250, 3));
        let left = |sql| value::<i64>(&store.connection, sql, []).unwrap();
        assert_eq!(
            left("SELECT count(*) FROM exports WHERE queue = 1"),
            Some(300)
        );
        assert_eq!(
            left("SELECT count(*) FROM exports WHERE queue = 2"),
            Some(50)
        );
        assert_eq!(left("SELECT exports FROM queues WHERE id = 2"), Some(50));
    }
}
