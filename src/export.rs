//! The vocabulary: what an export is, where it is in its life, and what comes of it; no I/O.
//!
//! Not here: where exports are kept (`exports`), and how they reach their destination (`delivery`).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::destination::Destination;
use crate::memory::Reservation;

/// Milliseconds: of running time here, of Unix time where it says so.
pub type Millis = i64;

/// A queue's number in the store. A queue holds the exports of one owner to one destination.
pub type QueueId = i64;

/// An export that has still to be delivered. Its payload is in the store.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its public id.
    pub id: Uuid,
    /// Its row in the store.
    pub seq: i64,
    /// The queue it waits in.
    pub queue: QueueId,
    /// Its position there: lower ones are delivered first.
    pub turn: i64,
    /// Where it goes.
    pub destination: Destination,
    /// When it was accepted.
    pub accepted_at: Millis,
    /// How often it was tried so far.
    pub attempts: u32,
    /// When it was first moved to the end of its queue, if it was.
    pub first_moved_at: Option<Millis>,
}

/// How an export is tried again after an attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Whether the export itself seems to be the cause: it goes to the end of its queue then.
    pub to_end: bool,
    /// The least wait, which the destination asked for.
    pub least_wait: Millis,
}

/// How far a queue's backoff has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// No attempt before this.
    pub not_before: Millis,
    /// When the first of them failed.
    pub failing_since: Millis,
}

/// A queue as a start finds it in the store.
pub struct StoredQueue {
    /// How many exports it has that are not finished.
    pub exports: usize,
    /// The position of the first.
    pub first: i64,
    /// Its backoff, and why its last attempt failed, if that did.
    pub failing: Option<(Backoff, Option<Arc<RawValue>>)>,
}

/// Where an export is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum State {
    /// Queued.
    Pending,
    /// On the wire.
    Processing,
    /// It has a result.
    Finished,
}

/// What an app may see of an export.
pub struct View {
    /// Which export.
    pub id: Uuid,
    /// Where it is in its life.
    pub state: State,
    /// The `ext_response` object as JSON, once finished.
    pub response: Option<Arc<RawValue>>,
    /// How many attempts have failed.
    pub attempts: u32,
    /// Why the last one failed, as JSON.
    pub last_error: Option<Arc<RawValue>>,
    /// How long until there can be another.
    pub next_attempt_in: Option<Duration>,
}

impl View {
    /// A finished one.
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
    /// Why there was no response; the status is then this service's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<FailureReport>,
    /// What the body takes of the memory that all of them share, until it is in the store.
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

    /// As it is stored, and shown.
    pub fn to_json(&self) -> String {
        // A struct of strings and numbers has no way not to become JSON.
        serde_json::to_string(self).expect("a struct serialises")
    }
}

/// Why an attempt failed, as apps read it in `last_error`.
#[derive(Serialize)]
pub struct LastError<'a> {
    /// What went wrong, for programs.
    pub kind: &'static str,
    /// What went wrong, for people.
    pub message: &'a str,
}

/// Why an export has no response of its destination's.
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
    /// The disk takes longer than submissions keep coming.
    Overloaded,
    /// The disk is full.
    DiskFull,
    /// The store cannot be read or written; the log says why.
    Storage,
    /// The queue has this many unfinished exports, and may not have more.
    TooMany(usize),
    /// The store has reached the size that it may have.
    StoreFull,
}
