//! Who may be connected: a bounded number of slots, and which connection makes room for another.
//!
//! A connection is *waiting* while it has no whole request: in its handshake, idle, in the middle
//! of a request, or slow to read its answer. Those are the ones that a client can hold on to for
//! nothing, so when there is no room the one that has been waiting longest is closed. A connection
//! whose request is being served is never closed here.
//!
//! One that is closed gives up its place at once, and is *leaving* until its thread has ended.
//! Nobody waits for that, unless there are too many of them.
//!
//! Not here: sockets, but for closing them.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How many connections beyond the limit are let in to be told 503.
const TURNED_AWAY: usize = 16;
/// How many may be leaving before newcomers wait for them.
const LEAVING: usize = 64;
/// The connections that there may be beside those that have a place.
pub const BESIDE: usize = LEAVING + TURNED_AWAY;
/// How long a newcomer waits for those that are leaving.
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

/// One connection's place; given back when it is dropped.
pub struct Slot {
    slots: Arc<Slots>,
    handle: Arc<Handle>,
    peer: IpAddr,
    /// Its key in [`Inner::waiting`], or in [`Inner::leaving`] once it was closed; none while a
    /// request of it is served.
    key: Option<u64>,
    memory: usize,
    turned_away: bool,
}

/// What it takes to have a connection's thread notice something.
struct Handle {
    socket: Arc<TcpStream>,
    /// Nothing more is read from its client, since it was closed to make room at some time.
    cut_off: AtomicBool,
    /// It waits for memory, and may be the next to get some; or it was closed.
    changed: Condvar,
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
    /// where there is no room, not even to be told so. Blocks only while there are too many that
    /// leave, for a second at most.
    pub fn take(self: &Arc<Self>, peer: IpAddr, socket: Arc<TcpStream>) -> Option<Slot> {
        let peer = network(peer);
        let deadline = Instant::now() + MAKING_ROOM;
        let mut inner = self.inner.lock();
        while inner.leaving.len() >= LEAVING && !inner.closing {
            inner.hurry_oldest();
            if self.left.wait_until(&mut inner, deadline).timed_out() {
                break;
            }
        }
        if inner.closing {
            return None;
        }
        let turned_away = inner.leaving.len() >= LEAVING || !inner.admit(&self.limits, peer);
        if turned_away && inner.turned_away >= TURNED_AWAY {
            return None;
        }
        inner.turned_away += usize::from(turned_away);
        let mut slot = Slot {
            slots: self.clone(),
            handle: Arc::new(Handle {
                socket,
                cut_off: AtomicBool::new(false),
                changed: Condvar::new(),
            }),
            peer,
            key: None,
            memory: 0,
            turned_away,
        };
        slot.enter(&mut inner, false);
        Some(slot)
    }

    /// Closes the connection that has been waiting longest, if there is one.
    pub fn evict_one(&self) {
        self.inner.lock().evict(|_| true);
    }

    /// Closes all connections but those whose request is being served, and those when it is.
    pub fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closing = true;
        while inner.evict(|_| true) {}
        self.left.notify_all();
    }

    /// Whether [`Slots::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.inner.lock().closing
    }

    /// Waits until no connection is left, until `deadline` at the latest.
    pub fn wait_until_free(&self, deadline: Instant) {
        let mut inner = self.inner.lock();
        while inner.taken + inner.turned_away + inner.leaving.len() > 0 {
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

    /// Whether nothing more is read from the client: what has arrived already can be, to its end.
    pub fn is_cut_off(&self) -> bool {
        // Relaxed: nothing else is ordered by it.
        self.handle.cut_off.load(Ordering::Relaxed)
    }

    /// Whether the connection was closed, and has no place any more.
    pub fn is_leaving(&self) -> bool {
        // Without the lock for all those that were never closed, at each request.
        self.is_cut_off() && self.leaves(&self.slots.inner.lock())
    }

    /// From now on a whole request is being served. One that was there before its connection was
    /// closed to make room takes the place of another in turn.
    ///
    /// # Errors
    /// Where the connection has been closed, and there is no place.
    pub fn serve(&mut self) -> Result<(), Evicted> {
        let mut inner = self.slots.inner.lock();
        let Some(key) = self.key else {
            return Ok(());
        };
        if inner.waiting.remove(&key).is_none() {
            let hurried = inner.leaving.get(&key).is_none_or(|left| left.hurried);
            let again = !hurried && !self.turned_away && !inner.closing;
            if !again || !inner.admit(&self.slots.limits, self.peer) {
                return Err(Evicted);
            }
            inner.leaving.remove(&key);
            self.slots.left.notify_all();
        }
        self.key = None;
        Ok(())
    }

    /// From now on it waits for its client again, first for it to take what is being sent.
    ///
    /// # Errors
    /// Where the connection is to end after that.
    pub fn wait(&mut self) -> Result<(), Evicted> {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        match self.key {
            Some(key) => inner.set_sending(key, true),
            // None is closed any more then, so there is nothing to enter for.
            None if inner.closing => {}
            None => self.enter(&mut inner, true),
        }
        if inner.closing || self.is_cut_off() {
            return Err(Evicted);
        }
        Ok(())
    }

    /// The client has taken what was sent, and is waited for to send something.
    pub fn listen(&mut self) {
        if let Some(key) = self.key {
            self.slots.inner.lock().set_sending(key, false);
        }
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
        let place = (self.handle.clone(), self.peer);
        inner.in_line.insert(ticket, place);
        let kept = loop {
            let now = Instant::now();
            if self.leaves(&inner) || now >= deadline {
                break Err(Evicted);
            }
            let until = if inner.next_in_line() != Some(ticket) {
                // This one may have been the next so far.
                inner.wake_next_in_line();
                deadline
            } else if inner.memory + bytes <= slots.limits.memory {
                break Ok(());
            } else {
                let lacks = |inner: &Inner| {
                    inner.memory - inner.coming_back() + bytes > slots.limits.memory
                };
                while lacks(&inner) && inner.evict_dawdler(self.peer, now) {}
                inner.next_dawdling(now)
            };
            let changed = &self.handle.changed;
            changed.wait_until(&mut inner, until.min(deadline));
        };
        inner.in_line.remove(&ticket);
        if kept.is_ok() {
            self.set_memory(&mut inner, bytes);
        }
        inner.wake_next_in_line();
        kept
    }

    /// The same for what is in memory already: it does not wait.
    pub fn keep_anyway(&mut self, bytes: usize) {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        self.set_memory(&mut inner, bytes);
        if inner.memory > slots.limits.memory {
            inner.evict_dawdler(self.peer, Instant::now());
        }
    }

    /// Gives back what was kept.
    pub fn release(&mut self) {
        if self.memory > 0 {
            let slots = self.slots.clone();
            self.set_memory(&mut slots.inner.lock(), 0);
        }
    }

    fn leaves(&self, inner: &Inner) -> bool {
        self.key.is_some_and(|key| inner.leaving.contains_key(&key))
    }

    fn enter(&mut self, inner: &mut Inner, sending: bool) {
        let key = inner.ticket();
        let waiting = Waiting {
            handle: self.handle.clone(),
            peer: self.peer,
            turned_away: self.turned_away,
            sending,
            memory: self.memory,
            keeping_since: Instant::now(),
        };
        inner.waiting.insert(key, waiting);
        self.key = Some(key);
    }

    fn set_memory(&mut self, inner: &mut Inner, bytes: usize) {
        if bytes == self.memory {
            return;
        }
        inner.memory = inner.memory - self.memory + bytes;
        inner.change_peer(self.peer, |peer| {
            peer.memory = peer.memory - self.memory + bytes;
        });
        self.memory = bytes;
        if let Some(key) = self.key {
            if let Some(waiting) = inner.waiting.get_mut(&key) {
                waiting.memory = bytes;
                waiting.keeping_since = Instant::now();
            }
            if let Some(leaving) = inner.leaving.get_mut(&key) {
                leaving.memory = bytes;
            }
        }
        inner.wake_next_in_line();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        self.set_memory(&mut inner, 0);
        let left = self.key.and_then(|key| {
            inner.waiting.remove(&key);
            inner.leaving.remove(&key)
        });
        if self.turned_away {
            inner.turned_away -= 1;
        } else if left.is_none() {
            inner.give_up_place(self.peer);
        }
        drop(inner);
        slots.left.notify_all();
    }
}

#[derive(Default)]
struct Inner {
    taken: usize,
    turned_away: usize,
    peers: HashMap<IpAddr, Peer>,
    /// By how long they have been waiting: the longest first.
    waiting: BTreeMap<u64, Waiting>,
    /// Closed to make room, and not gone yet.
    leaving: BTreeMap<u64, Leaving>,
    /// Who waits for memory, in the order of coming. Only the next may take some, see
    /// [`Inner::next_in_line`]: so the others need not be woken whenever some comes free.
    in_line: BTreeMap<u64, (Arc<Handle>, IpAddr)>,
    /// The last key in one of these.
    last: u64,
    memory: usize,
    closing: bool,
}

/// What one client address has.
#[derive(Default)]
struct Peer {
    connections: usize,
    memory: usize,
}

struct Waiting {
    handle: Arc<Handle>,
    peer: IpAddr,
    turned_away: bool,
    /// It waits for its client to take something.
    sending: bool,
    memory: usize,
    /// Since when it keeps that memory.
    keeping_since: Instant,
}

struct Leaving {
    handle: Arc<Handle>,
    /// What it still keeps, and gives back when its thread has noticed.
    memory: usize,
    /// Nothing more can be told to its client.
    hurried: bool,
}

impl Waiting {
    fn dawdles(&self, now: Instant) -> bool {
        self.memory > 0 && now >= self.keeping_since + DAWDLING
    }
}

impl Inner {
    fn ticket(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn change_peer(&mut self, address: IpAddr, change: impl FnOnce(&mut Peer)) {
        let peer = self.peers.entry(address).or_default();
        change(peer);
        if peer.connections == 0 && peer.memory == 0 {
            self.peers.remove(&address);
        }
    }

    fn memory_of(&self, address: IpAddr) -> usize {
        self.peers.get(&address).map_or(0, |peer| peer.memory)
    }

    fn set_sending(&mut self, key: u64, sending: bool) {
        if let Some(waiting) = self.waiting.get_mut(&key) {
            waiting.sending = sending;
        }
    }

    /// Counts one connection more, for which another is closed where there is no room: one of the
    /// same peer if that has as many as it may have. False where all of those are being served.
    fn admit(&mut self, limits: &Limits, address: IpAddr) -> bool {
        let of_peer = self.peers.get(&address).map_or(0, |peer| peer.connections);
        let peer_is_full = of_peer >= limits.per_peer;
        let makes_room =
            |waiting: &Waiting| !waiting.turned_away && (!peer_is_full || waiting.peer == address);
        let is_full = peer_is_full || self.taken >= limits.connections;
        if is_full && !self.evict(makes_room) {
            return false;
        }
        self.taken += 1;
        self.change_peer(address, |peer| peer.connections += 1);
        true
    }

    fn give_up_place(&mut self, address: IpAddr) {
        self.taken -= 1;
        self.change_peer(address, |peer| peer.connections -= 1);
    }

    /// Closes the longest waiting connection of those that may be; false where there is none. Its
    /// place is free at once.
    fn evict(&mut self, may_be: impl Fn(&Waiting) -> bool) -> bool {
        let found = self.waiting.iter().find(|(_, waiting)| may_be(waiting));
        let key = found.map(|(key, _)| *key);
        let Some((key, waiting)) = key.and_then(|key| self.waiting.remove_entry(&key)) else {
            return false;
        };
        let handle = waiting.handle;
        handle.cut_off.store(true, Ordering::Relaxed);
        // Who is in the middle of a request can still be told why nothing comes of it. Who does not
        // take what is sent could not, unless it has only just begun and the service stops.
        let how = if waiting.sending && !self.closing {
            Shutdown::Both
        } else {
            Shutdown::Read
        };
        // It fails where the client has gone already, and then the thread is on its way.
        let _ = handle.socket.shutdown(how);
        handle.changed.notify_one();
        let leaving = Leaving {
            handle,
            memory: waiting.memory,
            hurried: false,
        };
        self.leaving.insert(key, leaving);
        if !waiting.turned_away {
            self.give_up_place(waiting.peer);
        }
        true
    }

    /// Has the one that has been leaving longest tell its client nothing more, which wakes its
    /// thread wherever that waits.
    fn hurry_oldest(&mut self) {
        if let Some(mut oldest) = self.leaving.first_entry() {
            oldest.get_mut().hurried = true;
            let _ = oldest.get().handle.socket.shutdown(Shutdown::Both);
        }
    }

    /// The memory that those who leave still keep.
    fn coming_back(&self) -> usize {
        self.leaving.values().map(|leaving| leaving.memory).sum()
    }

    /// Whose turn it is to get memory: of the peers that keep least of it, the one that came first.
    /// So a client that wants much, on many connections, holds up itself and not the others.
    fn next_in_line(&self) -> Option<u64> {
        self.in_line
            .iter()
            .min_by_key(|(ticket, (_, peer))| (self.memory_of(*peer), **ticket))
            .map(|(ticket, _)| *ticket)
    }

    fn wake_next_in_line(&self) {
        let next = self.next_in_line().and_then(|next| self.in_line.get(&next));
        if let Some((handle, _)) = next {
            handle.changed.notify_one();
        }
    }

    /// Closes a connection that dawdles over its memory, of the peer that keeps most; of none that
    /// keeps less than the one which wants some. False where there is none.
    fn evict_dawdler(&mut self, wanting: IpAddr, now: Instant) -> bool {
        let dawdling = self.waiting.values().filter(|waiting| waiting.dawdles(now));
        let most = dawdling.map(|waiting| (self.memory_of(waiting.peer), waiting.peer));
        let Some((memory, peer)) = most.max() else {
            return false;
        };
        memory >= self.memory_of(wanting)
            && self.evict(|waiting| waiting.peer == peer && waiting.dawdles(now))
    }

    /// When to look again for connections that dawdle, or for what should have come back.
    fn next_dawdling(&self, now: Instant) -> Instant {
        let keeping = self.waiting.values().filter(|waiting| waiting.memory > 0);
        let since = keeping.map(|waiting| waiting.keeping_since + DAWDLING);
        since.filter(|at| *at > now).min().unwrap_or(now + DAWDLING)
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
        let evicted = [&a, &b, &c, &d].map(Slot::is_leaving);
        assert_eq!(evicted, [true, false, false, false]);
        let e = taken(&slots, 3);
        let evicted = [&b, &c, &d, &e].map(Slot::is_leaving);
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
        assert!(!too_many.iter().any(Slot::is_leaving));
    }

    #[test]
    fn a_request_that_was_whole_before_its_connection_was_closed_is_served_after_all() {
        let slots = Slots::new(LIMITS);
        let [mut a, mut b, mut c] = [1, 1, 1].map(|peer| taken(&slots, peer));
        assert!(a.is_leaving());
        assert_eq!(a.serve(), Ok(()));
        assert!(b.is_leaving() && !c.is_leaving());
        assert_eq!(c.serve(), Ok(()));
        assert_eq!(b.serve(), Err(Evicted), "nobody is left to make room");
        // Nothing is read from it any more, so its answer is its last.
        assert_eq!((a.wait(), c.wait()), (Err(Evicted), Ok(())));
        assert!(!a.is_leaving());
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
        let waiters: Vec<_> = [90, 20, 90]
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
    fn a_client_that_keeps_much_memory_holds_up_itself_and_not_the_others() {
        let slots = Slots::new(Limits {
            connections: 9,
            per_peer: 9,
            ..LIMITS
        });
        let later = Instant::now() + Duration::from_secs(60);
        let [mut first, mut second] = [1, 1].map(|peer| taken(&slots, peer));
        first.keep_anyway(60);
        second.keep_anyway(40);
        let in_line = |count: usize| {
            while slots.inner.lock().in_line.len() < count {
                thread::yield_now();
            }
        };
        let (sender, order) = crossbeam_channel::unbounded();
        for (number, peer) in [1, 1, 2].into_iter().enumerate() {
            let (mut slot, sender) = (taken(&slots, peer), sender.clone());
            thread::spawn(move || {
                slot.keep(40, later).unwrap();
                sender.send(peer).unwrap();
                slot.serve().unwrap();
                // Until the end of the test.
                thread::park();
            });
            in_line(number + 1);
        }
        second.release();
        assert_eq!(
            order.recv(),
            Ok(2),
            "it came last, and its client keeps nothing"
        );
        first.release();
        assert_eq!(order.recv(), Ok(1));
    }

    #[test]
    fn memory_is_not_taken_from_a_client_that_keeps_less() {
        let slots = Slots::new(Limits {
            connections: 9,
            per_peer: 9,
            ..LIMITS
        });
        let [mut modest, mut greedy, mut more] = [1, 2, 2].map(|peer| taken(&slots, peer));
        modest.keep_anyway(30);
        greedy.keep_anyway(70);
        let dawdled = Instant::now() + DAWDLING;
        let mut inner = slots.inner.lock();
        assert!(inner.evict_dawdler(modest.peer, dawdled));
        assert!(greedy.leaves(&inner) && !modest.leaves(&inner));
        // What it has kept is not back yet.
        assert!(!inner.evict_dawdler(more.peer, dawdled));
        drop(inner);
        drop(greedy);
        let waited = thread::spawn(move || {
            more.keep(90, Instant::now() + Duration::from_secs(60))
                .is_ok()
        });
        // Who keeps nothing may have what is dawdled over.
        while !modest.is_leaving() {
            thread::yield_now();
        }
        drop(modest);
        assert!(waited.join().unwrap());
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
                    (4, Some(index)) => { let _ = held[index].wait(); held[index].listen(); }
                    (5, Some(index)) => held[index].keep_anyway(usize::from(peer) * 40),
                    (6, _) => slots.evict_one(),
                    _ => {}
                }
                let inner = slots.inner.lock();
                prop_assert!(inner.taken <= LIMITS.connections && inner.turned_away <= TURNED_AWAY);
                let peers = || inner.peers.values();
                prop_assert!(peers().all(|peer| peer.connections <= LIMITS.per_peer));
                prop_assert!(peers().all(|peer| peer.connections + peer.memory > 0));
                prop_assert_eq!(peers().map(|peer| peer.connections).sum::<usize>(), inner.taken);
                let leaving = held.iter().filter(|slot| !slot.turned_away && slot.leaves(&inner));
                prop_assert_eq!(inner.taken + leaving.count() + inner.turned_away, held.len());
                let memory = held.iter().map(|slot| slot.memory).sum::<usize>();
                prop_assert_eq!(inner.memory, memory);
                prop_assert_eq!(peers().map(|peer| peer.memory).sum::<usize>(), memory);
            }
            drop(held);
            let inner = slots.inner.lock();
            prop_assert_eq!((inner.taken, inner.turned_away, inner.memory), (0, 0, 0));
            prop_assert!(inner.peers.is_empty() && inner.waiting.is_empty() && inner.leaving.is_empty());
        }
    }
}
