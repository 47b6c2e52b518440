//! Who may be connected: a bounded number of slots, and which connection makes room for another.
//!
//! A connection is *waiting* while it has no whole request: in its handshake, idle, in the middle
//! of a request, or slow to read its answer. Those are the ones that a client can hold on to for
//! nothing, so when there is no room the one that has been waiting longest is closed. A connection
//! whose request is being served is never closed here.
//!
//! Not here: sockets, but for closing them.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How many connections beyond the limit are let in to be told 503.
const TURNED_AWAY: usize = 16;
/// How many that were closed to make room may not be gone yet, before newcomers wait for them.
const LEAVING: usize = 64;
/// The connections that there may be beside those that have a place.
pub const BESIDE: usize = LEAVING + TURNED_AWAY;
/// How long a newcomer waits for them.
const MAKING_ROOM: Duration = Duration::from_secs(1);
/// How long a connection may keep large memory waiting before others may take it. A client that
/// does not dawdle has sent its body by then.
const DAWDLING: Duration = Duration::from_secs(1);

/// How much there may be at a time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one client address.
    pub per_peer: usize,
    /// Bytes of large bodies and answers, of all connections together.
    pub memory: usize,
}

/// The slots of one listener.
pub struct Slots {
    limits: Limits,
    inner: Mutex<Inner>,
    /// A connection has gone, or all is to end.
    left: Condvar,
}

#[derive(Default)]
struct Inner {
    taken: usize,
    /// Closed to make room, and not gone yet: their places are others' already.
    leaving: usize,
    turned_away: usize,
    peers: HashMap<IpAddr, usize>,
    /// By how long they have been waiting: the longest first.
    waiting: BTreeMap<u64, Waiting>,
    /// Who waits for memory, in the order of coming. Only the first may take some: so those behind
    /// it need not be woken for each byte that comes free, and are not overtaken for ever.
    in_line: BTreeMap<u64, Arc<Handle>>,
    /// The next key in `waiting` or `in_line`.
    next: u64,
    memory: usize,
    closing: bool,
}

struct Waiting {
    handle: Arc<Handle>,
    peer: IpAddr,
    turned_away: bool,
    /// It is being sent an answer, and not read from.
    is_answered: bool,
    memory: usize,
    /// Since when it keeps that memory.
    keeping_since: Instant,
}

/// What it takes to have a connection's thread notice something.
struct Handle {
    socket: Arc<TcpStream>,
    /// It waits for memory, and may be the first in line now; or it was closed.
    changed: Condvar,
}

/// One connection's place; given back when it is dropped.
pub struct Slot {
    slots: Arc<Slots>,
    handle: Arc<Handle>,
    peer: IpAddr,
    /// Its key in [`Inner::waiting`]; none while a request of it is served.
    waiting: Option<u64>,
    memory: usize,
    turned_away: bool,
    /// Nothing more is read from its client.
    cut_off: bool,
}

/// The connection was closed to make room for another, or because the service stops.
#[derive(Debug, PartialEq, Eq)]
pub struct Evicted;

impl Slots {
    /// Slots that are all free.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            inner: Mutex::default(),
            left: Condvar::new(),
        })
    }

    /// Takes a slot for a connection that begins, and closes another where that is needed. None
    /// where there is no room, not even to be told so. Blocks only while many that were closed
    /// have not gone yet, for a second at most.
    pub fn take(self: &Arc<Self>, peer: IpAddr, socket: Arc<TcpStream>) -> Option<Slot> {
        let peer = network(peer);
        let deadline = Instant::now() + MAKING_ROOM;
        let mut inner = self.inner.lock();
        while inner.leaving >= LEAVING && !inner.closing {
            if self.left.wait_until(&mut inner, deadline).timed_out() {
                break;
            }
        }
        if inner.closing {
            return None;
        }
        let turned_away = inner.leaving >= LEAVING || !self.admit(&mut inner, peer);
        if turned_away && inner.turned_away >= TURNED_AWAY {
            return None;
        }
        inner.turned_away += usize::from(turned_away);
        let mut slot = Slot {
            slots: self.clone(),
            handle: Arc::new(Handle {
                socket,
                changed: Condvar::new(),
            }),
            peer,
            waiting: None,
            memory: 0,
            turned_away,
            cut_off: false,
        };
        slot.enter(&mut inner, false);
        Some(slot)
    }

    /// Closes the connection that has been waiting longest, if there is one.
    pub fn evict_one(&self) {
        self.evict(&mut self.inner.lock(), |_| true);
    }

    /// Closes all connections but those whose request is being served, and those when it is.
    pub fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closing = true;
        while self.evict(&mut inner, |_| true) {}
        self.left.notify_all();
    }

    /// Whether [`Slots::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.inner.lock().closing
    }

    /// Waits until no connection is left, until `deadline` at the latest.
    pub fn wait_until_free(&self, deadline: Instant) {
        let mut inner = self.inner.lock();
        while inner.taken + inner.leaving + inner.turned_away > 0 {
            if self.left.wait_until(&mut inner, deadline).timed_out() {
                return;
            }
        }
    }
}

impl Slot {
    /// Whether this connection is one too many, let in only to be told so.
    pub fn is_turned_away(&self) -> bool {
        self.turned_away
    }

    /// From now on a whole request is being served. One that was there before its connection was
    /// closed to make room takes the place of another in turn.
    ///
    /// # Errors
    /// Where the connection has been closed, and there is no place.
    pub fn serve(&mut self) -> Result<(), Evicted> {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        if self.was_removed(&inner) {
            if self.turned_away || inner.closing || !slots.admit(&mut inner, self.peer) {
                return Err(Evicted);
            }
            inner.leaving -= 1;
            self.cut_off = true;
        }
        if let Some(key) = self.waiting.take() {
            inner.waiting.remove(&key);
        }
        Ok(())
    }

    /// From now on it waits for its client again, first for it to take an answer.
    ///
    /// # Errors
    /// Where the connection is to end after what it is about to send.
    pub fn wait(&mut self) -> Result<(), Evicted> {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        if inner.closing {
            return Err(Evicted);
        }
        if self.waiting.is_none() {
            self.enter(&mut inner, true);
        }
        if self.cut_off { Err(Evicted) } else { Ok(()) }
    }

    /// The client has its answer, and is waited for to send something.
    pub fn answered(&mut self) {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        self.set_memory(&mut inner, 0);
        if let Some(waiting) = self.waiting.and_then(|key| inner.waiting.get_mut(&key)) {
            waiting.is_answered = false;
        }
    }

    /// Whether the connection was closed to make room, or because the service stops.
    pub fn is_evicted(&self) -> bool {
        self.was_removed(&self.slots.inner.lock())
    }

    fn was_removed(&self, inner: &Inner) -> bool {
        self.waiting
            .is_some_and(|key| !inner.waiting.contains_key(&key))
    }

    fn enter(&mut self, inner: &mut Inner, is_answered: bool) {
        let key = inner.ticket();
        let waiting = Waiting {
            handle: self.handle.clone(),
            peer: self.peer,
            turned_away: self.turned_away,
            is_answered,
            memory: self.memory,
            keeping_since: Instant::now(),
        };
        inner.waiting.insert(key, waiting);
        self.waiting = Some(key);
    }

    /// Keeps so much memory instead of what was kept before. Where there is too little, it waits in
    /// line until `deadline`, and has connections closed that dawdle over theirs.
    ///
    /// # Errors
    /// Where there is still too little then, and nothing is kept.
    pub fn keep(&mut self, bytes: usize, deadline: Instant) -> Result<(), Evicted> {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        self.set_memory(&mut inner, 0);
        let ticket = inner.ticket();
        inner.in_line.insert(ticket, self.handle.clone());
        let kept = loop {
            let now = Instant::now();
            if self.was_removed(&inner) || now >= deadline {
                break Err(Evicted);
            }
            let is_first = inner.first_in_line() == Some(ticket);
            if is_first && inner.memory + bytes <= slots.limits.memory {
                break Ok(());
            }
            let mut until = deadline;
            // Of one that is closed the memory comes back, which is told to the first in line.
            if is_first && !slots.evict(&mut inner, |waiting| waiting.dawdles(now)) {
                until = inner.next_dawdling().unwrap_or(deadline).min(deadline);
            }
            self.handle.changed.wait_until(&mut inner, until);
        };
        inner.in_line.remove(&ticket);
        if kept.is_ok() {
            self.set_memory(&mut inner, bytes);
        }
        inner.wake_first_in_line();
        kept
    }

    /// The same for what is in memory already: it does not wait.
    pub fn keep_anyway(&mut self, bytes: usize) {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        self.set_memory(&mut inner, bytes);
        let now = Instant::now();
        if inner.memory > slots.limits.memory {
            slots.evict(&mut inner, |waiting| waiting.dawdles(now));
        }
    }

    /// Gives back what was kept.
    pub fn release(&mut self) {
        if self.memory > 0 {
            let slots = self.slots.clone();
            self.set_memory(&mut slots.inner.lock(), 0);
        }
    }

    fn set_memory(&mut self, inner: &mut Inner, bytes: usize) {
        inner.memory = inner.memory - self.memory + bytes;
        if bytes < self.memory {
            inner.wake_first_in_line();
        }
        self.memory = bytes;
        if let Some(waiting) = self.waiting.and_then(|key| inner.waiting.get_mut(&key)) {
            waiting.memory = bytes;
            waiting.keeping_since = Instant::now();
        }
    }
}

impl Waiting {
    fn dawdles(&self, now: Instant) -> bool {
        self.memory > 0 && now >= self.keeping_since + DAWDLING
    }
}

impl Inner {
    fn ticket(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn first_in_line(&self) -> Option<u64> {
        self.in_line.first_key_value().map(|(ticket, _)| *ticket)
    }

    fn wake_first_in_line(&self) {
        if let Some((_, first)) = self.in_line.first_key_value() {
            first.changed.notify_one();
        }
    }

    /// When the next connection begins to dawdle over its memory.
    fn next_dawdling(&self) -> Option<Instant> {
        let keeping = self.waiting.values().filter(|waiting| waiting.memory > 0);
        keeping
            .map(|waiting| waiting.keeping_since + DAWDLING)
            .min()
    }

    /// Takes a connection off the count of those that have a place.
    fn leave(&mut self, peer: IpAddr) {
        self.taken -= 1;
        if let Some(count) = self.peers.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                self.peers.remove(&peer);
            }
        }
    }
}

impl Slots {
    /// Counts one connection more, for which another is closed where there is no room: one of the
    /// same peer if that has as many as it may have. False where all of those are being served.
    fn admit(&self, inner: &mut Inner, peer: IpAddr) -> bool {
        let of_peer = inner.peers.get(&peer).copied().unwrap_or(0);
        let peer_is_full = of_peer >= self.limits.per_peer;
        let makes_room =
            |waiting: &Waiting| !waiting.turned_away && (!peer_is_full || waiting.peer == peer);
        let is_full = peer_is_full || inner.taken >= self.limits.connections;
        if is_full && !self.evict(inner, makes_room) {
            return false;
        }
        inner.taken += 1;
        *inner.peers.entry(peer).or_default() += 1;
        true
    }

    /// Closes the longest waiting connection of those that may be; false where there is none. Its
    /// place is free at once. Its thread finds that out, whether it reads from the client, writes
    /// to it or waits for memory, and ends.
    fn evict(&self, inner: &mut Inner, may_be: impl Fn(&Waiting) -> bool) -> bool {
        let found = inner.waiting.iter().find(|(_, waiting)| may_be(waiting));
        let Some(key) = found.map(|(key, _)| *key) else {
            return false;
        };
        let Some(waiting) = inner.waiting.remove(&key) else {
            return false;
        };
        // Who is in the middle of a request can still be told why nothing comes of it.
        let how = if waiting.is_answered {
            Shutdown::Both
        } else {
            Shutdown::Read
        };
        // It fails where the client has gone already, and then the thread is on its way.
        let _ = waiting.handle.socket.shutdown(how);
        waiting.handle.changed.notify_one();
        if !waiting.turned_away {
            inner.leave(waiting.peer);
            inner.leaving += 1;
        }
        true
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        let was_removed = self.was_removed(&inner);
        self.set_memory(&mut inner, 0);
        if let Some(key) = self.waiting {
            inner.waiting.remove(&key);
        }
        if self.turned_away {
            inner.turned_away -= 1;
        } else if was_removed {
            inner.leaving -= 1;
        } else {
            inner.leave(self.peer);
        }
        drop(inner);
        slots.left.notify_all();
    }
}

/// What counts as one client: an IPv4 address, or the 64 bits of an IPv6 address that a client
/// does not choose by itself (RFC 4291, section 2.5.4).
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
    use super::*;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    const LIMITS: Limits = Limits {
        connections: 3,
        per_peer: 2,
        memory: 100,
    };

    fn socket() -> Arc<TcpStream> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Arc::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap())
    }

    fn taken(slots: &Arc<Slots>, peer: u8) -> Slot {
        let peer = IpAddr::from([192, 168, 1, peer]);
        slots.take(peer, socket()).unwrap()
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_one_that_has_waited_longest_and_of_no_other() {
        let slots = Slots::new(LIMITS);
        let [a, b, c] = [1, 2, 1].map(|peer| taken(&slots, peer));
        let d = taken(&slots, 1);
        assert!(!d.is_turned_away());
        let evicted = [&a, &b, &c, &d].map(Slot::is_evicted);
        assert_eq!(evicted, [true, false, false, false]);
        let e = taken(&slots, 3);
        let evicted = [&b, &c, &d, &e].map(Slot::is_evicted);
        assert_eq!(evicted, [true, false, false, false]);
    }

    #[test]
    fn where_all_are_being_served_a_newcomer_is_turned_away_at_once() {
        let slots = Slots::new(LIMITS);
        let mut served = [1, 1].map(|peer| taken(&slots, peer));
        for slot in &mut served {
            assert_eq!(slot.serve(), Ok(()));
        }
        let started = Instant::now();
        let too_many: Vec<_> = (0..TURNED_AWAY).map(|_| taken(&slots, 1)).collect();
        assert!(too_many.iter().all(Slot::is_turned_away));
        assert!(slots.take([192, 168, 1, 1].into(), socket()).is_none());
        assert!(started.elapsed() < MAKING_ROOM);
        // They take nothing from others, and are not closed in the place of others.
        let others = [2, 3].map(|peer| taken(&slots, peer));
        assert_eq!(others.map(|other| other.is_turned_away()), [false, false]);
        assert!(!too_many.iter().any(Slot::is_evicted));
    }

    #[test]
    fn a_request_that_was_whole_before_its_connection_was_closed_is_served_after_all() {
        let slots = Slots::new(LIMITS);
        let [mut a, mut b, mut c] = [1, 1, 1].map(|peer| taken(&slots, peer));
        assert!(a.is_evicted());
        assert_eq!(a.serve(), Ok(()));
        assert!(b.is_evicted() && !c.is_evicted());
        assert_eq!(c.serve(), Ok(()));
        assert_eq!(b.serve(), Err(Evicted), "nobody is left to make room");
        // Nothing is read from it any more, so its answer is its last.
        assert_eq!((a.wait(), c.wait()), (Err(Evicted), Ok(())));
        assert!(!a.is_evicted());
    }

    #[test]
    fn memory_is_given_to_those_who_wait_in_the_order_of_their_coming() {
        let slots = Slots::new(Limits {
            connections: 9,
            per_peer: 9,
            ..LIMITS
        });
        let later = Instant::now() + Duration::from_secs(60);
        let mut holder = taken(&slots, 1);
        holder.serve().unwrap();
        holder.keep_anyway(100);
        let (sender, order) = crossbeam_channel::unbounded();
        let waiters: Vec<_> = [90, 20, 80]
            .into_iter()
            .enumerate()
            .map(|(number, bytes)| {
                let (mut slot, sender) = (taken(&slots, 1), sender.clone());
                let waiter = thread::spawn(move || {
                    slot.keep(bytes, later).unwrap();
                    sender.send(number).unwrap();
                });
                // The next one comes when this one stands in line.
                while slots.inner.lock().in_line.len() <= number {
                    thread::yield_now();
                }
                waiter
            })
            .collect();
        // Enough for the second, which must not overtake the first.
        holder.keep_anyway(80);
        assert!(order.try_recv().is_err());
        holder.release();
        for waiter in waiters {
            waiter.join().unwrap();
        }
        assert_eq!(order.try_iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn who_is_closed_while_waiting_for_memory_waits_no_longer() {
        let slots = Slots::new(LIMITS);
        let mut holder = taken(&slots, 1);
        holder.serve().unwrap();
        holder.keep_anyway(100);
        let mut slot = taken(&slots, 1);
        let waiter = thread::spawn(move || slot.keep(50, Instant::now() + Duration::from_secs(60)));
        while slots.inner.lock().in_line.is_empty() {
            thread::yield_now();
        }
        slots.evict_one();
        assert_eq!(waiter.join().unwrap(), Err(Evicted));
        assert!(slots.inner.lock().in_line.is_empty());
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_there_may_be_and_every_slot_comes_back(
            steps in proptest::collection::vec((0_u8..7, 0_u8..4, any::<prop::sample::Index>()), 0..200),
        ) {
            let slots = Slots::new(LIMITS);
            let socket = socket();
            let mut held = Vec::<Slot>::new();
            for (step, peer, which) in steps {
                let index = (!held.is_empty()).then(|| which.index(held.len()));
                match (step, index) {
                    (0 | 1, _) => held.extend(slots.take([192, 168, 1, peer].into(), socket.clone())),
                    (2, Some(index)) => drop(held.swap_remove(index)),
                    (3, Some(index)) => { let _ = held[index].serve(); }
                    (4, Some(index)) => { let _ = held[index].wait(); held[index].answered(); }
                    (5, Some(index)) => held[index].keep_anyway(usize::from(peer) * 40),
                    (6, _) => slots.evict_one(),
                    _ => {}
                }
                let inner = slots.inner.lock();
                prop_assert!(inner.taken <= LIMITS.connections && inner.turned_away <= TURNED_AWAY);
                prop_assert!(inner.peers.values().all(|count| (1..=LIMITS.per_peer).contains(count)));
                prop_assert_eq!(inner.peers.values().sum::<usize>(), inner.taken);
                prop_assert_eq!(inner.taken + inner.leaving + inner.turned_away, held.len());
                prop_assert_eq!(inner.memory, held.iter().map(|slot| slot.memory).sum::<usize>());
            }
            drop(held);
            let inner = slots.inner.lock();
            prop_assert_eq!((inner.taken, inner.leaving, inner.turned_away, inner.memory), (0, 0, 0, 0));
            prop_assert!(inner.peers.is_empty() && inner.waiting.is_empty());
        }
    }
}
