//! Acts on many exports, in steps of a commit each, with other writes in between, so that no submission waits for
//! all of it. A queue is locked while its exports are cancelled.
//!
//! Not here: acts of a single commit ([`super::running`]).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::running::{FINISHED, Named, ON_WIRE, acted, described, exports};
use super::subject::Subject;
use super::{ActError, Acted};
use crate::export::{ExtResponse, FailureReport, QueueId, View, to_json};
use crate::exports::clock::wall_clock;
use crate::exports::store::acts::{STEP, Waiting};
use crate::exports::writer::Writer;
use crate::ledger::{Entry, Event};

/// How long an act waits for results that were reported to be in the store.
const SETTLE: Duration = Duration::from_secs(10);
/// The longest sleep while an act waits for that.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// An act on many exports that is under way.
pub struct Bulk {
    reply: Sender<Result<Acted, ActError>>,
    subject: Subject,
    kind: Kind,
    /// The queues that are still to be looked at, the last one first.
    queues: Vec<Named>,
    /// All queues of the subject.
    ids: HashSet<QueueId>,
    /// Exports behind this position were accepted after the act, which does not mean them.
    until: i64,
    /// When the last of `queues` was locked.
    locked_at: Option<Instant>,
    /// Whether that queue has been settled since.
    settled: bool,
    stage: Stage,
    cancelled: u64,
    on_wire: u64,
    deleted: u64,
}

/// What is to be done with the exports.
#[derive(Clone, Copy)]
enum Kind {
    CancelOne(Uuid),
    Cancel,
    Forget,
}

/// An act cancels what is in its queues, one after the other; then it may delete results, and then rows of the
/// ledger. The numbers are the last rows that were looked at.
#[derive(Clone, Copy)]
enum Stage {
    Cancelling,
    Deleting(i64),
    Forgetting(i64),
}

/// What follows from a step.
enum Step {
    /// The next one can be done at once.
    Next,
    /// Reports have to be written first.
    Wait,
    /// It was the last one.
    Done(String),
}

impl Writer {
    /// Begins to cancel one export.
    pub(super) fn bulk_of_one(
        &self,
        id: Uuid,
        reply: &Sender<Result<Acted, ActError>>,
    ) -> Result<Bulk, ActError> {
        let found = self.unfinished(id, false)?;
        let queue = Named {
            id: found.queue,
            destination: self.name_of(&found.url),
            who: found.who,
        };
        Ok(Bulk::new(
            Kind::CancelOne(id),
            Subject::All,
            vec![queue],
            i64::MAX,
            reply,
        ))
    }

    /// Begins to cancel all of a subject, or to forget it.
    pub(super) fn bulk_of(
        &self,
        text: &str,
        forgets: bool,
        reply: &Sender<Result<Acted, ActError>>,
    ) -> Result<Bulk, ActError> {
        let subject = self.subject(text)?;
        if subject == Subject::All {
            return Err(ActError::Malformed(
                "say which destination or which sender".into(),
            ));
        }
        let queues = self.matching(&subject)?;
        let kind = match forgets {
            true => Kind::Forget,
            false => Kind::Cancel,
        };
        Ok(Bulk::new(
            kind,
            subject,
            queues,
            self.store.last_turn(),
            reply,
        ))
    }

    /// How long the writer may sleep: not at all if an act can go on.
    pub(in crate::exports) fn until_next_step(&self) -> Duration {
        match &self.bulk {
            None => Duration::MAX,
            Some(bulk) if bulk.waits() => LOOK_AGAIN,
            Some(_) => Duration::ZERO,
        }
    }

    /// Carries out the next step of an act, if there is one under way.
    pub(in crate::exports) fn continue_act(&mut self) {
        let Some(mut bulk) = self.bulk.take() else {
            return;
        };
        let held = self.exports.clone();
        let commits = held.hold_checkpoints();
        let step = match bulk.stage {
            Stage::Cancelling => self.cancel_some(&mut bulk),
            Stage::Deleting(after) => self.delete_some(&mut bulk, after),
            Stage::Forgetting(after) => self.forget_some(&mut bulk, after),
        };
        drop(commits);
        self.wrote();
        match step {
            Ok(Step::Next | Step::Wait) => self.bulk = Some(bulk),
            Ok(Step::Done(done)) => self.answer(&bulk.reply, Ok(acted(done))),
            Err(error) => {
                self.unlock(&mut bulk);
                self.answer(&bulk.reply, Err(error));
            }
        }
    }

    fn unlock(&self, bulk: &mut Bulk) {
        if bulk.locked_at.take().is_some()
            && let Some(queue) = bulk.queues.last()
        {
            self.exports
                .queues
                .lock()
                .unlock(queue.id, self.exports.running());
            self.exports.wake_worker();
        }
    }

    /// Cancels some exports of the first queue that is left.
    fn cancel_some(&mut self, bulk: &mut Bulk) -> Result<Step, ActError> {
        let Some(queue) = bulk.queues.last().cloned() else {
            return Ok(match bulk.kind {
                Kind::Forget => {
                    bulk.stage = Stage::Deleting(i64::MIN);
                    Step::Next
                }
                Kind::Cancel if bulk.cancelled == 0 && bulk.on_wire == 0 => {
                    return Err(ActError::NotFound(format!(
                        "nothing waits of {}",
                        bulk.subject
                    )));
                }
                Kind::Cancel | Kind::CancelOne(_) => Step::Done(bulk.told()),
            });
        };
        let mut queues = self.exports.queues.lock();
        if bulk.locked_at.is_none() {
            if !queues.lock(queue.id) {
                bulk.queues.pop();
                return Ok(Step::Next);
            }
            bulk.locked_at = Some(Instant::now());
        }
        let (is_settled, (after, on_wire)) = (queues.is_settled(queue.id), queues.cursor(queue.id));
        drop(queues);
        // From here on the queue only changes by what this thread does, and by the end of an attempt under way.
        if !is_settled && bulk.has_waited_too_long() {
            return Err(ActError::Conflict(format!(
                "the disk is slow to take results: {} so far, try again",
                bulk.told()
            )));
        }
        if !is_settled {
            return Ok(Step::Wait);
        }
        bulk.settled = true;
        let only = match bulk.kind {
            Kind::CancelOne(id) => Some(id),
            Kind::Cancel | Kind::Forget => None,
        };
        if only.is_some() && only == on_wire {
            return Err(ActError::Conflict(ON_WIRE.into()));
        }
        let waiting = self.store.waiting(queue.id, after, bulk.until, only)?;
        if only.is_some() && waiting.is_empty() {
            return Err(ActError::Conflict(FINISHED.into()));
        }
        let is_last = waiting.len() < STEP;
        self.cancel(bulk, &queue, waiting)?;
        if is_last {
            bulk.on_wire += u64::from(on_wire.is_some());
            self.unlock(bulk);
            bulk.settled = false;
            bulk.queues.pop();
        }
        Ok(Step::Next)
    }

    fn cancel(
        &mut self,
        bulk: &mut Bulk,
        queue: &Named,
        waiting: Vec<Waiting>,
    ) -> Result<(), ActError> {
        if waiting.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> = match bulk.kind {
            // One that names nobody. Should this be the last step before a kill, it is on record.
            Kind::Forget => vec![Entry {
                note: format!("{} cancelled", exports(waiting.len() as u64)),
                ..Entry::new(Event::Forget, wall_clock())
            }],
            Kind::Cancel | Kind::CancelOne(_) => {
                let entry = |export: &Waiting| Entry {
                    export: Some(export.id),
                    who: queue.who.clone(),
                    destination: queue.destination.clone(),
                    outcome: KIND.into(),
                    ..Entry::new(Event::Cancel, wall_clock())
                };
                waiting.iter().map(entry).collect()
            }
        };
        let with_results = waiting.into_iter().map(|export| {
            let result = result(export.attempts);
            (export, result)
        });
        let cancelled: Vec<_> = with_results.collect();
        let is_empty = self.exports.queues.lock().unfinished_in(queue.id) == cancelled.len();
        self.store
            .cancel(queue.id, &cancelled, is_empty, &entries, self.exports.now())?;
        bulk.cancelled += cancelled.len() as u64;
        self.exports.metrics.cancelled.add(cancelled.len() as u64);
        let mut queues = self.exports.queues.lock();
        for (export, _) in &cancelled {
            queues.cancelled(queue.id, export.id);
        }
        drop(queues);
        for (export, result) in cancelled {
            for reply in self.exports.parked.take(export.id) {
                reply.answer(Ok(View::finished(export.id, result.clone())));
            }
        }
        Ok(())
    }

    fn delete_some(&mut self, bulk: &mut Bulk, after: i64) -> Result<Step, ActError> {
        let (deleted, next) = self.store.delete_results(&bulk.ids, after)?;
        bulk.deleted += deleted as u64;
        bulk.stage = match next {
            Some(next) => Stage::Deleting(next),
            None => Stage::Forgetting(0),
        };
        Ok(Step::Next)
    }

    fn forget_some(&mut self, bulk: &mut Bulk, after: i64) -> Result<Step, ActError> {
        let matches = |who: &str, destination: &str| bulk.subject.matches(who, destination);
        if let Some(next) = self.store.forget_rows(after, matches, self.exports.now())? {
            bulk.stage = Stage::Forgetting(next);
            return Ok(Step::Next);
        }
        // It does not name what is forgotten.
        let entry = Entry {
            note: bulk.told(),
            ..Entry::new(Event::Forget, wall_clock())
        };
        self.store.forget_names(matches, &entry)?;
        Ok(Step::Done(format!(
            "{} is forgotten: {}",
            described(&bulk.subject),
            bulk.told()
        )))
    }
}

impl Bulk {
    fn new(
        kind: Kind,
        subject: Subject,
        queues: Vec<Named>,
        until: i64,
        reply: &Sender<Result<Acted, ActError>>,
    ) -> Self {
        Self {
            reply: reply.clone(),
            subject,
            kind,
            ids: queues.iter().map(|queue| queue.id).collect(),
            queues,
            until,
            locked_at: None,
            settled: false,
            stage: Stage::Cancelling,
            cancelled: 0,
            on_wire: 0,
            deleted: 0,
        }
    }

    /// Whether reports have to be written before it can go on.
    fn waits(&self) -> bool {
        self.locked_at.is_some() && !self.settled
    }

    fn has_waited_too_long(&self) -> bool {
        self.locked_at.is_some_and(|at| at.elapsed() > SETTLE)
    }

    /// What was done so far.
    fn told(&self) -> String {
        let mut told = format!("{} cancelled", exports(self.cancelled));
        if let Kind::Forget = self.kind {
            // Those that were just cancelled have results too.
            let results = self.deleted.saturating_sub(self.cancelled);
            told += &format!(", {results} results deleted");
        }
        match self.on_wire {
            0 => {}
            count => {
                told += &format!(
                    ", {} left that may be on the way now: look again in a minute",
                    exports(count)
                )
            }
        }
        told
    }
}

/// The kind of failure that the result of a cancelled export tells.
const KIND: &str = "cancelled";

/// The result of an export that was cancelled.
fn result(attempts: u32) -> Arc<RawValue> {
    to_json(&ExtResponse {
        error: Some(FailureReport {
            kind: KIND.into(),
            message: "cancelled by the owner of this box".into(),
            attempts,
        }),
        ..ExtResponse::with_status(403, "Forbidden")
    })
}
