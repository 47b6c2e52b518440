//! The small tools for a person at the keyboard: mint a token, be a destination, see whether a
//! destination can be reached, ask for health.
//!
//! Not here: the service itself.

pub mod check;
pub mod healthcheck;
pub mod sink;
pub mod token;
