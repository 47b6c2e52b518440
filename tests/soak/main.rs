//! A long run against the real program: many apps, bad destinations, hostile clients, restarts, and a clock
//! that jumps. What was promised is checked all along; memory, threads, descriptors, file and log must stay
//! the same.
//!
//! `scripts/soak MINUTES` starts it. It writes `samples.csv`, `soak.svg` and the service's log to
//! `target/soak`, and fails if a promise was broken or a figure has grown. The service is restarted in the
//! first third of the time only, so that the other two show growth: a figure is flat if its median in the last
//! third is at most a tenth (and a little) above that in the middle third. In the end, when nobody asks
//! any more, threads and descriptors must be as few as before the first request.

#[path = "../support/mod.rs"]
mod support;

mod apps;
mod client;
mod destinations;
mod events;
mod hostile;
mod model;
mod process;
mod samples;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use apps::{App, Plan};
use destinations::{Destinations, Kind};
use model::Model;
use process::Process;
use samples::{Events, Samples, descriptors, is_flat};

/// How long results can be read.
pub const RETENTION: Duration = Duration::from_secs(120);
/// Long poll clients, connections of the destinations and the like may outlive the load by this.
const QUIET: Duration = Duration::from_secs(180);
/// How many threads and descriptors more than at first there may be when nobody asks any more.
const MORE_WHEN_QUIET: f64 = 8.0;
/// The longest that the destination that moves is away. Its queues are tried again after as much time, and
/// a fifth more at most; so it is there for half as long again, and nothing is given up for five times as long.
const AWAY: Duration = Duration::from_secs(120);

/// How many descriptors this program needs at most.
const DESCRIPTORS: u64 = 4096;

/// What all threads share.
pub struct World {
    /// The service.
    pub process: Process,
    /// What it has promised.
    pub model: Arc<Model>,
    /// Where it sends to.
    pub destinations: Destinations,
    /// While the store is being filled, submissions may be refused.
    pub store_may_be_full: AtomicBool,
    /// How long exports are tried.
    pub give_up_after: Duration,
    /// How long the last exports may take once the load has ended.
    pub last_results: Duration,
    /// All apps have all their results.
    pub idle: Barrier,
    /// The service was restarted after that.
    pub restarted: Barrier,
    ended: (Mutex<bool>, Condvar),
}

impl World {
    /// Sleeps. False if the load is to end.
    pub fn sleep(&self, duration: Duration) -> bool {
        let ended = self.ended.0.lock().unwrap();
        let waited = self
            .ended
            .1
            .wait_timeout_while(ended, duration, |ended| !*ended);
        !*waited.unwrap().0
    }

    fn end(&self) {
        *self.ended.0.lock().unwrap() = true;
        self.ended.1.notify_all();
    }
}

fn main() {
    let mut arguments = std::env::args();
    if arguments.find(|argument| argument == "--minutes").is_none() {
        // `cargo test` only checks that a leak would be found.
        assert!(is_flat(40.0, 43.0, (0.1, 1.0)) && !is_flat(40.0, 46.0, (0.1, 1.0)));
        return;
    }
    let minutes = arguments.next().and_then(|text| text.parse().ok());
    let minutes: f64 = minutes.expect("--minutes needs a number");
    raise_descriptor_limit();
    exit_on_panic();
    if !soak(Duration::from_secs_f64(minutes * 60.0)) {
        std::process::exit(1);
    }
}

/// Allows for all the connections that there are at a time.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(maximum.map_or(DESCRIPTORS, |most| most.min(DESCRIPTORS)));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

/// A thread that fails must not leave the others waiting for it, nor the service running.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        process::kill_service();
        std::process::exit(1);
    }));
}

/// Runs it all. False if something is wrong.
fn soak(load: Duration) -> bool {
    let folder = support::root().join("target/soak");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    let away = AWAY.min(load / 12);
    let plans = plans();
    let world = world(&folder, away, plans.len());
    thread::sleep(Duration::from_secs(2));
    let at_first = threads_and_descriptors(&world);
    Destinations::start(&world);
    let samples = Mutex::new(Samples::new(&world));
    let mut events = Events::new();
    let sampled = AtomicBool::new(false);
    thread::scope(|scope| {
        let (world, samples) = (&*world, &samples);
        let sampled = &sampled;
        let ends = support::Ends(sampled);
        scope.spawn(move || {
            while !sampled.load(Ordering::Relaxed) {
                samples.lock().unwrap().take(world);
                thread::sleep(samples::EVERY);
            }
        });
        scope.spawn(move || Destinations::keep_moving(world, away * 3 / 2, away));
        for (queue, (kind, plan)) in plans.into_iter().enumerate() {
            let url = world.destinations.url(kind, queue);
            scope.spawn(move || App::new(world, queue, url, plan).run());
        }
        hostile::start(scope, world);
        events::cause(world, load, samples, &mut events);
        world.end();
        eprintln!("the load has ended; waiting for the last results");
        world.idle.wait();
        becomes_quiet(world, at_first);
        drop(ends);
        for signal in ["KILL", "TERM"] {
            world.process.restart(signal, Duration::ZERO);
        }
        world.restarted.wait();
    });
    world.process.stop("TERM");
    events::check_store(&world, &world.process.data().join("exports.db"));
    report(
        &world,
        &folder,
        load,
        &samples.into_inner().unwrap(),
        &events,
    )
}

/// Starts the destinations and the service.
fn world(folder: &Path, away: Duration, apps: usize) -> Arc<World> {
    let (model, destinations) = (Arc::new(Model::default()), Destinations::new());
    let ca = destinations.identity.ca();
    let give_up_after = format!("{}s", (5 * away).as_secs());
    let arguments = [
        ["--allow-network", "127.0.0.0/8"],
        ["--ca-file", ca.to_str().unwrap()],
        ["--retention", "120s"],
        ["--give-up-after", &give_up_after],
        ["--attempt-timeout", "10s"],
        ["--max-store", "50000000"],
    ];
    let process = Process::start(folder, model.clone(), arguments.as_flattened());
    Arc::new(World {
        process,
        model,
        destinations,
        store_may_be_full: AtomicBool::new(false),
        give_up_after: 5 * away,
        last_results: 3 * away + Duration::from_secs(120),
        idle: Barrier::new(apps + 1),
        restarted: Barrier::new(apps + 1),
        ended: Default::default(),
    })
}

/// The apps.
fn plans() -> Vec<(Kind, Plan)> {
    let plan = |kind, pace| Plan {
        kind,
        length: (10, 2000),
        pace: Duration::from_millis(pace),
        long: false,
        keyed: true,
        slow: false,
        one_by_one: false,
        apart: false,
    };
    let mut plans = vec![
        plan(Kind::Quick, 150),
        plan(Kind::Quick, 300),
        plan(Kind::Slow, 2500),
        plan(Kind::Fails, 500),
        plan(Kind::Large, 8000),
        plan(Kind::Cut, 2000),
        plan(Kind::Secure, 300),
        plan(Kind::Secure, 1000),
        plan(Kind::Moves, 2000),
        plan(Kind::Moves, 4000),
        plan(Kind::Dead, 8000),
        Plan {
            keyed: false,
            ..plan(Kind::Quick, 300)
        },
        Plan {
            length: (20_000, 300_000),
            ..plan(Kind::Quick, 4000)
        },
        Plan {
            length: (20_000, 40_000),
            slow: true,
            ..plan(Kind::Quick, 4000)
        },
        Plan {
            slow: true,
            ..plan(Kind::Large, 15_000)
        },
        Plan {
            apart: true,
            ..plan(Kind::Quick, 400)
        },
        Plan {
            apart: true,
            ..plan(Kind::Moves, 4000)
        },
    ];
    for kind in [
        Kind::Quick,
        Kind::Slow,
        Kind::Secure,
        Kind::Moves,
        Kind::Hangs,
        Kind::Garbage,
        Kind::Resets,
    ] {
        plans.push(Plan {
            long: true,
            one_by_one: true,
            ..plan(kind, 1000)
        });
    }
    plans.into_iter().map(|plan| (plan.kind, plan)).collect()
}

fn threads_and_descriptors(world: &World) -> [f64; 2] {
    let pid = world.process.pid();
    let threads = support::figure(pid, "Threads").unwrap();
    [threads as f64, descriptors(pid) as f64]
}

/// Waits until there are as few threads and descriptors as at first.
fn becomes_quiet(world: &World, at_first: [f64; 2]) {
    let deadline = Instant::now() + QUIET;
    loop {
        let now = threads_and_descriptors(world);
        let more = [now[0] - at_first[0], now[1] - at_first[1]];
        if more.iter().all(|more| *more <= MORE_WHEN_QUIET) {
            eprintln!("quiet: threads and descriptors {at_first:?} at first, {now:?} now");
            return;
        }
        if Instant::now() >= deadline {
            let what =
                format!("threads and descriptors: {at_first:?} at first, {now:?} when quiet");
            return world.model.broken(what);
        }
        thread::sleep(Duration::from_secs(1));
    }
}

/// Writes everything down. False if something is wrong.
fn report(
    world: &World,
    folder: &Path,
    load: Duration,
    samples: &Samples,
    events: &Events,
) -> bool {
    let model = &world.model;
    std::fs::write(folder.join("samples.csv"), samples.csv()).unwrap();
    std::fs::write(folder.join("soak.svg"), samples.svg(events)).unwrap();
    let (table, grown) = samples.judge(load);
    let count = |event: &str| events.iter().filter(|(_, other)| *other == event).count();
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let slowest = read(&model.slowest_of_all) as f64 / 1e3;
    println!("{table}");
    println!(
        "{} acknowledged, {} finished, {} delivered, {} repeated; 503 without need: {}; slowest answer {slowest:.0} ms",
        read(&model.acknowledged),
        read(&model.finished),
        model.delivered(),
        read(&model.repeated),
        read(&model.busy),
    );
    let mut kinds: Vec<_> = events.iter().map(|(_, event)| *event).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let done = kinds.iter().map(|kind| format!("{kind}: {}", count(kind)));
    println!("{}", done.collect::<Vec<_>>().join(", "));
    let broken = model.all_broken();
    for what in broken.iter().chain(&grown) {
        println!("WRONG: {what}");
    }
    println!("see {}", folder.display());
    broken.is_empty() && grown.is_empty()
}
