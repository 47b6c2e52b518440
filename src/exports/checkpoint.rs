//! The thread that makes checkpoints: it moves the contents of SQLite's write-ahead log (WAL) into the
//! database, so that commits need not. It does so when the WAL is long, and a few seconds after a write,
//! because payloads that were erased from the database stay in the WAL until then.
//!
//! Not here: the statements ([`super::store`]).

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use parking_lot::{Mutex, MutexGuard};

use super::store::{self, ORDINARY_WAL, Reader, Store};

/// From the first write until the WAL is truncated.
const AGE: Duration = Duration::from_secs(5);
/// From a truncation that another process's read prevented until the next try.
const BUSY: Duration = Duration::from_secs(5);
/// The same for a WAL that is long and still growing.
const BUSY_AND_LONG: Duration = Duration::from_secs(1);
/// From an error until the next try, and from the first prevented truncation until a warning.
const LONG: Duration = Duration::from_secs(60);

/// Shared by the checkpoint thread and the writer.
pub struct Checkpoint {
    /// The checkpoint thread's own connection.
    pub(super) reader: Mutex<Reader>,
    /// Held during a commit and during the last part of a checkpoint, so that neither finds the other in
    /// its way and has to try again.
    commits: Mutex<()>,
    database: PathBuf,
    wrote: AtomicBool,
    long: AtomicBool,
    wake: Sender<()>,
    woken: Receiver<()>,
}

impl Checkpoint {
    /// Opens the connection.
    ///
    /// # Errors
    /// The file cannot be opened again.
    pub fn new(store: &Store) -> Result<Self, store::Error> {
        let (wake, woken) = bounded(1);
        Ok(Self {
            reader: Mutex::new(store.checkpointer()?),
            commits: Mutex::new(()),
            database: store.path().to_owned(),
            wrote: AtomicBool::new(false),
            long: AtomicBool::new(false),
            wake,
            woken,
        })
    }

    /// Keeps checkpoints from getting in the way of a commit while the guard lives. Blocks while one does.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.commits.lock()
    }

    /// Notes a commit, after which the WAL may be long. Does not block.
    pub fn wrote(&self, is_long: bool) {
        let first = !self.wrote.swap(true, Ordering::Relaxed);
        let long = is_long && !self.long.swap(true, Ordering::Relaxed);
        if first || long {
            // If the channel is full, the thread is about to look.
            let _ = self.wake.try_send(());
        }
    }

    /// The thread's body. Returns when `stop` is dropped.
    pub fn run(&self, stop: &Receiver<()>) {
        let mut plan = Plan {
            // An earlier run may have left something in the WAL.
            truncate_at: Some(Instant::now()),
            restart_at: None,
            held_up: None,
        };
        loop {
            let next = plan.truncate_at.into_iter().chain(plan.restart_at).min();
            let timer = next.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
            select! {
                recv(self.woken) -> _ => {}
                recv(timer) -> _ => {}
                recv(stop) -> _ => return,
            }
            let now = Instant::now();
            if self.wrote.load(Ordering::Relaxed) {
                // Counts from the first write, not the last: otherwise steady traffic would put it off for ever.
                plan.truncate_at.get_or_insert(now + AGE);
            }
            if self.long.load(Ordering::Relaxed) {
                plan.restart_at.get_or_insert(now);
            }
            if plan.restart_at.is_some_and(|at| at <= now) {
                plan.restart_at = self.restart();
            }
            if plan.truncate_at.is_some_and(|at| at <= now) {
                plan.truncate_at = self.truncate(&mut plan.held_up);
            }
        }
    }

    /// Copies all of the WAL, so that the next commit restarts it. Returns when to try again.
    fn restart(&self) -> Option<Instant> {
        match self.copy(Reader::checkpoint) {
            Ok(true) => {
                self.long.store(false, Ordering::Relaxed);
                None
            }
            Ok(false) => Some(Instant::now() + BUSY_AND_LONG),
            Err(error) => {
                warn_failed(&error);
                Some(Instant::now() + LONG)
            }
        }
    }

    /// Truncates the WAL. Returns when to try again.
    fn truncate(&self, held_up: &mut Option<HeldUp>) -> Option<Instant> {
        self.wrote.store(false, Ordering::Relaxed);
        match self.copy(Reader::truncate_wal) {
            Ok(true) => {
                *held_up = None;
                self.long.store(false, Ordering::Relaxed);
                None
            }
            Ok(false) => {
                log::debug!("somebody reads the store, its log is emptied later");
                self.warn_of_reader(held_up);
                Some(Instant::now() + BUSY)
            }
            Err(error) => {
                warn_failed(&error);
                Some(Instant::now() + LONG)
            }
        }
    }

    /// Truncates the WAL at once, unless another process's read prevents it. Blocks while the disk writes.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn empty(&self) -> Result<(), store::Error> {
        self.copy(Reader::truncate_wal).map(drop)
    }

    /// Copies the WAL into the database. What was written meanwhile is left to `last`, for which commits
    /// wait briefly.
    fn copy(
        &self,
        last: impl FnOnce(&Reader) -> Result<bool, store::Error>,
    ) -> Result<bool, store::Error> {
        let reader = self.reader.lock();
        reader.checkpoint()?;
        let _commits = self.hold();
        last(&reader)
    }

    /// Warns of a reader in another process, once until the WAL is truncated.
    fn warn_of_reader(&self, held_up: &mut Option<HeldUp>) {
        let now = Instant::now();
        let held_up = held_up.get_or_insert(HeldUp {
            since: now,
            warned: false,
        });
        let bytes = store::wal_size(&self.database);
        if !held_up.warned && (now >= held_up.since + LONG || bytes > ORDINARY_WAL) {
            held_up.warned = true;
            log::warn!(
                bytes, file:% = self.database.display();
                "SQLite's log cannot be emptied while somebody else reads the store, keeps the payloads \
                 of finished exports, and counts against --max-store: end what has the file open"
            );
        }
    }
}

struct Plan {
    truncate_at: Option<Instant>,
    restart_at: Option<Instant>,
    held_up: Option<HeldUp>,
}

/// Another process's read keeps the WAL from being truncated.
struct HeldUp {
    since: Instant,
    warned: bool,
}

fn warn_failed(error: &store::Error) {
    log::warn!(reason:% = error; "cannot empty the store's log");
}
