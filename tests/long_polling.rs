//! Long polls: contract section 1, "Long polling".

mod support;

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Destination, PATIENCE, Response, Service, nowhere, ok, payload, token};

fn long_poll(service: &Service, url: &str, id: &str, timeout: &str) -> TcpStream {
    let body = json!({"id": id}).to_string();
    let path = format!("/lp/export?timeout={timeout}");
    // With keep-alive, as client libraries do.
    let headers = [("X-Api-Key", &*token(url)), ("Connection", "keep-alive")];
    service.send("POST", &path, &headers, body.as_bytes())
}

#[test]
fn one_request_can_submit_and_return_the_result() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let body = json!({"id": null, "uri": destination.url, "data": payload(1)});
    let response = service.post("/lp/export", &token(&destination.url), &body);
    assert_eq!(response.json()["state"], "Finished", "{}", response.body);
}

#[test]
fn a_long_poll_that_times_out_answers_with_the_state_at_that_moment() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let url = &destination.url;
    let body = json!({"uri": url, "data": payload(1)});
    let response = service
        .post("/lp/export?timeout=0", &token(url), &body)
        .json();
    assert_ne!(response["state"], "Finished");
    let id = response["id"].as_str().unwrap();
    destination.arrival();
    for timeout in ["0", "0.05"] {
        let response = Response::read(long_poll(&service, url, id, timeout)).json();
        assert_eq!(response["state"], "Processing");
        assert_eq!(response["ext_response"], json!({}));
    }
    gate.open();
    let response = Response::read(long_poll(&service, url, id, "60")).json();
    assert_eq!(response["state"], "Finished");
}

/// Submits with a long poll that would last longer than any test waits.
fn submit_and_wait(service: &Service, url: &str, key: &str) -> serde_json::Value {
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    let headers = [("X-Api-Key", &*token(url)), ("Idempotency-Key", key)];
    let path = "/lp/export?timeout=60";
    let stream = service.send("POST", path, &headers, body.as_bytes());
    // Half of its timeout.
    stream
        .set_read_timeout(Some(support::PATIENCE / 2))
        .unwrap();
    Response::read(stream).json()
}

#[test]
fn a_new_export_to_a_failing_queue_is_answered_at_once_with_the_reason() {
    let (url, address) = &nowhere();
    let service = Service::start(&[]);
    let first = service.submit(url, &payload(1));
    service.reports(1);
    let held_up = |answer: serde_json::Value| {
        assert_eq!(answer["state"], "Pending", "{answer}");
        assert_eq!(answer["attempts"], 0, "{answer}");
        assert_eq!(answer["last_error"]["kind"], "connect", "{answer}");
        assert!(answer["next_attempt_in"].is_number(), "{answer}");
        answer["id"].as_str().unwrap().to_owned()
    };
    let mut last = String::new();
    for number in 0..200 {
        last = held_up(submit_and_wait(&service, url, &number.to_string()));
    }
    // So is a repeat, and so are those after a restart.
    assert_eq!(held_up(submit_and_wait(&service, url, "199")), last);
    let service = service.kill_and_restart();
    held_up(submit_and_wait(&service, url, "200"));
    // Polls of what was submitted before wait.
    let poll = long_poll(&service, url, &first, "60");
    let last_poll = long_poll(&service, url, &last, "60");
    service.events("poll", 2);
    let _destination = Destination::start_at(*address, |_| ok());
    for poll in [poll, last_poll] {
        assert_eq!(Response::read(poll).json()["state"], "Finished");
    }
    // The queue goes on, so submissions wait for their results again.
    let answer = submit_and_wait(&service, url, "201");
    assert_eq!(answer["state"], "Finished", "{answer}");
}

#[test]
fn a_queue_whose_exports_were_all_given_up_still_says_why_it_waits() {
    let (url, address) = &nowhere();
    let service = Service::start(&["--give-up-after", "2s"]);
    let first = service.submit(url, &payload(1));
    // Attempts at 0 and 1 s; the next one would be at 3 s.
    let result = service.result(url, &first);
    assert_eq!(result["error"]["kind"], "connect");
    // What is submitted now is tried then, not sooner.
    let body = json!({"uri": url, "data": payload(2)});
    let answer = service.post("/lp/export?timeout=0.1", &token(url), &body);
    let answer = answer.json();
    assert_eq!(
        (&answer["state"], &answer["last_error"]["kind"]),
        (&json!("Pending"), &json!("connect")),
        "{answer}"
    );
    // It is first in its queue, and is tried before the long poll's timeout.
    let _destination = Destination::start_at(*address, |_| ok());
    let id = answer["id"].as_str().unwrap();
    let result = service.result(url, id);
    assert_eq!(result["status_code"], 200, "{result}");
}

#[test]
fn a_new_export_whose_turn_comes_soon_is_waited_for_although_its_queue_has_failed() {
    let (url, address) = &nowhere();
    let service = Service::start(&["--give-up-after", "700ms"]);
    let first = service.submit(url, &payload(1));
    assert_eq!(service.result(url, &first)["error"]["kind"], "connect");
    let _destination = Destination::start_at(*address, |_| ok());
    let answer = submit_and_wait(&service, url, "1");
    assert_eq!(answer["ext_response"]["status_code"], 200, "{answer}");
}

#[test]
fn every_long_poll_on_an_export_gets_the_answer() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    let polls: Vec<_> = (0..3)
        .map(|_| long_poll(&service, url, &id, "60"))
        .collect();
    service.events("poll", 3);
    gate.open();
    let answers: Vec<_> = polls
        .into_iter()
        .map(|poll| Response::read(poll).json())
        .collect();
    assert_eq!(answers[0]["state"], "Finished");
    assert!(answers.iter().all(|answer| *answer == answers[0]));
}

#[test]
fn a_client_that_leaves_a_long_poll_frees_everything_long_before_its_timeout() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&["--attempt-timeout", "10m"]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    destination.arrival();
    // The submission's own connection ends a moment after its answer.
    let submitted = Instant::now();
    while service.threads("connection") > 0 {
        assert!(submitted.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
    let (threads, before) = (service.threads("connection"), descriptors(&service));
    let polls: Vec<_> = (0..40)
        .map(|_| long_poll(&service, url, &id, "60"))
        .collect();
    service.events("poll", 40);
    assert_eq!(service.threads("connection"), threads + 40);
    let left = Instant::now();
    drop(polls);
    while service.threads("connection") > threads || descriptors(&service) > before {
        // Two seconds on a machine that is not busy.
        let now = (service.threads("connection"), descriptors(&service));
        assert!(left.elapsed() < Duration::from_secs(50), "{now:?}");
        thread::sleep(Duration::from_millis(20));
    }
    eprintln!("40 clients that left were gone after {:?}", left.elapsed());
    gate.open();
    assert_eq!(service.result(url, &id)["status_code"], 200);
}

#[test]
fn a_thousand_long_polls_leave_the_pool_free() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[
        "--max-connections",
        "1100",
        "--max-connections-per-peer",
        "1100",
    ]);
    let url = &destination.url;
    let ids: Vec<_> = (0..1000)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    destination.arrival();
    let memory = service.figure("VmRSS");
    let polls: Vec<_> = ids
        .iter()
        .map(|id| (id, long_poll(&service, url, id, "60")))
        .collect();
    service.events("poll", 1000);
    let resident = service.figure("VmRSS");
    eprintln!(
        "1,000 long polls held: {} threads, {resident} kB resident ({memory} kB before)",
        service.figure("Threads"),
    );
    // A debug build takes twice as much as a release.
    assert!(resident < 96_000, "{resident} kB");

    let started = Instant::now();
    assert_eq!(service.request("GET", "/status", &[], b"").body, "active");
    eprintln!("/status meanwhile: {:?}", started.elapsed());
    let started = Instant::now();
    let last = service.submit(url, &payload(1000));
    eprintln!("a submission meanwhile: {:?}", started.elapsed());

    gate.open();
    for (id, poll) in polls {
        let answer = Response::read(poll).json();
        assert_eq!(
            (&answer["id"], &answer["state"]),
            (&json!(id), &json!("Finished"))
        );
    }
    assert_eq!(service.result(url, &last)["status_code"], 200);
}

fn descriptors(service: &Service) -> u64 {
    std::fs::read_dir(format!("/proc/{}/fd", service.pid()))
        .unwrap()
        .count() as u64
}
