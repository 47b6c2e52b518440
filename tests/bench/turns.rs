//! The service and its limits take turns in short rounds, so that other work on the machine affects them
//! alike. The median of each figure is what counts.

use crate::Bench;
use crate::load::Work;
use crate::process::Usage;
use crate::report::{Figure, Limit, Unit};

/// What the 50th and the 99th percentile are called. The blanks say that they belong to the line above.
const HALF: &str = "  half of them took at most";
const MOST: &str = "  99 of 100 took at most";

/// One round, or the medians of several.
#[derive(Clone, Copy)]
pub struct Round {
    /// Operations per second.
    pub rate: f64,
    /// In ms.
    pub p50: f64,
    /// In ms.
    pub p99: f64,
    /// CPU time for one operation in µs.
    pub cpu: f64,
    /// Context switches for one operation.
    pub switches: f64,
}

/// Does work and reads what a process has used for it.
pub fn metered(pid: u32, work: impl FnOnce() -> Work) -> Round {
    let before = Usage::of(pid);
    let work = work();
    let [cpu, switches] = Usage::of(pid).since(&before);
    let operations = work.operations as f64;
    Round {
        rate: operations / work.wall.as_secs_f64(),
        p50: work.p50.as_secs_f64() * 1e3,
        p99: work.p99.as_secs_f64() * 1e3,
        cpu: cpu / operations,
        switches: switches / operations,
    }
}

/// The service or a limit, which does a round at each call.
pub struct Contender<'a> {
    name: &'static str,
    round: Box<dyn FnMut() -> Round + 'a>,
}

impl<'a> Contender<'a> {
    pub fn new(name: &'static str, round: impl FnMut() -> Round + 'a) -> Self {
        let round = Box::new(round);
        Self { name, round }
    }
}

/// The medians of all contenders, the service first.
pub struct Compared(Vec<(&'static str, Round)>);

/// Measures all in turns, after a first round that does not count.
pub fn compare<const N: usize>(bench: &Bench, mut contenders: [Contender<'_>; N]) -> Compared {
    let mut turn = || contenders.each_mut().map(|one| (one.round)());
    turn();
    let turns: Vec<_> = (0..bench.rounds()).map(|_| turn()).collect();
    let medians = contenders.iter().enumerate().map(|(place, one)| {
        let rounds: Vec<_> = turns.iter().map(|turn| turn[place]).collect();
        (one.name, median(&rounds))
    });
    Compared(medians.collect())
}

/// The median of each figure.
pub fn median(rounds: &[Round]) -> Round {
    let of = |figure: fn(&Round) -> f64| {
        let mut all: Vec<_> = rounds.iter().map(figure).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Round {
        rate: of(|round| round.rate),
        p50: of(|round| round.p50),
        p99: of(|round| round.p99),
        cpu: of(|round| round.cpu),
        switches: of(|round| round.switches),
    }
}

impl Compared {
    /// Rates, and what one operation costs.
    pub fn rates(&self, what: &str) -> Figure {
        let Self(all) = self;
        let mut figure = self.figure(what, Unit::PerSecond, |round| round.rate);
        figure.cpu = Some(all[0].1.cpu);
        figure.switches = Some(all[0].1.switches);
        for (limit, (_, round)) in figure.limits.iter_mut().zip(&all[1..]) {
            limit.cpu = Some(round.cpu);
        }
        figure
    }

    /// Rates as [`Compared::rates`], and how long one operation takes.
    pub fn rates_and_times(&self, what: &str) -> Vec<Figure> {
        vec![
            self.rates(what),
            self.figure(HALF, Unit::Milliseconds, |round| round.p50),
            self.figure(MOST, Unit::Milliseconds, |round| round.p99),
        ]
    }

    fn figure(&self, what: &str, unit: Unit, of: fn(&Round) -> f64) -> Figure {
        let mut all = self.0.iter();
        let service = all.next().map_or(f64::NAN, |(_, round)| of(round));
        let limits = all.map(|(name, round)| Limit {
            name: (*name).to_owned(),
            value: of(round),
            cpu: None,
        });
        Figure {
            limits: limits.collect(),
            ..Figure::new(what, service, unit)
        }
    }
}
