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
use super::store::overview::Totals;
use super::store::{self, Reader};
use crate::export::Millis;

/// The most queues that are told one by one.
const MOST_QUEUES: usize = 100;
/// The sizes of all payloads are added up for at most one part in this many of the time.
const PART_OF_TIME: u32 = 20;

/// What waits at one moment.
#[derive(Debug, Default, Serialize)]
pub struct Overview {
    /// The queues with exports that are not finished, the worst first, at most 100.
    pub queues: Vec<Queue>,
    /// How many such queues there are.
    pub queues_total: usize,
    /// How many exports are not finished.
    pub waiting: usize,
    /// Bytes of their payloads.
    pub waiting_bytes: u64,
    /// The pauses in force.
    pub pauses: Vec<Pause>,
    /// How many queues are in which state.
    #[serde(skip)]
    pub states: States,
    /// When the oldest export that is not finished was accepted, in Unix milliseconds.
    #[serde(skip)]
    pub oldest_at: Option<i64>,
}

/// How many queues are in which state.
#[derive(Clone, Copy, Debug, Default)]
pub struct States {
    /// One of their exports is being sent.
    pub sending: usize,
    /// They wait for their turn.
    pub waiting: usize,
    /// Their last attempt failed.
    pub failing: usize,
    /// They are paused.
    pub paused: usize,
}

/// The exports of one sender to one destination that are not finished.
#[derive(Debug, Serialize)]
pub struct Queue {
    /// The sender's name.
    pub who: String,
    /// The owner's own name for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The destination's name.
    pub destination: String,
    /// How many exports there are.
    pub waiting: usize,
    /// What is being done about them.
    pub state: QueueState,
    /// Why the last attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Attempts that failed since the last one that did not.
    pub failures: u32,
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
#[derive(Debug, Serialize)]
pub struct Reason {
    /// For programs.
    pub kind: String,
    /// For people.
    pub message: String,
}

/// Sums that were read, and until when they are not read again.
pub(super) struct Known {
    totals: Totals,
    until: Instant,
}

impl Exports {
    /// What waits, why, and what is paused. Opens the store beside what delivers and polls, so it holds up neither.
    /// Blocks for some look-ups for each of at most a hundred queues. The bytes and the age of all that waits are a
    /// little older if there is very much of it.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn overview(&self) -> Result<Overview, store::Error> {
        let now = self.running();
        let queues = self.queues.lock();
        let mut found = queues.summaries(now);
        let (waiting, give_up_after) = (queues.unfinished(), queues.give_up_after());
        let mut states = States::default();
        for queue in &found {
            *match queue.state {
                QueueState::Sending => &mut states.sending,
                QueueState::Waiting => &mut states.waiting,
                QueueState::Failing => &mut states.failing,
                QueueState::Paused => &mut states.paused,
            } += 1;
        }
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
                waiting: queue.unfinished,
                state: queue.state,
                reason: reason(&queue, error.as_deref()),
                failures: queue.failures,
                next_attempt_in: queue.next_attempt_at.map(|at| seconds(at, now)),
                give_up_in: give_up_at.map(|at| seconds(at, now)),
                oldest_id: oldest.as_ref().map(|oldest| id_text(oldest.id)),
                oldest_at: oldest.map(|oldest| oldest.accepted_at_by_clock),
            });
        }
        let totals = self.totals(&reader, waiting)?;
        Ok(Overview {
            queues: shown,
            queues_total,
            waiting,
            waiting_bytes: totals.bytes,
            pauses: self.pauses.lock().clone(),
            states,
            oldest_at: totals.oldest_at,
        })
    }

    /// The sums over all that waits, or those of a moment ago.
    fn totals(&self, reader: &Reader, unfinished: usize) -> Result<Totals, store::Error> {
        if unfinished == 0 {
            return Ok(Totals::default());
        }
        let started = Instant::now();
        let known = self.totals.lock();
        if let Some(known) = known.as_ref().filter(|known| started < known.until) {
            return Ok(known.totals);
        }
        drop(known);
        let totals = reader.totals(unfinished)?;
        let took = started.elapsed();
        *self.totals.lock() = Some(Known {
            totals,
            until: Instant::now() + took * PART_OF_TIME,
        });
        Ok(totals)
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
