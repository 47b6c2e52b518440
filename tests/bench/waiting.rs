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
/// The most exports that are submitted and delivered in one round.
const MOST_IN_A_ROUND: usize = 4000;

pub fn none(_: &Bench) -> Vec<Figure> {
    let memory = settled(&Service::start(&[])).memory();
    let starts = (0..STARTS).map(|_| Service::start(&[]).start);
    vec![
        Figure::new("memory, idle", memory, Unit::Megabytes),
        start_time("start in a new folder", starts.collect()),
    ]
}

fn settled(service: &Service) -> &Service {
    thread::sleep(SETTLE);
    service
}

fn start_time(what: &str, mut starts: Vec<Duration>) -> Figure {
    let median = percentile(&mut starts, 0.5).as_secs_f64() * 1e3;
    Figure::new(what, median, Unit::Milliseconds)
}

/// Memory, the start and all rates, with this many exports waiting.
pub fn many(bench: &Bench, count: usize) -> Vec<Figure> {
    let (_, address) = nowhere();
    let folder = filled(count, |queue| format!("http://{address}/{queue}"));
    // Nobody listens there yet, so that all of it stays where it is.
    let start = || {
        Service::start_as(Setup {
            folder: Some(folder.clone()),
            ..Setup::default()
        })
    };
    let starts = (0..STARTS).map(|_| start().start);
    let starts = starts.collect();
    let memory = settled(&start()).memory();
    forget_failures(&folder);

    let sink = Sink::start_at(address, 0, Duration::ZERO);
    let mut drain = Drain::new(start(), sink, QUEUES);
    let pid = drain.service.pid();
    let polled = |number: usize| {
        let number = number * 7919 % count;
        (number % QUEUES, id(number).to_string())
    };
    let each = (count / 2).min(MOST_IN_A_ROUND);
    // As many operations as with many waiting, in more rounds.
    let rounds = bench.rounds() * (bench.batch() / each).max(1);
    let mut rates = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..bench.rounds() {
        rates[0].push(metered(pid, || drain.poll(bench.lasting() / 2, polled)));
    }
    for _ in 0..rounds {
        rates[1].push(metered(pid, || drain.submit(each)));
        rates[2].push(metered(pid, || drain.deliver(each)));
    }
    let [polls, submissions, deliveries] = rates.map(|rounds| median(&rounds));
    let what = |kind: &str| format!("{kind}, {} waiting", thousands(count as f64));
    let rate = |kind: &str, round: Round| Figure {
        cpu: Some(round.cpu),
        switches: Some(round.switches),
        ..Figure::new(&what(kind), round.rate, Unit::PerSecond)
    };
    let figures = [
        Figure::new(&what("memory"), memory, Unit::Megabytes),
        start_time(&what("start"), starts),
        rate("submissions", submissions),
        rate("polls", polls),
        rate("deliveries", deliveries),
    ];
    let waiting = Some(count);
    figures
        .map(|figure| Figure { waiting, ..figure })
        .into_iter()
        .collect()
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
