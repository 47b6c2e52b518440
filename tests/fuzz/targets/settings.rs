//! Flags and their values: lists, durations, networks, the endpoint, the signing secret. Whatever is accepted
//! can be used, and whatever is refused is refused in one line that shows no secret.
//!
//! An input is a list of settings with a NUL between: a character for the flag, and its value.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::LazyLock;
use std::time::Instant;

use clap::Parser;
use export_service::arbiter::curve::Endpoint;
use export_service::config::{Cli, Config};
use tempfile::TempDir;

const FLAGS: [&str; 22] = [
    "allow-network",
    "retry-on",
    "retention",
    "give-up-after",
    "attempt-timeout",
    "signing-secret",
    "arbiter",
    "name",
    "bind",
    "port",
    "threads",
    "max-connections",
    "max-connections-per-peer",
    "max-body",
    "max-pending",
    "max-store",
    "max-concurrent-attempts",
    "max-relieved",
    "max-response",
    "log-format",
    "admin",
    "admin-host",
];
const SECRET: &str = "a-secret-that-must-not-be-shown";

/// Secrets as a Databox mounts them.
static SECRETS: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, content) in [
        ("ARBITER_TOKEN", SECRET),
        ("ZMQ_PUBLIC_KEY", "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"),
    ] {
        fs::write(folder.path().join(name), content).expect("a file");
    }
    folder
});

pub fn run(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    if text.contains(SECRET) {
        return;
    }
    let mut arguments = vec!["export-service".to_owned()];
    let folder = SECRETS.path().display();
    arguments.push(format!("--secrets-dir={folder}"));
    let mut signing_secret = None;
    for setting in text.split('\0') {
        let mut characters = setting.chars();
        let Some(flag) = characters.next() else {
            continue;
        };
        let (flag, value) = (FLAGS[flag as usize % FLAGS.len()], characters.as_str());
        arguments.push(format!("--{flag}={value}"));
        if flag == "signing-secret" && value.len() > 12 {
            signing_secret = Some(value);
        }
        if let Ok(endpoint) = value.parse::<Endpoint>() {
            assert_eq!(format!("tcp://{endpoint}").parse(), Ok(endpoint));
        }
    }
    // Without a secret the arbiter's endpoint is checked too.
    if !text.contains("tcp") {
        arguments.push(format!("--secret={SECRET}"));
    }
    let Ok(cli) = Cli::try_parse_from(arguments) else {
        return;
    };
    match cli.serve.check() {
        Ok(config) => {
            assert_is_usable(&config);
            assert_shows_nothing(&format!("{config:?}"), signing_secret);
        }
        Err(error) => {
            let error = error.to_string();
            assert!(!error.contains(|c: char| c.is_control()), "{error:?}");
            let quoted = signing_secret.filter(|_| text.matches("whsec_").count() == 1);
            assert_shows_nothing(&error, quoted);
        }
    }
}

fn assert_is_usable(config: &Config) {
    let statuses = &config.worker.retry_on;
    assert!(statuses.iter().all(|status| (300..600).contains(status)));
    // An attempt's end must be a time.
    let end = Instant::now().checked_add(config.attempts.timeout);
    assert!(end.is_some(), "{:?}", config.attempts.timeout);
    let rules = &config.attempts.rules;
    for address in [
        "10.0.0.1",
        "127.0.0.1",
        "0.0.0.0",
        "9.9.9.9",
        "::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "2620:fe::fe",
    ] {
        let ip: IpAddr = address.parse().expect("an address");
        let address = SocketAddr::new(ip, 1);
        let covered = rules
            .allowed
            .iter()
            .any(|net| net.contains(&ip) || net.contains(&ip.to_canonical()));
        // In plain text only into an allowed network.
        assert_eq!(rules.judge(address, false, |_| false).is_ok(), covered);
        assert!(!covered || rules.judge(address, true, |_| false).is_ok());
    }
}

fn assert_shows_nothing(shown: &str, signing_secret: Option<&str>) {
    assert!(!shown.contains(SECRET));
    assert!(signing_secret.is_none_or(|secret| !shown.contains(secret)));
}
