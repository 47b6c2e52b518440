//! The owner's acts, over the socket in the data folder and as commands.

mod support;

use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rusqlite::Connection;
use serde_json::{Value, json};
use support::{
    Destination, MARK, PATIENCE, Reaction, Response, Service, command, nowhere, ok, payload, token,
    token_of,
};
use uuid::Uuid;

/// Sends a request over the socket in the data folder.
fn ask(service: &Service, method: &str, path: &str, body: &str) -> Response {
    let mut stream = UnixStream::connect(service.folder().join("owner.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .unwrap();
    Response::next(&mut BufReader::new(stream))
}

/// Carries an act out and returns what was done.
fn act(service: &Service, name: &str, body: &Value) -> Value {
    let response = ask(service, "POST", &format!("/api/{name}"), &body.to_string());
    assert_eq!(response.status, 200, "{name} {body}: {}", response.body);
    response.json()
}

/// The status, the code and the message of an act that is refused.
fn refused(service: &Service, name: &str, body: &Value) -> (u16, String, String) {
    let response = ask(service, "POST", &format!("/api/{name}"), &body.to_string());
    let message = response.json()["error"]["message"]
        .as_str()
        .map(str::to_owned);
    (response.status, response.code(), message.unwrap())
}

fn submit_as(service: &Service, owner: &str, url: &str, data: &Value) -> Value {
    let body = json!({ "uri": url, "data": data });
    let response = service.post("/export", &token_of(owner, url), &body);
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

fn state_as(service: &Service, owner: &str, url: &str, id: &str, wait: u32) -> Value {
    let path = format!("/lp/export?timeout={wait}");
    let response = service.post(&path, &token_of(owner, url), &json!({ "id": id }));
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

/// The command with these arguments on the service's data folder.
fn run(service: &Service, arguments: &[&str]) -> Output {
    command()
        .args(arguments)
        .arg("--data-dir")
        .arg(service.folder())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// All rows of the ledger as event, sender, destination and outcome.
fn rows(service: &Service) -> Vec<[String; 4]> {
    let store = Connection::open(service.folder().join("exports.db")).unwrap();
    let sql = "SELECT coalesce(event, ''), coalesce(who, ''), coalesce(destination, ''), coalesce(outcome, '')
        FROM ledger ORDER BY seq";
    let mut statement = store.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| {
        Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?])
    });
    rows.unwrap().map(Result::unwrap).collect()
}

fn events(service: &Service) -> Vec<String> {
    let rows = rows(service).into_iter();
    rows.map(|[event, ..]| event).collect()
}

#[test]
fn a_thousand_exports_wait_out_a_pause_with_a_restart_in_it_and_then_leave_in_order() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&["--give-up-after", "2s"]);
    let paused = act(&service, "pause", &json!({ "subject": "all" }));
    assert!(
        paused["done"].as_str().unwrap().contains("everything"),
        "{paused}"
    );
    let ids: Vec<_> = (0..1000)
        .map(|number| service.submit(&destination.url, &payload(number)))
        .collect();
    let service = service.kill_and_restart();
    // Longer than exports are tried for: nothing of the time may count.
    let body = json!({ "id": ids[0] });
    let view = service
        .post("/lp/export?timeout=3", &token(&destination.url), &body)
        .json();
    assert_eq!(view["state"], "Pending");
    assert_eq!(view["last_error"]["kind"], "paused");
    assert!(view.get("next_attempt_in").is_none(), "{view}");
    assert!(destination.arrivals().is_empty());

    let resumed = act(&service, "resume", &json!({ "subject": "all" }));
    assert!(
        resumed["done"].as_str().unwrap().contains("1000 exports"),
        "{resumed}"
    );
    for (number, id) in ids.iter().enumerate() {
        let arrival = destination.arrival();
        assert_eq!(arrival.header("webhook-id"), Some(id.as_str()));
        assert_eq!(arrival.text(), payload(number).to_string());
    }
    for id in &ids {
        assert_eq!(service.result(&destination.url, id)["status_code"], 200);
    }
    let events = events(&service);
    assert!(!events.contains(&"given up".to_owned()));
    assert_eq!(events.first().map(String::as_str), Some("pause"));
}

#[test]
fn what_failed_before_a_pause_is_tried_at_once_after_it_and_has_all_its_time_again() {
    let (url, address) = nowhere();
    let service = Service::start(&["--give-up-after", "3s"]);
    let id = service.submit(&url, &payload(1));
    service.event("failed", |_| true);
    act(&service, "pause", &json!({ "subject": url }));
    // Past the time at which it would have been given up.
    let view = state_as(&service, "", &url, &id, 4);
    assert_eq!(view["state"], "Pending", "{view}");
    let service = service.kill_and_restart();
    act(&service, "resume", &json!({ "subject": url }));
    service.event("failed", |_| true);
    let destination = Destination::start_at(address, |_| ok());
    assert_eq!(service.result(&url, &id)["status_code"], 200);
    assert_eq!(destination.arrivals().len(), 1);
}

#[test]
fn pausing_one_sender_holds_no_other_ones_exports_to_the_same_destination() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let first = submit_as(&service, "sleep", url, &payload(1));
    assert_eq!(
        state_as(&service, "sleep", url, first["id"].as_str().unwrap(), 10)["state"],
        "Finished"
    );
    act(&service, "pause", &json!({ "subject": "sleep" }));
    let held = submit_as(&service, "sleep", url, &payload(2));
    let free = submit_as(&service, "run", url, &payload(3));
    let free = state_as(&service, "run", url, free["id"].as_str().unwrap(), 10);
    assert_eq!(free["ext_response"]["status_code"], 200);
    let held = held["id"].as_str().unwrap();
    assert_eq!(
        state_as(&service, "sleep", url, held, 0)["state"],
        "Pending"
    );
    assert_eq!(destination.arrivals().len(), 2);
    act(&service, "resume", &json!({ "subject": "sleep" }));
    assert_eq!(
        state_as(&service, "sleep", url, held, 10)["state"],
        "Finished"
    );
}

#[test]
fn pausing_one_address_holds_no_other_apps_exports_where_tokens_do_not_tell_them_apart() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    act(&service, "pause", &json!({ "subject": "who:127.0.0.2" }));
    let body = json!({ "uri": destination.url, "data": payload(1) }).to_string();
    let submit_from = |from: [u8; 4], timeout: u32| {
        let path = format!("/lp/export?timeout={timeout}");
        let token = token(&destination.url);
        let mut stream = service.connect_from(from);
        let headers = [("X-Api-Key", token.as_str())];
        let request = Service::written("POST", &path, &headers, body.as_bytes());
        stream.write_all(&request).unwrap();
        Response::read(stream).json()
    };
    // Answered at once, with what holds it up: an app with one loop must not fall behind.
    let held = submit_from([127, 0, 0, 2], 60);
    assert_eq!(held["last_error"]["kind"], "paused", "{held}");
    let free = submit_from([127, 0, 0, 3], 60);
    assert_eq!(free["state"], "Finished");
    assert_eq!(destination.arrivals().len(), 1);
}

#[test]
fn a_pause_with_an_end_ends_by_itself_after_a_restart_too() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let paused = act(&service, "pause", &json!({ "subject": "all", "for": "4s" }));
    assert!(
        paused["done"].as_str().unwrap().contains("until 20"),
        "{paused}"
    );
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(
        state_as(&service, "", &destination.url, &id, 0)["state"],
        "Pending"
    );
    let service = service.kill_and_restart();
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
    assert_eq!(&events(&service)[..2], ["pause", "resume"]);
    let (status, ..) = refused(&service, "resume", &json!({ "subject": "all" }));
    assert_eq!(status, 404);
}

#[test]
fn a_destination_that_two_pauses_hold_is_sent_to_after_both() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    act(&service, "pause", &json!({ "subject": "all" }));
    act(&service, "pause", &json!({ "subject": destination.url }));
    let id = service.submit(&destination.url, &payload(1));
    let resumed = act(&service, "resume", &json!({ "subject": "all" }));
    assert!(
        resumed["done"]
            .as_str()
            .unwrap()
            .contains("paused: destination:"),
        "{resumed}"
    );
    assert_eq!(
        state_as(&service, "", &destination.url, &id, 1)["state"],
        "Pending"
    );
    let (status, _, message) = refused(&service, "resume", &json!({ "subject": "all" }));
    assert_eq!(status, 404);
    assert!(message.contains("destination:"), "{message}");
    act(&service, "resume", &json!({ "subject": destination.url }));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
}

#[test]
fn an_attempt_under_way_ends_as_usual_when_its_destination_is_paused() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let ids = [1, 2].map(|number| service.submit(&destination.url, &payload(number)));
    destination.arrival();
    act(&service, "pause", &json!({ "subject": destination.url }));
    gate.open();
    assert_eq!(
        service.result(&destination.url, &ids[0])["status_code"],
        200
    );
    assert_eq!(
        state_as(&service, "", &destination.url, &ids[1], 1)["state"],
        "Pending"
    );
    assert!(destination.arrivals().is_empty());
}

#[test]
fn cancelling_answers_a_long_poll_and_what_is_cancelled_never_arrives() {
    let (url, address) = nowhere();
    let service = Service::start(&[]);
    let ids = [1, 2].map(|number| service.submit(&url, &payload(number)));
    service.event("failed", |_| true);
    let result = thread::scope(|scope| {
        let poll = scope.spawn(|| service.result(&url, &ids[1]));
        // It may not be parked yet, and is answered all the same.
        act(&service, "cancel", &json!({ "id": ids[1] }));
        poll.join().unwrap()
    });
    assert_eq!(result["status_code"], 403);
    assert_eq!(result["error"]["kind"], "cancelled");
    assert_eq!(
        result["error"]["message"],
        "cancelled by the owner of this box"
    );
    let (status, ..) = refused(&service, "cancel", &json!({ "id": ids[1] }));
    assert_eq!(status, 409);
    let destination = Destination::start_at(address, |_| ok());
    act(&service, "retry", &json!({ "id": ids[0] }));
    assert_eq!(service.result(&url, &ids[0])["status_code"], 200);
    assert_eq!(destination.arrivals().len(), 1);
    let rows = rows(&service);
    let cancelled: Vec<_> = rows
        .iter()
        .filter(|[event, ..]| event == "cancel")
        .collect();
    assert_eq!(cancelled.len(), 1);
    assert_eq!(cancelled[0][3], "cancelled");
    let unknown = json!({ "id": Uuid::now_v7().to_string() });
    assert_eq!(refused(&service, "cancel", &unknown).0, 404);
}

#[test]
fn an_export_that_is_being_sent_is_not_cancelled_and_the_owner_is_told() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let ids = [1, 2, 3].map(|number| service.submit(&destination.url, &payload(number)));
    destination.arrival();
    let (status, code, message) = refused(&service, "cancel", &json!({ "id": ids[0] }));
    assert_eq!((status, code.as_str()), (409, "conflict"));
    assert_eq!(message, "it is being sent now");
    let cancelled = act(
        &service,
        "cancel",
        &json!({ "destination": destination.url }),
    );
    let done = cancelled["done"].as_str().unwrap();
    assert!(
        done.contains("2 exports") && done.contains("1 export left"),
        "{done}"
    );
    gate.open();
    assert_eq!(
        service.result(&destination.url, &ids[0])["status_code"],
        200
    );
    for id in &ids[1..] {
        assert_eq!(
            service.result(&destination.url, id)["error"]["kind"],
            "cancelled"
        );
    }
    assert!(destination.arrivals().is_empty());
}

#[test]
fn cancelling_a_thousand_exports_keeps_no_submission_waiting_and_leaves_other_queues_alone() {
    let (url, _) = nowhere();
    let other = Destination::start(|_| ok());
    let service = Service::start(&[]);
    act(&service, "pause", &json!({ "subject": "all" }));
    for number in 0..1000 {
        service.submit(&url, &payload(number));
    }
    let kept = service.submit(&other.url, &payload(1));
    let late = thread::scope(|scope| {
        let cancel = scope.spawn(|| act(&service, "cancel", &json!({ "destination": url })));
        let late = service.submit(&other.url, &payload(2));
        let done = cancel.join().unwrap();
        assert!(
            done["done"].as_str().unwrap().contains("1000 exports"),
            "{done}"
        );
        late
    });
    act(&service, "resume", &json!({ "subject": "all" }));
    for id in [kept, late] {
        assert_eq!(service.result(&other.url, &id)["status_code"], 200);
    }
    let (status, ..) = refused(&service, "cancel", &json!({ "destination": url }));
    assert_eq!(status, 404);
    let count = events(&service)
        .iter()
        .filter(|event| *event == "cancel")
        .count();
    assert_eq!(count, 1000);
}

#[test]
fn acts_while_exports_are_sent_lose_nothing_and_finish_each_export_once() {
    let arrived = Arc::new(AtomicUsize::new(0));
    let counted = arrived.clone();
    let destination =
        Destination::start(move |_| match counted.fetch_add(1, Ordering::Relaxed) % 7 {
            3 => Reaction::Answer(503, Vec::new()),
            5 => Reaction::Raw(Vec::new()),
            _ => ok(),
        });
    let service = Service::start(&["--retry-on", "503"]);
    let url = &destination.url;
    let mut ids = Vec::new();
    for round in 0..12 {
        for number in 0..20 {
            ids.push(service.submit(url, &payload(round * 100 + number)));
        }
        match round % 4 {
            0 => drop(act(&service, "pause", &json!({ "subject": url }))),
            1 => drop(act(&service, "resume", &json!({ "subject": url }))),
            2 => drop(ask(
                &service,
                "POST",
                "/api/cancel",
                &json!({ "destination": url }).to_string(),
            )),
            _ => drop(ask(
                &service,
                "POST",
                "/api/retry",
                &json!({ "destination": url }).to_string(),
            )),
        }
    }
    let deadline = Instant::now() + PATIENCE;
    let mut cancelled = 0;
    for id in &ids {
        ask(
            &service,
            "POST",
            "/api/retry",
            &json!({ "destination": url }).to_string(),
        );
        let result = service.result(url, id);
        assert!(Instant::now() < deadline);
        match result["status_code"].as_u64().unwrap() {
            200 => {}
            403 => cancelled += 1,
            other => panic!("{other}"),
        }
    }
    let arrivals = destination.arrivals();
    let delivered = ids.len() - cancelled;
    let arrived = |id: &String| {
        arrivals
            .iter()
            .any(|arrival| arrival.header("webhook-id") == Some(id))
    };
    assert!(ids.iter().filter(|id| arrived(id)).count() >= delivered);
    // Nothing is left, in memory or in the store.
    let (status, ..) = refused(&service, "retry", &json!({ "destination": url }));
    assert_eq!(status, 404);
    let rows = rows(&service);
    let count = |event: &str, outcome: &str| {
        rows.iter()
            .filter(|row| row[0] == event && row[3] == outcome)
            .count()
    };
    assert_eq!(count("cancel", "cancelled"), cancelled);
    assert_eq!(count("attempt", "200"), delivered);
}

#[test]
fn an_act_that_was_answered_survives_a_kill() {
    let (url, address) = nowhere();
    let service = Service::start(&[]);
    let ids = [1, 2].map(|number| service.submit(&url, &payload(number)));
    service.event("failed", |_| true);
    act(&service, "cancel", &json!({ "id": ids[0] }));
    let service = service.kill_and_restart();
    assert_eq!(service.result(&url, &ids[0])["error"]["kind"], "cancelled");
    // Both a sender and a host are called so.
    let (status, ..) = refused(&service, "pause", &json!({ "subject": "127.0.0.1" }));
    assert_eq!(status, 409);
    act(&service, "pause", &json!({ "subject": "who:127.0.0.1" }));
    let service = service.kill_and_restart();
    let destination = Destination::start_at(address, |_| ok());
    assert_eq!(state_as(&service, "", &url, &ids[1], 2)["state"], "Pending");
    act(&service, "resume", &json!({ "subject": "127.0.0.1" }));
    let service = service.kill_and_restart();
    assert_eq!(service.result(&url, &ids[1])["status_code"], 200);
    let arrivals = destination.arrivals();
    assert!(
        arrivals
            .iter()
            .all(|arrival| arrival.header("webhook-id") == Some(&ids[1]))
    );
}

#[test]
fn what_waits_is_shown_with_its_url_and_then_leaves() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    act(&service, "pause", &json!({ "subject": "all" }));
    let url = format!("{}?key=s3cret", destination.url);
    let id = service.submit(&url, &payload(7));
    let shown = run(&service, &["show", &id]);
    assert_eq!(shown.status.code(), Some(0), "{}", text(&shown.stderr));
    assert_eq!(text(&shown.stdout), payload(7).to_string());
    assert!(text(&shown.stderr).contains(&format!("POST {url}")));
    act(&service, "resume", &json!({ "subject": "all" }));
    assert_eq!(service.result(&url, &id)["status_code"], 200);
    let (status, _, message) = refused(&service, "show", &json!({ "id": id }));
    assert_eq!(status, 409);
    assert!(
        !message.contains("s3cret") && !message.contains(MARK),
        "{message}"
    );
    assert!(events(&service).contains(&"show".to_owned()));
    for row in rows(&service) {
        assert!(!row.concat().contains("s3cret"), "{row:?}");
    }
}

#[test]
fn what_is_forgotten_is_gone_and_what_others_did_stays() {
    let destination = Destination::start(|_| ok());
    let (dead, _) = nowhere();
    let service = Service::start(&[]);
    let url = &destination.url;
    let finished = |owner: &str| {
        let id = submit_as(&service, owner, url, &payload(1))["id"]
            .as_str()
            .unwrap()
            .to_owned();
        assert_eq!(state_as(&service, owner, url, &id, 10)["state"], "Finished");
        id
    };
    let (mine, others) = (finished("sleep"), finished("run"));
    let waiting = submit_as(&service, "sleep", &dead, &payload(2))["id"]
        .as_str()
        .unwrap()
        .to_owned();
    act(
        &service,
        "label",
        &json!({ "who": "sleep", "label": "sleep app" }),
    );
    let forgotten = act(&service, "forget", &json!({ "who": "sleep app" }));
    let done = forgotten["done"].as_str().unwrap();
    assert!(
        done.contains("1 export cancelled") && done.contains("1 results deleted"),
        "{done}"
    );
    for (id, url) in [(&mine, url), (&waiting, &dead)] {
        let response = service.post("/export", &token_of("sleep", url), &json!({ "id": id }));
        assert_eq!(response.status, 404, "{}", response.body);
    }
    assert_eq!(
        state_as(&service, "run", url, &others, 0)["state"],
        "Finished"
    );
    let rows = rows(&service);
    assert!(rows.iter().all(|[_, who, ..]| who != "sleep"), "{rows:?}");
    assert!(rows.iter().any(|[_, who, ..]| who == "run"));
    assert_eq!(
        refused(&service, "pause", &json!({ "subject": "sleep app" })).0,
        404
    );
}

#[test]
fn a_sender_can_be_meant_by_its_label_which_no_other_may_have() {
    let (url, _) = nowhere();
    let service = Service::start(&[]);
    submit_as(&service, "abc123", &url, &payload(1));
    submit_as(&service, "run", &url, &payload(1));
    act(
        &service,
        "label",
        &json!({ "who": "abc123", "label": "sleep app" }),
    );
    for label in ["sleep app", "abc123"] {
        let (status, ..) = refused(&service, "label", &json!({ "who": "run", "label": label }));
        assert_eq!(status, 409, "{label}");
    }
    // As a subject, these would mean something else.
    for label in [
        "two\nlines",
        "all",
        "who:abc123",
        "host:a.example",
        "http://a.example/x",
    ] {
        let bad = json!({ "who": "run", "label": label });
        assert_eq!(refused(&service, "label", &bad).0, 400, "{label}");
    }
    let paused = act(&service, "pause", &json!({ "subject": "sleep app" }));
    assert!(
        paused["done"]
            .as_str()
            .unwrap()
            .starts_with("abc123 is paused"),
        "{paused}"
    );
    act(&service, "label", &json!({ "who": "abc123", "label": "" }));
    assert_eq!(
        refused(&service, "pause", &json!({ "subject": "sleep app" })).0,
        404
    );
}

#[test]
fn acts_that_make_no_sense_change_nothing_and_say_what_to_send() {
    let service = Service::start(&[]);
    for (name, body, status) in [
        ("pause", "", 400),
        ("pause", "{\"subject\":\"\"}", 400),
        ("pause", "{\"subject\":\"nobody\"}", 404),
        ("pause", "{\"subject\":\"all\",\"for\":\"soon\"}", 400),
        ("resume", "{\"subject\":\"all\"}", 404),
        ("retry", "{\"destination\":\"nobody.example\"}", 404),
        ("cancel", "{\"destination\":\"all\"}", 400),
        ("forget", "{\"destination\":\"all\"}", 400),
        (
            "forget",
            "{\"destination\":\"ftp://a.example/s3cret\"}",
            400,
        ),
        ("seen", "{\"destination\":\"a.example\"}", 404),
        ("show", "{\"id\":\"1\"}", 400),
        ("vanish", "{}", 404),
    ] {
        let response = ask(&service, "POST", &format!("/api/{name}"), body);
        assert_eq!(response.status, status, "{name} {body}: {}", response.body);
        assert!(!response.body.contains("s3cret"));
    }
    let response = ask(&service, "GET", "/api/pause", "");
    assert_eq!(
        (response.status, response.header("allow")),
        (405, Some("POST"))
    );
    assert!(events(&service).is_empty());
}

#[test]
fn resuming_an_empty_name_ends_no_pause() {
    let service = Service::start(&[]);
    act(&service, "pause", &json!({ "subject": "all" }));
    for empty in ["", " "] {
        let (status, code, message) = refused(&service, "resume", &json!({ "subject": empty }));
        assert_eq!((status, code.as_str()), (400, "malformed"), "{message}");
    }
    let status = ask(&service, "GET", "/api/status", "").json();
    assert_eq!(status["state"], "paused");
}

#[test]
fn the_commands_say_what_they_did_and_exit_0_1_or_2() {
    let destination = Destination::start(|_| ok());
    let mut service = Service::start(&[]);
    let done = run(&service, &["pause", "--for", "2h"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    assert!(text(&done.stdout).starts_with("everything is paused until 20"));
    let id = service.submit(&destination.url, &payload(1));
    let done = run(&service, &["retry", &id]);
    assert_eq!(done.status.code(), Some(1));
    assert!(
        text(&done.stderr).contains("resume"),
        "{}",
        text(&done.stderr)
    );
    assert_eq!(
        run(&service, &["pause", "--for", "soon"]).status.code(),
        Some(2)
    );
    assert_eq!(run(&service, &["cancel", &id]).status.code(), Some(0));
    assert_eq!(
        run(&service, &["label", "127.0.0.1", "sleep app"])
            .status
            .code(),
        Some(0)
    );
    assert_eq!(
        run(&service, &["seen", &destination.url]).status.code(),
        Some(0)
    );
    assert_eq!(run(&service, &["resume"]).status.code(), Some(0));
    assert_eq!(
        run(&service, &["forget", "sleep app"]).status.code(),
        Some(0)
    );
    assert!(destination.arrivals().is_empty());
    service.signal("TERM");
    service.ended();
    let done = run(&service, &["pause"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(
        text(&done.stderr).contains("is the service running"),
        "{}",
        text(&done.stderr)
    );
}

#[test]
fn a_stop_does_not_wait_for_acts_and_leaves_none_half_done() {
    let (url, _) = nowhere();
    let mut service = Service::start(&[]);
    act(&service, "pause", &json!({ "subject": "all" }));
    for number in 0..500 {
        service.submit(&url, &payload(number));
    }
    thread::scope(|scope| {
        let folder = &service;
        let cancel = scope.spawn(move || {
            let mut stream = UnixStream::connect(folder.folder().join("owner.sock")).unwrap();
            let body = json!({ "destination": url }).to_string();
            let length = body.len();
            let _ = write!(
                stream,
                "POST /api/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
                 Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            );
        });
        cancel.join().unwrap();
        service.signal("TERM");
    });
    assert!(service.ended().success());
    let store = Connection::open(service.folder().join("exports.db")).unwrap();
    let count = |sql| {
        store
            .query_row(sql, [], |row| row.get::<_, i64>(0))
            .unwrap()
    };
    let cancelled = count("SELECT count(*) FROM exports WHERE finished_at NOT NULL");
    let told = count("SELECT count(*) FROM ledger WHERE event = 'cancel'");
    assert_eq!(cancelled, told);
}

#[test]
fn the_status_tells_what_waits_why_and_what_is_paused() {
    let destination = Destination::start(|_| ok());
    let (dead, address) = nowhere();
    let service = Service::start(&["--give-up-after", "1h"]);
    let status = || ask(&service, "GET", "/api/status", "").json();
    let fresh = status();
    assert_eq!(fresh["state"], "sending");
    assert_eq!(
        (&fresh["waiting"], &fresh["queues"]),
        (&json!(0), &json!([]))
    );

    act(
        &service,
        "pause",
        &json!({ "subject": "who:run", "for": "1h" }),
    );
    submit_as(&service, "run", &destination.url, &payload(1));
    let id = submit_as(&service, "sleep", &dead, &payload(2))["id"].clone();
    submit_as(&service, "sleep", &dead, &payload(3));
    act(
        &service,
        "label",
        &json!({ "who": "sleep", "label": "sleep app" }),
    );
    for _ in 0..2 {
        act(&service, "retry", &json!({ "destination": dead }));
    }
    service.events("failed", 3);
    let told = status();
    assert_eq!(told["state"], "sending");
    assert_eq!(
        (&told["waiting"], &told["queues_total"]),
        (&json!(3), &json!(2))
    );
    let bytes: usize = (1..=3)
        .map(|number| payload(number).to_string().len())
        .sum();
    assert_eq!(told["waiting_bytes"], json!(bytes));
    let [failing, held] = &told["queues"].as_array().unwrap()[..] else {
        panic!("{told}");
    };
    assert_eq!(
        (&failing["who"], &failing["label"]),
        (&json!("sleep"), &json!("sleep app"))
    );
    assert_eq!(
        (&failing["waiting"], &failing["state"]),
        (&json!(2), &json!("failing"))
    );
    assert_eq!(failing["reason"]["kind"], "connect");
    assert_eq!(failing["oldest_id"], id);
    let name = failing["destination"].as_str().unwrap();
    assert!(name.starts_with(&format!("http://{address} #")), "{name}");
    assert!(failing["next_attempt_in"].as_f64().unwrap() < 60.0);
    let give_up_in = failing["give_up_in"].as_f64().unwrap();
    assert!((3_000.0..=3_600.0).contains(&give_up_in), "{give_up_in}");
    assert_eq!(
        (&held["who"], &held["state"]),
        (&json!("run"), &json!("paused"))
    );
    assert!(held.get("next_attempt_in").is_none() && held.get("give_up_in").is_none());
    assert_eq!(told["pauses"][0]["subject"], "who:run");
    assert!(told["pauses"][0]["until"].is_i64());
    let attention = told["attention"].to_string();
    assert!(
        attention.contains("2 exports of sleep app cannot be sent to"),
        "{attention}"
    );
    let printed = run(&service, &["status"]);
    assert_eq!(printed.status.code(), Some(1));
    assert!(
        text(&printed.stdout).contains("sleep app (sleep)"),
        "{}",
        text(&printed.stdout)
    );

    act(&service, "pause", &json!({ "subject": "all" }));
    assert_eq!(status()["state"], "paused");
    let metrics = ask(&service, "GET", "/metrics", "").body;
    assert!(metrics.contains("\nexport_service_paused 1\n"), "{metrics}");
    assert!(metrics.contains("\nexport_service_queues{state=\"paused\"} 2\n"));
    assert!(metrics.contains(&format!("\nexport_service_pending_bytes {bytes}\n")));
}

#[test]
fn a_destination_is_new_until_the_owner_says_to_know_it() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    service.result(&destination.url, &id);
    let new = || ask(&service, "GET", "/api/status", "").json()["new_destinations"].clone();
    let name = new()[0].as_str().unwrap().to_owned();
    let done = act(&service, "seen", &json!({ "destination": name }));
    assert!(done["done"].as_str().unwrap().starts_with(&name), "{done}");
    assert_eq!(new(), json!([]));
    let other = format!("{}?other", destination.url);
    service.result(&other, &service.submit(&other, &payload(2)));
    assert_eq!(new().as_array().unwrap().len(), 1);
}

#[test]
fn each_act_that_was_carried_out_is_one_line_of_the_log() {
    let mut service = Service::start(&[]);
    act(
        &service,
        "pause",
        &json!({ "subject": "https://a.example/MARK-payload" }),
    );
    refused(&service, "resume", &json!({ "subject": "all" }));
    act(
        &service,
        "label",
        &json!({ "who": "who:run", "label": "sleep app" }),
    );
    service.signal("TERM");
    service.ended();
    let log = service.log();
    let lines = log
        .iter()
        .filter(|line| line.contains("the owner") && !line.contains("token"));
    let acts: Vec<Value> = lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let told: Vec<_> = acts
        .iter()
        .map(|line| (&line["event"], &line["act"]))
        .collect();
    let event = json!("the owner acts");
    assert_eq!(told, [(&event, &json!("pause")), (&event, &json!("label"))]);
}
