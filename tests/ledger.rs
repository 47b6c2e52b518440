//! What left the box is on record: README, "What left the box".

mod support;

use std::process::Output;

use rusqlite::Connection;
use serde_json::{Value, json};
use support::{Destination, Service, command, nowhere, ok, payload, token_of};

/// Runs `ledger` on a service's folder. Returns its exit code and its output.
fn ledger(service: &Service, arguments: &[&str]) -> (Option<i32>, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command()
        .arg("ledger")
        .args(arguments)
        .arg("--data-dir")
        .arg(service.folder())
        .output()
        .unwrap();
    let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    (status.code(), text)
}

fn rows(service: &Service, arguments: &[&str]) -> Vec<Value> {
    let (code, text) = ledger(service, &[&["--json"], arguments].concat());
    assert_eq!(code, Some(0), "{text}");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The ledger's file, past this program.
fn tamper(service: &Service, sql: &str) {
    let store = Connection::open(service.folder().join("exports.db")).unwrap();
    store.execute_batch(sql).unwrap();
}

#[test]
fn each_attempt_is_on_record_with_where_it_went_and_how_much() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..3)
        .map(|number| service.submit(&destination.url, &payload(number)))
        .collect();
    for id in &ids {
        service.result(&destination.url, id);
    }
    let found = rows(&service, &[]);
    let exports: Vec<_> = found
        .iter()
        .map(|row| row["export"].as_str().unwrap())
        .collect();
    assert_eq!(exports, ids);
    let arrivals = destination.arrivals();
    for (row, arrival) in found.iter().zip(&arrivals) {
        assert_eq!(row["event"], "attempt");
        assert_eq!(row["outcome"], "200");
        assert_eq!(row["attempt"], 1);
        assert_eq!(row["bytes_out"], arrival.body.len());
        let name = row["destination"].as_str().unwrap();
        let (origin, tag) = name.split_once(" #").unwrap();
        assert!(
            destination.url.starts_with(origin) && tag.len() == 4,
            "{name}"
        );
        assert!(destination.url.contains(row["address"].as_str().unwrap()));
    }
    // The same payload has the same digest, another one another.
    let again = service.submit(&destination.url, &payload(1));
    service.result(&destination.url, &again);
    let found = rows(&service, &["--id", &again]);
    let digests = rows(&service, &[]);
    assert_eq!(found.len(), 1);
    assert_eq!(digests[1]["digest"], found[0]["digest"]);
    assert_ne!(digests[0]["digest"], found[0]["digest"]);
    let (code, text) = ledger(&service, &["--verify"]);
    assert_eq!(code, Some(0), "{text}");
}

#[test]
fn an_attempt_that_failed_says_why_and_that_nothing_left() {
    let (url, _) = nowhere();
    let service = Service::start(&[]);
    service.submit(&url, &payload(1));
    service.reports(2);
    let found = rows(&service, &["--failed"]);
    assert_eq!(found[0]["outcome"], "connect");
    assert_eq!(found[0]["bytes_out"], 0);
    assert_eq!(found[1]["attempt"], 2);
    let (_, text) = ledger(&service, &["--failed"]);
    assert!(
        text.contains("connect") && text.contains("attempt 2"),
        "{text}"
    );
}

#[test]
fn neither_paths_nor_payloads_are_in_the_ledger() {
    let destination = Destination::start(|_| ok());
    let url = format!("{}/s3cret-path?key=s3cret-query", destination.url);
    let service = Service::start(&[]);
    let id = service.submit(&url, &json!({"pin": "s3cret-pin"}));
    service.result(&url, &id);
    for arguments in [&["--json"][..], &["--csv"], &[], &["--summary=destination"]] {
        let (code, text) = ledger(&service, arguments);
        assert_eq!(code, Some(0), "{text}");
        assert!(
            text.contains("127.0.0.1") && !text.contains("s3cret"),
            "{text}"
        );
    }
}

#[test]
fn a_sender_without_an_identifier_is_known_by_its_address() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let token = token_of("", &destination.url);
    let submitted = service.post(
        "/lp/export",
        &token,
        &json!({"uri": destination.url, "data": {}}),
    );
    assert_eq!(submitted.json()["state"], "Finished");
    assert_eq!(rows(&service, &["--who", "127.0.0.1"]).len(), 1);
    assert_eq!(rows(&service, &["--who", "me"]).len(), 0);
}

#[test]
fn refused_requests_are_counted_and_those_of_the_last_minute_are_written_at_the_stop() {
    let mut service = Service::start(&[]);
    for _ in 0..20 {
        let refused = service.post("/export", "no token", &json!({}));
        assert_eq!(refused.status, 401);
    }
    service.signal("TERM");
    assert!(service.ended().success());
    let found = rows(&service, &["--refused"]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["who"], "127.0.0.1");
    assert_eq!(found[0]["outcome"], "unauthorized");
    assert_eq!(found[0]["attempt"], 20);
}

#[test]
fn rows_survive_a_kill_and_the_chain_goes_on() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    service.result(&destination.url, &id);
    let (_, head) = ledger(&service, &["--head"]);
    let service = service.kill_and_restart();
    let id = service.submit(&destination.url, &payload(2));
    service.result(&destination.url, &id);
    let (code, text) = ledger(&service, &["--verify", "--head", head.trim()]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.starts_with("whole: 2 rows from 1 to 2"), "{text}");
}

#[test]
fn an_attempt_that_a_stop_cuts_off_is_on_record_as_what_may_have_left() {
    let (destination, held) = Destination::held();
    let mut service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    let arrival = destination.arrival();
    service.signal("TERM");
    assert!(service.ended().success());
    held.open();
    let found = rows(&service, &["--id", &id]);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["outcome"], "cut off");
    assert_eq!(found[0]["bytes_out"], arrival.body.len());
    assert_eq!(ledger(&service, &["--verify"]).0, Some(0));
}

#[test]
fn a_changed_a_removed_and_a_swapped_row_and_an_old_copy_are_found() {
    let destination = Destination::start(|_| ok());
    let mut service = Service::start(&[]);
    for number in 0..6 {
        let id = service.submit(&destination.url, &payload(number));
        service.result(&destination.url, &id);
    }
    service.signal("TERM");
    assert!(service.ended().success());
    let file = service.folder().join("exports.db");
    let whole = std::fs::read(&file).unwrap();
    let (_, head) = ledger(&service, &["--head"]);
    for (sql, broken) in [
        (
            "UPDATE ledger SET destination = 'a.example #0000' WHERE seq = 3",
            "row 3:",
        ),
        ("DELETE FROM ledger WHERE seq = 3", "row 3:"),
        (
            "UPDATE ledger SET seq = 0 WHERE seq = 3; UPDATE ledger SET seq = 3 WHERE seq = 4;
             UPDATE ledger SET seq = 4 WHERE seq = 0",
            "row 3:",
        ),
    ] {
        tamper(&service, sql);
        let (code, text) = ledger(&service, &["--verify"]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(broken), "{text}");
        std::fs::write(&file, &whole).unwrap();
    }
    // An old copy is whole in itself. Only a head that somebody has remembered shows that it is old.
    tamper(&service, "DELETE FROM ledger WHERE seq > 4");
    assert_eq!(ledger(&service, &["--verify"]).0, Some(0));
    let (code, text) = ledger(&service, &["--verify", "--head", head.trim()]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("older copy"), "{text}");
}

#[test]
fn days_senders_and_destinations_are_summed_up() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    for owner in ["sleep", "sleep", "steps"] {
        let token = token_of(owner, &destination.url);
        let body = json!({"uri": destination.url, "data": {}});
        assert_eq!(service.post("/lp/export", &token, &body).status, 200);
    }
    for by in ["day", "week", "who", "destination"] {
        let sums = rows(&service, &[&format!("--summary={by}")]);
        let exports: i64 = sums
            .iter()
            .map(|sum| sum["exports"].as_i64().unwrap())
            .sum();
        assert_eq!(exports, 3, "{by}");
    }
    let senders = rows(&service, &["--summary=who"]);
    assert_eq!(senders.len(), 2);
    let (_, text) = ledger(&service, &["--summary=who"]);
    assert!(
        text.contains("sleep") && text.contains("delivered"),
        "{text}"
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_what_to_do() {
    let service = Service::start(&[]);
    for (arguments, code, said) in [
        (&["--since", "soon"][..], 2, "--since soon: give a day"),
        (&["--id", "17"], 2, "--id 17"),
        (&["--verify", "--head", "17"], 2, "--head 17"),
        (&["--head", "1:00"], 2, "--head 1:00"),
        (&["--summary=month"], 2, "month"),
    ] {
        let (exit, text) = ledger(&service, arguments);
        assert_eq!(exit, Some(code), "{text}");
        assert!(text.contains(said), "{text}");
    }
    let nowhere = command()
        .args(["ledger", "--data-dir", "/nonexistent"])
        .output()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(4));
    let text = String::from_utf8(nowhere.stderr).unwrap();
    assert!(
        text.contains("/nonexistent/exports.db") && text.contains("--data-dir"),
        "{text}"
    );
}

#[test]
fn names_from_apps_cannot_change_what_a_terminal_shows() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let token = token_of("\u{1b}[2J\u{202e}evil\n=1+1", &destination.url);
    let body = json!({"uri": destination.url, "data": {}});
    assert_eq!(service.post("/lp/export", &token, &body).status, 200);
    let (_, text) = ledger(&service, &[]);
    assert!(text.contains("\\u{1b}[2J\\u{202e}evil\\u{a}=1+1"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_fresh_folder_has_an_empty_ledger_that_is_whole() {
    let service = Service::start(&[]);
    assert!(rows(&service, &[]).is_empty());
    assert_eq!(ledger(&service, &["--verify"]).0, Some(0));
}
