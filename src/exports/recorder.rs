//! The one thread that writes: takes everything that waits, commits once, then tells all of them.
//! When there is time it deletes expired results and empties SQLite's log.
//!
//! Not here: the statements themselves ([`super::store`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, never, select};
use serde_json::value::RawValue;

use super::states::{Poll, Progress};
use super::store::{self, Change, Effect, NewExport, News, Report, Writer};
use super::{Accept, Clock, Damage, Exports, Limits, Queued, UNWRITTEN_REPORTS, enqueue, raw};
use crate::export::{Error, Export, ExtResponse, Millis, QueueKey, View};
use crate::logging::millis;

/// What an export takes in the store beside its payload, with its part of the indexes, in bytes.
const ROW: usize = 512;
/// Changes that go into one transaction.
const BATCH: usize = 512;
/// How long the recorder waits after a failed write before it tries again.
const RETRY: Duration = Duration::from_secs(1);
/// The log is emptied so long after the first write to it.
const LOG_AGE: Duration = Duration::from_secs(5);
/// How long until it is tried again, where somebody who reads the store was in the way.
const LOG_BUSY: Duration = Duration::from_secs(5);
/// A difference between clocks, in milliseconds, that says that the clock was set.
const CLOCK_SET: Millis = 1000;
/// How often the running time is stored while a queue is failing, and nothing else is written. A
/// kill loses no more of it than a minute.
const SAVE_RUNNING: Duration = Duration::from_secs(50);
/// The longest the recorder sleeps.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// See the module's own text.
pub struct Recorder {
    pub(super) exports: Arc<Exports>,
    pub(super) writer: Writer,
    pub(super) retention: Duration,
    pub(super) limits: Limits,
    pub(super) queue: Sender<Queued>,
    pub(super) incoming: Receiver<Accept>,
    pub(super) reported: Receiver<Report>,
    pub(super) damaged: Receiver<Damage>,
    /// A store that could not be mended is not tried again before this.
    pub(super) mend_again_at: Instant,
    /// Submissions taken and not yet written.
    pub(super) accepts: Vec<Accept>,
    /// Reports taken and not yet written, [`UNWRITTEN_REPORTS`] at most. Those that could not be
    /// written stay here: so the worker waits in the end too, and memory stays bounded.
    pub(super) reports: Vec<Report>,
    /// Whether there was no room at the last try.
    pub(super) disk_full: bool,
}

impl Recorder {
    /// Runs until `stop` is dropped, then writes what still waits and closes the store.
    pub fn run(mut self, stop: &Receiver<()>) {
        let mut housekeeping = Housekeeping::due_now();
        loop {
            let stopping = self.sleep(stop, &housekeeping);
            housekeeping.follow_clock(&self.exports.clock, &mut self.writer);
            while self.take_waiting() {
                let written = self.write();
                housekeeping.wrote();
                if !(stopping && written) {
                    break;
                }
            }
            if stopping {
                if self.exports.unfinished() > 0 {
                    self.save_running();
                }
                housekeeping.empty_log(&mut self.writer);
                return;
            }
            if housekeeping.is_running_due() && self.exports.states.is_any_failing() {
                self.save_running();
            }
            self.see_that_files_are_there();
            let now = self.exports.now();
            housekeeping.run(&mut self.writer, self.retention, now);
            if std::mem::take(&mut housekeeping.found_damage) {
                self.mend();
            }
        }
    }

    /// Ends the process where a file of the store was removed: nothing that is written from then on
    /// would be there after a restart.
    fn see_that_files_are_there(&self) {
        if let Some(file) = self.writer.missing_file() {
            log::error!(
                file:% = file.display();
                "the store was removed or replaced while the service runs; put it back, or remove \
                 all of it with the file lock to start empty"
            );
            panic!("the store was removed while the service runs");
        }
    }

    fn save_running(&mut self) {
        let running = self.exports.running();
        if let Err(error) = self.writer.save_running(running) {
            log::warn!(reason:% = error; "cannot store for how long exports have been tried");
        }
    }

    /// Waits for something to do; true when it is time to stop.
    fn sleep(&mut self, stop: &Receiver<()>, housekeeping: &Housekeeping) -> bool {
        let (reported, timeout) = if self.reports.is_empty() {
            (&self.reported, housekeeping.sleep())
        } else {
            (&never(), RETRY)
        };
        select! {
            recv(self.incoming) -> accept => self.accepts.extend(accept),
            recv(reported) -> report => self.reports.extend(report),
            recv(self.damaged) -> damage => self.mend_unless_done(damage.ok()),
            recv(stop) -> _ => return true,
            default(timeout) => {}
        }
        false
    }

    fn mend_unless_done(&mut self, damage: Option<Damage>) {
        if let Some(Damage { mended, done }) = damage {
            if mended == self.exports.mended.load(Ordering::Acquire) {
                self.mend();
            }
            drop(done);
        }
    }

    /// False where the store is as it was.
    fn mend(&mut self) -> bool {
        if Instant::now() < self.mend_again_at {
            return false;
        }
        self.mend_again_at = Instant::now() + LONGEST_SLEEP;
        self.exports.mend(&mut self.writer).is_ok()
    }

    /// Takes what waits, up to a batch; false when there is nothing to write.
    fn take_waiting(&mut self) -> bool {
        let room = BATCH - self.accepts.len();
        self.accepts.extend(self.incoming.try_iter().take(room));
        let room = UNWRITTEN_REPORTS.saturating_sub(self.reports.len());
        self.reports.extend(self.reported.try_iter().take(room));
        !(self.accepts.is_empty() && self.reports.is_empty())
    }

    /// Writes what was taken, and answers; false where the reports could not be written.
    fn write(&mut self) -> bool {
        self.see_that_files_are_there();
        let accepts = std::mem::take(&mut self.accepts);
        let bytes = accepts
            .iter()
            .map(|accept| accept.export.payload.len())
            .sum();
        let started = Instant::now();
        // After a full disk the log goes first: what is in it takes its room twice until then.
        let room = !self.disk_full || self.writer.empty_log().is_ok();
        let mut committed = if room {
            self.commit(&accepts)
        } else {
            Err(store::Error::Full)
        };
        if matches!(committed, Err(store::Error::Damaged)) && self.mend() {
            committed = self.commit(&accepts);
        }
        self.disk_full = matches!(committed, Err(store::Error::Full));
        match committed {
            Ok(effects) => {
                log::trace!(
                    submissions = accepts.len(), reports = self.reports.len(),
                    ms = millis(started.elapsed());
                    "committed"
                );
                for report in self.reports.drain(..) {
                    self.exports.written(report);
                }
                for (accept, effect) in accepts.into_iter().zip(effects) {
                    self.accepted(accept, effect);
                }
            }
            Err(error) => {
                log::error!(
                    reason:% = error, refused = accepts.len(), reports_waiting = self.reports.len();
                    "cannot write to the store"
                );
                let reason = Error::from(error);
                for accept in accepts {
                    (accept.reply)(Err(reason));
                }
                self.write_reports_one_by_one();
            }
        }
        self.exports
            .waiting_bytes
            .fetch_sub(bytes, Ordering::Relaxed);
        self.reports.is_empty()
    }

    /// Gets as far with the reports as a disk that is almost full lets it: to erase a payload
    /// takes as much room as the payload does, until the log is emptied.
    fn write_reports_one_by_one(&mut self) {
        while let Some(report) = self.reports.first() {
            let (now, running) = (self.exports.now(), self.exports.running());
            let change = Change::Report(report);
            let written = self.writer.commit(&[change], now, running, |_| Ok(()));
            if written.is_err() || self.writer.empty_log().is_err() {
                return;
            }
            self.exports.written(self.reports.remove(0));
        }
    }

    /// Writes the waiting reports first, so that a repeated submission sees them. Returns for each
    /// submission what became of it.
    fn commit(&mut self, accepts: &[Accept]) -> Result<Vec<Effect>, store::Error> {
        let mut size = self.writer.size()?;
        for report in &mut self.reports {
            if let News::Finished { response, .. } = &mut report.news {
                if size + response.get().len() as u64 > self.limits.max_store {
                    *response = without_body(response);
                }
                size += response.get().len() as u64;
            }
        }
        let reports = self.reports.iter().map(Change::Report);
        let submissions = accepts.iter().map(|accept| Change::Accept(&accept.export));
        let changes: Vec<_> = reports.chain(submissions).collect();
        let mut pending = HashMap::new();
        let (exports, limits) = (&self.exports, &self.limits);
        let has_room = |export: &NewExport| {
            let key = QueueKey {
                owner: export.owner.as_slice().into(),
                destination: export.destination.shared(),
            };
            let count = pending
                .entry(key)
                .or_insert_with_key(|key| exports.states.count_of(key));
            let bytes = (export.payload.len() + ROW) as u64;
            if *count >= limits.max_pending {
                return Err(Error::TooMany(*count));
            }
            if size + bytes > limits.max_store {
                return Err(Error::StoreFull);
            }
            *count += 1;
            size += bytes;
            Ok(())
        };
        let (now, running) = (exports.now(), exports.running());
        let mut effects = self.writer.commit(&changes, now, running, has_room)?;
        Ok(effects.split_off(self.reports.len()))
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
            running,
            ..
        } = export;
        let states = &self.exports.states;
        // What is held up for longer is answered at once: apps that submit from their only loop must
        // not fall behind while a destination is down.
        let poll = |id, reply| {
            let at_once = states.is_held_up(id, deadline);
            let deadline = if at_once { received } else { deadline };
            states.poll(id, |_, _| true, deadline, reply)
        };
        let answer = match effect {
            Effect::Written => {
                log::info!(
                    id:%, destination = destination.origin(), bytes = payload.len(),
                    ms = millis(received.elapsed());
                    "accepted"
                );
                let key = QueueKey {
                    owner: owner.into(),
                    destination: destination.shared(),
                };
                let key = states.insert(id, key, Progress::default());
                // Before the worker knows of it, so that the first answer is always Pending.
                let answer = poll(id, reply);
                let export = Export {
                    id,
                    destination: destination.sharing(&key.destination),
                    key,
                    accepted_at: running,
                    attempts: 0,
                    first_moved_at: None,
                };
                enqueue(
                    &self.queue,
                    Queued {
                        export,
                        resume: None,
                    },
                );
                answer
            }
            Effect::Repeat { id, response } => {
                log::info!(id:%, destination = destination.origin(); "accepted before");
                match response {
                    Some(response) => Poll::Now(reply, Ok(View::finished(id, response))),
                    None => poll(id, reply),
                }
            }
            Effect::Conflict => Poll::Now(reply, Err(Error::KeyReused)),
            Effect::NoRoom(why) => Poll::Now(reply, Err(why)),
        };
        match answer {
            Poll::Parked => {}
            Poll::Now(reply, answer) => reply(answer),
            // Not reached: an export without a result is among the states.
            Poll::Elsewhere(reply) => reply(Err(Error::NotFound)),
        }
    }
}

/// A result with its body cut off, for a store that is full.
fn without_body(response: &Arc<RawValue>) -> Arc<RawValue> {
    match serde_json::from_str::<ExtResponse>(response.get()) {
        Ok(result) if result.body.is_empty() && result.body_base64.is_none() => response.clone(),
        Ok(result) => raw(&ExtResponse {
            body: String::new(),
            body_base64: None,
            truncated: true,
            ..result
        }),
        // Not reached: it was written by this program a moment ago.
        Err(_) => response.clone(),
    }
}

/// What the recorder does when there is time: deletes expired results in small steps, and
/// empties the log, which still holds the payloads of finished exports.
struct Housekeeping {
    expire_at: Instant,
    empty_log_at: Option<Instant>,
    /// Not to be tried again before this.
    follow_clock_at: Instant,
    save_running_at: Instant,
    found_damage: bool,
    log_held_up: Option<HeldUp>,
}

/// Somebody who reads the store keeps the log from being emptied.
struct HeldUp {
    since: Instant,
    warned: bool,
}

impl Housekeeping {
    fn due_now() -> Self {
        let now = Instant::now();
        Self {
            expire_at: now,
            empty_log_at: Some(now),
            follow_clock_at: now,
            save_running_at: now + SAVE_RUNNING,
            found_damage: false,
            log_held_up: None,
        }
    }

    /// Looks whether the wall clock was set, and corrects what was stored by it since the start. A
    /// box without a battery starts with the time of its last stop: without this, results of this
    /// run would be old, and exports overdue, after the next start. The time for which a machine was
    /// asleep counts for nothing in the same way.
    fn follow_clock(&mut self, clock: &Clock, writer: &mut Writer) {
        let by = clock.behind() - writer.clock_offset();
        if by.abs() < CLOCK_SET || Instant::now() < self.follow_clock_at {
            return;
        }
        match writer.clock_was_set(clock.wall, clock.now(), by) {
            Ok(()) => {
                self.wrote();
                log::info!(ms = by; "the clock was set, and stored times with it");
            }
            Err(error) => {
                self.follow_clock_at = Instant::now() + LONGEST_SLEEP;
                log::warn!(reason:% = error; "cannot correct stored times yet");
            }
        }
    }

    fn wrote(&mut self) {
        // From the first write on, not the last: under steady traffic it has to be emptied too.
        self.empty_log_at.get_or_insert(Instant::now() + LOG_AGE);
    }

    /// Whether it is time to store the running time.
    fn is_running_due(&mut self) -> bool {
        let now = Instant::now();
        let due = self.save_running_at <= now;
        if due {
            self.save_running_at = now + SAVE_RUNNING;
        }
        due
    }

    fn sleep(&self) -> Duration {
        let next = self.expire_at.min(self.save_running_at);
        let next = self.empty_log_at.map_or(next, |at| at.min(next));
        next.saturating_duration_since(Instant::now())
    }

    fn run(&mut self, writer: &mut Writer, retention: Duration, now: Millis) {
        if self.expire_at <= Instant::now() {
            self.expire(writer, retention, now);
        }
        if self.empty_log_at.is_some_and(|at| at <= Instant::now()) {
            self.empty_log(writer);
        }
    }

    fn empty_log(&mut self, writer: &mut Writer) {
        self.empty_log_at = match writer.empty_log() {
            Ok(true) => {
                self.log_held_up = None;
                None
            }
            Ok(false) => {
                log::debug!("somebody reads the store, its log is emptied later");
                self.warn_of_reader(writer);
                Some(Instant::now() + LOG_BUSY)
            }
            Err(error) => {
                log::warn!(reason:% = error; "cannot empty the store's log");
                Some(Instant::now() + LONGEST_SLEEP)
            }
        };
    }

    /// Once, until the log has been emptied.
    fn warn_of_reader(&mut self, writer: &Writer) {
        let now = Instant::now();
        let held_up = self.log_held_up.get_or_insert(HeldUp {
            since: now,
            warned: false,
        });
        let bytes = writer.log_size();
        let long = now >= held_up.since + LONGEST_SLEEP;
        if !held_up.warned && (long || bytes > store::ORDINARY_LOG) {
            held_up.warned = true;
            log::warn!(
                bytes, file:% = writer.path().display();
                "SQLite's log cannot be emptied while somebody else reads the store, keeps the payloads \
                 of finished exports, and counts against --max-store: end what has the file open"
            );
        }
    }

    /// Deletes a few results, and notes when the next are due.
    fn expire(&mut self, writer: &mut Writer, retention: Duration, now: Millis) {
        let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
        let wait = match writer.expire(now.saturating_sub(retention)) {
            Ok((deleted, oldest)) => {
                if deleted > 0 {
                    self.wrote();
                }
                // What finishes from now on expires no sooner.
                let oldest = oldest.unwrap_or(now);
                let left = oldest.saturating_add(retention).saturating_sub(now);
                Duration::from_millis(left.max(0).unsigned_abs())
            }
            Err(error) => {
                self.found_damage = matches!(error, store::Error::Damaged);
                log::warn!(reason:% = error; "cannot delete expired results");
                LONGEST_SLEEP
            }
        };
        self.expire_at = Instant::now() + wait.min(LONGEST_SLEEP);
    }
}
