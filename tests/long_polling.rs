//! Long polls: contract section 1, "Long polling".

mod support;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Destination, Response, Service, ok, payload, token};

fn long_poll(service: &Service, url: &str, id: &str, timeout: &str) -> TcpStream {
    let body = json!({"id": id}).to_string();
    let path = format!("/lp/export?timeout={timeout}");
    // As client libraries do, keeping the connection.
    let headers = [("X-Api-Key", &*token(url)), ("Connection", "keep-alive")];
    service.send("POST", &path, &headers, body.as_bytes())
}

#[test]
fn one_request_can_submit_and_bring_the_result() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let body = json!({"id": null, "uri": destination.url, "data": payload(1)});
    let response = service.post("/lp/export", &token(&destination.url), &body);
    assert_eq!(response.json()["state"], "Finished", "{}", response.body);
}

#[test]
fn a_long_poll_answers_with_the_state_of_then_when_its_time_is_over() {
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
fn a_client_that_leaves_costs_nothing_once_its_time_is_over() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    destination.arrival();
    let (threads, before) = (service.figure("Threads"), descriptors(&service));
    for _ in 0..40 {
        drop(long_poll(&service, url, &id, "1"));
    }
    // The last one to be parked is answered last.
    Response::read(long_poll(&service, url, &id, "1.2"));
    let deadline = Instant::now() + support::PATIENCE;
    // A few links to tiny_http stay open, each with a thread and three descriptors; the others
    // go when nobody has used them for a while.
    while service.figure("Threads") > threads + LINKS || descriptors(&service) > before + 3 * LINKS
    {
        let left = (service.figure("Threads"), descriptors(&service));
        assert!(Instant::now() < deadline, "{left:?} of {threads}, {before}");
        std::thread::sleep(Duration::from_millis(50));
    }
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

/// How many links to tiny_http are kept.
const LINKS: u64 = 8;

fn descriptors(service: &Service) -> u64 {
    std::fs::read_dir(format!("/proc/{}/fd", service.pid()))
        .unwrap()
        .count() as u64
}
