//! Where a connection waits for the answer to its request, and whoever has the answer puts it there.
//!
//! A waiting connection costs its own thread and nothing else: no thread of the pool, no link. Whether
//! the answer is known at once, after a commit or after a minute makes no difference here.
//!
//! Not here: what an answer says (`answer`), and how it is written (`gate`).

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::answer::Response;

/// All connections that there are, by number.
#[derive(Default)]
pub struct Waits {
    /// Held for moments only.
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    last: AtomicU64,
}

#[derive(Default)]
struct Entry {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
enum State {
    /// Nothing was asked, or it was given up.
    #[default]
    Idle,
    /// A request is under way.
    Asked,
    Answered(Response),
}

impl Waits {
    /// A place for a connection to wait at.
    pub fn enter(self: &Arc<Self>) -> Wait {
        // Relaxed: the numbers differ, and that is all.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::<Entry>::default();
        self.entries.lock().insert(number, entry.clone());
        Wait {
            waits: self.clone(),
            number,
            entry,
        }
    }

    /// The means to answer a connection; none where it has gone.
    pub fn answerer(&self, number: u64) -> Option<Answerer> {
        self.entries.lock().get(&number).cloned().map(Answerer)
    }

    /// Waits until no request is under way, until `deadline` at the latest.
    pub fn wait_until_answered(&self, deadline: Instant) {
        let entries: Vec<_> = self.entries.lock().values().cloned().collect();
        for entry in entries {
            let mut state = entry.state.lock();
            while matches!(*state, State::Asked) {
                if entry.changed.wait_until(&mut state, deadline).timed_out() {
                    return;
                }
            }
        }
    }
}

/// A connection's end.
pub struct Wait {
    waits: Arc<Waits>,
    number: u64,
    entry: Arc<Entry>,
}

impl Wait {
    /// The number by which its answers find it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// A request is about to be sent. An answer to an earlier one is forgotten.
    pub fn ask(&self) {
        *self.entry.state.lock() = State::Asked;
    }

    /// The answer to the request. Blocks until it is there, for `limit` at the most, and looks every
    /// `interval` whether it `is_wanted`. None where it is not there, or no longer wanted.
    pub fn answer(
        &self,
        limit: Duration,
        interval: Duration,
        mut is_wanted: impl FnMut() -> bool,
    ) -> Option<Response> {
        let deadline = Instant::now() + limit;
        let mut state = self.entry.state.lock();
        loop {
            if let State::Answered(response) = &mut *state {
                let response = mem::take(response);
                *state = State::Idle;
                return Some(response);
            }
            let until = (Instant::now() + interval).min(deadline);
            if self.entry.changed.wait_until(&mut state, until).timed_out()
                && matches!(*state, State::Asked)
                && (Instant::now() >= deadline || !is_wanted())
            {
                *state = State::Idle;
                self.entry.changed.notify_all();
                return None;
            }
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.waits.entries.lock().remove(&self.number);
        *self.entry.state.lock() = State::Idle;
        self.entry.changed.notify_all();
    }
}

/// What it takes to answer a connection, from any thread.
#[derive(Clone)]
pub struct Answerer(Arc<Entry>);

impl Answerer {
    /// Puts the answer where the connection waits for it. Does not block. Where the connection has gone,
    /// or no longer waits, nobody hears of it.
    pub fn put(&self, response: Response) {
        let mut state = self.0.state.lock();
        if matches!(*state, State::Asked) {
            *state = State::Answered(response);
            drop(state);
            self.0.changed.notify_all();
        }
    }

    /// Whether the connection still waits.
    pub fn is_wanted(&self) -> bool {
        matches!(*self.0.state.lock(), State::Asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);
    const OFTEN: Duration = Duration::from_millis(1);

    fn response(status: u16) -> Response {
        Response {
            status,
            ..Response::default()
        }
    }

    #[test]
    fn an_answer_reaches_the_connection_that_asked_from_another_thread() {
        let waits = Arc::new(Waits::default());
        let (first, second) = (waits.enter(), waits.enter());
        first.ask();
        second.ask();
        thread::scope(|scope| {
            scope.spawn(|| waits.answerer(second.number()).unwrap().put(response(2)));
            scope.spawn(|| waits.answerer(first.number()).unwrap().put(response(1)));
            for (wait, status) in [(&first, 1), (&second, 2)] {
                let answer = wait.answer(LONG, LONG, || true).unwrap();
                assert_eq!(answer.status, status);
            }
        });
        waits.wait_until_answered(Instant::now() + LONG);
    }

    #[test]
    fn nobody_hears_an_answer_that_comes_too_late_or_is_not_wanted() {
        let waits = Arc::new(Waits::default());
        let wait = waits.enter();
        let answerer = waits.answerer(wait.number()).unwrap();
        answerer.put(response(1));
        wait.ask();
        assert!(answerer.is_wanted());
        assert!(wait.answer(LONG, OFTEN, || false).is_none());
        answerer.put(response(2));
        wait.ask();
        assert!(wait.answer(OFTEN, LONG, || true).is_none());
        assert!(!answerer.is_wanted());
        drop(wait);
        answerer.put(response(3));
        assert!(waits.entries.lock().is_empty());
    }
}
