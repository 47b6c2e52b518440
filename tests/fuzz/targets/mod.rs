//! A target for each parser that reads bytes from outside. It takes any input, and panics if what it checks
//! does not hold. `scripts/fuzz` looks for such inputs, and `tests/corpus.rs` runs those that are kept.
//!
//! Who sends what, and where it is tested:
//!
//! | from | bytes | target |
//! |---|---|---|
//! | apps | a connection's bytes: heads, chunks, lengths | `framing` (and `tests/framing.rs`, against tiny_http) |
//! | apps | paths, queries, headers, bodies, idempotency keys | `request` |
//! | apps | tokens and their caveats | `token` |
//! | apps | destinations | `url` |
//! | whoever reaches the owner's port | credentials, `Host`, `Origin`, queries, acts | `owner` |
//! | destinations | heads, chunks, statuses | `response` |
//! | destinations | the same through a socket and ureq; `Retry-After` | `transport` |
//! | arbiter | ZMTP and CURVE, `ZMQ_PUBLIC_KEY` | `curve` |
//! | arbiter | Zest messages, the arbiter's instance | `zest` |
//! | the disk | `exports.db` and its WAL in every layout, stored errors and results | `store` |
//! | the disk | `secret`, certificate files | `files` |
//! | the owner of the box | flags and variables: lists, durations, endpoint, signing secret | `settings` |
//!
//! Not here: TLS, X.509 and SQLite's file format below the rows, which rustls, webpki and SQLite fuzz
//! themselves; DNS answers, which the system's resolver reads; `/proc`, which the kernel writes; the answer
//! that `healthcheck` reads, which is only compared; requests to `sink`, which are a developer's own.

pub mod curve;
pub mod files;
pub mod framing;
pub mod owner;
pub mod request;
pub mod response;
pub mod settings;
pub mod store;
pub mod token;
pub mod transport;
pub mod url;
pub mod zest;

/// Takes an input.
pub type Target = fn(&[u8]);

/// All targets by name. Each has a folder in `corpus`.
pub const ALL: [(&str, Target); 12] = [
    ("curve", curve::run),
    ("files", files::run),
    ("framing", framing::run),
    ("owner", owner::run),
    ("request", request::run),
    ("response", response::run),
    ("settings", settings::run),
    ("store", store::run),
    ("token", token::run),
    ("transport", transport::run),
    ("url", url::run),
    ("zest", zest::run),
];
