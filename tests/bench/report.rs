//! What was measured, and on what: as a table for people, as Markdown, and as JSON.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::Read;
use std::iter;
use std::thread;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::load::percentile;
use crate::process::new_folder;
use crate::support;

/// How many syncs are tried to see what one takes.
const SYNCS: usize = 100;

/// All rows of one run.
#[derive(Serialize, Deserialize)]
pub struct Report {
    pub machine: Machine,
    pub binary: Binary,
    /// Whether rounds were so short that figures are rough.
    pub quick: bool,
    pub rows: Vec<Row>,
}

/// The machine that it ran on.
#[derive(Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    /// The median of overwriting 4 KiB and fdatasync, in ms.
    pub sync_ms: f64,
}

/// The program that was measured.
#[derive(Serialize, Deserialize)]
pub struct Binary {
    pub path: String,
    pub bytes: u64,
    /// Whether it needs no shared libraries.
    pub is_static: bool,
}

/// A row that was measured, or why it was not.
#[derive(Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    pub figures: Vec<Figure>,
    pub failure: Option<String>,
}

/// One figure of the service, beside its limits.
#[derive(Clone, Serialize, Deserialize)]
pub struct Figure {
    pub what: String,
    pub value: f64,
    pub unit: Unit,
    /// CPU time of the service's process for one operation, in µs.
    pub cpu: Option<f64>,
    /// Context switches of the service's process for one operation.
    pub switches: Option<f64>,
    /// fsync and fdatasync for one operation.
    pub syncs: Option<f64>,
    /// How many exports waited meanwhile, if that is what a row is about.
    pub waiting: Option<usize>,
    pub limits: Vec<Limit>,
}

/// What something that does nothing else reaches, in the same unit.
#[derive(Clone, Serialize, Deserialize)]
pub struct Limit {
    pub name: String,
    pub value: f64,
    /// CPU time of its process for one operation, in µs.
    pub cpu: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    PerSecond,
    Milliseconds,
    Megabytes,
    Count,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{} /s", thousands(value)),
            Self::Milliseconds if value >= 100.0 => format!("{} ms", thousands(value)),
            Self::Milliseconds if value >= 10.0 => format!("{value:.1} ms"),
            Self::Milliseconds => format!("{value:.2} ms"),
            Self::Megabytes => format!("{value:.2} MB"),
            Self::Count => thousands(value),
        }
    }
}

impl Figure {
    pub fn new(what: &str, value: f64, unit: Unit) -> Self {
        Self {
            what: what.to_owned(),
            value,
            unit,
            cpu: None,
            switches: None,
            syncs: None,
            waiting: None,
            limits: Vec::new(),
        }
    }

    /// How near the figure is to a limit: 1 is the limit itself, 0.5 is half as fast.
    fn ratio(&self, limit: &Limit) -> f64 {
        match self.unit {
            Unit::PerSecond => self.value / limit.value,
            _ => limit.value / self.value,
        }
    }

    /// Its cells: a line for each limit, with the figure itself in the first.
    fn lines(&self) -> Vec<[String; 9]> {
        let number = |value: Option<f64>, digits| {
            value.map_or(String::new(), |value| format!("{value:.digits$}"))
        };
        let own = [
            self.what.clone(),
            self.unit.show(self.value),
            number(self.cpu, 1),
            number(self.switches, 2),
            number(self.syncs, 3),
        ];
        let more = iter::repeat_with(Default::default);
        let limits = self.limits.iter().map(|limit| {
            [
                limit.name.clone(),
                self.unit.show(limit.value),
                format!("{:.2}", self.ratio(limit)),
                number(limit.cpu, 1),
            ]
        });
        let mut limits: Vec<[String; 4]> = limits.collect();
        if limits.is_empty() {
            limits.push(Default::default());
        }
        let lines = iter::once(own).chain(more).zip(limits);
        let lines = lines.map(|(own, limit)| {
            let mut cells = own.into_iter().chain(limit);
            std::array::from_fn(|_| cells.next().unwrap())
        });
        lines.collect()
    }
}

/// A column's heading, its width, and whether it holds text.
const COLUMNS: [(&str, usize, bool); 9] = [
    ("", 36, true),
    ("service", 11, false),
    ("CPU µs", 7, false),
    ("switches", 8, false),
    ("syncs", 6, false),
    ("limit", 21, true),
    ("it reaches", 11, false),
    ("ratio", 5, false),
    ("CPU µs", 7, false),
];

/// The table's headings, for the terminal.
pub fn heading() -> String {
    line(&COLUMNS.map(|(heading, ..)| heading.to_owned()))
}

fn line(cells: &[String; 9]) -> String {
    let mut line = String::new();
    for (cell, (_, width, is_text)) in cells.iter().zip(COLUMNS) {
        let _ = match is_text {
            true => write!(line, "{cell:<width$} "),
            false => write!(line, "{cell:>width$} "),
        };
    }
    line.trim_end().to_owned()
}

impl Row {
    /// Its lines in the table.
    pub fn table(&self) -> String {
        if let Some(failure) = &self.failure {
            return format!("{}: FAILED: {failure}", self.name);
        }
        let lines: Vec<_> = self.figures.iter().flat_map(Figure::lines).collect();
        lines.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

impl Report {
    pub fn new(quick: bool) -> Self {
        Self {
            machine: Machine::here(),
            binary: Binary::under_test(),
            quick,
            rows: Vec::new(),
        }
    }

    /// What ran where, in two lines, without the machine's paths.
    pub fn conditions(&self) -> String {
        let Self {
            machine, binary, ..
        } = self;
        let linking = match binary.is_static {
            true => "static",
            false => "dynamic",
        };
        let quick = match self.quick {
            true => " Short rounds: rough figures.",
            false => "",
        };
        format!(
            "{} bytes, {linking}.{quick}\n{}, {} cores, Linux {}, fdatasync {:.2} ms",
            thousands(binary.bytes as f64),
            machine.cpu,
            machine.cores,
            machine.kernel,
            machine.sync_ms,
        )
    }

    /// The table as Markdown, with the conditions below it.
    pub fn markdown(&self) -> String {
        let row = |cells: [String; 9]| format!("| {} |\n", cells.join(" | "));
        let mut text = row(COLUMNS.map(|(heading, ..)| heading.to_owned()));
        text += &row(COLUMNS.map(|(_, _, is_text)| match is_text {
            true => "---".to_owned(),
            false => "---:".to_owned(),
        }));
        for found in &self.rows {
            for cells in found.figures.iter().flat_map(Figure::lines) {
                // Two blanks at the beginning would be lost.
                let cells = cells.map(|cell| match cell.strip_prefix("  ") {
                    Some(rest) => format!("… {rest}"),
                    None => cell,
                });
                text += &row(cells);
            }
        }
        let conditions = self.conditions().replace('\n', " ");
        text + "\n" + &conditions + ".\n"
    }
}

/// What a figure is, without how many exports waited.
pub fn kind(what: &str) -> &str {
    what.split(',').next().unwrap_or(what)
}

impl Machine {
    fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name"));
        let cpu = cpu.map_or("an unknown CPU", |cpu| {
            cpu.trim_start_matches([':', ' ', '\t'])
        });
        Self {
            cpu: cpu.to_owned(),
            cores: thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            sync_ms: sync_ms(),
        }
    }
}

fn sync_ms() -> f64 {
    let folder = new_folder();
    let mut disk = Disk::new(folder.path());
    let sync = || {
        let began = Instant::now();
        disk.sync();
        began.elapsed()
    };
    let mut took: Vec<_> = iter::repeat_with(sync).take(SYNCS).collect();
    percentile(&mut took, 0.5).as_secs_f64() * 1e3
}

impl Binary {
    fn under_test() -> Self {
        let path = support::program();
        let mut file = File::open(&path).unwrap();
        // A dynamic program names its loader right after the headers.
        let mut head = [0; 4096];
        file.read_exact(&mut head).unwrap();
        let is_static = !head.windows(4).any(|bytes| bytes == b"/ld-");
        Self {
            path: path.display().to_string(),
            bytes: file.metadata().unwrap().len(),
            is_static,
        }
    }
}

/// A whole number with commas.
pub fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
