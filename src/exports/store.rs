//! The store on disk: every export from its acceptance until its result expires. All SQL is here.
//!
//! SQLite in WAL mode with `synchronous=FULL`: a commit that returned survives loss of power.
//! One [`Writer`] owns the only writing connection; [`Reader`]s see committed rows only and, in a
//! file, are never held up by the writer. Payloads are overwritten with zeros once an export is finished.
//!
//! Not here: which thread writes when, and what is kept in memory (`exports`).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, named_params, params,
};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::destination::{BadUrl, Destination};
use crate::export::{self, Backoff};
use crate::exports::folder::{Folder, beside};
use crate::exports::salvage;
use crate::exports::wal::{LeftOut, Log};
use crate::memory::Reservation;

/// The file's name in the data folder.
pub const FILE: &str = "exports.db";

/// "EXPS", so that `file` and SQLite itself can tell whose database this is.
const APPLICATION_ID: i32 = 0x4558_5053;

/// What the tables look like: how many of [`STEPS`] a file has behind it.
const SCHEMA_VERSION: i32 = 2;

/// What brings a file from each version to the next; a new one goes all the way, so that all look
/// alike. A change to the tables adds a step.
const STEPS: [&str; SCHEMA_VERSION as usize] = [VERSION_1, VERSION_2];

/// `payload` is null once finished, `finished_at` and `response` are null before. `accepted_at` and
/// `finished_at` are Unix milliseconds by the wall clock. `attempts` and `last_error` are the
/// export's own. `turn` stands for `seq` in the order of delivery once the export was moved to the
/// end of its queue, which happened at `moved_at`. `fingerprint` tells a repeat of the same
/// submission from another one under the same idempotency key, when the payload itself is gone
/// already. `failures` and `next_attempt_at` are not used since version 2.
const VERSION_1: &str = "
    CREATE TABLE exports (
        seq             INTEGER PRIMARY KEY,
        id              TEXT NOT NULL UNIQUE,
        owner           BLOB NOT NULL,
        destination     TEXT NOT NULL,
        payload         BLOB,
        accepted_at     INTEGER NOT NULL,
        finished_at     INTEGER,
        response        TEXT,
        attempts        INTEGER NOT NULL DEFAULT 0,
        last_error      TEXT,
        failures        INTEGER NOT NULL DEFAULT 0,
        next_attempt_at INTEGER,
        turn            INTEGER,
        moved_at        INTEGER,
        idempotency_key TEXT,
        fingerprint     BLOB
    ) STRICT;
    CREATE INDEX unfinished ON exports (seq) WHERE finished_at IS NULL;
    CREATE INDEX finished ON exports (finished_at) WHERE finished_at IS NOT NULL;
    CREATE INDEX delayed ON exports (owner, destination) WHERE failures > 0;
    CREATE UNIQUE INDEX repeats ON exports (owner, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
";

/// Times from here on are running time, in milliseconds: see `Exports::running`. It is kept in
/// `running`; `running_at` is when the export was accepted, `first_moved_at` and now `moved_at` when
/// it was moved to the end of its queue. `queues` has those whose last attempt failed. Only columns
/// that cost nothing are added, as a large file must be taken over on a disk that is almost full.
///
/// Waits that a file of version 1 has were stored by the wall clock, which may have been wrong then.
const VERSION_2: &str = "
    ALTER TABLE exports ADD COLUMN running_at INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE exports ADD COLUMN first_moved_at INTEGER;
    CREATE TABLE running (millis INTEGER NOT NULL) STRICT;
    INSERT INTO running VALUES (0);
    CREATE TABLE queues (
        owner           BLOB NOT NULL,
        destination     TEXT NOT NULL,
        failures        INTEGER NOT NULL,
        next_attempt_at INTEGER NOT NULL,
        failing_since   INTEGER NOT NULL,
        last_error      TEXT,
        PRIMARY KEY (owner, destination)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO queues
        SELECT owner, destination, failures,
            min(max(latest - unixepoch() * 1000, 0), 3600000), 0, last_error
        FROM (SELECT owner, destination, failures, last_error,
                  max(coalesce(next_attempt_at, 0)) AS latest
              FROM exports WHERE failures > 0 AND finished_at IS NULL
              GROUP BY owner, destination);
    UPDATE exports SET moved_at = moved_at - (SELECT max(moved_at) FROM exports)
        WHERE moved_at IS NOT NULL;
    DROP INDEX delayed;
    DROP INDEX repeats;
    CREATE UNIQUE INDEX repeats ON exports (owner, destination, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
";

/// The running time is stored with any commit when so much of it has passed, in milliseconds.
const RUNNING_STEP: i64 = 10_000;

/// Rows deleted in one go once they expired: a few milliseconds even on an SD card.
const EXPIRY_STEP: u32 = 100;

/// SQLite begins its log anew at about this many bytes, unless somebody reads the store.
pub const ORDINARY_LOG: u64 = 4 * 1024 * 1024;

/// How long a connection waits for another's lock. Only a checkpoint, or a second connection in
/// `--ephemeral` mode, ever holds one.
const BUSY: Duration = Duration::from_secs(10);

/// How the writer opens the store; a file exists by then, a database in memory does not.
const WRITING: OpenFlags = OpenFlags::SQLITE_OPEN_READ_WRITE.union(OpenFlags::SQLITE_OPEN_CREATE);

/// How the URI of a database in memory begins; paths of files are absolute, so none begins so.
const MEMORY: &str = "file:";

/// Where the exports are kept.
#[derive(Clone, Debug)]
pub enum Place {
    /// In this folder, which is created where it does not exist.
    Folder(PathBuf),
    /// In memory, lost with the process (`--ephemeral`).
    Memory,
}

impl Place {
    /// The folder, if it is one.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(folder) => Some(folder),
            Self::Memory => None,
        }
    }
}

/// Why the store could not be opened; the text says what to do.
#[derive(Debug)]
pub struct OpenError(pub(super) String);

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
    /// A page of the file cannot be made sense of, or a row holds what no version of this program
    /// writes.
    Damaged,
    /// Somebody else has the store open, and is in the way.
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
            Some(ErrorCode::DatabaseCorrupt) => Self::Damaged,
            Some(_) => Self::Failed(error),
            None => match error {
                // The tables are strict: no such value gets into them by a statement.
                rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::InvalidColumnType(..)
                | rusqlite::Error::Utf8Error(..) => Self::Damaged,
                error => Self::Failed(error),
            },
        }
    }
}

/// A new export as it goes into the store.
pub struct NewExport {
    /// Its public id.
    pub id: Uuid,
    /// The identifier of the macaroon it came with.
    pub owner: Vec<u8>,
    /// Where it goes.
    pub destination: Destination,
    /// What goes there.
    pub payload: Vec<u8>,
    /// Unix milliseconds.
    pub accepted_at: i64,
    /// The same in running time.
    pub running: i64,
    /// The idempotency key, if the submission had one.
    pub key: Option<IdempotencyKey>,
}

/// A client's key for a submission, and the digest of what was submitted under it.
pub struct IdempotencyKey {
    /// 1 to 255 visible ASCII characters.
    pub key: String,
    /// Tells whether a second submission under the key is the same one.
    pub fingerprint: [u8; 32],
}

/// One thing for [`Writer::commit`] to write down.
pub enum Change<'a> {
    /// A new export.
    Accept(&'a NewExport),
    /// News of an export that was accepted before.
    Report(&'a Report),
}

/// What became of an export, to be written down.
pub struct Report {
    /// Which export.
    pub id: Uuid,
    /// Its result, or that it is tried again.
    pub news: News,
    /// What is known of its queue by that.
    pub queue: QueueNews,
}

/// See [`Report`].
pub enum News {
    /// It is finished.
    Finished {
        /// The `ext_response` object.
        response: Arc<RawValue>,
        /// What it takes of the memory that all of them share.
        memory: Option<Reservation>,
    },
    /// An attempt failed, and there will be another.
    Postponed {
        /// How often it was tried.
        attempts: u32,
        /// Why the last attempt failed: `kind` and `message`.
        error: Arc<RawValue>,
        /// Whether it went to the end of its queue.
        to_end: bool,
        /// When it first did, in running time.
        first_moved_at: Option<i64>,
    },
}

/// See [`Report`].
pub enum QueueNews {
    /// Nothing.
    AsBefore,
    /// It is not failing, or has no exports left.
    Forgotten,
    /// Its last attempt failed: its backoff, and why.
    Failing(Backoff, Arc<RawValue>),
}

/// What became of a [`Change`].
pub enum Effect {
    /// The export is in the store, or its result is.
    Written,
    /// The idempotency key was used before for the same submission, which is this export.
    Repeat {
        /// The first export's id.
        id: Uuid,
        /// Its result, if it is finished.
        response: Option<Arc<RawValue>>,
    },
    /// The idempotency key was used before for another submission. Nothing was written.
    Conflict,
    /// There is no room for it, and why. Nothing was written.
    NoRoom(export::Error),
}

/// An export as it is found in the store.
pub struct Stored {
    /// The identifier of the macaroon it came with.
    pub owner: Vec<u8>,
    /// Where it goes or went.
    pub destination: String,
    /// Its result, if it is finished.
    pub response: Option<Arc<RawValue>>,
}

/// An export that has still to be delivered; its payload stays on disk.
pub struct Unfinished {
    /// Its public id.
    pub id: Uuid,
    /// The identifier of the macaroon it came with.
    pub owner: Vec<u8>,
    /// Where it goes.
    pub destination: Destination,
    /// When it was accepted, in running time.
    pub running: i64,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was first moved to the end of its queue, in running time.
    pub first_moved_at: Option<i64>,
    /// Why its last attempt failed.
    pub last_error: Option<Arc<RawValue>>,
    /// What its queue waits for, if that was failing.
    pub queue: Option<StoredQueue>,
}

/// A queue whose last attempt failed.
pub struct StoredQueue {
    /// Its backoff, in running time.
    pub backoff: Backoff,
    /// Why that attempt failed.
    pub error: Option<Arc<RawValue>>,
}

/// The one connection that writes. Dropping it gives the folder free for another process.
///
/// Times come and go as the process counts them, which a clock that is set does not change, and
/// are stored by the wall clock: see [`Writer::clock_was_set`].
pub struct Writer {
    connection: Connection,
    /// What the wall clock is ahead of the process's count, in milliseconds.
    clock_offset: i64,
    /// The running time as it was stored last.
    running: i64,
    /// The file, or a URI for a database in memory.
    path: PathBuf,
    /// The folder, locked, and the files that SQLite has open in it; none for a database in memory.
    on_disk: Option<(Folder, Files)>,
}

impl Writer {
    /// Opens the store, creates it where there is none, and locks it against other processes.
    ///
    /// # Errors
    /// Where the folder cannot be used, is in use, or holds what this program cannot read.
    pub fn open(place: &Place) -> Result<Self, OpenError> {
        match place {
            Place::Folder(folder) => Self::open_folder(folder),
            Place::Memory => {
                // A name of its own, so that two stores in one process (as in tests) stay apart.
                let uri = format!("{MEMORY}/{}?vfs=memdb", Uuid::now_v7());
                let path = PathBuf::from(uri);
                let (connection, running) = connect(&path, WRITING)
                    .and_then(|mut connection| {
                        let running = prepare(&mut connection)?;
                        Ok((connection, running))
                    })
                    .map_err(|error| {
                        OpenError(format!("cannot keep exports in memory: {error}"))
                    })?;
                Ok(Self {
                    connection,
                    clock_offset: 0,
                    running,
                    path,
                    on_disk: None,
                })
            }
        }
    }

    fn open_folder(folder: &Path) -> Result<Self, OpenError> {
        let mut folder = Folder::open(folder)?;
        let path = folder.database();
        let unusable = |error| folder.unusable(&error);
        let log = beside(&path, "-wal");
        let found = Log::find(&log).map_err(|error| folder.unusable(&error))?;
        let mut connection = connect(&path, WRITING).map_err(unusable)?;
        recognise(&connection, &path, folder.in_use)?;
        // SQLite has read the log by now, if there is one, and says how much of it.
        let read = connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                row.get::<_, i64>(1)
            })
            .map_err(unusable)?;
        // -1 without a log.
        warn_of_what_was_left_out(&found.left_out(read.max(0).unsigned_abs()), &log);
        let prepared = prepare_folder(&mut connection);
        let damaged = matches!(prepared, Err(PrepareError::Failed(Error::Damaged)));
        let running = match prepared {
            Err(_) if damaged => 0,
            prepared => prepared.map_err(|error| folder.unusable(&error))?,
        };
        // The log has been created, or it was before.
        folder.sync()?;
        folder.mark_in_use()?;
        let files = Files::find(&path).map_err(|error| folder.unusable(&error))?;
        let mut writer = Self {
            connection,
            clock_offset: 0,
            running,
            path,
            on_disk: Some((folder, files)),
        };
        if damaged {
            writer
                .mend([])
                .map_err(|error| OpenError(cannot_mend(&writer.path, &error)))?;
        }
        Ok(writer)
    }

    /// Puts what can still be read into a new file in place of the damaged one, which is kept beside it.
    /// Says so in the log. The readers are of this store, and are opened anew. Blocks for as long as it
    /// takes to read and write all of it.
    ///
    /// # Errors
    /// Where the new file cannot be written, or the old one is in use by somebody else. Then everything is
    /// as it was.
    pub fn mend<const COUNT: usize>(
        &mut self,
        mut readers: [&mut Reader; COUNT],
    ) -> Result<(), Error> {
        let Some((folder, files)) = self.on_disk.take() else {
            // A database in memory has no pages that go bad.
            return Err(Error::Damaged);
        };
        let done = self.mend_in(&folder, &mut readers);
        self.on_disk = Some((folder, Files::find(&self.path).unwrap_or(files)));
        done
    }

    fn mend_in(&mut self, folder: &Folder, readers: &mut [&mut Reader]) -> Result<(), Error> {
        let failed = |error: PrepareError| match error {
            PrepareError::Failed(error) => error,
            PrepareError::Setting(..) => Error::Damaged,
        };
        let version = self
            .connection
            .pragma_query_value(None, "user_version", |row| row.get::<_, i32>(0))?;
        if version != SCHEMA_VERSION {
            return Err(Error::Damaged);
        }
        let new = folder.new_database()?;
        let mut copy = connect(&new, WRITING)?;
        prepare(&mut copy)?;
        let transaction = copy.transaction()?;
        let salvaged = salvage::copy(&self.connection, &transaction, self.running)?;
        transaction.commit()?;
        copy.close().map_err(|(_, error)| error)?;

        // Empty, it can neither be taken for the new file's nor be missed by who looks at the old one.
        if !self.empty_log()? {
            return Err(Error::InUse);
        }
        // All closed before the files change places: the last to be closed removes the log.
        for reader in readers.iter_mut() {
            reader.connection = Connection::open_in_memory()?;
        }
        self.connection = Connection::open_in_memory()?;
        let replaced = folder.replace_database(&new);
        self.connection = connect(&self.path, WRITING)?;
        self.running = prepare_folder(&mut self.connection).map_err(failed)?;
        for reader in readers {
            **reader = self.reader()?;
        }
        let old = replaced?;
        folder.sync().map_err(|error| io::Error::other(error.0))?;
        for id in &salvaged.damaged {
            log::error!(id:%; "its payload or result was damaged in the store, and is lost");
        }
        for id in &salvaged.gone {
            log::error!(id = id.as_str(); "it was damaged in the store, and is lost");
        }
        log::error!(
            whole = salvaged.whole, file:% = old.display();
            "the store was damaged, and what could be read was moved to a new file; sqlite3's .recover \
             may find more in the old one, which holds payloads: remove it when it is not needed"
        );
        Ok(())
    }

    /// Opens another connection for reading.
    ///
    /// # Errors
    /// Where the file cannot be opened a second time.
    pub fn reader(&self) -> Result<Reader, Error> {
        let connection = connect(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.pragma_update(None, "cache_size", -128)?;
        Ok(Reader { connection })
    }

    /// The exports that were accepted and have no result, in the order of their delivery. Returns
    /// those whose URL an earlier version has let in and this one does not, and why.
    ///
    /// # Errors
    /// Where the store cannot be read, or holds a row that no version of this program wrote.
    pub fn unfinished(
        &self,
        mut each: impl FnMut(Unfinished),
    ) -> Result<Vec<(Uuid, BadUrl)>, Error> {
        let mut refused = Vec::new();
        let mut statement = self.connection.prepare(
            "SELECT id, owner, destination, running_at, attempts, first_moved_at,
                    exports.last_error, queues.failures, queues.next_attempt_at, failing_since,
                    queues.last_error
             FROM exports LEFT JOIN queues USING (owner, destination)
             WHERE finished_at IS NULL ORDER BY coalesce(turn, seq), moved_at",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (id, destination): (String, String) = (row.get(0)?, row.get(2)?);
            let id = id.parse().map_err(|_| Error::Damaged)?;
            let destination = match Destination::parse(&destination) {
                Ok(destination) => destination,
                Err(bad) => {
                    refused.push((id, bad));
                    continue;
                }
            };
            let queue = match row.get(7)? {
                Some(failures) => Some(StoredQueue {
                    backoff: Backoff {
                        failures,
                        not_before: row.get(8)?,
                        failing_since: row.get(9)?,
                    },
                    error: json(row.get(10)?)?,
                }),
                None => None,
            };
            each(Unfinished {
                id,
                owner: row.get(1)?,
                destination,
                running: row.get(3)?,
                attempts: row.get(4)?,
                first_moved_at: row.get(5)?,
                last_error: json(row.get(6)?)?,
                queue,
            });
        }
        Ok(refused)
    }

    /// A file that was removed or replaced, while what is written still goes to the old one.
    pub fn missing_file(&self) -> Option<&Path> {
        let (_, files) = self.on_disk.as_ref()?;
        files.missing()
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The running time as it was stored last.
    pub fn running(&self) -> i64 {
        self.running
    }

    /// Stores the running time.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn save_running(&mut self, running: i64) -> Result<(), Error> {
        save_running(&self.connection, running)?;
        self.running = running;
        Ok(())
    }

    /// How many bytes SQLite's log has; it may be larger than what is in it.
    pub fn log_size(&self) -> u64 {
        let log = fs::metadata(beside(&self.path, "-wal"));
        log.map_or(0, |log| log.len())
    }

    /// How many bytes of the disk hold exports and results; free pages of the file do not count. The
    /// log counts where it is larger than it should be: it grows for as long as somebody reads what
    /// has been changed since.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn size(&self) -> Result<u64, Error> {
        let pages = self
            .connection
            .prepare_cached(
                "SELECT (page_count - freelist_count) * page_size
                 FROM pragma_page_count, pragma_freelist_count, pragma_page_size",
            )?
            .query_row([], |row| row.get::<_, i64>(0))?;
        let log = self.log_size().saturating_sub(ORDINARY_LOG);
        Ok(pages.unsigned_abs().saturating_add(log))
    }

    /// Writes all of `changes` in one transaction and returns what became of each, in order.
    /// `has_room` is asked about each new export, but for repeats of an earlier submission, which
    /// need none. `now` are Unix milliseconds, `running` is the running time. Blocks until the disk
    /// has them: that is what a 200 to an app stands for.
    ///
    /// # Errors
    /// Nothing of it was written.
    pub fn commit(
        &mut self,
        changes: &[Change<'_>],
        now: i64,
        running: i64,
        mut has_room: impl FnMut(&NewExport) -> Result<(), export::Error>,
    ) -> Result<Vec<Effect>, Error> {
        let offset = self.clock_offset;
        let transaction = self.connection.transaction()?;
        let mut effects = Vec::with_capacity(changes.len());
        for change in changes {
            effects.push(match change {
                Change::Accept(export) => accept(&transaction, export, offset, &mut has_room)?,
                Change::Report(report) => {
                    write_report(&transaction, report, now.saturating_add(offset), running)?
                }
            });
        }
        let failing = |change: &Change<'_>| {
            matches!(change, Change::Report(report)
                if matches!(report.queue, QueueNews::Failing(..)))
        };
        // Waits are counted from the time that is stored with them.
        let save = running - self.running >= RUNNING_STEP || changes.iter().any(failing);
        if save {
            save_running(&transaction, running)?;
        }
        transaction.commit()?;
        if save {
            self.running = running;
        }
        Ok(effects)
    }

    /// Deletes some results that were finished at or before `limit` (Unix milliseconds), and says
    /// how many, and when the oldest one left was finished.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn expire(&mut self, limit: i64) -> Result<(usize, Option<i64>), Error> {
        let offset = self.clock_offset;
        let limit = limit.saturating_add(offset);
        let mut deleted = 0;
        let oldest = |connection: &Connection| {
            connection
                .prepare_cached("SELECT min(finished_at) FROM exports WHERE finished_at NOT NULL")?
                .query_row([], |row| row.get::<_, Option<i64>>(0))
        };
        if oldest(&self.connection)?.is_some_and(|finished| finished <= limit) {
            deleted = self
                .connection
                .prepare_cached(
                    "DELETE FROM exports WHERE seq IN
                     (SELECT seq FROM exports WHERE finished_at <= ? LIMIT ?)",
                )?
                .execute(params![limit, EXPIRY_STEP])?;
        }
        let oldest = oldest(&self.connection)?.map(|oldest| oldest.saturating_sub(offset));
        Ok((deleted, oldest))
    }

    /// What the wall clock is known to be ahead of the process's count, in milliseconds.
    pub fn clock_offset(&self) -> i64 {
        self.clock_offset
    }

    /// The wall clock was set forward by so many milliseconds: moves the times that were stored since
    /// the process started, and those to come. Results from a future that the clock has taken back
    /// are taken for finished now, or they would be kept until then. `started` and `now` are as the
    /// process counts them.
    ///
    /// # Errors
    /// Where the store cannot be written; then everything is as it was, and can be tried again.
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
        transaction.commit()?;
        self.clock_offset += by;
        Ok(())
    }

    /// Moves what the write-ahead log holds into the database and empties the log, which until
    /// then still has every payload in it. False where somebody who reads the file is in the way;
    /// it is not waited for.
    ///
    /// # Errors
    /// Where the store cannot be written; nothing is lost by that.
    pub fn empty_log(&mut self) -> Result<bool, Error> {
        if self.path.starts_with(MEMORY) {
            return Ok(true);
        }
        self.connection.busy_timeout(Duration::ZERO)?;
        let busy = self
            .connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
                row.get::<_, bool>(0)
            });
        self.connection.busy_timeout(BUSY)?;
        match busy {
            Ok(busy) => Ok(!busy),
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// A connection that reads, for one thread at a time.
pub struct Reader {
    connection: Connection,
}

impl Reader {
    /// Looks an export up.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn find(&self, id: Uuid) -> Result<Option<Stored>, Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT owner, destination, response FROM exports WHERE id = ?")?;
        let mut rows = statement.query([id.to_string()])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        Ok(Some(Stored {
            owner: row.get(0)?,
            destination: row.get(1)?,
            response: json(row.get(2)?)?,
        }))
    }

    /// The payload of an export that is not finished; `None` where somebody took it away.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn payload(&self, id: Uuid) -> Result<Option<Vec<u8>>, Error> {
        let payload = self
            .connection
            .prepare_cached("SELECT payload FROM exports WHERE id = ?")?
            .query_row([id.to_string()], |row| row.get(0))
            .optional()?;
        Ok(payload.flatten())
    }
}

/// JSON as it stands in a row.
fn json(text: Option<String>) -> Result<Option<Arc<RawValue>>, Error> {
    let parsed = text.map(RawValue::from_string).transpose();
    Ok(parsed.map_err(|_| Error::Damaged)?.map(Arc::from))
}

fn accept(
    transaction: &Transaction<'_>,
    export: &NewExport,
    clock_offset: i64,
    has_room: impl FnOnce(&NewExport) -> Result<(), export::Error>,
) -> Result<Effect, Error> {
    if let Some(key) = &export.key
        && let Some(earlier) = earlier(transaction, export, key)?
    {
        return Ok(earlier);
    }
    if let Err(why) = has_room(export) {
        return Ok(Effect::NoRoom(why));
    }
    transaction
        .prepare_cached(
            "INSERT INTO exports
             (id, owner, destination, payload, accepted_at, running_at, idempotency_key, fingerprint)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            export.id.to_string(),
            export.owner,
            export.destination.as_str(),
            export.payload,
            export.accepted_at.saturating_add(clock_offset),
            export.running,
            export.key.as_ref().map(|key| &key.key),
            export.key.as_ref().map(|key| key.fingerprint),
        ])?;
    Ok(Effect::Written)
}

/// What was submitted before to the same queue under the same key, if anything was.
fn earlier(
    transaction: &Transaction<'_>,
    export: &NewExport,
    key: &IdempotencyKey,
) -> Result<Option<Effect>, Error> {
    let mut statement = transaction.prepare_cached(
        "SELECT id, fingerprint, response FROM exports
         WHERE owner = ? AND destination = ? AND idempotency_key = ?",
    )?;
    let mut rows = statement.query(params![export.owner, export.destination.as_str(), key.key])?;
    let Some(row) = rows.next()? else {
        return Ok(None);
    };
    if row.get::<_, Vec<u8>>(1)? != key.fingerprint {
        return Ok(Some(Effect::Conflict));
    }
    let id = row
        .get::<_, String>(0)?
        .parse()
        .map_err(|_| Error::Damaged)?;
    Ok(Some(Effect::Repeat {
        id,
        response: json(row.get(2)?)?,
    }))
}

fn write_report(
    transaction: &Transaction<'_>,
    report: &Report,
    now: i64,
    running: i64,
) -> Result<Effect, Error> {
    let id = report.id.to_string();
    match &report.news {
        News::Finished { response, .. } => {
            transaction
                .prepare_cached(
                    "UPDATE exports SET payload = NULL, finished_at = ?, response = ? WHERE id = ?",
                )?
                .execute(params![now, response.get(), id])?;
        }
        News::Postponed {
            attempts,
            error,
            to_end,
            first_moved_at,
        } => {
            transaction
                .prepare_cached(
                    "UPDATE exports SET attempts = :attempts, last_error = :error,
                         turn = iif(:to_end, (SELECT max(seq) FROM exports), turn),
                         moved_at = iif(:to_end, :running, moved_at),
                         first_moved_at = :first_moved_at
                     WHERE id = :id",
                )?
                .execute(named_params! {
                    ":attempts": attempts,
                    ":error": error.get(),
                    ":to_end": to_end,
                    ":running": running,
                    ":first_moved_at": first_moved_at,
                    ":id": id,
                })?;
        }
    }
    match &report.queue {
        QueueNews::AsBefore => {}
        QueueNews::Forgotten => {
            transaction
                .prepare_cached(
                    "DELETE FROM queues WHERE (owner, destination) =
                         (SELECT owner, destination FROM exports WHERE id = ?)",
                )?
                .execute([id])?;
        }
        QueueNews::Failing(backoff, error) => {
            transaction
                .prepare_cached(
                    "INSERT OR REPLACE INTO queues
                     SELECT owner, destination, ?, ?, ?, ? FROM exports WHERE id = ?",
                )?
                .execute(params![
                    backoff.failures,
                    backoff.not_before,
                    backoff.failing_since,
                    error.get(),
                    id
                ])?;
        }
    }
    Ok(Effect::Written)
}

fn save_running(connection: &Connection, running: i64) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("UPDATE running SET millis = ?")?
        .execute([running])?;
    Ok(())
}

fn warn_of_what_was_left_out(left_out: &LeftOut, log: &Path) {
    match left_out {
        LeftOut::Nothing => {}
        LeftOut::Transactions => log::warn!(
            file:% = log.display();
            "SQLite's log was damaged, and only what is in front of that could be read: exports that \
             were accepted last may be missing, and results be forgotten and sent again"
        ),
        LeftOut::Beginning => log::warn!(
            file:% = log.display();
            "SQLite's log ends in the middle of a write, which was left out: it was not answered, \
             unless the file was cut off"
        ),
    }
}

/// What is said where [`Writer::mend`] has failed.
pub fn cannot_mend(path: &Path, error: &Error) -> String {
    format!(
        "{} is damaged, and cannot be mended: {error}; put a copy of it back, or move it away, and what \
         `sqlite3 FILE .recover` finds in it there",
        path.display()
    )
}

/// Why a database cannot be written as it has to be.
enum PrepareError {
    Failed(Error),
    /// A setting that SQLite did not take, and the value it has instead.
    Setting(&'static str, String),
}

impl From<rusqlite::Error> for PrepareError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl std::fmt::Display for PrepareError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(error) => write!(f, "{error}"),
            Self::Setting(name, value) => write!(
                f,
                "SQLite stays at {name} = {value}, with which a power cut could undo what was \
                 accepted"
            ),
        }
    }
}

/// The files that SQLite has open, each by its path, device and inode.
struct Files([(PathBuf, (u64, u64)); 2]);

impl Files {
    fn find(database: &Path) -> io::Result<Self> {
        let log = beside(database, "-wal");
        let [database, log] =
            [database.to_owned(), log].map(|path| identity(&path).map(|identity| (path, identity)));
        Ok(Self([database?, log?]))
    }

    /// One that is not at its path any more.
    fn missing(&self) -> Option<&Path> {
        let missing = |(path, was): &&(PathBuf, (u64, u64))| match identity(path) {
            Ok(is) => is != *was,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        self.0.iter().find(missing).map(|(path, _)| path.as_path())
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn connect(path: &Path, access: OpenFlags) -> Result<Connection, rusqlite::Error> {
    // NO_MUTEX: each connection is used by one thread at a time, which Rust sees to.
    let mut flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if path.starts_with(MEMORY) {
        flags |= OpenFlags::SQLITE_OPEN_URI;
    }
    let mut connection = Connection::open_with_flags(path, flags)?;
    if path.starts_with(MEMORY) {
        // SQLite's own handler sleeps for up to 100 ms, and all polls share one reader. Here it is always
        // another thread of ours that has the lock, for less than a millisecond mostly.
        connection.busy_handler(Some(|tried: i32| {
            thread::sleep(Duration::from_millis(1));
            u128::from(tried.unsigned_abs()) < BUSY.as_millis()
        }))?;
    } else {
        connection.busy_timeout(BUSY)?;
    }
    Ok(connection)
}

/// Sets what the writer needs, in a file or in memory, and brings the tables to
/// [`SCHEMA_VERSION`], all of it or nothing. Returns the running time.
fn prepare(connection: &mut Connection) -> Result<i64, rusqlite::Error> {
    connection.pragma_update(None, "cache_size", -1024)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.pragma_update(None, "secure_delete", true)?;
    let transaction = connection.transaction()?;
    let version: i32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let behind = usize::try_from(version).unwrap_or(0).min(STEPS.len());
    if behind < STEPS.len() {
        for step in &STEPS[behind..] {
            transaction.execute_batch(step)?;
        }
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    }
    // Written in any case, so that it is known that it can be.
    transaction.execute("UPDATE running SET millis = millis", [])?;
    transaction.commit()?;
    connection.query_row("SELECT millis FROM running", [], |row| row.get(0))
}

/// Each setting is read back: without the log or its syncs, a power cut undoes what was accepted.
fn prepare_folder(connection: &mut Connection) -> Result<i64, PrepareError> {
    // Sets the mode and returns the one in force, so it is a query.
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(PrepareError::Setting("journal_mode", mode));
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    let synchronous: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    // 2 is FULL.
    if synchronous != 2 {
        return Err(PrepareError::Setting(
            "synchronous",
            synchronous.to_string(),
        ));
    }
    Ok(prepare(connection)?)
}

/// Says no to a file that is not ours, or from the future.
fn recognise(connection: &Connection, path: &Path, in_use: bool) -> Result<(), OpenError> {
    let number =
        |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    let path = path.display();
    let unreadable = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => OpenError(format!(
            "{path} is not a database of export-service: move it away, or choose another folder \
             with --data-dir"
        )),
        _ => OpenError(format!("cannot read {path}: {error}")),
    };
    let version = number("user_version").map_err(unreadable)?;
    let owner = number("application_id").map_err(unreadable)?;
    let tables: i32 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(unreadable)?;
    if tables > 0 && owner != APPLICATION_ID {
        return Err(OpenError(format!(
            "{path} is another program's database: choose another folder with --data-dir"
        )));
    }
    if tables == 0 && in_use {
        return Err(OpenError(format!(
            "{path} is empty, although exports were kept in this folder: put a copy of it back, \
             or, to give them up and start empty, remove lock, {FILE} and {FILE}-wal there"
        )));
    }
    if version > SCHEMA_VERSION {
        return Err(OpenError(format!(
            "{path} was written by a newer export-service (schema {version}; this one knows up \
             to {SCHEMA_VERSION}): run that version, or choose another folder with --data-dir"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_export(owner: &str, key: Option<&str>, content: u8) -> NewExport {
        NewExport {
            id: Uuid::now_v7(),
            owner: owner.into(),
            destination: Destination::parse("https://a.example/").unwrap(),
            payload: vec![content],
            accepted_at: 0,
            running: 0,
            key: key.map(|key| IdempotencyKey {
                key: key.into(),
                fingerprint: [content; 32],
            }),
        }
    }

    #[test]
    fn only_what_is_written_needs_room() {
        let mut writer = Writer::open(&Place::Memory).unwrap();
        let exports = [
            new_export("me", Some("k"), 1),
            new_export("me", Some("k"), 1),
            new_export("me", Some("k"), 2),
            new_export("me", None, 3),
            new_export("you", Some("k"), 4),
        ];
        let changes: Vec<_> = exports.iter().map(Change::Accept).collect();
        let mut asked = Vec::new();
        let effects = writer
            .commit(&changes, 0, 0, |export| {
                asked.push(export.payload[0]);
                match export.payload[0] {
                    4 => Err(export::Error::StoreFull),
                    _ => Ok(()),
                }
            })
            .unwrap();
        assert_eq!(asked, [1, 3, 4]);
        assert!(matches!(
            effects[..],
            [
                Effect::Written,
                Effect::Repeat { .. },
                Effect::Conflict,
                Effect::Written,
                Effect::NoRoom(export::Error::StoreFull)
            ]
        ));
    }

    #[test]
    fn what_was_stored_by_a_wrong_clock_is_corrected_with_it() {
        const DAY: i64 = 86_400_000;
        let mut writer = Writer::open(&Place::Memory).unwrap();
        let times = |writer: &Writer| {
            let mut statement = writer
                .connection
                .prepare("SELECT accepted_at, finished_at FROM exports ORDER BY seq")
                .unwrap();
            statement
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
                .unwrap()
                .collect::<Result<Vec<(i64, Option<i64>)>, _>>()
                .unwrap()
        };
        let submit = |writer: &mut Writer, accepted_at, finished_at| {
            let export = NewExport {
                accepted_at,
                ..new_export("me", None, 1)
            };
            let report = Report {
                id: export.id,
                news: News::Finished {
                    response: RawValue::from_string("{}".into()).unwrap().into(),
                    memory: None,
                },
                queue: QueueNews::AsBefore,
            };
            let changes = [Change::Accept(&export), Change::Report(&report)];
            let all = if finished_at > 0 { 2 } else { 1 };
            writer
                .commit(&changes[..all], finished_at, 0, |_| Ok(()))
                .unwrap();
        };
        // An earlier run's, by the right time; then this one's, which starts three days late.
        submit(&mut writer, 100 * DAY, 100 * DAY + 1);
        let start = 101 * DAY;
        submit(&mut writer, start + 2, start + 3);
        submit(&mut writer, start + 4, 0);
        writer.clock_was_set(start, start + 5, 3 * DAY).unwrap();
        submit(&mut writer, start + 6, start + 7);
        let right = 104 * DAY;
        assert_eq!(
            times(&writer),
            [
                (100 * DAY, Some(100 * DAY + 1)),
                (right + 2, Some(right + 3)),
                (right + 4, None),
                (right + 6, Some(right + 7)),
            ]
        );
        // Expiry counts on evenly: what is older by the right time goes, and no more.
        assert_eq!(writer.expire(start - DAY).unwrap(), (1, Some(start + 3)));

        // Set back to before everything: nothing is left in the future.
        writer.clock_was_set(start, start + 8, -50 * DAY).unwrap();
        let now = right + 8 - 50 * DAY;
        assert!(
            times(&writer)
                .iter()
                .all(|(_, finished)| *finished <= Some(now))
        );
    }

    #[test]
    fn commits_reach_the_disk_and_what_is_deleted_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Writer::open(&Place::Folder(folder.path().join("new"))).unwrap();
        let pragma = |name: &str| {
            let value = |row: &rusqlite::Row<'_>| row.get::<_, rusqlite::types::Value>(0);
            writer
                .connection
                .pragma_query_value(None, name, value)
                .unwrap()
        };
        // 2 is FULL: the log is synced at every commit.
        assert_eq!(pragma("synchronous"), 2.into());
        assert_eq!(pragma("journal_mode"), "wal".to_owned().into());
        assert_eq!(pragma("secure_delete"), 1.into());
    }
}
