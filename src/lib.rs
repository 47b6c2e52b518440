//! export-service: the only way data leaves a Databox.
//!
//! The life of a request, from module to module:
//!
//! 1. [`config`] reads arguments and environment once and yields one checked value.
//! 2. [`gate`] lets connections in, speaks TLS, and passes whole requests on to tiny_http.
//! 3. [`server`] hands each request to a thread of a fixed pool; the connection meanwhile waits for its
//!    answer in [`waits`].
//! 4. [`routes`] turns a request into a command; no I/O. It asks [`auth`] what the request's macaroon
//!    allows; the key to check it with was given, or [`arbiter`] has fetched it.
//! 5. [`exports`] carries the command out: it writes submissions to the store, which is the queue too,
//!    parks long polls, and answers through [`reply`] when there is something to say. What it says becomes a
//!    response in [`answer`].
//! 6. [`delivery`] is the worker: it asks [`exports`] whose turn it is, POSTs one export after the other to
//!    its destination, and reports each result back.
//!
//! The nouns, which [`export`] and [`destination`] define: an *export* is one payload on its way to one
//! *destination*; its *owner* is the identifier of the *macaroon* it came with; a *caveat* limits what a
//! macaroon is good for; a *long poll* is *parked* while it waits; an *attempt* is one POST, its *outcome* an
//! answer or a failure; exports of one owner to one destination wait in one *queue*, which has a *backoff*
//! after failures; an export is *finished* once its *result* is stored.
//!
//! Below all of them: [`logging`] says what may be shown, [`threads`] makes a panic the end of the
//! process, [`dial`] looks names up and connects, [`socket`] has one deadline for all that it does, [`memory`]
//! is shared within a bound, [`backoff`] says how long to wait after failures. Beside
//! all of it: [`tools`] for a person at the keyboard.

// A line printed in passing would bypass the log and its rules on what may be shown.
#![warn(clippy::dbg_macro, clippy::print_stdout, clippy::print_stderr)]

pub mod answer;
pub mod arbiter;
pub mod auth;
pub mod backoff;
pub mod config;
pub mod delivery;
pub mod destination;
pub mod dial;
pub mod export;
pub mod exports;
pub mod gate;
pub mod logging;
pub mod memory;
pub mod reply;
pub mod routes;
pub mod server;
pub mod socket;
pub mod threads;
pub mod tools;
pub mod waits;
