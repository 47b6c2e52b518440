//! What the metrics say to Prometheus, and README's alerts.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use export_service::metrics::{CONTENT_TYPE, Gauges, Metrics};
use serde_json::{Value, json};
use support::{
    Destination, PATIENCE, Reaction, Response, Service, command, nowhere, ok, payload, root, token,
};
use tempfile::TempDir;

/// Where README's configuration has the token.
const CREDENTIALS: &str = "/etc/prometheus/export-service.token";

/// The metrics of a service, from the socket in its data folder.
fn scrape(service: &Service) -> Response {
    let mut stream = UnixStream::connect(service.folder().join("owner.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    Response::next(&mut BufReader::new(stream))
}

/// Their values, without those of the process.
fn values(service: &Service) -> BTreeMap<String, f64> {
    let body = scrape(service).body;
    let samples = body
        .lines()
        .filter_map(|line| line.strip_prefix("export_service_"));
    samples
        .map(|sample| {
            let (name, value) = sample.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// A new export.
fn request(url: &str, data: &str) -> Value {
    json!({ "uri": url, "data": data })
}

/// Asserts what these metrics are.
fn are(values: &BTreeMap<String, f64>, expected: &[(&str, f64)]) {
    for (name, value) in expected {
        assert_eq!(values.get(*name), Some(value), "{name} in {values:#?}");
    }
}

/// Scrapes until these metrics are as expected.
fn become_so(service: &Service, expected: &[(&str, f64)]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let values = values(service);
        let mut all = expected.iter();
        if all.all(|(name, value)| values.get(*name) == Some(value)) {
            return;
        }
        assert!(Instant::now() < deadline, "{expected:?} {values:#?}");
        thread::yield_now();
    }
}

/// A program of Prometheus: the one that `scripts/test` has unpacked, or else an installed one.
fn of_prometheus(name: &str) -> Command {
    let unpacked = root().join("target/prometheus/usr/bin").join(name);
    Command::new(if unpacked.exists() {
        unpacked
    } else {
        PathBuf::from(name)
    })
}

/// Everything that it printed, if it succeeded.
fn printed(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

/// What promtool says of these metrics: nothing, if they are as they should be.
fn complaints(metrics: &str) -> String {
    let mut promtool = of_prometheus("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(metrics.as_bytes()).unwrap();
    drop(input);
    printed(&promtool.wait_with_output().unwrap())
}

/// The blocks of YAML in README's section on metrics: the configuration of Prometheus, and its rules.
fn blocks() -> [String; 2] {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let section = readme.split_once("\n## Metrics\n").unwrap().1;
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```yaml\n").skip(1);
    let blocks: Vec<_> = blocks
        .map(|block| block.split_once("```").unwrap().0.to_owned())
        .collect();
    blocks.try_into().unwrap()
}

/// Runs promtool in this folder.
fn promtool(folder: &Path, arguments: &[&str]) -> String {
    let output = of_prometheus("promtool")
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    printed(&output)
}

#[test]
fn promtool_has_nothing_to_say_against_the_metrics() {
    let gauges = Gauges {
        disk_free: Some(1),
        ..Gauges::default()
    };
    let text = Metrics::default().render(&gauges);
    assert_eq!(complaints(&text), "");
}

#[test]
fn the_configuration_and_the_five_alerts_of_readme_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    let [configuration, rules] = blocks();
    let token = folder.path().join("token");
    fs::write(&token, "token").unwrap();
    assert!(configuration.contains(CREDENTIALS));
    let configuration = configuration.replace(CREDENTIALS, token.to_str().unwrap());
    fs::write(folder.path().join("prometheus.yml"), configuration).unwrap();
    fs::write(folder.path().join("rules.yml"), &rules).unwrap();
    let said = promtool(folder.path(), &["check", "config", "prometheus.yml"]);
    assert!(said.contains("5 rules found"), "{said}");

    let text = Metrics::default().render(&Gauges::default());
    let named = rules.split("export_service_").skip(1).map(|rest| {
        let name: String = rest
            .chars()
            .take_while(|sign| sign.is_ascii_lowercase() || *sign == '_')
            .collect();
        format!("# TYPE export_service_{name} ")
    });
    for metric in named {
        assert!(text.contains(&metric), "{metric}");
    }
}

#[test]
fn the_alerts_are_raised_when_they_should_be_and_not_by_a_fresh_or_paused_service() {
    let folder = tempfile::tempdir().unwrap();
    let [_, rules] = blocks();
    fs::write(folder.path().join("rules.yml"), rules).unwrap();
    let cases = root().join("tests/metrics/alerts.yml");
    fs::copy(cases, folder.path().join("alerts.yml")).unwrap();
    let said = promtool(folder.path(), &["test", "rules", "alerts.yml"]);
    assert!(said.contains("SUCCESS"), "{said}");
}

#[test]
fn exports_are_counted_with_their_bytes_answers_and_times() {
    let destination = Destination::start(|arrival| match arrival.text() {
        "[1]" => Reaction::Answer(500, b"no".to_vec()),
        _ => ok(),
    });
    let service = Service::start(&[]);
    let url = &destination.url;
    let fresh = values(&service);
    // These are true of a fresh service too.
    let present = [
        "build_info",
        "secret_ready",
        "disk_free_bytes",
        "store_",
        "ledger_",
        "commit_",
    ];
    for (name, value) in &fresh {
        let is_present = present.iter().any(|start| name.starts_with(start));
        assert!(is_present || *value == 0.0, "{name} {value}");
    }

    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    for data in ["[1]", "[2]", "{\"three\":3}"] {
        let body = request(url, data);
        let response = service.post("/lp/export?timeout=60", &token(url), &body);
        assert_eq!(response.json()["state"], "Finished");
    }
    let values = values(&service);
    are(
        &values,
        &[
            ("accepted_total", 3.0),
            ("accepted_bytes_total", 17.0),
            ("attempts_total{outcome=\"answered\"}", 3.0),
            ("answers_total{status=\"2xx\"}", 2.0),
            ("answers_total{status=\"5xx\"}", 1.0),
            ("finished_total{result=\"delivered\"}", 3.0),
            ("finished_total{result=\"failed\"}", 0.0),
            ("sent_bytes_total", 17.0),
            ("received_bytes_total", 6.0),
            ("attempt_duration_seconds_count", 3.0),
            ("attempt_duration_seconds_bucket{le=\"+Inf\"}", 3.0),
            ("delivery_delay_seconds_count", 3.0),
            ("attempts_in_flight", 0.0),
            ("pending", 0.0),
        ],
    );
    assert!(values["attempt_duration_seconds_sum"] > 0.0);
    // Each submission is one commit, and so is each result that somebody waits for.
    assert!(values["commit_duration_seconds_count"] >= 6.0);
    assert!(values["commit_duration_seconds_sum"] > 0.0);
    assert!(values["last_delivery_timestamp_seconds"] > began.as_secs_f64() - 1.0);
}

#[test]
fn a_repeated_submission_is_not_another_export() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let body = request(url, "[1]").to_string();
    for _ in 0..2 {
        let headers = [("X-Api-Key", &token(url)[..]), ("Idempotency-Key", "once")];
        let response = service.request("POST", "/lp/export", &headers, body.as_bytes());
        assert_eq!(response.status, 200);
    }
    let other = request(url, "[2]").to_string();
    let headers = [("X-Api-Key", &token(url)[..]), ("Idempotency-Key", "once")];
    let response = service.request("POST", "/export", &headers, other.as_bytes());
    assert_eq!(response.status, 409);
    are(
        &values(&service),
        &[
            ("accepted_total", 1.0),
            ("refused_total{reason=\"idempotency_conflict\"}", 1.0),
            ("finished_total{result=\"delivered\"}", 1.0),
        ],
    );
}

#[test]
fn failed_attempts_are_counted_by_kind_and_exports_by_how_they_ended() {
    let busy = Destination::start(|_| Reaction::Answer(503, Vec::new()));
    let closing = Destination::start(|_| Reaction::Raw(Vec::new()));
    let (dead, _) = nowhere();
    let service = Service::start(&["--retry-on", "503", "--give-up-after", "1s"]);
    let submit = |url: &str| {
        let body = request(url, "[1]");
        let response = service.post("/export", &token(url), &body);
        assert_eq!(response.status, 200, "{}", response.body);
    };
    for url in [&busy.url, &closing.url, &dead, "http://192.0.2.1/"] {
        submit(url);
    }
    become_so(
        &service,
        &[
            ("finished_total{result=\"given_up\"}", 3.0),
            ("finished_total{result=\"failed\"}", 1.0),
            ("pending", 0.0),
        ],
    );
    let values = values(&service);
    are(
        &values,
        &[
            ("accepted_total", 4.0),
            ("finished_total{result=\"delivered\"}", 0.0),
            ("attempts_total{outcome=\"answered\"}", 0.0),
            ("attempts_total{outcome=\"forbidden_address\"}", 1.0),
            ("last_delivery_timestamp_seconds", 0.0),
            ("delivery_delay_seconds_count", 0.0),
        ],
    );
    let of = |outcome: &str| values[&format!("attempts_total{{outcome=\"{outcome}\"}}")];
    let (status, closed, connect) = (of("status"), of("closed"), of("connect"));
    assert!(
        status >= 1.0 && closed >= 1.0 && connect >= 1.0,
        "{values:#?}"
    );
    assert_eq!(values["answers_total{status=\"5xx\"}"], status);
    let all = status + closed + connect + 1.0;
    assert_eq!(values["attempt_duration_seconds_count"], all);
    // Nothing was sent to an address that did not listen, or was forbidden.
    assert_eq!(values["sent_bytes_total"], 3.0 * (status + closed));
}

#[test]
fn refused_requests_are_counted_by_the_code_of_their_answer_wherever_they_are_refused() {
    let service = Service::start(&["--max-body", "1024"]);
    let url = "http://127.0.0.1:9/";
    let body = request(url, "[1]");
    let codes = [
        service.post("/export", "wrong", &body).code(),
        service.request("GET", "/nothing", &[], b"").code(),
        service.request("PUT", "/export", &[], b"").code(),
        service.post("/export", &token(url), &json!([1])).code(),
        service.post("/export", &token(url), &payload(1)).code(),
        service
            .post(
                "/export",
                &token(url),
                &json!({ "uri": url, "data": "x".repeat(2000) }),
            )
            .code(),
        service
            .request("POST", "/export", &[("Expect", "cake")], b"")
            .code(),
        service
            .post("/export", &token(url), &json!({ "id": "none", "uri": url }))
            .code(),
    ];
    let mut expected = BTreeMap::new();
    for code in &codes {
        let name = format!("refused_total{{reason=\"{code}\"}}");
        *expected.entry(name).or_insert(0.0) += 1.0;
    }
    assert!(expected.len() >= 7, "{expected:?}");
    let values = values(&service);
    for (name, value) in &values {
        if name.starts_with("refused_total") {
            assert_eq!(*value, expected.remove(name).unwrap_or(0.0), "{name}");
        }
    }
    assert!(expected.is_empty(), "{expected:?}");
    are(&values, &[("accepted_total", 0.0)]);
}

#[test]
fn attempts_long_polls_and_connections_are_counted_while_they_last() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let url = &destination.url;
    let body = request(url, "[1]");
    thread::scope(|scope| {
        let polling = scope.spawn(|| {
            service
                .post("/lp/export?timeout=60", &token(url), &body)
                .json()
        });
        destination.arrival();
        become_so(
            &service,
            &[
                ("attempts_in_flight", 1.0),
                ("long_polls", 1.0),
                ("connections{state=\"served\"}", 1.0),
                ("connections{state=\"waiting\"}", 0.0),
                ("pending", 1.0),
            ],
        );
        gate.open();
        assert_eq!(polling.join().unwrap()["state"], "Finished");
    });
    let idle = TcpStream::connect(service.address).unwrap();
    become_so(
        &service,
        &[
            ("attempts_in_flight", 0.0),
            ("long_polls", 0.0),
            ("connections{state=\"served\"}", 0.0),
            ("connections{state=\"waiting\"}", 1.0),
            ("pending", 0.0),
        ],
    );
    drop(idle);
    become_so(&service, &[("connections{state=\"waiting\"}", 0.0)]);
}

#[test]
fn nothing_that_an_app_sends_becomes_a_series() {
    let evil = "\"}\\n export_service_evil 1";
    let destination = Destination::start(|_| {
        Reaction::Raw(b"HTTP/1.1 299 evil\r\nContent-Length: 4\r\n\r\nevil".to_vec())
    });
    let service = Service::start(&[]);
    let names = || values(&service).into_keys().collect::<Vec<_>>();
    let before = names();
    let url = format!("{}?evil=1", destination.url);
    let token = support::token_of(evil, &url);
    let body = json!({ "uri": url, "data": json!([evil]).to_string() });
    let response = service.post("/lp/export?timeout=60", &token, &body);
    assert_eq!(response.json()["state"], "Finished", "{}", response.body);
    service.request("EVIL", "/evil", &[("X-Api-Key", evil)], evil.as_bytes());
    service.post("/export", evil, &json!({ "uri": evil, "id": evil }));
    assert_eq!(names(), before);
    let page = scrape(&service);
    assert_eq!(page.header("content-type"), Some(CONTENT_TYPE));
    assert!(!page.body.contains("evil"));
    assert_eq!(complaints(&page.body), "");
}

/// A Prometheus that scrapes with README's configuration, every second.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    _folder: TempDir,
}

impl Prometheus {
    /// It scrapes this address with this token.
    fn start(target: SocketAddr, token: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [configuration, rules] = blocks();
        let file = |name: &str| folder.path().join(name);
        fs::write(file("token"), token).unwrap();
        fs::write(file("rules.yml"), rules).unwrap();
        let configuration = configuration
            .replace(CREDENTIALS, file("token").to_str().unwrap())
            .replace("127.0.0.1:8081", &target.to_string());
        let global = "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n";
        fs::write(file("prometheus.yml"), global.to_owned() + &configuration).unwrap();
        let (_, address) = nowhere();
        let child = of_prometheus("prometheus")
            .arg(format!(
                "--config.file={}",
                file("prometheus.yml").display()
            ))
            .arg(format!("--storage.tsdb.path={}", file("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            address,
            _folder: folder,
        }
    }

    /// Asks until the result of a query is not empty and `is_wanted`.
    fn query(&self, expression: &str, is_wanted: impl Fn(f64) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = Command::new("curl")
                .args(["--silent", "--max-time", "5", "--get", "--data-urlencode"])
                .arg(format!("query={expression}"))
                .arg(format!("http://{}/api/v1/query", self.address))
                .output()
                .unwrap();
            let answer: Value = serde_json::from_slice(&answer.stdout).unwrap_or_default();
            let value = answer["data"]["result"][0]["value"][1].as_str();
            if value.is_some_and(|value| is_wanted(value.parse().unwrap())) {
                return;
            }
            assert!(Instant::now() < deadline, "{expression}: {answer}");
            thread::yield_now();
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_prometheus_with_readmes_configuration_scrapes_the_owners_port_and_answers_queries() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&["--admin", "127.0.0.1:0"]);
    let listening = service.event("listening for the owner", |_| true);
    let address = listening["address"].as_str().unwrap().parse().unwrap();
    let link = command()
        .args(["link", "--metrics", "--data-dir"])
        .arg(service.folder())
        .output()
        .unwrap();
    let printed = String::from_utf8(link.stdout).unwrap();
    let prometheus = Prometheus::start(address, printed.lines().last().unwrap());
    prometheus.query("up", |up| up == 1.0);
    prometheus.query("export_service_accepted_total", |accepted| accepted == 0.0);
    let url = &destination.url;
    for number in 0..10 {
        let response = service.post(
            "/export",
            &token(url),
            &request(url, &format!("[{number}]")),
        );
        assert_eq!(response.status, 200);
    }
    prometheus.query(
        "increase(export_service_finished_total{result=\"delivered\"}[1m])",
        |delivered| delivered >= 9.0,
    );
    let delay = "histogram_quantile(0.9, rate(export_service_delivery_delay_seconds_bucket[1m]))";
    prometheus.query(delay, |seconds| seconds > 0.0);
    prometheus.query("export_service_secret_ready", |ready| ready == 1.0);
    prometheus.query("process_resident_memory_bytes", |bytes| bytes > 1e6);
    // No alert of README's stands.
    prometheus.query("count(ALERTS) or vector(0)", |alerts| alerts == 0.0);
}

#[test]
fn queues_their_oldest_export_and_the_store_are_shown_as_they_are() {
    let (held, gate) = Destination::held();
    let (dead, _) = nowhere();
    let service = Service::start(&["--max-store", "10000000", "--ledger-size", "2000000"]);
    let submit = |url: &str, data: &str| {
        let response = service.post("/export", &token(url), &request(url, data));
        assert_eq!(response.status, 200, "{}", response.body);
    };
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs_f64()
    };
    let before = now();
    submit(&dead, "[1]");
    let after = now();
    become_so(
        &service,
        &[
            ("queues{state=\"failing\"}", 1.0),
            ("queues{state=\"sending\"}", 0.0),
        ],
    );
    submit(&held.url, "[2]");
    submit(&held.url, "[3]");
    held.arrival();
    // The dead one's queue is tried again now and then.
    become_so(
        &service,
        &[
            ("pending", 3.0),
            ("queues{state=\"sending\"}", 1.0),
            ("queues{state=\"waiting\"}", 0.0),
            ("queues{state=\"paused\"}", 0.0),
            ("paused", 0.0),
            ("store_limit_bytes{kind=\"exports\"}", 1e7),
            ("store_limit_bytes{kind=\"ledger\"}", 2e6),
        ],
    );
    let shown = values(&service);
    let oldest = shown["oldest_pending_timestamp_seconds"];
    assert!(before - 0.1 <= oldest && oldest <= after + 0.1, "{oldest}");
    assert!(shown["store_bytes{kind=\"exports\"}"] > 0.0);
    assert!(shown["store_bytes{kind=\"ledger\"}"] > 0.0);
    gate.open();
    become_so(
        &service,
        &[
            ("pending", 1.0),
            ("queues{state=\"sending\"}", 0.0),
            ("queues{state=\"failing\"}", 1.0),
        ],
    );
    assert!(values(&service)["ledger_rows_total"] >= 3.0);
    // The dead one's is still the oldest, also after a restart.
    let service = service.kill_and_restart();
    let shown = values(&service);
    are(&shown, &[("pending", 1.0)]);
    assert_eq!(shown["oldest_pending_timestamp_seconds"], oldest);
}
