//! Answers of a destination, through a socket and ureq: an attempt ends with what the reader of responses
//! says of the same bytes, on a new connection and on one that is used again, and no `Retry-After` is too
//! much for the verdict on it.
//!
//! An input is two bytes that say where an answer is cut in two, and up to three answers with 0xff between.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use export_service::delivery::addresses::Rules;
use export_service::delivery::attempt::{Client, Kind, Outcome, Settings};
use export_service::delivery::connect::LookUp;
use export_service::delivery::retry::retry;
use export_service::delivery::tls::Trust;
use export_service::destination::Destination;
use export_service::dial::{Late, LookUpError};
use uuid::Uuid;

use super::response;

const PAYLOAD: &[u8] = b"{\"the\":\"end\"}";
const MOST_BODY: usize = 1024;
/// Far more than any answer takes.
const TIMEOUT: Duration = Duration::from_secs(60);

pub fn run(bytes: &[u8]) {
    let Some((cut, answers)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let cut = u16::from_be_bytes(*cut).into();
    for answer in answers.split(|byte| *byte == 0xff).take(3) {
        attempt(answer, cut);
    }
}

fn attempt(answer: &[u8], cut: usize) {
    let expected = response::read(answer, answer.len().max(1));
    let (first, second) = answer.split_at(cut.min(answer.len()));
    *PEER.answer.lock().unwrap() = Answer {
        pieces: [first.to_vec(), second.to_vec()],
        // As the framing says where the answer ends, and a server may keep the connection.
        stays: expected.as_ref().is_some_and(|(head, _, done, used)| {
            let closes = head.windows(17).any(|line| line == b"Connection: close");
            *done && *used == answer.len() && !closes
        }),
    };
    let destination = Destination::parse(&PEER.url).expect("a URL");
    let outcome = PEER.client.post(Uuid::nil(), &destination, PAYLOAD);
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let again = retry(&outcome, &destination, true, &[429, 500, 503], now);
    match (outcome, expected) {
        (Outcome::Answered(answer), Some((head, body, done, _))) => {
            let status = answer.status.to_string();
            assert!(head.starts_with(format!("HTTP/1.1 {status} ").as_bytes()));
            assert_eq!(answer.body, body[..body.len().min(MOST_BODY)]);
            // Those have no body that could be cut off.
            let is_bare = matches!(answer.status, 101 | 204 | 304);
            let is_cut = !done && !is_bare || body.len() > MOST_BODY;
            assert_eq!(answer.truncated, is_cut);
            assert_eq!(again.is_some(), [429, 500, 503].contains(&answer.status));
            assert!(again.is_none_or(|again| again.least_wait >= 0));
        }
        (Outcome::Failed(failure), None) => {
            assert!(matches!(failure.kind, Kind::Closed | Kind::Protocol));
            assert!(again.is_some());
        }
        (outcome, expected) => panic!("{outcome:?} instead of {expected:?}"),
    }
}

static PEER: LazyLock<Peer> = LazyLock::new(|| {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            thread::spawn(move || serve(stream));
        }
    });
    let settings = Settings {
        timeout: TIMEOUT,
        max_response: MOST_BODY,
        rules: Rules {
            allowed: vec!["127.0.0.0/8".parse().expect("a network")],
            own_ports: vec![1],
        },
        trust: Trust::new(None).expect("the usual roots"),
        signing_key: None,
    };
    Peer {
        url: format!("http://destination.example:{}/in", address.port()),
        client: Client::with_names(settings, Name(address)),
        answer: Mutex::default(),
    }
});

/// The destination and the client that sends to it.
struct Peer {
    url: String,
    client: Client,
    answer: Mutex<Answer>,
}

#[derive(Clone, Default)]
struct Answer {
    pieces: [Vec<u8>; 2],
    /// Whether the connection stays open.
    stays: bool,
}

/// Answers requests as long as the connection stays open.
fn serve(mut stream: TcpStream) {
    let mut request = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        request.extend_from_slice(&buffer[..read]);
        if !request.ends_with(PAYLOAD) {
            continue;
        }
        request.clear();
        let Answer { pieces, stays } = PEER.answer.lock().unwrap().clone();
        // A client that has seen enough may have closed it.
        let written = pieces.iter().try_for_each(|piece| stream.write_all(piece));
        if !stays || written.is_err() {
            let _ = stream.shutdown(Shutdown::Write);
            return;
        }
    }
}

/// The destination's name.
#[derive(Debug)]
struct Name(SocketAddr);

impl LookUp for Name {
    fn look_up(&self, _: &str, _: u16, _: Instant) -> Result<Vec<SocketAddr>, LookUpError> {
        Ok(vec![self.0])
    }

    fn late(&self, _: &str, _: u16, _: Instant) -> Late {
        Late::All(vec![self.0])
    }
}
