//! export-service: the only way data leaves a Databox.
//!
//! The life of a request, from module to module:
//!
//! 1. [`config`] reads arguments and environment once and yields one checked value.
//! 2. [`gate`] admits connections, speaks TLS, and passes whole requests on to tiny_http.
//! 3. [`server`] serves each request on a thread of a fixed pool. The connection meanwhile waits for its
//!    answer in [`waits`].
//! 4. [`routes`] turns a request into a command, without I/O. It asks [`auth`] what the request's macaroon
//!    allows. The key for checking macaroons is given, or [`arbiter`] fetches it.
//! 5. [`exports`] carries the command out. It writes submissions to the store, which is also the queue,
//!    parks long polls, and answers through [`reply`]. [`answer`] turns that into a response.
//! 6. [`delivery`] is the worker: it asks [`exports`] whose turn it is, POSTs exports to their destinations
//!    one after the other, and reports each result back.
//!
//! The nouns, which [`export`] and [`destination`] define: an *export* is one payload on its way to one
//! *destination*. Its *owner* is the identifier of the *macaroon* that it came with. A *caveat* limits what a
//! macaroon permits. A *long poll* is *parked* while it waits. An *attempt* is one POST; its *outcome* is an
//! answer or a failure. Exports of one sender (the owner, or the client's address if that is empty) to one
//! destination wait in one *queue*, which has a *backoff* after failures. An export is *finished* once its *result*
//! is stored.
//!
//! Below all of these: [`logging`] decides what may be shown, [`threads`] makes a panic end the process,
//! [`dial`] looks names up and connects, [`socket`] puts one deadline on everything that it does, [`memory`]
//! is a shared budget of bytes, [`metrics`] counts what happens, [`backoff`] says how long to wait after
//! failures, [`pem`] what is wrong with a certificate file, [`denied`] what keeps the service from its own files,
//! [`key_file`] keeps this box's own keys, [`unseen`] knows the characters that a text from outside must not
//! smuggle in, [`systemd`] is told of the start and the stop, and [`ledger`] is the vocabulary of what left it.
//! Beside them are the [`owner`]'s side, which shows what left
//! the box, and the [`tools`] for a person at the keyboard.

// A line printed in passing would bypass the log and its rules on what may be shown.
#![warn(clippy::dbg_macro, clippy::print_stdout, clippy::print_stderr)]

pub mod answer;
pub mod arbiter;
pub mod auth;
pub mod backoff;
pub mod config;
pub mod delivery;
pub mod denied;
pub mod destination;
pub mod dial;
pub mod export;
pub mod exports;
pub mod gate;
pub mod key_file;
pub mod ledger;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod owner;
pub mod pem;
pub mod reply;
pub mod routes;
pub mod server;
pub mod socket;
pub mod systemd;
pub mod threads;
pub mod tools;
pub mod unseen;
pub mod version;
pub mod waits;
