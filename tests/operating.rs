//! Running the service: settings, messages, logs, tools and scripts.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use clap::CommandFactory;
use export_service::config::Cli;
use support::{
    Destination, Identity, Reaction, SECRET, Service, command, ok, payload, root, token,
};

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
    let output = command()
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn without_a_secret_it_says_where_to_give_one_and_what_the_arbiter_would_need() {
    for environment in [vec![], vec![("EXPORT_SECRET", "")]] {
        let arguments = ["--ephemeral", "--secrets-dir", "/nonexistent"];
        let (code, message) = run(&arguments, &environment);
        assert_eq!(code, Some(2));
        for word in ["--secret", "EXPORT_SECRET"] {
            assert!(message.contains(word), "{message}");
        }
        let file = message.contains("/nonexistent/ARBITER_TOKEN");
        assert_eq!(
            file && message.contains("--secrets-dir"),
            environment.is_empty()
        );
    }
    let (code, message) = run(&["token", "--destination", "https://a.example/"], &[]);
    assert_eq!(code, Some(2));
    assert!(
        message.contains("there is no macaroon secret: give one"),
        "{message}"
    );
}

#[test]
fn a_token_that_nobody_could_use_is_not_minted() {
    let token = ["token", "--destination", "https://a.example/"];
    for (option, value, words) in [
        ("--path", "export", "begin it with a slash"),
        ("--expires", "0s", "give some time"),
    ] {
        let arguments = [&token[..], &[option, value]].concat();
        let (code, message) = run(&arguments, &[("EXPORT_SECRET", SECRET)]);
        assert_eq!(code, Some(2), "{message}");
        assert!(
            message.contains(option) && message.contains(words),
            "{message}"
        );
    }
}

#[test]
fn settings_that_cannot_work_are_refused_before_anything_starts() {
    for (arguments, environment, words) in [
        (
            vec!["--threads", "0"],
            vec![],
            ["--threads is 0", "1 to 256"],
        ),
        (
            vec![],
            vec![("EXPORT_RETENTION", "soon")],
            ["soon", "--retention"],
        ),
        (
            vec!["--retention", "0s"],
            vec![],
            ["--retention is 0", "1h"],
        ),
        (vec!["--port", "70000"], vec![], ["70000", "--port"]),
        (
            vec![],
            vec![("DATABOX_LOCAL_PORT", "http")],
            ["http", "--port"],
        ),
        (
            vec!["--allow-network", "home"],
            vec![],
            ["--allow-network home", "192.168.1.0/24"],
        ),
        (
            vec!["--retry-on", "503,200"],
            vec![],
            ["--retry-on 200", "300 to 599"],
        ),
        (
            vec!["--signing-secret", "x"],
            vec![],
            ["--signing-secret", "whsec_"],
        ),
        (
            vec!["--max-pending", "0"],
            vec![],
            ["--max-pending is 0", "from 1"],
        ),
        (
            vec!["--max-store", "1"],
            vec![],
            ["--max-store is 1", "at least"],
        ),
        (vec!["--no-such-flag"], vec![], ["--no-such-flag", "--help"]),
    ] {
        let secret = ("EXPORT_SECRET", SECRET);
        let (code, message) = run(&arguments, &[&environment[..], &[secret]].concat());
        assert_eq!(code, Some(2), "{message}");
        for word in words {
            assert!(message.contains(word), "{message}");
        }
        assert!(!message.contains(SECRET));
    }
}

#[test]
fn an_empty_variable_counts_as_not_set() {
    let empty = [
        "EXPORT_ALLOW_NETWORKS",
        "EXPORT_RETRY_ON",
        "EXPORT_CA_FILE",
        "EXPORT_SIGNING_SECRET",
    ];
    let environment: Vec<_> = empty.map(|name| (name, "")).into_iter().collect();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let arguments = [
        "--ephemeral",
        "--bind",
        "127.0.0.1",
        "--port",
        &port,
        "--secret",
        SECRET,
    ];
    // All settings are valid: the start gets as far as the port, which is in use.
    let (code, message) = run(&arguments, &environment);
    assert_eq!(code, Some(1), "{message}");
}

#[test]
fn blanks_and_line_ends_that_env_files_and_yaml_leave_in_variables_are_ignored() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let port = format!(" {} ", taken.local_addr().unwrap().port());
    let data = tempfile::tempdir().unwrap();
    let folder = format!("{}/data\n", data.path().display());
    let environment = [
        ("DATABOX_LOCAL_PORT", port.as_str()),
        ("EXPORT_BIND", "127.0.0.1\t"),
        ("DATABOX_LOCAL_NAME", "export-service\n"),
        ("EXPORT_SECRET", SECRET),
        ("EXPORT_DATA_DIR", &folder),
        ("EXPORT_ALLOW_NETWORKS", "192.168.1.7/32, 10.0.0.0/8,\n"),
        ("EXPORT_RETRY_ON", " 429 , 503 , "),
        ("EXPORT_RETENTION", "1h "),
        ("EXPORT_MAX_BODY", " 4096"),
        ("EXPORT_EPHEMERAL", " true\n"),
        ("EXPORT_LOG_FORMAT", "json "),
        ("EXPORT_TLS_PEM", " "),
        ("EXPORT_CA_FILE", " \n"),
    ];
    // All settings are valid: the start gets as far as the port, which is in use.
    let (code, message) = run(&[], &environment);
    assert_eq!(code, Some(1), "{message}");
    assert!(
        message.contains(&format!("cannot listen on {address}:")),
        "{message}"
    );
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let arguments = ["--ephemeral", "--bind", "127.0.0.1", "--port", &port];
    let (code, message) = run(&arguments, &[("EXPORT_SECRET", SECRET)]);
    assert_eq!(code, Some(1));
    assert!(
        message.contains(&port) && message.contains("choose another --port"),
        "{message}"
    );
}

#[test]
fn the_help_names_every_subcommand_and_never_the_secret() {
    for arguments in [
        vec!["--help"],
        vec!["serve", "--help"],
        vec!["token", "--help"],
    ] {
        let (code, help) = run(&arguments, &[("EXPORT_SECRET", SECRET)]);
        assert_eq!(code, Some(0));
        assert!(
            help.contains("EXPORT_SECRET") && !help.contains(SECRET),
            "{help}"
        );
    }
    let (_, help) = run(&["--help"], &[]);
    for name in ["serve", "token", "sink", "healthcheck"] {
        assert!(help.contains(name));
    }
}

#[test]
fn readme_has_every_setting_with_its_variable_and_default() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut command = Cli::command();
    command.build();
    let serve = command.find_subcommand("serve").unwrap();
    let rows: Vec<_> = serve
        .get_arguments()
        .filter_map(|argument| {
            let shown = |long: &&str| *long != "help" && !argument.is_hide_set();
            let long = argument.get_long().filter(shown)?;
            let flag = argument.get_short().map_or_else(
                || format!("`--{long}`"),
                |short| format!("`-{short}`, `--{long}`"),
            );
            let variable = argument
                .get_env()
                .map_or_else(String::new, |name| format!("`{}`", name.to_string_lossy()));
            let defaults = argument.get_default_values();
            let default = match defaults
                .first()
                .filter(|_| argument.get_action().takes_values())
            {
                Some(value) => format!("`{}`", value.to_string_lossy()),
                None => String::new(),
            };
            let help = argument.get_help().unwrap();
            Some(format!("| {flag} | {variable} | {default} | {help} |"))
        })
        .collect();
    assert!(rows.len() > 10);
    let missing: Vec<_> = rows
        .iter()
        .filter(|row| !readme.contains(row.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "README lacks or misstates {missing:#?}\nall: {}",
        rows.join("\n")
    );
}

#[test]
fn the_health_check_succeeds_only_if_the_service_runs() {
    let service = Service::start(&[]);
    let port = service.address.port().to_string();
    assert_eq!(
        run(&["healthcheck", "--port", &port], &[]),
        (Some(0), String::new())
    );
    assert_eq!(
        run(&["healthcheck"], &[("DATABOX_LOCAL_PORT", &port)]).0,
        Some(0)
    );
    drop(service);
    let (code, message) = run(&["healthcheck", "--port", &port], &[]);
    assert_eq!(code, Some(1));
    assert!(
        message.contains(&format!("http://127.0.0.1:{port}/status")),
        "{message}"
    );
}

#[test]
fn the_first_200_comes_soon_after_the_start() {
    let started = Instant::now();
    let service = Service::start(&[]);
    assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
    // Its own CPU time, which other work on the machine does not increase.
    let (took, worked) = (started.elapsed(), service.cpu_time());
    let (threads, resident) = (service.figure("Threads"), service.figure("VmRSS"));
    eprintln!(
        "start to first 200: {took:?}, {worked:?} of them work; idle: {threads} threads, \
         {resident} kB resident"
    );
    assert!(worked < Duration::from_millis(500), "{worked:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

#[test]
fn each_request_and_delivery_has_one_log_line_with_its_figures() {
    let destination = Destination::start(|_| Reaction::Answer(404, b"no".to_vec()));
    let service = Service::start(&[]);
    let url = format!("{}?key=MARK-payload", destination.url);
    let id = service.submit(&url, &payload(1));
    service.result(&url, &id);
    let accepted = service.event("accepted", |line| line["id"] == id.as_str());
    let origin = destination.url.strip_suffix("/in").unwrap();
    assert_eq!(
        accepted["destination"], origin,
        "the path and the query may be secrets"
    );
    assert_eq!(accepted["bytes"], payload(1).to_string().len());
    assert!(accepted["ms"].is_u64());
    let delivered = service.event("delivered", |line| line["id"] == id.as_str());
    assert_eq!(
        (&delivered["status"], &delivered["response_bytes"]),
        (&404.into(), &2.into())
    );

    let body = serde_json::json!({"uri": "https://a.example/", "data": payload(1)}).to_string();
    service.request(
        "POST",
        "/export?x=MARK-payload",
        &[("X-Api-Key", "MARK-payload")],
        body.as_bytes(),
    );
    let refused = service.event("refused", |_| true);
    assert_eq!(
        (&refused["status"], &refused["path"]),
        (&401.into(), &"/export".into())
    );
    assert!(
        refused["client"]
            .as_str()
            .unwrap()
            .starts_with("127.0.0.1:")
    );
}

#[test]
fn what_ends_without_an_answer_is_one_error_after_its_last_attempt() {
    let service = Service::start_bare(&[]);
    let url = "https://10.255.255.1/MARK-payload?key=MARK-payload";
    let id = service.submit(url, &payload(1));
    assert_eq!(service.result(url, &id)["status_code"], 403);
    let failed = service.event("failed", |line| line["id"] == id.as_str());
    assert_eq!(
        (&failed["level"], &failed["attempt"]),
        (&"warn".into(), &1.into())
    );
    let end = service.event("given up", |line| line["id"] == id.as_str());
    assert_eq!(
        (&end["level"], &end["attempts"]),
        (&"error".into(), &1.into())
    );
    assert_eq!(end["kind"], "forbidden_address");
    assert!(
        end["reason"].as_str().unwrap().contains("10.255.255.1"),
        "{end}"
    );
    let name = end["destination"].as_str().unwrap();
    assert!(
        name.starts_with("10.255.255.1 #"),
        "as the ledger shows it: {name}"
    );
}

#[test]
fn with_qq_nothing_is_logged_of_an_export_but_that_it_was_given_up() {
    let (url, address) = support::nowhere();
    let mut service = Service::start(&[]);
    let id = service.submit(&format!("{url}?key=MARK-payload"), &payload(1));
    service.reports(1);
    service.signal("KILL");
    service.ended();
    let mut child = command()
        .args(["-qq", "--log-format", "json", "--give-up-after", "100ms"])
        .args([
            "--port",
            "0",
            "--bind",
            "127.0.0.1",
            "--allow-network",
            "127.0.0.1",
        ])
        .arg("--data-dir")
        .arg(service.folder())
        .env("EXPORT_SECRET", SECRET)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    log.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&line["level"], &line["event"]),
        (&"error".into(), &"given up".into())
    );
    assert_eq!(
        (&line["id"], &line["kind"]),
        (&id.into(), &"connect".into())
    );
    assert!(line["attempts"].as_u64().unwrap() >= 1, "{line}");
    let reason = format!("connection refused by {address}: nothing listens there");
    assert_eq!(line["reason"], reason);
    let name = line["destination"].as_str().unwrap();
    assert!(name.starts_with(&format!("http://{address} #")), "{name}");
}

#[test]
fn a_log_that_nobody_reads_delays_no_submission_no_delivery_and_no_stop() {
    let destination = Destination::start(|_| ok());
    let (mut service, reading) = Service::start_with_unread_log(&[]);
    for number in 0..1000 {
        service.submit(&destination.url, &payload(number));
    }
    for _ in 0..1000 {
        destination.arrival();
    }
    service.signal("TERM");
    assert_eq!(service.exited().code(), Some(0));
    reading.open();
}

#[test]
fn an_error_message_that_nobody_reads_does_not_prevent_the_exit() {
    for argument in ["--threads=0", "--no-such-flag"] {
        // A pipe that is full already and whose reader has stalled.
        let script = format!(
            "head -c 65536 /dev/zero >&2; exec {} {argument}",
            support::program().display()
        );
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .env("EXPORT_SECRET", SECRET)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(support::exited(&mut child).code(), Some(2));
    }
}

#[test]
fn a_log_that_is_read_again_says_how_many_lines_were_lost_and_goes_on() {
    let destination = Destination::start(|_| ok());
    let (mut service, reading) = Service::start_with_unread_log(&[]);
    for number in 0..1000 {
        service.submit(&destination.url, &payload(number));
    }
    reading.open();
    let lost = service.event("log lines lost", |_| true);
    assert_eq!(lost["level"], "warn");
    assert!(lost["count"].as_u64().unwrap() > 0, "{lost}");

    let id = service.submit(&destination.url, &payload(1000));
    service.event("delivered", |line| line["id"] == id.as_str());
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
    let last = service.log().pop().unwrap();
    assert!(last.contains(r#""event":"stopped""#), "{last}");
}

#[test]
fn a_token_in_the_wrong_place_of_a_request_is_not_logged() {
    let service = Service::start(&[]);
    let token = token("https://a.example/");
    let plain = token.trim_end_matches('=');
    for (method, path) in [(plain, "/status".to_owned()), ("GET", format!("/{plain}"))] {
        service.request(method, &path, &[], b"");
    }
    service.events("refused", 2);
    let log = service.log().concat();
    assert!(!log.contains(&plain[..16]), "{log}");
}

/// The program's `sink`, killed when this is dropped.
struct Sink {
    child: Child,
    url: String,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Sink {
    fn start(arguments: &[&str]) -> Self {
        let mut child = command()
            .args(["sink", "--port", "0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        let url = line.strip_prefix("listening on ").unwrap().to_owned();
        Self { child, url, lines }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_sink_prints_what_arrives_and_answers_with_it() {
    let mut sink = Sink::start(&["--status", "202", "--delay", "10ms"]);
    let service = Service::start(&[]);
    let id = service.submit(&sink.url, &payload(1));
    let result = service.result(&sink.url, &id);
    assert_eq!(result["status"], "202 Accepted");
    assert_eq!(result["body"], payload(1).to_string());
    let line = sink.lines.next().unwrap().unwrap();
    assert_eq!(line, format!("POST / webhook-id={id} {}", payload(1)));
}

/// Runs `scripts/export` against a service.
fn export(service: &Service, token: &str, url: &str, data: &[u8]) -> Output {
    let at = format!("http://{}", service.address);
    export_at(&at, None, token, url, data)
}

fn export_at(at: &str, ca: Option<&Path>, token: &str, url: &str, data: &[u8]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    fs::write(&token_file, format!("{token}\n")).unwrap();
    let mut child = Command::new(root().join("scripts/export"))
        .arg("--token-file")
        .arg(&token_file)
        .arg(url)
        .env("EXPORT_SERVICE", at)
        .envs(ca.map(|ca| ("CURL_CA_BUNDLE", ca)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn the_shell_client_prints_the_answer_and_shows_success_by_its_exit_code() {
    let echo = Destination::start(|arrival| match arrival.text() {
        "[404]" => Reaction::Answer(404, b"not \"here\"\n".to_vec()),
        "[255]" => Reaction::Answer(200, vec![0xff, 0, 0xfe]),
        _ => Reaction::Answer(200, arrival.body.clone()),
    });
    let service = Service::start(&[]);
    let url = &echo.url;
    let token = token(url);
    let odd =
        "{ \"a\" : \"grün \\\\ \\\" \\n \\u0001 \\/\",\n\t\"state\":\"Pending\", \"n\": 1e400 }";
    for (data, code, printed) in [
        (odd.as_bytes(), 0, odd.as_bytes()),
        (b"[255]", 0, &[0xff, 0, 0xfe]),
        (b"[404]", 1, b"not \"here\"\n"),
    ] {
        let output = export(&service, &token, url, data);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{errors}");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(printed)
        );
        assert_eq!(errors.contains("404 Not Found"), code == 1);
    }
    assert_eq!(echo.arrivals().len(), 3);

    for (token, url, data, word) in [
        (token.as_str(), url.as_str(), "no JSON", "not valid JSON"),
        ("nonsense", url, "{}", "not a macaroon"),
        (
            &token,
            "https://elsewhere.example/",
            "{}",
            "`destination` caveat",
        ),
    ] {
        let output = export(&service, token, url, data.as_bytes());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains(word), "{errors}");
    }
}

#[test]
fn the_shell_client_says_at_once_that_a_certificate_is_not_trusted_and_what_to_do() {
    let identity = Identity::new("ec");
    let service = Service::start_secure(&identity, &[]);
    let echo = Destination::start(|_| ok());
    let at = format!("https://localhost:{}", service.address.port());
    let token = token(&echo.url);
    let output = export_at(&at, None, &token, &echo.url, b"{}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("CURL_CA_BUNDLE"), "{errors}");
    let output = export_at(&at, Some(&identity.ca()), &token, &echo.url, b"{}");
    assert_eq!(output.stdout, b"ok");
}

#[test]
fn the_shell_client_waits_longer_than_one_poll_and_reports_an_unreachable_destination() {
    let refusing = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", refusing.local_addr().unwrap());
    drop(refusing);
    let service = Service::start(&["--give-up-after", "200ms"]);
    let output = export(&service, &token(&url), &url, b"{}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(
        errors.contains("502 Bad Gateway connection refused"),
        "{errors}"
    );

    let slow = Destination::start(|_| {
        // Longer than one poll of the client, so it has to poll again.
        std::thread::sleep(std::time::Duration::from_secs(11));
        ok()
    });
    let output = export(&service, &token(&slow.url), &slow.url, b"{}");
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"ok"[..])
    );
}
