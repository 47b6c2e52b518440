//! How fast and how small the program is. Every rate and time stands beside a limit that was measured in the
//! same run: what a program reaches that does nothing else.
//!
//! `cargo bench` takes some minutes; `cargo bench -- --quick` one, with rough figures. Names choose rows, as
//! does their beginning: `cargo bench -- submit drain-1`. `EXPORT_SERVICE_BIN` names another build of the
//! program. It prints a table and writes `target/bench.json`; `scripts/bench` draws that too.
//!
//! CPU time and context switches are those of the measured process, and depend little on what else the
//! machine does. Rates depend on it, as the clients take their share of the processors: look at the ratios. A
//! ratio of 1 is the limit itself; with 0.5 the service is half as fast.

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

const ROWS: [(&str, Measure); 18] = [
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
    ("waiting", waiting::many),
];

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
    let is_named = |row: &str, name: &str| row.starts_with(name);
    let unknown = names
        .iter()
        .find(|name| !ROWS.iter().any(|row| is_named(row.0, name)));
    if let Some(unknown) = unknown {
        let all = ROWS.map(|row| row.0).join(" ");
        eprintln!("there is no row {unknown}, but these: {all}");
        return ExitCode::FAILURE;
    }
    let rows = ROWS.into_iter().filter(|row| {
        let mut names = names.iter();
        names.len() == 0 || names.any(|name| is_named(row.0, name))
    });
    let mut report = Report::new(quick);
    println!("{}: {}\n", report.binary.path, report.conditions());
    println!("{}", report::heading());
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
        println!("{}", row.table());
        report.rows.push(row);
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
