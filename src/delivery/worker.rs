//! The worker: takes an export that is due, makes one attempt, reports its outcome, and repeats.
//!
//! The threads are leader and followers. Exactly one at a time has the *lead*, which comes with the
//! worker's channels, and decides what to do. It makes the lead available before an attempt. If the attempt
//! is short it takes the lead back. If not, the follower takes the lead and goes on, and the thread that is
//! stuck reports to it later. So usually one thread does the work (and a follower exists for a while), a
//! distant destination does not slow the others down, and one that hangs holds up nobody.
//!
//! Not here: whose turn it is and storing results (`exports`), making a POST ([`super::attempt`]), and what
//! is tried again ([`super::retry`]).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select, unbounded};
use parking_lot::{Condvar, Mutex};
use ureq::http::StatusCode;

use super::attempt::{Answer, Client, Failure, Kind, Outcome};
use super::connect;
use super::retry::{is_hopeless, retry};
use crate::export::{Export, ExtResponse, FailureReport, LastError};
use crate::exports::Exports;
use crate::exports::attempts::{GivenUp, Taken, Work};
use crate::exports::queues::Turn;
use crate::ledger::{self, Sent};
use crate::logging::millis;
use crate::metrics::Metrics;
use crate::threads;

/// After this long in an attempt a thread loses the lead, if no other has.
const TAKEOVER: Duration = Duration::from_millis(100);
/// The same if many others have: the network is slow then, and the next queue is likely to be.
const SHORTEST_TAKEOVER: Duration = Duration::from_millis(20);
/// A follower that was not needed for this long ends.
const FOLLOWER_IDLE: Duration = Duration::from_secs(10);

/// The worker's settings.
#[derive(Debug)]
pub struct Settings {
    /// Statuses that count as failed attempts.
    pub retry_on: Vec<u16>,
    /// Whether there is any network that plain `http` may go to.
    pub plain_allowed: bool,
    /// How many attempts there may be at a time; at least one.
    pub max_concurrent_attempts: usize,
}

/// Starts the worker. It delivers what is due, and looks again after each message through `woken`, until
/// `stop` is dropped. Attempts under way then are still finished. The returned channel is disconnected after
/// the last of them.
pub fn start(
    woken: Receiver<()>,
    stop: Receiver<()>,
    exports: Arc<Exports>,
    client: Client,
    settings: Settings,
) -> Receiver<()> {
    let (running, ended) = bounded(0);
    let (reports, reported) = unbounded();
    let lead = Lead {
        woken,
        reported,
        stop,
        under_way: 0,
        failing_under_way: 0,
        _running: running,
    };
    let workers = Arc::new(Workers {
        exports,
        client,
        settings,
        reports,
        handover: Mutex::default(),
        changed: Condvar::new(),
    });
    threads::spawn("worker", move || workers.run(Some(Box::new(lead))));
    ended
}

/// State that only the leading thread may touch.
struct Lead {
    woken: Receiver<()>,
    /// From threads that have lost the lead.
    reported: Receiver<FinishedTurn>,
    stop: Receiver<()>,
    under_way: usize,
    /// Those of them whose queue was failing already.
    failing_under_way: usize,
    /// Dropped with the lead, to say that the worker has ended.
    _running: Sender<()>,
}

/// A turn that is over.
struct FinishedTurn {
    failing: bool,
    /// None if there was nothing to send.
    attempt: Option<Attempt>,
}

/// An attempt that was made.
struct Attempt {
    export: Export,
    bytes: usize,
    sent: Sent,
    took: Duration,
    outcome: Outcome,
}

/// Shared by all threads of the worker.
struct Workers {
    exports: Arc<Exports>,
    client: Client,
    settings: Settings,
    reports: Sender<FinishedTurn>,
    /// Locked briefly, and never during an attempt or while deciding.
    handover: Mutex<Handover>,
    changed: Condvar,
}

/// Holds the lead while the thread that had it makes an attempt.
#[derive(Default)]
struct Handover {
    lead: Option<Box<Lead>>,
    /// When the follower may take the lead. Set only while there is a follower.
    takeover_at: Option<Instant>,
    follower: Follower,
    /// Threads that have lost the lead and are still in their attempt.
    without_lead: usize,
    closed: bool,
}

impl Handover {
    /// How long an attempt may take before its thread loses the lead.
    fn takeover(&self) -> Duration {
        let stuck = u32::try_from(self.without_lead).unwrap_or(u32::MAX);
        (TAKEOVER / stuck.saturating_add(1)).max(SHORTEST_TAKEOVER)
    }
}

/// What the thread that may take the lead next is doing.
#[derive(Clone, Copy, Default, PartialEq)]
enum Follower {
    /// There is none.
    #[default]
    None,
    /// It polls, and need not be woken for each attempt. In a long row of short attempts, waking it would
    /// cost more than everything else.
    Watching,
    /// It sleeps until it is woken.
    Asleep,
}

impl Workers {
    /// The body of each thread, which begins with the lead or as a follower.
    fn run(self: Arc<Self>, mut lead: Option<Box<Lead>>) {
        while let Some(taken) = lead.take().or_else(|| self.follow()) {
            if !self.work(taken) {
                return;
            }
        }
    }

    /// Decides and makes attempts while this thread has the lead. True if it has lost the lead and is to
    /// follow now; false if it is no longer needed.
    fn work(self: &Arc<Self>, mut lead: Box<Lead>) -> bool {
        while let Some(turn) = lead.next(self) {
            lead.under_way += 1;
            lead.failing_under_way += usize::from(turn.failing);
            if self.most_without_lead() == 0 {
                let report = self.attempt(&turn);
                lead.record(report, self);
                continue;
            }
            self.hand_over(lead, turn.slow);
            let report = self.attempt(&turn);
            match self.take_back() {
                Some(taken) => {
                    lead = taken;
                    lead.record(report, self);
                }
                None => {
                    // The leading thread waits for all reports before it ends, so this cannot fail.
                    let _ = self.reports.send(report);
                    let mut handover = self.handover.lock();
                    let is_alone = handover.follower == Follower::None;
                    if is_alone {
                        handover.follower = Follower::Watching;
                    }
                    return is_alone;
                }
            }
        }
        self.handover.lock().closed = true;
        self.changed.notify_all();
        false
    }

    fn most_without_lead(&self) -> usize {
        self.settings.max_concurrent_attempts - 1
    }

    /// Makes the lead available to the follower, at once if `slow`, else after [`Handover::takeover`]. At the limit of
    /// concurrent attempts, the first thread that returns from one takes it.
    fn hand_over(self: &Arc<Self>, lead: Box<Lead>, slow: bool) {
        let mut handover = self.handover.lock();
        handover.lead = Some(lead);
        if handover.without_lead >= self.most_without_lead() {
            return;
        }
        let now = Instant::now();
        handover.takeover_at = Some(match slow {
            true => now,
            false => now + handover.takeover(),
        });
        match handover.follower {
            // It looks within that time.
            Follower::Watching if !slow => {}
            Follower::Watching | Follower::Asleep => {
                self.changed.notify_one();
            }
            Follower::None => {
                let workers = self.clone();
                match threads::try_spawn("worker", move || workers.run(None)) {
                    Ok(_) => handover.follower = Follower::Watching,
                    // This thread takes the lead back after its attempt, and the next attempt tries again.
                    Err(error) => log::warn!(reason:% = error; "no thread to follow the worker"),
                }
            }
        }
    }

    /// Takes the lead after an attempt, whether this thread made it available or, when there could be no
    /// follower, another one. `None` if it was taken meanwhile.
    fn take_back(&self) -> Option<Box<Lead>> {
        let mut handover = self.handover.lock();
        let lead = handover.lead.take();
        match lead {
            Some(_) => handover.takeover_at = None,
            // This thread was counted when the follower took the lead.
            None => handover.without_lead -= 1,
        }
        lead
    }

    /// Waits until this thread may take the lead. `None` when no follower is needed any longer.
    fn follow(&self) -> Option<Box<Lead>> {
        let mut handover = self.handover.lock();
        let mut idle_since = Instant::now();
        loop {
            if handover.closed {
                return None;
            }
            match handover.takeover_at {
                Some(at) if at <= Instant::now() => {
                    handover.takeover_at = None;
                    handover.without_lead += 1;
                    handover.follower = Follower::None;
                    return handover.lead.take();
                }
                Some(at) => {
                    handover.follower = Follower::Watching;
                    self.changed.wait_until(&mut handover, at);
                    idle_since = Instant::now();
                }
                None if idle_since.elapsed() < 2 * TAKEOVER => {
                    let wait = handover.takeover();
                    self.changed.wait_for(&mut handover, wait);
                }
                None => {
                    handover.follower = Follower::Asleep;
                    let wait = self.changed.wait_for(&mut handover, FOLLOWER_IDLE);
                    if wait.timed_out() && handover.takeover_at.is_none() {
                        handover.follower = Follower::None;
                        return None;
                    }
                    handover.follower = Follower::Watching;
                }
            }
        }
    }

    fn attempt(&self, turn: &Turn) -> FinishedTurn {
        let taken = self.exports.begin(turn);
        FinishedTurn {
            failing: turn.failing,
            attempt: taken.map(|taken| self.post(taken)),
        }
    }

    fn post(&self, Taken { export, payload }: Taken) -> Attempt {
        log::trace!(id:% = export.id, destination = export.destination.origin(); "attempt");
        let _under_way = self.exports.metrics.attempts_in_flight.enter();
        let started = Instant::now();
        let outcome = match &payload {
            Some(payload) => {
                let outcome = self.client.post(export.id, &export.destination, payload);
                self.prefer_forbidden_http(outcome, &export)
            }
            None => Outcome::Failed(Failure {
                kind: Kind::Lost,
                message:
                    "the payload is no longer in the store: it was damaged, or somebody removed it"
                        .into(),
                connected: false,
            }),
        };
        let took = started.elapsed();
        let peer = payload.is_some().then(connect::peer).flatten();
        let bytes = payload.as_ref().map_or(0, Vec::len);
        let (may_have_left, bytes_in) = match &outcome {
            Outcome::Answered(answer) => (true, answer.body.len()),
            Outcome::Failed(failure) => (failure.connected, 0),
        };
        Attempt {
            sent: Sent {
                address: peer.map_or_else(String::new, ledger::address),
                bytes_out: if may_have_left { bytes as u64 } else { 0 },
                bytes_in: bytes_in as u64,
                digest: payload.map(|payload| self.exports.digest(&payload)),
                ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                attempt: export.attempts.saturating_add(1),
            },
            export,
            bytes,
            took,
            outcome,
        }
    }

    /// Reports that plain `http` is forbidden instead of another failure, such as a failed look-up, if the
    /// destination could not be sent to at any address.
    fn prefer_forbidden_http(&self, outcome: Outcome, export: &Export) -> Outcome {
        let forbidden = |kind| matches!(kind, Kind::ForbiddenAddress | Kind::ForbiddenHttp);
        match outcome {
            Outcome::Failed(failure)
                if is_hopeless(&export.destination, self.settings.plain_allowed)
                    && !forbidden(failure.kind) =>
            {
                Outcome::Failed(Failure {
                    kind: Kind::ForbiddenHttp,
                    message: format!(
                        "nothing is sent to {}: plain http could be read on its way: use https, or \
                         start with --allow-network to permit it in a network of yours",
                        export.destination.authority()
                    ),
                    connected: false,
                })
            }
            outcome => outcome,
        }
    }
}

impl Lead {
    /// Waits for the next turn, and records what is reported meanwhile. `None` when it is time to stop and
    /// no attempt is under way any longer.
    fn next(&mut self, workers: &Workers) -> Option<Turn> {
        loop {
            while let Ok(report) = self.reported.try_recv() {
                self.record(report, workers);
            }
            if self.stop.try_recv() == Err(TryRecvError::Disconnected) {
                while self.under_way > 0 {
                    let report = self.reported.recv().ok()?;
                    self.record(report, workers);
                }
                return None;
            }
            match workers.exports.next(self.may_try_failing(workers)) {
                Work::Attempt(turn) => return Some(turn),
                Work::GiveUp(given_up) => give_up(*given_up, workers),
                Work::Wait(wait) => self.wait(wait.unwrap_or(Duration::MAX), workers),
            }
        }
    }

    /// Whether a failing queue may be tried. Its attempt is likely to hang again, so these may take no more
    /// than half of the threads, and not the last one.
    fn may_try_failing(&self, workers: &Workers) -> bool {
        let most = workers.most_without_lead();
        most == 0
            || self.failing_under_way < most.div_ceil(2)
                && workers.handover.lock().without_lead < most
    }

    fn wait(&mut self, wait: Duration, workers: &Workers) {
        let at = Instant::now().checked_add(wait);
        let timer = at.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
        select! {
            recv(self.woken) -> _ => {}
            recv(self.reported) -> report => if let Ok(report) = report {
                self.record(report, workers);
            },
            recv(self.stop) -> _ => {}
            recv(timer) -> _ => {}
        }
    }

    /// Decides what an attempt's outcome means, and reports it to `exports`.
    fn record(&mut self, report: FinishedTurn, workers: &Workers) {
        self.under_way -= 1;
        self.failing_under_way -= usize::from(report.failing);
        let Some(attempt) = report.attempt else {
            return;
        };
        let Attempt {
            export,
            bytes,
            sent,
            took,
            outcome,
        } = attempt;
        let Settings {
            retry_on,
            plain_allowed,
            ..
        } = &workers.settings;
        let destination = &export.destination;
        let again = retry(
            &outcome,
            destination,
            *plain_allowed,
            retry_on,
            SystemTime::now(),
        );
        log_attempt(&export, bytes, took, &outcome, again.is_some());
        count_attempt(
            &workers.exports.metrics,
            &sent,
            took,
            &outcome,
            again.is_some(),
        );
        match (again, outcome) {
            (Some(again), outcome) => {
                let (kind, message) = kind_and_message(&outcome, &export);
                let error = LastError {
                    kind,
                    message: &message,
                };
                let how = match &outcome {
                    Outcome::Answered(answer) => answer.status.to_string(),
                    Outcome::Failed(failure) => failure.kind.name().into(),
                };
                let given_up = workers
                    .exports
                    .failed(export, again, &error, how, sent, took);
                if let Some(given_up) = given_up {
                    give_up(given_up, workers);
                }
            }
            (None, Outcome::Answered(answer)) => {
                workers
                    .exports
                    .answered(&export, answered(answer), sent, took);
            }
            (None, Outcome::Failed(failure)) => {
                let kind = failure.kind.name().into();
                let result = failed(kind, failure.message, export.attempts.saturating_add(1));
                workers.exports.ended(&export, result, sent);
            }
        }
    }
}

/// Finishes an export that was tried for long enough, with its last error.
fn give_up(mut given_up: GivenUp, workers: &Workers) {
    let attempts = given_up.export.attempts;
    let (kind, message) = given_up.reason.take().unwrap_or_else(|| {
        // Not reached: its queue is failing, and so has a reason.
        let message = "there was no turn in time";
        (Kind::Timeout.name().into(), message.into())
    });
    workers
        .exports
        .give_up(given_up, failed(kind, message, attempts));
}

fn log_attempt(export: &Export, bytes: usize, took: Duration, outcome: &Outcome, again: bool) {
    let (id, destination, ms) = (export.id, export.destination.origin(), millis(took));
    let attempt = export.attempts.saturating_add(1);
    match outcome {
        Outcome::Answered(answer) if again => log::warn!(
            id:%, destination, bytes, attempt, kind = "status", status = answer.status,
            response_bytes = answer.body.len(), ms;
            "failed"
        ),
        Outcome::Answered(answer) => log::info!(
            id:%, destination, bytes, attempt, status = answer.status,
            response_bytes = answer.body.len(), ms;
            "delivered"
        ),
        Outcome::Failed(failure) => log::warn!(
            id:%, destination, bytes, attempt, kind = failure.kind.name(),
            reason = failure.message.as_str(), ms;
            "failed"
        ),
    }
}

fn count_attempt(metrics: &Metrics, sent: &Sent, took: Duration, outcome: &Outcome, again: bool) {
    let outcome = match outcome {
        Outcome::Answered(answer) => {
            metrics.answer(answer.status);
            if again { "status" } else { "answered" }
        }
        Outcome::Failed(failure) => failure.kind.name(),
    };
    metrics.attempts.count(outcome);
    metrics.attempt_duration.observe(took);
    metrics.sent_bytes.add(sent.bytes_out);
    metrics.received_bytes.add(sent.bytes_in);
}

/// Kind and message for an attempt that counts as failed.
fn kind_and_message(outcome: &Outcome, export: &Export) -> (&'static str, String) {
    match outcome {
        Outcome::Failed(failure) => (failure.kind.name(), failure.message.clone()),
        Outcome::Answered(answer) => {
            let host = export.destination.authority();
            let (status, reason) = (answer.status, reason(answer.status));
            ("status", format!("{host} answered {status} {reason}"))
        }
    }
}

fn answered(answer: Answer) -> ExtResponse {
    let (body, body_base64) = match String::from_utf8(answer.body) {
        Ok(text) => (text, None),
        Err(error) if answer.truncated => cut_text(error),
        Err(error) => (String::new(), Some(STANDARD.encode(error.as_bytes()))),
    };
    ExtResponse {
        body,
        body_base64,
        truncated: answer.truncated,
        memory: answer.memory,
        ..ExtResponse::with_status(answer.status, reason(answer.status))
    }
}

/// The body fields for cut text that is not valid UTF-8. A cut may fall inside a character: if only the last
/// one is incomplete, the rest is text.
fn cut_text(error: std::string::FromUtf8Error) -> (String, Option<String>) {
    let flaw = error.utf8_error();
    let bytes = error.into_bytes();
    match str::from_utf8(&bytes[..flaw.valid_up_to()]) {
        Ok(text) if flaw.error_len().is_none() => (text.to_owned(), None),
        _ => (String::new(), Some(STANDARD.encode(&bytes))),
    }
}

/// The result of an export that ends without a final response.
fn failed(kind: String, message: String, attempts: u32) -> ExtResponse {
    let is = |one: Kind| kind == one.name();
    let status = if is(Kind::Timeout) {
        504
    } else if is(Kind::ForbiddenAddress) || is(Kind::ForbiddenHttp) {
        403
    } else {
        502
    };
    ExtResponse {
        error: Some(FailureReport {
            kind,
            message,
            attempts,
        }),
        ..ExtResponse::with_status(status, reason(status))
    }
}

/// The registered reason phrase. ureq does not pass on the one that was sent.
fn reason(status: u16) -> &'static str {
    StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or("Unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(body: &[u8], truncated: bool) -> (String, Option<String>) {
        let response = answered(Answer {
            status: 200,
            body: body.to_vec(),
            truncated,
            retry_after: None,
            memory: None,
        });
        (response.body, response.body_base64)
    }

    #[test]
    fn the_more_threads_are_stuck_the_sooner_the_next_loses_the_lead_but_no_short_attempt_does() {
        let takeover = |without_lead| {
            let handover = Handover {
                without_lead,
                ..Handover::default()
            };
            handover.takeover().as_millis()
        };
        assert_eq!(
            [0, 1, 3, 4, 5, 1000].map(takeover),
            [100, 50, 25, 20, 20, 20]
        );
    }

    #[test]
    fn text_stays_text_and_anything_else_goes_in_base64() {
        assert_eq!(body("grün".as_bytes(), false), ("grün".into(), None));
        assert_eq!(
            body(b"\xff\x00", false),
            (String::new(), Some("/wA=".into()))
        );
    }

    #[test]
    fn text_cut_inside_a_character_loses_that_character_only() {
        assert_eq!(body(b"gr\xc3", true), ("gr".into(), None));
        assert_eq!(body(b"gr\xc3", false), (String::new(), Some("Z3LD".into())));
        assert_eq!(
            body(b"\xff gr\xc3", true),
            (String::new(), Some("/yBncsM=".into()))
        );
    }

    #[test]
    fn timeouts_are_504_forbidden_addresses_403_and_other_failures_502() {
        let status = |kind: Kind| failed(kind.name().into(), String::new(), 1).status_code;
        assert_eq!(status(Kind::Timeout), 504);
        assert_eq!(status(Kind::Connect), 502);
        assert_eq!(status(Kind::ForbiddenAddress), 403);
    }
}
