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

use crate::export::{Error, QueueKey, State, View};

/// Answers one request, exactly once. It may write to a socket, so it is never called with the
/// mutex held. It must not wait for the answer of another request: tiny_http makes it do so when
/// a client pipelines, so whatever stands before tiny_http must pass on one request at a time.
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
    /// What the exports of a queue have in common; an entry for as long as there are any, or the
    /// queue waits after it had some.
    queues: HashMap<QueueKey, Queue>,
    /// Those that have none and wait.
    empty: Vec<QueueKey>,
    /// Whose time is over when; the number tells apart what is due at the same moment.
    deadlines: BTreeMap<(Instant, u64), Uuid>,
    parked: u64,
    due: Vec<(Reply, View)>,
    closing: bool,
}

#[derive(Default)]
struct Queue {
    exports: usize,
    trouble: Option<Trouble>,
}

impl Queue {
    fn waits(&self, now: Instant) -> bool {
        let trouble = self.trouble.as_ref();
        trouble.is_some_and(|trouble| trouble.next_attempt > now)
    }
}

struct Entry {
    key: QueueKey,
    state: State,
    progress: Progress,
    parked: Vec<Parked>,
}

/// How far an export has come by its own attempts.
#[derive(Clone, Default)]
pub struct Progress {
    /// How many have failed.
    pub attempts: u32,
    /// Why the last one failed: `kind` and `message` as JSON.
    pub last_error: Option<Arc<RawValue>>,
}

/// Why a queue waits.
#[derive(Clone)]
pub struct Trouble {
    /// Why its last attempt failed, whichever export that was.
    pub error: Arc<RawValue>,
    /// Before when there will be no other.
    pub next_attempt: Instant,
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
    /// Adds an export as Pending. Returns its key with the text that all of its queue share: ten
    /// thousand copies of a long URL are a lot of memory.
    pub fn insert(&self, id: Uuid, key: QueueKey, progress: Progress) -> QueueKey {
        let mut inner = self.inner.lock();
        inner.forget_empty(Instant::now());
        let known = inner.queues.get_key_value(&key);
        let key = known.map_or(key, |(known, _)| known.clone());
        inner.queues.entry(key.clone()).or_default().exports += 1;
        let entry = Entry {
            key: key.clone(),
            state: State::Pending,
            progress,
            parked: Vec::new(),
        };
        inner.unfinished.insert(id, entry);
        key
    }

    /// Whether this is an export that is not finished.
    pub fn knows(&self, id: Uuid) -> bool {
        self.inner.lock().unfinished.contains_key(&id)
    }

    /// How many exports are not finished.
    pub fn count(&self) -> usize {
        self.inner.lock().unfinished.len()
    }

    /// How many exports of this queue are not finished.
    pub fn count_of(&self, key: &QueueKey) -> usize {
        let inner = self.inner.lock();
        inner.queues.get(key).map_or(0, |queue| queue.exports)
    }

    /// Whether it is known that an export will not be tried before `deadline`: its queue's last
    /// attempt has failed, and the next one is later, or is another export's.
    pub fn is_held_up(&self, id: Uuid, deadline: Instant) -> bool {
        let inner = self.inner.lock();
        let Some(entry) = inner.unfinished.get(&id) else {
            return false;
        };
        let queue = inner.queues.get(&entry.key);
        queue.is_some_and(|queue| {
            queue.trouble.as_ref().is_some_and(|trouble| {
                let behind = entry.progress.attempts == 0 && queue.exports > 1;
                behind || trouble.next_attempt > deadline
            })
        })
    }

    /// The queue waits, for this reason.
    pub fn delay(&self, key: &QueueKey, trouble: Trouble) {
        if let Some(queue) = self.inner.lock().queues.get_mut(key) {
            queue.trouble = Some(trouble);
        }
    }

    /// The export's attempt failed, and it is queued again.
    pub fn postpone(&self, id: Uuid, progress: Progress) {
        if let Some(entry) = self.inner.lock().unfinished.get_mut(&id) {
            entry.state = State::Pending;
            entry.progress = progress;
        }
    }

    /// The export is on the wire from now on.
    pub fn begin(&self, id: Uuid) {
        if let Some(entry) = self.inner.lock().unfinished.get_mut(&id) {
            entry.state = State::Processing;
        }
    }

    /// Why an export waits, by its own last attempt or its queue's.
    pub fn last_error(&self, id: Uuid) -> Option<Arc<RawValue>> {
        let inner = self.inner.lock();
        inner
            .unfinished
            .get(&id)?
            .view(id, &inner.queues)
            .last_error
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
        if !may_see(&entry.key.owner, &entry.key.destination) {
            return Poll::Now(reply, Err(Error::NotFound));
        }
        if inner.closing || deadline <= Instant::now() {
            let view = entry.view(id, &inner.queues);
            return Poll::Now(reply, Ok(view));
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

    /// Whether any queue's last attempt has failed.
    pub fn is_any_failing(&self) -> bool {
        let inner = self.inner.lock();
        inner.queues.values().any(|queue| queue.trouble.is_some())
    }

    /// The export's destination was reached: its queue waits no longer.
    pub fn recover(&self, id: Uuid) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let key = inner.unfinished.get(&id).map(|entry| &entry.key);
        if let Some(queue) = key.and_then(|key| inner.queues.get_mut(key)) {
            queue.trouble = None;
        }
    }

    /// Takes an export out, now that its result is in the store, and has the waiter answer every
    /// poll that was parked on it.
    pub fn finish(&self, id: Uuid, response: &Arc<RawValue>) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let Some(entry) = inner.unfinished.remove(&id) else {
            return;
        };
        inner.leave(&entry.key);
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

impl Entry {
    /// What may be seen of it: while it is Pending, why, and when something will happen. Where
    /// it was not tried itself, that is its queue's reason.
    fn view(&self, id: Uuid, queues: &HashMap<QueueKey, Queue>) -> View {
        let trouble = queues
            .get(&self.key)
            .and_then(|queue| queue.trouble.as_ref());
        let trouble = trouble.filter(|_| self.state == State::Pending);
        let Progress {
            attempts,
            last_error,
        } = self.progress.clone();
        View {
            id,
            state: self.state,
            response: None,
            attempts,
            last_error: last_error.or_else(|| trouble.map(|trouble| trouble.error.clone())),
            next_attempt_in: trouble.map(|trouble| {
                trouble
                    .next_attempt
                    .saturating_duration_since(Instant::now())
            }),
        }
    }
}

impl Inner {
    /// One export of a queue less.
    fn leave(&mut self, key: &QueueKey) {
        let now = Instant::now();
        self.forget_empty(now);
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        queue.exports -= 1;
        if queue.exports > 0 {
            return;
        }
        if queue.waits(now) {
            if !self.empty.contains(key) {
                self.empty.push(key.clone());
            }
        } else {
            self.queues.remove(key);
        }
    }

    /// Forgets queues without exports whose wait is over, as the worker does.
    fn forget_empty(&mut self, now: Instant) {
        let queues = &mut self.queues;
        self.empty.retain(|key| match queues.get(key) {
            Some(queue) if queue.exports > 0 => false,
            Some(queue) if queue.waits(now) => true,
            _ => {
                queues.remove(key);
                false
            }
        });
    }

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
            let view = entry.view(id, &self.queues);
            self.due.push((reply, view));
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
        let key = QueueKey {
            owner: b"me".as_slice().into(),
            destination: "https://a.example/".into(),
        };
        states.insert(id, key, Progress::default());
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
        assert!(inner.queues.is_empty());
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
