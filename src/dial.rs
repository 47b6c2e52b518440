//! Looks names up and connects to their addresses, each under a deadline.
//!
//! IPv6 and IPv4 addresses are looked up in parallel, so that a missing answer to AAAA does not lose the A.
//! They are dialled by RFC 8305 ("Happy Eyeballs"), so that a dead address costs a quarter of a second and
//! not the attempt.
//!
//! Not here: which addresses may be dialled (`delivery`), and what is sent over a connection.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dns_lookup::{AddrFamily, AddrInfoHints, LookupErrorKind, SockType, getaddrinfo};
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::threads;

/// How long an answer is cached. A busy queue need not ask at each attempt, and a name that moves is followed
/// within seconds.
const CACHED: Duration = Duration::from_secs(3);
/// How long one family's answer waits for the other's (RFC 8305, section 3).
const RESOLUTION_DELAY: Duration = Duration::from_millis(50);
/// How long an address has to itself before the next one is dialled too (RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// How many names are cached. Only somebody who makes names up asks for more within seconds.
const NAMES: usize = 1024;
/// How many of a name's addresses are dialled.
const MOST_ADDRESSES: usize = 64;

/// Why a name has no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookUpError {
    /// The name servers say that the name has none, or does not exist.
    NoAddress,
    /// No name server has answered.
    NoAnswer,
    /// There was no answer before the deadline.
    TooSlow,
    /// The system could not start a thread for the look-up.
    NoThread,
}

impl std::error::Error for LookUpError {}

impl fmt::Display for LookUpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoAddress => "the name has no address",
            Self::NoAnswer => "no name server gave an answer",
            Self::TooSlow => "the name servers took too long",
            Self::NoThread => "the system has no thread for it",
        })
    }
}

/// The system's look-up, with a cache of some seconds that clones share.
#[derive(Clone, Default)]
pub struct Names {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Locked briefly, and never during a look-up.
    names: Mutex<HashMap<String, Name>>,
    answered: Condvar,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names")
    }
}

#[derive(Clone, Copy)]
enum Family {
    V6,
    V4,
}

/// What is known of a name, by family.
#[derive(Default)]
struct Name {
    v6: Answers,
    v4: Answers,
}

#[derive(Default)]
struct Answers {
    /// A look-up is under way. There is never a second one at the same time, however slow it is.
    asked: bool,
    last: Option<Answer>,
}

struct Answer {
    at: Instant,
    result: Result<Vec<SocketAddr>, LookUpError>,
}

impl Names {
    /// The addresses of a host, with this port, alternating between the families, IPv6 first. A literal
    /// address is its own answer. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// Why there is none.
    pub fn look_up(
        &self,
        host: &str,
        port: u16,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, LookUpError> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        let started = Instant::now();
        let mut names = self.shared.names.lock();
        make_room(&mut names, started);
        let name = names.entry(host.to_owned()).or_default();
        if !name.has_address(started) {
            // A failure is only for callers that have waited for it. Later ones ask anew.
            (name.v6.last, name.v4.last) = (None, None);
        }
        for family in [Family::V6, Family::V4] {
            let answers = name.of(family);
            if answers.asked || answers.recent(started).is_some() {
                continue;
            }
            // The system's look-up has no deadline, so it gets a thread of its own, which may outlast
            // the caller.
            let (shared, host) = (self.shared.clone(), host.to_owned());
            let began = threads::try_spawn("look-up", move || shared.ask(&host, family));
            answers.asked = began.is_ok();
            if began.is_err() {
                answers.last = Some(Answer {
                    at: started,
                    result: Err(LookUpError::NoThread),
                });
            }
        }
        loop {
            let Some(name) = names.get(host) else {
                // Not reached: a name with a look-up under way stays in the map.
                return Err(LookUpError::NoAnswer);
            };
            let now = Instant::now();
            let until = match name.decide(started, now, deadline) {
                Decision::Use => return Ok(name.addresses(started, port)),
                Decision::Fail(error) => return Err(error),
                Decision::WaitUntil(until) => until,
            };
            self.shared.answered.wait_until(&mut names, until);
        }
    }
}

/// Addresses that may still arrive while those already known are dialled.
pub enum Late {
    /// A look-up is still under way.
    Awaited,
    /// All look-ups are done, and these are all addresses.
    All(Vec<SocketAddr>),
}

impl Names {
    /// All addresses of a name of which [`Names::look_up`] may have returned one family's. Blocks until the
    /// other family's answer arrives, but not beyond `until`.
    pub fn late(&self, host: &str, port: u16, until: Instant) -> Late {
        let mut names = self.shared.names.lock();
        loop {
            let now = Instant::now();
            match names.get(host) {
                Some(name) if !name.is_asked() => return Late::All(name.addresses(now, port)),
                None => return Late::All(Vec::new()),
                Some(_) if now >= until => return Late::Awaited,
                Some(_) => {}
            }
            self.shared.answered.wait_until(&mut names, until);
        }
    }
}

impl Shared {
    fn ask(&self, host: &str, family: Family) {
        let result = ask_system(host, family);
        let mut names = self.names.lock();
        let name = names.entry(host.to_owned()).or_default();
        *name.of(family) = Answers {
            asked: false,
            last: Some(Answer {
                at: Instant::now(),
                result,
            }),
        };
        drop(names);
        self.answered.notify_all();
    }
}

/// Asks as every program of the system does, including the hosts file and search domains.
fn ask_system(host: &str, family: Family) -> Result<Vec<SocketAddr>, LookUpError> {
    let address = match family {
        Family::V6 => AddrFamily::Inet6,
        Family::V4 => AddrFamily::Inet,
    };
    let hints = AddrInfoHints {
        socktype: SockType::Stream.into(),
        address: address.into(),
        ..AddrInfoHints::default()
    };
    let found = getaddrinfo(Some(host), None, Some(hints)).map_err(|error| match error.kind() {
        LookupErrorKind::Again | LookupErrorKind::Fail | LookupErrorKind::System => {
            LookUpError::NoAnswer
        }
        _ => LookUpError::NoAddress,
    })?;
    Ok(found.flatten().map(|info| info.sockaddr).collect())
}

fn make_room(names: &mut HashMap<String, Name>, now: Instant) {
    if names.len() < NAMES {
        return;
    }
    names.retain(|_, name| name.is_asked() || name.has_address(now));
    if names.len() >= NAMES {
        names.retain(|_, name| name.is_asked());
    }
}

enum Decision {
    /// Use the addresses that are known.
    Use,
    Fail(LookUpError),
    WaitUntil(Instant),
}

impl Name {
    fn of(&mut self, family: Family) -> &mut Answers {
        match family {
            Family::V6 => &mut self.v6,
            Family::V4 => &mut self.v4,
        }
    }

    fn is_asked(&self) -> bool {
        self.v4.asked || self.v6.asked
    }

    fn has_address(&self, now: Instant) -> bool {
        let mut answers = [&self.v6, &self.v4].into_iter();
        answers.any(|answers| {
            let recent = answers.recent(now);
            recent.is_some_and(|answer| answer.result.as_ref().is_ok_and(|found| !found.is_empty()))
        })
    }

    /// What to do for a caller that has asked at `started`; pure.
    fn decide(&self, started: Instant, now: Instant, deadline: Instant) -> Decision {
        let (v6, v4) = (self.v6.recent(started), self.v4.recent(started));
        let found = self.has_address(started);
        if v6.is_some() && v4.is_some() {
            return match (found, v6, v4) {
                (true, ..) => Decision::Use,
                (
                    false,
                    Some(Answer { result: Err(a), .. }),
                    Some(Answer { result: Err(b), .. }),
                ) => {
                    // Without an answer for one family, the name may have an address in it.
                    let unheard = [*a, *b]
                        .into_iter()
                        .find(|one| *one != LookUpError::NoAddress);
                    Decision::Fail(unheard.unwrap_or(LookUpError::NoAddress))
                }
                _ => Decision::Fail(LookUpError::NoAddress),
            };
        }
        if !found {
            return if now < deadline {
                Decision::WaitUntil(deadline)
            } else {
                Decision::Fail(LookUpError::TooSlow)
            };
        }
        // One family has arrived, and the other one gets a moment more.
        let at = [v6, v4].into_iter().flatten().map(|answer| answer.at).max();
        let until = at.map_or(now, |at| at + RESOLUTION_DELAY).min(deadline);
        if now < until {
            Decision::WaitUntil(until)
        } else {
            Decision::Use
        }
    }

    /// The addresses of both families that are still valid at `now`, with this port.
    fn addresses(&self, now: Instant, port: u16) -> Vec<SocketAddr> {
        let of = |answers: &Answers| match answers.recent(now) {
            Some(Answer {
                result: Ok(found), ..
            }) => found.clone(),
            _ => Vec::new(),
        };
        let mut all = alternate(of(&self.v6), of(&self.v4));
        for address in &mut all {
            address.set_port(port);
        }
        all
    }
}

impl Answers {
    /// The last answer, if it is still valid at `now`.
    fn recent(&self, now: Instant) -> Option<&Answer> {
        self.last.as_ref().filter(|answer| now < answer.at + CACHED)
    }
}

fn alternate(v6: Vec<SocketAddr>, v4: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    let mut all = Vec::with_capacity(v6.len() + v4.len());
    while v6.len() + v4.len() > 0 {
        all.extend(v6.next());
        all.extend(v4.next());
    }
    all
}

/// Connects to one of these addresses (RFC 8305, section 5). The next one is dialled when one has failed, or
/// has not answered for a quarter of a second. The first that answers is used. `late` is asked for addresses
/// that arrive late, and may block until the time that it is given. Blocks until `deadline` at most.
///
/// # Errors
/// The most telling error of the addresses, `ErrorKind::TimedOut` if one of them was still silent, or an
/// error of `late`.
pub fn connect<E: From<io::Error>>(
    addresses: &[SocketAddr],
    deadline: Instant,
    mut late: impl FnMut(Instant) -> Result<Late, E>,
) -> Result<TcpStream, E> {
    let mut known = addresses.to_vec();
    let mut next = 0;
    let mut complete = false;
    let mut dialled: Vec<OwnedFd> = Vec::new();
    let mut failure = io::Error::new(ErrorKind::NotFound, "the name has no address");
    let mut next_at = Instant::now();
    loop {
        let now = Instant::now();
        while (now >= next_at || dialled.is_empty())
            && let Some(address) = known.get(next).filter(|_| next < MOST_ADDRESSES)
        {
            next += 1;
            match begin(address) {
                Ok(socket) => {
                    dialled.push(socket);
                    next_at = now + ATTEMPT_DELAY;
                    break;
                }
                Err(error) => failure = more_telling(failure, error),
            }
        }
        if !complete {
            // With nothing dialled, there is nothing else to wait for.
            let until = if dialled.is_empty() { deadline } else { now };
            if let Late::All(all) = late(until)? {
                complete = true;
                known.extend(all.iter().filter(|one| !addresses.contains(one)));
                continue;
            }
        }
        if now >= deadline {
            return Err(io::Error::from(ErrorKind::TimedOut).into());
        }
        if dialled.is_empty() {
            match complete {
                true => return Err(failure.into()),
                false => continue,
            }
        }
        let until = if next < known.len().min(MOST_ADDRESSES) {
            next_at
        } else if complete {
            deadline
        } else {
            now + RESOLUTION_DELAY
        };
        let answered = wait(&dialled, until.min(deadline).saturating_duration_since(now))?;
        // From the last one down, so that the remaining indexes stay valid.
        for at in answered.into_iter().rev() {
            let socket = dialled.remove(at);
            match sockopt::socket_error(&socket) {
                Ok(Ok(())) => {
                    let stream = TcpStream::from(socket);
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Ok(Err(error)) | Err(error) => {
                    failure = more_telling(failure, error.into());
                    next_at = now;
                }
            }
        }
    }
}

/// Begins to connect, without blocking.
fn begin(address: &SocketAddr) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Waits until some of these have connected or failed, or `limit` has passed. Returns their indexes.
fn wait(sockets: &[OwnedFd], limit: Duration) -> io::Result<Vec<usize>> {
    let mut waiting: Vec<_> = sockets
        .iter()
        .map(|socket| PollFd::new(socket, PollFlags::OUT))
        .collect();
    // Rounded up: for less than a millisecond the kernel would return at once.
    let limit = Timespec::try_from(limit + Duration::from_millis(1)).map_err(io::Error::other)?;
    match poll(&mut waiting, Some(&limit)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let answered = |(at, one): (usize, &PollFd<'_>)| (!one.revents().is_empty()).then_some(at);
    Ok(waiting.iter().enumerate().filter_map(answered).collect())
}

/// Which of two failures to report: what a host has answered tells more than that another one cannot be
/// reached.
fn more_telling(one: io::Error, other: io::Error) -> io::Error {
    let weight = |error: &io::Error| match error.kind() {
        ErrorKind::NotFound => 0,
        ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable | ErrorKind::Unsupported => 1,
        ErrorKind::HostUnreachable | ErrorKind::PermissionDenied => 2,
        ErrorKind::TimedOut => 3,
        _ => 4,
    };
    if weight(&other) >= weight(&one) {
        other
    } else {
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn answer(at: Instant, addresses: &[&str]) -> Answers {
        let parse = |ip: &&str| SocketAddr::new(ip.parse().unwrap(), 0);
        Answers {
            asked: false,
            last: Some(Answer {
                at,
                result: Ok(addresses.iter().map(parse).collect()),
            }),
        }
    }

    fn failed(at: Instant, error: LookUpError) -> Answers {
        Answers {
            asked: false,
            last: Some(Answer {
                at,
                result: Err(error),
            }),
        }
    }

    fn asked() -> Answers {
        Answers {
            asked: true,
            last: None,
        }
    }

    #[test]
    fn an_unanswered_family_does_not_lose_the_other() {
        let start = Instant::now();
        let deadline = start + Duration::from_secs(30);
        let name = Name {
            v6: asked(),
            v4: answer(start + Duration::from_secs(1), &["192.0.2.1"]),
        };
        let at = start + Duration::from_secs(1);
        assert!(
            matches!(name.decide(start, at, deadline), Decision::WaitUntil(until) if until == at + RESOLUTION_DELAY)
        );
        assert!(matches!(
            name.decide(start, at + RESOLUTION_DELAY, deadline),
            Decision::Use
        ));
        assert_eq!(name.addresses(at, 7), ["192.0.2.1:7".parse().unwrap()]);
        // Nothing there, or nothing heard: that is for the other one to say.
        for v4 in [answer(at, &[]), failed(at, LookUpError::NoAnswer)] {
            let name = Name { v6: asked(), v4 };
            assert!(
                matches!(name.decide(start, at, deadline), Decision::WaitUntil(until) if until == deadline)
            );
            assert!(matches!(
                name.decide(start, deadline, deadline),
                Decision::Fail(LookUpError::TooSlow)
            ));
        }
    }

    #[test]
    fn a_failure_counts_for_who_has_waited_for_it_and_an_address_for_seconds() {
        let start = Instant::now();
        let later = start + Duration::from_secs(2);
        let deadline = start + Duration::from_secs(30);
        let name = Name {
            v6: failed(start, LookUpError::NoAddress),
            v4: failed(start, LookUpError::NoAnswer),
        };
        assert!(matches!(
            name.decide(start, start, deadline),
            Decision::Fail(LookUpError::NoAnswer)
        ));
        assert!(!name.has_address(start), "the next caller asks anew");
        let name = Name {
            v6: failed(start, LookUpError::NoAddress),
            v4: answer(start, &["192.0.2.1"]),
        };
        assert!(name.has_address(later) && !name.has_address(start + CACHED));
    }

    #[test]
    fn literal_addresses_and_names_of_this_machine_are_found() {
        let names = Names::default();
        for (host, expected) in [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80")] {
            let found = names.look_up(host, 80, soon()).unwrap();
            assert_eq!(found, [expected.parse().unwrap()]);
        }
        let found = names.look_up("localhost", 80, soon()).unwrap();
        assert!(
            found
                .iter()
                .all(|address| address.ip().is_loopback() && address.port() == 80)
        );
        assert!(names.look_up("localhost", 81, soon()).unwrap()[0].port() == 81);
        assert!(names.look_up("no..name", 80, soon()).is_err());
    }

    #[test]
    fn a_dead_address_does_not_keep_from_a_living_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let alive = listener.local_addr().unwrap();
        // Nobody listens at the one, and the other may not be dialled at all.
        let refusing = SocketAddr::from(([127, 0, 0, 1], 1));
        let impossible: SocketAddr = "[ff02::1%1]:80".parse().unwrap_or(refusing);
        let connect = |addresses: &[SocketAddr], late: &[SocketAddr]| {
            // The second time that they are asked for, they are there.
            let mut asked = false;
            connect(addresses, soon(), |_| -> io::Result<Late> {
                match std::mem::replace(&mut asked, true) {
                    true => Ok(Late::All(late.to_vec())),
                    false => Ok(Late::Awaited),
                }
            })
        };
        let stream = connect(&[impossible, refusing, alive], &[]).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), alive);
        let error = connect(&[refusing], &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert!(connect(&[], &[]).is_err());
        let stream = connect(&[refusing], &[refusing, alive]).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), alive);
    }

    proptest! {
        #[test]
        fn families_take_turns_and_keep_their_order(v6 in 0_u16..80, v4 in 0_u8..80) {
            let six: Vec<_> = (0..v6).map(|n| SocketAddr::from(([0x2001, 0, 0, 0, 0, 0, 0, n], 0))).collect();
            let four: Vec<_> = (0..v4).map(|n| SocketAddr::from(([192, 0, 2, n], 0))).collect();
            let all = alternate(six.clone(), four.clone());
            let of = |wanted: bool| all.iter().copied().filter(|one| one.is_ipv6() == wanted).collect::<Vec<_>>();
            prop_assert!(six == of(true) && four == of(false));
            let both = six.len().min(four.len());
            prop_assert!(all[..2 * both].iter().enumerate().all(|(at, one)| one.is_ipv6() == (at % 2 == 0)));
        }
    }
}
