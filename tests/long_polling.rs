//! Long polls: contract section 1, "Long polling".

mod support;

use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Destination, Response, Service, ok, payload, token};

fn long_poll(service: &Service, url: &str, id: &str, timeout: &str) -> TcpStream {
    let body = json!({"id": id}).to_string();
    let path = format!("/lp/export?timeout={timeout}");
    // As client libraries do, keeping the connection: tiny_http keeps a thread for it then.
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
    // tiny_http lets an idle thread of its own go after five seconds.
    while service.figure("Threads") > threads || descriptors(&service) > before {
        assert!(
            Instant::now() < deadline,
            "{} threads",
            service.figure("Threads")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    gate.open();
    assert_eq!(service.result(url, &id)["status_code"], 200);
}

#[test]
fn five_hundred_long_polls_leave_the_pool_free() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let url = &destination.url;
    let ids: Vec<_> = (0..500)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    destination.arrival();
    let memory = service.figure("VmRSS");
    let mut polls = Vec::new();
    for id in &ids {
        polls.push((id, long_poll(&service, url, id, "60")));
        // One after another: tiny_http loses connections that come all at once.
        service.event("poll", |line| line["id"] == id.as_str());
    }
    eprintln!(
        "500 long polls held: {} threads, {} kB resident ({memory} kB before)",
        service.figure("Threads"),
        service.figure("VmRSS"),
    );

    let started = Instant::now();
    assert_eq!(service.request("GET", "/status", &[], b"").body, "active");
    eprintln!("/status meanwhile: {:?}", started.elapsed());
    let started = Instant::now();
    let last = service.submit(url, &payload(500));
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

fn descriptors(service: &Service) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", service.pid()))
        .unwrap()
        .count()
}
