//! The state of every unfinished export, and the long polls that wait for a change of it.
//!
//! One mutex guards everything here and is never held during I/O: no caller waits long for it,
//! and there is no second lock to order it with. The Condvar wakes one thread, the waiter, which
//! alone answers parked polls: those whose export finished and those whose time is over. So a
//! waiting long poll costs an entry in a map, not a thread of the pool.
//!
//! Not here: finished exports, which are in the store only.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{Error, State, View};
use crate::delivery::addresses::Destination;

/// Answers one request, exactly once. It may write to a socket, so it is never called with the
/// mutex held.
pub type Reply = Box<dyn FnOnce(Result<View, Error>) + Send>;

/// See the module's own text.
#[derive(Default)]
pub struct States {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    unfinished: HashMap<Uuid, Entry>,
    /// Whose time is over when; the number tells apart what is due at the same moment.
    deadlines: BTreeMap<(Instant, u64), Uuid>,
    parked: u64,
    due: Vec<(Reply, View)>,
    closing: bool,
}

struct Entry {
    owner: Vec<u8>,
    destination: Destination,
    state: State,
    parked: Vec<Parked>,
}

struct Parked {
    due: (Instant, u64),
    reply: Reply,
}

/// What became of a poll.
pub enum Poll {
    /// It is parked, and will be answered.
    Parked,
    /// It is to be answered now, with this.
    Now(Reply, Result<View, Error>),
    /// No unfinished export has this id: the store may have its result.
    Elsewhere(Reply),
}

impl States {
    /// Adds an export as Pending.
    pub fn insert(&self, id: Uuid, owner: Vec<u8>, destination: Destination) {
        let entry = Entry {
            owner,
            destination,
            state: State::Pending,
            parked: Vec::new(),
        };
        self.inner.lock().unfinished.insert(id, entry);
    }

    /// How many exports are not finished.
    pub fn count(&self) -> usize {
        self.inner.lock().unfinished.len()
    }

    /// The export is on the wire from now on.
    pub fn begin(&self, id: Uuid) {
        if let Some(entry) = self.inner.lock().unfinished.get_mut(&id) {
            entry.state = State::Processing;
        }
    }

    /// Parks a poll until the export is finished or `deadline` arrives. `may_see` decides from
    /// the export's owner and destination whether this caller may know of it.
    pub fn poll(
        &self,
        id: Uuid,
        may_see: impl FnOnce(&[u8], &str) -> bool,
        deadline: Instant,
        reply: Reply,
    ) -> Poll {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let Some(entry) = inner.unfinished.get_mut(&id) else {
            return Poll::Elsewhere(reply);
        };
        if !may_see(&entry.owner, entry.destination.as_str()) {
            return Poll::Now(reply, Err(Error::NotFound));
        }
        if inner.closing || deadline <= Instant::now() {
            return Poll::Now(reply, Ok(View::unfinished(id, entry.state)));
        }
        inner.parked += 1;
        let due = (deadline, inner.parked);
        entry.parked.push(Parked { due, reply });
        inner.deadlines.insert(due, id);
        // The waiter sleeps until what was the earliest deadline.
        if inner
            .deadlines
            .first_key_value()
            .is_some_and(|(&first, _)| first == due)
        {
            self.changed.notify_one();
        }
        Poll::Parked
    }

    /// Takes an export out, now that its result is in the store, and has the waiter answer every
    /// poll that was parked on it.
    pub fn finish(&self, id: Uuid, response: &Arc<RawValue>) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let Some(entry) = inner.unfinished.remove(&id) else {
            return;
        };
        for Parked { due, reply } in entry.parked {
            inner.deadlines.remove(&due);
            inner
                .due
                .push((reply, View::finished(id, response.clone())));
        }
        if !inner.due.is_empty() {
            self.changed.notify_one();
        }
    }

    /// Lets no poll wait any more: those parked are answered with the state they have now, and
    /// [`States::wait`] returns after that.
    pub fn close(&self) {
        self.inner.lock().closing = true;
        self.changed.notify_one();
    }

    /// What the waiter thread does: sleeps until a parked poll is due, answers it, and repeats,
    /// until [`States::close`].
    pub fn wait(&self) {
        let mut inner = self.inner.lock();
        loop {
            inner.take_due(Instant::now());
            if !inner.due.is_empty() {
                let due = std::mem::take(&mut inner.due);
                parking_lot::MutexGuard::unlocked(&mut inner, || {
                    for (reply, view) in due {
                        reply(Ok(view));
                    }
                });
            } else if inner.closing {
                return;
            } else if let Some((&(deadline, _), _)) = inner.deadlines.first_key_value() {
                self.changed.wait_until(&mut inner, deadline);
            } else {
                self.changed.wait(&mut inner);
            }
        }
    }
}

impl Inner {
    /// Moves every parked poll whose time is over to `due`; all of them once closing.
    fn take_due(&mut self, now: Instant) {
        while let Some(first) = self.deadlines.first_entry()
            && (self.closing || first.key().0 <= now)
        {
            let (due, id) = first.remove_entry();
            // Every deadline belongs to a poll in its entry: they are added and removed together.
            let Some(entry) = self.unfinished.get_mut(&id) else {
                continue;
            };
            let Some(at) = entry.parked.iter().position(|parked| parked.due == due) else {
                continue;
            };
            let Parked { reply, .. } = entry.parked.swap_remove(at);
            self.due.push((reply, View::unfinished(id, entry.state)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, unbounded};
    use std::time::Duration;

    fn reply() -> (Reply, Receiver<View>) {
        let (sender, receiver) = unbounded();
        let reply: Reply = Box::new(move |result| sender.send(result.ok().unwrap()).unwrap());
        (reply, receiver)
    }

    fn states_with_one() -> (States, Uuid) {
        let states = States::default();
        let id = Uuid::now_v7();
        let destination = Destination::parse("https://a.example/").unwrap();
        states.insert(id, b"me".to_vec(), destination);
        (states, id)
    }

    fn in_an_hour() -> Instant {
        Instant::now() + Duration::from_secs(3600)
    }

    #[test]
    fn every_poll_parked_on_an_export_gets_its_result() {
        let (states, id) = states_with_one();
        std::thread::scope(|scope| {
            scope.spawn(|| states.wait());
            let answers: Vec<_> = (0..3)
                .map(|_| {
                    let (reply, answer) = reply();
                    assert!(matches!(
                        states.poll(id, |_, _| true, in_an_hour(), reply),
                        Poll::Parked
                    ));
                    answer
                })
                .collect();
            states.finish(id, &RawValue::from_string("{}".into()).unwrap().into());
            for answer in answers {
                assert_eq!(answer.recv().unwrap().state, State::Finished);
            }
            states.close();
        });
        let inner = states.inner.lock();
        assert!(inner.unfinished.is_empty() && inner.deadlines.is_empty());
    }

    #[test]
    fn a_poll_whose_time_is_over_gets_the_state_of_then_and_leaves_nothing_behind() {
        let (states, id) = states_with_one();
        std::thread::scope(|scope| {
            scope.spawn(|| states.wait());
            states.begin(id);
            let (reply, answer) = reply();
            let soon = Instant::now() + Duration::from_millis(20);
            assert!(matches!(
                states.poll(id, |_, _| true, soon, reply),
                Poll::Parked
            ));
            assert_eq!(answer.recv().unwrap().state, State::Processing);
            states.close();
        });
        let inner = states.inner.lock();
        assert!(inner.deadlines.is_empty() && inner.unfinished[&id].parked.is_empty());
    }

    #[test]
    fn closing_answers_parked_polls_and_parks_no_more() {
        let (states, id) = states_with_one();
        let (first, answer) = reply();
        assert!(matches!(
            states.poll(id, |_, _| true, in_an_hour(), first),
            Poll::Parked
        ));
        states.close();
        states.wait();
        assert_eq!(answer.recv().unwrap().state, State::Pending);
        let (second, _answer) = reply();
        assert!(matches!(
            states.poll(id, |_, _| true, in_an_hour(), second),
            Poll::Now(..)
        ));
    }

    #[test]
    fn a_stranger_learns_nothing_of_an_export() {
        let (states, id) = states_with_one();
        let (reply, _answer) = reply();
        let poll = states.poll(id, |owner, _| owner == b"you", in_an_hour(), reply);
        assert!(matches!(poll, Poll::Now(_, Err(Error::NotFound))));
    }
}
