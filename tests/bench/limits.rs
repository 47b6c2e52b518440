//! The limits: programs that do nothing but the part that the service cannot do without. Each is this
//! program in another process.
//!
//! A limit that is a server prints its address. The others do their work for as many microseconds as a line
//! of their input says, and print how many operations that were, and times in µs.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use export_service::gate::tls;
use rusqlite::Connection;
use rustls::{ServerConnection, StreamOwned};
use ureq::Agent;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::disk::Disk;
use crate::load::{Until, Work, drive, payload};

/// Threads of the bare tiny_http, as many as the service has for requests.
const THREADS: usize = 8;

/// Runs the limit that the arguments name. False if they name none.
pub fn run(arguments: &[&str]) -> bool {
    match arguments {
        ["tiny_http", answer] => tiny_http(answer),
        ["loop", answer] => bare_loop(answer, None),
        ["loop", answer, pem] => bare_loop(answer, Some(pem)),
        ["sqlite", clients, folder] => sqlite(clients.parse().unwrap(), Path::new(folder)),
        ["ureq", url] => ureq(url),
        ["direct", url, folder] => direct(url, Path::new(folder)),
        _ => return false,
    }
    true
}

/// tiny_http as a program without a gate would use it.
fn tiny_http(answer: &str) {
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
fn bare_loop(answer: &str, pem: Option<&str>) {
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

/// Works as each line of the input says.
fn work_as_told(mut work: impl FnMut(Until) -> Work) {
    for line in io::stdin().lines() {
        let time = Duration::from_micros(line.unwrap().parse().unwrap());
        let work = work(Until::Elapsed(time));
        let [wall, p50, p99] = [work.wall, work.p50, work.p99].map(|time| time.as_micros());
        println!("{} {wall} {p50} {p99}", work.operations);
    }
}

/// A payload on its way to the thread that writes, and where that says that it is committed.
type Handover = (String, Sender<()>);

/// Group commit with SQLite alone: clients that each wait for their payload to be committed, and one thread
/// that commits all that wait. Its CPU time is what that thread takes: the others end with each round.
fn sqlite(clients: usize, folder: &Path) {
    let (sender, payloads) = bounded::<Handover>(clients);
    let connection = Connection::open(folder.join("bare.db")).unwrap();
    // As the service sets it.
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -1024;
             PRAGMA secure_delete = true;
             CREATE TABLE exports (seq INTEGER PRIMARY KEY, payload BLOB)",
        )
        .unwrap();
    grow_wal(&connection);
    thread::spawn(move || commit_all(&connection, &payloads));
    let mut clients: Vec<_> = (0..clients).map(|_| bounded::<()>(1)).collect();
    work_as_told(|until| {
        drive(&mut clients, until, |(done, committed), number| {
            sender.send((payload(number), done.clone())).unwrap();
            committed.recv().unwrap();
        })
    });
}

/// Makes the log as long as it becomes: then it is overwritten, and syncs are fast.
fn grow_wal(connection: &Connection) {
    connection
        .execute_batch(
            "INSERT INTO exports (payload) VALUES (zeroblob(8000000)); DELETE FROM exports",
        )
        .unwrap();
    connection
        .query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))
        .unwrap();
}

fn commit_all(connection: &Connection, payloads: &Receiver<Handover>) {
    while let Ok(first) = payloads.recv() {
        let waiting: Vec<_> = [first].into_iter().chain(payloads.try_iter()).collect();
        let transaction = connection.unchecked_transaction().unwrap();
        for (payload, _) in &waiting {
            transaction
                .prepare_cached("INSERT INTO exports (payload) VALUES (?)")
                .unwrap()
                .execute([payload.as_bytes()])
                .unwrap();
        }
        transaction.commit().unwrap();
        for (_, done) in waiting {
            done.send(()).unwrap();
        }
    }
}

/// Takes the address from the URL: there are no names here.
#[derive(Debug)]
struct Literal;

impl Resolver for Literal {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut found = self.empty();
        found.push(uri.authority().unwrap().as_str().parse().unwrap());
        Ok(found)
    }
}

/// POSTs as the service does, over one connection.
fn posting(url: &str) -> impl Fn(usize) {
    let config = Agent::config_builder()
        .proxy(None)
        .timeout_global(Some(Duration::from_secs(30)))
        .build();
    let agent = Agent::with_parts(config, DefaultConnector::default(), Literal);
    move |number| {
        let payload = payload(number);
        let mut response = agent
            .post(url)
            .content_type("application/json")
            .send(payload.as_bytes())
            .unwrap();
        assert_eq!(response.body_mut().read_to_string().unwrap(), "ok");
    }
}

/// POSTs payloads one after the other, and keeps nothing.
fn ureq(url: &str) {
    let post = posting(url);
    work_as_told(|until| drive(&mut [()], until, |(), number| post(number)));
}

/// What an export takes at least: a sync when it is accepted, a POST, and a sync for the result.
fn direct(url: &str, folder: &Path) {
    let post = posting(url);
    let mut disk = [Disk::new(folder)];
    work_as_told(|until| {
        drive(&mut disk, until, |disk, number| {
            disk.sync();
            post(number);
            disk.sync();
        })
    });
}
