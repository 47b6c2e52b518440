//! Settings that catch mistakes: what is warned of, and what is refused with what to write instead.

mod support;

use std::net::TcpListener;
use std::process::Output;

use support::{Destination, Reaction, SECRET, Service, command, payload};

/// A secret that is long enough.
const LONG: &str = "0123456789abcdef";

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = command();
    command.args(arguments).envs(environment.iter().copied());
    command.output().unwrap()
}

/// What it writes to stderr.
fn errors(output: &Output) -> &str {
    str::from_utf8(&output.stderr).unwrap()
}

#[test]
fn variables_that_are_no_settings_are_named_once_with_what_may_be_meant_and_no_value() {
    let variables = [
        ("EXPORT_ALLOW_NETWORK", "10.0.0.0/8"),
        ("EXPORT_COFFEE", "MARK-payload"),
        ("EXPORT_SERVICE", "http://127.0.0.1:8080"),
        ("EXPORT_SERVICE_PORT_8080_TCP", "tcp://172.17.0.2:8080"),
    ];
    let named = "EXPORT_ALLOW_NETWORK (did you mean EXPORT_ALLOW_NETWORKS?), EXPORT_COFFEE";
    let service = Service::start_with_variables(&variables);
    let warned = service.event("unknown variables are ignored", |_| true);
    assert_eq!(
        (&warned["level"], &warned["setting"]),
        (&"warn".into(), &named.into())
    );
    assert_eq!(service.log().concat().matches("COFFEE").count(), 1);

    let warning = format!("export-service: warning: {named}: unknown variables are ignored\n");
    let secret = ("EXPORT_SECRET", LONG);
    let environment = [&variables[..], &[secret]].concat();
    let token = ["token", "--destination", "https://a.example/"];
    for arguments in [&token[..], &["serve", "--check", "--bind", "localhost"]] {
        let output = run(arguments, &environment);
        assert!(output.status.success());
        assert_eq!(errors(&output), warning, "{arguments:?}");
    }
    // It may be why a start is refused.
    let output = run(
        &["--secrets-dir", "/nonexistent"],
        &[("EXPORT_SECERT", "MARK-secret")],
    );
    assert_eq!(output.status.code(), Some(2));
    let (first, rest) = errors(&output).split_once('\n').unwrap();
    assert!(
        first.contains("EXPORT_SECERT (did you mean EXPORT_SECRET?)"),
        "{first}"
    );
    assert!(
        rest.starts_with("export-service: there is no macaroon secret"),
        "{rest}"
    );
    assert!(!rest.contains("MARK-secret"));
    // Healthchecks run every minute.
    let output = run(&["healthcheck", "--port", "1"], &variables);
    assert!(!errors(&output).contains("warning"), "{}", errors(&output));
}

#[test]
fn a_network_with_more_bits_than_its_mask_is_refused_with_both_readings() {
    for arguments in [&["--ephemeral"][..], &["check", "https://192.168.1.7/"]] {
        let variables = [
            ("EXPORT_SECRET", SECRET),
            ("EXPORT_ALLOW_NETWORKS", "10.0.0.0/8, 192.168.1.7/24"),
        ];
        let output = run(arguments, &variables);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(
            errors(&output),
            "export-service: --allow-network 192.168.1.7/24: give 192.168.1.0/24 for the whole network, or \
             192.168.1.7/32 for that address alone (set by EXPORT_ALLOW_NETWORKS)\n"
        );
    }
}

#[test]
fn what_may_not_be_meant_is_one_warning_each_at_the_start_and_of_the_check() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["--bind", "0.0.0.0", "--allow-network", "0.0.0.0/0"];
    let arguments = [
        &settings[..],
        &["--data-dir", folder.path().to_str().unwrap()],
    ]
    .concat();
    let service = Service::start_bare(&settings[..0]);
    service.event("starting", |_| true);
    let calm = service
        .log()
        .iter()
        .filter(|line| line.contains("warn"))
        .count();
    // The secret of the tests is a short one.
    assert_eq!(calm, 1, "{:#?}", service.log());
    service.event(
        "the secret is short enough to be guessed, and whoever does can mint tokens: make one with \
         `openssl rand -hex 32` (tokens minted before are void then)",
        |line| line["level"] == "warn" && line["setting"] == "--secret",
    );
    let checked = run(
        &[&["serve", "--check"], &arguments[..]].concat(),
        &[("EXPORT_SECRET", "short")],
    );
    assert_eq!(checked.status.code(), Some(0));
    let warnings: Vec<_> = errors(&checked).lines().collect();
    assert_eq!(warnings.len(), 3, "{warnings:#?}");
    for (warning, setting) in
        warnings
            .iter()
            .zip(["--bind 0.0.0.0", "--allow-network 0.0.0.0/0", "--secret"])
    {
        let begins = format!("export-service: warning: {setting}: ");
        assert!(warning.starts_with(&begins), "{warning}");
    }
}

#[test]
fn sizes_times_and_addresses_can_be_written_as_people_do() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let port = address.port().to_string();
    let variables = [
        ("EXPORT_SECRET", SECRET),
        ("EXPORT_BIND", "localhost"),
        ("DATABOX_LOCAL_PORT", &port),
        ("EXPORT_EPHEMERAL", "yes"),
        ("EXPORT_MAX_BODY", "64KiB"),
        ("EXPORT_MAX_STORE", "1M"),
        ("EXPORT_LEDGER_SIZE", "1 MB"),
        ("EXPORT_MAX_RESPONSE", "4096"),
        ("EXPORT_RETRY_ON", "429, 5xx"),
    ];
    // All settings are valid: the start gets as far as the port, which is in use.
    let output = run(&[], &variables);
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    let listening = format!("cannot listen on {address}:");
    assert!(errors(&output).contains(&listening), "{}", errors(&output));
}

#[test]
fn a_class_of_statuses_is_retried_as_each_of_them_would_be() {
    let statuses = std::sync::Mutex::new(vec![200, 404, 599, 507]);
    let destination = Destination::start(move |_| {
        let next = statuses.lock().unwrap().pop();
        Reaction::Answer(next.unwrap(), Vec::new())
    });
    let service = Service::start(&["--retry-on", "5xx"]);
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 404);
    assert_eq!(destination.arrivals().len(), 3);
}

#[test]
fn every_error_about_settings_begins_with_the_program_and_says_what_to_give() {
    for (arguments, message) in [
        (
            vec!["--retention", "soon"],
            "--retention soon: give a time with its unit, like 30s, 15m, 24h or 7d",
        ),
        (
            vec!["--max-store", "a lot"],
            "--max-store a lot: give bytes, as a whole number or like 64KiB or 1M",
        ),
        (
            vec!["--threads", "0"],
            "--threads is 0: it must be from 1 to 256",
        ),
        (
            vec!["--port", "http"],
            "--port http: give a port from 0 to 65535",
        ),
        (
            vec!["--log-format", "xml"],
            "--log-format xml: give text or json",
        ),
        (
            vec!["--ephemeral=maybe"],
            "unexpected value 'maybe' for '--ephemeral' found; no more were expected",
        ),
        (
            vec!["sink", "--status", "99"],
            "--status 99: give a status from 200 to 999",
        ),
        (vec!["tokn"], "unrecognized subcommand 'tokn'"),
    ] {
        let output = run(&arguments, &[("EXPORT_SECRET", SECRET)]);
        assert_eq!(output.status.code(), Some(2));
        let first = errors(&output).lines().next().unwrap();
        assert_eq!(first, format!("export-service: {message}"));
    }
}

#[test]
fn a_refused_setting_that_a_variable_gave_is_told_with_the_variable() {
    for (arguments, variable, message) in [
        (
            vec![],
            ("EXPORT_EPHEMERAL", "maybe"),
            "--ephemeral maybe: give true or false",
        ),
        (
            vec![],
            ("EXPORT_THREADS", "0"),
            "--threads is 0: it must be from 1 to 256",
        ),
        (
            vec![],
            ("DATABOX_LOCAL_PORT", ""),
            "--port is empty: give a port from 0 to 65535",
        ),
        (
            vec!["check", "https://a.example/"],
            ("EXPORT_ALLOW_NETWORKS", "home"),
            "--allow-network home: give a network like 192.168.1.0/24, several with commas",
        ),
    ] {
        let output = run(&arguments, &[("EXPORT_SECRET", SECRET), variable]);
        assert_eq!(output.status.code(), Some(2));
        let expected = format!("export-service: {message} (set by {})\n", variable.0);
        assert_eq!(errors(&output), expected);
    }
    let flag = ["--threads=0"];
    let output = run(&flag, &[("EXPORT_SECRET", SECRET), ("EXPORT_THREADS", "1")]);
    let expected = "export-service: --threads is 0: it must be from 1 to 256\n";
    assert_eq!(errors(&output), expected);
}

#[test]
fn the_start_tells_where_the_data_is_and_where_exports_may_go() {
    let service = Service::start_bare(&["--allow-network", "10.0.0.5, fd00::/8"]);
    let starting = service.event("starting", |_| true);
    let folder = service.folder().canonicalize().unwrap();
    assert_eq!(starting["data_dir"], folder.to_str().unwrap());
    assert_eq!(starting["allow_network"], "10.0.0.5/32,fd00::/8");
    let service = Service::start_bare(&["--ephemeral"]);
    let starting = service.event("starting", |_| true);
    assert_eq!(
        (&starting["data_dir"], &starting["allow_network"]),
        (&"none".into(), &"none".into())
    );
}
