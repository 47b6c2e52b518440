//! The life of an export: submitted, polled, settled.
//!
//! [`Exports`] is what requests and the worker share. A submission goes to the store thread,
//! which writes everything that waits in one transaction, tells the worker, and only then
//! answers: accepted means durable. Unfinished exports are in [`states`] and in the store,
//! finished ones in the store alone.
//!
//! Not here: HTTP (`routes`, `server`), and how a payload reaches its destination (`delivery`).

pub mod states;
pub mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, never, select};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::auth::Grant;
use crate::delivery::addresses::Destination;
use crate::logging::millis;
pub use states::Reply;
use states::{Poll, States};
use store::{Change, Effect, IdempotencyKey, NewExport, Reader, Unfinished, Writer};

/// Submissions that may wait for the store thread; with more the disk is not keeping up.
const WAITING: usize = 1024;
/// Bytes of payload that may wait for the store thread.
const WAITING_BYTES: usize = 16 * 1024 * 1024;
/// Results that may wait for the store thread, before the worker waits for it too.
const UNWRITTEN_RESULTS: usize = 64;
/// Changes that go into one transaction.
const BATCH: usize = 512;
/// How long the store thread waits after a failed write before it tries again.
const RETRY: Duration = Duration::from_secs(1);
/// The log is emptied once nothing was written for so long.
const QUIET: Duration = Duration::from_secs(1);
/// The longest the store thread sleeps, so that a corrected clock is noticed.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Where an export is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum State {
    /// Queued.
    Pending,
    /// On the wire.
    Processing,
    /// It has a result.
    Finished,
}

/// What an app may see of an export.
pub struct View {
    /// Which export.
    pub id: Uuid,
    /// Where it is in its life.
    pub state: State,
    /// The `ext_response` object as JSON, once finished.
    pub response: Option<Arc<RawValue>>,
}

impl View {
    fn unfinished(id: Uuid, state: State) -> Self {
        Self {
            id,
            state,
            response: None,
        }
    }

    fn finished(id: Uuid, response: Arc<RawValue>) -> Self {
        Self {
            id,
            state: State::Finished,
            response: Some(response),
        }
    }
}

/// The result of an export, as apps read it in `ext_response` and as the store keeps it.
#[derive(Default, Serialize)]
pub struct ExtResponse {
    /// Code and reason phrase, like `200 OK`.
    pub status: String,
    /// The code alone.
    pub status_code: u16,
    /// The response's body if it is text, else empty.
    pub body: String,
    /// The response's body if it is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
    /// Whether the body is only the beginning of what was sent.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// Why there was no response; the status is then this service's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<FailureReport>,
}

impl ExtResponse {
    /// A result with this status and nothing else.
    pub fn with_status(code: u16, reason: &str) -> Self {
        Self {
            status: format!("{code} {reason}"),
            status_code: code,
            ..Self::default()
        }
    }
}

/// Why an export has no response of its destination's.
#[derive(Serialize)]
pub struct FailureReport {
    /// What went wrong, for programs.
    pub kind: &'static str,
    /// What went wrong, for people.
    pub message: String,
    /// How often it was tried.
    pub attempts: u32,
}

/// Why a submission or a poll got no [`View`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No such export, or not this caller's: the caller cannot tell which.
    NotFound,
    /// The idempotency key was used before for another submission.
    KeyReused,
    /// The disk takes longer than submissions keep coming.
    Overloaded,
    /// The disk is full.
    DiskFull,
    /// The store cannot be read or written; the log says why.
    Storage,
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::Full => Self::DiskFull,
            store::Error::Damaged | store::Error::Failed(_) => Self::Storage,
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
    pub id: Uuid,
    /// Where it goes.
    pub destination: Destination,
}

/// See the module's own text. Shared by the pool, the worker, the waiter and the store thread.
pub struct Exports {
    states: States,
    accepts: Sender<Accept>,
    waiting_bytes: AtomicUsize,
    results: Sender<Settle>,
    /// For polls of finished exports.
    finished: Mutex<Reader>,
    /// For the worker, so that a large payload does not hold up polls.
    payloads: Mutex<Reader>,
}

struct Accept {
    export: NewExport,
    received: Instant,
    deadline: Instant,
    reply: Reply,
}

struct Settle {
    id: Uuid,
    response: Arc<RawValue>,
}

impl Exports {
    /// Takes over an opened store and queues every unfinished export in it, oldest first.
    /// The second half is for the thread that runs [`StoreThread::run`].
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn open(
        writer: Writer,
        retention: Duration,
        queue: Sender<Queued>,
    ) -> Result<(Arc<Self>, StoreThread), store::Error> {
        let (accepts, incoming) = bounded(WAITING);
        let (results, settled) = bounded(UNWRITTEN_RESULTS);
        let exports = Arc::new(Self {
            states: States::default(),
            accepts,
            waiting_bytes: AtomicUsize::new(0),
            results,
            finished: Mutex::new(writer.reader()?),
            payloads: Mutex::new(writer.reader()?),
        });
        writer.unfinished(|export| {
            let Unfinished {
                id,
                owner,
                destination,
            } = export;
            exports.states.insert(id, owner, destination.clone());
            enqueue(&queue, id, destination);
        })?;
        let thread = StoreThread {
            exports: exports.clone(),
            writer,
            retention,
            queue,
            incoming,
            settled,
            accepts: Vec::new(),
            results: Vec::new(),
        };
        Ok((exports, thread))
    }

    /// How many exports are not finished.
    pub fn unfinished(&self) -> usize {
        self.states.count()
    }

    /// Submits a new export. `reply` is called once it is durable, or at `deadline` or when it is
    /// finished, whichever is first, if `deadline` lies after that. Does not block.
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
            accepted_at: unix_millis(SystemTime::now()),
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
                let found = self.finished.lock().find(query.id);
                reply(match found {
                    Ok(Some(stored)) if may_see(&stored.owner, &stored.destination) => {
                        // Only finished exports are missing from the states, but for the moment
                        // between a submission's commit and its reply, when nobody knows its id.
                        match stored.response {
                            Some(response) => Ok(View::finished(query.id, response)),
                            None => Ok(View::unfinished(query.id, State::Pending)),
                        }
                    }
                    Ok(_) => Err(Error::NotFound),
                    Err(error) => {
                        log::error!(reason:% = error; "cannot read the store");
                        Err(error.into())
                    }
                });
            }
        }
    }

    /// Marks an export as on the wire and gets its payload from the store. For the worker.
    ///
    /// # Panics
    /// Where the store cannot be read: without it there is nothing left to deliver, and after a
    /// restart the export is queued again.
    pub fn begin(&self, id: Uuid) -> Vec<u8> {
        self.states.begin(id);
        match self.payloads.lock().payload(id) {
            Ok(payload) => payload,
            Err(error) => {
                log::error!(id:%, reason:% = error; "cannot read a payload from the store");
                panic!("a payload cannot be read");
            }
        }
    }

    /// Hands over an export's result. It is shown to nobody before it is in the store. Blocks
    /// only while the store is far behind. For the worker.
    pub fn settle(&self, id: Uuid, response: &ExtResponse) {
        // A struct of strings and numbers has no way not to become JSON.
        let response = to_raw_value(response).expect("a result serialises").into();
        // The store thread ends after the worker, unless the process is being left in a hurry.
        let _ = self.results.send(Settle { id, response });
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

/// The one thread that writes: takes everything that waits, commits once, then tells all of them.
pub struct StoreThread {
    exports: Arc<Exports>,
    writer: Writer,
    retention: Duration,
    queue: Sender<Queued>,
    incoming: Receiver<Accept>,
    settled: Receiver<Settle>,
    /// Submissions taken and not yet written.
    accepts: Vec<Accept>,
    /// Results taken and not yet written. Those that could not be written stay here, and until
    /// they could be, no more are taken: so the worker waits too, and memory stays bounded.
    results: Vec<Settle>,
}

impl StoreThread {
    /// Runs until `stop` is dropped, then writes what still waits and closes the store.
    pub fn run(mut self, stop: &Receiver<()>) {
        let mut housekeeping = Housekeeping::due_now();
        loop {
            let stopping = self.sleep(stop, &housekeeping);
            while self.take_waiting() {
                let written = self.write();
                housekeeping.wrote();
                if !(stopping && written) {
                    break;
                }
            }
            if stopping {
                housekeeping.empty_log(&mut self.writer);
                return;
            }
            housekeeping.run(&mut self.writer, self.retention);
        }
    }

    /// Waits for something to do; true when it is time to stop.
    fn sleep(&mut self, stop: &Receiver<()>, housekeeping: &Housekeeping) -> bool {
        let (settled, timeout) = if self.results.is_empty() {
            (&self.settled, housekeeping.sleep())
        } else {
            (&never(), RETRY)
        };
        select! {
            recv(self.incoming) -> accept => self.accepts.extend(accept),
            recv(settled) -> result => self.results.extend(result),
            recv(stop) -> _ => return true,
            default(timeout) => {}
        }
        false
    }

    /// Takes what waits, up to a batch; false when there is nothing to write.
    fn take_waiting(&mut self) -> bool {
        let room = BATCH - self.accepts.len();
        self.accepts.extend(self.incoming.try_iter().take(room));
        let room = UNWRITTEN_RESULTS.saturating_sub(self.results.len());
        self.results.extend(self.settled.try_iter().take(room));
        !(self.accepts.is_empty() && self.results.is_empty())
    }

    /// Writes what was taken, and answers; false where the results could not be written.
    fn write(&mut self) -> bool {
        let accepts = std::mem::take(&mut self.accepts);
        let bytes = accepts
            .iter()
            .map(|accept| accept.export.payload.len())
            .sum();
        match self.commit(&accepts) {
            Ok(effects) => {
                for Settle { id, response } in self.results.drain(..) {
                    self.exports.states.finish(id, &response);
                }
                for (accept, effect) in accepts.into_iter().zip(effects) {
                    self.accepted(accept, effect);
                }
            }
            Err(error) => {
                log::error!(
                    reason:% = error, refused = accepts.len(), results_waiting = self.results.len();
                    "cannot write to the store"
                );
                let refused = !accepts.is_empty();
                let reason = Error::from(error);
                for accept in accepts {
                    (accept.reply)(Err(reason));
                }
                // It may be the submissions that did not fit: the results get a try alone.
                if refused && !self.results.is_empty() {
                    self.write();
                }
            }
        }
        self.exports
            .waiting_bytes
            .fetch_sub(bytes, Ordering::Relaxed);
        self.results.is_empty()
    }

    /// Writes the waiting results first, so that a repeated submission sees them.
    fn commit(&mut self, accepts: &[Accept]) -> Result<Vec<Effect>, store::Error> {
        let changes: Vec<_> = self
            .results
            .iter()
            .map(|result| Change::Settle {
                id: result.id,
                response: &result.response,
            })
            .chain(accepts.iter().map(|accept| Change::Accept(&accept.export)))
            .collect();
        let mut effects = self
            .writer
            .commit(&changes, unix_millis(SystemTime::now()))?;
        Ok(effects.split_off(self.results.len()))
    }

    fn accepted(&self, accept: Accept, effect: Effect) {
        let Accept {
            export,
            received,
            deadline,
            reply,
        } = accept;
        let NewExport {
            id,
            owner,
            destination,
            payload,
            ..
        } = export;
        let anyone = |_: &[u8], _: &str| true;
        let answer = match effect {
            Effect::Written => {
                log::info!(
                    id:%, destination = destination.origin(), bytes = payload.len(),
                    ms = millis(received.elapsed());
                    "accepted"
                );
                let states = &self.exports.states;
                states.insert(id, owner, destination.clone());
                // Before the worker knows of it, so that the first answer is always Pending.
                let poll = states.poll(id, anyone, deadline, reply);
                enqueue(&self.queue, id, destination);
                poll
            }
            Effect::Repeat { id, response } => {
                log::info!(id:%, destination = destination.origin(); "accepted before");
                match response {
                    Some(response) => Poll::Now(reply, Ok(View::finished(id, response))),
                    None => self.exports.states.poll(id, anyone, deadline, reply),
                }
            }
            Effect::Conflict => Poll::Now(reply, Err(Error::KeyReused)),
        };
        match answer {
            Poll::Parked => {}
            Poll::Now(reply, answer) => reply(answer),
            // Not reached: an export without a result is among the states.
            Poll::Elsewhere(reply) => reply(Err(Error::NotFound)),
        }
    }
}

fn enqueue(queue: &Sender<Queued>, id: Uuid, destination: Destination) {
    // The worker's end goes away only when the process stops; the export then stays stored.
    let _ = queue.send(Queued { id, destination });
}

/// What the store thread does when there is time: deletes expired results in small steps, and
/// empties the log, which still holds the payloads of finished exports.
struct Housekeeping {
    expire_at: Instant,
    empty_log_at: Option<Instant>,
}

impl Housekeeping {
    fn due_now() -> Self {
        let now = Instant::now();
        Self {
            expire_at: now,
            empty_log_at: Some(now),
        }
    }

    fn wrote(&mut self) {
        self.empty_log_at = Some(Instant::now() + QUIET);
    }

    fn sleep(&self) -> Duration {
        let next = self
            .empty_log_at
            .map_or(self.expire_at, |at| at.min(self.expire_at));
        next.saturating_duration_since(Instant::now())
    }

    fn run(&mut self, writer: &mut Writer, retention: Duration) {
        let now = Instant::now();
        if self.expire_at <= now {
            self.expire_at = now + Self::expire(writer, retention);
        }
        if self.empty_log_at.is_some_and(|at| at <= now) {
            self.empty_log(writer);
        }
    }

    fn empty_log(&mut self, writer: &mut Writer) {
        self.empty_log_at = None;
        if let Err(error) = writer.empty_log() {
            log::warn!(reason:% = error; "cannot empty the store's log");
            self.empty_log_at = Some(Instant::now() + LONGEST_SLEEP);
        }
    }

    /// Deletes a few results and returns how long until the next.
    fn expire(writer: &mut Writer, retention: Duration) -> Duration {
        let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
        let now = unix_millis(SystemTime::now());
        match writer.expire(now.saturating_sub(retention)) {
            Ok(Some(oldest)) => {
                let left = oldest.saturating_add(retention).saturating_sub(now);
                Duration::from_millis(u64::try_from(left).unwrap_or(0)).min(LONGEST_SLEEP)
            }
            // What finishes from now on expires no sooner.
            Ok(None) => Duration::from_millis(retention.unsigned_abs()).min(LONGEST_SLEEP),
            Err(error) => {
                log::warn!(reason:% = error; "cannot delete expired results");
                LONGEST_SLEEP
            }
        }
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

fn unix_millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
