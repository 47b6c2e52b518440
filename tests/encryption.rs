//! TLS to destinations: which certificates are accepted, and that a destination with a bad one is sent
//! nothing.

mod support;

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use support::{Peer, SECRET, Service, command, payload, token};
use tempfile::TempDir;

/// HTTPS servers on OpenSSL, with certificates of all kinds.
struct Servers {
    peer: Peer,
    ports: Value,
    folder: TempDir,
}

impl Servers {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut peer = Peer::start("tls.py", &[folder.path()]);
        let ports = peer.line();
        Self {
            peer,
            ports,
            folder,
        }
    }

    /// How many bytes of requests a server has received.
    fn received(&mut self, kind: &str) -> u64 {
        self.peer.ask(&Value::Null)[kind].as_u64().unwrap()
    }

    fn url(&self, kind: &str) -> String {
        format!("https://localhost:{}/in", self.ports[kind])
    }

    fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }
}

/// The message for each bad certificate.
const BAD: [(&str, &str); 5] = [
    ("expired", "expired on 2026-01-31"),
    (
        "early",
        "is not valid before 2048-02-29: check this box's clock",
    ),
    ("misnamed", "is for another name: "),
    (
        "stranger",
        "is self-signed, or of a CA that is not trusted here",
    ),
    (
        "self_signed",
        "is self-signed, or of a CA that is not trusted here",
    ),
];

#[test]
fn a_destination_with_a_bad_certificate_is_sent_nothing_and_is_retried() {
    let mut servers = Servers::start();
    let service = Service::start(&["--ca-file", servers.ca().to_str().unwrap()]);
    for (kind, words) in BAD {
        let url = servers.url(kind);
        let id = service.submit(&url, &payload(1));
        service.event("failed", |line| {
            line["id"] == id.as_str() && line["attempt"] == 2
        });
        let waiting = service.post("/lp/export?timeout=0", &token(&url), &json!({ "id": id }));
        let waiting = waiting.json();
        assert_ne!(waiting["state"], "Finished", "{waiting}");
        assert_eq!(waiting["last_error"]["kind"], "tls", "{waiting}");
        let message = waiting["last_error"]["message"].as_str().unwrap();
        assert!(
            message.starts_with("certificate of localhost:") && message.contains(words),
            "{message}"
        );
        assert_eq!(servers.received(kind), 0, "{kind}");
    }
}

#[test]
fn an_export_given_up_over_a_bad_certificate_says_so() {
    let servers = Servers::start();
    let ca = servers.ca();
    let arguments = [
        "--ca-file",
        ca.to_str().unwrap(),
        "--give-up-after",
        "100ms",
    ];
    let service = Service::start(&arguments);
    let url = servers.url("expired");
    let ids: Vec<_> = (0..3)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    for id in &ids {
        let result = service.result(&url, id);
        assert_eq!(result["status"], "502 Bad Gateway", "{result}");
        assert_eq!(result["error"]["kind"], "tls");
    }
}

#[test]
fn a_server_at_home_is_trusted_only_with_its_ca() {
    let mut servers = Servers::start();
    let url = servers.url("good");
    let service = Service::start(&["--ca-file", servers.ca().to_str().unwrap()]);
    for number in 0..2 {
        let id = service.submit(&url, &payload(number));
        assert_eq!(service.result(&url, &id)["status_code"], 200);
    }
    let by_address = url.replace("localhost", "127.0.0.1");
    let id = service.submit(&by_address, &payload(2));
    assert_eq!(service.result(&by_address, &id)["body"], "ok");
    let received = servers.received("good");
    assert!(received > 0);

    let service = service.kill_and_restart_with(&["--give-up-after", "100ms"]);
    let id = service.submit(&url, &payload(3));
    let message = service.result(&url, &id)["error"]["message"].clone();
    assert!(message.as_str().unwrap().contains("--ca-file"), "{message}");
    assert_eq!(servers.received("good"), received);
}

#[test]
fn a_hanging_handshake_times_out_and_is_retried() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/in", silent.local_addr().unwrap());
    let service = Service::start(&["--attempt-timeout", "1s", "--give-up-after", "500ms"]);
    let id = service.submit(&url, &payload(1));
    let result = service.result(&url, &id);
    assert_eq!(
        (&result["status_code"], &result["error"]["kind"]),
        (&json!(504), &json!("timeout"))
    );
}

#[test]
fn a_ca_file_that_cannot_be_used_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.pem");
    fs::write(&empty, "no certificate here\n").unwrap();
    let broken = folder.path().join("broken.pem");
    fs::write(
        &broken,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    for (path, words) in [
        (folder.path().join("missing.pem"), "it cannot be read"),
        (empty, "it holds no certificate"),
        (broken, "it holds a certificate that cannot be used"),
    ] {
        let output = command()
            .args(["--ephemeral", "--ca-file"])
            .arg(&path)
            .env("EXPORT_SECRET", SECRET)
            .output()
            .unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(
            message.contains(words) && message.contains(path.to_str().unwrap()),
            "{message}"
        );
    }
}

#[test]
fn check_takes_every_step_and_sends_nothing() {
    let mut servers = Servers::start();
    let ca = servers.ca();
    let check = |url: &str, more: &[&str]| {
        let output = command()
            .args([
                "check",
                "--allow-network",
                "127.0.0.0/8,::1/128",
                "--ca-file",
            ])
            .arg(&ca)
            .args(more)
            .arg(url)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (code, lines) = check(&servers.url("good"), &[]);
    assert_eq!(code, Some(0), "{lines}");
    assert!(
        lines.lines().all(|line| line.starts_with("ok  ")),
        "{lines}"
    );
    assert!(
        lines.contains("certificate of localhost is good until 2049-05-17"),
        "{lines}"
    );
    for (kind, words) in BAD {
        let (code, lines) = check(&servers.url(kind), &[]);
        assert_eq!(code, Some(1), "{lines}");
        let last = lines.lines().last().unwrap();
        assert!(
            last.starts_with("FAIL  certificate") && last.contains(words),
            "{lines}"
        );
    }
    let (code, json) = check(&servers.url("good"), &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["ok"]), (Some(0), &json!(true)));
    assert_eq!(
        json["steps"].as_array().unwrap().last().unwrap()["step"],
        "certificate"
    );

    for (url, step) in [
        ("nonsense", "url"),
        ("https://no-such-host.invalid/", "look-up"),
        ("https://10.0.0.5/", "address"),
        ("http://1.1.1.1/", "address"),
        ("http://127.0.0.1:8080/", "address"),
        ("http://127.0.0.1:1/", "connection"),
    ] {
        let (code, lines) = check(url, &[]);
        assert_eq!(code, Some(1), "{lines}");
        let last = lines.lines().last().unwrap();
        assert!(last.starts_with(&format!("FAIL  {step}")), "{lines}");
    }
    for kind in ["good", "expired"] {
        assert_eq!(servers.received(kind), 0);
    }
}
