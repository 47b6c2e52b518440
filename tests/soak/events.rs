//! What is done to the service: restarts and kills, a clock that is set, a full store, and what its owner
//! does.

use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::World;
use crate::apps::{App, Plan};
use crate::destinations::Kind;
use crate::model::Random;
use crate::samples::{Events, Samples};

/// From the end of one event to the next, depending on the time that there is.
const SHORTEST_STEP: Duration = Duration::from_secs(6);
const LONGEST_STEP: Duration = Duration::from_secs(45);
/// Long enough for any event.
const LONGEST_EVENT: Duration = Duration::from_secs(60);

/// What is done to the service, in turns.
const EVENTS: [&str; 6] = [
    "store filled",
    "clock ahead",
    "log not read",
    "clock back",
    "certificate renewed",
    "backup",
];
/// The same while it is restarted too.
const WITH_RESTARTS: [&str; 13] = [
    "store filled",
    "SIGTERM",
    "clock ahead",
    "SIGKILL",
    "log not read",
    "wrong clock",
    "clock back",
    "SIGKILL",
    "certificate renewed",
    "SIGTERM",
    "backup",
    "SIGKILL",
    "store filled",
];

/// Does one thing after the other to the service until the time is over, and notes what and when.
pub fn cause(world: &World, load: Duration, samples: &Mutex<Samples>, events: &mut Events) {
    let queue = usize::MAX >> 1;
    let filling = Plan {
        kind: Kind::Moves,
        length: (0, 900_000),
        pace: Duration::ZERO,
        long: false,
        keyed: true,
        slow: false,
        one_by_one: false,
        apart: false,
    };
    let mut filler = App::new(world, queue, world.destinations.filled_url(queue), filling);
    let (started, step) = (
        Instant::now(),
        (load / 30).clamp(SHORTEST_STEP, LONGEST_STEP),
    );
    let mut random = Random::new(1);
    let (mut fillings, mut number) = (Vec::new(), 0);
    while started.elapsed() + step + LONGEST_EVENT.min(load / 10) < load {
        let restarts = started.elapsed() < load / 3;
        thread::sleep(if restarts { step / 2 } else { step });
        let all = if restarts {
            &WITH_RESTARTS[..]
        } else {
            &EVENTS
        };
        let event = all[number % all.len()];
        number += 1;
        if event.contains("clock") && !world.process.has_clock() {
            continue;
        }
        events.push((samples.lock().unwrap().seconds(), event));
        eprintln!("{:>5.0} s  {event}", started.elapsed().as_secs_f64());
        let process = &world.process;
        let down = Duration::from_millis(random.below(3000) as u64);
        match event {
            "SIGTERM" => process.restart("TERM", down),
            "SIGKILL" => process.restart("KILL", down),
            "store filled" => fillings.push(fill_store(world, &mut filler, restarts)),
            "clock ahead" => set_clock_for_a_while(world, 5 * 3600 + 7, restarts),
            "clock back" => set_clock_for_a_while(world, -2 * 24 * 3600, restarts),
            "wrong clock" => {
                process.stop("KILL");
                process.set_clock(-40 * 24 * 3600);
                process.launch();
                thread::sleep(2 * SHORTEST_STEP);
                process.set_clock(0);
                thread::sleep(2 * SHORTEST_STEP);
            }
            "certificate renewed" => process.renew_certificate(),
            "backup" => back_up(world),
            _ => {
                process.log.paused.store(true, Ordering::Relaxed);
                thread::sleep(SHORTEST_STEP);
                process.log.paused.store(false, Ordering::Relaxed);
            }
        }
    }
    thread::sleep(load.saturating_sub(started.elapsed()));
    check_room(world, &fillings);
}

/// Submits until the store is full, and delivers it all a little later, or after a kill. Returns how much was
/// submitted.
fn fill_store(world: &World, filler: &mut App<'_>, kill: bool) -> usize {
    world.store_may_be_full.store(true, Ordering::Relaxed);
    let accepted = filler.fill();
    if kill {
        world.process.restart("KILL", Duration::ZERO);
    }
    thread::sleep(SHORTEST_STEP);
    world.destinations.filled.set_open(true);
    filler.drain();
    world.destinations.filled.set_open(false);
    world.store_may_be_full.store(false, Ordering::Relaxed);
    eprintln!("         the store was full after {accepted} more");
    accepted
}

/// What finished exports leave behind must not take more and more of the store.
fn check_room(world: &World, fillings: &[usize]) {
    // At the first time there are hardly any results yet.
    if let Some((last, others)) = fillings.split_last()
        && let Some(most) = others.iter().skip(1).max()
        && *last < most * 4 / 5
    {
        let what = format!("the room in the store has become less: {fillings:?}");
        world.model.broken(what);
    }
}

/// Sets the clock and sets it back, in the same run or in the next one.
fn set_clock_for_a_while(world: &World, offset: i64, restart: bool) {
    world.process.set_clock(offset);
    // Long enough to be noticed and written.
    thread::sleep(2 * SHORTEST_STEP);
    if restart {
        world.process.restart("KILL", Duration::ZERO);
    }
    world.process.set_clock(0);
    thread::sleep(2 * SHORTEST_STEP);
}

/// Copies the store while the service runs, as README says, and checks the copy.
fn back_up(world: &World) {
    let copy = world.process.folder.join("copy.db");
    let _ = std::fs::remove_file(&copy);
    let done = Command::new("sqlite3")
        .arg(world.process.data().join("exports.db"))
        .arg(format!("VACUUM INTO '{}'", copy.display()))
        .status();
    if !done.unwrap().success() {
        return world.model.broken("there is no backup".into());
    }
    check_store(world, &copy);
}

/// Checks a file itself.
pub fn check_store(world: &World, file: &Path) {
    let connection = rusqlite::Connection::open(file).unwrap();
    let read = |row: &rusqlite::Row<'_>| row.get::<_, String>(0);
    let found = connection.query_row("PRAGMA integrity_check", [], read);
    if found.as_deref() != Ok("ok") {
        world.model.broken(format!("integrity_check: {found:?}"));
    }
}
