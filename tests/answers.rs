//! Odd answers from destinations: contract section 1, "Any HTTP response is final". What curl can read is
//! readable.

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use support::{Destination, Identity, Service, ok, payload};

/// How a destination ends the connection after its answer.
#[derive(Clone, Copy, Debug)]
enum End {
    /// With a FIN.
    Fin,
    /// With a reset.
    Reset,
    /// Not at all: it waits for the client to close.
    Stay,
}

/// A destination that answers each connection's first request with these bytes.
fn saying(answer: &[u8], end: End) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", listener.local_addr().unwrap());
    let answer = answer.to_vec();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), answer.clone());
            thread::spawn(move || {
                read_request(&mut stream);
                // The client may have closed already.
                let _ = stream.write_all(&answer);
                match end {
                    End::Fin => {}
                    End::Stay => {
                        let _ = stream.read(&mut [0]);
                    }
                    End::Reset => {
                        // The reset would discard what has not arrived yet.
                        while rustix::io::ioctl_fionread(&stream).is_err() {}
                        thread::sleep(Duration::from_millis(200));
                        let at_once = Some(Duration::ZERO);
                        rustix::net::sockopt::set_socket_linger(&stream, at_once).unwrap();
                    }
                }
            });
        }
    });
    url
}

fn read_request(stream: &mut impl Read) {
    let mut request = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let read = stream.read(&mut bytes).unwrap_or(0);
        request.extend_from_slice(&bytes[..read]);
        let text = String::from_utf8_lossy(&request);
        let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                let is_length = name.eq_ignore_ascii_case("content-length");
                is_length.then(|| value.parse::<usize>().unwrap())
            });
            body.len() >= length.unwrap_or(0)
        });
        if whole || read == 0 {
            return;
        }
    }
}

fn exported(service: &Service, url: &str) -> Value {
    let id = service.submit(url, &payload(1));
    service.result(url, &id)
}

/// How curl reads an answer to a POST: its exit code, the status and the body.
fn curled(url: &str) -> (i32, u64, Vec<u8>) {
    let done = Command::new("curl")
        .args(["--silent", "--max-time", "5", "--data", "{}"])
        .args(["--write-out", "%{stderr}%{http_code}", url])
        .output()
        .unwrap();
    let status = String::from_utf8(done.stderr).unwrap().parse().unwrap();
    (done.status.code().unwrap(), status, done.stdout)
}

#[test]
fn what_curl_reads_is_read_and_when_curl_complains_the_status_is_kept() {
    let folded = "HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\tc\r\nContent-Length: 2\r\n\r\nok";
    let many = format!(
        "HTTP/1.1 200 OK\r\n{}Content-Length: 2\r\n\r\nok",
        "X: y\r\n".repeat(400)
    );
    let long = format!(
        "HTTP/1.1 200 OK\r\nX: {}\r\nContent-Length: 2\r\n\r\nok",
        "y".repeat(60_000)
    );
    let extension = |length| {
        format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;{}\r\nok\r\n0\r\n\r\n",
            "e".repeat(length)
        )
    };
    let (short_extension, long_extension) = (extension(22), extension(2_000));
    let continued =
        |interim: &str| format!("{interim}\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let via = continued("HTTP/1.1 100 Continue\r\nVia: 1.1 proxy");
    let hints = continued("HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload");
    let twice = continued("HTTP/1.1 100 C\r\n\r\nHTTP/1.1 102 P\r\nX: y");
    let cases: &[(&str, End)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", End::Stay),
        ("HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", End::Stay),
        ("HTTP/1.1 200 \r\nContent-Length:2\r\n\r\nok", End::Stay),
        ("HTTP/1.0 200 OK\r\n\r\nok", End::Fin),
        ("HTTP/1.1 200 OK\nContent-Length: 2\n\nok", End::Stay),
        ("HTTP/1.1 404 Not\r\nContent-Length: 2\r\n\r\nno", End::Stay),
        ("HTTP/1.1 204 No\r\n\r\n", End::Stay),
        ("HTTP/1.1 304 No\r\nContent-Length: 5\r\n\r\n", End::Stay),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", End::Stay),
        (
            "HTTP/1.1 200 OK\r\ncontent-LENGTH:   2  \r\n\r\nok",
            End::Stay,
        ),
        (
            "HTTP/1.1 200 OK\r\nN\u{e4}me: \u{e4}\r\nContent-Length: 2\r\n\r\nok",
            End::Stay,
        ),
        (
            "HTTP/1.1 200 OK\r\nX-Empty:\r\nContent-Length: 2\r\n\r\nok",
            End::Stay,
        ),
        (folded, End::Stay),
        (&many, End::Stay),
        (&long, End::Stay),
        (&via, End::Stay),
        (&hints, End::Stay),
        (&twice, End::Stay),
        (&short_extension, End::Stay),
        (&long_extension, End::Stay),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\nT: y\r\n\r\n",
            End::Stay,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n0002  \r\nok\r\n00\r\n\r\n",
            End::Stay,
        ),
        (
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n",
            End::Stay,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            End::Stay,
        ),
        ("HTTP/1.1 200 OK\r\n\r\nok", End::Fin),
        (
            "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\nok",
            End::Fin,
        ),
        // Curl reports an error for these.
        ("HTTP/1.1 200 OK\r\n\r\nok", End::Reset),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", End::Fin),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", End::Reset),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nok",
            End::Fin,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
            End::Fin,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
            End::Fin,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nokay\r\n0\r\n\r\n",
            End::Stay,
        ),
        ("HTTP/1.1 500 Oh\r\nContent-Length: 5\r\n\r\nno", End::Fin),
    ];
    let service = Service::start(&[]);
    thread::scope(|scope| {
        for (answer, end) in cases {
            let service = &service;
            scope.spawn(move || {
                let url = saying(answer.as_bytes(), *end);
                let (code, status, body) = curled(&url);
                let result = exported(service, &url);
                let shown = format!("{answer:.120?} {end:?}: curl {code} {status}, {result:.300}");
                assert_eq!(result["status_code"], status, "{shown}");
                assert!(result.get("error").is_none(), "{shown}");
                assert_eq!(result["truncated"] == true, code != 0, "{shown}");
                let text = result["body"].as_str().unwrap().as_bytes();
                assert_eq!(text, body, "{shown}");
            });
        }
    });
}

#[test]
fn a_head_that_cannot_be_read_to_its_end_is_still_a_response() {
    let endless = format!("HTTP/1.1 201 Yes\r\nX: {}", "y".repeat(2_000_000));
    let headers = format!("HTTP/1.1 201 Yes\r\n{}", "X: y\r\n".repeat(200_000));
    let service = Service::start(&["--attempt-timeout", "4s"]);
    for (answer, end) in [
        ("HTTP/1.1 201 Yes\r\nX: y", End::Fin),
        ("HTTP/1.1 201 Yes\r\nX: y", End::Reset),
        ("HTTP/1.1 201 Yes\r\nX: y", End::Stay),
        ("HTTP/1.1 201 Yes\r\nContent-Length: nine\r\n\r\n", End::Fin),
        (&endless, End::Stay),
        (&headers, End::Stay),
    ] {
        let result = exported(&service, &saying(answer.as_bytes(), end));
        let read = (
            &result["status_code"],
            &result["truncated"],
            &result["body"],
        );
        let expected = (&json!(201), &json!(true), &json!(""));
        assert_eq!(read, expected, "{answer:.80?} {end:?}");
    }
    let peak = service.figure("VmHWM");
    assert!(peak < 30_000, "{peak} kB");
}

#[test]
fn a_destination_that_sends_no_final_status_is_retried() {
    let service = Service::start(&["--give-up-after", "200ms"]);
    for (answer, kind) in [
        ("", "closed"),
        ("HTTP/1.1 20", "closed"),
        ("HTTP/1.1 100 Continue\r\nVia: 1.1 proxy\r\n\r\n", "closed"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "protocol"),
        ("<html>captive portal</html>", "protocol"),
    ] {
        let result = exported(&service, &saying(answer.as_bytes(), End::Fin));
        assert_eq!(result["error"]["kind"], kind, "{answer}: {result}");
        service.event("failed", |line| line["kind"] == kind);
    }
}

/// An HTTPS destination that sends this answer, with or without close_notify at its end.
fn saying_over_tls(identity: &Identity, answer: &[u8], close_notify: bool) -> String {
    let pem = std::fs::read(identity.pem()).unwrap();
    let chain = CertificateDer::pem_slice_iter(&pem).map(Result::unwrap);
    let key = PrivateKeyDer::from_pem_slice(&pem).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.collect(), key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = answer.to_vec();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let connection = ServerConnection::new(config.clone()).unwrap();
            let mut stream: StreamOwned<_, TcpStream> =
                StreamOwned::new(connection, stream.unwrap());
            read_request(&mut stream);
            stream.write_all(&answer).unwrap();
            if close_notify {
                stream.conn.send_close_notify();
            }
            stream.flush().unwrap();
        }
    });
    format!("https://localhost:{port}/in")
}

#[test]
fn over_tls_a_body_without_length_that_ends_without_close_notify_is_truncated() {
    let identity = Identity::new("ec");
    let service = Service::start(&["--ca-file", identity.ca().to_str().unwrap()]);
    let endless = &b"HTTP/1.1 200 OK\r\n\r\nok"[..];
    let counted = &b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"[..];
    for (answer, close_notify, truncated) in [
        (endless, true, false),
        (endless, false, true),
        (counted, true, false),
        (counted, false, false),
    ] {
        let result = exported(&service, &saying_over_tls(&identity, answer, close_notify));
        let read = (&result["status_code"], &result["body"]);
        assert_eq!(read, (&json!(200), &json!("ok")), "{result}");
        assert_eq!(result["truncated"] == true, truncated, "{result}");
    }
}

#[test]
fn an_answer_of_a_megabyte_arrives_whole() {
    let body = format!("[{}]", vec!["\"reading\""; 104_000].join(","));
    assert!(body.len() > 1_000_000 && body.len() <= 1024 * 1024);
    let answer = body.clone();
    let destination =
        Destination::start(move |_| support::Reaction::Answer(200, answer.clone().into_bytes()));
    let service = Service::start(&[]);
    let result = exported(&service, &destination.url);
    assert_eq!(result["body"].as_str(), Some(body.as_str()));
    assert!(result.get("truncated").is_none());
}

#[test]
fn large_answers_from_many_destinations_share_bounded_memory() {
    const LARGE: usize = 1024 * 1024;
    // Each sends all but the last bytes of its body, then waits until all others have been asked.
    let asked = Arc::new(std::sync::Barrier::new(40));
    let service = Service::start(&["--attempt-timeout", "60s"]);
    let urls: Vec<_> = (0..40)
        .map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}/in", listener.local_addr().unwrap());
            let asked = asked.clone();
            thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                read_request(&mut stream);
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n");
                stream.write_all(head.as_bytes()).unwrap();
                asked.wait();
                stream.write_all(&vec![b'x'; LARGE]).unwrap();
                let _ = stream.read(&mut [0]);
            });
            url
        })
        .collect();
    let ids: Vec<_> = urls
        .iter()
        .map(|url| service.submit(url, &payload(1)))
        .collect();
    let small = Destination::start(|_| ok());
    assert_eq!(exported(&service, &small.url)["body"], "ok");
    for (url, id) in urls.iter().zip(&ids) {
        let result = service.result(url, id);
        assert_eq!(result["body"].as_str().unwrap().len(), LARGE, "{url}");
    }
    let peak = service.figure("VmHWM");
    eprintln!("40 answers of 1 MiB at once: {peak} kB at most");
}
