//! The means to answer one submission or poll, at once or later, from whichever thread has the answer.
//!
//! Not here: where the connection waits meanwhile (`waits`), and what an answer says (`answer`).

use crate::answer::{self, Refusal};
use crate::export::{Error, View};
use crate::logging;
use crate::waits::Answerer;

/// What is logged of a request that is refused.
pub struct RequestLine {
    /// The method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// The client's address.
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
    /// Where the connection waits for it.
    pub to: Answerer,
    /// The request.
    pub line: RequestLine,
}

impl Reply {
    /// Answers. Does not block, and touches no socket.
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
