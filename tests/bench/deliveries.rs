//! Deliveries: from one queue and from many, beside submissions, and one export from end to end.

use std::time::{Duration, Instant};

use crate::Bench;
use crate::load::{self, Client, Until, Work, drive, member};
use crate::process::{Counted, Process, Service, Setup, can_count_syncs, new_folder};
use crate::report::{Figure, Limit, Unit};
use crate::requests::CROWD;
use crate::sink::{Last, Sink};
use crate::support::token;
use crate::turns::{Contender, compare, metered};

const UREQ: &str = "bare ureq loop";

/// A service whose exports wait until their destination answers.
pub struct Drain {
    pub service: Service,
    pub sink: Sink,
    queues: Vec<(String, String)>,
    clients: Vec<Client>,
}

impl Drain {
    pub fn new(service: Service, sink: Sink, queues: usize) -> Self {
        let urls = (0..queues).map(|queue| sink.url(queue));
        Self {
            queues: urls.map(|url| (token(&url), url)).collect(),
            clients: service.server.clients(CROWD),
            service,
            sink,
        }
    }

    /// Submits this many exports, evenly to all queues.
    pub fn submit(&mut self, count: usize) -> Work {
        drive(&mut self.clients, Until::Count(count), |client, number| {
            let (token, url) = &self.queues[number % self.queues.len()];
            client.ask(&load::submission("/export", token, url, number));
        })
    }

    /// Polls what a function names, all the time.
    pub fn poll(&mut self, time: Duration, what: impl Fn(usize) -> (usize, String) + Sync) -> Work {
        drive(&mut self.clients, Until::Elapsed(time), |client, number| {
            let (queue, id) = what(number);
            client.ask(&load::poll("/export", &self.queues[queue].0, &id));
        })
    }

    /// Has this many exports delivered, and waits until the last one's result can be read.
    pub fn deliver(&mut self, count: usize) -> Work {
        let (started, given) = (Instant::now(), self.sink.given());
        self.sink.allow(count);
        let last = self.sink.wait_for(given + count);
        let wall = started.elapsed();
        self.wait_for_result(&last);
        Work::unseen(count, wall)
    }

    fn wait_for_result(&mut self, last: &Last) {
        let queue: usize = last.path[1..].parse().unwrap();
        let poll = load::poll("/lp/export?timeout=30", &self.queues[queue].0, &last.id);
        let answer = self.clients[0].ask(&poll);
        assert_eq!(member(&answer, "state"), "Finished", "{answer}");
    }
}

pub fn drain_1(bench: &Bench) -> Vec<Figure> {
    vec![drain(bench, 1, "deliveries from 1 queue")]
}

pub fn drain_64(bench: &Bench) -> Vec<Figure> {
    vec![drain(bench, 64, "deliveries from 64 queues")]
}

fn drain(bench: &Bench, queues: usize, what: &str) -> Figure {
    let open = Sink::open(Duration::ZERO);
    let mut ureq = Process::limit(&["ureq", &open.url(0)]);
    let mut drain = Drain::new(Service::start(&[]), Sink::held(), queues);
    let (pid, ureq_pid) = (drain.service.pid(), ureq.pid());
    let compared = compare(
        bench,
        [
            Contender::new("", || {
                drain.submit(bench.batch());
                metered(pid, || drain.deliver(bench.batch()))
            }),
            Contender::new(UREQ, || metered(ureq_pid, || ureq.work(bench.lasting()))),
        ],
    );
    Figure {
        syncs: syncs(|service| {
            let mut drain = Drain::new(service, Sink::held(), queues);
            drain.submit(bench.batch());
            let before = drain.service.syncs();
            drain.deliver(bench.batch());
            (drain.service.syncs() - before) as f64 / bench.batch() as f64
        }),
        ..compared.rates(what)
    }
}

/// Syncs for one operation, by a service of which they are counted; none where that is not possible.
fn syncs(count: impl FnOnce(Service) -> f64) -> Option<f64> {
    let service = || {
        Service::start_as(Setup {
            counted: Counted::Syncs,
            ..Setup::default()
        })
    };
    can_count_syncs().then(|| count(service()))
}

/// 64 clients submit to 64 queues, which are delivered meanwhile.
pub fn flood(bench: &Bench) -> Vec<Figure> {
    let open = Sink::open(Duration::ZERO);
    let mut ureq = Process::limit(&["ureq", &open.url(0)]);
    let new = |service| Drain::new(service, Sink::open(Duration::ZERO), 64);
    let mut flooded = new(Service::start(&[]));
    let (pid, ureq_pid) = (flooded.service.pid(), ureq.pid());
    let mut while_submitting = Vec::new();
    let compared = compare(
        bench,
        [
            Contender::new("", || {
                metered(pid, || {
                    let (work, delivered) = submit_and_deliver(&mut flooded, bench.batch());
                    while_submitting.push(delivered);
                    work
                })
            }),
            Contender::new(UREQ, || metered(ureq_pid, || ureq.work(bench.lasting()))),
        ],
    );
    let syncs = syncs(|service| {
        let mut flooded = new(service);
        let before = flooded.service.syncs();
        submit_and_deliver(&mut flooded, bench.batch());
        (flooded.service.syncs() - before) as f64 / bench.batch() as f64
    });
    while_submitting.sort_by(f64::total_cmp);
    let delivered = while_submitting[while_submitting.len() / 2];
    let whole = Figure {
        syncs,
        ..compared.rates("exports submitted and delivered")
    };
    let during = Figure {
        limits: without_cpu(&whole.limits),
        ..Figure::new("  deliveries while 64 submit", delivered, Unit::PerSecond)
    };
    vec![whole, during]
}

fn without_cpu(limits: &[Limit]) -> Vec<Limit> {
    let without = |limit: &Limit| Limit {
        cpu: None,
        ..limit.clone()
    };
    limits.iter().map(without).collect()
}

/// Submits so many exports and waits until all are delivered. Also returns how many were delivered per
/// second until the last was submitted.
fn submit_and_deliver(drain: &mut Drain, count: usize) -> (Work, f64) {
    let (started, given) = (Instant::now(), drain.sink.given());
    let submitted = drain.submit(count);
    let meanwhile = drain.sink.given() - given;
    let last = drain.sink.wait_for(given + count);
    let wall = started.elapsed();
    drain.wait_for_result(&last);
    let rate = meanwhile as f64 / submitted.wall.as_secs_f64();
    (Work::unseen(count, wall), rate)
}

/// One client that submits and gets the result in the same request.
pub fn round_trip(bench: &Bench) -> Vec<Figure> {
    let sink = Sink::open(Duration::ZERO);
    let (service, url, folder) = (Service::start(&[]), sink.url(0), new_folder());
    let token = token(&url);
    let arguments = ["direct", &url, &folder.path().display().to_string()];
    let mut direct = Process::limit(&arguments);
    let (pid, direct_pid) = (service.pid(), direct.pid());
    let mut client = [service.client()];
    let ask = |client: &mut Client, number| {
        let request = load::submission("/lp/export?timeout=30", &token, &url, number);
        let answer = client.ask(&request);
        assert!(answer.contains("Finished"), "{answer}");
    };
    let until = Until::Elapsed(bench.lasting());
    let compared = compare(
        bench,
        [
            Contender::new("", || metered(pid, || drive(&mut client, until, ask))),
            Contender::new("POST and 2 fdatasync", || {
                metered(direct_pid, || direct.work(bench.lasting()))
            }),
        ],
    );
    compared.rates_and_times("submitted to Finished, 1 connection")
}

/// 500 exports to 20 destinations that take 200 ms each.
pub fn distant(_: &Bench) -> Vec<Figure> {
    const EXPORTS: usize = 500;
    const DESTINATIONS: usize = 20;
    const DELAY: Duration = Duration::from_millis(200);
    let mut drain = Drain::new(Service::start(&[]), Sink::open(DELAY), DESTINATIONS);
    let round = metered(drain.service.pid(), || {
        submit_and_deliver(&mut drain, EXPORTS).0
    });
    let least = DELAY * (EXPORTS / DESTINATIONS) as u32;
    let limit = Limit {
        name: "25 × 200 ms each".into(),
        value: least.as_secs_f64() * 1e3,
        cpu: None,
    };
    let took = EXPORTS as f64 / round.rate * 1e3;
    vec![Figure {
        cpu: Some(round.cpu),
        switches: Some(round.switches),
        limits: vec![limit],
        ..Figure::new(
            "500 exports to 20 slow destinations",
            took,
            Unit::Milliseconds,
        )
    }]
}
