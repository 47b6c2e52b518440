//! A fixed pool of threads that serve tiny_http's requests, and its orderly stop.
//!
//! A pool thread takes a request from tiny_http, has `routes` decide, and passes submissions and polls to
//! `exports` with the means to answer the connection, which waits in `waits`. So it waits for no commit and
//! no destination. tiny_http itself gets no answer.
//!
//! Not here: clients. tiny_http trusts its clients, so it listens on a socket that only `gate` can reach,
//! which sends it whole requests of a bounded size.

use std::env;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use uuid::Uuid;

use crate::answer;
use crate::exports::Exports;
use crate::reply::{self, Reply};
use crate::routes::{self, Command, Policy, Request};
use crate::threads::{self, Thread};
use crate::waits::{Answerer, Waits};

/// The header in which `gate` passes the connection's number on, for the answer.
pub const CONNECTION: &str = "Connection-Number";
/// How long a stop waits for requests that the pool has begun to serve.
const STOP: Duration = Duration::from_secs(1);
/// The name of the private socket in its folder.
const SOCKET: &str = "http.sock";

/// What serving a request needs.
pub struct Service {
    /// Decides which tokens are valid.
    pub policy: Policy,
    /// Receives submissions and polls.
    pub exports: Arc<Exports>,
    /// Holds the connections that wait for their answers.
    pub waits: Arc<Waits>,
}

/// A running server.
pub struct Server {
    http: Arc<tiny_http::Server>,
    stopping: Arc<AtomicBool>,
    pool: Vec<Thread>,
    folder: PathBuf,
}

impl Server {
    /// Serves requests from a private socket with `threads` threads. The socket is in the data folder if
    /// there is one whose file system has sockets, else in the folder for temporary files.
    ///
    /// # Errors
    /// The socket cannot be created.
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
        let pool = (0..threads)
            .map(|number| {
                let (http, service, stopping) = (http.clone(), service.clone(), stopping.clone());
                threads::spawn(&format!("pool-{number}"), move || {
                    service.serve_all(&http, &stopping);
                })
            })
            .collect();
        Ok(Self {
            http,
            stopping,
            pool,
            folder,
        })
    }

    /// The path of the socket that it listens on.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    /// Takes no more requests, and waits until those taken are served, for at most a second.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        // Each call unblocks one thread, after the requests that are queued.
        for _ in &self.pool {
            self.http.unblock();
        }
        // The listener closes when the last thread has dropped it too.
        drop(self.http);
        let deadline = Instant::now() + STOP;
        for thread in self.pool {
            thread.ends_within(deadline.saturating_duration_since(Instant::now()));
        }
        // tiny_http has removed the socket. A folder that is left over does no harm.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// A socket in a folder that nobody else may enter.
fn private_socket(folder: PathBuf) -> io::Result<(UnixListener, PathBuf)> {
    match DirBuilder::new().mode(0o700).create(&folder) {
        // Left by an earlier run: the data folder is locked, so nobody uses it now.
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

impl Service {
    /// The body of each pool thread.
    fn serve_all(&self, http: &tiny_http::Server, stopping: &AtomicBool) {
        loop {
            match http.recv() {
                Ok(request) => self.serve(request),
                Err(_) if stopping.load(Ordering::Acquire) => return,
                Err(error) => {
                    // tiny_http reports this once and never accepts again.
                    log::error!(reason:% = error; "tiny_http no longer accepts connections");
                    panic!("tiny_http stopped accepting");
                }
            }
        }
    }

    fn serve(&self, mut request: tiny_http::Request) {
        let received = Instant::now();
        let mut body = Vec::with_capacity(request.body_length().unwrap_or(0));
        if request.as_reader().read_to_end(&mut body).is_err() {
            // The link broke in the middle of a request: no connection waits for an answer.
            return;
        }
        let Some(number) = header(&request, CONNECTION) else {
            return prove(request);
        };
        // None if the connection has ended by now.
        if let Some(answerer) = number
            .parse()
            .ok()
            .and_then(|number| self.waits.answerer(number))
        {
            self.answer(&request, &body, received, answerer);
        }
        // tiny_http sends nothing then: nobody would read it.
        drop(request.into_writer());
    }

    fn answer(
        &self,
        request: &tiny_http::Request,
        body: &[u8],
        received: Instant,
        answerer: Answerer,
    ) {
        let decided = routes::command(&parts(request, body), &self.policy, SystemTime::now());
        let reply = |to| Reply {
            to,
            target: request.url().to_owned(),
        };
        match decided {
            Ok(Command::Status) => answerer.put(answer::status()),
            Ok(Command::Ui) => answerer.put(answer::ui()),
            Ok(Command::Submit(submission, wait)) => {
                self.exports
                    .submit(submission, received, received + wait, reply(answerer));
            }
            Ok(Command::Poll(query, wait)) => {
                log::debug!(id:% = query.id; "poll");
                self.exports.poll(&query, received + wait, reply(answerer));
            }
            Err(refusal) => {
                let (method, target) = (request.method().as_str(), request.url());
                reply::refuse(method, target, &answerer, &refusal);
            }
        }
    }
}

/// Answers the request by which `gate` finds that a link works.
fn prove(request: tiny_http::Request) {
    // Not `Request::respond`, which evaluates the request's headers and adds some of its own.
    let mut writer = request.into_writer();
    let written = writer
        .write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
        .and_then(|()| writer.flush());
    if let Err(error) = written {
        log::debug!(reason:% = error; "a link to tiny_http broke");
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
