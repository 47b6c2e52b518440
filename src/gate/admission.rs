//! Admission: a bounded number of connections, in all and for each client address.
//!
//! At the limit, the connections that have waited longest without a whole request are evicted, one for each
//! newcomer in line; see [`super::permit`]. If none waits because all have a request being served, the
//! newcomer is rejected: it is admitted only to be told 503, and closed if too many are.
//!
//! No connection is evicted before its grace period is over, since on a slow machine nobody would get
//! through if each newcomer evicted the one before it. If newcomers arrive faster than that, they wait in
//! line without a thread. Each client address has a line of its own, so that a crowd holds up only its own
//! address.
//!
//! Only the thread that accepts has an [`Admission`], so there is no lock. It looks at the connections only
//! while newcomers stand in line.
//!
//! Not here: accepting, and what a connection does ([`super::connection`]).

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::permit::{Activity, Common, Handle, Permit, Snapshot};

/// How many connections beyond the limit are admitted to be told 503.
pub const REJECTED: usize = 16;

/// How many connections there may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In all.
    pub connections: usize,
    /// For each client address.
    pub per_client: usize,
}

/// The connections of one listener, and the newcomers in line.
pub struct Admission {
    limits: Limits,
    common: Arc<Common>,
    /// Each permit has a clone: see [`Permit::new`].
    open: Sender<()>,
    connections: Vec<(IpAddr, Arc<Handle>)>,
    rejected: Vec<Arc<Handle>>,
    clients: HashMap<IpAddr, Client>,
    last_ticket: u64,
}

/// One client address. The counts are as [`Admission::look`] found them.
#[derive(Default)]
struct Client {
    connections: usize,
    /// Those of them that wait.
    waiting: usize,
    /// Those of them that were evicted and have not ended.
    evicted: usize,
    /// In order of arrival.
    line: VecDeque<Newcomer>,
}

/// A connection that was accepted and has no permit yet.
#[derive(Clone)]
pub struct Newcomer {
    /// The accepted socket.
    pub socket: Arc<TcpStream>,
    /// The client's address.
    pub address: SocketAddr,
    accepted: Instant,
    ticket: u64,
}

/// Whether there is room for a newcomer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Free,
    /// Not yet: a connection can be evicted, or has been and has not ended.
    Later,
    /// No: a request is being served on every connection that could make room.
    None,
}

impl Client {
    fn could_make_room(&self) -> bool {
        self.waiting + self.evicted > 0
    }
}

impl Admission {
    /// For a listener without connections. The last clone of `open` is dropped with the last connection.
    pub fn new(limits: Limits, common: Arc<Common>, open: Sender<()>) -> Self {
        Self {
            limits,
            common,
            open,
            connections: Vec::new(),
            rejected: Vec::new(),
            clients: HashMap::new(),
            last_ticket: 0,
        }
    }

    /// Puts a connection that was accepted `now` at the end of its client address's line.
    pub fn line_up(&mut self, socket: Arc<TcpStream>, address: SocketAddr, now: Instant) {
        self.last_ticket += 1;
        let newcomer = Newcomer {
            socket,
            address,
            accepted: now,
            ticket: self.last_ticket,
        };
        self.client(address).line.push_back(newcomer);
    }

    /// Puts a newcomer that [`Admission::admit`] returned back at the front of its line.
    pub fn put_back(&mut self, newcomer: Newcomer) {
        self.client(newcomer.address).line.push_front(newcomer);
    }

    fn client(&mut self, address: SocketAddr) -> &mut Client {
        self.clients.entry(network(address.ip())).or_default()
    }

    /// How many stand in line.
    pub fn newcomers(&self) -> usize {
        self.clients.values().map(|client| client.line.len()).sum()
    }

    /// Looks at what the connections are doing, for [`Admission::admit`] and [`Admission::make_room`].
    pub fn look(&mut self) {
        for client in self.clients.values_mut() {
            (client.connections, client.waiting, client.evicted) = (0, 0, 0);
        }
        self.connections.retain(|(address, handle)| {
            let activity = handle.activity();
            if activity == Activity::Ended {
                return false;
            }
            let client = self.clients.entry(*address).or_default();
            client.connections += 1;
            client.waiting += usize::from(matches!(activity, Activity::Waiting(_)));
            client.evicted += usize::from(activity == Activity::Evicted);
            true
        });
        self.rejected
            .retain(|handle| handle.activity() != Activity::Ended);
        let is_there = |client: &Client| client.connections > 0 || !client.line.is_empty();
        self.clients.retain(|_, client| is_there(client));
    }

    /// Gives a permit to the next newcomer that there is room for, or that is to be rejected. Closes
    /// newcomers beyond [`REJECTED`].
    pub fn admit(&mut self) -> Option<(Permit, Newcomer)> {
        loop {
            let (network, room) = self.next_in_line()?;
            let client = self.clients.get_mut(&network)?;
            let newcomer = client.line.pop_front()?;
            let rejected = room == Room::None;
            if rejected && self.rejected.len() >= REJECTED {
                continue;
            }
            let permit = Permit::new(
                &self.common,
                &newcomer.socket,
                (network, newcomer.accepted),
                rejected,
                self.open.clone(),
            );
            if rejected {
                self.rejected.push(permit.handle().clone());
            } else {
                self.connections.push((network, permit.handle().clone()));
                client.connections += 1;
                client.waiting += 1;
            }
            return Some((permit, newcomer));
        }
    }

    /// The client address whose first newcomer need not wait any longer. Addresses with fewer connections
    /// come first, then newcomers that were accepted first.
    fn next_in_line(&self) -> Option<(IpAddr, Room)> {
        let others = self.clients.values().any(Client::could_make_room);
        let lines = self.clients.iter().filter_map(|(network, client)| {
            let first = client.line.front()?;
            let room = self.room(client, others);
            (room != Room::Later).then_some(((client.connections, first.ticket), *network, room))
        });
        let next = lines.min_by_key(|(rank, ..)| *rank);
        next.map(|(_, network, room)| (network, room))
    }

    /// Whether there is room for another connection of this client. At the client's own limit, only its own
    /// connections can make room. Else any can, if `others` says that there is such a one.
    fn room(&self, client: &Client, others: bool) -> Room {
        let is_full = client.connections >= self.limits.per_client;
        let could_be_made = if is_full {
            client.could_make_room()
        } else {
            others
        };
        match (is_full, could_be_made) {
            (false, _) if self.connections.len() < self.limits.connections => Room::Free,
            (_, true) => Room::Later,
            (_, false) => Room::None,
        }
    }

    /// Evicts the connections that have waited longest, after their grace period, as many as newcomers need.
    /// True if there were any.
    pub fn make_room(&mut self, now: Instant) -> bool {
        // How many evictions are needed among the connections of one address, and among all.
        let (mut own, mut any) = (HashMap::new(), 0);
        for (network, client) in &self.clients {
            match self.limits.per_client.saturating_sub(client.connections) {
                0 => {
                    own.insert(*network, client.line.len().saturating_sub(client.evicted));
                }
                more => any += client.line.len().min(more),
            }
        }
        let evicted: usize = self.clients.values().map(|client| client.evicted).sum();
        let free = self
            .limits
            .connections
            .saturating_sub(self.connections.len());
        any = any.saturating_sub(free + evicted);
        if any == 0 && own.values().all(|count| *count == 0) {
            return false;
        }
        let mut done = false;
        for (state, network, handle) in self.waiting() {
            if !handle.is_grace_over(state, now) {
                break;
            }
            let needed = match own.get_mut(&network) {
                Some(count) if *count > 0 => count,
                _ => &mut any,
            };
            if *needed > 0 && handle.evict(state) {
                *needed -= 1;
                done = true;
            }
        }
        done
    }

    /// The connections that wait, in the order in which they may be evicted.
    fn waiting(&self) -> Vec<(Snapshot, IpAddr, Arc<Handle>)> {
        let waiting = self.connections.iter().filter_map(|(network, handle)| {
            let Activity::Waiting(state) = handle.activity() else {
                return None;
            };
            Some((state, *network, handle.clone()))
        });
        let mut waiting: Vec<_> = waiting.collect();
        waiting.sort_unstable_by_key(|(state, ..)| *state);
        waiting
    }

    /// Evicts the connection that has waited longest, if any waits, even in its grace period.
    pub fn evict_one(&self) {
        self.waiting()
            .iter()
            .any(|(state, _, handle)| handle.evict(*state));
    }

    /// Evicts all connections that wait, and closes newcomers. Connections with a request being served find
    /// out for themselves that it is their last, as [`Common::close`] was called before.
    pub fn close(self) {
        let connections = self.connections.iter().map(|(_, handle)| handle);
        for handle in connections.chain(&self.rejected) {
            while let Activity::Waiting(state) = handle.activity() {
                handle.evict(state);
            }
        }
    }
}

/// What counts as one client: an IPv4 address, or the first 64 bits of an IPv6 address, which a client
/// cannot choose (RFC 4291, section 2.5.4).
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::super::permit::tests::socket;
    use super::super::permit::{GRACE, TURN};
    use super::*;
    use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
    use proptest::prelude::*;
    use std::io::Read;
    use std::net::{Ipv4Addr, TcpListener};
    use std::time::Duration;

    const LIMITS: Limits = Limits {
        connections: 3,
        per_client: 2,
    };

    fn admission() -> (Admission, Receiver<()>) {
        let (open, ended) = bounded(0);
        let common = Common::new(Instant::now());
        (Admission::new(LIMITS, common, open), ended)
    }

    fn address(client: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([192, 168, 1, client], port))
    }

    /// Lets in whoever can be now.
    fn admitted(admission: &mut Admission) -> Vec<(Permit, SocketAddr)> {
        admission.look();
        let admit = || {
            let (permit, newcomer) = admission.admit()?;
            permit.begin(Instant::now());
            Some((permit, newcomer.address))
        };
        std::iter::from_fn(admit).collect()
    }

    fn come(admission: &mut Admission, client: u8) -> Vec<Permit> {
        admission.line_up(socket(), address(client, 1), Instant::now());
        let admitted = admitted(admission);
        admitted.into_iter().map(|(permit, _)| permit).collect()
    }

    fn taken(admission: &mut Admission, client: u8) -> Permit {
        let mut permits = come(admission, client);
        assert_eq!(permits.len(), 1);
        permits.remove(0)
    }

    /// Which of them have to make room at that moment.
    fn evicted<const N: usize>(
        admission: &mut Admission,
        now: Instant,
        permits: [&Permit; N],
    ) -> [bool; N] {
        admission.look();
        admission.make_room(now);
        permits.map(Permit::is_evicted)
    }

    fn later() -> Instant {
        Instant::now() + GRACE
    }

    #[test]
    fn nobody_makes_room_before_its_time_and_newcomers_wait_in_the_order_of_coming() {
        let (mut admission, _) = admission();
        let too_early = Instant::now();
        let [a, b] = [1, 1].map(|client| taken(&mut admission, client));
        let addresses = [5, 3, 4].map(|port| address(1, port));
        for address in addresses {
            admission.line_up(socket(), address, too_early);
        }
        assert!(admitted(&mut admission).is_empty());
        assert_eq!(evicted(&mut admission, too_early, [&a, &b]), [false, false]);
        // Whose client has begun a handshake has more time.
        let enough = later();
        a.begin_handshake(enough);
        assert_eq!(evicted(&mut admission, enough, [&a, &b]), [false, true]);
        assert!(admitted(&mut admission).is_empty(), "it is still there");
        drop(b);
        let (first, from) = admitted(&mut admission).remove(0);
        assert_eq!((from, admission.newcomers()), (addresses[0], 2));
        let enough = later() + GRACE;
        assert_eq!(evicted(&mut admission, enough, [&a, &first]), [true, true]);
        drop((a, first));
        let froms = admitted(&mut admission).into_iter().map(|(_, from)| from);
        assert_eq!(froms.collect::<Vec<_>>(), addresses[1..]);
    }

    #[test]
    fn those_that_have_waited_longest_make_room_as_many_as_stand_in_line() {
        let (mut admission, _) = admission();
        let [mut a, b, c] = [1, 2, 1].map(|client| taken(&mut admission, client));
        a.serve().unwrap();
        a.send(later());
        assert!(come(&mut admission, 1).is_empty());
        let all = [&a, &b, &c];
        assert_eq!(evicted(&mut admission, later(), all), [false, false, true]);
        assert_eq!(
            evicted(&mut admission, later() + TURN, all),
            [false, false, true]
        );
        drop(c);
        let d = admitted(&mut admission).remove(0).0;
        // Of all, where its own address has less than it may have.
        assert!(come(&mut admission, 3).is_empty());
        let all = [&a, &b, &d];
        assert_eq!(evicted(&mut admission, later(), all), [false, true, false]);
    }

    #[test]
    fn a_connection_whose_thread_has_not_begun_makes_no_room() {
        let (mut admission, _) = admission();
        admission.line_up(socket(), address(1, 1), Instant::now());
        admission.look();
        let (not_begun, _) = admission.admit().unwrap();
        let begun = taken(&mut admission, 1);
        assert!(come(&mut admission, 1).is_empty());
        let both = [&not_begun, &begun];
        assert_eq!(evicted(&mut admission, later(), both), [false, true]);
    }

    #[test]
    fn a_crowd_in_line_holds_up_its_own_address_and_no_other() {
        let (mut admission, _) = admission();
        let too_early = Instant::now();
        let [a, b] = [1, 1].map(|client| taken(&mut admission, client));
        for _ in 0..100 {
            assert!(come(&mut admission, 1).is_empty());
        }
        let other = taken(&mut admission, 2);
        assert!(!other.is_rejected());
        // If any connection can make room, the address with the fewest comes first.
        assert!(come(&mut admission, 3).is_empty());
        evicted(&mut admission, too_early, []);
        assert!(!a.is_evicted());
        assert_eq!(evicted(&mut admission, later(), [&a, &b]), [true, true]);
        drop(a);
        let (_another, from) = admitted(&mut admission).remove(0);
        assert_eq!(from, address(3, 1));
    }

    #[test]
    fn where_all_are_being_served_a_newcomer_is_rejected_at_once() {
        let (mut admission, _) = admission();
        let mut served = [1, 1].map(|client| taken(&mut admission, client));
        for permit in &mut served {
            permit.serve().unwrap();
        }
        let too_many: Vec<_> = (0..REJECTED).map(|_| taken(&mut admission, 1)).collect();
        assert!(too_many.iter().all(Permit::is_rejected));
        assert!(come(&mut admission, 1).is_empty());
        assert_eq!(admission.newcomers(), 0);
        // They take nothing from others, and make no room for others.
        assert!(!taken(&mut admission, 2).is_rejected());
        admission.look();
        assert!(!admission.make_room(later()) && !too_many.iter().any(Permit::is_evicted));
        drop(too_many);
        assert!(taken(&mut admission, 1).is_rejected());
    }

    #[test]
    fn who_was_let_in_without_a_thread_to_be_had_is_first_in_line_again() {
        let (mut admission, _) = admission();
        for port in [1, 2] {
            admission.line_up(socket(), address(1, port), Instant::now());
        }
        admission.look();
        let (permit, newcomer) = admission.admit().unwrap();
        drop(permit);
        admission.put_back(newcomer);
        let froms = admitted(&mut admission).into_iter().map(|(_, from)| from);
        assert_eq!(froms.collect::<Vec<_>>(), [address(1, 1), address(1, 2)]);
    }

    #[test]
    fn when_the_service_stops_all_that_wait_are_evicted_and_who_stands_in_line_is_closed() {
        let (mut admission, ended) = admission();
        let [waiting, mut served] = [1, 1].map(|client| taken(&mut admission, client));
        served.serve().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        admission.line_up(Arc::new(socket), address(1, 1), Instant::now());
        admission.common.close();
        admission.close();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert!(waiting.is_evicted() && !served.is_evicted());
        drop(waiting);
        let moment = Duration::from_millis(1);
        assert_eq!(ended.recv_timeout(moment), Err(RecvTimeoutError::Timeout));
        assert!(!served.send(Instant::now()));
        drop(served);
        assert_eq!(
            ended.recv_timeout(moment),
            Err(RecvTimeoutError::Disconnected)
        );
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_there_may_be_and_everybody_in_line_has_its_turn(
            steps in proptest::collection::vec((0_u8..7, 0_u8..4, any::<prop::sample::Index>()), 0..200),
        ) {
            let (mut admission, _) = admission();
            let socket = socket();
            let mut held = Vec::<Permit>::new();
            let mut now = Instant::now();
            for (step, client, which) in steps {
                now += TURN;
                let index = (!held.is_empty()).then(|| which.index(held.len()));
                match (step, index) {
                    (0 | 1, _) => admission.line_up(socket.clone(), address(client, 1), now),
                    (2, Some(index)) => drop(held.swap_remove(index)),
                    (3, Some(index)) => held[index].serve().unwrap(),
                    (4, Some(index)) => { held[index].send(now); }
                    (5, Some(index)) => held[index].receive(),
                    (6, _) => admission.evict_one(),
                    _ => {}
                }
                let served: Vec<_> = held.iter().map(|permit| permit.handle().activity() == Activity::Served).collect();
                admission.look();
                while let Some((permit, _)) = admission.admit() {
                    permit.begin(now);
                    held.push(permit);
                }
                admission.make_room(now);
                let taken = || held.iter().filter(|permit| !permit.is_rejected());
                prop_assert!(taken().count() <= LIMITS.connections);
                prop_assert!(held.len() - taken().count() <= REJECTED);
                for permit in &held {
                    let of_client = taken().filter(|other| other.client() == permit.client());
                    prop_assert!(of_client.count() <= LIMITS.per_client);
                }
                for (permit, served) in held.iter().zip(served) {
                    prop_assert_eq!(served, permit.handle().activity() == Activity::Served);
                }
            }
            // Those that are evicted end, and those in line take turns, until none is left.
            let mut left = admission.newcomers();
            while left > 0 {
                now += 10 * GRACE;
                held.retain(|permit| !permit.is_evicted() && permit.handle().activity() != Activity::Served);
                admission.look();
                while let Some((permit, _)) = admission.admit() {
                    permit.begin(now);
                    held.push(permit);
                }
                admission.make_room(now + 10 * GRACE);
                prop_assert!(admission.newcomers() < left || held.iter().any(Permit::is_evicted));
                left = admission.newcomers();
            }
            drop(held);
            admission.look();
            prop_assert!(admission.connections.is_empty() && admission.rejected.is_empty());
            prop_assert!(admission.clients.is_empty());
        }
    }
}
