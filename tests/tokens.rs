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
        vec!["--path", "/*", "--method", "GET", "--id", "an app"],
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
            assert!(caveats.contains(&&json!("method = GET")));
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
