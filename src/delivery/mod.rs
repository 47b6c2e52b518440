//! Delivers payloads to their destinations.
//!
//! Not here: the queues, and storing results (`exports`).

pub mod addresses;
pub mod attempt;
pub mod connect;
pub mod response;
pub mod retry;
pub mod signature;
pub mod tls;
pub mod worker;
