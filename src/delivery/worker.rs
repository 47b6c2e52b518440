//! The worker: takes what is due, makes one attempt, hands over what came of it, and repeats.
//!
//! Leader and followers: exactly one thread has the *lead* at any time, with all that feeds it, and
//! decides. Before an attempt it hands the lead over. If the attempt is over soon,
//! it takes the lead back; if not, the follower takes it and goes on, and the thread that is stuck
//! reports to it later. So the usual case costs one thread (and a follower for a while), a distant
//! destination does not slow the others down, and a hanging one holds up nobody.
//!
//! Not here: whose turn it is and how a result is kept (`exports`), how a POST is made
//! ([`super::attempt`]), and what is tried again ([`super::retry`]).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select, unbounded};
use parking_lot::{Condvar, Mutex};
use ureq::http::StatusCode;

use super::attempt::{Answer, Client, Failure, Kind, Outcome};
use super::retry::{is_hopeless, retry};
use crate::export::{Export, ExtResponse, FailureReport, LastError};
use crate::exports::Exports;
use crate::exports::attempts::{GivenUp, Taken, Work};
use crate::exports::queues::Turn;
use crate::logging::millis;
use crate::threads;

/// After so long in an attempt a thread loses the lead.
const PATIENCE: Duration = Duration::from_millis(100);
/// A follower that was not needed for so long ends.
const FOLLOWING: Duration = Duration::from_secs(10);

/// How the worker goes about its work.
#[derive(Debug)]
pub struct Settings {
    /// Statuses that count as failed attempts.
    pub retry_on: Vec<u16>,
    /// Whether there is any network that plain `http` may go to.
    pub plain_allowed: bool,
    /// How many attempts there may be at a time, at least one.
    pub max_concurrent_attempts: usize,
}

/// Starts the worker. It delivers what there is, and looks again whenever something comes through
/// `woken`, until `stop` is dropped; attempts under way then are still finished. What is returned is
/// closed after the last of them.
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

/// What only the thread that leads may touch.
struct Lead {
    woken: Receiver<()>,
    /// From threads that have lost the lead.
    reported: Receiver<Report>,
    stop: Receiver<()>,
    under_way: usize,
    /// Those of them whose queue's attempt before has failed.
    failing_under_way: usize,
    /// Dropped with the lead, to say that all is over.
    _running: Sender<()>,
}

/// A turn that is over.
struct Report {
    failing: bool,
    /// None where there was nothing to send.
    attempt: Option<Attempt>,
}

/// What came of an attempt.
struct Attempt {
    export: Export,
    bytes: usize,
    took: Duration,
    outcome: Outcome,
}

/// What all threads of the worker share.
struct Workers {
    exports: Arc<Exports>,
    client: Client,
    settings: Settings,
    reports: Sender<Report>,
    /// Held for moments only, never during an attempt or while deciding.
    handover: Mutex<Handover>,
    changed: Condvar,
}

/// Where the lead is while the thread that had it makes an attempt.
#[derive(Default)]
struct Handover {
    lead: Option<Box<Lead>>,
    /// From when on the follower may take it; set only while there is one.
    takeover_at: Option<Instant>,
    follower: Follower,
    /// Threads that have lost the lead and are still in their attempt.
    without_lead: usize,
    closed: bool,
}

/// What the thread does that may take the lead next.
#[derive(Clone, Copy, Default, PartialEq)]
enum Follower {
    /// There is none.
    #[default]
    None,
    /// It looks every now and then, and need not be woken for each attempt: in a long row of short ones
    /// that would cost more than all else.
    Watching,
    /// It sleeps until it is woken.
    Asleep,
}

impl Workers {
    /// What each thread of the worker does, beginning with the lead or as a follower.
    fn run(self: Arc<Self>, mut lead: Option<Box<Lead>>) {
        while let Some(taken) = lead.take().or_else(|| self.follow()) {
            if !self.work(taken) {
                return;
            }
        }
    }

    /// Decides and makes attempts for as long as this thread has the lead. True where it has lost it
    /// and is to follow now; false where it is no longer needed.
    fn work(self: &Arc<Self>, mut lead: Box<Lead>) -> bool {
        while let Some(turn) = lead.next(self) {
            lead.under_way += 1;
            lead.failing_under_way += usize::from(turn.failing);
            if self.most_without_lead() == 0 {
                let report = self.attempt(&turn);
                lead.book(report, self);
                continue;
            }
            self.hand_over(lead, turn.slow);
            let report = self.attempt(&turn);
            match self.take_back() {
                Some(taken) => {
                    lead = taken;
                    lead.book(report, self);
                }
                None => {
                    // The thread with the lead has the other end, and waits for all reports
                    // before it ends.
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

    /// Leaves the lead to the follower, at once or when patience is over; or, where there are as many
    /// attempts as there may be, to the first thread that comes back from one.
    fn hand_over(self: &Arc<Self>, lead: Box<Lead>, slow: bool) {
        let mut handover = self.handover.lock();
        handover.lead = Some(lead);
        if handover.without_lead >= self.most_without_lead() {
            return;
        }
        let now = Instant::now();
        handover.takeover_at = Some(if slow { now } else { now + PATIENCE });
        match handover.follower {
            // It looks within `PATIENCE`.
            Follower::Watching if !slow => {}
            Follower::Watching | Follower::Asleep => {
                self.changed.notify_one();
            }
            Follower::None => {
                let workers = self.clone();
                match threads::try_spawn("worker", move || workers.run(None)) {
                    Ok(_) => handover.follower = Follower::Watching,
                    // Then this attempt is waited for; the next one tries again.
                    Err(error) => log::warn!(reason:% = error; "no thread to follow the worker"),
                }
            }
        }
    }

    /// Takes the lead back after an attempt: this thread's own, or one that another has handed over
    /// when there could be no follower. `None` where it was taken meanwhile.
    fn take_back(&self) -> Option<Box<Lead>> {
        let mut handover = self.handover.lock();
        let lead = handover.lead.take();
        match lead {
            Some(_) => handover.takeover_at = None,
            // Whoever has the lead instead was counted in this one's place.
            None => handover.without_lead -= 1,
        }
        lead
    }

    /// Waits until the lead may be taken. `None` when no follower is needed any longer.
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
                None if idle_since.elapsed() < 2 * PATIENCE => {
                    self.changed.wait_for(&mut handover, PATIENCE);
                }
                None => {
                    handover.follower = Follower::Asleep;
                    let wait = self.changed.wait_for(&mut handover, FOLLOWING);
                    if wait.timed_out() && handover.takeover_at.is_none() {
                        handover.follower = Follower::None;
                        return None;
                    }
                    handover.follower = Follower::Watching;
                }
            }
        }
    }

    fn attempt(&self, turn: &Turn) -> Report {
        let taken = self.exports.begin(turn);
        Report {
            failing: turn.failing,
            attempt: taken.map(|taken| self.post(taken)),
        }
    }

    fn post(&self, Taken { export, payload }: Taken) -> Attempt {
        log::trace!(id:% = export.id, destination = export.destination.origin(); "attempt");
        let started = Instant::now();
        let outcome = match &payload {
            Some(payload) => {
                let outcome = self.client.post(export.id, &export.destination, payload);
                self.say_what_cannot_change(outcome, &export)
            }
            None => Outcome::Failed(Failure {
                kind: Kind::Lost,
                message:
                    "the payload is no longer in the store: it was damaged, or somebody removed it"
                        .into(),
                connected: false,
            }),
        };
        Attempt {
            export,
            bytes: payload.map_or(0, |payload| payload.len()),
            took: started.elapsed(),
            outcome,
        }
    }

    /// Where nothing may be sent whatever the name stands for, that a look-up of it has failed is
    /// beside the point.
    fn say_what_cannot_change(&self, outcome: Outcome, export: &Export) -> Outcome {
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
    /// Waits for the next turn, and books what is reported meanwhile. `None` when it is
    /// time to stop and nothing is under way any more.
    fn next(&mut self, workers: &Workers) -> Option<Turn> {
        loop {
            while let Ok(report) = self.reported.try_recv() {
                self.book(report, workers);
            }
            if self.stop.try_recv() == Err(TryRecvError::Disconnected) {
                while self.under_way > 0 {
                    let report = self.reported.recv().ok()?;
                    self.book(report, workers);
                }
                return None;
            }
            match workers.exports.next(self.may_try_failing(workers)) {
                Work::Attempt(turn) => return Some(turn),
                Work::GiveUp(given_up) => give_up(given_up, workers),
                Work::Wait(wait) => self.wait(wait.unwrap_or(Duration::MAX), workers),
            }
        }
    }

    /// Queues whose last attempt failed are likely to hang again: they may take no more than half
    /// of the threads, and not the last one.
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
                self.book(report, workers);
            },
            recv(self.stop) -> _ => {}
            recv(timer) -> _ => {}
        }
    }

    /// Decides what an attempt's outcome means, and tells the exports.
    fn book(&mut self, report: Report, workers: &Workers) {
        self.under_way -= 1;
        self.failing_under_way -= usize::from(report.failing);
        let Some(attempt) = report.attempt else {
            return;
        };
        let Attempt {
            export,
            bytes,
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
        match (again, outcome) {
            (Some(again), outcome) => {
                let (kind, message) = words(&outcome, &export);
                let error = LastError {
                    kind,
                    message: &message,
                };
                if let Some(given_up) = workers.exports.failed(export, again, &error, took) {
                    give_up(given_up, workers);
                }
            }
            (None, Outcome::Answered(answer)) => {
                workers.exports.answered(&export, answered(answer), took);
            }
            (None, Outcome::Failed(failure)) => {
                let kind = failure.kind.name().into();
                let result = failed(kind, failure.message, export.attempts.saturating_add(1));
                workers.exports.ended(&export, result);
            }
        }
    }
}

/// Finishes an export that has been tried for long enough, with the last error.
fn give_up(mut given_up: GivenUp, workers: &Workers) {
    let Export { id, attempts, .. } = given_up.export;
    log::warn!(id:%, attempts; "given up");
    let (kind, message) = given_up.reason.take().unwrap_or_else(|| {
        // Not reached: its queue has failed, and that has a reason.
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

/// Kind and message of an attempt that counts as failed.
fn words(outcome: &Outcome, export: &Export) -> (&'static str, String) {
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

/// A cut may fall inside a character: text whose only flaw is its last character is text still.
fn cut_text(error: std::string::FromUtf8Error) -> (String, Option<String>) {
    let flaw = error.utf8_error();
    let bytes = error.into_bytes();
    match str::from_utf8(&bytes[..flaw.valid_up_to()]) {
        Ok(text) if flaw.error_len().is_none() => (text.to_owned(), None),
        _ => (String::new(), Some(STANDARD.encode(&bytes))),
    }
}

/// A result of this service's own, where there was no response for good.
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

/// The registered reason phrase: HTTP clients do not pass on the one that was sent.
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
