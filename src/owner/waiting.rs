//! What waits and what is paused, in the status, and what of it needs the owner's attention.
//!
//! Not here: where that comes from ([`crate::exports::overview`]).

use serde_json::{Value, json};

use super::Owner;
use crate::exports::overview::{Overview, Queue};
use crate::exports::queues::QueueState;

/// A queue needs attention when this many attempts have failed in a row: a single one means little.
const FAILURES: u32 = 3;
/// The most queues that are named under what needs attention.
const MOST: usize = 5;

/// Adds what waits to the status. Blocks for reading the store.
pub fn add(owner: &Owner, status: &mut Value) {
    let overview = match owner.exports.overview() {
        Ok(overview) => overview,
        Err(error) => {
            log::error!(reason:% = error; "cannot read the store");
            let text = format!(
                "The store cannot be read: {error}. See the log, and what the kernel says of the disk."
            );
            note(status, json!({ "kind": "store", "text": text }));
            return;
        }
    };
    let all = overview.pauses.iter().find(|pause| pause.subject == "all");
    status["state"] = json!(if all.is_some() { "paused" } else { "sending" });
    status["since"] = json!(all.map_or(owner.exports.started(), |pause| pause.since));
    for item in attention(&overview) {
        note(status, item);
    }
    if let (Value::Object(status), Ok(Value::Object(overview))) =
        (status, serde_json::to_value(&overview))
    {
        status.extend(overview);
    }
}

fn note(status: &mut Value, item: Value) {
    if let Some(items) = status["attention"].as_array_mut() {
        items.push(item);
    }
}

/// What of the queues needs attention, the worst first.
fn attention(overview: &Overview) -> Vec<Value> {
    let is_bad = |queue: &&Queue| queue.state == QueueState::Failing && queue.failures >= FAILURES;
    let bad: Vec<_> = overview.queues.iter().filter(is_bad).collect();
    let mut items: Vec<_> = bad.iter().take(MOST).map(|queue| failing(queue)).collect();
    if bad.len() > MOST {
        let more = bad.len() - MOST;
        let text = format!("{more} more destinations cannot be sent to: see what waits.");
        items.push(json!({ "kind": "failing", "text": text }));
    }
    items
}

fn failing(queue: &Queue) -> Value {
    let Queue {
        who,
        destination,
        waiting,
        ..
    } = queue;
    let who = queue.label.as_ref().unwrap_or(who);
    let reason = queue.reason.as_ref();
    let reason = reason.map_or("of an unknown reason", |reason| reason.message.as_str());
    let exports = match waiting {
        1 => "1 export".to_owned(),
        count => format!("{count} exports"),
    };
    json!({
        "kind": "failing",
        "text": format!("{exports} of {who} cannot be sent to {destination}: {reason}."),
        "act": { "label": "Try now", "act": "retry", "body": { "destination": destination } },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exports::overview::Reason;

    fn queue(failures: u32) -> Queue {
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
        let overview = |count, failures| Overview {
            queues: (0..count).map(|_| queue(failures)).collect(),
            ..Overview::default()
        };
        assert!(attention(&overview(1, FAILURES - 1)).is_empty());
        let items = attention(&overview(1, FAILURES));
        assert_eq!(
            items[0]["text"],
            "12 exports of sleep app cannot be sent to a.example #3f9a: connection refused by a.example:443."
        );
        assert_eq!(items[0]["act"]["body"]["destination"], "a.example #3f9a");
        let items = attention(&overview(40, FAILURES));
        assert_eq!(items.len(), MOST + 1);
        assert!(items[MOST]["text"].as_str().unwrap().starts_with("35 more"));
    }
}
