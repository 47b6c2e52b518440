//! What waits and what is paused, in the status, and what of it needs the owner's attention.
//!
//! Not here: where that comes from ([`crate::exports::overview`]).

use serde_json::json;

use super::Owner;
use super::report::{Activity, Attention, Status, Suggestion};
use crate::exports::acts::running::exports;
use crate::exports::overview::{Overview, Queue};
use crate::exports::queues::QueueState;

/// A queue needs attention when this many attempts have failed in a row: a single one means little.
const FAILURES: u64 = 3;
/// The most queues that are named under what needs attention.
const MOST: usize = 5;

/// Adds what waits to the status. Blocks for reading the store.
pub fn add(owner: &Owner, status: &mut Status) {
    let overview = match owner.exports.overview() {
        Ok(overview) => overview,
        Err(error) => {
            log::error!(reason:% = error; "cannot read the store");
            let text = format!(
                "The store cannot be read: {error}. See the log, and what the kernel says of the disk."
            );
            return status.attention.push(Attention {
                kind: "store",
                text,
                act: None,
            });
        }
    };
    if let Some(all) = overview.pauses.iter().find(|pause| pause.subject == "all") {
        (status.state, status.since) = (Activity::Paused, all.since);
    }
    status.attention.extend(attention(&overview));
    let Overview {
        queues,
        queues_total,
        waiting,
        waiting_bytes,
        pauses,
    } = overview;
    (status.queues, status.queues_total) = (queues, queues_total);
    (status.waiting, status.waiting_bytes) = (waiting, waiting_bytes);
    status.pauses = pauses;
}

/// What of the queues needs attention, the worst first.
fn attention(overview: &Overview) -> Vec<Attention> {
    let is_bad = |queue: &&Queue| queue.state == QueueState::Failing && queue.failures >= FAILURES;
    let bad: Vec<_> = overview.queues.iter().filter(is_bad).collect();
    let mut items: Vec<_> = bad.iter().take(MOST).map(|queue| failing(queue)).collect();
    if bad.len() > MOST {
        let more = bad.len() - MOST;
        let text = format!("{more} more destinations cannot be sent to: see what waits.");
        items.push(Attention {
            kind: "failing",
            text,
            act: None,
        });
    }
    items
}

fn failing(queue: &Queue) -> Attention {
    let Queue {
        who,
        destination,
        waiting,
        ..
    } = queue;
    let who = queue.label.as_ref().unwrap_or(who);
    let reason = queue.reason.as_ref();
    let reason = reason.map_or("of an unknown reason", |reason| reason.message.as_str());
    let exports = exports(*waiting);
    Attention {
        kind: "failing",
        text: format!("{exports} of {who} cannot be sent to {destination}: {reason}."),
        act: Some(Suggestion {
            label: "Try now".into(),
            act: "retry".into(),
            body: json!({ "destination": destination }),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exports::overview::Reason;

    fn queue(failures: u64) -> Queue {
        Queue {
            who: "172.18.0.5".into(),
            label: Some("sleep app".into()),
            destination: "a.example #3f9a".into(),
            waiting: 12,
            state: QueueState::Failing,
            reason: Some(Reason {
                kind: "connect".into(),
                message: "connection refused by a.example:443".into(),
            }),
            failures,
            next_attempt_in: None,
            give_up_in: None,
            oldest_id: None,
            oldest_at: None,
        }
    }

    #[test]
    fn queues_that_keep_failing_need_attention_and_few_are_named() {
        let overview = |count: u64, failures| Overview {
            queues: (0..count).map(|_| queue(failures)).collect(),
            ..Overview::default()
        };
        assert!(attention(&overview(1, FAILURES - 1)).is_empty());
        let items = attention(&overview(1, FAILURES));
        assert_eq!(
            items[0].text,
            "12 exports of sleep app cannot be sent to a.example #3f9a: connection refused by a.example:443."
        );
        assert_eq!(
            items[0].act.as_ref().unwrap().body["destination"],
            "a.example #3f9a"
        );
        let items = attention(&overview(40, FAILURES));
        assert_eq!(items.len(), MOST + 1);
        assert!(items[MOST].text.starts_with("35 more"));
    }
}
