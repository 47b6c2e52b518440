//! What waits, why, and what is paused, for the owner.
//!
//! Not here: how it is shown (`owner`), and what has left (`store::evidence`).

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use serde::Serialize;
use uuid::Uuid;

use super::Exports;
use super::acts::running::name_of;
use super::attempts::kind_and_message;
use super::queues::{QueueState, Summary};
use super::store::acts::Pause;
use super::store::{self, Reader};
use crate::export::Millis;

/// The most queues that are told one by one.
const MOST_QUEUES: usize = 100;
/// The sizes of all payloads are added up for at most one part in this many of the time.
const PART_OF_TIME: u32 = 20;

/// What waits at one moment.
#[derive(Debug, Default)]
pub struct Overview {
    /// The queues with exports that are not finished, the worst first, at most 100.
    pub queues: Vec<Queue>,
    /// How many such queues there are.
    pub queues_total: u64,
    /// How many exports are not finished.
    pub waiting: u64,
    /// Bytes of their payloads.
    pub waiting_bytes: u64,
    /// The pauses in force.
    pub pauses: Vec<Pause>,
}

/// The exports of one sender to one destination that are not finished.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Queue {
    /// The sender's name.
    pub who: String,
    /// The owner's own name for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The destination's name.
    pub destination: String,
    /// How many exports there are.
    pub waiting: u64,
    /// What is being done about them.
    pub state: QueueState,
    /// Why the last attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Attempts that failed since the last one that did not.
    pub failures: u64,
    /// Seconds until the next attempt, if it waits for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt_in: Option<f64>,
    /// Seconds until the first of them is given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub give_up_in: Option<f64>,
    /// The one that is the next to be sent, or is being sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_id: Option<String>,
    /// When that was accepted, in Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_at: Option<i64>,
}

/// Why an attempt failed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Reason {
    /// For programs.
    pub kind: String,
    /// For people.
    pub message: String,
}

/// A sum that was read, and until when it is not read again.
#[derive(Clone, Copy)]
pub(super) struct Sum {
    bytes: u64,
    until: Instant,
}

impl Exports {
    /// What waits, why, and what is paused. Opens the store beside what delivers and polls, so it holds up neither.
    /// Blocks for some look-ups for each of at most a hundred queues. The bytes of all that waits are a little older if
    /// there is very much of it.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn overview(&self) -> Result<Overview, store::Error> {
        let now = self.running();
        let queues = self.queues.lock();
        let mut found = queues.summaries(now);
        let (waiting, give_up_after) = (queues.unfinished(), queues.give_up_after());
        let queues_total = found.len();
        found.sort_unstable_by_key(|queue| {
            (
                Reverse(queue.state),
                Reverse(queue.failures),
                Reverse(queue.unfinished),
            )
        });
        found.truncate(MOST_QUEUES);
        let found: Vec<_> = found
            .into_iter()
            .map(|queue| (queue, queues.error(queue.id)))
            .collect();
        drop(queues);
        let reader = Reader::open(&self.store)?;
        let labels = reader.labels()?;
        let mut shown = Vec::with_capacity(found.len());
        for (queue, error) in found {
            // It may have been finished and forgotten meanwhile.
            let Some(name) = reader.queue_name(queue.id)? else {
                continue;
            };
            let oldest = reader.first_unfinished(queue.id)?;
            let give_up_at = oldest
                .as_ref()
                .zip(queue.failing_since)
                .map(|(oldest, since)| oldest.accepted_at.max(since).saturating_add(give_up_after));
            shown.push(Queue {
                label: labels.get(&name.who).cloned(),
                who: name.who,
                destination: name_of(&self.ledger_key, &name.url),
                waiting: queue.unfinished as u64,
                state: queue.state,
                reason: reason(&queue, error.as_deref()),
                failures: queue.failures.into(),
                next_attempt_in: queue.next_attempt_at.map(|at| seconds(at, now)),
                give_up_in: give_up_at.map(|at| seconds(at, now)),
                oldest_id: oldest.as_ref().map(|oldest| id_text(oldest.id)),
                oldest_at: oldest.map(|oldest| oldest.accepted_at_by_clock),
            });
        }
        Ok(Overview {
            queues: shown,
            queues_total: queues_total as u64,
            waiting: waiting as u64,
            waiting_bytes: self.waiting_bytes(waiting)?,
            pauses: self.pauses.lock().clone(),
        })
    }

    /// The bytes of all payloads that wait, or those of a moment ago.
    pub(super) fn waiting_bytes(&self, unfinished: usize) -> Result<u64, store::Error> {
        if unfinished == 0 {
            return Ok(0);
        }
        let started = Instant::now();
        let sum = *self.sum.lock();
        if let Some(sum) = sum.filter(|sum| started < sum.until) {
            return Ok(sum.bytes);
        }
        let bytes = Reader::open(&self.store)?.waiting_bytes(unfinished)?;
        let until = Instant::now() + started.elapsed() * PART_OF_TIME;
        *self.sum.lock() = Some(Sum { bytes, until });
        Ok(bytes)
    }
}

fn reason(queue: &Summary, error: Option<&serde_json::value::RawValue>) -> Option<Reason> {
    // A resumed queue still has the error of before, until it is tried.
    let error = error.filter(|_| queue.failures > 0)?;
    let (kind, message) = kind_and_message(error)?;
    Some(Reason { kind, message })
}

fn id_text(id: Uuid) -> String {
    id.hyphenated().to_string()
}

/// How long until then, in seconds.
fn seconds(at: Millis, now: Millis) -> f64 {
    Duration::from_millis(at.saturating_sub(now).max(0).unsigned_abs()).as_secs_f64()
}
