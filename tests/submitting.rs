//! Submitting and polling: contract sections 1, 3 and 4.

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread;

use serde_json::{Value, json};
use support::{Destination, MARK, Reaction, Response, Service, ok, payload, token, token_of};

#[test]
fn an_export_reaches_its_destination_and_the_answer_reaches_the_app() {
    let destination = Destination::start(|arrival| Reaction::Answer(201, arrival.body.clone()));
    let service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    let result = service.result(&destination.url, &id);
    assert_eq!(result["status"], "201 Created");
    assert_eq!(result["status_code"], 201);
    assert_eq!(result["body"], payload(1).to_string());
    assert_eq!(result.as_object().unwrap().len(), 3, "{result}");

    let arrival = destination.arrival();
    assert!(
        arrival.head.starts_with("POST /in HTTP/1.1\r\n"),
        "{}",
        arrival.head
    );
    assert_eq!(arrival.text(), payload(1).to_string());
    assert_eq!(arrival.header("content-type"), Some("application/json"));
    assert_eq!(arrival.header("webhook-id"), Some(id.as_str()));
    let agent = concat!("export-service/", env!("CARGO_PKG_VERSION"));
    assert_eq!(arrival.header("user-agent"), Some(agent));
    for unwanted in [
        "cookie",
        "transfer-encoding",
        "expect",
        "authorization",
        "x-api-key",
    ] {
        assert_eq!(arrival.header(unwanted), None);
    }
}

#[test]
fn payloads_arrive_byte_for_byte_as_text_and_as_objects() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let token = token(&destination.url);
    let texts = [
        r#"{"z":1.0,"a":[1e400,12345678901234567890],"e":"\u00e9\/"}"#,
        " [ 1.10 ,\t{ \"b\" : -0 } ]",
        r#"{"a":1,"a":"twice"}"#,
    ];
    for text in texts {
        let as_text = serde_json::to_string(text).unwrap();
        for data in [text, &as_text] {
            let body = format!(r#"{{"uri":"{}","data":{data}}}"#, destination.url);
            let response = service.request(
                "POST",
                "/lp/export",
                &[("X-Api-Key", &token)],
                body.as_bytes(),
            );
            assert_eq!(response.json()["state"], "Finished", "{}", response.body);
            let expected = if data == text { text.trim() } else { text };
            assert_eq!(destination.arrival().text(), expected);
        }
    }
}

#[test]
fn curl_with_its_form_content_type_and_basic_auth_can_submit() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let output = Command::new("curl")
        .args(["-sS", "-u", &format!("{}:", token(&destination.url)), "-d"])
        .arg(json!({"id": "", "uri": destination.url, "data": payload(1).to_string()}).to_string())
        .arg(format!("http://{}/lp/export", service.address))
        .output()
        .unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["state"], "Finished");
    assert_eq!(answer["ext_response"]["body"], "ok");
}

#[test]
fn the_state_goes_from_pending_through_processing_to_finished() {
    let (destination, gate) = Destination::held();
    let service = Service::start(&[]);
    let url = &destination.url;
    let first = service.submit(url, &payload(1));
    destination.arrival();
    let second = service.submit(url, &payload(2));
    let state = |id: &str| {
        service
            .post("/export", &token(url), &json!({"id": id}))
            .json()
    };
    assert_eq!(
        state(&first),
        json!({"id": first, "state": "Processing", "ext_response": {}})
    );
    assert_eq!(
        state(&second),
        json!({"id": second, "state": "Pending", "ext_response": {}})
    );
    gate.open();
    assert_eq!(service.result(url, &second)["status_code"], 200);
    assert_eq!(state(&first)["state"], "Finished");
}

#[test]
fn a_result_can_be_read_again_and_stays_the_same() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    let first = service.result(&destination.url, &id);
    assert_eq!(service.result(&destination.url, &id), first);
    let service = service.kill_and_restart();
    assert_eq!(service.result(&destination.url, &id), first);
    assert_eq!(destination.arrivals().len(), 1);
}

#[test]
fn any_status_is_an_answer_and_redirects_are_not_followed() {
    let elsewhere = Destination::start(|_| ok());
    let target = elsewhere.url.clone();
    let destination = Destination::start(move |arrival| {
        let status = arrival.text().trim_matches(['[', ']']).parse().unwrap();
        if (300..400).contains(&status) {
            let head =
                format!("HTTP/1.1 {status} X\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n");
            return Reaction::Raw(head.into_bytes());
        }
        Reaction::Answer(status, format!("answer {status}").into_bytes())
    });
    let service = Service::start(&[]);
    for (status, line) in [
        (202, "202 Accepted"),
        (302, "302 Found"),
        (307, "307 Temporary Redirect"),
        (404, "404 Not Found"),
        (500, "500 Internal Server Error"),
        (299, "299 Unknown"),
    ] {
        let id = service.submit(&destination.url, &json!([status]));
        let result = service.result(&destination.url, &id);
        assert_eq!(result["status"], line);
        assert!(result.get("error").is_none());
    }
    assert!(elsewhere.arrivals().is_empty());
}

#[test]
fn long_bodies_are_cut_and_bodies_that_are_not_text_are_encoded() {
    let destination = Destination::start(|arrival| match arrival.text() {
        "[1]" => Reaction::Answer(200, "é".repeat(40_000).into_bytes()),
        "[2]" => Reaction::Answer(200, vec![0xff, 0xfe]),
        "[3]" => Reaction::Answer(200, vec![b'x'; 65_536]),
        _ => Reaction::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec()),
    });
    let service = Service::start(&["--max-response", "65536"]);
    let result = |number: u32| {
        let id = service.submit(&destination.url, &json!([number]));
        service.result(&destination.url, &id)
    };
    let long = result(1);
    assert_eq!(long["body"].as_str().unwrap().len(), 65_536);
    assert_eq!(long["truncated"], true);
    let binary = result(2);
    assert_eq!(
        (&binary["body"], &binary["body_base64"]),
        (&json!(""), &json!("//4="))
    );
    let exact = result(3);
    assert_eq!(exact["body"].as_str().unwrap().len(), 65_536);
    assert!(exact.get("truncated").is_none());
    let broken_off = result(4);
    assert_eq!(
        (&broken_off["body"], &broken_off["truncated"]),
        (&json!("half"), &json!(true))
    );
}

#[test]
fn a_kept_connection_that_the_destination_closes_on_the_next_request_is_no_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/in", listener.local_addr().unwrap());
    let connections = thread::spawn(move || {
        // Each connection answers once and closes when the second request is under way.
        for (number, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let mut read = |bytes: &mut [u8]| stream.read(bytes).unwrap();
            let mut bytes = [0; 4096];
            read(&mut bytes);
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                .unwrap();
            if number == 2 {
                return number;
            }
            stream.read_exact(&mut [0; 10]).unwrap();
        }
        unreachable!()
    });
    let service = Service::start(&[]);
    for number in 0..3 {
        let id = service.submit(&url, &payload(number));
        assert_eq!(service.result(&url, &id)["status_code"], 200);
    }
    assert_eq!(connections.join().unwrap(), 2);
}

#[test]
fn exports_are_sent_one_by_one_in_the_order_of_acceptance() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..30)
        .map(|n| service.submit(&destination.url, &payload(n)))
        .collect();
    let arrived: Vec<_> = ids.iter().map(|_| destination.arrival()).collect();
    let arrived: Vec<_> = arrived
        .iter()
        .map(|arrival| arrival.header("webhook-id").unwrap())
        .collect();
    assert_eq!(arrived, ids);
}

#[test]
fn malformed_requests_get_400_and_say_what_to_change() {
    let service = Service::start(&[]);
    let url = "https://a.example/in";
    let token = token(url);
    let deep = format!(
        r#"{{"uri":"{url}","data":{}{}}}"#,
        "[".repeat(300_000),
        "]".repeat(300_000)
    );
    for (body, word) in [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        (r#"{"id":5}"#, "strings"),
        (
            r#"{"uri":"https://a.example/in","uri":"x"}"#,
            "each field once",
        ),
        (r#"{"data":{}}"#, "`uri` is missing"),
        (r#"{"uri":"https://a.example/in"}"#, "`data` is missing"),
        (
            r#"{"uri":"https://a.example/in","data":7}"#,
            "`data` must be",
        ),
        (
            r#"{"uri":"https://a.example/in","data":"{MARK-payload"}"#,
            "not valid JSON",
        ),
        (
            r#"{"uri":"https://me:MARK-payload@a.example/in","data":{}}"#,
            "user name",
        ),
        (r#"{"uri":"a.example","data":{}}"#, "http://"),
        (&deep, "levels deep"),
    ] {
        let response =
            service.request("POST", "/export", &[("X-Api-Key", &token)], body.as_bytes());
        assert_eq!(response.status, 400, "{body:.60}");
        assert_eq!(response.header("content-type"), Some("application/json"));
        let message = response.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(message.contains(word), "{message}");
        assert!(!response.body.contains(MARK));
    }
    let headers = [
        ("X-Api-Key", token.as_str()),
        ("Idempotency-Key", "two words"),
    ];
    let body = json!({"uri": url, "data": {}}).to_string();
    assert_eq!(
        service
            .request("POST", "/export", &headers, body.as_bytes())
            .status,
        400
    );
}

#[test]
fn other_paths_methods_and_sizes_get_404_405_and_413() {
    let service = Service::start(&["--max-body", "2048"]);
    let status = |method, path, body: &[u8]| {
        let response: Response = service.request(method, path, &[], body);
        (
            response.status,
            response.header("allow").map(str::to_owned),
            response.code(),
        )
    };
    let code = |code: &str| code.to_owned();
    assert_eq!(status("GET", "/", b""), (404, None, code("no_such_path")));
    assert_eq!(
        status("POST", "/export/", b""),
        (404, None, code("no_such_path"))
    );
    assert_eq!(
        status("GET", "/export", b""),
        (405, Some("POST".into()), code("method_not_allowed"))
    );
    assert_eq!(
        status("PUT", "/lp/export?timeout=1", b""),
        (405, Some("POST".into()), code("method_not_allowed"))
    );
    assert_eq!(
        status("POST", "/status", b""),
        (405, Some("GET, HEAD".into()), code("method_not_allowed"))
    );
    assert_eq!(
        status("POST", "/export", &[b'x'; 2049]),
        (413, None, code("too_large"))
    );
    assert_eq!(
        status("POST", "/export", &[b'x'; 2048]),
        (401, None, code("unauthorized"))
    );
}

#[test]
fn a_body_that_says_it_is_encoded_gets_415_which_says_what_to_do() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let token = token(url);
    let send = |path: &str, encoding: &str, body: &Value| {
        let headers = [
            ("X-Api-Key", token.as_str()),
            ("Content-Encoding", encoding),
        ];
        service.request("POST", path, &headers, body.to_string().as_bytes())
    };
    let id = service.submit(url, &payload(1));
    let submission = json!({"uri": url, "data": payload(2)});
    for encoding in ["gzip", "BR", "identity, gzip", "gzip;q=1", "*", "x"] {
        for (path, body) in [
            ("/export", &submission),
            ("/lp/export", &json!({ "id": id })),
        ] {
            let response = send(path, encoding, body);
            assert_eq!(
                (response.status, response.code()),
                (415, "unsupported_encoding".into()),
                "{encoding}"
            );
            let message = response.json()["error"]["message"].to_string();
            assert!(message.contains("Content-Encoding"), "{message}");
            assert_eq!(response.header("accept-encoding"), Some("identity"));
        }
    }
    let twice = [
        ("Content-Encoding", "identity"),
        ("Content-Encoding", "gzip"),
    ];
    assert_eq!(
        service.request("POST", "/export", &twice, b"{}").status,
        415
    );
    for encoding in ["", "identity", "Identity , identity", ","] {
        assert_eq!(send("/export", encoding, &submission).status, 200);
    }
}

#[test]
fn a_byte_order_mark_is_named_wherever_it_is() {
    let service = Service::start(&[]);
    let url = "https://a.example/in";
    let body = json!({"uri": url, "data": {}}).to_string();
    let utf16 = |encode: fn(u16) -> [u8; 2]| {
        let units = "\u{feff}".encode_utf16().chain(body.encode_utf16());
        units.flat_map(encode).collect::<Vec<u8>>()
    };
    let text = |data: &str| format!("{{\"uri\":\"{url}\",\n\"data\":{data}}}").into_bytes();
    for body in [
        format!("\u{feff}{body}").into_bytes(),
        format!(" \r\n\u{feff}{body}").into_bytes(),
        format!("{body}\n\u{feff}").into_bytes(),
        utf16(u16::to_le_bytes),
        utf16(u16::to_be_bytes),
        text("\u{feff}{\"a\":1}"),
        text("\"\u{feff}{}\""),
        text(r#""\ufeff[]""#),
        text(r#""\n\ufeff[]""#),
    ] {
        let headers = [("X-Api-Key", token(url))];
        let headers = headers
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let response = service.request("POST", "/export", &headers, &body);
        assert_eq!(response.status, 400, "{}", response.body);
        let shown = String::from_utf8_lossy(&body);
        for word in ["byte order mark", "UTF-8 without"] {
            assert!(response.body.contains(word), "{shown}: {}", response.body);
        }
    }
    // Inside a string it is a character like any other.
    let body = json!({"uri": url, "data": {"\u{feff}": "\u{feff}"}}).to_string();
    let headers = [("X-Api-Key", token(url))];
    let headers = headers
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    assert_eq!(
        service
            .request("POST", "/export", &headers, body.as_bytes())
            .status,
        200
    );
}

#[test]
fn a_host_that_no_look_up_could_ever_find_is_refused_at_once() {
    let service = Service::start(&[]);
    for (url, words) in [
        ("http://[fe80::1%25eth0]/", "zone id"),
        ("http://[fe80::1%eth0]:9090/in", "zone id"),
        ("http://[v1.x]/", "IPv6 address"),
        ("https://a..b/", "labels"),
    ] {
        let body = json!({"uri": url, "data": {}});
        let response = service.post("/export", &token(url), &body);
        assert_eq!(response.status, 400, "{}", response.body);
        assert!(response.body.contains(words), "{}", response.body);
    }
}

/// Everything that is answered to these bytes, up to the end of the connection.
fn raw(service: &Service, request: &str) -> String {
    let mut stream = service.connect_from([127, 0, 0, 1]);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_head_request_that_is_refused_gets_the_headers_of_a_get_and_no_body() {
    let service = Service::start(&["--max-body", "2048"]);
    for (rest, status) in [
        (" /status HTTP/1.1\r\n\r\n", "400"),
        (" /status HTTP/1.1\r\nHost: x\r\nA b: c\r\n\r\n", "400"),
        (" /status HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", "400"),
        (
            " /status HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n",
            "417",
        ),
        (
            " /status HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n\r\n",
            "415",
        ),
        (
            " /status HTTP/1.1\r\nHost: x\r\nContent-Length: 2049\r\n\r\n",
            "413",
        ),
        (
            " /status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            "400",
        ),
        (" /status HTTP/2.0\r\nHost: x\r\n\r\n", "505"),
        (
            " /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            "404",
        ),
    ] {
        let answers = ["GET", "HEAD"].map(|method| {
            // A request before it must not be taken for the one that is refused.
            let before = "POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
            let answer = raw(&service, &format!("{before}{method}{rest}"));
            let (_, answer) = answer.split_once("HTTP/1.1 405").unwrap();
            let (_, answer) = answer.split_once("HTTP/1.1 ").unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let head = head.lines().filter(|line| !line.starts_with("Date:"));
            (head.collect::<Vec<_>>().join("\n"), body.to_owned())
        });
        let [(get, full), (head, none)] = answers;
        assert!(get.starts_with(status), "{rest:?}: {get}");
        assert_eq!(get, head);
        assert!(!full.is_empty());
        assert_eq!(none, "", "{rest:?}");
    }
}

#[test]
fn the_status_is_active_and_needs_no_token() {
    let service = Service::start(&[]);
    let response = service.request("GET", "/status", &[], b"");
    assert_eq!((response.status, response.body.as_str()), (200, "active"));
}

#[test]
fn an_export_is_found_only_by_its_owner_with_its_destination() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let other = format!("{url}/other");
    let body = json!({"uri": url, "data": payload(1)});
    let submitted = service
        .post("/lp/export", &token_of("me", url), &body)
        .json();
    let id = submitted["id"].as_str().unwrap();
    let unknown = "01890a5d-ac96-774b-bcce-b302099a8057";
    for (token, body) in [
        (token_of("you", url), json!({"id": id})),
        (token_of("", url), json!({"id": id})),
        (token_of("me", &other), json!({"id": id})),
        (token_of("me", url), json!({"id": id, "uri": other})),
        (token_of("me", url), json!({"id": unknown})),
        (token_of("me", url), json!({"id": "not a uuid"})),
    ] {
        let response = service.post("/export", &token, &body);
        assert_eq!(
            (response.status, response.code().as_str()),
            (404, "no_such_export"),
            "{body}"
        );
    }
    for body in [
        json!({"id": id}),
        json!({"id": id, "uri": url, "data": 5, "more": {}}),
    ] {
        assert_eq!(
            service.post("/export", &token_of("me", url), &body).json()["state"],
            "Finished"
        );
    }
}

#[test]
fn an_idempotency_key_makes_one_export_of_a_repeated_submission() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let other = format!("{url}/other");
    let submit = |service: &Service, owner: &str, url: &str, number: usize| {
        let body = json!({"uri": url, "data": payload(number)}).to_string();
        let token = token_of(owner, url);
        let headers = [("X-Api-Key", token.as_str()), ("Idempotency-Key", "key-1")];
        service.request("POST", "/lp/export", &headers, body.as_bytes())
    };
    let first = submit(&service, "me", url, 1).json();
    assert_eq!(first["state"], "Finished");
    assert_eq!(submit(&service, "me", url, 1).json(), first);
    let service = service.kill_and_restart();
    assert_eq!(submit(&service, "me", url, 1).json(), first, "durable");
    let conflict = submit(&service, "me", url, 2);
    assert_eq!(
        (conflict.status, conflict.code().as_str()),
        (409, "idempotency_conflict")
    );
    // Keys belong to the queue, since a real arbiter gives all apps the same identifier.
    let elsewhere = submit(&service, "me", &other, 2).json();
    assert_eq!(elsewhere["state"], "Finished");
    assert_eq!(submit(&service, "me", &other, 2).json(), elsewhere);
    assert_eq!(submit(&service, "me", &other, 1).status, 409);
    let stranger = submit(&service, "you", url, 1).json();
    let ids = [&first["id"], &elsewhere["id"], &stranger["id"]];
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
    assert_eq!(destination.arrivals().len(), 3);
}

#[test]
fn submissions_with_one_key_at_the_same_time_become_one_export() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    let token = token(url);
    let headers = [("X-Api-Key", token.as_str()), ("Idempotency-Key", "same")];
    let streams: Vec<_> = (0..20)
        .map(|_| service.send("POST", "/lp/export", &headers, body.as_bytes()))
        .collect();
    let ids: Vec<_> = streams
        .into_iter()
        .map(|stream| Response::read(stream).json()["id"].clone())
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(destination.arrivals().len(), 1);
}

#[test]
fn a_client_that_weights_encodings_with_nan_harms_nobody() {
    let service = Service::start(&[]);
    let weights: Vec<_> = (0..50)
        .map(|n| {
            if n % 2 == 0 {
                "a;q=NaN".into()
            } else {
                format!("a;q=0.{n}")
            }
        })
        .collect();
    for te in [weights.join(", ").as_str(), "chunked", "identity;q=0"] {
        let response = service.request("GET", "/status", &[("TE", te)], b"");
        assert_eq!(response.body, "active");
        assert_eq!(response.header("content-length"), Some("6"));
    }
}
