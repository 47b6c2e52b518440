//! Small tools for a person at the keyboard: mint a token, act as a destination, check whether a destination
//! can be reached, ask for the service's health and state, show the settings.
//!
//! Not here: the service itself.

pub mod acts;
pub mod ask;
pub mod check;
pub mod healthcheck;
pub mod ledger;
pub mod link;
pub mod settings;
pub mod sink;
pub mod status;
pub mod token;
