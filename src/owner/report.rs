//! What the owner is told: the values behind `GET /api/status`, `/api/ledger` and the page.
//!
//! Times are Unix milliseconds. A `who` is a macaroon identifier or an address, a `destination` a destination
//! name, like `hooks.example.com #3f9a`; both are as apps gave them, so whoever shows them escapes them.
//!
//! Not here: where the values come from (`exports`), and how they are shown (`page`).

use serde::{Deserialize, Serialize};

use crate::exports::store::evidence::Shown;

/// The state of the service, as `GET /api/status` tells it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The program's version.
    pub version: String,
    /// The time of all that follows.
    pub now: i64,
    /// Whether everything is paused.
    pub state: Activity,
    /// Since when it is paused, or since when the service runs.
    pub since: i64,
    /// What the owner should look at, worst first.
    pub attention: Vec<Attention>,
    /// The queues in which exports wait, worst first, at most 100.
    pub queues: Vec<Queue>,
    /// How many queues there are.
    pub queues_total: u64,
    /// The exports that wait.
    pub waiting: u64,
    /// The bytes of their payloads.
    pub waiting_bytes: u64,
    /// The pauses in force.
    pub pauses: Vec<Pause>,
    /// What the store takes.
    pub store: Store,
    /// The free bytes of the disk. None if they could not be asked for.
    pub disk_free: Option<u64>,
    /// The secret with which apps' tokens are checked.
    pub secret: Secret,
    /// The certificate of HTTPS.
    pub certificate: Certificate,
    /// How far the ledger reaches.
    pub ledger: Ledger,
    /// The destinations that are new to the owner.
    pub new_destinations: Vec<String>,
    /// Today so far, UTC.
    pub today: Totals,
    /// The mean of the last 30 days.
    pub usual: Totals,
}

/// Whether exports are sent at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// They are, unless a queue of theirs is paused.
    #[default]
    Sending,
    /// Everything is paused.
    Paused,
}

/// Something that needs the owner's attention.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Attention {
    /// A word for programs, like `failing`.
    pub kind: String,
    /// A sentence for people.
    pub text: String,
    /// What to do about it with one click.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub act: Option<Suggestion>,
}

/// An act of the owner that would help.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Suggestion {
    /// The words on its button.
    pub label: String,
    /// The last part of its path, like `retry`.
    pub act: String,
    /// Its body, like `{"destination":"hooks.example.com #3f9a"}`.
    pub body: serde_json::Value,
}

/// The exports of one `who` to one destination that wait.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Queue {
    /// Whose they are.
    pub who: String,
    /// The owner's own name for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Where they go.
    pub destination: String,
    /// How many there are.
    pub waiting: u64,
    /// What is being done about them.
    pub state: QueueState,
    /// Why the last attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Attempts that have failed since the last that did not.
    pub failures: u64,
    /// Seconds until the next attempt. None while it is paused or on its way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt_in: Option<f64>,
    /// Seconds until the first of them is given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub give_up_in: Option<f64>,
    /// The id of the one that has waited longest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_id: Option<String>,
    /// When that was accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_at: Option<i64>,
}

/// What is being done about a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueState {
    /// It is being delivered.
    Sending,
    /// It waits for its turn.
    #[default]
    Waiting,
    /// The last attempt failed.
    Failing,
    /// The owner has paused it.
    Paused,
}

/// Why an attempt failed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Reason {
    /// A word for programs, like `connect`.
    pub kind: String,
    /// A sentence for people.
    pub message: String,
}

/// A pause in force.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Pause {
    /// What is paused: `all`, `destination:NAME`, `host:HOST` or `who:WHO`.
    pub subject: String,
    /// Since when.
    pub since: i64,
    /// Until when. None: until the owner resumes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<i64>,
}

/// What the store takes, in bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Store {
    /// The whole store.
    pub bytes: u64,
    /// What it may take. None: no limit.
    pub limit: Option<u64>,
    /// The ledger in it.
    pub ledger_bytes: u64,
    /// What that may take.
    pub ledger_limit: u64,
}

/// The secret with which apps' tokens are checked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Secret {
    /// Whether there is one.
    pub ready: bool,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The certificate of HTTPS.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Certificate {
    /// When it expires. None: there is no certificate, so that the service speaks plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<i64>,
}

/// How far the ledger reaches.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Ledger {
    /// Its rows.
    pub rows: u64,
    /// The time of the first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_at: Option<i64>,
    /// Its last row. None: it is empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<Head>,
}

/// The last row of the ledger, by which it can be verified later.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Head {
    /// Its number.
    pub seq: i64,
    /// The chain's hash up to it, in hexadecimal.
    pub hash: String,
}

/// What was done in a day.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Bytes of requests that left.
    pub bytes_out: u64,
    /// Exports that were accepted.
    pub exports: u64,
    /// Exports that got an answer.
    pub delivered: u64,
    /// Exports that were given up.
    pub failed: u64,
    /// Destinations to which something was sent.
    pub destinations: u64,
    /// Requests of apps that were refused.
    pub refused: u64,
}

/// Rows of the ledger, as `GET /api/ledger` tells them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Rows {
    /// The rows, newest first.
    pub rows: Vec<Shown>,
    /// The `before` that shows the next older ones. None: these are the oldest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
}
