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

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How many connections beyond the limit are let in to be told 503.
const TURNED_AWAY: usize = 16;
/// How long a newcomer waits for a connection that was closed to make room for it.
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
    /// A slot was left, memory was given back, or all is to end.
    freed: Condvar,
}

#[derive(Default)]
struct Inner {
    taken: usize,
    turned_away: usize,
    peers: HashMap<IpAddr, usize>,
    /// By how long they have been waiting: the longest first.
    waiting: BTreeMap<u64, Waiting>,
    /// The next key in `waiting`.
    next: u64,
    memory: usize,
    closing: bool,
}

struct Waiting {
    peer: IpAddr,
    /// It is being sent an answer, and not read from.
    is_answered: bool,
    memory: usize,
    /// Since when it keeps that memory.
    keeping_since: Instant,
    socket: Arc<TcpStream>,
}

/// One connection's place; given back when it is dropped.
pub struct Slot {
    slots: Arc<Slots>,
    socket: Arc<TcpStream>,
    peer: IpAddr,
    /// Its key in [`Inner::waiting`]; none while a request of it is served.
    waiting: Option<u64>,
    memory: usize,
    turned_away: bool,
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
            freed: Condvar::new(),
        })
    }

    /// Takes a slot for a connection that begins, and closes another where that is needed. Blocks
    /// for a second at most. None where there is no room, not even to be told so.
    pub fn take(self: &Arc<Self>, peer: IpAddr, socket: Arc<TcpStream>) -> Option<Slot> {
        let peer = network(peer);
        let deadline = Instant::now() + MAKING_ROOM;
        let mut inner = self.inner.lock();
        let turned_away = loop {
            if inner.closing {
                return None;
            }
            let of_peer = inner.peers.get(&peer).copied().unwrap_or(0);
            let peer_is_full = of_peer >= self.limits.per_peer;
            if !peer_is_full && inner.taken < self.limits.connections {
                break false;
            }
            self.evict(&mut inner, |waiting| !peer_is_full || waiting.peer == peer);
            if self.freed.wait_until(&mut inner, deadline).timed_out() {
                break true;
            }
        };
        if turned_away {
            if inner.turned_away >= TURNED_AWAY {
                return None;
            }
            inner.turned_away += 1;
        } else {
            inner.taken += 1;
            *inner.peers.entry(peer).or_default() += 1;
        }
        let mut slot = Slot {
            slots: self.clone(),
            socket,
            peer,
            waiting: None,
            memory: 0,
            turned_away,
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
    }

    /// Whether [`Slots::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.inner.lock().closing
    }

    /// Waits until no slot is taken, until `deadline` at the latest.
    pub fn wait_until_free(&self, deadline: Instant) {
        let mut inner = self.inner.lock();
        while inner.taken + inner.turned_away > 0 {
            if self.freed.wait_until(&mut inner, deadline).timed_out() {
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

    /// From now on a whole request is being served.
    ///
    /// # Errors
    /// Where the connection has been closed meanwhile.
    pub fn serve(&mut self) -> Result<(), Evicted> {
        let mut inner = self.slots.inner.lock();
        let key = self.waiting.take().ok_or(Evicted)?;
        inner.waiting.remove(&key).map(|_| ()).ok_or(Evicted)
    }

    /// From now on it waits for its client again, first for it to take an answer.
    ///
    /// # Errors
    /// Where the service stops, and the connection is to end after what it is about to send.
    pub fn wait(&mut self) -> Result<(), Evicted> {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        if inner.closing {
            return Err(Evicted);
        }
        if self.waiting.is_none() {
            self.enter(&mut inner, true);
        }
        Ok(())
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
        let key = inner.next;
        inner.next += 1;
        let waiting = Waiting {
            peer: self.peer,
            is_answered,
            memory: self.memory,
            keeping_since: Instant::now(),
            socket: self.socket.clone(),
        };
        inner.waiting.insert(key, waiting);
        self.waiting = Some(key);
    }

    /// Keeps so much memory instead of what was kept before. Where there is too little, connections
    /// that dawdle over theirs are closed; if that does not help, it waits until `deadline`.
    ///
    /// # Errors
    /// Where there is still too little then, and nothing is kept.
    pub fn keep(&mut self, bytes: usize, deadline: Instant) -> Result<(), Evicted> {
        let slots = self.slots.clone();
        let mut inner = slots.inner.lock();
        self.set_memory(&mut inner, 0);
        while inner.memory + bytes > slots.limits.memory {
            let now = Instant::now();
            if self.was_removed(&inner) || now >= deadline {
                return Err(Evicted);
            }
            slots.make_room(&mut inner, now, deadline);
        }
        self.set_memory(&mut inner, bytes);
        Ok(())
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
        if bytes < self.memory {
            self.slots.freed.notify_all();
        }
        inner.memory = inner.memory - self.memory + bytes;
        self.memory = bytes;
        if let Some(waiting) = self.waiting.and_then(|key| inner.waiting.get_mut(&key)) {
            waiting.memory = bytes;
            waiting.keeping_since = Instant::now();
        }
    }
}

impl Waiting {
    fn dawdles(&self, now: Instant) -> bool {
        self.memory > 0 && now.saturating_duration_since(self.keeping_since) >= DAWDLING
    }
}

impl Slots {
    /// Closes the longest waiting connection of those that may be; false where there is none. Its
    /// thread finds that out, whether it reads from the client, writes to it or waits for memory, and
    /// gives the slot back.
    fn evict(&self, inner: &mut Inner, may_be: impl Fn(&Waiting) -> bool) -> bool {
        let found = inner.waiting.iter().find(|(_, waiting)| may_be(waiting));
        let Some(key) = found.map(|(key, _)| *key) else {
            return false;
        };
        if let Some(waiting) = inner.waiting.remove(&key) {
            // Who is in the middle of a request can still be told why nothing comes of it.
            let how = if waiting.is_answered {
                Shutdown::Both
            } else {
                Shutdown::Read
            };
            // It fails where the client has gone already, and then the thread is on its way.
            let _ = waiting.socket.shutdown(how);
        }
        self.freed.notify_all();
        true
    }

    /// Closes a connection that dawdles over memory, or waits until one may.
    fn make_room(&self, inner: &mut MutexGuard<'_, Inner>, now: Instant, deadline: Instant) {
        if self.evict(inner, |waiting| waiting.dawdles(now)) {
            self.freed.wait_until(inner, deadline);
            return;
        }
        let holding = inner.waiting.values().filter(|waiting| waiting.memory > 0);
        let next = holding
            .map(|waiting| waiting.keeping_since + DAWDLING)
            .min();
        self.freed
            .wait_until(inner, next.map_or(deadline, |next| next.min(deadline)));
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.slots.inner.lock();
        if let Some(key) = self.waiting {
            inner.waiting.remove(&key);
        }
        inner.memory -= self.memory;
        if self.turned_away {
            inner.turned_away -= 1;
        } else {
            inner.taken -= 1;
            if let Some(count) = inner.peers.get_mut(&self.peer) {
                *count -= 1;
                if *count == 0 {
                    inner.peers.remove(&self.peer);
                }
            }
        }
        drop(inner);
        self.slots.freed.notify_all();
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
