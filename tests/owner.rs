//! The owner's side: the port and the socket, and who is kept out of them.

mod support;

use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use export_service::auth::{Key, Macaroon};
use serde_json::{Value, json};
use support::{
    Destination, Identity, PATIENCE, Response, Service, command, connect, nowhere, ok, payload,
    token,
};

/// A service with an owner's port.
struct Owner {
    service: Service,
    address: SocketAddr,
}

impl Owner {
    fn start(arguments: &[&str]) -> Self {
        Self::of(Service::start(
            &[&["--admin", "127.0.0.1:0"], arguments].concat(),
        ))
    }

    fn of(service: Service) -> Self {
        let listening = service.event("listening for the owner", |_| true);
        let address = listening["address"].as_str().unwrap().parse().unwrap();
        Self { service, address }
    }

    fn token(&self, caveats: &[&str]) -> String {
        let key = fs::read(self.service.folder().join("owner.key")).unwrap();
        let caveats = caveats.iter().map(|&caveat| caveat.to_owned());
        let minted = Macaroon::mint(&Key::derive(&key), "owner", caveats);
        minted.to_v1().unwrap()
    }

    /// A request with exactly these headers.
    fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let mut stream = connect([127, 0, 0, 1], self.address).unwrap();
        stream
            .write_all(written(method, path, headers, body).as_bytes())
            .unwrap();
        Response::read(stream)
    }

    /// A request with this `Authorization` and the usual `Host`.
    fn with(&self, authorization: &str, method: &str, path: &str) -> Response {
        let host = self.address.to_string();
        let headers = [("Host", host.as_str()), ("Authorization", authorization)];
        self.raw(method, path, &headers, "")
    }

    fn get(&self, path: &str) -> Response {
        self.with(&format!("Bearer {}", self.token(&[])), "GET", path)
    }
}

fn written(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text + &format!("Content-Length: {}\r\n\r\n{body}", body.len())
}

/// Asks over the socket in a data folder.
fn ask(folder: &Path, method: &str, path: &str) -> Response {
    ask_with(folder, method, path, "")
}

fn ask_with(folder: &Path, method: &str, path: &str, body: &str) -> Response {
    let mut stream = UnixStream::connect(folder.join("owner.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = written(method, path, &[("Host", "socket")], body);
    stream.write_all(request.as_bytes()).unwrap();
    Response::next(&mut BufReader::new(stream))
}

const HEADERS: [(&str, &str); 5] = [
    (
        "content-security-policy",
        "default-src 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
];

fn is_guarded(response: &Response) {
    for (name, value) in HEADERS {
        assert_eq!(response.header(name), Some(value), "{response:?}");
    }
    assert_eq!(response.header("access-control-allow-origin"), None);
}

#[test]
fn nobody_gets_in_without_a_token_on_loopback_either() {
    let owner = Owner::start(&[]);
    let host = owner.address.to_string();
    for path in ["/", "/api/status", "/metrics", "/api/pause", "/nothing"] {
        let response = owner.raw("GET", path, &[("Host", &host)], "");
        assert_eq!(
            (response.status, response.code().as_str()),
            (401, "unauthorized")
        );
        let challenge = response.header("www-authenticate").unwrap();
        assert!(challenge.starts_with("Basic realm="), "{challenge}");
        assert!(
            response.body.contains("export-service link"),
            "{response:?}"
        );
        is_guarded(&response);
    }
    for (path, word) in [("/livez", "alive\n"), ("/readyz", "ready\n")] {
        let response = owner.raw("GET", path, &[("Host", &host)], "");
        assert_eq!((response.status, response.body.as_str()), (200, word));
        is_guarded(&response);
    }
    let status = owner.get("/api/status");
    assert_eq!(status.status, 200);
    is_guarded(&status);
    assert_eq!(status.json()["secret"], json!({ "ready": true }));
    assert_eq!(owner.get("/nothing").code(), "no_such_path");
    assert_eq!(owner.with("", "PUT", "/livez").status, 405);
}

#[test]
fn an_apps_token_opens_nothing_of_the_owners_nor_the_owners_the_apps() {
    let owner = Owner::start(&[]);
    let destination = Destination::start(|_| ok());
    let app = token(&destination.url);
    for authorization in [
        format!("Bearer {app}"),
        format!("Basic {}", STANDARD.encode(format!("{app}:"))),
    ] {
        let response = owner.with(&authorization, "GET", "/api/status");
        assert_eq!(response.status, 401);
        assert!(!response.body.contains(&app));
    }
    let body = json!({ "uri": destination.url, "data": payload(1) });
    let response = owner.service.post("/export", &owner.token(&[]), &body);
    assert_eq!(response.status, 401);
}

#[test]
fn a_limited_token_does_what_its_caveats_allow() {
    let owner = Owner::start(&[]);
    let status = |caveats: &[&str], method: &str, path: &str| {
        let bearer = format!("Bearer {}", owner.token(caveats));
        owner.with(&bearer, method, path).status
    };
    let metrics = ["method = GET", "path = /metrics"];
    assert_eq!(status(&metrics, "GET", "/metrics"), 200);
    assert_eq!(status(&metrics, "GET", "/api/status"), 403);
    assert_eq!(status(&["method = GET"], "GET", "/api/status"), 200);
    assert_eq!(status(&["method = GET"], "POST", "/api/pause"), 403);
    assert_eq!(
        status(&["time < 2100-01-01T00:00:00Z"], "GET", "/api/status"),
        200
    );
    assert_eq!(
        status(&["time < 2020-01-01T00:00:00Z"], "GET", "/api/status"),
        401
    );
    assert_eq!(status(&["colour = red"], "GET", "/api/status"), 403);
}

#[test]
fn a_name_of_somebody_else_is_not_this_boxs_whatever_address_it_stands_for() {
    let owner = Owner::start(&["--admin-host", "box.lan,pi.local"]);
    let bearer = format!("Bearer {}", owner.token(&[]));
    let port = owner.address.port();
    let ask = |path: &str, host: &str| {
        owner.raw(
            "GET",
            path,
            &[("Host", host), ("Authorization", &bearer)],
            "",
        )
    };
    for path in ["/api/status", "/livez"] {
        let response = ask(path, &format!("evil.example:{port}"));
        assert_eq!(
            (response.status, response.code().as_str()),
            (421, "unknown_host")
        );
        assert!(
            response.body.contains("--admin-host evil.example"),
            "{response:?}"
        );
        is_guarded(&response);
    }
    for host in [
        "127.0.0.1",
        "localhost",
        "box.lan",
        "pi.local",
        "[::1]",
        "export-service",
    ] {
        assert_eq!(
            ask("/api/status", &format!("{host}:{port}")).status,
            200,
            "{host}"
        );
    }
}

#[test]
fn a_page_of_another_site_cannot_act_even_with_the_browsers_stored_password() {
    let owner = Owner::start(&[]);
    let host = owner.address.to_string();
    let user = STANDARD.encode(format!("{}:", owner.token(&[])));
    let basic = format!("Basic {user}");
    let act = |more: &[(&str, &str)]| {
        let usual = [("Host", host.as_str()), ("Authorization", basic.as_str())];
        let response = owner.raw(
            "POST",
            "/api/pause",
            &[&usual, more].concat(),
            "{\"subject\":\"all\"}",
        );
        (response.status, response.code())
    };
    let json = ("Content-Type", "application/json");
    let form = ("Content-Type", "application/x-www-form-urlencoded");
    let plain = ("Content-Type", "text/plain");
    let elsewhere = ("Origin", "https://evil.example");
    let cross_site = (403, "cross_site".to_owned());
    for headers in [
        vec![form, elsewhere, ("Sec-Fetch-Site", "cross-site")],
        vec![json, ("Sec-Fetch-Site", "same-site")],
        // To an address in the network, over plain HTTP, browsers send no Sec-Fetch-Site.
        vec![form, elsewhere],
        vec![plain, ("Origin", "null")],
    ] {
        assert_eq!(act(&headers), cross_site, "{headers:?}");
    }
    assert_eq!(act(&[plain]), (415, "not_json".to_owned()));
    // A script's request is preceded by this one, which must allow nothing.
    let preflight = [
        ("Host", host.as_str()),
        elsewhere,
        ("Access-Control-Request-Method", "POST"),
    ];
    let response = owner.raw("OPTIONS", "/api/pause", &preflight, "");
    assert_eq!(response.status, 401);
    is_guarded(&response);
}

#[test]
fn a_post_to_what_is_only_read_gets_405_and_to_nothing_404_whatever_it_holds() {
    let owner = Owner::start(&[]);
    let host = owner.address.to_string();
    let token = format!("Bearer {}", owner.token(&[]));
    for kind in ["text/plain", "application/json"] {
        let headers = [
            ("Host", host.as_str()),
            ("Authorization", token.as_str()),
            ("Content-Type", kind),
        ];
        for path in ["/", "/livez", "/metrics", "/api/status", "/api/ledger"] {
            let response = owner.raw("POST", path, &headers, "{}");
            assert_eq!(response.status, 405, "{path} {kind}");
            assert_eq!(response.header("allow"), Some("GET, HEAD"));
        }
        let response = owner.raw("POST", "/api/nothing", &headers, "{}");
        assert_eq!(response.status, 404, "{kind}");
    }
}

#[test]
fn whatever_is_not_possible_now_is_answered_with_when_to_try_again() {
    // An arbiter that never answers, so that there is no secret.
    let secrets = tempfile::tempdir().unwrap();
    fs::write(secrets.path().join("ARBITER_TOKEN"), "token").unwrap();
    let key = "HelloWorldHelloWorldHelloWorldHelloWorld";
    fs::write(secrets.path().join("ZMQ_PUBLIC_KEY"), key).unwrap();
    let (_, arbiter) = nowhere();
    let arbiter = format!("tcp://{arbiter}");
    let secrets = secrets.path().to_str().unwrap();
    let waiting = Service::start_without_secret(&["--arbiter", &arbiter, "--secrets-dir", secrets]);
    let ready = ask(&waiting.folder(), "GET", "/readyz");
    assert_eq!(
        (ready.status, ready.header("retry-after")),
        (503, Some("5"))
    );

    let service = Service::start(&[]);
    fs::remove_file(service.folder().join("exports.db")).unwrap();
    let ledger = ask(&service.folder(), "GET", "/api/ledger");
    assert_eq!(
        (ledger.status, ledger.code().as_str()),
        (503, "storage_failed")
    );
    assert_eq!(ledger.header("retry-after"), Some("5"));
}

#[test]
fn ten_wrong_tokens_a_minute_are_enough_but_never_lock_the_owner_out() {
    let owner = Owner::start(&[]);
    let codes: Vec<_> = (0..12)
        .map(|_| owner.with("Bearer nonsense", "GET", "/").status)
        .collect();
    assert_eq!(codes, [[401; 10].as_slice(), &[429; 2]].concat());
    let refused = owner.with("Bearer nonsense", "GET", "/");
    assert_eq!(refused.header("retry-after"), Some("60"));
    is_guarded(&refused);
    assert_eq!(owner.get("/api/status").status, 200);
}

#[test]
fn the_owner_gets_through_a_crowd_and_so_do_the_apps() {
    let owner = Owner::start(&[
        "--max-connections",
        "20",
        "--max-connections-per-peer",
        "20",
    ]);
    let open = |address| -> Vec<TcpStream> {
        let dial = |_| {
            let mut stream = connect([127, 0, 0, 1], address).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: ").unwrap();
            stream
        };
        (0..40).map(dial).collect()
    };
    // Slow clients on one port take nothing away from the other, and on their own they make room.
    let apps = open(owner.service.address);
    assert_eq!(owner.get("/api/status").status, 200);
    drop(apps);
    let owners = open(owner.address);
    let destination = Destination::start(|_| ok());
    let id = owner.service.submit(&destination.url, &payload(1));
    let result = owner.service.result(&destination.url, &id);
    assert_eq!(result["status_code"], 200);
    assert_eq!(owner.get("/api/status").status, 200);
    let from_elsewhere = connect([127, 0, 0, 2], owner.address).unwrap();
    let host = owner.address.to_string();
    let request = written("GET", "/livez", &[("Host", &host)], "");
    (&from_elsewhere).write_all(request.as_bytes()).unwrap();
    assert_eq!(Response::read(from_elsewhere).status, 200);
    drop(owners);
}

#[test]
fn the_owners_port_is_never_a_destination_whatever_networks_are_allowed() {
    let owner = Owner::of(Service::start_bare(&[
        "--admin",
        "0.0.0.0:0",
        "--allow-network",
        "0.0.0.0/0,::/0",
    ]));
    let port = owner.address.port();
    for host in ["127.0.0.1", "127.9.9.9", "0.0.0.0", "[::ffff:127.0.0.1]"] {
        let url = format!("http://{host}:{port}/api/pause");
        let id = owner.service.submit(&url, &payload(1));
        let result = owner.service.result(&url, &id);
        assert_eq!(result["status_code"], 403, "{result}");
        let message = result["error"]["message"].as_str().unwrap();
        assert!(message.contains("this service itself"), "{message}");
    }
}

#[test]
fn curl_gets_in_with_basic_and_with_bearer_over_tls() {
    let identity = Identity::new("ec");
    let owner = Owner::of(Service::start_secure(
        &identity,
        &["--admin", "127.0.0.1:0"],
    ));
    let curl = |arguments: &[&str], path: &str| {
        let output = Command::new("curl")
            .args(["-s", "-w", "%{http_code}", "--cacert"])
            .arg(identity.ca())
            .args(arguments)
            .arg(format!("https://localhost:{}{path}", owner.address.port()))
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let token = owner.token(&[]);
    let basic = curl(&["-u", &format!("{token}:")], "/api/status");
    assert!(
        basic.ends_with("200") && basic.contains("\"version\""),
        "{basic}"
    );
    let bearer = curl(
        &["-H", &format!("Authorization: Bearer {token}")],
        "/metrics",
    );
    assert!(bearer.contains("export_service_build_info"), "{bearer}");
    let none = curl(&[], "/api/status");
    assert!(none.ends_with("401"), "{none}");
    // A Databox's certificates are good for a long time, this one for two days.
    let status: Value = serde_json::from_str(basic.trim_end_matches("200")).unwrap();
    assert!(status["certificate"]["expires_at"].is_u64(), "{status}");
    assert_eq!(status["attention"][0]["kind"], "certificate", "{status}");
}

#[test]
fn the_port_closes_with_the_service_after_the_answers_under_way() {
    let mut owner = Owner::start(&[]);
    let mut idle = connect([127, 0, 0, 1], owner.address).unwrap();
    owner.service.signal("TERM");
    assert_eq!(idle.read(&mut [0; 16]).unwrap_or(0), 0);
    assert!(owner.service.ended().success());
    assert!(!owner.service.folder().join("owner.sock").exists());
}

#[test]
fn a_port_without_tls_that_others_can_reach_is_warned_of() {
    let owner = Owner::of(Service::start(&["--admin", "0.0.0.0:0"]));
    let warning = "the owner's port is open to the network without TLS: give a certificate, or listen on 127.0.0.1";
    owner.service.event(warning, |line| line["level"] == "warn");
    let status = ask(&owner.service.folder(), "GET", "/api/status").json();
    assert_eq!(status["attention"][0]["kind"], "plain_http", "{status}");
}

#[test]
fn a_parameter_of_the_ledger_that_means_nothing_is_refused_rather_than_ignored() {
    let service = Service::start(&[]);
    for wrong in ["before=x", "before=1.5", "format=xml", "format=CSV"] {
        let response = ask(&service.folder(), "GET", &format!("/api/ledger?{wrong}"));
        assert_eq!(
            (response.status, response.code().as_str()),
            (400, "malformed"),
            "{wrong}"
        );
        let name = wrong.split('=').next().unwrap();
        assert!(response.body.contains(name), "{}", response.body);
    }
    for right in [
        "before=",
        "before=17",
        "format=",
        "format=json",
        "format=csv",
    ] {
        let response = ask(&service.folder(), "GET", &format!("/api/ledger?{right}"));
        assert_eq!(response.status, 200, "{right}");
    }
}

#[test]
fn the_socket_needs_no_token_and_only_this_user_can_open_it() {
    let service = Service::start(&[]);
    let folder = service.folder();
    let socket = fs::metadata(folder.join("owner.sock")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
        0o700
    );
    let key = fs::metadata(folder.join("owner.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    let status = ask(&folder, "GET", "/api/status");
    assert_eq!(status.status, 200);
    assert_eq!(status.json()["attention"], json!([]));
    assert_eq!(ask(&folder, "GET", "/nothing").status, 404);
    // What is no request is refused, and what says nothing does not keep others waiting for long.
    let mut stream = UnixStream::connect(folder.join("owner.sock")).unwrap();
    stream.write_all(b"\x16\x03\x01 nonsense\r\n\r\n").unwrap();
    assert_eq!(Response::next(&mut BufReader::new(stream)).status, 400);
    let _silent = UnixStream::connect(folder.join("owner.sock")).unwrap();
    assert_eq!(ask(&folder, "GET", "/livez").body, "alive\n");
}

#[test]
fn a_socket_that_is_left_over_is_replaced() {
    let service = Service::start(&[]);
    let service = service.kill_and_restart();
    assert_eq!(ask(&service.folder(), "GET", "/livez").status, 200);
    let service = service.kill_and_restart_with(&["--ephemeral"]);
    // Nobody listens on the one that the run before has left.
    assert!(UnixStream::connect(service.folder().join("owner.sock")).is_err());
}

#[test]
fn a_folder_that_can_have_no_socket_is_warned_of_and_served() {
    let long = "d".repeat(120);
    let folder = tempfile::Builder::new().prefix(&long).tempdir().unwrap();
    let too_long = Service::start_in(Arc::new(folder), &[]);
    let warning = "no socket for the owner: status and acts are only possible over --admin";
    let line = too_long.event(warning, |_| true);
    let reason = line["reason"].as_str().unwrap();
    assert!(reason.contains("longer than a socket's may be"), "{line}");
    assert_eq!(too_long.request("GET", "/status", &[], b"").status, 200);
}

#[test]
fn settings_of_the_port_that_cannot_work_are_refused() {
    for (arguments, words) in [
        (vec!["--admin", "8081"], "give an IP address and a port"),
        (
            vec!["--admin", "127.0.0.1:8081", "--ephemeral"],
            "leave --ephemeral out",
        ),
        (
            vec!["--admin-host", "https://box"],
            "without scheme and port",
        ),
    ] {
        let output = command()
            .args(&arguments)
            .env("EXPORT_SECRET", support::SECRET)
            .output()
            .unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(words), "{message}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let mut with = command();
    with.env("EXPORT_ADMIN", &address);
    let (listens, code, log) = support::try_start(with, folder.path());
    assert_eq!((listens, code), (false, Some(1)), "{log}");
    assert!(log.contains("choose another --admin"), "{log}");
}

/// Runs the program on the data folder of a service. Its exit code, and what it wrote to stdout and stderr.
fn run(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = command()
        .args(arguments)
        .env("EXPORT_DATA_DIR", folder)
        .output()
        .unwrap();
    let [out, errors] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), out, errors)
}

#[test]
fn link_prints_an_address_and_a_token_that_work() {
    let owner = Owner::start(&[]);
    let folder = owner.service.folder();
    let (code, out, hint) = run(&folder, &["link"]);
    assert_eq!(
        (code, hint.contains("user name")),
        (Some(0), true),
        "{hint}"
    );
    let [url, token] = out.lines().collect::<Vec<_>>()[..] else {
        panic!("not two lines: {out}");
    };
    assert_eq!(url, format!("http://{}/", owner.address));
    let bearer = |token: &str| format!("Bearer {token}");
    assert_eq!(owner.with(&bearer(token), "GET", "/api/status").status, 200);

    let limited = |flags: &[&str]| {
        let (code, out, _) = run(&folder, &[&["link"], flags].concat());
        assert_eq!(code, Some(0));
        bearer(out.lines().last().unwrap())
    };
    let metrics = limited(&["--metrics", "--expires", "1h"]);
    assert_eq!(owner.with(&metrics, "GET", "/metrics").status, 200);
    assert_eq!(owner.with(&metrics, "GET", "/api/status").status, 403);
    let read_only = limited(&["--read-only"]);
    assert_eq!(owner.with(&read_only, "GET", "/api/status").status, 200);
    assert_eq!(owner.with(&read_only, "POST", "/api/pause").status, 403);
    let (code, _, error) = run(&folder, &["link", "--expires", "0s"]);
    assert_eq!(
        (code, error.contains("--expires is 0")),
        (Some(2), true),
        "{error}"
    );

    let Owner { mut service, .. } = owner;
    service.signal("TERM");
    assert!(service.ended().success());
    let (code, out, hint) = run(&folder, &["link"]);
    assert_eq!((code, out.lines().count()), (Some(0), 1), "{out}");
    assert!(hint.contains("does not run"), "{hint}");
    let nowhere = tempfile::tempdir().unwrap();
    let (code, _, error) = run(nowhere.path(), &["link"]);
    assert_eq!(
        (code, error.contains("at its first start")),
        (Some(2), true),
        "{error}"
    );
}

#[test]
fn a_name_that_was_given_for_the_port_is_the_one_that_link_prints() {
    let owner = Owner::start(&["--admin-host", "box.lan"]);
    let (_, out, _) = run(&owner.service.folder(), &["link"]);
    let url = format!("http://box.lan:{}/", owner.address.port());
    assert_eq!(out.lines().next(), Some(url.as_str()));
}

#[test]
fn status_tells_of_what_was_given_up_today_although_nothing_waits_for_it() {
    let service = Service::start(&[]);
    service.submit("https://10.0.0.1/in", &json!({"a": 1}));
    service.event("given up", |_| true);
    service.reports(1);
    let (code, out, _) = run(&service.folder(), &["status"]);
    assert_eq!(code, Some(1), "{out}");
    assert!(
        out.contains("1 export of today was given up") && out.contains("waiting      nothing"),
        "{out}"
    );
}

#[test]
fn status_says_with_its_exit_code_whether_all_is_well() {
    let service = Service::start(&[]);
    let folder = service.folder();
    let (code, out, _) = run(&folder, &["status"]);
    assert_eq!(code, Some(0), "{out}");
    for words in [
        "sending",
        "Nothing needs attention.",
        "waiting      nothing",
        "secret       there",
    ] {
        assert!(out.contains(words), "{words}: {out}");
    }
    let (code, out, _) = run(&folder, &["status", "--json"]);
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &status["waiting"]), (Some(0), &json!(0)));
    assert_eq!(run(&folder, &["status", "--nonsense"]).0, Some(2));
    drop(service);
    let (code, _, error) = run(&folder, &["status"]);
    assert_eq!(code, Some(1), "{error}");
    assert!(
        error.contains("owner.sock") && error.contains("--data-dir"),
        "{error}"
    );

    let (url, _) = support::nowhere();
    let stuck = Service::start(&[]);
    stuck.submit(&url, &json!({"a": 1}));
    stuck.event("failed", |line| line["attempt"] == 3);
    stuck.reports(3);
    let (code, out, _) = run(&stuck.folder(), &["status"]);
    assert_eq!(code, Some(1), "{out}");
    assert!(
        out.contains("!  1 export of") && out.contains("connection refused"),
        "{out}"
    );

    // A port in a container may be published on its machine only, which the service cannot know.
    let exposed = Service::start(&["--admin", "0.0.0.0:0"]);
    let (code, out, _) = run(&exposed.folder(), &["status"]);
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains("!  The owner's port is open to the network"),
        "{out}"
    );
}

#[test]
fn serve_check_shows_the_settings_in_force_and_no_secret() {
    let check = |arguments: &[&str]| {
        let output = command()
            .args(arguments)
            .env("EXPORT_SECRET", support::SECRET)
            .env("EXPORT_RETENTION", "7d")
            .output()
            .unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(!text.contains(support::SECRET), "{text}");
        let rows = text.lines().map(|line| {
            let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            words.join(" ")
        });
        (output.status.code(), rows.collect::<Vec<_>>())
    };
    for form in [&["--check"][..], &["serve", "--check"]] {
        let (code, rows) = check(&[form, &["--port", "9999"]].concat());
        assert_eq!(code, Some(0), "{rows:#?}");
        for row in [
            "--port 9999 --port",
            "--retention 7d EXPORT_RETENTION",
            "--secret set EXPORT_SECRET",
            "--signing-secret - default",
            "--threads 8 default",
            "macaroon secret given",
            "certificate none: plain HTTP",
        ] {
            assert!(rows.iter().any(|found| found == row), "{row}: {rows:#?}");
        }
    }
    let (code, rows) = check(&["serve", "--check", "--threads", "0"]);
    assert_eq!(code, Some(2), "{rows:#?}");
}

#[test]
fn check_says_whether_a_token_allows_a_destination() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", silent.local_addr().unwrap());
    let check = |token: &str, secret: Option<&str>, url: &str| {
        let output = command()
            .args(["check", "--allow-network", "127.0.0.0/8", url])
            .env("EXPORT_TOKEN", token)
            .envs(secret.map(|secret| ("EXPORT_SECRET", secret)))
            .output()
            .unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(!text.contains(token), "{text}");
        (
            output.status.code(),
            text.lines().next().unwrap().to_owned(),
        )
    };
    let good = token(&url);
    let (code, line) = check(&good, Some(support::SECRET), &url);
    assert_eq!(code, Some(0), "{line}");
    assert!(
        line.starts_with("ok    token") && line.contains("POST /lp/export and /export"),
        "{line}"
    );
    let (code, line) = check(&good, None, &url);
    assert_eq!(code, Some(0), "{line}");
    assert!(line.contains("signature was not checked"), "{line}");
    for (secret, url, words) in [
        ("another", url.as_str(), "signature does not match"),
        (
            support::SECRET,
            "http://127.0.0.1:1/",
            "`destination` caveat",
        ),
    ] {
        let (code, line) = check(&good, Some(secret), url);
        assert_eq!(code, Some(1), "{line}");
        assert!(
            line.starts_with("FAIL  token") && line.contains(words),
            "{line}"
        );
    }
    let (code, line) = check("nonsense", Some(support::SECRET), &url);
    assert_eq!(
        (code, line.starts_with("FAIL  token")),
        (Some(1), true),
        "{line}"
    );
}

#[test]
fn the_version_names_the_commit_and_sqlite() {
    let (code, out, _) = run(Path::new("/nonexistent"), &["--version"]);
    assert_eq!(code, Some(0));
    let start = format!("export-service {} (commit ", env!("CARGO_PKG_VERSION"));
    assert!(
        out.starts_with(&start) && out.contains(", SQLite 3."),
        "{out}"
    );
}

#[test]
fn who_opens_the_apps_port_in_a_browser_is_told_where_to_look() {
    let service = Service::start(&[]);
    let page = service.request("GET", "/ui", &[], b"");
    assert_eq!(page.status, 200);
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert!(page.header("content-security-policy").is_some());
    for words in ["export-service status", "--admin", "export-service link"] {
        assert!(page.body.contains(words), "{words}");
    }
    assert_eq!(
        service.request("POST", "/ui", &[], b"").header("allow"),
        Some("GET, HEAD")
    );
}

#[test]
fn acts_are_carried_out_over_the_port_and_the_socket() {
    let owner = Owner::start(&[]);
    let (folder, host) = (owner.service.folder(), owner.address.to_string());
    let bearer = format!("Bearer {}", owner.token(&[]));
    let act = |name: &str, body: &str| {
        let headers = [
            ("Host", host.as_str()),
            ("Authorization", &bearer),
            ("Content-Type", "application/json"),
            ("Origin", &format!("http://{host}")),
            ("Sec-Fetch-Site", "same-origin"),
        ];
        owner.raw("POST", &format!("/api/{name}"), &headers, body)
    };
    let destination = Destination::start(|_| ok());
    let paused = act("pause", r#"{"subject":"all"}"#);
    assert_eq!(paused.status, 200, "{paused:?}");
    assert!(paused.json()["done"].is_string(), "{paused:?}");
    is_guarded(&paused);
    let id = owner.service.submit(&destination.url, &payload(1));
    let shown = act("show", &json!({ "id": id }).to_string());
    assert_eq!(shown.status, 200, "{shown:?}");
    assert_eq!(shown.json()["uri"], destination.url.as_str());
    let resumed = ask_with(&folder, "POST", "/api/resume", r#"{"subject":"all"}"#);
    assert_eq!(resumed.status, 200, "{resumed:?}");
    let result = owner.service.result(&destination.url, &id);
    assert_eq!(result["status_code"], 200);

    let malformed = act("pause", "[]");
    assert_eq!(
        (malformed.status, malformed.code().as_str()),
        (400, "malformed")
    );
    is_guarded(&malformed);
    let unknown = json!({ "id": "01a209fa-822b-7187-8cd1-039da68c5541" });
    assert_eq!(act("show", &unknown.to_string()).status, 404);
    assert_eq!(act("explode", "{}").code(), "no_such_path");
    // GET changes nothing.
    let looked = ask(&folder, "GET", "/api/pause");
    assert_eq!((looked.status, looked.header("allow")), (405, Some("POST")));
}
