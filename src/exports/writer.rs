//! The only thread that writes: it takes everything that waits, commits once, then answers. Results that
//! nobody waits for are gathered for a moment, as each commit costs a sync. In between it deletes expired
//! results and follows the wall clock.
//!
//! Not here: the statements themselves ([`super::store`]).

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select};
use serde_json::value::RawValue;

use super::acts::Request;
use super::acts::bulk::Bulk;
use super::clock::wall_clock;
use super::queues::Progress;
use super::store::evidence::hex;
use super::store::{self, Change, Effect, ExportUpdate, NewExport, Report, Store};
use super::{Accept, Damage, Exports, Limits, UNWRITTEN_REPORTS};
use crate::export::{DAY, Error, ExtResponse, Millis, QueueId, State, View, to_json};
use crate::ledger::{Entry, Event, Sent};
use crate::logging::millis;
use crate::reply::Reply;

/// Bytes that an export takes in the store beside its payload, with its part of the indexes.
const ROW: usize = 512;
/// Submissions that go into one transaction.
const BATCH: usize = 512;
/// How long results that nobody waits for are gathered.
const GATHER: Duration = Duration::from_millis(3);
/// How often the size of the store is measured while it is written.
const MEASURE: Duration = Duration::from_secs(1);
/// From a failed write until the next try.
const RETRY: Duration = Duration::from_secs(1);
/// A difference between the clocks, in milliseconds, from which the wall clock counts as having been set.
const CLOCK_SET: Millis = 1000;
/// How often the running time is stored while a queue is failing and nothing else is written. A kill
/// loses no more than a minute of it.
const SAVE_RUNNING: Duration = Duration::from_secs(50);
/// How often rows of the ledger that are too old are looked for.
const EXPIRE_LEDGER: Duration = Duration::from_secs(60 * 60);
/// How long what the ledger only counts may stay unwritten while nothing else is written.
const COMPLETE_LEDGER: Duration = Duration::from_secs(60);
/// The longest the writer sleeps.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// The channels that the thread reads from.
pub(super) struct Incoming {
    pub accepts: Receiver<Accept>,
    pub reports: Receiver<Report>,
    /// Says that a client waits for a report that was just sent.
    pub awaited: Receiver<()>,
    pub damage: Receiver<Damage>,
    pub acts: Receiver<Request>,
}

/// The thread's state.
pub struct Writer {
    pub(super) exports: Arc<Exports>,
    pub(super) store: Store,
    limits: Limits,
    incoming: Incoming,
    /// No repair is tried before this.
    repair_again_at: Instant,
    /// Submissions taken from the channel and not yet written.
    accepts: Vec<Accept>,
    /// Reports taken from the channel and not yet written, at most [`UNWRITTEN_REPORTS`]. Those that could
    /// not be written stay here, so that in the end the worker waits too and memory stays bounded.
    reports: Vec<Report>,
    /// Whether the last commit found the disk full.
    disk_full: bool,
    /// The UTC day on which the ledger's head was logged last.
    head_logged: i64,
    size: Size,
    /// An act of the owner that is to be begun.
    act: Option<Request>,
    /// One that is under way.
    pub(super) bulk: Option<Bulk>,
}

/// The size of the store without the ledger, in bytes, as it was measured last, and all that was added since.
struct Size {
    bytes: u64,
    measured: Instant,
}

impl Writer {
    pub(super) fn new(
        exports: Arc<Exports>,
        store: Store,
        limits: Limits,
        incoming: Incoming,
    ) -> Self {
        let size = Size {
            bytes: u64::MAX,
            measured: Instant::now(),
        };
        Self {
            exports,
            store,
            size,
            limits,
            incoming,
            repair_again_at: Instant::now(),
            accepts: Vec::new(),
            reports: Vec::new(),
            disk_full: false,
            head_logged: 0,
            act: None,
            bulk: None,
        }
    }

    /// The thread's body. When `stop` is dropped, writes what still waits and closes the store.
    pub fn run(mut self, stop: &Receiver<()>) {
        let mut housekeeping = Housekeeping::due_now();
        let metrics = &self.exports.metrics;
        metrics.store_limit.set(self.limits.max_store);
        metrics.ledger_limit.set(self.limits.ledger.size);
        loop {
            self.show_sizes();
            let stopping = self.sleep(stop, &housekeeping);
            self.follow_clock(&mut housekeeping);
            // Before each write, and when there is nothing to write.
            self.check_files_exist();
            while self.take_waiting() {
                let written = self.write();
                if !(stopping && written) {
                    break;
                }
            }
            if stopping {
                if self.exports.unfinished() > 0 {
                    self.save_running();
                }
                self.complete_ledger(self.cut_off());
                if let Err(error) = self.store.truncate_wal() {
                    log::warn!(reason:% = error; "cannot empty the store's log");
                }
                return;
            }
            if let Some(act) = self.act.take() {
                self.begin_act(act);
                housekeeping.end_pauses_at = Instant::now();
            }
            self.continue_act();
            if housekeeping.end_pauses_at <= Instant::now() {
                housekeeping.end_pauses_at = Instant::now() + self.end_pauses().min(LONGEST_SLEEP);
            }
            if housekeeping.is_running_due() && self.exports.queues.lock().is_any_failing() {
                self.save_running();
            }
            if housekeeping.expire_at <= Instant::now() {
                housekeeping.expire_at = Instant::now() + self.expire();
            }
            if housekeeping.expire_ledger_at <= Instant::now() {
                housekeeping.expire_ledger_at = Instant::now() + self.expire_ledger();
            }
            if housekeeping.complete_ledger_at <= Instant::now() {
                housekeeping.complete_ledger_at = Instant::now() + COMPLETE_LEDGER;
                self.complete_ledger(Vec::new());
                self.log_head();
            }
        }
    }

    /// Corrects the times stored since the start if the wall clock was set. A box without a battery
    /// starts with the time of its last stop; without this, this run's results would look old after the
    /// next start. Time that the machine spent asleep is corrected in the same way.
    fn follow_clock(&mut self, housekeeping: &mut Housekeeping) {
        let clock = &self.exports.clock;
        let by = clock.behind() - self.store.clock_offset();
        if by.abs() < CLOCK_SET || Instant::now() < housekeeping.follow_clock_at {
            return;
        }
        let commits = self.exports.hold_checkpoints();
        let corrected = self.store.clock_was_set(clock.wall, clock.now(), by);
        drop(commits);
        match corrected {
            Ok(()) => {
                self.wrote();
                self.reread_pauses();
                housekeeping.end_pauses_at = Instant::now();
                log::info!(ms = by; "the clock was set, and stored times with it");
            }
            Err(error) => {
                housekeeping.follow_clock_at = Instant::now() + LONGEST_SLEEP;
                log::warn!(reason:% = error; "cannot correct stored times yet");
            }
        }
    }

    /// Deletes a few expired results. Returns how long until the next expire.
    fn expire(&mut self) -> Duration {
        let retention = i64::try_from(self.limits.retention.as_millis()).unwrap_or(i64::MAX);
        let now = self.exports.now();
        let commits = self.exports.hold_checkpoints();
        let expired = self.store.expire(now.saturating_sub(retention));
        drop(commits);
        let wait = match expired {
            Ok((deleted, oldest)) => {
                if deleted > 0 {
                    self.wrote();
                }
                // With no result left, the next to expire has still to finish.
                let oldest = oldest.unwrap_or(now);
                let left = oldest.saturating_add(retention).saturating_sub(now);
                Duration::from_millis(left.max(0).unsigned_abs())
            }
            Err(error) => {
                log::warn!(reason:% = error; "cannot delete expired results");
                if matches!(error, store::Error::Damaged) {
                    self.repair();
                }
                LONGEST_SLEEP
            }
        };
        wait.min(LONGEST_SLEEP)
    }

    /// Deletes a few rows of the ledger that are older than its retention. Returns how long until the next try.
    fn expire_ledger(&mut self) -> Duration {
        let now = self.exports.now();
        let commits = self.exports.hold_checkpoints();
        let expired = self.store.expire_ledger(now);
        drop(commits);
        match expired {
            Ok(false) => return EXPIRE_LEDGER,
            Ok(true) => self.wrote(),
            Err(error) => log::warn!(reason:% = error; "cannot delete old rows of the ledger"),
        }
        RETRY
    }

    /// Writes what the ledger only counts so far, and is not in a commit by now, and `more` rows.
    fn complete_ledger(&mut self, more: Vec<Entry>) {
        let refusals = &self.exports.metrics.refusals;
        if more.is_empty() && refusals.is_empty() && !self.store.has_unwritten_counts() {
            return;
        }
        let now = self.exports.now();
        let refused = refusals.take();
        let entries = [refused.rows(wall_clock()), more].concat();
        let commits = self.exports.hold_checkpoints();
        let written = self.store.record(&entries, now);
        drop(commits);
        match written {
            Ok(()) => self.wrote(),
            Err(error) => {
                self.exports.metrics.refusals.give_back(refused);
                log::warn!(reason:% = error; "cannot write to the ledger");
            }
        }
    }

    /// A row for each attempt that the stop has cut off: its payload may have left.
    fn cut_off(&self) -> Vec<Entry> {
        let ids = self.exports.queues.lock().on_wire();
        let entry = |id| {
            let found = self.store.find(id, true).ok()??;
            Some(Entry {
                export: Some(id),
                who: found.who,
                destination: self.exports.destination_name(&found.url),
                outcome: "cut off".into(),
                attempt: Some(Sent {
                    address: String::new(),
                    bytes_out: found.payload.map_or(0, |payload| payload.len() as u64),
                    bytes_in: 0,
                    digest: None,
                    ms: 0,
                    // It does not count for the export, which is tried again.
                    attempt: 0,
                }),
                note: "the service was stopped meanwhile".into(),
                ..Entry::new(Event::Attempt, wall_clock())
            })
        };
        ids.into_iter().filter_map(entry).collect()
    }

    /// Logs the head of the ledger once a day, so that it is also where whoever changes the file cannot reach it.
    fn log_head(&mut self) {
        let day = wall_clock().div_euclid(DAY);
        let (seq, hash) = self.store.ledger_head();
        if day != self.head_logged && seq > 0 {
            self.head_logged = day;
            log::info!(head:% = format_args!("{seq}:{}", hex(&hash)); "ledger");
        }
    }

    pub(super) fn wrote(&self) {
        if let Some(checkpoint) = &self.exports.checkpoint {
            checkpoint.wrote(self.store.is_wal_long());
        }
    }

    /// Tells the metrics how much is in the store. Measures that now and then.
    fn show_sizes(&mut self) {
        if self.size.bytes == u64::MAX || self.size.measured.elapsed() > MEASURE {
            // What keeps it from being measured is told at the next commit.
            let _ = self.size(0);
        }
        let metrics = &self.exports.metrics;
        if self.size.bytes < u64::MAX {
            metrics.store_bytes.set(self.size.bytes);
        }
        metrics.ledger_bytes.set(self.store.ledger_size());
        let (rows, _) = self.store.ledger_head();
        metrics.ledger_rows.set(rows.unsigned_abs());
    }

    /// Ends the process if a file of the store was removed: nothing written after that would survive a
    /// restart.
    fn check_files_exist(&self) {
        if let Some(file) = self.store.missing_file() {
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
        if let Err(error) = self.store.save_running(running) {
            log::warn!(reason:% = error; "cannot store for how long exports have been tried");
        }
    }

    /// Waits for something to do. True when it is time to stop.
    fn sleep(&mut self, stop: &Receiver<()>, housekeeping: &Housekeeping) -> bool {
        let (reported, timeout) = match self.reports.is_empty() {
            true => (&self.incoming.reports, housekeeping.sleep()),
            // Those that could not be written come first.
            false => (&never(), RETRY),
        };
        let timeout = timeout.min(self.until_next_step());
        // They are carried out one after the other.
        let acts = match self.bulk {
            None => &self.incoming.acts,
            Some(_) => &never(),
        };
        select! {
            recv(self.incoming.accepts) -> accept => self.accepts.extend(accept),
            recv(acts) -> act => self.act = act.ok(),
            recv(reported) -> report => {
                self.reports.extend(report);
                let parked = &self.exports.parked;
                if self.reports.iter().any(|report| parked.is_awaited(report.id)) {
                    return false;
                }
                return self.gather(stop);
            }
            recv(self.incoming.damage) -> damage => self.repair_unless_done(damage.ok()),
            recv(stop) -> _ => return true,
            default(timeout) => {}
        }
        false
    }

    /// Waits for more reports, unless a client waits for one. They stay in their channel meanwhile: waking
    /// up for each would cost more than everything else.
    fn gather(&mut self, stop: &Receiver<()>) -> bool {
        select! {
            recv(self.incoming.awaited) -> _ => {}
            recv(self.incoming.accepts) -> accept => self.accepts.extend(accept),
            recv(self.incoming.damage) -> damage => self.repair_unless_done(damage.ok()),
            recv(stop) -> _ => return true,
            default(GATHER) => {}
        }
        false
    }

    fn repair_unless_done(&mut self, damage: Option<Damage>) {
        if let Some(Damage { repairs, done }) = damage {
            if repairs == self.exports.repairs.load(Ordering::Acquire) {
                self.repair();
            }
            drop(done);
        }
    }

    /// Repairs the store, at most once in [`LONGEST_SLEEP`]. False if it is as it was.
    fn repair(&mut self) -> bool {
        if Instant::now() < self.repair_again_at {
            return false;
        }
        self.repair_again_at = Instant::now() + LONGEST_SLEEP;
        self.exports.repair(&mut self.store).is_ok()
    }

    /// Takes what waits, up to a batch. False if there is nothing to write.
    fn take_waiting(&mut self) -> bool {
        let room = BATCH - self.accepts.len();
        self.accepts
            .extend(self.incoming.accepts.try_iter().take(room));
        let room = UNWRITTEN_REPORTS.saturating_sub(self.reports.len());
        self.reports
            .extend(self.incoming.reports.try_iter().take(room));
        !(self.accepts.is_empty() && self.reports.is_empty())
    }

    /// Writes what was taken, and answers. False if reports are left that could not be written.
    fn write(&mut self) -> bool {
        let accepts = mem::take(&mut self.accepts);
        let bytes = accepts
            .iter()
            .map(|accept| accept.export.payload.len())
            .sum();
        let started = Instant::now();
        let exports = self.exports.clone();
        let mut committed = self.commit(&accepts);
        if matches!(committed, Err(store::Error::Damaged)) && self.repair() {
            committed = self.commit(&accepts);
        }
        self.disk_full = matches!(committed, Err(store::Error::Full));
        // Reports may have moved an export, or unblocked a queue.
        let mut is_news = !self.reports.is_empty();
        match committed {
            Ok(effects) => {
                exports.metrics.commit_duration.observe(started.elapsed());
                log::trace!(
                    submissions = accepts.len(), reports = self.reports.len(),
                    ms = millis(started.elapsed());
                    "committed"
                );
                self.wrote();
                for report in self.reports.drain(..) {
                    exports.written(report);
                }
                for (accept, effect) in accepts.into_iter().zip(effects) {
                    is_news |= self.accepted(accept, effect);
                }
            }
            Err(error) => {
                log::error!(
                    reason:% = error, refused = accepts.len(), reports_waiting = self.reports.len();
                    "cannot write to the store"
                );
                let reason = Error::from(error);
                for accept in accepts {
                    accept.reply.answer(Err(reason));
                }
                self.write_reports_one_by_one();
            }
        }
        if is_news {
            exports.wake_worker();
        }
        exports.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.reports.is_empty()
    }

    /// Writes as many reports as an almost full disk allows. Erasing a payload takes as much room as the
    /// payload, until the WAL is truncated; so that is done after each one.
    fn write_reports_one_by_one(&mut self) {
        let exports = self.exports.clone();
        let _commits = exports.hold_checkpoints();
        while let Some(report) = self.reports.first() {
            let (now, running) = (exports.now(), exports.running());
            let change = Change::Report(report);
            let written = self.store.commit(&[change], now, running, |_, _, _| Ok(()));
            if written.is_err() || self.store.truncate_wal().is_err() {
                return;
            }
            exports.written(self.reports.remove(0));
        }
    }

    /// Commits everything that was taken, reports first, so that a repeated submission sees them. Returns
    /// the effect of each submission.
    fn commit(&mut self, accepts: &[Accept]) -> Result<Vec<Effect>, store::Error> {
        let held = self.exports.clone();
        let mut commits = held.hold_checkpoints();
        // After a full disk the WAL is truncated first: its contents take room twice until then.
        if self.disk_full && self.store.truncate_wal().is_err() {
            return Err(store::Error::Full);
        }
        let more = self.bytes_of(accepts);
        let mut size = self.size(more)?;
        // A burst that a slow disk has not moved into the database yet takes its room twice as well, and nothing
        // is to be refused for that.
        if size.saturating_add(more) > self.limits.max_store && self.store.counted_wal() > 0 {
            drop(commits);
            held.empty_wal()?;
            commits = held.hold_checkpoints();
            size = self.size(more)?;
        }
        for report in &mut self.reports {
            if let ExportUpdate::Finished { response, .. } = &mut report.update {
                if size + response.get().len() as u64 > self.limits.max_store {
                    *response = without_body(response);
                }
                size += response.get().len() as u64;
            }
        }
        let reports = self.reports.iter().map(Change::Report);
        let submissions = accepts.iter().map(|accept| Change::Accept(&accept.export));
        let changes: Vec<_> = reports.chain(submissions).collect();
        let (exports, limits) = (&self.exports, &self.limits);
        let has_room = |export: &NewExport, queue: Option<QueueId>, added: usize| {
            let count = queue.map_or(0, |queue| exports.queues.lock().unfinished_in(queue)) + added;
            let bytes = (export.payload.len() + ROW) as u64;
            if count >= limits.max_pending {
                return Err(Error::TooMany(count));
            }
            if size + bytes > limits.max_store {
                return Err(Error::StoreFull);
            }
            size += bytes;
            Ok(())
        };
        let (now, running) = (exports.now(), exports.running());
        let mut effects = self.store.commit(&changes, now, running, has_room)?;
        drop(commits);
        self.size.bytes = size;
        Ok(effects.split_off(self.reports.len()))
    }

    /// How much room these submissions and all reports take at most.
    fn bytes_of(&self, accepts: &[Accept]) -> u64 {
        let results = self.reports.iter().map(|report| match &report.update {
            ExportUpdate::Finished { response, .. } => response.get().len(),
            ExportUpdate::Rescheduled { .. } => 0,
        });
        let exports = accepts
            .iter()
            .map(|accept| accept.export.payload.len() + ROW);
        results.chain(exports).sum::<usize>() as u64
    }

    /// The size of the store before a commit of `more` bytes. Measured only now and then, as that costs more
    /// than a small commit; but always if the store might be full, or the WAL is long.
    fn size(&mut self, more: u64) -> Result<u64, store::Error> {
        let most = self.size.bytes.saturating_add(more);
        let outdated = self.size.measured.elapsed() > MEASURE || self.store.is_wal_long();
        if outdated || most > self.limits.max_store {
            self.size = Size {
                bytes: self.store.size()?.saturating_sub(self.store.ledger_size()),
                measured: Instant::now(),
            };
        }
        Ok(self.size.bytes)
    }

    /// Answers a submission. True if the worker is to look at its queue.
    fn accepted(&self, accept: Accept, effect: Effect) -> bool {
        let Accept {
            export,
            received,
            deadline,
            reply,
        } = accept;
        let exports = &self.exports;
        let (id, destination) = (export.id, export.destination.origin());
        match effect {
            Effect::Written(queue) => {
                log::info!(
                    id:%, destination, bytes = export.payload.len(), ms = millis(received.elapsed());
                    "accepted"
                );
                exports.metrics.accepted.one();
                exports
                    .metrics
                    .accepted_bytes
                    .add(export.payload.len() as u64);
                let progress = Progress {
                    id,
                    attempts: 0,
                    first_moved_at: None,
                };
                let is_paused = exports.is_paused(&export.owner, &export.peer, &export.destination);
                // Under one lock, so that the first answer is always Pending.
                let mut queues = exports.queues.lock();
                let now = exports.running();
                let is_news = queues.accepted(queue, export.running, now);
                if is_paused {
                    queues.pause(queue, now);
                }
                let held_up = queues.is_held_up(queue, 0, later(now, deadline));
                let view = queues.view(queue, progress, None, now);
                drop(queues);
                self.wait_for(view, deadline, held_up, reply);
                return is_news;
            }
            Effect::Repeat(earlier, stored) => {
                log::info!(id:% = earlier, destination; "accepted before");
                let (queue, attempts) = (stored.queue, stored.attempts);
                let view = exports.view_of(earlier, stored);
                let queues = exports.queues.lock();
                let held_up =
                    queues.is_held_up(queue, attempts, later(exports.running(), deadline));
                drop(queues);
                self.wait_for(view, deadline, held_up, reply);
            }
            Effect::Conflict => reply.answer(Err(Error::KeyReused)),
            Effect::NoRoom(why) => reply.answer(Err(why)),
        }
        false
    }

    /// Answers a submission when its export is finished or at `deadline`. Answers at once if it is known
    /// that `deadline` comes first: apps that submit from their only loop must not fall behind while a
    /// destination is down.
    fn wait_for(&self, view: View, deadline: Instant, held_up: bool, reply: Reply) {
        if held_up || view.state == State::Finished || deadline <= Instant::now() {
            return reply.answer(Ok(view));
        }
        // Only this thread writes results, so none has arrived since `view` was made.
        let ticket = self.exports.parked.announce(view.id);
        if let Err(reply) = self.exports.park(ticket, view.id, deadline, reply) {
            reply.answer(Ok(view));
        }
    }
}

/// The running time at `deadline`, if it is `now` at present.
fn later(now: Millis, deadline: Instant) -> Millis {
    let wait = deadline.saturating_duration_since(Instant::now());
    now.saturating_add(Millis::try_from(wait.as_millis()).unwrap_or(Millis::MAX))
}

/// A result without its body, for a store that is full.
fn without_body(response: &Arc<RawValue>) -> Arc<RawValue> {
    match serde_json::from_str::<ExtResponse>(response.get()) {
        Ok(result) if result.body.is_empty() && result.body_base64.is_none() => response.clone(),
        Ok(result) => to_json(&ExtResponse {
            body: String::new(),
            body_base64: None,
            truncated: true,
            ..result
        }),
        // Not reached: this program wrote it a moment ago.
        Err(_) => response.clone(),
    }
}

/// When the writer's periodic work is due.
struct Housekeeping {
    expire_at: Instant,
    /// The clock is not followed before this, after a correction that failed.
    follow_clock_at: Instant,
    save_running_at: Instant,
    expire_ledger_at: Instant,
    complete_ledger_at: Instant,
    end_pauses_at: Instant,
}

impl Housekeeping {
    fn due_now() -> Self {
        let now = Instant::now();
        Self {
            expire_at: now,
            follow_clock_at: now,
            save_running_at: now + SAVE_RUNNING,
            // Later than the others: a clock that was wrong at the start has been set by then.
            expire_ledger_at: now + EXPIRE_LEDGER,
            // Now, for the head that is logged each day.
            complete_ledger_at: now,
            end_pauses_at: now,
        }
    }

    /// Whether it is time to store the running time. Sets the next time if so.
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
        let next = next.min(self.expire_ledger_at).min(self.complete_ledger_at);
        let next = next.min(self.end_pauses_at);
        next.saturating_duration_since(Instant::now())
    }
}
