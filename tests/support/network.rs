//! A separate network for each test, with a name server in it.
//!
//! Such a test starts this test program again, for that one test, in new network, mount and process
//! namespaces. Everything that the test starts there (services, peers, threads) shares the new network,
//! which ends with the test, however that ends. Ports cannot collide, and any number of such tests can run
//! at the same time.

#![allow(dead_code)]

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use super::Peer;
use serde_json::{Value, json};

/// Set in the inner run: the folder that replaces `/etc` there.
const INSIDE: &str = "EXPORT_TEST_NETWORK";

/// A test that hangs is ended after this many seconds.
const LONGEST: &str = "300";

/// Names come from files and name servers, as in most containers; the rest of `/etc` stays.
const SETUP: &str = "
    ip link set lo up
    cd \"$1\"
    shift
    mkdir original etc
    mount --rbind /etc original
    ln -s \"$PWD\"/original/* etc
    rm -f etc/hosts etc/nsswitch.conf etc/resolv.conf
    echo '127.0.0.1 localhost' >etc/hosts
    echo 'hosts: files dns' >etc/nsswitch.conf
    echo 'nameserver 127.0.0.53' >etc/resolv.conf
    mount --bind etc /etc
    cd /
    exec \"$@\"";

/// The network that a test runs in. At first it holds only this machine, which expects its name server at
/// 127.0.0.53.
pub struct Network {
    etc: PathBuf,
}

/// Runs a test in a new network, or reports why it cannot.
pub fn alone<Test: FnOnce(&Network)>(test: Test) {
    if let Some(etc) = std::env::var_os(INSIDE) {
        return test(&Network { etc: etc.into() });
    }
    // The closure's own path holds the test's name.
    let path = std::any::type_name::<Test>();
    let name = path.split("::").nth(1).unwrap();
    if let Err(reason) = available() {
        super::not_run(&format!(
            "it needs iproute2, and root or user namespaces: {reason}"
        ));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let done = within(folder.path().to_str().unwrap())
        .args(["timeout", "--signal=KILL", LONGEST])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(INSIDE, folder.path().join("etc"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let errors = String::from_utf8_lossy(&done.stderr);
    // A wrong name would run no test, and succeed.
    assert!(
        done.status.success() && said.contains("1 passed"),
        "in a network of its own ({}):\n{said}\n{errors}",
        done.status
    );
}

/// Why there can be no namespaces here; determined once.
fn available() -> Result<(), &'static str> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let tried = within(folder.path().to_str().unwrap()).arg("true").output();
        let tried = tried.map_err(|error| error.to_string())?;
        let errors = String::from_utf8_lossy(&tried.stderr).trim().to_owned();
        if tried.status.success() {
            Ok(())
        } else {
            Err(errors)
        }
    });
    found.as_ref().copied().map_err(String::as_str)
}

/// A command that sets up the namespaces and then runs its further arguments in them.
fn within(folder: &str) -> Command {
    use rustix::process::geteuid;
    let mut command = Command::new(if geteuid().is_root() {
        "setpriv"
    } else {
        "unshare"
    });
    if !geteuid().is_root() {
        // An ordinary user can create the others only inside a new user namespace.
        command.args(["--map-root-user", "setpriv"]);
    }
    // If the outer run is killed the inner one ends, and with its process 1 all others.
    command.args(["--pdeathsig", "KILL", "unshare"]);
    command.args(["--net", "--mount", "--pid", "--mount-proc"]);
    command.args([
        "--fork",
        "--kill-child",
        "sh",
        "-ec",
        SETUP,
        "setup",
        folder,
    ]);
    command
}

impl Network {
    /// Runs a shell script, mostly of `ip`.
    pub fn run(&self, script: &str) {
        let done = Command::new("sh").args(["-ec", script]).output().unwrap();
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{script}: {errors}");
    }

    /// Replaces `/etc/resolv.conf`.
    pub fn resolv_conf(&self, text: &str) {
        fs::write(self.etc.join("resolv.conf"), text).unwrap();
    }

    /// Replaces `/etc/hosts`.
    pub fn hosts(&self, text: &str) {
        fs::write(self.etc.join("hosts"), text).unwrap();
    }

    /// Leaves the system without `/etc/resolv.conf`.
    pub fn remove_resolv_conf(&self) {
        fs::remove_file(self.etc.join("resolv.conf")).unwrap();
    }

    /// Makes 10.66.0.0/16 and fd66::/16 networks where nobody ever answers, not even by ICMP.
    pub fn silent_link(&self) {
        // With no ARP, packets get the sender's own address, which the other end is not.
        self.run(
            "ip link add silent type veth peer name silence
             ip link set silent arp off
             ip link set silent up
             ip link set silence up
             ip address add 10.66.0.1/16 dev silent
             ip -6 address add fd66::1/16 dev silent nodad",
        );
    }

    /// Another machine, at 10.77.0.2 and fd77::2 as seen from 10.77.0.1 and fd77::1.
    pub fn machine(&self) -> Machine {
        let mut peer = Peer::start("machine.py", &[]);
        peer.line();
        self.run(&format!(
            "ip link add wire type veth peer name wire netns {}
             ip link set wire up
             ip address add 10.77.0.1/24 dev wire
             ip -6 address add fd77::1/64 dev wire nodad",
            peer.pid()
        ));
        let mut machine = Machine { peer };
        machine.run(
            "ip link set lo up
             ip link set wire up
             ip address add 10.77.0.2/24 dev wire
             ip -6 address add fd77::2/64 dev wire nodad",
        );
        machine
    }
}

/// Another machine, connected to this one; see tests/peers/machine.py.
pub struct Machine {
    peer: Peer,
}

impl Machine {
    /// Runs a shell script there.
    pub fn run(&mut self, script: &str) {
        self.peer.ask(&json!({ "run": script }));
    }

    /// Answers POSTs on a port of all its addresses with 200 from now on.
    pub fn serve(&mut self, port: u16) {
        self.peer.ask(&json!({ "serve": port }));
    }

    /// The `webhook-id`s of what has arrived there so far.
    pub fn arrivals(&mut self) -> Value {
        self.peer.ask(&json!({ "arrivals": true }))["arrivals"].take()
    }
}

/// The record types that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    A,
    Aaaa,
    Other(u16),
}

/// One question, as it arrived.
pub struct Question {
    /// In lower case, without a dot at its end.
    pub name: String,
    pub kind: Kind,
    pub over_tcp: bool,
    packet: Vec<u8>,
    /// Where the question ends in the packet.
    end: usize,
}

/// What a name server sends back: no packet, one, or several; over TCP the first alone.
pub type Packets = Vec<Vec<u8>>;

pub const SERVFAIL: u8 = 2;
pub const NXDOMAIN: u8 = 3;
pub const REFUSED: u8 = 5;

impl Question {
    fn parse(packet: &[u8], over_tcp: bool) -> Option<Self> {
        let mut labels = Vec::new();
        let mut at = 12;
        loop {
            let length = usize::from(*packet.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            let label = packet.get(at..at + length)?;
            labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
            at += length;
        }
        let kind = match *packet.get(at..at + 2)? {
            [0, 1] => Kind::A,
            [0, 28] => Kind::Aaaa,
            [high, low] => Kind::Other(u16::from_be_bytes([high, low])),
            _ => return None,
        };
        Some(Self {
            name: labels.join("."),
            kind,
            over_tcp,
            packet: packet.to_vec(),
            end: at + 4,
        })
    }

    /// A reply with this error code, or none, and these records: their owner, type and data.
    fn reply(&self, truncated: bool, code: u8, records: &[(&[u8], u16, Vec<u8>)]) -> Vec<u8> {
        let mut reply = self.packet[..self.end].to_vec();
        reply[2] = 0x81 | if truncated { 2 } else { 0 };
        reply[3] = 0x80 | code;
        let count = u16::try_from(records.len()).unwrap().to_be_bytes();
        reply[4..12].copy_from_slice(&[0, 1, count[0], count[1], 0, 0, 0, 0]);
        for (owner, kind, data) in records {
            reply.extend_from_slice(owner);
            reply.extend_from_slice(&kind.to_be_bytes());
            // In the internet class, good for a minute.
            reply.extend_from_slice(&[0, 1, 0, 0, 0, 60]);
            reply.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
            reply.extend_from_slice(data);
        }
        reply
    }

    /// The addresses of the type that was asked for, after this many aliases.
    fn records(&self, aliases: &[&str], addresses: &[&str]) -> Vec<u8> {
        let alias_names: Vec<_> = aliases.iter().map(|alias| encoded(alias)).collect();
        // A pointer to the name in the question.
        let mut owner: &[u8] = &[0xc0, 12];
        let mut records = Vec::new();
        for alias in &alias_names {
            records.push((owner, 5, alias.clone()));
            owner = alias;
        }
        for address in addresses {
            match (self.kind, address.parse().unwrap()) {
                (Kind::A, IpAddr::V4(ip)) => records.push((owner, 1, ip.octets().to_vec())),
                (Kind::Aaaa, IpAddr::V6(ip)) => records.push((owner, 28, ip.octets().to_vec())),
                _ => {}
            }
        }
        // What a UDP packet may hold without extensions (RFC 1035 section 4.2.1).
        let whole = self.reply(false, 0, &records);
        if whole.len() > 512 && !self.over_tcp {
            return self.reply(true, 0, &records[..15]);
        }
        whole
    }

    /// Answers with the addresses of the type that was asked for, perhaps none; in a UDP packet with as
    /// many as fit.
    pub fn addresses(&self, addresses: &[&str]) -> Packets {
        vec![self.records(&[], addresses)]
    }

    /// The same for the last of these aliases, each of which points to the next.
    pub fn aliases(&self, aliases: &[&str], addresses: &[&str]) -> Packets {
        vec![self.records(aliases, addresses)]
    }

    /// Answers with an error.
    pub fn error(&self, code: u8) -> Packets {
        vec![self.reply(false, code, &[])]
    }

    /// Says that the answer is too large for UDP, and holds none of it.
    pub fn truncated(&self) -> Packets {
        vec![self.reply(true, 0, &[])]
    }
}

/// A name as it is written in packets.
fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap());
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

type Script = dyn Fn(&Question) -> Packets + Send + Sync;

/// A name server on port 53, over UDP and TCP, that does what its script says; the script may block.
pub struct NameServer {
    script: Arc<Mutex<Arc<Script>>>,
    asked: Arc<Mutex<Vec<(String, Kind)>>>,
}

impl NameServer {
    /// A name server at this address.
    pub fn start(
        address: &str,
        script: impl Fn(&Question) -> Packets + Send + Sync + 'static,
    ) -> Self {
        let address = SocketAddr::new(address.parse().unwrap(), 53);
        let (udp, tcp) = (UdpSocket::bind(address), TcpListener::bind(address));
        let (udp, tcp) = (udp.unwrap(), tcp.unwrap());
        let script: Arc<Script> = Arc::new(script);
        let server = Self {
            script: Arc::new(Mutex::new(script)),
            asked: Arc::default(),
        };
        let (script, asked) = (server.script.clone(), server.asked.clone());
        let answer = move |packet: &[u8], over_tcp| {
            let Some(question) = Question::parse(packet, over_tcp) else {
                return Vec::new();
            };
            asked
                .lock()
                .unwrap()
                .push((question.name.clone(), question.kind));
            let script = script.lock().unwrap().clone();
            script(&question)
        };
        let answer_tcp = answer.clone();
        thread::spawn(move || {
            let mut packet = [0; 4096];
            loop {
                // An error comes from an earlier reply that nobody waited for.
                let Ok((length, peer)) = udp.recv_from(&mut packet) else {
                    continue;
                };
                let (packet, answer) = (packet[..length].to_vec(), answer.clone());
                let socket = udp.try_clone().unwrap();
                thread::spawn(move || {
                    for reply in answer(&packet, false) {
                        let _ = socket.send_to(&reply, peer);
                    }
                });
            }
        });
        thread::spawn(move || {
            for stream in tcp.incoming() {
                let (mut stream, answer) = (stream.unwrap(), answer_tcp.clone());
                thread::spawn(move || {
                    let mut length = [0; 2];
                    while stream.read_exact(&mut length).is_ok() {
                        let mut packet = vec![0; usize::from(u16::from_be_bytes(length))];
                        if stream.read_exact(&mut packet).is_err() {
                            return;
                        }
                        for reply in answer(&packet, true).into_iter().take(1) {
                            let length = u16::try_from(reply.len()).unwrap().to_be_bytes();
                            let _ = stream.write_all(&[&length, &reply[..]].concat());
                        }
                    }
                });
            }
        });
        server
    }

    /// Replaces its script.
    pub fn now(&self, script: impl Fn(&Question) -> Packets + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }

    /// All questions so far.
    pub fn asked(&self) -> Vec<(String, Kind)> {
        self.asked.lock().unwrap().clone()
    }
}

/// The script of a name server that knows these addresses for every name.
pub fn stands_for(addresses: &[&str]) -> impl Fn(&Question) -> Packets + Send + Sync + 'static {
    let addresses: Vec<_> = addresses.iter().map(|&text| text.to_owned()).collect();
    move |question| {
        let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
        question.addresses(&addresses)
    }
}

/// The script of a name server that never answers.
pub fn silent(_: &Question) -> Packets {
    Vec::new()
}
