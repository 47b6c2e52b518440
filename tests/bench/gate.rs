//! What the gate costs: the real program beside a bare tiny_http and a bare loop on a socket.
//!
//! `cargo bench --bench gate` takes a good minute. It prints rates at 64 keep-alive connections for
//! `GET /status`, for a poll and over TLS, and the latency on one connection. To measure another
//! build of the program, name it in `EXPORT_SERVICE_BIN`.
//!
//! Each server is a separate process, and they take turns in short rounds, so that other work on the
//! machine affects them alike. The clients are threads here and take their share of the processors, so the
//! ratio of the first server's median to another's says more than the rates.

#[path = "../support/mod.rs"]
mod support;

use std::env;
use std::io::{BufRead, BufReader, Read, Write};
use std::iter::repeat_with;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use export_service::gate::tls;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use support::{Destination, Identity, PATIENCE, Response, SECRET, Service, ok, payload, token};

/// Client connections where rates are measured.
const CROWD: usize = 64;
/// Rounds that count, for each server, after one to warm up.
const ROUNDS: usize = 5;
/// How long a round is.
const ROUND: Duration = Duration::from_secs(1);
/// Threads of the bare tiny_http, as many as the program has for requests.
const THREADS: usize = 8;

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["bare", answer] => bare(answer),
        ["raw", answer] => raw(answer, None),
        ["raw", answer, pem] => raw(answer, Some(pem)),
        // `cargo test --benches` only checks that it starts.
        _ if arguments.contains(&"--bench") && !arguments.contains(&"--test") => measure(),
        _ => {}
    }
}

fn measure() {
    let destination = Destination::start(|_| ok());
    let program = Contestant::program("program", &[], None);
    let (poll, finished) = finished_export(&program, &destination.url);
    let status = b"GET /status HTTP/1.1\r\nHost: bench\r\n\r\n";

    let bare = Contestant::rival("bare tiny_http", &["bare", "active"], None);
    let raw = Contestant::rival("bare loop", &["raw", "active"], None);
    let everybody = [&program, &bare, &raw];
    compare(
        ["GET /status, 64 connections, requests/s"],
        everybody.map(|one| one.crowd(CROWD, status, "active")),
        rate,
    );
    compare(
        [
            "GET /status, 1 connection, median in µs",
            "GET /status, 1 connection, 99th percentile in µs",
        ],
        everybody.map(|one| one.crowd(1, status, "active")),
        latency,
    );

    let bare = Contestant::rival("bare tiny_http", &["bare", &finished], None);
    let raw = Contestant::rival("bare loop", &["raw", &finished], None);
    compare(
        ["poll of a Finished export, 64 connections, requests/s"],
        [&program, &bare, &raw].map(|one| one.crowd(CROWD, &poll, &finished)),
        rate,
    );

    let identity = Identity::new("ec");
    let pem = &identity.pem().display().to_string();
    let trust = trusting(&identity);
    let secure = Contestant::program("program, TLS", &["--tls-pem", pem], trust.clone());
    let raw = Contestant::rival("bare loop, TLS", &["raw", "active", pem], trust);
    compare(
        ["GET /status over TLS, 64 connections, requests/s"],
        [&secure, &program, &raw].map(|one| one.crowd(CROWD, status, "active")),
        rate,
    );
}

/// Has an export delivered, and returns a request that polls it and the body of the answer.
fn finished_export(program: &Contestant, url: &str) -> (Vec<u8>, String) {
    let token = token(url);
    let key = ("X-Api-Key", token.as_str());
    let body = json!({ "uri": url, "data": payload(1) }).to_string();
    let submission = Service::written("POST", "/lp/export?timeout=30", &[key], body.as_bytes());
    let mut stream = program.connect();
    stream.write_all(&submission).unwrap();
    let answer = Response::read(stream);
    assert_eq!(answer.json()["state"], "Finished", "{}", answer.body);
    let body = json!({ "id": answer.json()["id"] }).to_string();
    let headers = [key, ("Connection", "keep-alive")];
    let poll = Service::written("POST", "/export", &headers, body.as_bytes());
    (poll, answer.body)
}

/// A server in a separate process, killed when this is dropped.
struct Contestant {
    name: &'static str,
    child: Child,
    address: SocketAddr,
    trust: Option<Arc<ClientConfig>>,
}

impl Contestant {
    /// The real program. Its warnings are shown.
    fn program(name: &'static str, arguments: &[&str], trust: Option<Arc<ClientConfig>>) -> Self {
        let mut child = support::command()
            .args(["serve", "--ephemeral", "--port", "0", "--bind", "127.0.0.1"])
            .args(["--log-format", "json", "--allow-network", "127.0.0.0/8"])
            .args(arguments)
            .env("EXPORT_SECRET", SECRET)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let listening = log.find(|line| line["event"] == "listening").unwrap();
        let complaints = log.filter(|line| line["level"] != "info");
        thread::spawn(|| complaints.for_each(|line| eprintln!("{line}")));
        let address = listening["address"].as_str().unwrap().parse().unwrap();
        Self {
            name,
            child,
            address,
            trust,
        }
    }

    /// This program again, as another server.
    fn rival(name: &'static str, arguments: &[&str], trust: Option<Arc<ClientConfig>>) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        let command = command.args(arguments).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.next().unwrap().unwrap().parse().unwrap();
        Self {
            name,
            child,
            address,
            trust,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// This many connections, opened one by one, each with a round trip: tiny_http loses some of those that
    /// arrive all at once.
    fn crowd(&self, size: usize, request: &[u8], body: &str) -> Crowd {
        let open = |_| {
            let stream = self.connect();
            let Some(trust) = &self.trust else {
                return Connection::prove(Box::new(stream), request, body);
            };
            let name = ServerName::try_from("localhost").unwrap();
            let client = ClientConnection::new(trust.clone(), name).unwrap();
            Connection::prove(Box::new(StreamOwned::new(client, stream)), request, body)
        };
        (self.name, (0..size).map(open).collect())
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The connections to the server of this name.
type Crowd = (&'static str, Vec<Connection>);

/// TCP or TLS.
trait Stream: Read + Write + Send {}
impl<S: Read + Write + Send> Stream for S {}

/// A keep-alive connection that repeats one request.
struct Connection {
    stream: Box<dyn Stream>,
    request: Vec<u8>,
    body: Vec<u8>,
    /// The last answer; all have the same length.
    answer: Vec<u8>,
}

impl Connection {
    /// Sends the first request, and learns the length of the answers.
    fn prove(mut stream: Box<dyn Stream>, request: &[u8], body: &str) -> Self {
        let body = body.as_bytes().to_vec();
        stream.write_all(request).unwrap();
        let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
        while !answer.ends_with(&body) {
            let read = stream.read(&mut piece).unwrap();
            answer.extend_from_slice(&piece[..read]);
            assert!(read > 0, "{}", String::from_utf8_lossy(&answer));
        }
        Self {
            stream,
            request: request.to_vec(),
            body,
            answer,
        }
    }

    fn ask(&mut self) {
        self.stream.write_all(&self.request).unwrap();
        self.stream.read_exact(&mut self.answer).unwrap();
        let good = self.answer.starts_with(b"HTTP/1.1 200 ") && self.answer.ends_with(&self.body);
        assert!(good, "{}", String::from_utf8_lossy(&self.answer));
    }
}

/// Requests per second in one round, with a thread for each connection.
fn rate(crowd: &mut [Connection]) -> [f64; 1] {
    let started = Instant::now();
    let ask_on = |one: &mut Connection| {
        let answers = repeat_with(|| one.ask());
        answers.take_while(|()| started.elapsed() < ROUND).count()
    };
    let served: usize = thread::scope(|scope| {
        let clients = crowd.iter_mut().map(|one| scope.spawn(move || ask_on(one)));
        let clients: Vec<_> = clients.collect();
        clients.into_iter().map(|one| one.join().unwrap()).sum()
    });
    [served as f64 / ROUND.as_secs_f64()]
}

/// The median and the 99th percentile of the round trips of one round on one connection, in µs.
fn latency(crowd: &mut [Connection]) -> [f64; 2] {
    let started = Instant::now();
    let mut took = Vec::new();
    while started.elapsed() < ROUND {
        let asked = Instant::now();
        crowd[0].ask();
        took.push(asked.elapsed().as_secs_f64() * 1e6);
    }
    took.sort_by(f64::total_cmp);
    [took[took.len() / 2], took[took.len() * 99 / 100]]
}

/// Measures all in turns, and prints each figure of each and how the first compares to the others.
fn compare<const N: usize>(
    titles: [&str; N],
    mut crowds: [Crowd; 3],
    measure: impl Fn(&mut [Connection]) -> [f64; N],
) {
    let mut round = || crowds.each_mut().map(|(_, crowd)| measure(crowd));
    round();
    let rounds: [_; ROUNDS] = std::array::from_fn(|_| round());
    for (figure, title) in titles.iter().enumerate() {
        println!("\n{title:<54}  median     min     max   ratio");
        let mut first = None;
        for (place, (name, _)) in crowds.iter().enumerate() {
            let mut all = rounds.map(|round| round[place][figure]);
            all.sort_by(f64::total_cmp);
            let (min, median, max) = (all[0], all[ROUNDS / 2], all[ROUNDS - 1]);
            let ratio = *first.get_or_insert(median) / median;
            println!("  {name:<52} {median:>7.0} {min:>7.0} {max:>7.0}   {ratio:>5.2}");
        }
    }
}

/// tiny_http as a program without a gate would use it.
fn bare(answer: &str) {
    let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
    println!("{}", server.server_addr());
    let serve = || {
        for mut request in server.incoming_requests() {
            let mut body = Vec::new();
            request.as_reader().read_to_end(&mut body).unwrap();
            // It fails if the client has closed.
            let _ = request.respond(tiny_http::Response::from_string(answer));
        }
    };
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(serve);
        }
    });
}

/// As little as a server can do, with a thread for each connection.
fn raw(answer: &str, pem: Option<&str>) {
    let identity = pem.map(|pem| tls::Identity::load(pem.into()).unwrap());
    let length = answer.len();
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{answer}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("{}", listener.local_addr().unwrap());
    thread::scope(|scope| {
        for stream in listener.incoming() {
            let (stream, answer) = (stream.unwrap(), answer.as_bytes());
            stream.set_nodelay(true).unwrap();
            match &identity {
                None => scope.spawn(move || answer_all(stream, answer)),
                Some(identity) => {
                    let server = ServerConnection::new(identity.config()).unwrap();
                    scope.spawn(move || answer_all(StreamOwned::new(server, stream), answer))
                }
            };
        }
    });
}

/// Answers every request on a connection. Anything but well-formed requests, one at a time and with
/// Content-Length as the last header, would confuse it.
fn answer_all(mut stream: impl Read + Write, answer: &[u8]) {
    let (mut request, mut piece) = (String::new(), [0; 4096]);
    while let Ok(read @ 1..) = stream.read(&mut piece) {
        request += str::from_utf8(&piece[..read]).unwrap();
        let Some((head, body)) = request.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head.split_once("Content-Length: ").map_or("0", |it| it.1);
        if length.parse() == Ok(body.len()) {
            // If it fails the client has closed, and the next read says so.
            let _ = stream.write_all(answer);
            request.clear();
        }
    }
}

/// The TLS configuration of clients that trust the CA of this certificate.
fn trusting(identity: &Identity) -> Option<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(identity.ca()).unwrap();
    roots.add(ca).unwrap();
    let builder = ClientConfig::builder().with_root_certificates(roots);
    Some(Arc::new(builder.with_no_client_auth()))
}
