//! What a connection is doing, in one atomic word that its own thread sets without a lock.
//!
//! A connection *waits* while it has no whole request: in its handshake, idle, in the middle of a request,
//! or while its client takes an answer. Only then can it be evicted, and not before its grace is over.
//! While a request is *served* it cannot. Each side changes the word in one step, so a connection is either
//! served or evicted, never both.
//!
//! Evicted means that nothing more is read from its client. What has arrived by then still is, since a
//! client whose thread had no turn yet on a busy machine is not to blame; then the connection ends.
//!
//! Not here: who is evicted, and when ([`super::admission`], [`super::memory`]).

use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a client has to send its first message, from when its connection was accepted, and after
/// that to finish a TLS handshake and send a request. A client that is not slow can take as long on a
/// busy machine.
pub const GRACE: Duration = Duration::from_secs(1);
/// How long a connection is read from at least. A crowd that comes back as soon as it is evicted spends
/// its `GRACE` in line, so this is what it delays others of its address by for each
/// `Limits::per_client` of them.
pub const TURN: Duration = Duration::from_millis(250);

/// A flag in the word: the connection was evicted.
const EVICTED: u64 = 1;
/// A flag: it waits for its client to take something.
const SENDING: u64 = 2;
/// The rest of the word is a time, in quarters of a microsecond: from when on it may be evicted.
const TIME: u64 = !(EVICTED | SENDING);
/// The word while a request is being served.
const SERVED: u64 = 0;
/// The word once the connection has ended.
const ENDED: u64 = EVICTED | SENDING;
/// A time that does not come: its thread has not begun, so its client is not to blame.
const NEVER: u64 = TIME;

/// What all connections of one listener have in common.
pub struct Common {
    /// From when on times are counted.
    epoch: Instant,
    /// No more requests are served.
    closing: AtomicBool,
}

impl Common {
    /// For a listener that is open from `now` on.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self {
            epoch: now,
            closing: AtomicBool::new(false),
        })
    }

    /// From now on no request begins to be served.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Whether [`Common::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    fn time(&self, at: Instant) -> u64 {
        let micros = at.saturating_duration_since(self.epoch).as_micros();
        // It is neither that of `SERVED`, nor `NEVER` in a hundred thousand years.
        u64::try_from(micros).unwrap_or(NEVER).clamp(1, NEVER / 8) * 4
    }
}

/// What others see of a connection, and evict it by.
pub struct Place {
    common: Arc<Common>,
    /// Gone with its connection, whose descriptor is not to stay open for this.
    socket: Weak<TcpStream>,
    word: AtomicU64,
}

/// What a connection was doing at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It waits for its client.
    Waiting(Word),
    /// A request of it is being served.
    Served,
    /// It was evicted, and ends soon.
    Evicted,
    /// It has ended.
    Ended,
}

/// The word of a connection that waits. The one that could be evicted first has the least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Word(u64);

impl Place {
    /// What the connection does now.
    pub fn doing(&self) -> Doing {
        match self.word.load(Ordering::SeqCst) {
            SERVED => Doing::Served,
            ENDED => Doing::Ended,
            word if word & EVICTED != 0 => Doing::Evicted,
            word => Doing::Waiting(Word(word)),
        }
    }

    /// Whether a connection that waits like this has had its grace.
    pub fn has_had_its_grace(&self, Word(seen): Word, now: Instant) -> bool {
        seen & TIME <= self.common.time(now)
    }

    /// Whether it is not the client that a connection which waits like this waits for, but its own thread's
    /// turn on a busy machine: there is something to read, or room to write. Does not block.
    pub fn is_behind(&self, Word(seen): Word) -> bool {
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

    /// Evicts the connection, if it still waits as it was `seen` to; false where it does not.
    pub fn evict(&self, Word(seen): Word) -> bool {
        let (evicted, order) = (seen | EVICTED, Ordering::SeqCst);
        let exchanged = self.word.compare_exchange(seen, evicted, order, order);
        if exchanged.is_err() {
            return false;
        }
        // Who is in the middle of a request can still be told why nothing comes of it. Who does not take
        // what is sent could not, unless it has only just begun and the service stops.
        let how = if seen & SENDING != 0 && !self.common.is_closing() {
            Shutdown::Both
        } else {
            Shutdown::Read
        };
        if let Some(socket) = self.socket.upgrade() {
            // It fails where the client has gone already, and then the thread is on its way.
            let _ = socket.shutdown(how);
        }
        true
    }

    /// Whether the connection was evicted.
    pub fn is_evicted(&self) -> bool {
        self.word.load(Ordering::Relaxed) & EVICTED != 0
    }
}

/// The leave to be connected, held by the connection's own thread; given back when it is dropped.
pub struct Permit {
    place: Arc<Place>,
    client: IpAddr,
    came: Instant,
    rejected: bool,
    /// It was evicted, so that the request which had arrived by then is its last.
    last: bool,
    /// Dropped with the last of all permits, to say that all connections have ended.
    _open: Sender<()>,
}

/// The service stops, and serves no more requests.
#[derive(Debug, PartialEq, Eq)]
pub struct Closing;

impl Permit {
    /// A permit for a connection that was accepted when it `came`.
    pub fn new(
        common: &Arc<Common>,
        socket: &Arc<TcpStream>,
        (client, came): (IpAddr, Instant),
        rejected: bool,
        open: Sender<()>,
    ) -> Self {
        let place = Place {
            common: common.clone(),
            socket: Arc::downgrade(socket),
            word: AtomicU64::new(NEVER),
        };
        Self {
            place: Arc::new(place),
            client,
            came,
            rejected,
            last: false,
            _open: open,
        }
    }

    /// What others see of the connection.
    pub fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// What its client counts as.
    pub fn client(&self) -> IpAddr {
        self.client
    }

    /// Whether this connection is one too many, let in only to be told so.
    pub fn is_rejected(&self) -> bool {
        self.rejected
    }

    /// Whether nothing more is read from the client: what has arrived already can be, to its end.
    pub fn is_evicted(&self) -> bool {
        self.place.is_evicted()
    }

    /// Whether the request that is being served is the last, as its connection was evicted before.
    pub fn is_last(&self) -> bool {
        self.last
    }

    /// Its thread begins to read from it.
    pub fn begin(&self, now: Instant) {
        self.wait_until((self.came + GRACE).max(now + TURN));
    }

    /// Its client has begun a TLS handshake.
    pub fn begin_handshake(&self, now: Instant) {
        self.wait_until(now + GRACE);
    }

    /// It is not evicted before then, unless it was already.
    fn wait_until(&self, time: Instant) {
        let time = self.place.common.time(time);
        let word = &self.place.word;
        let prolong = |old| (old & EVICTED == 0).then_some(time | old & SENDING);
        // Where it was evicted there is nothing to prolong.
        let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, prolong);
    }

    /// From now on a whole request is being served.
    ///
    /// # Errors
    /// Where the service stops: the request is not to be begun.
    pub fn serve(&mut self) -> Result<(), Closing> {
        let old = self.place.word.swap(SERVED, Ordering::SeqCst);
        self.last |= old & EVICTED != 0;
        // After the word: either this sees that the service stops, or who stops it sees that a request
        // is being served, and evicts it no more.
        if self.place.common.is_closing() {
            return Err(Closing);
        }
        Ok(())
    }

    /// From now on it waits for its client again, first for it to take what is being sent. True where the
    /// connection may go on after that.
    pub fn send(&mut self, now: Instant) -> bool {
        let word = &self.place.word;
        if word.load(Ordering::Relaxed) == SERVED {
            let turn = self.place.common.time(now + TURN);
            word.store(turn | SENDING, Ordering::SeqCst);
        } else {
            word.fetch_or(SENDING, Ordering::SeqCst);
        }
        // After the word, as above.
        !(self.last || self.is_evicted() || self.place.common.is_closing())
    }

    /// The client has taken what was sent, and is waited for to send something.
    pub fn receive(&self) {
        self.place.word.fetch_and(!SENDING, Ordering::SeqCst);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.place.word.store(ENDED, Ordering::SeqCst);
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

    /// Evicts it if it waits.
    pub fn evict(permit: &Permit) -> bool {
        match permit.place().doing() {
            Doing::Waiting(word) => permit.place().evict(word),
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
            let place = permit.place().clone();
            let Doing::Waiting(word) = place.doing() else {
                panic!()
            };
            thread::scope(|scope| {
                let evicting = scope.spawn(|| place.evict(word));
                permit.serve().unwrap();
                assert_eq!(place.doing(), Doing::Served);
                let was_evicted = evicting.join().unwrap();
                assert_eq!(place.doing(), Doing::Served);
                assert_eq!(permit.send(Instant::now()), !was_evicted);
            });
        }
    }

    #[test]
    fn a_request_is_not_begun_once_the_service_stops_or_is_seen_by_who_stops_it() {
        for _ in 0..2000 {
            let common = Common::new(Instant::now());
            let mut permit = permit(&common, 1);
            let place = permit.place().clone();
            thread::scope(|scope| {
                let stopping = scope.spawn(|| {
                    common.close();
                    place.doing()
                });
                let begun = permit.serve();
                let seen = stopping.join().unwrap();
                assert!(begun == Err(Closing) || seen == Doing::Served);
                assert!(!permit.send(Instant::now()));
            });
        }
    }

    #[test]
    fn a_connection_has_had_its_grace_when_its_time_is_over_and_not_before_its_thread_began() {
        let now = Instant::now();
        let had = |permit: &Permit, after: Duration| match permit.place().doing() {
            Doing::Waiting(word) => permit.place().has_had_its_grace(word, now + after),
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
        let is_behind = |permit: &Permit| match permit.place().doing() {
            Doing::Waiting(word) => permit.place().is_behind(word),
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
