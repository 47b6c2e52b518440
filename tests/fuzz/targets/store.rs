//! A data folder as some release may have left it, in any layout, with strange values in its rows, and with
//! damage to its files. Opening it, polling, submitting and delivering never panics or hangs. Exports that
//! can be read are not lost, and are delivered if their queue may be.
//!
//! An input is a byte for the layout, one for whether the changes are still in the WAL, and changes of four
//! bytes each.

use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::bounded;
use export_service::auth::{Key, Macaroon, Request, authorize};
use export_service::destination::Destination;
use export_service::export::ExtResponse;
use export_service::exports::attempts::Work;
use export_service::exports::store::{FILE, LedgerLimits, Place, Store};
use export_service::exports::{Exports, Limits, Query, Submission};
use export_service::ledger::{Entry, Event, LedgerKey, Sent};
use export_service::reply::Reply;
use export_service::waits::Waits;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use uuid::Uuid;

const PAGE: usize = 4096;
/// Longer than anything takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(60);
const LIMITS: Limits = Limits {
    max_pending: 100,
    max_store: 1 << 30,
    // Nothing expires but what was finished before 1926.
    retention: Duration::from_secs(100 * 365 * 24 * 60 * 60),
    give_up_after: Duration::from_secs(24 * 60 * 60),
    ledger: LedgerLimits {
        size: 1 << 20,
        retention: i64::MAX,
    },
};

const VERSION_1: &str = include_str!("../../upgrading/version_1.sql");
const VERSION_2: &str = include_str!("../../upgrading/version_2.sql");
const VERSION_3: &str = include_str!("../../upgrading/version_3.sql");
const AS_VERSION_3: &str = include_str!("../../upgrading/as_version_3.sql");
/// What every layout holds: results, exports that wait, one that was moved, a large one, one with a key, and
/// a queue that is failing.
const ROWS: &str = "
    INSERT INTO exports (seq, id, owner, destination, accepted_at, payload)
        SELECT value, printf('01890a5d-ac96-774b-bcce-%012d', value), x'616c696365', 'https://a.example/',
            1700000000000 + value, CAST('[' || value || ']' AS BLOB)
        FROM (SELECT 1 AS value UNION VALUES (2), (3), (4), (5), (6), (7), (8));
    UPDATE exports SET finished_at = 1700000001000, payload = NULL,
        response = '{\"status\":\"200 OK\",\"status_code\":200,\"body\":\"'
            || CASE seq WHEN 1 THEN 'ok' ELSE hex(zeroblob(3000)) END || '\"}' WHERE seq IN (1, 8);
    UPDATE exports SET idempotency_key = 'k' || seq, fingerprint = zeroblob(32) WHERE seq IN (1, 5);
    UPDATE exports SET turn = 5, moved_at = 1700000002000, attempts = 2,
        last_error = '{\"kind\":\"closed\",\"message\":\"it broke\"}' WHERE seq = 3;
    UPDATE exports SET payload = CAST('\"' || hex(zeroblob(5000)) || '\"' AS BLOB) WHERE seq = 4;
    UPDATE exports SET owner = x'626f62', destination = 'https://b.example/', failures = 3, attempts = 3,
        next_attempt_at = 1700000003000, last_error = '{\"kind\":\"dns\",\"message\":\"no address\"}'
        WHERE seq IN (6, 7);";
const SEQS: std::ops::RangeInclusive<i64> = 1..=8;

/// The file of each layout. The service itself has made the last one of the second.
static LAYOUTS: LazyLock<[Vec<u8>; 4]> = LazyLock::new(|| {
    [1, 2, 3, 4].map(|version| {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join(FILE);
        let store = Connection::open(&file).expect("a database");
        let all = match version {
            1 => [VERSION_1, ROWS].concat(),
            // The steps to it are for a file that has rows.
            _ => [VERSION_1, ROWS, VERSION_2].concat(),
        };
        store.execute_batch(&all).expect("the layout");
        drop(store);
        if version == 3 {
            let second = file.with_extension("second");
            fs::rename(&file, &second).expect("a name");
            let store = Connection::open(&file).expect("a database");
            store.execute_batch(VERSION_3).expect("the layout");
            let second = second.to_str().expect("a path that is text");
            store
                .execute("ATTACH ? AS second", [second])
                .expect("a database");
            store.execute_batch(AS_VERSION_3).expect("the rows");
        }
        if version == 4 {
            let mut store = Store::open(&place(folder.path())).expect("a takeover");
            let entries = SEQS.map(|seq| Entry::new(Event::Pause, seq));
            store
                .record(&entries.collect::<Vec<_>>(), 1)
                .expect("the ledger");
        }
        fs::read(file).expect("a file")
    })
});

const COLUMNS: [&str; 28] = [
    "exports.id",
    "exports.owner",
    "exports.destination",
    "exports.payload",
    "exports.accepted_at",
    "exports.finished_at",
    "exports.response",
    "exports.attempts",
    "exports.last_error",
    "exports.failures",
    "exports.next_attempt_at",
    "exports.turn",
    "exports.moved_at",
    "exports.idempotency_key",
    "exports.fingerprint",
    "exports.running_at",
    "exports.first_moved_at",
    "exports.queue",
    "queues.failures",
    "queues.next_attempt_at",
    "queues.failing_since",
    "queues.last_error",
    "queues.destination",
    "running.millis",
    "queues.peer",
    "ledger.seq",
    "ledger.at",
    "ledger.hash",
];
const VALUES: [&str; 28] = [
    "NULL",
    "0",
    "1",
    "-1",
    "2",
    "5",
    "9223372036854775807",
    "9223372036854775806",
    "-9223372036854775808",
    "-9223372036854775807",
    "4294967296",
    "2147483648",
    "1700000000000",
    "'null'",
    "'no JSON'",
    "'{}'",
    "'{\"kind\":1,\"message\":[]}'",
    "'{\"kind\":\"x\",\"message\":\"\\u0000\"}'",
    "''",
    "'no URL'",
    "'https://10.0.0.1/'",
    "'01890A5D-AC96-774B-BCCE-000000000002'",
    "char(0)",
    "'k1'",
    "CAST(x'ff' AS TEXT)",
    "x''",
    "x'ff'",
    "zeroblob(32)",
];

pub fn run(bytes: &[u8]) {
    let [layout, in_wal, changes @ ..] = bytes else {
        return;
    };
    let (changes, _) = changes.as_chunks::<4>();
    let changes = &changes[..changes.len().min(16)];
    let folder = tempfile::tempdir().expect("a folder");
    let left = leave(
        folder.path(),
        usize::from(*layout) % 4,
        in_wal % 2 == 1,
        changes,
    );
    let readable = readable(folder.path());

    let store = match Store::open(&place(folder.path())) {
        Ok(store) => store,
        Err(error) => return assert!(left.beginning, "{error}"),
    };
    let (exports, writer, _woken) = match Exports::open(
        store,
        LIMITS,
        LedgerKey::new(&[7; 32].into()),
        Arc::default(),
    ) {
        Ok(opened) => opened,
        Err(error) => return assert!(left.beginning, "{error}"),
    };
    let (stop, stopped) = bounded::<()>(0);
    let writing = thread::spawn(move || writer.run(&stopped));
    let mut service = Service {
        exports,
        waits: Arc::default(),
    };
    if left.beginning {
        // Statements may fail in any way.
        drop((stop, service));
        return writing.join().expect("the writer");
    }
    for export in &readable {
        // What a damaged index says is wrong cannot be told, unless all rows are read.
        if service.shows(export)
            || (left.is_changed && left.version == 4 && !repaired(folder.path()))
        {
            continue;
        }
        panic!("{} is lost", export.id);
    }
    for (key, payload) in [
        (Some("k1"), &b"[1]"[..]),
        (Some("k5"), b"[5]"),
        (None, b"[9]"),
    ] {
        service.submit(key, payload);
    }
    service.deliver();
    drop((stop, service));
    writing.join().expect("the writer");

    let mut store = Store::open(&place(folder.path())).expect("what was opened already");
    store
        .queues(|_, found| {
            let failing = found.failing.is_some();
            // Of two at the same position one waits for the next start, unless all are numbered in a takeover.
            let expected = failing || left.version == 4 || left.is_changed;
            assert!(expected, "an export waits for nothing");
        })
        .expect("what was read already");
}

/// What was done to a folder.
struct Left {
    version: i32,
    /// Whether a byte of its files was changed.
    is_changed: bool,
    /// Whether that was where the whole file is described.
    beginning: bool,
}

fn leave(folder: &Path, layout: usize, in_wal: bool, changes: &[[u8; 4]]) -> Left {
    let file = folder.join(FILE);
    let mut left = Left {
        version: layout as i32 + 1,
        is_changed: false,
        beginning: false,
    };
    fs::write(&file, &LAYOUTS[layout]).expect("a file");
    let store = Connection::open(&file).expect("a database");
    let mode = "PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF";
    store.execute_batch(mode).expect("a mode");
    let no_checkpoint = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
    store
        .set_db_config(no_checkpoint, in_wal)
        .expect("a setting");
    for [kind, column, row, value] in changes {
        if kind % 2 == 0 {
            let column = COLUMNS[usize::from(*column) % COLUMNS.len()];
            let (table, column) = column.split_once('.').expect("a table");
            let value = VALUES[usize::from(*value) % VALUES.len()];
            let sql =
                format!("UPDATE {table} SET {column} = {value} WHERE rowid = {row} OR {row} = 0");
            // Not every layout has every column, and no column takes every value.
            let _ = store.execute_batch(&sql);
        }
    }
    drop(store);
    for [kind, high, low, value] in changes {
        if kind % 2 == 1 {
            let name = if kind & 2 == 0 {
                FILE
            } else {
                "exports.db-wal"
            };
            let mut bytes = fs::read(folder.join(name)).unwrap_or_default();
            let at = usize::from(*high) << 8 | usize::from(*low);
            if bytes.is_empty() {
                continue;
            }
            let at = at % bytes.len();
            let length = [1, 1, 8, PAGE][usize::from(kind >> 2) % 4].min(bytes.len() - at);
            bytes[at..at + length].fill(*value);
            fs::write(folder.join(name), bytes).expect("a file");
            left.is_changed = true;
            left.beginning |= name != FILE || at < PAGE;
        }
    }
    left
}

/// An export as any program can read it.
#[derive(PartialEq)]
struct Readable {
    id: Uuid,
    owner: String,
    destination: String,
    response: Option<String>,
}

/// Those of the exports that can be read, each by itself, from a copy.
fn readable(folder: &Path) -> Vec<Readable> {
    let copy = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("a copy");
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
    let Ok(store) = Connection::open_with_flags(copy.path().join(FILE), flags) else {
        return Vec::new();
    };
    let whole = "id, owner, destination, finished_at, response, accepted_at, attempts, payload,
        idempotency_key, fingerprint, last_error, turn";
    let ask = |table: &str| format!("SELECT {whole} FROM {table} WHERE seq = ?");
    let joined =
        "SELECT exports.id, owner, destination, finished_at, response, accepted_at, attempts,
        payload, idempotency_key, fingerprint, exports.last_error, turn, running_at
        FROM exports NOT INDEXED CROSS JOIN queues NOT INDEXED WHERE seq = ? AND queues.id = queue";
    let first = ask("exports NOT INDEXED");
    let mut found: Vec<Readable> = Vec::new();
    for seq in SEQS {
        let read = |sql: &str| {
            store.query_row(sql, [seq], |row| {
                row.get::<_, i64>(5)?;
                row.get::<_, i64>(6)?;
                row.get::<_, Option<Vec<u8>>>(7)?;
                row.get::<_, Option<String>>(8)?;
                row.get::<_, Option<Vec<u8>>>(9)?;
                row.get::<_, Option<String>>(10)?;
                row.get::<_, Option<i64>>(11)?;
                let id = match row.get_ref(0)? {
                    rusqlite::types::ValueRef::Text(text) => Uuid::try_parse_ascii(text).ok(),
                    rusqlite::types::ValueRef::Blob(bytes) => Uuid::from_slice(bytes).ok(),
                    _ => None,
                };
                let finished: Option<i64> = row.get(3)?;
                let response: Option<String> = row.get(4)?;
                let export = Readable {
                    id: id.ok_or(rusqlite::Error::InvalidQuery)?,
                    owner: String::from_utf8(row.get(1)?)
                        .map_err(|_| rusqlite::Error::InvalidQuery)?,
                    destination: row.get(2)?,
                    response: response.filter(|_| finished.is_some()),
                };
                // That one has expired.
                Ok(finished.is_none_or(|at| at >= 0).then_some(export))
            })
        };
        if let Ok(Some(export)) = read(&first).or_else(|_| read(joined)) {
            found.push(export);
        }
    }
    // Of two with the same id one is enough.
    found.sort_by_key(|export| export.id);
    found.dedup_by_key(|export| export.id);
    found
}

fn repaired(folder: &Path) -> bool {
    let mut entries = fs::read_dir(folder).expect("a folder");
    entries.any(|entry| {
        let name = entry.expect("an entry").file_name();
        name.to_string_lossy().contains(".damaged-")
    })
}

fn place(folder: &Path) -> Place {
    Place::Folder(folder.to_owned())
}

struct Service {
    exports: Arc<Exports>,
    waits: Arc<Waits>,
}

impl Service {
    fn ask(&mut self, ask: impl FnOnce(&Arc<Exports>, Reply)) -> (u16, String) {
        let wait = self.waits.enter(([127, 0, 0, 1], 1).into());
        wait.ask();
        let to = self.waits.answerer(wait.number()).expect("a connection");
        let target = "/export".into();
        ask(&self.exports, Reply { to, target });
        let answer = wait.answer(PATIENCE, PATIENCE, || true).expect("an answer");
        (answer.status, answer.body)
    }

    /// Whether a poll finds an export, with its result if it has one.
    fn shows(&mut self, export: &Readable) -> bool {
        let key = Key::derive(b"key");
        let caveats = ["target = t", "method = POST", "path = *"].map(str::to_owned);
        let caveats = caveats
            .into_iter()
            .chain([format!("destination = {}", export.destination)]);
        let request = Request {
            target: "t",
            method: "POST",
            path: "/export",
        };
        let token = Macaroon::mint(&key, &export.owner, caveats).to_v1();
        let grant =
            token.and_then(|token| authorize(&token, &key, &request, SystemTime::now()).ok());
        let Some(grant) = grant else {
            return true;
        };
        let query = Query {
            id: export.id,
            grant,
            destination: None,
        };
        let (status, body) = self.ask(|exports, reply| exports.poll(&query, Instant::now(), reply));
        assert!(
            status == 200 || status == 404,
            "a poll was answered {status}"
        );
        let is_json = |text: &&String| serde_json::from_str::<serde_json::Value>(text).is_ok();
        match export.response.as_ref().filter(is_json) {
            Some(response) => body.contains(response.as_str()),
            None => status == 200,
        }
    }

    fn submit(&mut self, key: Option<&str>, payload: &[u8]) {
        let submission = Submission {
            owner: b"alice".to_vec(),
            destination: Destination::parse("https://a.example/").expect("a URL"),
            payload: payload.to_vec(),
            idempotency_key: key.map(str::to_owned),
        };
        let now = Instant::now();
        let (status, _) = self.ask(|exports, reply| exports.submit(submission, now, now, reply));
        let expected = status == 200 || key.is_some() && status == 409;
        assert!(expected, "a submission was answered {status}");
    }

    /// Does as the worker does, with a destination that always answers.
    fn deliver(&self) {
        for _ in 0..100 {
            match self.exports.next(true) {
                Work::Attempt(turn) => {
                    let Some(taken) = self.exports.begin(&turn) else {
                        continue;
                    };
                    let result = ExtResponse::with_status(200, "OK");
                    let sent = Sent {
                        address: String::new(),
                        bytes_out: 1,
                        bytes_in: 0,
                        digest: None,
                        ms: 0,
                        attempt: 1,
                    };
                    let (export, quick) = (&taken.export, Duration::ZERO);
                    match taken.payload {
                        Some(_) => self.exports.answered(export, result, sent, quick),
                        None => self.exports.ended(export, result, sent),
                    }
                }
                Work::GiveUp(given_up) => {
                    let result = ExtResponse::with_status(502, "Bad Gateway");
                    self.exports.give_up(*given_up, result);
                }
                Work::Wait(_) => return,
            }
        }
        panic!("there is always something to do");
    }
}
