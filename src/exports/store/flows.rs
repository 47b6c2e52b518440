//! What went from whom to where: the sums and the few rows that the owner's page draws. The time for each is
//! bounded, however long the ledger is.
//!
//! Not here: the ledger's rows one by one ([`super::evidence`]).

use std::collections::HashMap;

use super::Error;
use super::evidence::Evidence;
use super::reading::value;
use crate::export::DAY;

/// The newest rows that are searched for the time of the last attempt: these take a few milliseconds. Of flows
/// that are not among them only the day is told.
const RECENT: i64 = 2000;

/// How much was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Exports that got an answer.
    pub delivered: u64,
    /// Exports that ended without one.
    pub failed: u64,
    /// Bytes of payload that left.
    pub bytes_out: u64,
}

/// What one sender has sent to one destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The sender.
    pub who: String,
    /// The owner's own name for it.
    pub label: Option<String>,
    /// The destination.
    pub destination: String,
    /// The last attempt, in Unix milliseconds. None if it was long ago.
    pub last_at: Option<i64>,
    /// The UTC day of the last attempt, in days since 1970.
    pub last_day: i64,
    /// Today so far, UTC.
    pub today: Amount,
    /// The whole time that was asked for.
    pub all: Amount,
}

/// What left for one destination in some span of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The start of the span, in Unix milliseconds.
    pub at: i64,
    /// The destination.
    pub destination: String,
    /// How much.
    pub amount: Amount,
}

/// Requests of one sender that were refused for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// The sender's address, or what the ledger says in its place.
    pub who: String,
    /// The owner's own name for it.
    pub label: Option<String>,
    /// The code that the sender was told, like `unauthorized`.
    pub reason: String,
    /// How many there were.
    pub count: u64,
    /// The last of them, in Unix milliseconds.
    pub last_at: i64,
}

/// What was done in a day, or on the mean of some days.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Day {
    /// How much was sent.
    pub amount: Amount,
    /// Exports that were tried for the first time.
    pub exports: u64,
    /// Destinations to which something was sent.
    pub destinations: u64,
    /// Requests that were refused.
    pub refused: u64,
}

impl Evidence {
    /// The sums of this UTC day, and the mean of so many days before it, as far as there are any.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn day_and_usual(&self, today: i64, days: i64) -> Result<(Day, Day), Error> {
        let first: Option<i64> =
            value(&self.connection, "SELECT min(day) FROM day_sums", [])?.flatten();
        let since = first.unwrap_or(today).clamp(today - days, today);
        Ok((
            self.mean(today, today + 1)?,
            match today - since {
                0 => Day::default(),
                _ => self.mean(since, today)?,
            },
        ))
    }

    /// The mean of the days from `since` to before `until`.
    fn mean(&self, since: i64, until: i64) -> Result<Day, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT sum(delivered), sum(failed), sum(bytes_out), sum(exports), sum(destinations)
             FROM (SELECT sum(delivered) AS delivered, sum(failed) AS failed, sum(bytes_out) AS bytes_out,
                     sum(exports) AS exports,
                     count(DISTINCT destination) FILTER (WHERE attempts > 0) AS destinations
                 FROM day_sums WHERE day >= ? AND day < ? GROUP BY day)",
        )?;
        let days = (until - since).unsigned_abs().max(1);
        let mean = |sum: Option<i64>| {
            let sum = sum.unwrap_or(0).unsigned_abs();
            sum.saturating_add(days / 2) / days
        };
        let mut day = statement.query_row([since, until], |row| {
            Ok(Day {
                amount: Amount {
                    delivered: mean(row.get(0)?),
                    failed: mean(row.get(1)?),
                    bytes_out: mean(row.get(2)?),
                },
                exports: mean(row.get(3)?),
                destinations: mean(row.get(4)?),
                refused: 0,
            })
        })?;
        let refused = "SELECT sum(coalesce(attempt, 1)) FROM ledger WHERE event = 'refused' AND at >= ? AND at < ?";
        day.refused = mean(value(&self.connection, refused, [since * DAY, until * DAY])?.flatten());
        Ok(day)
    }

    /// How many rows there are from this UTC day on, without those whose body is gone, and how many bytes they take.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn size(&self, since: i64) -> Result<(u64, u64), Error> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT sum(rows), sum(row_bytes) FROM day_sums WHERE day >= ?")?;
        Ok(statement.query_row([since], |row| {
            let count = |at| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(at)?.unwrap_or(0));
            Ok((count(0)?.unsigned_abs(), count(1)?.unsigned_abs()))
        })?)
    }

    /// The destinations since this UTC day that the owner has not said to know, at most `limit`.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn new_destinations(&self, since: i64, limit: usize) -> Result<Vec<String>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT DISTINCT destination FROM day_sums
             WHERE day >= ? AND attempts + delivered + failed > 0 AND destination <> 'forgotten'
                 AND destination NOT IN (SELECT name FROM destinations WHERE seen_at IS NOT NULL)
             ORDER BY 1 LIMIT ?",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let names = statement.query_map([since, limit], |row| row.get(0))?;
        Ok(names.collect::<Result<_, _>>()?)
    }

    /// The `limit` largest flows from this UTC day to today, and how many there are.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn flows(&self, since: i64, today: i64, limit: usize) -> Result<(Vec<Flow>, u64), Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT who, label, destination, max(day),
                 sum(delivered), sum(failed), sum(bytes_out),
                 sum(delivered) FILTER (WHERE day = ?2), sum(failed) FILTER (WHERE day = ?2),
                 sum(bytes_out) FILTER (WHERE day = ?2), count(*) OVER ()
             FROM day_sums LEFT JOIN labels USING (who)
             WHERE day >= ?1 AND day <= ?2 AND attempts + delivered + failed > 0
             GROUP BY who, destination ORDER BY sum(bytes_out) DESC, who, destination LIMIT ?3",
        )?;
        let mut rows = statement.query((since, today, i64::try_from(limit).unwrap_or(i64::MAX)))?;
        let (mut flows, mut total) = (Vec::new(), 0);
        let last = self.last_attempts()?;
        while let Some(row) = rows.next()? {
            let count =
                |at| Ok::<_, Error>(row.get::<_, Option<i64>>(at)?.unwrap_or(0).unsigned_abs());
            let amount = |at| {
                Ok::<_, Error>(Amount {
                    delivered: count(at)?,
                    failed: count(at + 1)?,
                    bytes_out: count(at + 2)?,
                })
            };
            let (who, destination): (String, String) = (row.get(0)?, row.get(2)?);
            let key = (who, destination);
            let last_at = last.get(&key).copied();
            let (who, destination) = key;
            flows.push(Flow {
                who,
                label: row.get(1)?,
                destination,
                last_at,
                last_day: row.get(3)?,
                today: amount(7)?,
                all: amount(4)?,
            });
            total = count(10)?;
        }
        Ok((flows, total))
    }

    /// When something was last sent from whom to where, among the newest rows.
    fn last_attempts(&self) -> Result<HashMap<(String, String), i64>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT who, destination, max(at)
             FROM (SELECT who, destination, at, event FROM ledger ORDER BY seq DESC LIMIT ?)
             WHERE event = 'attempt' AND who IS NOT NULL AND destination IS NOT NULL
             GROUP BY who, destination",
        )?;
        let rows = statement.query_map([RECENT], |row| {
            Ok(((row.get(0)?, row.get(1)?), row.get(2)?))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// What left from `since` on, in spans of so many UTC days. Reads the sums only.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn parts_by_days(&self, since: i64, days: i64) -> Result<Vec<Part>, Error> {
        let first = since.div_euclid(DAY);
        self.parts(
            "SELECT (?1 + (day - ?1) / ?2 * ?2) * 86400000, destination,
                 sum(delivered), sum(failed), sum(bytes_out)
             FROM day_sums WHERE day >= ?1 AND bytes_out + delivered + failed > 0 GROUP BY 1, 2",
            [first, days.max(1)],
        )
    }

    /// What left from `since` on, in spans of so many milliseconds. Reads the rows since then, and no others.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn parts_by_rows(&self, since: i64, span: i64) -> Result<Vec<Part>, Error> {
        let first = self.first_since(since)?;
        self.parts(
            "SELECT at / ?2 * ?2, destination,
                 count(*) FILTER (WHERE event = 'attempt' AND outcome GLOB '[1-9][0-9][0-9]'),
                 count(*) FILTER (WHERE event = 'given up'), sum(bytes_out)
             FROM ledger WHERE seq >= ?1 AND event IN ('attempt', 'given up') AND destination IS NOT NULL
             GROUP BY 1, 2",
            [first, span.max(1)],
        )
    }

    fn parts(&self, sql: &str, parameters: [i64; 2]) -> Result<Vec<Part>, Error> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let rows = statement.query_map(parameters, |row| {
            let count = |at| {
                let value: Option<i64> = row.get(at)?;
                Ok::<_, rusqlite::Error>(value.unwrap_or(0).unsigned_abs())
            };
            Ok(Part {
                at: row.get(0)?,
                destination: row.get(1)?,
                amount: Amount {
                    delivered: count(2)?,
                    failed: count(3)?,
                    bytes_out: count(4)?,
                },
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The number of the first row that was written at `since` or later, by halving: rows are in the order of
    /// time but for a clock that was set back.
    fn first_since(&self, since: i64) -> Result<i64, Error> {
        let end = |sql| value::<Option<i64>>(&self.connection, sql, []);
        let mut low = end("SELECT min(seq) FROM ledger")?.flatten().unwrap_or(1);
        let mut high = end("SELECT max(seq) FROM ledger")?.flatten().unwrap_or(0) + 1;
        let mut probe = self.connection.prepare_cached(
            "SELECT seq, at FROM ledger WHERE seq >= ? AND seq < ? AND at IS NOT NULL ORDER BY seq LIMIT 1",
        )?;
        while low < high {
            let middle = low + (high - low) / 2;
            let mut rows = probe.query([middle, high])?;
            match rows.next()? {
                Some(row) if row.get::<_, i64>(1)? < since => low = row.get::<_, i64>(0)? + 1,
                // No row with a time is between these either, if there is none.
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// What was refused from `since` on, the most first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn refusals(&self, since: i64, limit: usize) -> Result<Vec<Refusals>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT coalesce(ledger.who, ''), label, coalesce(outcome, ''), sum(coalesce(attempt, 1)), max(at)
             FROM ledger LEFT JOIN labels ON labels.who = ledger.who
             WHERE event = 'refused' AND at >= ?1
             GROUP BY 1, 3 ORDER BY 4 DESC, 1, 3 LIMIT ?2",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = statement.query_map([since, limit], |row| {
            Ok(Refusals {
                who: row.get(0)?,
                label: row.get(1)?,
                reason: row.get(2)?,
                count: row.get::<_, i64>(3)?.unsigned_abs(),
                last_at: row.get(4)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exports::store::{Place, Store};
    use crate::ledger::{Entry, Event, Sent};

    const HOUR: i64 = 3_600_000;
    const TODAY: i64 = 20_783;

    fn attempt(who: &str, destination: &str, at: i64, bytes_out: u64) -> Entry {
        Entry {
            who: who.into(),
            destination: destination.into(),
            outcome: "200".into(),
            delivered: Some(true),
            attempt: Some(Sent {
                address: String::new(),
                bytes_out,
                bytes_in: 0,
                digest: None,
                ms: 3,
                attempt: 1,
            }),
            ..Entry::new(Event::Attempt, at)
        }
    }

    fn evidence(entries: &[Entry]) -> (Store, Evidence) {
        let mut store = Store::open(&Place::Memory).unwrap();
        store.record(entries, TODAY * DAY).unwrap();
        let evidence = Evidence::of(store.path()).unwrap();
        (store, evidence)
    }

    #[test]
    fn flows_have_the_sums_of_today_and_of_all_days_that_are_asked_for() {
        let now = TODAY * DAY + 5 * HOUR;
        let (_store, evidence) = evidence(&[
            attempt("old", "a #0001", now - 40 * DAY, 1),
            attempt("app", "a #0001", now - 3 * DAY, 10),
            attempt("app", "a #0001", now - HOUR, 20),
            attempt("app", "b #0002", now - 2 * DAY, 100),
        ]);
        let (flows, total) = evidence.flows(TODAY - 29, TODAY, 10).unwrap();
        assert_eq!(total, 2);
        let seen: Vec<_> = flows
            .iter()
            .map(|flow| {
                (
                    &*flow.destination,
                    flow.all.bytes_out,
                    flow.today.bytes_out,
                    flow.last_at,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("b #0002", 100, 0, Some(now - 2 * DAY)),
                ("a #0001", 30, 20, Some(now - HOUR))
            ]
        );
        let (largest, total) = evidence.flows(TODAY - 29, TODAY, 1).unwrap();
        assert_eq!((largest.len(), total), (1, 2));
    }

    #[test]
    fn a_usual_day_is_the_mean_of_the_days_that_there_were() {
        let now = TODAY * DAY;
        let (_store, evidence) = evidence(&[
            attempt("app", "a #0001", now - 4 * DAY, 10),
            attempt("app", "a #0001", now - 2 * DAY, 20),
            attempt("app", "b #0002", now - 2 * DAY, 10),
            attempt("app", "b #0002", now, 7),
        ]);
        let (today, usual) = evidence.day_and_usual(TODAY, 30).unwrap();
        assert_eq!((today.amount.bytes_out, today.destinations), (7, 1));
        assert_eq!((usual.amount.bytes_out, usual.destinations), (10, 1));
        assert_eq!(
            evidence.day_and_usual(TODAY - 4, 30).unwrap().1,
            Day::default()
        );
        assert_eq!(evidence.size(0).unwrap().0, 4);
    }

    #[test]
    fn parts_are_summed_up_by_hours_from_the_rows_and_by_days_from_the_sums() {
        let start = TODAY * DAY;
        let (_store, evidence) = evidence(&[
            attempt("app", "a #0001", start - DAY, 1),
            attempt("app", "a #0001", start + 10, 2),
            attempt("app", "a #0001", start + HOUR - 1, 4),
            attempt("app", "b #0002", start + HOUR, 8),
        ]);
        let bytes = |parts: Vec<Part>| -> Vec<_> {
            let all = parts.into_iter();
            all.map(|part| (part.at, part.destination, part.amount.bytes_out))
                .collect()
        };
        let (a, b) = ("a #0001".to_owned(), "b #0002".to_owned());
        assert_eq!(
            bytes(evidence.parts_by_rows(start, HOUR).unwrap()),
            [(start, a.clone(), 6), (start + HOUR, b.clone(), 8)]
        );
        assert_eq!(
            bytes(evidence.parts_by_days(start - DAY, 1).unwrap()),
            [
                (start - DAY, a.clone(), 1),
                (start, a.clone(), 6),
                (start, b.clone(), 8)
            ]
        );
        assert_eq!(
            bytes(evidence.parts_by_days(start - 2 * DAY, 7).unwrap()),
            [(start - 2 * DAY, a, 7), (start - 2 * DAY, b, 8)]
        );
        assert!(
            evidence
                .parts_by_rows(start + DAY, HOUR)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn the_first_row_of_a_time_is_found_among_emptied_ones() {
        let entries: Vec<_> = (0..100)
            .map(|n| attempt("app", "a #0001", n * 10, 1))
            .collect();
        let (store, evidence) = evidence(&entries);
        store.tamper("UPDATE ledger SET at = NULL WHERE seq % 3 = 0 OR seq BETWEEN 40 AND 60");
        for since in [0, 5, 390, 395, 500, 990, 991] {
            let first = evidence.first_since(since).unwrap();
            let wanted = (1..=100)
                .find(|seq| !(seq % 3 == 0 || (40..=60).contains(seq)) && (seq - 1) * 10 >= since);
            let found = (first..=100).find(|seq| !(seq % 3 == 0 || (40..=60).contains(seq)));
            assert_eq!(found, wanted, "{since}");
        }
    }

    #[test]
    fn refusals_are_counted_by_sender_and_reason() {
        let refused = |who: &str, reason: &str, at, count| Entry {
            who: who.into(),
            outcome: reason.into(),
            count,
            ..Entry::new(Event::Refused, at)
        };
        let (_store, evidence) = evidence(&[
            refused("10.0.0.1", "unauthorized", 5, 9),
            refused("10.0.0.1", "unauthorized", 10, 3),
            refused("10.0.0.1", "unauthorized", 20, 4),
            refused("10.0.0.2", "too_large", 30, 1),
        ]);
        let found = evidence.refusals(10, 10).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|one| (&*one.who, &*one.reason, one.count, one.last_at))
            .collect();
        assert_eq!(
            seen,
            [
                ("10.0.0.1", "unauthorized", 7, 20),
                ("10.0.0.2", "too_large", 1, 30)
            ]
        );
    }
}
