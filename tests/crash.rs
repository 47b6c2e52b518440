//! Nothing that was promised is lost or undone by a kill or a loss of power at any moment: contract section
//! 1, and the store.
//!
//! Both tests make random choices, and print their seed. `EXPORT_CRASH_SEED=SEED cargo test --test crash`
//! makes the same choices again; the order in which threads run is not among them. The text of a failure
//! names the folder that it leaves.
//!
//! A loss of power is modelled as follows. The service runs under strace, which yields the contents and the
//! order of all its writes, and its syncs and answers (`crash/journal.rs`). At the end of each run, what the
//! journal says must be what is in the folder. Then power is lost at random moments: an image is made of what
//! had been synced by then, and of some of the rest. The real service starts on the image, and must keep all
//! promises that it had made by then.
//!
//! - Each sector, of 512 or 4096 bytes, of a file holds what it held at some moment since the last sync of that
//!   file, and so does the file's length, each at a moment of its own. So writes are lost, torn and reordered,
//!   within a file and between files. Where a file is longer than what was written, there are zeros. A cut of a
//!   file is there as a whole or not at all, and if not, nothing that was written behind it later is either.
//! - Each change of a folder since its last sync is there or not, and a later one may be there without an
//!   earlier one. A rename is there as a whole or not at all. Syncing a file does not sync its name.
//! - What a killed service had not synced stays unsynced for the next one.
//! - A call that a kill interrupts has been carried out or not, as the folder shows.
//!
//! Not modelled: sectors that are damaged by a write that power loss interrupts, or that go bad by themselves
//! (tests/starting.rs damages pages); garbage in place of zeros; syncs that fail (tests/starting.rs); shared
//! memory (`exports.db-shm`), which is not in the images; the gate's socket; permissions and times.
//! Calls that the model does not know end the test.

mod support;

mod crash {
    pub mod client;
    pub mod disk;
    pub mod journal;
    pub mod kills;
    pub mod power;
    pub mod promises;
    pub mod random;
    pub mod recording;
}

use std::path::Path;

use crash::journal::Event;
use crash::random::{Random, SEED};
use crash::recording::Recording;

#[test]
fn two_hundred_kills_at_any_moment_break_no_promise() {
    let seed = Random::seed();
    eprintln!("kills: {SEED}={seed}");
    let count = crash::kills::run(200, seed);
    eprintln!("kills: {count:?}");
}

/// Which syncs do nothing.
type Lies = (&'static str, fn(&Path) -> bool);

const LIES: [Lies; 4] = [
    ("all", |_| true),
    ("the log's", |path| path.ends_with("exports.db-wal")),
    ("the database's", |path| path.ends_with("exports.db")),
    ("the folders'", |path| {
        path.extension().is_none() && !path.ends_with("lock")
    }),
];

#[test]
fn three_hundred_losses_of_power_break_no_promise_unless_syncs_do_nothing() {
    let seed = Random::seed();
    eprintln!("power: {SEED}={seed}");
    let mut random = Random::new(seed);
    let recordings = [
        (Recording::of_a_life(), 180),
        (Recording::of_a_takeover(1), 40),
        (Recording::of_a_takeover(2), 40),
        (Recording::of_a_repair(), 40),
    ];
    let mut broken = Vec::new();
    for (recording, images) in &recordings {
        let (count, lost) = recording.lose_power(*images, usize::MAX, &mut random, |_| false);
        eprintln!("power: {}: {count:?}", recording.name);
        broken.extend(lost);
    }
    // Without this, the images might prove nothing.
    let life = &recordings[0].0;
    for (name, lies) in LIES {
        let (count, _) = life.lose_power(200, 10, &mut random, lies);
        eprintln!("power: {}, {name} syncs do nothing: {count:?}", life.name);
        // An image without a whole folder, on which it does not start, proves less.
        if count.lost == 0 {
            broken.push(format!("nothing is lost although {name} syncs do nothing"));
        }
    }
    if !broken.is_empty() {
        for (recording, _) in recordings {
            recording.keep();
        }
        panic!(
            "{SEED}={seed}, {} images, the first of them:\n{}",
            broken.len(),
            broken[..broken.len().min(3)].join("\n")
        );
    }
}

/// Beside the new file, SQLite would take the log of the old one for the new one's.
#[test]
fn a_new_file_takes_the_old_ones_place_only_when_the_old_ones_log_is_durably_gone() {
    for recording in [Recording::of_a_takeover(2), Recording::of_a_repair()] {
        let events = || recording.journal.events.iter().map(|(_, event)| event);
        let renamed = events().position(Event::replaces_database);
        let renamed = renamed.unwrap();
        let is_log = |event: &Event| matches!(event, Event::Remove(path) if path.ends_with("exports.db-wal"));
        let removed = events().take(renamed).position(is_log).unwrap();
        let covers = |event: &Event| matches!(event, Event::Sync(path, began) if path.ends_with("data") && *began > removed);
        assert!(events().take(renamed).any(covers), "{}", recording.name);
    }
}
