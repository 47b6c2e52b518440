//! Bounded memory, in bytes, that large bodies and answers share.
//!
//! It is reserved first come, first served, and at most half of it for one client address. Connections
//! that hold some and wait for more could deadlock, so one connection at a time may exceed the limit and
//! finish. While others wait, connections that are slow to use what they hold are evicted.
//!
//! Small bodies and answers are not counted, so most requests take no lock.
//!
//! Not here: how much a body takes ([`super::framing`]), and which deadline is for what
//! ([`super::connection`]).

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::permit::{Activity, Handle, Permit};

/// How long a connection that waits for its client may hold memory while others need it. A client that is
/// not slow has sent its body by then.
const SLOW: Duration = Duration::from_secs(1);

/// The memory of one listener's connections.
pub struct Memory {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: usize,
    /// Bytes used by each client address.
    by_client: HashMap<IpAddr, usize>,
    holders: BTreeMap<u64, Holder>,
    /// Connections that wait, in order of arrival.
    line: BTreeMap<u64, Waiter>,
    /// The last key that was used in either map.
    last: u64,
    /// A connection exceeds the limit: see [`Reservation::grow`].
    exceeded: bool,
}

/// A connection that holds memory.
struct Holder {
    handle: Arc<Handle>,
    client: IpAddr,
    bytes: usize,
    /// Since when it has held this much. None while it waits for more.
    since: Option<Instant>,
}

/// A connection that waits for memory, or for more.
struct Waiter {
    client: IpAddr,
    more: usize,
    /// Notified when it may be its turn, or it was evicted.
    changed: Arc<Condvar>,
}

/// There is too little memory, or the connection was evicted while it waited.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused;

impl Memory {
    /// This many bytes, all of them free.
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            state: Mutex::default(),
        }
    }

    /// A connection's reservation, which is empty at first.
    pub fn part(&self, permit: &Permit) -> Reservation<'_> {
        Reservation {
            memory: self,
            handle: permit.handle().clone(),
            client: permit.client(),
            key: None,
            bytes: 0,
            exceeds: false,
        }
    }

    /// Has waiting connections check whether they were evicted.
    pub fn wake(&self) {
        for waiter in self.state.lock().line.values() {
            waiter.changed.notify_one();
        }
    }
}

/// The memory that a connection holds, released when this is dropped.
pub struct Reservation<'a> {
    memory: &'a Memory,
    handle: Arc<Handle>,
    client: IpAddr,
    /// Its key among the holders, while it holds any.
    key: Option<u64>,
    bytes: usize,
    exceeds: bool,
}

impl Reservation<'_> {
    /// Grows to this many bytes, if it has fewer. Blocks until there is room, but not beyond `deadline`.
    ///
    /// # Errors
    /// There is no room by then, or the connection was evicted. The reservation stays as it was.
    pub fn grow(&mut self, bytes: usize, deadline: Instant) -> Result<(), Refused> {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 || self.exceeds {
            return Ok(());
        }
        let limit = self.memory.limit;
        let mut state = self.memory.state.lock();
        state.set_since(self.key, None);
        let changed = Arc::new(Condvar::new());
        let waiter = Waiter {
            client: self.client,
            more,
            changed: changed.clone(),
        };
        let ticket = state.key();
        state.line.insert(ticket, waiter);
        let grown = loop {
            let now = Instant::now();
            if self.handle.is_evicted() || now >= deadline {
                break Err(Refused);
            }
            let until = if !state.next_in_line(limit).contains(&ticket) {
                deadline
            } else if state.lacking(limit, self.client, more) == 0 {
                break Ok(());
            } else if !state.exceeded {
                state.exceeded = true;
                self.exceeds = true;
                break Ok(());
            } else {
                let beyond_half = state.beyond_half(limit, self.client, more) > 0;
                let lacking = state.lacking(limit, self.client, more);
                state.evict_slow(beyond_half.then_some(self.client), lacking, now);
                state.next_slow(now)
            };
            changed.wait_until(&mut state, until.min(deadline));
        };
        state.line.remove(&ticket);
        match grown {
            Ok(()) => self.set(&mut state, bytes),
            Err(Refused) => state.set_since(self.key, Some(Instant::now())),
        }
        state.wake_next(limit);
        grown
    }

    /// Counts this many bytes that are in memory already, without waiting for room. They may be more than the
    /// client's half, as refusing them would gain nothing.
    pub fn hold(&mut self, bytes: usize) {
        let mut state = self.memory.state.lock();
        self.set(&mut state, bytes);
        let lacking = state.used.saturating_sub(self.memory.limit);
        state.evict_slow(None, lacking, Instant::now());
    }

    /// Releases all of it.
    pub fn release(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let mut state = self.memory.state.lock();
        self.set(&mut state, 0);
        if self.exceeds {
            state.exceeded = false;
            self.exceeds = false;
        }
        state.wake_next(self.memory.limit);
    }

    fn set(&mut self, state: &mut State, bytes: usize) {
        if let Some(key) = self.key.take() {
            state.holders.remove(&key);
        }
        state.used = state.used - self.bytes + bytes;
        let by_client = state.by_client.entry(self.client).or_default();
        *by_client = *by_client - self.bytes + bytes;
        if *by_client == 0 {
            state.by_client.remove(&self.client);
        }
        if bytes > 0 {
            let holder = Holder {
                handle: self.handle.clone(),
                client: self.client,
                bytes,
                since: Some(Instant::now()),
            };
            let key = state.key();
            state.holders.insert(key, holder);
            self.key = Some(key);
        }
        self.bytes = bytes;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

impl State {
    fn key(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn set_since(&mut self, key: Option<u64>, since: Option<Instant>) {
        if let Some(holder) = key.and_then(|key| self.holders.get_mut(&key)) {
            holder.since = since;
        }
    }

    fn held_by(&self, client: IpAddr) -> usize {
        self.by_client.get(&client).copied().unwrap_or(0)
    }

    /// By how much a client with this much more would exceed its half.
    fn beyond_half(&self, limit: usize, client: IpAddr, more: usize) -> usize {
        (self.held_by(client) + more).saturating_sub(limit / 2)
    }

    /// How much has to be released before a client can have this much more.
    fn lacking(&self, limit: usize, client: IpAddr, more: usize) -> usize {
        let beyond_limit = (self.used + more).saturating_sub(limit);
        beyond_limit.max(self.beyond_half(limit, client, more))
    }

    /// The waiters whose turn it is: the first in line, and those behind it that are only preceded by waiters
    /// of other clients that wait for their own half.
    fn next_in_line(&self, limit: usize) -> Vec<u64> {
        let (mut next, mut seen) = (Vec::new(), HashSet::new());
        for (ticket, waiter) in &self.line {
            if seen.insert(waiter.client) {
                next.push(*ticket);
                if self.beyond_half(limit, waiter.client, waiter.more) == 0 {
                    break;
                }
            }
        }
        next
    }

    fn wake_next(&self, limit: usize) {
        for ticket in self.next_in_line(limit) {
            self.line[&ticket].changed.notify_one();
        }
    }

    /// Evicts connections that are slow to use what they hold, of this client or of any, until enough will be
    /// released. The client that holds most comes first.
    fn evict_slow(&self, of: Option<IpAddr>, lacking: usize, now: Instant) {
        let counts = |holder: &&Holder| of.is_none_or(|client| client == holder.client);
        let holders = || self.holders.values().filter(counts);
        let coming_back = holders().filter(|holder| holder.handle.is_evicted());
        let coming_back: usize = coming_back.map(|holder| holder.bytes).sum();
        let mut lacking = lacking.saturating_sub(coming_back);
        if lacking == 0 {
            return;
        }
        let mut slow: Vec<_> = holders()
            .filter(|holder| holder.since.is_some_and(|since| since + SLOW <= now))
            .collect();
        slow.sort_by_key(|holder| (Reverse(self.held_by(holder.client)), holder.since));
        for holder in slow {
            if lacking == 0 {
                break;
            }
            if let Activity::Waiting(state) = holder.handle.activity()
                && !holder.handle.is_behind(state)
                && holder.handle.evict(state)
            {
                lacking = lacking.saturating_sub(holder.bytes);
            }
        }
    }

    /// When the next connection becomes slow.
    fn next_slow(&self, now: Instant) -> Instant {
        let since = self.holders.values().filter_map(|holder| holder.since);
        let slow = since.map(|since| since + SLOW).filter(|at| *at > now);
        slow.min().unwrap_or(now + SLOW)
    }
}

#[cfg(test)]
mod tests {
    use super::super::permit::Common;
    use super::super::permit::tests::{evict, permit, permit_and_ends};
    use super::*;
    use std::io::Write;
    use std::thread;

    fn common() -> Arc<Common> {
        Common::new(Instant::now())
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn wait_for_line(memory: &Memory, length: usize) {
        while memory.state.lock().line.len() < length {
            thread::yield_now();
        }
    }

    fn is_all_free(memory: &Memory) -> bool {
        let state = memory.state.lock();
        let nobody = state.holders.is_empty() && state.line.is_empty();
        nobody && state.used == 0 && state.by_client.is_empty() && !state.exceeded
    }

    #[test]
    fn memory_is_given_in_the_order_of_coming() {
        let (memory, common) = (Memory::new(100), common());
        let holder = permit(&common, 1);
        let [mut exceeding, mut held, mut little] = [(); 3].map(|()| memory.part(&holder));
        held.hold(80);
        little.hold(20);
        exceeding.grow(1, later()).unwrap();
        let (sender, order) = crossbeam_channel::unbounded();
        thread::scope(|scope| {
            // Each leaves too little of its client's half for the next.
            for (number, bytes) in [45, 10, 45].into_iter().enumerate() {
                let (memory, sender) = (&memory, sender.clone());
                let permit = permit(&common, 2);
                scope.spawn(move || {
                    let mut part = memory.part(&permit);
                    part.grow(bytes, later()).unwrap();
                    sender.send(number).unwrap();
                });
                wait_for_line(memory, number + 1);
            }
            // Enough for the second, which must not overtake the first.
            little.release();
            assert!(order.try_recv().is_err());
            held.release();
        });
        assert_eq!(order.try_iter().collect::<Vec<_>>(), [0, 1, 2]);
        drop((exceeding, held, little));
        assert!(is_all_free(&memory));
    }

    #[test]
    fn one_client_gets_half_and_waits_for_itself_while_others_do_not() {
        let (memory, common) = (Memory::new(100), common());
        let [greedy, modest] = [1, 2].map(|client| permit(&common, client));
        let mut parts = [(); 3].map(|()| memory.part(&greedy));
        let [first, second, third] = &mut parts;
        first.grow(50, later()).unwrap();
        // The one that may exceed.
        second.grow(30, later()).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| third.grow(20, later()));
            wait_for_line(&memory, 1);
            let mut other = memory.part(&modest);
            assert_eq!(other.grow(20, later()), Ok(()));
            assert!(!waiting.is_finished());
            first.release();
            assert_eq!(waiting.join().unwrap(), Ok(()));
        });
        drop(parts);
        assert!(is_all_free(&memory));
    }

    #[test]
    fn everybody_gets_to_an_end_however_many_grow_at_once() {
        let (memory, common) = (Memory::new(100), common());
        thread::scope(|scope| {
            for number in 0..32 {
                let (memory, permit) = (&memory, permit(&common, number % 3));
                scope.spawn(move || {
                    let mut part = memory.part(&permit);
                    for step in 1..=4 {
                        part.grow(10 * step, later()).unwrap();
                        assert!(memory.state.lock().used <= 140);
                        thread::yield_now();
                    }
                });
            }
        });
        assert!(is_all_free(&memory));
    }

    #[test]
    fn who_is_slow_makes_room_first_of_the_client_that_keeps_most() {
        let (memory, common) = (Memory::new(100), common());
        let all = [1, 1, 2, 2].map(|client| permit_and_ends(&common, client));
        let [
            (mut served, _a),
            (slow, _b),
            (modest, _c),
            (behind, mut ends),
        ] = all;
        let parts = [&modest, &slow, &served].map(|permit| memory.part(permit));
        let [mut first, mut second, mut third] = parts;
        first.hold(30);
        second.hold(30);
        third.hold(40);
        served.serve().unwrap();
        let mut sent = memory.part(&behind);
        sent.hold(1);
        ends.1.write_all(b"a").unwrap();
        let arrived = |handle: &Handle| match handle.activity() {
            Activity::Waiting(state) => handle.is_behind(state),
            _ => false,
        };
        while !arrived(behind.handle()) {
            thread::yield_now();
        }
        let state = memory.state.lock();
        let evict = |of, lacking, now| {
            state.evict_slow(of, lacking, now);
            assert!(!behind.is_evicted(), "its client is not slow");
            [&served, &slow, &modest].map(Permit::is_evicted)
        };
        let now = Instant::now();
        assert_eq!(evict(None, 1, now), [false; 3]);
        let slow = now + SLOW;
        assert_eq!(evict(None, 1, slow), [false, true, false]);
        // What comes back is enough.
        assert_eq!(evict(None, 30, slow), [false, true, false]);
        // No other of its own is slow and waits for its client.
        let own = Some(served.client());
        assert_eq!(evict(own, 100, slow), [false, true, false]);
        assert_eq!(evict(None, 100, slow), [false, true, true]);
        drop(state);
    }

    #[test]
    fn who_is_evicted_while_waiting_for_memory_waits_no_longer() {
        let (memory, common) = (Memory::new(100), common());
        let [holder, waiting] = [1, 1].map(|client| permit(&common, client));
        let (mut exceeding, mut held) = (memory.part(&holder), memory.part(&holder));
        held.hold(100);
        exceeding.grow(1, later()).unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| memory.part(&waiting).grow(50, later()));
            wait_for_line(&memory, 1);
            assert!(evict(&waiting));
            memory.wake();
            assert_eq!(waits.join().unwrap(), Err(Refused));
        });
        let in_vain = memory.part(&holder).grow(1, Instant::now());
        assert_eq!(in_vain, Err(Refused));
        drop((exceeding, held));
        assert!(is_all_free(&memory));
    }
}
