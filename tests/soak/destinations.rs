//! Destinations of every kind: the path says how a request is treated.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::World;
use crate::support::{self, Identity};

/// How a destination treats a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Quick,
    /// Answers after a while.
    Slow,
    /// Answers 500.
    Fails,
    /// Answers with up to 1.2 MB, which is more than is kept.
    Large,
    /// Closes in the middle of the answer.
    Cut,
    /// The first time something else than HTTP.
    Garbage,
    /// No answer the first time.
    Hangs,
    /// Resets the connection the first time.
    Resets,
    /// Nothing listens for a while, and then for a while it does.
    Moves,
    /// Over TLS.
    Secure,
    /// Nothing listens, ever.
    Dead,
}

impl Kind {
    fn of(path: &str) -> Option<Self> {
        let name = path.split('/').nth(1)?;
        let all = [
            Self::Quick,
            Self::Slow,
            Self::Fails,
            Self::Large,
            Self::Cut,
            Self::Garbage,
            Self::Hangs,
            Self::Resets,
            Self::Moves,
            Self::Secure,
        ];
        all.into_iter().find(|kind| kind.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Slow => "slow",
            Self::Fails => "fails",
            Self::Large => "large",
            Self::Cut => "cut",
            Self::Garbage => "garbage",
            Self::Hangs => "hangs",
            Self::Resets => "resets",
            Self::Moves => "moves",
            Self::Secure => "secure",
            Self::Dead => "dead",
        }
    }

    /// The status that its exports end with.
    pub fn status(self) -> u64 {
        match self {
            Self::Fails => 500,
            Self::Dead => 502,
            _ => 200,
        }
    }
}

/// A destination that listens only while it is open.
pub struct Door {
    address: SocketAddr,
    open: AtomicBool,
}

impl Door {
    /// A closed one, whose port nobody else gets.
    fn new() -> Arc<Self> {
        let (_, address) = support::nowhere();
        let open = AtomicBool::new(false);
        Arc::new(Self { address, open })
    }

    /// Listens from soon on, or from soon on no longer.
    pub fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::Relaxed);
    }

    fn run(&self, world: &Arc<World>) {
        loop {
            while !self.open.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
            let listener = TcpListener::bind(self.address).unwrap();
            listener.set_nonblocking(true).unwrap();
            while self.open.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).unwrap();
                        let world = world.clone();
                        thread::spawn(move || serve(stream, &world));
                    }
                    Err(_) => thread::sleep(Duration::from_millis(20)),
                }
            }
        }
    }
}

/// The addresses of all destinations.
pub struct Destinations {
    plain: SocketAddr,
    secure: SocketAddr,
    dead: SocketAddr,
    /// For the app that fills the store.
    pub filled: Arc<Door>,
    moving: Arc<Door>,
    listeners: std::sync::Mutex<Vec<(TcpListener, Option<Arc<ServerConfig>>)>>,
    pub identity: Identity,
}

impl Destinations {
    pub fn new() -> Self {
        let identity = Identity::new("ec");
        let config = export_service::gate::tls::Identity::load(identity.pem());
        let config = config.unwrap().config();
        let (plain, secure) = (listen(), listen());
        let address = |listener: &TcpListener| listener.local_addr().unwrap();
        Self {
            plain: address(&plain),
            secure: address(&secure),
            dead: support::nowhere().1,
            filled: Door::new(),
            moving: Door::new(),
            listeners: vec![(plain, None), (secure, Some(config))].into(),
            identity,
        }
    }

    pub fn url(&self, kind: Kind, queue: usize) -> String {
        let (scheme, address) = match kind {
            Kind::Secure => ("https", self.secure),
            Kind::Moves => ("http", self.moving.address),
            Kind::Dead => ("http", self.dead),
            _ => ("http", self.plain),
        };
        format!("{scheme}://{address}/{}/{queue}", kind.name())
    }

    pub fn filled_url(&self, queue: usize) -> String {
        format!("http://{}/moves/{queue}", self.filled.address)
    }

    /// Starts their threads, which run until the process ends.
    pub fn start(world: &Arc<World>) {
        let own = &world.destinations;
        for (listener, tls) in own.listeners.lock().unwrap().drain(..) {
            let world = world.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (world, tls) = (world.clone(), tls.clone());
                    thread::spawn(move || match tls {
                        None => serve(stream, &world),
                        Some(tls) => {
                            let session = ServerConnection::new(tls).unwrap();
                            serve(StreamOwned::new(session, stream), &world);
                        }
                    });
                }
            });
        }
        for door in [&own.filled, &own.moving] {
            let (door, world) = (door.clone(), world.clone());
            thread::spawn(move || door.run(&world));
        }
    }

    /// Opens and closes the one that moves, until the end; then it stays open.
    pub fn keep_moving(world: &World, up: Duration, down: Duration) {
        loop {
            world.destinations.moving.set_open(true);
            if !world.sleep(up) {
                return;
            }
            world.destinations.moving.set_open(false);
            if !world.sleep(down) {
                world.destinations.moving.set_open(true);
                return;
            }
        }
    }
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

trait Stream: Read + Write {
    fn tcp(&self) -> &TcpStream;
}

impl Stream for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Stream for StreamOwned<ServerConnection, TcpStream> {
    fn tcp(&self) -> &TcpStream {
        &self.sock
    }
}

/// Serves one connection of the service.
fn serve(stream: impl Stream, world: &World) {
    let _ = stream.tcp().set_nodelay(true);
    let mut stream = BufReader::new(stream);
    while let Some((path, id, body)) = request(&mut stream) {
        let (times, number) = world.model.arrives(&id, &body, world.process.run());
        if !answer(&mut stream, &path, times, number) {
            return;
        }
    }
}

/// Reads a request: its path, its webhook-id and its body.
fn request(stream: &mut impl BufRead) -> Option<(String, String, Vec<u8>)> {
    let (mut path, mut id, mut length) = (String::new(), String::new(), 0);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if path.is_empty() {
            path = line.split(' ').nth(1)?.to_owned();
        }
        if let Some((name, value)) = line.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "webhook-id" => id = value.to_owned(),
                "content-length" => length = value.parse().ok()?,
                _ => {}
            }
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some((path, id, body))
}

/// Answers. False if the connection is to be closed.
fn answer(stream: &mut BufReader<impl Stream>, path: &str, times: usize, number: usize) -> bool {
    let ok = |body: &str, headers: &str| {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: {length}\r\n\r\n{body}")
    };
    let small = format!("{{\"received\":{number}}}");
    let (text, keep) = match Kind::of(path) {
        Some(Kind::Slow) => {
            thread::sleep(Duration::from_millis(300 + 100 * (number as u64 % 17)));
            (ok(&small, ""), true)
        }
        Some(Kind::Fails) => {
            let head = "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\n";
            (format!("{head}oops"), true)
        }
        Some(Kind::Large) => {
            let length = 1000 * (1 + number * 7919 % 1200);
            (ok(&"0123456789".repeat(length / 10), ""), true)
        }
        Some(Kind::Cut) => {
            let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n";
            (format!("{head}the rest is missing"), false)
        }
        Some(Kind::Garbage) if times == 1 => ("what is this?\r\n\r\n".into(), false),
        Some(Kind::Hangs) if times == 1 => {
            // Until the service gives up.
            let _ = stream.read(&mut [0]);
            return false;
        }
        Some(Kind::Resets) if times == 1 => {
            let now = Some(Duration::ZERO);
            let _ = rustix::net::sockopt::set_socket_linger(stream.get_ref().tcp(), now);
            return false;
        }
        // Closed by the answer, so that none is in use when the listener goes.
        Some(Kind::Moves) => (ok(&small, "Connection: close\r\n"), false),
        _ => (ok(&small, ""), true),
    };
    let stream = stream.get_mut();
    stream.write_all(text.as_bytes()).is_ok() && stream.flush().is_ok() && keep
}
