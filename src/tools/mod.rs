//! Small tools for a person at the keyboard: mint a token, act as a destination, check whether a destination
//! can be reached, ask for the service's health.
//!
//! Not here: the service itself.

pub mod check;
pub mod healthcheck;
pub mod sink;
pub mod token;
