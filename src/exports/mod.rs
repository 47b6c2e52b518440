//! The life of an export: submitted, polled, delivered, finished.
//!
//! [`Exports`] is shared by requests and the worker. A submission goes to the [`writer`], which commits
//! everything that waits in one transaction, tells the worker, and only then answers: accepted means
//! durable. Exports live in the [`store`] alone. Memory holds one entry for each queue ([`queues`]) and
//! one for each parked long poll (`parked`).
//!
//! Not here: HTTP (`routes`, `server`), and how a payload reaches its destination (`delivery`).

pub mod acts;
pub mod attempts;
mod checkpoint;
mod clock;
pub mod overview;
mod parked;
pub mod queues;
pub mod store;
pub mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::{Mutex, MutexGuard};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::auth::Grant;
use crate::destination::Destination;
use crate::export::{Error, Millis, State, View};
use crate::ledger::LedgerKey;
use crate::metrics::{Gauges, Metrics};
use crate::reply::Reply;
use checkpoint::Checkpoint;
use clock::Clock;
use parked::Parked;
use queues::{Progress, Queues};
use store::acts::Pause;
use store::evidence::Evidence;
use store::{ExportUpdate, IdempotencyKey, LedgerLimits, NewExport, Reader, Report, Store, Stored};
use writer::{Incoming, Writer};

/// Submissions that may wait for the writer. With more, the disk is not keeping up.
const WAITING: usize = 1024;
/// Bytes of payload that may wait for the writer.
const WAITING_BYTES: usize = 16 * 1024 * 1024;
/// Acts of the owner that may wait for the writer.
const WAITING_ACTS: usize = 16;
/// Reports that may wait for the writer before the worker has to wait too. A crash may cause this many
/// exports to be sent again.
const UNWRITTEN_REPORTS: usize = 256;

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
    /// The macaroon's identifier.
    pub owner: Vec<u8>,
    /// One that the token allows.
    pub destination: Destination,
    /// The body that is sent, byte for byte.
    pub payload: Vec<u8>,
    /// The client's key, by which repeats of this submission are recognised.
    pub idempotency_key: Option<String>,
}

/// A checked request for the state of an export.
pub struct Query {
    /// The id that the submission was answered with.
    pub id: Uuid,
    /// What the caller's token allows.
    pub grant: Grant,
    /// The export's destination according to the caller, who need not name one.
    pub destination: Option<String>,
}

impl Query {
    fn may_see(&self, stored: &Stored) -> bool {
        let Stored {
            owner, destination, ..
        } = stored;
        let named = self.destination.as_ref();
        self.grant.owner() == owner
            && self.grant.allows(destination)
            && named.is_none_or(|named| named == destination)
    }
}

/// How much may be stored, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Unfinished exports in one queue.
    pub max_pending: usize,
    /// Bytes that all exports and results together may take in the store.
    pub max_store: u64,
    /// How long results stay in the store.
    pub retention: Duration,
    /// How long a queue fails before its exports are given up.
    pub give_up_after: Duration,
    /// How much of the ledger is kept.
    pub ledger: LedgerLimits,
}

/// State shared by the pool, the worker and the writer.
pub struct Exports {
    /// Locked briefly, and never while the store is read or written.
    queues: Mutex<Queues>,
    parked: Arc<Parked>,
    clock: Clock,
    accepts: Sender<Accept>,
    waiting_bytes: AtomicUsize,
    reports: Sender<Report>,
    /// Tells the writer that a client waits for a report that was just sent.
    awaited: Sender<()>,
    /// Tells the worker that an export may be due.
    wake: Sender<()>,
    /// For polls.
    polls: Mutex<Reader>,
    /// For the worker, so that a large payload does not hold up polls.
    payloads: Mutex<Reader>,
    /// None for a database in memory.
    checkpoint: Option<Checkpoint>,
    /// To the writer, which repairs the store.
    damage: Sender<Damage>,
    /// To the writer, which carries the owner's acts out.
    acts: Sender<acts::Request>,
    /// What the owner has paused. Only the writer changes it, after it is stored.
    pauses: Mutex<Vec<Pause>>,
    /// The store's path, for the owner.
    store: PathBuf,
    sum: Mutex<Option<overview::Sum>>,
    /// How often the store has been repaired.
    repairs: AtomicUsize,
    ledger_key: LedgerKey,
    /// Counts exports, attempts and commits.
    pub metrics: Arc<Metrics>,
}

/// Tells the writer that the store was found to be damaged.
struct Damage {
    /// The count of repairs before that: if it has changed, somebody else's report was first.
    repairs: usize,
    /// Dropped when the repair has succeeded or failed.
    done: Sender<()>,
}

struct Accept {
    export: NewExport,
    received: Instant,
    deadline: Instant,
    reply: Reply,
}

impl Exports {
    /// Takes over an opened store with every unfinished export in it. The second value is for the thread
    /// that runs [`Writer::run`]. The third is for the worker, and says that an export may be due.
    ///
    /// # Errors
    /// The store cannot be read, or needs a repair that fails.
    pub fn open(
        mut store: Store,
        limits: Limits,
        ledger_key: LedgerKey,
        metrics: Arc<Metrics>,
    ) -> Result<(Arc<Self>, Writer, Receiver<()>), store::Error> {
        let (accepts, incoming) = bounded(WAITING);
        let (reports, reported) = bounded(UNWRITTEN_REPORTS);
        let (damage, damaged) = bounded(UNWRITTEN_REPORTS);
        let (acts, asked) = bounded(WAITING_ACTS);
        let (urge, awaited) = bounded(1);
        let (wake, woken) = bounded(1);
        let clock = Clock::new(store.running());
        store.limit_ledger(limits.ledger);
        let (queues, pauses) =
            store.repaired(|store| read_queues(store, limits.give_up_after, &ledger_key))?;
        let exports = Arc::new(Self {
            queues: Mutex::new(queues),
            parked: Arc::default(),
            clock,
            accepts,
            waiting_bytes: AtomicUsize::new(0),
            reports,
            awaited: urge,
            wake,
            polls: Mutex::new(store.reader()?),
            payloads: Mutex::new(store.reader()?),
            checkpoint: store
                .has_wal()
                .then(|| Checkpoint::new(&store))
                .transpose()?,
            damage,
            acts,
            pauses: Mutex::new(pauses),
            store: store.path().to_owned(),
            sum: Mutex::default(),
            repairs: AtomicUsize::new(0),
            ledger_key,
            metrics,
        });
        let incoming = Incoming {
            accepts: incoming,
            reports: reported,
            awaited,
            damage: damaged,
            acts: asked,
        };
        let writer = Writer::new(exports.clone(), store, limits, incoming);
        Ok((exports, writer, woken))
    }

    /// The time in Unix milliseconds, for what is stored by the wall clock.
    pub fn now(&self) -> Millis {
        self.clock.now()
    }

    /// When this run began, in Unix milliseconds.
    pub fn started(&self) -> Millis {
        self.clock.wall
    }

    /// The running time: how many milliseconds the service has run for, all its runs together.
    pub fn running(&self) -> Millis {
        self.clock.running()
    }

    /// A connection of its own to the ledger. Opening it takes a fraction of a millisecond, and keeping it would
    /// take memory.
    ///
    /// # Errors
    /// The store cannot be opened again.
    pub fn evidence(&self) -> Result<Evidence, store::Error> {
        Evidence::of(&self.store)
    }

    /// How many exports are not finished.
    pub fn unfinished(&self) -> usize {
        self.queues.lock().unfinished()
    }

    /// What metrics show of exports at this moment. Blocks for a look at the first export of each queue; if the
    /// store cannot be read, there is no oldest one.
    pub fn gauges(&self) -> Gauges {
        let (pending, queues) = {
            let queues = self.queues.lock();
            (queues.unfinished(), queues.states())
        };
        let oldest_pending = self.polls.lock().oldest_accepted();
        let pauses = self.pauses.lock();
        Gauges {
            pending,
            pending_bytes: self.waiting_bytes(pending).ok(),
            queues,
            oldest_pending: oldest_pending.unwrap_or_else(|error| {
                log::warn!(reason:% = error; "cannot read the store for the metrics");
                None
            }),
            long_polls: self.parked.count(),
            paused: pauses.iter().any(|pause| pause.subject == "all"),
            ..Gauges::default()
        }
    }

    /// Submits a new export. `reply` answers no sooner than the export is durable. It then waits until
    /// the export is finished or `deadline` has passed, unless the queue's backoff lasts beyond that.
    /// Does not block.
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
            // On a Databox all identifiers are empty: there, only the address tells apps apart.
            peer: if owner.is_empty() {
                reply.to.client().ip().to_canonical().to_string()
            } else {
                String::new()
            },
            owner,
            destination,
            payload,
            accepted_at: self.now(),
            running: self.running(),
            key,
        };
        // Relaxed: nothing is ordered by this count.
        if self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) > WAITING_BYTES {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return reply.answer(Err(Error::Overloaded));
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
                accept.reply.answer(Err(Error::Overloaded));
            }
        }
    }

    /// Looks at an export. `reply` answers at once if the export is finished or not the caller's to see,
    /// else when it is finished or at `deadline`, whichever is first. Blocks for at most two look-ups, and
    /// while a damaged store is repaired.
    pub fn poll(self: &Arc<Self>, query: &Query, deadline: Instant, reply: Reply) {
        let look_up = || self.view(query.id, |stored| query.may_see(stored));
        if deadline <= Instant::now() {
            return reply.answer(look_up());
        }
        let ticket = self.parked.announce(query.id);
        match look_up() {
            Ok(view) if view.state != State::Finished => {
                if let Err(reply) = self.park(ticket, query.id, deadline, reply) {
                    reply.answer(look_up());
                }
            }
            known => reply.answer(known),
        }
    }

    /// Parks a poll: see [`parked::Ticket::park`].
    fn park(
        self: &Arc<Self>,
        ticket: parked::Ticket,
        id: Uuid,
        deadline: Instant,
        reply: Reply,
    ) -> Result<(), Reply> {
        let exports = self.clone();
        ticket.park(reply, deadline, move |reply| {
            reply.answer(exports.view(id, |_| true));
        })
    }

    /// What the store and the queues know of an export, if the caller `may_see` it.
    fn view(&self, id: Uuid, may_see: impl FnOnce(&Stored) -> bool) -> Result<View, Error> {
        match self.read_from(&self.polls, |reader| reader.find(id)) {
            Ok(Some(stored)) if may_see(&stored) => Ok(self.view_of(id, stored)),
            Ok(_) => Err(Error::NotFound),
            Err(error) => {
                log::error!(reason:% = error; "cannot read the store");
                Err(error.into())
            }
        }
    }

    /// Reads the store. If it is damaged, has it repaired and reads once more.
    fn read_from<T>(
        &self,
        reader: &Mutex<Reader>,
        read: impl Fn(&Reader) -> Result<T, store::Error>,
    ) -> Result<T, store::Error> {
        let repairs = self.repairs.load(Ordering::Acquire);
        let found = read(&reader.lock());
        if !matches!(found, Err(store::Error::Damaged)) {
            return found;
        }
        let (done, wait) = bounded(0);
        // The writer outlives its readers, or drops `done`.
        let _ = self.damage.send(Damage { repairs, done });
        let _ = wait.recv();
        read(&reader.lock())
    }

    fn view_of(&self, id: Uuid, stored: Stored) -> View {
        if let Some(response) = stored.response {
            return View::finished(id, response);
        }
        let progress = Progress {
            id,
            attempts: stored.attempts,
            first_moved_at: None,
        };
        let queues = self.queues.lock();
        queues.view(stored.queue, progress, stored.last_error, self.running())
    }

    /// Publishes a report that is now in the store.
    fn written(&self, report: Report) {
        let (id, queue, now) = (report.id, report.queue, self.running());
        match report.update {
            ExportUpdate::Finished {
                response, resumes, ..
            } => {
                let mut queues = self.queues.lock();
                match resumes {
                    true => queues.finished_and_unblocked(queue, now),
                    false => queues.finished(queue, now),
                }
                drop(queues);
                for reply in self.parked.take(id) {
                    reply.answer(Ok(View::finished(id, response.clone())));
                }
            }
            ExportUpdate::Rescheduled { to_end: true, .. } => self.queues.lock().moved(queue, now),
            ExportUpdate::Rescheduled { .. } => {}
        }
    }

    fn wake_worker(&self) {
        // If the channel is full, the worker is about to look.
        let _ = self.wake.try_send(());
    }

    /// Repairs the store, which nobody can read meanwhile.
    fn repair(&self, store: &mut Store) -> Result<(), store::Error> {
        let (mut polls, mut payloads) = (self.polls.lock(), self.payloads.lock());
        let mut checkpoint = self
            .checkpoint
            .as_ref()
            .map(|checkpoint| checkpoint.reader.lock());
        let checkpoint = checkpoint.as_deref_mut();
        let mut readers: Vec<_> = [&mut *polls, &mut *payloads]
            .into_iter()
            .chain(checkpoint)
            .collect();
        let done = store.repair(&mut readers);
        match &done {
            Ok(()) => {
                self.repairs.fetch_add(1, Ordering::AcqRel);
            }
            Err(error) => log::error!("{}", store::cannot_repair(store.path(), error)),
        }
        done
    }

    /// Keeps checkpoints from getting in the way of a commit while the guard lives. Must not be held during
    /// a repair, which takes the checkpoint's other lock first.
    fn hold_checkpoints(&self) -> Option<MutexGuard<'_, ()>> {
        self.checkpoint.as_ref().map(Checkpoint::hold)
    }

    /// Moves the store's WAL into the database, and truncates it unless another process reads the store. Blocks
    /// while the disk writes. Not to be called while checkpoints are held.
    ///
    /// # Errors
    /// The store cannot be written.
    fn empty_wal(&self) -> Result<(), store::Error> {
        match &self.checkpoint {
            Some(checkpoint) => checkpoint.empty(),
            None => Ok(()),
        }
    }

    /// The checkpoint thread's body. Returns when `stop` is dropped.
    pub fn make_checkpoints(&self, stop: &Receiver<()>) {
        if let Some(checkpoint) = &self.checkpoint {
            checkpoint.run(stop);
        }
    }
}

fn read_queues(
    store: &mut Store,
    give_up_after: Duration,
    key: &LedgerKey,
) -> Result<(Queues, Vec<Pause>), store::Error> {
    let mut queues = Queues::new(give_up_after);
    let now = store.running();
    store.queues(|id, found| queues.restore(id, found, now))?;
    let pauses = store.pauses()?;
    acts::running::pause_restored(&mut queues, store, key, &pauses, now)?;
    Ok((queues, pauses))
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
