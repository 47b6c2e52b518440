//! Malicious clients: attacks that tiny_http alone would not survive, and crowds.

mod support;

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{
    Destination, Ends, Identity, PATIENCE, Reaction, Response, Service, ok, payload, python, token,
};

/// The most memory that the service may take, in kB, under any attack.
const MEMORY: u64 = 60_000;

/// Attacks the service while normal clients use it. Checks that they can, then and afterwards, and that the
/// service is still the same process and has not grown.
fn withstands(arguments: &[&str], attack: impl FnOnce(&Service)) {
    let mut service = Service::start(arguments);
    let destination = Destination::start(|_| ok());
    let url = &destination.url;
    let (over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let slowest = thread::scope(|scope| {
        let normal = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) || served.load(Ordering::Relaxed) == 0 {
                let started = Instant::now();
                assert_eq!(service.request("GET", "/status", &[], b"").body, "active");
                service.result(url, &service.submit(url, &payload(1)));
                slowest = slowest.max(started.elapsed());
                served.fetch_add(1, Ordering::Relaxed);
            }
            slowest
        });
        let ends = Ends(&over);
        attack(&service);
        drop(ends);
        normal.join().unwrap()
    });
    let peak = service.figure("VmHWM");
    eprintln!(
        "{} exports meanwhile, the slowest in {slowest:?}; {peak} kB at most",
        served.load(Ordering::Relaxed)
    );
    assert!(peak < MEMORY, "{peak} kB");
    let last = service.submit(url, &payload(2));
    assert_eq!(service.result(url, &last)["status_code"], 200);
    assert!(service.is_running());
}

fn connect(service: &Service) -> TcpStream {
    service.connect_from([127, 0, 0, 1])
}

/// Writes as long as the service reads, until it closes the connection.
fn pour(stream: &mut TcpStream, bytes: &[u8], times: usize) {
    for _ in 0..times {
        if stream.write_all(bytes).is_err() {
            return;
        }
    }
}

/// Everything that the service sends before it closes the connection.
fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // It is reset if more was sent than was read.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn a_huge_announced_body_is_refused_at_once_and_takes_no_memory() {
    withstands(&[], |service| {
        for length in ["9999999999999999", "20000000000", "99999999999999999999999"] {
            for _ in 0..50 {
                let mut stream = connect(service);
                let head = format!(
                    "POST /export HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nsome"
                );
                stream.write_all(head.as_bytes()).unwrap();
                assert_eq!(Response::read(stream).status, 413);
            }
        }
    });
}

#[test]
fn a_header_line_without_end_is_cut_off() {
    withstands(&[], |service| {
        for _ in 0..4 {
            let mut stream = connect(service);
            stream.write_all(b"GET / HTTP/1.1\r\nA: ").unwrap();
            pour(&mut stream, &[b'a'; 64 * 1024], 1000);
            let _ = stream.shutdown(Shutdown::Write);
            // Data in flight may have reset the connection before the answer was read.
            let answer = rest(&mut stream);
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1.1 431 "),
                "{answer}"
            );
        }
        let head = format!("GET /{} HTTP/1.1\r\n", "a".repeat(20_000));
        let mut stream = connect(service);
        stream.write_all(head.as_bytes()).unwrap();
        assert_eq!(Response::read(stream).code(), "head_too_large");
    });
}

#[test]
fn without_free_descriptors_the_service_goes_on_and_recovers() {
    withstands(&[], |service| {
        let prlimit = |files: &str| {
            let done = Command::new("prlimit")
                .args([
                    "--pid",
                    &service.pid().to_string(),
                    &format!("--nofile={files}"),
                ])
                .status()
                .unwrap();
            assert!(done.success());
        };
        let files = std::fs::read_dir(format!("/proc/{}/fd", service.pid())).unwrap();
        prlimit(&format!("{}:4096", files.count() + 30));
        let crowd: Vec<_> = (0..200).map(|_| connect(service)).collect();
        service.event(
            "cannot accept connections: trying again, and closing some if it lasts",
            |_| true,
        );
        // A client that connects now is served in its turn, since others are evicted.
        assert_eq!(service.request("GET", "/status", &[], b"").body, "active");
        drop(crowd);
        prlimit("4096:4096");
        service.event("accepting connections again", |_| true);
    });
}

#[test]
fn without_free_threads_the_service_goes_on_and_recovers() {
    let Some(mut service) = Service::start_with_threads(60) else {
        return;
    };
    // None of them sends anything; each is closed to make room for the next.
    let crowd: Vec<_> = (0..200).map(|_| connect(&service)).collect();
    service.event(
        "cannot accept connections: trying again, and closing some if it lasts",
        |_| true,
    );
    assert_eq!(service.request("GET", "/status", &[], b"").body, "active");
    // Each request needs one more thread, so some of these are told to come again.
    let mut answers = Vec::new();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..100)
            .map(|_| scope.spawn(|| rest(&mut service.send("GET", "/status", &[], b""))))
            .collect();
        answers.extend(clients.into_iter().map(|client| client.join().unwrap()));
    });
    assert!(
        answers
            .iter()
            .any(|answer| answer.starts_with("HTTP/1.1 200 "))
    );
    drop(crowd);
    let destination = Destination::start(|_| ok());
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
    assert!(service.is_running());
}

#[test]
fn connections_that_arrive_all_at_once_are_all_served() {
    withstands(&[], |service| {
        for _ in 0..10 {
            let crowd: Vec<_> = (0..64).map(|_| connect(service)).collect();
            for mut stream in &crowd {
                let request =
                    Service::written("GET", "/status", &[("Connection", "keep-alive")], b"");
                stream.write_all(&request).unwrap();
            }
            for stream in crowd {
                assert_eq!(Response::read(stream).body, "active");
            }
        }
    });
}

#[test]
fn clients_that_reset_their_connection_leave_nothing_behind() {
    withstands(&[], |service| {
        let script = "
import socket, struct, sys
for number in range(20000):
    client = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    client.sendall([b'GET /status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n', b'GET /sta', b''][number % 3])
    client.close()
";
        let SocketAddr::V4(address) = service.address else {
            unreachable!()
        };
        let done = python()
            .args([
                "-c",
                script,
                &address.ip().to_string(),
                &address.port().to_string(),
            ])
            .status()
            .unwrap();
        assert!(done.success());
        // No connection's thread is left but those of the normal client at this moment.
        let deadline = Instant::now() + PATIENCE;
        while service.threads("connection") > 2 {
            assert!(
                Instant::now() < deadline,
                "{} left",
                service.threads("connection")
            );
            thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn pipelined_requests_are_answered_in_order_and_delay_nobody() {
    withstands(&[], |service| {
        let destination = Destination::start(|_| ok());
        let url = &destination.url;
        // Answers that tiny_http would have to write in order, from threads that would wait for each other.
        let body = json!({"uri": url, "data": payload(1)}).to_string();
        let token = token(url);
        let headers = [("X-Api-Key", token.as_str()), ("Connection", "keep-alive")];
        let request = Service::written("POST", "/lp/export", &headers, body.as_bytes());
        let mut stream = connect(service);
        stream.write_all(&request.repeat(20)).unwrap();
        let mut reader = BufReader::new(stream);
        for _ in 0..20 {
            assert_eq!(Response::next(&mut reader).json()["state"], "Finished");
        }

        // A long pipeline from a client that reads nothing.
        let flood = b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n".repeat(1000);
        let mut streams: Vec<_> = (0..16).map(|_| connect(service)).collect();
        for stream in &mut streams {
            stream
                .set_write_timeout(Some(Duration::from_millis(500)))
                .unwrap();
            pour(stream, &flood, 400);
        }
    });
}

#[test]
fn no_request_can_be_smuggled_in_the_body_of_another() {
    withstands(&[], |service| {
        for headers in [
            "Content-Length: -5",
            "Content-Length: abc",
            "Content-Length: 3, 3",
            "Content-Length: 3\r\nContent-Length: 4",
            "Content-Length: 3\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: identity",
        ] {
            let mut stream = connect(service);
            let text = format!(
                "POST /export HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\nGET /status HTTP/1.1\r\nHost: x\r\n\r\n"
            );
            stream.write_all(text.as_bytes()).unwrap();
            let answer = rest(&mut stream);
            assert!(
                answer.starts_with("HTTP/1.1 400 ") || answer.starts_with("HTTP/1.1 501 "),
                "{answer}"
            );
            assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
            assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{headers}: {answer}");
        }
        // A chunked body that nobody reads still ends at its last chunk.
        let mut stream = connect(service);
        let text = "POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\
                    24\r\nGET /status HTTP/1.1\r\nHost: x\r\n\r\n...\r\n0\r\n\r\n\
                    GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(text.as_bytes()).unwrap();
        let answer = rest(&mut stream);
        assert!(
            answer.starts_with("HTTP/1.1 404 ") && answer.ends_with("\r\n\r\nactive"),
            "{answer}"
        );
        assert_eq!(answer.matches("HTTP/1.1").count(), 2, "{answer}");
    });
}

/// The CPU time that the service has used, in hundredths of a second.
fn computed(service: &Service) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.pid())).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn tls_clients_that_send_nothing_or_only_close_notify_cost_nothing() {
    let identity = Identity::new("ec");
    let mut service = Service::start_secure(&identity, &[]);
    let url = format!("https://localhost:{}/status", service.address.port());
    let active = || {
        let done = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "5", "--cacert"])
            .arg(identity.ca())
            .arg(&url)
            .output()
            .unwrap();
        assert_eq!(
            (done.stdout.as_slice(), done.stderr.as_slice()),
            (&b"active"[..], &b""[..])
        );
    };
    let silent: Vec<_> = (0..100).map(|_| connect(&service)).collect();
    active();
    // An alert that says close_notify, before any handshake and in the middle of one.
    let mut leaving = Vec::new();
    for beginning in [&b""[..], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"] {
        for _ in 0..50 {
            let mut stream = connect(&service);
            stream
                .write_all(&[beginning, b"\x15\x03\x01\x00\x02\x01\x00"].concat())
                .unwrap();
            leaving.push(stream);
        }
    }
    active();
    let before = computed(&service);
    thread::sleep(Duration::from_secs(2));
    let spent = computed(&service) - before;
    assert!(
        spent < 50,
        "it computed for {spent} of 200 hundredths of a second"
    );
    drop((silent, leaving));
    active();
    assert!(service.is_running());
    let peak = service.figure("VmHWM");
    assert!(peak < MEMORY, "{peak} kB");
}

/// A connection on which only the beginning of a request was sent.
fn begun(service: &Service, beginning: &[u8]) -> TcpStream {
    let mut stream = connect(service);
    // It may have been closed already.
    let _ = stream.write_all(beginning);
    stream
}

/// Opens connections, sends a byte a second on each, and replaces each that is closed. Counts how often.
fn drip(
    service: &Service,
    count: usize,
    beginning: &[u8],
    over: &AtomicBool,
    come_back: &AtomicUsize,
) {
    let open = || begun(service, beginning);
    let mut streams: Vec<_> = (0..count).map(|_| open()).collect();
    while !over.load(Ordering::Relaxed) {
        for stream in &mut streams {
            if stream.write_all(b"a").is_err() {
                *stream = open();
                come_back.fetch_add(1, Ordering::Relaxed);
            }
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Opens connections, sends only a beginning on each, and replaces each as soon as it is closed. Counts how
/// often.
fn return_at_once(
    service: &Service,
    count: usize,
    beginning: &[u8],
    over: &AtomicBool,
    come_back: &AtomicUsize,
) {
    let open = || {
        let stream = begun(service, beginning);
        stream.set_nonblocking(true).unwrap();
        stream
    };
    let mut streams: Vec<_> = (0..count).map(|_| open()).collect();
    while !over.load(Ordering::Relaxed) {
        for stream in &mut streams {
            match stream.read(&mut [0; 1024]) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                _ => {
                    *stream = open();
                    come_back.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Submits an export from this address with curl and waits for its result, on one connection and at the
/// first try. Returns how long that took.
fn exported_from(
    from: &str,
    service: &Service,
    identity: Option<&Identity>,
    url: &str,
) -> Duration {
    let started = Instant::now();
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "60"])
        .args(["--interface", from])
        .args(["--user", &format!("{}:", token(url)), "--data", &body]);
    if let Some(identity) = identity {
        curl.arg("--cacert").arg(identity.ca());
    }
    let scheme = identity.map_or("http", |_| "https");
    let port = service.address.port();
    let done = curl
        .arg(format!("{scheme}://localhost:{port}/lp/export"))
        .output()
        .unwrap();
    let answer = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(answer.contains("\"Finished\""), "{from}: {answer}{errors}");
    started.elapsed()
}

/// How many clients a crowd has: several times the connections that one address may have.
const CROWD: usize = 1200;

/// Exports from another address than a crowd's and from the crowd's own, in turn, for this long. Each must
/// succeed before the whole crowd has come back three times. So no crowd shuts a client out, however slow
/// the machine is.
fn keeps_nobody_out(
    service: &Service,
    identity: Option<&Identity>,
    come_back: &AtomicUsize,
    time: Duration,
) {
    let destination = Destination::start(|_| ok());
    let (mut slowest, mut most) = ([Duration::ZERO; 2], 0);
    let started = Instant::now();
    while started.elapsed() < time {
        for (from, slowest) in ["127.0.0.2", "127.0.0.1"].into_iter().zip(&mut slowest) {
            let before = come_back.load(Ordering::Relaxed);
            let took = exported_from(from, service, identity, &destination.url);
            let meanwhile = come_back.load(Ordering::Relaxed) - before;
            assert!(meanwhile < 3 * CROWD, "{from}: {meanwhile} came back");
            most = most.max(meanwhile);
            *slowest = took.max(*slowest);
        }
    }
    let peak = service.figure("VmHWM");
    let [apart, beside] = slowest;
    eprintln!(
        "TLS {}: from another address {apart:?} at most, from the same {beside:?}, \
         and {most} came back meanwhile; {peak} kB at most",
        identity.is_some()
    );
    assert!(peak < MEMORY, "{peak} kB");
}

#[test]
fn a_crowd_of_slow_clients_shuts_nobody_out() {
    let own = Identity::new("ec");
    for identity in [None, Some(&own)] {
        let service = match identity {
            Some(identity) => Service::start_secure(identity, &[]),
            None => Service::start(&[]),
        };
        let (over, come_back) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let body = [
                b"POST /export HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n",
                &[b'a'; 600_000][..],
            ];
            let handshake = b"\x16\x03\x01".to_vec();
            let crowds = if identity.is_some() {
                vec![(CROWD, handshake)]
            } else {
                vec![
                    (500, b"GET /status HTTP/1.1\r\nA: ".to_vec()),
                    (500, body.concat()),
                    (CROWD - 1000, handshake),
                ]
            };
            for (count, beginning) in crowds {
                let (service, over, come_back) = (&service, &over, &come_back);
                scope.spawn(move || drip(service, count, &beginning, over, come_back));
            }
            let _ends = Ends(&over);
            keeps_nobody_out(&service, identity, &come_back, Duration::from_secs(14));
        });
    }
}

#[test]
fn a_crowd_that_reconnects_at_once_shuts_nobody_out_on_a_busy_machine() {
    let own = Identity::new("ec");
    let clients: [(_, &[u8]); 2] = [(None, b"GET"), (Some(&own), b"\x16\x03\x01")];
    for (identity, beginning) in clients {
        let service = match identity {
            Some(identity) => Service::start_secure(identity, &[]),
            None => Service::start(&[]),
        };
        let (over, come_back) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| return_at_once(&service, CROWD, beginning, &over, &come_back));
            for _ in 0..4 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let _ends = Ends(&over);
            keeps_nobody_out(&service, identity, &come_back, Duration::from_secs(14));
        });
    }
}

#[test]
fn a_connection_over_the_limit_gets_503_while_all_others_are_being_served() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&["--max-connections-per-peer", "2", "--max-connections", "3"]);
    let url = &destination.url;
    let id = service.submit(url, &payload(1));
    destination.arrival();
    let token = token(url);
    let headers = [("X-Api-Key", token.as_str())];
    let body = json!({"id": id}).to_string();
    let polls: Vec<_> = (0..2)
        .map(|_| service.send("POST", "/lp/export?timeout=60", &headers, body.as_bytes()))
        .collect();
    service.events("poll", 2);
    let refused = service.request("GET", "/status", &[], b"");
    assert_eq!((refused.status, refused.code()), (503, "busy".into()));
    assert!(refused.header("retry-after").is_some());

    // Another client gets the third place, however many connections that send nothing want it, and however
    // many of the first client's were there before.
    let started = Instant::now();
    let in_vain: Vec<_> = (0..40).map(|_| connect(&service)).collect();
    let idle: Vec<_> = (0..5)
        .map(|_| service.connect_from([127, 0, 0, 2]))
        .collect();
    let mut other = service.connect_from([127, 0, 0, 3]);
    other
        .write_all(&Service::written("GET", "/status", &[], b""))
        .unwrap();
    assert_eq!(Response::read(other).body, "active");
    assert!(started.elapsed() < Duration::from_secs(20));
    drop((idle, in_vain));

    gate.open();
    for poll in polls {
        assert_eq!(Response::read(poll).json()["state"], "Finished");
    }
    assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
}

/// Sends these bytes, then a byte every half second, until the service has answered or closed. Returns how
/// long that took, and the answer.
fn dripped(service: &Service, beginning: &[u8]) -> (Duration, String) {
    let mut stream = connect(service);
    let started = Instant::now();
    stream.write_all(beginning).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut answer = Vec::new();
    loop {
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && answer.is_empty() => {
                assert!(started.elapsed() < 2 * PATIENCE);
                if !beginning.is_empty() {
                    let _ = stream.write_all(b"a");
                }
            }
            _ => return (started.elapsed(), String::from_utf8(answer).unwrap()),
        }
    }
}

#[test]
fn a_byte_now_and_then_extends_no_deadline() {
    let service = Service::start(&[]);
    thread::scope(|scope| {
        let body = "POST /export HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n";
        let chunks = "POST /export HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;";
        for (beginning, seconds) in [("GET / HTTP/1.1\r\nA: ", 10), (body, 30), (chunks, 30)] {
            let service = &service;
            scope.spawn(move || {
                let (took, answer) = dripped(service, beginning.as_bytes());
                assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
                assert!(took >= Duration::from_secs(seconds) - Duration::from_millis(100));
                assert!(took < Duration::from_secs(seconds + 5), "{took:?}");
            });
        }
        scope.spawn(|| {
            let (took, answer) = dripped(&service, b"");
            assert_eq!(answer, "");
            assert!(
                took >= Duration::from_secs(59) && took < Duration::from_secs(65),
                "{took:?}"
            );
        });
        scope.spawn(|| {
            // Sends requests and reads nothing, until the service reads no more of them. The answers are
            // large, since a slow machine would take minutes to fill the buffers with small ones.
            let destination = Destination::start(|_| Reaction::Answer(200, vec![b'x'; 60_000]));
            let (url, token) = (&destination.url, token(&destination.url));
            let id = service.submit(url, &payload(1));
            service.result(url, &id);
            let body = json!({"id": id}).to_string();
            let headers = [("X-Api-Key", token.as_str()), ("Connection", "keep-alive")];
            let request = Service::written("POST", "/export", &headers, body.as_bytes());
            let requests = request.repeat(100);
            let mut stream = connect(&service);
            let mut stalled = Duration::ZERO;
            loop {
                let started = Instant::now();
                let written = stream.write_all(&requests);
                stalled = stalled.max(started.elapsed());
                if written.is_err() {
                    break;
                }
            }
            assert!(
                stalled > Duration::from_secs(29) && stalled < PATIENCE,
                "{stalled:?}"
            );
        });
    });
}

#[test]
fn many_large_requests_at_once_wait_for_each_other_and_all_arrive() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let large = json!({"uri": url, "data": {"text": "x".repeat(900_000)}}).to_string();
    let token = token(url);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..64)
            .map(|_| {
                scope.spawn(|| {
                    let headers = [("X-Api-Key", token.as_str())];
                    loop {
                        let answer = service.request("POST", "/export", &headers, large.as_bytes());
                        match answer.status {
                            200 => return,
                            // The disk is too slow, and the client is told to come again.
                            _ => assert_eq!(answer.code(), "overloaded"),
                        }
                    }
                })
            })
            .collect();
        clients
            .into_iter()
            .for_each(|client| client.join().unwrap());
    });
    for _ in 0..64 {
        assert_eq!(destination.arrival().body.len(), 900_011);
    }
    let peak = service.figure("VmHWM");
    eprintln!("64 requests of 900 kB at a time: {peak} kB at most");
}

/// A request with a chunked body: its head with this many bytes of the body, and the rest.
fn chunked(token: &str, body: &str, first: usize) -> (String, String) {
    let (first, second) = body.split_at(first);
    let head = format!(
        "POST /export HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Api-Key: {token}\r\n\
         Transfer-Encoding: chunked\r\n\r\n"
    );
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    (head + &chunk(first), format!("{}0\r\n\r\n", chunk(second)))
}

#[test]
fn chunked_requests_that_have_sent_little_do_not_use_up_the_memory_of_large_ones() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let token = token(url);
    let of_size =
        |bytes: usize| json!({"uri": url, "data": {"text": "x".repeat(bytes)}}).to_string();
    let (beginning, rest) = chunked(&token, &of_size(30_000), 20_000);
    let mut slow: Vec<_> = (0..200).map(|_| connect(&service)).collect();
    for stream in &mut slow {
        stream.write_all(beginning.as_bytes()).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while service.threads("connection") < slow.len() || !service.waits("connection") {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    // From the same address, which gets no more than its share.
    let large = of_size(900_000);
    let headers = [("X-Api-Key", token.as_str())];
    let answer = service.request("POST", "/export", &headers, large.as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.body);
    for mut stream in slow {
        // It may have been answered already.
        let _ = stream.write_all(rest.as_bytes());
        let answer = Response::read(stream);
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
}

#[test]
fn chunked_bodies_that_grow_at_once_wait_for_each_other_and_all_arrive() {
    let destination = Destination::start(|_| ok());
    // In the end each takes an eighth of the memory, which is a quarter of its client's half.
    let service = Service::start(&["--max-body", "4000000"]);
    let url = &destination.url;
    let body = json!({"uri": url, "data": {"text": "x".repeat(1_500_000)}}).to_string();
    let (beginning, rest) = chunked(&token(url), &body, 700_000);
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                loop {
                    let mut stream = connect(&service);
                    for part in [&beginning, &rest] {
                        let _ = stream.write_all(part.as_bytes());
                    }
                    let answer = Response::read(stream);
                    match answer.status {
                        200 => return,
                        // The disk is too slow, and the client is told to come again.
                        _ => assert_eq!(answer.code(), "overloaded"),
                    }
                }
            });
        }
    });
    for _ in 0..32 {
        assert_eq!(destination.arrival().body.len(), 1_500_011);
    }
}

#[test]
fn an_evicted_request_gets_503_and_the_log_says_why() {
    let service = Service::start(&["--max-connections-per-peer", "2"]);
    let beginnings = [
        "GET /status HTTP/1.1\r\nHo",
        "POST /export HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    ];
    let begun = beginnings.map(|beginning| {
        let mut stream = connect(&service);
        stream.write_all(beginning.as_bytes()).unwrap();
        stream
    });
    for _ in &begun {
        assert_eq!(service.request("GET", "/status", &[], b"").body, "active");
        // Its place is free as soon as its client has gone; one that stays takes it.
        let mut idle = connect(&service);
        idle.write_all(b"G").unwrap();
        std::mem::forget(idle);
    }
    for stream in begun {
        let answer = Response::read(stream);
        assert_eq!((answer.status, answer.code()), (503, "busy".into()));
    }
    service.events("refused", 2);
    // Bodies that do not arrive make room for others too.
    let service = Service::start(&[]);
    let large = "POST /export HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{";
    let mut begun: Vec<_> = (0..17).map(|_| connect(&service)).collect();
    for stream in &mut begun {
        stream.write_all(large.as_bytes()).unwrap();
    }
    let refused = service.event("refused", |_| true);
    assert_eq!(refused["code"], "busy");
}

#[test]
fn an_evicted_request_gets_503_over_tls_too() {
    let identity = Identity::new("ec");
    let service = Service::start_secure(&identity, &["--max-connections-per-peer", "2"]);
    let (mut request, mut answers) = identity.client(&service);
    // The answer to the first shows that half of the second has arrived too.
    request
        .write_all(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\nGET /status HTTP/1.1\r\nHo")
        .unwrap();
    assert_eq!(Response::next(&mut answers).body, "active");
    // It has the answer, but only when the service waits for the rest of the second has it noticed
    // that it is through with the first.
    let deadline = Instant::now() + PATIENCE;
    while !service.waits("connection") {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    let _idle = [connect(&service), connect(&service)];
    let refused = Response::next(&mut answers);
    assert_eq!((refused.status, refused.code()), (503, "busy".into()));
}

#[test]
fn clients_that_send_empty_lines_endlessly_are_evicted_too() {
    let service = Service::start(&["--max-connections-per-peer", "80"]);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let lines = b"\r\n".repeat(32 * 1024);
            let mut streams: Vec<_> = (0..80).map(|_| connect(&service)).collect();
            for stream in &streams {
                stream.set_nonblocking(true).unwrap();
            }
            while !over.load(Ordering::Relaxed) {
                streams.iter_mut().for_each(|stream| {
                    let _ = stream.write(&lines);
                });
            }
        });
        let _ends = Ends(&over);
        let deadline = Instant::now() + PATIENCE;
        while service.threads("connection") < 80 {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        let _newcomers: Vec<_> = (0..80).map(|_| connect(&service)).collect();
        for _ in 0..20 {
            let mut other = service.connect_from([127, 0, 0, 2]);
            other
                .write_all(&Service::written("GET", "/status", &[], b""))
                .unwrap();
            assert_eq!(Response::read(other).body, "active");
        }
    });
}

#[test]
fn what_a_refused_request_has_sent_takes_no_memory_while_its_client_lingers() {
    withstands(&[], |service| {
        let chunk = format!("DBBA0\r\n{}\r\n", "x".repeat(0xDBBA0));
        let request = format!(
            "POST /export HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}no size\r\n"
        );
        let lingering: Vec<_> = (0..100)
            .map(|_| {
                let mut stream = connect(service);
                stream.write_all(request.as_bytes()).unwrap();
                let answer = Response::read(stream.try_clone().unwrap());
                assert_eq!(answer.code(), "bad_request");
                stream
            })
            .collect();
        drop(lingering);
    });
}

#[test]
fn a_client_that_announces_much_and_sends_nothing_does_not_delay_anothers_large_request() {
    let service = Service::start(&[]);
    let over = AtomicBool::new(false);
    let head = b"POST /export HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n";
    let destination = Destination::start(|_| ok());
    let url = &destination.url;
    let large = json!({"uri": url, "data": {"text": "x".repeat(100_000)}}).to_string();
    let token = token(url);
    let request = Service::written(
        "POST",
        "/export",
        &[("X-Api-Key", &token)],
        large.as_bytes(),
    );
    thread::scope(|scope| {
        scope.spawn(|| drip(&service, 200, head, &over, &AtomicUsize::new(0)));
        let _ends = Ends(&over);
        // They are closed and come back, so they may never all be there at the same time.
        let enough = Instant::now() + Duration::from_secs(3);
        while service.threads("connection") < 200 && Instant::now() < enough {
            thread::yield_now();
        }
        for _ in 0..3 {
            let mut other = service.connect_from([127, 0, 0, 2]);
            let started = Instant::now();
            other.write_all(&request).unwrap();
            assert_eq!(Response::read(other).status, 200);
            assert!(started.elapsed() < Duration::from_secs(8));
        }
    });
}

#[test]
fn a_flood_of_refused_requests_does_not_fill_the_log() {
    let service = Service::start(&[]);
    let mut stream = connect(&service);
    let request = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.write_all(&request.repeat(5000)).unwrap();
    let mut reader = BufReader::new(stream);
    for _ in 0..5000 {
        assert_eq!(Response::next(&mut reader).status, 404);
    }
    let lines = service
        .log()
        .iter()
        .filter(|line| line.contains("refused"))
        .count();
    assert!(lines < 1000, "{lines} lines");
}
