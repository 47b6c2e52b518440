//! Pages that are hard to bring about in a short test, rendered from values: a box with a year behind it, one
//! with a destination that is dead, one whose apps give things names that attack the page.

use export_service::exports::store::evidence::Shown as Row;
use export_service::exports::store::flows::{Amount, Flow, Part, Refusals};
use export_service::owner::page::{self, Query, Range, View};
use export_service::owner::report::{
    Activity, Attention, Certificate, Head, Ledger, Pause, Queue, QueueState, Reason, Rows, Secret,
    Status, Store, Suggestion, Totals,
};
use serde_json::json;

const HOUR: i64 = 3_600_000;
const DAY: i64 = 24 * HOUR;

/// What there is to render.
#[derive(Default)]
pub struct Example {
    pub name: &'static str,
    query: Query,
    status: Status,
    flows: Vec<Flow>,
    parts: Vec<Part>,
    refusals: Vec<Refusals>,
    rows: Rows,
    wrong_filter: Option<&'static str>,
}

impl Example {
    pub fn html(&self) -> String {
        page::render(&View {
            query: &self.query,
            host: "databox.local",
            apps_url: "http://127.0.0.1:8080",
            status: &self.status,
            flows: &self.flows,
            flows_total: self.flows.len() as u64 + if self.flows.len() > 20 { 31 } else { 0 },
            parts: &self.parts,
            refusals: &self.refusals,
            rows: &self.rows,
            wrong_filter: self.wrong_filter,
        })
    }
}

/// All examples, at this time.
pub fn all(now: i64) -> Vec<Example> {
    let fresh = Example {
        name: "fresh",
        status: quiet(now, 0),
        ..Example::default()
    };
    vec![
        fresh,
        busy(now, "busy", Query::default()),
        busy(now, "day", Query::parse("range=day")),
        busy(
            now,
            "year",
            Query::parse("range=year&who=app-3&outcome=failed&before=100"),
        ),
        trouble(now),
        paused(now),
        hostile(now),
    ]
}

fn quiet(now: i64, rows: u64) -> Status {
    Status {
        version: "0.1.0 (3f9a1c2, SQLite 3.51.1)".into(),
        now,
        since: now - 3 * DAY,
        store: Store {
            bytes: 1_230_000 + rows * 110,
            limit: Some(1 << 30),
            ledger_bytes: rows * 110,
            ledger_limit: 64 << 20,
        },
        disk_free: Some(17_300_000_000),
        secret: Secret {
            ready: true,
            reason: None,
        },
        certificate: Certificate {
            expires_at: Some(now + 200 * DAY),
        },
        ledger: Ledger {
            rows,
            first_at: (rows > 0).then_some(now - 90 * DAY),
            head: (rows > 0).then(|| Head {
                seq: i64::try_from(rows).unwrap(),
                hash: "5d41402abc4b2a76b9719d911017c592ae31cf0b7ac4b0bfbb1f7b3b9d5c0aa1".into(),
            }),
        },
        ..Status::default()
    }
}

const APPS: [&str; 12] = [
    "sleep", "heating", "shopping", "mood", "steps", "energy", "doorbell", "calendar", "air",
    "music", "photos", "garden",
];
const DESTINATIONS: [&str; 9] = [
    "hooks.example.com #3f9a",
    "ingest.sleep.example #77c0",
    "api.heat.example #0b1e",
    "collect.shop.example #91aa",
    "research.example.ac.uk #c5d2",
    "http://10.0.0.7:9090 #ab12",
    "energy.example.org #4410",
    "air.example.net:8443 #ee01",
    "photos.example.com #2d2d",
];

/// 10,000 exports of 12 apps.
fn busy(now: i64, name: &'static str, query: Query) -> Example {
    let mut status = quiet(now, 10_412);
    status.today = Totals {
        bytes_out: 4_210_000,
        exports: 341,
        delivered: 338,
        failed: 0,
        destinations: 9,
        refused: 2,
    };
    status.usual = Totals {
        bytes_out: 3_900_000,
        exports: 333,
        delivered: 331,
        failed: 1,
        destinations: 8,
        refused: 0,
    };
    status.waiting = 3;
    status.waiting_bytes = 5_120;
    status.queues_total = 1;
    status.queues = vec![Queue {
        who: "172.18.0.5".into(),
        label: Some("sleep app".into()),
        destination: DESTINATIONS[1].into(),
        waiting: 3,
        state: QueueState::Sending,
        oldest_id: Some("01a209fa-822b-7187-8cd1-039da68c5541".into()),
        oldest_at: Some(now - 1200),
        ..Queue::default()
    }];
    let mut flows = Vec::new();
    let mut rows = Vec::new();
    for (index, app) in APPS.into_iter().enumerate() {
        flows.push(Flow {
            who: format!("172.18.0.{}", index + 5),
            label: (index % 3 == 0).then(|| format!("{app} app")),
            destination: DESTINATIONS[index % 9].into(),
            last_at: Some(now - 97_000 * index as i64 - 4_000),
            last_day: now / DAY,
            today: Amount {
                delivered: 330 / (index as u64 + 1),
                failed: 0,
                bytes_out: 2_000_000 / (index as u64 + 1),
            },
            all: Amount {
                delivered: 9_000 / (index as u64 + 1),
                failed: 0,
                bytes_out: 61_000_000 / (index as u64 + 1),
            },
        });
    }
    for seq in 0..50 {
        let index = usize::try_from(seq * 7 % 12).unwrap();
        rows.push(Row {
            seq: 10_412 - seq,
            at: now - 61_000 * seq,
            event: "attempt".into(),
            export: Some("01a209fa-822b-7187-8cd1-039da68c5541".into()),
            who: Some(format!("172.18.0.{}", index + 5)),
            label: (index % 3 == 0).then(|| format!("{} app", APPS[index])),
            destination: Some(DESTINATIONS[index % 9].into()),
            address: Some("192.0.2.17:443".into()),
            bytes_out: Some(1_312 + 700 * seq),
            bytes_in: Some(212),
            digest: Some("9f86d081884c7d659a2feaa0c55ad015".into()),
            outcome: Some("200".into()),
            ms: Some(84 + 3 * seq),
            attempt: Some(1),
            note: None,
        });
    }
    let (bars, span) = query.range.bars();
    let start = query.range.start(now);
    let mut parts = Vec::new();
    for bar in 0..bars {
        for (index, destination) in DESTINATIONS.into_iter().enumerate() {
            let wave = (bar * 7 + index as i64 * 3) % 11;
            parts.push(Part {
                at: start + bar * span,
                destination: destination.into(),
                amount: Amount {
                    delivered: 40 / (index as u64 + 1),
                    failed: u64::from(wave == 10),
                    bytes_out: wave.unsigned_abs() * 130_000 / (index as u64 + 1),
                },
            });
        }
    }
    let refusals = vec![
        Refusals {
            who: "172.18.0.9".into(),
            label: None,
            reason: "unauthorized".into(),
            count: 1_204,
            last_at: now - 3 * HOUR,
        },
        Refusals {
            who: String::new(),
            label: None,
            reason: "too_large".into(),
            count: 3,
            last_at: now - 2 * DAY,
        },
    ];
    Example {
        name,
        query,
        status,
        flows,
        parts,
        refusals,
        rows: Rows {
            rows,
            next: Some(10_362),
        },
        ..Example::default()
    }
}

/// A dead destination, a new one, and all that can be wrong with a box.
fn trouble(now: i64) -> Example {
    let mut example = busy(now, "trouble", Query::default());
    let status = &mut example.status;
    status.attention = vec![
        Attention {
            kind: "failing",
            text: "37 exports for hooks.example.com #3f9a have been waiting since yesterday: connection refused by \
                   hooks.example.com:443: nothing listens there."
                .into(),
            act: Some(Suggestion {
                label: "Try now".into(),
                act: "retry".into(),
                body: json!({"destination": "hooks.example.com #3f9a"}),
            }),
        },
        Attention {
            kind: "new_destination",
            text: "photos.example.com #2d2d is new: 172.18.0.13 sent there for the first time.".into(),
            act: Some(Suggestion {
                label: "I know it".into(),
                act: "seen".into(),
                body: json!({"destination": "photos.example.com #2d2d"}),
            }),
        },
        Attention {
            kind: "disk",
            text: "The disk has 41 MB left: make room, or the service refuses exports.".into(),
            act: None,
        },
        Attention {
            kind: "plain_http",
            text: "The owner's port is open to the network without TLS, so that others there can read the token: \
                   give a certificate with --tls-pem, or listen on 127.0.0.1."
                .into(),
            act: None,
        },
    ];
    status.new_destinations = vec!["photos.example.com #2d2d".into()];
    status.queues.insert(
        0,
        Queue {
            who: "172.18.0.5".into(),
            label: Some("sleep app".into()),
            destination: "hooks.example.com #3f9a".into(),
            waiting: 37,
            state: QueueState::Failing,
            reason: Some(Reason {
                kind: "connect".into(),
                message: "connection refused by hooks.example.com:443: nothing listens there"
                    .into(),
            }),
            failures: 112,
            next_attempt_in: Some(431.0),
            give_up_in: Some(18_000.0),
            oldest_id: Some("01a209fa-822b-7187-8cd1-039da68c5541".into()),
            oldest_at: Some(now - 19 * HOUR),
        },
    );
    status.queues_total = 41;
    status.waiting = 40;
    status.secret = Secret {
        ready: false,
        reason: Some("the arbiter at tcp://arbiter:4444 does not answer".into()),
    };
    status.certificate.expires_at = Some(now + 3 * DAY);
    status.today.failed = 4;
    example.rows.rows[0].outcome = Some("connect".into());
    example.rows.rows[0].attempt = Some(113);
    example.rows.rows[0].bytes_out = Some(0);
    example.rows.rows[1] = Row {
        seq: 10_411,
        at: now - 61_000,
        event: "refused".into(),
        who: Some("172.18.0.9".into()),
        outcome: Some("unauthorized".into()),
        note: Some("1,204 in this minute".into()),
        ..Row::default()
    };
    example.rows.rows[2] = Row {
        seq: 10_410,
        at: now - 2 * 61_000,
        event: "pause".into(),
        note: Some("all, for 1 hour".into()),
        ..Row::default()
    };
    example.wrong_filter = Some("since=yesterday is not a day: write it like 2026-11-26");
    example
}

fn paused(now: i64) -> Example {
    let mut example = busy(now, "paused", Query::default());
    let status = &mut example.status;
    status.state = Activity::Paused;
    status.pauses = vec![
        Pause {
            subject: "all".into(),
            since: now - HOUR,
            until: Some(now + HOUR),
        },
        Pause {
            subject: format!("destination:{}", DESTINATIONS[3]),
            since: now - DAY,
            until: None,
        },
        Pause {
            subject: "who:172.18.0.6".into(),
            since: now - DAY,
            until: Some(now + DAY),
        },
    ];
    status.queues[0].state = QueueState::Paused;
    example
}

/// Whatever an app or a destination can give a name to, with markup, and characters that cannot be seen.
fn hostile(now: i64) -> Example {
    const MARKUP: &str =
        "\"><img src=x onerror=alert(1)><script>alert(1)</script>'\u{202e}\u{0}\u{200b}\u{7}&amp;";
    let long = "</style></script><b>".repeat(52_000);
    let mut example = busy(now, "hostile", Query::default());
    example.query = Query {
        range: Range::Month,
        who: MARKUP.into(),
        destination: MARKUP.into(),
        outcome: MARKUP.into(),
        since: MARKUP.into(),
        until: MARKUP.into(),
        id: MARKUP.into(),
        before: Some(1),
    };
    for (flow, index) in example.flows.iter_mut().zip(0..) {
        flow.who = format!("{index}{MARKUP}");
        flow.label = match index {
            0 => Some(long.clone()),
            _ => (index % 2 == 0).then(|| MARKUP.into()),
        };
        flow.destination = format!("{MARKUP}.example #{index:04x}");
    }
    for part in &mut example.parts {
        part.destination = format!("{MARKUP}{}", part.destination);
    }
    for row in &mut example.rows.rows {
        row.who = Some(MARKUP.into());
        row.label = Some(MARKUP.into());
        row.event = MARKUP.into();
        row.note = Some(long.clone());
        row.destination = Some(long.clone());
        row.address = Some(MARKUP.into());
        row.outcome = Some(MARKUP.into());
        row.export = Some(MARKUP.into());
        row.digest = Some("\u{202e}é<b>".into());
    }
    for refusal in &mut example.refusals {
        refusal.who = MARKUP.into();
        refusal.reason = MARKUP.into();
    }
    let status = &mut example.status;
    status.version = MARKUP.into();
    status.attention = vec![Attention {
        kind: MARKUP,
        text: MARKUP.repeat(30),
        act: Some(Suggestion {
            label: MARKUP.into(),
            act: MARKUP.into(),
            body: json!({ MARKUP: MARKUP }),
        }),
    }];
    status.new_destinations = example
        .flows
        .iter()
        .map(|flow| flow.destination.clone())
        .collect();
    status.pauses = vec![Pause {
        subject: format!("who:{MARKUP}"),
        since: now,
        until: Some(i64::MAX),
    }];
    status.queues = example.flows[..4]
        .iter()
        .map(|flow| Queue {
            who: flow.who.clone(),
            label: flow.label.clone(),
            destination: flow.destination.clone(),
            state: QueueState::Failing,
            reason: Some(Reason {
                kind: MARKUP.into(),
                message: long.clone(),
            }),
            oldest_id: Some(MARKUP.into()),
            oldest_at: Some(i64::MIN),
            next_attempt_in: Some(f64::NAN),
            give_up_in: Some(f64::INFINITY),
            failures: u64::MAX,
            waiting: u64::MAX,
        })
        .collect();
    status.ledger.head = Some(Head {
        seq: i64::MAX,
        hash: MARKUP.into(),
    });
    status.secret = Secret {
        ready: false,
        reason: Some(MARKUP.into()),
    };
    example
}
