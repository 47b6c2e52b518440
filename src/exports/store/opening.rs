//! Opening the store. Nothing is shown to clients before it is certain that a power cut cannot undo it. A
//! file of an earlier release is migrated, and what can be read of a damaged one is saved.
//!
//! Both are done by writing a new file beside the old one and renaming it when it is complete, so that a
//! kill in between leaves the old one as it was.
//!
//! Not here: which rows are copied and how ([`super::copying`]).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::hooks::Wal;
use rusqlite::{Connection, OpenFlags, TransactionBehavior};
use uuid::Uuid;

use super::copying::{self, Copied};
use super::evidence::Evidence;
use super::folder::{Folder, beside};
use super::ledger::Ledger;
use super::reading::json;
use super::schema;
use super::wal::{Scan, Skipped};
use super::{Error, OpenError, Place, Reader, Store};
use crate::export::{Backoff, Millis, QueueId, StoredQueue};

/// How long a connection waits for another's lock. Only a checkpoint, or a second connection in
/// `--ephemeral` mode, ever holds one.
pub(super) const BUSY: Duration = Duration::from_secs(10);

/// How the store is opened to write. A file exists by then; a database in memory is created.
pub(super) const WRITING: OpenFlags =
    OpenFlags::SQLITE_OPEN_READ_WRITE.union(OpenFlags::SQLITE_OPEN_CREATE);

/// How the URI of a database in memory begins. No file's path does, as those are absolute.
pub(super) const MEMORY: &str = "file:";

impl Store {
    /// Opens the store, creates it if there is none, and locks it against other processes. Blocks while
    /// all of it is copied, if an earlier release wrote it or it is damaged.
    ///
    /// # Errors
    /// The folder cannot be used, is in use, or holds what this program cannot read.
    pub fn open(place: &Place) -> Result<Self, OpenError> {
        let mut store = match place {
            Place::Folder(folder) => Self::open_folder(folder)?,
            Place::Memory => Self::open_memory()
                .map_err(|error| OpenError(format!("cannot keep exports in memory: {error}")))?,
        };
        let loaded = store.repaired(Self::load);
        loaded.map_err(|error| OpenError(cannot_repair(&store.path, &error)))?;
        Ok(store)
    }

    /// Reads at the start, when there are no readers yet. If the store is damaged, repairs it and reads once
    /// more.
    ///
    /// # Errors
    /// The store cannot be read, or needs a repair that fails.
    pub fn repaired<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match read(self) {
            Err(error) if self.is_damage(&error) => {
                self.repair(&mut [])?;
                read(self)
            }
            read => read,
        }
    }

    /// Whether an error is because of damage. SQLite may call that a lack of memory, as it asks for as much as a
    /// damaged length says.
    fn is_damage(&self, error: &Error) -> bool {
        match error {
            Error::Damaged => true,
            Error::Failed(_) => {
                let sound = |row: &rusqlite::Row<'_>| Ok(row.get::<_, String>(0)? == "ok");
                let check = "PRAGMA quick_check(1)";
                match self.connection.query_row(check, [], sound) {
                    Ok(sound) => !sound,
                    Err(error) => matches!(error.into(), Error::Damaged),
                }
            }
            Error::Full | Error::InUse => false,
        }
    }

    fn open_memory() -> Result<Self, rusqlite::Error> {
        // A name of its own, so that two stores in one process (as in tests) stay apart.
        let path = PathBuf::from(format!("{MEMORY}/{}?vfs=memdb", Uuid::now_v7()));
        let mut connection = connect(&path, WRITING)?;
        schema::configure(&connection)?;
        schema::create(&mut connection)?;
        Ok(Self::new(connection, path, None))
    }

    fn new(connection: Connection, path: PathBuf, on_disk: Option<(Folder, Files)>) -> Self {
        Self {
            connection,
            clock_offset: 0,
            running: 0,
            last_turn: 0,
            ledger: Ledger::empty(),
            wal_pages: Arc::default(),
            path,
            on_disk,
        }
    }

    fn open_folder(folder: &Path) -> Result<Self, OpenError> {
        let mut folder = Folder::open(folder)?;
        let path = folder.database();
        let unusable = |error| folder.unusable(&error);
        let wal = beside(&path, "-wal");
        let found = Scan::of(&wal).map_err(|error| folder.unusable(&error))?;
        let mut connection = connect(&path, WRITING).map_err(unusable)?;
        schema::recognise(&connection, &path, folder.in_use)?;
        // SQLite has read the WAL by now, if there is one, and says how much of it.
        let read = connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                row.get::<_, i64>(1)
            })
            .map_err(unusable)?;
        // -1 without a WAL.
        warn_of_skipped(&found.skipped(read.max(0).unsigned_abs()), &wal);
        let pages = Arc::new(AtomicI32::new(0));
        set_wal(&mut connection, pages.clone()).map_err(|error| folder.unusable(&error))?;
        let version = schema::version(&connection).map_err(unusable)?;
        if matches!(version, 0 | schema::VERSION) {
            match schema::create(&mut connection).map_err(Error::from) {
                // `open` saves what can be read of it.
                Err(Error::Damaged) if version != 0 => {}
                created => created.map_err(|error| folder.unusable(&error))?,
            }
        }
        // The WAL exists by now.
        folder.sync()?;
        folder.mark_in_use()?;
        let files = Files::find(&path).map_err(|error| folder.unusable(&error))?;
        let mut store = Self::new(connection, path, Some((folder, files)));
        store.wal_pages = pages;
        if !matches!(version, 0 | schema::VERSION) {
            store.take_over(version)?;
        }
        Ok(store)
    }

    fn take_over(&mut self, version: i32) -> Result<(), OpenError> {
        log::info!(schema = version, file:% = self.path.display(); "taking over from an earlier release");
        let size = fs::metadata(&self.path).map_or(0, |file| file.len());
        self.copy(&mut []).map_err(|error| {
            OpenError(format!(
                "cannot take over {} from an earlier release: {error}; a copy of it is made, so see that \
                 there are {} MiB free and nobody else reads it, or go on with that release: nothing was \
                 changed",
                self.path.display(),
                size.div_ceil(1024 * 1024)
            ))
        })
    }

    fn load(&mut self) -> Result<(), Error> {
        let running = "SELECT millis FROM running";
        self.running = self.connection.query_row(running, [], |row| row.get(0))?;
        self.ledger.load(&self.connection)
    }

    /// Calls `each` for every queue that has exports without a result. Reads an index entry for each of
    /// these exports.
    ///
    /// # Errors
    /// The store cannot be read, or holds a row that no version of this program wrote.
    pub fn queues(&mut self, mut each: impl FnMut(QueueId, StoredQueue)) -> Result<(), Error> {
        let mut statement = self.connection.prepare(
            "SELECT queue, exports, first, last, failures, next_attempt_at, failing_since, last_error,
                 resumed_at
             FROM (SELECT queue, count(*) AS exports, min(turn) AS first, max(turn) AS last
                   FROM exports WHERE finished_at IS NULL GROUP BY queue)
             LEFT JOIN (SELECT id, failures, next_attempt_at, failing_since, last_error, resumed_at
                        FROM queues) ON id = queue",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            // Null if the export's queue is missing, which is damage like any other null here.
            let backoff = Backoff {
                failures: row.get(4)?,
                not_before: row.get(5)?,
                failing_since: row.get(6)?,
            };
            let error = json(row.get(7)?)?;
            let found = StoredQueue {
                exports: usize::try_from(row.get::<_, i64>(1)?).unwrap_or(0),
                first: row.get(2)?,
                failing: (backoff.failures > 0).then_some((backoff, error)),
                resumed_at: row.get(8)?,
            };
            let last = row.get(3)?;
            if found.first < 0 || last > schema::LAST_TURN {
                return Err(Error::Damaged);
            }
            self.last_turn = self.last_turn.max(last);
            each(row.get(0)?, found);
        }
        Ok(())
    }

    /// Copies what can still be read to a new file in place of the damaged one, which is kept beside it, and
    /// logs what is lost. `readers` are all of this store's, and are reopened. Blocks while all of it is
    /// read and written.
    ///
    /// # Errors
    /// The new file cannot be written, or another process uses the old one. Then everything is as it was.
    pub fn repair(&mut self, readers: &mut [&mut Reader]) -> Result<(), Error> {
        self.copy(readers)
    }

    fn copy(&mut self, readers: &mut [&mut Reader]) -> Result<(), Error> {
        let Some((folder, files)) = self.on_disk.take() else {
            // A database in memory has no pages that can go bad.
            return Err(Error::Damaged);
        };
        let done = self.copy_in(&folder, readers);
        self.on_disk = Some((folder, Files::find(&self.path).unwrap_or(files)));
        done
    }

    fn copy_in(&mut self, folder: &Folder, readers: &mut [&mut Reader]) -> Result<(), Error> {
        let version = schema::version(&self.connection)?;
        let new = folder.new_database()?;
        let copied = copy_into(&new, &self.connection, version, self.running)?;
        // An empty WAL cannot be mistaken for the new file's, and the old file is complete without it.
        if !self.truncate_wal()? {
            return Err(Error::InUse);
        }
        // All are closed before the files change places: the last one to close removes the WAL.
        for reader in readers.iter_mut() {
            reader.connection = Connection::open_in_memory()?;
        }
        self.connection = Connection::open_in_memory()?;
        let is_whole = version != schema::VERSION && copied.is_whole();
        let replaced = folder.replace_database(&new, !is_whole);
        self.connection = connect(&self.path, WRITING)?;
        set_wal(&mut self.connection, self.wal_pages.clone()).map_err(|error| match error {
            SettingError::Failed(error) => error,
            SettingError::Refused(..) => Error::Damaged,
        })?;
        // Writes something, so that there is a WAL.
        schema::create(&mut self.connection)?;
        self.running = self.running.max(copied.running);
        self.ledger.load(&self.connection)?;
        for reader in readers {
            **reader = self.open_reader(reader.writes)?;
        }
        let old = replaced?;
        folder.sync().map_err(|error| io::Error::other(error.0))?;
        match old {
            Some(old) => log_losses(&copied, &old),
            None => log::info!(exports = copied.whole; "taken over"),
        }
        Ok(())
    }

    /// Opens another connection for reading.
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn reader(&self) -> Result<Reader, Error> {
        self.open_reader(false)
    }

    /// Opens another connection for checkpoints.
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn checkpointer(&self) -> Result<Reader, Error> {
        self.open_reader(true)
    }

    fn open_reader(&self, writes: bool) -> Result<Reader, Error> {
        let access = if writes {
            WRITING
        } else {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        };
        let connection = connect(&self.path, access)?;
        connection.pragma_update(None, "cache_size", -128)?;
        Ok(Reader { connection, writes })
    }

    /// A file that was removed or replaced at its path, although SQLite still writes to the old one.
    pub fn missing_file(&self) -> Option<&Path> {
        let (_, files) = self.on_disk.as_ref()?;
        files.missing()
    }

    /// The database's path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The running time that was stored last, in milliseconds.
    pub fn running(&self) -> Millis {
        self.running
    }
}

impl Evidence {
    /// Opens another connection to a store that this process has open, by [`Store::path`].
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.pragma_update(None, "cache_size", -512)?;
        Ok(Self { connection })
    }
}

fn copy_into(new: &Path, old: &Connection, version: i32, running: Millis) -> Result<Copied, Error> {
    let mut copy = connect(new, WRITING)?;
    schema::configure(&copy)?;
    schema::create(&mut copy)?;
    let transaction = copy.transaction()?;
    let copied = copying::copy(old, version, &transaction, running)?;
    transaction.commit()?;
    copy.close().map_err(|(_, error)| error)?;
    Ok(copied)
}

fn log_losses(copied: &Copied, old: &Path) {
    for id in &copied.damaged {
        log::error!(id:%; "its payload or result was damaged in the store, and is lost");
    }
    for id in &copied.gone {
        log::error!(id:%; "it was damaged in the store, and is lost");
    }
    log::error!(
        whole = copied.whole, file:% = old.display();
        "the store was damaged, and what could be read was moved to a new file; sqlite3's .recover \
         may find more in the old one, which holds payloads: remove it when it is not needed"
    );
}

fn warn_of_skipped(skipped: &Skipped, wal: &Path) {
    match skipped {
        Skipped::Nothing => {}
        Skipped::Transactions => log::warn!(
            file:% = wal.display();
            "SQLite's log was damaged, and only what is in front of that could be read: exports that \
             were accepted last may be missing, and results be forgotten and sent again"
        ),
        Skipped::Beginning => log::warn!(
            file:% = wal.display();
            "SQLite's log ends in the middle of a write, which was left out: it was not answered, \
             unless the file was cut off"
        ),
    }
}

/// The message for when [`Store::repair`] has failed.
pub fn cannot_repair(path: &Path, error: &Error) -> String {
    format!(
        "{} is damaged, and cannot be mended: {error}; put a copy of it back, or move it away, and what \
         `sqlite3 FILE .recover` finds in it there",
        path.display()
    )
}

/// Why a database cannot be written as it has to be.
enum SettingError {
    Failed(Error),
    /// A setting that SQLite did not take, and the value it has instead.
    Refused(&'static str, String),
}

impl From<rusqlite::Error> for SettingError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl std::fmt::Display for SettingError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed(error) => write!(f, "{error}"),
            Self::Refused(name, value) => write!(
                f,
                "SQLite stays at {name} = {value}, with which a power cut could undo what was \
                 accepted"
            ),
        }
    }
}

/// Turns the WAL and its syncs on. Each setting is read back, as without it a power cut undoes what was
/// accepted. From then on `pages` is the WAL's length.
fn set_wal(connection: &mut Connection, pages: Arc<AtomicI32>) -> Result<(), SettingError> {
    schema::configure(connection)?;
    // Sets the mode and returns the one in force, so it is a query.
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(SettingError::Refused("journal_mode", mode));
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    let synchronous: i64 = connection.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    // 2 is FULL.
    if synchronous != 2 {
        return Err(SettingError::Refused(
            "synchronous",
            synchronous.to_string(),
        ));
    }
    // Replaces the hook that makes checkpoints inside commits: the checkpoint thread does that.
    connection.wal_hook(Some(move |_: &mut Wal, length| {
        // Relaxed: nothing is ordered by this number.
        pages.store(length, Ordering::Relaxed);
        Ok(())
    }))?;
    Ok(())
}

/// The files that SQLite has open, each by its path, device and inode.
pub(super) struct Files([(PathBuf, (u64, u64)); 2]);

impl Files {
    fn find(database: &Path) -> io::Result<Self> {
        let wal = beside(database, "-wal");
        let [database, wal] =
            [database.to_owned(), wal].map(|path| identity(&path).map(|identity| (path, identity)));
        Ok(Self([database?, wal?]))
    }

    /// A file that is no longer at its path.
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

pub(super) fn connect(path: &Path, access: OpenFlags) -> Result<Connection, rusqlite::Error> {
    // NO_MUTEX: Rust guarantees that one thread at a time uses each connection.
    let mut flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if path.starts_with(MEMORY) {
        flags |= OpenFlags::SQLITE_OPEN_URI;
    }
    let mut connection = Connection::open_with_flags(path, flags)?;
    // Else a transaction that has begun with a read fails at once when its first write finds the store locked.
    // A connection that reads locks it too, for a moment: when it meets a half-written header of the WAL's
    // index.
    connection.set_transaction_behavior(TransactionBehavior::Immediate);
    // Else SQLite plans a statement again whenever another value is bound, which costs more than to run it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    if path.starts_with(MEMORY) {
        // SQLite's own handler sleeps for up to 100 ms, and all polls share one reader. Here the lock is
        // always held by another thread of this process, mostly for less than a millisecond.
        connection.busy_handler(Some(|tried: i32| {
            thread::sleep(Duration::from_millis(1));
            u128::from(tried.unsigned_abs()) < BUSY.as_millis()
        }))?;
    } else {
        connection.busy_timeout(BUSY)?;
    }
    Ok(connection)
}
