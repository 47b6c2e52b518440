//! A folder that an earlier release has written is taken over with everything in it: contract section 1,
//! and the store.

mod support;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ToSql, params, params_from_iter};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{
    Arrival, Destination, Gate, PATIENCE, Reaction, Service, nowhere, ok, payload, program,
    token_of,
};
use tempfile::TempDir;

/// The schema of the first release.
const VERSION_1: &str = include_str!("upgrading/version_1.sql");
/// The steps from there to the schema of the second release.
const VERSION_2: &str = include_str!("upgrading/version_2.sql");
/// The schema of the third release, which made a new file of the second one's.
const VERSION_3: &str = include_str!("upgrading/version_3.sql");
/// The rows of a file of the second release, in tables of the third.
const AS_VERSION_3: &str = include_str!("upgrading/as_version_3.sql");

/// For how long the service had been running, in milliseconds, when a file of version 2 was left.
const RUNNING: i64 = 300_000_000;
const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

/// The file of an earlier release, open as that release had it, so that a test can fill it.
struct Old {
    version: u32,
    /// Unix milliseconds.
    now: i64,
    store: Connection,
    file: PathBuf,
    _folder: TempDir,
}

/// A row of `exports`.
#[derive(Clone)]
struct Row {
    seq: i64,
    id: String,
    owner: &'static str,
    url: String,
    payload: Vec<u8>,
}

impl Old {
    /// A file of the first or second release.
    fn new(version: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("exports.db");
        let store = Connection::open(&file).unwrap();
        store.execute_batch("PRAGMA journal_mode = WAL").unwrap();
        store.execute_batch(VERSION_1).unwrap();
        if version == 2 {
            store.execute_batch(VERSION_2).unwrap();
            store
                .execute("UPDATE running SET millis = ?", [RUNNING])
                .unwrap();
        }
        let sql = "SELECT unixepoch() * 1000";
        let now = store.query_row(sql, [], |row| row.get(0)).unwrap();
        Self {
            version,
            now,
            store,
            file,
            _folder: folder,
        }
    }

    /// The same as the third release has left it.
    fn into_third(self) -> Self {
        let file = self.file.with_file_name("third.db");
        let store = Connection::open(&file).unwrap();
        store.execute_batch("PRAGMA journal_mode = WAL").unwrap();
        store.execute_batch(VERSION_3).unwrap();
        store
            .execute(
                "ATTACH ? AS second",
                [self
                    .file
                    .to_str()
                    .expect("a temporary folder's path is text")],
            )
            .unwrap();
        store.execute_batch(AS_VERSION_3).unwrap();
        Self {
            version: 3,
            store,
            file,
            ..self
        }
    }

    /// An export that was accepted half an hour ago, with these columns besides or instead of the usual.
    fn export(&self, owner: &'static str, url: &str, columns: &[(&str, &dyn ToSql)]) -> Row {
        let next = "SELECT coalesce(max(seq), 0) + 1 FROM exports";
        let seq = self.store.query_row(next, [], |row| row.get(0)).unwrap();
        let row = Row {
            seq,
            id: format!("01890a5d-ac96-774b-bcce-{seq:012}"),
            owner,
            url: url.to_owned(),
            payload: payload(usize::try_from(seq).unwrap())
                .to_string()
                .into_bytes(),
        };
        let accepted_at = self.now - HOUR / 2;
        let running_at = RUNNING - HOUR / 2;
        let mut all: HashMap<&str, &dyn ToSql> = HashMap::from([
            ("seq", &row.seq as &dyn ToSql),
            ("id", &row.id),
            ("destination", &row.url),
            ("payload", &row.payload),
            ("accepted_at", &accepted_at),
        ]);
        let owner = owner.as_bytes();
        all.insert("owner", &owner);
        if self.version == 2 {
            all.insert("running_at", &running_at);
        }
        all.extend(columns.iter().copied());
        let (names, values): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        let sql = format!(
            "INSERT INTO exports ({}) VALUES ({})",
            names.join(", "),
            vec!["?"; names.len()].join(", ")
        );
        self.store.execute(&sql, params_from_iter(values)).unwrap();
        row
    }

    /// One that was finished some time ago, in milliseconds.
    fn finished(
        &self,
        owner: &'static str,
        url: &str,
        ago: i64,
        response: &Value,
        columns: &[(&str, &dyn ToSql)],
    ) -> Row {
        let (finished_at, response) = (self.now - ago, response.to_string());
        let nothing = None::<Vec<u8>>;
        let usual: [(&str, &dyn ToSql); 3] = [
            ("payload", &nothing),
            ("finished_at", &finished_at),
            ("response", &response),
        ];
        self.export(owner, url, &[&usual, columns].concat())
    }

    /// An idempotency key for a row's submission.
    fn key(&self, row: &Row, key: &str) {
        let sql = "UPDATE exports SET idempotency_key = ?, fingerprint = ? WHERE seq = ?";
        let fingerprint = Sha256::new()
            .chain_update(&row.url)
            .chain_update(b"\n")
            .chain_update(&row.payload)
            .finalize();
        self.store
            .execute(sql, params![key, fingerprint.to_vec(), row.seq])
            .unwrap();
    }

    /// Makes the queue of this export fail, with this export tried last, and wait for this many
    /// milliseconds.
    fn failing(&self, row: &Row, failures: u32, wait: i64, error: &str) {
        if self.version == 1 {
            let sql = "UPDATE exports SET failures = ?, next_attempt_at = ? WHERE seq = ?";
            let values = params![failures, self.now + wait, row.seq];
            self.store.execute(sql, values).unwrap();
        } else {
            let since = RUNNING - HOUR / 4;
            let sql = "INSERT INTO queues VALUES (?, ?, ?, ?, ?, ?)";
            let owner = row.owner.as_bytes();
            let values = params![owner, row.url, failures, RUNNING + wait, since, error];
            self.store.execute(sql, values).unwrap();
        }
    }

    /// Moves an export behind the one that was the last, after this many others had been moved.
    fn moved(&self, row: &Row, behind: &Row, before: i64) {
        self.store
            .execute(
                "UPDATE exports SET turn = ?, moved_at = ? WHERE seq = ?",
                params![behind.seq, self.now - 10_000 + before, row.seq],
            )
            .unwrap();
        if self.version == 2 {
            // Exports that the first release moved have such times, and no first one.
            let (at, first) = match before {
                0 => (-1000, None),
                1 => (0, None),
                _ => (RUNNING - 10_000 + before, Some(RUNNING - 20_000)),
            };
            self.store
                .execute(
                    "UPDATE exports SET moved_at = ?, first_moved_at = ? WHERE seq = ?",
                    params![at, first, row.seq],
                )
                .unwrap();
        }
    }

    /// Copies it to this folder, as a kill leaves it: a part is still in the write-ahead log.
    fn leave(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        for end in ["", "-wal"] {
            let mut from = self.file.clone().into_os_string();
            from.push(end);
            fs::copy(from, folder.join(format!("exports.db{end}"))).unwrap();
        }
        fs::write(folder.join("lock"), "").unwrap();
    }
}

fn error(kind: &str, message: &str) -> String {
    json!({"kind": kind, "message": message}).to_string()
}

/// What a file of an earlier release holds, and what has to become of it.
struct Left {
    old: Old,
    /// Where a destination will be; nobody listens there yet.
    address: SocketAddr,
    /// They wait for ten minutes. Each with its attempts, and the error that it must show.
    waiting: Vec<(Row, u32, Value)>,
    finished: Vec<(Row, Value)>,
    expired: Row,
    /// Exports that finish without an attempt, with the status and kind of their result.
    ending: Vec<(Row, u16, &'static str)>,
    keys: Vec<(Row, &'static str)>,
    /// The queues for the destination in the order of delivery, with attempts and errors so far.
    queues: Vec<Vec<(Row, u32, Option<String>)>>,
}

impl Left {
    fn new(version: u32) -> Self {
        let old = Old::new(version.min(2));
        // Half of it is in the database, the rest in the write-ahead log.
        old.store
            .execute_batch("PRAGMA wal_autocheckpoint = 0")
            .unwrap();
        let (dead, _) = nowhere();
        let (base, address) = nowhere();
        let [plain, moving, due, losing, done, other] =
            ["plain", "moving", "due", "losing", "done", "other"]
                .map(|end| format!("{base}/{end}"));
        let closed = error("closed", "the connection was closed");
        let refused = error("connect", "as it was");
        let unreachable = error("connect", "as it was for alice");
        let tried = |attempts: &'static u32, error| {
            [
                ("attempts", attempts as &dyn ToSql),
                ("last_error", error as &dyn ToSql),
            ]
        };

        let mut queues = Vec::new();
        let [m1, m2] = [(); 2].map(|()| old.export("", &moving, &tried(&2, &closed)));
        let p1 = old.export("", &plain, &[]);
        let m3 = old.export("", &moving, &tried(&300, &closed));
        let a1 = old.export("alice", &plain, &[]);
        let m4 = old.export("", &moving, &[]);
        old.moved(&m2, &m4, 0);
        old.moved(&m1, &m4, 1);
        let binary: &[u8] = b"\0\xff\xfe";
        let mut p2 = old.export("", &plain, &[("payload", &binary)]);
        p2.payload = binary.to_vec();
        let [m5, m6] = [(); 2].map(|()| old.export("", &moving, &[]));

        let responses = [
            json!({"status": "200 OK", "status_code": 200, "body": "{\"a\": 1}\u{e9}\n"}),
            json!({"status": "404 Not Found", "status_code": 404, "body": "", "body_base64": "AP8="}),
            json!({"status": "200 OK", "status_code": 200, "body": "x".repeat(20_000), "truncated": true}),
            json!({"status": "504 Gateway Timeout", "status_code": 504, "body": "",
                "error": {"kind": "timeout", "message": "it took over 30 s", "attempts": 12}}),
        ];
        let owners = ["", "alice"].into_iter().cycle();
        let finished: Vec<_> = owners
            .zip(responses)
            .map(|(owner, response)| {
                let row = old.finished(owner, &done, HOUR, &response, &[]);
                (row, response)
            })
            .collect();
        let expired = old.finished("", &done, 2 * DAY, &json!({"status_code": 200}), &[]);

        // The last of all was a finished one then.
        old.moved(&m3, &expired, 2);
        let m7 = old.export("", &moving, &[]);
        old.store
            .execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")
            .unwrap();

        let d1 = old.export("", &due, &tried(&4, &refused));
        let d2 = old.export("", &due, &[]);
        old.failing(&d1, 4, -5000, &refused);
        let a2 = old.export("alice", &plain, &[]);
        let p3 = old.export("", &plain, &[]);
        let nothing = None::<Vec<u8>>;
        let l1 = old.export("", &losing, &[("payload", &nothing)]);
        let l2 = old.export("", &losing, &[]);

        let w1 = old.export("", &dead, &tried(&3, &refused));
        let w2 = old.export("", &dead, &[]);
        old.failing(&w1, 3, 600_000, &refused);
        let w3 = old.export("alice", &dead, &tried(&9, &unreachable));
        old.failing(&w3, 9, 600_000, &unreachable);

        let bad = ["ftp://a.example/in", "http://user@a.example/in"];
        let bad = bad.map(|url| (old.export("", url, &[]), 502, "bad_uri"));

        let mut keys = vec![
            (p3.clone(), "waits"),
            (a1.clone(), "waits"),
            (w2.clone(), "waits-long"),
            (finished[0].0.clone(), "done"),
            (finished[1].0.clone(), "done"),
        ];
        if version > 1 {
            // The first release had a key once for each owner.
            let again = old.export("", &other, &[]);
            keys.push((again.clone(), "waits"));
            queues.push(vec![(again, 0, None)]);
        }
        for (row, key) in &keys {
            old.key(row, key);
        }
        let untried = |row: Row| (row, 0, None);
        queues.extend([
            [p1, p2, p3].map(untried).into(),
            [a1, a2].map(untried).into(),
            vec![
                untried(m4),
                (m2, 2, Some(closed.clone())),
                (m1, 2, Some(closed.clone())),
                untried(m5),
                untried(m6),
                (m3, 300, Some(closed)),
                untried(m7),
            ],
            vec![(d1, 4, Some(refused.clone())), untried(d2)],
            vec![untried(l2)],
        ]);
        let shown = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let old = match version {
            3 => old.into_third(),
            _ => old,
        };
        Self {
            old,
            address,
            waiting: vec![
                (w1, 3, shown(&refused)),
                (w2, 0, shown(&refused)),
                (w3, 9, shown(&unreachable)),
            ],
            finished,
            expired,
            ending: bad.into_iter().chain([(l1, 502, "lost")]).collect(),
            keys,
            queues,
        }
    }

    /// Accepts connections like a destination, and never reads from them, while something is done.
    fn while_nothing_arrives<T>(&self, done: impl FnOnce() -> T) -> T {
        let listener = TcpListener::bind(self.address).unwrap();
        let result = done();
        // Closing it is not enough: a process that is being started holds a copy until its exec.
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        result
    }

    /// Asserts that a service on the folder has all of it, continues with it, and sends each waiting export
    /// once.
    fn goes_on(&self, folder: Arc<TempDir>) {
        let gate = Gate::default();
        let passing = gate.clone();
        let destination = Destination::start_at(self.address, move |_| {
            passing.pass();
            ok()
        });
        let service = Service::start_in(folder, &[]);
        self.is_shown_as_it_was(&service);
        self.keys_are_known(&service);
        gate.open();
        let all: Vec<_> = self.queues.iter().flatten().map(|(row, ..)| row).collect();
        for row in &all {
            assert_eq!(result(&service, row)["status_code"], 200);
        }
        let arrivals = destination.arrivals();
        let by_id: HashMap<_, _> = arrivals.iter().map(|one| (id_of(one), one)).collect();
        for row in &all {
            let arrival = by_id[row.id.as_str()];
            assert_eq!(arrival.body, row.payload, "{}", row.id);
            let path = row.url.rsplit_once('/').unwrap().1;
            assert!(arrival.head.contains(&format!("/{path} ")));
        }
        for queue in &self.queues {
            let expected: Vec<_> = queue.iter().map(|(row, ..)| row.id.as_str()).collect();
            let ids = arrivals.iter().map(id_of);
            let arrived: Vec<_> = ids.filter(|id| expected.contains(id)).collect();
            assert_eq!(arrived, expected);
        }
        assert_eq!(arrivals.len(), all.len(), "each arrives once, and no other");

        // The same again with what is on disk now.
        let service = service.kill_and_restart();
        for row in &all {
            assert_eq!(result(&service, row)["status_code"], 200);
        }
        self.is_shown_as_it_was(&service);
        self.keys_are_known(&service);
        assert_eq!(destination.arrivals().len(), 0);
    }

    fn is_shown_as_it_was(&self, service: &Service) {
        for (row, attempts, error) in &self.waiting {
            let shown = poll(service, row);
            assert_eq!(shown["state"], "Pending", "{shown}");
            assert_eq!(shown["attempts"], *attempts, "{shown}");
            assert_eq!(shown["last_error"], *error, "{shown}");
            let wait = shown["next_attempt_in"].as_f64().unwrap();
            assert!(wait > 300.0 && wait <= 600.0, "the wait goes on: {shown}");
        }
        for (row, response) in &self.finished {
            let shown = poll(service, row);
            assert_eq!(shown["state"], "Finished", "{shown}");
            assert_eq!(shown["ext_response"], *response);
        }
        for (row, status, kind) in &self.ending {
            let result = result(service, row);
            assert_eq!(result["status_code"], *status, "{result}");
            assert_eq!(result["error"]["kind"], *kind, "{result}");
        }
        let deadline = Instant::now() + PATIENCE;
        while status(service, &self.expired, self.expired.owner) != 404 {
            assert!(Instant::now() < deadline, "it never expires");
            thread::sleep(Duration::from_millis(20));
        }
        let (row, ..) = &self.waiting[0];
        assert_eq!(status(service, row, "alice"), 404, "it is another's");
        for queue in &self.queues {
            // The first export is being sent.
            for (row, attempts, error) in &queue[1..] {
                let shown = poll(service, row);
                if shown["state"] == "Pending" {
                    assert_eq!(
                        shown["attempts"].as_u64().unwrap_or(0),
                        u64::from(*attempts)
                    );
                }
                if let (Some(error), "Pending") = (error, shown["state"].as_str().unwrap()) {
                    assert_eq!(shown["last_error"].to_string(), *error);
                }
            }
        }
    }

    fn keys_are_known(&self, service: &Service) {
        for (row, key) in &self.keys {
            let submit = |data: &str| {
                let body = format!(r#"{{"uri":"{}","data":{data}}}"#, row.url);
                let token = token_of(row.owner, &row.url);
                let headers = [("X-Api-Key", token.as_str()), ("Idempotency-Key", key)];
                service.request("POST", "/export", &headers, body.as_bytes())
            };
            let repeated = submit(str::from_utf8(&row.payload).unwrap());
            assert_eq!(repeated.status, 200, "{key}: {}", repeated.body);
            assert_eq!(repeated.json()["id"], row.id.as_str(), "{key}");
            assert_eq!(submit("[\"other\"]").status, 409, "{key}");
        }
    }
}

fn id_of(arrival: &Arrival) -> &str {
    arrival.header("webhook-id").unwrap()
}

fn status(service: &Service, row: &Row, owner: &str) -> u16 {
    let token = token_of(owner, &row.url);
    let poll = service.post("/export", &token, &json!({"id": row.id}));
    poll.status
}

fn poll(service: &Service, row: &Row) -> Value {
    let token = token_of(row.owner, &row.url);
    let poll = service.post("/export", &token, &json!({"id": row.id}));
    assert_eq!(poll.status, 200, "{}: {}", row.id, poll.body);
    poll.json()
}

/// Long-polls until it is finished.
fn result(service: &Service, row: &Row) -> Value {
    let token = token_of(row.owner, &row.url);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let poll = service.post("/lp/export?timeout=10", &token, &json!({"id": row.id}));
        // While damage is found and repaired, the store cannot be read.
        if poll.status != 503 {
            assert_eq!(poll.status, 200, "{}: {}", row.id, poll.body);
            if poll.json()["state"] == "Finished" {
                return poll.json()["ext_response"].clone();
            }
        }
        assert!(Instant::now() < deadline, "still {}", poll.body);
    }
}

fn folder() -> Arc<TempDir> {
    Arc::new(tempfile::tempdir().unwrap())
}

#[test]
fn a_folder_of_an_earlier_release_is_taken_over_with_everything_in_it() {
    for version in [1, 2, 3] {
        let left = Left::new(version);
        let folder = folder();
        left.old.leave(&folder.path().join("data"));
        left.goes_on(folder);
    }
}

/// All calls that change files, except shared memory, which needs no order.
const WRITES: &str =
    "/^(p?write|copy_file_range|sendfile|fsync|fdatasync|ftruncate|fallocate|rename|link|unlink)";

/// The program under strace, killed before a thread's `nth` call that changes a file. Strace is a
/// grandchild, so that the child is the program.
fn killed_at(nth: usize) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-D", "-f", "-qq", "-o", "/dev/null"])
        .args(["-e", &format!("trace={WRITES}"), "-e"])
        .arg(format!("inject={WRITES}:signal=KILL:when={nth}"))
        .arg(program());
    command
}

/// Kills a start at each of these calls, each time on a new folder, and checks the folder afterwards. Ends
/// with the first start that is not killed.
fn killed_at_each_write(
    calls: impl Iterator<Item = usize>,
    new: impl Fn() -> Left,
    look: impl Fn(&Left, Arc<TempDir>),
) {
    for nth in calls {
        let left = new();
        let folder = folder();
        let data = folder.path().join("data");
        left.old.leave(&data);
        let (listens, code, log) =
            left.while_nothing_arrives(|| support::try_start(killed_at(nth), &data));
        assert!(listens || code.is_none(), "{code:?}: {log}");
        look(&left, folder);
        if listens {
            eprintln!("version {}: {nth} calls", left.old.version);
            return;
        }
    }
}

#[test]
fn a_takeover_from_the_first_release_that_is_killed_at_a_write_is_completed_by_the_next_start() {
    // Together with the next test this kills at most calls; each kill costs a second.
    killed_at_each_write((1..).step_by(3), || Left::new(1), Left::goes_on);
}

#[test]
fn a_takeover_from_the_second_release_that_is_killed_at_a_write_is_completed_by_the_next_start() {
    killed_at_each_write((2..).step_by(3), || Left::new(2), Left::goes_on);
}

impl Left {
    /// With this many more results of this many bytes each. Returns some of their exports.
    fn with_more(version: u32, count: i64, bytes: i64) -> (Self, Vec<Row>) {
        let left = Self::new(version);
        let url = "https://a.example/more";
        let first = 100;
        let sql = "INSERT INTO exports (seq, id, owner, destination, accepted_at, finished_at, response)
             WITH RECURSIVE numbers (n) AS (SELECT ?1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?2)
             SELECT n, format('01890a5d-ac96-774b-bcce-%012d', n), x'', ?3, ?4, ?4,
                 json_object('status_code', n, 'body', format('%0*d', ?5, n))
             FROM numbers";
        let finished_at = left.old.now - HOUR;
        let values = params![first, first + count - 1, url, finished_at, bytes];
        left.old.store.execute(sql, values).unwrap();
        let row = |seq| Row {
            seq,
            id: format!("01890a5d-ac96-774b-bcce-{seq:012}"),
            owner: "",
            url: url.to_owned(),
            payload: Vec::new(),
        };
        let some = (first..first + count).step_by(97).map(row).collect();
        (left, some)
    }
}

/// Asserts that these of [`Left::with_more`] are there.
fn are_there(more: &[Row], folder: &Arc<TempDir>) {
    let service = Service::start_in(folder.clone(), &[]);
    for row in more {
        assert_eq!(result(&service, row)["status_code"], row.seq);
    }
}

#[test]
fn a_killed_takeover_of_more_than_fits_into_memory_is_completed_by_the_next_start() {
    let more = std::cell::RefCell::new(Vec::new());
    let new = || {
        let (left, some) = Left::with_more(2, 10_000, 300);
        more.replace(some);
        left
    };
    // Everything is checked after each kill, so only some calls are killed at.
    let calls = std::iter::successors(Some(8), |nth| Some(4 * nth));
    killed_at_each_write(calls, new, |left, folder| {
        left.goes_on(folder.clone());
        are_there(&more.borrow(), &folder);
    });
}

/// A small file system on a folder, which is gone when this is dropped.
struct SmallDisk {
    holder: Child,
    folder: PathBuf,
}

impl SmallDisk {
    /// With this many bytes; `None` if the system does not allow that.
    fn new(folder: &Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(folder).unwrap();
        let mut holder = Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c"])
            .arg(r#"mount -t tmpfs -o size="$2" tmpfs "$1" && echo mounted && exec cat"#)
            .args(["sh", folder.to_str().unwrap(), &bytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        BufReader::new(holder.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        if said != "mounted\n" {
            holder.wait().unwrap();
            support::not_run("a disk of its own takes a user namespace with mounts");
            return None;
        }
        Some(Self {
            holder,
            folder: folder.to_owned(),
        })
    }

    /// The path of the folder from outside its mount namespace.
    fn outside(&self) -> PathBuf {
        let inside = self.folder.strip_prefix("/").unwrap();
        Path::new(&format!("/proc/{}/root", self.holder.id())).join(inside)
    }

    /// The program, with this disk mounted.
    fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .env_clear()
            .args(["--preserve-credentials", "--user", "--mount", "--target"])
            .arg(self.holder.id().to_string())
            .arg(program());
        command
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn bytes_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap();
    // A disk counts in pages.
    let sizes = entries.map(|entry| {
        entry
            .unwrap()
            .metadata()
            .unwrap()
            .len()
            .next_multiple_of(4096)
    });
    sizes.sum()
}

#[test]
fn a_folder_on_a_nearly_full_disk_is_taken_over_or_left_usable_elsewhere() {
    for version in [1, 2] {
        let mut room = 0;
        loop {
            let (left, more) = Left::with_more(version, 2000, 300);
            let (small, large) = (folder(), folder());
            let original = small.path().join("original");
            // As a release that was stopped leaves it: the write-ahead log takes no room.
            let emptied = "PRAGMA wal_checkpoint(TRUNCATE)";
            left.old.store.execute_batch(emptied).unwrap();
            left.old.leave(&original);
            let size = bytes_in(&original);
            let Some(disk) = SmallDisk::new(&small.path().join("data"), size + room) else {
                return;
            };
            for entry in fs::read_dir(&original).unwrap() {
                let from = entry.unwrap().path();
                let to = disk.outside().join(from.file_name().unwrap());
                fs::copy(from, to).unwrap();
            }
            let (listens, code, log) =
                left.while_nothing_arrives(|| support::try_start(disk.command(), &disk.folder));
            if !listens {
                assert_eq!(code, Some(1), "{log}");
                eprintln!("version {version}, {size} bytes, {room} more: {log}");
                let reasons = ["disk", "No space left on device"];
                assert!(reasons.iter().any(|reason| log.contains(reason)), "{log}");
            }
            let data = large.path().join("data");
            fs::create_dir(&data).unwrap();
            for entry in fs::read_dir(disk.outside()).unwrap() {
                let from = entry.unwrap().path();
                if from.is_file() {
                    fs::copy(&from, data.join(from.file_name().unwrap())).unwrap();
                }
            }
            left.goes_on(large.clone());
            are_there(&more, &large);
            if listens {
                eprintln!("version {version}, {size} bytes, {room} more: taken over");
                break;
            }
            assert!(room < 8 * size, "it takes more than eight times its size");
            room = (2 * room).max(4096);
        }
    }
}

#[test]
fn a_takeover_does_not_reset_how_long_exports_have_been_tried() {
    let old = Old::new(2);
    let (dead, _) = nowhere();
    let breaking = Destination::start(|_| Reaction::Raw(Vec::new()));
    let as_it_was = error("connect", "as it was");
    let (day_ago, just_now) = (RUNNING - DAY - 10_000, RUNNING - 10_000);
    let since = |at: &'static i64| [("running_at", at as &dyn ToSql)];
    let accepted: &'static [i64; 2] = Box::leak(Box::new([day_ago, just_now]));
    // A queue that has been failing for a day; one export is as old, the other is not.
    let old_one = old.export(
        "",
        &dead,
        &[&since(&accepted[0])[..], &[("attempts", &40)]].concat(),
    );
    let young = old.export("", &dead, &since(&accepted[1]));
    old.failing(&old_one, 40, 0, &as_it_was);
    let failing_since = RUNNING - DAY - 5000;
    old.store
        .execute("UPDATE queues SET failing_since = ?", [failing_since])
        .unwrap();
    // An export that has failed for just as long, in a queue that has not.
    let other = old.export(
        "alice",
        &dead,
        &[&since(&accepted[0])[..], &[("attempts", &7)]].concat(),
    );
    old.failing(&other, 7, 0, &as_it_was);
    // An export that has been refused for a day in a queue that is not failing, and a later one.
    let refused = [
        ("attempts", &30 as &dyn ToSql),
        ("first_moved_at", &accepted[0]),
    ];
    let refused = old.export(
        "",
        &breaking.url,
        &[&since(&accepted[0])[..], &refused].concat(),
    );
    let behind = old.export("", &breaking.url, &since(&accepted[1]));
    let folder = folder();
    old.leave(&folder.path().join("data"));
    let service = Service::start_in(folder, &[]);
    for (row, kind, attempts) in [(&old_one, "connect", 40), (&refused, "closed", 30)] {
        let result = result(&service, row);
        assert_eq!(result["status_code"], 502, "{result}");
        assert_eq!(result["error"]["kind"], kind, "{result}");
        // With or without a last one.
        let tried = result["error"]["attempts"].as_u64().unwrap();
        assert!((attempts..=attempts + 1).contains(&tried), "{result}");
    }
    for (row, attempts) in [(&young, 1), (&other, 8), (&behind, 1)] {
        let deadline = Instant::now() + PATIENCE;
        while poll(&service, row)["attempts"].as_u64() < Some(attempts) {
            assert!(Instant::now() < deadline, "{}", poll(&service, row));
            thread::sleep(Duration::from_millis(50));
        }
        let shown = poll(&service, row);
        assert_ne!(shown["state"], "Finished", "{shown}");
    }
}

#[test]
fn an_empty_queues_backoff_does_not_delay_a_new_export_after_a_takeover() {
    let old = Old::new(2);
    let destination = Destination::start(|_| ok());
    let last = old.finished(
        "",
        &destination.url,
        HOUR,
        &json!({"status_code": 502}),
        &[],
    );
    old.failing(&last, 9, 600_000, &error("connect", "as it was"));
    let folder = folder();
    old.leave(&folder.path().join("data"));
    let service = Service::start_in(folder, &[]);
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
}

#[test]
fn an_invalid_row_loses_only_its_own_export() {
    // With the status of its result, if it must have one.
    let cases = [
        ("last_error = 'no JSON', attempts = 1", Some(200)),
        ("last_error = ''", Some(200)),
        ("payload = NULL", Some(502)),
        ("payload = x''", Some(200)),
        ("destination = ''", None),
        ("destination = 'http://'", None),
        ("destination = 'no URL'", None),
        ("turn = -5, moved_at = 0", Some(200)),
        (
            "turn = 9223372036854775807, moved_at = 9223372036854775807",
            Some(200),
        ),
        ("turn = NULL, moved_at = 5", Some(200)),
        ("accepted_at = -9223372036854775808", Some(200)),
        ("accepted_at = 9223372036854775807", Some(200)),
        ("id = 'no UUID'", None),
        ("response = 'no JSON'", Some(200)),
        (
            "finished_at = unixepoch() * 1000, payload = NULL, response = 'no JSON'",
            None,
        ),
        ("finished_at = unixepoch() * 1000, payload = NULL", None),
        ("idempotency_key = 'key'", Some(200)),
        ("idempotency_key = char(0), fingerprint = x'00'", Some(200)),
        ("failures = -1", Some(200)),
        ("failures = 9223372036854775807", Some(200)),
        ("attempts = -1", Some(200)),
        ("attempts = 9223372036854775807", Some(200)),
    ];
    for version in [1, 2] {
        for (change, expected) in cases {
            let old = Old::new(version);
            let destination = Destination::start(|_| ok());
            let rows = ["", "", "", "alice"].map(|owner| old.export(owner, &destination.url, &[]));
            let sql = format!("UPDATE exports SET {change} WHERE seq = ?");
            old.store.execute(&sql, [rows[1].seq]).unwrap();
            let folder = folder();
            old.leave(&folder.path().join("data"));
            let service = Service::start_in(folder, &[]);
            for row in [&rows[0], &rows[2], &rows[3]] {
                assert_eq!(result(&service, row)["status_code"], 200, "{change}");
            }
            if let Some(expected) = expected {
                let result = result(&service, &rows[1]);
                assert_eq!(result["status_code"], expected, "{change}: {result}");
            }
            let expected = 3 + usize::from(expected == Some(200));
            assert_eq!(destination.arrivals().len(), expected, "{change}");
        }
    }
}

#[test]
fn twenty_thousand_exports_for_a_dead_destination_delay_no_other() {
    let count = 20_000;
    let old = Old::new(2);
    let (dead, address) = nowhere();
    let destination = Destination::start(|_| ok());
    let sql = "INSERT INTO exports (seq, id, owner, destination, payload, accepted_at, running_at)
         WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?1)
         SELECT n, format('01890a5d-ac96-774b-bcce-%012d', n), x'', ?2,
             CAST(format('[%d]', n) AS BLOB), ?3, ?4 FROM numbers";
    let values = params![count, dead, old.now - HOUR, RUNNING - HOUR];
    old.store.execute(sql, values).unwrap();
    let good = [(); 10].map(|()| old.export("alice", &destination.url, &[]));
    let folder = folder();
    old.leave(&folder.path().join("data"));
    let service = Service::start_in(folder, &[]);
    for row in &good {
        assert_eq!(id_of(&destination.arrival()), row.id);
        assert_eq!(result(&service, row)["status_code"], 200);
    }
    let failed = || {
        let log = service.log();
        let failed = |line: &&String| line.contains(r#""event":"failed""#);
        log.iter().filter(failed).count()
    };
    // 1 s, 2 s and so on: two minutes would have passed by then.
    assert!(failed() <= 8, "the dead one is not tried for each");
    // It does not delay what is submitted while it is dead either.
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
    let last = Destination::start_at(address, |_| ok());
    for number in 1..=count {
        assert_eq!(last.arrival().text(), format!("[{number}]"));
    }
    let row = Row {
        seq: count,
        id: format!("01890a5d-ac96-774b-bcce-{count:012}"),
        owner: "",
        url: dead,
        payload: Vec::new(),
    };
    assert_eq!(result(&service, &row)["status_code"], 200);
    assert!(last.arrivals().is_empty() && destination.arrivals().len() == 1);
}
