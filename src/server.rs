//! tiny_http's requests to a fixed pool of threads, and answers back; the orderly stop.
//!
//! A thread of the pool reads a request, has `routes` decide, and hands submissions and polls to
//! `exports` together with the means to answer. It waits for no commit and no destination.
//!
//! Not here: keeping hostile clients away from tiny_http, which trusts them.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Sender, bounded};
use tiny_http::{Header, Method, StatusCode};

use crate::exports::{Exports, Reply, View};
use crate::routes::{self, Command, Policy, Refusal, Request, Response};
use crate::threads::{self, Thread};

/// Requests that may wait for a thread of the pool, for each of its threads.
const WAITING_PER_THREAD: usize = 4;
/// How long a stop waits for requests that the pool has begun to read.
const STOP: Duration = Duration::from_secs(1);

/// What every request is served with.
pub struct Service {
    /// Which tokens are good.
    pub policy: Policy,
    /// Where submissions and polls go.
    pub exports: Arc<Exports>,
    /// The largest request body in bytes.
    pub max_body: usize,
}

/// A running server.
pub struct Server {
    http: Arc<tiny_http::Server>,
    stopping: Arc<AtomicBool>,
    pool: Vec<Thread>,
}

impl Server {
    /// Serves what arrives at `listener` with `threads` threads, and one that hands out requests.
    ///
    /// # Errors
    /// Where the listener is of no use.
    pub fn start(listener: TcpListener, service: Service, threads: usize) -> io::Result<Self> {
        let http = tiny_http::Server::from_listener(listener, None).map_err(io::Error::other)?;
        let http = Arc::new(http);
        let stopping = Arc::new(AtomicBool::new(false));
        let service = Arc::new(service);
        let (requests, waiting) = bounded(threads * WAITING_PER_THREAD);
        let pool = (0..threads)
            .map(|number| {
                let (service, waiting) = (service.clone(), waiting.clone());
                threads::spawn(&format!("pool-{number}"), move || {
                    for request in waiting {
                        service.serve(request);
                    }
                })
            })
            .collect();
        let (incoming, flag) = (http.clone(), stopping.clone());
        threads::spawn("server", move || hand_out(&incoming, &requests, &flag));
        Ok(Self {
            http,
            stopping,
            pool,
        })
    }

    /// Takes no more requests, and waits until those taken are served: a moment, or a second
    /// where a client is slow to send one.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        self.http.unblock();
        // The listener closes when both this and the one in `hand_out` are dropped.
        drop(self.http);
        let deadline = Instant::now() + STOP;
        for thread in self.pool {
            thread.ends_within(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

fn hand_out(
    http: &tiny_http::Server,
    requests: &Sender<tiny_http::Request>,
    stopping: &AtomicBool,
) {
    loop {
        match http.recv() {
            Ok(request) => {
                if requests.send(request).is_err() {
                    return;
                }
            }
            Err(_) if stopping.load(Ordering::Acquire) => break,
            Err(error) => {
                // tiny_http says so once and never accepts again.
                log::error!(reason:% = error; "cannot accept connections any more");
                panic!("tiny_http stopped accepting");
            }
        }
    }
    while let Ok(Some(request)) = http.try_recv() {
        if requests.send(request).is_err() {
            return;
        }
    }
}

impl Service {
    fn serve(&self, mut request: tiny_http::Request) {
        let received = Instant::now();
        let body = self.read_body(&mut request);
        let decided = body.and_then(|body| {
            let parts = parts(&request, &body);
            routes::command(&parts, &self.policy, SystemTime::now())
        });
        match decided {
            Ok(Command::Status) => respond(request, routes::status()),
            Ok(Command::Submit(submission, wait)) => {
                let deadline = received + wait;
                self.exports
                    .submit(submission, received, deadline, reply(request));
            }
            Ok(Command::Poll(query, wait)) => {
                log::debug!(id:% = query.id; "poll");
                self.exports.poll(&query, received + wait, reply(request));
            }
            Err(refusal) => refuse(request, &refusal),
        }
    }

    fn read_body(&self, request: &mut tiny_http::Request) -> Result<Vec<u8>, Refusal> {
        let announced = request.body_length().unwrap_or(0);
        if announced > self.max_body {
            return Err(Refusal::TooLarge(self.max_body));
        }
        let mut body = Vec::with_capacity(announced);
        request
            .as_reader()
            .take(self.max_body as u64 + 1)
            .read_to_end(&mut body)
            .map_err(|_| Refusal::Incomplete)?;
        if body.len() > self.max_body {
            return Err(Refusal::TooLarge(self.max_body));
        }
        if body.len() < announced {
            return Err(Refusal::Incomplete);
        }
        Ok(body)
    }
}

fn parts<'a>(request: &'a tiny_http::Request, body: &'a [u8]) -> Request<'a> {
    let header = |name: &'static str| {
        let found = request
            .headers()
            .iter()
            .find(|header| header.field.equiv(name));
        found.map(|header| header.value.as_str())
    };
    Request {
        method: request.method().as_str(),
        target: request.url(),
        api_key: header("X-Api-Key"),
        authorization: header("Authorization"),
        idempotency_key: header("Idempotency-Key"),
        body,
    }
}

/// The means to answer a request later, from another thread.
fn reply(request: tiny_http::Request) -> Reply {
    Box::new(move |result: Result<View, _>| match result {
        Ok(view) => respond(request, routes::view(&view)),
        Err(error) => refuse(request, &Refusal::Export(error)),
    })
}

fn refuse(request: tiny_http::Request, refusal: &Refusal) {
    let (status, code) = refusal.status();
    let client = request
        .remote_addr()
        .map_or_else(String::new, SocketAddr::to_string);
    // Without the query, and cut: what a client sends is not to fill the log.
    let path: String = request
        .url()
        .split('?')
        .take(1)
        .flat_map(|path| path.chars().take(80))
        .collect();
    log::info!(
        method = request.method().as_str(), path = path.as_str(), status, code,
        reason:% = refusal, client = client.as_str();
        "refused"
    );
    respond(request, routes::refusal(refusal));
}

fn respond(request: tiny_http::Request, response: Response) {
    let header = |(name, value): (&str, String)| {
        // Names and values are ours: literals, numbers and lists of methods, all ASCII.
        Header::from_bytes(name, value).expect("headers are ASCII")
    };
    let named = ("Server", "export-service".to_owned());
    let headers = response
        .headers
        .into_iter()
        .chain([named])
        .map(header)
        .collect();
    let length = response.body.len();
    let body = response.body.as_bytes();
    let status = StatusCode(response.status);
    let response = tiny_http::Response::new(status, headers, body, Some(length), None)
        // Always with Content-Length: a length is what a simple client can rely on.
        .with_chunked_threshold(usize::MAX);
    let version = request.http_version().clone();
    let head_only = *request.method() == Method::Head;
    let mut writer = request.into_writer();
    // Not `Request::respond`: it sorts the client's TE header, and panics at a weight of NaN.
    let written = response.raw_print(&mut writer, version, &[], head_only, None);
    if let Err(error) = written.and_then(|()| writer.flush()) {
        log::debug!(reason:% = error; "cannot answer");
    }
}
