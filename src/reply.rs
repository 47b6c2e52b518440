//! The means to answer one submission or poll, now or later, from any thread.
//!
//! Not here: the connection that waits meanwhile (`waits`), and what an answer says (`answer`).

use crate::answer::{self, Refusal};
use crate::export::{Error, View};
use crate::logging;
use crate::waits::Answerer;

/// What is logged of a refused request.
pub struct RequestLine {
    /// As the client sent it.
    pub method: String,
    /// Path and query; only the path is logged.
    pub target: String,
    /// The client's address and port.
    pub client: String,
}

impl RequestLine {
    /// Logs that the request was refused.
    pub fn refused(&self, refusal: &Refusal) {
        let (method, target) = (&self.method, &self.target);
        logging::refused(method, target, refusal.status(), refusal, &self.client);
    }
}

/// Answers one request, once.
pub struct Reply {
    /// The connection that waits for it.
    pub to: Answerer,
    /// For the log, if the answer is a refusal.
    pub line: RequestLine,
}

impl Reply {
    /// Gives the connection its answer. Does not block: the connection's own thread writes to the socket.
    pub fn answer(self, result: Result<View, Error>) {
        match result {
            Ok(view) => self.to.put(answer::view(&view)),
            Err(error) => {
                let refusal = Refusal::Export(error);
                self.line.refused(&refusal);
                self.to.put(answer::refusal(&refusal));
            }
        }
    }
}
