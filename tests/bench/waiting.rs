//! What waiting costs: exports that wait in the store, and long polls that wait for a result.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rustix::process::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;
use uuid::Uuid;

use crate::Bench;
use crate::deliveries::Drain;
use crate::disk::Disk;
use crate::load::{self, Client, Work, member, payload, percentile};
use crate::process::{Service, Setup, new_folder};
use crate::report::{Figure, Limit, Unit, thousands};
use crate::sink::Sink;
use crate::support::{nowhere, token};
use crate::turns::{Round, median, metered};

/// Queues in which exports wait.
const QUEUES: usize = 64;
/// Long polls that are held.
const POLLS: usize = 1000;
/// How long a service is left alone before its memory is read.
const SETTLE: Duration = Duration::from_secs(2);
/// Starts of which the median counts.
const STARTS: usize = 5;

pub fn none(_: &Bench) -> Vec<Figure> {
    let memory = settled(&Service::start(&[])).memory();
    let starts = (0..STARTS).map(|_| Service::start(&[]).start);
    let mut starts: Vec<_> = starts.collect();
    vec![
        Figure::new("memory, idle", memory, Unit::Megabytes),
        start_time("start in a new folder", &mut starts),
    ]
}

fn settled(service: &Service) -> &Service {
    thread::sleep(SETTLE);
    service
}

fn start_time(what: &str, starts: &mut [Duration]) -> Figure {
    let median = percentile(starts, 0.5).as_secs_f64() * 1e3;
    Figure::new(what, median, Unit::Milliseconds)
}

/// A service in which exports wait, and what was measured of it.
struct Waiting {
    count: usize,
    drain: Drain,
    memory: f64,
    starts: Vec<Duration>,
    submissions: Vec<Round>,
    polls: Vec<Round>,
    deliveries: Vec<Round>,
}

/// Memory, the start and all rates with few and with many exports waiting. The services take turns, so that
/// a slope is theirs and not the machine's.
pub fn many(bench: &Bench) -> Vec<Figure> {
    let counts: &[usize] = match bench.quick {
        true => &[1000, 10_000, 100_000],
        false => &[1000, 10_000, 100_000, 1_000_000],
    };
    let mut all: Vec<_> = counts.iter().map(|count| Waiting::new(*count)).collect();
    for _ in 0..bench.rounds() {
        all.iter_mut().for_each(|one| one.poll(bench));
    }
    for _ in 0..bench.rounds() {
        all.iter_mut().for_each(|one| one.submit_and_deliver(bench));
    }
    let kinds: [fn(&mut Waiting) -> Figure; 5] = [
        |one| Figure::new("memory", one.memory, Unit::Megabytes),
        |one| start_time("start", &mut one.starts),
        |one| rate("submissions", &one.submissions),
        |one| rate("polls", &one.polls),
        |one| rate("deliveries", &one.deliveries),
    ];
    let figures = kinds.map(|figure| {
        let mut slope: Vec<_> = all.iter_mut().map(|one| one.label(figure)).collect();
        compare_to_first(&mut slope);
        slope
    });
    figures.into_iter().flatten().collect()
}

/// The first figure, which is that with the fewest waiting, is the limit of the other rates.
fn compare_to_first(figures: &mut [Figure]) {
    let [few, others @ ..] = figures else { return };
    for other in others.iter_mut().filter(|other| other.cpu.is_some()) {
        other.limits.push(Limit {
            name: format!("{} waiting", thousands(few.waiting.unwrap_or(0) as f64)),
            value: few.value,
            cpu: few.cpu,
        });
    }
}

fn rate(what: &str, rounds: &[Round]) -> Figure {
    let median = median(rounds);
    Figure {
        cpu: Some(median.cpu),
        switches: Some(median.switches),
        ..Figure::new(what, median.rate, Unit::PerSecond)
    }
}

impl Waiting {
    /// Starts a service in which this many exports wait.
    fn new(count: usize) -> Self {
        let (_, address) = nowhere();
        let folder = filled(count, |queue| format!("http://{address}/{queue}"));
        // Nobody listens there yet, so that all of it stays where it is.
        let start = || {
            Service::start_as(Setup {
                folder: Some(folder.clone()),
                ..Setup::default()
            })
        };
        let starts = (0..STARTS).map(|_| start().start).collect();
        let memory = settled(&start()).memory();
        forget_failures(&folder);
        let sink = Sink::start_at(address, 0, Duration::ZERO);
        Self {
            count,
            drain: Drain::new(start(), sink, QUEUES),
            memory,
            starts,
            submissions: Vec::new(),
            polls: Vec::new(),
            deliveries: Vec::new(),
        }
    }

    fn poll(&mut self, bench: &Bench) {
        let count = self.count;
        let polled = |number: usize| {
            let number = number * 7919 % count;
            (number % QUEUES, id(number).to_string())
        };
        let (pid, time) = (self.drain.service.pid(), bench.lasting());
        let poll = || self.drain.poll(time, polled);
        self.polls.push(metered(pid, poll));
    }

    /// Submits some exports, and has as many delivered, so that as many wait as before. Where few wait, does so
    /// several times.
    fn submit_and_deliver(&mut self, bench: &Bench) {
        let each = (self.count / 2).min(bench.batch());
        let pid = self.drain.service.pid();
        for _ in 0..bench.batch() / each {
            let submit = || self.drain.submit(each);
            self.submissions.push(metered(pid, submit));
            let deliver = || self.drain.deliver(each);
            self.deliveries.push(metered(pid, deliver));
        }
    }

    /// A figure with how many exports waited.
    fn label(&mut self, figure: fn(&mut Self) -> Figure) -> Figure {
        let figure = figure(self);
        Figure {
            what: format!("{}, {} waiting", figure.what, thousands(self.count as f64)),
            waiting: Some(self.count),
            ..figure
        }
    }
}

/// The id of the export with this number: ids grow with it, as those of a service grow with time.
fn id(number: usize) -> Uuid {
    const FIRST_MILLISECOND: u64 = 0x0190_0000_0000;
    let mixed = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut random = [0; 10];
    random[..8].copy_from_slice(&mixed.to_be_bytes());
    uuid::Builder::from_unix_timestamp_millis(FIRST_MILLISECOND + number as u64, &random)
        .into_uuid()
}

/// A folder of a service in which this many exports wait. The service makes the tables; the rows are written
/// here, since a million submissions would take minutes.
fn filled(count: usize, url: impl Fn(usize) -> String) -> Arc<TempDir> {
    let service = Service::start(&[]);
    let database = service.database();
    let folder = service.stop();
    let mut connection = Connection::open(database).unwrap();
    connection
        .execute_batch("PRAGMA synchronous = OFF; PRAGMA cache_size = -200000")
        .unwrap();
    let transaction = connection.transaction().unwrap();
    for queue in 0..QUEUES {
        let exports = (queue..count).step_by(QUEUES).count();
        transaction
            .execute(
                "INSERT INTO queues (id, owner, destination, exports) VALUES (?, x'', ?, ?)",
                (queue as i64 + 1, url(queue), exports as i64),
            )
            .unwrap();
    }
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    let mut insert = transaction
        .prepare(
            "INSERT INTO exports (id, queue, turn, accepted_at, running_at, payload)
             VALUES (?, ?, ?, ?, 0, ?)",
        )
        .unwrap();
    for number in 0..count {
        let queue = (number % QUEUES) as i64 + 1;
        let row = (
            id(number),
            queue,
            number as i64 + 1,
            now.as_millis() as i64,
            payload(number).into_bytes(),
        );
        insert.execute(row).unwrap();
    }
    drop(insert);
    transaction.commit().unwrap();
    connection
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    folder
}

/// Makes every queue due again.
fn forget_failures(folder: &TempDir) {
    let connection = Connection::open(folder.path().join("data/exports.db")).unwrap();
    connection
        .execute_batch("UPDATE queues SET failures = 0, next_attempt_at = 0, last_error = NULL")
        .unwrap();
}

/// 1,000 long polls that wait, each for an export of its own, and are answered one after the other.
pub fn held_polls(_: &Bench) -> Vec<Figure> {
    allow_files();
    let sink = Sink::held();
    let service = Service::start(&[]);
    let (url, pid) = (sink.url(0), service.pid());
    let token = token(&url);
    let mut client = service.client();
    let ids: Vec<_> = (0..POLLS)
        .map(|number| {
            let request = load::submission("/export", &token, &url, number);
            member(&client.ask(&request), "id")
        })
        .collect();
    let poll = |id: &String| {
        let mut client = service.client();
        client.send(&load::poll("/lp/export?timeout=60", &token, id));
        client
    };
    let mut clients: Vec<Client> = ids.iter().map(poll).collect();
    let memory = settled(&service).memory();
    let threads = service.figure("Threads");

    let folder = new_folder();
    let mut disk = Disk::new(folder.path());
    let (mut woken, mut synced) = (Vec::new(), Vec::new());
    let answered = metered(pid, || {
        let started = Instant::now();
        for (number, client) in clients.iter_mut().enumerate() {
            sink.allow(1);
            let answer = client.answer();
            let answered = Instant::now();
            assert_eq!(member(&answer, "state"), "Finished", "{answer}");
            woken.push(answered - sink.wait_for(number + 1).at);
            let began = Instant::now();
            disk.sync();
            synced.push(began.elapsed());
        }
        Work::unseen(POLLS, started.elapsed())
    });
    let mut times =
        |part| [&mut woken, &mut synced].map(|times| percentile(times, part).as_secs_f64() * 1e3);
    let mut time = |what: &str, part| {
        let [woken, synced] = times(part);
        let limits = vec![Limit {
            name: "1 fdatasync".into(),
            value: synced,
            cpu: None,
        }];
        Figure {
            limits,
            ..Figure::new(what, woken, Unit::Milliseconds)
        }
    };
    vec![
        Figure::new("memory, 1,000 long polls held", memory, Unit::Megabytes),
        Figure::new("  threads", threads, Unit::Count),
        Figure {
            cpu: Some(answered.cpu),
            switches: Some(answered.switches),
            ..time("  result to its poll, half of them", 0.5)
        },
        time("  result to its poll, 99 of 100", 0.99),
    ]
}

/// Raises the limit of open files as far as it goes.
fn allow_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}
