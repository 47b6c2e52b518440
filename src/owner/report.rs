//! What the owner is told: the values behind `GET /api/status`, `/api/ledger` and the page.
//!
//! Times are Unix milliseconds. A `who` is a macaroon identifier or an address, a `destination` a destination
//! name, like `hooks.example.com #3f9a`; both are as apps gave them, so whoever shows them escapes them.
//!
//! Not here: where the values come from (`exports`), and how they are shown (`page`).

use serde::Serialize;

pub use crate::exports::overview::{Queue, Reason};
pub use crate::exports::queues::QueueState;
pub use crate::exports::store::acts::Pause;
use crate::exports::store::evidence::Shown;

/// The state of the service, as `GET /api/status` tells it.
#[derive(Clone, Debug, Default, Serialize)]
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
    /// The owner's port. None: there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<Admin>,
}

/// The owner's port.
#[derive(Clone, Debug, Serialize)]
pub struct Admin {
    /// Where it listens.
    pub address: String,
    /// What the owner's browser opens.
    pub url: String,
}

/// Whether exports are sent at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Activity {
    /// They are, unless a queue of theirs is paused.
    #[default]
    Sending,
    /// Everything is paused.
    Paused,
}

/// Something that needs the owner's attention.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Attention {
    /// A word for programs, like `failing`.
    pub kind: &'static str,
    /// A sentence for people.
    pub text: String,
    /// What to do about it with one click.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub act: Option<Suggestion>,
}

/// An act of the owner that would help.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Suggestion {
    /// The words on its button.
    pub label: String,
    /// The last part of its path, like `retry`.
    pub act: String,
    /// Its body, like `{"destination":"hooks.example.com #3f9a"}`.
    pub body: serde_json::Value,
}

/// What the store takes, in bytes.
#[derive(Clone, Debug, Default, Serialize)]
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
#[derive(Clone, Debug, Default, Serialize)]
pub struct Secret {
    /// Whether there is one.
    pub ready: bool,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The certificate of HTTPS.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Certificate {
    /// When it expires. None: there is no certificate, so that the service speaks plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<i64>,
}

/// How far the ledger reaches.
#[derive(Clone, Debug, Default, Serialize)]
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
#[derive(Clone, Debug, Default, Serialize)]
pub struct Head {
    /// Its number.
    pub seq: i64,
    /// The chain's hash up to it, in hexadecimal.
    pub hash: String,
}

/// What was done in a day.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
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
