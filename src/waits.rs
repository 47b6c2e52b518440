//! Connections that wait for the answer to their request, which any thread can give them.
//!
//! A waiting connection occupies its own thread and nothing else: no thread of the pool, no link. It makes no
//! difference whether the answer is known at once, after a commit or after a minute.
//!
//! Not here: what an answer says (`answer`), and how it is written (`gate`).

use std::collections::HashMap;
use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::answer::Response;

/// All connections, by number.
#[derive(Default)]
pub struct Waits {
    /// Locked briefly.
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    last: AtomicU64,
    hurried: AtomicBool,
}

struct Entry {
    client: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    hurried: AtomicBool,
}

#[derive(Default)]
enum State {
    /// No request is under way, or its answer is no longer wanted.
    #[default]
    Idle,
    /// A request is under way.
    Asked(Option<Later>),
    Answered(Response),
}

/// What the connection's thread does if there is no answer by then.
struct Later {
    at: Instant,
    act: Box<dyn FnOnce() + Send>,
}

impl Waits {
    /// Registers a connection from this client.
    pub fn enter(self: &Arc<Self>, client: SocketAddr) -> Wait {
        // Relaxed: the numbers only have to differ.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(Entry {
            client,
            state: Mutex::default(),
            changed: Condvar::new(),
            // For connections that `hurry` does not find in the map.
            hurried: AtomicBool::new(self.hurried.load(Ordering::SeqCst)),
        });
        self.entries.lock().insert(number, entry.clone());
        Wait {
            waits: self.clone(),
            number,
            entry,
        }
    }

    /// The means to answer a connection. None if it has ended.
    pub fn answerer(&self, number: u64) -> Option<Answerer> {
        self.entries.lock().get(&number).cloned().map(Answerer)
    }

    /// From now on, whatever [`Answerer::at`] has put off is done at once. Does not block.
    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::SeqCst);
        let entries: Vec<_> = self.entries.lock().values().cloned().collect();
        for entry in entries {
            entry.hurried.store(true, Ordering::SeqCst);
            // The lock makes sure that its thread is not between checking and waiting.
            drop(entry.state.lock());
            entry.changed.notify_all();
        }
    }
}

/// A registered connection, for its own thread. Dropping it removes it.
pub struct Wait {
    waits: Arc<Waits>,
    number: u64,
    entry: Arc<Entry>,
}

impl Wait {
    /// The number by which answers find this connection.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Notes that a request is about to be sent. Drops an answer to an earlier one.
    pub fn ask(&self) {
        self.entry.set(State::Asked(None));
    }

    /// The answer to the request. Blocks until it arrives, for at most `limit`, and checks every
    /// `interval` whether it `is_wanted`. None if it has not arrived or is no longer wanted.
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
        // Dropped without the lock, as it may contain something that takes a lock when dropped.
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

/// The means to answer a connection from any thread.
#[derive(Clone)]
pub struct Answerer(Arc<Entry>);

impl Answerer {
    /// The client's address and port.
    pub fn client(&self) -> SocketAddr {
        self.0.client
    }

    /// Gives the connection its answer. Does not block. If the connection has ended, or no longer waits, the
    /// answer is dropped.
    pub fn put(&self, response: Response) {
        let mut state = self.0.state.lock();
        if matches!(*state, State::Asked(_)) {
            let before = mem::replace(&mut *state, State::Answered(response));
            drop(state);
            self.0.changed.notify_all();
            drop(before);
        }
    }

    /// Has the connection's own thread, which waits anyway, call `act` at this time unless there is an answer
    /// by then. `act` should give one. It is dropped uncalled if the connection ends before. Does not block.
    pub fn at(&self, time: Instant, act: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock();
        // Otherwise `act` is dropped, after the lock.
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
    use std::net::{Ipv4Addr, SocketAddrV4};
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);
    const OFTEN: Duration = Duration::from_millis(1);
    const CLIENT: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1));

    fn response(status: u16) -> Response {
        Response {
            status,
            ..Response::default()
        }
    }

    #[test]
    fn an_answer_reaches_the_connection_that_asked_from_another_thread() {
        let waits = Arc::new(Waits::default());
        let (first, second) = (waits.enter(CLIENT), waits.enter(CLIENT));
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
        let wait = waits.enter(CLIENT);
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
