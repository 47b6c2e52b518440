//! The means to answer one submission or poll, now or later, from any thread.
//!
//! Not here: the connection that waits meanwhile (`waits`), and what an answer says (`answer`).

use crate::answer::{self, Refusal};
use crate::export::{Error, View};
use crate::logging;
use crate::waits::Answerer;

/// Answers one POST request, once.
pub struct Reply {
    /// The connection that waits for it.
    pub to: Answerer,
    /// Path and query, for the log.
    pub target: String,
}

impl Reply {
    /// Gives the connection its answer. Does not block: the connection's own thread writes to the socket.
    pub fn answer(self, result: Result<View, Error>) {
        match result {
            Ok(view) => self.to.put(answer::view(&view)),
            Err(error) => refuse("POST", &self.target, &self.to, &Refusal::Export(error)),
        }
    }
}

/// Gives a connection the answer to a refused request, and logs that.
pub fn refuse(method: &str, target: &str, to: &Answerer, refusal: &Refusal) {
    logging::refused(method, target, refusal.status(), refusal, to.client());
    to.put(answer::refusal(refusal));
}
