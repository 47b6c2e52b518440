//! Getting a payload to its destination.
//!
//! Not here: what is queued and what becomes of a result (`exports`).

pub mod addresses;
pub mod attempt;
pub mod worker;
