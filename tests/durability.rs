//! What was accepted is never lost: contract sections 1 and 5, and the store.

mod support;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use serde_json::json;
use support::{
    Destination, Ends, MARK, PATIENCE, SECRET, Service, command, exited, nowhere, ok, payload,
    token,
};

/// Tries to start a service on a folder and waits until it fails.
fn refused(folder: &Path) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command()
        .args(["--port", "0", "--bind", "127.0.0.1", "--data-dir"])
        .arg(folder)
        .env("EXPORT_SECRET", SECRET)
        .output()
        .unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn two_hundred_exports_survive_five_kills() {
    let destination = Destination::start(|_| {
        // A slow destination, so that each kill finds exports under way.
        thread::sleep(Duration::from_millis(4));
        ok()
    });
    let url = &destination.url;
    let running = Mutex::new(Some(Service::start(&[])));
    let accepted = Mutex::new(Vec::new());
    let done = AtomicBool::new(false);
    let count = || accepted.lock().unwrap().len();
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    thread::scope(|scope| {
        let ends = Ends(&done);
        for _ in 0..4 {
            scope.spawn(|| {
                let token = token(url);
                while !done.load(Ordering::Relaxed) {
                    let address = running.lock().unwrap().as_ref().unwrap().address;
                    // A submission that is cut off was not accepted: only a 200 counts.
                    if let Some(id) = try_submit(address, &token, &body) {
                        accepted.lock().unwrap().push(id);
                    }
                }
            });
        }
        for kill in 1..=5 {
            while count() < 35 * kill {
                thread::yield_now();
            }
            // Killed while clients submit; they wait for the lock, then go on.
            running.lock().unwrap().as_ref().unwrap().signal("KILL");
            let mut running = running.lock().unwrap();
            *running = running.take().map(Service::kill_and_restart);
        }
        while count() < 200 {
            thread::yield_now();
        }
        drop(ends);
    });
    let service = running.into_inner().unwrap().unwrap();
    let accepted = accepted.into_inner().unwrap();
    for id in &accepted {
        assert_eq!(service.result(url, id)["status_code"], 200);
    }
    let arrivals = destination.arrivals();
    let arrived: HashSet<_> = arrivals
        .iter()
        .map(|arrival| arrival.header("webhook-id").unwrap())
        .collect();
    assert!(accepted.iter().all(|id| arrived.contains(id.as_str())));
    eprintln!(
        "{} accepted, {} arrivals of {} exports",
        accepted.len(),
        arrivals.len(),
        arrived.len()
    );
}

fn try_submit(address: std::net::SocketAddr, token: &str, body: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    let head = format!(
        "POST /export HTTP/1.1\r\nHost: test\r\nConnection: close\r\nX-Api-Key: {token}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200 "), "{answer}");
    let json: serde_json::Value = serde_json::from_str(body).unwrap();
    Some(json["id"].as_str().unwrap().to_owned())
}

#[test]
fn a_backup_made_while_exports_come_in_is_complete_and_can_be_restored() {
    let destination = Destination::start(|_| ok());
    let (dead, _) = nowhere();
    let service = Service::start(&[]);
    // So much that there are commits while it is copied.
    let large = json!({"text": "x".repeat(900_000)});
    let ids: Vec<_> = (0..60).map(|_| service.submit(&dead, &large)).collect();
    let copy = service.folder().join("copy.db");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _ends = Ends(&done);
        for _ in 0..4 {
            scope.spawn(|| {
                let token = token(&destination.url);
                let body = json!({"uri": destination.url, "data": payload(1)}).to_string();
                while !done.load(Ordering::Relaxed) {
                    try_submit(service.address, &token, &body);
                }
            });
        }
        // As README says.
        let mut backup = std::process::Command::new("sqlite3")
            .arg(service.folder().join("exports.db"))
            .arg(format!("VACUUM INTO '{}'", copy.display()))
            .spawn()
            .unwrap();
        assert!(exited(&mut backup).success());
    });
    let folder = service.folder();
    let service = service.kill_and_restart_after(|| {
        for name in ["exports.db-wal", "exports.db-shm"] {
            let _ = fs::remove_file(folder.join(name));
        }
        fs::rename(&copy, folder.join("exports.db")).unwrap();
    });
    for id in ids {
        let response = service.post("/export", &token(&dead), &json!({"id": id}));
        assert_eq!(response.status, 200, "{}", response.body);
    }
}

#[test]
fn unfinished_exports_are_delivered_after_a_restart_oldest_first() {
    let (destination, gate) = Destination::held();
    let url = &destination.url;
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..5)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    assert_eq!(
        destination.arrival().header("webhook-id"),
        Some(ids[0].as_str())
    );
    let service = service.kill_and_restart();
    assert_eq!(service.event("starting", |_| true)["unfinished"], 5);
    gate.open();
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(service.result(url, id)["status_code"], 200);
        let arrival = destination.arrival();
        assert_eq!(arrival.header("webhook-id"), Some(id.as_str()));
        assert_eq!(arrival.text(), payload(number).to_string());
    }
}

#[test]
fn a_restart_does_not_read_all_payloads_into_memory() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let large = json!({ "text": MARK, "more": "x".repeat(900_000) });
    for _ in 0..50 {
        service.submit(&destination.url, &large);
    }
    let service = service.kill_and_restart();
    // Once by the first service and once by the second.
    destination.arrival();
    destination.arrival();
    let resident = service.figure("VmRSS");
    eprintln!("45 MB queued: {resident} kB resident after the restart");
    assert!(resident < 25_000, "{resident} kB");
    gate.open();
}

/// Whether a file in the data folder holds some text.
fn on_disk(service: &Service, text: &str) -> bool {
    let entries = fs::read_dir(service.folder()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    // Its subfolder holds a socket, which has no content.
    paths.filter(|path| path.is_file()).any(|file| {
        let bytes = fs::read(file).unwrap();
        bytes
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    })
}

#[test]
fn a_payload_is_erased_from_disk_once_its_export_is_finished() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let id = service.submit(url, &json!({ "text": MARK, "first": "MARK-first" }));
    service.result(url, &id);
    // Meanwhile another program reads the store, and more exports arrive.
    let reader = Connection::open(service.folder().join("exports.db")).unwrap();
    reader
        .execute_batch("BEGIN; SELECT count(*) FROM exports")
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut reading = 0;
    while on_disk(&service, "MARK-first") {
        assert!(Instant::now() < deadline, "the payload is still there");
        let more = service.submit(url, &payload(1));
        service.result(url, &more);
        thread::sleep(Duration::from_millis(20));
        reading += 1;
        if reading == 20 {
            reader.execute_batch("COMMIT").unwrap();
        }
    }
    assert_eq!(service.result(url, &id)["body"], "ok");
}

#[test]
fn an_export_whose_payload_was_removed_ends_and_delays_no_other() {
    let (destination, gate) = Destination::held();
    let url = &destination.url;
    let mut service = Service::start(&[]);
    let ids: Vec<_> = (0..2)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    destination.arrival();
    service.signal("KILL");
    service.ended();
    let store = Connection::open(service.folder().join("exports.db")).unwrap();
    let id: uuid::Uuid = ids[0].parse().unwrap();
    store
        .execute("UPDATE exports SET payload = NULL WHERE id = ?", [id])
        .unwrap();
    drop(store);
    gate.open();
    let service = service.kill_and_restart();
    assert_eq!(service.result(url, &ids[0])["error"]["kind"], "lost");
    assert_eq!(service.result(url, &ids[1])["status_code"], 200);
}

#[test]
fn a_result_and_its_idempotency_key_expire_after_the_retention() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&["--retention", "1s"]);
    let url = &destination.url;
    let token = token(url);
    let submit = || {
        let body = json!({"uri": url, "data": payload(1)}).to_string();
        let headers = [("X-Api-Key", token.as_str()), ("Idempotency-Key", "key")];
        service
            .request("POST", "/lp/export", &headers, body.as_bytes())
            .json()["id"]
            .clone()
    };
    let first = submit();
    let deadline = Instant::now() + PATIENCE;
    while service
        .post("/export", &token, &json!({"id": first}))
        .status
        != 404
    {
        assert!(Instant::now() < deadline, "still there");
        thread::sleep(Duration::from_millis(50));
    }
    assert_ne!(submit(), first);
    let first = first.as_str().unwrap();
    while on_disk(&service, first) {
        assert!(
            Instant::now() < deadline,
            "the expired result is still on disk"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_submission_waits_while_something_else_has_the_store_locked() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    service.result(url, &id);
    let other = Connection::open(service.folder().join("exports.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (sender, answer) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| sender.send(service.submit(url, &payload(2))).unwrap());
        // Refused at once is refused by now.
        let early = answer.recv_timeout(Duration::from_secs(1));
        other.execute_batch("COMMIT").unwrap();
        assert!(early.is_err(), "{early:?}");
    });
    let id = answer.recv().unwrap();
    assert_eq!(service.result(url, &id)["status_code"], 200);
}

#[test]
fn the_data_folder_is_for_one_service_and_its_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let service = Service::start(&[]);
    let (code, message) = refused(&service.folder());
    assert_eq!(code, Some(1));
    assert!(
        message.contains("another export-service is using the data folder"),
        "{message}"
    );
    assert!(message.contains(service.folder().to_str().unwrap()));
    assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&service.folder()), 0o700);
    assert_eq!(mode(&service.folder().join("exports.db")), 0o600);
}

#[test]
fn a_store_of_a_newer_version_or_of_another_program_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("exports.db");
    let open = || Connection::open(&data).unwrap();

    open().execute_batch("CREATE TABLE other (x)").unwrap();
    let (code, message) = refused(folder.path());
    assert_eq!(code, Some(1));
    assert!(message.contains("another program's database"), "{message}");

    fs::write(
        &data,
        "this is no database, however long the text may be ".repeat(20),
    )
    .unwrap();
    let (code, message) = refused(folder.path());
    assert_eq!(code, Some(1));
    assert!(
        message.contains("is not a database of export-service"),
        "{message}"
    );

    fs::remove_file(&data).unwrap();
    let mut service = Service::start(&[]);
    service.signal("TERM");
    service.ended();
    let data = service.folder().join("exports.db");
    Connection::open(&data)
        .unwrap()
        .pragma_update(None, "user_version", 99)
        .unwrap();
    let (code, message) = refused(&service.folder());
    assert_eq!(code, Some(1));
    assert!(
        message.contains("newer export-service (schema 99;"),
        "{message}"
    );
}

#[test]
fn a_folder_that_cannot_be_used_is_named_with_what_to_do() {
    let (code, message) = refused(Path::new("/dev/null/data"));
    assert_eq!(code, Some(1));
    for word in ["/dev/null/data", "--data-dir", "--ephemeral"] {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn an_ephemeral_service_delivers_and_leaves_nothing_on_disk() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&["--ephemeral"]);
    let url = &destination.url;
    thread::scope(|scope| {
        for worker in 0..4 {
            let service = &service;
            scope.spawn(move || {
                for number in 0..25 {
                    let id = service.submit(url, &payload(100 * worker + number));
                    assert_eq!(service.result(url, &id)["status_code"], 200);
                }
            });
        }
    });
    assert!(!service.folder().exists());
}
