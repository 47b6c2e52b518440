//! Whose turn it is, when a failed export is tried again, and when it is given up; pure.
//!
//! There is one queue per owner and destination. Turns go round the queues that are due, with one
//! attempt at a time in each, so nobody's backlog delays anybody else. Backoff belongs to the
//! queue: five thousand exports to a dead host cost one attempt per wait, and keep their order.
//! An export is given up when its queue has been failing for long enough since its acceptance.
//!
//! Times are always handed in, and are the service's running time: milliseconds that the service
//! has run for, all its runs together. Time in which the box is off must end no wait and give
//! nothing up, and a clock that is set must not either.
//!
//! Not here: threads and sockets ([`super::worker`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use super::addresses::is_literal;
use super::attempt::{Kind, Outcome};
use crate::backoff::backoff;
use crate::destination::Destination;
use crate::export::{Backoff, Export, Millis, QueueKey};

/// The wait after the first failed attempt; it doubles with each one after.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait of a queue's own accord.
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);
/// The longest wait that a destination's `Retry-After` can ask for. An export whose time is over
/// before that is given up then.
const LONGEST_RETRY_AFTER: Millis = 24 * 60 * 60 * 1000;
/// An attempt that takes longer makes its queue a slow one, whose attempts begin on a thread of
/// their own.
const SLOW: Duration = Duration::from_millis(20);

/// What follows from a failed attempt.
#[derive(Debug)]
pub struct Failed {
    /// The export, with this attempt counted.
    pub export: Export,
    /// The backoff of its queue from now on.
    pub backoff: Backoff,
    /// Whether it has been tried for long enough; otherwise it is in its queue again.
    pub given_up: bool,
}

/// What there is to do now.
#[derive(Debug)]
pub enum Next {
    /// This export is to be tried; its queue is busy until it is reported back.
    Attempt {
        /// Which export.
        export: Export,
        /// Whether its queue's last attempt failed.
        failing: bool,
        /// Whether its queue's last attempt took long.
        slow: bool,
    },
    /// This export has been tried for long enough.
    GiveUp(Export),
    /// Nothing is due before this, or before something is added or reported back.
    Wait(Option<Millis>),
}

/// Why an attempt is not the last one of its export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Whether the export itself seems to be the cause: it goes to the end of its queue then.
    pub to_end: bool,
    /// The least wait, which the destination asked for.
    pub least_wait: Millis,
}

/// Whether an attempt's outcome is final (`None`), or how the export is to be tried again.
/// `plain_allowed` says whether there is any network that plain `http` may go to.
pub fn retry(
    outcome: &Outcome,
    destination: &Destination,
    plain_allowed: bool,
    retry_on: &[u16],
    now: SystemTime,
) -> Option<Retry> {
    match outcome {
        Outcome::Answered(answer) if retry_on.contains(&answer.status) => {
            let asked = answer
                .retry_after
                .as_deref()
                .and_then(|text| retry_after(text, now));
            Some(Retry {
                // These two speak of the destination, any other of what it was sent.
                to_end: !matches!(answer.status, 429 | 503),
                least_wait: asked.unwrap_or(0).min(LONGEST_RETRY_AFTER),
            })
        }
        Outcome::Answered(_) => None,
        Outcome::Failed(_) if is_hopeless(destination, plain_allowed) => None,
        Outcome::Failed(failure) => match failure.kind {
            Kind::Timeout | Kind::Closed | Kind::Protocol => Some(Retry {
                to_end: failure.connected,
                least_wait: 0,
            }),
            Kind::ForbiddenAddress | Kind::ForbiddenHttp
                if is_literal(destination.host_and_port().0) =>
            {
                None
            }
            // Routers without a line, captive portals and clocks give wrong answers for a while.
            Kind::Dns
            | Kind::Connect
            | Kind::Tls
            | Kind::ForbiddenAddress
            | Kind::ForbiddenHttp => Some(Retry {
                to_end: false,
                least_wait: 0,
            }),
            Kind::Lost => None,
        },
    }
}

/// Whether a destination can never be sent to, whatever its name stands for.
pub fn is_hopeless(destination: &Destination, plain_allowed: bool) -> bool {
    !destination.is_encrypted() && !plain_allowed
}

/// How long `Retry-After` asks to wait (RFC 9110 section 10.2.3): seconds, or a date.
fn retry_after(text: &str, now: SystemTime) -> Option<Millis> {
    let text = text.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text)
            .ok()?
            .duration_since(now)
            .unwrap_or_default(),
    };
    Some(Millis::try_from(wait.as_millis()).unwrap_or(Millis::MAX))
}

/// The wait after so many failures in a row.
fn wait_after(failures: u32, chance: f64) -> Millis {
    let wait = backoff(FIRST_WAIT, LONGEST_WAIT, failures, chance);
    Millis::try_from(wait.as_millis()).unwrap_or(Millis::MAX)
}

/// All exports that are not finished, in their queues.
pub struct Schedule {
    queues: HashMap<QueueKey, Queue>,
    /// Queues whose turn it could be now, in the order of their turns; those whose last attempt
    /// failed are apart, as they may have to wait for others.
    ready: BTreeMap<u64, QueueKey>,
    ready_failing: BTreeMap<u64, QueueKey>,
    /// Queues that wait for a time, by that time.
    waiting: BTreeMap<(Millis, u64), QueueKey>,
    /// Failing queues, by when the first of their exports may have to be given up: it never
    /// happens sooner. Not there while an attempt is under way that was not over by then.
    deadlines: BTreeSet<(Millis, QueueKey)>,
    tickets: u64,
    give_up_after: Millis,
}

#[derive(Default)]
struct Queue {
    exports: VecDeque<Export>,
    backoff: Backoff,
    /// Its entry in `deadlines`.
    deadline: Option<Millis>,
    slow: bool,
    place: Place,
}

#[derive(Clone, Copy, Default)]
enum Place {
    /// Empty, and not held back.
    #[default]
    Nowhere,
    /// One of its exports is being tried.
    Busy,
    /// In `ready` or `ready_failing`, under this ticket.
    Ready(u64),
    /// In `waiting`, under this key.
    Waiting((Millis, u64)),
}

impl Schedule {
    /// An empty schedule that gives exports up when their queue has been failing for so long.
    pub fn new(give_up_after: Duration) -> Self {
        Self {
            queues: HashMap::new(),
            ready: BTreeMap::new(),
            ready_failing: BTreeMap::new(),
            waiting: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            tickets: 0,
            give_up_after: Millis::try_from(give_up_after.as_millis()).unwrap_or(Millis::MAX),
        }
    }

    /// Adds an export at the end of its queue. `resume` is the backoff that a restart found stored
    /// for its queue.
    pub fn add(&mut self, mut export: Export, resume: Option<Backoff>, now: Millis) {
        // A little running time is lost where the service was killed.
        export.accepted_at = export.accepted_at.min(now);
        let key = export.key.clone();
        let queue = self.queues.entry(key.clone()).or_default();
        if let Some(stored) = resume
            && stored.not_before >= queue.backoff.not_before
        {
            queue.backoff = Backoff {
                not_before: stored.not_before.min(now + LONGEST_RETRY_AFTER),
                failing_since: stored.failing_since.min(now),
                ..stored
            };
            self.unplace(&key);
        }
        self.watch(&key, Some(&export));
        if let Some(queue) = self.queues.get_mut(&key) {
            queue.exports.push_back(export);
        }
        self.place(&key, now);
    }

    /// What to do now. With `failing` false, queues whose last attempt failed are passed over.
    pub fn next(&mut self, now: Millis, failing: bool) -> Next {
        while let Some((at, key)) = self.deadlines.first()
            && *at <= now
        {
            let key = key.clone();
            if let Some(export) = self.give_up(&key, now) {
                return Next::GiveUp(export);
            }
        }
        while let Some(first) = self.waiting.first_entry()
            && first.key().0 <= now
        {
            let key = first.remove();
            self.set_place(&key, Place::Nowhere);
            self.place(&key, now);
        }
        let healthy = self.ready.first_key_value().map(|(ticket, _)| *ticket);
        let ailing = self
            .ready_failing
            .first_key_value()
            .map(|(ticket, _)| *ticket);
        let turn = match (healthy, ailing.filter(|_| failing)) {
            (Some(healthy), Some(ailing)) => Some(healthy.min(ailing)),
            (one, other) => one.or(other),
        };
        let key = turn.and_then(|ticket| {
            self.ready
                .remove(&ticket)
                .or_else(|| self.ready_failing.remove(&ticket))
        });
        let Some(key) = key else {
            let waiting = self.waiting.first_key_value().map(|((at, _), _)| *at);
            let deadline = self.deadlines.first().map(|(at, _)| *at);
            return Next::Wait(waiting.into_iter().chain(deadline).min());
        };
        self.set_place(&key, Place::Busy);
        let queue = self.queues.get_mut(&key);
        let Some((export, queue)) =
            queue.and_then(|queue| Some((queue.exports.pop_front()?, queue)))
        else {
            // Not reached: a queue is ready only while it holds an export.
            self.set_place(&key, Place::Nowhere);
            return Next::Wait(Some(now));
        };
        Next::Attempt {
            failing: queue.backoff.failures > 0,
            slow: queue.slow,
            export,
        }
    }

    /// Reports an export back whose destination has answered for good.
    pub fn answered(&mut self, key: &QueueKey, took: Duration, now: Millis) {
        self.unwatch(key);
        if let Some(queue) = self.queues.get_mut(key) {
            queue.backoff = Backoff::default();
            queue.slow = took > SLOW;
            queue.place = Place::Nowhere;
        }
        self.place(key, now);
    }

    /// Reports an export back that ended without an answer, by a failure that no other try could
    /// change. That says nothing of its destination, so its queue stays as it was.
    pub fn ended(&mut self, key: &QueueKey, now: Millis) {
        self.set_place(key, Place::Nowhere);
        self.watch(key, None);
        self.place(key, now);
    }

    /// Reports an export back whose attempt failed: it is queued again, or given up.
    pub fn failed(
        &mut self,
        mut export: Export,
        retry: Retry,
        took: Duration,
        chance: f64,
        now: Millis,
    ) -> Failed {
        export.attempts += 1;
        let key = export.key.clone();
        let queue = self.queues.entry(key.clone()).or_default();
        let failures = queue.backoff.failures.saturating_add(1);
        let wait = wait_after(failures, chance).max(retry.least_wait);
        let failing_since = match queue.backoff.failures {
            0 => now,
            _ => queue.backoff.failing_since,
        };
        let backoff = Backoff {
            failures,
            not_before: now.saturating_add(wait),
            failing_since,
        };
        queue.backoff = backoff;
        queue.slow = took > SLOW;
        queue.place = Place::Nowhere;
        let mut since = failing_since;
        if retry.to_end {
            // While others get through, the queue does not count as failing: an export that is
            // always refused has a time of its own, so that it ends too.
            since = since.min(*export.first_moved_at.get_or_insert(now));
        }
        let given_up = deadline(&export, since, self.give_up_after) <= now;
        if !given_up {
            if retry.to_end {
                queue.exports.push_back(export.clone());
            } else {
                queue.exports.push_front(export.clone());
            }
        }
        self.watch(&key, None);
        self.place(&key, now);
        Failed {
            export,
            backoff,
            given_up,
        }
    }

    /// Whether a queue has an export that is not being tried.
    pub fn has_waiting(&self, key: &QueueKey) -> bool {
        let queue = self.queues.get(key);
        queue.is_some_and(|queue| !queue.exports.is_empty())
    }

    /// How many queues have an export that is not being tried.
    #[cfg(test)]
    fn backlog(&self) -> usize {
        self.queues
            .values()
            .filter(|queue| !queue.exports.is_empty())
            .count()
    }

    /// Takes an export out of a queue whose deadline has come, if there is one to be given up;
    /// sets the deadline anew if not.
    fn give_up(&mut self, key: &QueueKey, now: Millis) -> Option<Export> {
        let give_up_after = self.give_up_after;
        let queue = self.queues.get_mut(key)?;
        let since = queue.backoff.failing_since;
        let due = |export: &Export| deadline(export, since, give_up_after) <= now;
        // The attempt under way may succeed, so it is waited for.
        let busy = matches!(queue.place, Place::Busy);
        if !busy && let Some(at) = queue.exports.iter().position(due) {
            let export = queue.exports.remove(at);
            if queue.exports.is_empty() {
                self.unwatch(key);
                self.unplace(key);
                self.place(key, now);
            }
            return export;
        }
        let next = queue
            .exports
            .iter()
            .min_by_key(|export| export.accepted_at)
            .filter(|_| !busy)
            .cloned();
        self.unwatch(key);
        if next.is_some() {
            self.watch(key, next.as_ref());
        }
        None
    }

    /// Notes when a queue has to be looked at because of an export, or of any of its exports, if
    /// it is failing.
    fn watch(&mut self, key: &QueueKey, export: Option<&Export>) {
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        if queue.backoff.failures == 0 {
            return;
        }
        let since = queue.backoff.failing_since;
        let at = match export {
            Some(export) => deadline(export, since, self.give_up_after),
            None => since.saturating_add(self.give_up_after),
        };
        if queue.deadline.is_none_or(|noted| at < noted) {
            if let Some(noted) = queue.deadline.replace(at) {
                self.deadlines.remove(&(noted, key.clone()));
            }
            self.deadlines.insert((at, key.clone()));
        }
    }

    fn unwatch(&mut self, key: &QueueKey) {
        let queue = self.queues.get_mut(key);
        if let Some(noted) = queue.and_then(|queue| queue.deadline.take()) {
            self.deadlines.remove(&(noted, key.clone()));
        }
    }

    fn set_place(&mut self, key: &QueueKey, place: Place) {
        if let Some(queue) = self.queues.get_mut(key) {
            queue.place = place;
        }
    }

    /// Takes a queue out of where it stands, unless one of its exports is being tried.
    fn unplace(&mut self, key: &QueueKey) {
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        match queue.place {
            Place::Nowhere | Place::Busy => return,
            Place::Ready(ticket) => {
                self.ready.remove(&ticket);
                self.ready_failing.remove(&ticket);
            }
            Place::Waiting(at) => {
                self.waiting.remove(&at);
            }
        }
        queue.place = Place::Nowhere;
    }

    /// Puts a queue that stands nowhere where it belongs, and forgets one that needs nothing.
    fn place(&mut self, key: &QueueKey, now: Millis) {
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        if !matches!(queue.place, Place::Nowhere) {
            return;
        }
        self.tickets += 1;
        let ticket = self.tickets;
        if queue.backoff.not_before > now {
            // An empty queue waits too: the next export to a dead host is not to start afresh.
            let at = (queue.backoff.not_before, ticket);
            queue.place = Place::Waiting(at);
            self.waiting.insert(at, key.clone());
        } else if queue.exports.is_empty() {
            self.unwatch(key);
            self.queues.remove(key);
        } else {
            queue.place = Place::Ready(ticket);
            let failing = queue.backoff.failures > 0;
            let line = if failing {
                &mut self.ready_failing
            } else {
                &mut self.ready
            };
            line.insert(ticket, key.clone());
        }
    }
}

/// When an export is given up whose queue has been failing since then.
fn deadline(export: &Export, failing_since: Millis, give_up_after: Millis) -> Millis {
    let since = export.accepted_at.max(failing_since);
    since.saturating_add(give_up_after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::attempt::{Answer, Failure};
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::sync::Arc;
    use uuid::Uuid;

    /// The longest wait of a queue's own accord.
    const LONGEST: Millis = 15 * 60 * 1000;
    const DAY: Millis = 24 * 60 * 60 * 1000;
    const QUICK: Duration = Duration::from_millis(1);
    const DOWN: Retry = Retry {
        to_end: false,
        least_wait: 0,
    };
    const BLAMED: Retry = Retry {
        to_end: true,
        least_wait: 0,
    };

    fn export(owner: u8, accepted_at: Millis) -> Export {
        let destination = Destination::parse("https://a.example/").unwrap();
        let key = QueueKey {
            owner: Arc::new([owner]),
            destination: destination.as_str().into(),
        };
        Export {
            id: Uuid::now_v7(),
            key,
            destination,
            accepted_at,
            attempts: 0,
            first_moved_at: None,
        }
    }

    fn schedule() -> Schedule {
        Schedule::new(Duration::from_millis(DAY as u64))
    }

    fn attempt(schedule: &mut Schedule, now: Millis) -> Export {
        match schedule.next(now, true) {
            Next::Attempt { export, .. } => export,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn turns_go_round_however_long_a_queue_is() {
        let mut schedule = schedule();
        for _ in 0..100 {
            schedule.add(export(1, 0), None, 0);
        }
        schedule.add(export(2, 0), None, 0);
        let first = attempt(&mut schedule, 0);
        let second = attempt(&mut schedule, 0);
        assert_eq!((first.key.owner[0], second.key.owner[0]), (1, 2));
        assert!(
            matches!(schedule.next(0, true), Next::Wait(None)),
            "one at a time in each"
        );
        schedule.answered(&first.key, QUICK, 0);
        assert_eq!(attempt(&mut schedule, 0).key.owner[0], 1);
    }

    #[test]
    fn a_queue_that_fails_waits_longer_each_time_and_keeps_its_order() {
        let mut schedule = schedule();
        let exports: Vec<_> = (0..3).map(|_| export(1, 0)).collect();
        for export in &exports {
            schedule.add(export.clone(), None, 0);
        }
        let mut now = 0;
        for wait in [1_000, 2_000, 4_000, 8_000] {
            let tried = attempt(&mut schedule, now);
            assert_eq!(tried.id, exports[0].id);
            let Failed { backoff, .. } = schedule.failed(tried, DOWN, QUICK, 0.5, now);
            assert_eq!(backoff.not_before, now + wait);
            assert!(
                matches!(schedule.next(now + wait - 1, true), Next::Wait(Some(at)) if at == now + wait)
            );
            now += wait;
        }
        for export in &exports {
            let tried = attempt(&mut schedule, now);
            assert_eq!(tried.id, export.id);
            schedule.answered(&tried.key, QUICK, now);
        }
        assert!(schedule.queues.is_empty());
    }

    #[test]
    fn an_export_that_seems_to_be_the_cause_goes_to_the_end() {
        let mut schedule = schedule();
        let (bad, good) = (export(1, 0), export(1, 0));
        schedule.add(bad.clone(), None, 0);
        schedule.add(good.clone(), None, 0);
        let tried = attempt(&mut schedule, 0);
        schedule.failed(tried, BLAMED, QUICK, 0.5, 0);
        assert_eq!(attempt(&mut schedule, 1_000).id, good.id);
        schedule.answered(&good.key, QUICK, 1_000);
        assert_eq!(attempt(&mut schedule, 1_000).id, bad.id);
    }

    fn given_up(schedule: &mut Schedule, now: Millis) -> Option<Export> {
        match schedule.next(now, true) {
            Next::GiveUp(export) => Some(export),
            Next::Wait(_) => None,
            Next::Attempt { .. } => panic!("an attempt"),
        }
    }

    /// Lets the next attempt fail, after which its queue waits for longer than a day.
    fn fail_for_long(schedule: &mut Schedule, now: Millis) -> Failed {
        let tried = attempt(schedule, now);
        let retry = Retry {
            least_wait: 3 * DAY,
            ..DOWN
        };
        schedule.failed(tried, retry, QUICK, 0.5, now)
    }

    #[test]
    fn exports_are_given_up_when_their_queue_has_failed_for_long_enough_since_they_came() {
        let mut schedule = schedule();
        let (first, second, late) = (export(1, 0), export(1, 10), export(1, 9_000));
        schedule.add(first.clone(), None, 0);
        schedule.add(second.clone(), None, 10);
        assert!(!fail_for_long(&mut schedule, 5_000).given_up);
        schedule.add(late.clone(), None, 9_000);
        assert!(given_up(&mut schedule, DAY + 4_999).is_none());
        let tried = given_up(&mut schedule, DAY + 5_000).unwrap();
        assert_eq!((tried.id, tried.attempts), (first.id, 1));
        assert_eq!(given_up(&mut schedule, DAY + 5_000).unwrap().id, second.id);
        assert!(
            matches!(schedule.next(DAY + 5_000, true), Next::Wait(Some(at)) if at == DAY + 9_000)
        );
        assert!(schedule.has_waiting(&late.key));
        assert_eq!(given_up(&mut schedule, DAY + 9_000).unwrap().id, late.id);
        assert!(!schedule.has_waiting(&late.key));
    }

    #[test]
    fn a_queue_that_is_being_delivered_loses_nothing_however_long_that_takes() {
        let mut schedule = schedule();
        for _ in 0..3 {
            schedule.add(export(1, 0), None, 0);
        }
        for day in 1..=3 {
            let tried = attempt(&mut schedule, day * DAY);
            schedule.failed(tried, DOWN, QUICK, 0.5, day * DAY);
            let now = day * DAY + 5_000;
            let tried = attempt(&mut schedule, now);
            schedule.answered(&tried.key, QUICK, now);
        }
        assert!(schedule.queues.is_empty() && schedule.deadlines.is_empty());
    }

    #[test]
    fn an_attempt_under_way_is_waited_for_before_anything_of_its_queue_is_given_up() {
        let mut schedule = schedule();
        let (first, second) = (export(1, 0), export(1, 0));
        schedule.add(first.clone(), None, 0);
        schedule.add(second.clone(), None, 0);
        let tried = attempt(&mut schedule, 0);
        schedule.failed(tried, DOWN, QUICK, 0.5, 0);
        let tried = attempt(&mut schedule, DAY - 1);
        assert!(given_up(&mut schedule, DAY + 9).is_none());
        let failed = schedule.failed(tried, DOWN, QUICK, 0.5, DAY + 9);
        assert!(failed.given_up);
        assert_eq!((failed.export.id, failed.export.attempts), (first.id, 2));
        assert_eq!(given_up(&mut schedule, DAY + 9).unwrap().id, second.id);
    }

    #[test]
    fn an_export_that_is_always_refused_while_others_get_through_ends_too() {
        let mut schedule = schedule();
        let bad = export(1, 0);
        schedule.add(bad.clone(), None, 0);
        let tried = attempt(&mut schedule, 0);
        schedule.failed(tried, BLAMED, QUICK, 0.5, 0);
        let mut now = 0;
        let failed = loop {
            now += DAY / 4;
            let good = export(1, now);
            schedule.add(good.clone(), None, now);
            let tried = attempt(&mut schedule, now);
            assert_eq!(tried.id, bad.id);
            let failed = schedule.failed(tried, BLAMED, QUICK, 0.5, now);
            let tried = attempt(&mut schedule, now + 2_000);
            assert_eq!(tried.id, good.id);
            schedule.answered(&tried.key, QUICK, now + 2_000);
            if failed.given_up {
                break failed;
            }
        };
        assert_eq!((now, failed.export.attempts), (DAY, 5));
        // Its time counts against what it did itself only: a failure that speaks of the destination
        // would have been the first of its queue.
        let mut moved = bad;
        moved.first_moved_at = Some(0);
        schedule.add(moved, None, now);
        let tried = attempt(&mut schedule, 2 * DAY);
        assert!(!schedule.failed(tried, DOWN, QUICK, 0.5, 2 * DAY).given_up);
    }

    #[test]
    fn a_final_failure_ends_no_wait_and_hurries_no_other() {
        let mut schedule = schedule();
        for _ in 0..3 {
            schedule.add(export(1, 0), None, 0);
        }
        for now in [0, 1_000] {
            let tried = attempt(&mut schedule, now);
            schedule.failed(tried, DOWN, QUICK, 0.5, now);
        }
        let lost = attempt(&mut schedule, 3_000);
        schedule.ended(&lost.key, 3_000);
        // It was not sent, so the next one has this turn, and the wait after it is the third.
        let tried = attempt(&mut schedule, 3_000);
        let Failed { backoff, .. } = schedule.failed(tried, DOWN, QUICK, 0.5, 3_000);
        assert_eq!(
            backoff,
            Backoff {
                failures: 3,
                not_before: 7_000,
                failing_since: 0
            }
        );
        assert_eq!(schedule.deadlines.len(), 1);
    }

    #[test]
    fn a_restart_goes_on_with_the_stored_backoff() {
        let mut schedule = schedule();
        let stored = Backoff {
            failures: 3,
            not_before: 9_000,
            failing_since: 1_000,
        };
        schedule.add(export(1, 0), Some(stored), 5_000);
        schedule.add(export(1, 0), Some(stored), 5_000);
        assert!(matches!(
            schedule.next(8_999, true),
            Next::Wait(Some(9_000))
        ));
        let tried = attempt(&mut schedule, 9_000);
        let Failed { backoff, .. } = schedule.failed(tried, DOWN, QUICK, 0.5, 9_000);
        assert_eq!(
            backoff,
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
        let mut schedule = Schedule::new(Duration::MAX);
        schedule.add(export(1, Millis::MAX), Some(wild), 17_000);
        let longest = 17_000 + LONGEST_RETRY_AFTER;
        assert!(matches!(schedule.next(17_000, true), Next::Wait(Some(at)) if at == longest));
        assert_eq!(attempt(&mut schedule, longest).accepted_at, 17_000);
    }

    #[test]
    fn failing_queues_can_be_passed_over() {
        let mut schedule = schedule();
        schedule.add(export(1, 0), None, 0);
        let tried = attempt(&mut schedule, 0);
        schedule.failed(tried, DOWN, Duration::from_millis(30), 0.5, 0);
        schedule.add(export(2, 0), None, 1_000);
        assert!(
            matches!(schedule.next(1_000, false), Next::Attempt { export, failing: false, slow: false } if export.key.owner[0] == 2)
        );
        assert!(matches!(schedule.next(1_000, false), Next::Wait(_)));
        assert!(matches!(
            schedule.next(1_000, true),
            Next::Attempt {
                failing: true,
                slow: true,
                ..
            }
        ));
    }

    #[test]
    fn what_is_final_and_what_is_tried_again() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let failed = |kind, connected| {
            Outcome::Failed(Failure {
                kind,
                message: String::new(),
                connected,
            })
        };
        let to = |url: &str| Destination::parse(url).unwrap();
        let name = to("https://a.example/");
        for (kind, connected, to_end) in [
            (Kind::Dns, false, false),
            (Kind::Connect, false, false),
            (Kind::Timeout, false, false),
            (Kind::Timeout, true, true),
            (Kind::Closed, true, true),
            (Kind::Protocol, true, true),
            // A certificate speaks of the destination.
            (Kind::Tls, true, false),
            (Kind::ForbiddenAddress, false, false),
            (Kind::ForbiddenHttp, false, false),
        ] {
            let verdict = Retry {
                to_end,
                least_wait: 0,
            };
            for url in [&name, &to("http://a.example/"), &to("http://localhost:1/")] {
                let again = retry(&failed(kind, connected), url, true, &[], now);
                assert_eq!(again, Some(verdict), "{kind:?} {url:?}");
            }
            // No network is allowed, so no other address of the name would do.
            let again = retry(&failed(kind, connected), &name, false, &[], now);
            assert_eq!(again, Some(verdict), "{kind:?}");
            let plain = to("http://a.example/");
            let again = retry(&failed(kind, connected), &plain, false, &[], now);
            assert_eq!(again, None, "{kind:?}");
        }
        assert_eq!(
            retry(&failed(Kind::Lost, false), &name, true, &[], now),
            None
        );
        for literal in ["https://10.0.0.1/", "https://[::1]/", "https://127.1:9/"] {
            for kind in [Kind::ForbiddenAddress, Kind::ForbiddenHttp] {
                let again = retry(&failed(kind, false), &to(literal), true, &[], now);
                assert_eq!(again, None, "{literal}");
            }
            let again = retry(&failed(Kind::Connect, false), &to(literal), true, &[], now);
            assert_eq!(again, Some(DOWN), "{literal}");
        }
        let status = |status| {
            let answer = Answer {
                status,
                body: Vec::new(),
                truncated: false,
                retry_after: None,
                memory: None,
            };
            let again = retry(
                &Outcome::Answered(answer),
                &name,
                true,
                &[429, 500, 503],
                now,
            );
            again.map(|again| again.to_end)
        };
        assert_eq!(
            [200, 429, 500, 502, 503].map(status),
            [None, Some(false), Some(true), None, Some(false)]
        );
        let answered = |retry_after: Option<&str>| {
            let retry_after = retry_after.map(str::to_owned);
            Outcome::Answered(Answer {
                status: 503,
                body: Vec::new(),
                truncated: false,
                retry_after,
                memory: None,
            })
        };
        assert_eq!(retry(&answered(None), &name, true, &[429], now), None);
        for (text, wait) in [
            (None, 0),
            (Some("7"), 7_000),
            (Some("Sun, 06 Nov 1994 08:50:37 GMT"), 60_000),
            (Some("Sun, 06 Nov 1994 08:00:00 GMT"), 0),
            (Some("999999999999"), LONGEST_RETRY_AFTER),
            (Some("soon"), 0),
        ] {
            let verdict = retry(&answered(text), &name, true, &[429, 503], now);
            assert_eq!(
                verdict,
                Some(Retry {
                    to_end: false,
                    least_wait: wait
                }),
                "{text:?}"
            );
        }
    }

    /// Something that happens to a schedule.
    #[derive(Clone, Debug)]
    enum Event {
        Submit(u8),
        Succeed(usize),
        Fail(usize, bool, f64),
        Pass(Millis),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            3 => (0_u8..6).prop_map(Event::Submit),
            3 => any::<usize>().prop_map(Event::Succeed),
            2 => (any::<usize>(), any::<bool>(), 0.0..=1.0).prop_map(|(at, end, chance)| Event::Fail(at, end, chance)),
            2 => (0..3_000_i64).prop_map(Event::Pass),
        ];
        proptest::collection::vec(event, 0..80)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn backoff_stays_in_its_bounds(failures in 1_u32.., chance in 0.0..=1.0) {
            let wait = wait_after(failures, chance);
            let middle = if failures > 10 { LONGEST } else { (1000 << (failures - 1)).min(LONGEST) };
            prop_assert!(wait >= middle * 8 / 10 - 1 && wait <= middle * 12 / 10 + 1);
        }

        #[test]
        fn no_retry_after_makes_the_reader_panic(text in ".{0,40}") {
            let wait = retry_after(&text, SystemTime::UNIX_EPOCH);
            prop_assert!(wait.is_none_or(|wait| wait >= 0));
        }

        /// Against a plain model: one attempt at a time in each queue, none before its time,
        /// order kept, no queue twice while another that was ready first waits, nothing lost.
        #[test]
        fn turns_are_fair_and_nothing_due_is_forgotten(events in events()) {
            let mut schedule = schedule();
            let mut now = 0;
            let mut order: HashMap<u8, VecDeque<Uuid>> = HashMap::new();
            let mut not_before: HashMap<u8, Millis> = HashMap::new();
            let mut tried: Vec<Export> = Vec::new();
            let mut left = HashSet::new();
            // How many turns others had while a queue was due.
            let mut passed_over: HashMap<u8, HashMap<u8, u32>> = HashMap::new();
            for event in events {
                match event {
                    Event::Submit(owner) => {
                        let new = export(owner, now);
                        left.insert(new.id);
                        order.entry(owner).or_default().push_back(new.id);
                        schedule.add(new, None, now);
                    }
                    Event::Succeed(at) if !tried.is_empty() => {
                        let export = tried.swap_remove(at % tried.len());
                        left.remove(&export.id);
                        not_before.remove(&export.key.owner[0]);
                        schedule.answered(&export.key, QUICK, now);
                    }
                    Event::Fail(at, to_end, chance) if !tried.is_empty() => {
                        let export = tried.swap_remove(at % tried.len());
                        let (owner, id) = (export.key.owner[0], export.id);
                        let queue = order.entry(owner).or_default();
                        if to_end { queue.push_back(id) } else { queue.push_front(id) }
                        let Failed { backoff, given_up, .. } = schedule.failed(export, Retry { to_end, least_wait: 0 }, QUICK, chance, now);
                        prop_assert!(!given_up, "given up within minutes");
                        prop_assert!(backoff.not_before >= now + 800 && backoff.not_before <= now + LONGEST * 12 / 10 + 1);
                        not_before.insert(owner, backoff.not_before);
                    }
                    Event::Pass(millis) => now += millis,
                    _ => {}
                }
                loop {
                    match schedule.next(now, true) {
                        Next::Attempt { export, .. } => {
                            let owner = export.key.owner[0];
                            prop_assert!(tried.iter().all(|other| other.key.owner[0] != owner), "two at a time");
                            prop_assert!(not_before.get(&owner).is_none_or(|at| *at <= now), "too early");
                            prop_assert_eq!(order.get_mut(&owner).and_then(VecDeque::pop_front), Some(export.id));
                            passed_over.remove(&owner);
                            for (other, queue) in &order {
                                let due = !queue.is_empty()
                                    && tried.iter().all(|busy| busy.key.owner[0] != *other)
                                    && not_before.get(other).is_none_or(|at| *at <= now);
                                if due && *other != owner {
                                    let turns = passed_over.entry(*other).or_default().entry(owner).or_default();
                                    *turns += 1;
                                    prop_assert!(*turns <= 1, "{} had two turns while {} was due", owner, other);
                                }
                            }
                            tried.push(export);
                            // A few at a time, as with a limited number of threads.
                            if tried.len() >= 3 { break; }
                        }
                        Next::Wait(at) => {
                            for (owner, queue) in &order {
                                let due = !queue.is_empty() && tried.iter().all(|busy| busy.key.owner[0] != *owner);
                                if due {
                                    let at_least = *not_before.get(owner).unwrap_or(&now);
                                    prop_assert!(at_least > now, "forgotten");
                                    prop_assert!(at.is_some_and(|at| at <= at_least), "would sleep too long");
                                }
                            }
                            break;
                        }
                        Next::GiveUp(_) => prop_assert!(false, "given up within minutes"),
                    }
                }
            }
            let waiting: usize = order.values().map(VecDeque::len).sum();
            prop_assert_eq!(waiting + tried.len(), left.len());
            prop_assert_eq!(schedule.backlog(), order.values().filter(|queue| !queue.is_empty()).count());
        }

    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Against a plain model that knows the true running time: none is given up before its queue
        /// has failed for long enough since it came, and none is kept for longer, but for what
        /// restarts lose of the running time and for attempts under way.
        #[test]
        fn exports_are_given_up_neither_early_nor_late(lives in lives()) {
            let mut world = World::new();
            for life in lives {
                world.happen(life)?;
                world.settle()?;
            }
        }
    }

    /// How long exports are tried in the model.
    const MODEL_GIVE_UP: Millis = 300_000;
    /// How often the model's worker looks what there is to do.
    const STEP: Millis = 2_000;

    /// Something that happens to the service as a whole.
    #[derive(Clone, Debug)]
    enum Life {
        Submit(u8),
        Answer(usize),
        Fail(usize, bool, f64),
        Run(Millis),
        /// It is killed, and what it has run for since a minute ago at most is forgotten.
        Kill(Millis),
    }

    fn lives() -> impl Strategy<Value = Vec<Life>> {
        let life = prop_oneof![
            3 => (0_u8..3).prop_map(Life::Submit),
            1 => any::<usize>().prop_map(Life::Answer),
            5 => (any::<usize>(), any::<bool>(), 0.0..=1.0).prop_map(|(at, end, chance)| Life::Fail(at, end, chance)),
            5 => (0..60_000_i64).prop_map(Life::Run),
            1 => (0..60_000_i64).prop_map(Life::Kill),
        ];
        proptest::collection::vec(life, 0..120)
    }

    /// What the model knows of an export, in true running time.
    #[derive(Clone)]
    struct Known {
        id: Uuid,
        owner: u8,
        accepted: Millis,
        first_moved: Option<Millis>,
    }

    struct World {
        schedule: Schedule,
        /// True running time, and the service's own, of which kills lose some.
        truth: Millis,
        count: Millis,
        /// The service's own at its last commit, below which it never falls.
        committed: Millis,
        lost: Millis,
        left: Vec<Known>,
        under_way: Vec<Export>,
        /// Since when each queue fails, in true running time, and since when without having been empty:
        /// an empty queue may be forgotten.
        failing: HashMap<u8, (Millis, Option<Millis>)>,
        /// What is on disk, in the order of delivery.
        stored: Vec<Export>,
        backoffs: HashMap<u8, Backoff>,
    }

    impl World {
        fn new() -> Self {
            Self {
                schedule: Schedule::new(Duration::from_millis(MODEL_GIVE_UP as u64)),
                truth: 0,
                count: 0,
                committed: 0,
                lost: 0,
                left: Vec::new(),
                under_way: Vec::new(),
                failing: HashMap::new(),
                stored: Vec::new(),
                backoffs: HashMap::new(),
            }
        }

        fn happen(&mut self, life: Life) -> Result<(), TestCaseError> {
            match life {
                Life::Submit(owner) => {
                    let new = export(owner, self.count);
                    self.left.push(Known {
                        id: new.id,
                        owner,
                        accepted: self.truth,
                        first_moved: None,
                    });
                    self.stored.push(new.clone());
                    self.schedule.add(new, None, self.count);
                }
                Life::Answer(at) if !self.under_way.is_empty() => {
                    let export = self.under_way.swap_remove(at % self.under_way.len());
                    let owner = export.key.owner[0];
                    self.failing.remove(&owner);
                    self.backoffs.remove(&owner);
                    self.forget(export.id);
                    self.schedule.answered(&export.key, QUICK, self.count);
                }
                Life::Fail(at, to_end, chance) if !self.under_way.is_empty() => {
                    let export = self.under_way.swap_remove(at % self.under_way.len());
                    self.fail(export, to_end, chance)?;
                }
                Life::Run(millis) => {
                    // As the worker does, which wakes when something is due.
                    for _ in 0..=millis / STEP {
                        self.truth += STEP;
                        self.count += STEP;
                        self.settle()?;
                    }
                }
                Life::Kill(millis) => {
                    let lost = millis.min(self.count - self.committed);
                    self.lost += lost;
                    self.count -= lost;
                    self.under_way.clear();
                    self.schedule = World::new().schedule;
                    for export in &self.stored {
                        let backoff = self.backoffs.get(&export.key.owner[0]);
                        self.schedule
                            .add(export.clone(), backoff.copied(), self.count);
                    }
                }
                _ => {}
            }
            Ok(())
        }

        fn fail(&mut self, export: Export, to_end: bool, chance: f64) -> Result<(), TestCaseError> {
            let (owner, id) = (export.key.owner[0], export.id);
            let (since, unbroken) = self.failing.entry(owner).or_insert((self.truth, None));
            let (since, unbroken) = (*since, *unbroken.get_or_insert(self.truth));
            let retry = if to_end { BLAMED } else { DOWN };
            let failed = self
                .schedule
                .failed(export, retry, QUICK, chance, self.count);
            let known = self.left.iter_mut().find(|known| known.id == id).unwrap();
            let mut own = Millis::MAX;
            if to_end {
                own = *known.first_moved.get_or_insert(self.truth);
            }
            let known = known.clone();
            self.backoffs.insert(owner, failed.backoff);
            self.committed = self.count;
            if failed.given_up {
                self.gone(&known, since.min(own))?;
            } else {
                let late = self.truth - unbroken.min(own).max(known.accepted);
                prop_assert!(
                    late < MODEL_GIVE_UP + self.lost + STEP,
                    "kept after its own attempt"
                );
                let at = self
                    .stored
                    .iter()
                    .position(|stored| stored.id == id)
                    .unwrap();
                let mut stored = self.stored.remove(at);
                stored.first_moved_at = failed.export.first_moved_at;
                let at = if to_end { self.stored.len() } else { at };
                self.stored.insert(at, stored);
            }
            Ok(())
        }

        /// Does what there is to do now, and sees that nothing is left that should have gone.
        fn settle(&mut self) -> Result<(), TestCaseError> {
            loop {
                match self.schedule.next(self.count, true) {
                    Next::Attempt { export, .. } => self.under_way.push(export),
                    Next::GiveUp(export) => {
                        let mut left = self.left.iter();
                        let known = left.find(|known| known.id == export.id).cloned().unwrap();
                        let since = self.failing.get(&known.owner).copied();
                        prop_assert!(since.is_some(), "given up in a queue that is not failing");
                        self.gone(&known, since.unwrap().0)?;
                    }
                    Next::Wait(at) => {
                        prop_assert!(at.is_none_or(|at| at > self.count), "it would not sleep");
                        break;
                    }
                }
            }
            for known in &self.left {
                let busy = self
                    .under_way
                    .iter()
                    .any(|one| one.key.owner[0] == known.owner);
                let since = self.failing.get(&known.owner).and_then(|(_, since)| *since);
                if let Some(since) = since.filter(|_| !busy) {
                    let late = self.truth - known.accepted.max(since);
                    prop_assert!(late < MODEL_GIVE_UP + self.lost + STEP, "kept for too long");
                }
            }
            Ok(())
        }

        fn gone(&mut self, known: &Known, since: Millis) -> Result<(), TestCaseError> {
            let tried_for = self.truth - known.accepted.max(since);
            prop_assert!(tried_for >= MODEL_GIVE_UP, "given up early");
            self.forget(known.id);
            if self.left.iter().all(|other| other.owner != known.owner) {
                // A queue without exports is not remembered on disk.
                self.backoffs.remove(&known.owner);
                self.failing
                    .entry(known.owner)
                    .and_modify(|failing| failing.1 = None);
            }
            Ok(())
        }

        fn forget(&mut self, id: Uuid) {
            self.left.retain(|known| known.id != id);
            self.stored.retain(|export| export.id != id);
        }
    }
}
