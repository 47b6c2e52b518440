//! Real clients, over HTTP and TLS: they are answered soon, whatever the size of the answer.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use support::{Destination, Identity, Reaction, Response, SECRET, Service, command, ok, payload};
use support::{python, root, token};

/// The sizes of destinations' answers that clients poll for, in bytes.
const SIZES: [usize; 5] = [0, 700, 1024, 30_000, 100_000];
/// The destination of every client here.
const TIMES: usize = 20;
/// The least delay from a delayed acknowledgement, in milliseconds, even on an idle machine.
const STALL: f64 = 36.0;

/// A service with a Finished export for each size, whose answer has that size.
struct Served {
    service: Service,
    identity: Option<Identity>,
    token: String,
    ids: Vec<(usize, String)>,
    _destination: Destination,
}

impl Served {
    fn start(identity: Option<Identity>) -> Self {
        let destination = Destination::start(|arrival| {
            let size = arrival.text().parse::<Value>().unwrap()[0]
                .as_u64()
                .unwrap();
            Reaction::Answer(200, vec![b'x'; usize::try_from(size).unwrap()])
        });
        let arguments = ["--max-response", "200000"];
        // Set up over HTTP, since only the later polls matter here.
        let service = Service::start(&arguments);
        let url = &destination.url;
        let ids = SIZES.map(|size| (size, service.submit(url, &json!([size]))));
        for (_, id) in &ids {
            service.result(url, id);
        }
        let token = token(url);
        let service = match &identity {
            Some(identity) => {
                let pem = identity.pem();
                let tls = ["--tls-pem", pem.to_str().unwrap()];
                service.kill_and_restart_with(&[&tls, &arguments[..]].concat())
            }
            None => service,
        };
        Self {
            service,
            identity,
            token,
            ids: ids.to_vec(),
            _destination: destination,
        }
    }

    fn url(&self, path: &str) -> String {
        let scheme = if self.identity.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://localhost:{}{path}", self.service.address.port())
    }

    /// Runs a script that polls for each size several times, with and without keep-alive, and checks each
    /// answer. It prints a line of JSON: the milliseconds that each answer took, by kind.
    fn polled_by(&self, program: &mut Command, script: &str) {
        let task = json!({
            "url": self.url("/export"),
            "ca": self.identity.as_ref().map(Identity::ca),
            "token": self.token,
            "ids": self.ids,
            "times": TIMES,
        });
        let done = program
            .arg(root().join("tests/peers").join(script))
            .arg(task.to_string())
            .output()
            .unwrap();
        let times: Value = serde_json::from_str(&text(&done)).unwrap();
        let sorted = |kind: &str| {
            let mut times: Vec<f64> = serde_json::from_value(times[kind].clone()).unwrap();
            assert_eq!(times.len(), TIMES);
            times.sort_by(f64::total_cmp);
            times
        };
        for kind in times.as_object().unwrap().keys() {
            let times = sorted(kind);
            let (quick, slowest) = (times[TIMES / 4], times[TIMES - 1]);
            eprintln!("{script} {kind}: {quick:.2} ms, {slowest:.2} ms at most");
            // An empty answer is never delayed.
            let (_, connection) = kind.split_once(' ').unwrap();
            let empty = sorted(&format!("{} {connection}", SIZES[0]))[TIMES / 4];
            assert!(quick < empty + STALL, "{kind}: {times:?}, empty {empty}");
        }
    }
}

/// The output of a program. Panics if it fails.
fn text(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn answers_to_pythons_http_client_do_not_stall() {
    Served::start(None).polled_by(&mut python(), "poll.py");
    Served::start(Some(Identity::new("rsa"))).polled_by(&mut python(), "poll.py");
}

#[test]
fn answers_to_nodes_https_client_do_not_stall() {
    Served::start(None).polled_by(&mut Command::new("node"), "poll.js");
    Served::start(Some(Identity::new("pkcs8"))).polled_by(&mut Command::new("node"), "poll.js");
}

#[test]
fn answers_to_curl_do_not_stall() {
    for identity in [None, Some(Identity::new("ec"))] {
        let served = Served::start(identity);
        let curl = |arguments: &[&str]| {
            let mut curl = Command::new("curl");
            if let Some(identity) = &served.identity {
                curl.arg("--cacert").arg(identity.ca());
            }
            let user = format!("{}:", served.token);
            text(
                &curl
                    .args(["--silent", "--show-error", "--user", &user])
                    .args(arguments)
                    .output()
                    .unwrap(),
            )
        };
        let url = served.url("/export");
        for version in ["--http1.0", "--http1.1", "--http2"] {
            // The first is empty, and never delayed.
            let mut empty = None;
            for (size, id) in &served.ids {
                let body = json!({ "id": id }).to_string();
                // One process, one connection, several requests.
                let mut arguments = vec![];
                for time in 0..TIMES {
                    if time > 0 {
                        arguments.push("--next");
                    }
                    arguments.extend(["--silent", version, "--data", &body, "--write-out"]);
                    arguments.extend([
                        "\n%{http_code} %{num_connects} %{time_starttransfer} %{time_total}\n",
                        &url,
                    ]);
                    if let Some(identity) = &served.identity {
                        arguments.extend([
                            "--cacert",
                            identity.ca().to_str().unwrap().to_owned().leak(),
                        ]);
                    }
                    arguments.extend(["--user", format!("{}:", served.token).leak()]);
                }
                let mut curl = Command::new("curl");
                let printed = text(&curl.args(&arguments).output().unwrap());
                let lines: Vec<_> = printed.lines().collect();
                let mut times = Vec::new();
                for answer in lines.chunks(3) {
                    let [body, _, figures] = answer else {
                        panic!("{answer:?}")
                    };
                    let body: Value = serde_json::from_str(body).unwrap();
                    assert_eq!(body["ext_response"]["body"].as_str().unwrap().len(), *size);
                    let figures: Vec<f64> = figures
                        .split(' ')
                        .map(|figure| figure.parse().unwrap())
                        .collect();
                    assert_eq!(figures[0], 200.0);
                    let is_new = figures[1] > 0.0;
                    assert!(
                        times.is_empty() || version == "--http1.0" || !is_new,
                        "the connection is kept"
                    );
                    times.push(figures[3] * 1000.0);
                }
                times.sort_by(f64::total_cmp);
                let quick = times[TIMES / 4];
                let empty = *empty.get_or_insert(quick);
                assert!(
                    quick < empty + STALL,
                    "{version}, {size} bytes: {times:?}, empty {empty}"
                );
            }
        }
        // A body with Expect: 100-continue, one in chunks, and a HEAD request.
        let large = format!(
            "{{\"id\":\"{}\",\"data\":\"{}\"}}",
            served.ids[0].1,
            "x".repeat(1_040_000)
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("large");
        fs::write(&file, &large).unwrap();
        let from = format!("@{}", file.display());
        for header in ["Expect: 100-continue", "Transfer-Encoding: chunked"] {
            let answer = curl(&["--header", header, "--data-binary", &from, &url]);
            assert!(answer.contains("\"Finished\""), "{answer}");
        }
        let head = curl(&["--head", &served.url("/status")]);
        assert!(
            head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        // Too large a body, with a known and an unknown length.
        fs::write(&file, large.repeat(3)).unwrap();
        for header in ["A: b", "Expect: 100-continue", "Transfer-Encoding: chunked"] {
            let answer = curl(&["--header", header, "--data-binary", &from, &url]);
            assert!(answer.contains("\"too_large\""), "{header}: {answer}");
        }
    }
}

/// Sends some text with openssl's client and returns everything that comes back.
fn s_client(service: &Service, identity: &Identity, arguments: &[&str], sent: &str) -> Output {
    let mut child = Command::new("openssl")
        .args([
            "s_client",
            "-quiet",
            "-verify_return_error",
            "-servername",
            "localhost",
        ])
        .args(["-verify_hostname", "localhost", "-CAfile"])
        .arg(identity.ca())
        .args(["-connect", &service.address.to_string()])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(sent.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

const STATUS: &str = "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n";
const LAST_STATUS: &str = "GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

#[test]
fn tls_1_2_and_1_3_work_with_all_kinds_of_keys_and_older_versions_do_not() {
    for key in ["rsa", "pkcs8", "ec"] {
        let identity = Identity::new(key);
        let service = Service::start_secure(&identity, &[]);
        for version in ["-tls1_2", "-tls1_3"] {
            let sent = [STATUS, STATUS, LAST_STATUS].concat();
            let answers = text(&s_client(&service, &identity, &[version], &sent));
            assert_eq!(
                answers.matches("\r\n\r\nactive").count(),
                3,
                "{key} {version}: {answers}"
            );
        }
        let old = ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"];
        assert!(
            !s_client(&service, &identity, &old, LAST_STATUS)
                .status
                .success()
        );
    }
}

#[test]
fn a_databox_pem_in_the_secrets_folder_turns_on_https() {
    let identity = Identity::new("rsa");
    let folder = identity.folder().to_str().unwrap();
    let service = Service::start(&["--secrets-dir", folder]);
    assert_eq!(service.event("listening", |_| true)["scheme"], "https");
    let destination = Destination::start(|_| ok());
    let body = json!({"uri": destination.url, "data": payload(1)}).to_string();
    let answer = Command::new("curl")
        .args(["--silent", "--show-error", "--cacert"])
        .arg(identity.ca())
        .args([
            "--user",
            &format!("{}:", token(&destination.url)),
            "--data",
            &body,
        ])
        .arg(format!(
            "https://localhost:{}/lp/export",
            service.address.port()
        ))
        .output()
        .unwrap();
    assert!(text(&answer).contains("\"Finished\""));
    // The health check speaks TLS too, and knows where the certificate is.
    let healthy = command()
        .args(["healthcheck", "--port", &service.address.port().to_string()])
        .env("EXPORT_SECRETS_DIR", folder)
        .output()
        .unwrap();
    assert_eq!(text(&healthy), "");
}

#[test]
fn a_client_that_speaks_http_to_an_https_port_or_the_reverse_is_told_so() {
    let identity = Identity::new("ec");
    let service = Service::start_secure(&identity, &[]);
    let answer = service.request("GET", "/status", &[], b"");
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("https://"), "{}", answer.body);

    let plain = Service::start(&[]);
    let refused = s_client(&plain, &identity, &[], LAST_STATUS);
    assert!(!refused.status.success());
    let refused = plain.event("refused", |_| true);
    assert!(refused["reason"].as_str().unwrap().contains("http://"));
}

#[test]
fn a_certificate_file_that_cannot_work_is_refused_at_start_with_the_reason() {
    let (identity, other) = (Identity::new("rsa"), Identity::new("ec"));
    let good = fs::read_to_string(identity.pem()).unwrap();
    let key_of_other = fs::read_to_string(other.folder().join("own.key")).unwrap();
    let certificate = fs::read_to_string(identity.folder().join("leaf.pem")).unwrap();
    let damaged = good.replacen("MII", "M!I", 1);
    let file = identity.folder().join("tried.pem");
    for (content, words) in [
        (Some(String::new()), "holds no certificate"),
        (Some(key_of_other.clone()), "holds no certificate"),
        (Some(certificate.clone()), "holds no private key"),
        (
            Some(certificate.clone() + &key_of_other),
            "not the first certificate's",
        ),
        (
            Some(good.clone() + &key_of_other),
            "more than one private key",
        ),
        (Some(damaged), "is damaged"),
        (Some(good[..good.len() / 2].to_owned()), "is damaged"),
        (None, "cannot be read"),
    ] {
        match content {
            Some(content) => fs::write(&file, content).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let refused = command()
            .args(["--ephemeral", "--port", "0", "--tls-pem"])
            .arg(&file)
            .env("EXPORT_SECRET", SECRET)
            .output()
            .unwrap();
        let message = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(
            message.contains("tried.pem") && message.contains(words),
            "{message}"
        );
        assert!(!message.contains("PRIVATE KEY-----"), "{message}");
    }
}

#[test]
fn sighup_loads_a_new_certificate_and_keeps_open_connections() {
    let identity = Identity::new("ec");
    let service = Service::start_secure(&identity, &[]);
    let (mut stdin, mut answers) = identity.client(&service);
    let mut ask = || {
        stdin.write_all(STATUS.as_bytes()).unwrap();
        assert_eq!(Response::next(&mut answers).body, "active");
    };
    ask();

    identity.renew("rsa");
    service.signal("HUP");
    service.event("certificate read again", |_| true);
    ask();
    assert!(text(&s_client(&service, &identity, &[], LAST_STATUS)).ends_with("active"));

    // An unusable certificate changes nothing.
    fs::write(identity.pem(), "nothing").unwrap();
    service.signal("HUP");
    service.event("the old certificate stays", |_| true);
    ask();
    assert!(text(&s_client(&service, &identity, &[], LAST_STATUS)).ends_with("active"));

    let plain = Service::start(&[]);
    plain.signal("HUP");
    plain.event(
        "SIGHUP: there is no certificate to read again; start anew to have one",
        |_| true,
    );
    assert_eq!(plain.request("GET", "/status", &[], b"").status, 200);
}

#[test]
fn a_service_whose_inner_socket_was_removed_keeps_serving() {
    let mut service = Service::start(&[]);
    fs::remove_file(service.folder().join("gate/http.sock")).unwrap();
    let streams: Vec<TcpStream> = (0..50)
        .map(|_| service.send("GET", "/status", &[("Connection", "keep-alive")], b""))
        .collect();
    for stream in streams {
        assert_eq!(Response::read(stream).body, "active");
    }
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
}

#[test]
fn old_clients_get_what_they_expect() {
    let service = Service::start(&[]);
    let mut answers = Vec::new();
    for request in [
        "GET /status HTTP/1.0\r\n\r\n",
        "GET http://export-service:8080/status HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n",
        "\r\n\r\nGET /status HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /status HTTP/1.0\r\n\r\n",
    ] {
        let mut stream = service.connect_from([127, 0, 0, 1]);
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answers.push(answer);
    }
    assert!(
        answers
            .iter()
            .all(|answer| answer.ends_with("\r\n\r\nactive")),
        "{answers:?}"
    );
    assert!(
        answers[0].contains("\r\nConnection: close\r\n"),
        "{answers:?}"
    );
    assert!(
        answers[2].contains("\r\nConnection: keep-alive\r\n"),
        "{answers:?}"
    );
    assert_eq!(answers[2].matches("active").count(), 2);
    let mut half_closed = service.connect_from([127, 0, 0, 1]);
    half_closed.write_all(STATUS.as_bytes()).unwrap();
    half_closed.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reader = BufReader::new(half_closed);
    assert_eq!(Response::next(&mut reader).body, "active");
    assert!(reader.fill_buf().unwrap().is_empty());
}
