//! What the gate reads as one request, and that tiny_http reads the same (RFC 9112).

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use export_service::answer::Refusal;
use export_service::gate::framing::{Framer, Phase, Request};
use proptest::prelude::*;

const MAX_BODY: usize = 4096;

/// All requests in these bytes, which arrive in pieces of these sizes, and why there are no more.
fn requests(
    bytes: &[u8],
    mut pieces: impl Iterator<Item = usize>,
) -> (Vec<Request>, Option<Refusal>) {
    let (mut framer, mut rest, mut found) = (Framer::new(MAX_BODY), bytes, Vec::new());
    loop {
        match framer.take() {
            Ok(Some(request)) => found.push(request),
            Ok(None) if rest.is_empty() => return (found, None),
            Ok(None) => {
                let piece = pieces.next().unwrap().clamp(1, rest.len());
                let (mut now, later) = rest.split_at(piece);
                // A large piece is read in several steps.
                while !now.is_empty() {
                    framer.read_from(&mut now).unwrap();
                }
                rest = later;
            }
            Err(refusal) => return (found, Some(refusal)),
        }
    }
}

fn all_at_once(bytes: &[u8]) -> (Vec<Request>, Option<Refusal>) {
    requests(bytes, std::iter::repeat(usize::MAX))
}

/// A request as text: method, target, body.
fn seen(mut request: Request) -> (String, String, String) {
    let (method, target) = (request.method().to_owned(), request.target().to_owned());
    let body = String::from_utf8(request.take_body()).unwrap();
    (method, target, body)
}

#[test]
fn well_formed_requests_are_read_as_they_are() {
    for (text, expected) in [
        (
            "GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n",
            vec![("GET", "/a?b=c", "")],
        ),
        ("GET /a HTTP/1.0\r\n\r\n", vec![("GET", "/a", "")]),
        ("GET /a HTTP/1.1\r\nHost:\r\n\r\n", vec![("GET", "/a", "")]),
        (
            "\r\n\r\nGET /a HTTP/1.1\r\nHost: x\r\n\r\n\r\n",
            vec![("GET", "/a", "")],
        ),
        (
            "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
            vec![("OPTIONS", "*", "")],
        ),
        (
            "GET http://y:80/a?b HTTP/1.1\r\nHost: x\r\n\r\n",
            vec![("GET", "/a?b", "")],
        ),
        (
            "GET https://y HTTP/1.1\r\nHost: x\r\n\r\n",
            vec![("GET", "/", "")],
        ),
        (
            "GET http://y?b HTTP/1.1\r\nHost: x\r\n\r\n",
            vec![("GET", "/?b", "")],
        ),
        (
            "GET /a HTTP/1.1\r\nHost: [::1]:80\r\nX: \u{e9}\r\n\r\n",
            vec![("GET", "/a", "")],
        ),
        (
            "POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 003\r\n\r\nabcGET /b HTTP/1.1\r\nHost: x\r\n\r\n",
            vec![("POST", "/a", "abc"), ("GET", "/b", "")],
        ),
        (
            "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: CHUNKED\r\n\r\n\
             3;ext=\"v\"\r\nabc\r\n0a \r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n",
            vec![("POST", "/a", "abc0123456789")],
        ),
        (
            "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /b HTTP/1.0\r\n\r\n",
            vec![("POST", "/a", ""), ("GET", "/b", "")],
        ),
        // There are no upgrades: the request is answered without (RFC 9110, section 7.8).
        (
            "GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
            vec![("GET", "/a", "")],
        ),
    ] {
        let (found, refusal) = all_at_once(text.as_bytes());
        assert_eq!(refusal, None, "{text:?}");
        let found: Vec<_> = found.into_iter().map(seen).collect();
        let expected: Vec<_> = expected
            .into_iter()
            .map(|(method, target, body)| (method.to_owned(), target.to_owned(), body.to_owned()))
            .collect();
        assert_eq!(found, expected, "{text:?}");
    }
}

#[test]
fn requests_that_can_be_read_in_two_ways_are_refused() {
    let with = |headers: &str| format!("POST /a HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n");
    let chunks = |chunks: &str| with("Transfer-Encoding: chunked") + chunks;
    let line = |line: &str| format!("{line}\r\nHost: x\r\n\r\n");
    for (text, status) in [
        // Lengths.
        (with("Content-Length: -5"), 400),
        (with("Content-Length: +5"), 400),
        (with("Content-Length: abc"), 400),
        (with("Content-Length: 0x5"), 400),
        (with("Content-Length: 5 5"), 400),
        (with("Content-Length: 3, 3"), 400),
        (with("Content-Length:"), 400),
        (with("Content-Length: 3\r\nContent-Length: 3"), 400),
        (with("Content-Length: 3\r\ncontent-length: 4"), 400),
        (with("Content-Length : 3"), 400),
        (with(" Content-Length: 3"), 400),
        (with("A: b\r\n Content-Length: 3"), 400),
        (with("Content-Length: 4097"), 413),
        (with("Content-Length: 9999999999999999"), 413),
        (
            with("Content-Length: 99999999999999999999999999999999"),
            413,
        ),
        (with("A: b"), 411),
        ("PUT /a HTTP/1.0\r\n\r\n".into(), 411),
        // Transfer codings.
        (with("Transfer-Encoding: chunked\r\nContent-Length: 3"), 400),
        (with("Content-Length: 3\r\nTransfer-Encoding: chunked"), 400),
        (
            with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
            400,
        ),
        (with("Transfer-Encoding: chunked, chunked"), 400),
        (with("Transfer-Encoding: chunked, identity"), 400),
        (with("Transfer-Encoding: gzip"), 400),
        (with("Transfer-Encoding: xchunked"), 400),
        (with("Transfer-Encoding: \"chunked\""), 400),
        (with("Transfer-Encoding: chunked;q=1"), 400),
        (with("Transfer-Encoding:"), 400),
        (with("Transfer-Encoding: \u{b}chunked"), 400),
        (with("Transfer-Encoding: gzip, chunked"), 501),
        (with("Transfer_Encoding: chunked"), 411),
        (
            "POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            400,
        ),
        // Chunks.
        (chunks("\r\n"), 400),
        (chunks(" 3\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks("-1\r\n"), 400),
        (chunks("0x3\r\nabc\r\n"), 400),
        (chunks("3\nabc\r\n0\r\n\r\n"), 400),
        (chunks("3\r\nabcd\r\n0\r\n\r\n"), 400),
        (chunks("3\r\nabc\n0\r\n\r\n"), 400),
        (chunks("3;a\nb\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks("3;a\0b\r\nabc\r\n0\r\n\r\n"), 400),
        (chunks("fffffffffffffffff\r\n"), 400),
        (chunks("ffffffffffffffff\r\n"), 413),
        (chunks("1001\r\n"), 413),
        (chunks(&format!("3;{}\r\n", "a".repeat(300))), 400),
        (chunks("0\r\nTrailer\r\n\r\n"), 400),
        (chunks("0\r\nA: b\nC: d\r\n\r\n"), 400),
        (
            chunks(&format!("0\r\nA: {}\r\n\r\n", "b".repeat(17_000))),
            431,
        ),
        (chunks(&format!("0\r\n{}\r\n", "A: b\r\n".repeat(65))), 431),
        // Lines and characters.
        ("GET /a HTTP/1.1\nHost: x\n\n".into(), 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\nA: b\n\r\n".into(), 400),
        (
            "GET /a HTTP/1.1\r\nHost: x\r\nA: b\rC: d\r\n\r\n".into(),
            400,
        ),
        ("GET /a HTTP/1.1\r\nHost: x\r\nA: b\0\r\n\r\n".into(), 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\nA\r\n\r\n".into(), 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n".into(), 400),
        ("\u{16}\u{3}\u{1}".into(), 400),
        (" GET /a HTTP/1.1\r\nHost: x\r\n\r\n".into(), 400),
        (line("GET  /a HTTP/1.1"), 400),
        (line("GET /a  HTTP/1.1"), 400),
        (line("GET /a b HTTP/1.1"), 400),
        (line("GET\t/a\tHTTP/1.1"), 400),
        (line("GET /a"), 400),
        (line("GET /a HTTP/1.1 "), 400),
        (line("GET /a http/1.1"), 400),
        (line("GE(T /a HTTP/1.1"), 400),
        (line("GET /\u{e9} HTTP/1.1"), 400),
        (line("GET /a#b HTTP/1.1"), 400),
        (line("GET a HTTP/1.1"), 400),
        (line("GET * HTTP/1.1"), 400),
        (line("GET ftp://y/a HTTP/1.1"), 400),
        (line("GET http://u@y/a HTTP/1.1"), 400),
        (line("CONNECT y:443 HTTP/1.1"), 501),
        (line("GET /a HTTP/2.0"), 505),
        (line("GET /a HTTP/1.2"), 505),
        (line("GET /a HTTP/0.9"), 505),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), 505),
        // Headers.
        ("GET /a HTTP/1.1\r\n\r\n".into(), 400),
        ("GET /a HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n".into(), 400),
        ("GET /a HTTP/1.1\r\nHost: x y\r\n\r\n".into(), 400),
        ("GET /a HTTP/1.1\r\nHost: u@x\r\n\r\n".into(), 400),
        (
            with("Content-Length: 0\r\nX-Api-Key: a\r\nx-api-key: b"),
            400,
        ),
        (with("Content-Length: 0\r\nAuthorization: \u{e9}"), 400),
        (with("Content-Length: 3\r\nExpect: 200-ok"), 417),
        (with(&"A: b\r\n".repeat(70)), 431),
        (with(&format!("A: {}", "b".repeat(17_000))), 431),
        (format!("GET /{} HTTP/1.1\r\n", "a".repeat(17_000)), 431),
    ] {
        let (found, refusal) = all_at_once(text.as_bytes());
        assert!(found.is_empty(), "{text:?}");
        let refused = refusal.as_ref().map(|refusal| refusal.status().0);
        assert_eq!(refused, Some(status), "{text:.200?}: {refusal:?}");
    }
}

#[test]
fn the_client_says_whether_its_connection_is_kept() {
    for (text, keeps) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", true),
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: a, Close\r\n\r\n",
            false,
        ),
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n",
            false,
        ),
        ("GET / HTTP/1.0\r\n\r\n", false),
        ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
    ] {
        let (found, _) = all_at_once(text.as_bytes());
        assert_eq!(found[0].keeps_alive(), keeps, "{text:?}");
    }
}

#[test]
fn a_100_continue_is_sent_once_and_only_to_a_client_that_waits_for_it() {
    let head = |version: &str| {
        format!(
            "POST / HTTP/{version}\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 3\r\n\r\n"
        )
    };
    for (text, waits) in [
        (head("1.1"), true),
        (head("1.0"), false),
        (head("1.1") + "a", false),
        (head("1.1").replace('3', "0"), false),
    ] {
        let mut framer = Framer::new(MAX_BODY);
        framer.read_from(&mut text.as_bytes()).unwrap();
        framer.take().unwrap();
        assert_eq!(framer.takes_continue(), waits, "{text:?}");
        assert!(!framer.takes_continue());
    }
}

#[test]
fn an_announced_length_takes_no_memory_before_it_is_sent() {
    let mut framer = Framer::new(usize::MAX);
    let head = format!(
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        usize::MAX
    );
    framer.read_from(&mut head.as_bytes()).unwrap();
    assert_eq!(framer.take(), Ok(None));
    assert_eq!(framer.phase(), Phase::Body(usize::MAX));
}

#[test]
fn a_chunked_body_takes_memory_for_what_has_arrived_and_grows_in_few_steps() {
    let max_body = 1_000_000;
    let mut framer = Framer::new(max_body);
    let mut sent: &[u8] = &[
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nF4240\r\n",
        &vec![b'a'; max_body][..],
    ]
    .concat();
    let (all, mut steps) = (sent.len(), Vec::new());
    while framer.read_from(&mut sent).unwrap() > 0 {
        assert_eq!(framer.take(), Ok(None));
        let Phase::Body(bytes) = framer.phase() else {
            panic!("its head is there");
        };
        let come = all - sent.len();
        assert!(
            bytes >= come.min(max_body) && bytes <= 2 * come + 16 * 1024,
            "{come}"
        );
        if steps.last() != Some(&bytes) {
            steps.push(bytes);
        }
    }
    let powers = (14..20).map(|power| 1 << power);
    assert_eq!(steps, powers.chain([max_body]).collect::<Vec<_>>());
}

/// tiny_http behind a socket of its own, and a connection to it.
struct Inside {
    server: tiny_http::Server,
    link: UnixStream,
    _folder: tempfile::TempDir,
}

impl Inside {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let server =
            tiny_http::Server::from_listener(UnixListener::bind(&path).unwrap(), None).unwrap();
        let link = UnixStream::connect(path).unwrap();
        Self {
            server,
            link,
            _folder: folder,
        }
    }

    /// How tiny_http reads a request as it is passed on. Another one follows, so that a byte too many or
    /// too few is noticed.
    fn sees(&mut self, mut request: Request) -> (String, String, Vec<u8>) {
        let head = request.normalised_head(7);
        let body = request.take_body();
        self.link.write_all(&[&head, &body[..]].concat()).unwrap();
        let taken = self.receive();
        self.link.write_all(b"GET /next HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(self.receive(), ("GET".into(), "/next".into(), vec![]));
        taken
    }

    fn receive(&mut self) -> (String, String, Vec<u8>) {
        let mut request = self.server.recv().unwrap();
        let mut body = Vec::new();
        request.as_reader().read_to_end(&mut body).unwrap();
        let taken = (request.method().to_string(), request.url().to_owned(), body);
        request
            .respond(tiny_http::Response::from_data(*b""))
            .unwrap();
        let mut answer = [0; 1024];
        let read = self.link.read(&mut answer).unwrap();
        assert!(
            answer[..read].starts_with(b"HTTP/1.1 200 "),
            "{:?}",
            String::from_utf8_lossy(&answer[..read])
        );
        taken
    }
}

fn assert_tiny_http_sees_the_same(inside: &mut Inside, bytes: &[u8]) -> usize {
    let (found, _) = all_at_once(bytes);
    let (again, _) = all_at_once(bytes);
    let count = found.len();
    for (request, mut twin) in found.into_iter().zip(again) {
        let expected = (
            twin.method().to_owned(),
            twin.target().to_owned(),
            twin.take_body(),
        );
        assert_eq!(inside.sees(request), expected);
    }
    count
}

/// Requests that are nearly well-formed: valid and invalid pieces, put together.
fn messy() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just("POST /export?a=%20 HTTP/1.1\r\n"),
        Just("GET http://h/p HTTP/1.1\r\n"),
        Just("OPTIONS * HTTP/1.0\r\n"),
        Just("X-Y(Z) /\\\"<>{}|^` HTTP/1.1\r\n"),
        Just("M!#$%&'*+-.^_`|~ /:@;,=[] HTTP/1.1\r\n"),
    ];
    let header = prop::sample::select(vec![
        "Host: h\r\n",
        "Host: h\r\n",
        "Host: h\r\n",
        "Host: h\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Connection: upgrade\r\n",
        "Expect: 100-continue\r\n",
        "TE: trailers;q=NaN\r\n",
        "X-Api-Key:   a:b c\t\r\n",
        "Authorization:\r\n",
        "Idempotency-Key: \"'\\:,;\r\n",
        "Upgrade: h2c\r\n",
        "Content-Length : 5\r\n",
        "content-length: 0\r\n",
        " folded\r\n",
    ]);
    let body = prop_oneof![
        Just("\r\n"),
        Just("\r\nabcde"),
        Just("\r\n5\r\nabcde\r\n0\r\n\r\n"),
        Just("\r\n2;x\r\nab\r\n3\r\ncde\r\n0\r\nT: v\r\n\r\n"),
        Just("\n"),
    ];
    let request = (piece, prop::collection::vec(header, 0..6), body)
        .prop_map(|(line, headers, body)| [line, &headers.concat(), body].concat());
    let change = (any::<prop::sample::Index>(), any::<u8>());
    let changes = prop_oneof![3 => Just(vec![]), 1 => prop::collection::vec(change, 1..3)];
    (prop::collection::vec(request, 1..3), changes).prop_map(|(requests, changes)| {
        let mut bytes = requests.concat().into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

#[test]
fn tiny_http_sees_the_request_that_the_gate_has_seen() {
    let mut inside = Inside::new();
    let mut taken = 0;
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let inside = std::cell::RefCell::new(&mut inside);
    let count = std::cell::RefCell::new(&mut taken);
    runner
        .run(&messy(), |bytes| {
            **count.borrow_mut() +=
                assert_tiny_http_sees_the_same(&mut inside.borrow_mut(), &bytes);
            Ok(())
        })
        .unwrap();
    assert!(taken > 1000, "only {taken} of them were requests");
}

#[test]
fn tiny_http_sees_the_same_in_the_shapes_that_are_fuzzed_with() {
    let mut inside = Inside::new();
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/framing");
    for shape in std::fs::read_dir(corpus).unwrap() {
        let bytes = std::fs::read(shape.unwrap().path()).unwrap();
        assert_tiny_http_sees_the_same(&mut inside, &bytes);
    }
}

proptest! {
    #[test]
    fn it_makes_no_difference_in_which_pieces_bytes_arrive(
        bytes in messy(),
        pieces in prop::collection::vec(1_usize..9, 1..20),
    ) {
        let whole = all_at_once(&bytes);
        prop_assert_eq!(requests(&bytes, pieces.into_iter().cycle()), whole);
    }
}
