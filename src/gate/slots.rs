//! Who may be connected: a bounded number of slots, and which connection makes room for another.
//!
//! A connection is *waiting* while it has no whole request: in its handshake, idle, in the middle
//! of a request, or slow to read its answer. Those are the ones that a client can hold on to for
//! nothing, so when there is no room the one that has been waiting longest is closed. A connection
//! whose request is being served is never closed here.
//!
//! Each has a moment first. Where a crowd comes faster than that a newcomer waits in line, without
//! a thread: closing whoever came just before it would let nobody through on a slow machine. There
//! is a line for each client address, so that a crowd holds up its own address only.
//!
//! One that is closed gives up its place at once, and is *leaving* until its thread has ended.
//! Nobody waits for that, unless there are too many of them.
//!
//! Not here: sockets, but for closing them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How many connections beyond the limit are let in to be told 503.
const TURNED_AWAY: usize = 16;
/// How many may be leaving before newcomers wait until they have left.
const LEAVING: usize = 64;
/// The connections that there may be beside those that have a place.
pub const BESIDE: usize = LEAVING + TURNED_AWAY;
/// How long a client has to send its first message, from when its connection was accepted, and after
/// that to finish a TLS handshake and send a request, before it makes room for a newcomer. A client
/// that is not slow can take as long on a busy machine.
const GRACE: Duration = Duration::from_secs(1);
/// How long a connection is read from at least before it makes room. A crowd that comes back as soon
/// as it is closed spends its `GRACE` in line, so this is what it delays others of its address by for
/// each `Limits::per_peer` of them.
const TURN: Duration = Duration::from_millis(250);
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
    /// A connection has gone.
    left: Condvar,
}

/// One connection's place; given back when it is dropped.
pub struct Slot {
    slots: Arc<Slots>,
    handle: Arc<Handle>,
    peer: IpAddr,
    came: Instant,
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

    /// Puts a connection that begins at the end of the line of its client address.
    pub fn line_up(&self, socket: Arc<TcpStream>, client: SocketAddr) {
        let mut inner = self.inner.lock();
        if inner.closing {
            return;
        }
        let newcomer = Newcomer {
            ticket: inner.ticket(),
            socket,
            client,
            came: Instant::now(),
        };
        inner.newcomers += 1;
        inner.change_peer(network(client.ip()), |peer| {
            peer.newcomers.push_back(newcomer)
        });
    }

    /// How many stand in line.
    pub fn newcomers(&self) -> usize {
        self.inner.lock().newcomers
    }

    /// Takes a slot for the next newcomer that can have one now, and closes another connection where
    /// that is needed. Newcomers that there is no room for, not even to be told so, are closed.
    pub fn admit(self: &Arc<Self>, now: Instant) -> Option<(Slot, Arc<TcpStream>, SocketAddr)> {
        let mut inner = self.inner.lock();
        loop {
            if inner.newcomers > 0 && inner.leaving.len() >= LEAVING {
                inner.hurry_oldest();
            }
            let peer = inner.next_newcomer(&self.limits, now)?;
            let newcomer = inner.call(peer)?;
            let turned_away = !inner.admit(&self.limits, peer, now);
            if turned_away && inner.turned_away >= TURNED_AWAY {
                continue;
            }
            inner.turned_away += usize::from(turned_away);
            let mut slot = Slot {
                slots: self.clone(),
                handle: Arc::new(Handle {
                    socket: newcomer.socket.clone(),
                    cut_off: AtomicBool::new(false),
                    changed: Condvar::new(),
                }),
                peer,
                came: newcomer.came,
                key: None,
                memory: 0,
                turned_away,
            };
            slot.enter(&mut inner, false, None);
            return Some((slot, newcomer.socket, newcomer.client));
        }
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
        inner.newcomers = 0;
        inner.peers.retain(|_, peer| {
            peer.newcomers.clear();
            !peer.is_gone()
        });
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
            if !again || !inner.admit(&self.slots.limits, self.peer, Instant::now()) {
                return Err(Evicted);
            }
            inner.leaving.remove(&key);
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
            None => self.enter(&mut inner, true, Some(Instant::now() + TURN)),
        }
        if inner.closing || self.is_cut_off() {
            return Err(Evicted);
        }
        Ok(())
    }

    /// Its thread begins to read from it; as long as it has not, its client is not to blame.
    pub fn begin(&mut self) {
        self.stay_until((self.came + GRACE).max(Instant::now() + TURN));
    }

    /// Its client has begun a TLS handshake.
    pub fn begin_handshake(&mut self) {
        self.stay_until(Instant::now() + GRACE);
    }

    /// It makes room for no newcomer before then.
    fn stay_until(&self, until: Instant) {
        let mut inner = self.slots.inner.lock();
        if let Some(waiting) = self.key.and_then(|key| inner.waiting.get_mut(&key)) {
            waiting.stays_until = Some(until);
        }
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

    fn enter(&mut self, inner: &mut Inner, sending: bool, stays_until: Option<Instant>) {
        let key = inner.ticket();
        let waiting = Waiting {
            handle: self.handle.clone(),
            peer: self.peer,
            turned_away: self.turned_away,
            sending,
            stays_until,
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
    /// In all lines together.
    newcomers: usize,
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
    /// In the order of coming.
    newcomers: VecDeque<Newcomer>,
}

/// A connection in line.
struct Newcomer {
    ticket: u64,
    socket: Arc<TcpStream>,
    client: SocketAddr,
    came: Instant,
}

impl Peer {
    fn is_gone(&self) -> bool {
        self.connections == 0 && self.memory == 0 && self.newcomers.is_empty()
    }
}

/// Where one connection more can go.
enum Room {
    Free,
    /// Where the waiting connection with this key is.
    InPlaceOf(u64),
    /// The same, but it has not had its time.
    Later(u64),
    /// Nowhere: all that could make room are being served.
    None,
}

struct Waiting {
    handle: Arc<Handle>,
    peer: IpAddr,
    turned_away: bool,
    /// It waits for its client to take something.
    sending: bool,
    /// Until when it makes no room for newcomers; none as long as its thread has not begun.
    stays_until: Option<Instant>,
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
        if peer.is_gone() {
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

    /// The client address whose first in line can come in, to be served or to be told that there is
    /// no room: of those the one that has the fewest connections, and then the one that came first.
    fn next_newcomer(&self, limits: &Limits, now: Instant) -> Option<IpAddr> {
        let mut lines: Vec<_> = self
            .peers
            .iter()
            .filter_map(|(address, peer)| {
                let first = peer.newcomers.front()?;
                Some((peer.connections, first.ticket, *address))
            })
            .collect();
        lines.sort_unstable();
        let mut addresses = lines.into_iter().map(|(.., address)| address);
        addresses.find(|address| match self.room(limits, *address, now) {
            Room::InPlaceOf(_) => self.leaving.len() < LEAVING,
            Room::Later(_) => false,
            Room::Free | Room::None => true,
        })
    }

    /// Takes the first in the line of an address out of it.
    fn call(&mut self, address: IpAddr) -> Option<Newcomer> {
        let mut first = None;
        self.change_peer(address, |peer| first = peer.newcomers.pop_front());
        self.newcomers -= usize::from(first.is_some());
        first
    }

    /// Where one connection more of this address can go: in the place of one of its own if it has
    /// as many as it may have.
    fn room(&self, limits: &Limits, address: IpAddr, now: Instant) -> Room {
        let of_peer = self.peers.get(&address).map_or(0, |peer| peer.connections);
        let peer_is_full = of_peer >= limits.per_peer;
        if !peer_is_full && self.taken < limits.connections {
            return Room::Free;
        }
        let mut by_time = self.waiting.iter().filter(|(_, waiting)| {
            !waiting.turned_away && (!peer_is_full || waiting.peer == address)
        });
        let Some((longest, waiting)) = by_time.next() else {
            return Room::None;
        };
        let has_stayed = |waiting: &Waiting| waiting.stays_until.is_some_and(|until| until <= now);
        if has_stayed(waiting) {
            return Room::InPlaceOf(*longest);
        }
        let other = by_time.find(|(_, waiting)| has_stayed(waiting));
        other.map_or(Room::Later(*longest), |(key, _)| Room::InPlaceOf(*key))
    }

    /// Counts one connection more, for which another is closed where that is needed. False where
    /// all that could make room are being served.
    fn admit(&mut self, limits: &Limits, address: IpAddr, now: Instant) -> bool {
        match self.room(limits, address, now) {
            Room::None => return false,
            Room::InPlaceOf(key) | Room::Later(key) => self.close(key),
            Room::Free => {}
        }
        self.taken += 1;
        self.change_peer(address, |peer| peer.connections += 1);
        true
    }

    fn give_up_place(&mut self, address: IpAddr) {
        self.taken -= 1;
        self.change_peer(address, |peer| peer.connections -= 1);
    }

    /// Closes the longest waiting connection of those that may be; false where there is none.
    fn evict(&mut self, may_be: impl Fn(&Waiting) -> bool) -> bool {
        let found = self.waiting.iter().find(|(_, waiting)| may_be(waiting));
        let key = found.map(|(key, _)| *key);
        key.inspect(|key| self.close(*key)).is_some()
    }

    /// Closes a waiting connection, whose place is free at once.
    fn close(&mut self, key: u64) {
        let Some(waiting) = self.waiting.remove(&key) else {
            return;
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
    }

    /// Has the one that has been leaving longest tell its client nothing more, which wakes its
    /// thread wherever that waits.
    fn hurry_oldest(&mut self) {
        if let Some(oldest) = self.leaving.values_mut().find(|left| !left.hurried) {
            oldest.hurried = true;
            let _ = oldest.handle.socket.shutdown(Shutdown::Both);
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

    fn client(peer: u8) -> SocketAddr {
        SocketAddr::from(([192, 168, 1, peer], 1))
    }

    /// The slot of a newcomer that comes when the others have waited long enough.
    fn come(slots: &Arc<Slots>, peer: u8) -> Option<Slot> {
        slots.line_up(socket(), client(peer));
        admitted(slots, Instant::now() + GRACE).map(|(slot, _)| slot)
    }

    fn admitted(slots: &Arc<Slots>, now: Instant) -> Option<(Slot, SocketAddr)> {
        let (mut slot, _, client) = slots.admit(now)?;
        slot.begin();
        Some((slot, client))
    }

    fn taken(slots: &Arc<Slots>, peer: u8) -> Slot {
        come(slots, peer).unwrap()
    }

    #[test]
    fn nobody_makes_room_before_its_time_and_newcomers_wait_in_the_order_of_coming() {
        let slots = Slots::new(LIMITS);
        let too_early = Instant::now();
        let [mut a, b] = [1, 1].map(|peer| taken(&slots, peer));
        let ports = [5, 3, 4].map(|port| SocketAddr::from(([192, 168, 1, 1], port)));
        for client in ports {
            slots.line_up(socket(), client);
        }
        assert!(admitted(&slots, too_early).is_none());
        assert_eq!((slots.newcomers(), a.is_leaving()), (3, false));
        // Whose client has begun a handshake has more time.
        let enough = Instant::now() + GRACE;
        a.begin_handshake();
        let (first, from) = admitted(&slots, enough).unwrap();
        assert_eq!(from, ports[0]);
        assert_eq!([&a, &b, &first].map(Slot::is_leaving), [false, true, false]);
        let now = Instant::now() + GRACE;
        let next = [1, 2].map(|_| admitted(&slots, now).unwrap());
        assert_eq!(next.each_ref().map(|(_, client)| *client), ports[1..]);
        let evicted = [&a, &first, &next[0].0, &next[1].0].map(Slot::is_leaving);
        assert_eq!(evicted, [true, true, false, false]);
    }

    #[test]
    fn a_connection_whose_thread_has_not_begun_makes_no_room() {
        let slots = Slots::new(LIMITS);
        slots.line_up(socket(), client(1));
        let (not_begun, ..) = slots.admit(Instant::now()).unwrap();
        let begun = taken(&slots, 1);
        let newcomer = taken(&slots, 1);
        let evicted = [&not_begun, &begun, &newcomer].map(Slot::is_leaving);
        assert_eq!(evicted, [false, true, false]);
    }

    #[test]
    fn a_crowd_in_line_holds_up_its_own_address_and_no_other() {
        let slots = Slots::new(LIMITS);
        let too_early = Instant::now();
        let crowd = [1, 1].map(|peer| taken(&slots, peer));
        for _ in 0..100 {
            slots.line_up(socket(), client(1));
        }
        slots.line_up(socket(), client(2));
        let (other, from) = admitted(&slots, too_early).unwrap();
        assert_eq!((from, other.is_turned_away()), (client(2), false));
        assert!(admitted(&slots, too_early).is_none());
        // Where one of them all has to make room, whoever has fewest comes first.
        slots.line_up(socket(), client(3));
        let now = Instant::now() + GRACE;
        let (another, from) = admitted(&slots, now).unwrap();
        assert_eq!((from, another.is_turned_away()), (client(3), false));
        assert_eq!(crowd.each_ref().map(Slot::is_leaving), [true, false]);
    }

    #[test]
    fn who_stands_in_line_when_the_service_stops_is_closed() {
        let slots = Slots::new(LIMITS);
        let _crowd = [1, 1].map(|peer| taken(&slots, peer));
        slots.line_up(socket(), client(1));
        slots.close();
        slots.line_up(socket(), client(1));
        assert_eq!(slots.newcomers(), 0);
        assert!(admitted(&slots, Instant::now() + GRACE).is_none());
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
        let too_many: Vec<_> = (0..TURNED_AWAY).map(|_| taken(&slots, 1)).collect();
        assert!(too_many.iter().all(Slot::is_turned_away));
        assert!(come(&slots, 1).is_none());
        assert_eq!(slots.newcomers(), 0);
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
                    (0 | 1, _) => {
                        slots.line_up(socket.clone(), client(peer));
                        let now = Instant::now() + GRACE * u32::from(step);
                        held.extend(slots.admit(now).map(|(slot, ..)| slot));
                    }
                    (2, Some(index)) => drop(held.swap_remove(index)),
                    (3, Some(index)) => { let _ = held[index].serve(); }
                    (4, Some(index)) => {
                        let _ = held[index].wait();
                        held[index].listen();
                        held[index].begin_handshake();
                    }
                    (5, Some(index)) => held[index].keep_anyway(usize::from(peer) * 40),
                    (6, _) => slots.evict_one(),
                    _ => {}
                }
                let inner = slots.inner.lock();
                prop_assert!(inner.taken <= LIMITS.connections && inner.turned_away <= TURNED_AWAY);
                let peers = || inner.peers.values();
                prop_assert!(peers().all(|peer| peer.connections <= LIMITS.per_peer));
                prop_assert!(!peers().any(Peer::is_gone));
                prop_assert_eq!(peers().map(|peer| peer.newcomers.len()).sum::<usize>(), inner.newcomers);
                prop_assert_eq!(peers().map(|peer| peer.connections).sum::<usize>(), inner.taken);
                let leaving = held.iter().filter(|slot| !slot.turned_away && slot.leaves(&inner));
                prop_assert_eq!(inner.taken + leaving.count() + inner.turned_away, held.len());
                let memory = held.iter().map(|slot| slot.memory).sum::<usize>();
                prop_assert_eq!(inner.memory, memory);
                prop_assert_eq!(peers().map(|peer| peer.memory).sum::<usize>(), memory);
            }
            drop(held);
            while slots.admit(Instant::now()).is_some() {}
            let inner = slots.inner.lock();
            prop_assert_eq!((inner.taken, inner.turned_away, inner.newcomers, inner.memory), (0, 0, 0, 0));
            prop_assert!(inner.peers.is_empty() && inner.waiting.is_empty() && inner.leaving.is_empty());
        }
    }
}
