//! Delivery over a bad internet: contract section 4, "When an attempt fails" and "Where a POST
//! may go".

mod support;

use std::collections::HashMap;
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use export_service::delivery::addresses::Rules;
use export_service::delivery::attempt::{Client, Kind, Outcome, Settings};
use export_service::delivery::connect::LookUp;
use export_service::delivery::tls::Trust;
use export_service::dial::{Late, LookUpError};
use serde_json::{Value, json};
use support::{
    Destination, Gate, PATIENCE, Reaction, Response, Service, nowhere, ok, payload, python, root,
    token, token_of,
};

/// A destination that accepts connections and requests and never answers.
fn hanging() -> Destination {
    Destination::start(|_| {
        loop {
            thread::park();
        }
    })
}

fn poll(service: &Service, url: &str, id: &str) -> Value {
    service
        .post("/export", &token(url), &json!({ "id": id }))
        .json()
}

#[test]
fn a_destination_that_was_down_gets_its_exports_in_order_once_it_is_up() {
    let (url, address) = nowhere();
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..20)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    service.event("failed", |line| {
        line["id"] == ids[0].as_str() && line["attempt"] == 2
    });
    let destination = Destination::start_at(address, |_| ok());
    for id in &ids {
        assert_eq!(service.result(&url, id)["status_code"], 200);
        assert_eq!(
            destination.arrival().header("webhook-id"),
            Some(id.as_str())
        );
    }
}

#[test]
fn a_pending_export_says_why_it_waits_and_for_how_long() {
    let (url, _) = nowhere();
    let service = Service::start(&[]);
    let first = service.submit(&url, &payload(1));
    let second = service.submit(&url, &payload(2));
    service.event("failed", |line| line["attempt"] == 2);
    let waiting = poll(&service, &url, &first);
    assert_eq!(waiting["state"], "Pending");
    assert_eq!(waiting["ext_response"], json!({}));
    assert_eq!(waiting["attempts"], 2);
    assert_eq!(waiting["last_error"]["kind"], "connect");
    let message = waiting["last_error"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("connection refused by 127.0.0.1:"),
        "{message}"
    );
    let wait = waiting["next_attempt_in"].as_f64().unwrap();
    assert!(wait <= 2.4, "{wait}");
    // The one behind it was not tried, and waits for the same reason.
    let behind = poll(&service, &url, &second);
    assert_eq!(
        (&behind["attempts"], &behind["last_error"]),
        (&json!(0), &waiting["last_error"])
    );
}

#[test]
fn five_thousand_exports_to_a_dead_destination_cost_a_handful_of_attempts() {
    let (url, address) = nowhere();
    let started = Instant::now();
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..5_000)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    service.event("failed", |line| line["attempt"] == 4);
    let attempts = service
        .log()
        .iter()
        .filter(|line| line.contains("\"event\":\"failed\""))
        .count();
    // The waits double from 0.8 s at least, however long the submissions took.
    let possible = (started.elapsed().as_secs_f64() / 0.8 + 1.0).log2() + 1.0;
    assert!(attempts as f64 <= possible, "{attempts}");
    let destination = Destination::start_at(address, |_| ok());
    assert_eq!(
        service.result(&url, ids.last().unwrap())["status_code"],
        200
    );
    let arrivals = destination.arrivals();
    let arrived: Vec<_> = arrivals
        .iter()
        .map(|arrival| arrival.header("webhook-id").unwrap())
        .collect();
    assert!(arrived == ids, "in order, each once");
}

#[test]
fn an_export_is_given_up_in_time_with_the_reason_and_all_its_attempts() {
    let (url, _) = nowhere();
    let service = Service::start(&["--give-up-after", "5s"]);
    let first = service.submit(&url, &payload(1));
    service.reports(2);
    let service = service.kill_and_restart();
    // It is not retried at once or from the start: both the wait and the count go on.
    let again = service.event("failed", |_| true);
    assert_eq!(again["attempt"], 3);
    let second = service.submit(&url, &payload(2));
    let result = service.result(&url, &first);
    assert_eq!(result["status"], "502 Bad Gateway");
    assert_eq!(result["error"]["kind"], "connect");
    assert!(
        result["error"]["attempts"].as_u64().unwrap() >= 3,
        "{result}"
    );
    // An export accepted later is given up later, whether it had an attempt or not.
    let result = service.result(&url, &second);
    assert_eq!(result["error"]["kind"], "connect");
}

#[test]
fn restarts_do_not_reset_how_long_exports_have_been_tried() {
    let (url, _) = nowhere();
    let mut service = Service::start(&["--give-up-after", "10s"]);
    let id = service.submit(&url, &payload(1));
    // Attempts at 0, 1, 3 and 7 s of running time, each in a run of its own.
    for _ in 0..4 {
        service.reports(1);
        service = service.kill_and_restart();
    }
    let result = service.result(&url, &id);
    assert_eq!(result["error"]["kind"], "connect");
    // A fifth attempt would come at 15 s.
    assert_eq!(result["error"]["attempts"], 4, "{result}");
}

#[test]
fn an_export_behind_others_that_are_delivered_is_not_given_up() {
    let destination = Destination::start(|_| {
        thread::sleep(Duration::from_millis(300));
        ok()
    });
    let url = &destination.url;
    let service = Service::start(&["--give-up-after", "500ms"]);
    let ids: Vec<_> = (0..12)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    // It is not given up in a run that begins after all of that time either.
    service.event("delivered", |line| line["id"] == ids[5].as_str());
    let service = service.kill_and_restart();
    for id in &ids {
        let result = service.result(url, id);
        assert_eq!(result["status_code"], 200, "{result}");
    }
}

#[test]
fn a_payload_that_is_always_refused_delays_no_other_and_is_given_up() {
    let destination = Destination::start(|arrival| match arrival.text() {
        r#"{"bad":1}"# => Reaction::Answer(500, b"no".to_vec()),
        _ => ok(),
    });
    let service = Service::start(&["--retry-on", "500,503", "--give-up-after", "6s"]);
    let url = &destination.url;
    let bad = service.submit(url, &json!({"bad": 1}));
    let good: Vec<_> = (0..5)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    for id in &good {
        assert_eq!(service.result(url, id)["status_code"], 200);
    }
    let waiting = poll(&service, url, &bad);
    assert_eq!(waiting["last_error"]["kind"], "status", "{waiting}");
    let result = service.result(url, &bad);
    assert_eq!(
        (&result["status_code"], &result["error"]["kind"]),
        (&json!(502), &json!("status"))
    );
}

#[test]
fn a_status_that_is_about_the_whole_destination_keeps_the_order() {
    let answers = AtomicUsize::new(0);
    let destination = Destination::start(move |_| match answers.fetch_add(1, Ordering::Relaxed) {
        0 => Reaction::Answer(503, Vec::new()),
        1 => Reaction::Answer(429, Vec::new()),
        _ => ok(),
    });
    let service = Service::start(&["--retry-on", "429,503"]);
    let url = &destination.url;
    let ids: Vec<_> = (0..3)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    for id in [&ids[0], &ids[0], &ids[0], &ids[1], &ids[2]] {
        assert_eq!(
            destination.arrival().header("webhook-id"),
            Some(id.as_str())
        );
    }
}

#[test]
fn a_name_that_resolves_to_a_forbidden_address_for_a_while_loses_no_export() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    std::fs::write(&hosts, "192.168.1.1 box.example\n").unwrap();
    let service = Service::start_with_hosts(&hosts, &[]);
    let destination = Destination::start(|_| ok());
    for scheme in ["http", "https"] {
        // For https it stays wrong, since the look-up is remembered for some seconds.
        let port = destination.url.split([':', '/']).nth(4).unwrap();
        let url = format!("{scheme}://box.example:{port}/in");
        let ids: Vec<_> = (0..20)
            .map(|number| service.submit(&url, &payload(number)))
            .collect();
        service.event("failed", |line| {
            let again = line["attempt"].as_u64() >= Some(2);
            line["id"] == ids[0].as_str() && again && line["kind"] == "forbidden_address"
        });
        let waiting = poll(&service, &url, &ids[19]);
        assert_eq!(waiting["state"], "Pending");
        assert_eq!(waiting["last_error"]["kind"], "forbidden_address");
        if scheme == "https" {
            continue;
        }
        std::fs::write(&hosts, "127.0.0.1 box.example\n").unwrap();
        for id in &ids {
            assert_eq!(service.result(&url, id)["status_code"], 200);
            assert_eq!(
                destination.arrival().header("webhook-id"),
                Some(id.as_str())
            );
        }
        std::fs::write(&hosts, "192.168.1.1 box.example\n").unwrap();
    }
}

#[test]
fn an_export_whose_answer_is_not_http_is_retried_behind_the_others() {
    let answers = AtomicUsize::new(0);
    let gate = Gate::default();
    let passing = gate.clone();
    let destination = Destination::start(move |_| match answers.fetch_add(1, Ordering::Relaxed) {
        0 => {
            passing.pass();
            Reaction::Raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n".to_vec())
        }
        _ => ok(),
    });
    let service = Service::start(&[]);
    let url = &destination.url;
    let ids: Vec<_> = (0..2)
        .map(|number| service.submit(url, &payload(number)))
        .collect();
    gate.open();
    let failed = service.event("failed", |_| true);
    assert_eq!(failed["kind"], "protocol", "{failed}");
    for id in [&ids[0], &ids[1], &ids[0]] {
        assert_eq!(
            destination.arrival().header("webhook-id"),
            Some(id.as_str())
        );
    }
    assert_eq!(service.result(url, &ids[0])["status_code"], 200);
}

#[test]
fn if_no_network_is_allowed_plain_http_fails_at_once_whatever_the_name_resolves_to() {
    let service = Service::start_bare(&[]);
    for host in ["localhost", "no-such-host.invalid", "10.0.0.1"] {
        let url = format!("http://{host}/in");
        let id = service.submit(&url, &payload(1));
        let result = service.result(&url, &id);
        assert_eq!(result["status_code"], 403, "{result}");
        let message = result["error"]["message"].as_str().unwrap();
        assert!(message.contains("--allow-network"), "{message}");
    }
    // Over TLS another address of the same name could work.
    let url = "https://localhost/in";
    let id = service.submit(url, &payload(1));
    service.event("failed", |line| {
        line["id"] == id.as_str() && line["attempt"] == 2
    });
    let waiting = poll(&service, url, &id);
    assert_eq!(
        (&waiting["state"], &waiting["last_error"]["kind"]),
        (&json!("Pending"), &json!("forbidden_address"))
    );
}

#[test]
fn a_lost_payload_does_not_end_the_backoff_of_its_queue() {
    let (url, _) = nowhere();
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..3)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    service.reports(3);
    let database = service.folder().join("exports.db");
    let id: uuid::Uuid = ids[0].parse().unwrap();
    let service = service.kill_and_restart_after(|| {
        rusqlite::Connection::open(&database)
            .unwrap()
            .execute("UPDATE exports SET payload = NULL WHERE id = ?", [id])
            .unwrap();
    });
    let result = service.result(&url, &ids[0]);
    assert_eq!(result["error"]["kind"], "lost", "{result}");
    let failed = service.event("failed", |line| line["id"] == ids[1].as_str());
    assert_eq!(failed["attempt"], 1);
    // The fourth wait in a row is 8 s; after a success it would be 1 s.
    let waiting = loop {
        let waiting = poll(&service, &url, &ids[1]);
        if waiting["state"] == "Pending" && waiting["attempts"] == 1 {
            break waiting;
        }
    };
    let wait = waiting["next_attempt_in"].as_f64().unwrap();
    assert!(wait > 2.0, "{waiting}");
}

#[test]
fn a_restart_does_not_end_a_backoff() {
    let (url, _) = nowhere();
    let service = Service::start(&[]);
    let id = service.submit(&url, &payload(1));
    service.reports(3);
    let service = service.kill_and_restart();
    let waiting = poll(&service, &url, &id);
    assert_eq!(waiting["attempts"], 3);
    assert!(
        waiting["next_attempt_in"].as_f64().unwrap() > 1.0,
        "{waiting}"
    );
    assert_eq!(
        service
            .log()
            .iter()
            .filter(|line| line.contains("\"attempt\""))
            .count(),
        0
    );
}

#[test]
fn after_two_days_off_everything_that_waits_is_delivered() {
    let (url, address) = nowhere();
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..20)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    service.reports(1);
    let database = service.folder().join("exports.db");
    let mut destination = None;
    let service = service.kill_and_restart_after(|| {
        // As if all of that was 48 hours ago and the destination is back.
        let changed = rusqlite::Connection::open(&database)
            .unwrap()
            .execute(
                "UPDATE exports SET accepted_at = accepted_at - 172800000",
                [],
            )
            .unwrap();
        assert_eq!(changed, ids.len());
        destination = Some(Destination::start_at(address, |_| ok()));
    });
    for id in &ids {
        let result = service.result(&url, id);
        assert_eq!(result["status_code"], 200, "{result}");
    }
    assert!(destination.unwrap().arrivals().len() >= ids.len());
}

#[test]
fn the_order_of_a_queue_is_the_same_after_a_restart() {
    let (url, address) = nowhere();
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..3)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    service.event("failed", |line| line["kind"] == "connect");
    // The first goes behind the third, then the second behind the first.
    let breaking = Destination::start_at(address, |_| Reaction::Raw(Vec::new()));
    for id in &ids[..2] {
        assert_eq!(breaking.arrival().header("webhook-id"), Some(id.as_str()));
        service.event("failed", |line| {
            line["id"] == id.as_str() && line["kind"] == "closed"
        });
    }
    let failed = service
        .log()
        .iter()
        .filter(|line| line.contains("\"failed\""))
        .count();
    service.reports(failed as u64);
    let service = service.kill_and_restart();
    for id in [&ids[2], &ids[0], &ids[1]] {
        assert_eq!(breaking.arrival().header("webhook-id"), Some(id.as_str()));
        service.event("failed", |line| line["id"] == id.as_str());
    }
}

#[test]
fn an_export_that_breaks_its_connection_goes_behind_the_others_of_its_queue() {
    let destination = Destination::start(|arrival| match arrival.text() {
        r#"{"bad":1}"# => Reaction::Raw(Vec::new()),
        _ => ok(),
    });
    let service = Service::start(&["--give-up-after", "4s"]);
    let url = &destination.url;
    let bad = service.submit(url, &json!({"bad": 1}));
    let good = service.submit(url, &json!({"good": 1}));
    assert_eq!(service.result(url, &good)["status_code"], 200);
    let result = service.result(url, &bad);
    assert_eq!(
        (&result["status_code"], &result["error"]["kind"]),
        (&json!(502), &json!("closed"))
    );
}

#[test]
fn a_status_to_retry_is_retried_after_the_wait_it_asks_for() {
    let answers = AtomicUsize::new(0);
    let destination = Destination::start(move |_| match answers.fetch_add(1, Ordering::Relaxed) {
        0 => Reaction::Raw(
            b"HTTP/1.1 503 No\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n".to_vec(),
        ),
        1 => Reaction::Answer(429, b"slower".to_vec()),
        _ => ok(),
    });
    let service = Service::start(&["--retry-on", "429,503"]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    destination.arrival();
    let first = Instant::now();
    let failed = service.event("failed", |line| line["id"] == id.as_str());
    assert_eq!(
        (&failed["kind"], &failed["status"]),
        (&"status".into(), &503.into())
    );
    let waiting = loop {
        let waiting = poll(&service, url, &id);
        if waiting["state"] == "Pending" {
            break waiting;
        }
    };
    assert_eq!(waiting["last_error"]["kind"], "status");
    assert!(
        waiting["last_error"]["message"]
            .as_str()
            .unwrap()
            .contains("503 Service Unavailable")
    );
    destination.arrival();
    assert!(
        first.elapsed() >= Duration::from_millis(1_900),
        "Retry-After was not respected"
    );
    assert_eq!(service.result(url, &id)["status_code"], 200);
    let delivered = service.event("delivered", |_| true);
    assert_eq!(
        (&delivered["status"], &delivered["attempt"]),
        (&200.into(), &3.into())
    );

    // By default a 503 is an answer like any other.
    let destination = Destination::start(|_| Reaction::Answer(503, b"no".to_vec()));
    let service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 503);
}

#[test]
fn a_hanging_destination_with_a_long_backlog_delays_no_other_app() {
    let hanging = hanging();
    let healthy = Destination::start(|_| ok());
    let service = Service::start(&["--attempt-timeout", "30s"]);
    for number in 0..5_000 {
        service.submit(&hanging.url, &payload(number));
    }
    hanging.arrival();
    let mut longest = Duration::ZERO;
    for number in 0..5 {
        let started = Instant::now();
        let id = service.submit(&healthy.url, &payload(number));
        assert_eq!(service.result(&healthy.url, &id)["status_code"], 200);
        longest = longest.max(started.elapsed());
    }
    eprintln!(
        "beside 5,000 exports to a hanging destination: {longest:?} at most; {} threads, {} kB resident",
        service.figure("Threads"),
        service.figure("VmRSS"),
    );
    // Waiting for the hanging one would take half a minute.
    assert!(longest < Duration::from_secs(10));
}

#[test]
fn thirty_hanging_apps_do_not_delay_the_next_and_take_at_most_one_thread_each() {
    let healthy = Destination::start(|_| ok());
    let service = Service::start(&["--attempt-timeout", "20s", "--give-up-after", "10s"]);
    assert_eq!(service.threads("worker"), 1);
    let hanging: Vec<_> = (0..30).map(|_| hanging()).collect();
    let ids: Vec<_> = hanging
        .iter()
        .map(|one| service.submit(&one.url, &payload(1)))
        .collect();
    let started = Instant::now();
    let id = service.submit(&healthy.url, &payload(2));
    assert_eq!(service.result(&healthy.url, &id)["status_code"], 200);
    eprintln!(
        "the 31st app's export took {:?}; {} threads, {} of the worker, {} kB resident",
        started.elapsed(),
        service.figure("Threads"),
        service.threads("worker"),
        service.figure("VmRSS"),
    );
    // One by one would take ten minutes. The limit allows for a busy machine.
    assert!(started.elapsed() < Duration::from_secs(15));
    assert!(service.threads("worker") <= 32);
    for (one, id) in hanging.iter().zip(&ids) {
        let result = service.result(&one.url, id);
        assert_eq!(
            (&result["status_code"], &result["error"]["kind"]),
            (&json!(504), &json!("timeout"))
        );
    }
    // The follower ends after ten seconds.
    let deadline = Instant::now() + PATIENCE;
    while service.threads("worker") > 1 {
        assert!(
            Instant::now() < deadline,
            "{} workers",
            service.threads("worker")
        );
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn at_the_limit_of_attempts_the_first_thread_that_is_free_takes_the_next() {
    let hanging: Vec<_> = (0..2).map(|_| hanging()).collect();
    let slow = Destination::start(|_| {
        thread::sleep(Duration::from_millis(500));
        ok()
    });
    let healthy = Destination::start(|_| ok());
    let service = Service::start(&["--attempt-timeout", "20s", "--max-concurrent-attempts", "3"]);
    // Two hang, and the slow one is under way: no thread can take the next attempt until the slow one's is
    // free.
    service.submit(&hanging[0].url, &payload(1));
    hanging[0].arrival();
    let first = service.submit(&slow.url, &payload(2));
    slow.arrival();
    service.submit(&hanging[1].url, &payload(3));
    hanging[1].arrival();
    let started = Instant::now();
    assert_eq!(service.result(&slow.url, &first)["status_code"], 200);
    let id = service.submit(&healthy.url, &payload(4));
    assert_eq!(service.result(&healthy.url, &id)["status_code"], 200);
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn with_one_attempt_at_a_time_each_hanging_queue_costs_one_timeout() {
    let hanging: Vec<_> = (0..2).map(|_| hanging()).collect();
    let healthy = Destination::start(|_| ok());
    // With the setting's former name, whose value was one less.
    let service = Service::start(&["--attempt-timeout", "1s", "--max-relieved", "0"]);
    for one in &hanging {
        service.submit(&one.url, &payload(1));
    }
    let started = Instant::now();
    let id = service.submit(&healthy.url, &payload(2));
    assert_eq!(service.result(&healthy.url, &id)["status_code"], 200);
    eprintln!(
        "behind two hanging queues, one thread: {:?}",
        started.elapsed()
    );
    assert!(
        started.elapsed() > Duration::from_secs(1),
        "one after another"
    );
    assert_eq!(service.threads("worker"), 1);
    // The log is written by its own thread, in order.
    service.event("delivered", |_| true);
    let attempts = service
        .log()
        .iter()
        .filter(|line| line.contains("\"attempt\":1"))
        .count();
    assert_eq!(
        attempts, 3,
        "each queue has had one attempt before anyone had another"
    );
}

#[test]
fn distant_destinations_are_served_concurrently_and_each_in_order() {
    // How many are answering at the same time, and the most of them that ever were.
    static BUSY: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    let destinations: Vec<_> = (0..20)
        .map(|_| {
            Destination::start(|_| {
                MOST.fetch_max(BUSY.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(200));
                BUSY.fetch_sub(1, Ordering::SeqCst);
                ok()
            })
        })
        .collect();
    let service = Service::start(&[]);
    let mut submitted: HashMap<&str, Vec<String>> = HashMap::new();
    for number in 0..500 {
        let url = destinations[number % 20].url.as_str();
        submitted
            .entry(url)
            .or_default()
            .push(service.submit(url, &payload(number)));
    }
    for one in &destinations {
        let ids = &submitted[one.url.as_str()];
        assert_eq!(
            service.result(&one.url, ids.last().unwrap())["status_code"],
            200
        );
        let arrivals = one.arrivals();
        let arrived: Vec<_> = arrivals
            .iter()
            .map(|arrival| arrival.header("webhook-id").unwrap())
            .collect();
        assert!(arrived == *ids, "in order, each once");
    }
    let most = MOST.load(Ordering::SeqCst);
    assert!(most >= 10, "at most {most} of 20 at a time");
}

#[test]
fn hostile_answers_cost_no_memory_and_the_next_export_works() {
    let repeat = |head: &'static str, piece: Vec<u8>, times: usize, pause: Duration| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/in", listener.local_addr().unwrap());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let piece = piece.clone();
                thread::spawn(move || {
                    let mut sent = stream.write_all(head.as_bytes());
                    for _ in 0..times {
                        sent = sent.and_then(|()| stream.write_all(&piece));
                        if sent.is_err() {
                            return;
                        }
                        thread::sleep(pause);
                    }
                });
            }
        });
        url
    };
    let megabyte = vec![b'x'; 1024 * 1024];
    let large_head = [&[b'y'; 20_000][..], b"\r\nContent-Length: 0\r\n\r\n"].concat();
    let none = Duration::ZERO;
    let close = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    let gzip = "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n";
    let cases = [
        (
            "50 MB",
            repeat(close, megabyte.clone(), 50, none),
            "200 OK",
            None,
        ),
        (
            "gzip bomb",
            repeat(gzip, megabyte.clone(), 50, none),
            "200 OK",
            None,
        ),
        (
            "a large head",
            repeat("HTTP/1.1 200 OK\r\nX: ", large_head, 1, none),
            "200 OK",
            None,
        ),
        (
            "endless header",
            repeat("HTTP/1.1 200 OK\r\nX: ", megabyte.clone(), 50, none),
            "200 OK",
            None,
        ),
        (
            "endless headers",
            repeat("HTTP/1.1 200 OK\r\n", b"X: y\r\n".repeat(20_000), 50, none),
            "200 OK",
            None,
        ),
        (
            "one byte a second",
            repeat(
                "HTTP/1.1 200 OK\r\nX: ",
                b"y".to_vec(),
                60,
                Duration::from_secs(1),
            ),
            "200 OK",
            None,
        ),
        (
            "a body of one byte a second",
            repeat(close, b"x".to_vec(), 60, Duration::from_secs(1)),
            "200 OK",
            None,
        ),
        (
            "garbage",
            repeat("\u{1}\u{2}garbage\r\n\r\n", megabyte, 50, none),
            "502 Bad Gateway",
            Some("protocol"),
        ),
        (
            "closed before the request",
            closing(false),
            "502 Bad Gateway",
            Some("closed"),
        ),
        (
            "closed after the request",
            closing(true),
            "502 Bad Gateway",
            Some("closed"),
        ),
    ];
    let service = Service::start(&["--attempt-timeout", "2s", "--give-up-after", "1s"]);
    let healthy = Destination::start(|_| ok());
    for (what, url, status, kind) in cases {
        let id = service.submit(&url, &payload(1));
        let result = service.result(&url, &id);
        assert_eq!(result["status"], status, "{what}: {result:.300}");
        assert_eq!(result["error"]["kind"].as_str(), kind, "{what}");
        let id = service.submit(&healthy.url, &payload(2));
        assert_eq!(
            service.result(&healthy.url, &id)["status_code"],
            200,
            "after {what}"
        );
    }
    let peak = service.figure("VmHWM");
    eprintln!("hostile answers: {peak} kB resident at the most");
    assert!(peak < 30_000, "{peak} kB");
}

#[test]
fn an_answer_sent_before_the_whole_request_was_read_counts() {
    use std::io::Read;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1000]);
            let _ = stream.write_all(b"HTTP/1.1 413 X\r\nContent-Length: 3\r\n\r\nbig");
            // Closed with most of the request unread, which resets the connection.
        }
    });
    let service = Service::start(&["--give-up-after", "1s"]);
    let large = json!({ "text": support::MARK, "more": "x".repeat(900_000) });
    for _ in 0..20 {
        let id = service.submit(&url, &large);
        let result = service.result(&url, &id);
        assert_eq!(
            (&result["status_code"], &result["body"]),
            (&json!(413), &json!("big"))
        );
    }
}

/// A destination that closes each connection at once, or after it has read something.
fn closing(after_reading: bool) -> String {
    use std::io::Read;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            if after_reading {
                let _ = stream.unwrap().read(&mut [0; 10]);
            }
        }
    });
    url
}

#[test]
fn private_addresses_are_refused_in_every_spelling_and_nothing_is_sent() {
    let inside = Destination::start(|_| ok());
    let port = inside.url.split([':', '/']).nth(4).unwrap().to_owned();
    // The default arguments allow this machine; later ones add to them.
    let service = Service::start_bare(&["--give-up-after", "200ms"]);
    for host in [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:7f00:0001]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "0.0.0.0",
        "0",
        "[::]",
        "10.0.0.5",
        "192.168.1.1",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00::1]",
    ] {
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{host}:{port}/in");
            let id = service.submit(&url, &payload(1));
            let result = service.result(&url, &id);
            assert_eq!(result["status"], "403 Forbidden", "{url}: {result}");
            assert_eq!(result["error"]["kind"], "forbidden_address", "{url}");
        }
    }
    // The system's look-up decides what these resolve to; if to this machine, nothing is sent.
    for host in ["LOCALHOST", "localhost.", "127.0.0.1.", "xn--lcalhost-1ya"] {
        let url = format!("http://{host}:{port}/in");
        let id = service.submit(&url, &payload(1));
        let status = service.result(&url, &id)["status_code"].clone();
        assert!(status == 403 || status == 502, "{url}: {status}");
    }
    let url = "http://10.0.0.5/in";
    let id = service.submit(url, &payload(1));
    let message = service.result(url, &id)["error"]["message"].clone();
    assert_eq!(
        message,
        "nothing is sent to 10.0.0.5: 10.0.0.5 is in your home network; start with \
         --allow-network 10.0.0.5/32 to permit it"
    );
    // Plain http to a public address is refused before anything is dialled.
    let id = service.submit("http://93.184.215.14/in", &payload(1));
    let result = service.result("http://93.184.215.14/in", &id);
    assert_eq!(
        (&result["status_code"], &result["error"]["kind"]),
        (&json!(403), &json!("forbidden_http"))
    );
    assert!(inside.arrivals().is_empty());
}

#[test]
fn if_no_thread_can_be_started_for_a_look_up_the_export_waits_and_the_service_goes_on() {
    let Some(mut service) = Service::start_with_threads(60) else {
        return;
    };
    let destination = Destination::start(|_| ok());
    let url = destination.url.replace("127.0.0.1", "localhost");
    // This connection has its threads already.
    let mut stream = service.connect_from([127, 0, 0, 1]);
    let keep = ("Connection", "keep-alive");
    stream
        .write_all(&Service::written("GET", "/status", &[keep], b""))
        .unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    assert_eq!(Response::next(&mut reader).status, 200);
    service.limit_threads(1);
    let token = token(&url);
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    let headers = [keep, ("X-Api-Key", &token)];
    stream
        .write_all(&Service::written(
            "POST",
            "/export",
            &headers,
            body.as_bytes(),
        ))
        .unwrap();
    let id = Response::next(&mut reader).json()["id"].clone();
    let failed = service.event("failed", |_| true);
    assert_eq!(failed["kind"], "dns", "{failed}");
    service.limit_threads(60);
    let result = service.result(&url, id.as_str().unwrap());
    assert_eq!(result["status_code"], 200, "{result}");
    assert!(service.is_running());
}

#[test]
fn the_service_is_no_destination_even_in_an_allowed_network() {
    let service = Service::start(&[]);
    for host in ["127.0.0.1", "localhost", "127.0.0.2"] {
        let url = format!("http://{host}:{}/status", service.address.port());
        let id = service.submit(&url, &payload(1));
        // An address behind a name may change, so that export is retried.
        let error = if host == "localhost" {
            service.event("failed", |line| line["id"] == id.as_str());
            loop {
                let waiting = poll(&service, &url, &id);
                if waiting["state"] == "Pending" {
                    break waiting["last_error"].clone();
                }
            }
        } else {
            service.result(&url, &id)["error"].clone()
        };
        assert_eq!(error["kind"], "forbidden_address", "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("this service itself"), "{message}");
    }
}

/// Gives one address at the first look-up and another ever after.
#[derive(Debug)]
struct Rebinding {
    first: SocketAddr,
    then: SocketAddr,
    lookups: AtomicUsize,
}

impl LookUp for Rebinding {
    fn look_up(&self, _: &str, _: u16, _: Instant) -> Result<Vec<SocketAddr>, LookUpError> {
        let first = self.lookups.fetch_add(1, Ordering::Relaxed) == 0;
        Ok(vec![if first { self.first } else { self.then }])
    }

    fn late(&self, _: &str, _: u16, _: Instant) -> Late {
        Late::All(Vec::new())
    }
}

#[test]
fn a_name_that_changes_its_address_is_checked_again_and_only_checked_addresses_are_dialled() {
    // Here 127.0.0.2 plays a public address, and 127.0.0.1 a private one.
    let (_, home) = nowhere();
    let inside = Destination::start_at(home, |_| ok());
    // Nobody else uses that address, so its port is free.
    let public = SocketAddr::from(([127, 0, 0, 2], home.port()));
    let outside = Destination::start_at(public, |_| {
        Reaction::Raw(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok".to_vec(),
        )
    });
    let settings = Settings {
        timeout: Duration::from_secs(5),
        max_response: 100,
        rules: Rules {
            allowed: vec!["127.0.0.2/32".parse().unwrap()],
            own_ports: vec![1],
        },
        trust: Trust::new(None).unwrap(),
        signing_key: None,
    };
    let names = Rebinding {
        first: public,
        then: home,
        lookups: AtomicUsize::new(0),
    };
    let client = Client::with_names(settings, names);
    let url = format!("http://rebinding.example:{}/in", public.port());
    let destination = export_service::destination::Destination::parse(&url).unwrap();
    let id = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
    assert!(
        matches!(client.post(id, &destination, b"{}"), Outcome::Answered(answer) if answer.status == 200)
    );
    let Outcome::Failed(failure) = client.post(id, &destination, b"{}") else {
        panic!("it was sent")
    };
    assert_eq!(failure.kind, Kind::ForbiddenAddress);
    assert_eq!((outside.arrivals().len(), inside.arrivals().len()), (1, 0));
}

#[test]
fn signed_exports_verify_with_the_library_of_standard_webhooks() {
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMARK";
    let attempts = AtomicUsize::new(0);
    let seen = std::sync::Arc::new(Mutex::new(Vec::new()));
    let heard = seen.clone();
    let destination = Destination::start(move |arrival| {
        heard.lock().unwrap().push(arrival.clone());
        match attempts.fetch_add(1, Ordering::Relaxed) {
            0 => Reaction::Answer(503, Vec::new()),
            _ => ok(),
        }
    });
    let service = Service::start(&["--signing-secret", secret, "--retry-on", "503"]);
    let id = service.submit(&destination.url, &json!({"text": "grün", "n": 1.0}));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 2);
    for arrival in seen.iter() {
        let headers: Value = ["webhook-id", "webhook-timestamp", "webhook-signature"]
            .map(|name| (name.to_owned(), json!(arrival.header(name).unwrap())))
            .into_iter()
            .collect::<serde_json::Map<_, _>>()
            .into();
        let verify = |payload: &str| {
            python()
                .arg(root().join("tests/peers/webhook.py"))
                .args([secret, &headers.to_string(), payload])
                .output()
                .unwrap()
        };
        let output = verify(arrival.text());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(
            !verify(&arrival.text().replace("1.0", "2.0"))
                .status
                .success()
        );
    }
    assert!(service.log().iter().all(|line| !line.contains("MfKQ9r8")));
}

#[test]
fn a_queue_with_too_many_unfinished_exports_gets_429_and_others_go_on() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&["--max-pending", "3"]);
    let url = &destination.url;
    let other = Destination::start(|_| ok());
    let submit_to = |owner: &str, url: &str, key: &str| {
        let body = json!({"uri": url, "data": payload(1)}).to_string();
        let token = token_of(owner, url);
        let headers = [("X-Api-Key", token.as_str()), ("Idempotency-Key", key)];
        service.request("POST", "/export", &headers, body.as_bytes())
    };
    let submit = |owner: &str, key: &str| submit_to(owner, url, key);
    let first = submit("me", "1").json();
    assert_eq!(submit("me", "2").status, 200);
    assert_eq!(submit("me", "3").status, 200);
    let refused = submit("me", "4");
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (429, "too_many_pending")
    );
    assert!(refused.header("retry-after").is_some());
    assert_eq!(
        submit("me", "1").json()["id"],
        first["id"],
        "a repeat takes no room"
    );
    let message = refused.json()["error"]["message"].clone();
    assert!(message.as_str().unwrap().contains("to this destination"));
    assert_eq!(submit("you", "1").status, 200);
    // A real arbiter gives all apps the same identifier.
    for key in ["4", "5", "6", "7"] {
        assert_eq!(submit_to("me", &other.url, key).status, 200);
        other.arrival();
    }
    gate.open();
    let id = first["id"].as_str().unwrap();
    let done = || {
        let response = service.post("/lp/export", &token_of("me", url), &json!({ "id": id }));
        response.json()["state"] == "Finished"
    };
    while !done() {}
    assert_eq!(submit("me", "5").status, 200);
}

#[test]
fn a_submission_to_a_full_store_gets_503_and_is_not_stored() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&["--max-store", "1000000"]);
    let url = &destination.url;
    let large = json!({ "text": support::MARK, "more": "x".repeat(200_000) });
    let submit = || service.post("/export", &token(url), &json!({"uri": url, "data": large}));
    let mut accepted = Vec::new();
    let refused = loop {
        let response = submit();
        if response.status != 200 {
            break response;
        }
        accepted.push(response.json()["id"].as_str().unwrap().to_owned());
    };
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (503, "store_full")
    );
    assert!(refused.header("retry-after").is_some());
    assert!(matches!(accepted.len(), 3 | 4), "{}", accepted.len());
    gate.open();
    for id in &accepted {
        assert_eq!(service.result(url, id)["status_code"], 200);
    }
    let again = submit();
    assert_eq!(again.status, 200, "there is room again");
    accepted.push(again.json()["id"].as_str().unwrap().to_owned());
    assert_eq!(
        service.result(url, accepted.last().unwrap())["status_code"],
        200
    );
    let database = service.folder().join("exports.db");
    let mut stored = 0;
    let service = service.kill_and_restart_after(|| {
        let database = rusqlite::Connection::open(database).unwrap();
        let mut rows = database.prepare("SELECT id FROM exports").unwrap();
        stored = rows.query_map([], |_| Ok(())).unwrap().count();
    });
    assert_eq!(stored, accepted.len());
    assert_eq!(service.event("starting", |_| true)["unfinished"], 0);
    assert_eq!(destination.arrivals().len(), accepted.len());
}

#[test]
fn a_burst_that_a_slow_disk_still_has_to_move_into_the_database_does_not_make_the_store_full() {
    let (destination, _gate) = Destination::held();
    let service = Service::start(&["--max-store", "24000000"]);
    let url = &destination.url;
    // The log of the latest writes goes on at full speed.
    let slow = "delay_enter=3000000";
    let database = Some("exports.db");
    let Some((mut strace, _lines)) = support::delay_syncs(&service, database, slow) else {
        return;
    };
    let large = json!({ "text": support::MARK, "more": "x".repeat(900_000) });
    let submit = || service.post("/export", &token(url), &json!({"uri": url, "data": large}));
    let accepted = (0..)
        .take_while(|_| {
            let response = submit();
            assert!(response.status == 200 || response.code() == "store_full");
            response.status == 200
        })
        .count();
    strace.kill().unwrap();
    strace.wait().unwrap();
    assert!(matches!(accepted, 23..=26), "{accepted}");
}

#[test]
fn results_do_not_fill_the_store_beyond_its_limit() {
    // Bytes that take six times their size as JSON.
    let destination = Destination::start(|_| Reaction::Answer(200, vec![1; 60_000]));
    let service = Service::start(&["--max-store", "1000000", "--max-body", "2000"]);
    let url = &destination.url;
    let mut last = Value::Null;
    for number in 0..30 {
        let body = json!({"uri": url, "data": payload(number)});
        let response = service.post("/lp/export", &token(url), &body);
        if response.status == 503 {
            assert_eq!(response.code(), "store_full");
            break;
        }
        last = response.json()["ext_response"].clone();
        assert_eq!(last["status_code"], 200);
    }
    assert_eq!(
        (&last["body"], &last["truncated"]),
        (&json!(""), &json!(true)),
        "no room for a body"
    );
    let size = std::fs::metadata(service.folder().join("exports.db"))
        .unwrap()
        .len();
    assert!(size < 1_200_000, "{size}");
}

#[test]
fn on_a_full_disk_submissions_get_503_nothing_is_lost_and_space_ends_it() {
    let (destination, gate) = Destination::held();
    let url = &destination.url;
    let Some(mut service) = Service::start_on_small_disk(8 * 1024 * 1024) else {
        return;
    };
    let large = json!({ "text": support::MARK, "more": "x".repeat(200_000) });
    let submit = |service: &Service| {
        service.post("/export", &token(url), &json!({"uri": url, "data": large}))
    };
    let mut accepted = Vec::new();
    let refused = loop {
        let response = submit(&service);
        if response.status != 200 {
            break response;
        }
        accepted.push(response.json()["id"].as_str().unwrap().to_owned());
        assert!(accepted.len() < 50, "the disk does not get full");
    };
    assert_eq!(
        (refused.status, refused.code().as_str()),
        (503, "disk_full")
    );
    assert!(refused.header("retry-after").is_some());
    assert!(!accepted.is_empty());
    // Now the result of one export waits for the disk, and the others have to wait for it.
    gate.open();
    service.event("delivered", |_| true);
    // The ballast plays another program's file on the disk.
    service.remove_ballast();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let response = submit(&service);
        if response.status == 200 {
            accepted.push(response.json()["id"].as_str().unwrap().to_owned());
            break;
        }
        assert!(Instant::now() < deadline, "{}", response.body);
        thread::sleep(Duration::from_millis(50));
    }
    for id in &accepted {
        assert_eq!(service.result(url, id)["status_code"], 200);
    }
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
}
