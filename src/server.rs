//! tiny_http's requests to a fixed pool of threads, and answers back; the orderly stop.
//!
//! A thread of the pool reads a request, has `routes` decide, and hands submissions and polls to
//! `exports` together with the means to answer. It waits for no commit and no destination.
//!
//! Not here: clients. tiny_http trusts them, so it listens on a socket that only `gate` can reach,
//! which sends it whole requests of a bounded size.

use std::env;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Sender, bounded};
use tiny_http::{Header, Method, StatusCode};
use uuid::Uuid;

use crate::exports::{Exports, Reply, View};
use crate::gate::framing::CLIENT;
use crate::logging;
use crate::routes::{self, Command, Policy, Refusal, Request, Response};
use crate::threads::{self, Thread};

/// Requests that may wait for a thread of the pool, for each of its threads.
const WAITING_PER_THREAD: usize = 4;
/// How long a stop waits for requests that the pool has begun to serve.
const STOP: Duration = Duration::from_secs(1);
/// The name of the private socket in its folder.
const SOCKET: &str = "http.sock";

/// What every request is served with.
pub struct Service {
    /// Which tokens are good.
    pub policy: Policy,
    /// Where submissions and polls go.
    pub exports: Arc<Exports>,
}

/// A running server.
pub struct Server {
    http: Arc<tiny_http::Server>,
    stopping: Arc<AtomicBool>,
    pool: Vec<Thread>,
    folder: PathBuf,
}

impl Server {
    /// Serves what arrives at a private socket with `threads` threads, and one that hands out
    /// requests. The socket is in the data folder if there is one and it can hold sockets, else
    /// where temporary files are.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn start(data: Option<&Path>, service: Service, threads: usize) -> io::Result<Self> {
        let unnamed = || env::temp_dir().join(format!("export-service-{}", Uuid::now_v7()));
        let in_data = data.map(|data| private_socket(data.join("gate")));
        let (listener, folder) = match in_data {
            Some(Ok(made)) => made,
            _ => private_socket(unnamed())?,
        };
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
            folder,
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    /// Takes no more requests, and waits until those taken are served, a second at most.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        self.http.unblock();
        // The listener closes when both this and the one in `hand_out` are dropped.
        drop(self.http);
        let deadline = Instant::now() + STOP;
        for thread in self.pool {
            thread.ends_within(deadline.saturating_duration_since(Instant::now()));
        }
        // tiny_http has removed the socket. What is left over is in nobody's way.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// A socket in a folder that nobody else may enter.
fn private_socket(folder: PathBuf) -> io::Result<(UnixListener, PathBuf)> {
    match DirBuilder::new().mode(0o700).create(&folder) {
        // From before: the data folder is locked, so nobody uses it now.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
            match fs::remove_file(folder.join(SOCKET)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        made => made?,
    }
    match UnixListener::bind(folder.join(SOCKET)) {
        Ok(listener) => Ok((listener, folder)),
        Err(error) => {
            let _ = fs::remove_dir(&folder);
            Err(error)
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
        let mut body = Vec::with_capacity(request.body_length().unwrap_or(0));
        if request.as_reader().read_to_end(&mut body).is_err() {
            // The gate has gone away in the middle of a request: nobody waits for an answer.
            return;
        }
        let parts = parts(&request, &body);
        let decided = routes::command(&parts, &self.policy, SystemTime::now());
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
}

fn parts<'a>(request: &'a tiny_http::Request, body: &'a [u8]) -> Request<'a> {
    Request {
        method: request.method().as_str(),
        target: request.url(),
        api_key: header(request, "X-Api-Key"),
        authorization: header(request, "Authorization"),
        idempotency_key: header(request, "Idempotency-Key"),
        body,
    }
}

fn header<'a>(request: &'a tiny_http::Request, name: &'static str) -> Option<&'a str> {
    let mut headers = request.headers().iter();
    let found = headers.find(|header| header.field.equiv(name));
    found.map(|header| header.value.as_str())
}

/// The means to answer a request later, from another thread.
fn reply(request: tiny_http::Request) -> Reply {
    Box::new(move |result: Result<View, _>| match result {
        Ok(view) => respond(request, routes::view(&view)),
        Err(error) => refuse(request, &Refusal::Export(error)),
    })
}

fn refuse(request: tiny_http::Request, refusal: &Refusal) {
    let client = header(&request, CLIENT).unwrap_or_default();
    let method = request.method().as_str();
    logging::refused(method, request.url(), refusal.status(), refusal, client);
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
