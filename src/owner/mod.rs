//! The owner's side: what the person whose data this is can see and do, over a Unix socket in the data folder
//! and, with `--admin`, over a port of its own.
//!
//! The port is a gate like the apps', with few connections, so that neither locks the other out. Its requests
//! need a token; those on the socket need none, since whoever can open it can read the key as well.
//!
//! Not here: what apps can do (`routes`), and the commands that ask over the socket (`tools`).

pub mod access;
mod api;
pub mod filter;
pub mod page;
mod reading;
pub mod records;
pub mod report;
mod routes;
mod socket;
mod waiting;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use crate::auth::Key;
use crate::auth::secret::Secret;
use crate::exports::store::Place;
use crate::exports::{Exports, Limits};
use crate::gate::tls::Identity;
use crate::gate::{self, Gate, Serve};
use crate::key_file;
use access::{HEADERS, Hosts, Logins};
pub use socket::{FILE as SOCKET, Listener};

/// The file of the data folder with the root key of the owner's tokens.
pub const KEY_FILE: &str = "owner.key";
/// Connections at a time on the owner's port.
const CONNECTIONS: usize = 16;
/// The same from one address: one client cannot take them all.
const PER_CLIENT: usize = 8;
/// Bytes that the large answers of all these connections may take together.
const MEMORY: usize = 4 * 1024 * 1024;
/// The largest body of a request, in bytes: an act with the longest URL.
const MAX_BODY: usize = 32 * 1024;

/// What the owner's requests are served with.
pub struct Owner {
    /// The root key of the owner's tokens.
    pub key: Key,
    /// The names of this box.
    pub hosts: Hosts,
    /// The exports.
    pub exports: Arc<Exports>,
    /// The key for checking apps' tokens, once there is one.
    pub secret: Arc<Secret>,
    /// The certificate that apps see, and the owner.
    pub identity: Option<Arc<Identity>>,
    /// Where the store is.
    pub place: Place,
    /// How much is kept.
    pub limits: Limits,
    /// Where apps reach the service.
    pub apps: SocketAddr,
    /// Where the owner's port listens.
    pub port: Option<SocketAddr>,
    /// Wrong tokens. Locked briefly.
    pub logins: Mutex<Logins>,
}

/// Who sends a request.
#[derive(Clone, Copy)]
enum Client {
    /// Somebody who may open the socket.
    Local,
    /// Anybody who can reach the port.
    Remote(SocketAddr),
}

impl Owner {
    /// The root key of the owner's tokens in this place. With a folder, the one in its file, which is made if
    /// there is none. Blocks until a new key is on disk.
    ///
    /// # Errors
    /// The file cannot be read or made.
    pub fn key(place: &Place) -> Result<Key, String> {
        let key = match place.folder() {
            Some(folder) => key_file::Key::in_file(&folder.join(KEY_FILE)),
            None => key_file::Key::random(),
        };
        Ok(Key::derive(key?.bytes()))
    }

    /// What the owner's browser opens, if the port is at this address.
    fn url(&self, port: SocketAddr) -> String {
        let scheme = match self.identity {
            Some(_) => "https",
            None => "http",
        };
        if let Some(name) = self.hosts.first() {
            return format!("{scheme}://{name}:{}/", port.port());
        }
        let ip = match port.ip() {
            ip if ip.is_unspecified() => own_address(),
            ip => ip,
        };
        format!("{scheme}://{}/", SocketAddr::new(ip, port.port()))
    }

    /// Whether others in the network could read the owner's token.
    pub fn is_exposed(&self) -> bool {
        let is_open = self.port.is_some_and(|port| !port.ip().is_loopback());
        is_open && self.identity.is_none()
    }

    /// Serves the owner on this port.
    ///
    /// # Errors
    /// The listener cannot be used.
    pub fn open_port(self: &Arc<Self>, listener: TcpListener) -> io::Result<Gate> {
        let owner = self.clone();
        let handler: gate::Handler =
            Arc::new(move |request, client| owner.serve(request, Client::Remote(client)));
        Gate::open(
            listener,
            Serve::Here(handler, &HEADERS),
            gate::Settings {
                limits: gate::Limits {
                    connections: CONNECTIONS,
                    per_client: PER_CLIENT,
                },
                memory: MEMORY,
                max_body: MAX_BODY,
                identity: self.identity.clone(),
            },
            // Nobody reads these: the metrics are about apps.
            Arc::default(),
        )
    }

    /// Serves the owner on the socket in the data folder. None if there is no folder, or if the folder can have
    /// no such socket, which is logged.
    pub fn open_socket(self: &Arc<Self>) -> Option<Listener> {
        let folder = self.place.folder()?;
        let owner = self.clone();
        match Listener::open(folder, move |request| owner.serve(request, Client::Local)) {
            Ok(listener) => Some(listener),
            Err(reason) => {
                log::warn!(
                    file:% = folder.join(SOCKET).display(), reason = reason.as_str();
                    "no socket for the owner: status and acts are only possible over --admin"
                );
                None
            }
        }
    }

    fn serve(&self, request: &gate::framing::Request, client: Client) -> crate::answer::Response {
        routes::serve(self, request, client, SystemTime::now(), Instant::now())
    }
}

/// An address by which other machines reach this one; its own loopback if there is none.
fn own_address() -> IpAddr {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let mut found = interfaces
        .iter()
        .map(|interface| interface.ip())
        .filter(|ip| ip.is_ipv4() && !ip.is_loopback());
    found.next().unwrap_or(Ipv4Addr::LOCALHOST.into())
}
