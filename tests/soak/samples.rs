//! Figures of the process over time: taken, written as CSV, drawn, and judged.

use std::fmt::Write;
use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::World;
use crate::support::{cpu_time, figure};

/// From one sample to the next.
pub const EVERY: Duration = Duration::from_secs(3);

/// A load that is shorter says nothing about growth.
const WARM_UP: Duration = Duration::from_secs(5 * 60);

/// One figure: its name, its unit, and how much more than in the middle third of the load its median may be
/// in the last third, as a part and in units. Figures without that are only drawn.
struct Figure(&'static str, &'static str, Option<(f64, f64)>);

const FIGURES: [Figure; 11] = [
    Figure("resident memory", "MB", Some((0.10, 2.0))),
    Figure("anonymous memory", "MB", Some((0.10, 1.0))),
    Figure("threads", "", Some((0.10, 8.0))),
    Figure("descriptors", "", Some((0.10, 24.0))),
    Figure("exports.db", "MB", Some((0.10, 2.0))),
    Figure("exports.db-wal", "MB", Some((0.25, 2.0))),
    Figure("log", "KB/min", Some((0.25, 50.0))),
    Figure("log lines", "per min", Some((0.25, 300.0))),
    Figure("waiting exports", "", Some((0.50, 100.0))),
    Figure("slowest answer", "ms", None),
    Figure("processor time", "% of one", None),
];

/// What the counters were at the sample before.
struct Counters {
    at: Instant,
    bytes: u64,
    lines: u64,
    cpu: Duration,
}

pub struct Samples {
    started: Instant,
    before: Counters,
    /// Seconds since the start, the run, and the figures in their order.
    rows: Vec<(f64, usize, [f64; FIGURES.len()])>,
}

/// What was done to the service, and when.
pub type Events = Vec<(f64, &'static str)>;

impl Samples {
    pub fn new(world: &World) -> Self {
        let mut samples = Self {
            started: Instant::now(),
            before: Counters {
                at: Instant::now(),
                bytes: 0,
                lines: 0,
                cpu: Duration::ZERO,
            },
            rows: Vec::new(),
        };
        // The first sets the counters.
        samples.take(world);
        samples.rows.clear();
        samples
    }

    /// Takes a sample, unless the service is down.
    pub fn take(&mut self, world: &World) {
        let (process, model) = (&world.process, &world.model);
        process.check_running();
        let (pid, run) = (process.pid(), process.run());
        let figures = ["VmRSS", "RssAnon", "Threads"].map(|name| figure(pid, name));
        let [Some(rss), Some(anonymous), Some(threads)] = figures else {
            return;
        };
        let now = Counters {
            at: Instant::now(),
            bytes: process.log.bytes.load(Ordering::Relaxed),
            lines: process.log.lines.load(Ordering::Relaxed),
            cpu: cpu_time(pid).unwrap_or_default(),
        };
        let before = &self.before;
        let minutes = (now.at - before.at).as_secs_f64() / 60.0;
        let file = |name: &str| {
            let file = fs::metadata(process.data().join(name));
            file.map_or(0.0, |file| file.len() as f64 / 1e6)
        };
        let figures = [
            rss as f64 / 1024.0,
            anonymous as f64 / 1024.0,
            threads as f64,
            descriptors(pid) as f64,
            file("exports.db"),
            file("exports.db-wal"),
            (now.bytes - before.bytes) as f64 / 1000.0 / minutes,
            (now.lines - before.lines) as f64 / minutes,
            model.waiting() as f64,
            model.take_slowest(),
            // A new process starts from nothing.
            now.cpu.saturating_sub(before.cpu).as_secs_f64() / minutes / 0.6,
        ];
        let seconds = (now.at - self.started).as_secs_f64();
        self.rows.push((seconds, run, figures));
        self.before = now;
    }

    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    pub fn csv(&self) -> String {
        let names = FIGURES.map(|Figure(name, unit, _)| match unit {
            "" => name.to_owned(),
            unit => format!("{name} ({unit})"),
        });
        let mut csv = format!("seconds,run,{}\n", names.join(","));
        for (seconds, run, figures) in &self.rows {
            let figures = figures.map(|figure| format!("{figure:.1}")).join(",");
            let _ = writeln!(csv, "{seconds:.0},{run},{figures}");
        }
        csv
    }

    /// Says of each figure whether it is flat, unless there were only the first minutes, in which they may
    /// rise. Returns those that are not.
    pub fn judge(&self, load: Duration) -> (String, Vec<String>) {
        let (mut table, mut grown) = (String::new(), Vec::new());
        let _ = writeln!(
            table,
            "{:<28} {:>10} {:>10} {:>10} {:>10}  ",
            "median of each third", "first", "middle", "last", "most"
        );
        for (at, Figure(name, unit, tolerance)) in FIGURES.iter().enumerate() {
            let series = |from: f64, to: f64| -> Vec<f64> {
                let load = load.as_secs_f64();
                let rows = self.rows.iter();
                let rows = rows.filter(|row| row.0 >= from * load && row.0 < to * load);
                rows.map(|row| row.2[at]).collect()
            };
            let [first, middle, last] =
                [0.0, 1.0, 2.0].map(|third| median(series(third / 3.0, (third + 1.0) / 3.0)));
            let most = series(0.0, 1.0).into_iter().fold(0.0, f64::max);
            let verdict = match tolerance {
                None => "",
                Some(_) if load < WARM_UP => "too short to say",
                Some(tolerance) if is_flat(middle, last, *tolerance) => "flat",
                Some(_) => {
                    grown.push(format!(
                        "{name} has grown from {middle:.1} to {last:.1} {unit}"
                    ));
                    "GROWN"
                }
            };
            let name = format!("{name} {unit}");
            let _ = writeln!(
                table,
                "{name:<28} {first:>10.1} {middle:>10.1} {last:>10.1} {most:>10.1}  {verdict}"
            );
        }
        (table, grown)
    }

    /// Draws each figure above the time, with a line for each event.
    pub fn svg(&self, events: &Events) -> String {
        const WIDTH: f64 = 1040.0;
        const HEIGHT: f64 = 80.0;
        const LEFT: f64 = 150.0;
        const STEP: f64 = HEIGHT + 22.0;
        let end = self.rows.last().map_or(1.0, |row| row.0);
        let x = |seconds: f64| LEFT + seconds / end * WIDTH;
        let total = STEP * FIGURES.len() as f64 + 50.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{total}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            LEFT + WIDTH + 20.0
        );
        let colours = [
            "#b33", "#393", "#36c", "#c80", "#939", "#088", "#666", "#850",
        ];
        let mut kinds: Vec<&str> = Vec::new();
        for (seconds, kind) in events {
            let known = kinds.iter().position(|other| other == kind);
            let colour = colours[known.unwrap_or(kinds.len()) % colours.len()];
            let place = x(*seconds);
            let _ = writeln!(
                svg,
                "<line x1=\"{place:.1}\" x2=\"{place:.1}\" y1=\"0\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-opacity=\"0.35\"/>",
                total - 45.0
            );
            if known.is_none() {
                let legend = LEFT + WIDTH / 9.0 * kinds.len() as f64;
                let _ = writeln!(
                    svg,
                    "<text x=\"{legend}\" y=\"{}\" fill=\"{colour}\">{kind}</text>",
                    total - 10.0
                );
                kinds.push(kind);
            }
        }
        for (at, Figure(name, unit, _)) in FIGURES.iter().enumerate() {
            let bottom = STEP * at as f64 + HEIGHT + 10.0;
            let most = self.rows.iter().map(|row| row.2[at]).fold(0.0, f64::max);
            let points = self.rows.iter().map(|(seconds, _, figures)| {
                let y = bottom - figures[at] / most.max(1e-9) * HEIGHT;
                format!("{:.1},{y:.1}", x(*seconds))
            });
            let points: Vec<String> = points.collect();
            let _ = write!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{bottom}\" y2=\"{bottom}\" stroke=\"#999\"/>\n\
                 <text x=\"5\" y=\"{}\">{name}</text>\n\
                 <text x=\"5\" y=\"{}\" fill=\"#666\">to {most:.0} {unit}</text>\n\
                 <polyline fill=\"none\" stroke=\"black\" points=\"{}\"/>\n",
                LEFT + WIDTH,
                bottom - HEIGHT / 2.0,
                bottom - HEIGHT / 2.0 + 16.0,
                points.join(" ")
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{LEFT}\" y=\"{}\">0 to {:.0} minutes</text>\n</svg>",
            total - 28.0,
            end / 60.0
        );
        svg
    }
}

/// Whether a figure has not grown by more than this part of it and this many units.
pub fn is_flat(middle: f64, last: f64, (part, units): (f64, f64)) -> bool {
    last <= middle * (1.0 + part) + units
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// How many files and sockets it has open.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}
