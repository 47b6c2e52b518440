//! How fast and how small the program is. Every rate and time stands beside a limit that was measured in the
//! same run: what a program reaches that does nothing else.
//!
//! `cargo bench` takes some minutes; `cargo bench -- --quick` one, with rough figures. Names choose rows, as
//! does their beginning: `cargo bench -- submit drain-1`. `EXPORT_SERVICE_BIN` names another build of the
//! program. It prints a table and writes `target/bench.json`; `scripts/bench` draws that too.
//!
//! CPU time and context switches are those of the measured process, and hardly depend on what else the
//! machine does. Rates do, as the clients take their share of the processors: look at the ratios. A ratio of
//! 1 is the limit itself; with 0.5 the service is half as fast.

mod allocations;
mod deliveries;
mod disk;
mod limits;
mod load;
mod picture;
mod process;
mod report;
mod requests;
mod sink;
#[path = "../support/mod.rs"]
mod support;
mod turns;
mod waiting;

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use report::{Figure, Report, Row, Unit};

/// How much is done.
pub struct Bench {
    /// Little, in a minute.
    pub quick: bool,
}

impl Bench {
    /// Rounds that count.
    pub fn rounds(&self) -> usize {
        if self.quick { 3 } else { 5 }
    }

    /// How long a round is.
    pub fn lasting(&self) -> Duration {
        Duration::from_millis(if self.quick { 250 } else { 1000 })
    }

    /// How many exports are delivered in a round.
    pub fn batch(&self) -> usize {
        if self.quick { 1000 } else { 4000 }
    }
}

/// Measures what one row is about.
type Measure = fn(&Bench) -> Vec<Figure>;

const ROWS: [(&str, Measure); 20] = [
    ("size", size),
    ("idle", waiting::none),
    ("status", requests::status),
    ("submit-1", requests::submit_1),
    ("submit-64", requests::submit_64),
    ("submit-ephemeral", requests::ephemeral),
    ("submit-tls", requests::submit_tls),
    ("poll-pending", requests::poll_pending),
    ("poll-finished", requests::poll_finished),
    ("poll-tls", requests::poll_tls),
    ("drain-1", deliveries::drain_1),
    ("drain-64", deliveries::drain_64),
    ("flood", deliveries::flood),
    ("round-trip", deliveries::round_trip),
    ("distant", deliveries::distant),
    ("held-polls", waiting::held_polls),
    ("allocations", allocations::allocations),
    ("waiting-1000", |bench| waiting::many(bench, 1000)),
    ("waiting-10000", |bench| waiting::many(bench, 10_000)),
    ("waiting-100000", |bench| waiting::many(bench, 100_000)),
];

/// Not part of a quick run unless it is named.
const LONG_ROW: (&str, Measure) = ("waiting-1000000", |bench| waiting::many(bench, 1_000_000));

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if limits::run(&arguments) {
        return ExitCode::SUCCESS;
    }
    if let ["counted", arguments @ ..] = &arguments[..] {
        allocations::serve(arguments);
        return ExitCode::SUCCESS;
    }
    // `cargo test --benches` only checks that it starts.
    if !arguments.contains(&"--bench") || arguments.contains(&"--test") {
        return ExitCode::SUCCESS;
    }
    let is_set = |flag| arguments.contains(&flag);
    if is_set("--draw") {
        return draw();
    }
    let names = arguments
        .iter()
        .filter(|argument| !argument.starts_with("--"));
    let names: Vec<&str> = names.copied().collect();
    measure(is_set("--quick"), &names)
}

/// A file among the build products.
fn product(name: &str) -> PathBuf {
    support::root().join("target").join(name)
}

fn measure(quick: bool, names: &[&str]) -> ExitCode {
    let bench = Bench { quick };
    let chosen = |row: &(&str, Measure)| match names {
        [] => *row != LONG_ROW || !quick,
        names => names.iter().any(|name| row.0.starts_with(name)),
    };
    let rows: Vec<_> = ROWS.into_iter().chain([LONG_ROW]).filter(chosen).collect();
    if rows.is_empty() {
        let all = ROWS.iter().chain([&LONG_ROW]).map(|row| row.0);
        eprintln!(
            "no such row; there are: {}",
            all.collect::<Vec<_>>().join(" ")
        );
        return ExitCode::FAILURE;
    }
    let mut report = Report::new(quick);
    println!("{}\n\n{}", report.conditions(), report::heading());
    for (name, measure) in rows {
        let name = name.to_owned();
        let row = match catch_unwind(AssertUnwindSafe(|| measure(&bench))) {
            Ok(figures) => Row {
                name,
                figures,
                failure: None,
            },
            Err(panic) => Row {
                name,
                figures: Vec::new(),
                failure: Some(reason(&*panic)),
            },
        };
        println!("{}", report.add(row).table());
    }
    let json = serde_json::to_string_pretty(&report).unwrap();
    fs::write(product("bench.json"), json + "\n").unwrap();
    match report.rows.iter().any(|row| row.failure.is_some()) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// What a panic said.
fn reason(panic: &dyn std::any::Any) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("see above").to_owned()
}

/// Prints the last run as Markdown and draws `target/bench.svg`.
fn draw() -> ExitCode {
    let json = fs::read(product("bench.json")).unwrap();
    let report: Report = serde_json::from_slice(&json).unwrap();
    fs::write(product("bench.svg"), picture::draw(&report)).unwrap();
    print!("{}", report.markdown());
    ExitCode::SUCCESS
}

fn size(_: &Bench) -> Vec<Figure> {
    let bytes = fs::metadata(support::program()).unwrap().len();
    vec![Figure::new("binary", bytes as f64 / 1e6, Unit::Megabytes)]
}
