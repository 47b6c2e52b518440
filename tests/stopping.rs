//! How the service ends: signals and panics.

mod support;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Destination, PATIENCE, Reaction, Response, Service, ok, payload, token};

#[test]
fn after_a_signal_parked_polls_are_answered_and_the_attempt_under_way_can_end() {
    for signal in ["TERM", "INT"] {
        let (destination, gate) = Destination::held();
        let mut service = Service::start(&[]);
        let url = &destination.url;
        let first = service.submit(url, &payload(1));
        destination.arrival();
        let second = service.submit(url, &payload(2));
        let body = json!({"id": first}).to_string();
        let headers = [("X-Api-Key", token(url))];
        let headers = headers
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let poll = service.send("POST", "/lp/export?timeout=60", &headers, body.as_bytes());
        service.event("poll", |_| true);

        service.signal(signal);
        assert_eq!(Response::read(poll).json()["state"], "Processing");
        gate.open();
        assert_eq!(service.ended().code(), Some(0));
        service.event("delivered", |line| line["id"] == first.as_str());

        let service = service.kill_and_restart();
        assert_eq!(service.event("starting", |_| true)["unfinished"], 1);
        assert_eq!(service.result(url, &first)["status_code"], 200);
        assert_eq!(service.result(url, &second)["status_code"], 200);
        assert_eq!(
            destination.arrivals().len(),
            1,
            "the first was not sent twice"
        );
    }
}

#[test]
fn a_request_that_is_incomplete_at_the_stop_gets_503_with_retry_after() {
    let mut service = Service::start(&[]);
    let whole = Service::written("GET", "/status", &[("Connection", "keep-alive")], b"");
    let submission = Service::written("POST", "/export", &[], &[b' '; 100_000]);
    // In its head, in a small body, in a large one.
    let streams = [30, 300, 90_000].map(|length: usize| {
        let mut stream = service.connect_from([127, 0, 0, 1]);
        stream.write_all(&whole).unwrap();
        let mut reader = std::io::BufReader::new(stream.try_clone().unwrap());
        assert_eq!(Response::next(&mut reader).status, 200);
        stream.write_all(&submission[..length]).unwrap();
        reader
    });
    service.signal("TERM");
    for mut stream in streams {
        let answer = Response::next(&mut stream);
        assert_eq!((answer.status, answer.code()), (503, "stopping".into()));
        assert!(answer.header("retry-after").is_some());
        let message = answer.json()["error"]["message"].to_string();
        assert!(message.contains("stopping"), "{message}");
    }
    assert_eq!(service.ended().code(), Some(0));
}

#[test]
fn a_crowd_that_connects_during_the_stop_does_not_make_it_fail() {
    for _ in 0..5 {
        let mut service = Service::start(&[]);
        thread::scope(|scope| {
            // Each needs its own inner connection, and those are opened one by one.
            for _ in 0..100 {
                scope.spawn(|| {
                    let request = Service::written("GET", "/status", &[], b"");
                    let stream = std::net::TcpStream::connect(service.address);
                    let _ = stream.and_then(|mut stream| {
                        stream.write_all(&request)?;
                        stream.read_to_end(&mut Vec::new())
                    });
                });
            }
            service.signal("TERM");
        });
        assert_eq!(service.ended().code(), Some(0));
    }
}

/// The next answer; `None` if the connection ends before its first byte.
fn answer(reader: &mut BufReader<TcpStream>) -> Option<Response> {
    match reader.fill_buf() {
        Ok([]) => None,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
        Ok(_) => Some(Response::next(reader)),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_stop_under_load_answers_started_requests_and_keeps_what_was_accepted() {
    let destination = Destination::start(|_| ok());
    let mut service = Service::start(&[]);
    let url = &destination.url;
    let token = token(url);
    let headers = [("X-Api-Key", token.as_str()), ("Connection", "keep-alive")];
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    let request = Service::written("POST", "/export", &headers, body.as_bytes());
    let (clients, busy) = (64, AtomicUsize::new(0));
    let outcomes: Vec<_> = thread::scope(|scope| {
        let submit_all = || {
            let stream = service.connect_from([127, 0, 0, 1]);
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut accepted = Vec::new();
            let last = loop {
                let answer = match (&stream).write_all(&request) {
                    Ok(()) => answer(&mut reader),
                    Err(_) => None,
                };
                match answer {
                    Some(answer) if answer.status == 200 => {
                        let id = answer.json()["id"].as_str().unwrap().to_owned();
                        accepted.push(id);
                        if accepted.len() == 5 {
                            busy.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    last => break last,
                }
            };
            (accepted, last)
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(submit_all)).collect();
        let deadline = Instant::now() + PATIENCE;
        while busy.load(Ordering::Relaxed) < clients.len() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        service.signal("TERM");
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    assert_eq!(service.ended().code(), Some(0));
    for (_, last) in &outcomes {
        if let Some(answer) = last {
            assert_eq!((answer.status, answer.code()), (503, "stopping".into()));
        }
    }
    let told = outcomes.iter().filter(|(_, last)| last.is_some()).count();
    let accepted: Vec<_> = outcomes.into_iter().flat_map(|(ids, _)| ids).collect();
    eprintln!(
        "{} accepted, and {told} of {clients} clients were told that it stops",
        accepted.len()
    );

    let service = service.kill_and_restart();
    let mut reader = BufReader::new(service.connect_from([127, 0, 0, 1]));
    for id in &accepted {
        let body = json!({ "id": id }).to_string();
        let poll = Service::written("POST", "/export", &headers, body.as_bytes());
        reader.get_mut().write_all(&poll).unwrap();
        assert_eq!(Response::next(&mut reader).status, 200, "{id}");
    }
    // They are delivered in order: nothing is left behind this one.
    let last = service.submit(url, &payload(2));
    service.result(url, &last);
    let delivered = destination.arrivals();
    let ids = delivered.iter().map(|arrival| arrival.header("webhook-id"));
    let answered: HashSet<_> = accepted
        .iter()
        .chain([&last])
        .map(|id| Some(&**id))
        .collect();
    let unanswered = ids.filter(|id| !answered.contains(id)).count();
    assert_eq!(unanswered, 0, "accepted, and their clients were not told");
}

#[test]
fn a_stop_ends_before_docker_kills_no_matter_what_hangs() {
    let (destination, gate) = Destination::held();
    let mut service = Service::start(&[]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    destination.arrival();
    let token = token(url);
    let headers = [("X-Api-Key", token.as_str())];
    let poll = json!({ "id": id }).to_string();
    let poll = service.send("POST", "/lp/export?timeout=60", &headers, poll.as_bytes());
    service.event("poll", |_| true);
    let half = Service::written("POST", "/export", &headers, &[b' '; 100_000]);
    let mut slow = service.connect_from([127, 0, 0, 1]);
    slow.write_all(&half[..50_000]).unwrap();
    // It reads none of its answers, which are large, so they fill the buffers between it and the service.
    let large = Destination::start(|_| Reaction::Answer(200, vec![b'x'; 60_000]));
    let finished = service.submit(&large.url, &payload(3));
    service.result(&large.url, &finished);
    let body = json!({ "id": finished }).to_string();
    let key = support::token(&large.url);
    let kept = [("X-Api-Key", key.as_str()), ("Connection", "keep-alive")];
    let request = Service::written("POST", "/export", &kept, body.as_bytes());
    let mut deaf = service.connect_from([127, 0, 0, 1]);
    deaf.set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    while deaf.write_all(&request.repeat(100)).is_ok() {}

    let delay = "delay_enter=30000000";
    let Some((mut strace, _lines)) = support::delay_syncs(&service, None, delay) else {
        return;
    };
    let body = json!({"uri": url, "data": payload(2)}).to_string();
    let submission = service.send("POST", "/export", &headers, body.as_bytes());

    let started = Instant::now();
    service.signal("TERM");
    assert_eq!(Response::read(poll).json()["state"], "Processing");
    assert_eq!(Response::read(slow).code(), "stopping");
    service.event("stopped", |_| true);
    let took = started.elapsed();
    eprintln!("stopped after {took:?}");
    // Docker kills after ten.
    assert!(took < Duration::from_secs(8), "{took:?}");
    // A process cannot end before its disk operation does.
    let _ = strace.kill();
    strace.wait().unwrap();
    assert_eq!(service.ended().code(), Some(0));
    let submitted = answer(&mut BufReader::new(submission));
    gate.open();
    let service = service.kill_and_restart();
    assert_eq!(service.result(url, &id)["status_code"], 200);
    match submitted {
        // Its commit was over in the moment between the end of strace and that of the process.
        Some(accepted) if accepted.status == 200 => {
            let id = accepted.json()["id"].as_str().unwrap().to_owned();
            assert_eq!(service.result(url, &id)["status_code"], 200);
        }
        Some(refused) => assert_eq!(refused.code(), "stopping"),
        None => {}
    }
}

#[test]
fn a_hanging_attempt_does_not_delay_the_stop_and_is_repeated() {
    let (destination, gate) = Destination::held();
    let mut service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    destination.arrival();
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
    gate.open();
    let service = service.kill_and_restart();
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
}

#[test]
fn a_second_signal_ends_the_service_at_once_and_loses_nothing() {
    let (destination, gate) = Destination::held();
    let mut service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    destination.arrival();
    service.signal("TERM");
    service.event("stopping", |_| true);
    // The attempt hangs, so the service is still there for the second one; it may take a moment
    // to listen for it.
    while service_is_running(&service) {
        service.signal("INT");
        thread::yield_now();
    }
    assert_eq!(service.ended().code(), Some(130));
    gate.open();
    let service = service.kill_and_restart();
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
}

/// Whether the process is there and not a zombie.
fn service_is_running(service: &Service) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.pid())).unwrap();
    !status.lines().any(|line| line.starts_with("State:\tZ"))
}

/// Not a test by itself: the one below runs it in a separate process, which it ends.
#[test]
#[ignore = "panics on purpose, in a process of its own"]
fn panics_in_two_threads() {
    export_service::logging::start(
        export_service::logging::Format::Text,
        log::LevelFilter::Trace,
        std::sync::Arc::default(),
    );
    export_service::threads::exit_on_panic(export_service::logging::flush);
    // A library's thread has no name, and its panic ends only itself.
    let _ = thread::spawn(|| panic!("in a library")).join();
    let quoted = "MARK-payload";
    export_service::threads::spawn("worker", move || panic!("over {quoted}"))
        .ends_within(support::PATIENCE);
    unreachable!("a panic in a thread of ours ends the process");
}

#[test]
fn a_panic_in_a_thread_of_ours_ends_the_process_and_reveals_nothing() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "panics_in_two_threads",
            "--nocapture",
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        output.status.code(),
        Some(export_service::threads::EXIT_PANIC),
        "{log}"
    );
    assert!(
        log.contains("a library's thread panicked") && log.contains("in a library"),
        "{log}"
    );
    assert!(log.contains("panic, leaving thread=worker"), "{log}");
    assert!(!log.contains("MARK-payload"), "{log}");
}
