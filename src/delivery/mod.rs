//! Getting a payload to its destination.
//!
//! Not here: what is queued and what becomes of a result (`exports`).

pub mod addresses;
pub mod attempt;
pub mod connect;
pub mod response;
pub mod retry;
pub mod signature;
pub mod tls;
pub mod worker;
