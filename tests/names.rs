//! From a name to a connection, over networks that misbehave: contract section 4, "When an attempt
//! fails" and "Looking up and connecting". Each test has a network of its own.

mod support;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::network::{
    Kind, NXDOMAIN, NameServer, Network, Packets, Question, REFUSED, SERVFAIL, alone, silent,
    stands_for,
};
use support::{
    Destination, Gate, PATIENCE, Peer, Reaction, Service, command, ok, payload, token, token_of,
};
use tempfile::TempDir;

/// The address of the name server that a network begins with.
const NAME_SERVER: &str = "127.0.0.53";
/// Two addresses of this machine, for destinations.
const HERE: &str = "127.0.1.1";
const THERE: &str = "127.0.1.2";
/// The destination's port; each test's network has it to itself.
const PORT: u16 = 8000;
const URL: &str = "http://home.test:8000/in";
/// All networks that tests send to, besides loopback, which all services here allow.
const NETWORKS: [&str; 2] = ["--allow-network", "10.0.0.0/8,fd00::/8"];

fn at(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), PORT)
}

fn destination(address: &str) -> Destination {
    Destination::start_at(at(address), |_| ok())
}

fn service(arguments: &[&str]) -> Service {
    Service::start(&[&NETWORKS, arguments].concat())
}

fn submit_all(service: &Service, url: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|number| service.submit(url, &payload(number)))
        .collect()
}

fn poll(service: &Service, url: &str, id: &str) -> Value {
    service
        .post("/export", &token(url), &json!({ "id": id }))
        .json()
}

/// Waits until an attempt fails in one of these ways, and checks that each of these exports, which form a
/// whole queue, still waits and shows that failure.
fn waits_for(service: &Service, url: &str, ids: &[String], kinds: &[&str]) {
    let is_wanted = |kind: &Value| kinds.iter().any(|&wanted| kind == wanted);
    service.event("failed", |line| is_wanted(&line["kind"]));
    for id in ids {
        let deadline = Instant::now() + PATIENCE;
        let mut waiting = poll(service, url, id);
        while waiting["state"] == "Processing" {
            assert!(Instant::now() < deadline, "still {waiting}");
            thread::sleep(Duration::from_millis(5));
            waiting = poll(service, url, id);
        }
        assert_eq!(waiting["state"], "Pending", "{waiting}");
        assert!(is_wanted(&waiting["last_error"]["kind"]), "{waiting}");
    }
}

fn arrive(service: &Service, url: &str, ids: &[String]) {
    for id in ids {
        let result = service.result(url, id);
        assert_eq!(result["status_code"], 200, "{result}");
    }
}

fn ids_of(destination: &Destination) -> Vec<String> {
    let arrivals = destination.arrivals();
    let ids = arrivals.iter().map(|arrival| arrival.header("webhook-id"));
    ids.map(|id| id.unwrap().to_owned()).collect()
}

fn failures(service: &Service) -> Vec<String> {
    let mut lines = service.log();
    lines.retain(|line| line.contains("\"event\":\"failed\""));
    lines
}

/// Sends one export, which arrives with the first attempt, and checks that `check` agrees.
fn arrives_at_once(url: &str) {
    thread::scope(|scope| {
        let checked = scope.spawn(|| check(url, &[]));
        let service = service(&[]);
        let id = service.submit(url, &payload(1));
        arrive(&service, url, &[id]);
        assert_eq!(failures(&service), Vec::<String>::new());
        let report = checked.join().unwrap();
        assert_eq!(report["ok"], true, "{report}");
    });
}

/// The report of `check` for a URL.
fn check(url: &str, arguments: &[&str]) -> Value {
    let done = command()
        .args(["check", "--json", url, "--allow-network", "127.0.0.0/8,::1"])
        .args(NETWORKS)
        .args(arguments)
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["ok"], done.status.success(), "{report}");
    report
}

/// Redirects every connection to an address to where `to` says, after the wait that it says.
fn relay(address: SocketAddr, to: impl Fn() -> (Duration, SocketAddr) + Send + Sync + 'static) {
    let listener = TcpListener::bind(address).unwrap();
    let to = Arc::new(to);
    thread::spawn(move || {
        for near in listener.incoming() {
            let (near, to) = (near.unwrap(), to.clone());
            thread::spawn(move || {
                let (wait, address) = to();
                thread::sleep(wait);
                let far = TcpStream::connect(address).unwrap();
                let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let backwards = thread::spawn(move || copy(back.0, back.1));
                copy(near, far);
                backwards.join().unwrap();
            });
        }
    });
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// HTTPS servers for `home.test`; see tests/peers/tls.py.
struct TlsServers {
    _peer: Peer,
    ports: Value,
    folder: TempDir,
}

impl TlsServers {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut peer = Peer::start("tls.py", &[folder.path(), Path::new("home.test")]);
        let ports = peer.line();
        Self {
            _peer: peer,
            ports,
            folder,
        }
    }

    fn address(&self, kind: &str) -> SocketAddr {
        let port = self.ports[kind].as_u64().unwrap();
        SocketAddr::from(([127, 0, 0, 1], u16::try_from(port).unwrap()))
    }

    fn ca(&self) -> String {
        self.folder.path().join("ca.pem").display().to_string()
    }
}

// Wrong answers that last for seconds.

#[test]
fn exports_to_a_name_whose_address_is_wrong_for_a_while_all_arrive_in_order() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let service = service(&[]);
        let ids = submit_all(&service, URL, 20);
        waits_for(&service, URL, &ids, &["connect"]);
        // The answer of a router without a line.
        names.now(stands_for(&["192.168.1.1"]));
        waits_for(&service, URL, &ids, &["forbidden_address"]);
        let report = check(URL, &[]);
        assert_eq!(report["ok"], false);
        assert!(report.to_string().contains("192.168.1.1"), "{report}");
        names.now(stands_for(&[HERE]));
        let destination = destination(HERE);
        arrive(&service, URL, &ids);
        assert_eq!(ids_of(&destination), ids);
    });
}

#[test]
fn a_name_whose_address_is_wrong_for_a_while_has_the_usual_backoff() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&["192.168.1.1"]));
        let service = service(&[]);
        let ids = submit_all(&service, URL, 20);
        service.event("failed", |line| line["attempt"] == 4);
        // Four attempts of one export, unless a backoff was lost.
        assert_eq!(failures(&service).len(), 4, "{:#?}", failures(&service));
        waits_for(&service, URL, &ids, &["forbidden_address"]);
    });
}

#[test]
fn one_forbidden_address_among_good_ones_holds_everything_back_until_it_is_gone() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, stands_for(&[HERE, "192.168.1.1"]));
        let destination = destination(HERE);
        let service = service(&[]);
        let ids = submit_all(&service, URL, 3);
        waits_for(&service, URL, &ids, &["forbidden_address"]);
        // Whatever its position, and however it is written.
        let mut many: Vec<_> = (1..=24).map(|last| format!("127.0.1.{last}")).collect();
        many.push("192.168.1.1".to_owned());
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        let sets = [
            &[HERE, "192.168.1.1"],
            &many[..],
            &[HERE, "::ffff:192.168.1.1"],
            &[HERE, "64:ff9b::c0a8:101"],
            &[HERE, "fe80::1"],
        ];
        for set in sets {
            names.now(stands_for(set));
            let report = check(URL, &[]);
            assert_eq!(report["ok"], false, "{report}");
        }
        names.now(stands_for(&many));
        service.event("failed", |line| line["attempt"] == 4);
        assert_eq!(ids_of(&destination), Vec::<String>::new());
        names.now(stands_for(&[HERE]));
        arrive(&service, URL, &ids);
        assert_eq!(ids_of(&destination), ids);
    });
}

#[test]
fn an_export_to_a_name_that_always_resolves_to_a_forbidden_address_is_given_up() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&["192.168.1.1"]));
        let service = service(&["--give-up-after", "3s"]);
        let ids = submit_all(&service, URL, 3);
        for id in &ids {
            let result = service.result(URL, id);
            assert_eq!(result["status"], "403 Forbidden", "{result}");
            assert_eq!(result["error"]["kind"], "forbidden_address", "{result}");
        }
        // The first of them was tried several times.
        let result = service.result(URL, &ids[0]);
        let attempts = result["error"]["attempts"].as_u64().unwrap();
        assert!(attempts > 1, "{result}");
    });
}

#[test]
fn plain_http_to_a_name_that_is_public_for_a_while_arrives_once_it_is_private() {
    alone(|_| {
        // Any address outside the allowed networks: that of a captive portal, say.
        let names = NameServer::start(NAME_SERVER, stands_for(&["9.9.9.9"]));
        let destination = destination(HERE);
        let service = service(&[]);
        let ids = submit_all(&service, URL, 3);
        waits_for(&service, URL, &ids, &["forbidden_http"]);
        assert_eq!(check(URL, &[])["ok"], false);
        names.now(stands_for(&[HERE]));
        arrive(&service, URL, &ids);
        assert_eq!(ids_of(&destination), ids);
    });
}

#[test]
fn certificates_that_do_not_match_for_a_while_lose_nothing() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let servers = TlsServers::start();
        let now = Arc::new(Mutex::new(servers.address("self_signed")));
        let target = now.clone();
        relay(at(HERE), move || (Duration::ZERO, *target.lock().unwrap()));
        let (url, ca) = ("https://home.test:8000/in", servers.ca());
        let service = service(&["--ca-file", &ca]);
        let ids = submit_all(&service, url, 5);
        let unfit = ["self_signed", "misnamed", "expired", "early", "stranger"];
        for (attempt, kind) in (0..).zip(unfit) {
            *now.lock().unwrap() = servers.address(kind);
            service.events("failed", attempt + 1);
            waits_for(&service, url, &ids, &["tls"]);
            assert_eq!(check(url, &["--ca-file", &ca])["ok"], false, "{kind}");
        }
        *now.lock().unwrap() = servers.address("good");
        arrive(&service, url, &ids);
        assert_eq!(check(url, &["--ca-file", &ca])["ok"], true);
    });
}

#[test]
fn an_https_port_that_speaks_plain_http_for_a_while_loses_nothing() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let servers = TlsServers::start();
        // A captive portal, which answers everything.
        let portal = TcpListener::bind("127.0.0.1:0").unwrap();
        let now = Arc::new(Mutex::new(portal.local_addr().unwrap()));
        thread::spawn(move || {
            for stream in portal.incoming() {
                let mut stream = stream.unwrap();
                let mut hello = [0; 5];
                let _ = stream.read_exact(&mut hello);
                let _ = stream.write_all(b"HTTP/1.1 302 Found\r\nLocation: http://log.in/\r\n\r\n");
            }
        });
        let target = now.clone();
        relay(at(HERE), move || (Duration::ZERO, *target.lock().unwrap()));
        let (url, ca) = ("https://home.test:8000/in", servers.ca());
        let service = service(&["--ca-file", &ca]);
        let ids = submit_all(&service, url, 3);
        waits_for(&service, url, &ids, &["tls", "protocol", "closed"]);
        assert_eq!(check(url, &["--ca-file", &ca])["ok"], false);
        *now.lock().unwrap() = servers.address("good");
        arrive(&service, url, &ids);
    });
}

#[test]
fn answers_that_are_not_http_for_a_while_lose_nothing() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let answers = AtomicUsize::new(0);
        let nonsense: [&[u8]; 4] = [
            b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n",
            b"\x15\x03\x01\x00\x02\x02\x46",
            b"<html>no line</html>\n",
            b"HTTP/1.1 what\r\n\r\n",
        ];
        let _destination = Destination::start_at(at(HERE), move |_| {
            match nonsense.get(answers.fetch_add(1, Ordering::Relaxed)) {
                Some(bytes) => Reaction::Raw(bytes.to_vec()),
                None => ok(),
            }
        });
        let service = service(&[]);
        let ids = submit_all(&service, URL, 5);
        waits_for(&service, URL, &ids, &["protocol"]);
        arrive(&service, URL, &ids);
    });
}

#[test]
fn a_name_that_cannot_be_looked_up_for_a_while_loses_nothing() {
    alone(|_| {
        // At first there is no name server.
        let service = service(&[]);
        let ids = submit_all(&service, URL, 5);
        waits_for(&service, URL, &ids, &["dns", "timeout"]);
        assert_eq!(check(URL, &[])["ok"], false);
        let names = NameServer::start(NAME_SERVER, |question: &Question| question.error(REFUSED));
        service.event("failed", |line| line["attempt"] == 2);
        names.now(|question| question.error(NXDOMAIN));
        service.event("failed", |line| line["attempt"] == 3);
        // It exists, and has no address.
        names.now(stands_for(&[]));
        service.event("failed", |line| line["attempt"] == 4);
        waits_for(&service, URL, &ids, &["dns", "timeout"]);
        names.now(stands_for(&[HERE]));
        let destination = destination(HERE);
        arrive(&service, URL, &ids);
        assert_eq!(ids_of(&destination), ids);
    });
}

#[test]
fn nonsense_from_a_name_server_is_just_another_failed_attempt() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, |question: &Question| {
            // An alias whose name points to itself, in a loop.
            let mut looping = question.aliases(&["x.test"], &[]).remove(0);
            let name = looping.len() - 8;
            let [high, low] = u16::try_from(name).unwrap().to_be_bytes();
            looping.truncate(name);
            looping.extend_from_slice(&[0xc0 | high, low, 0, 0, 0, 0, 0, 0]);
            vec![looping]
        });
        let service = service(&["--attempt-timeout", "3s"]);
        let ids = submit_all(&service, URL, 3);
        service.event("failed", |line| line["attempt"] == 1);
        names.now(|question| {
            // One is cut off in the middle of an address, one is shorter than a header.
            let mut cut = question.addresses(&[HERE, "fd00::1"]).remove(0);
            cut.truncate(cut.len() - 3);
            vec![cut.clone(), cut[..7].to_vec()]
        });
        service.event("failed", |line| line["attempt"] == 2);
        names.now(stands_for(&[HERE]));
        let destination = destination(HERE);
        arrive(&service, URL, &ids);
        assert_eq!(ids_of(&destination), ids);
    });
}

#[test]
fn a_reply_to_another_question_is_not_taken_for_an_answer() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, |question: &Question| {
            // An attacker who cannot see the question guesses its number, and is first.
            let mut guessed = question.addresses(&[THERE]).remove(0);
            guessed[0] ^= 0x55;
            [vec![guessed], question.addresses(&[HERE])].concat()
        });
        let (right, wrong) = (destination(HERE), destination(THERE));
        arrives_at_once(URL);
        assert_eq!(ids_of(&right).len(), 1);
        assert_eq!(ids_of(&wrong).len(), 0);
    });
}

// Name servers that do not answer.

/// A network with these name servers first, and last one that knows the destination.
fn after(network: &Network, before: &[&str]) -> (NameServer, Destination) {
    let mut servers = before.to_vec();
    servers.push(NAME_SERVER);
    let lines = servers
        .iter()
        .map(|server| format!("nameserver {server}\n"));
    network.resolv_conf(&lines.collect::<String>());
    let names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
    (names, destination(HERE))
}

#[test]
fn a_silent_first_name_server_leaves_time_for_the_second() {
    alone(|network| {
        let _silent = NameServer::start("127.0.0.51", silent);
        let _answering = after(network, &["127.0.0.51"]);
        arrives_at_once(URL);
    });
}

#[test]
fn a_first_name_server_that_is_down_leaves_time_for_the_second() {
    alone(|network| {
        network.silent_link();
        let _answering = after(network, &["10.66.0.53"]);
        arrives_at_once(URL);
    });
}

#[test]
fn two_silent_name_servers_leave_time_for_the_third() {
    alone(|network| {
        let _silent = [
            NameServer::start("127.0.0.51", silent),
            NameServer::start("127.0.0.52", silent),
        ];
        let _answering = after(network, &["127.0.0.51", "127.0.0.52"]);
        arrives_at_once(URL);
    });
}

#[test]
fn if_the_first_name_server_answers_with_an_error_the_second_is_asked() {
    alone(|network| {
        let _failing =
            NameServer::start("127.0.0.51", |question: &Question| question.error(SERVFAIL));
        let _answering = after(network, &["127.0.0.51"]);
        arrives_at_once(URL);
    });
}

#[test]
fn if_nothing_listens_at_the_first_name_server_the_second_is_asked() {
    alone(|network| {
        // The system refuses by ICMP: port unreachable.
        let _answering = after(network, &["127.0.0.51"]);
        arrives_at_once(URL);
    });
}

#[test]
fn a_name_server_that_loses_the_first_packets_is_asked_again() {
    alone(|_| {
        let lost = AtomicUsize::new(0);
        let _names = NameServer::start(NAME_SERVER, move |question: &Question| {
            match lost.fetch_add(1, Ordering::Relaxed) {
                0 | 1 => Vec::new(),
                _ => question.addresses(&[HERE]),
            }
        });
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn a_look_up_that_outlasts_its_attempt_serves_the_next() {
    alone(|network| {
        let _silent = NameServer::start("127.0.0.51", silent);
        let _answering = after(network, &["127.0.0.51"]);
        let service = service(&["--attempt-timeout", "4s"]);
        let ids = submit_all(&service, URL, 3);
        arrive(&service, URL, &ids);
    });
}

#[test]
fn name_servers_without_an_answer_do_not_delay_exports_to_other_names() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, |question: &Question| {
            if question.name == "home.test" {
                question.addresses(&[HERE])
            } else {
                Vec::new()
            }
        });
        let destination = destination(HERE);
        let service = service(&[]);
        let others: Vec<_> = (0..20)
            .map(|number| {
                let url = format!("http://silent{number}.test/");
                let id = service.submit(&url, &payload(number));
                (url, id)
            })
            .collect();
        let ids = submit_all(&service, URL, 5);
        arrive(&service, URL, &ids);
        assert_eq!(ids_of(&destination), ids);
        for (url, id) in others {
            assert_ne!(poll(&service, &url, &id)["state"], "Finished");
        }
    });
}

#[test]
fn a_list_of_name_servers_that_changes_is_read_again() {
    alone(|network| {
        network.resolv_conf("nameserver 127.0.0.51\n");
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let _destination = destination(HERE);
        let service = service(&[]);
        let ids = submit_all(&service, URL, 3);
        waits_for(&service, URL, &ids, &["dns", "timeout"]);
        network.resolv_conf("nameserver 127.0.0.53\n");
        arrive(&service, URL, &ids);
    });
}

// Answers for one family.

/// The script of a name server that reacts like this to AAAA, and otherwise knows one address.
fn without_aaaa(
    reaction: impl Fn(&Question) -> Packets + Send + Sync + 'static,
) -> impl Fn(&Question) -> Packets + Send + Sync + 'static {
    move |question| match question.kind {
        Kind::Aaaa => reaction(question),
        _ => question.addresses(&[HERE]),
    }
}

#[test]
fn an_unanswered_aaaa_query_does_not_lose_the_a_record() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, without_aaaa(silent));
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn an_aaaa_query_that_no_name_server_answers_does_not_lose_the_a_record() {
    alone(|network| {
        let _first = NameServer::start("127.0.0.51", without_aaaa(silent));
        network.resolv_conf("nameserver 127.0.0.51\nnameserver 127.0.0.53\n");
        let _second = NameServer::start(NAME_SERVER, without_aaaa(silent));
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn an_aaaa_query_that_ends_in_an_error_does_not_lose_the_a_record() {
    // RFC 4074 describes such name servers.
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, silent);
        let _destination = destination(HERE);
        for code in [SERVFAIL, REFUSED] {
            names.now(without_aaaa(move |question| question.error(code)));
            arrives_at_once(URL);
        }
    });
}

#[test]
fn an_unanswered_a_query_does_not_lose_the_aaaa_record() {
    alone(|network| {
        network.run("ip -6 address add fd09::1/128 dev lo nodad");
        let _names = NameServer::start(NAME_SERVER, |question: &Question| match question.kind {
            Kind::Aaaa => question.addresses(&["fd09::1"]),
            _ => Vec::new(),
        });
        let _destination = destination("fd09::1");
        arrives_at_once(URL);
    });
}

/// Exports arrive with the first attempt if one family's only address is dead, and the other's arrives a
/// second later.
fn arrives_though_it_is_heard_of_late(network: &Network, late: Kind, dead: &str, good: &str) {
    network.silent_link();
    network.run("ip -6 address add fd09::1/128 dev lo nodad");
    let addresses = [dead.to_owned(), good.to_owned()];
    let _names = NameServer::start(NAME_SERVER, move |question: &Question| {
        if question.kind == late {
            thread::sleep(Duration::from_secs(1));
        }
        question.addresses(&[&addresses[0], &addresses[1]])
    });
    let _destination = destination(good);
    arrives_at_once(URL);
}

#[test]
fn a_late_a_record_is_used_if_the_ipv6_address_never_answers() {
    alone(|network| arrives_though_it_is_heard_of_late(network, Kind::A, "fd66::9", HERE));
}

#[test]
fn a_late_a_record_is_used_if_the_ipv6_address_refuses() {
    alone(|network| arrives_though_it_is_heard_of_late(network, Kind::A, "::1", HERE));
}

#[test]
fn a_late_aaaa_record_is_used_if_the_ipv4_address_never_answers() {
    alone(|network| {
        arrives_though_it_is_heard_of_late(network, Kind::Aaaa, "10.66.0.9", "fd09::1")
    });
}

#[test]
fn a_late_aaaa_record_is_used_if_the_ipv4_address_refuses() {
    alone(|network| {
        arrives_though_it_is_heard_of_late(network, Kind::Aaaa, "127.0.2.2", "fd09::1")
    });
}

#[test]
fn a_late_address_is_checked_before_it_is_dialled() {
    alone(|network| {
        network.silent_link();
        // Listens at the forbidden address, to notice if it is dialled.
        network.run("ip address add 192.168.1.1/32 dev lo");
        let forbidden = Destination::start_at(at("192.168.1.1"), |_| ok());
        let _names = NameServer::start(NAME_SERVER, |question: &Question| {
            if question.kind == Kind::A {
                thread::sleep(Duration::from_secs(1));
            }
            question.addresses(&["fd66::9", "192.168.1.1"])
        });
        let service = service(&["--attempt-timeout", "4s"]);
        let ids = submit_all(&service, URL, 2);
        service.event("failed", |line| line["attempt"] == 2);
        assert_eq!(ids_of(&forbidden), Vec::<String>::new());
        assert_ne!(poll(&service, URL, &ids[0])["state"], "Finished");
    });
}

// Addresses that lead nowhere.

/// Exports to a name with these addresses and a good one arrive with the first attempt, whatever the
/// position of the good one.
fn arrives_in_spite_of(dead: &[&str]) {
    let names = NameServer::start(NAME_SERVER, silent);
    let destination = destination(HERE);
    for addresses in [[dead, &[HERE]].concat(), [&[HERE], dead].concat()] {
        names.now(stands_for(&addresses));
        arrives_at_once(URL);
        assert_eq!(ids_of(&destination).len(), 1);
    }
}

#[test]
fn an_ipv6_address_that_the_kernel_refuses_does_not_lose_the_ipv4() {
    alone(|network| {
        network.run("ip -6 route add prohibit fd01::/16");
        arrives_in_spite_of(&["fd01::1"]);
    });
}

#[test]
fn an_ipv6_address_that_a_router_refuses_does_not_lose_the_ipv4() {
    alone(|network| {
        // By ICMPv6 type 1 code 1, administratively prohibited.
        let mut router = network.machine();
        router.run(
            "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
             ip -6 route add prohibit fd01::/16",
        );
        network.run("ip -6 route add fd01::/16 via fd77::2");
        arrives_in_spite_of(&["fd01::1"]);
    });
}

#[test]
fn addresses_that_fail_in_any_way_do_not_lose_the_good_one() {
    alone(|network| {
        network.run(
            "ip -6 route add unreachable fd01::/16
             ip -6 route add blackhole fd02::/16
             ip -6 route add prohibit fd03::/16
             ip route add unreachable 10.1.0.0/16
             ip route add blackhole 10.2.0.0/16
             ip route add prohibit 10.3.0.0/16",
        );
        // The last two: no route at all, and one where nothing listens.
        arrives_in_spite_of(&[
            "fd01::1", "fd02::1", "fd03::1", "10.1.0.1", "10.2.0.1", "10.3.0.1", "fd04::1", "::1",
        ]);
    });
}

#[test]
fn ipv6_addresses_on_a_box_without_ipv6_do_not_lose_the_ipv4() {
    alone(|network| {
        network.run("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6");
        arrives_in_spite_of(&["fd01::1", "fd01::2"]);
    });
}

#[test]
fn an_ipv6_address_that_never_answers_costs_a_moment_and_no_attempt() {
    alone(|network| {
        network.silent_link();
        let names = NameServer::start(NAME_SERVER, stands_for(&["fd66::9", HERE]));
        // Each export on a connection of its own.
        let closing = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
        let destination = Destination::start_at(at(HERE), |_| Reaction::Raw(closing.to_vec()));
        let service = service(&[]);
        let begun = Instant::now();
        let ids = submit_all(&service, URL, 16);
        arrive(&service, URL, &ids);
        assert_eq!(failures(&service), Vec::<String>::new());
        assert_eq!(ids_of(&destination), ids);
        // By RFC 8305 they take 4 s in all, or less if the outcome is remembered.
        let taken = begun.elapsed();
        assert!(taken < Duration::from_secs(16), "{taken:?}");
        assert_eq!(check(URL, &[])["ok"], true);
        drop(names);
    });
}

#[test]
fn eight_addresses_that_never_answer_leave_time_for_the_ninth() {
    alone(|network| {
        network.silent_link();
        let dead: Vec<_> = (2..10).map(|last| format!("10.66.0.{last}")).collect();
        let dead: Vec<_> = dead.iter().map(String::as_str).collect();
        arrives_in_spite_of(&dead);
    });
}

#[test]
fn many_ipv6_addresses_that_never_answer_leave_time_for_the_only_ipv4() {
    alone(|network| {
        network.silent_link();
        let dead: Vec<_> = (2..26).map(|last| format!("fd66::{last}")).collect();
        let dead: Vec<_> = dead.iter().map(String::as_str).collect();
        arrives_in_spite_of(&dead);
    });
}

#[test]
fn twenty_addresses_that_refuse_leave_the_one_that_does_not() {
    alone(|_| {
        let dead: Vec<_> = (2..22).map(|last| format!("127.0.2.{last}")).collect();
        let dead: Vec<_> = dead.iter().map(String::as_str).collect();
        arrives_in_spite_of(&dead);
    });
}

#[test]
fn a_destination_whose_addresses_are_all_dead_differs_from_one_without_any() {
    alone(|network| {
        network.silent_link();
        let _names = NameServer::start(NAME_SERVER, stands_for(&["fd66::9", "10.66.0.9"]));
        let service = service(&["--attempt-timeout", "3s"]);
        let ids = submit_all(&service, URL, 2);
        waits_for(&service, URL, &ids, &["timeout", "connect"]);
    });
}

#[test]
fn a_tls_handshake_may_take_as_long_as_its_attempt() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let servers = TlsServers::start();
        let good = servers.address("good");
        relay(at(HERE), move || (Duration::from_secs(6), good));
        let (url, ca) = ("https://home.test:8000/in", servers.ca());
        let service = service(&["--ca-file", &ca, "--attempt-timeout", "60s"]);
        let id = service.submit(url, &payload(1));
        arrive(&service, url, &[id]);
        assert_eq!(failures(&service), Vec::<String>::new());
    });
}

// What is remembered.

#[test]
fn a_name_that_moves_is_followed_though_its_old_address_still_answers() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let (old, new) = (destination(HERE), destination(THERE));
        let service = service(&[]);
        let send = |count| {
            let ids = submit_all(&service, URL, count);
            arrive(&service, URL, &ids);
            ids
        };
        let first = send(3);
        assert_eq!(ids_of(&old), first);
        names.now(stands_for(&[THERE]));
        let moved = Instant::now();
        while ids_of(&new).is_empty() {
            // Some seconds, and some more for a busy machine.
            assert!(moved.elapsed() < Duration::from_secs(20), "still the old");
            send(1);
        }
        ids_of(&old);
        for _ in 0..40 {
            send(1);
        }
        assert_eq!(ids_of(&old).len(), 0);
        assert_eq!(ids_of(&new).len(), 40);
    });
}

#[test]
fn a_name_that_moves_to_a_forbidden_address_is_sent_nothing_more() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let destination = destination(HERE);
        let service = service(&[]);
        let ids = submit_all(&service, URL, 3);
        arrive(&service, URL, &ids);
        names.now(stands_for(&["192.168.1.1"]));
        let moved = Instant::now();
        let waiting = loop {
            assert!(moved.elapsed() < Duration::from_secs(20), "still sent to");
            let id = service.submit(URL, &payload(1));
            let body = json!({ "id": id });
            let path = "/lp/export?timeout=1";
            let answer = service.post(path, &token(URL), &body).json();
            if answer["state"] != "Finished" {
                break id;
            }
            assert_eq!(answer["ext_response"]["status_code"], 200, "{answer}");
        };
        waits_for(&service, URL, &[waiting], &["forbidden_address"]);
        drop(destination);
    });
}

#[test]
fn a_destination_that_moves_away_from_a_kept_connection_gets_everything() {
    alone(|network| {
        // The old address goes dark: no FIN, no RST.
        let mut machine = network.machine();
        machine.serve(PORT);
        let names = NameServer::start(NAME_SERVER, stands_for(&["10.77.0.2"]));
        let service = service(&["--attempt-timeout", "3s"]);
        let ids = submit_all(&service, URL, 3);
        arrive(&service, URL, &ids);
        assert_eq!(machine.arrivals(), json!(ids));
        network.run("ip link set wire arp off");
        machine.run("ip address flush dev wire");
        names.now(stands_for(&[HERE]));
        let destination = destination(HERE);
        let ids = submit_all(&service, URL, 10);
        arrive(&service, URL, &ids);
        let mut arrived = ids_of(&destination);
        arrived.sort();
        assert_eq!(arrived, ids);
    });
}

#[test]
fn a_busy_queue_to_a_name_costs_neither_a_query_nor_a_thread_for_each_export() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let gate = Gate::default();
        let passing = gate.clone();
        let destination = Destination::start_at(at(HERE), move |_| {
            passing.pass();
            ok()
        });
        let service = service(&[]);
        let ids = submit_all(&service, URL, 200);
        destination.arrival();
        // Threads are numbered like processes, and this test has its own numbers.
        let newest = || {
            let line = fs::read_to_string("/proc/loadavg").unwrap();
            let number = line.split_whitespace().last().unwrap();
            number.parse::<usize>().unwrap()
        };
        let before = newest();
        gate.open();
        for _ in 1..ids.len() {
            destination.arrival();
        }
        // A handful; more only if the machine is so busy that this takes many seconds.
        let threads = newest() - before;
        assert!(threads < 50, "{threads} threads");
        let queries = names.asked().len();
        assert!(queries < 50, "{queries} queries");
        arrive(&service, URL, &ids);
    });
}

#[test]
fn many_queues_to_one_name_share_its_look_up() {
    alone(|_| {
        let gate = Gate::default();
        let passing = gate.clone();
        let names = NameServer::start(NAME_SERVER, move |question: &Question| {
            passing.pass();
            question.addresses(&[HERE])
        });
        let destination = destination(HERE);
        let service = service(&[]);
        let mut ids: Vec<_> = (0..30)
            .map(|number| {
                let app = token_of(&format!("app {number}"), URL);
                let body = json!({ "uri": URL, "data": payload(number) });
                let answer = service.post("/export", &app, &body).json();
                answer["id"].as_str().unwrap().to_owned()
            })
            .collect();
        gate.open();
        let mut arrived: Vec<_> = ids
            .iter()
            .map(|_| destination.arrival())
            .map(|arrival| arrival.header("webhook-id").unwrap().to_owned())
            .collect();
        ids.sort();
        arrived.sort();
        assert_eq!(arrived, ids);
        let queries = names.asked().len();
        assert!(queries < 20, "{queries} queries");
    });
}

// The service itself.

#[test]
fn another_machine_is_not_this_service_even_if_any_address_can_be_bound() {
    alone(|network| {
        network.run(
            "echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind
             echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind",
        );
        let mut machine = network.machine();
        let names = NameServer::start(NAME_SERVER, stands_for(&["10.77.0.2"]));
        let service = service(&[]);
        let port = service.address.port();
        machine.serve(port);
        let own_port = port.to_string();
        for host in ["10.77.0.2", "[fd77::2]", "home.test"] {
            let url = format!("http://{host}:{port}/in");
            let id = service.submit(&url, &payload(1));
            arrive(&service, &url, &[id]);
            let report = check(&url, &["--port", &own_port]);
            assert_eq!(report["ok"], true, "{report}");
        }
        // Its own address is still refused. By name that is not final, since the name may mean another
        // machine later.
        is_never_sent_to(&service, &["10.77.0.1", "[fd77::1]"]);
        for address in ["10.77.0.1", "127.0.0.1", "fd77::1"] {
            names.now(stands_for(&[address]));
            let url = format!("http://{}.test:{port}/in", address.replace([':', '.'], "-"));
            let ids = submit_all(&service, &url, 2);
            waits_for(&service, &url, &ids, &["forbidden_address"]);
            names.now(stands_for(&["10.77.0.2"]));
            arrive(&service, &url, &ids);
        }
    });
}

/// A service whose port is open at all of these addresses is not a destination there.
fn is_never_sent_to(service: &Service, own: &[&str]) {
    let port = service.address.port();
    let always = [
        "127.0.0.1",
        "127.9.9.9",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "[::]",
    ];
    for host in always.iter().chain(own) {
        let url = format!("http://{host}:{port}/export");
        let id = service.submit(&url, &payload(1));
        let result = service.result(&url, &id);
        assert_eq!(result["status_code"], 403, "{host}: {result}");
        assert_eq!(result["error"]["kind"], "forbidden_address", "{result}");
        let port = port.to_string();
        let arguments = ["--allow-network", "0.0.0.0/0,::/0", "--port", &port];
        let report = check(&url, &arguments);
        assert_eq!(report["ok"], false, "{report}");
    }
}

#[test]
fn the_services_own_addresses_are_never_destinations_whatever_is_allowed() {
    alone(|network| {
        let service = service(&["--allow-network", "0.0.0.0/0,::/0"]);
        // They need not exist at the start, or be known one by one.
        network.run(
            "ip address add 10.88.0.1/32 dev lo
             ip -6 address add fd88::1/128 dev lo nodad
             ip route add local 10.99.0.0/24 dev lo",
        );
        let own = ["10.88.0.1", "[fd88::1]", "[::ffff:10.88.0.1]", "10.99.0.7"];
        is_never_sent_to(&service, &own);
    });
}

// The arbiter's link.

/// A service gets its secret from an arbiter that it knows by name.
fn learns_its_secret() {
    let folder = tempfile::tempdir().unwrap();
    let endpoint = Path::new("tcp://127.0.1.1:4444");
    let mut arbiter = Peer::start("arbiter.py", &[folder.path(), endpoint]);
    arbiter.line();
    let service = Service::start_without_secret(&[
        "--arbiter",
        "tcp://arbiter.test:4444",
        "--secrets-dir",
        folder.path().to_str().unwrap(),
    ]);
    let deadline = Instant::now() + PATIENCE;
    while arbiter.ask(&json!({"do": "count"}))["secrets"] == 0 {
        assert!(Instant::now() < deadline, "never asked");
        thread::sleep(Duration::from_millis(20));
    }
    let destination = destination(THERE);
    let url = &destination.url;
    let minted = arbiter.ask(&json!({"do": "mint", "destination": url}));
    let minted = minted["token"].as_str().unwrap();
    let body = json!({ "uri": url, "data": payload(1) });
    loop {
        let answer = service.post("/lp/export?timeout=10", minted, &body);
        if answer.status == 200 {
            break;
        }
        assert_eq!(answer.status, 503, "{}", answer.body);
        assert!(Instant::now() < deadline, "{}", answer.body);
        thread::sleep(Duration::from_millis(20));
    }
    destination.arrival();
}

#[test]
fn the_arbiter_is_found_behind_a_silent_name_server() {
    alone(|network| {
        let _silent = NameServer::start("127.0.0.51", silent);
        network.resolv_conf("nameserver 127.0.0.51\nnameserver 127.0.0.53\n");
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        learns_its_secret();
    });
}

#[test]
fn the_arbiter_is_found_although_its_aaaa_query_is_not_answered() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, without_aaaa(silent));
        learns_its_secret();
    });
}

#[test]
fn the_arbiter_is_reached_in_spite_of_addresses_that_lead_nowhere() {
    alone(|network| {
        network.silent_link();
        network.run("ip -6 route add prohibit fd01::/16");
        let addresses = ["fd66::9", "fd01::1", "10.66.0.9", HERE];
        let _names = NameServer::start(NAME_SERVER, stands_for(&addresses));
        learns_its_secret();
    });
}

// Names as the system writes and finds them.

#[test]
fn an_answer_that_is_too_large_for_udp_is_asked_for_over_tcp() {
    alone(|_| {
        let names = NameServer::start(NAME_SERVER, |question: &Question| {
            if question.over_tcp {
                question.addresses(&[HERE])
            } else {
                question.truncated()
            }
        });
        let destination = destination(HERE);
        arrives_at_once(URL);
        // Too many for one packet, the good one among those that are cut off.
        let mut many: Vec<_> = (2..42).map(|last| format!("127.0.2.{last}")).collect();
        many.push(HERE.to_owned());
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        names.now(stands_for(&many));
        arrives_at_once(URL);
        assert_eq!(ids_of(&destination).len(), 2);
    });
}

#[test]
fn a_chain_of_aliases_is_followed() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, |question: &Question| {
            let chain = ["a.cdn.test", "b.cdn.test", "c.cdn.test", "d.cdn.test"];
            question.aliases(&chain, &[HERE])
        });
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn names_are_completed_from_the_search_list() {
    alone(|network| {
        network.resolv_conf("search office.test lan.test\nnameserver 127.0.0.53\n");
        let _names = NameServer::start(NAME_SERVER, |question: &Question| {
            match question.name.as_str() {
                "home.lan.test" => question.addresses(&[HERE]),
                _ => question.error(NXDOMAIN),
            }
        });
        let _destination = destination(HERE);
        arrives_at_once("http://home:8000/in");
    });
}

#[test]
fn names_are_found_in_the_hosts_file() {
    alone(|network| {
        network.hosts("127.0.0.1 localhost\n127.0.1.1 printer home.test # here\n");
        let names = NameServer::start(NAME_SERVER, |question: &Question| question.error(NXDOMAIN));
        let _destination = destination(HERE);
        arrives_at_once(URL);
        arrives_at_once("http://printer:8000/in");
        let asked = names.asked();
        assert!(asked.iter().all(|(_, kind)| *kind != Kind::A), "{asked:?}");
    });
}

#[test]
fn names_are_found_in_the_hosts_file_with_no_name_server_at_all() {
    alone(|network| {
        network.resolv_conf("");
        network.hosts("127.0.1.1 home.test\n");
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn without_a_list_of_name_servers_the_local_machine_is_asked() {
    // resolv.conf(5), for glibc and musl alike.
    alone(|network| {
        network.remove_resolv_conf();
        let _names = NameServer::start("127.0.0.1", stands_for(&[HERE]));
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn a_name_server_may_have_an_ipv6_address_and_the_list_options_and_comments() {
    alone(|network| {
        network.resolv_conf(
            "# by hand\n; too\noptions timeout:1 attempts:2 ndots:2\n\
             nameserver\t::1   # here\nsortlist 130.155.160.0\nnonsense\n",
        );
        let _names = NameServer::start("::1", stands_for(&[HERE]));
        let _destination = destination(HERE);
        arrives_at_once(URL);
    });
}

#[test]
fn a_host_may_be_written_in_capitals_and_with_a_dot_at_its_end() {
    alone(|network| {
        // With a dot at the end the search list is not used.
        network.resolv_conf("search lan.test\nnameserver 127.0.0.53\n");
        let _names = NameServer::start(NAME_SERVER, |question: &Question| {
            match question.name.as_str() {
                "home.test" => question.addresses(&[HERE]),
                _ => question.error(NXDOMAIN),
            }
        });
        let destination = destination(HERE);
        for url in ["http://HOME.test:8000/in", "http://home.test.:8000/in"] {
            arrives_at_once(url);
            destination.arrival();
        }
    });
}

#[test]
fn a_certificate_matches_a_host_with_a_dot_at_its_end() {
    alone(|_| {
        let _names = NameServer::start(NAME_SERVER, stands_for(&[HERE]));
        let servers = TlsServers::start();
        let good = servers.address("good");
        relay(at(HERE), move || (Duration::ZERO, good));
        let ca = servers.ca();
        let url = "https://home.test.:8000/in";
        let service = service(&["--ca-file", &ca]);
        let id = service.submit(url, &payload(1));
        arrive(&service, url, &[id]);
        let report = check(url, &["--ca-file", &ca]);
        assert_eq!(report["ok"], true, "{report}");
    });
}
