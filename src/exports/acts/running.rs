//! The writer's side of the owner's acts: those that are a single commit, and the beginning of the others.
//!
//! Not here: acts on many exports ([`super::bulk`]), and the statements ([`crate::exports::store::acts`]).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::Sender;
use uuid::Uuid;

use super::subject::{Meaning, Subject, is_at};
use super::{Act, ActError, Acted, Request, Target, checked_label};
use crate::destination::Destination;
use crate::export::{Millis, QueueId};
use crate::exports::clock::wall_clock;
use crate::exports::store::acts::{Found, Pause};
use crate::exports::store::{self, Store};
use crate::exports::writer::Writer;
use crate::exports::{Exports, queues};
use crate::ledger::{Entry, Event, LedgerKey};

/// A queue by its names.
#[derive(Clone)]
pub struct Named {
    pub id: QueueId,
    pub who: String,
    pub destination: String,
}

impl Exports {
    /// Whether something that this sender submits to this destination is paused.
    pub(in crate::exports) fn is_paused(
        &self,
        owner: &[u8],
        peer: &str,
        destination: &Destination,
    ) -> bool {
        let pauses = self.pauses.lock();
        if pauses.is_empty() {
            return false;
        }
        let who = crate::ledger::who(owner, peer);
        is_any(&pauses, &who, &self.ledger_key.name(destination))
    }
}

fn is_any(pauses: &[Pause], who: &str, destination: &str) -> bool {
    let subjects = pauses
        .iter()
        .filter_map(|pause| Subject::from_stored(&pause.subject));
    subjects
        .into_iter()
        .any(|subject| subject.matches(who, destination))
}

/// All queues by their names.
fn named(store: &Store, key: &LedgerKey) -> Result<Vec<Named>, store::Error> {
    let names = store.queue_names()?.into_iter();
    let names = names.map(|name| Named {
        id: name.id,
        who: name.who,
        destination: name_of(key, &name.url),
    });
    Ok(names.collect())
}

/// A destination's name; empty for a URL that an earlier release accepted and this one refuses.
pub fn name_of(key: &LedgerKey, url: &str) -> String {
    Destination::parse(url).map_or_else(|_| String::new(), |url| key.name(&url))
}

/// Pauses the queues that these pauses hold.
///
/// # Errors
/// The store cannot be read.
pub fn pause_restored(
    queues: &mut queues::Queues,
    store: &Store,
    key: &LedgerKey,
    pauses: &[Pause],
    now: Millis,
) -> Result<(), store::Error> {
    if pauses.is_empty() {
        return Ok(());
    }
    for queue in named(store, key)? {
        if is_any(pauses, &queue.who, &queue.destination) {
            queues.pause(queue.id, now);
        }
    }
    Ok(())
}

/// A row of the ledger about an act on a subject.
fn entry(event: Event, subject: &Subject, note: String) -> Entry {
    let (who, destination) = subject.names();
    Entry {
        who: who.into(),
        destination: destination.into(),
        note,
        ..Entry::new(event, wall_clock())
    }
}

/// `1 export`, `1000 exports`.
pub(crate) fn exports(count: u64) -> String {
    match count {
        1 => "1 export".into(),
        count => format!("{count} exports"),
    }
}

/// A time for people, in UTC.
fn utc(at: i64) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(at.max(0).unsigned_abs());
    format!("{}", humantime::format_rfc3339_seconds(at.min(last_time())))
}

/// The last time that can be written.
fn last_time() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(253_402_300_799)
}

impl Writer {
    /// Carries an act out, or begins to.
    pub(in crate::exports) fn begin_act(&mut self, request: Request) {
        let Request { act, reply } = request;
        let held = self.exports.clone();
        let commits = held.hold_checkpoints();
        let done = match act {
            Act::Pause(subject, length) => self.pause(&subject, length),
            Act::Resume(subject) => self.resume(&subject),
            Act::Retry(Target::Export(id)) => self.retry_one(id),
            Act::Retry(Target::Subject(subject)) => self.retry(&subject),
            Act::Label { who, label } => self.label(&who, &label),
            Act::Seen(destination) => self.seen(&destination),
            Act::Show(id) => self.show(id),
            Act::Cancel(target) => {
                let bulk = match target {
                    Target::Export(id) => self.bulk_of_one(id, &reply),
                    Target::Subject(subject) => self.bulk_of(&subject, false, &reply),
                };
                match bulk {
                    Ok(bulk) => return self.bulk = Some(bulk),
                    Err(error) => Err(error),
                }
            }
            Act::Forget(subject) => match self.bulk_of(&subject, true, &reply) {
                Ok(bulk) => return self.bulk = Some(bulk),
                Err(error) => Err(error),
            },
        };
        drop(commits);
        self.answer(&reply, done);
    }

    pub(super) fn answer(
        &mut self,
        reply: &Sender<Result<Acted, ActError>>,
        done: Result<Acted, ActError>,
    ) {
        self.wrote();
        self.exports.wake_worker();
        if let Err(ActError::Storage(error)) = &done {
            log::error!(reason:% = error; "cannot carry out an act of the owner");
        }
        // Its sender may have left.
        let _ = reply.send(done);
    }

    /// The wall clock, as stored times go by it.
    fn wall(&self) -> i64 {
        self.exports.now().saturating_add(self.store.clock_offset())
    }

    fn named(&self) -> Result<Vec<Named>, ActError> {
        Ok(named(&self.store, &self.exports.ledger_key)?)
    }

    pub(super) fn name_of(&self, url: &str) -> String {
        name_of(&self.exports.ledger_key, url)
    }

    /// Finds out what a text of the owner means.
    pub(super) fn subject(&self, text: &str) -> Result<Subject, ActError> {
        match Subject::parse(text, &self.exports.ledger_key).map_err(ActError::Malformed)? {
            Meaning::Subject(Subject::Who(name)) => {
                let is_sender = self.is_sender(&name, &self.named()?)?;
                let labelled = match is_sender {
                    true => None,
                    false => self.store.labelled(&name)?,
                };
                Ok(Subject::Who(labelled.unwrap_or(name)))
            }
            Meaning::Subject(subject) => Ok(subject),
            Meaning::Name(name) => {
                let queues = self.named()?;
                let is_host = queues.iter().any(|queue| is_at(&name, &queue.destination))
                    || self
                        .store
                        .destination_names()?
                        .iter()
                        .any(|known| is_at(&name, known));
                match (self.is_sender(&name, &queues)?, is_host) {
                    (true, false) => Ok(Subject::Who(name)),
                    (false, true) => Ok(Subject::Host(name.to_ascii_lowercase())),
                    (true, true) => Err(ActError::Conflict(format!(
                        "{name} is a sender and a host: say who:{name} or host:{name}"
                    ))),
                    (false, false) => match self.store.labelled(&name)? {
                        Some(who) => Ok(Subject::Who(who)),
                        None => Err(ActError::NotFound(format!(
                            "no sender, label or host {name} is known: say who:{name} or host:{name} to \
                             mean one that is not known yet"
                        ))),
                    },
                }
            }
        }
    }

    fn is_sender(&self, name: &str, queues: &[Named]) -> Result<bool, ActError> {
        Ok(queues.iter().any(|queue| queue.who == name) || self.store.has_sender(name)?)
    }

    fn pause(&mut self, text: &str, length: Option<Duration>) -> Result<Acted, ActError> {
        let subject = self.subject(text)?;
        let now = self.wall();
        let length = length.map(|length| i64::try_from(length.as_millis()).unwrap_or(i64::MAX));
        let pause = Pause {
            subject: subject.to_string(),
            since: now,
            until: length.map(|length| now.saturating_add(length)),
        };
        let end = pause.until.map_or_else(
            || "until you resume it".into(),
            |until| format!("until {}", utc(until)),
        );
        self.store
            .pause(&pause, &entry(Event::Pause, &subject, end.clone()))?;
        let mut pauses = self.exports.pauses.lock();
        match pauses
            .iter_mut()
            .find(|known| known.subject == pause.subject)
        {
            Some(known) => known.until = pause.until,
            None => pauses.push(pause),
        }
        drop(pauses);
        let held = self.matching(&subject)?;
        let running = self.exports.running();
        let mut queues = self.exports.queues.lock();
        let mut waiting = 0;
        for queue in held {
            queues.pause(queue.id, running);
            waiting += queues.unfinished_in(queue.id) as u64;
        }
        drop(queues);
        let unknown = match self.is_known(&subject)? {
            true => "",
            false => {
                "; nothing that was sent so far matches it, so see that it is written as status or the \
                 ledger shows it"
            }
        };
        Ok(acted(format!(
            "{} is paused {end}, with {} waiting{unknown}",
            described(&subject),
            exports(waiting)
        )))
    }

    /// Whether anything that is known matches a subject.
    fn is_known(&self, subject: &Subject) -> Result<bool, ActError> {
        if !self.matching(subject)?.is_empty() {
            return Ok(true);
        }
        Ok(match subject {
            Subject::All => true,
            Subject::Who(who) => self.store.has_sender(who)?,
            Subject::Destination(_) | Subject::Host(_) => {
                let names = self.store.destination_names()?;
                names.iter().any(|name| subject.matches("", name))
            }
        })
    }

    pub(super) fn matching(&self, subject: &Subject) -> Result<Vec<Named>, ActError> {
        let mut queues = self.named()?;
        queues.retain(|queue| subject.matches(&queue.who, &queue.destination));
        Ok(queues)
    }

    fn resume(&mut self, text: &str) -> Result<Acted, ActError> {
        let pauses = self.exports.pauses.lock().clone();
        let is_meant = |pause: &&Pause| {
            let whole = pause.subject.as_str();
            let name = whole.split_once(':').map_or(whole, |(_, name)| name);
            [whole, name]
                .iter()
                .any(|known| known.eq_ignore_ascii_case(text.trim()))
        };
        let meant: Vec<_> = pauses.iter().filter(is_meant).collect();
        let subject = match meant[..] {
            [pause] => pause.subject.clone(),
            _ => self.subject(text)?.to_string(),
        };
        if pauses.iter().all(|pause| pause.subject != subject) {
            return Err(ActError::NotFound(match &pauses[..] {
                [] => "nothing is paused".into(),
                pauses => {
                    format!("there is no pause of {subject}; {}", still_paused(pauses))
                }
            }));
        }
        let resumed = self.end_pause(&subject, "by the owner")?;
        let left = self.exports.pauses.lock();
        let left = match &left[..] {
            [] => String::new(),
            pauses => format!("; {}", still_paused(pauses)),
        };
        Ok(acted(format!(
            "the pause of {subject} has ended: {} can be sent{left}",
            exports(resumed)
        )))
    }

    /// Ends a pause that is in force. Returns how many exports can be sent now.
    fn end_pause(&mut self, subject: &str, why: &str) -> Result<u64, ActError> {
        let held = self.exports.clone();
        let mut left = held.pauses.lock().clone();
        left.retain(|pause| pause.subject != subject);
        let mut ids: Vec<_> = self
            .named()?
            .into_iter()
            .filter(|queue| !is_any(&left, &queue.who, &queue.destination))
            .map(|queue| queue.id)
            .collect();
        let queues = held.queues.lock();
        ids.retain(|id| queues.is_paused(*id));
        drop(queues);
        let named = Subject::from_stored(subject).unwrap_or(Subject::All);
        let entry = entry(Event::Resume, &named, why.into());
        let running = held.running();
        self.store.resume(subject, &ids, running, &entry)?;
        *held.pauses.lock() = left;
        let mut queues = held.queues.lock();
        let mut resumed = 0;
        for id in ids {
            resumed += queues.unfinished_in(id) as u64;
            queues.resume(id, running);
        }
        Ok(resumed)
    }

    /// Ends the pauses whose time is over. Returns how long until the next one has to be looked at.
    pub(in crate::exports) fn end_pauses(&mut self) -> Duration {
        let held = self.exports.clone();
        let pauses = held.pauses.lock().clone();
        let now = self.wall();
        let mut wait = Duration::MAX;
        for pause in pauses {
            let Some(until) = pause.until else {
                continue;
            };
            if until > now {
                wait = wait.min(Duration::from_millis(until.abs_diff(now)));
                continue;
            }
            let commits = held.hold_checkpoints();
            let ended = self.end_pause(&pause.subject, "its time was over");
            drop(commits);
            match ended {
                Ok(exports) => {
                    log::info!(exports; "a pause has ended");
                    self.wrote();
                    held.wake_worker();
                }
                Err(error) => {
                    log::warn!(reason:% = error; "cannot end a pause yet");
                    wait = wait.min(AGAIN);
                }
            }
        }
        wait
    }

    /// Reads the pauses again, after the clock was set.
    pub(in crate::exports) fn reread_pauses(&mut self) {
        if let Ok(pauses) = self.store.pauses() {
            *self.exports.pauses.lock() = pauses;
        }
    }

    fn retry_one(&mut self, id: Uuid) -> Result<Acted, ActError> {
        let found = self.unfinished(id, false)?;
        let queues = self.exports.queues.lock();
        let (is_paused, (_, on_wire)) = (queues.is_paused(found.queue), queues.cursor(found.queue));
        drop(queues);
        if is_paused {
            return Err(ActError::Conflict("it is paused: resume it first".into()));
        }
        if on_wire == Some(id) {
            return Err(ActError::Conflict(ON_WIRE.into()));
        }
        let entry = Entry {
            export: Some(id),
            who: found.who,
            destination: self.name_of(&found.url),
            ..Entry::new(Event::Retry, wall_clock())
        };
        self.store.record(&[entry], self.exports.now())?;
        self.exports
            .queues
            .lock()
            .retry(found.queue, self.exports.running());
        Ok(acted("its queue is tried now".into()))
    }

    fn retry(&mut self, text: &str) -> Result<Acted, ActError> {
        let subject = self.subject(text)?;
        let mut found = self.matching(&subject)?;
        let queues = self.exports.queues.lock();
        found.retain(|queue| queues.unfinished_in(queue.id) > 0);
        let waiting = found.len();
        found.retain(|queue| !queues.is_paused(queue.id));
        drop(queues);
        if found.is_empty() {
            return Err(match waiting {
                0 => ActError::NotFound(format!("nothing waits of {subject}")),
                _ => ActError::Conflict("all of it is paused: resume it first".into()),
            });
        }
        let note = match found.len() {
            1 => "1 queue".into(),
            count => format!("{count} queues"),
        };
        self.store
            .record(&[entry(Event::Retry, &subject, note)], self.exports.now())?;
        let running = self.exports.running();
        let mut queues = self.exports.queues.lock();
        let mut waiting = 0;
        for queue in &found {
            waiting += queues.unfinished_in(queue.id) as u64;
            queues.retry(queue.id, running);
        }
        drop(queues);
        Ok(acted(format!(
            "{} is tried now, with {} waiting",
            described(&subject),
            exports(waiting)
        )))
    }

    /// An export without a result.
    pub(super) fn unfinished(&self, id: Uuid, payload: bool) -> Result<Found, ActError> {
        match self.store.find(id, payload)? {
            Some(found) if found.is_finished => Err(ActError::Conflict(FINISHED.into())),
            Some(found) => Ok(found),
            None => Err(ActError::NotFound(
                "there is no export of this id: it may have expired, and the ledger may still tell of it".into(),
            )),
        }
    }

    fn label(&mut self, who: &str, label: &str) -> Result<Acted, ActError> {
        let label = checked_label(label)?;
        let who = who.trim();
        let who = who.strip_prefix("who:").unwrap_or(who);
        if who.is_empty() {
            return Err(ActError::Malformed(
                "say which sender is to have this label".into(),
            ));
        }
        let queues = self.named()?;
        let who = match self.is_sender(who, &queues)? {
            true => who.to_owned(),
            false => self.store.labelled(who)?.unwrap_or_else(|| who.to_owned()),
        };
        if !label.is_empty() && label != who {
            let other = self.store.labelled(label)?.filter(|other| *other != who);
            if other.is_some() || self.is_sender(label, &queues)? {
                return Err(ActError::Conflict(format!(
                    "another sender is called {label}: choose another label"
                )));
            }
        }
        let entry = entry(Event::Label, &Subject::Who(who.clone()), label.into());
        self.store.label(&who, label, &entry)?;
        Ok(acted(match label {
            "" => format!("{who} has no label any longer"),
            label => format!("{who} is called {label}"),
        }))
    }

    fn seen(&mut self, text: &str) -> Result<Acted, ActError> {
        let subject = self.subject(text)?;
        let queues = self.named()?.into_iter().map(|queue| queue.destination);
        let mut names = self.store.destination_names()?;
        names.extend(queues);
        names.retain(|name| !name.is_empty() && subject.matches("", name));
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Err(ActError::NotFound(format!(
                "nothing was ever sent to {subject}"
            )));
        }
        let entries: Vec<_> = names
            .iter()
            .map(|name| {
                entry(
                    Event::Seen,
                    &Subject::Destination(name.clone()),
                    String::new(),
                )
            })
            .collect();
        self.store.seen(&names, &entries)?;
        Ok(acted(format!(
            "{} is no longer marked as new",
            names.join(", ")
        )))
    }

    fn show(&mut self, id: Uuid) -> Result<Acted, ActError> {
        let found = self.unfinished(id, true)?;
        let Some(payload) = found.payload else {
            return Err(ActError::Conflict(
                "its payload is no longer in the store: it was damaged, or somebody removed it"
                    .into(),
            ));
        };
        let name = self.name_of(&found.url);
        let done = format!("{} bytes from {} for {name}", payload.len(), found.who);
        let entry = Entry {
            export: Some(id),
            who: found.who,
            destination: name,
            ..Entry::new(Event::Show, wall_clock())
        };
        self.store.record(&[entry], self.exports.now())?;
        Ok(Acted {
            done,
            url: Some(found.url),
            payload: Some(payload),
        })
    }
}

/// From a failure to end a pause until the next try.
const AGAIN: Duration = Duration::from_secs(1);
pub(super) const ON_WIRE: &str = "it is being sent now";
pub(super) const FINISHED: &str =
    "it is finished already, and its payload is gone; the ledger tells what became of it";

pub(super) fn acted(done: String) -> Acted {
    Acted {
        done,
        ..Acted::default()
    }
}

pub(super) fn described(subject: &Subject) -> String {
    match subject {
        Subject::All => "everything".into(),
        Subject::Destination(name) | Subject::Host(name) | Subject::Who(name) => name.clone(),
    }
}

fn still_paused(pauses: &[Pause]) -> String {
    let subjects: Vec<_> = pauses.iter().map(|pause| pause.subject.as_str()).collect();
    format!("paused: {}", subjects.join(", "))
}
