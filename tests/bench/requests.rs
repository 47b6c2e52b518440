//! Requests per second: the status, submissions and polls, also over TLS and with `--ephemeral`.

use std::sync::Arc;

use rustls::ClientConfig;

use crate::Bench;
use crate::load::{self, Client, Server, Until, drive};
use crate::process::{LimitServer, Process, Service, Setup, new_folder};
use crate::report::Figure;
use crate::sink::Sink;
use crate::support::{Identity, nowhere, token};
use crate::turns::{Compared, Contender, compare, metered};

/// Clients that are there at once, where there is more than one.
pub const CROWD: usize = 64;
/// Exports that polls go round.
const POLLED: usize = 2000;

const TINY_HTTP: &str = "bare tiny_http";
const LOOP: &str = "bare loop";
const SQLITE: &str = "bare SQLite";

/// The clients of a server, which repeat requests in each round.
fn asking<'a>(
    bench: &Bench,
    name: &'static str,
    (server, pid): (&Server, u32),
    clients: usize,
    request: impl Fn(usize) -> Vec<u8> + Sync + 'a,
) -> Contender<'a> {
    let mut clients = server.clients(clients);
    let until = Until::Elapsed(bench.lasting());
    let ask = move |client: &mut Client, number| {
        client.ask(&request(number));
    };
    Contender::new(name, move || {
        metered(pid, || drive(&mut clients, until, &ask))
    })
}

/// The service and a bare tiny_http, asked the same.
fn beside_tiny_http<'a>(
    bench: &Bench,
    service: &Service,
    bare: &LimitServer,
    clients: usize,
    request: impl Fn(usize) -> Vec<u8> + Copy + Sync + 'a,
) -> [Contender<'a>; 2] {
    [
        ("", &service.server, service.pid()),
        (TINY_HTTP, &bare.server, bare.pid()),
    ]
    .map(|(name, server, pid)| asking(bench, name, (server, pid), clients, request))
}

/// `GET /status`.
pub fn status(bench: &Bench) -> Vec<Figure> {
    let service = Service::start(&[]);
    let bare = LimitServer::start(&["tiny_http", "active"], None);
    let raw = LimitServer::start(&["loop", "active"], None);
    let rates = compare(
        bench,
        [
            asking(bench, "", (&service.server, service.pid()), CROWD, |_| {
                load::status()
            }),
            asking(bench, TINY_HTTP, (&bare.server, bare.pid()), CROWD, |_| {
                load::status()
            }),
            asking(bench, LOOP, (&raw.server, raw.pid()), CROWD, |_| {
                load::status()
            }),
        ],
    );
    vec![rates.rates("GET /status, 64 connections")]
}

pub fn submit_1(bench: &Bench) -> Vec<Figure> {
    submit(bench, 1).rates_and_times("submissions, 1 connection")
}

pub fn submit_64(bench: &Bench) -> Vec<Figure> {
    vec![submit(bench, CROWD).rates("submissions, 64 connections")]
}

/// Submissions for a destination that is down.
fn submit(bench: &Bench, clients: usize) -> Compared {
    let service = Service::start(&[]);
    let (url, _) = nowhere();
    let token = token(&url);
    let request = |number| load::submission("/export", &token, &url, number);
    let answer = service.client().ask(&request(0));
    let bare = LimitServer::start(&["tiny_http", &answer], None);
    let folder = new_folder();
    let arguments = [
        "sqlite",
        &clients.to_string(),
        &folder.path().display().to_string(),
    ];
    let mut sqlite = Process::limit(&arguments);
    let pid = sqlite.pid();
    let [ours, bare] = beside_tiny_http(bench, &service, &bare, clients, request);
    let sqlite = Contender::new(SQLITE, || metered(pid, || sqlite.work(bench.lasting())));
    compare(bench, [ours, bare, sqlite])
}

/// Submissions that are kept in memory.
pub fn ephemeral(bench: &Bench) -> Vec<Figure> {
    let service = Service::start(&["--ephemeral"]);
    let (url, _) = nowhere();
    let token = token(&url);
    let request = |number| load::submission("/export", &token, &url, number);
    let answer = service.client().ask(&request(0));
    let bare = LimitServer::start(&["tiny_http", &answer], None);
    let contenders = beside_tiny_http(bench, &service, &bare, CROWD, request);
    let rates = compare(bench, contenders);
    vec![rates.rates("submissions, --ephemeral, 64 conn.")]
}

pub fn submit_tls(bench: &Bench) -> Vec<Figure> {
    let (identity, trust) = identity();
    let service = secure_service(&identity, &trust);
    let (url, _) = nowhere();
    let token = token(&url);
    let request = |number| load::submission("/export", &token, &url, number);
    let answer = service.client().ask(&request(0));
    let rates = over_tls(bench, &identity, trust, &service, &answer, request);
    vec![rates.rates("submissions over TLS, 64 connections")]
}

pub fn poll_tls(bench: &Bench) -> Vec<Figure> {
    let (identity, trust) = identity();
    let service = secure_service(&identity, &trust);
    let sink = Sink::open(std::time::Duration::ZERO);
    let polls = Polls::new(&service, &sink.url(0), "/lp/export?timeout=30", 1);
    let rates = over_tls(
        bench,
        &identity,
        trust,
        &service,
        &polls.answer,
        polls.request(),
    );
    vec![rates.rates("polls over TLS, finished, 64 conn.")]
}

fn over_tls(
    bench: &Bench,
    identity: &Identity,
    trust: Arc<ClientConfig>,
    service: &Service,
    answer: &str,
    request: impl Fn(usize) -> Vec<u8> + Sync + Copy,
) -> Compared {
    let pem = identity.pem().display().to_string();
    let raw = LimitServer::start(&["loop", answer, &pem], Some(trust));
    compare(
        bench,
        [
            asking(bench, "", (&service.server, service.pid()), CROWD, request),
            asking(
                bench,
                "bare loop, TLS",
                (&raw.server, raw.pid()),
                CROWD,
                request,
            ),
        ],
    )
}

fn secure_service(identity: &Identity, trust: &Arc<ClientConfig>) -> Service {
    Service::start_as(Setup {
        arguments: &["--tls-pem", &identity.pem().display().to_string()],
        trust: Some(trust.clone()),
        ..Setup::default()
    })
}

/// A certificate, and what clients need to trust it.
fn identity() -> (Identity, Arc<ClientConfig>) {
    let identity = Identity::new("ec");
    let trust = identity.trust().unwrap();
    (identity, trust)
}

/// Exports that were submitted in order to be polled.
pub struct Polls {
    token: String,
    ids: Vec<String>,
    /// The answer to the last submission.
    answer: String,
}

impl Polls {
    /// Submits this many exports to a path.
    pub fn new(service: &Service, url: &str, path: &str, count: usize) -> Self {
        let token = token(url);
        let mut clients = service.server.clients(CROWD.min(count));
        let answers = std::sync::Mutex::new(Vec::new());
        drive(&mut clients, Until::Count(count), |client, number| {
            let answer = client.ask(&load::submission(path, &token, url, number));
            answers.lock().unwrap().push(answer);
        });
        let answers = answers.into_inner().unwrap();
        let ids = answers.iter().map(|answer| load::member(answer, "id"));
        Self {
            ids: ids.collect(),
            answer: answers.last().unwrap().clone(),
            token,
        }
    }

    /// Requests that poll them all, not in the order of their ids.
    pub fn request(&self) -> impl Fn(usize) -> Vec<u8> + Sync + Copy + '_ {
        |number| {
            let id = &self.ids[number * 7 % self.ids.len()];
            load::poll("/export", &self.token, id)
        }
    }
}

pub fn poll_pending(bench: &Bench) -> Vec<Figure> {
    let service = Service::start(&[]);
    let polls = Polls::new(&service, &nowhere().0, "/export", POLLED);
    vec![poll(bench, &service, &polls).rates("polls, pending, 64 connections")]
}

pub fn poll_finished(bench: &Bench) -> Vec<Figure> {
    let service = Service::start(&[]);
    let sink = Sink::open(std::time::Duration::ZERO);
    let polls = Polls::new(&service, &sink.url(0), "/lp/export?timeout=30", POLLED);
    vec![poll(bench, &service, &polls).rates("polls, finished, 64 connections")]
}

fn poll(bench: &Bench, service: &Service, polls: &Polls) -> Compared {
    let answer = service.client().ask(&polls.request()(0));
    let bare = LimitServer::start(&["tiny_http", &answer], None);
    let contenders = beside_tiny_http(bench, service, &bare, CROWD, polls.request());
    compare(bench, contenders)
}
