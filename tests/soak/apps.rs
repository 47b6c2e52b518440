//! Well-behaved apps, each with one queue: they submit, poll, and check what they were promised.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, Response, post};
use crate::destinations::Kind;
use crate::model::{Random, hash, payload};
use crate::support::token_of;
use crate::{RETENTION, World};

/// The longest that an app may wait for an answer, beside the time of a long poll.
const SERVED: Duration = Duration::from_secs(10);
/// Deleting expired results may take this much longer than the retention.
const EXPIRED: Duration = Duration::from_secs(90);
/// How long a long poll is held.
const HELD: Duration = Duration::from_secs(5);
/// From a 503 until the next try.
const AGAIN: Duration = Duration::from_millis(300);
/// Unfinished exports that an app polls each time.
const POLLED: usize = 4;

/// What an app does.
pub struct Plan {
    pub kind: Kind,
    /// The payload's length, from and to, without what surrounds it.
    pub length: (usize, usize),
    /// From one submission to the next.
    pub pace: Duration,
    /// Submits and waits by long polls, instead of polling.
    pub long: bool,
    /// Repeats a submission whose answer was lost, with its key. Others number it anew.
    pub keyed: bool,
    /// Sends and reads slowly.
    pub slow: bool,
    /// Submits the next one only when the last one is finished.
    pub one_by_one: bool,
    /// Sends each one to a destination of its own, and so through a queue of its own.
    pub apart: bool,
}

/// An export that was accepted.
struct Accepted {
    id: String,
    number: usize,
    at: Instant,
    /// When its result was seen first, and the result's hash.
    finished: Option<(Instant, u64)>,
}

pub struct App<'a> {
    world: &'a World,
    plan: Plan,
    queue: usize,
    url: String,
    client: Client,
    random: Random,
    next: usize,
    unfinished: VecDeque<Accepted>,
    /// Those whose result was seen and may be there still.
    finished: VecDeque<Accepted>,
}

impl<'a> App<'a> {
    pub fn new(world: &'a World, queue: usize, url: String, plan: Plan) -> Self {
        let in_order = [Kind::Quick, Kind::Slow, Kind::Fails, Kind::Large].contains(&plan.kind);
        if in_order && plan.keyed && !plan.apart {
            world.model.keeps_order(queue);
        }
        // Some share an address, as behind a port mapping.
        let from = [127, 0, 0, 2 + u8::try_from(queue % 8).unwrap()];
        Self {
            client: Client::new(from, plan.slow),
            world,
            plan,
            queue,
            url,
            random: Random::new(queue),
            next: 0,
            unfinished: VecDeque::new(),
            finished: VecDeque::new(),
        }
    }

    /// Works until the end of the load, and then until all its exports are finished.
    pub fn run(mut self) {
        loop {
            let pause = self.random.about(self.plan.pace);
            if !self.world.sleep(pause) {
                break;
            }
            if !self.plan.one_by_one || self.unfinished.is_empty() {
                self.submit();
            }
            self.poll_some();
        }
        self.finish();
        // Once more, after the service was killed and stopped for the last time.
        self.client.close();
        self.world.idle.wait();
        self.world.restarted.wait();
        for accepted in std::mem::take(&mut self.finished) {
            self.poll(accepted, "/export");
        }
    }

    /// Polls until all are finished that must be by now.
    fn finish(&mut self) {
        let deadline = Instant::now() + self.world.last_results;
        loop {
            // It is given up at some time after the load.
            let due = 3 * self.world.give_up_after;
            self.unfinished
                .retain(|one| self.plan.kind != Kind::Dead || one.at.elapsed() > due);
            let Some(first) = self.unfinished.front() else {
                return;
            };
            if Instant::now() >= deadline {
                let (count, id) = (self.unfinished.len(), &first.id);
                let kind = self.plan.kind.name();
                let what = format!("{count} for {kind} not finished in the end, like {id}");
                return self.world.model.broken(what);
            }
            self.poll_some();
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The destination of the export with this number, and the token for it.
    fn destination(&self, number: usize) -> (String, String) {
        let url = match self.plan.apart {
            true => format!("{}/{number}", self.url),
            false => self.url.clone(),
        };
        let token = token_of(&format!("owner-{}", self.queue), &url);
        (url, token)
    }

    /// Submits the next export, and repeats that until it is accepted.
    pub fn submit(&mut self) {
        let (least, most) = self.plan.length;
        let length = least + self.random.below(most - least + 1);
        loop {
            let number = self.next;
            let key = self
                .plan
                .keyed
                .then(|| format!("key-{}-{number}", self.queue));
            let data = payload((self.queue, number), length);
            let (url, token) = self.destination(number);
            let body = format!("{{\"uri\":\"{url}\",\"data\":{data}}}");
            let path = if self.plan.long {
                "/lp/export?timeout=5"
            } else {
                "/export"
            };
            let request = post(path, &token, key.as_deref(), &body);
            if key.is_none() {
                self.next += 1;
            }
            let Some(response) = self.ask(&request, self.plan.keyed) else {
                continue;
            };
            if response.status != 200 {
                let (status, body) = (response.status, response.body);
                return self
                    .world
                    .model
                    .broken(format!("submission: {status} {body}"));
            }
            if key.is_some() {
                self.next += 1;
            }
            self.world
                .model
                .acknowledged
                .fetch_add(1, Ordering::Relaxed);
            let json: Value = serde_json::from_str(&response.body).unwrap();
            let mut accepted = Accepted {
                id: json["id"].as_str().unwrap().to_owned(),
                number,
                at: Instant::now(),
                finished: None,
            };
            if json["state"] == "Finished" {
                self.has_result(&mut accepted, &response.body, &json);
                self.finished.push_back(accepted);
            } else {
                self.unfinished.push_back(accepted);
            }
            return;
        }
    }

    /// Fills the store: submits until there is no room. Returns how many were accepted.
    pub fn fill(&mut self) -> usize {
        let before = self.next;
        loop {
            let data = payload((self.queue, self.next), self.plan.length.1);
            let (url, token) = self.destination(self.next);
            let body = format!("{{\"uri\":\"{url}\",\"data\":{data}}}");
            let key = format!("key-{}-{}", self.queue, self.next);
            let request = post("/export", &token, Some(&key), &body);
            let Ok(response) = self.client.ask(&self.world.process, &request) else {
                continue;
            };
            if response.code() == "store_full" {
                return self.next - before;
            }
            if response.status != 200 {
                let (status, body) = (response.status, response.body);
                self.world.model.broken(format!("filling: {status} {body}"));
                return self.next - before;
            }
            self.world
                .model
                .acknowledged
                .fetch_add(1, Ordering::Relaxed);
            let json: Value = serde_json::from_str(&response.body).unwrap();
            self.unfinished.push_back(Accepted {
                id: json["id"].as_str().unwrap().to_owned(),
                number: self.next,
                at: Instant::now(),
                finished: None,
            });
            self.next += 1;
        }
    }

    /// Waits until what was filled in is delivered.
    pub fn drain(&mut self) {
        self.finish();
        self.finished.clear();
    }

    /// Polls the oldest unfinished exports, and two that are finished.
    fn poll_some(&mut self) {
        let path = match self.plan.long {
            true => "/lp/export?timeout=5",
            false => "/export",
        };
        let polled = match self.plan.long {
            true => 1,
            false => POLLED,
        };
        for _ in 0..polled.min(self.unfinished.len()) {
            let one = self.unfinished.pop_front().unwrap();
            self.poll(one, path);
        }
        // The oldest, if it must have expired, and any.
        if let Some((seen, _)) = self.finished.front().and_then(|one| one.finished)
            && seen.elapsed() > RETENTION + EXPIRED
        {
            let one = self.finished.pop_front().unwrap();
            self.poll(one, "/export");
        }
        if !self.finished.is_empty() {
            let at = self.random.below(self.finished.len());
            let one = self.finished.remove(at).unwrap();
            self.poll(one, "/export");
        }
    }

    /// Polls one and puts it where it belongs then.
    fn poll(&mut self, mut one: Accepted, path: &str) {
        let body = format!("{{\"id\":\"{}\"}}", one.id);
        let (_, token) = self.destination(one.number);
        let response = loop {
            let request = post(path, &token, None, &body);
            if let Some(response) = self.ask(&request, true) {
                break response;
            }
        };
        let (model, id) = (&self.world.model, &one.id);
        let json: Value = serde_json::from_str(&response.body).unwrap_or_default();
        match response.status {
            200 if json["state"] == "Finished" => {
                self.has_result(&mut one, &response.body, &json);
                // Sorted by when they were seen first, except for the few that were polled since.
                let at = self
                    .finished
                    .partition_point(|other| other.finished < one.finished);
                self.finished.insert(at, one);
            }
            200 if one.finished.is_some() => {
                model.broken(format!("{id} was finished, and now is {}", response.body));
            }
            200 => self.unfinished.push_back(one),
            404 => {
                if !self.may_be_gone(&one) {
                    let kind = self.plan.kind.name();
                    model.broken(format!("{id} for {kind} is gone before its time"));
                }
                if one.finished.is_none() {
                    model.finished.fetch_add(1, Ordering::Relaxed);
                }
            }
            status => model.broken(format!("poll of {id}: {status} {}", response.body)),
        }
    }

    fn has_result(&self, one: &mut Accepted, body: &str, json: &Value) {
        let (model, id) = (&self.world.model, &one.id);
        let result = hash(body.split_once("\"ext_response\":").unwrap().1);
        match one.finished {
            None => {
                model.finished.fetch_add(1, Ordering::Relaxed);
                one.finished = Some((Instant::now(), result));
                let status = json["ext_response"]["status_code"].as_u64();
                let kind = self.plan.kind;
                if status != Some(kind.status()) {
                    let result: String = body.trim_end().chars().take(400).collect();
                    model.broken(format!("{id} for {} ended with {result}", kind.name()));
                }
                if kind != Kind::Dead && model.arrived((self.queue, one.number)).is_none() {
                    model.broken(format!("{id} for {} never arrived", kind.name()));
                }
            }
            Some((_, first)) if first != result => {
                model.broken(format!("the result of {id} has changed to {body}"));
            }
            Some((seen, _)) if seen.elapsed() > RETENTION + EXPIRED => {
                if !self.world.process.was_clock_set(one.at, self.run_of(one)) {
                    model.broken(format!("{id} has not expired"));
                }
            }
            Some(_) => {}
        }
    }

    /// Whether its result may have expired.
    fn may_be_gone(&self, one: &Accepted) -> bool {
        let arrived = self.world.model.arrived((self.queue, one.number));
        if arrived.is_none() && self.plan.kind != Kind::Dead {
            return false;
        }
        // It was finished after this.
        let since = arrived.map_or(one.at, |arrived| arrived.last);
        since.elapsed() > RETENTION || self.world.process.was_clock_set(since, self.run_of(one))
    }

    /// The run in which it was finished, as far as that is known.
    fn run_of(&self, one: &Accepted) -> usize {
        let arrived = self.world.model.arrived((self.queue, one.number));
        arrived.map_or(usize::MAX, |arrived| arrived.run)
    }

    /// Asks until there is an answer that is not 503 or 429. `None` if the answer was lost and `again` does
    /// not allow to ask again.
    fn ask(&mut self, request: &[u8], again: bool) -> Option<Response> {
        let (model, process) = (&self.world.model, &self.world.process);
        let mut first = Instant::now();
        let mut first_epoch = process.epoch();
        loop {
            let epoch = process.epoch();
            if epoch % 2 == 1 {
                thread::sleep(Duration::from_millis(20));
                continue;
            }
            if epoch != first_epoch || self.world.store_may_be_full.load(Ordering::Relaxed) {
                (first, first_epoch) = (Instant::now(), epoch);
            }
            let kept = self.client.is_connected();
            let asked = Instant::now();
            let answer = self.client.ask(process, request);
            let undisturbed = process.epoch() == epoch;
            match answer {
                Ok(response) if response.status == 503 || response.status == 429 => {
                    let code = response.code();
                    let full = self.world.store_may_be_full.load(Ordering::Relaxed);
                    if undisturbed && !(full && code == "store_full") {
                        model.busy.fetch_add(1, Ordering::Relaxed);
                        if first.elapsed() > SERVED {
                            model.broken(format!("an app is still refused: {}", response.body));
                            first = Instant::now();
                        }
                    }
                    thread::sleep(AGAIN);
                }
                Ok(response) => {
                    if undisturbed && !self.plan.slow {
                        let took = asked.elapsed();
                        let held = if self.plan.long { HELD } else { Duration::ZERO };
                        let (took, kind) = (took.saturating_sub(held), self.plan.kind.name());
                        model.served(took);
                        if took > SERVED {
                            model.broken(format!("an app ({kind}) waited {took:?} for an answer"));
                        }
                    }
                    return Some(response);
                }
                Err(error) => {
                    // A connection that was kept may have been closed in the meantime.
                    if undisturbed && !kept {
                        let kind = self.plan.kind.name();
                        model.broken(format!("an app ({kind}) got no answer: {error}"));
                        thread::sleep(AGAIN);
                    }
                    if !again {
                        return None;
                    }
                }
            }
        }
    }
}
