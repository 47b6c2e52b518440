//! The worker's side: which export is to be tried next, and what came of it. A report counts at once for
//! the queues and is written soon after; no client sees a result before it is in the store.
//!
//! Not here: whose turn it is ([`super::queues`]), and what counts as a failure (`delivery`).

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::Exports;
use super::acts::running::name_of;
use super::clock::wall_clock;
use super::queues::{Failed, Next, Oldest, Queues, Turn};
use super::store::{self, ExportUpdate, QueueUpdate, Queued, Reader, Report};
use crate::backoff::jitter;
use crate::destination::{BadUrl, Destination};
use crate::export::{
    Export, ExtResponse, FailureReport, LastError, Millis, QueueId, Retry, to_json,
};
use crate::ledger::{Digest, Entry, Event, Sent};

/// What the worker is to do next.
pub enum Work {
    /// Send a queue's next export: see [`Exports::begin`].
    Attempt(Turn),
    /// Give up an export that was tried for long enough: see [`Exports::give_up`].
    GiveUp(Box<GivenUp>),
    /// Wait for news, for at most this long if it is given.
    Wait(Option<Duration>),
}

/// An export that was tried for long enough. It must be finished with [`Exports::give_up`].
#[must_use]
pub struct GivenUp {
    /// Its `attempts` include the last one.
    pub export: Export,
    /// Kind and message of the last failure, if known.
    pub reason: Option<(String, String)>,
    queue_update: QueueUpdate,
    resumes: bool,
    /// The last attempt's, if this one was just made.
    entries: Vec<Entry>,
}

/// An export that is being sent.
pub struct Taken {
    /// Its state in the store, and what is not written yet.
    pub export: Export,
    /// None if it was damaged in the store, or removed by hand.
    pub payload: Option<Vec<u8>>,
}

impl Exports {
    /// Decides what to do next. With `failing` false, queues whose last attempt failed are passed over.
    /// Blocks for a look-up if an export may have been tried for long enough, and while a damaged store
    /// is repaired.
    ///
    /// # Panics
    /// As [`Exports::begin`] does.
    pub fn next(&self, failing: bool) -> Work {
        loop {
            let now = self.running();
            let next = self.queues.lock().next(now, failing);
            match next {
                Next::Attempt(turn) => return Work::Attempt(turn),
                Next::Wait(at) => return Work::Wait(at.map(|at| until(at, now))),
                Next::Overdue { queue, after } => {
                    let oldest = self.read(|reader| reader.oldest(queue, after));
                    if let Some(given_up) = self.overdue(queue, oldest, now) {
                        return Work::GiveUp(Box::new(given_up));
                    }
                }
            }
        }
    }

    /// Takes a queue's oldest export if it was tried for long enough.
    fn overdue(
        &self,
        queue: QueueId,
        oldest: Option<(Queued, bool)>,
        now: Millis,
    ) -> Option<GivenUp> {
        let mut queues = self.queues.lock();
        let Some((mut found, is_first)) = oldest else {
            queues.overdue(queue, None, now);
            return None;
        };
        if let Some(again) = queues.again(queue, found.id) {
            found.attempts = again.attempts;
            found.last_error = queues.error(queue);
        }
        let oldest = Oldest {
            turn: found.turn,
            accepted_at: found.accepted_at.min(now),
            is_first,
        };
        if !queues.overdue(queue, Some(oldest), now) {
            return None;
        }
        let error = found.last_error.take().or_else(|| queues.error(queue));
        let queue_update = unless_done(&queues, queue, QueueUpdate::AsBefore);
        drop(queues);
        match Destination::parse(&found.destination) {
            Ok(destination) => Some(GivenUp {
                export: taken(queue, found, destination, now).export,
                reason: error.and_then(|error| kind_and_message(&error)),
                queue_update,
                resumes: !is_first,
                entries: Vec::new(),
            }),
            Err(bad) => {
                self.refuse(queue, &found, bad, queue_update, !is_first);
                None
            }
        }
    }

    /// Takes the next export of the queue whose turn it is, and marks it as being sent. None, which ends
    /// the turn, if there turns out to be nothing to send or the queue is held since. Blocks for a look-up, and while a damaged store
    /// is repaired.
    ///
    /// # Panics
    /// The store cannot be read. Nothing can be delivered without it, and a restart delivers everything
    /// that has no result.
    pub fn begin(&self, turn: &Turn) -> Option<Taken> {
        let found = self.read(|reader| reader.next(turn.queue, turn.after));
        let now = self.running();
        let mut queues = self.queues.lock();
        let Some(mut found) = found else {
            queues.found_none(turn, now);
            return None;
        };
        if let Some(again) = queues.again(turn.queue, found.id) {
            found.attempts = again.attempts;
            found.first_moved_at = again.first_moved_at;
        }
        if !queues.begin(turn, found.id, found.turn) {
            return None;
        }
        match Destination::parse(&found.destination) {
            Ok(destination) => Some(taken(turn.queue, found, destination, now)),
            Err(bad) => {
                queues.ended(turn.queue, now);
                drop(queues);
                self.refuse(turn.queue, &found, bad, QueueUpdate::AsBefore, false);
                None
            }
        }
    }

    fn read<T>(&self, read: impl Fn(&Reader) -> Result<T, store::Error>) -> T {
        self.read_from(&self.payloads, read)
            .unwrap_or_else(|error| {
                log::error!(reason:% = error; "cannot read the store");
                panic!("what is to be delivered cannot be read");
            })
    }

    /// Finishes an export that its destination has answered. Like all reports, blocks only while too many
    /// wait for the writer, since the disk is slow.
    pub fn answered(&self, export: &Export, result: ExtResponse, sent: Sent, took: Duration) {
        let entry = Entry {
            outcome: result.status_code.to_string(),
            attempt: Some(sent),
            delivered: Some(true),
            ..self.entry(Event::Attempt, export)
        };
        let now = self.running();
        self.metrics
            .delivery(self.now(), now.saturating_sub(export.accepted_at));
        let was_failing = self.queues.lock().answered(export.queue, took, now);
        let queue_update = match was_failing {
            true => QueueUpdate::Recovered,
            false => QueueUpdate::AsBefore,
        };
        self.finish(export, result, queue_update, false, vec![entry]);
    }

    /// Finishes an export whose attempt failed in a way that no retry could change.
    pub fn ended(&self, export: &Export, result: ExtResponse, sent: Sent) {
        let entry = Entry {
            outcome: kind_of(&result),
            attempt: Some(sent),
            delivered: Some(false),
            ..self.entry(Event::Attempt, export)
        };
        log_end(export.id, &entry.destination, &result);
        self.metrics.failed.one();
        let mut queues = self.queues.lock();
        queues.ended(export.queue, self.running());
        let queue_update = unless_done(&queues, export.queue, QueueUpdate::AsBefore);
        drop(queues);
        self.finish(export, result, queue_update, false, vec![entry]);
    }

    /// Reports a failed attempt, whose `outcome` is the kind of the failure or the status that counts as one. The export is queued again, or returned for the caller to give up if it
    /// was tried for long enough.
    pub fn failed(
        &self,
        mut export: Export,
        retry: Retry,
        error: &LastError<'_>,
        outcome: String,
        sent: Sent,
        took: Duration,
    ) -> Option<GivenUp> {
        let entry = Entry {
            outcome,
            attempt: Some(sent),
            ..self.entry(Event::Attempt, &export)
        };
        let now = self.running();
        let error = to_json(error);
        let mut queues = self.queues.lock();
        let Failed { backoff, given_up } =
            queues.failed(&mut export, retry, error.clone(), took, jitter(), now);
        let queue_update = QueueUpdate::Failing(backoff, error.clone());
        if given_up {
            return Some(GivenUp {
                reason: kind_and_message(&error),
                queue_update: unless_done(&queues, export.queue, queue_update),
                export,
                resumes: false,
                entries: vec![entry],
            });
        }
        drop(queues);
        self.report(Report {
            id: export.id,
            seq: export.seq,
            queue: export.queue,
            update: ExportUpdate::Rescheduled {
                attempts: export.attempts,
                error,
                to_end: retry.to_end,
                first_moved_at: export.first_moved_at,
            },
            queue_update,
            entries: vec![entry],
        });
        None
    }

    /// Finishes an export that was tried for long enough.
    pub fn give_up(&self, given_up: GivenUp, result: ExtResponse) {
        let GivenUp {
            export,
            queue_update,
            resumes,
            mut entries,
            ..
        } = given_up;
        self.metrics.given_up.one();
        let entry = Entry {
            outcome: kind_of(&result),
            delivered: Some(false),
            ..self.entry(Event::GivenUp, &export)
        };
        log_end(export.id, &entry.destination, &result);
        entries.push(entry);
        self.finish(&export, result, queue_update, resumes, entries);
    }

    /// Finishes an export whose URL an earlier release accepted and this one refuses.
    fn refuse(
        &self,
        queue: QueueId,
        found: &Queued,
        bad: BadUrl,
        queue_update: QueueUpdate,
        resumes: bool,
    ) {
        self.metrics.failed.one();
        let result = ExtResponse {
            error: Some(FailureReport {
                kind: "bad_uri".into(),
                message: format!("the uri that was accepted by an earlier version {bad}"),
                attempts: found.attempts,
            }),
            ..ExtResponse::with_status(502, "Bad Gateway")
        };
        let entry = Entry {
            export: Some(found.id),
            who: found.who.clone(),
            outcome: kind_of(&result),
            delivered: Some(false),
            ..Entry::new(Event::GivenUp, wall_clock())
        };
        log_end(found.id, &entry.destination, &result);
        self.report(Report {
            id: found.id,
            seq: found.seq,
            queue,
            update: finished(result, resumes),
            queue_update,
            entries: vec![entry],
        });
    }

    /// The digest of a payload by this box's own key.
    pub fn digest(&self, payload: &[u8]) -> Digest {
        self.ledger_key.digest(payload)
    }

    /// How the ledger names a destination: see `acts::running`.
    pub(super) fn destination_name(&self, url: &str) -> String {
        name_of(&self.ledger_key, url)
    }

    fn entry(&self, event: Event, export: &Export) -> Entry {
        Entry {
            export: Some(export.id),
            who: export.who.clone(),
            destination: self.ledger_key.name(&export.destination),
            ..Entry::new(event, wall_clock())
        }
    }

    fn finish(
        &self,
        export: &Export,
        result: ExtResponse,
        queue_update: QueueUpdate,
        resumes: bool,
        entries: Vec<Entry>,
    ) {
        self.report(Report {
            id: export.id,
            seq: export.seq,
            queue: export.queue,
            update: finished(result, resumes),
            queue_update,
            entries,
        });
    }

    fn report(&self, report: Report) {
        let is_awaited = self.parked.is_awaited(report.id);
        // Fails only when the process exits without waiting for the worker; else the writer ends last.
        let _ = self.reports.send(report);
        if is_awaited {
            let _ = self.awaited.try_send(());
        }
    }
}

/// What is stored of a queue. The backoff of one without exports is not remembered beyond this run.
fn unless_done(queues: &Queues, queue: QueueId, update: QueueUpdate) -> QueueUpdate {
    match queues.is_done(queue) {
        true => QueueUpdate::Recovered,
        false => update,
    }
}

fn finished(result: ExtResponse, resumes: bool) -> ExportUpdate {
    ExportUpdate::Finished {
        response: to_json(&result),
        memory: result.memory,
        resumes,
    }
}

/// Logs that an export ended without an answer. Its destination is named as the owner's commands take it.
fn log_end(id: Uuid, destination: &str, result: &ExtResponse) {
    if let Some(error) = &result.error {
        log::error!(
            id:%, destination, kind = error.kind.as_str(), reason = error.message.as_str(),
            attempts = error.attempts;
            "given up"
        );
    }
}

/// The kind of failure that a result tells.
fn kind_of(result: &ExtResponse) -> String {
    let error = result.error.as_ref();
    error.map_or_else(String::new, |error| error.kind.clone())
}

/// What the worker gets of a row.
fn taken(queue: QueueId, found: Queued, destination: Destination, now: Millis) -> Taken {
    let export = Export {
        id: found.id,
        seq: found.seq,
        queue,
        turn: found.turn,
        who: found.who,
        destination,
        // A little running time is lost where the service was killed.
        accepted_at: found.accepted_at.min(now),
        attempts: found.attempts,
        first_moved_at: found.first_moved_at,
    };
    Taken {
        export,
        payload: found.payload,
    }
}

/// Kind and message of a stored error.
pub(super) fn kind_and_message(error: &RawValue) -> Option<(String, String)> {
    #[derive(Deserialize)]
    struct Stored {
        kind: String,
        message: String,
    }
    let Stored { kind, message } = serde_json::from_str(error.get()).ok()?;
    Some((kind, message))
}

fn until(at: Millis, now: Millis) -> Duration {
    Duration::from_millis(at.saturating_sub(now).max(0).unsigned_abs())
}
