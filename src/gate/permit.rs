//! What a connection is doing, in one atomic word that its own thread sets without a lock.
//!
//! A connection *waits* while it has no whole request: in its handshake, idle, in the middle of a request,
//! or while its client reads an answer. Only then can it be evicted, and not before its grace period is
//! over. While a request is *served* it cannot. Each side changes the word in one step, so a connection is
//! either served or evicted, never both.
//!
//! Once a connection is evicted, nothing more is received from its client. What had arrived by then is
//! still read, since the client is not to blame if the connection's thread had no time yet on a busy
//! machine. Then the connection ends.
//!
//! Not here: who is evicted, and when ([`super::admission`], [`super::memory`]).

use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The grace period: how long a client has to send its first message after its connection was accepted,
/// and after that to finish a TLS handshake and send a request. On a busy machine, a normal client can
/// take this long.
pub const GRACE: Duration = Duration::from_secs(1);
/// How long a connection is read from at least. Clients that reconnect as soon as they are evicted spend
/// their `GRACE` in line. So `Limits::per_client` of them delay others of their address by this long.
pub const TURN: Duration = Duration::from_millis(250);

/// A flag in the word: the connection was evicted.
const EVICTED: u64 = 1;
/// A flag in the word: the connection waits for its client to take what is sent.
const SENDING: u64 = 2;
/// The rest of the word is the time from which the connection may be evicted: microseconds, shifted left by
/// two bits.
const TIME: u64 = !(EVICTED | SENDING);
/// The word while a request is being served.
const SERVED: u64 = 0;
/// The word once the connection has ended.
const ENDED: u64 = EVICTED | SENDING;
/// A time that never comes, for a connection whose thread has not begun.
const NEVER: u64 = TIME;

/// Shared by all connections of one listener.
pub struct Common {
    /// Times are counted from here.
    epoch: Instant,
    /// Set once no more requests are served.
    closing: AtomicBool,
}

impl Common {
    /// For a listener that is opened `now`.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self {
            epoch: now,
            closing: AtomicBool::new(false),
        })
    }

    /// From now on no further request is served.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Whether [`Common::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    fn time(&self, at: Instant) -> u64 {
        let micros = at.saturating_duration_since(self.epoch).as_micros();
        // Never 0, which is `SERVED`, nor `NEVER`, which is 100,000 years away.
        u64::try_from(micros).unwrap_or(NEVER).clamp(1, NEVER / 8) * 4
    }
}

/// A connection as other threads see it, and evict it.
pub struct Handle {
    common: Arc<Common>,
    /// Weak, so that it does not keep the descriptor open after the connection's end.
    socket: Weak<TcpStream>,
    state: AtomicU64,
}

/// What a connection was doing at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// It waits for its client.
    Waiting(Snapshot),
    /// One of its requests is being served.
    Served,
    /// It was evicted, and ends soon.
    Evicted,
    /// It has ended.
    Ended,
}

/// The word of a connection that waits. The one that may be evicted first has the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Snapshot(u64);

impl Handle {
    /// What the connection is doing now.
    pub fn activity(&self) -> Activity {
        match self.state.load(Ordering::SeqCst) {
            SERVED => Activity::Served,
            ENDED => Activity::Ended,
            state if state & EVICTED != 0 => Activity::Evicted,
            state => Activity::Waiting(Snapshot(state)),
        }
    }

    /// Whether the grace period of a connection that waits like this is over.
    pub fn is_grace_over(&self, Snapshot(seen): Snapshot, now: Instant) -> bool {
        seen & TIME <= self.common.time(now)
    }

    /// Whether a connection that waits like this waits for its own thread, on a busy machine, and not for its
    /// client: there is something to read, or room to write. Does not block.
    pub fn is_behind(&self, Snapshot(seen): Snapshot) -> bool {
        let wanted = if seen & SENDING == 0 {
            PollFlags::IN
        } else {
            PollFlags::OUT
        };
        self.socket.upgrade().is_some_and(|socket| {
            let mut socket = [PollFd::new(&*socket, wanted)];
            poll(&mut socket, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        })
    }

    /// Evicts the connection if it still waits as it was `seen` to. False if it does not.
    pub fn evict(&self, Snapshot(seen): Snapshot) -> bool {
        let (evicted, order) = (seen | EVICTED, Ordering::SeqCst);
        let exchanged = self.state.compare_exchange(seen, evicted, order, order);
        if exchanged.is_err() {
            return false;
        }
        // A client that is sending a request can still be told why it is not served. One that does not
        // take what is sent cannot; but while the service stops it may only just have begun to.
        let how = if seen & SENDING != 0 && !self.common.is_closing() {
            Shutdown::Both
        } else {
            Shutdown::Read
        };
        if let Some(socket) = self.socket.upgrade() {
            // Fails if the client has left, and then the connection is ending anyway.
            let _ = socket.shutdown(how);
        }
        true
    }

    /// Whether the connection was evicted.
    pub fn is_evicted(&self) -> bool {
        self.state.load(Ordering::Relaxed) & EVICTED != 0
    }
}

/// Permission to be connected. The connection's own thread holds it, and returns it by dropping it.
pub struct Permit {
    handle: Arc<Handle>,
    client: IpAddr,
    accepted: Instant,
    rejected: bool,
    /// It was evicted while its last request had already arrived.
    last: bool,
    /// Clones are dropped with each permit: when the last is gone, all connections have ended.
    _open: Sender<()>,
}

/// The service stops, and serves no more requests.
#[derive(Debug, PartialEq, Eq)]
pub struct Closing;

impl Permit {
    /// A permit for a connection of this client that was accepted at this time.
    pub fn new(
        common: &Arc<Common>,
        socket: &Arc<TcpStream>,
        (client, accepted): (IpAddr, Instant),
        rejected: bool,
        open: Sender<()>,
    ) -> Self {
        let handle = Handle {
            common: common.clone(),
            socket: Arc::downgrade(socket),
            state: AtomicU64::new(NEVER),
        };
        Self {
            handle: Arc::new(handle),
            client,
            accepted,
            rejected,
            last: false,
            _open: open,
        }
    }

    /// The connection as other threads see it.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// The client's network, by which connections are counted.
    pub fn client(&self) -> IpAddr {
        self.client
    }

    /// Whether this connection is one too many, and is only told so.
    pub fn is_rejected(&self) -> bool {
        self.rejected
    }

    /// Whether the connection was evicted. What has arrived already can still be read.
    pub fn is_evicted(&self) -> bool {
        self.handle.is_evicted()
    }

    /// Whether the request that is being served is the last, as the connection was evicted before.
    pub fn is_last(&self) -> bool {
        self.last
    }

    /// The connection's thread begins to read.
    pub fn begin(&self, now: Instant) {
        self.wait_until((self.accepted + GRACE).max(now + TURN));
    }

    /// The client has begun a TLS handshake.
    pub fn begin_handshake(&self, now: Instant) {
        self.wait_until(now + GRACE);
    }

    /// Puts eviction off until then, unless the connection is evicted already.
    fn wait_until(&self, time: Instant) {
        let time = self.handle.common.time(time);
        let state = &self.handle.state;
        let prolong = |old| (old & EVICTED == 0).then_some(time | old & SENDING);
        // Fails if it is evicted: there is nothing to prolong.
        let _ = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, prolong);
    }

    /// From now on a whole request is being served.
    ///
    /// # Errors
    /// The service stops, and the request must not be served.
    pub fn serve(&mut self) -> Result<(), Closing> {
        let old = self.handle.state.swap(SERVED, Ordering::SeqCst);
        self.last |= old & EVICTED != 0;
        // Checked after the word is set: either this thread sees that the service stops, or the stopping
        // thread sees that a request is being served, and does not evict the connection.
        if self.handle.common.is_closing() {
            return Err(Closing);
        }
        Ok(())
    }

    /// From now on the connection waits for its client again, first to take what is being sent. True if it
    /// may go on after that.
    pub fn send(&mut self, now: Instant) -> bool {
        let state = &self.handle.state;
        if state.load(Ordering::Relaxed) == SERVED {
            let turn = self.handle.common.time(now + TURN);
            state.store(turn | SENDING, Ordering::SeqCst);
        } else {
            state.fetch_or(SENDING, Ordering::SeqCst);
        }
        // Checked after the word is set, as in `serve`.
        !(self.last || self.is_evicted() || self.handle.common.is_closing())
    }

    /// The client has taken what was sent. Now the connection waits for it to send something.
    pub fn receive(&self) {
        self.handle.state.fetch_and(!SENDING, Ordering::SeqCst);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.handle.state.store(ENDED, Ordering::SeqCst);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::io::Write;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    /// A permit for a client 192.168.1.x whose thread has begun, and both ends of its connection.
    pub fn permit_and_ends(
        common: &Arc<Common>,
        client: u8,
    ) -> (Permit, (Arc<TcpStream>, TcpStream)) {
        let (socket, end) = connection();
        let from = (IpAddr::from([192, 168, 1, client]), Instant::now());
        let permit = Permit::new(common, &socket, from, false, bounded(0).0);
        permit.begin(Instant::now());
        (permit, (socket, end))
    }

    /// The same, for a connection of which nothing else is left.
    pub fn permit(common: &Arc<Common>, client: u8) -> Permit {
        permit_and_ends(common, client).0
    }

    fn connection() -> (Arc<TcpStream>, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let end = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Arc::new(listener.accept().unwrap().0), end)
    }

    /// A socket whose other end has gone.
    pub fn socket() -> Arc<TcpStream> {
        connection().0
    }

    /// Evicts the connection if it waits.
    pub fn evict(permit: &Permit) -> bool {
        match permit.handle().activity() {
            Activity::Waiting(state) => permit.handle().evict(state),
            _ => false,
        }
    }

    #[test]
    fn a_request_that_had_arrived_when_its_connection_was_evicted_is_served_and_is_the_last() {
        let mut permit = permit(&Common::new(Instant::now()), 1);
        assert!(evict(&permit) && permit.is_evicted());
        permit.begin_handshake(Instant::now());
        assert!(permit.is_evicted());
        assert_eq!(permit.serve(), Ok(()));
        assert!(permit.is_last() && !permit.is_evicted() && !evict(&permit));
        assert!(!permit.send(Instant::now()));
        assert!(
            evict(&permit),
            "it may take no longer over its answer than others"
        );
    }

    #[test]
    fn a_connection_is_served_or_evicted_but_never_both() {
        let common = Common::new(Instant::now());
        for _ in 0..2000 {
            let mut permit = permit(&common, 1);
            let handle = permit.handle().clone();
            let Activity::Waiting(state) = handle.activity() else {
                panic!()
            };
            thread::scope(|scope| {
                let evicting = scope.spawn(|| handle.evict(state));
                permit.serve().unwrap();
                assert_eq!(handle.activity(), Activity::Served);
                let was_evicted = evicting.join().unwrap();
                assert_eq!(handle.activity(), Activity::Served);
                assert_eq!(permit.send(Instant::now()), !was_evicted);
            });
        }
    }

    #[test]
    fn a_request_is_not_begun_once_the_service_stops_or_is_seen_by_who_stops_it() {
        for _ in 0..2000 {
            let common = Common::new(Instant::now());
            let mut permit = permit(&common, 1);
            let handle = permit.handle().clone();
            thread::scope(|scope| {
                let stopping = scope.spawn(|| {
                    common.close();
                    handle.activity()
                });
                let begun = permit.serve();
                let seen = stopping.join().unwrap();
                assert!(begun == Err(Closing) || seen == Activity::Served);
                assert!(!permit.send(Instant::now()));
            });
        }
    }

    #[test]
    fn a_connection_has_had_its_grace_when_its_time_is_over_and_not_before_its_thread_began() {
        let now = Instant::now();
        let had = |permit: &Permit, after: Duration| match permit.handle().activity() {
            Activity::Waiting(state) => permit.handle().is_grace_over(state, now + after),
            _ => false,
        };
        let common = Common::new(now);
        let client = (IpAddr::from([127, 0, 0, 1]), now);
        let mut permit = Permit::new(&common, &socket(), client, false, bounded(0).0);
        assert!(!had(&permit, GRACE * 1000));
        permit.begin(now);
        let moment = Duration::from_millis(1);
        assert!(!had(&permit, GRACE - moment) && had(&permit, GRACE + moment));
        permit.begin_handshake(now + GRACE);
        assert!(!had(&permit, 2 * GRACE - moment) && had(&permit, 2 * GRACE + moment));
        permit.serve().unwrap();
        assert!(!had(&permit, GRACE * 1000));
        assert!(permit.send(now) && !had(&permit, TURN - moment));
        permit.receive();
        assert!(!had(&permit, TURN - moment) && had(&permit, TURN + moment));
    }

    #[test]
    fn a_connection_whose_client_has_sent_something_or_takes_something_is_itself_behind() {
        let (mut permit, (_own, mut end)) = permit_and_ends(&Common::new(Instant::now()), 1);
        let is_behind = |permit: &Permit| match permit.handle().activity() {
            Activity::Waiting(state) => permit.handle().is_behind(state),
            _ => false,
        };
        assert!(!is_behind(&permit));
        permit.serve().unwrap();
        permit.send(Instant::now());
        assert!(is_behind(&permit), "there is room for an answer");
        permit.receive();
        assert!(!is_behind(&permit));
        end.write_all(b"a").unwrap();
        // Until it has arrived.
        while !is_behind(&permit) {
            thread::yield_now();
        }
    }
}
