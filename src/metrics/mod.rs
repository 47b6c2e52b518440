//! Counts what happens, and renders that for Prometheus.
//!
//! Counters are atomics that are raised where something happens: no lock, no allocation, and no order among
//! them. All labels come from lists in this file, so no client can add a series. What others know at any
//! moment, like the number of queues, is not counted here but handed over when the text is made: [`Gauges`].
//!
//! Not here: serving the text, and finding the values of [`Gauges`] (`owner`).

mod counters;
mod process;
mod text;

use std::net::IpAddr;
use std::time::Duration;

use crate::export::Millis;
use crate::ledger::Refusals;
use crate::version;
use counters::{Counter, Family, Found, Histogram, Level, OTHER};
use text::Text;

/// The media type of the text: version 0.0.4 of Prometheus' own format, which all scrapers read.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Why requests are refused: the codes of `answer::Refusal`.
const REASONS: [&str; 26] = [
    "bad_request",
    "busy",
    "disk_full",
    "expectation_failed",
    "head_too_large",
    "http_version",
    "idempotency_conflict",
    "incomplete",
    "length_required",
    "malformed",
    "method_not_allowed",
    "no_secret",
    "no_such_export",
    "no_such_path",
    "not_implemented",
    "overloaded",
    "stopping",
    "storage_failed",
    "store_full",
    "too_large",
    "too_many_pending",
    "too_slow",
    "unanswered",
    "unauthorized",
    "unsupported_encoding",
    OTHER,
];

/// How attempts end: with an answer that is final, with one whose status is in `--retry-on`, or with a
/// failure of one of the kinds of `delivery::attempt::Kind`.
const OUTCOMES: [&str; 12] = [
    "answered",
    "status",
    "dns",
    "connect",
    "tls",
    "timeout",
    "closed",
    "protocol",
    "forbidden_address",
    "forbidden_http",
    "lost",
    OTHER,
];

/// The hundreds of a status.
const CLASSES: [&str; 5] = ["2xx", "3xx", "4xx", "5xx", OTHER];

/// Upper bounds of the buckets for commits, in microseconds: from a fast SSD to an SD card that is failing.
const COMMIT: [u64; 10] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 250_000, 1_000_000, 5_000_000,
];
/// The same for attempts, whose default limit is 30 s.
const ATTEMPT: [u64; 10] = [
    5_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 10_000_000, 30_000_000,
];
/// The same for the time from acceptance to delivery: from at once to a day.
const DELAY: [u64; 10] = [
    10_000,
    50_000,
    250_000,
    1_000_000,
    10_000_000,
    60_000_000,
    600_000_000,
    3_600_000_000,
    21_600_000_000,
    86_400_000_000,
];

/// All that is counted in this run of the service.
pub struct Metrics {
    /// Submissions that were accepted as new exports.
    pub accepted: Counter,
    /// Bytes of their payloads.
    pub accepted_bytes: Counter,
    /// Requests that were answered with an error, by the error's code.
    pub refused: Family<{ REASONS.len() }>,
    /// The same with the clients, for the ledger.
    pub refusals: Refusals,
    /// Attempts that were made, by outcome.
    pub attempts: Family<{ OUTCOMES.len() }>,
    /// Answers of destinations, by the hundreds of their status: see [`Metrics::answer`].
    answers: Family<{ CLASSES.len() }>,
    /// Exports that were finished by an answer of their destination.
    pub delivered: Counter,
    /// Exports that were finished without one, since no other attempt could change that.
    pub failed: Counter,
    /// Exports that were finished without one, since they were tried for long enough.
    pub given_up: Counter,
    /// Exports that the owner of the box has cancelled.
    pub cancelled: Counter,
    /// Bytes of payload in attempts that had a connection.
    pub sent_bytes: Counter,
    /// Bytes of the answers' bodies that were read.
    pub received_bytes: Counter,
    /// How long attempts took.
    pub attempt_duration: Histogram<{ ATTEMPT.len() }>,
    /// The service's running time between acceptance and final answer of an export.
    pub delivery_delay: Histogram<{ DELAY.len() }>,
    /// How long commits of submissions and results took.
    pub commit_duration: Histogram<{ COMMIT.len() }>,
    /// The last delivery of this run, in Unix milliseconds; 0 if there was none.
    last_delivery: Found,
    /// Bytes of exports and results in the store, as they count against `store_limit`.
    pub store_bytes: Found,
    /// How many there may be: `--max-store`.
    pub store_limit: Found,
    /// Bytes of the ledger, about.
    pub ledger_bytes: Found,
    /// How many there may be: `--ledger-size`.
    pub ledger_limit: Found,
    /// Rows that were ever written to the ledger.
    pub ledger_rows: Found,
    /// Attempts under way.
    pub attempts_in_flight: Level,
    /// Connections of apps.
    pub connections: Level,
    /// Those of them that have a request which is being served.
    pub connections_served: Level,
    /// Log lines that were dropped because nobody read them in time.
    pub log_lines_lost: Counter,
}

/// What is true at the moment when the text is made.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Exports without a result.
    pub pending: usize,
    /// Bytes of their payloads. None if that is unknown.
    pub pending_bytes: Option<u64>,
    /// Queues with exports, by state.
    pub queues: QueueStates,
    /// When the oldest export without a result was accepted, in Unix milliseconds.
    pub oldest_pending: Option<Millis>,
    /// Requests that wait for an export to be finished.
    pub long_polls: usize,
    /// Free bytes on the disk of the data folder. None if there is no data folder.
    pub disk_free: Option<u64>,
    /// When the certificate ends, in Unix seconds. None without TLS.
    pub certificate_expiry: Option<i64>,
    /// Whether there is a key to check tokens with.
    pub secret_ready: bool,
    /// Whether the owner has paused all sending.
    pub paused: bool,
}

/// How many queues are in which state.
#[derive(Debug, Default)]
pub struct QueueStates {
    /// One of their exports is being sent.
    pub sending: usize,
    /// They wait for their turn.
    pub waiting: usize,
    /// Their last attempt failed.
    pub failing: usize,
    /// Their owner has paused them.
    pub paused: usize,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            accepted: Counter::default(),
            accepted_bytes: Counter::default(),
            refused: Family::new(REASONS),
            refusals: Refusals::default(),
            attempts: Family::new(OUTCOMES),
            answers: Family::new(CLASSES),
            delivered: Counter::default(),
            failed: Counter::default(),
            given_up: Counter::default(),
            cancelled: Counter::default(),
            sent_bytes: Counter::default(),
            received_bytes: Counter::default(),
            attempt_duration: Histogram::new(ATTEMPT),
            delivery_delay: Histogram::new(DELAY),
            commit_duration: Histogram::new(COMMIT),
            last_delivery: Found::default(),
            store_bytes: Found::default(),
            store_limit: Found::default(),
            ledger_bytes: Found::default(),
            ledger_limit: Found::default(),
            ledger_rows: Found::default(),
            attempts_in_flight: Level::default(),
            connections: Level::default(),
            connections_served: Level::default(),
            log_lines_lost: Counter::default(),
        }
    }
}

impl Metrics {
    /// Counts a request of this client that was refused with this code.
    pub fn refuse(&self, client: IpAddr, code: &'static str) {
        self.refused.count(code);
        self.refusals.count(client, code);
    }

    /// Counts an answer of a destination, final or not.
    pub fn answer(&self, status: u16) {
        let class = usize::from(status / 100).checked_sub(2);
        let class = class.and_then(|class| CLASSES.get(class));
        self.answers.count(class.unwrap_or(&OTHER));
    }

    /// Counts an export that was finished by an answer, `now` in Unix milliseconds, and this long after it
    /// was accepted.
    pub fn delivery(&self, now: Millis, delay: Millis) {
        self.delivered.one();
        self.delivery_delay
            .observe(Duration::from_millis(delay.max(0).unsigned_abs()));
        self.last_delivery.set(now.max(0).unsigned_abs());
    }

    /// All metrics as text of [`CONTENT_TYPE`], with those of the process itself. Blocks for a moment to read
    /// `/proc`.
    pub fn render(&self, gauges: &Gauges) -> String {
        let mut text = Text::new("export_service_");
        self.render_counts(&mut text);
        self.render_state(gauges, &mut text);
        process::render(text.followed_by("process_"))
    }

    /// What has happened since the start.
    fn render_counts(&self, text: &mut Text) {
        text.counter("accepted_total: Submissions accepted as new exports.")
            .value(self.accepted.value());
        text.counter("accepted_bytes_total: Bytes of the payloads of accepted exports.")
            .value(self.accepted_bytes.value());
        text.counter("refused_total: Requests of apps answered with an error, by its code.")
            .family("reason", &self.refused);
        text.counter("attempts_total: Attempts at delivery: answered, or why they failed.")
            .family("outcome", &self.attempts);
        text.counter("answers_total: Answers of destinations, by the hundreds of their status.")
            .family("status", &self.answers);
        text.counter(
            "finished_total: Exports finished: answered with any status, failed for good, tried for \
             long enough, or cancelled by the owner.",
        )
        .sample("result", "delivered", self.delivered.value())
        .sample("result", "failed", self.failed.value())
        .sample("result", "given_up", self.given_up.value())
        .sample("result", "cancelled", self.cancelled.value());
        text.counter("sent_bytes_total: Bytes of payload in attempts that had a connection.")
            .value(self.sent_bytes.value());
        text.counter("received_bytes_total: Bytes read of the bodies of answers.")
            .value(self.received_bytes.value());
        text.histogram("attempt_duration_seconds: How long attempts took.")
            .buckets(&self.attempt_duration);
        text.histogram(
            "delivery_delay_seconds: Time from acceptance to the final answer, without time in which \
             the service did not run.",
        )
        .buckets(&self.delivery_delay);
        text.histogram("commit_duration_seconds: How long commits of exports and results took.")
            .buckets(&self.commit_duration);
        text.counter("log_lines_lost_total: Log lines dropped as nobody read them in time.")
            .value(self.log_lines_lost.value());
    }

    /// What is true now.
    fn render_state(&self, gauges: &Gauges, text: &mut Text) {
        let (number, commit) = (version::NUMBER, version::COMMIT);
        text.gauge("build_info: Always 1; the labels say which program this is.")
            .line(
                "",
                &format!("{{version=\"{number}\",commit=\"{commit}\"}}"),
                1.0,
            );
        text.gauge("pending: Exports without a result.")
            .value(gauges.pending as f64);
        if let Some(bytes) = gauges.pending_bytes {
            text.gauge("pending_bytes: Bytes of the payloads of exports without a result.")
                .value(bytes as f64);
        }
        let queues = &gauges.queues;
        text.gauge("queues: Queues with exports, by what they are doing.")
            .sample("state", "sending", queues.sending as f64)
            .sample("state", "waiting", queues.waiting as f64)
            .sample("state", "failing", queues.failing as f64)
            .sample("state", "paused", queues.paused as f64);
        text.gauge(
            "oldest_pending_timestamp_seconds: When the oldest export without a result was accepted; \
             0 if there is none.",
        )
        .value(gauges.oldest_pending.unwrap_or(0) as f64 / 1e3);
        text.gauge(
            "last_delivery_timestamp_seconds: When an export was last delivered; 0 if none was since \
             the start.",
        )
        .value(self.last_delivery.value() / 1e3);
        text.gauge("attempts_in_flight: Attempts under way.")
            .value(self.attempts_in_flight.value());
        text.gauge("long_polls: Requests that wait for an export to be finished.")
            .value(gauges.long_polls as f64);
        let served = self.connections_served.value();
        let waiting = self.connections.value() - served;
        text.gauge(
            "connections: Connections of apps: with a request being served, or waiting for one.",
        )
        .sample("state", "served", served)
        // Two atomics, read one after the other.
        .sample("state", "waiting", waiting.max(0.0));
        text.gauge("store_bytes: Bytes in the store: exports with their results, and the ledger.")
            .sample("kind", "exports", self.store_bytes.value())
            .sample("kind", "ledger", self.ledger_bytes.value());
        text.gauge("store_limit_bytes: How many there may be: --max-store and --ledger-size.")
            .sample("kind", "exports", self.store_limit.value())
            .sample("kind", "ledger", self.ledger_limit.value());
        text.gauge(
            "disk_free_bytes: Free bytes on the disk of the data folder; absent without one.",
        );
        if let Some(free) = gauges.disk_free {
            text.value(free as f64);
        }
        text.gauge(
            "certificate_expiry_timestamp_seconds: When the certificate of HTTPS ends; 0 without HTTPS.",
        )
        .value(gauges.certificate_expiry.unwrap_or(0) as f64);
        text.gauge("secret_ready: 1 if there is a secret to check tokens with, else 0.")
            .value(u8::from(gauges.secret_ready).into());
        text.gauge("paused: 1 if the owner has paused all sending, else 0.")
            .value(u8::from(gauges.paused).into());
        text.counter("ledger_rows_total: Rows ever written to the ledger.")
            .value(self.ledger_rows.value());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;
    use std::thread;

    /// The value of a sample, written as Prometheus writes it.
    fn value(text: &str, sample: &str) -> f64 {
        let mut lines = text.lines();
        let found = lines.find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        found
            .unwrap_or_else(|| panic!("no {sample} in {text}"))
            .parse()
            .unwrap()
    }

    #[test]
    fn everything_that_is_counted_is_there_from_the_start_and_zero() {
        let text = Metrics::default().render(&Gauges::default());
        for sample in [
            "accepted_total",
            "accepted_bytes_total",
            "refused_total{reason=\"unauthorized\"}",
            "attempts_total{outcome=\"answered\"}",
            "attempts_total{outcome=\"tls\"}",
            "answers_total{status=\"5xx\"}",
            "finished_total{result=\"delivered\"}",
            "finished_total{result=\"cancelled\"}",
            "sent_bytes_total",
            "received_bytes_total",
            "attempt_duration_seconds_bucket{le=\"0.005\"}",
            "attempt_duration_seconds_bucket{le=\"30\"}",
            "attempt_duration_seconds_bucket{le=\"+Inf\"}",
            "delivery_delay_seconds_sum",
            "commit_duration_seconds_count",
            "pending",
            "queues{state=\"failing\"}",
            "oldest_pending_timestamp_seconds",
            "last_delivery_timestamp_seconds",
            "attempts_in_flight",
            "long_polls",
            "connections{state=\"waiting\"}",
            "store_bytes{kind=\"exports\"}",
            "store_limit_bytes{kind=\"ledger\"}",
            "certificate_expiry_timestamp_seconds",
            "secret_ready",
            "paused",
            "ledger_rows_total",
            "log_lines_lost_total",
        ] {
            assert_eq!(value(&text, &format!("export_service_{sample}")), 0.0);
        }
        assert!(!text.contains("\nexport_service_disk_free_bytes "));
        let build = format!(
            "export_service_build_info{{version=\"{}\",commit=\"{}\"}}",
            version::NUMBER,
            version::COMMIT
        );
        assert_eq!(value(&text, &build), 1.0);
    }

    #[test]
    fn each_series_is_there_once_below_its_help_and_type() {
        let metrics = Metrics::default();
        let disk_free = Some(7);
        let text = metrics.render(&Gauges {
            disk_free,
            ..Gauges::default()
        });
        let (mut seen, mut name) = (HashSet::new(), "");
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                name = help.split_once(' ').unwrap().0;
                assert!(seen.insert(name), "{line}");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                assert_eq!(kind.split_once(' ').unwrap().0, name);
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                assert!(seen.insert(series) || series == name, "{line}");
                assert!(series.starts_with(name), "{line}");
                value.parse::<f64>().unwrap();
            }
        }
        assert_eq!(value(&text, "export_service_disk_free_bytes"), 7.0);
    }

    #[test]
    fn the_process_is_described_as_other_programs_are() {
        let text = Metrics::default().render(&Gauges::default());
        for (name, least) in [
            ("process_cpu_seconds_total", 0.0),
            ("process_resident_memory_bytes", 1e6),
            ("process_virtual_memory_bytes", 1e6),
            ("process_open_fds", 3.0),
            ("process_max_fds", 3.0),
            ("process_start_time_seconds", 1e9),
            ("process_threads", 1.0),
        ] {
            let value = value(&text, name);
            assert!(value >= least, "{name} {value}");
        }
    }

    #[test]
    fn every_error_code_and_every_kind_of_failure_has_a_series_of_its_own() {
        // Read from the source: a list here would not know of a new one.
        let answer = include_str!("../answer.rs");
        let codes = answer.split("=> (").skip(1).filter_map(|rest| {
            let (status, rest) = rest.split_once(", \"")?;
            status.parse::<u16>().ok()?;
            rest.split_once('"').map(|(code, _)| code)
        });
        assert_eq!(codes.collect::<HashSet<_>>(), known(&REASONS));
        let attempt = include_str!("../delivery/attempt.rs");
        let (_, names) = attempt.split_once("fn name(self)").unwrap();
        let (names, _) = names.split_once("    }\n").unwrap();
        let names = names.split('"').skip(1).step_by(2);
        let more = ["answered", "status"];
        assert_eq!(names.chain(more).collect::<HashSet<_>>(), known(&OUTCOMES));
    }

    /// The names of a family but for the last.
    fn known(names: &[&'static str]) -> HashSet<&'static str> {
        names[..names.len() - 1].iter().copied().collect()
    }

    #[test]
    fn what_has_no_series_of_its_own_is_counted_nevertheless() {
        let metrics = Metrics::default();
        metrics.refused.count("\"}\n evil 1");
        for status in [100, 200, 204, 301, 404, 599, 600, 999, 0, u16::MAX] {
            metrics.answer(status);
        }
        let text = metrics.render(&Gauges::default());
        assert_eq!(
            value(&text, "export_service_refused_total{reason=\"other\"}"),
            1.0
        );
        assert!(!text.contains("evil"));
        let classes = CLASSES.map(|class| {
            value(
                &text,
                &format!("export_service_answers_total{{status=\"{class}\"}}"),
            )
        });
        assert_eq!(classes, [2.0, 1.0, 1.0, 1.0, 5.0]);
    }

    #[test]
    fn times_are_in_seconds_and_sizes_exact() {
        let metrics = Metrics::default();
        metrics.delivery(1_795_000_000_125, 2_500);
        metrics.delivery(1_795_000_000_250, -1);
        let text = metrics.render(&Gauges {
            pending_bytes: Some(9_007_199_254_740_991),
            oldest_pending: Some(1_795_000_000_001),
            certificate_expiry: Some(1_800_000_000),
            ..Gauges::default()
        });
        for (sample, written) in [
            ("pending_bytes", "9007199254740991"),
            ("oldest_pending_timestamp_seconds", "1795000000.001"),
            ("last_delivery_timestamp_seconds", "1795000000.25"),
            ("certificate_expiry_timestamp_seconds", "1800000000"),
            ("delivery_delay_seconds_sum", "2.5"),
            ("delivery_delay_seconds_bucket{le=\"0.01\"}", "1"),
            ("delivery_delay_seconds_bucket{le=\"1\"}", "1"),
            ("delivery_delay_seconds_bucket{le=\"10\"}", "2"),
            ("finished_total{result=\"delivered\"}", "2"),
        ] {
            let line = format!("\nexport_service_{sample} {written}\n");
            assert!(text.contains(&line), "{line} in {text}");
        }
    }

    #[test]
    fn a_level_falls_again_when_what_it_counts_ends() {
        let level = Level::default();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| drop(level.enter())));
            }
        });
        let _one = level.enter();
        assert_eq!(level.value(), 1.0);
    }

    proptest! {
        /// As Prometheus reads them: a bucket holds all durations up to its bound.
        #[test]
        fn buckets_hold_what_is_not_longer_than_their_bound(
            micros in proptest::collection::vec(0..40_000_000_u64, 0..50)
        ) {
            let metrics = Metrics::default();
            for micros in &micros {
                metrics.attempt_duration.observe(Duration::from_micros(*micros));
            }
            let text = metrics.render(&Gauges::default());
            let name = "export_service_attempt_duration_seconds";
            for bound in ATTEMPT {
                let seconds = bound as f64 / 1e6;
                let found = value(&text, &format!("{name}_bucket{{le=\"{seconds}\"}}"));
                let held = micros.iter().filter(|micros| **micros <= bound).count();
                prop_assert_eq!(found, held as f64);
            }
            let all = micros.len() as f64;
            prop_assert_eq!(value(&text, &format!("{name}_bucket{{le=\"+Inf\"}}")), all);
            prop_assert_eq!(value(&text, &format!("{name}_count")), all);
            let sum = micros.iter().sum::<u64>() as f64 / 1e6;
            prop_assert_eq!(value(&text, &format!("{name}_sum")), sum);
        }
    }
}
