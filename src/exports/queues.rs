//! Whose turn it is, when an export that failed is tried again, and when it is given up; pure.
//!
//! There is one queue for each sender and destination. Memory holds its count of exports, its backoff and a
//! cursor; the exports themselves are in the store alone. The worker decides by the same values that a
//! poll is shown, as there is no other copy.
//!
//! Queues that are due take turns (round robin), with one attempt at a time in each, so nobody's backlog
//! delays anybody else. Backoff belongs to the queue: five thousand exports to a dead host cost one
//! attempt per wait, and keep their order. An export is given up when its queue has been failing for
//! long enough since the export was accepted.
//!
//! The worker goes on before a result is in the store. So each queue has a cursor, the position of the
//! last export taken, and only exports behind it are looked at.
//!
//! The owner's acts hold queues. Nothing is taken from a held queue and nothing in it is given up, but an attempt
//! under way ends as usual. A *pause* lasts until the queue is resumed; then it is tried at once, and its
//! backoff and the time to give up start anew. An act that changes the rows of a queue *locks* it meanwhile.
//!
//! Times are passed in, and are the service's running time: the milliseconds that it has run for, all its
//! runs together. Neither time in which the box is off nor a clock that is set may end a wait or give
//! anything up.
//!
//! Not here: what is in the store, and locks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::backoff::backoff;
use crate::export::{
    Backoff, Export, LastError, Millis, QueueId, Retry, State, StoredQueue, View, to_json,
};
use crate::metrics::QueueStates;

/// The wait after the first failed attempt. It doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait, unless a destination asks for more.
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);
/// The longest wait that a destination's `Retry-After` can ask for. It does not keep an export from being
/// given up in the meantime.
pub const LONGEST_RETRY_AFTER: Millis = 24 * 60 * 60 * 1000;
/// An attempt that takes longer makes its queue slow: the worker hands the lead over before the next one.
const SLOW: Duration = Duration::from_millis(20);

/// Why an export of a paused queue is not sent.
const PAUSED: LastError<'_> = LastError {
    kind: "paused",
    message: "the owner of this box has paused it; it is sent when the pause ends",
};

/// JSON as it was written, unparsed.
type Json = Arc<RawValue>;

/// What is to be done now.
#[derive(Debug)]
pub enum Next {
    /// Try a queue's next export. The queue is busy until the attempt is reported.
    Attempt(Turn),
    /// Look up a queue's oldest export, which may have been tried for long enough: see
    /// [`Queues::overdue`].
    Overdue {
        /// The failing queue.
        queue: QueueId,
        /// Its cursor: only exports behind this position count.
        after: i64,
    },
    /// Nothing is due before this time, or before an export is added or reported.
    Wait(Option<Millis>),
}

/// A queue's turn to have an export tried.
#[derive(Debug)]
pub struct Turn {
    /// The queue, which is busy until the turn ends.
    pub queue: QueueId,
    /// Its cursor: the export to try is the first one behind this position.
    pub after: i64,
    /// Whether the queue's last attempt failed.
    pub failing: bool,
    /// Whether the queue's last attempt took longer than 20 ms.
    pub slow: bool,
    /// How many exports could be taken when the turn began.
    waiting: usize,
}

/// An export's own attempts so far.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// The export's id.
    pub id: Uuid,
    /// How many attempts have failed.
    pub attempts: u32,
    /// When it was first moved to the end of its queue, if it was.
    pub first_moved_at: Option<Millis>,
}

/// What follows from a failed attempt.
#[derive(Debug)]
pub struct Failed {
    /// The queue's new backoff.
    pub backoff: Backoff,
    /// Whether the export has been tried for long enough. Otherwise it is in its queue again.
    pub given_up: bool,
}

/// What is being done about a queue, the best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueState {
    /// One of its exports is being sent.
    Sending,
    /// It waits for its turn.
    #[default]
    Waiting,
    /// The owner has paused it.
    Paused,
    /// Its last attempt failed.
    Failing,
}

/// A queue with exports, as the owner sees it.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    /// The queue.
    pub id: QueueId,
    /// Exports without a result in the store.
    pub unfinished: usize,
    /// What is being done about them.
    pub state: QueueState,
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// When it is tried again, if it waits for that.
    pub next_attempt_at: Option<Millis>,
    /// Since when it fails, if it may be given up.
    pub failing_since: Option<Millis>,
}

/// A queue's oldest export behind the cursor.
#[derive(Clone, Copy, Debug)]
pub struct Oldest {
    /// Its position in the queue.
    pub turn: i64,
    /// In running time.
    pub accepted_at: Millis,
    /// Whether it is the first one behind the cursor.
    pub is_first: bool,
}

/// All queues that have exports or a backoff that is not over.
pub struct Queues {
    queues: HashMap<QueueId, Queue>,
    /// Queues that are due, by ticket, which is the order of their turns. Those whose last attempt failed
    /// are kept apart, as the worker may have to pass them over.
    ready: BTreeMap<u64, QueueId>,
    ready_failing: BTreeMap<u64, QueueId>,
    /// Queues in backoff, by its end and their ticket.
    waiting: BTreeMap<(Millis, u64), QueueId>,
    /// Failing queues, by the earliest time at which one of their exports may have to be given up. A queue
    /// is missing while an attempt that outlasts this time is under way.
    deadlines: BTreeSet<(Millis, QueueId)>,
    tickets: u64,
    unfinished: usize,
    give_up_after: Millis,
}

struct Queue {
    /// Exports without a result in the store.
    unfinished: usize,
    /// Those of them that are in the store behind the cursor, and can be taken.
    waiting: usize,
    /// Those of them whose move to the end is not in the store yet.
    moving: usize,
    /// The cursor: exports up to this position were taken.
    after: i64,
    on_wire: Option<Uuid>,
    slow: bool,
    /// Whether the owner has paused it.
    paused: bool,
    /// Whether an act of the owner is changing its rows.
    locked: bool,
    /// When it was last resumed. No failure before that counts towards giving up.
    resumed_at: Millis,
    phase: Phase,
    failing: Option<Box<Failing>>,
}

/// What is known of a queue whose last attempt failed.
struct Failing {
    backoff: Backoff,
    /// Why the last attempt failed, whichever export that was.
    error: Option<Json>,
    /// The queue's entry in `deadlines`.
    deadline: Option<Millis>,
    /// The export that failed, if it is the next to be tried. The store may not have its progress yet.
    again: Option<Progress>,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    /// It has nothing to try, and no backoff.
    Idle,
    /// One of its exports is being tried.
    Busy,
    /// An export other than its first was given up, and could be taken again until that is in the store.
    Blocked,
    /// In `ready` or `ready_failing` under this ticket.
    Ready(u64),
    /// In `waiting` under this key.
    Waiting((Millis, u64)),
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            unfinished: 0,
            waiting: 0,
            moving: 0,
            after: i64::MIN,
            on_wire: None,
            slow: false,
            paused: false,
            locked: false,
            resumed_at: Millis::MIN,
            phase: Phase::Idle,
            failing: None,
        }
    }
}

impl Queue {
    fn not_before(&self) -> Millis {
        let failing = self.failing.as_ref();
        failing.map_or(Millis::MIN, |failing| failing.backoff.not_before)
    }

    fn is_held(&self) -> bool {
        self.paused || self.locked
    }
}

impl Queues {
    /// Starts without queues. `give_up_after` is how long a queue fails before its exports are given up.
    pub fn new(give_up_after: Duration) -> Self {
        Self {
            queues: HashMap::new(),
            ready: BTreeMap::new(),
            ready_failing: BTreeMap::new(),
            waiting: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            tickets: 0,
            unfinished: 0,
            give_up_after: Millis::try_from(give_up_after.as_millis()).unwrap_or(Millis::MAX),
        }
    }

    /// Adds a queue that was found in the store at the start.
    pub fn restore(&mut self, id: QueueId, found: StoredQueue, now: Millis) {
        let resumed_at = found.resumed_at.min(now);
        let is_outdated = |stored: &Backoff| stored.failing_since < found.resumed_at;
        let failing = found.failing.map(|(stored, error)| {
            // A little running time is lost where the service was killed.
            let backoff = Backoff {
                not_before: stored
                    .not_before
                    .min(now.saturating_add(LONGEST_RETRY_AFTER)),
                failing_since: stored.failing_since.min(now),
                ..stored
            };
            let backoff = match is_outdated(&stored) {
                true => resumed(resumed_at),
                false => backoff,
            };
            Box::new(Failing {
                backoff,
                error,
                deadline: None,
                again: None,
            })
        });
        let queue = Queue {
            unfinished: found.exports,
            waiting: found.exports,
            after: found.first.saturating_sub(1),
            resumed_at,
            failing,
            ..Queue::default()
        };
        self.unfinished += found.exports;
        self.queues.insert(id, queue);
        self.watch(id, None);
        self.schedule(id, now);
    }

    /// Notes an export that was accepted, and is now in the store at the end of its queue. False if others
    /// wait there already: then this is no news to the worker, which looks at the queue anyway once it may.
    pub fn accepted(&mut self, id: QueueId, accepted_at: Millis, now: Millis) -> bool {
        let queue = self.queues.entry(id).or_default();
        let is_first = queue.waiting == 0;
        queue.unfinished += 1;
        queue.waiting += 1;
        self.unfinished += 1;
        self.watch(id, Some(accepted_at));
        self.schedule(id, now);
        is_first
    }

    /// Notes that an export's move to the end of its queue is now in the store.
    pub fn moved(&mut self, id: QueueId, now: Millis) {
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.moving = queue.moving.saturating_sub(1);
            queue.waiting += 1;
        }
        self.watch(id, None);
        self.schedule(id, now);
    }

    /// Notes that an export's result is now in the store.
    pub fn finished(&mut self, id: QueueId, now: Millis) {
        self.forget(id, 1);
        self.schedule(id, now);
    }

    /// The same for an export other than the first, which [`Queues::overdue`] took and which blocked its queue.
    pub fn finished_and_unblocked(&mut self, id: QueueId, now: Millis) {
        self.set_phase(id, Phase::Idle);
        self.watch(id, None);
        self.finished(id, now);
    }

    /// What is to be done now. With `failing` false, queues whose last attempt failed are passed over.
    pub fn next(&mut self, now: Millis, failing: bool) -> Next {
        while let Some(&(at, id)) = self.deadlines.first()
            && at <= now
        {
            match self.queues.get(&id) {
                Some(queue) if !matches!(queue.phase, Phase::Busy | Phase::Blocked) => {
                    return Next::Overdue {
                        queue: id,
                        after: queue.after,
                    };
                }
                // The attempt under way may succeed: wait for it.
                _ => self.unwatch(id),
            }
        }
        while let Some(first) = self.waiting.first_entry()
            && first.key().0 <= now
        {
            let id = first.remove();
            self.set_phase(id, Phase::Idle);
            self.schedule(id, now);
        }
        let first = |line: &BTreeMap<u64, QueueId>| line.first_key_value().map(|(at, _)| *at);
        let turn = match (
            first(&self.ready),
            first(&self.ready_failing).filter(|_| failing),
        ) {
            (Some(healthy), Some(failing)) => Some(healthy.min(failing)),
            (one, other) => one.or(other),
        };
        let id = turn.and_then(|ticket| {
            let failing = &mut self.ready_failing;
            self.ready
                .remove(&ticket)
                .or_else(|| failing.remove(&ticket))
        });
        // A ticket always has its queue.
        let Some((id, queue)) = id.and_then(|id| Some((id, self.queues.get_mut(&id)?))) else {
            let waiting = self.waiting.first_key_value().map(|((at, _), _)| *at);
            let deadline = self.deadlines.first().map(|(at, _)| *at);
            return Next::Wait(waiting.into_iter().chain(deadline).min());
        };
        queue.phase = Phase::Busy;
        Next::Attempt(Turn {
            queue: id,
            after: queue.after,
            failing: queue.failing.is_some(),
            slow: queue.slow,
            waiting: queue.waiting,
        })
    }

    /// The progress of an export whose attempt failed and that is the next to be tried. The store may not
    /// have it yet.
    pub fn again(&self, id: QueueId, export: Uuid) -> Option<Progress> {
        let again = self.queues.get(&id)?.failing.as_ref()?.again;
        again.filter(|again| again.id == export)
    }

    /// Notes that the export at this position was found for a turn, and is now being sent. False, which ends
    /// the turn, if its queue is held since.
    pub fn begin(&mut self, turn: &Turn, id: Uuid, at: i64) -> bool {
        let Some(queue) = self.queues.get_mut(&turn.queue) else {
            return false;
        };
        if queue.is_held() {
            self.set_phase(turn.queue, Phase::Idle);
            return false;
        }
        queue.after = at;
        queue.waiting = queue.waiting.saturating_sub(1);
        queue.on_wire = Some(id);
        if let Some(failing) = &mut queue.failing {
            failing.again = None;
        }
        true
    }

    /// Ends a turn for which there is no export, although there should be: it was deleted by hand, or lost.
    pub fn found_none(&mut self, turn: &Turn, now: Millis) {
        if let Some(queue) = self.queues.get_mut(&turn.queue) {
            // Others may have been accepted meanwhile.
            queue.waiting = queue.waiting.saturating_sub(turn.waiting);
        }
        self.set_phase(turn.queue, Phase::Idle);
        self.forget(turn.queue, turn.waiting);
        self.schedule(turn.queue, now);
    }

    /// Ends an attempt that the destination has answered with a final result. True if the queue was
    /// failing until now.
    pub fn answered(&mut self, id: QueueId, took: Duration, now: Millis) -> bool {
        self.unwatch(id);
        let mut was_failing = false;
        if let Some(queue) = self.queues.get_mut(&id) {
            was_failing = queue.failing.take().is_some();
            queue.slow = took > SLOW;
        }
        self.set_phase(id, Phase::Idle);
        self.schedule(id, now);
        was_failing
    }

    /// Ends an attempt that failed in a way that no retry could change. That says nothing about the
    /// destination, so the queue's backoff stays as it was.
    pub fn ended(&mut self, id: QueueId, now: Millis) {
        self.set_phase(id, Phase::Idle);
        self.watch(id, None);
        self.schedule(id, now);
    }

    /// Ends an attempt that failed with this error, and counts it. The export is queued again or given up.
    /// `jitter` is from 0 to 1: see [`backoff`].
    pub fn failed(
        &mut self,
        export: &mut Export,
        retry: Retry,
        error: Json,
        took: Duration,
        jitter: f64,
        now: Millis,
    ) -> Failed {
        export.attempts = export.attempts.saturating_add(1);
        let id = export.queue;
        let queue = self.queues.entry(id).or_default();
        let before = queue.failing.as_ref().map(|failing| failing.backoff);
        let failures = before.map_or(0, |before| before.failures).saturating_add(1);
        let wait = wait_after(failures, jitter).max(retry.least_wait.min(LONGEST_RETRY_AFTER));
        let backoff = Backoff {
            failures,
            not_before: now.saturating_add(wait),
            failing_since: before.map_or(now, |before| before.failing_since),
        };
        queue.slow = took > SLOW;
        let mut since = backoff.failing_since;
        if retry.to_end {
            // The queue does not count as failing while others get through. So an export that is always
            // refused also counts from its own first move, or it would never end.
            let first_moved_at = *export.first_moved_at.get_or_insert(now);
            since = since.min(first_moved_at.max(queue.resumed_at));
        }
        let given_up =
            !queue.paused && deadline(export.accepted_at, since, self.give_up_after) <= now;
        let mut again = None;
        if !given_up && retry.to_end {
            queue.moving += 1;
        } else if !given_up {
            again = Some(Progress {
                id: export.id,
                attempts: export.attempts,
                first_moved_at: export.first_moved_at,
            });
            queue.after = export.turn.saturating_sub(1);
            queue.waiting += 1;
        }
        queue.failing = Some(Box::new(Failing {
            backoff,
            error: Some(error),
            deadline: queue.failing.as_ref().and_then(|before| before.deadline),
            again,
        }));
        self.set_phase(id, Phase::Idle);
        self.watch(id, None);
        self.schedule(id, now);
        Failed { backoff, given_up }
    }

    /// Whether a queue's oldest export, if there is one, has to be given up. It counts as taken then. If it
    /// is not the queue's first, the queue is blocked until [`Queues::finished_and_unblocked`].
    pub fn overdue(&mut self, id: QueueId, oldest: Option<Oldest>, now: Millis) -> bool {
        self.unwatch(id);
        let Some(oldest) = oldest else {
            return false;
        };
        // Does nothing in a queue that is held since.
        self.watch(id, Some(oldest.accepted_at));
        let Some(queue) = self.queues.get_mut(&id) else {
            return false;
        };
        let Some(failing) = queue.failing.as_mut() else {
            return false;
        };
        if failing.deadline.is_none_or(|at| at > now) {
            return false;
        }
        queue.waiting = queue.waiting.saturating_sub(1);
        let is_empty = queue.waiting == 0;
        if oldest.is_first {
            queue.after = oldest.turn;
            failing.again = None;
        }
        if is_empty || !oldest.is_first {
            self.unwatch(id);
            self.leave(id);
        }
        if oldest.is_first {
            self.schedule(id, now);
        } else {
            self.set_phase(id, Phase::Blocked);
        }
        true
    }

    /// Whether there is such a queue: it has exports, or a backoff.
    pub fn has(&self, id: QueueId) -> bool {
        self.queues.contains_key(&id)
    }

    /// The queues that there are.
    pub fn ids(&self) -> Vec<QueueId> {
        self.queues.keys().copied().collect()
    }

    /// Pauses a queue. It is forgotten when it has no exports left.
    pub fn pause(&mut self, id: QueueId, now: Millis) {
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.paused = true;
        }
        self.unwatch(id);
        self.leave(id);
        self.schedule(id, now);
    }

    /// Whether a queue is paused.
    pub fn is_paused(&self, id: QueueId) -> bool {
        self.queues.get(&id).is_some_and(|queue| queue.paused)
    }

    /// Ends a queue's pause. Its failures before `now` no longer count.
    pub fn resume(&mut self, id: QueueId, now: Millis) {
        let Some(queue) = self.queues.get_mut(&id).filter(|queue| queue.paused) else {
            return;
        };
        queue.paused = false;
        queue.resumed_at = now;
        if let Some(failing) = &mut queue.failing {
            failing.backoff = resumed(now);
        }
        self.watch(id, None);
        self.schedule(id, now);
    }

    /// Locks a queue, so that an act may change its rows once it [is settled](Queues::is_settled). False if
    /// there is no such queue.
    pub fn lock(&mut self, id: QueueId) -> bool {
        let Some(queue) = self.queues.get_mut(&id) else {
            return false;
        };
        queue.locked = true;
        self.unwatch(id);
        self.leave(id);
        true
    }

    /// Ends [`Queues::lock`]. The queue goes on as it was.
    pub fn unlock(&mut self, id: QueueId, now: Millis) {
        let Some(queue) = self.queues.get_mut(&id) else {
            return;
        };
        queue.locked = false;
        self.watch(id, None);
        self.schedule(id, now);
    }

    /// Whether the store has all that was reported of a locked queue, so that every unfinished export behind
    /// its cursor waits. Only the one that is being sent, if there is one, is not among them.
    pub fn is_settled(&self, id: QueueId) -> bool {
        self.queues.get(&id).is_none_or(|queue| {
            let taken = usize::from(queue.on_wire.is_some());
            let phase = match queue.phase {
                Phase::Busy => queue.on_wire.is_some(),
                Phase::Blocked => false,
                Phase::Idle | Phase::Ready(_) | Phase::Waiting(_) => true,
            };
            phase && queue.unfinished == queue.waiting + taken
        })
    }

    /// The exports that are being sent.
    pub fn on_wire(&self) -> Vec<Uuid> {
        self.queues
            .values()
            .filter_map(|queue| queue.on_wire)
            .collect()
    }

    /// A queue's cursor, and the export that is being sent.
    pub fn cursor(&self, id: QueueId) -> (i64, Option<Uuid>) {
        let queue = self.queues.get(&id);
        queue.map_or((i64::MIN, None), |queue| (queue.after, queue.on_wire))
    }

    /// Notes that an export behind the cursor of a locked queue is finished in the store without having been
    /// taken.
    pub fn cancelled(&mut self, id: QueueId, export: Uuid) {
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.waiting = queue.waiting.saturating_sub(1);
            if let Some(failing) = &mut queue.failing {
                failing.again = failing.again.filter(|again| again.id != export);
            }
        }
        self.forget(id, 1);
    }

    /// Ends a queue's backoff, so that it is tried at once unless it is held. False if it had none.
    pub fn retry(&mut self, id: QueueId, now: Millis) -> bool {
        let queue = self.queues.get_mut(&id);
        let Some(failing) = queue.and_then(|queue| queue.failing.as_mut()) else {
            return false;
        };
        if failing.backoff.not_before <= now {
            // It keeps its turn.
            return false;
        }
        failing.backoff.not_before = now;
        self.leave(id);
        self.schedule(id, now);
        true
    }

    /// Whether a queue has no export left to try.
    pub fn is_done(&self, id: QueueId) -> bool {
        let queue = self.queues.get(&id);
        queue.is_none_or(|queue| queue.waiting + queue.moving == 0 && queue.on_wire.is_none())
    }

    /// How many queues with exports are in which state. Looks at all of them.
    pub fn states(&self) -> QueueStates {
        let mut states = QueueStates::default();
        for queue in self.queues.values().filter(|queue| queue.unfinished > 0) {
            let state = if queue.on_wire.is_some() {
                &mut states.sending
            } else if queue.paused {
                &mut states.paused
            } else if queue.failing.is_some() {
                &mut states.failing
            } else {
                &mut states.waiting
            };
            *state += 1;
        }
        states
    }

    /// How many exports have no result in the store.
    pub fn unfinished(&self) -> usize {
        self.unfinished
    }

    /// How many exports of this queue have no result in the store.
    pub fn unfinished_in(&self, id: QueueId) -> usize {
        self.queues.get(&id).map_or(0, |queue| queue.unfinished)
    }

    /// All queues with exports.
    pub fn summaries(&self, now: Millis) -> Vec<Summary> {
        let queues = self.queues.iter().filter(|(_, queue)| queue.unfinished > 0);
        let summary = |(id, queue): (&QueueId, &Queue)| {
            let backoff = queue.failing.as_ref().map(|failing| failing.backoff);
            let counts = backoff.filter(|_| !queue.paused);
            let state = match counts {
                _ if queue.on_wire.is_some() => QueueState::Sending,
                _ if queue.paused => QueueState::Paused,
                Some(Backoff { failures: 1.., .. }) => QueueState::Failing,
                _ => QueueState::Waiting,
            };
            Summary {
                id: *id,
                unfinished: queue.unfinished,
                state,
                failures: backoff.map_or(0, |backoff| backoff.failures),
                next_attempt_at: counts
                    .map(|backoff| backoff.not_before.max(now))
                    .filter(|_| state == QueueState::Failing),
                failing_since: counts.map(|backoff| backoff.failing_since),
            }
        };
        queues.map(summary).collect()
    }

    /// How long a queue fails before its exports are given up.
    pub fn give_up_after(&self) -> Millis {
        self.give_up_after
    }

    /// Whether any queue is failing, if only in backoff and without exports.
    pub fn is_any_failing(&self) -> bool {
        !(self.deadlines.is_empty() && self.waiting.is_empty() && self.ready_failing.is_empty())
    }

    /// Whether it is known that an export with this many attempts will not be tried before `deadline`,
    /// because its queue is paused, or is failing and the next attempt is later or another export's.
    pub fn is_held_up(&self, id: QueueId, attempts: u32, deadline: Millis) -> bool {
        let queue = self.queues.get(&id);
        queue.is_some_and(|queue| {
            let behind = attempts == 0 && queue.unfinished > 1;
            queue.paused || queue.failing.is_some() && (behind || queue.not_before() > deadline)
        })
    }

    /// Why a queue's last attempt failed. None if it succeeded.
    pub fn error(&self, id: QueueId) -> Option<Json> {
        self.queues.get(&id)?.failing.as_ref()?.error.clone()
    }

    /// What a client sees of an unfinished export, of which the store has `stored` and `last_error`. A
    /// Pending export in a failing queue has a reason and the time to the next attempt; if it was not tried
    /// itself, the reason is its queue's. In a paused queue the pause is the reason.
    pub fn view(
        &self,
        id: QueueId,
        stored: Progress,
        last_error: Option<Json>,
        now: Millis,
    ) -> View {
        let queue = self.queues.get(&id);
        let on_wire = queue.is_some_and(|queue| queue.on_wire == Some(stored.id));
        let mut view = View {
            id: stored.id,
            state: if on_wire {
                State::Processing
            } else {
                State::Pending
            },
            response: None,
            attempts: stored.attempts,
            last_error,
            next_attempt_in: None,
        };
        let is_paused = queue.is_some_and(|queue| queue.paused) && !on_wire;
        if is_paused {
            view.last_error = Some(to_json(&PAUSED));
        }
        let Some(failing) = queue.and_then(|queue| queue.failing.as_ref()) else {
            return view;
        };
        if let Some(again) = failing.again.filter(|again| again.id == stored.id) {
            view.attempts = again.attempts;
            view.last_error = view
                .last_error
                .filter(|_| is_paused)
                .or_else(|| failing.error.clone());
        }
        if !on_wire && !is_paused {
            view.last_error = view.last_error.or_else(|| failing.error.clone());
            let wait = failing.backoff.not_before.saturating_sub(now).max(0);
            view.next_attempt_in = Some(Duration::from_millis(wait.unsigned_abs()));
        }
        view
    }

    /// Lowers the counts of unfinished exports.
    fn forget(&mut self, id: QueueId, exports: usize) {
        if let Some(queue) = self.queues.get_mut(&id) {
            let exports = exports.min(queue.unfinished);
            queue.unfinished -= exports;
            self.unfinished -= exports;
        }
    }

    /// If a queue is failing, notes when one of its exports may have to be given up: the one that was
    /// accepted at this time, or any of them.
    fn watch(&mut self, id: QueueId, accepted_at: Option<Millis>) {
        let give_up_after = self.give_up_after;
        let Some(queue) = self.queues.get_mut(&id) else {
            return;
        };
        if queue.is_held() {
            return;
        }
        let Some(failing) = queue.failing.as_mut() else {
            return;
        };
        let accepted_at = accepted_at.unwrap_or(Millis::MIN);
        let at = deadline(accepted_at, failing.backoff.failing_since, give_up_after);
        if failing.deadline.is_none_or(|noted| at < noted) {
            if let Some(noted) = failing.deadline.replace(at) {
                self.deadlines.remove(&(noted, id));
            }
            self.deadlines.insert((at, id));
        }
    }

    fn unwatch(&mut self, id: QueueId) {
        let failing = self
            .queues
            .get_mut(&id)
            .and_then(|queue| queue.failing.as_mut());
        if let Some(noted) = failing.and_then(|failing| failing.deadline.take()) {
            self.deadlines.remove(&(noted, id));
        }
    }

    fn set_phase(&mut self, id: QueueId, phase: Phase) {
        if let Some(queue) = self.queues.get_mut(&id) {
            if queue.phase == Phase::Busy {
                queue.on_wire = None;
            }
            queue.phase = phase;
        }
    }

    /// Takes a queue out of `ready`, `ready_failing` or `waiting`.
    fn leave(&mut self, id: QueueId) {
        let Some(queue) = self.queues.get_mut(&id) else {
            return;
        };
        match queue.phase {
            Phase::Idle | Phase::Busy | Phase::Blocked => return,
            Phase::Ready(ticket) => {
                self.ready.remove(&ticket);
                self.ready_failing.remove(&ticket);
            }
            Phase::Waiting(at) => {
                self.waiting.remove(&at);
            }
        }
        queue.phase = Phase::Idle;
    }

    /// Puts an idle queue where it belongs, and forgets it if it has no exports and no backoff.
    fn schedule(&mut self, id: QueueId, now: Millis) {
        let Some(queue) = self.queues.get_mut(&id) else {
            return;
        };
        if queue.phase != Phase::Idle || queue.locked {
            return;
        }
        if queue.paused {
            if queue.unfinished == 0 {
                self.queues.remove(&id);
            }
            return;
        }
        self.tickets += 1;
        let ticket = self.tickets;
        if queue.not_before() > now {
            // An empty queue waits too: the next export to a dead host must not start a new backoff.
            let at = (queue.not_before(), ticket);
            queue.phase = Phase::Waiting(at);
            self.waiting.insert(at, id);
        } else if queue.waiting > 0 {
            queue.phase = Phase::Ready(ticket);
            match queue.failing {
                Some(_) => self.ready_failing.insert(ticket, id),
                None => self.ready.insert(ticket, id),
            };
        } else if queue.unfinished == 0 {
            self.unwatch(id);
            self.queues.remove(&id);
        }
    }
}

/// When an export is given up that was accepted at one time, and whose queue has been failing since
/// another.
fn deadline(accepted_at: Millis, failing_since: Millis, give_up_after: Millis) -> Millis {
    accepted_at.max(failing_since).saturating_add(give_up_after)
}

/// The backoff of a queue whose failures no longer count since it was resumed.
fn resumed(at: Millis) -> Backoff {
    Backoff {
        failures: 0,
        not_before: at,
        failing_since: at,
    }
}

/// The wait after this many failures in a row.
fn wait_after(failures: u32, jitter: f64) -> Millis {
    let wait = backoff(FIRST_WAIT, LONGEST_WAIT, failures, jitter);
    Millis::try_from(wait.as_millis()).unwrap_or(Millis::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::destination::Destination;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// [`LONGEST_WAIT`].
    const LONGEST: Millis = 15 * 60 * 1000;
    use crate::export::DAY;
    const QUICK: Duration = Duration::from_millis(1);
    const DOWN: Retry = Retry {
        to_end: false,
        least_wait: 0,
    };
    const BLAMED: Retry = Retry {
        to_end: true,
        least_wait: 0,
    };

    fn error() -> Json {
        RawValue::from_string("{}".into()).unwrap().into()
    }

    /// An export as it is on disk.
    #[derive(Clone, Debug)]
    struct Row {
        id: Uuid,
        queue: QueueId,
        turn: i64,
        accepted_at: Millis,
        attempts: u32,
        first_moved_at: Option<Millis>,
    }

    /// What was reported, and is not on disk yet.
    #[derive(Debug)]
    struct Unwritten {
        id: Uuid,
        queue: QueueId,
        /// The export and whether it moves to the end; for a finished one, whether its queue resumes.
        update: Result<(Export, bool), bool>,
        failing: Option<Option<Backoff>>,
    }

    /// The queues, and a plain store that lags behind.
    struct World {
        queues: Queues,
        rows: Vec<Row>,
        failing: HashMap<QueueId, Backoff>,
        /// Queues that are paused, and when others were resumed.
        paused: BTreeSet<QueueId>,
        resumed: HashMap<QueueId, Millis>,
        unwritten: VecDeque<Unwritten>,
        last_turn: i64,
        now: Millis,
        /// The running time that was lost by kills.
        lost: Millis,
    }

    /// What [`World::next`] finds to do.
    enum Found {
        Export(Export),
        GivenUp(Export),
        Nothing(Option<Millis>),
    }

    impl World {
        fn new(give_up_after: Millis) -> Self {
            Self {
                queues: Queues::new(Duration::from_millis(give_up_after as u64)),
                rows: Vec::new(),
                failing: HashMap::new(),
                paused: BTreeSet::new(),
                resumed: HashMap::new(),
                unwritten: VecDeque::new(),
                last_turn: 0,
                now: 0,
                lost: 0,
            }
        }

        fn at(&mut self, now: Millis) -> &mut Self {
            self.now = now;
            self
        }

        fn submit(&mut self, queue: QueueId) -> Uuid {
            self.last_turn += 1;
            let row = Row {
                id: Uuid::now_v7(),
                queue,
                turn: self.last_turn,
                accepted_at: self.now,
                attempts: 0,
                first_moved_at: None,
            };
            let id = row.id;
            self.rows.push(row);
            let due = self.due();
            // Else the worker sleeps on.
            let is_news = self.queues.accepted(queue, self.now, self.now);
            assert!(is_news || self.due() == due);
            if self.paused.contains(&queue) {
                self.queues.pause(queue, self.now);
            }
            id
        }

        /// What is due, and when the next will be, without give-ups.
        fn due(&self) -> (usize, usize, Option<Millis>) {
            let Queues {
                ready,
                ready_failing,
                waiting,
                ..
            } = &self.queues;
            let next = waiting.first_key_value().map(|((at, _), _)| *at);
            (ready.len(), ready_failing.len(), next)
        }

        fn pause(&mut self, queue: QueueId) {
            self.paused.insert(queue);
            self.queues.pause(queue, self.now);
        }

        fn resume(&mut self, queue: QueueId) {
            assert!(self.paused.remove(&queue));
            self.resumed.insert(queue, self.now);
            self.queues.resume(queue, self.now);
        }

        /// Cancels all exports of a queue that wait, and returns them.
        fn cancel(&mut self, queue: QueueId) -> Vec<Uuid> {
            self.queues.lock(queue);
            self.write_all();
            assert!(self.queues.is_settled(queue));
            let (after, on_wire) = self.queues.cursor(queue);
            let ids: Vec<_> = self.behind(queue, after).map(|row| row.id).collect();
            assert!(on_wire.is_none_or(|id| !ids.contains(&id)));
            for id in &ids {
                self.rows.retain(|row| row.id != *id);
                self.queues.cancelled(queue, *id);
            }
            if self.queues.is_done(queue) {
                self.failing.remove(&queue);
            }
            self.queues.unlock(queue, self.now);
            ids
        }

        fn behind(&self, queue: QueueId, after: i64) -> impl Iterator<Item = &Row> {
            let is_behind = move |row: &&Row| row.queue == queue && row.turn > after;
            self.rows.iter().filter(is_behind)
        }

        fn next(&mut self) -> Found {
            loop {
                match self.queues.next(self.now, true) {
                    Next::Wait(at) => return Found::Nothing(at),
                    Next::Attempt(turn) => {
                        let first = self
                            .behind(turn.queue, turn.after)
                            .min_by_key(|row| row.turn);
                        let Some(row) = first.cloned() else {
                            self.queues.found_none(&turn, self.now);
                            continue;
                        };
                        let export = self.export(&row);
                        assert!(self.queues.begin(&turn, row.id, row.turn));
                        return Found::Export(export);
                    }
                    Next::Overdue { queue, after } => {
                        let first = self.behind(queue, after).min_by_key(|row| row.turn);
                        let moved = self.behind(queue, after);
                        let moved = moved.filter(|row| row.first_moved_at.is_some());
                        let oldest = first
                            .into_iter()
                            .chain(moved)
                            .min_by_key(|row| row.accepted_at);
                        let truly = self.behind(queue, after).map(|row| row.accepted_at).min();
                        let found = oldest.map(|row| row.accepted_at);
                        // Kills turn the running time back a little.
                        let late = found.zip(truly).map_or(0, |(found, truly)| found - truly);
                        assert!(found.is_some() == truly.is_some() && late <= self.lost);
                        let Some(oldest) = oldest.cloned() else {
                            assert!(!self.queues.overdue(queue, None, self.now));
                            continue;
                        };
                        let export = self.export(&oldest);
                        let about = Oldest {
                            turn: oldest.turn,
                            accepted_at: export.accepted_at,
                            is_first: first.is_some_and(|first| first.id == oldest.id),
                        };
                        if self.queues.overdue(queue, Some(about), self.now) {
                            self.finish(&export, !about.is_first, None);
                            return Found::GivenUp(export);
                        }
                    }
                }
            }
        }

        fn export(&self, row: &Row) -> Export {
            let again = self.queues.again(row.queue, row.id);
            Export {
                who: String::new(),
                id: row.id,
                seq: 0,
                queue: row.queue,
                turn: row.turn,
                destination: Destination::parse("https://a.example/").unwrap(),
                accepted_at: row.accepted_at.min(self.now),
                attempts: again.map_or(row.attempts, |again| again.attempts),
                first_moved_at: again.map_or(row.first_moved_at, |again| again.first_moved_at),
            }
        }

        fn attempt(&mut self) -> Export {
            match self.next() {
                Found::Export(export) => export,
                Found::GivenUp(_) => panic!("one was given up"),
                Found::Nothing(at) => panic!("nothing before {at:?}"),
            }
        }

        fn given_up(&mut self) -> Option<Export> {
            match self.next() {
                Found::GivenUp(export) => Some(export),
                Found::Nothing(_) => None,
                Found::Export(_) => panic!("an attempt"),
            }
        }

        fn finish(&mut self, export: &Export, resumes: bool, failing: Option<Backoff>) {
            let failing = match self.queues.is_done(export.queue) {
                true => Some(None),
                false => failing.map(Some),
            };
            self.unwritten.push_back(Unwritten {
                id: export.id,
                queue: export.queue,
                update: Err(resumes),
                failing,
            });
        }

        fn answer(&mut self, export: &Export) {
            self.queues.answered(export.queue, QUICK, self.now);
            self.finish(export, false, None);
            if let Some(last) = self.unwritten.back_mut() {
                last.failing = Some(None);
            }
        }

        fn fail(&mut self, export: Export, retry: Retry, jitter: f64) -> (Failed, Export) {
            let mut export = export;
            let failed = self
                .queues
                .failed(&mut export, retry, error(), QUICK, jitter, self.now);
            match failed.given_up {
                true => self.finish(&export, false, Some(failed.backoff)),
                false => self.unwritten.push_back(Unwritten {
                    id: export.id,
                    queue: export.queue,
                    update: Ok((export.clone(), retry.to_end)),
                    failing: Some(Some(failed.backoff)),
                }),
            }
            (failed, export)
        }

        /// Writes the oldest unwritten report, and returns it.
        fn write(&mut self) -> Option<Unwritten> {
            let unwritten = self.unwritten.pop_front()?;
            let queue = unwritten.queue;
            match unwritten.failing {
                Some(Some(backoff)) => drop(self.failing.insert(queue, backoff)),
                Some(None) => drop(self.failing.remove(&queue)),
                None => {}
            }
            match &unwritten.update {
                Err(resumes) => {
                    self.rows.retain(|row| row.id != unwritten.id);
                    match resumes {
                        true => self.queues.finished_and_unblocked(queue, self.now),
                        false => self.queues.finished(queue, self.now),
                    }
                }
                Ok((export, to_end)) => {
                    let row = self
                        .rows
                        .iter_mut()
                        .find(|row| row.id == unwritten.id)
                        .unwrap();
                    row.attempts = export.attempts;
                    row.first_moved_at = export.first_moved_at;
                    if *to_end {
                        self.last_turn += 1;
                        row.turn = self.last_turn;
                        self.queues.moved(queue, self.now);
                    }
                }
            }
            Some(unwritten)
        }

        fn write_all(&mut self) {
            while self.write().is_some() {}
        }

        /// Forgets what is not on disk, and this much running time.
        fn kill(&mut self, lost: Millis) {
            self.now -= lost;
            self.lost += lost;
            self.unwritten.clear();
            self.queues = Queues::new(Duration::from_millis(self.queues.give_up_after as u64));
            let mut found: HashMap<QueueId, (usize, i64)> = HashMap::new();
            for row in &self.rows {
                let (exports, first) = found.entry(row.queue).or_insert((0, row.turn));
                *exports += 1;
                *first = row.turn.min(*first);
            }
            for (id, (exports, first)) in found {
                let failing = self.failing.get(&id).map(|backoff| (*backoff, None));
                let found = StoredQueue {
                    exports,
                    first,
                    failing,
                    resumed_at: self.resumed.get(&id).copied().unwrap_or(0),
                };
                self.queues.restore(id, found, self.now);
                if self.paused.contains(&id) {
                    self.queues.pause(id, self.now);
                }
            }
        }
    }

    #[test]
    fn turns_go_round_however_long_a_queue_is() {
        let mut world = World::new(DAY);
        for _ in 0..100 {
            world.submit(1);
        }
        world.submit(2);
        let first = world.attempt();
        let second = world.attempt();
        assert_eq!((first.queue, second.queue), (1, 2));
        assert!(
            matches!(world.next(), Found::Nothing(None)),
            "one at a time in each"
        );
        world.answer(&first);
        assert_eq!(world.attempt().queue, 1);
    }

    #[test]
    fn a_queue_that_fails_waits_longer_each_time_and_keeps_its_order() {
        let mut world = World::new(DAY);
        let ids = [(); 3].map(|()| world.submit(1));
        let mut now = 0;
        for wait in [1_000, 2_000, 4_000, 8_000] {
            let tried = world.at(now).attempt();
            assert_eq!(tried.id, ids[0]);
            let (failed, _) = world.fail(tried, DOWN, 0.5);
            assert_eq!(failed.backoff.not_before, now + wait);
            now += wait;
            let early = world.at(now - 1).next();
            assert!(matches!(early, Found::Nothing(Some(at)) if at == now));
        }
        for id in ids {
            let tried = world.at(now).attempt();
            assert_eq!(tried.id, id);
            world.answer(&tried);
        }
        world.write_all();
        assert!(world.queues.queues.is_empty());
    }

    #[test]
    fn what_failed_is_tried_again_with_its_attempts_counted_before_the_store_knows() {
        let mut world = World::new(DAY);
        let id = world.submit(1);
        for attempts in 0..5 {
            let tried = world.at(attempts * LONGEST).attempt();
            assert_eq!((tried.id, i64::from(tried.attempts)), (id, attempts));
            world.fail(tried, DOWN, 0.5);
        }
        let stored = Progress {
            id,
            attempts: 0,
            first_moved_at: None,
        };
        let view = world.queues.view(1, stored, None, world.now);
        assert_eq!((view.state, view.attempts), (State::Pending, 5));
        assert!(view.last_error.is_some());
        assert_eq!(view.next_attempt_in, Some(Duration::from_secs(16)));
    }

    #[test]
    fn an_export_that_seems_to_be_the_cause_goes_to_the_end() {
        let mut world = World::new(DAY);
        let [bad, good] = [(); 2].map(|()| world.submit(1));
        let tried = world.attempt();
        world.fail(tried, BLAMED, 0.5);
        let tried = world.at(1_000).attempt();
        assert_eq!(tried.id, good);
        world.answer(&tried);
        // Only where it stands in the store is it found again.
        assert!(matches!(world.next(), Found::Nothing(None)));
        world.write_all();
        let tried = world.attempt();
        assert_eq!((tried.id, tried.attempts), (bad, 1));
    }

    /// Lets the next attempt fail, after which its queue waits for longer than a day.
    fn fail_for_long(world: &mut World) -> Failed {
        let tried = world.attempt();
        let retry = Retry {
            least_wait: 3 * DAY,
            ..DOWN
        };
        world.fail(tried, retry, 0.5).0
    }

    #[test]
    fn exports_are_given_up_when_their_queue_has_failed_for_long_enough_since_they_came() {
        let mut world = World::new(DAY / 2);
        let first = world.submit(1);
        let second = world.at(10).submit(1);
        assert!(!fail_for_long(world.at(5_000)).given_up);
        let late = world.at(9_000).submit(1);
        let due = DAY / 2 + 5_000;
        assert!(world.at(due - 1).given_up().is_none());
        let tried = world.at(due).given_up().unwrap();
        assert_eq!((tried.id, tried.attempts), (first, 1));
        assert_eq!(world.given_up().unwrap().id, second);
        assert!(!world.queues.is_done(1));
        assert!(matches!(world.next(), Found::Nothing(Some(at)) if at == DAY / 2 + 9_000));
        assert_eq!(world.at(DAY / 2 + 9_000).given_up().unwrap().id, late);
        assert!(world.queues.is_done(1));
        world.write_all();
        assert_eq!(world.queues.unfinished(), 0);
    }

    #[test]
    fn an_old_export_at_the_end_is_given_up_before_younger_ones_in_front_of_it() {
        let mut world = World::new(DAY);
        let old = world.submit(1);
        let tried = world.attempt();
        let young = world.at(DAY / 2).submit(1);
        world.fail(tried, BLAMED, 0.5);
        world.write_all();
        let tried = world.at(DAY / 2 + 1_000).attempt();
        assert_eq!(tried.id, young);
        world.fail(tried, DOWN, 0.5);
        let tried = world.at(DAY + DAY / 2).given_up().unwrap();
        assert_eq!(tried.id, old);
        assert!(
            matches!(world.next(), Found::Nothing(_)),
            "it could be found again before it is stored"
        );
        world.write_all();
        assert_eq!(world.given_up().unwrap().id, young);
    }

    #[test]
    fn a_queue_that_is_being_delivered_loses_nothing_however_long_that_takes() {
        let mut world = World::new(DAY);
        for _ in 0..3 {
            world.submit(1);
        }
        for day in 1..=3 {
            let tried = world.at(day * DAY).attempt();
            world.fail(tried, DOWN, 0.5);
            let tried = world.at(day * DAY + 5_000).attempt();
            world.answer(&tried);
        }
        world.write_all();
        assert!(world.queues.queues.is_empty() && world.queues.deadlines.is_empty());
    }

    #[test]
    fn an_attempt_under_way_is_waited_for_before_anything_of_its_queue_is_given_up() {
        let mut world = World::new(DAY);
        let [first, second] = [(); 2].map(|()| world.submit(1));
        let tried = world.attempt();
        world.fail(tried, DOWN, 0.5);
        let tried = world.at(DAY - 1).attempt();
        assert!(world.at(DAY + 9).given_up().is_none());
        let (failed, export) = world.fail(tried, DOWN, 0.5);
        assert!(failed.given_up);
        assert_eq!((export.id, export.attempts), (first, 2));
        assert_eq!(world.given_up().unwrap().id, second);
    }

    #[test]
    fn an_export_that_is_always_refused_while_others_get_through_ends_too() {
        let mut world = World::new(DAY);
        let bad = world.submit(1);
        let tried = world.attempt();
        world.fail(tried, BLAMED, 0.5);
        let mut now = 0;
        let attempts = loop {
            now += DAY / 4;
            world.write_all();
            let good = world.at(now).submit(1);
            let tried = world.attempt();
            assert_eq!(tried.id, bad);
            let (failed, export) = world.fail(tried, BLAMED, 0.5);
            let tried = world.at(now + 2_000).attempt();
            assert_eq!(tried.id, good);
            world.answer(&tried);
            if failed.given_up {
                break export.attempts;
            }
        };
        assert_eq!((now, attempts), (DAY, 5));
    }

    #[test]
    fn the_time_of_an_export_that_was_the_cause_counts_only_against_what_it_does_itself() {
        let mut world = World::new(DAY);
        let [bad, _] = [(); 2].map(|()| world.submit(1));
        let tried = world.attempt();
        world.fail(tried, BLAMED, 0.5);
        world.write_all();
        let good = world.at(1_000).attempt();
        world.answer(&good);
        let tried = world.at(2 * DAY).attempt();
        assert_eq!(tried.id, bad);
        let (failed, _) = world.fail(tried, DOWN, 0.5);
        assert!(!failed.given_up);
    }

    #[test]
    fn a_final_failure_ends_no_wait_and_hurries_no_other() {
        let mut world = World::new(DAY);
        for _ in 0..3 {
            world.submit(1);
        }
        for now in [0, 1_000] {
            let tried = world.at(now).attempt();
            world.fail(tried, DOWN, 0.5);
        }
        let lost = world.at(3_000).attempt();
        world.queues.ended(lost.queue, 3_000);
        // It was not sent, so the next one has this turn, and the wait after it is the third.
        let tried = world.attempt();
        let (failed, _) = world.fail(tried, DOWN, 0.5);
        assert_eq!(
            failed.backoff,
            Backoff {
                failures: 3,
                not_before: 7_000,
                failing_since: 0
            }
        );
        assert_eq!(world.queues.deadlines.len(), 1);
    }

    #[test]
    fn a_restart_goes_on_with_the_stored_backoff() {
        let found = |backoff| StoredQueue {
            exports: 2,
            first: 1,
            failing: Some((backoff, None)),
            resumed_at: 0,
        };
        let mut world = World::new(DAY);
        for _ in 0..2 {
            world.submit(1);
        }
        let stored = Backoff {
            failures: 3,
            not_before: 9_000,
            failing_since: 1_000,
        };
        world.queues = Queues::new(Duration::from_secs(86_400));
        world.queues.restore(1, found(stored), 5_000);
        assert!(matches!(
            world.at(8_999).next(),
            Found::Nothing(Some(9_000))
        ));
        let tried = world.at(9_000).attempt();
        let (failed, _) = world.fail(tried, DOWN, 0.5);
        assert_eq!(
            failed.backoff,
            Backoff {
                failures: 4,
                not_before: 17_000,
                failing_since: 1_000,
            }
        );

        // What somebody has changed by hand keeps nothing waiting for ever.
        let wild = Backoff {
            failures: 1,
            not_before: Millis::MAX,
            failing_since: Millis::MAX,
        };
        world.queues = Queues::new(Duration::MAX);
        world.queues.restore(1, found(wild), 17_000);
        let longest = 17_000 + LONGEST_RETRY_AFTER;
        assert!(matches!(world.at(17_000).next(), Found::Nothing(Some(at)) if at == longest));
        world.at(longest).attempt();
    }

    #[test]
    fn exports_that_somebody_has_deleted_are_no_longer_counted_and_hold_up_no_other() {
        let mut world = World::new(DAY);
        for _ in 0..3 {
            world.submit(1);
        }
        world.submit(2);
        world.rows.retain(|row| row.queue == 2);
        assert_eq!(world.attempt().queue, 2);
        assert_eq!(world.queues.unfinished(), 1);
        let late = world.submit(1);
        assert_eq!(world.attempt().id, late);
    }

    #[test]
    fn failing_queues_can_be_passed_over() {
        let mut world = World::new(DAY);
        world.submit(1);
        let mut tried = world.attempt();
        let slow = Duration::from_millis(30);
        world.queues.failed(&mut tried, DOWN, error(), slow, 0.5, 0);
        world.at(1_000).submit(2);
        let mut next = |failing| world.queues.next(1_000, failing);
        assert!(matches!(
            next(false),
            Next::Attempt(Turn {
                queue: 2,
                failing: false,
                slow: false,
                ..
            })
        ));
        assert!(matches!(next(false), Next::Wait(_)));
        assert!(matches!(
            next(true),
            Next::Attempt(Turn {
                queue: 1,
                failing: true,
                slow: true,
                ..
            })
        ));
    }

    #[test]
    fn an_export_is_seen_as_the_worker_sees_it() {
        let mut world = World::new(DAY);
        let ids = [(); 2].map(|()| world.submit(1));
        let stored = |id| Progress {
            id,
            attempts: 0,
            first_moved_at: None,
        };
        let view = |world: &World, id| world.queues.view(1, stored(id), None, world.now);
        assert!(!world.queues.is_held_up(1, 0, DAY));
        let tried = world.attempt();
        assert_eq!(view(&world, ids[0]).state, State::Processing);
        assert_eq!(view(&world, ids[1]).state, State::Pending);
        assert!(view(&world, ids[1]).next_attempt_in.is_none());
        world.fail(tried, DOWN, 0.5);
        for id in ids {
            let view = view(&world, id);
            assert_eq!(view.state, State::Pending);
            assert!(view.last_error.is_some(), "for its queue's reason");
            assert_eq!(view.next_attempt_in, Some(Duration::from_secs(1)));
        }
        assert!(world.queues.is_held_up(1, 0, DAY), "behind the other");
        assert!(world.queues.is_held_up(1, 1, 999));
        assert!(!world.queues.is_held_up(1, 1, 1_000));
        let tried = world.at(1_000).attempt();
        world.answer(&tried);
        assert!(view(&world, ids[1]).last_error.is_none());
        assert!(!world.queues.is_held_up(1, 0, DAY));
    }

    #[test]
    fn a_paused_queue_is_neither_tried_nor_given_up_and_starts_anew_when_it_is_resumed() {
        let mut world = World::new(DAY);
        let ids = [(); 2].map(|()| world.submit(1));
        let tried = world.attempt();
        world.fail(tried, DOWN, 0.5);
        world.at(500).pause(1);
        let late = world.at(3 * DAY).submit(1);
        assert!(matches!(world.next(), Found::Nothing(None)));
        assert!(!world.queues.is_any_failing(), "its time stands");
        assert!(world.queues.is_held_up(1, 1, 9 * DAY));
        let stored = Progress {
            id: late,
            attempts: 0,
            first_moved_at: None,
        };
        let view = world.queues.view(1, stored, None, world.now);
        assert!(view.last_error.unwrap().get().contains("paused"));
        assert_eq!(view.next_attempt_in, None);

        world.at(3 * DAY + 1).resume(1);
        let failed = fail_for_long(&mut world);
        assert!(!failed.given_up);
        assert_eq!(failed.backoff.failures, 1);
        assert!(world.at(4 * DAY).given_up().is_none());
        assert_eq!(world.at(4 * DAY + 1).given_up().unwrap().id, ids[0]);
    }

    #[test]
    fn an_attempt_under_way_ends_as_usual_in_a_paused_queue() {
        let mut world = World::new(DAY);
        let ids = [(); 3].map(|()| world.submit(1));
        let tried = world.attempt();
        world.pause(1);
        world.answer(&tried);
        world.write_all();
        assert!(matches!(world.next(), Found::Nothing(None)));
        world.resume(1);
        let tried = world.attempt();
        assert_eq!(tried.id, ids[1]);
        world.pause(1);
        let (failed, tried) = world.at(2 * DAY).fail(tried, DOWN, 0.5);
        assert!(!failed.given_up);
        world.at(3 * DAY).resume(1);
        let again = world.attempt();
        assert_eq!((again.id, again.attempts), (tried.id, 1));
    }

    #[test]
    fn each_queue_with_exports_counts_in_one_state() {
        let mut world = World::new(DAY);
        let states = |world: &World| {
            let states = world.queues.states();
            [
                states.sending,
                states.waiting,
                states.failing,
                states.paused,
            ]
        };
        world.submit(1);
        world.submit(2);
        assert_eq!(states(&world), [0, 2, 0, 0]);
        let tried = world.attempt();
        assert_eq!(states(&world), [1, 1, 0, 0]);
        world.pause(1);
        assert_eq!(states(&world), [1, 1, 0, 0], "the attempt goes on");
        world.fail(tried, DOWN, 0.5);
        assert_eq!(states(&world), [0, 1, 0, 1]);
        world.resume(1);
        let tried = world.attempt();
        world.fail(tried, DOWN, 0.5);
        assert_eq!(states(&world), [0, 0, 2, 0]);
        for _ in 0..2 {
            world.now += 10_000;
            let tried = world.attempt();
            world.answer(&tried);
        }
        world.write_all();
        assert_eq!(states(&world), [0, 0, 0, 0], "none has exports");
    }

    #[test]
    fn a_turn_that_was_not_begun_ends_when_its_queue_is_held() {
        for locks in [false, true] {
            let mut world = World::new(DAY);
            let id = world.submit(1);
            let Next::Attempt(turn) = world.queues.next(0, true) else {
                panic!("no turn");
            };
            match locks {
                true => assert!(world.queues.lock(1)),
                false => world.pause(1),
            }
            assert!(!world.queues.is_settled(1), "which export is taken is open");
            assert!(!world.queues.begin(&turn, id, 1));
            assert!(world.queues.is_settled(1));
            assert!(matches!(world.next(), Found::Nothing(None)));
            match locks {
                true => world.queues.unlock(1, 0),
                false => world.resume(1),
            }
            assert_eq!(world.attempt().id, id);
        }
    }

    #[test]
    fn a_kill_keeps_what_a_pause_has_changed_although_the_store_still_has_older_failures() {
        let mut world = World::new(DAY);
        world.submit(1);
        let tried = world.attempt();
        world.pause(1);
        world.fail(tried, DOWN, 0.5);
        world.at(2 * DAY).resume(1);
        world.write_all();
        world.kill(0);
        let tried = world.attempt();
        let (failed, _) = world.fail(tried, DOWN, 0.5);
        assert!(!failed.given_up);
        assert_eq!(failed.backoff.failing_since, 2 * DAY);

        world.pause(1);
        world.kill(0);
        assert!(matches!(world.at(9 * DAY).next(), Found::Nothing(None)));
    }

    #[test]
    fn a_retry_ends_the_wait_but_nothing_else() {
        let mut world = World::new(DAY);
        world.submit(1);
        let tried = world.attempt();
        world.fail(tried, DOWN, 0.5);
        assert!(world.queues.retry(1, 10));
        let tried = world.at(10).attempt();
        let (failed, _) = world.fail(tried, DOWN, 0.5);
        assert_eq!(
            (failed.backoff.failures, failed.backoff.failing_since),
            (2, 0)
        );
        world.pause(1);
        assert!(world.queues.retry(1, 20));
        assert!(matches!(world.at(20).next(), Found::Nothing(None)));
    }

    #[test]
    fn what_is_cancelled_is_not_tried_and_what_follows_is() {
        let mut world = World::new(DAY);
        let ids = [(); 3].map(|()| world.submit(1));
        let tried = world.attempt();
        assert_eq!(world.cancel(1), ids[1..]);
        let next = world.submit(1);
        world.answer(&tried);
        world.write_all();
        assert_eq!(world.queues.unfinished(), 1);
        assert_eq!(world.attempt().id, next);
    }

    /// What the property tests let happen.
    #[derive(Clone, Debug)]
    enum Event {
        Submit(QueueId),
        Answer(usize),
        Fail(usize, bool, f64),
        /// An attempt ends with a final failure.
        End(usize),
        /// Time passes.
        Run(Millis),
        /// This many reports are written.
        Write(usize),
        Pause(QueueId),
        Resume(QueueId),
        Retry(QueueId),
        /// Everything in a queue that waits is cancelled.
        Cancel(QueueId),
        /// The service is killed, and up to this much of its running time since the last commit is lost.
        Kill(Millis),
    }

    fn events(queues: QueueId) -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            4 => (0..queues).prop_map(Event::Submit),
            2 => any::<usize>().prop_map(Event::Answer),
            5 => (any::<usize>(), any::<bool>(), 0.0..=1.0)
                .prop_map(|(at, end, jitter)| Event::Fail(at, end, jitter)),
            1 => any::<usize>().prop_map(Event::End),
            4 => (0..60_000_i64).prop_map(Event::Run),
            2 => (0..4_usize).prop_map(Event::Write),
            1 => (0..queues).prop_map(Event::Pause),
            2 => (0..queues).prop_map(Event::Resume),
            1 => (0..queues).prop_map(Event::Retry),
            1 => (0..queues).prop_map(Event::Cancel),
            1 => (0..60_000_i64).prop_map(Event::Kill),
        ];
        proptest::collection::vec(event, 0..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]

        /// Against a plain model, whatever fails and however far the store lags behind at a kill: one attempt
        /// at a time in each queue, none before its time, order and attempts preserved, nothing taken twice, no
        /// queue twice while another that was ready first waits, nothing forgotten, nothing of a paused queue
        /// or of what was cancelled.
        #[test]
        fn turns_are_fair_and_nothing_due_is_forgotten(events in events(6)) {
            let mut model = Model::new(DAY, 3);
            for event in events {
                model.happen(event)?;
            }
        }

        /// None is given up before its queue has failed for long enough since it was accepted. None waits
        /// longer than that, apart from running time lost by kills, from attempts under way and from pauses,
        /// in which nothing is given up and after which all of that time starts anew.
        #[test]
        fn exports_are_given_up_neither_early_nor_late(events in events(3)) {
            let mut model = Model::new(300_000, 3);
            for event in events {
                model.happen(event)?;
            }
        }
    }

    /// How often the model's worker looks for something to do.
    const STEP: Millis = 2_000;

    /// What the model knows of an export, in true running time.
    #[derive(Clone, Debug)]
    struct Known {
        queue: QueueId,
        accepted: Millis,
        attempts: u32,
        first_moved: Option<Millis>,
        /// Whether it has a result, which may not be in the store yet.
        ended: bool,
    }

    /// Since when a queue fails, in true running time.
    #[derive(Clone, Copy)]
    struct Since {
        first: Millis,
        /// The same, but since it was last empty: an empty queue may be forgotten.
        unbroken: Option<Millis>,
        not_before: Millis,
    }

    struct Model {
        world: World,
        give_up_after: Millis,
        most_under_way: usize,
        truth: Millis,
        /// The running time as it was stored last.
        stored_now: Millis,
        known: HashMap<Uuid, Known>,
        under_way: Vec<Export>,
        /// What is to be tried, in order.
        order: HashMap<QueueId, VecDeque<Uuid>>,
        since: HashMap<QueueId, Since>,
        /// The same as it is in the store.
        stored_since: HashMap<QueueId, Since>,
        /// What each report that is not in the store says of `since`.
        unwritten_since: VecDeque<Option<Option<Since>>>,
        /// How many turns others had while a queue was due.
        passed_over: HashMap<QueueId, HashMap<QueueId, u32>>,
    }

    impl Model {
        fn new(give_up_after: Millis, most_under_way: usize) -> Self {
            Self {
                world: World::new(give_up_after),
                give_up_after,
                most_under_way,
                truth: 0,
                stored_now: 0,
                known: HashMap::new(),
                under_way: Vec::new(),
                order: HashMap::new(),
                since: HashMap::new(),
                stored_since: HashMap::new(),
                unwritten_since: VecDeque::new(),
                passed_over: HashMap::new(),
            }
        }

        fn happen(&mut self, event: Event) -> Result<(), TestCaseError> {
            let one = |at: usize, under_way: &mut Vec<Export>| match under_way.len() {
                0 => None,
                count => Some(under_way.swap_remove(at % count)),
            };
            match event {
                Event::Submit(queue) => {
                    let id = self.world.submit(queue);
                    self.order.entry(queue).or_default().push_back(id);
                    let known = Known {
                        queue,
                        accepted: self.truth,
                        attempts: 0,
                        first_moved: None,
                        ended: false,
                    };
                    self.known.insert(id, known);
                }
                Event::Answer(at) => {
                    if let Some(export) = one(at, &mut self.under_way) {
                        self.world.answer(&export);
                        self.since.remove(&export.queue);
                        self.end(&export, Some(None));
                    }
                }
                Event::End(at) => {
                    if let Some(export) = one(at, &mut self.under_way) {
                        self.world.queues.ended(export.queue, self.world.now);
                        self.world.finish(&export, false, None);
                        self.end(&export, None);
                    }
                }
                Event::Fail(at, to_end, jitter) => {
                    if let Some(export) = one(at, &mut self.under_way) {
                        self.fail(export, to_end, jitter)?;
                    }
                }
                Event::Run(millis) => {
                    // As the worker does, which wakes when something is due, and the writer.
                    for _ in 0..=millis / STEP {
                        self.write(usize::MAX);
                        self.truth += STEP;
                        self.world.now += STEP;
                        self.work()?;
                    }
                }
                Event::Write(count) => self.write(count),
                Event::Pause(queue) => {
                    // It costs it its turn, as a cancellation does.
                    self.passed_over.remove(&queue);
                    self.world.pause(queue);
                }
                Event::Resume(queue) if self.world.paused.contains(&queue) => self.resume(queue),
                Event::Resume(_) => {}
                Event::Retry(queue) => {
                    self.world.queues.retry(queue, self.world.now);
                    let now = self.world.now;
                    if let Some(since) = self.since.get_mut(&queue) {
                        since.not_before = since.not_before.min(now);
                    }
                }
                Event::Cancel(queue) => {
                    self.passed_over.remove(&queue);
                    self.write(usize::MAX);
                    for id in self.world.cancel(queue) {
                        self.known.remove(&id);
                        self.order
                            .entry(queue)
                            .or_default()
                            .retain(|known| *known != id);
                    }
                    if self.known.values().all(|known| known.queue != queue) {
                        self.stored_since.remove(&queue);
                        if let Some(since) = self.since.get_mut(&queue) {
                            since.unbroken = None;
                        }
                    }
                }
                Event::Kill(millis) => self.kill(millis),
            }
            self.work()
        }

        fn resume(&mut self, queue: QueueId) {
            // As in reality, a commit takes longer than a millisecond.
            (self.truth, self.world.now) = (self.truth + 1, self.world.now + 1);
            self.world.resume(queue);
            self.stored_now = self.world.now;
            let (truth, now) = (self.truth, self.world.now);
            for since in [&mut self.since, &mut self.stored_since] {
                if let Some(since) = since.get_mut(&queue) {
                    *since = Since {
                        first: truth,
                        unbroken: since.unbroken.map(|_| truth),
                        not_before: now,
                    };
                }
            }
            let unwritten = self.world.unwritten.iter().zip(&mut self.unwritten_since);
            for (_, since) in unwritten.filter(|(unwritten, _)| unwritten.queue == queue) {
                if let Some(Some(since)) = since {
                    since.first = truth;
                    since.unbroken = since.unbroken.map(|_| truth);
                    since.not_before = now;
                }
            }
            let known = self.known.values_mut();
            for known in known.filter(|known| known.queue == queue) {
                known.first_moved = known.first_moved.map(|_| truth);
            }
        }

        fn fail(&mut self, export: Export, to_end: bool, jitter: f64) -> Result<(), TestCaseError> {
            let (id, queue) = (export.id, export.queue);
            let retry = if to_end { BLAMED } else { DOWN };
            let (failed, _) = self.world.fail(export.clone(), retry, jitter);
            let wait = failed.backoff.not_before - self.world.now;
            prop_assert!((800..=LONGEST * 12 / 10 + 1).contains(&wait));
            let truth = self.truth;
            let since = self.since.entry(queue).or_insert(Since {
                first: truth,
                unbroken: None,
                not_before: 0,
            });
            since.not_before = failed.backoff.not_before;
            let unbroken = *since.unbroken.get_or_insert(truth);
            let since = *since;
            let known = self.known.get_mut(&id).unwrap();
            known.attempts += 1;
            let own = match to_end {
                true => *known.first_moved.get_or_insert(truth),
                false => Millis::MAX,
            };
            let known = known.clone();
            let is_paused = self.world.paused.contains(&queue);
            if failed.given_up {
                prop_assert!(!is_paused, "given up in a paused queue");
                prop_assert!(
                    truth - known.accepted.max(since.first.min(own)) >= self.give_up_after,
                    "given up early after its own attempt"
                );
                self.end(&export, Some(Some(since)));
            } else {
                let late = truth - known.accepted.max(unbroken.min(own));
                prop_assert!(
                    is_paused || late < self.give_up_after + self.world.lost + STEP,
                    "kept after its own attempt"
                );
                if !to_end {
                    self.order.entry(queue).or_default().push_front(id);
                }
                self.unwritten_since.push_back(Some(Some(since)));
            }
            Ok(())
        }

        fn end(&mut self, export: &Export, since: Option<Option<Since>>) {
            self.known.get_mut(&export.id).unwrap().ended = true;
            let mut left = self.known.values().filter(|known| !known.ended);
            let since = match left.all(|known| known.queue != export.queue) {
                true => {
                    if let Some(since) = self.since.get_mut(&export.queue) {
                        since.unbroken = None;
                    }
                    Some(None)
                }
                false => since,
            };
            self.unwritten_since.push_back(since);
        }

        fn write(&mut self, count: usize) {
            for _ in 0..count {
                let Some(written) = self.world.write() else {
                    break;
                };
                self.stored_now = self.world.now;
                match self.unwritten_since.pop_front().unwrap() {
                    Some(Some(since)) => drop(self.stored_since.insert(written.queue, since)),
                    Some(None) => drop(self.stored_since.remove(&written.queue)),
                    None => {}
                }
                match written.update {
                    Err(_) => drop(self.known.remove(&written.id)),
                    Ok((_, true)) => {
                        let order = self.order.entry(written.queue).or_default();
                        order.push_back(written.id);
                    }
                    Ok((_, false)) => {}
                }
            }
        }

        fn kill(&mut self, millis: Millis) {
            let lost = millis.min(self.world.now - self.stored_now);
            self.world.kill(lost);
            self.under_way.clear();
            self.passed_over.clear();
            self.unwritten_since.clear();
            self.since = self.stored_since.clone();
            self.order.clear();
            let mut rows = self.world.rows.clone();
            rows.sort_unstable_by_key(|row| row.turn);
            for row in rows {
                self.order.entry(row.queue).or_default().push_back(row.id);
                let known = self.known.get_mut(&row.id).unwrap();
                known.ended = false;
                known.attempts = row.attempts;
                known.first_moved = known.first_moved.filter(|_| row.first_moved_at.is_some());
            }
            // Queues without exports are not restored.
            let order = &self.order;
            self.since.retain(|queue, _| order.contains_key(queue));
        }

        fn is_busy(&self, queue: QueueId) -> bool {
            self.under_way.iter().any(|export| export.queue == queue)
        }

        fn is_due(&self, queue: QueueId) -> bool {
            let waits = |since: &Since| since.not_before > self.world.now;
            let has_exports = self
                .order
                .get(&queue)
                .is_some_and(|order| !order.is_empty());
            has_exports
                && !self.world.paused.contains(&queue)
                && !self.is_busy(queue)
                && !self.since.get(&queue).is_some_and(waits)
        }

        /// A queue of which an export that was not the first was given up, which is not in the store.
        fn is_blocked(&self, queue: QueueId) -> bool {
            let blocks = |unwritten: &Unwritten| {
                unwritten.queue == queue && matches!(unwritten.update, Err(true))
            };
            self.world.unwritten.iter().any(blocks)
        }

        fn is_left_alone(&self, queue: QueueId) -> bool {
            self.is_blocked(queue) || self.world.paused.contains(&queue)
        }

        /// Does what is due, then checks that nothing was left that should have been done.
        fn work(&mut self) -> Result<(), TestCaseError> {
            while self.under_way.len() < self.most_under_way {
                match self.world.next() {
                    Found::Export(export) => self.begin(export)?,
                    Found::GivenUp(export) => {
                        let known = self.known[&export.id].clone();
                        prop_assert!(!known.ended, "given up twice");
                        prop_assert!(!self.is_busy(known.queue));
                        prop_assert!(!self.world.paused.contains(&known.queue));
                        prop_assert_eq!(known.attempts, export.attempts);
                        let since = self.since.get(&known.queue).map(|since| since.first);
                        prop_assert!(since.is_some(), "given up in a queue that is not failing");
                        let tried_for = self.truth - known.accepted.max(since.unwrap());
                        prop_assert!(tried_for >= self.give_up_after, "given up early");
                        let order = self.order.get_mut(&known.queue).unwrap();
                        order.retain(|id| *id != export.id);
                        self.end(&export, None);
                    }
                    Found::Nothing(at) => {
                        prop_assert!(
                            at.is_none_or(|at| at > self.world.now),
                            "it would not sleep"
                        );
                        for (queue, order) in &self.order {
                            if order.is_empty()
                                || self.is_busy(*queue)
                                || self.is_left_alone(*queue)
                            {
                                continue;
                            }
                            prop_assert!(!self.is_due(*queue), "{queue} was forgotten");
                            let not_before = self.since[queue].not_before;
                            prop_assert!(
                                at.is_some_and(|at| at <= not_before),
                                "would sleep too long"
                            );
                        }
                        break;
                    }
                }
            }
            for known in self.known.values().filter(|known| !known.ended) {
                let since = self
                    .since
                    .get(&known.queue)
                    .and_then(|since| since.unbroken);
                let looked = self.under_way.len() < self.most_under_way;
                if let Some(since) = since
                    && looked
                    && !self.is_busy(known.queue)
                    && !self.is_left_alone(known.queue)
                {
                    let late = self.truth - known.accepted.max(since);
                    prop_assert!(
                        late < self.give_up_after + self.world.lost + STEP,
                        "kept for too long"
                    );
                }
            }
            let unwritten = self.world.rows.len();
            prop_assert_eq!(self.world.queues.unfinished(), unwritten);
            Ok(())
        }

        fn begin(&mut self, export: Export) -> Result<(), TestCaseError> {
            let queue = export.queue;
            prop_assert!(self.is_due(queue), "two at a time, or too early");
            let order = self.order.get_mut(&queue).unwrap();
            prop_assert_eq!(order.pop_front(), Some(export.id));
            let known = &self.known[&export.id];
            prop_assert!(!known.ended, "taken after it had ended");
            prop_assert_eq!(known.attempts, export.attempts);
            self.passed_over.remove(&queue);
            let others: Vec<_> = self.order.keys().copied().collect();
            for other in others {
                if other != queue && self.is_due(other) && !self.is_blocked(other) {
                    let passed = self.passed_over.entry(other).or_default();
                    let turns = passed.entry(queue).or_default();
                    *turns += 1;
                    prop_assert!(*turns <= 1, "{queue} had two turns while {other} was due");
                }
            }
            self.under_way.push(export);
            Ok(())
        }
    }
}
