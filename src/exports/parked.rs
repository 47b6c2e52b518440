//! Long polls that wait until their export is finished.
//!
//! A parked poll costs an entry in a map. Its connection's thread waits anyway, and looks the export up
//! itself at the deadline. If the client leaves first, the entry is removed.
//!
//! Not here: what the answer is, and how a connection waits (`waits`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::reply::Reply;

/// All parked polls, by the export that they wait for.
#[derive(Default)]
pub struct Parked(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    by_export: HashMap<Uuid, Vec<Entry>>,
    last: u64,
}

struct Entry {
    number: u64,
    /// None while the export is still being looked up.
    reply: Option<Reply>,
}

impl Parked {
    /// Announces a poll before its export is looked up, so that a result which is stored between the
    /// look-up and [`Ticket::park`] is noticed.
    pub fn announce(self: &Arc<Self>, id: Uuid) -> Ticket {
        let mut inner = self.0.lock();
        inner.last += 1;
        let number = inner.last;
        let entry = Entry {
            number,
            reply: None,
        };
        inner.by_export.entry(id).or_default().push(entry);
        Ticket {
            parked: self.clone(),
            id,
            number,
        }
    }

    /// Removes and returns every poll that waits for an export, whose result is in the store by now.
    pub fn take(&self, id: Uuid) -> Vec<Reply> {
        let entries = self.0.lock().by_export.remove(&id).unwrap_or_default();
        entries
            .into_iter()
            .filter_map(|entry| entry.reply)
            .collect()
    }

    /// How many polls wait.
    pub fn count(&self) -> usize {
        let inner = self.0.lock();
        let polls = inner.by_export.values().flatten();
        polls.filter(|entry| entry.reply.is_some()).count()
    }

    /// Whether a poll waits for this export.
    pub fn is_awaited(&self, id: Uuid) -> bool {
        self.0.lock().by_export.contains_key(&id)
    }
}

/// An announced poll. Dropping it removes the entry.
pub struct Ticket {
    parked: Arc<Parked>,
    id: Uuid,
    number: u64,
}

impl Ticket {
    /// Parks the poll until the export is finished. If that does not happen before `deadline` or the
    /// service stops, the connection's own thread calls `late`, which must answer.
    ///
    /// # Errors
    /// The result has arrived since the poll was announced, and can be looked up.
    pub fn park(
        self,
        reply: Reply,
        deadline: Instant,
        late: impl FnOnce(Reply) + Send + 'static,
    ) -> Result<(), Reply> {
        let to = reply.to.clone();
        {
            let mut inner = self.parked.0.lock();
            match inner.entry(self.id, self.number) {
                Some(entry) => entry.reply = Some(reply),
                None => return Err(reply),
            }
        }
        to.at(deadline, move || {
            if let Some(reply) = self.take() {
                late(reply);
            }
        });
        Ok(())
    }

    /// Removes the poll, unless that was done already.
    fn take(&self) -> Option<Reply> {
        let mut inner = self.parked.0.lock();
        let entries = inner.by_export.get_mut(&self.id)?;
        let at = entries
            .iter()
            .position(|entry| entry.number == self.number)?;
        let entry = entries.swap_remove(at);
        if entries.is_empty() {
            inner.by_export.remove(&self.id);
        }
        entry.reply
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.take();
    }
}

impl Inner {
    fn entry(&mut self, id: Uuid, number: u64) -> Option<&mut Entry> {
        let entries = self.by_export.get_mut(&id)?;
        entries.iter_mut().find(|entry| entry.number == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::View;
    use crate::waits::{Wait, Waits};
    use serde_json::value::RawValue;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);

    /// A connection that has asked for something, and the means to answer it.
    fn asked() -> (Arc<Waits>, Wait, Reply) {
        let waits = Arc::new(Waits::default());
        let wait = waits.enter(([127, 0, 0, 1], 1).into());
        wait.ask();
        let reply = Reply {
            to: waits.answerer(wait.number()).unwrap(),
            target: "/lp/export".into(),
        };
        (waits, wait, reply)
    }

    fn view(id: Uuid) -> View {
        View::finished(id, RawValue::from_string("{}".into()).unwrap().into())
    }

    #[test]
    fn every_poll_of_an_export_is_found_when_it_is_finished() {
        let parked = Arc::<Parked>::default();
        let id = Uuid::now_v7();
        let polls: Vec<_> = (0..3)
            .map(|_| {
                let (waits, wait, reply) = asked();
                let deadline = Instant::now() + LONG;
                let parked = parked
                    .announce(id)
                    .park(reply, deadline, |_| panic!("too late"));
                assert!(parked.is_ok());
                (waits, wait)
            })
            .collect();
        assert!(parked.is_awaited(id));
        let looking = parked.announce(Uuid::now_v7());
        assert_eq!(parked.count(), 3);
        drop(looking);
        for reply in parked.take(id) {
            reply.answer(Ok(view(id)));
        }
        for (_, wait) in polls {
            assert!(wait.answer(LONG, LONG, || true).is_some());
        }
        assert!(parked.0.lock().by_export.is_empty());
    }

    #[test]
    fn a_result_that_comes_between_looking_and_parking_is_noticed() {
        let parked = Arc::<Parked>::default();
        let id = Uuid::now_v7();
        let (_waits, _wait, reply) = asked();
        let ticket = parked.announce(id);
        assert!(parked.take(id).is_empty());
        let late = Instant::now() + LONG;
        assert!(ticket.park(reply, late, |_| panic!("too late")).is_err());
    }

    #[test]
    fn at_its_deadline_or_when_the_service_stops_a_poll_is_answered_by_its_own_thread() {
        let parked = Arc::<Parked>::default();
        let id = Uuid::now_v7();
        for (stops, deadline) in [(false, Instant::now()), (true, Instant::now() + LONG)] {
            let (waits, wait, reply) = asked();
            let ticket = parked.announce(id);
            let parked_it = ticket.park(reply, deadline, move |reply| reply.answer(Ok(view(id))));
            assert!(parked_it.is_ok());
            if stops {
                waits.hurry();
            }
            assert!(wait.answer(LONG, LONG, || true).is_some());
            assert!(parked.0.lock().by_export.is_empty());
        }
    }

    #[test]
    fn a_poll_whose_client_has_left_leaves_nothing_behind() {
        let parked = Arc::<Parked>::default();
        let id = Uuid::now_v7();
        let (_waits, wait, reply) = asked();
        let late = Instant::now() + LONG;
        assert!(
            parked
                .announce(id)
                .park(reply, late, |_| panic!("too late"))
                .is_ok()
        );
        assert!(
            wait.answer(LONG, Duration::from_millis(1), || false)
                .is_none()
        );
        assert!(!parked.is_awaited(id));
    }
}
