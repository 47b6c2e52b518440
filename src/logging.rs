//! Log lines on stderr, as text or JSON.
//!
//! Only this program's own lines are shown, as libraries log headers and bodies at trace level, with tokens
//! and payloads in them. Our own lines may have ids, origins of destinations, sizes, durations, statuses and
//! reasons, but never a payload, a token, a secret or a URL's path.
//!
//! Nothing waits for the reader of the log: lines go through a bounded queue to the one thread that writes
//! them. Lines that find the queue full are dropped and counted.
//!
//! Levels are a promise: `error` needs someone to act, as when an export was given up; `warn` is something that did not
//! work, as an attempt, or a setting that may not be meant; `info` is one line per request and delivery,
//! `debug` each poll, `trace` each step.

use std::fmt::{Display, Write as _};
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use log::kv::{self, Key, Value, VisitSource};
use log::{Level, LevelFilter, Metadata, Record};
use parking_lot::{Condvar, Mutex};
use serde_json::{Map, Value as Json};

use crate::metrics::Metrics;
use crate::threads;

/// The format of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// `TIME LEVEL event key=value …`
    Text,
    /// One JSON object per line, with `time`, `level`, `event` and the keys.
    Json,
}

/// Starts logging, on a thread of its own, and counts lost lines in `metrics`. A second call changes nothing.
///
/// # Panics
/// The system cannot start a thread.
pub fn start(format: Format, level: LevelFilter, metrics: Arc<Metrics>) {
    let queue = Arc::new(Queue {
        metrics,
        ..Queue::default()
    });
    let logger = Logger {
        format,
        queue: queue.clone(),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
        threads::spawn("log", move || queue.write_to(&mut io::stderr(), format));
    }
}

/// Waits until all lines so far are written, so that the end of the process does not lose them. Blocks for
/// at most half a second, in case nobody reads them.
pub fn flush() {
    log::logger().flush();
}

/// Writes a message that is not a log line to stderr: one from before logging starts, or the last. Blocks
/// for at most half a second.
pub fn print(message: String) {
    // If it cannot be written, the exit code still tells.
    let write = |message: &str| drop(io::stderr().write_all(message.as_bytes()));
    let copy = message.clone();
    // On a thread, which can be left behind if nobody reads.
    match threads::try_spawn("message", move || write(&copy)) {
        Ok(thread) => drop(thread.ends_within(LAST_LINES)),
        Err(_) => write(&message),
    }
}

/// Runs `tell`, which logs something that clients cause, unless there have been too many such lines lately,
/// so that a client cannot fill the disk with them. How many were left out is logged with the next one.
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

/// Logs a refused request. Of its target only the path is shown. Path and method are cut to the lengths of
/// those that are served: a client must not fill the log, and what it sends may be a token in the wrong
/// place.
pub fn refused(
    method: &str,
    target: &str,
    (status, code): (u16, &str),
    reason: &dyn Display,
    client: SocketAddr,
) {
    of_clients(|| {
        let path = target.split('?').next().unwrap_or_default();
        let path: String = path.chars().take(LONGEST_PATH).collect();
        let method: String = method.chars().take(LONGEST_METHOD).collect();
        log::info!(
            method = method.as_str(), path = path.as_str(), status, code, reason:% = reason,
            client:%;
            "refused"
        );
    });
}

/// How many characters of a path are shown.
const LONGEST_PATH: usize = 16;
/// How many characters of a method are shown.
const LONGEST_METHOD: usize = 8;

/// How many lines about clients may be logged at once.
const BURST: f64 = 100.0;
/// How many a second may be logged for any length of time.
const PER_SECOND: f64 = 10.0;

/// A token bucket, which limits the rate of lines about clients.
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

    /// Some if another line may be logged: how many could not since the last one.
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
    queue: Arc<Queue>,
}

impl log::Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("export_service")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.queue
                .add(&line(self.format, SystemTime::now(), record));
        }
    }

    fn flush(&self) {
        self.queue.wait_until_written(Instant::now() + LAST_LINES);
    }
}

/// Bytes of lines that may wait to be written: some 800 lines.
const MOST_WAITING: usize = 128 * 1024;
/// How long lines are gathered before they are written: a wake-up and a write for each would cost a busy
/// service more than the lines themselves.
const GATHERING: Duration = Duration::from_millis(5);
/// How long to wait before writing again to a non-blocking stderr that is full.
const FULL: Duration = Duration::from_millis(10);
/// How long the last lines of the process may take.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Lines on their way to the thread that writes them.
#[derive(Default)]
struct Queue {
    inner: Mutex<Waiting>,
    added: Condvar,
    written: Condvar,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Waiting {
    /// Whole lines, each with its end.
    lines: Vec<u8>,
    /// How many were dropped after these.
    lost: u64,
    /// Bytes that the thread has taken and not written yet.
    taken: usize,
}

impl Queue {
    /// Adds a line, or counts it if there is no room. Never blocks.
    fn add(&self, line: &str) {
        let mut inner = self.inner.lock();
        // After a dropped line all are dropped, even short ones, so that the count appears where they
        // are missing.
        if inner.lost > 0 || inner.lines.len() + inner.taken + line.len() > MOST_WAITING {
            inner.lost += 1;
            self.metrics.log_lines_lost.one();
        } else {
            inner.lines.extend_from_slice(line.as_bytes());
        }
        drop(inner);
        self.added.notify_one();
    }

    /// The thread's body: writes whatever is added, for ever.
    fn write_to(&self, out: &mut impl Write, format: Format) {
        let mut batch = Vec::new();
        let mut lost = 0;
        loop {
            lost += self.take(&mut batch);
            if lost > 0 {
                batch.extend_from_slice(lost_lines(format, SystemTime::now(), lost).as_bytes());
            }
            let written = write(out, &batch);
            lost = match &batch[written..] {
                [] => 0,
                // Reported after the next lines that can be written. The unwritten line with the count
                // is not itself a lost one.
                rest => {
                    let more = lines(rest) - u64::from(lost > 0);
                    self.metrics.log_lines_lost.add(more);
                    lost + more
                }
            };
            batch.clear();
            self.inner.lock().taken = 0;
            self.written.notify_all();
        }
    }

    /// Waits for lines and moves them to `batch`. Returns how many were dropped after them.
    fn take(&self, batch: &mut Vec<u8>) -> u64 {
        let mut inner = self.inner.lock();
        while inner.lines.is_empty() && inner.lost == 0 {
            self.added.wait(&mut inner);
        }
        drop(inner);
        thread::sleep(GATHERING);
        let mut inner = self.inner.lock();
        batch.append(&mut inner.lines);
        inner.taken = batch.len();
        mem::take(&mut inner.lost)
    }

    fn wait_until_written(&self, deadline: Instant) {
        let mut inner = self.inner.lock();
        while inner.taken > 0 || !inner.lines.is_empty() || inner.lost > 0 {
            if self.written.wait_until(&mut inner, deadline).timed_out() {
                return;
            }
        }
    }
}

/// Writes as much as it can, and returns how many bytes those were. Blocks as `out` does.
fn write(out: &mut impl Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match out.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(FULL),
            Err(_) => break,
        }
    }
    written
}

fn lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The line that is written where others are missing.
fn lost_lines(format: Format, now: SystemTime, count: u64) -> String {
    let count = [("count", Value::from(count))];
    let record = Record::builder()
        .level(Level::Warn)
        .args(format_args!("log lines lost"))
        .key_values(&count)
        .build();
    line(format, now, &record)
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
    use crossbeam_channel::{Receiver, Sender, unbounded};
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

    /// Passes on what is written to it, and fails or blocks where the test says so.
    struct Out {
        written: Sender<Vec<u8>>,
        results: Receiver<io::Result<usize>>,
    }

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // At the end of the test its thread ends here.
            let result = self.results.recv().unwrap_or(Ok(usize::MAX));
            let result = result.map(|most| most.min(bytes.len()));
            if let Ok(length) = result {
                let _ = self.written.send(bytes[..length].to_vec());
            }
            result
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A queue, what it writes, and the means to say how each write goes.
    fn queue() -> (Arc<Queue>, Receiver<Vec<u8>>, Sender<io::Result<usize>>) {
        let (written, output) = unbounded();
        let (going, results) = unbounded();
        let queue = Arc::new(Queue::default());
        let writing = queue.clone();
        thread::spawn(move || writing.write_to(&mut Out { written, results }, Format::Text));
        (queue, output, going)
    }

    fn next(output: &Receiver<Vec<u8>>) -> String {
        String::from_utf8(output.recv_timeout(Duration::from_secs(60)).unwrap()).unwrap()
    }

    const ALL: io::Result<usize> = Ok(usize::MAX);

    #[test]
    fn while_nobody_reads_lines_are_kept_in_order_up_to_a_limit_and_the_rest_is_counted() {
        let (queue, output, going) = queue();
        let line = |number| format!("{number:0>999}\n");
        let count = 1000;
        queue.add(&line(0));
        while queue.inner.lock().taken == 0 {
            thread::yield_now();
        }
        for number in 1..count {
            queue.add(&line(number));
        }
        queue.add("short\n");
        for _ in 0..2 {
            going.send(ALL).unwrap();
        }
        queue.wait_until_written(Instant::now() + Duration::from_secs(60));
        let text: String = output
            .try_iter()
            .map(|text| String::from_utf8(text).unwrap())
            .collect();
        let (kept, notice) = text.trim_end().rsplit_once('\n').unwrap();
        let kept: Vec<_> = kept.lines().collect();
        assert_eq!(kept.len(), MOST_WAITING / 1000);
        for (number, kept) in kept.iter().enumerate() {
            assert_eq!(format!("{kept}\n"), line(number));
        }
        let lost = count + 1 - kept.len();
        assert_eq!(queue.metrics.log_lines_lost.value(), lost as f64);
        assert!(
            notice.ends_with(&format!("WARN  log lines lost count={lost}")),
            "{notice}"
        );
        queue.add("again\n");
        going.send(ALL).unwrap();
        assert_eq!(next(&output), "again\n");
    }

    #[test]
    fn a_line_that_is_longer_than_the_queue_is_lost_alone() {
        let (queue, output, going) = queue();
        queue.add(&"x".repeat(MOST_WAITING + 1));
        going.send(ALL).unwrap();
        assert!(next(&output).ends_with("log lines lost count=1\n"));
        queue.add("next\n");
        going.send(ALL).unwrap();
        assert_eq!(next(&output), "next\n");
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told_once_something_can() {
        let (queue, output, going) = queue();
        let failing = || Err(ErrorKind::StorageFull.into());
        let written = |line: &str, results: Vec<io::Result<usize>>| {
            queue.add(line);
            results
                .into_iter()
                .for_each(|result| going.send(result).unwrap());
            queue.wait_until_written(Instant::now() + Duration::from_secs(60));
        };
        written("one\n", vec![failing()]);
        written("two\n", vec![failing()]);
        written(
            "three\n",
            vec![Ok(2), Err(ErrorKind::Interrupted.into()), failing()],
        );
        assert_eq!(next(&output), "th");
        written("four\n", vec![Err(ErrorKind::WouldBlock.into()), ALL]);
        let text = next(&output);
        assert!(
            text.starts_with("four\n") && text.ends_with("log lines lost count=3\n"),
            "{text}"
        );
        assert_eq!(queue.metrics.log_lines_lost.value(), 3.0);
        written("five\n", vec![ALL]);
        assert_eq!(next(&output), "five\n");
    }

    #[test]
    fn the_end_waits_no_longer_than_its_deadline_for_a_reader_that_stands_still() {
        let (queue, output, _going) = queue();
        queue.add("line\n");
        queue.wait_until_written(Instant::now() + Duration::from_millis(50));
        assert!(output.is_empty());
    }

    #[test]
    fn lines_of_libraries_are_not_shown() {
        let logger = Logger {
            format: Format::Text,
            queue: Arc::default(),
        };
        let target = |target| Metadata::builder().target(target).build();
        assert!(log::Log::enabled(
            &logger,
            &target("export_service::server")
        ));
        assert!(!log::Log::enabled(&logger, &target("ureq::run")));
    }
}
