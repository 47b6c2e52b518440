//! The store on disk: every export from its acceptance until its result expires. All SQL is here.
//!
//! SQLite in WAL mode with `synchronous=FULL`: a commit that returned survives loss of power.
//! One [`Writer`] owns the only writing connection; [`Reader`]s see committed rows only and are
//! never held up by the writer. Payloads are overwritten with zeros once an export is finished.
//!
//! Not here: which thread writes when, and what is kept in memory (`exports`).

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, params};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::delivery::addresses::Destination;

/// The file's name in the data folder.
pub const FILE: &str = "exports.db";

/// "EXPS", so that `file` and SQLite itself can tell whose database this is.
const APPLICATION_ID: i32 = 0x4558_5053;

/// What the tables below look like. A change to them raises this by one and adds the statements
/// that bring a file of the version before up to it, in [`migrate`].
const SCHEMA_VERSION: i32 = 1;

/// `payload` is null once finished, `finished_at` and `response` are null before. Times are Unix
/// milliseconds. `fingerprint` tells a repeat of the same submission from another one under the
/// same idempotency key, when the payload itself is gone already.
const SCHEMA: &str = "
    CREATE TABLE exports (
        seq             INTEGER PRIMARY KEY,
        id              TEXT NOT NULL UNIQUE,
        owner           BLOB NOT NULL,
        destination     TEXT NOT NULL,
        payload         BLOB,
        accepted_at     INTEGER NOT NULL,
        finished_at     INTEGER,
        response        TEXT,
        idempotency_key TEXT,
        fingerprint     BLOB
    ) STRICT;
    CREATE INDEX unfinished ON exports (seq) WHERE finished_at IS NULL;
    CREATE INDEX finished ON exports (finished_at) WHERE finished_at IS NOT NULL;
    CREATE UNIQUE INDEX repeats ON exports (owner, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
";

/// Rows deleted in one go once they expired: a few milliseconds even on an SD card.
const EXPIRY_STEP: u32 = 100;

/// How long a connection waits for another's lock. Only a checkpoint, or a second connection in
/// `--ephemeral` mode, ever holds one.
const BUSY: Duration = Duration::from_secs(10);

/// How the writer opens the store; a file exists by then, a database in memory does not.
const WRITING: OpenFlags = OpenFlags::SQLITE_OPEN_READ_WRITE.union(OpenFlags::SQLITE_OPEN_CREATE);

/// Where the exports are kept.
#[derive(Clone, Debug)]
pub enum Place {
    /// In this folder, which is created where it does not exist.
    Folder(PathBuf),
    /// In memory, lost with the process (`--ephemeral`).
    Memory,
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
    /// A row holds what no version of this program writes: somebody changed it.
    Damaged,
    /// Anything else SQLite reports.
    Failed(rusqlite::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("the disk is full"),
            Self::Damaged => f.write_str("the store holds a row that this program did not write"),
            Self::Failed(error) => write!(f, "{error}"),
        }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            _ => Self::Failed(error),
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
    /// An export is finished: its result as JSON.
    Settle {
        /// Which export.
        id: Uuid,
        /// The `ext_response` object.
        response: &'a RawValue,
    },
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
}

/// The one connection that writes. Dropping it gives the folder free for another process.
pub struct Writer {
    connection: Connection,
    uri: String,
    /// Held for as long as the folder is in use; the operating system lets go of it in any case.
    _lock: Option<File>,
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
                let uri = format!("file:/{}?vfs=memdb", Uuid::now_v7());
                let connection = connect(&uri, WRITING)
                    .and_then(|connection| prepare(&connection).map(|()| connection))
                    .map_err(|error| {
                        OpenError(format!("cannot keep exports in memory: {error}"))
                    })?;
                Ok(Self {
                    connection,
                    uri,
                    _lock: None,
                })
            }
        }
    }

    fn open_folder(folder: &Path) -> Result<Self, OpenError> {
        let unusable = |what: &str, error: &dyn std::fmt::Display| {
            OpenError(format!(
                "cannot {what} the data folder {}: {error}; make it writable for this user, \
                 choose another with --data-dir, or give --ephemeral to keep nothing",
                folder.display()
            ))
        };
        create(folder).map_err(|error| unusable("create", &error))?;
        let lock = private_file(&folder.join("lock")).map_err(|error| unusable("use", &error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError(format!(
                    "another export-service is using the data folder {}: stop it first, or give \
                     this one another folder with --data-dir",
                    folder.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(unusable("lock", &error)),
        }
        let path = folder.join(FILE);
        private_file(&path).map_err(|error| unusable("use", &error))?;
        let uri = file_uri(&path);
        let connection = connect(&uri, WRITING).map_err(|error| unusable("use", &error))?;
        migrate(&connection, &path)?;
        prepare_folder(&connection).map_err(|error| unusable("use", &error))?;
        Ok(Self {
            connection,
            uri,
            _lock: Some(lock),
        })
    }

    /// Opens another connection for reading.
    ///
    /// # Errors
    /// Where the file cannot be opened a second time.
    pub fn reader(&self) -> Result<Reader, Error> {
        let connection = connect(&self.uri, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.pragma_update(None, "cache_size", -128)?;
        Ok(Reader { connection })
    }

    /// The exports that were accepted and have no result, in the order of their acceptance.
    ///
    /// # Errors
    /// Where the store cannot be read, or holds a row that no version of this program wrote.
    pub fn unfinished(&self, mut each: impl FnMut(Unfinished)) -> Result<(), Error> {
        let mut statement = self.connection.prepare(
            "SELECT id, owner, destination FROM exports WHERE finished_at IS NULL ORDER BY seq",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (id, destination): (String, String) = (row.get(0)?, row.get(2)?);
            let (Ok(id), Ok(destination)) = (id.parse(), Destination::parse(&destination)) else {
                return Err(Error::Damaged);
            };
            each(Unfinished {
                id,
                owner: row.get(1)?,
                destination,
            });
        }
        Ok(())
    }

    /// Writes all of `changes` in one transaction and returns what became of each, in order.
    /// Blocks until the disk has them: that is what a 200 to an app stands for.
    ///
    /// # Errors
    /// Nothing of it was written.
    pub fn commit(&mut self, changes: &[Change<'_>], now: i64) -> Result<Vec<Effect>, Error> {
        let transaction = self.connection.transaction()?;
        let mut effects = Vec::with_capacity(changes.len());
        for change in changes {
            effects.push(match change {
                Change::Accept(export) => accept(&transaction, export)?,
                Change::Settle { id, response } => settle(&transaction, *id, response, now)?,
            });
        }
        transaction.commit()?;
        Ok(effects)
    }

    /// Deletes some results that were finished at or before `limit` (Unix milliseconds), and says
    /// when the oldest one left was finished.
    ///
    /// # Errors
    /// Where the store cannot be written.
    pub fn expire(&mut self, limit: i64) -> Result<Option<i64>, Error> {
        let oldest = |connection: &Connection| {
            connection
                .prepare_cached("SELECT min(finished_at) FROM exports WHERE finished_at NOT NULL")?
                .query_row([], |row| row.get::<_, Option<i64>>(0))
        };
        if oldest(&self.connection)?.is_some_and(|finished| finished <= limit) {
            self.connection
                .prepare_cached(
                    "DELETE FROM exports WHERE seq IN
                     (SELECT seq FROM exports WHERE finished_at <= ? LIMIT ?)",
                )?
                .execute(params![limit, EXPIRY_STEP])?;
        }
        Ok(oldest(&self.connection)?)
    }

    /// Moves what the write-ahead log holds into the database and empties the log, which until
    /// then still has every payload in it.
    ///
    /// # Errors
    /// Where the store cannot be written; nothing is lost by that.
    pub fn empty_log(&mut self) -> Result<(), Error> {
        self.connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        Ok(())
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
            response: result(row.get(2)?)?,
        }))
    }

    /// The payload of an export that is not finished.
    ///
    /// # Errors
    /// Where the store cannot be read, or holds no payload under this id.
    pub fn payload(&self, id: Uuid) -> Result<Vec<u8>, Error> {
        let payload = self
            .connection
            .prepare_cached("SELECT payload FROM exports WHERE id = ?")?
            .query_row([id.to_string()], |row| row.get(0))?;
        Ok(payload)
    }
}

/// A result as it stands in a row.
fn result(text: Option<String>) -> Result<Option<Arc<RawValue>>, Error> {
    let parsed = text.map(RawValue::from_string).transpose();
    Ok(parsed.map_err(|_| Error::Damaged)?.map(Arc::from))
}

fn accept(transaction: &Transaction<'_>, export: &NewExport) -> Result<Effect, Error> {
    if let Some(key) = &export.key
        && let Some(earlier) = earlier(transaction, &export.owner, key)?
    {
        return Ok(earlier);
    }
    transaction
        .prepare_cached(
            "INSERT INTO exports
             (id, owner, destination, payload, accepted_at, idempotency_key, fingerprint)
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            export.id.to_string(),
            export.owner,
            export.destination.as_str(),
            export.payload,
            export.accepted_at,
            export.key.as_ref().map(|key| &key.key),
            export.key.as_ref().map(|key| key.fingerprint),
        ])?;
    Ok(Effect::Written)
}

/// What was submitted before under the same key, if anything was.
fn earlier(
    transaction: &Transaction<'_>,
    owner: &[u8],
    key: &IdempotencyKey,
) -> Result<Option<Effect>, Error> {
    let mut statement = transaction.prepare_cached(
        "SELECT id, fingerprint, response FROM exports WHERE owner = ? AND idempotency_key = ?",
    )?;
    let mut rows = statement.query(params![owner, key.key])?;
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
        response: result(row.get(2)?)?,
    }))
}

fn settle(
    transaction: &Transaction<'_>,
    id: Uuid,
    response: &RawValue,
    now: i64,
) -> Result<Effect, Error> {
    transaction
        .prepare_cached(
            "UPDATE exports SET payload = NULL, finished_at = ?, response = ? WHERE id = ?",
        )?
        .execute(params![now, response.get(), id.to_string()])?;
    Ok(Effect::Written)
}

fn connect(uri: &str, access: OpenFlags) -> Result<Connection, rusqlite::Error> {
    // NO_MUTEX: each connection is used by one thread at a time, which Rust sees to.
    let flags = access | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(uri, flags)?;
    connection.busy_timeout(BUSY)?;
    Ok(connection)
}

/// What the writer needs set, in a file or in memory.
fn prepare(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.pragma_update(None, "cache_size", -1024)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.pragma_update(None, "secure_delete", true)?;
    if connection.pragma_query_value(None, "user_version", |row| row.get::<_, i32>(0))? == 0 {
        connection.execute_batch(&format!(
            "BEGIN; {SCHEMA}
             PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};
             COMMIT;"
        ))?;
    }
    Ok(())
}

fn prepare_folder(connection: &Connection) -> Result<(), rusqlite::Error> {
    // Sets the mode and returns the one in force, so it is a query.
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    prepare(connection)
}

/// Brings the file to [`SCHEMA_VERSION`]. There is only one version so far, so this only says
/// no to what is not ours or from the future.
fn migrate(connection: &Connection, path: &Path) -> Result<(), OpenError> {
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
    if version > SCHEMA_VERSION {
        return Err(OpenError(format!(
            "{path} was written by a newer export-service (schema {version}; this one knows up \
             to {SCHEMA_VERSION}): run that version, or choose another folder with --data-dir"
        )));
    }
    Ok(())
}

/// Creates a folder that only its owner may look into, and makes sure that it outlives a power
/// cut: SQLite syncs what is in it, not its own entry in the folder above.
fn create(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

/// Opens a file that only its owner may read, and creates it where it does not exist. SQLite
/// gives its log the same permissions.
fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// A path as SQLite's URI syntax wants it, where `%`, `?` and `#` mean something else.
fn file_uri(path: &Path) -> String {
    let path = path.to_string_lossy();
    let escaped = path
        .replace('%', "%25")
        .replace('?', "%3f")
        .replace('#', "%23");
    format!("file:{escaped}")
}
