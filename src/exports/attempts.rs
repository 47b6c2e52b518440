//! What the worker asks for and reports: which export is to be tried, and what came of it. What it
//! reports counts at once, and is written soon; nobody is shown a result before it is in the store.
//!
//! Not here: whose turn it is ([`super::queues`]), and what counts as a failure (`delivery`).

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::queues::{Failed, Next, Oldest, Turn};
use super::store::{self, News, QueueNews, Queued, Reader, Report};
use super::{Exports, raw};
use crate::backoff::chance;
use crate::destination::{BadUrl, Destination};
use crate::export::{Export, ExtResponse, FailureReport, LastError, Millis, QueueId, Retry};

/// What there is to do for the worker.
pub enum Work {
    /// A queue has its turn: see [`Exports::begin`].
    Attempt(Turn),
    /// An export was tried for long enough: see [`Exports::give_up`].
    GiveUp(GivenUp),
    /// Nothing, for so long at the most.
    Wait(Option<Duration>),
}

/// An export that was tried for long enough, and has to be finished.
#[must_use]
pub struct GivenUp {
    /// Which export.
    pub export: Export,
    /// Kind and message of why it was not delivered, where that is known.
    pub reason: Option<(String, String)>,
    queue_news: QueueNews,
    resumes: bool,
}

/// An export that is on the wire.
pub struct Taken {
    /// Which export.
    pub export: Export,
    /// What goes to its destination; none where that was damaged, or somebody took it away.
    pub payload: Option<Vec<u8>>,
}

impl Exports {
    /// Decides what there is to do. With `failing` false, queues whose last attempt failed are passed
    /// over. Blocks for a look-up where an export may have been tried for long enough, and while a
    /// damaged store is mended.
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
                        return Work::GiveUp(given_up);
                    }
                }
            }
        }
    }

    /// Takes a queue's oldest export, if it was tried for long enough.
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
        let queue_news = match queues.is_done(queue) {
            // A queue that has no exports is not remembered beyond this run.
            true => QueueNews::Recovered,
            false => QueueNews::AsBefore,
        };
        drop(queues);
        match Destination::parse(&found.destination) {
            Ok(destination) => Some(GivenUp {
                export: taken(queue, found, destination, now).export,
                reason: error.and_then(|error| words(&error)),
                queue_news,
                resumes: !is_first,
            }),
            Err(bad) => {
                self.refuse(queue, &found, bad, queue_news, !is_first);
                None
            }
        }
    }

    /// Takes the next export of a queue that has its turn: it is on the wire from now on. None where it
    /// turns out that there is none to send; the turn is over then. Blocks for a look-up, and while a
    /// damaged store is mended.
    ///
    /// # Panics
    /// Where the store cannot be read: without it there is nothing left to deliver, and after a
    /// restart all that has no result is delivered again.
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
        queues.begin(turn, found.id, found.turn);
        match Destination::parse(&found.destination) {
            Ok(destination) => Some(taken(turn.queue, found, destination, now)),
            Err(bad) => {
                queues.ended(turn.queue, now);
                drop(queues);
                self.refuse(turn.queue, &found, bad, QueueNews::AsBefore, false);
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

    /// Finishes an export that its destination has answered. Blocks only while the store is far behind,
    /// like all of these.
    pub fn answered(&self, export: &Export, result: ExtResponse, took: Duration) {
        let now = self.running();
        let was_failing = self.queues.lock().answered(export.queue, took, now);
        let queue_news = match was_failing {
            true => QueueNews::Recovered,
            false => QueueNews::AsBefore,
        };
        self.finish(export, result, queue_news, false);
    }

    /// Finishes an export that ended without an answer, by a failure that no other try could change.
    pub fn ended(&self, export: &Export, result: ExtResponse) {
        let mut queues = self.queues.lock();
        queues.ended(export.queue, self.running());
        let queue_news = match queues.is_done(export.queue) {
            true => QueueNews::Recovered,
            false => QueueNews::AsBefore,
        };
        drop(queues);
        self.finish(export, result, queue_news, false);
    }

    /// Reports an attempt that failed: the export is queued again, or it was tried for long enough, and
    /// is to be given up by who asks.
    pub fn failed(
        &self,
        mut export: Export,
        retry: Retry,
        error: &LastError<'_>,
        took: Duration,
    ) -> Option<GivenUp> {
        let now = self.running();
        let error = raw(error);
        let mut queues = self.queues.lock();
        let Failed { backoff, given_up } =
            queues.failed(&mut export, retry, error.clone(), took, chance(), now);
        let is_done = queues.is_done(export.queue);
        drop(queues);
        if given_up {
            return Some(GivenUp {
                reason: words(&error),
                export,
                queue_news: match is_done {
                    true => QueueNews::Recovered,
                    false => QueueNews::Failing(backoff, error),
                },
                resumes: false,
            });
        }
        self.report(Report {
            id: export.id,
            seq: export.seq,
            queue: export.queue,
            news: News::Rescheduled {
                attempts: export.attempts,
                error: error.clone(),
                to_end: retry.to_end,
                first_moved_at: export.first_moved_at,
            },
            queue_news: QueueNews::Failing(backoff, error),
        });
        None
    }

    /// Finishes an export that was tried for long enough.
    pub fn give_up(&self, given_up: GivenUp, result: ExtResponse) {
        let GivenUp {
            export,
            queue_news,
            resumes,
            ..
        } = given_up;
        self.finish(&export, result, queue_news, resumes);
    }

    /// Finishes an export whose URL is no longer taken: an earlier release has let it in.
    fn refuse(
        &self,
        queue: QueueId,
        found: &Queued,
        bad: BadUrl,
        queue_news: QueueNews,
        resumes: bool,
    ) {
        log::warn!(id:% = found.id, reason:% = format_args!("its uri {bad}"); "cannot be delivered");
        let result = ExtResponse {
            error: Some(FailureReport {
                kind: "bad_uri".into(),
                message: format!("the uri that was accepted by an earlier version {bad}"),
                attempts: found.attempts,
            }),
            ..ExtResponse::with_status(502, "Bad Gateway")
        };
        self.report(Report {
            id: found.id,
            seq: found.seq,
            queue,
            news: finished(result, resumes),
            queue_news,
        });
    }

    fn finish(&self, export: &Export, result: ExtResponse, queue_news: QueueNews, resumes: bool) {
        self.report(Report {
            id: export.id,
            seq: export.seq,
            queue: export.queue,
            news: finished(result, resumes),
            queue_news,
        });
    }

    fn report(&self, report: Report) {
        let is_awaited = self.parked.is_awaited(report.id);
        // The writer ends after the worker, unless the process is being left in a hurry.
        let _ = self.reports.send(report);
        if is_awaited {
            let _ = self.awaited.try_send(());
        }
    }
}

fn finished(result: ExtResponse, resumes: bool) -> News {
    News::Finished {
        response: raw(&result),
        memory: result.memory,
        resumes,
    }
}

/// What was found, as the worker gets it.
fn taken(queue: QueueId, found: Queued, destination: Destination, now: Millis) -> Taken {
    let export = Export {
        id: found.id,
        seq: found.seq,
        queue,
        turn: found.turn,
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
fn words(error: &RawValue) -> Option<(String, String)> {
    #[derive(Deserialize)]
    struct Words {
        kind: String,
        message: String,
    }
    let Words { kind, message } = serde_json::from_str(error.get()).ok()?;
    Some((kind, message))
}

fn until(at: Millis, now: Millis) -> Duration {
    Duration::from_millis(at.saturating_sub(now).max(0).unsigned_abs())
}
