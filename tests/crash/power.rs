//! States that a loss of power may leave behind, and the look at each of them.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::Client;
use super::disk::Disk;
use super::journal::Event;
use super::random::Random;
use super::recording::{Accepted, Recording};
use crate::support::{PATIENCE, Service, command, payload};

/// What came of the images of a recording.
#[derive(Default, Debug)]
pub struct Count {
    pub images: usize,
    /// Images in which something is not as promised.
    pub damaged: usize,
    pub acknowledged: usize,
    pub finished: usize,
    pub delivered: usize,
    pub repeated: usize,
    pub expired: usize,
    /// Images on which the service does not start.
    pub refused: usize,
    pub lost: usize,
    /// Images in which something that was acknowledged is lost.
    pub with_losses: usize,
}

impl Recording {
    /// Loses power at this many moments, or until enough of the images have lost exports, and checks what
    /// is left. `lies` says which syncs do nothing. Returns what was lost.
    pub fn lose_power(
        &self,
        images: usize,
        enough: usize,
        random: &mut Random,
        lies: fn(&Path) -> bool,
    ) -> (Count, Vec<String>) {
        let events = &self.journal.events;
        // Each sync and each change of a folder is as likely as another, with what comes before the next.
        let marks: Vec<_> = (0..events.len())
            .filter(|at| !matches!(events[*at].1, Event::Write(..) | Event::Sent(_)))
            .collect();
        let replaced: Vec<_> = (0..events.len())
            .filter(|at| events[*at].1.replaces_database())
            .collect();
        let mut points: Vec<_> = (0..images)
            .map(|nth| {
                // Half of them are when a new database has just taken the place of another, if one has.
                if nth % 2 == 0 && !replaced.is_empty() {
                    return (random.pick(&replaced) + 1 + random.below(6)).min(events.len());
                }
                let mark = random.below(marks.len());
                let end = marks.get(mark + 1).unwrap_or(&events.len()) - marks[mark];
                marks[mark] + random.below(end) + 1
            })
            .collect();
        points.sort_unstable();
        let mut disk = Disk::of(self.initial.path(), self.root.path());
        let mut promised = Promised {
            results: self.earlier.clone(),
            ..Promised::default()
        };
        let (mut count, mut losses) = (Count::default(), Vec::new());
        let mut done = 0;
        for point in points {
            for (number, (time, event)) in events.iter().enumerate().take(point).skip(done) {
                event.happen(number, &mut disk, lies);
                promised.follow(*time, event);
            }
            done = point;
            let image = Arc::new(in_memory());
            let seed = random.next();
            let how = disk.leave(&mut Random::new(seed), image.path());
            let before = count.lost;
            let lost = self.check(&image, &promised, &mut count);
            count.with_losses += usize::from(count.lost > before);
            if lost.is_empty() {
                continue;
            }
            count.damaged += 1;
            // The image as it was before the service opened it.
            let kept = self.traces.path().join(format!("image-{point}-{seed}"));
            disk.leave(&mut Random::new(seed), &kept);
            let last = events[..point].iter().rev().take(3);
            losses.push(format!(
                "{}: power lost after event {point} of {}, the last being {:?}; {how}; the image: {}\n{}",
                self.name,
                events.len(),
                last.map(|(_, event)| event.in_short()).collect::<Vec<_>>(),
                kept.display(),
                lost.join("\n"),
            ));
            if count.with_losses == enough {
                break;
            }
        }
        (count, losses)
    }

    /// Starts the service on an image. Returns what is not as promised.
    fn check(&self, image: &Arc<TempDir>, promised: &Promised, count: &mut Count) -> Vec<String> {
        self.destination.arrivals();
        count.images += 1;
        let accepted = self.accepted.lock().unwrap();
        let known = |id: &&String| accepted.contains_key(*id);
        let ids: Vec<_> = promised.results.keys().filter(known).collect();
        count.acknowledged += ids.len();
        let mut service = Service::begin(image.clone(), command(), &[]);
        if !service.listens() {
            count.refused += 1;
            count.lost += ids.len();
            return vec![format!("it does not start: {}", service.log().join("\n"))];
        }
        let mut check = Check {
            client: Client::new(service.address),
            promised,
            count,
            lost: Vec::new(),
        };
        for id in &ids {
            check.poll(id, &accepted[*id]);
        }
        let keyed = ids.iter().filter(|id| accepted[**id].key.is_some());
        for id in keyed.take(3) {
            check.repeat(id, &accepted[*id]);
        }
        let new = Accepted::new(self.url(1), None, payload(1));
        if new
            .submit(&mut check.client, "/lp/export?timeout=60")
            .is_none()
        {
            check.lost.push("it accepts nothing new".into());
        }
        let arrivals = self.destination.arrivals();
        let mut arrived = HashSet::new();
        for arrival in &arrivals {
            let id = arrival.header("webhook-id").unwrap();
            let data = accepted.get(id).map(|accepted| accepted.data.to_string());
            if data.is_some_and(|data| data != arrival.text()) {
                check
                    .lost
                    .push(format!("{id} arrived with another payload"));
            }
            arrived.insert(id);
        }
        for id in &ids {
            let (now, before) = (
                arrived.contains(id.as_str()),
                promised.sent.contains_key(*id),
            );
            check.count.delivered += usize::from(now || before);
            check.count.repeated += usize::from(now && before);
            let finished_before_the_journal = self.earlier.get(*id).is_some_and(Option::is_some);
            if !now && !before && !finished_before_the_journal {
                check.lose(id, "was never delivered".into());
            }
        }
        let mut lost = check.lost;
        if !lost.is_empty() {
            let log = service.log();
            lost.extend(log.iter().rev().take(10).rev().cloned());
        }
        lost
    }
}

/// A folder in memory if there is such a file system, since the images are not what loses power.
fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// What the service has promised up to a moment.
#[derive(Default)]
struct Promised {
    /// The exports that were acknowledged, with the results that were shown.
    results: HashMap<String, Option<Value>>,
    /// When each export was sent first.
    sent: HashMap<String, Duration>,
    /// The retention of each run, and until when it lasted.
    runs: Vec<(Duration, Duration)>,
}

impl Promised {
    fn follow(&mut self, time: Duration, event: &Event) {
        match event {
            Event::Started(retention) => self.runs.push((*retention, time)),
            Event::Answered(id, result) => {
                let known = self.results.entry(id.clone()).or_default();
                *known = result.clone().or(known.take());
            }
            Event::Sent(id) => {
                self.sent.entry(id.clone()).or_insert(time);
            }
            _ => {}
        }
        if let Some((_, until)) = self.runs.last_mut() {
            *until = time;
        }
    }

    /// Whether the retention has passed: no export is finished before it is sent.
    fn may_be_gone(&self, id: &str) -> bool {
        let Some(sent) = self.sent.get(id) else {
            return false;
        };
        let mut runs = self.runs.iter();
        runs.any(|(retention, until)| *sent + *retention <= *until)
    }
}

/// The look at one image.
struct Check<'a> {
    client: Client,
    promised: &'a Promised,
    count: &'a mut Count,
    lost: Vec<String>,
}

impl Check<'_> {
    fn lose(&mut self, id: &str, how: String) {
        self.count.lost += 1;
        self.lost.push(format!("{id} {how}"));
    }

    /// Waits until an export is finished.
    fn poll(&mut self, id: &str, accepted: &Accepted) {
        let promised = &self.promised.results[id];
        let deadline = Instant::now() + PATIENCE;
        let mut path = "/export";
        loop {
            let body = json!({"id": id});
            let answer = self.client.ask(path, &accepted.token, None, &body);
            let Ok(answer) = answer else {
                return self.lose(id, "cannot be polled".into());
            };
            if answer.status == 404 && self.promised.may_be_gone(id) {
                self.count.expired += 1;
                return;
            }
            if answer.status != 200 {
                return self.lose(id, format!("is not known: {}", answer.body));
            }
            let answer = answer.json();
            if answer["state"] == "Finished" {
                self.count.finished += 1;
                let result = &answer["ext_response"];
                if promised.as_ref().is_some_and(|promised| promised != result) {
                    self.lose(id, format!("was {promised:?} and is {result}"));
                } else if result["status_code"] != 200 {
                    self.lose(id, format!("ends with {result}"));
                }
                return;
            }
            if promised.is_some() {
                return self.lose(id, format!("was finished and is {answer}"));
            }
            if Instant::now() > deadline {
                return self.lose(id, format!("does not end: {answer}"));
            }
            path = "/lp/export?timeout=10";
        }
    }

    /// Submits again under the same key.
    fn repeat(&mut self, id: &str, accepted: &Accepted) {
        let again = accepted.submit(&mut self.client, "/export");
        if again.as_deref() != Some(id) && !self.promised.may_be_gone(id) {
            self.lose(id, format!("is {again:?} when its key is repeated"));
        }
    }
}
