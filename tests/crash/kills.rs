//! Clients of a service that is killed again and again, and the moments at which it is killed.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use tempfile::TempDir;

use super::client::Client;
use super::promises::{Count, Promises, data, is_long};
use super::random::{Random, SEED};
use crate::support::{Destination, PATIENCE, Reaction, Response, Service, command, token_of};

/// Each has a queue of its own. The last one's destination breaks connections now and then.
const CLIENTS: usize = 4;
/// So short that results expire all the time.
const RETENTION: Duration = Duration::from_secs(3);

/// When a service is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// While it starts.
    Start,
    /// While clients submit and poll.
    Load,
    /// When a checkpoint begins to write.
    Checkpoint,
    /// When results expire and nothing else happens.
    Expiry,
    /// After SIGTERM.
    Stop,
    /// When all exports are finished and were polled.
    Idle,
}

/// How often each moment is chosen.
const MOMENTS: [Moment; 25] = {
    use Moment::{Checkpoint, Expiry, Idle, Load, Start, Stop};
    [
        Start, Start, Start, Start, Start, Start, Load, Load, Load, Load, Load, Load, Checkpoint,
        Checkpoint, Checkpoint, Checkpoint, Checkpoint, Stop, Stop, Stop, Stop, Idle, Idle, Idle,
        Expiry,
    ]
};

/// What the clients are to do.
#[derive(Default)]
struct Wanted {
    /// Where the service is; none while it is down.
    address: Option<SocketAddr>,
    /// Nothing is to be submitted.
    is_paused: bool,
    /// Only long payloads are to be submitted.
    is_long: bool,
    is_done: bool,
}

struct Driver {
    promises: Arc<Promises>,
    destination: Destination,
    wanted: Mutex<Wanted>,
    changed: Condvar,
    /// How often all exports were polled by the same service.
    passes: AtomicUsize,
}

/// Sets [`Wanted::is_done`] when it is dropped, so that after a failure too no thread is waited for.
struct Done<'a>(&'a Driver);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.want(|wanted| wanted.is_done = true);
    }
}

/// Kills a service in so many rounds. Returns what came of it. Panics with what was not as promised.
pub fn run(rounds: usize, seed: u64) -> Count {
    let promises = Arc::new(Promises::new(RETENTION));
    let model = promises.clone();
    let answers = AtomicUsize::new(0);
    let destination = Destination::start(move |arrival| {
        let flaky = arrival.head.starts_with("POST /in/flaky ");
        model.arrived(arrival, !flaky);
        let answer = answers.fetch_add(1, Ordering::Relaxed);
        if flaky && answer.is_multiple_of(5) {
            return Reaction::Raw(Vec::new());
        }
        // Different each time, so that a result is seen to have changed.
        Reaction::Answer(200, answer.to_string().into_bytes())
    });
    let driver = Driver {
        promises,
        destination,
        wanted: Mutex::default(),
        changed: Condvar::new(),
        passes: AtomicUsize::new(0),
    };
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let mut random = Random::new(seed);
    thread::scope(|scope| {
        let done = Done(&driver);
        for client in 0..CLIENTS {
            let random = Random::new(random.next());
            let driver = &driver;
            scope.spawn(move || driver.submit_and_poll(client, random));
        }
        scope.spawn(|| driver.poll_all());
        for round in 1..=rounds {
            let moment = *random.pick(&MOMENTS);
            let log = driver.round(&folder, moment, &mut random);
            driver.hold_promises(
                &folder,
                &format!("{SEED}={seed}, round {round}, killed at {moment:?}"),
                &log,
            );
        }
        drop(done);
    });
    let log = driver.finish(&folder);
    let count = driver.promises.end();
    driver.hold_promises(&folder, &format!("{SEED}={seed}, the last start"), &log);
    count
}

impl Driver {
    /// Fails if a promise was broken.
    fn hold_promises(&self, folder: &Arc<TempDir>, when: &str, log: &[String]) {
        // Nobody looks at them, and they take memory.
        self.destination.arrivals();
        let broken = self.promises.broken();
        if broken.is_empty() {
            return;
        }
        // It is never dropped, so it stays.
        std::mem::forget(folder.clone());
        panic!(
            "{when}: {}\nthe folder: {}\nthe log's end:\n{}",
            broken.join("\n"),
            folder.path().display(),
            log[log.len().saturating_sub(30)..].join("\n")
        );
    }

    fn want(&self, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.wanted.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until there is a service, and until nothing is paused if something is to be submitted. None
    /// when all is done.
    fn address(&self, submits: bool) -> Option<(SocketAddr, bool)> {
        let waits = |wanted: &mut Wanted| {
            !wanted.is_done && (wanted.address.is_none() || submits && wanted.is_paused)
        };
        let wanted = self.wanted.lock().unwrap();
        let wanted = self.changed.wait_while(wanted, waits).unwrap();
        match wanted.is_done {
            true => None,
            false => Some((wanted.address?, wanted.is_long)),
        }
    }

    fn token(&self, client: usize) -> (String, String) {
        let end = if client + 1 == CLIENTS {
            "flaky"
        } else {
            "some"
        };
        let url = format!("{}/{end}", self.destination.url);
        (token_of(&format!("client {client}"), &url), url)
    }

    fn submit_and_poll(&self, client: usize, mut random: Random) {
        let (token, url) = self.token(client);
        let mut connection = None;
        let (mut next, mut again) = (0, None);
        let mut ids: Vec<String> = Vec::new();
        while let Some((address, only_long)) = self.address(true) {
            // Keeps the number of exports that are polled after each start within bounds.
            thread::sleep(Duration::from_millis(random.next() % 8));
            let connection = to(&mut connection, address);
            let path = match random.one_in(2) {
                true => "/export",
                false => "/lp/export?timeout=0.3",
            };
            let asked = Instant::now();
            if again.is_none() && !ids.is_empty() && random.one_in(3) {
                let id = random.pick(&ids).clone();
                let answer = connection.ask(path, &token, None, &json!({"id": id}));
                self.polled(&id, asked, answer.ok());
                continue;
            }
            let number = again.take().unwrap_or_else(|| {
                next += 1;
                while only_long && !is_long((client, next)) {
                    next += 1;
                }
                next
            });
            let submission = (client, number);
            self.promises.asks(submission);
            let key = (number % 2 == 0 || number % 3 == 0).then(|| format!("key-{number}"));
            let body = json!({"uri": url, "data": data(submission)});
            let answer = connection.ask(path, &token, key.as_deref(), &body);
            let answer = self.unless_stopping(answer.ok());
            if let Some(answer) = answer {
                if answer.status != 200 {
                    self.promises
                        .breaks(&format!("{submission:?} is answered with {}", answer.body));
                    return;
                }
                let answer = answer.json();
                self.promises.acknowledged(submission, asked, &answer);
                ids.push(answer["id"].as_str().unwrap().to_owned());
                if ids.len() > 40 {
                    ids.remove(0);
                }
                if key.is_some() && random.one_in(8) {
                    again = Some(number);
                }
            } else if key.is_some() {
                // Perhaps it was accepted, and only the answer was lost.
                again = Some(number);
            }
        }
    }

    /// A service that is stopping refuses what it has not accepted.
    fn unless_stopping(&self, answer: Option<Response>) -> Option<Response> {
        answer.filter(|answer| answer.status != 503 || answer.code() != "stopping")
    }

    fn polled(&self, id: &str, asked: Instant, answer: Option<Response>) -> bool {
        let answer = self.unless_stopping(answer);
        if let Some(answer) = &answer {
            self.promises.polled(id, asked, answer);
        }
        answer.is_some()
    }

    /// Polls everything that was acknowledged, after each start and then again and again.
    fn poll_all(&self) {
        let tokens: Vec<_> = (0..CLIENTS).map(|client| self.token(client).0).collect();
        let mut connection = None;
        while let Some((address, _)) = self.address(false) {
            let connection = to(&mut connection, address);
            let polled = self.promises.ids().into_iter().all(|(id, client)| {
                let asked = Instant::now();
                let answer = connection.ask("/export", &tokens[client], None, &json!({"id": id}));
                self.polled(&id, asked, answer.ok())
            });
            self.passes
                .fetch_add(usize::from(polled), Ordering::Relaxed);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts a service and kills it. Returns its log.
    fn round(&self, folder: &Arc<TempDir>, moment: Moment, random: &mut Random) -> Vec<String> {
        let mut service = start(folder);
        let mut pause = |most: u64| {
            thread::sleep(Duration::from_micros(random.next() % (1000 * most)));
        };
        if matches!(moment, Moment::Start) {
            pause(150);
            return self.kill(service);
        }
        if !service.listens() {
            self.promises.breaks("the service does not start");
            return service.log();
        }
        self.want(|wanted| wanted.address = Some(service.address));
        match moment {
            Moment::Start => {}
            Moment::Load => pause(300),
            Moment::Checkpoint => {
                let is_long = random.one_in(2);
                self.want(|wanted| wanted.is_long = is_long);
                self.until_checkpoint(&service, if is_long { 3_000_000 } else { 0 });
                thread::sleep(Duration::from_micros(random.next() % 4000));
            }
            Moment::Stop => {
                pause(200);
                service.signal("TERM");
                pause(100);
            }
            Moment::Idle => {
                self.want(|wanted| wanted.is_paused = true);
                self.until(|| self.promises.unfinished().is_empty());
                self.until_polled();
                pause(20);
            }
            Moment::Expiry => {
                pause(200);
                self.want(|wanted| wanted.is_paused = true);
                let expired = self.promises.expired();
                self.until(|| self.promises.expired() > expired);
                pause(400);
            }
        }
        let log = self.kill(service);
        self.want(|wanted| *wanted = Wanted::default());
        log
    }

    fn kill(&self, mut service: Service) -> Vec<String> {
        service.signal("KILL");
        service.ended();
        self.want(|wanted| wanted.address = None);
        service.log()
    }

    /// Waits until all exports were polled.
    fn until_polled(&self) {
        // The first may have begun before.
        let passes = self.passes.load(Ordering::Relaxed) + 2;
        self.until(|| self.passes.load(Ordering::Relaxed) >= passes);
    }

    fn until(&self, done: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() && self.promises.broken().is_empty() {
            if Instant::now() > deadline {
                let left = self.promises.unfinished();
                return self
                    .promises
                    .breaks(&format!("it takes too long: {left:?}"));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the log has this many bytes, and then until the database is written, which only
    /// checkpoints do.
    fn until_checkpoint(&self, service: &Service, bytes: u64) {
        let database = service.folder().join("exports.db");
        let log = service.folder().join("exports.db-wal");
        let length = |path: &PathBuf| fs::metadata(path).map_or(0, |file| file.len());
        let changed = || {
            let changed = fs::metadata(&database).and_then(|file| file.modified());
            changed.unwrap_or(SystemTime::UNIX_EPOCH)
        };
        self.until(|| length(&log) >= bytes);
        let before = changed();
        self.until(|| changed() != before);
    }

    /// Starts the service once more, and waits until everything that was acknowledged is finished.
    fn finish(&self, folder: &Arc<TempDir>) -> Vec<String> {
        self.want(|wanted| *wanted = Wanted::default());
        let mut service = start(folder);
        if !service.listens() {
            self.promises.breaks("the service does not start");
            return service.log();
        }
        thread::scope(|scope| {
            let _done = Done(self);
            self.want(|wanted| wanted.address = Some(service.address));
            scope.spawn(|| self.poll_all());
            self.until(|| self.promises.unfinished().is_empty());
            self.until_polled();
        });
        service.log()
    }
}

fn start(folder: &Arc<TempDir>) -> Service {
    let retention = format!("{}s", RETENTION.as_secs());
    Service::begin(folder.clone(), command(), &["--retention", &retention])
}

/// A client of the service at this address; the same as before if it is the same service.
fn to(client: &mut Option<(SocketAddr, Client)>, address: SocketAddr) -> &mut Client {
    if client.as_ref().is_none_or(|(before, _)| *before != address) {
        *client = None;
    }
    &mut client
        .get_or_insert_with(|| (address, Client::new(address)))
        .1
}
