//! Clients that do harm, on purpose or not, each from an address of its own.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::World;
use crate::client::{self, is_closed, post, read, tcp, tls};
use crate::destinations::Kind;
use crate::model::Random;
use crate::support::token_of;

/// Connections of a crowd.
const CROWD: usize = 300;
/// Silent connections at a time. As many each time, since they are there most of the time and count.
const HALF_OPEN: usize = 30;
/// The service must have closed an idle or a slow connection by then.
const CLOSED: Duration = Duration::from_secs(150);

type Act = fn(&World, [u8; 4], &mut Random);

/// What they do, again and again, and how long they rest in between.
const ACTS: [(Act, u64); 9] = [
    (slow_head, 3),
    (noise, 2),
    (noise_in_tls, 2),
    (half_open, 10),
    (too_large, 3),
    (resets, 1),
    (crowd, 20),
    (vanishes, 2),
    (wrong, 2),
];

/// Starts them all; they work until the end of the load.
pub fn start<'scope>(scope: &'scope thread::Scope<'scope, '_>, world: &'scope World) {
    for (number, (act, rest)) in ACTS.into_iter().enumerate() {
        scope.spawn(move || {
            let from = [127, 0, 1, 1 + u8::try_from(number).unwrap()];
            let mut random = Random::new(1000 + number);
            while world.sleep(random.about(Duration::from_secs(rest))) {
                if world.process.epoch().is_multiple_of(2) {
                    act(world, from, &mut random);
                }
            }
        });
    }
}

/// Reads the answer, if there is one, and checks its status.
fn expect(world: &World, mut stream: client::Tls, request: &[u8], status: u16) {
    let epoch = world.process.epoch();
    // It fails if the service has refused it already.
    let _ = stream.write_all(request);
    let _ = stream.flush();
    if let Ok((response, _)) = read(&mut BufReader::new(stream), false)
        && response.status != status
        && response.status != 503
        && world.process.epoch() == epoch
    {
        let (was, body) = (response.status, response.body);
        world
            .model
            .broken(format!("{was} {body} instead of {status}"));
    }
}

/// Waits until the service closes the connection, which it must.
fn must_close(world: &World, stream: &mut TcpStream, what: &str) {
    stream.set_read_timeout(Some(CLOSED)).unwrap();
    if !is_closed(stream) {
        world.model.broken(format!("{what} was not closed"));
    }
}

fn slow_head(world: &World, from: [u8; 4], _: &mut Random) {
    let Ok(mut stream) = tls(from, &world.process) else {
        return;
    };
    let started = Instant::now();
    for byte in b"POST /export HTTP/1.1\r\nHost: soak\r\nX-Api-Key: "
        .iter()
        .cycle()
    {
        if stream.write_all(&[*byte]).is_err() || stream.flush().is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(700));
        if started.elapsed() > CLOSED {
            return world.model.broken("a slow head was not refused".into());
        }
    }
}

fn noise(world: &World, from: [u8; 4], random: &mut Random) {
    let Ok(mut stream) = tcp(from, world.process.address) else {
        return;
    };
    let noise: Vec<u8> = (0..4000).map(|_| random.below(256) as u8).collect();
    let _ = stream.write_all(&noise[..1 + random.below(noise.len())]);
    must_close(world, &mut stream, "noise instead of TLS");
}

fn noise_in_tls(world: &World, from: [u8; 4], random: &mut Random) {
    let Ok(mut stream) = tls(from, &world.process) else {
        return;
    };
    let noise: Vec<u8> = (0..4000).map(|_| random.below(256) as u8).collect();
    let _ = stream.write_all(&noise[..1 + random.below(noise.len())]);
    let _ = stream.write_all(b"\r\n\r\n");
    let _ = stream.flush();
    stream.sock.set_read_timeout(Some(CLOSED)).unwrap();
    if !is_closed(&mut stream) {
        world
            .model
            .broken("noise instead of HTTP was not closed".into());
    }
}

/// Some say nothing at all, some stop in the middle of a handshake.
fn half_open(world: &World, from: [u8; 4], _: &mut Random) {
    let mut all: Vec<TcpStream> = (0..HALF_OPEN)
        .filter_map(|_| tcp(from, world.process.address).ok())
        .collect();
    for stream in all.iter_mut().step_by(2) {
        let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]);
    }
    for mut stream in all {
        must_close(world, &mut stream, "a silent connection");
    }
}

fn too_large(world: &World, from: [u8; 4], random: &mut Random) {
    let Ok(stream) = tls(from, &world.process) else {
        return;
    };
    if random.below(2) == 0 {
        let head = "POST /export HTTP/1.1\r\nHost: soak\r\nContent-Length: 2000000\r\n\r\n";
        let body = vec![b'x'; 2_000_000];
        expect(world, stream, &[head.as_bytes(), &body].concat(), 413);
    } else {
        let name = "x".repeat(20_000);
        let head = format!("POST /export HTTP/1.1\r\nHost: soak\r\nX-Name: {name}\r\n\r\n");
        expect(world, stream, head.as_bytes(), 431);
    }
}

/// Resets the connection in the middle of a request.
fn resets(world: &World, from: [u8; 4], random: &mut Random) {
    let url = world.destinations.url(Kind::Quick, 999);
    let request = post("/export", &token_of("hostile", &url), None, "{\"uri\":");
    let Ok(mut stream) = tls(from, &world.process) else {
        return;
    };
    let _ = stream.write_all(&request[..1 + random.below(request.len())]);
    let _ = stream.flush();
    let _ = rustix::net::sockopt::set_socket_linger(&stream.sock, Some(Duration::ZERO));
}

fn crowd(world: &World, from: [u8; 4], _: &mut Random) {
    let crowd: Vec<_> = (0..CROWD)
        .filter_map(|_| tcp(from, world.process.address).ok())
        .collect();
    world.sleep(Duration::from_secs(5));
    drop(crowd);
}

/// Submits an export that is not delivered soon, and does not wait for the answer.
fn vanishes(world: &World, from: [u8; 4], random: &mut Random) {
    let url = world.destinations.url(Kind::Dead, 998);
    let token = token_of("hostile", &url);
    let Ok(mut stream) = tls(from, &world.process) else {
        return;
    };
    // One for ever, which keeps the queue small.
    let body = format!("{{\"uri\":\"{url}\",\"data\":{{}}}}");
    let request = post("/lp/export?timeout=60", &token, Some("vanishes"), &body);
    let _ = stream.write_all(&request);
    let _ = stream.flush();
    let mut reader = BufReader::new(stream);
    let Ok((response, true)) = read(&mut reader, false) else {
        return;
    };
    let json: serde_json::Value = serde_json::from_str(&response.body).unwrap_or_default();
    let id = json["id"].as_str().unwrap_or_default();
    let poll = format!("{{\"id\":\"{id}\"}}");
    let request = post("/lp/export?timeout=60", &token, None, &poll);
    let _ = reader.get_mut().write_all(&request);
    let _ = reader.get_mut().flush();
    thread::sleep(random.about(Duration::from_secs(1)));
    if random.below(2) == 0 {
        let tls = reader.into_inner();
        let _ = rustix::net::sockopt::set_socket_linger(&tls.sock, Some(Duration::ZERO));
    }
}

/// Requests that are refused, each for another reason.
fn wrong(world: &World, from: [u8; 4], random: &mut Random) {
    let url = world.destinations.url(Kind::Quick, 997);
    let token = token_of("hostile", &url);
    let unknown = r#"{"id":"01a209fa-822b-7187-8cd1-039da68c5541"}"#;
    let (request, status) = match random.below(5) {
        0 => (post("/export", "no-token", None, unknown), 401),
        1 => (post("/export", &token, None, unknown), 404),
        2 => (post("/export", &token, None, "{\"uri\":1}"), 400),
        3 => (post("/elsewhere", &token, None, "{}"), 404),
        _ => {
            let uri = world.destinations.url(Kind::Quick, 996);
            let body = format!("{{\"uri\":\"{uri}\",\"data\":{{}}}}");
            (post("/export", &token, None, &body), 401)
        }
    };
    if let Ok(stream) = tls(from, &world.process) {
        expect(world, stream, &request, status);
    }
}
