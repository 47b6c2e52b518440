//! How often a request allocates. The service runs in this program, whose allocator counts. What SQLite
//! allocates in C is not seen.

use std::io::stdin;
use std::net::TcpListener;
use std::sync::Arc;

use clap::Parser;
use crossbeam_channel::bounded;
use export_service::auth::secret::Secret;
use export_service::config::{Cli, Command, SecretSource};
use export_service::delivery::attempt::Client;
use export_service::delivery::worker;
use export_service::exports::Exports;
use export_service::exports::store::Store;
use export_service::gate::{Gate, Serve};
use export_service::key_file::Key;
use export_service::ledger::LedgerKey;
use export_service::logging;
use export_service::metrics::Metrics;
use export_service::routes::Policy;
use export_service::server::{Server, Service};
use export_service::threads;
use export_service::waits::Waits;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

use crate::Bench;
use crate::deliveries::Drain;
use crate::load::{Until, drive, submission};
use crate::process::{self, Counted, Setup};
use crate::report::{Figure, Unit};
use crate::requests::Polls;
use crate::sink::Sink;
use crate::support::{nowhere, token};

#[global_allocator]
static COUNTING: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

/// Requests of each kind.
const REQUESTS: usize = 2000;

/// Allocations and bytes of a submission, of polls and of a delivery.
pub fn allocations(_: &Bench) -> Vec<Figure> {
    let start = || {
        process::Service::start_as(Setup {
            counted: Counted::Allocations,
            ..Setup::default()
        })
    };
    let mut service = start();
    let (url, _) = nowhere();
    let dead = token(&url);
    let request = |number| submission("/export", &dead, &url, number);
    let submissions = counted(&mut service, request);
    let pending = Polls::new(&service, &url, "/export", REQUESTS);
    let pending = counted(&mut service, pending.request());
    let sink = Sink::open(std::time::Duration::ZERO);
    let finished = Polls::new(&service, &sink.url(0), "/lp/export?timeout=30", REQUESTS);
    let finished = counted(&mut service, finished.request());

    let mut drain = Drain::new(start(), Sink::held(), 1);
    // The first one makes the connection.
    drain.submit(1);
    drain.deliver(1);
    drain.submit(REQUESTS);
    let before = drain.service.allocations();
    drain.deliver(REQUESTS);
    let delivered = each(before, drain.service.allocations());

    let kinds = [
        ("a submission", submissions),
        ("a poll, pending", pending),
        ("a poll, finished", finished),
        ("a delivery", delivered),
    ];
    let figures = kinds.into_iter().flat_map(|(kind, [count, bytes])| {
        [
            Figure::new(&format!("allocations of {kind}"), count, Unit::Count),
            Figure::new("  bytes in all", bytes, Unit::Count),
        ]
    });
    figures.collect()
}

/// What each of these requests allocates, one after the other over one connection.
fn counted(service: &mut process::Service, request: impl Fn(usize) -> Vec<u8> + Sync) -> [f64; 2] {
    let mut client = [service.client()];
    client[0].ask(&request(0));
    let before = service.allocations();
    drive(&mut client, Until::Count(REQUESTS), |client, number| {
        client.ask(&request(number));
    });
    each(before, service.allocations())
}

fn each(before: [f64; 2], after: [f64; 2]) -> [f64; 2] {
    std::array::from_fn(|place| (after[place] - before[place]) / REQUESTS as f64)
}

/// Serves as `src/main.rs` does, but for the end of it. Prints the count of allocations so far, and their
/// bytes, for each line of its input.
pub fn serve(arguments: &[&str]) {
    let cli = Cli::parse_from([&["export-service"], arguments].concat());
    let Some(Command::Serve(arguments)) = cli.command else {
        panic!("only for serve");
    };
    let mut config = arguments.check().unwrap();
    let metrics = Arc::new(Metrics::default());
    logging::start(config.log_format, config.log_level, metrics.clone());
    threads::exit_on_panic(logging::flush);
    let listener = TcpListener::bind(config.address).unwrap();
    let store = Store::open(&config.place).unwrap();
    let key = LedgerKey::new(&Key::random().unwrap());
    let opened = Exports::open(store, config.limits, key, metrics.clone());
    let (exports, writer, woken) = opened.unwrap();
    // They stay: the process is killed.
    let (_writes, writer_stopping) = bounded::<()>(0);
    let (_works, worker_stopping) = bounded::<()>(0);
    let (_checks, checkpoints_stopping) = bounded::<()>(0);
    let _writer = threads::spawn("writer", move || writer.run(&writer_stopping));
    let written = exports.clone();
    let _checkpoints = threads::spawn("checkpoints", move || {
        written.make_checkpoints(&checkpoints_stopping);
    });
    config.attempts.rules.own_ports = vec![config.address.port()];
    let _ended = worker::start(
        woken,
        worker_stopping,
        exports.clone(),
        Client::new(config.attempts),
        config.worker,
    );
    let SecretSource::Given(key) = config.secret else {
        panic!("a secret is given here");
    };
    let waits = Arc::new(Waits::default());
    let policy = Policy {
        name: config.name,
        secret: Arc::new(Secret::given(key)),
    };
    let service = Service {
        policy,
        exports,
        waits: waits.clone(),
    };
    let server = Server::start(config.place.folder(), service, config.threads).unwrap();
    let _gate = Gate::open(
        listener,
        Serve::Pool(&server.socket(), waits),
        config.connections,
        metrics,
    )
    .unwrap();
    for _ in stdin().lines() {
        let so_far = COUNTING.stats();
        let count = so_far.allocations + so_far.reallocations;
        println!("{count} {}", so_far.bytes_allocated);
    }
}
