//! A model of what the service has promised, by its answers, and of what came of that.
//!
//! Each client has a queue of its own and submits one export after the other, so the numbers in their
//! payloads are the order of the queue.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Arrival, Response, payload};

/// A submission, by its client and its number.
pub type Number = (usize, usize);

/// Rounding of times to milliseconds, by the service and here.
const ROUNDING: Duration = Duration::from_millis(20);

pub struct Promises {
    retention: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    submissions: HashMap<Number, Submission>,
    /// Those that were acknowledged, by their ids.
    exports: HashMap<String, Export>,
    arrivals: HashMap<String, Arrived>,
    /// The highest number that has arrived of each client.
    highest: HashMap<usize, usize>,
    broken: Vec<String>,
    count: Count,
}

struct Submission {
    first_asked: Instant,
    /// Its id, once it was acknowledged or has arrived.
    id: Option<String>,
}

struct Export {
    number: Number,
    /// The result, and when it was first known here.
    result: Option<(Value, Instant)>,
    /// When it was found to have expired.
    gone: Option<Instant>,
}

struct Arrived {
    number: Number,
    first: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub submitted: usize,
    pub acknowledged: usize,
    pub delivered: usize,
    pub repeated: usize,
    pub expired: usize,
    pub lost: usize,
    pub polls: usize,
}

/// Every fourth submission is a long one, which fills the log.
pub fn is_long((_, number): Number) -> bool {
    number % 4 == 3
}

/// The payload of a submission.
pub fn data(submission: Number) -> Value {
    let (client, number) = submission;
    let mut data = payload(number);
    data["client"] = client.into();
    let bytes = if is_long(submission) { 40_000 } else { 10 };
    data["more"] = "x".repeat(bytes).into();
    data
}

impl Promises {
    /// For a service that keeps results for this long.
    pub fn new(retention: Duration) -> Self {
        Self {
            retention,
            state: Mutex::default(),
        }
    }

    /// A client is about to submit.
    pub fn asks(&self, number: Number) {
        let mut state = self.state.lock().unwrap();
        if !state.submissions.contains_key(&number) {
            state.count.submitted += 1;
        }
        state.submissions.entry(number).or_insert(Submission {
            first_asked: Instant::now(),
            id: None,
        });
    }

    /// A submission was answered with 200. Answers may be reported in another order than they were given in,
    /// so each comes with the time at which it was asked for.
    pub fn acknowledged(&self, number: Number, asked: Instant, answer: &Value) {
        let mut state = self.state.lock().unwrap();
        let id = answer["id"].as_str().unwrap();
        state.is_the_only_id(number, id, self.retention);
        if !state.exports.contains_key(id) {
            state.count.acknowledged += 1;
        }
        state.exports.entry(id.to_owned()).or_insert(Export {
            number,
            result: None,
            gone: None,
        });
        state.shows(id, asked, answer);
    }

    /// An export was polled.
    pub fn polled(&self, id: &str, asked: Instant, answer: &Response) {
        let mut state = self.state.lock().unwrap();
        state.count.polls += 1;
        match answer.status {
            200 => state.shows(id, asked, &answer.json()),
            404 => {
                // It was not finished before it arrived.
                let arrived = state.arrivals.get(id);
                let since = arrived.map(|arrived| arrived.first.elapsed() + ROUNDING);
                if since.is_none_or(|since| since < self.retention) {
                    state.count.lost += 1;
                    let arrived = since.map(|since| format!("it arrived {since:?} ago"));
                    state.breaks(id, &format!("is not known; {arrived:?}"));
                }
                let export = state.exports.get_mut(id).unwrap();
                if export.gone.is_none() {
                    export.gone = Some(Instant::now());
                    state.count.expired += 1;
                }
            }
            _ => state.breaks(
                id,
                &format!("is answered with {}: {}", answer.status, answer.body),
            ),
        }
    }

    /// Something has arrived at a destination, which may want its exports in order.
    pub fn arrived(&self, arrival: &Arrival, in_order: bool) {
        let id = arrival.header("webhook-id").unwrap().to_owned();
        let body: Value = serde_json::from_str(arrival.text()).unwrap();
        let [client, nth] =
            ["client", "number"].map(|name| usize::try_from(body[name].as_u64().unwrap()).unwrap());
        let number = (client, nth);
        let mut state = self.state.lock().unwrap();
        let sent = data(number).to_string();
        if arrival.text() != sent {
            state.breaks(&id, "arrived with another payload");
        }
        let known = state.arrivals.get(&id).map(|arrived| arrived.number);
        if known.is_some() {
            state.count.repeated += 1;
            if known != Some(number) {
                state.breaks(&id, &format!("was {known:?} and arrived as {number:?}"));
            }
            return;
        }
        state.count.delivered += 1;
        let first = Instant::now();
        state.arrivals.insert(id.clone(), Arrived { number, first });
        state.is_the_only_id(number, &id, self.retention);
        let highest = state.highest.entry(client).or_default();
        let before = std::mem::replace(highest, nth.max(*highest));
        if in_order && nth < before {
            state.breaks(&id, &format!("{number:?} arrived behind {before}"));
        }
    }

    /// Notes that something was not as promised.
    pub fn breaks(&self, what: &str) {
        self.state.lock().unwrap().breaks("", what);
    }

    /// What was not as promised.
    pub fn broken(&self) -> Vec<String> {
        self.state.lock().unwrap().broken.clone()
    }

    /// The acknowledged exports that are not known to have expired, with their clients.
    pub fn ids(&self) -> Vec<(String, usize)> {
        let state = self.state.lock().unwrap();
        let there = state
            .exports
            .iter()
            .filter(|(_, export)| export.gone.is_none());
        there
            .map(|(id, export)| (id.clone(), export.number.0))
            .collect()
    }

    /// The acknowledged exports that are neither known to be finished nor to have expired, with their
    /// clients.
    pub fn unfinished(&self) -> Vec<(String, usize)> {
        let state = self.state.lock().unwrap();
        let there = state
            .exports
            .iter()
            .filter(|(_, export)| export.gone.is_none() && export.result.is_none());
        there
            .map(|(id, export)| (id.clone(), export.number.0))
            .collect()
    }

    /// How many results have expired so far.
    pub fn expired(&self) -> usize {
        self.state.lock().unwrap().count.expired
    }

    /// What has come of it all. Each acknowledged export must have arrived by now.
    pub fn end(&self) -> Count {
        let mut state = self.state.lock().unwrap();
        let ids = state.exports.keys();
        let missing: Vec<_> = ids
            .filter(|id| !state.arrivals.contains_key(*id))
            .cloned()
            .collect();
        for id in missing {
            state.count.lost += 1;
            state.breaks(&id, "was never delivered");
        }
        state.count
    }
}

impl State {
    fn breaks(&mut self, id: &str, what: &str) {
        self.broken.push(format!("{id} {what}"));
    }

    /// Within the retention, a submission is one export, however often it is repeated under its key.
    fn is_the_only_id(&mut self, number: Number, id: &str, retention: Duration) {
        let submission = self.submissions.get_mut(&number).unwrap();
        let before = submission.id.replace(id.to_owned());
        let is_other = before.as_deref().is_some_and(|before| before != id);
        if is_other && submission.first_asked.elapsed() < retention {
            self.breaks(id, &format!("is {number:?}, which was {before:?}"));
        }
    }

    /// An answer has shown the state of an export.
    fn shows(&mut self, id: &str, asked: Instant, answer: &Value) {
        let Some(export) = self.exports.get_mut(id) else {
            return self.breaks(id, "was never acknowledged");
        };
        let result = &answer["ext_response"];
        let is_finished = answer["state"] == "Finished";
        let known = export.result.clone();
        let had_expired = export.gone.is_some_and(|gone| gone < asked);
        if is_finished && known.is_none() {
            export.result = Some((result.clone(), Instant::now()));
        }
        if answer["id"] != json!(id) {
            self.breaks(id, &format!("is shown as {answer}"));
        }
        if had_expired {
            self.breaks(id, &format!("had expired, and is {answer}"));
        }
        match known {
            Some((known, _)) if is_finished && *result != known => {
                self.breaks(id, &format!("had the result {known}, and is {answer}"));
            }
            Some((_, since)) if !is_finished && since < asked => {
                self.breaks(id, &format!("was finished, and is {answer}"));
            }
            None if is_finished && result["status_code"] != 200 => {
                self.breaks(id, &format!("ends with {result}"));
            }
            _ => {}
        }
        if is_finished && !self.arrivals.contains_key(id) {
            self.breaks(id, "is finished and was never delivered");
        }
    }
}
