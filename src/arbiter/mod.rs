//! The link to a Databox's arbiter.
//!
//! Not here yet: the thread that asks.

pub mod curve;
pub mod zest;
