//! Recordings of all that the service writes and promises.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::Client;
use super::disk::Disk;
use super::journal::Journal;
use crate::support::{Destination, Gate, PATIENCE, Service, ok, payload, token};

/// The retention of runs in which nothing has to expire.
const LONG: Duration = Duration::from_secs(3600);

/// A submission that was accepted.
pub struct Accepted {
    pub url: String,
    pub token: String,
    pub key: Option<String>,
    pub data: Value,
}

/// Runs of the service in one folder, with all that it wrote, and what it promised.
pub struct Recording {
    pub name: &'static str,
    pub destination: Destination,
    /// Closed while exports to the second URL are to wait.
    gate: Arc<Mutex<Gate>>,
    pub root: Arc<TempDir>,
    /// A copy of the folder as it was before the first run.
    pub initial: TempDir,
    pub traces: TempDir,
    pub journal: Journal,
    pub accepted: Mutex<HashMap<String, Accepted>>,
    submissions: AtomicUsize,
    /// What had been accepted before the first run, with its result if there was one.
    pub earlier: HashMap<String, Option<Value>>,
}

/// How a run ends.
enum End {
    Stop,
    Kill,
}

impl Recording {
    fn new(name: &'static str) -> Self {
        let gate = Arc::new(Mutex::new(Gate::default()));
        let current = gate.clone();
        let destination = Destination::start(move |arrival| {
            if arrival.head.starts_with("POST /in/held ") {
                let gate = current.lock().unwrap().clone();
                gate.pass();
            }
            ok()
        });
        let root = Arc::new(tempfile::tempdir().unwrap());
        Self {
            name,
            destination,
            gate,
            journal: Journal::new(root.path()),
            root,
            initial: tempfile::tempdir().unwrap(),
            traces: tempfile::tempdir().unwrap(),
            accepted: Mutex::default(),
            submissions: AtomicUsize::new(0),
            earlier: HashMap::new(),
        }
    }

    /// A first start, long transactions, checkpoints, a stop, a kill, expiry, and starts after each.
    pub fn of_a_life() -> Self {
        let mut life = Self::new("life");
        let mut disk = Disk::of(life.initial.path(), life.root.path());
        life.run(&mut disk, LONG, End::Stop, |life, service| {
            life.submit_from_three(service, 10, 100);
            // The log is emptied a few seconds after the first write.
            let log = service.folder().join("exports.db-wal");
            let deadline = Instant::now() + PATIENCE;
            while fs::metadata(&log).unwrap().len() > 0 {
                assert!(Instant::now() < deadline, "no checkpoint");
                thread::sleep(Duration::from_millis(5));
            }
            life.submit_from_three(service, 4, 5000);
        });
        life.run(&mut disk, LONG, End::Kill, |life, service| {
            // More than the log holds without a checkpoint.
            life.submit_from_three(service, 9, 100_000);
            life.until_killed(service, 10, 1000);
        });
        life.run(
            &mut disk,
            Duration::from_secs(1),
            End::Kill,
            |life, service| {
                life.submit_from_three(service, 5, 100);
                // All that was finished before this run expires in it.
                let earlier: Vec<_> = life.accepted.lock().unwrap().keys().cloned().collect();
                let is_gone = |id: &String| life.poll(&mut Client::new(service.address), id) == 404;
                let deadline = Instant::now() + PATIENCE;
                while earlier.iter().filter(|id| is_gone(id)).count() < 20 {
                    assert!(Instant::now() < deadline, "nothing expires");
                    thread::sleep(Duration::from_millis(50));
                }
                life.until_killed(service, 10, 1000);
            },
        );
        life.run(&mut disk, LONG, End::Stop, |life, service| {
            life.submit_from_three(service, 5, 1000);
        });
        life
    }

    /// A start on the file of an earlier release, which the kill of that release has left.
    pub fn of_a_takeover(version: u32) -> Self {
        let mut takeover = Self::new(if version == 1 {
            "takeover 1"
        } else {
            "takeover 2"
        });
        let made = tempfile::tempdir().unwrap();
        let store = Connection::open(made.path().join("exports.db")).unwrap();
        store.execute_batch("PRAGMA journal_mode = WAL").unwrap();
        store
            .execute_batch(include_str!("../upgrading/version_1.sql"))
            .unwrap();
        if version == 2 {
            store
                .execute_batch(include_str!("../upgrading/version_2.sql"))
                .unwrap();
        }
        for number in 0..40 {
            if number == 20 {
                // The rest stays in the log.
                store
                    .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
                    .unwrap();
            }
            let id = format!("01890a5d-ac96-774b-bcce-{number:012}");
            let url = takeover.url(number);
            let data = payload(number);
            let finished = number % 2 == 0;
            let response = finished.then(
                || json!({"status": "200 OK", "status_code": 200, "body": "x".repeat(50 * number)}),
            );
            let sql = "INSERT INTO exports (id, owner, destination, payload, accepted_at, finished_at, response)
                 VALUES (?1, x'', ?2, ?3, unixepoch() * 1000, iif(?4, unixepoch() * 1000, NULL), ?5)";
            let bytes = (!finished).then(|| data.to_string().into_bytes());
            let text = response.as_ref().map(Value::to_string);
            store
                .execute(sql, params![id, url, bytes, finished, text])
                .unwrap();
            let key = None;
            let accepted = Accepted::new(url, key, data);
            takeover
                .accepted
                .lock()
                .unwrap()
                .insert(id.clone(), accepted);
            takeover.earlier.insert(id, response);
        }
        for folder in [takeover.root.path(), takeover.initial.path()] {
            let data = folder.join("data");
            fs::create_dir(&data).unwrap();
            for name in ["exports.db", "exports.db-wal"] {
                fs::copy(made.path().join(name), data.join(name)).unwrap();
            }
            fs::write(data.join("lock"), "").unwrap();
        }
        let mut disk = Disk::of(takeover.initial.path(), takeover.root.path());
        takeover.run(&mut disk, LONG, End::Kill, |takeover, service| {
            takeover.until_killed(service, 10, 100);
        });
        takeover
    }

    /// A start on a damaged file, of which everything can be saved.
    pub fn of_a_repair() -> Self {
        let mut repair = Self::new("repair");
        let service = Service::start_in(repair.root.clone(), &[]);
        repair.submit_from_three(&service, 10, 100);
        for (id, accepted) in repair.accepted.lock().unwrap().iter() {
            let waits = accepted.url.ends_with("/held");
            let result = (!waits).then(|| service.result(&accepted.url, id));
            repair.earlier.insert(id.clone(), result);
        }
        drop(service);
        repair.gate.lock().unwrap().open();
        let data = repair.root.path().join("data");
        let file = data.join("exports.db");
        // Moves the log into the file when it is closed.
        let store = Connection::open(&file).unwrap();
        let sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'unfinished'";
        let page: u32 = store.query_row(sql, [], |row| row.get(0)).unwrap();
        store.close().unwrap();
        let mut bytes = fs::read(&file).unwrap();
        bytes[4096 * (usize::try_from(page).unwrap() - 1)] = 0;
        fs::write(&file, bytes).unwrap();
        fs::remove_dir_all(data.join("gate")).unwrap();
        let copy = repair.initial.path().join("data");
        fs::create_dir(&copy).unwrap();
        for name in ["exports.db", "lock", "owner.key", "ledger.key"] {
            fs::copy(data.join(name), copy.join(name)).unwrap();
        }
        let mut disk = Disk::of(repair.initial.path(), repair.root.path());
        repair.run(&mut disk, LONG, End::Kill, |repair, service| {
            repair.until_killed(service, 10, 100);
        });
        repair
    }

    fn run(
        &mut self,
        disk: &mut Disk,
        retention: Duration,
        end: End,
        body: impl FnOnce(&Self, &Service),
    ) {
        *self.gate.lock().unwrap() = Gate::default();
        let number = fs::read_dir(self.traces.path()).unwrap().count();
        let trace = self.traces.path().join(number.to_string());
        let seconds = format!("{}s", retention.as_secs());
        let arguments = ["--retention", &seconds];
        let mut service = Service::begin(self.root.clone(), Journal::command(&trace), &arguments);
        assert!(service.listens(), "{:#?}", service.log());
        body(self, &service);
        if matches!(end, End::Stop) {
            self.gate.lock().unwrap().open();
            service.signal("TERM");
        }
        service.ended();
        self.gate.lock().unwrap().open();
        self.journal.add(&trace, service.pid(), retention, disk);
    }

    pub fn url(&self, number: usize) -> String {
        let end = if number.is_multiple_of(5) {
            "held"
        } else {
            "some"
        };
        format!("{}/{end}", self.destination.url)
    }

    /// Submits with three clients, each this many exports of about this many bytes.
    fn submit_from_three(&self, service: &Service, each: usize, bytes: usize) {
        let address = service.address;
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(move || {
                    let mut client = Client::new(address);
                    for _ in 0..each {
                        assert!(self.submit(&mut client, bytes));
                    }
                });
            }
        });
    }

    /// Submits from three clients until the service is killed, which is after this many of each or so.
    fn until_killed(&self, service: &Service, each: usize, bytes: usize) {
        let address = service.address;
        let before = self.accepted.lock().unwrap().len();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(move || {
                    let mut client = Client::new(address);
                    while self.submit(&mut client, bytes) {}
                });
            }
            let deadline = Instant::now() + PATIENCE;
            while self.accepted.lock().unwrap().len() < before + 3 * each {
                assert!(Instant::now() < deadline, "{:#?}", service.log());
                thread::yield_now();
            }
            service.signal("KILL");
        });
    }

    /// False if it is not accepted.
    fn submit(&self, client: &mut Client, bytes: usize) -> bool {
        let number = 1000 + self.submissions.fetch_add(1, Ordering::Relaxed);
        let mut data = payload(number);
        data["more"] = "x".repeat(bytes).into();
        let url = self.url(number);
        let key = (!number.is_multiple_of(3)).then(|| format!("key-{number}"));
        let accepted = Accepted::new(url, key, data);
        let Some(id) = accepted.submit(client, "/export") else {
            return false;
        };
        self.accepted.lock().unwrap().insert(id, accepted);
        true
    }

    fn poll(&self, client: &mut Client, id: &str) -> u16 {
        let token = self.accepted.lock().unwrap()[id].token.clone();
        client
            .ask("/export", &token, None, &json!({"id": id}))
            .unwrap()
            .status
    }

    /// Leaves the journals and the kept images where they are.
    pub fn keep(self) {
        eprintln!("kept: {}", self.traces.keep().display());
    }
}

impl Accepted {
    pub fn new(url: String, key: Option<String>, data: Value) -> Self {
        let token = token(&url);
        Self {
            url,
            token,
            key,
            data,
        }
    }

    /// The id, if it is accepted.
    pub fn submit(&self, client: &mut Client, path: &str) -> Option<String> {
        let body = json!({"uri": self.url, "data": self.data});
        let answer = client.ask(path, &self.token, self.key.as_deref(), &body);
        let answer = answer.ok().filter(|answer| answer.status == 200)?;
        Some(answer.json()["id"].as_str().unwrap().to_owned())
    }
}
