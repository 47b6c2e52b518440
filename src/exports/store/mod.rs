//! The store on disk, which is the queue too. It holds every export from its acceptance until its result
//! expires. All SQL is here and in the modules below.
//!
//! SQLite in WAL mode with `synchronous=FULL`: a commit that returned survives loss of power.
//! One [`Store`] owns the only connection that changes rows. [`Reader`]s see committed rows only, and in
//! a file never wait for it. Payloads are overwritten with zeros once an export is finished.
//!
//! Not here: which thread writes when, and what memory holds (`exports`).

pub mod acts;
mod copying;
pub mod evidence;
pub mod flows;
mod folder;
mod ledger;
mod opening;
pub mod overview;
mod reading;
mod schema;
mod wal;
mod writing;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicI32;

use rusqlite::{Connection, ErrorCode};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::destination::Destination;
use crate::export::{self, Backoff, QueueId};
use crate::ledger::Entry;
use crate::memory::Reservation;
pub use ledger::Limits as LedgerLimits;
pub use opening::cannot_repair;
pub use reading::{Queued, Reader, Stored};
pub use writing::wal_size;

/// The file's name in the data folder.
pub const FILE: &str = "exports.db";

/// The write-ahead log (WAL) is restarted at about this many bytes, unless another process reads the store.
pub const ORDINARY_WAL: u64 = 4 * 1024 * 1024;
/// The same in pages.
const ORDINARY_WAL_PAGES: i32 = 1024;

/// Where the store is.
#[derive(Clone, Debug)]
pub enum Place {
    /// In this folder, which is created if it does not exist.
    Folder(PathBuf),
    /// In memory, lost with the process (`--ephemeral`).
    Memory,
}

impl Place {
    /// The folder; none for memory.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(folder) => Some(folder),
            Self::Memory => None,
        }
    }
}

/// Why the store could not be opened; the text says what to do.
#[derive(Debug)]
pub struct OpenError(String);

impl std::fmt::Display for OpenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a statement was not carried out.
#[derive(Debug)]
pub enum Error {
    /// There is no room left on the disk.
    Full,
    /// A page of the file makes no sense to SQLite, or a row holds what no version of this program writes.
    Damaged,
    /// Another process has the store open, and is in the way.
    InUse,
    /// Anything else SQLite reports.
    Failed(rusqlite::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("the disk is full"),
            Self::Damaged => f.write_str("the store is damaged"),
            Self::InUse => f.write_str("somebody else reads the store"),
            Self::Failed(error) => write!(f, "{error}"),
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull => Self::Full,
            _ => Self::Failed(rusqlite::Error::ToSqlConversionFailure(error.into())),
        }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            // No statement of this program violates a constraint or reads a value that is too long, unless a
            // row or an index is damaged.
            Some(
                ErrorCode::DatabaseCorrupt | ErrorCode::ConstraintViolation | ErrorCode::TooBig,
            ) => Self::Damaged,
            Some(_) => Self::Failed(error),
            None => match error {
                // The tables are strict, so no statement can have written such a value.
                rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::InvalidColumnType(..)
                | rusqlite::Error::Utf8Error(..) => Self::Damaged,
                error => Self::Failed(error),
            },
        }
    }
}

/// A new export, to be written.
pub struct NewExport {
    /// Its public id.
    pub id: Uuid,
    /// The identifier of the macaroon it came with.
    pub owner: Vec<u8>,
    /// The client's IP address if the owner is empty, else nothing.
    pub peer: String,
    /// With the owner and the peer, this determines its queue.
    pub destination: Destination,
    /// Stored until the export is finished.
    pub payload: Vec<u8>,
    /// Unix milliseconds.
    pub accepted_at: i64,
    /// The same moment in running time.
    pub running: i64,
    /// The idempotency key, if the submission had one.
    pub key: Option<IdempotencyKey>,
}

/// A client's key for a submission, and the digest of what was submitted under it.
pub struct IdempotencyKey {
    /// 1 to 255 visible ASCII characters.
    pub key: String,
    /// SHA-256 of destination and payload: tells a repeat from another submission under the same key.
    pub fingerprint: [u8; 32],
}

/// One thing for [`Store::commit`] to write.
pub enum Change<'a> {
    /// A new export.
    Accept(&'a NewExport),
    /// What came of an attempt on an export, or that it was given up.
    Report(&'a Report),
}

/// What came of an export, to be written.
pub struct Report {
    /// Its public id.
    pub id: Uuid,
    /// Its row. Nothing is written if that has another id by now.
    pub seq: i64,
    /// The queue it is in.
    pub queue: QueueId,
    /// Its result, or that it is tried again.
    pub update: ExportUpdate,
    /// What that says about its queue.
    pub queue_update: QueueUpdate,
    /// What the ledger is to say of it.
    pub entries: Vec<Entry>,
}

/// What changes in an export's row.
pub enum ExportUpdate {
    /// It is finished.
    Finished {
        /// The `ext_response` object.
        response: Arc<RawValue>,
        /// The part of the shared response memory that it takes until it is written.
        memory: Option<Reservation>,
        /// Whether its queue is paused until this is in the store.
        resumes: bool,
    },
    /// An attempt failed, and there will be another.
    Rescheduled {
        /// How often it was tried.
        attempts: u32,
        /// Why the last attempt failed: `kind` and `message`.
        error: Arc<RawValue>,
        /// Whether it moves to the end of its queue.
        to_end: bool,
        /// When it first moved there, in running time.
        first_moved_at: Option<i64>,
    },
}

/// What changes in a queue's row.
pub enum QueueUpdate {
    /// Nothing.
    AsBefore,
    /// It is no longer failing, or has no exports left.
    Recovered,
    /// Its last attempt failed: its backoff, and `kind` and `message` of the failure.
    Failing(Backoff, Arc<RawValue>),
}

/// What became of a [`Change`].
pub enum Effect {
    /// The change was written. The export belongs to this queue.
    Written(QueueId),
    /// The idempotency key was used before for the same submission, which is this export.
    Repeat(Uuid, Stored),
    /// The idempotency key was used before for another submission. Nothing was written.
    Conflict,
    /// There is no room for it, and why. Nothing was written.
    NoRoom(export::Error),
}

/// The only connection that changes rows. Dropping it releases the folder for another process.
///
/// Times are passed in and out as the process counts them, unaffected by a clock that is set, and are
/// stored by the wall clock: see [`Store::clock_was_set`].
pub struct Store {
    connection: Connection,
    /// By how many milliseconds the wall clock is ahead of the process's count.
    clock_offset: i64,
    /// The running time that was stored last.
    running: i64,
    /// The highest position that an export was given.
    last_turn: i64,
    ledger: ledger::Ledger,
    /// How many pages the WAL had after the last commit.
    wal_pages: Arc<AtomicI32>,
    /// The file, or a URI for a database in memory.
    path: PathBuf,
    /// The locked folder, and the files that SQLite has open in it. None for a database in memory.
    on_disk: Option<(folder::Folder, opening::Files)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_export(owner: &str, key: Option<&str>, content: u8) -> NewExport {
        NewExport {
            id: Uuid::now_v7(),
            owner: owner.into(),
            peer: String::new(),
            destination: Destination::parse("https://a.example/").unwrap(),
            payload: vec![content],
            accepted_at: 0,
            running: i64::from(content),
            key: key.map(|key| IdempotencyKey {
                key: key.into(),
                fingerprint: [content; 32],
            }),
        }
    }

    fn accept(store: &mut Store, exports: &[NewExport]) -> Vec<Effect> {
        let changes: Vec<_> = exports.iter().map(Change::Accept).collect();
        store.commit(&changes, 0, 0, |_, _, _| Ok(())).unwrap()
    }

    fn report(store: &mut Store, queued: &Queued, queue: QueueId, update: ExportUpdate, now: i64) {
        let report = Report {
            id: queued.id,
            seq: queued.seq,
            queue,
            update,
            queue_update: QueueUpdate::AsBefore,
            entries: Vec::new(),
        };
        let changes = [Change::Report(&report)];
        store.commit(&changes, now, 0, |_, _, _| Ok(())).unwrap();
    }

    fn finished() -> ExportUpdate {
        ExportUpdate::Finished {
            response: RawValue::from_string("{}".into()).unwrap().into(),
            memory: None,
            resumes: false,
        }
    }

    fn moved(at: i64) -> ExportUpdate {
        ExportUpdate::Rescheduled {
            attempts: 1,
            error: RawValue::from_string("{}".into()).unwrap().into(),
            to_end: true,
            first_moved_at: Some(at),
        }
    }

    #[test]
    fn only_what_is_written_needs_room() {
        let mut store = Store::open(&Place::Memory).unwrap();
        let exports = [
            new_export("me", Some("k"), 1),
            new_export("me", Some("k"), 1),
            new_export("me", Some("k"), 2),
            new_export("me", None, 3),
            new_export("you", Some("k"), 4),
        ];
        let changes: Vec<_> = exports.iter().map(Change::Accept).collect();
        let mut asked = Vec::new();
        let effects = store
            .commit(&changes, 0, 0, |export, queue, added| {
                asked.push((export.payload[0], queue.is_some(), added));
                match export.payload[0] {
                    4 => Err(export::Error::StoreFull),
                    _ => Ok(()),
                }
            })
            .unwrap();
        assert_eq!(asked, [(1, false, 0), (3, true, 1), (4, false, 0)]);
        assert!(matches!(
            effects[..],
            [
                Effect::Written(_),
                Effect::Repeat(..),
                Effect::Conflict,
                Effect::Written(_),
                Effect::NoRoom(export::Error::StoreFull)
            ]
        ));
    }

    #[test]
    fn a_queue_is_read_in_its_order_and_its_oldest_is_found_wherever_it_was_moved() {
        let mut store = Store::open(&Place::Memory).unwrap();
        let exports = [1, 2, 3].map(|content| new_export("me", None, content));
        let effects = accept(&mut store, &exports);
        let Effect::Written(queue) = effects[0] else {
            panic!("refused");
        };
        accept(&mut store, &[new_export("you", None, 9)]);
        let reader = store.reader().unwrap();
        let order = |reader: &Reader| {
            let mut after = i64::MIN;
            let next = || {
                let next = reader.next(queue, after).unwrap()?;
                after = next.turn;
                next.payload
            };
            std::iter::from_fn(next).flatten().collect::<Vec<_>>()
        };
        assert_eq!(order(&reader), [1, 2, 3]);
        let first = reader.next(queue, i64::MIN).unwrap().unwrap();
        let (oldest, is_first) = reader.oldest(queue, i64::MIN).unwrap().unwrap();
        assert!(is_first && oldest.id == first.id && oldest.payload.is_none());

        report(&mut store, &first, queue, moved(7), 0);
        assert_eq!(order(&reader), [2, 3, 1]);
        accept(&mut store, &[new_export("me", None, 4)]);
        assert_eq!(order(&reader), [2, 3, 1, 4]);
        let (oldest, is_first) = reader.oldest(queue, i64::MIN).unwrap().unwrap();
        assert!(!is_first && oldest.id == first.id);
        assert_eq!((oldest.attempts, oldest.first_moved_at), (1, Some(7)));
        // What was taken already does not count.
        let (oldest, is_first) = reader.oldest(queue, oldest.turn).unwrap().unwrap();
        assert!(is_first && oldest.accepted_at == 4);
    }

    #[test]
    fn a_key_whose_fingerprint_was_removed_is_refused_for_any_submission() {
        let mut store = Store::open(&Place::Memory).unwrap();
        let export = [new_export("me", Some("k"), 1)];
        accept(&mut store, &export);
        let removed = "UPDATE exports SET fingerprint = NULL";
        store.connection.execute(removed, []).unwrap();
        assert!(matches!(
            accept(&mut store, &export)[..],
            [Effect::Conflict]
        ));
    }

    #[test]
    fn positions_behind_which_no_export_would_be_found_are_given_anew() {
        for strange in ["9223372036854775807", "-9223372036854775808", "-1"] {
            let folder = tempfile::tempdir().unwrap();
            let place = Place::Folder(folder.path().to_owned());
            let mut store = Store::open(&place).unwrap();
            let exports = [1, 2].map(|content| new_export("me", None, content));
            accept(&mut store, &exports);
            let moved = format!("UPDATE exports SET turn = {strange} WHERE seq = 2");
            store.connection.execute(&moved, []).unwrap();
            drop(store);
            let mut store = Store::open(&place).unwrap();
            store.repaired(|store| store.queues(|_, _| {})).unwrap();
            accept(&mut store, &[new_export("me", None, 3)]);
            let reader = store.reader().unwrap();
            let (mut after, mut found) = (-1, Vec::new());
            while let Some(next) = reader.next(1, after).unwrap() {
                after = next.turn;
                found.extend(next.payload.unwrap());
            }
            assert_eq!(found.len(), 3, "{strange}");
            assert_eq!(found[2], 3, "{strange}");
        }
    }

    #[test]
    fn a_value_that_the_tables_do_not_take_costs_only_its_own_payload() {
        for damage in [
            "attempts = NULL",
            "first_moved_at = 'text'",
            "idempotency_key = x'00'",
            "fingerprint = 'text'",
            "payload = 'text'",
        ] {
            let folder = tempfile::tempdir().unwrap();
            let place = Place::Folder(folder.path().to_owned());
            let mut store = Store::open(&place).unwrap();
            accept(
                &mut store,
                &[1, 2, 3].map(|content| new_export("me", None, content)),
            );
            // Damage to the file can put any value into any column.
            let file = store.path.clone();
            drop(store);
            for sql in [
                "UPDATE sqlite_schema SET sql = replace(replace(sql, 'STRICT', ''), 'NOT NULL', '')
                 WHERE name = 'exports'",
                &format!("UPDATE exports SET {damage} WHERE seq = 2"),
            ] {
                let raw = Connection::open(&file).unwrap();
                raw.pragma_update(None, "writable_schema", true).unwrap();
                raw.execute(sql, []).unwrap();
            }
            let mut store = Store::open(&place).unwrap();
            store.repair(&mut []).unwrap();
            let reader = store.reader().unwrap();
            let (mut after, mut payloads) = (-1, Vec::new());
            while let Some(next) = reader.next(1, after).unwrap() {
                after = next.turn;
                payloads.push(next.payload);
            }
            assert_eq!(payloads, [Some(vec![1]), None, Some(vec![3])], "{damage}");
        }
    }

    #[test]
    fn a_damaged_running_time_is_found_again_from_the_exports() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::Folder(folder.path().to_owned());
        let mut store = Store::open(&place).unwrap();
        accept(&mut store, &[new_export("me", None, 7)]);
        let file = store.path.clone();
        drop(store);
        for sql in [
            "UPDATE sqlite_schema SET sql = replace(sql, 'NOT NULL', '') WHERE name = 'running'",
            "UPDATE running SET millis = NULL",
            "UPDATE sqlite_schema SET sql = replace(sql, ' INTEGER ', ' INTEGER NOT NULL ')
             WHERE name = 'running'",
        ] {
            let raw = Connection::open(&file).unwrap();
            raw.pragma_update(None, "writable_schema", true).unwrap();
            raw.execute(sql, []).unwrap();
        }
        let store = Store::open(&place).unwrap();
        assert_eq!(store.running(), 7);
        let next = store.reader().unwrap().next(1, i64::MIN).unwrap().unwrap();
        assert_eq!(next.payload, Some(vec![7]));
    }

    #[test]
    fn a_queue_is_forgotten_with_its_last_export() {
        let mut store = Store::open(&Place::Memory).unwrap();
        let effects = accept(
            &mut store,
            &[1, 2].map(|content| new_export("me", None, content)),
        );
        let Effect::Written(queue) = effects[0] else {
            panic!("refused");
        };
        let queues = |store: &Store| -> i64 {
            let count = "SELECT count(*) FROM queues";
            store
                .connection
                .query_row(count, [], |row| row.get(0))
                .unwrap()
        };
        for left in [1, 0] {
            let reader = store.reader().unwrap();
            let next = reader.next(queue, i64::MIN).unwrap().unwrap();
            report(&mut store, &next, queue, finished(), 5);
            assert_eq!(store.expire(5).unwrap(), (1, None));
            assert_eq!(queues(&store), left);
        }
        // Its number is never another's.
        let effects = accept(&mut store, &[new_export("you", None, 1)]);
        assert!(matches!(effects[..], [Effect::Written(other)] if other != queue));
    }

    #[test]
    fn a_report_of_a_row_that_is_now_anothers_changes_nothing() {
        let mut store = Store::open(&Place::Memory).unwrap();
        let exports = [1, 2].map(|content| new_export("me", None, content));
        accept(&mut store, &exports);
        let reader = store.reader().unwrap();
        let mut next = reader.next(1, i64::MIN).unwrap().unwrap();
        next.id = Uuid::now_v7();
        report(&mut store, &next, 1, finished(), 0);
        assert_eq!(
            reader.next(1, i64::MIN).unwrap().unwrap().payload,
            Some(vec![1])
        );
    }

    #[test]
    fn what_was_stored_by_a_wrong_clock_is_corrected_with_it() {
        use crate::export::DAY;
        let mut store = Store::open(&Place::Memory).unwrap();
        let times = |store: &Store| {
            let mut statement = store
                .connection
                .prepare("SELECT accepted_at, finished_at FROM exports ORDER BY seq")
                .unwrap();
            statement
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
                .unwrap()
                .collect::<Result<Vec<(i64, Option<i64>)>, _>>()
                .unwrap()
        };
        let submit = |store: &mut Store, accepted_at, finished_at| {
            let export = NewExport {
                accepted_at,
                ..new_export("me", None, 1)
            };
            accept(store, &[export]);
            if finished_at > 0 {
                let next = store.reader().unwrap().next(1, i64::MIN).unwrap().unwrap();
                report(store, &next, 1, finished(), finished_at);
            }
        };
        // One of an earlier run, by the right time; then two of this one, whose clock is three days behind.
        submit(&mut store, 100 * DAY, 100 * DAY + 1);
        let start = 101 * DAY;
        submit(&mut store, start + 2, start + 3);
        submit(&mut store, start + 4, start + 5);
        store.clock_was_set(start, start + 6, 3 * DAY).unwrap();
        submit(&mut store, start + 7, 0);
        let right = 104 * DAY;
        assert_eq!(
            times(&store),
            [
                (100 * DAY, Some(100 * DAY + 1)),
                (right + 2, Some(right + 3)),
                (right + 4, Some(right + 5)),
                (right + 7, None),
            ]
        );
        // Expiry goes by the process's count: what is older by the right time goes, and nothing else.
        assert_eq!(store.expire(start - DAY).unwrap(), (1, Some(start + 3)));

        // Set back to before everything: nothing is left in the future.
        store.clock_was_set(start, start + 8, -50 * DAY).unwrap();
        let now = right + 8 - 50 * DAY;
        assert!(
            times(&store)
                .iter()
                .all(|(_, finished)| *finished <= Some(now))
        );
    }

    #[test]
    fn commits_reach_the_disk_and_what_is_deleted_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&Place::Folder(folder.path().join("new"))).unwrap();
        let pragma = |name: &str| {
            let value = |row: &rusqlite::Row<'_>| row.get::<_, rusqlite::types::Value>(0);
            store
                .connection
                .pragma_query_value(None, name, value)
                .unwrap()
        };
        // 2 is FULL: the WAL is synced at every commit.
        assert_eq!(pragma("synchronous"), 2.into());
        assert_eq!(pragma("journal_mode"), "wal".to_owned().into());
        assert_eq!(pragma("secure_delete"), 1.into());
        assert!(!store.is_wal_long());
    }
}
