//! Reads which rows of the ledger somebody asks for, in the words of the command line, the API and the page; pure.
//!
//! Not here: finding the rows ([`crate::exports::store::evidence`]).

use std::time::{SystemTime, UNIX_EPOCH};

use crate::exports::store::evidence::Filter;

/// What was asked for, as text. Empty texts are no conditions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// At or after this time.
    pub since: &'a str,
    /// Before this time.
    pub until: &'a str,
    /// From this sender.
    pub who: &'a str,
    /// To this destination.
    pub destination: &'a str,
    /// `failed` or `refused`.
    pub outcome: &'a str,
    /// About this export.
    pub id: &'a str,
}

/// The filter that was asked for. `now` is in Unix milliseconds.
///
/// # Errors
/// Which text cannot be read, and what it should be.
pub fn filter(asked: &Asked<'_>, now: i64) -> Result<Filter, String> {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let time = |name: &str, text: &str| {
        match text {
        "" => Ok(None),
        text => moment(text, now).map(Some).ok_or_else(|| {
            format!(
                "{name} {}: give a day like 2026-01-31, a time like 2026-01-31T08:00:00Z, or how long \
                 ago, like 24h or 7d",
                text.escape_debug()
            )
        }),
    }
    };
    let (failed, refused) = match asked.outcome {
        "" | "all" => (false, false),
        "failed" => (true, false),
        "refused" => (false, true),
        other => {
            return Err(format!(
                "outcome {}: give failed or refused, or leave it out",
                other.escape_debug()
            ));
        }
    };
    let id = match asked.id {
        "" => None,
        id => Some(id.parse().map_err(|_| {
            format!(
                "id {}: give an export's whole id, like 01a209fa-822b-7187-8cd1-039da68c5541",
                id.escape_debug()
            )
        })?),
    };
    Ok(Filter {
        since: time("since", asked.since)?,
        until: time("until", asked.until)?,
        who: text(asked.who),
        destination: text(asked.destination),
        failed,
        refused,
        id,
        before: None,
        after: None,
    })
}

/// A time in Unix milliseconds: a UTC day, a time as in RFC 3339, Unix milliseconds, or a duration before `now`.
fn moment(text: &str, now: i64) -> Option<i64> {
    let text = text.trim();
    if text.len() >= 11 && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok();
    }
    let is_day = text.len() == 10 && !text.contains([':', 'T']);
    let full = match is_day {
        true => format!("{text}T00:00:00Z"),
        false => text.to_owned(),
    };
    if let Ok(time) = humantime::parse_rfc3339_weak(&full) {
        return Some(millis(time));
    }
    let ago = humantime::parse_duration(text).ok()?;
    now.checked_sub(i64::try_from(ago.as_millis()).ok()?)
}

/// A time in Unix milliseconds.
pub fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: i64 = 1_795_686_123_456;

    #[test]
    fn times_are_read_as_people_write_them() {
        let day = 20_783 * 86_400_000;
        for (text, expected) in [
            ("2026-11-26", Some(day)),
            ("2026-11-26T01:00:00Z", Some(day + 3_600_000)),
            ("2026-11-26 01:00:00", Some(day + 3_600_000)),
            ("1795686123456", Some(NOW)),
            ("24h", Some(NOW - 86_400_000)),
            ("7d", Some(NOW - 7 * 86_400_000)),
            ("yesterday", None),
            ("2026-13-01", None),
            ("", None),
        ] {
            assert_eq!(moment(text, NOW), expected, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let wrong = |asked: Asked<'_>| filter(&asked, NOW).unwrap_err();
        let since = wrong(Asked {
            since: "soon",
            ..Asked::default()
        });
        assert!(since.starts_with("since soon: give a day"), "{since}");
        assert!(
            wrong(Asked {
                outcome: "good",
                ..Asked::default()
            })
            .contains("failed or refused")
        );
        assert!(
            wrong(Asked {
                id: "17",
                ..Asked::default()
            })
            .contains("id 17")
        );
        assert!(filter(&Asked::default(), NOW).unwrap().who.is_none());
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in ".*") {
            moment(&text, NOW);
        }
    }
}
