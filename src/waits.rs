//! Where a connection waits for the answer to its request, and whoever has the answer puts it there.
//!
//! A waiting connection costs its own thread and nothing else: no thread of the pool, no link. Whether
//! the answer is known at once, after a commit or after a minute makes no difference here.
//!
//! Not here: what an answer says (`answer`), and how it is written (`gate`).

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::answer::Response;

/// All connections that there are, by number.
#[derive(Default)]
pub struct Waits {
    /// Held for moments only.
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    last: AtomicU64,
    hurried: AtomicBool,
}

#[derive(Default)]
struct Entry {
    state: Mutex<State>,
    changed: Condvar,
    hurried: AtomicBool,
}

#[derive(Default)]
enum State {
    /// Nothing was asked, or it was given up.
    #[default]
    Idle,
    /// A request is under way.
    Asked(Option<Later>),
    Answered(Response),
}

/// What is to be done where there is no answer by then.
struct Later {
    at: Instant,
    act: Box<dyn FnOnce() + Send>,
}

impl Waits {
    /// A place for a connection to wait at.
    pub fn enter(self: &Arc<Self>) -> Wait {
        // Relaxed: the numbers differ, and that is all.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(Entry {
            // Whoever enters after `hurry` has looked sees this.
            hurried: AtomicBool::new(self.hurried.load(Ordering::SeqCst)),
            ..Entry::default()
        });
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

    /// From now on all that was put off by [`Answerer::at`] is done at once.
    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::SeqCst);
        let entries: Vec<_> = self.entries.lock().values().cloned().collect();
        for entry in entries {
            entry.hurried.store(true, Ordering::SeqCst);
            // So that it is not between looking and waiting.
            drop(entry.state.lock());
            entry.changed.notify_all();
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
        self.entry.set(State::Asked(None));
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
            let mut until = (Instant::now() + interval).min(deadline);
            match &mut *state {
                State::Answered(response) => {
                    let response = mem::take(response);
                    *state = State::Idle;
                    return Some(response);
                }
                State::Asked(Some(later)) if !self.entry.is_due(later) => {
                    until = until.min(later.at)
                }
                State::Asked(later) => {
                    if let Some(later) = later.take() {
                        MutexGuard::unlocked(&mut state, later.act);
                        continue;
                    }
                }
                State::Idle => {}
            }
            if self.entry.changed.wait_until(&mut state, until).timed_out()
                && matches!(*state, State::Asked(_))
                && (Instant::now() >= deadline || !is_wanted())
            {
                drop(state);
                self.entry.set(State::Idle);
                return None;
            }
        }
    }
}

impl Entry {
    fn is_due(&self, later: &Later) -> bool {
        later.at <= Instant::now() || self.hurried.load(Ordering::SeqCst)
    }

    fn set(&self, state: State) {
        // Dropped without the lock: it may hold what has a lock of its own.
        let before = mem::replace(&mut *self.state.lock(), state);
        drop(before);
        self.changed.notify_all();
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.waits.entries.lock().remove(&self.number);
        self.entry.set(State::Idle);
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
        if matches!(*state, State::Asked(_)) {
            let before = mem::replace(&mut *state, State::Answered(response));
            drop(state);
            self.0.changed.notify_all();
            drop(before);
        }
    }

    /// Has the connection's own thread `act` at this time, unless there is an answer by then: it is there
    /// and has nothing else to do. `act` is dropped where the connection goes away before, and should
    /// put an answer if it is called. Does not block.
    pub fn at(&self, time: Instant, act: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock();
        // Else `act` is dropped, after the lock.
        if let State::Asked(later) = &mut *state {
            *later = Some(Later {
                at: time,
                act: Box::new(act),
            });
            drop(state);
            self.0.changed.notify_all();
        }
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
    }

    #[test]
    fn nobody_hears_an_answer_that_comes_too_late_or_is_not_wanted() {
        let waits = Arc::new(Waits::default());
        let wait = waits.enter();
        let answerer = waits.answerer(wait.number()).unwrap();
        answerer.put(response(1));
        wait.ask();
        assert!(wait.answer(LONG, OFTEN, || false).is_none());
        answerer.put(response(2));
        wait.ask();
        assert!(wait.answer(OFTEN, LONG, || true).is_none());
        drop(wait);
        answerer.put(response(3));
        assert!(waits.entries.lock().is_empty());
    }
}
