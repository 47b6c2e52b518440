//! What the page's address asks for: filters of the ledger, a span for the bars.
//!
//! Not here: what the texts of the filters mean to the ledger (`api`).

use super::text::{Component, put};

/// The query of the page's address. An empty text is no filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// What the bars span.
    pub range: Range,
    /// Rows of this `who`.
    pub who: String,
    /// Rows of this destination name.
    pub destination: String,
    /// `failed` or `refused`.
    pub outcome: String,
    /// Rows from this day or time on.
    pub since: String,
    /// Rows before this day or time.
    pub until: String,
    /// Rows of the export with this id.
    pub id: String,
    /// Rows with a smaller number than this.
    pub before: Option<i64>,
}

/// What the bars span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Range {
    /// 24 hours.
    Day,
    /// 30 days.
    #[default]
    Month,
    /// 52 weeks.
    Year,
}

impl Range {
    /// How many bars there are, and how many milliseconds each spans.
    pub fn bars(self) -> (i64, i64) {
        const HOUR: i64 = 3_600_000;
        match self {
            Self::Day => (24, HOUR),
            Self::Month => (30, 24 * HOUR),
            Self::Year => (52, 7 * 24 * HOUR),
        }
    }

    /// When the first bar begins, if the last one contains `now`. Bars begin with an hour or a day, UTC.
    pub fn start(self, now: i64) -> i64 {
        let (bars, span) = self.bars();
        let step = span.min(24 * 3_600_000);
        let end = (now.div_euclid(step) + 1).saturating_mul(step);
        end.saturating_sub(bars * span)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
            Self::Year => "year",
        }
    }
}

impl Query {
    /// Reads what follows the `?`. What is not known is ignored; the last of several counts.
    pub fn parse(query: &str) -> Self {
        let mut parsed = Self::default();
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value);
            match name {
                "range" => {
                    parsed.range = match value.as_str() {
                        "day" => Range::Day,
                        "year" => Range::Year,
                        _ => Range::Month,
                    }
                }
                "who" => parsed.who = value,
                "destination" => parsed.destination = value,
                "outcome" => parsed.outcome = value,
                "since" => parsed.since = value,
                "until" => parsed.until = value,
                "id" => parsed.id = value,
                "before" => parsed.before = value.parse().ok(),
                _ => {}
            }
        }
        parsed
    }

    /// Whether rows are left out.
    pub fn is_filtered(&self) -> bool {
        self.filters()
            .into_iter()
            .any(|(_, value)| !value.is_empty())
    }

    /// The filters by name, empty ones too.
    fn filters(&self) -> [(&'static str, &str); 6] {
        [
            ("who", &self.who),
            ("destination", &self.destination),
            ("outcome", &self.outcome),
            ("since", &self.since),
            ("until", &self.until),
            ("id", &self.id),
        ]
    }

    /// The filters as a query, with `&amp;` between them as in an attribute: safe in HTML.
    pub fn filter_query(&self) -> String {
        let mut query = String::new();
        for (name, value) in self.filters() {
            if !value.is_empty() {
                let and = if query.is_empty() { "" } else { "&amp;" };
                put!(query, "{and}{name}={}", Component(value));
            }
        }
        query
    }

    /// The page's own address with this range, as in an attribute.
    pub fn link(&self, range: Range, before: Option<i64>, section: &str) -> String {
        let mut link = format!("/?range={}", range.word());
        let filters = self.filter_query();
        if !filters.is_empty() {
            put!(link, "&amp;{filters}");
        }
        if let Some(before) = before {
            put!(link, "&amp;before={before}");
        }
        put!(link, "#{section}");
        link
    }
}

/// A component of a query as text. What is not UTF-8 is replaced.
fn decoded(component: &str) -> String {
    let mut bytes = Vec::with_capacity(component.len());
    let mut rest = component.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        let digit = |at: usize| {
            after
                .get(at)
                .and_then(|&byte| char::from(byte).to_digit(16))
        };
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                // Two digits of 16 are a byte.
                bytes.push((high * 16 + low) as u8);
                rest = &after[2..];
            }
            (b'+', ..) => bytes.push(b' '),
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_reads_back_as_the_query_that_it_was_made_of() {
        let query = Query {
            range: Range::Year,
            who: "a&b=c \"<é".into(),
            destination: "hooks.example.com #3f9a".into(),
            outcome: "failed".into(),
            since: "2026-11-01".into(),
            before: Some(17),
            ..Query::default()
        };
        let link = query.link(query.range, query.before, "ledger");
        let (path, section) = link.split_once('#').unwrap();
        assert_eq!(section, "ledger");
        let read = path.strip_prefix("/?").unwrap().replace("&amp;", "&");
        assert_eq!(Query::parse(&read), query);
    }

    #[test]
    fn a_query_that_nobody_would_write_is_read_all_the_same() {
        let query = Query::parse("who=%zz%4&&=&before=x&range=never&destination=a+b%20c&who=%ff%");
        assert_eq!(query.who, "\u{fffd}%");
        assert_eq!(query.destination, "a b c");
        assert_eq!(query.before, None);
        assert_eq!(query.range, Range::Month);
    }

    #[test]
    fn the_last_bar_contains_now() {
        let now = 1_795_686_123_456;
        for range in [Range::Day, Range::Month, Range::Year] {
            let (bars, span) = range.bars();
            let index = (now - range.start(now)) / span;
            assert_eq!(index, bars - 1, "{range:?}");
        }
    }
}
