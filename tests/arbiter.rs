//! The link to the arbiter, with libzmq as the other side: fetching the secret, caching it, asking again,
//! and what the service reports of arbiters that misbehave.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use export_service::arbiter::curve::{Cause, Client, RANDOM, Step, key_of_z85};
use export_service::arbiter::zest::{self, Reply};
use serde_json::{Value, json};
use support::{Destination, Identity, PATIENCE, Peer, Response, Service};
use support::{ok, payload, python, root, token};
use tempfile::TempDir;

/// The Z85 key of RFC 32's example, which belongs to no arbiter here.
const STRANGER: &str = "HelloWorldHelloWorldHelloWorldHelloWorld";

/// An arbiter that uses libzmq; see tests/peers/arbiter.py.
struct Arbiter {
    peer: Peer,
    folder: TempDir,
    endpoint: String,
}

impl Arbiter {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut peer = Peer::start("arbiter.py", &[folder.path()]);
        let endpoint = peer.line()["endpoint"].as_str().unwrap().to_owned();
        Self {
            peer,
            folder,
            endpoint,
        }
    }

    /// Starts a service that asks this arbiter.
    fn service(&self) -> Service {
        Service::start_without_secret(&self.arguments())
    }

    fn arguments(&self) -> [&str; 4] {
        let folder = self.folder.path().to_str().unwrap();
        ["--arbiter", &self.endpoint, "--secrets-dir", folder]
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// How often the secret was requested.
    fn asked(&mut self) -> u64 {
        self.peer.ask(&json!({"do": "count"}))["secrets"]
            .as_u64()
            .unwrap()
    }

    fn behave(&mut self, kind: &str) {
        self.peer.ask(&json!({"do": "behave", "as": kind}));
    }

    fn stop(&mut self) {
        self.peer.ask(&json!({"do": "stop"}));
    }

    fn start_as(&mut self, kind: &str) {
        self.peer.ask(&json!({"do": "start", "as": kind}));
    }

    fn restart(&mut self) {
        self.stop();
        self.start_as("well");
    }

    /// Makes it unreachable, although it runs on.
    fn cut(&mut self) {
        self.peer.ask(&json!({"do": "cut"}));
    }

    fn mend(&mut self) {
        self.peer.ask(&json!({"do": "mend"}));
    }

    /// Makes it lose the service's registration and get it again.
    fn forget(&mut self) {
        self.peer.ask(&json!({"do": "forget"}));
    }

    /// A token for an app, if the arbiter can mint one.
    fn mint(&mut self, destination: &str) -> Option<String> {
        let minted = self
            .peer
            .ask(&json!({"do": "mint", "destination": destination}));
        Some(minted["token"].as_str()?.to_owned())
    }
}

/// The status of a submission with this token.
fn submitted(service: &Service, token: &str, url: &str) -> u16 {
    submit(service, token, url).status
}

fn submit(service: &Service, token: &str, url: &str) -> Response {
    service.post("/export", token, &json!({"uri": url, "data": payload(1)}))
}

/// The content of the service's cache file.
fn cached(service: &Service) -> Value {
    serde_json::from_slice(&fs::read(service.folder().join("secret")).unwrap()).unwrap()
}

/// Changes the cache file. The service must not be running.
fn change_cached(folder: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let file = folder.join("secret");
    let mut cached: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(cached.as_object_mut().unwrap());
    fs::write(&file, cached.to_string()).unwrap();
}

/// Whether a line of the log gives a reason with these words.
fn has_reason(line: &Value, words: &str) -> bool {
    line["reason"].as_str().unwrap().contains(words)
}

/// Waits until the service logs these words as the reason, and checks that it refuses requests for the time
/// being.
fn put_off(service: &Service, words: &[&str], in_general: &str) {
    let line = service.event("no link to the arbiter", |line| {
        words.iter().all(|words| has_reason(line, words))
    });
    assert_eq!(line["level"], "warn");
    let response = submit(service, &token("https://a.example/"), "https://a.example/");
    assert_eq!(
        (response.status, response.code()),
        (503, "no_secret".into())
    );
    assert_eq!(response.header("retry-after"), Some("5"));
    let message = response.json()["error"]["message"].to_string();
    assert!(message.contains(in_general), "{message}");
    assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
}

#[test]
fn the_secret_is_fetched_at_the_first_try_and_an_apps_token_is_accepted() {
    let destination = Destination::start(|_| ok());
    let mut arbiter = Arbiter::start();
    assert_eq!(arbiter.mint(&destination.url), None, "it was not asked yet");
    let service = arbiter.service();
    let there = service.event("secret is there", |_| true);
    assert_eq!(
        (&there["from"], &there["level"]),
        (&json!("arbiter"), &json!("info"))
    );
    assert_eq!(arbiter.asked(), 1);
    assert!(!service.log().iter().any(|line| line.contains("no link")));
    service.event("connected to the arbiter", |_| true);
    eprintln!(
        "idle with the link held: {} threads, {} kB resident",
        service.figure("Threads"),
        service.figure("VmRSS")
    );

    // An app gets its token like this: from the arbiter, over Zest.
    let minted = python()
        .arg(root().join("tests/peers/arbiter.py"))
        .arg("token")
        .args([arbiter.folder.path(), Path::new(&arbiter.endpoint)])
        .arg(&destination.url)
        .output()
        .unwrap();
    let token = String::from_utf8(minted.stdout).unwrap();
    let token = token.trim();
    assert!(
        !token.is_empty() && token.len().is_multiple_of(4),
        "padded base64url"
    );
    let body = json!({"uri": destination.url, "data": payload(1)});
    let response = service.post("/lp/export?timeout=20", token, &body);
    assert_eq!(response.json()["ext_response"]["body"], "ok");
    assert_eq!(arbiter.asked(), 1);
}

#[test]
fn an_app_exports_over_tls_with_nothing_but_what_a_databox_gives_it() {
    let destination = Destination::start(|_| ok());
    let (mut arbiter, identity) = (Arbiter::start(), Identity::new("rsa"));
    fs::copy(identity.pem(), arbiter.file("DATABOX.pem")).unwrap();
    fs::copy(identity.ca(), arbiter.file("DATABOX_ROOT_CA")).unwrap();
    let service = arbiter.service();
    service.event("secret is there", |_| true);
    let token = arbiter.mint(&destination.url).unwrap();
    // Like those of the arbiter: v1, padded, with an empty identifier and location.
    let plain = URL_SAFE.decode(&token).unwrap();
    assert!(plain.starts_with(b"000elocation \n0010identifier \n"));
    let caveats = ["path = ", "method = ", "target = ", "destination = "];
    let places = caveats.map(|caveat| {
        let wanted = format!("cid {caveat}");
        plain
            .windows(wanted.len())
            .position(|part| part == wanted.as_bytes())
    });
    assert!(places.iter().all(Option::is_some) && places.is_sorted());

    let body = json!({"uri": destination.url, "data": payload(1).to_string()}).to_string();
    let port = service.address.port();
    let exported = Command::new("curl")
        .args(["--silent", "--show-error", "--cacert"])
        .arg(arbiter.file("DATABOX_ROOT_CA"))
        .args(["--header", &format!("X-Api-Key: {token}"), "--data", &body])
        .args(["--resolve", &format!("export-service:{port}:127.0.0.1")])
        .arg(format!("https://export-service:{port}/lp/export"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&exported.stderr);
    let answer: Value = serde_json::from_slice(&exported.stdout).expect(&errors);
    assert_eq!(answer["ext_response"]["status"], "200 OK");
    assert_eq!(destination.arrival().text(), payload(1).to_string());
    assert_eq!(arbiter.asked(), 1);
}

#[test]
fn the_cached_secret_is_private_and_its_file_holds_neither_token_nor_key() {
    let arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("secret is there", |_| true);
    let file = service.folder().join("secret");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let kept = fs::read_to_string(&file).unwrap();
    for name in ["ARBITER_TOKEN", "ZMQ_PUBLIC_KEY"] {
        let known = fs::read_to_string(arbiter.file(name)).unwrap();
        assert!(!kept.contains(known.trim()), "{name}");
    }
}

#[test]
fn a_storm_of_forged_tokens_causes_no_request_to_the_arbiter() {
    let mut arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("secret is there", |_| true);
    thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(|| {
                for _ in 0..100 {
                    let url = "https://a.example/";
                    assert_eq!(submitted(&service, &token(url), url), 401);
                    assert_eq!(submitted(&service, "nonsense", url), 401);
                }
            });
        }
    });
    assert_eq!(arbiter.asked(), 1);
}

#[test]
fn after_a_restart_of_the_service_tokens_stay_valid_and_the_arbiter_is_not_asked() {
    let mut arbiter = Arbiter::start();
    let mut service = arbiter.service();
    service.event("secret is there", |_| true);
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();
    for orderly in [false, true] {
        if orderly {
            service.signal("TERM");
            service.ended();
        }
        service = service.kill_and_restart();
        assert_eq!(
            submitted(&service, &token, url),
            200,
            "from the first moment"
        );
        service.event("secret is there", |line| line["from"] == "kept");
        service.event("connected to the arbiter", |_| true);
        assert_eq!(arbiter.asked(), 1);
    }
    assert!(
        arbiter
            .mint(url)
            .is_some_and(|token| submitted(&service, &token, url) == 200)
    );
}

#[test]
fn a_restarted_arbiter_is_asked_again_and_the_old_secret_stays_valid_until_then() {
    let mut arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("secret is there", |_| true);
    let url = "https://a.example/";
    let old = arbiter.mint(url).unwrap();
    arbiter.stop();
    service.event("no link to the arbiter", |line| {
        has_reason(line, "restarted")
    });
    assert_eq!(submitted(&service, &old, url), 200);

    // It is back, but does not know this service yet.
    arbiter.start_as("unauthorized");
    service.event("no link to the arbiter", |line| {
        has_reason(line, "129, unauthorized")
    });
    assert_eq!(arbiter.mint(url), None);
    assert_eq!(submitted(&service, &old, url), 200);

    arbiter.behave("well");
    let back = Instant::now();
    service.events("secret is there", 2);
    assert!(back.elapsed() < Duration::from_secs(60));
    let new = arbiter.mint(url).unwrap();
    assert_eq!(submitted(&service, &new, url), 200);
    assert_eq!(submitted(&service, &old, url), 401);
}

#[test]
fn a_service_restarted_while_the_arbiter_was_down_asks_again() {
    let mut arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("secret is there", |_| true);
    let url = "https://a.example/";
    let old = arbiter.mint(url).unwrap();
    // Down when the service stops, as when all programs restart but the machine does not.
    arbiter.stop();
    service.event("no link to the arbiter", |_| true);
    let service = service.kill_and_restart();
    assert_eq!(submitted(&service, &old, url), 200);
    arbiter.start_as("well");
    service.event("secret is there", |line| line["from"] == "arbiter");
    assert_eq!(arbiter.asked(), 2);

    // Down only while the service starts.
    let service = {
        service.signal("STOP");
        arbiter.stop();
        service.kill_and_restart()
    };
    service.event("no link to the arbiter", |_| true);
    arbiter.start_as("well");
    service.event("secret is there", |line| line["from"] == "arbiter");
    assert_eq!(arbiter.asked(), 3);
}

#[test]
fn an_arbiter_that_was_restarted_while_the_service_was_off_is_asked_at_once() {
    let mut arbiter = Arbiter::start();
    let mut service = arbiter.service();
    service.event("secret is there", |_| true);
    let url = "https://a.example/";
    let mut old = arbiter.mint(url).unwrap();
    for asked in [2, 3] {
        service = service.kill_and_restart_after(|| arbiter.restart());
        let there = service.event("secret is there", |line| line["from"] == "arbiter");
        assert_eq!(there["reason"], "the arbiter was restarted");
        service.event("connected to the arbiter", |_| true);
        assert_eq!(arbiter.asked(), asked);
        assert!(!service.log().iter().any(|line| line.contains("no link")));
        let new = arbiter.mint(url).unwrap();
        assert_eq!(submitted(&service, &new, url), 200);
        assert_eq!(submitted(&service, &old, url), 401);
        old = new;
    }
}

#[test]
fn losing_the_connection_to_an_arbiter_that_was_not_restarted_voids_no_token() {
    let mut arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("connected to the arbiter", |_| true);
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();
    for losses in 1..=3 {
        arbiter.cut();
        service.events("no link to the arbiter", losses);
        arbiter.mend();
        service.events("connected to the arbiter", losses + 1);
        assert_eq!(arbiter.asked(), 1);
    }
    for token in [token, arbiter.mint(url).unwrap()] {
        assert_eq!(submitted(&service, &token, url), 200);
    }

    // A later restart of the arbiter is noticed.
    arbiter.restart();
    service.event("secret is there", |line| {
        line["reason"] == "the arbiter was restarted"
    });
    assert_eq!(arbiter.asked(), 2);
    let token = arbiter.mint(url).unwrap();
    assert_eq!(submitted(&service, &token, url), 200);
}

#[test]
fn an_arbiter_unreachable_while_the_service_restarts_voids_no_token() {
    let mut arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("connected to the arbiter", |_| true);
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();
    arbiter.cut();
    service.event("no link to the arbiter", |_| true);
    let service = service.kill_and_restart();
    service.event("no link to the arbiter", |_| true);
    assert_eq!(submitted(&service, &token, url), 200);
    arbiter.mend();
    service.event("connected to the arbiter", |_| true);
    assert_eq!(arbiter.asked(), 1);
    for token in [token, arbiter.mint(url).unwrap()] {
        assert_eq!(submitted(&service, &token, url), 200);
    }
}

#[test]
fn an_arbiter_that_does_not_know_the_service_is_asked_every_second_or_two() {
    let mut arbiter = Arbiter::start();
    arbiter.behave("unauthorized");
    let service = arbiter.service();
    service.events("no link to the arbiter", 6);
    let waits: Vec<u64> = service
        .log()
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["event"] == "no link to the arbiter")
        .map(|line| line["retry_ms"].as_u64().unwrap())
        .collect();
    assert!(
        waits.iter().all(|wait| (1000..=2000).contains(wait)),
        "{waits:?}"
    );
    assert!(waits.iter().any(|wait| *wait != waits[0]), "{waits:?}");
    arbiter.behave("well");
    service.event("secret is there", |_| true);
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();
    assert_eq!(submitted(&service, &token, url), 200);
}

#[test]
fn failures_after_the_arbiter_did_not_know_the_service_begin_a_new_backoff() {
    let mut arbiter = Arbiter::start();
    arbiter.behave("unavailable");
    let service = arbiter.service();
    let wait = |line: &Value, words: &str, range: std::ops::RangeInclusive<u64>| {
        has_reason(line, words) && range.contains(&line["retry_ms"].as_u64().unwrap())
    };
    let doubled = |line: &Value| wait(line, "163, unavailable", 3200..=4800);
    service.event("no link to the arbiter", doubled);
    arbiter.behave("unauthorized");
    service.event("no link to the arbiter", |line| {
        wait(line, "129, unauthorized", 1000..=2000)
    });
    arbiter.stop();
    service.event("no link to the arbiter", |line| {
        !wait(line, "129, unauthorized", 0..=2000) && wait(line, "--arbiter", 800..=1200)
    });
}

#[test]
fn an_arbiter_that_lost_the_registration_is_asked_although_it_was_not_restarted() {
    let mut arbiter = Arbiter::start();
    let mut service = arbiter.service();
    service.event("connected to the arbiter", |_| true);
    let url = "https://a.example/";
    for restarted in [false, true] {
        let (old, asked) = (arbiter.mint(url).unwrap(), arbiter.asked());
        arbiter.cut();
        service.event("no link to the arbiter", |_| true);
        arbiter.behave("unauthorized");
        arbiter.mend();
        service.event("no link to the arbiter", |line| {
            has_reason(line, "129, unauthorized")
        });
        assert_eq!(submitted(&service, &old, url), 200);
        if restarted {
            // It is down when the service would learn that it is registered again.
            service = service.kill_and_restart_after(|| arbiter.forget());
        } else {
            arbiter.forget();
        }
        arbiter.behave("well");
        service.event("secret is there", |line| {
            line["from"] == "arbiter" && line["reason"] != "none was cached"
        });
        service.event("connected to the arbiter", |_| true);
        assert!(arbiter.asked() > asked);
        let new = arbiter.mint(url).unwrap();
        assert_eq!(submitted(&service, &new, url), 200);
        assert_eq!(submitted(&service, &old, url), 401);
        service = service.kill_and_restart();
        service.event("connected to the arbiter", |_| true);
    }
}

#[test]
fn an_arbiter_that_names_no_instance_is_asked_after_each_loss_and_each_boot() {
    let mut arbiter = Arbiter::start();
    arbiter.behave("old");
    let mut service = arbiter.service();
    service.event("connected to the arbiter", |_| true);
    assert_eq!(cached(&service)["instance"], Value::Null);
    arbiter.cut();
    service.event("no link to the arbiter", |_| true);
    arbiter.mend();
    service.events("connected to the arbiter", 2);
    assert_eq!(arbiter.asked(), 2);
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();

    service = service.kill_and_restart();
    service.event("connected to the arbiter", |_| true);
    assert_eq!(arbiter.asked(), 2, "nothing was lost");
    assert_eq!(submitted(&service, &token, url), 200);

    let folder = service.folder();
    service = service.kill_and_restart_after(|| {
        change_cached(&folder, |cached| cached["boot"] = "another".into());
    });
    // The arbiter was up first, and is asked all the same.
    let there = service.event("secret is there", |line| line["from"] == "arbiter");
    assert_eq!(there["reason"], "the machine was started");
    assert_eq!(arbiter.asked(), 3);
    assert_eq!(submitted(&service, &token, url), 401);

    service.event("connected to the arbiter", |_| true);
    arbiter.cut();
    service.event("no link to the arbiter", |_| true);
    service = service.kill_and_restart_after(|| arbiter.mend());
    service.event("secret is there", |line| line["from"] == "arbiter");
    assert_eq!(arbiter.asked(), 4, "that it was lost outlives a restart");
}

#[test]
fn a_secret_cached_by_an_earlier_release_is_used() {
    let mut arbiter = Arbiter::start();
    let mut service = arbiter.service();
    service.event("connected to the arbiter", |_| true);
    let (url, folder) = ("https://a.example/", service.folder());
    let token = arbiter.mint(url).unwrap();
    let written = cached(&service);
    let earlier = |lost: bool| {
        change_cached(&folder, |cached| {
            assert!(cached.remove("instance").unwrap().is_string());
            assert!(cached["boot"].is_string());
            if lost {
                cached["boot"] = Value::Null;
            }
        });
    };
    service = service.kill_and_restart_after(|| earlier(false));
    assert_eq!(submitted(&service, &token, url), 200);
    service.event("connected to the arbiter", |_| true);
    assert_eq!(arbiter.asked(), 1);
    assert_eq!(
        cached(&service),
        written,
        "the instance is known from now on"
    );
    service = service.kill_and_restart_after(|| arbiter.restart());
    service.event("secret is there", |line| line["from"] == "arbiter");
    service.event("connected to the arbiter", |_| true);
    assert_eq!(arbiter.asked(), 2);

    // What was stale for that release is still stale.
    service = service.kill_and_restart_after(|| earlier(true));
    service.event("secret is there", |line| line["from"] == "arbiter");
    service.event("connected to the arbiter", |_| true);
    assert_eq!(arbiter.asked(), 3);
    assert!(cached(&service)["boot"].is_string(), "no longer stale");
}

#[test]
fn a_secret_for_another_token_or_key_is_not_used() {
    let mut arbiter = Arbiter::start();
    let mut service = arbiter.service();
    service.event("secret is there", |_| true);
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();
    let read = |name| fs::read_to_string(arbiter.file(name)).unwrap();
    let (old_token, old_key) = (read("ARBITER_TOKEN"), read("ZMQ_PUBLIC_KEY"));
    for (name, other, words, in_general) in [
        (
            "ARBITER_TOKEN",
            "another",
            "refused ARBITER_TOKEN (129, unauthorized)",
            "does not know this service",
        ),
        (
            "ZMQ_PUBLIC_KEY",
            STRANGER,
            "check that ZMQ_PUBLIC_KEY is this arbiter's key",
            "another key",
        ),
    ] {
        fs::write(arbiter.file(name), other).unwrap();
        service = service.kill_and_restart();
        put_off(&service, &[words], in_general);
        fs::write(arbiter.file("ARBITER_TOKEN"), &old_token).unwrap();
        fs::write(arbiter.file("ZMQ_PUBLIC_KEY"), &old_key).unwrap();
    }
    service = service.kill_and_restart();
    service.event("secret is there", |line| line["from"] == "kept");
    assert_eq!(submitted(&service, &token, url), 200);
}

#[test]
fn an_ephemeral_service_writes_no_secret_to_disk() {
    let mut arbiter = Arbiter::start();
    let arguments = [&arbiter.arguments()[..], &["--ephemeral"]].concat();
    let service = Service::start_without_secret(&arguments);
    service.event("secret is there", |_| true);
    assert!(!service.folder().exists());
    let service = service.kill_and_restart();
    service.event("secret is there", |line| line["from"] == "arbiter");
    assert_eq!(arbiter.asked(), 2);
}

#[test]
fn an_unreadable_cached_secret_is_logged_and_fetched_again() {
    let mut arbiter = Arbiter::start();
    let service = arbiter.service();
    service.event("secret is there", |_| true);
    fs::write(service.folder().join("secret"), "MARK-secret").unwrap();
    let service = service.kill_and_restart();
    service.event("cannot use the kept secret", |line| line["level"] == "warn");
    service.event("secret is there", |line| line["from"] == "arbiter");
    assert_eq!(arbiter.asked(), 2);
}

#[test]
fn while_there_is_no_secret_each_kind_of_failure_is_named_and_its_end_is_noticed() {
    let mut arbiter = Arbiter::start();
    arbiter.stop();
    let service = arbiter.service();
    put_off(
        &service,
        &["connection failed", "refused", "--arbiter"],
        "cannot be reached",
    );
    for (kind, words, in_general) in [
        (
            "reset",
            "closed the connection at the greeting",
            "closed the connection",
        ),
        (
            "garbage",
            "the answer to the greeting",
            "cannot be understood",
        ),
        (
            "exclusive",
            "answered the INITIATE with ERROR 400; check whom the arbiter's access rules",
            "refuses this service",
        ),
        (
            "unauthorized",
            "refused ARBITER_TOKEN (129, unauthorized)",
            "does not know this service",
        ),
    ] {
        arbiter.start_as(kind);
        put_off(&service, &[words], in_general);
        arbiter.stop();
    }
    arbiter.start_as("well");
    service.event("secret is there", |line| line["from"] == "arbiter");
    let url = "https://a.example/";
    let token = arbiter.mint(url).unwrap();
    assert_eq!(submitted(&service, &token, url), 200);
}

#[test]
fn an_arbiter_that_cannot_answer_is_asked_until_it_can() {
    let mut arbiter = Arbiter::start();
    arbiter.behave("unavailable");
    let service = arbiter.service();
    put_off(&service, &["163, unavailable"], "does not give it");
    arbiter.behave("gibberish");
    put_off(&service, &["no Zest message"], "cannot be understood");
    arbiter.behave("well");
    service.event("secret is there", |_| true);
}

#[test]
fn a_lasting_failure_is_warned_about_once() {
    let mut arbiter = Arbiter::start();
    arbiter.stop();
    let service = arbiter.service();
    service.events("no link to the arbiter", 3);
    let warnings = service.log();
    let warnings = warnings.iter().filter(|line| {
        line.contains("no link to the arbiter") && line.contains(r#""level":"warn""#)
    });
    assert_eq!(warnings.count(), 1);
}

#[test]
fn a_hanging_arbiter_is_noticed_at_each_step() {
    // All at the same time, since each takes long.
    thread::scope(|threads| {
        threads.spawn(|| {
            let mut arbiter = Arbiter::start();
            arbiter.stop();
            arbiter.start_as("silent");
            let service = arbiter.service();
            put_off(
                &service,
                &["no answer to the greeting in time", "--arbiter"],
                "did not answer in time",
            );
            arbiter.stop();
            arbiter.start_as("well");
            service.event("secret is there", |_| true);
        });
        threads.spawn(|| {
            let mut arbiter = Arbiter::start();
            arbiter.behave("late");
            let service = arbiter.service();
            // The answer is ten seconds late and must be used: another request would void it.
            service.event("secret is there", |_| true);
            assert_eq!(arbiter.asked(), 1);
        });
        threads.spawn(|| {
            let mut arbiter = Arbiter::start();
            arbiter.behave("mute");
            let service = arbiter.service();
            put_off(
                &service,
                &["no answer to the request in time"],
                "did not answer in time",
            );
            arbiter.behave("well");
            service.event("secret is there", |_| true);
        });
        threads.spawn(|| {
            let mut arbiter = Arbiter::start();
            let service = arbiter.service();
            // The loss of one that never answered a PING would go unnoticed.
            service.event("the arbiter has answered a PING", |_| true);
            let signal = |name: &str| {
                let pid = arbiter.peer.pid().to_string();
                assert!(
                    Command::new("kill")
                        .args([name, &pid])
                        .status()
                        .unwrap()
                        .success()
                );
            };
            signal("-STOP");
            service.event("no link to the arbiter", |line| {
                has_reason(line, "no answer to the PING in time")
            });
            // It was only stalled: its secret is still valid.
            signal("-CONT");
            service.events("connected to the arbiter", 2);
            assert_eq!(arbiter.asked(), 1);
            let url = "https://a.example/";
            let token = arbiter.mint(url).unwrap();
            assert_eq!(submitted(&service, &token, url), 200);
        });
    });
}

#[test]
fn files_may_end_with_a_newline_and_the_token_is_otherwise_used_unchanged() {
    let mut arbiter = Arbiter::start();
    let read = |name| fs::read_to_string(arbiter.file(name)).unwrap();
    let (token, key) = (read("ARBITER_TOKEN"), read("ZMQ_PUBLIC_KEY"));
    for (asked, end) in ["", "\n"].iter().enumerate() {
        fs::write(arbiter.file("ARBITER_TOKEN"), format!("{token}{end}")).unwrap();
        fs::write(
            arbiter.file("ZMQ_PUBLIC_KEY"),
            format!("{}{end}", key.trim()),
        )
        .unwrap();
        let service = arbiter.service();
        service.event("secret is there", |_| true);
        assert_eq!(arbiter.asked(), asked as u64 + 1);
    }
    fs::write(arbiter.file("ARBITER_TOKEN"), format!(" {token}")).unwrap();
    put_off(
        &arbiter.service(),
        &["129, unauthorized"],
        "does not know this service",
    );
}

#[test]
fn a_missing_or_wrong_file_is_named_with_what_works_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let refused = |more: &[&str], words: &[&str]| {
        let output = support::command()
            .args(["--ephemeral", "--secrets-dir"])
            .arg(folder.path())
            .args(more)
            .output()
            .unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        for word in words {
            assert!(message.contains(word), "{message}");
        }
        assert!(!message.contains("MARK"), "{message}");
    };
    let without = ["--secret", "EXPORT_SECRET"];
    let named = |name: &str, what: &str| {
        refused(
            &[],
            &[&[file(name).to_str().unwrap(), what], &without[..]].concat(),
        );
    };
    named("ARBITER_TOKEN", "No such file");
    for nothing in ["", "\n"] {
        fs::write(file("ARBITER_TOKEN"), nothing).unwrap();
        named("ARBITER_TOKEN", "empty");
    }
    fs::write(file("ARBITER_TOKEN"), "MARK".repeat(1025)).unwrap();
    named("ARBITER_TOKEN", "too long");
    fs::write(file("ARBITER_TOKEN"), "MARK-secret").unwrap();
    named("ZMQ_PUBLIC_KEY", "No such file");
    fs::create_dir(file("ZMQ_PUBLIC_KEY")).unwrap();
    named("ZMQ_PUBLIC_KEY", "Is a directory");
    fs::remove_dir(file("ZMQ_PUBLIC_KEY")).unwrap();
    for wrong in ["MARK", &STRANGER[1..], "\u{fffd}"] {
        fs::write(file("ZMQ_PUBLIC_KEY"), wrong).unwrap();
        named("ZMQ_PUBLIC_KEY", "40 characters");
    }
    fs::write(file("ZMQ_PUBLIC_KEY"), format!("{STRANGER}\n")).unwrap();
    refused(
        &["--arbiter", "arbiter:4444"],
        &["--arbiter arbiter:4444", "tcp://arbiter:4444"],
    );
}

/// How a conversation with libzmq ended.
#[derive(Debug, PartialEq)]
enum End {
    /// It answered a request.
    Answered(u8),
    /// It closed the connection while our side was at this step.
    Closed(Step),
    /// Our side refused something at this step.
    Refused(Step, Cause),
}

/// Asks for the secret with the client alone, without I/O of its own. `tamper` may change everything that
/// is sent or received; it is told the step and the direction.
fn converse(arbiter: &Arbiter, mut tamper: impl FnMut(bool, Step, &mut Vec<u8>)) -> End {
    let text = fs::read_to_string(arbiter.file("ZMQ_PUBLIC_KEY")).unwrap();
    let token = fs::read(arbiter.file("ARBITER_TOKEN")).unwrap();
    let request = zest::get(&token, "/store/secret", "export-service").unwrap();
    let mut client = Client::new(key_of_z85(text.trim()).unwrap(), &[42; RANDOM]);
    let address = arbiter.endpoint.strip_prefix("tcp://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut asked = false;
    loop {
        if client.is_ready() && !asked {
            client.request(&request);
            asked = true;
        }
        let mut output = client.take_output();
        if !output.is_empty() {
            tamper(true, client.step(), &mut output);
            if stream.write_all(&output).is_err() {
                return End::Closed(client.step());
            }
        }
        let mut input = vec![0; 4096];
        let length = stream.read(&mut input).unwrap_or(0);
        if length == 0 {
            return End::Closed(client.step());
        }
        input.truncate(length);
        tamper(false, client.step(), &mut input);
        if let Err(cause) = client.receive(&input) {
            return End::Refused(client.step(), cause);
        }
        if let Some(answer) = client.take_answer() {
            return End::Answered(Reply::read(&answer).unwrap().code);
        }
    }
}

#[test]
fn libzmq_accepts_what_we_send_and_refuses_it_with_any_part_changed() {
    let arbiter = Arbiter::start();
    let mut lengths = Vec::new();
    let end = converse(&arbiter, |sent, step, bytes| {
        if sent {
            lengths.push((step, bytes.len()));
        }
    });
    assert_eq!(end, End::Answered(69));
    assert_eq!(
        lengths[..3],
        [
            (Step::Greeting, 64),
            (Step::Hello, 2 + 200),
            (Step::Initiate, 9 + 113 + 128 + 32 + 16)
        ]
    );
    // Bytes of HELLO (after a head of two) and INITIATE (after one of nine) that are not padding.
    let hello = (2..10)
        .chain(82..202)
        .step_by(3)
        .map(|at| (Step::Hello, at));
    let initiate = (9..lengths[2].1).step_by(5).map(|at| (Step::Initiate, at));
    for (wanted, at) in hello.chain(initiate) {
        let end = converse(&arbiter, |sent, step, bytes| {
            if sent && step == wanted {
                bytes[at] ^= 1;
            }
        });
        assert_eq!(end, End::Closed(wanted), "byte {at}");
    }
}

#[test]
fn what_libzmq_sends_is_refused_with_any_part_changed() {
    let arbiter = Arbiter::start();
    for wanted in [Step::Hello, Step::Initiate, Step::Request] {
        // Counted from the end, where the encrypted part is.
        for back in (1..=50).step_by(7) {
            let end = converse(&arbiter, |sent, step, bytes| {
                if !sent && step == wanted {
                    let at = bytes.len() - back;
                    bytes[at] ^= 0x10;
                }
            });
            assert_eq!(end, End::Refused(wanted, Cause::Sealed), "{back}");
        }
    }
    let end = converse(&arbiter, |sent, step, bytes| {
        if !sent && step == Step::Request {
            // The first of the answer's two frames is repeated.
            let length = usize::from(bytes[1]) + 2;
            let again = bytes[..length].to_vec();
            bytes.splice(length..length, again);
        }
    });
    let again = Cause::Unexpected("repeats an earlier one");
    assert_eq!(end, End::Refused(Step::Request, again));
}

#[test]
fn a_key_that_is_not_the_arbiters_is_refused_by_libzmq() {
    let arbiter = Arbiter::start();
    fs::write(arbiter.file("ZMQ_PUBLIC_KEY"), STRANGER).unwrap();
    assert_eq!(converse(&arbiter, |_, _, _| {}), End::Closed(Step::Hello));
}
