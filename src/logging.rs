//! Log lines on stderr, as text or JSON.
//!
//! Only this program's own lines are shown: libraries log headers and bodies at trace level, and
//! those hold tokens and payloads. What our own lines may hold: ids, origins of destinations,
//! sizes, durations, statuses, reasons. Never a payload, a token, a secret or a URL's path.
//!
//! Levels are a promise: `error` needs someone to act, `warn` is something that did not work,
//! `info` is one line per request and delivery, `debug` each poll, `trace` each step.

use std::fmt::{Display, Write as _};
use std::io::{self, Write as _};
use std::time::{Duration, Instant, SystemTime};

use log::kv::{self, Key, Value, VisitSource};
use log::{LevelFilter, Metadata, Record};
use parking_lot::Mutex;
use serde_json::{Map, Value as Json};

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `TIME LEVEL event key=value …`
    Text,
    /// One JSON object per line, with `time`, `level`, `event` and the keys.
    Json,
}

/// Starts logging. A second call changes nothing.
pub fn start(format: Format, level: LevelFilter) {
    if log::set_boxed_logger(Box::new(Logger { format })).is_ok() {
        log::set_max_level(level);
    }
}

/// Runs `tell`, which logs something that clients cause, unless there have been too many such
/// lines lately: a client is not to fill the disk with them. How many were left out is told with
/// the next one.
pub fn of_clients(tell: impl FnOnce()) {
    static LINES: Mutex<Bucket> = Mutex::new(Bucket::new());
    let passed = LINES.lock().pass(Instant::now());
    if let Some(left_out) = passed {
        if left_out > 0 {
            log::warn!(count = left_out; "lines about clients left out");
        }
        tell();
    }
}

/// One line for a request that is not carried out. Of the target only its path is shown, and what is
/// longer than any that are served is cut, as the method is: what a client sends is not to fill the
/// log, and may be a token in the wrong place.
pub fn refused(
    method: &str,
    target: &str,
    (status, code): (u16, &str),
    reason: &dyn Display,
    client: &str,
) {
    of_clients(|| {
        let path = target.split('?').next().unwrap_or_default();
        let path: String = path.chars().take(LONGEST_PATH).collect();
        let method: String = method.chars().take(LONGEST_METHOD).collect();
        log::info!(
            method = method.as_str(), path = path.as_str(), status, code, reason:% = reason, client;
            "refused"
        );
    });
}

/// What is shown of a path, in characters.
const LONGEST_PATH: usize = 16;
/// What is shown of a method.
const LONGEST_METHOD: usize = 8;

/// How many lines about clients may come at once.
const BURST: f64 = 100.0;
/// How many may come in a second for ever.
const PER_SECOND: f64 = 10.0;

/// A token bucket.
struct Bucket {
    left: f64,
    at: Option<Instant>,
    left_out: u64,
}

impl Bucket {
    const fn new() -> Self {
        Self {
            left: BURST,
            at: None,
            left_out: 0,
        }
    }

    /// Whether another line may pass, and how many could not since the last one.
    fn pass(&mut self, now: Instant) -> Option<u64> {
        let since = self.at.replace(now).unwrap_or(now);
        let more = now.saturating_duration_since(since).as_secs_f64() * PER_SECOND;
        self.left = (self.left + more).min(BURST);
        if self.left < 1.0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1.0;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// A duration for a log line, in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

struct Logger {
    format: Format,
}

impl log::Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("export_service")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = line(self.format, SystemTime::now(), record);
            // In one write, so that lines of several threads do not mix. With nobody to read
            // them, lines are lost and the service goes on.
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

fn line(format: Format, now: SystemTime, record: &Record<'_>) -> String {
    let time = humantime::format_rfc3339_millis(now).to_string();
    match format {
        Format::Text => {
            let mut fields = Text(format!("{time} {:<5} {}", record.level(), record.args()));
            // The visitor below never fails.
            let _ = record.key_values().visit(&mut fields);
            fields.0.push('\n');
            fields.0
        }
        Format::Json => {
            let mut fields = Map::new();
            fields.insert("time".into(), time.into());
            fields.insert(
                "level".into(),
                record.level().as_str().to_lowercase().into(),
            );
            fields.insert("event".into(), record.args().to_string().into());
            let mut fields = Object(fields);
            let _ = record.key_values().visit(&mut fields);
            format!("{}\n", Json::Object(fields.0))
        }
    }
}

struct Text(String);

impl<'kvs> VisitSource<'kvs> for Text {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let value = value.to_string();
        let plain = !value.is_empty()
            && value
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'='));
        // Writing to a String cannot fail.
        let _ = if plain {
            write!(self.0, " {key}={value}")
        } else {
            // Debug escapes control characters: no value can pretend to be a line of its own.
            write!(self.0, " {key}={value:?}")
        };
        Ok(())
    }
}

struct Object(Map<String, Json>);

impl<'kvs> VisitSource<'kvs> for Object {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let json = match value.to_u64() {
            Some(number) => number.into(),
            None => value.to_string().into(),
        };
        self.0.insert(key.to_string(), json);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn written(format: Format) -> String {
        let values = [
            ("bytes", Value::from(12_u64)),
            ("reason", Value::from("a \"b\"\nc=d")),
        ];
        let record = Record::builder()
            .level(log::Level::Info)
            .args(format_args!("accepted"))
            .key_values(&values)
            .build();
        line(
            format,
            UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            &record,
        )
    }

    #[test]
    fn a_text_line_quotes_what_is_not_plain_and_stays_one_line() {
        assert_eq!(
            written(Format::Text),
            "2023-11-14T22:13:20.123Z INFO  accepted bytes=12 reason=\"a \\\"b\\\"\\nc=d\"\n"
        );
    }

    #[test]
    fn a_json_line_is_one_object_with_numbers_as_numbers() {
        let line = written(Format::Json);
        let json: Json = serde_json::from_str(&line).unwrap();
        assert_eq!(json["event"], "accepted");
        assert_eq!(json["level"], "info");
        assert_eq!(json["bytes"], 12);
        assert_eq!(json["reason"], "a \"b\"\nc=d");
        assert_eq!(line.lines().count(), 1);
    }

    #[test]
    fn a_flood_of_lines_is_cut_and_counted_and_comes_back_with_time() {
        let (mut bucket, start) = (Bucket::new(), Instant::now());
        let passed = (0..1000).filter(|_| bucket.pass(start).is_some()).count();
        assert_eq!(passed, 100);
        assert_eq!(bucket.pass(start + Duration::from_millis(100)), Some(900));
        assert_eq!(bucket.pass(start + Duration::from_millis(100)), None);
        assert_eq!(bucket.pass(start + Duration::from_secs(60)), Some(1));
        assert_eq!(bucket.pass(start + Duration::from_secs(60)), Some(0));
    }

    #[test]
    fn lines_of_libraries_are_not_shown() {
        let logger = Logger {
            format: Format::Text,
        };
        let target = |target| Metadata::builder().target(target).build();
        assert!(log::Log::enabled(
            &logger,
            &target("export_service::server")
        ));
        assert!(!log::Log::enabled(&logger, &target("ureq::run")));
    }
}
