//! What was promised and what arrived, and every promise that was broken.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::MARK;

/// A queue and a number in it: each app numbers what it submits from 0.
pub type Key = (usize, usize);

/// How many broken promises are told of.
const MOST_BROKEN: usize = 200;

/// Random enough for a load, and repeatable.
pub struct Random(u64);

impl Random {
    pub fn new(seed: usize) -> Self {
        Self(hash(&seed) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    /// Half to one and a half of it.
    pub fn about(&mut self, duration: Duration) -> Duration {
        duration.mul_f64(0.5 + self.below(1000) as f64 / 1000.0)
    }
}

pub fn hash(value: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The payload with this number. It can be told from every other, and no part of it may change on the way.
pub fn payload((queue, number): Key, length: usize) -> String {
    let fill: String = (0..length.div_ceil(1024))
        .map(|at| format!("{:016x}", hash(&(queue, number, at))).repeat(64))
        .collect();
    let fill = &fill[..length];
    format!("{{\"queue\":{queue},\"number\":{number},\"mark\":\"{MARK}\",\"fill\":\"{fill}\"}}")
}

/// The key of a payload that is whole.
fn key_of(body: &[u8]) -> Option<Key> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let number = |name: &str| usize::try_from(value[name].as_u64()?).ok();
    let key = (number("queue")?, number("number")?);
    let length = value["fill"].as_str()?.len();
    (payload(key, length).as_bytes() == body).then_some(key)
}

/// What a destination has seen of one export.
#[derive(Clone)]
pub struct Arrived {
    pub id: String,
    pub times: usize,
    pub last: Instant,
    /// The run of the service that sent it last.
    pub run: usize,
}

/// All that has arrived at the destinations, and what is wrong.
#[derive(Default)]
pub struct Model {
    arrived: Mutex<HashMap<Key, Arrived>>,
    /// For each queue that keeps its order: the number that must arrive next.
    next: Mutex<HashMap<usize, usize>>,
    broken: Mutex<Vec<String>>,
    pub acknowledged: AtomicU64,
    pub finished: AtomicU64,
    pub repeated: AtomicU64,
    /// Answers 503 to well-behaved clients while there was nothing in their way.
    pub busy: AtomicU64,
    /// The slowest answers since the last sample and of all, in microseconds.
    slowest: AtomicU64,
    pub slowest_of_all: AtomicU64,
}

impl Model {
    /// Notes a broken promise. Of very many only the first are kept.
    pub fn broken(&self, what: String) {
        let mut broken = self.broken.lock().unwrap();
        if broken.len() < MOST_BROKEN {
            eprintln!("BROKEN: {what}");
            broken.push(what);
        }
    }

    pub fn all_broken(&self) -> Vec<String> {
        self.broken.lock().unwrap().clone()
    }

    /// Says that each number of the queue must arrive right after the one before it.
    pub fn keeps_order(&self, queue: usize) {
        self.next.lock().unwrap().insert(queue, 0);
    }

    /// Notes a request to a destination. Returns how many times the export has arrived, and its number.
    pub fn arrives(&self, id: &str, body: &[u8], run: usize) -> (usize, usize) {
        let Some(key) = key_of(body) else {
            self.broken(format!("export {id} arrived with another payload"));
            return (1, 0);
        };
        let now = Instant::now();
        let mut arrived = self.arrived.lock().unwrap();
        let seen = arrived.entry(key).or_insert_with(|| Arrived {
            id: id.to_owned(),
            times: 0,
            last: now,
            run,
        });
        if seen.id != id {
            self.broken(format!("{key:?} was delivered as {} and as {id}", seen.id));
        }
        seen.times += 1;
        (seen.last, seen.run) = (now, run);
        let times = seen.times;
        drop(arrived);
        if times > 1 {
            self.repeated.fetch_add(1, Ordering::Relaxed);
        } else if let Some(next) = self.next.lock().unwrap().get_mut(&key.0) {
            if *next != key.1 {
                self.broken(format!("{key:?} arrived before {:?}", (key.0, *next)));
            }
            *next = key.1 + 1;
        }
        (times, key.1)
    }

    pub fn arrived(&self, key: Key) -> Option<Arrived> {
        self.arrived.lock().unwrap().get(&key).cloned()
    }

    /// How many exports have arrived.
    pub fn delivered(&self) -> usize {
        self.arrived.lock().unwrap().len()
    }

    /// Acknowledged exports whose result no app has seen yet.
    pub fn waiting(&self) -> u64 {
        let finished = self.finished.load(Ordering::Relaxed);
        self.acknowledged
            .load(Ordering::Relaxed)
            .saturating_sub(finished)
    }

    /// Notes how long an app waited for an answer.
    pub fn served(&self, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap();
        self.slowest.fetch_max(took, Ordering::Relaxed);
        self.slowest_of_all.fetch_max(took, Ordering::Relaxed);
    }

    /// The slowest answer since the last call, in milliseconds.
    pub fn take_slowest(&self) -> f64 {
        self.slowest.swap(0, Ordering::Relaxed) as f64 / 1e3
    }
}
