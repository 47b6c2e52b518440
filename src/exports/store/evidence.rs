//! Reads the ledger for the owner, beside a running service or without one: rows, sums, and whether the chain of
//! hashes is whole.
//!
//! Not here: writing rows (`store::ledger`), and how they are shown (`tools`, `owner`).

use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, Row, params_from_iter};
use serde::Serialize;
use uuid::Uuid;

use super::ledger::{Body, with_body};
use super::reading::value;
use super::{Error, FILE, schema};
use crate::ledger::{Hash, ORIGIN, body_hash, link};

/// A connection that only reads the ledger.
pub struct Evidence {
    pub(super) connection: Connection,
}

/// A row, as it is shown. What does not apply, or is gone, is `None`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Shown {
    /// Its number.
    pub seq: i64,
    /// Unix milliseconds by the wall clock.
    pub at: i64,
    /// What it tells of: see [`crate::ledger::Event::name`].
    pub event: String,
    /// The export's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// The sender's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// The name that the owner gave the sender.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The destination's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// The address that was connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Bytes of the payload that may have left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_out: Option<i64>,
    /// Bytes of the answer's body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_in: Option<i64>,
    /// The payload's keyed digest, in hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The status, or the kind of the failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// How long the attempt took, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<i64>,
    /// Which attempt on the export it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<i64>,
    /// Anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Which rows are asked for. All conditions have to hold.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// At or after this, in Unix milliseconds.
    pub since: Option<i64>,
    /// Before this.
    pub until: Option<i64>,
    /// From this sender, by name or label.
    pub who: Option<String>,
    /// To this destination, by its name or the host alone.
    pub destination: Option<String>,
    /// Attempts that got no answer of 200 to 299, and exports that were given up.
    pub failed: bool,
    /// Refused requests.
    pub refused: bool,
    /// About this export.
    pub id: Option<Uuid>,
    /// Rows with a lower number.
    pub before: Option<i64>,
    /// Rows with a higher number.
    pub after: Option<i64>,
}

/// What attempts are summed up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The UTC day.
    Day,
    /// The UTC week, which begins on a Monday.
    Week,
    /// The sender.
    Who,
    /// The destination.
    Destination,
}

/// The sum of some attempts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// The first day, as days since 1970, if the sum is by day or week.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub day: Option<i64>,
    /// The sender, if the sum is by sender.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// The destination, if the sum is by destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<String>,
    /// Exports that were tried for the first time.
    pub exports: i64,
    /// Attempts.
    pub attempts: i64,
    /// Exports that their destination has answered.
    pub delivered: i64,
    /// Exports that ended without an answer.
    pub failed: i64,
    /// Bytes of payload that may have left.
    pub bytes_out: i64,
    /// Bytes of answers that arrived.
    pub bytes_in: i64,
}

/// What a walk along the chain has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is whole.
    Whole {
        /// Rows that were looked at.
        rows: u64,
        /// Those of them whose body was pruned or forgotten.
        emptied: u64,
        /// The number of the first one.
        first: i64,
        /// The last one's number, and the hash up to it.
        head: (i64, Hash),
    },
    /// A row does not fit. Says which, and what is wrong.
    Broken(i64, &'static str),
    /// The remembered head is older than the first row that is kept.
    TooOld(i64),
}

impl Evidence {
    /// Opens the ledger of a data folder.
    ///
    /// # Errors
    /// There is none, or it cannot be read. The text says what to do.
    pub fn open(folder: &Path) -> Result<Self, String> {
        let path = folder.join(FILE);
        let shown = path.display();
        if !path.exists() {
            return Err(format!(
                "there is no {shown}: name the service's folder with --data-dir"
            ));
        }
        let fault = |error: rusqlite::Error| {
            format!("cannot read {shown}: {error}; run this as the user that the service runs as")
        };
        // Not read-only, which could not read what is in the write-ahead log of a service that was killed.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
        let connection = Connection::open_with_flags(&path, flags).map_err(fault)?;
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .map_err(fault)?;
        connection
            .pragma_update(None, "query_only", true)
            .map_err(fault)?;
        match schema::version(&connection).map_err(fault)? {
            schema::VERSION => Ok(Self { connection }),
            version if version > schema::VERSION => Err(format!(
                "{shown} was written by a newer release: use that one"
            )),
            _ => Err(format!(
                "{shown} has no ledger yet: it begins when this release of the service is started on it"
            )),
        }
    }

    /// Calls `each` for at most `limit` rows, the newest first, or the oldest first if `ascending`. Stops when
    /// `each` returns false.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn rows(
        &self,
        filter: &Filter,
        ascending: bool,
        limit: u64,
        mut each: impl FnMut(Shown) -> bool,
    ) -> Result<(), Error> {
        let mut conditions = vec!["at IS NOT NULL".to_owned()];
        let mut values: Vec<Value> = Vec::new();
        let mut add = |condition: &str, value: Value| {
            values.push(value);
            conditions.push(condition.replace('?', &format!("?{}", values.len())));
        };
        if let Some(since) = filter.since {
            add("at >= ?", since.into());
        }
        if let Some(until) = filter.until {
            add("at < ?", until.into());
        }
        if let Some(who) = &filter.who {
            add(
                "(ledger.who = ? OR ledger.who IN (SELECT who FROM labels WHERE label = ?))",
                who.clone().into(),
            );
        }
        if let Some(destination) = &filter.destination {
            add(
                "(destination = ? OR 1 IN (instr(destination, ? || ' #'), instr(destination, ? || ':'),
                     instr(destination, 'http://' || ? || ' #'), instr(destination, 'http://' || ? || ':')))",
                destination.clone().into(),
            );
        }
        if let Some(id) = filter.id {
            add("export = ?", Value::Blob(id.into_bytes().into()));
        }
        if let Some(before) = filter.before {
            add("seq < ?", before.into());
        }
        if let Some(after) = filter.after {
            add("seq > ?", after.into());
        }
        if filter.failed {
            let failed =
                "(event = 'given up' OR event = 'attempt' AND outcome NOT GLOB '2[0-9][0-9]')";
            conditions.push(failed.into());
        }
        if filter.refused {
            conditions.push("event = 'refused'".into());
        }
        let order = if ascending { "ASC" } else { "DESC" };
        let sql = format!(
            "SELECT seq, at, event, export, ledger.who, label, destination, address, bytes_out, bytes_in, digest,
                 outcome, ms, attempt, note
             FROM ledger LEFT JOIN labels ON labels.who = ledger.who
             WHERE {} ORDER BY seq {order} LIMIT {}",
            conditions.join(" AND "),
            i64::try_from(limit).unwrap_or(i64::MAX)
        );
        let mut statement = self.connection.prepare_cached(&sql)?;
        let mut rows = statement.query(params_from_iter(values))?;
        while let Some(row) = rows.next()? {
            if !each(shown(row)?) {
                break;
            }
        }
        Ok(())
    }

    /// The sums from one UTC day to before another, both as days since 1970.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn sums(&self, by: By, since: i64, until: i64) -> Result<Vec<Total>, Error> {
        // 1970-01-01 was a Thursday.
        let (key, order) = match by {
            By::Day => ("day", "1"),
            By::Week => ("day - (day + 3) % 7", "1"),
            By::Who => ("who", "sum(bytes_out) DESC, 1"),
            By::Destination => ("destination", "sum(bytes_out) DESC, 1"),
        };
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT {key}, sum(exports), sum(attempts), sum(delivered), sum(failed), sum(bytes_out), sum(bytes_in)
             FROM day_sums WHERE day >= ? AND day < ? AND attempts + delivered + failed > 0
             GROUP BY 1 ORDER BY {order}"
        ))?;
        let totals = statement.query_map([since, until], |row| {
            let (mut day, mut who, mut destination) = (None, None, None);
            match by {
                By::Day | By::Week => day = Some(row.get(0)?),
                By::Who => who = Some(row.get(0)?),
                By::Destination => destination = Some(row.get(0)?),
            }
            Ok(Total {
                day,
                who,
                destination,
                exports: row.get(1)?,
                attempts: row.get(2)?,
                delivered: row.get(3)?,
                failed: row.get(4)?,
                bytes_out: row.get(5)?,
                bytes_in: row.get(6)?,
            })
        })?;
        Ok(totals.collect::<Result<_, _>>()?)
    }

    /// The head: the last row's number and the hash up to it. None if there is no row.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn head(&self) -> Result<Option<(i64, Hash)>, Error> {
        let mut statement = self.connection.prepare_cached(
            "SELECT seq, hash FROM ledger WHERE hash IS NOT NULL ORDER BY seq DESC LIMIT 1",
        )?;
        let mut rows = statement.query([])?;
        let Some(row) = rows.next()? else {
            return Ok(None);
        };
        Ok(Some((row.get(0)?, hash(row.get(1)?)?)))
    }

    /// When the oldest row with a body was written, in Unix milliseconds.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn oldest(&self) -> Result<Option<i64>, Error> {
        let sql = "SELECT at FROM ledger WHERE at IS NOT NULL ORDER BY seq LIMIT 1";
        value(&self.connection, sql, [])
    }

    /// Walks along the chain from the first row that is kept, and past the head that somebody `remembered`.
    /// Reads all rows; calls `progress` with each row's number.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn verify(
        &self,
        remembered: Option<(i64, Hash)>,
        mut progress: impl FnMut(i64),
    ) -> Result<Verdict, Error> {
        // The head of an empty ledger says nothing.
        let remembered = remembered.filter(|(seq, _)| *seq > 0);
        let mut statement = self.connection.prepare(with_body!(
            "SELECT seq, body_hash, hash, ",
            " FROM ledger ORDER BY seq"
        ))?;
        let mut rows = statement.query([])?;
        let (mut first, mut last, mut before) = (None, 0, ORIGIN);
        let mut buffer = Vec::new();
        let (mut count, mut emptied, mut accounted, mut expired_to) = (0, 0, 0, None);
        while let Some(row) = rows.next()? {
            let seq: i64 = row.get(0)?;
            progress(seq);
            let stub: Option<Hash> = row.get::<_, Option<Vec<u8>>>(1)?.map(hash).transpose()?;
            let stored: Option<Hash> = row.get::<_, Option<Vec<u8>>>(2)?.map(hash).transpose()?;
            count += 1;
            if first.is_none() {
                first = Some(seq);
                if let Some((at, _)) = remembered
                    && at < seq
                {
                    return Ok(Verdict::TooOld(seq));
                }
                if seq != 1 {
                    // The rows before it are gone, and its own hash is where the chain begins.
                    let Some(anchor) = stored.filter(|_| stub.is_some()) else {
                        return Ok(Verdict::Broken(1, "it was removed"));
                    };
                    (last, before) = (seq, anchor);
                    if remembered == Some((seq, anchor))
                        || remembered.is_none_or(|(at, _)| at > seq)
                    {
                        continue;
                    }
                    return Ok(Verdict::Broken(
                        seq,
                        "it has another hash than was remembered",
                    ));
                }
            }
            if seq != last + 1 {
                return Ok(Verdict::Broken(last + 1, "it was removed"));
            }
            let body = Body::of(row, 3)?;
            let body_hash = match stub {
                Some(stub) => {
                    emptied += 1;
                    stub
                }
                None => body_hash(&body.fields(), &mut buffer),
            };
            let next = link(&before, seq, &body_hash);
            if stored.is_some_and(|stored| stored != next) {
                return Ok(Verdict::Broken(
                    seq,
                    "it was changed, or put in another's place",
                ));
            }
            if stub.is_none() && stored.is_none() {
                return Ok(Verdict::Broken(seq, "its hash is missing"));
            }
            if let Some((at, remembered)) = remembered
                && at == seq
                && remembered != next
            {
                return Ok(Verdict::Broken(
                    seq,
                    "it has another hash than was remembered",
                ));
            }
            if stub.is_none() {
                let removed: Option<i64> = row.get(3 + ATTEMPT)?;
                match row.get_ref(3 + EVENT)?.as_str() {
                    Ok("expired") => expired_to = removed,
                    Ok("pruned" | "forget") => accounted += removed.unwrap_or(0),
                    _ => {}
                }
            }
            (last, before) = (seq, next);
        }
        let Some(first) = first else {
            return Ok(match remembered {
                Some((seq, _)) => Verdict::Broken(seq, "it is missing: this is an older copy"),
                None => Verdict::Whole {
                    rows: 0,
                    emptied: 0,
                    first: 1,
                    head: (0, ORIGIN),
                },
            });
        };
        if let Some((seq, _)) = remembered
            && seq > last
        {
            return Ok(Verdict::Broken(
                last + 1,
                "it is missing: this is an older copy",
            ));
        }
        if first != 1 && expired_to != Some(first) {
            return Ok(Verdict::Broken(1, "no row says that it was pruned"));
        }
        if emptied > accounted {
            return Ok(Verdict::Broken(
                first,
                "there are rows without a body that no row speaks of",
            ));
        }
        Ok(Verdict::Whole {
            rows: count,
            emptied: emptied.unsigned_abs(),
            first,
            head: (last, before),
        })
    }
}

/// Positions in a body.
const EVENT: usize = 1;
const ATTEMPT: usize = 11;

fn hash(bytes: Vec<u8>) -> Result<Hash, Error> {
    bytes.try_into().map_err(|_| Error::Damaged)
}

fn shown(row: &Row<'_>) -> Result<Shown, Error> {
    let digest: Option<Vec<u8>> = row.get(10)?;
    Ok(Shown {
        seq: row.get(0)?,
        at: row.get(1)?,
        event: row.get(2)?,
        export: row
            .get::<_, Option<Vec<u8>>>(3)?
            .and_then(|id| Uuid::from_slice(&id).ok())
            .map(|id| id.to_string()),
        who: row.get(4)?,
        label: row.get(5)?,
        destination: row.get(6)?,
        address: row.get(7)?,
        bytes_out: row.get(8)?,
        bytes_in: row.get(9)?,
        digest: digest.map(|digest| hex(&digest)),
        outcome: row.get(11)?,
        ms: row.get(12)?,
        attempt: row.get(13)?,
        note: row.get(14)?,
    })
}

/// Bytes in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exports::store::{LedgerLimits, Place, Store};
    use crate::ledger::{Entry, Event, Sent};
    use proptest::prelude::*;

    use crate::export::DAY;

    fn attempt(who: &str, destination: &str, at: i64) -> Entry {
        Entry {
            who: who.into(),
            destination: destination.into(),
            export: Some(Uuid::now_v7()),
            outcome: "200".into(),
            delivered: Some(true),
            attempt: Some(Sent {
                address: "192.0.2.1:443".into(),
                bytes_out: 10,
                bytes_in: 2,
                digest: Some([7; 16]),
                ms: 3,
                attempt: 1,
            }),
            ..Entry::new(Event::Attempt, at)
        }
    }

    fn store(size: u64, retention: i64) -> Store {
        let mut store = Store::open(&Place::Memory).unwrap();
        store.limit_ledger(LedgerLimits { size, retention });
        store
    }

    fn evidence_of(store: &Store) -> Evidence {
        Evidence::of(store.path()).unwrap()
    }

    fn verified(store: &Store, remembered: Option<(i64, Hash)>) -> Verdict {
        evidence_of(store).verify(remembered, |_| {}).unwrap()
    }

    /// Rows that were told of, the oldest first.
    fn rows(store: &Store, filter: &Filter) -> Vec<Shown> {
        let mut found = Vec::new();
        let evidence = evidence_of(store);
        evidence
            .rows(filter, true, u64::MAX, |row| {
                found.push(row);
                true
            })
            .unwrap();
        found
    }

    fn seqs(store: &Store, filter: &Filter) -> Vec<i64> {
        rows(store, filter).iter().map(|row| row.seq).collect()
    }

    #[test]
    fn rows_and_sums_tell_what_was_written() {
        let mut store = store(u64::MAX, i64::MAX);
        let entries = [
            attempt("sleep", "a.example #0001", 5),
            attempt("10.0.0.1", "http://b.example:9090 #0002", DAY + 5),
            Entry {
                outcome: "connect".into(),
                delivered: Some(false),
                ..attempt("sleep", "a.example #0001", DAY + 6)
            },
        ];
        store.record(&entries, DAY + 6).unwrap();
        let all = rows(&store, &Filter::default());
        assert_eq!(all.len(), 3);
        assert_eq!(all[0].who.as_deref(), Some("sleep"));
        assert_eq!(all[0].digest.as_deref(), Some("07".repeat(16).as_str()));
        assert_eq!(all[0].note, None);
        let filter = Filter::default;
        for (filter, expected) in [
            (
                Filter {
                    who: Some("sleep".into()),
                    ..filter()
                },
                vec![1, 3],
            ),
            (
                Filter {
                    destination: Some("a.example".into()),
                    ..filter()
                },
                vec![1, 3],
            ),
            (
                Filter {
                    destination: Some("b.example:9090".into()),
                    ..filter()
                },
                vec![2],
            ),
            (
                Filter {
                    destination: Some("b.example".into()),
                    ..filter()
                },
                vec![2],
            ),
            (
                Filter {
                    destination: Some("a.example #0001".into()),
                    ..filter()
                },
                vec![1, 3],
            ),
            (
                Filter {
                    failed: true,
                    ..filter()
                },
                vec![3],
            ),
            (
                Filter {
                    since: Some(DAY),
                    until: Some(DAY + 6),
                    ..filter()
                },
                vec![2],
            ),
            (
                Filter {
                    before: Some(3),
                    after: Some(1),
                    ..filter()
                },
                vec![2],
            ),
            (
                Filter {
                    id: entries[1].export,
                    ..filter()
                },
                vec![2],
            ),
            (
                Filter {
                    refused: true,
                    ..filter()
                },
                vec![],
            ),
        ] {
            assert_eq!(seqs(&store, &filter), expected, "{filter:?}");
        }
        let evidence = evidence_of(&store);
        let days = evidence.sums(By::Day, 0, 2).unwrap();
        assert_eq!(days.len(), 2);
        assert_eq!(
            (days[1].attempts, days[1].delivered, days[1].failed),
            (2, 1, 1)
        );
        let senders = evidence.sums(By::Who, 0, 2).unwrap();
        assert_eq!(senders[0].who.as_deref(), Some("sleep"));
        assert_eq!((senders[0].attempts, senders[0].bytes_out), (2, 20));
        assert_eq!(evidence.sums(By::Destination, 1, 2).unwrap().len(), 2);
        // The first day of 1970 belongs to the week of Monday, 29 December.
        assert_eq!(evidence.sums(By::Week, 0, 2).unwrap()[0].day, Some(-3));
    }

    #[test]
    fn a_sender_that_never_stops_pushes_out_only_its_own_rows() {
        let mut store = store(512 * 1024, i64::MAX);
        store
            .record(&[attempt("quiet", "q.example #0001", 1)], 1)
            .unwrap();
        for minute in 0..400 {
            let entries: Vec<_> = (0..100)
                .map(|_| attempt("noisy", "n.example #0002", minute * 60_000))
                .collect();
            store.record(&entries, minute * 60_000).unwrap();
        }
        assert!(store.ledger_size() <= 550 * 1024, "{}", store.ledger_size());
        let quiet = Filter {
            who: Some("quiet".into()),
            ..Filter::default()
        };
        assert_eq!(seqs(&store, &quiet), [1]);
        let noisy = rows(
            &store,
            &Filter {
                who: Some("noisy".into()),
                ..Filter::default()
            },
        );
        assert!(
            noisy
                .iter()
                .any(|row| row.note.as_deref() == Some("96 more like this"))
        );
        // Nothing is missing in the sums.
        let sums = evidence_of(&store).sums(By::Who, 0, 1).unwrap();
        assert_eq!(sums[0].attempts, 40_000);
        assert!(matches!(
            verified(&store, None),
            Verdict::Whole {
                emptied: 1..,
                first: 1,
                ..
            }
        ));
    }

    #[test]
    fn rows_of_any_kind_are_pruned_and_refused_requests_count_as_of_one_sender() {
        let mut store = store(256 * 1024, i64::MAX);
        let cancel = |at| Entry {
            who: "cancelled".into(),
            destination: "c.example #0001".into(),
            outcome: "cancelled".into(),
            ..Entry::new(Event::Cancel, at)
        };
        let refused = |number: i64| Entry {
            who: format!("2001:db8::{number:x}"),
            outcome: "unauthorized".into(),
            count: 1,
            ..Entry::new(Event::Refused, number)
        };
        store
            .record(&[attempt("quiet", "q.example #0001", 1)], 1)
            .unwrap();
        for number in 0..60 {
            let cancels: Vec<_> = (0..50).map(|_| cancel(number)).collect();
            store.record(&cancels, number).unwrap();
            let refusals: Vec<_> = (0..50).map(|at| refused(50 * number + at)).collect();
            store.record(&refusals, number).unwrap();
        }
        assert!(store.ledger_size() <= 500 * 1024, "{}", store.ledger_size());
        assert!(matches!(
            verified(&store, None),
            Verdict::Whole {
                emptied: 1000..,
                ..
            }
        ));
        assert_eq!(
            seqs(
                &store,
                &Filter {
                    who: Some("quiet".into()),
                    ..Filter::default()
                }
            ),
            [1]
        );
        let days = "SELECT count(*) FROM day_sums";
        let evidence = evidence_of(&store);
        let rows: Option<i64> = value(&evidence.connection, days, []).unwrap();
        assert!(rows.unwrap() <= 4, "{rows:?}");
    }

    #[test]
    fn what_was_folded_in_a_commit_that_failed_is_not_counted() {
        let mut store = store(256 * 1024, i64::MAX);
        while store.ledger_size() < 240 * 1024 {
            let entries: Vec<_> = (0..100)
                .map(|_| attempt("me", "a.example #0001", 1))
                .collect();
            store.record(&entries, 1).unwrap();
        }
        let many: Vec<_> = (0..20)
            .map(|_| attempt("me", "a.example #0001", 60_000))
            .collect();
        store.record(&[], 1).unwrap();
        store.tamper("PRAGMA query_only = 1");
        assert!(store.record(&many, 60_000).is_err());
        store.tamper("PRAGMA query_only = 0");
        let before = evidence_of(&store).sums(By::Who, 0, 1).unwrap()[0].attempts;
        store.record(&many, 60_000).unwrap();
        store.record(&[], 120_000).unwrap();
        let after = evidence_of(&store).sums(By::Who, 0, 1).unwrap()[0].attempts;
        assert_eq!(after - before, 20);
        let told = rows(
            &store,
            &Filter {
                since: Some(60_000),
                ..Filter::default()
            },
        );
        let folded: i64 = told
            .iter()
            .filter_map(|row| {
                row.note
                    .as_deref()?
                    .strip_suffix(" more like this")?
                    .parse::<i64>()
                    .ok()
            })
            .sum();
        let single = told
            .iter()
            .filter(|row| row.event == "attempt" && row.note.is_none())
            .count();
        assert_eq!(folded + i64::try_from(single).unwrap(), 20);
    }

    #[test]
    fn old_rows_go_whole_and_the_chain_begins_with_the_last_of_them() {
        let mut store = store(u64::MAX, 90 * DAY);
        for day in 0..100 {
            store
                .record(&[attempt("me", "a.example #0001", day * DAY)], day * DAY)
                .unwrap();
        }
        let remembered = store.ledger_head();
        while store.expire_ledger(100 * DAY).unwrap() {}
        assert_eq!(seqs(&store, &Filter::default())[0], 12);
        assert!(matches!(
            verified(&store, Some(remembered)),
            Verdict::Whole { first: 11, .. }
        ));
        assert_eq!(verified(&store, Some((5, [0; 32]))), Verdict::TooOld(11));
        assert_eq!(
            evidence_of(&store).sums(By::Who, 0, 100).unwrap()[0].attempts,
            100
        );
    }

    #[test]
    fn what_is_forgotten_is_gone_and_the_chain_is_whole() {
        let mut store = store(u64::MAX, i64::MAX);
        let entries = ["me", "you", "me"].map(|who| attempt(who, "a.example #0001", 1));
        store.record(&entries, 1).unwrap();
        let mut after = Some(0);
        while let Some(from) = after {
            after = store.forget_rows(from, |who, _| who == "me", 2).unwrap();
        }
        assert_eq!(seqs(&store, &Filter::default()), [2, 4]);
        let text = "SELECT count(*) FROM ledger WHERE who = 'me'";
        let evidence = evidence_of(&store);
        assert_eq!(
            value::<i64>(&evidence.connection, text, []).unwrap(),
            Some(0)
        );
        let sums = evidence.sums(By::Who, 0, 1).unwrap();
        let senders: Vec<_> = sums.iter().map(|sum| sum.who.as_deref().unwrap()).collect();
        assert_eq!(senders, ["forgotten", "you"]);
        assert!(matches!(
            verified(&store, None),
            Verdict::Whole { emptied: 2, .. }
        ));
    }

    #[test]
    fn tampering_is_found_and_the_row_named() {
        let tampered = |sql: &str, remembered: Option<(i64, Hash)>| {
            let mut store = store(u64::MAX, i64::MAX);
            for seq in 1..=9 {
                let entry = Entry {
                    note: format!("row {seq}"),
                    ..attempt("me", "a.example #0001", seq)
                };
                store.record(&[entry], seq).unwrap();
            }
            store.tamper(sql);
            verified(&store, remembered)
        };
        let broken = |sql| match tampered(sql, None) {
            Verdict::Broken(seq, _) => seq,
            other => panic!("{sql}: {other:?}"),
        };
        assert!(matches!(
            tampered("SELECT 1", None),
            Verdict::Whole { rows: 9, .. }
        ));
        assert_eq!(broken("UPDATE ledger SET bytes_out = 9 WHERE seq = 4"), 4);
        assert_eq!(
            broken("UPDATE ledger SET destination = NULL WHERE seq = 4"),
            4
        );
        assert_eq!(broken("DELETE FROM ledger WHERE seq = 4"), 4);
        assert_eq!(broken("DELETE FROM ledger WHERE seq < 4"), 1);
        let swap =
            "UPDATE ledger SET seq = -4 WHERE seq = 4; UPDATE ledger SET seq = 4 WHERE seq = 5;
            UPDATE ledger SET seq = 5 WHERE seq = -4";
        assert_eq!(broken(swap), 4);
        let empty =
            "UPDATE ledger SET at = NULL, hash = NULL, body_hash = zeroblob(32) WHERE seq = 4";
        assert_eq!(broken(empty), 5);
        let cut = "DELETE FROM ledger WHERE seq > 6";
        assert!(matches!(
            tampered(cut, None),
            Verdict::Whole { rows: 6, .. }
        ));
        assert!(matches!(
            tampered(cut, Some((9, [1; 32]))),
            Verdict::Broken(7, _)
        ));
        assert!(matches!(
            tampered("SELECT 1", Some((9, [1; 32]))),
            Verdict::Broken(9, _)
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        /// Whatever was done, the chain is whole, the head that was remembered at any time is found or was
        /// pruned, and what memory counts is what a restart counts.
        #[test]
        fn the_chain_is_whole_after_any_history(
            steps in proptest::collection::vec((0..4_u8, 0..3_u8, 1..150_usize), 1..25),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let place = Place::Folder(folder.path().to_owned());
            let limits = LedgerLimits { size: 30_000, retention: 3 * DAY };
            let mut store = Store::open(&place).unwrap();
            store.limit_ledger(limits);
            let mut now = 0;
            let mut heads = Vec::new();
            for (step, who, count) in steps {
                let who = ["a", "b", "c"][usize::from(who)];
                match step {
                    0 | 1 => {
                        let entries: Vec<_> =
                            (0..count).map(|_| attempt(who, "x.example #0001", now)).collect();
                        store.record(&entries, now).unwrap();
                        now += i64::try_from(count).unwrap() * 300_000;
                    }
                    2 => {
                        store.forget_rows(0, |found, _| found == who, now).unwrap();
                    }
                    _ => {
                        store.expire_ledger(now).unwrap();
                    }
                }
                heads.push(store.ledger_head());
                if count % 5 == 0 {
                    let size = store.ledger_size();
                    drop(store);
                    store = Store::open(&place).unwrap();
                    store.limit_ledger(limits);
                    prop_assert_eq!(store.ledger_size(), size);
                }
            }
            for head in heads {
                match verified(&store, Some(head)) {
                    Verdict::Whole { .. } | Verdict::TooOld(_) => {}
                    broken => prop_assert!(false, "{:?} {:?}", head.0, broken),
                }
            }
        }
    }
}
