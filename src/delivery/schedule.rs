//! Whose turn it is, when a failed export is tried again, and when it is given up; pure.
//!
//! There is one queue per owner and destination. Turns go round the queues that are due, with one
//! attempt at a time in each, so nobody's backlog delays anybody else. Backoff belongs to the
//! queue: five thousand exports to a dead host cost one attempt per wait, and keep their order.
//!
//! Times are Unix milliseconds and always handed in.
//!
//! Not here: threads and sockets ([`super::worker`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::addresses::Destination;
use super::attempt::{Kind, Outcome};

/// Unix milliseconds.
pub type Millis = i64;

/// The wait after the first failed attempt; it doubles with each one after.
const FIRST_WAIT: Millis = 1000;
/// The longest wait of a queue's own accord.
const LONGEST_WAIT: Millis = 15 * 60 * 1000;
/// Waits differ by up to this part either way, so that boxes do not come back all at once.
const JITTER: f64 = 0.2;
/// The longest wait that a destination's `Retry-After` can ask for. An export whose time is over
/// before that is given up then.
const LONGEST_RETRY_AFTER: Millis = 24 * 60 * 60 * 1000;
/// The longest that a restart goes on with a wait: the clock may have been wrong when it was noted.
pub const LONGEST_RESUMED: Millis = 60 * 60 * 1000;
/// What an export has left after a restart that finds its time over: while the box was off, or by
/// a clock that was wrong then, there was no chance to deliver it.
const LAST_CHANCE: Millis = 60 * 1000;
/// An attempt that takes longer makes its queue a slow one, whose attempts begin on a thread of
/// their own.
const SLOW: Duration = Duration::from_millis(20);

/// Which queue an export waits in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueKey {
    /// The identifier of the macaroon it came with.
    pub owner: Arc<[u8]>,
    /// The URL it goes to.
    pub destination: Arc<str>,
}

/// An export that has still to be delivered.
#[derive(Clone, Debug)]
pub struct Export {
    /// Which export.
    pub id: Uuid,
    /// Whose it is and where it goes.
    pub key: QueueKey,
    /// Where it goes, again as a checked URL.
    pub destination: Destination,
    /// When it was accepted.
    pub accepted_at: Millis,
    /// How often it was tried so far.
    pub attempts: u32,
}

/// How far a queue's backoff has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    /// Attempts that failed since the last success.
    pub failures: u32,
    /// No attempt before this.
    pub not_before: Millis,
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
pub fn retry(outcome: &Outcome, retry_on: &[u16], now: SystemTime) -> Option<Retry> {
    match outcome {
        Outcome::Answered(answer) if retry_on.contains(&answer.status) => {
            let asked = answer
                .retry_after
                .as_deref()
                .and_then(|text| retry_after(text, now));
            let least_wait = asked.unwrap_or(0).min(LONGEST_RETRY_AFTER);
            Some(Retry {
                to_end: false,
                least_wait,
            })
        }
        Outcome::Answered(_) => None,
        Outcome::Failed(failure) => match failure.kind {
            Kind::Dns | Kind::Connect | Kind::Timeout | Kind::Closed => Some(Retry {
                to_end: failure.connected,
                least_wait: 0,
            }),
            Kind::TlsTooEarly => Some(Retry {
                to_end: false,
                least_wait: 0,
            }),
            Kind::Tls
            | Kind::Protocol
            | Kind::ForbiddenAddress
            | Kind::ForbiddenHttp
            | Kind::Lost => None,
        },
    }
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

/// The wait after so many failures in a row; `chance` is evenly spread from 0 to 1.
fn backoff(failures: u32, chance: f64) -> Millis {
    let doublings = failures.saturating_sub(1).min(20);
    let wait = (FIRST_WAIT << doublings).min(LONGEST_WAIT);
    // Far below 2^53, so nothing is lost on the way through f64.
    (wait as f64 * (1.0 + JITTER * (2.0 * chance - 1.0))) as Millis
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
    /// When each export that is in a queue is given up.
    deadlines: BTreeMap<(Millis, Uuid), QueueKey>,
    tickets: u64,
    give_up_after: Millis,
}

#[derive(Default)]
struct Queue {
    exports: VecDeque<Export>,
    backoff: Backoff,
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
    /// An empty schedule that gives exports up so long after they were accepted.
    pub fn new(give_up_after: Duration) -> Self {
        Self {
            queues: HashMap::new(),
            ready: BTreeMap::new(),
            ready_failing: BTreeMap::new(),
            waiting: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            tickets: 0,
            give_up_after: Millis::try_from(give_up_after.as_millis()).unwrap_or(Millis::MAX),
        }
    }

    /// Adds an export at the end of its queue. `resume` is there for exports that a restart found
    /// unfinished, and is the backoff that was stored with them: the queue goes on from the
    /// latest one.
    pub fn add(&mut self, mut export: Export, resume: Option<Backoff>, now: Millis) {
        if resume.is_some() {
            // The clock may have been ahead then.
            export.accepted_at = export.accepted_at.min(now);
            if self.deadline(&export) <= now {
                export.accepted_at = (now + LAST_CHANCE).saturating_sub(self.give_up_after);
            }
        }
        let key = export.key.clone();
        let deadline = self.deadline(&export);
        self.deadlines.insert((deadline, export.id), key.clone());
        let queue = self.queues.entry(key.clone()).or_default();
        queue.exports.push_back(export);
        if let Some(stored) = resume
            && stored.not_before >= queue.backoff.not_before
        {
            let not_before = stored.not_before.min(now + LONGEST_RESUMED);
            queue.backoff = Backoff {
                not_before,
                ..stored
            };
            self.unplace(&key);
        }
        self.place(&key, now);
    }

    /// What to do now. With `failing` false, queues whose last attempt failed are passed over.
    pub fn next(&mut self, now: Millis, failing: bool) -> Next {
        if let Some(first) = self.deadlines.first_entry()
            && first.key().0 <= now
        {
            let ((_, id), key) = first.remove_entry();
            if let Some(export) = self.take(&key, |export| export.id == id) {
                self.unplace(&key);
                self.place(&key, now);
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
            let deadline = self.deadlines.first_key_value().map(|((at, _), _)| *at);
            return Next::Wait(waiting.into_iter().chain(deadline).min());
        };
        self.set_place(&key, Place::Busy);
        let Some(export) = self.take(&key, |_| true) else {
            // Not reached: a queue is ready only while it holds an export.
            self.set_place(&key, Place::Nowhere);
            return Next::Wait(Some(now));
        };
        self.deadlines.remove(&(self.deadline(&export), export.id));
        let queue = &self.queues[&key];
        Next::Attempt {
            failing: queue.backoff.failures > 0,
            slow: queue.slow,
            export,
        }
    }

    /// Reports an export back that is finished now; its destination was reached, or never will be.
    pub fn finished(&mut self, key: &QueueKey, took: Duration, now: Millis) {
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        queue.backoff = Backoff::default();
        queue.slow = took > SLOW;
        queue.place = Place::Nowhere;
        self.place(key, now);
    }

    /// Reports an export back whose attempt failed: it is queued again and its queue's new
    /// backoff returned, or it is given up and returned itself.
    ///
    /// # Errors
    /// The export, where it has been tried for long enough.
    pub fn failed(
        &mut self,
        mut export: Export,
        retry: Retry,
        took: Duration,
        chance: f64,
        now: Millis,
    ) -> Result<Backoff, Export> {
        export.attempts += 1;
        let key = export.key.clone();
        let deadline = self.deadline(&export);
        let queue = self.queues.entry(key.clone()).or_default();
        let failures = queue.backoff.failures.saturating_add(1);
        let wait = backoff(failures, chance).max(retry.least_wait);
        queue.backoff = Backoff {
            failures,
            not_before: now.saturating_add(wait),
        };
        queue.slow = took > SLOW;
        queue.place = Place::Nowhere;
        let result = if deadline <= now {
            Err(export)
        } else {
            self.deadlines.insert((deadline, export.id), key.clone());
            if retry.to_end {
                queue.exports.push_back(export);
            } else {
                queue.exports.push_front(export);
            }
            Ok(queue.backoff)
        };
        self.place(&key, now);
        result
    }

    /// How many queues have an export that is not being tried.
    #[cfg(test)]
    fn backlog(&self) -> usize {
        self.queues
            .values()
            .filter(|queue| !queue.exports.is_empty())
            .count()
    }

    fn deadline(&self, export: &Export) -> Millis {
        export.accepted_at.saturating_add(self.give_up_after)
    }

    /// Takes the first export of a queue that is `wanted`.
    fn take(&mut self, key: &QueueKey, wanted: impl Fn(&Export) -> bool) -> Option<Export> {
        let queue = self.queues.get_mut(key)?;
        let at = queue.exports.iter().position(wanted)?;
        queue.exports.remove(at)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::attempt::{Answer, Failure};
    use proptest::prelude::*;
    use std::collections::HashSet;

    const DAY: Millis = 24 * 60 * 60 * 1000;
    const QUICK: Duration = Duration::from_millis(1);
    const DOWN: Retry = Retry {
        to_end: false,
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
            matches!(schedule.next(0, true), Next::Wait(Some(DAY))),
            "one at a time in each"
        );
        schedule.finished(&first.key, QUICK, 0);
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
            let backoff = schedule.failed(tried, DOWN, QUICK, 0.5, now).unwrap();
            assert_eq!(backoff.not_before, now + wait);
            assert!(
                matches!(schedule.next(now + wait - 1, true), Next::Wait(Some(at)) if at == now + wait)
            );
            now += wait;
        }
        for export in &exports {
            let tried = attempt(&mut schedule, now);
            assert_eq!(tried.id, export.id);
            schedule.finished(&tried.key, QUICK, now);
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
        schedule
            .failed(
                tried,
                Retry {
                    to_end: true,
                    ..DOWN
                },
                QUICK,
                0.5,
                0,
            )
            .unwrap();
        assert_eq!(attempt(&mut schedule, 1_000).id, good.id);
        schedule.finished(&good.key, QUICK, 1_000);
        assert_eq!(attempt(&mut schedule, 1_000).id, bad.id);
    }

    #[test]
    fn each_export_is_given_up_at_its_own_time() {
        let mut schedule = schedule();
        let (old, new) = (export(1, 0), export(1, 5_000));
        schedule.add(old.clone(), None, 0);
        schedule.add(new.clone(), None, 5_000);
        let tried = attempt(&mut schedule, 5_000);
        schedule
            .failed(
                tried,
                Retry {
                    least_wait: 2 * DAY,
                    ..DOWN
                },
                QUICK,
                0.5,
                5_000,
            )
            .unwrap();
        assert!(matches!(
            schedule.next(DAY - 1, true),
            Next::Wait(Some(DAY))
        ));
        assert!(
            matches!(schedule.next(DAY, true), Next::GiveUp(export) if export.id == old.id && export.attempts == 1)
        );
        assert!(
            matches!(schedule.next(DAY + 5_000, true), Next::GiveUp(export) if export.id == new.id)
        );
    }

    #[test]
    fn an_attempt_that_fails_after_the_deadline_is_the_last() {
        let mut schedule = schedule();
        schedule.add(export(1, 0), None, 0);
        let tried = attempt(&mut schedule, DAY - 1);
        let given_up = schedule.failed(tried, DOWN, QUICK, 0.5, DAY).unwrap_err();
        assert_eq!(given_up.attempts, 1);
    }

    #[test]
    fn a_restart_goes_on_with_the_stored_backoff_and_trusts_no_wild_clock() {
        let mut schedule = schedule();
        let stored = Backoff {
            failures: 3,
            not_before: 9_000,
        };
        schedule.add(export(1, 0), Some(stored), 5_000);
        schedule.add(export(1, 0), None, 5_000);
        assert!(matches!(
            schedule.next(8_999, true),
            Next::Wait(Some(9_000))
        ));
        let tried = attempt(&mut schedule, 9_000);
        let backoff = schedule.failed(tried, DOWN, QUICK, 0.5, 9_000).unwrap();
        assert_eq!(
            backoff,
            Backoff {
                failures: 4,
                not_before: 17_000
            }
        );

        let wild = Backoff {
            failures: 1,
            not_before: Millis::MAX,
        };
        schedule.add(export(2, 0), Some(wild), 17_000);
        attempt(&mut schedule, 17_000);
        let tried = attempt(&mut schedule, 17_000 + LONGEST_RESUMED);
        assert_eq!(tried.key.owner[0], 2);
    }

    #[test]
    fn an_export_whose_time_was_over_at_a_restart_has_a_last_chance() {
        let mut schedule = schedule();
        let now = 100 * DAY;
        schedule.add(export(1, 0), Some(Backoff::default()), now);
        schedule.add(export(2, 200 * DAY), Some(Backoff::default()), now);
        let tried = attempt(&mut schedule, now);
        let ahead = attempt(&mut schedule, now);
        assert_eq!((tried.key.owner[0], ahead.accepted_at), (1, now));
        schedule
            .failed(
                tried,
                Retry {
                    least_wait: DAY,
                    ..DOWN
                },
                QUICK,
                0.5,
                now,
            )
            .unwrap();
        assert!(matches!(
            schedule.next(now + LAST_CHANCE - 1, true),
            Next::Wait(_)
        ));
        assert!(matches!(
            schedule.next(now + LAST_CHANCE, true),
            Next::GiveUp(_)
        ));
    }

    #[test]
    fn failing_queues_can_be_passed_over() {
        let mut schedule = schedule();
        schedule.add(export(1, 0), None, 0);
        let tried = attempt(&mut schedule, 0);
        schedule
            .failed(tried, DOWN, Duration::from_millis(30), 0.5, 0)
            .unwrap();
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
        for (kind, connected) in [
            (Kind::Dns, false),
            (Kind::Connect, false),
            (Kind::Timeout, true),
            (Kind::Closed, true),
        ] {
            let verdict = retry(&failed(kind, connected), &[], now);
            assert_eq!(
                verdict,
                Some(Retry {
                    to_end: connected,
                    least_wait: 0
                })
            );
        }
        for kind in [
            Kind::Tls,
            Kind::Protocol,
            Kind::ForbiddenAddress,
            Kind::ForbiddenHttp,
        ] {
            assert_eq!(retry(&failed(kind, true), &[], now), None);
        }
        let too_early = retry(&failed(Kind::TlsTooEarly, true), &[], now);
        assert_eq!(too_early, Some(DOWN));
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
        assert_eq!(retry(&answered(None), &[429], now), None);
        for (text, wait) in [
            (None, 0),
            (Some("7"), 7_000),
            (Some("Sun, 06 Nov 1994 08:50:37 GMT"), 60_000),
            (Some("Sun, 06 Nov 1994 08:00:00 GMT"), 0),
            (Some("999999999999"), LONGEST_RETRY_AFTER),
            (Some("soon"), 0),
        ] {
            let verdict = retry(&answered(text), &[429, 503], now);
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
            let wait = backoff(failures, chance);
            let middle = if failures > 10 { LONGEST_WAIT } else { (1000 << (failures - 1)).min(LONGEST_WAIT) };
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
                        schedule.finished(&export.key, QUICK, now);
                    }
                    Event::Fail(at, to_end, chance) if !tried.is_empty() => {
                        let export = tried.swap_remove(at % tried.len());
                        let (owner, id) = (export.key.owner[0], export.id);
                        let queue = order.entry(owner).or_default();
                        if to_end { queue.push_back(id) } else { queue.push_front(id) }
                        let backoff = schedule.failed(export, Retry { to_end, least_wait: 0 }, QUICK, chance, now).unwrap();
                        prop_assert!(backoff.not_before >= now + 800 && backoff.not_before <= now + LONGEST_WAIT * 12 / 10 + 1);
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
}
