//! The shared vocabulary: exports, their states and their results; no I/O.
//!
//! Not here: storing exports (`exports`), and delivering them (`delivery`).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use crate::destination::Destination;
use crate::memory::Reservation;

/// Milliseconds of running time, unless a comment says Unix time.
pub type Millis = i64;

/// A day.
pub const DAY: Millis = 24 * 60 * 60 * 1000;

/// A queue's number in the store. A queue has the exports of one sender to one destination.
pub type QueueId = i64;

/// An export that is not finished. Its payload is in the store.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its public id.
    pub id: Uuid,
    /// Its row in the store.
    pub seq: i64,
    /// The queue it waits in.
    pub queue: QueueId,
    /// Its position there. Lower ones are delivered first.
    pub turn: i64,
    /// Its sender's name: see [`crate::ledger::who`].
    pub who: String,
    /// The parsed URL.
    pub destination: Destination,
    /// When it was accepted, in running time.
    pub accepted_at: Millis,
    /// How many attempts have failed so far.
    pub attempts: u32,
    /// When it was first moved to the end of its queue, if it was.
    pub first_moved_at: Option<Millis>,
}

/// How an export is tried again after an attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Whether the export itself seems to be the cause. Then it moves to the end of its queue.
    pub to_end: bool,
    /// The least wait that the destination asked for; 0 if it did not.
    pub least_wait: Millis,
}

/// The state of a queue's backoff. All zero for a queue that is not failing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// There is no attempt before this.
    pub not_before: Millis,
    /// When the first of these attempts failed.
    pub failing_since: Millis,
}

/// A queue as it is found in the store at the start.
pub struct StoredQueue {
    /// How many unfinished exports it has.
    pub exports: usize,
    /// The position of the first of them.
    pub first: i64,
    /// If its last attempt failed: its backoff, and why as JSON.
    pub failing: Option<(Backoff, Option<Arc<RawValue>>)>,
    /// When its last pause ended, in running time; 0 if it was never paused.
    pub resumed_at: Millis,
}

/// The state of an export, as apps read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum State {
    /// It waits in its queue.
    Pending,
    /// It is being sent.
    Processing,
    /// It has a result.
    Finished,
}

/// What an app may see of an export.
pub struct View {
    /// The id that the app polls with.
    pub id: Uuid,
    /// Whether it waits, is being sent or is finished.
    pub state: State,
    /// The `ext_response` object as JSON, once finished.
    pub response: Option<Arc<RawValue>>,
    /// How many attempts have failed.
    pub attempts: u32,
    /// Why the last one failed, as JSON.
    pub last_error: Option<Arc<RawValue>>,
    /// How long until there may be another attempt, if the queue is failing.
    pub next_attempt_in: Option<Duration>,
}

impl View {
    /// The view of a finished export.
    pub fn finished(id: Uuid, response: Arc<RawValue>) -> Self {
        Self {
            id,
            state: State::Finished,
            response: Some(response),
            attempts: 0,
            last_error: None,
            next_attempt_in: None,
        }
    }
}

/// The result of an export, as apps read it in `ext_response` and as the store keeps it.
#[derive(Default, Deserialize, Serialize)]
pub struct ExtResponse {
    /// Code and reason phrase, like `200 OK`.
    pub status: String,
    /// The code alone.
    pub status_code: u16,
    /// The response's body if it is text, else empty.
    pub body: String,
    /// The response's body if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
    /// Whether the body is only the beginning of what was sent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// Why there was no response. The status is this service's own then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<FailureReport>,
    /// The part of the memory shared by all responses that the body takes until it is in the store.
    #[serde(skip)]
    pub memory: Option<Reservation>,
}

impl ExtResponse {
    /// A result with this status and nothing else.
    pub fn with_status(code: u16, reason: &str) -> Self {
        Self {
            status: format!("{code} {reason}"),
            status_code: code,
            ..Self::default()
        }
    }
}

/// JSON as it is stored, and shown.
pub fn to_json(value: &impl Serialize) -> Arc<RawValue> {
    // Structs of strings and numbers always serialise.
    to_raw_value(value).expect("a struct serialises").into()
}

/// Why an attempt failed, as apps read it in `last_error`.
#[derive(Serialize)]
pub struct LastError<'a> {
    /// What went wrong, for programs.
    pub kind: &'static str,
    /// What went wrong, for people.
    pub message: &'a str,
}

/// Why an export has no response from its destination.
#[derive(Deserialize, Serialize)]
pub struct FailureReport {
    /// What went wrong, for programs.
    pub kind: String,
    /// What went wrong, for people.
    pub message: String,
    /// How often it was tried.
    pub attempts: u32,
}

/// Why a submission or a poll got no [`View`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No such export, or not this caller's: the caller cannot tell which.
    NotFound,
    /// The idempotency key was used before for another submission.
    KeyReused,
    /// Submissions arrive faster than the disk can store them.
    Overloaded,
    /// The disk is full.
    DiskFull,
    /// The store cannot be read or written. The log says why.
    Storage,
    /// The queue has this many unfinished exports, which is the limit.
    TooMany(usize),
    /// The store has reached its size limit.
    StoreFull,
}
