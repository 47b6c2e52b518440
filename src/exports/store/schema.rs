//! The tables, and recognising whose file and which version it is.
//!
//! Not here: migrating older files ([`super::copying`]).

use std::path::Path;

use rusqlite::{Connection, ErrorCode};

use super::{FILE, OpenError};

/// "EXPS" in ASCII, so that `file` and other programs can tell whose database this is.
const APPLICATION_ID: i32 = 0x4558_5053;

/// The version of the tables that this release writes.
pub const VERSION: i32 = 4;

/// The highest position that an export is found with. There are as many behind it for those that follow.
pub const LAST_TURN: i64 = i64::MAX / 2;

/// `queues` has every queue that an export belongs to, finished or not. `exports` counts these. `failures`
/// counts the attempts that failed since the last success, and `last_error` is why the last one did. `peer` is
/// the client's IP address if the owner is empty, as on a Databox, so that each app has its own queue.
/// `resumed_at` is when its last pause ended: failures before that no longer count.
///
/// `exports.turn` is the order of delivery in a queue. `response` is null until an export is finished, and
/// `payload` is null from then on. `last_error` is the export's own. `first_moved_at` is when it was first
/// moved to the end of its queue. `fingerprint` tells a repeat from another submission under the same
/// idempotency key, even when the payload is gone. Long columns come last, so that reading the others
/// touches fewer pages.
///
/// `accepted_at` and `finished_at` are Unix milliseconds by the wall clock. All other times are running
/// time in milliseconds: see `Exports::running`. `running` has the last running time that was stored.
///
/// `ledger` has a row for each attempt and each act of the owner: see [`crate::ledger`]. Its columns but the
/// hashes are null once it was pruned or forgotten. `day_sums` adds attempts up by UTC day, and says how many
/// rows of that day the ledger holds. The times of both and of `destinations` are Unix milliseconds by the
/// wall clock, and are not corrected when that is set: what was written is not changed. Those of `pauses` are.
///
/// `overview` is for people with sqlite3.
const TABLES: &str = "
    CREATE TABLE queues (
        id              INTEGER PRIMARY KEY AUTOINCREMENT,
        owner           BLOB NOT NULL,
        destination     TEXT NOT NULL,
        exports         INTEGER NOT NULL DEFAULT 0,
        failures        INTEGER NOT NULL DEFAULT 0,
        next_attempt_at INTEGER NOT NULL DEFAULT 0,
        failing_since   INTEGER NOT NULL DEFAULT 0,
        last_error      TEXT,
        peer            TEXT NOT NULL DEFAULT '',
        resumed_at      INTEGER NOT NULL DEFAULT 0,
        UNIQUE (owner, destination, peer)
    ) STRICT;
    CREATE TABLE exports (
        seq             INTEGER PRIMARY KEY,
        id              BLOB NOT NULL UNIQUE,
        queue           INTEGER NOT NULL,
        turn            INTEGER NOT NULL,
        accepted_at     INTEGER NOT NULL,
        running_at      INTEGER NOT NULL,
        attempts        INTEGER NOT NULL DEFAULT 0,
        first_moved_at  INTEGER,
        finished_at     INTEGER,
        idempotency_key TEXT,
        fingerprint     BLOB,
        last_error      TEXT,
        response        TEXT,
        payload         BLOB
    ) STRICT;
    CREATE INDEX unfinished ON exports (queue, turn) WHERE finished_at IS NULL;
    CREATE INDEX moved ON exports (queue, running_at)
        WHERE finished_at IS NULL AND first_moved_at IS NOT NULL;
    CREATE INDEX finished ON exports (finished_at) WHERE finished_at IS NOT NULL;
    CREATE UNIQUE INDEX repeats ON exports (queue, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
    CREATE TABLE running (millis INTEGER NOT NULL) STRICT;
    INSERT INTO running VALUES (0);
    CREATE TABLE ledger (
        seq         INTEGER PRIMARY KEY,
        at          INTEGER,
        event       TEXT,
        export      BLOB,
        who         TEXT,
        destination TEXT,
        address     TEXT,
        bytes_out   INTEGER,
        bytes_in    INTEGER,
        digest      BLOB,
        outcome     TEXT,
        ms          INTEGER,
        attempt     INTEGER,
        note        TEXT,
        body_hash   BLOB,
        hash        BLOB
    ) STRICT;
    CREATE INDEX refusals ON ledger (at) WHERE event = 'refused';
    CREATE TABLE day_sums (
        day         INTEGER NOT NULL,
        who         TEXT NOT NULL,
        destination TEXT NOT NULL,
        exports     INTEGER NOT NULL DEFAULT 0,
        attempts    INTEGER NOT NULL DEFAULT 0,
        delivered   INTEGER NOT NULL DEFAULT 0,
        failed      INTEGER NOT NULL DEFAULT 0,
        bytes_out   INTEGER NOT NULL DEFAULT 0,
        bytes_in    INTEGER NOT NULL DEFAULT 0,
        rows        INTEGER NOT NULL DEFAULT 0,
        row_bytes   INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (day, who, destination)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE pauses (subject TEXT PRIMARY KEY, since INTEGER NOT NULL, until INTEGER) STRICT;
    CREATE TABLE labels (who TEXT PRIMARY KEY, label TEXT NOT NULL) STRICT;
    CREATE TABLE destinations (
        name     TEXT PRIMARY KEY,
        first_at INTEGER NOT NULL,
        seen_at  INTEGER
    ) STRICT;
    CREATE VIEW overview AS
        SELECT seq,
            lower(substr(hex(exports.id), 1, 8) || '-' || substr(hex(exports.id), 9, 4) || '-' ||
                substr(hex(exports.id), 13, 4) || '-' || substr(hex(exports.id), 17, 4) || '-' ||
                substr(hex(exports.id), 21)) AS id,
            CAST(owner AS TEXT) AS owner, destination,
            datetime(accepted_at / 1000, 'unixepoch') AS accepted,
            datetime(finished_at / 1000, 'unixepoch') AS finished,
            attempts, coalesce(response ->> 'status', 'waiting') AS status,
            coalesce(exports.last_error, queues.last_error) ->> 'message' AS last_error
        FROM exports JOIN queues ON queues.id = queue;
";

/// The version of a database's tables; 0 without tables.
///
/// # Errors
/// It cannot be read.
pub fn version(connection: &Connection) -> Result<i32, rusqlite::Error> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Sets what a connection that writes needs.
///
/// # Errors
/// SQLite refuses a setting.
pub fn configure(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.pragma_update(None, "cache_size", -1024)?;
    connection.pragma_update(None, "temp_store", "memory")?;
    connection.pragma_update(None, "secure_delete", true)
}

/// Creates the tables in an empty database, all or none. Writes something in any case, which proves that
/// the database can be written.
///
/// # Errors
/// It cannot be written.
pub fn create(connection: &mut Connection) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction()?;
    if version(&transaction)? < VERSION {
        transaction.execute_batch(TABLES)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
    }
    transaction.execute("UPDATE running SET millis = millis", [])?;
    transaction.commit()
}

/// Refuses a database of another program or of a newer release. `in_use` says that the folder has had a
/// database, so that an empty one is refused too.
///
/// # Errors
/// The text says what the file is instead, and what to do.
pub fn recognise(connection: &Connection, path: &Path, in_use: bool) -> Result<(), OpenError> {
    let number =
        |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    let path = path.display();
    let unreadable = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => OpenError(format!(
            "{path} is not a database of export-service: move it away, or choose another folder \
             with --data-dir"
        )),
        _ => OpenError(format!(
            "cannot read {path}: {error}; see that there is room on the disk for the files beside it, and \
             what the kernel's log says of it"
        )),
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
    if version > VERSION {
        return Err(OpenError(format!(
            "{path} was written by a newer export-service (schema {version}; this one knows up \
             to {VERSION}): run that version, or choose another folder with --data-dir"
        )));
    }
    Ok(())
}
