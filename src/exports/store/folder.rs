//! The data folder, before SQLite opens the database: locked, writable, and synced, so that nothing is
//! shown that a power cut could still undo.
//!
//! A file that SQLite has open must not be opened here: closing it would release SQLite's locks (POSIX
//! locks belong to the process).
//!
//! Not here: what the database holds ([`super`]).

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Access, access};

use super::{FILE, OpenError};
use crate::denied;

/// The lock file's text once the folder has had a database, so that its loss is noticed.
const IN_USE: &[u8] = b"exports.db was created here\n";

/// The name of a copy of the database while it is written.
const NEW: &str = "exports.db.new";

/// The size of a database's header: none is smaller.
const SMALLEST: u64 = 100;

/// A data folder that is locked for this process, until it is dropped or the process ends.
pub struct Folder {
    path: PathBuf,
    lock: File,
    /// Whether the folder has had a database, by its lock file.
    pub in_use: bool,
}

impl Folder {
    /// Creates the folder and the database's file if they do not exist, and locks the folder. Blocks until
    /// everything found there is synced.
    ///
    /// # Errors
    /// The folder is in use, something in it cannot be written or synced, or the database that it had is
    /// gone.
    pub fn open(folder: &Path) -> Result<Self, OpenError> {
        create(folder).map_err(|error| unusable(folder, "create", &error))?;
        let path = folder
            .canonicalize()
            .map_err(|error| unusable(folder, "use", &error))?;
        // SQLite would only say that it cannot open the database.
        access(&path, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|error| unusable(&path, "write to", &error.into()))?;
        let lock = path.join("lock");
        let lock = private_file(&lock).map_err(|error| match lock.exists() {
            true => unwritable(&lock, &error),
            false => unusable(&path, "use", &error),
        })?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError(format!(
                    "another export-service is using the data folder {}: stop it first, or give \
                     this one another folder with --data-dir",
                    path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(unusable(&path, "lock", &error)),
        }
        let marked = lock
            .metadata()
            .map_err(|error| unusable(&path, "use", &error))?;
        let in_use = marked.len() > 0;
        let folder = Self { path, lock, in_use };
        folder.check_database_is_there()?;
        // A kill may have left one, with payloads in it.
        folder
            .remove_new_database()
            .map_err(|error| unusable(&folder.path, "use", &error))?;
        folder.sync_files()?;
        folder.sync()?;
        Ok(folder)
    }

    /// The database's path.
    pub fn database(&self) -> PathBuf {
        self.path.join(FILE)
    }

    /// The error for a database that SQLite cannot open.
    pub fn unusable(&self, error: &dyn std::fmt::Display) -> OpenError {
        let file = self.database();
        OpenError(format!(
            "cannot use {}: {error}; see that this user can write it and the files beside it, that \
             there is room on the disk, and what the kernel's log says of it, or choose another folder \
             with --data-dir",
            file.display()
        ))
    }

    /// Creates an empty file for a database that is to replace the present one.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn new_database(&self) -> io::Result<PathBuf> {
        self.remove_new_database()?;
        let new = self.path.join(NEW);
        private_file(&new)?;
        Ok(new)
    }

    fn remove_new_database(&self) -> io::Result<()> {
        let new = self.path.join(NEW);
        remove(&beside(&new, "-journal"))?;
        remove(&new)
    }

    /// Puts `new` in place of the database, which must not be open. There is a database at any time. A
    /// damaged one stays under another name, which is returned.
    ///
    /// # Errors
    /// The new file cannot be synced, or a file cannot be linked or renamed.
    pub fn replace_database(&self, new: &Path, damaged: bool) -> io::Result<Option<PathBuf>> {
        let database = self.database();
        File::open(new)?.sync_all()?;
        let mut old_path = None;
        if damaged {
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
            let end = format!(".damaged-{}", seconds.unwrap_or_default().as_secs());
            let old = beside(&database, &end);
            remove(&old)?;
            fs::hard_link(&database, &old)?;
            old_path = Some(old);
        }
        // A power cut must not leave the new file beside the old one's WAL, whatever order the file system
        // writes in: SQLite would take it for the new file's.
        match File::open(beside(&database, "-wal")) {
            Ok(wal) => wal.sync_all()?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        self.sync().map_err(|error| io::Error::other(error.0))?;
        fs::rename(new, database)?;
        Ok(old_path)
    }

    /// Notes in the lock file that the folder has a database, which must be synced by now.
    ///
    /// # Errors
    /// The lock file cannot be written.
    pub fn mark_in_use(&mut self) -> Result<(), OpenError> {
        if !self.in_use {
            let marked = self
                .lock
                .write_all(IN_USE)
                .and_then(|()| self.lock.sync_all());
            marked.map_err(|error| unwritable(&self.path.join("lock"), &error))?;
            self.in_use = true;
        }
        Ok(())
    }

    /// Syncs the folder and those above it, which hold its name. SQLite syncs only the folder, and ignores
    /// failures.
    ///
    /// # Errors
    /// A sync fails.
    pub fn sync(&self) -> Result<(), OpenError> {
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
        let own = device(&self.path).map_err(|error| unusable(&self.path, "use", &error))?;
        for path in self.path.ancestors() {
            // Nothing was created above the root of this file system.
            if !device(path).is_ok_and(|device| device == own) {
                break;
            }
            match File::open(path).and_then(|opened| opened.sync_all()) {
                Ok(()) => {}
                // A user who may not read a folder is unlikely to have created anything in it.
                Err(error) if error.kind() == ErrorKind::PermissionDenied && path != self.path => {}
                // A file system that cannot sync folders, or is never written.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::InvalidInput
                            | ErrorKind::Unsupported
                            | ErrorKind::ReadOnlyFilesystem
                    ) => {}
                Err(error) => return Err(unsynced(path, &error)),
            }
        }
        Ok(())
    }

    /// Guards against SQLite taking an empty file for a new database and discarding the WAL beside it.
    fn check_database_is_there(&self) -> Result<(), OpenError> {
        let size = |path: &Path| match fs::metadata(path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unwritable(path, &error)),
        };
        let file = self.database();
        let found = size(&file)?;
        let wal = size(&beside(&file, "-wal"))?.unwrap_or(0);
        let bytes = found.unwrap_or(0);
        if bytes >= SMALLEST || (bytes == 0 && wal == 0 && !self.in_use) {
            return Ok(());
        }
        let state = match found {
            Some(bytes) => format!("is no database, at {bytes} bytes"),
            None => "is gone".to_owned(),
        };
        Err(OpenError(format!(
            "{} {state}, although exports were kept in this folder: put a copy of it back, or, to \
             give them up and start empty, remove lock, {FILE} and {FILE}-wal there",
            file.display()
        )))
    }

    /// Syncs what a process that was killed may have left in the page cache only.
    fn sync_files(&self) -> Result<(), OpenError> {
        let file = self.database();
        private_file(&file).map_err(|error| unwritable(&file, &error))?;
        for file in [beside(&file, "-shm"), beside(&file, "-wal"), file] {
            let opened = OpenOptions::new().read(true).write(true).open(&file);
            match opened {
                Ok(opened) => opened.sync_all().map_err(|error| unsynced(&file, &error))?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(unwritable(&file, &error)),
            }
        }
        Ok(())
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// The path of a file beside the database whose name ends in `end`, as SQLite's own do.
pub fn beside(database: &Path, end: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(end);
    path.into()
}

fn unusable(folder: &Path, what: &str, error: &io::Error) -> OpenError {
    let remedy = denied::remedy(folder, folder, error);
    let remedy = remedy
        .as_deref()
        .unwrap_or("make it a folder that this user can write");
    OpenError(format!(
        "cannot {what} the data folder {}: {error}; {remedy}, choose another with --data-dir, or give \
         --ephemeral to keep nothing",
        folder.display()
    ))
}

fn unwritable(file: &Path, error: &io::Error) -> OpenError {
    if error.kind() == ErrorKind::StorageFull {
        return OpenError(format!(
            "cannot write {}: {error}; make some room on that disk, or choose another folder with \
             --data-dir",
            file.display()
        ));
    }
    let folder = file.parent().unwrap_or(file);
    let remedy = denied::remedy(folder, file, error);
    let remedy = remedy
        .as_deref()
        .unwrap_or("make it a file that this user can read and write");
    OpenError(format!(
        "cannot write {}: {error}; {remedy}, or choose another folder with --data-dir",
        file.display()
    ))
}

fn unsynced(path: &Path, error: &io::Error) -> OpenError {
    OpenError(format!(
        "cannot sync {}: {error}; a power cut could undo what was accepted, so see what the kernel's \
         log says of the disk, or choose a folder on another one with --data-dir",
        path.display()
    ))
}

/// Creates a folder that only its owner may read.
fn create(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Opens a file, or creates one that only its owner may read. SQLite gives its WAL the database's
/// permissions.
fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}
