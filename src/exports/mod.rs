//! The life of an export: submitted, polled, settled.
//!
//! [`Exports`] is what requests and the worker share. A submission goes to the [`recorder`], which
//! writes everything that waits in one transaction, tells the worker, and only then answers:
//! accepted means durable. Unfinished exports are in [`states`] and in the store,
//! finished ones in the store alone.
//!
//! Not here: HTTP (`routes`, `server`), and how a payload reaches its destination (`delivery`).

mod folder;
pub mod recorder;
mod salvage;
pub mod states;
pub mod store;
mod wal;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Sender, TrySendError, bounded};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::auth::Grant;
use crate::destination::{BadUrl, Destination};
use crate::export::{Backoff, Delay, Error, Export, ExtResponse, FailureReport};
use crate::export::{Millis, QueueKey, View};
use recorder::Recorder;
pub use states::Reply;
use states::{Poll, Progress, States, Trouble};
use store::{Change, IdempotencyKey, NewExport, News, QueueNews, Reader, Report};
use store::{Stored, StoredQueue, Unfinished, Writer};

/// Submissions that may wait for the recorder; with more the disk is not keeping up.
const WAITING: usize = 1024;
/// Bytes of payload that may wait for the recorder.
const WAITING_BYTES: usize = 16 * 1024 * 1024;
/// Reports that may wait for the recorder, before the worker waits for it too.
const UNWRITTEN_REPORTS: usize = 64;

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Full => Self::DiskFull,
            store::Error::Damaged | store::Error::InUse | store::Error::Failed(_) => Self::Storage,
        }
    }
}

/// A checked request for a new export.
pub struct Submission {
    /// Whose it is: the macaroon's identifier.
    pub owner: Vec<u8>,
    /// Where it goes, which the token allows.
    pub destination: Destination,
    /// What goes there, byte for byte.
    pub payload: Vec<u8>,
    /// The client's key for repeats of this submission.
    pub idempotency_key: Option<String>,
}

/// A checked request for the state of an export.
pub struct Query {
    /// Which export.
    pub id: Uuid,
    /// What the caller's token allows.
    pub grant: Grant,
    /// The destination that the caller says it has, if it says one.
    pub destination: Option<String>,
}

impl Query {
    fn may_see(&self, owner: &[u8], destination: &str) -> bool {
        self.grant.owner() == owner
            && self.grant.allows(destination)
            && self
                .destination
                .as_ref()
                .is_none_or(|said| said == destination)
    }
}

/// An export on its way to the worker. Its payload is still in the store.
pub struct Queued {
    /// Which export.
    pub export: Export,
    /// Its queue's backoff, where a restart found one stored.
    pub resume: Option<Backoff>,
}

/// How much may wait or be kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Unfinished exports of one queue.
    pub max_pending: usize,
    /// Bytes that all exports and results together take in the store.
    pub max_store: u64,
}

/// See the module's own text. Shared by the pool, the worker, the waiter and the recorder.
pub struct Exports {
    states: States,
    clock: Clock,
    accepts: Sender<Accept>,
    waiting_bytes: AtomicUsize,
    reports: Sender<Report>,
    /// For polls of finished exports.
    finished: Mutex<Reader>,
    /// For the worker, so that a large payload does not hold up polls.
    payloads: Mutex<Reader>,
    /// For the recorder, who mends the store.
    damage: Sender<Damage>,
    /// How often it was mended.
    mended: AtomicUsize,
}

/// The store was found to be damaged.
struct Damage {
    /// How often it had been mended before.
    mended: usize,
    /// Dropped when it has been mended, or could not be.
    done: Sender<()>,
}

struct Accept {
    export: NewExport,
    received: Instant,
    deadline: Instant,
    reply: Reply,
}

impl Exports {
    /// Takes over an opened store and queues every unfinished export in it, oldest first.
    /// The second half is for the thread that runs [`Recorder::run`].
    ///
    /// # Errors
    /// Where the store cannot be read, or not be written although that is needed.
    pub fn open(
        mut writer: Writer,
        retention: Duration,
        limits: Limits,
        queue: Sender<Queued>,
    ) -> Result<(Arc<Self>, Recorder), store::Error> {
        let (accepts, incoming) = bounded(WAITING);
        let (reports, reported) = bounded(UNWRITTEN_REPORTS);
        let (damage, damaged) = bounded(UNWRITTEN_REPORTS);
        let exports = Arc::new(Self {
            states: States::default(),
            clock: Clock::new(writer.running()),
            accepts,
            waiting_bytes: AtomicUsize::new(0),
            reports,
            finished: Mutex::new(writer.reader()?),
            payloads: Mutex::new(writer.reader()?),
            damage,
            mended: AtomicUsize::new(0),
        });
        let resume = |export: Unfinished| exports.resume(export, &queue);
        let refused = match writer.unfinished(resume) {
            Err(store::Error::Damaged) => {
                exports.mend(&mut writer)?;
                // Those that were found before the damage are queued already, and stand first again.
                writer.unfinished(|export| {
                    if !exports.states.knows(export.id) {
                        exports.resume(export, &queue);
                    }
                })
            }
            found => found,
        }?;
        for (id, bad) in refused {
            log::warn!(id:%, reason:% = format_args!("its uri {bad}"); "cannot be delivered");
            let report = Report {
                id,
                news: News::Finished {
                    response: raw(&refused_now(bad)),
                    memory: None,
                },
                queue: QueueNews::AsBefore,
            };
            let (now, running) = (exports.now(), exports.running());
            writer.commit(&[Change::Report(&report)], now, running, |_| Ok(()))?;
        }
        let thread = Recorder {
            exports: exports.clone(),
            writer,
            retention,
            limits,
            queue,
            incoming,
            reported,
            damaged,
            mend_again_at: Instant::now(),
            accepts: Vec::new(),
            reports: Vec::new(),
            disk_full: false,
        };
        Ok((exports, thread))
    }

    /// What time it is, for what is kept by the wall clock: Unix milliseconds.
    pub fn now(&self) -> Millis {
        self.clock.now()
    }

    /// For how long the service has run, all its runs together, in milliseconds.
    pub fn running(&self) -> Millis {
        self.clock.running()
    }

    /// How many exports are not finished.
    pub fn unfinished(&self) -> usize {
        self.states.count()
    }

    /// Submits a new export. `reply` is called once it is durable, or at `deadline` or when it is
    /// finished, whichever is first, if `deadline` lies after that; but at once where its queue is
    /// held up for longer. Does not block.
    pub fn submit(
        &self,
        submission: Submission,
        received: Instant,
        deadline: Instant,
        reply: Reply,
    ) {
        let Submission {
            owner,
            destination,
            payload,
            idempotency_key,
        } = submission;
        let bytes = payload.len();
        let key = idempotency_key.map(|key| {
            let fingerprint = fingerprint(&destination, &payload);
            IdempotencyKey { key, fingerprint }
        });
        let export = NewExport {
            id: Uuid::now_v7(),
            owner,
            destination,
            payload,
            accepted_at: self.now(),
            running: self.running(),
            key,
        };
        // Relaxed: a count that nothing else is ordered by.
        if self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) > WAITING_BYTES {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return reply(Err(Error::Overloaded));
        }
        match self.accepts.try_send(Accept {
            export,
            received,
            deadline,
            reply,
        }) {
            Ok(()) => {}
            Err(TrySendError::Full(accept) | TrySendError::Disconnected(accept)) => {
                self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
                (accept.reply)(Err(Error::Overloaded));
            }
        }
    }

    /// Looks at an export. `reply` is called at once if it is finished or not to be seen, else
    /// when it is finished or at `deadline`, whichever is first. Blocks for one look-up at most.
    pub fn poll(&self, query: &Query, deadline: Instant, reply: Reply) {
        let may_see = |owner: &[u8], destination: &str| query.may_see(owner, destination);
        match self.states.poll(query.id, may_see, deadline, reply) {
            Poll::Parked => {}
            Poll::Now(reply, answer) => reply(answer),
            Poll::Elsewhere(reply) => {
                let mended = self.mended.load(Ordering::Acquire);
                let found = self.finished.lock().find(query.id);
                if matches!(found, Err(store::Error::Damaged)) {
                    let (done, _) = bounded(0);
                    // Where many wait already, this one is not needed.
                    let _ = self.damage.try_send(Damage { mended, done });
                }
                reply(match found {
                    // Without a result it would be among the states, but for the moment between
                    // a submission's commit and its reply, when nobody knows its id.
                    Ok(Some(Stored {
                        owner,
                        destination,
                        response: Some(response),
                    })) if may_see(&owner, &destination) => Ok(View::finished(query.id, response)),
                    Ok(_) => Err(Error::NotFound),
                    Err(error) => {
                        log::error!(reason:% = error; "cannot read the store");
                        Err(error.into())
                    }
                });
            }
        }
    }

    /// Marks an export as on the wire and gets its payload from the store; `None` where somebody
    /// took it away, or it was damaged. For the worker. Blocks while a damaged store is mended.
    ///
    /// # Panics
    /// Where the store cannot be read: without it there is nothing left to deliver, and after a
    /// restart the export is queued again.
    pub fn begin(&self, id: Uuid) -> Option<Vec<u8>> {
        self.states.begin(id);
        let mended = self.mended.load(Ordering::Acquire);
        let mut read = self.payloads.lock().payload(id);
        if matches!(read, Err(store::Error::Damaged)) {
            let (done, wait) = bounded(0);
            // The recorder is there for longer than the worker, or drops `done`.
            let _ = self.damage.send(Damage { mended, done });
            let _ = wait.recv();
            read = self.payloads.lock().payload(id);
        }
        read.unwrap_or_else(|error| {
            log::error!(id:%, reason:% = error; "cannot read a payload from the store");
            panic!("a payload cannot be read");
        })
    }

    /// Mends the store, which nobody can read meanwhile.
    fn mend(&self, writer: &mut Writer) -> Result<(), store::Error> {
        let (mut finished, mut payloads) = (self.finished.lock(), self.payloads.lock());
        let done = writer.mend([&mut finished, &mut payloads]);
        match &done {
            Ok(()) => {
                self.mended.fetch_add(1, Ordering::AcqRel);
            }
            Err(error) => log::error!("{}", store::cannot_mend(writer.path(), error)),
        }
        done
    }

    /// Hands over an export's result. It is shown to nobody before it is in the store. Blocks
    /// only while the store is far behind. `answered` says that its destination was reached, so
    /// that its queue waits no longer. For the worker.
    pub fn settle(&self, id: Uuid, result: ExtResponse, answered: bool) {
        if answered {
            self.states.recover(id);
        }
        let queue = if answered {
            QueueNews::Forgotten
        } else {
            QueueNews::AsBefore
        };
        self.finished(id, result, queue);
    }

    /// The same for an export that was tried for long enough, after an attempt that has just
    /// failed or while it waited. `last` says that no other is left in its queue. For the worker.
    pub fn give_up(
        &self,
        export: &Export,
        result: ExtResponse,
        delay: Option<&Delay<'_>>,
        last: bool,
    ) {
        let delay = delay.map(|delay| (delay.backoff, self.delay(&export.key, delay)));
        let queue = match delay {
            // A queue that has no exports is not remembered beyond this run.
            _ if last => QueueNews::Forgotten,
            Some((backoff, error)) => QueueNews::Failing(backoff, error),
            None => QueueNews::AsBefore,
        };
        self.finished(export.id, result, queue);
    }

    fn finished(&self, id: Uuid, result: ExtResponse, queue: QueueNews) {
        let news = News::Finished {
            response: raw(&result),
            memory: result.memory,
        };
        self.report(Report { id, news, queue });
    }

    /// Hands over that an export was tried in vain and is queued again, at the end where it was
    /// moved there. Blocks only while the store is far behind. For the worker.
    pub fn postpone(&self, export: &Export, delay: &Delay<'_>, to_end: bool) {
        let error = self.delay(&export.key, delay);
        let progress = Progress {
            attempts: export.attempts,
            last_error: Some(error.clone()),
        };
        self.states.postpone(export.id, progress);
        let news = News::Postponed {
            attempts: export.attempts,
            error: error.clone(),
            to_end,
            first_moved_at: export.first_moved_at,
        };
        self.report(Report {
            id: export.id,
            news,
            queue: QueueNews::Failing(delay.backoff, error),
        });
    }

    fn delay(&self, key: &QueueKey, delay: &Delay<'_>) -> Arc<RawValue> {
        let error = raw(&delay.error);
        let next_attempt = Instant::now() + delay.wait;
        let trouble = Trouble {
            error: error.clone(),
            next_attempt,
        };
        self.states.delay(key, trouble);
        error
    }

    /// Kind and message of why an export waits, if that is known.
    pub fn trouble(&self, id: Uuid) -> Option<(String, String)> {
        #[derive(Deserialize)]
        struct Words {
            kind: String,
            message: String,
        }
        let error = self.states.last_error(id)?;
        let Words { kind, message } = serde_json::from_str(error.get()).ok()?;
        Some((kind, message))
    }

    /// Shows what a report says, now that it is in the store.
    fn written(&self, Report { id, news, .. }: Report) {
        if let News::Finished { response, .. } = news {
            self.states.finish(id, &response);
        }
    }

    fn report(&self, report: Report) {
        // The recorder ends after the worker, unless the process is being left in a hurry.
        let _ = self.reports.send(report);
    }

    /// Queues an export that was found in the store.
    fn resume(&self, found: Unfinished, queue: &Sender<Queued>) {
        let Unfinished {
            id,
            owner,
            destination,
            running,
            attempts,
            first_moved_at,
            last_error,
            queue: stored,
        } = found;
        let key = QueueKey {
            owner: owner.into(),
            destination: destination.shared(),
        };
        let progress = Progress {
            attempts,
            last_error,
        };
        let key = self.states.insert(id, key, progress);
        let resume = stored.as_ref().map(|stored| stored.backoff);
        if let Some(StoredQueue { backoff, error }) = stored {
            let wait = backoff.not_before.saturating_sub(self.running()).max(0);
            let wait = Duration::from_millis(wait.unsigned_abs());
            let next_attempt = Instant::now().checked_add(wait);
            if let (Some(error), Some(next_attempt)) = (error, next_attempt) {
                let trouble = Trouble {
                    error,
                    next_attempt,
                };
                self.states.delay(&key, trouble);
            }
        }
        let export = Export {
            id,
            destination: destination.sharing(&key.destination),
            key,
            accepted_at: running,
            attempts,
            first_moved_at,
        };
        enqueue(queue, Queued { export, resume });
    }

    /// What the waiter thread runs, until [`Exports::close`].
    pub fn answer_parked(&self) {
        self.states.wait();
    }

    /// Answers every parked poll with the state its export has now, and parks none from now on.
    pub fn close(&self) {
        self.states.close();
    }
}

fn enqueue(queue: &Sender<Queued>, queued: Queued) {
    // The worker's end goes away only when the process stops; the export then stays stored.
    let _ = queue.send(queued);
}

fn raw(value: &impl Serialize) -> Arc<RawValue> {
    // Structs of strings and numbers have no way not to become JSON.
    to_raw_value(value).expect("a struct serialises").into()
}

/// The result of an export whose URL is no longer taken.
fn refused_now(bad: BadUrl) -> ExtResponse {
    ExtResponse {
        error: Some(FailureReport {
            kind: "bad_uri".into(),
            message: format!("the uri that was accepted by an earlier version {bad}"),
            attempts: 0,
        }),
        ..ExtResponse::with_status(502, "Bad Gateway")
    }
}

fn fingerprint(destination: &Destination, payload: &[u8]) -> [u8; 32] {
    // No URL holds a newline, so no two submissions run together to the same bytes.
    Sha256::new()
        .chain_update(destination.as_str())
        .chain_update(b"\n")
        .chain_update(payload)
        .finalize()
        .into()
}

/// Two counts of milliseconds that go on evenly from the start of the process: a clock that is set
/// right meanwhile, as at the boot of a box without one of its own, must neither end nor prolong a
/// wait. The first are Unix milliseconds, which are stored by the wall clock: see
/// [`Writer::clock_was_set`]. The second is the running time, which goes on from one run to the next.
struct Clock {
    started: Instant,
    wall: Millis,
    /// The running time at the start.
    ran: Millis,
}

impl Clock {
    fn new(ran: Millis) -> Self {
        Self {
            started: Instant::now(),
            wall: wall_clock(),
            ran,
        }
    }

    fn now(&self) -> Millis {
        self.wall.saturating_add(as_millis(self.started.elapsed()))
    }

    fn running(&self) -> Millis {
        self.ran.saturating_add(as_millis(self.started.elapsed()))
    }

    /// By how much the wall clock is ahead of this one by now.
    fn behind(&self) -> Millis {
        wall_clock().saturating_sub(self.now())
    }
}

fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    as_millis(since.unwrap_or_default())
}

fn as_millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}
