//! What tokens allow: contract section 2, with pymacaroons as the other side.

mod support;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use export_service::auth::{Key, Macaroon};
use serde_json::{Value, json};
use support::{Destination, Peer, Response, SECRET, Service, command, ok, payload};

/// pymacaroons in its own process.
struct Macaroons(Peer);

impl Macaroons {
    fn start() -> Self {
        Self(Peer::start("macaroons.py", &[]))
    }

    fn mint(&mut self, url: &str, more: &Value) -> String {
        let mut request = json!({
            "do": "mint",
            "secret": SECRET,
            "caveats": [
                "path = /export",
                "method = POST",
                "target = export-service",
                format!("destination = {url}"),
            ],
        });
        for (key, value) in more.as_object().unwrap() {
            request[key] = value.clone();
        }
        self.0.ask(&request)["token"].as_str().unwrap().to_owned()
    }
}

fn submit(service: &Service, url: &str, name: &str, value: &str) -> Response {
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    service.request("POST", "/export", &[(name, value)], body.as_bytes())
}

#[test]
fn tokens_minted_by_pymacaroons_export_in_every_format_and_header() {
    let destination = Destination::start(|_| ok());
    let url = &destination.url;
    let service = Service::start(&[]);
    let mut peer = Macaroons::start();
    for more in [
        json!({}),
        json!({"version": 2}),
        json!({"version": 2, "json": true}),
        json!({"identifier": "an app", "location": "https://arbiter.example/"}),
        json!({"identifier": "an app", "location": "https://arbiter.example/", "version": 2}),
        json!({"version": 2, "json": true, "identifier": "an app", "location": "somewhere"}),
        json!({"later": ["time < 2100-01-01T00:00:00Z", "method = post", "path = /ex*"]}),
        json!({"later": ["time < 4102444800"], "version": 2}),
        json!({"later": ["time < 4102444800.25", "time < 2100-01-01T00:00:00.250+01:00"]}),
    ] {
        let token = peer.mint(url, &more);
        let padded = format!("{token}{}", "=".repeat((4 - token.len() % 4) % 4));
        let unpadded = token.trim_end_matches('=');
        let mut values = vec![
            ("X-Api-Key", token.clone()),
            ("Authorization", format!("Bearer {token}")),
            (
                "Authorization",
                format!("Basic {}", STANDARD.encode(format!("{token}:"))),
            ),
        ];
        if token.starts_with('{') {
            values.push(("X-Api-Key", URL_SAFE_NO_PAD.encode(&token)));
        } else {
            values.push(("X-Api-Key", padded));
            values.push(("X-Api-Key", unpadded.to_owned()));
        }
        for (name, value) in values {
            let response = submit(&service, url, name, &value);
            assert_eq!(response.status, 200, "{more} in {name}: {}", response.body);
        }
    }
}

#[test]
fn forged_truncated_expired_and_incomplete_tokens_all_get_401() {
    let destination = Destination::start(|_| ok());
    let url = &destination.url;
    let service = Service::start(&[]);
    let mut peer = Macaroons::start();
    let good = peer.mint(url, &json!({}));
    let good_v2 = peer.mint(url, &json!({"version": 2}));
    assert_eq!(submit(&service, url, "X-Api-Key", &good).status, 200);
    let without = |peer: &mut Macaroons, index: usize| {
        let mut caveats = vec![
            "path = /export".to_owned(),
            "method = POST".to_owned(),
            "target = export-service".to_owned(),
            format!("destination = {url}"),
        ];
        caveats.remove(index);
        peer.mint(url, &json!({"caveats": caveats}))
    };
    let swapped = {
        // Another destination written into a genuine token.
        let text = good.trim_end_matches('=');
        let mut bytes = URL_SAFE_NO_PAD.decode(text).unwrap();
        let at = bytes.windows(2).position(|pair| pair == b"in").unwrap();
        bytes[at] ^= 1;
        URL_SAFE_NO_PAD.encode(bytes)
    };
    let dropped = {
        // The last caveat taken out, the signature kept.
        let bytes = URL_SAFE_NO_PAD.decode(good.trim_end_matches('=')).unwrap();
        let caveat = format!("cid destination = {url}\n");
        let at = bytes
            .windows(caveat.len())
            .position(|part| part == caveat.as_bytes())
            .unwrap();
        let kept = [&bytes[..at - 4], &bytes[at + caveat.len()..]].concat();
        URL_SAFE_NO_PAD.encode(kept)
    };
    let mut wrong = vec![
        (
            "another secret",
            peer.mint(url, &json!({"secret": "other"})),
        ),
        ("another destination swapped in", swapped),
        ("a caveat dropped", dropped),
        ("cut by one character", good[..good.len() - 2].to_owned()),
        ("cut in half", good[..good.len() / 2].to_owned()),
        ("v2 cut in half", good_v2[..good_v2.len() / 2].to_owned()),
        ("grown", format!("{}AAAA", good.trim_end_matches('='))),
        ("nothing", String::new()),
        ("no base64", "not a token!".to_owned()),
        ("JSON that is no macaroon", "{\"v\":2}".to_owned()),
        (
            "third-party caveat",
            peer.mint(url, &json!({"third_party": true})),
        ),
        (
            "third-party caveat in v2",
            peer.mint(url, &json!({"third_party": true, "version": 2})),
        ),
        (
            "third-party caveat in JSON",
            peer.mint(
                url,
                &json!({"third_party": true, "version": 2, "json": true}),
            ),
        ),
        ("no path", without(&mut peer, 0)),
        ("no method", without(&mut peer, 1)),
        ("no target", without(&mut peer, 2)),
        ("no destination", without(&mut peer, 3)),
        ("no caveats", peer.mint(url, &json!({"caveats": []}))),
    ];
    for caveat in [
        "target = another-service",
        "method = GET",
        "path = /lp/export",
        "destination = https://elsewhere.example/",
        "time < 2001-01-01T00:00:00Z",
        "time < 1000000000",
        "time < never",
        "time < 1900000000000",
        "time < 1000000000.5",
        "colour = green",
        "",
    ] {
        wrong.push((caveat, peer.mint(url, &json!({"later": [caveat]}))));
    }
    for (what, token) in &wrong {
        for (name, value) in [
            ("X-Api-Key", token.clone()),
            ("Authorization", format!("Bearer {token}")),
        ] {
            let response = submit(&service, url, name, &value);
            assert_eq!(
                (response.status, response.code().as_str()),
                (401, "unauthorized"),
                "{what}"
            );
            assert!(response.header("www-authenticate").is_some());
            let says = |words: &str| response.body.contains(words);
            match *what {
                "time < never" | "time < 1900000000000" => assert!(says("can be read"), "{what}"),
                "time < 1000000000.5" => assert!(says("has expired"), "{what}"),
                _ => {}
            }
            assert!(
                token.is_empty() || !response.body.contains(token.as_str()),
                "{what}"
            );
        }
    }
    assert!(wrong.len() >= 12);
    assert_eq!(
        destination.arrivals().len(),
        1,
        "only the good token sent anything"
    );
}

#[test]
fn tokens_minted_by_the_program_verify_in_pymacaroons() {
    let mut peer = Macaroons::start();
    let url = "https://a.example/in?key=1";
    for arguments in [
        vec![],
        vec!["--path", "/*", "--method", "post", "--id", "an app"],
        vec!["--expires", "1h"],
    ] {
        let output = command()
            .args(["token", "--destination", url])
            .args(&arguments)
            .env("EXPORT_SECRET", SECRET)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let token = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let answer = peer
            .0
            .ask(&json!({"do": "verify", "secret": SECRET, "token": token}));
        let caveats: Vec<_> = answer["caveats"].as_array().unwrap().iter().collect();
        assert!(
            caveats.contains(&&json!(format!("destination = {url}"))),
            "{caveats:?}"
        );
        assert!(caveats.contains(&&json!("target = export-service")));
        if arguments.contains(&"--id") {
            assert_eq!(answer["identifier"], "an app");
            assert!(caveats.contains(&&json!("path = /*")));
            assert!(caveats.contains(&&json!("method = POST")));
        }
        let expiring = caveats
            .iter()
            .any(|caveat| caveat.as_str().unwrap().starts_with("time < 20"));
        assert_eq!(expiring, arguments.contains(&"--expires"));
    }
}

#[test]
fn a_token_minted_by_the_program_allows_exports() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let output = command()
        .args([
            "token",
            "--path",
            "/export",
            "--expires",
            "1m",
            "--destination",
            &destination.url,
        ])
        .env("EXPORT_SECRET", SECRET)
        .output()
        .unwrap();
    let token = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        submit(&service, &destination.url, "X-Api-Key", token.trim()).status,
        200
    );
}

#[test]
fn a_service_accepts_only_tokens_for_its_own_name() {
    let service = Service::start(&["--name", "my-export"]);
    let url = "https://a.example/in";
    let minted = |name: &str| {
        let caveats = [
            "path = *",
            "method = POST",
            &format!("target = {name}"),
            "destination = https://a.example/in",
        ]
        .map(str::to_owned);
        Macaroon::mint(&Key::derive(SECRET.as_bytes()), "", caveats)
            .to_v1()
            .unwrap()
    };
    let poll = json!({"id": "01890a5d-ac96-774b-bcce-b302099a8057", "uri": url});
    assert_eq!(
        service.post("/export", &minted("my-export"), &poll).status,
        404
    );
    assert_eq!(
        service
            .post("/export", &minted("export-service"), &poll)
            .status,
        401
    );
}

#[test]
fn a_refusal_tells_its_client_what_differs_and_the_log_nothing_of_it() {
    let destination = Destination::start(|_| ok());
    let url = &destination.url;
    let service = Service::start(&[]);
    let mut peer = Macaroons::start();
    for (caveat, words) in [
        (
            "path = /lp/export",
            "this token is good for path /lp/export, and the request went to /export",
        ),
        (
            "method = GET",
            "this token is good for method GET, and this is a POST",
        ),
        (
            "target = the-other-service",
            "this token is good for the service the-other-service, and this one is export-service",
        ),
        (
            "destination = https://elsewhere.example/pass/word",
            "this token is good for exports to https://elsewhere.example/pass/word, and this one goes to http",
        ),
        (
            "time < 1700000000",
            "the token has expired: it was good until 2023-11-14T22:13:20Z, and it is 20",
        ),
        ("time < yesterday", "`time < yesterday`"),
        ("colour = green", "`colour = green`"),
    ] {
        let token = peer.mint(url, &json!({"later": [caveat]}));
        let response = submit(&service, url, "X-Api-Key", &token);
        assert_eq!(response.status, 401, "{caveat}");
        let answer = response.json();
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{caveat}: {message}");

        // A token of another secret is not explained, whatever it says.
        let forged = peer.mint(url, &json!({"later": [caveat], "secret": "other"}));
        let response = submit(&service, url, "X-Api-Key", &forged);
        let answer = response.json();
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(
            message.starts_with("the token's signature does not match"),
            "{message}"
        );
    }
    service.events("refused", 14);
    let log = service.log().concat();
    for quoted in [
        "pass/word",
        "the-other-service",
        "yesterday",
        "green",
        "2023-11-14",
    ] {
        assert!(!log.contains(quoted), "{quoted}: {log}");
    }
}

#[test]
fn an_export_of_somebody_else_is_not_found_and_nothing_is_explained() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let id = service.submit(&destination.url, &payload(1));
    let poll = |token: &str, id: &str| {
        let response = service.post("/export", token, &json!({"id": id}));
        (response.status, response.body)
    };
    let of_none = "01890a5d-ac96-774b-bcce-b302099a8057";
    let others = [
        support::token_of("an app", &destination.url),
        support::token("https://elsewhere.example/"),
    ];
    for token in others {
        assert_eq!(poll(&token, &id), poll(&token, of_none));
        assert_eq!(poll(&token, &id).0, 404);
    }
}

/// Runs `token` with this secret, and this on standard input.
fn run_token(
    secret: Option<&str>,
    arguments: &[&str],
    input: &str,
) -> (Option<i32>, String, String) {
    use std::io::Write;
    use std::process::Stdio;
    let mut child = command()
        .arg("token")
        .args(arguments)
        .envs(secret.map(|secret| ("EXPORT_SECRET", secret)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without reading that.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// The rows of `token --show`, with single blanks.
fn shown(secret: Option<&str>, token: &str) -> Vec<String> {
    let (code, out, errors) = run_token(secret, &["--show"], &format!("{token}\n"));
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    // As an argument it is the same.
    let (_, again, _) = run_token(secret, &["--show", token], "");
    assert_eq!(again.lines().count(), out.lines().count());
    let raw = URL_SAFE_NO_PAD.decode(token.trim_end_matches('='));
    if let Ok(raw) = raw {
        // None of the ways to write the signature, which v1 and v2 end with.
        let end = raw.strip_suffix(b"\n").unwrap_or(&raw);
        let signature = &end[end.len() - 32..];
        let hex: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
        for written in [
            STANDARD.encode(signature),
            URL_SAFE_NO_PAD.encode(signature),
            hex,
        ] {
            assert!(!out.contains(&written), "{out}");
        }
    }
    assert!(!out.contains(SECRET) && !out.contains(token), "{out}");
    let single = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    out.lines().map(single).collect()
}

#[test]
fn a_token_is_shown_with_what_it_is_good_for_and_until_when() {
    let mut peer = Macaroons::start();
    let url = "https://hooks.example/in?key=1";
    let later = json!(["time < 4102444800", "path = /ex*"]);
    for (more, format) in [
        (
            json!({"later": later, "identifier": "an app"}),
            "libmacaroons v1",
        ),
        (
            json!({"later": later, "identifier": "an app", "version": 2}),
            "libmacaroons v2",
        ),
        (
            json!({"later": later, "identifier": "an app", "version": 2, "json": true}),
            "libmacaroons v2 JSON",
        ),
    ] {
        let token = peer.mint(url, &more);
        let rows = shown(Some(SECRET), &token);
        let expected = [
            format!("format {format}"),
            "identifier an app".into(),
            "caveat path = /export for this path".into(),
            "caveat method = POST for POST requests".into(),
            "caveat target = export-service for the service named export-service".into(),
            format!("caveat destination = {url} for exports to exactly this URL"),
            "caveat time < 4102444800 until 2100-01-01T00:00:00Z, for another".into(),
            "caveat path = /ex* for paths that begin with /ex".into(),
            "signature made with this secret".into(),
            "good for exports with POST /export".into(),
        ];
        assert_eq!(rows.len(), expected.len(), "{rows:#?}");
        for (row, expected) in rows.iter().zip(&expected) {
            assert!(
                row.starts_with(expected.as_str()),
                "{row:?}, not {expected:?}"
            );
        }
    }
    let good = peer.mint(url, &json!({}));
    for (secret, token, rows) in [
        (
            None,
            good.clone(),
            [
                "signature not checked: give the secret",
                "good for exports with POST /export",
            ],
        ),
        (
            Some("another"),
            good.clone(),
            [
                "signature not made with this secret",
                "good for nothing: the token's signature does not match",
            ],
        ),
        (
            Some(SECRET),
            peer.mint(url, &json!({"later": ["time < 2023-11-14T22:13:20Z"]})),
            [
                "caveat time < 2023-11-14T22:13:20Z expired ",
                "good for nothing: the token has expired",
            ],
        ),
        (
            None,
            peer.mint(url, &json!({"later": ["colour = \u{1b}[31m"]})),
            [
                "caveat colour = \\u{1b}[31m never holds",
                "good for nothing: the token has the caveat `colour",
            ],
        ),
        (
            None,
            peer.mint(url, &json!({"later": ["destination = https://b.example/"]})),
            [
                "identifier none: exports belong to the address",
                "good for nothing: this token is good for exports",
            ],
        ),
        (
            None,
            peer.mint(url, &json!({"caveats": ["path = *"]})),
            [
                "caveat path = * for every path",
                "good for nothing: the token has no `target` caveat",
            ],
        ),
        (
            None,
            peer.mint(url, &json!({"later": ["target = other"]})),
            [
                "caveat target = other for the service named other",
                "good for nothing: this token is good for the",
            ],
        ),
    ] {
        let found = shown(secret, &token);
        for row in rows {
            assert!(
                found.iter().any(|found| found.starts_with(row)),
                "{row}: {found:#?}"
            );
        }
    }
    for token in [
        "nonsense",
        "",
        &"A".repeat(1_000_000),
        &peer.mint(url, &json!({"third_party": true})),
    ] {
        let (code, out, errors) = run_token(None, &["--show"], token);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{errors}");
        assert!(errors.len() < 300, "{errors}");
    }
}

#[test]
fn a_token_that_nobody_could_use_is_not_minted() {
    let url = "https://a.example/in";
    for (arguments, words) in [
        (&["--method", "GET"][..], "leave --method out"),
        (&["--method", ""], "leave --method out"),
        (&["--path", "/lp/exprt"], "give one of them"),
        (&["--path", "/status"], "give one of them"),
        (&["--path", "/export/*"], "give one of them"),
        (&["--path", "export"], "begin it with a slash"),
        (&["--path", ""], "begin it with a slash"),
        (&["--expires", "0s"], "nobody could use"),
        (&["--id", &"x".repeat(20_000)], "too long for a request"),
        (&["--show"], "--show"),
    ] {
        let all = [&["--destination", url], arguments].concat();
        let (code, out, errors) = run_token(Some(SECRET), &all, "");
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(errors.contains(words), "{arguments:?}: {errors}");
    }
    for path in [
        "*",
        "/*",
        "/lp/*",
        "/e*",
        "/export*",
        "/export",
        "/lp/export",
    ] {
        let all = ["--destination", url, "--path", path, "--method", "Post"];
        let (code, out, errors) = run_token(Some(SECRET), &all, "");
        assert_eq!((code, errors.as_str()), (Some(0), ""), "{path}");
        let rows = shown(Some(SECRET), out.trim_end());
        assert!(
            rows.iter()
                .any(|row| row.starts_with("good for exports with POST /"))
        );
        assert!(rows.contains(&"caveat method = POST for POST requests".to_owned()));
    }
}

#[test]
fn a_star_in_a_destination_is_warned_of_as_it_matches_nothing_else() {
    let url = "https://a.example/*";
    let (code, out, errors) = run_token(Some(SECRET), &["--destination", url], "");
    assert_eq!(code, Some(0));
    assert!(
        errors.contains("warning: --destination https://a.example/*: "),
        "{errors}"
    );
    assert!(errors.contains("its * stands for nothing else"), "{errors}");
    let service = Service::start(&[]);
    let send = |url: &str| {
        let body = json!({"uri": url, "data": payload(1)}).to_string();
        let token = [("X-Api-Key", out.trim())];
        service
            .request("POST", "/lp/export?timeout=0", &token, body.as_bytes())
            .status
    };
    assert_eq!((send(url), send("https://a.example/in")), (200, 401));
}
