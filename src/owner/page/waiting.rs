//! The section of what waits, and why.

use serde_json::json;

use super::sections::{count, who};
use super::text::{Attribute, Number, Sentence, Shown, Span, Time, put};
use super::{Button, View, key, menu};
use crate::owner::report::{Queue, QueueState};

/// The queues that are shown: the page stays small, and the worst come first.
const SHOWN: usize = 25;

/// What waits, and why.
pub fn section(out: &mut String, view: &View<'_>) {
    let status = view.status;
    put!(
        out,
        "<section id=\"waiting\" aria-labelledby=\"waiting-h\"><h2 id=\"waiting-h\">Waiting</h2>"
    );
    if status.queues.is_empty() {
        put!(out, "<p class=\"quiet\">Nothing waits.</p></section>");
        return;
    }
    put!(
        out,
        "<table class=\"cards\"><caption class=\"hidden\">Exports that wait, by sender and destination</caption>\
         <thead><tr><th scope=\"col\">Who</th><th scope=\"col\">Destination</th><th scope=\"col\">Waiting</th>\
         <th scope=\"col\">Why</th><th scope=\"col\">Next try</th><th scope=\"col\">Given up</th>\
         <th scope=\"col\">Actions</th></tr></thead><tbody>"
    );
    let shown = &status.queues[..status.queues.len().min(SHOWN)];
    for queue in shown {
        put!(
            out,
            "<tr id=\"q{}\"><th scope=\"row\">",
            key(&queue.who, &queue.destination)
        );
        who(out, &queue.who, queue.label.as_deref());
        let (class, _) = state(queue);
        put!(
            out,
            "</th><td>{}</td><td>{}",
            Shown(&queue.destination),
            count(queue.waiting, "export", "exports")
        );
        if let Some(at) = queue.oldest_at {
            put!(out, " <small>oldest {}</small>", Time(at));
        }
        put!(out, "</td><td><span class=\"state {class}\">");
        why(out, queue);
        put!(out, "</span></td><td>");
        match (queue.state, queue.next_attempt_in) {
            (QueueState::Sending, _) => put!(out, "now"),
            (QueueState::Paused, _) => put!(out, "when resumed"),
            (_, Some(seconds)) if seconds >= 1.0 => put!(out, "in {}", Span(seconds)),
            _ => put!(out, "at once"),
        }
        put!(out, "</td><td>");
        match queue.give_up_in {
            Some(seconds) => put!(out, "in {}", Span(seconds)),
            // Its clock runs while it fails only.
            None => put!(out, "not now"),
        }
        put!(out, "</td>");
        waiting_actions(out, queue);
        put!(out, "</tr>");
    }
    put!(out, "</tbody></table>");
    let more = status.queues_total.saturating_sub(shown.len() as u64);
    if more > 0 {
        put!(
            out,
            "<p class=\"quiet\">And {} more: <code>export-service status</code> lists them.</p>",
            count(more, "queue", "queues")
        );
    }
    put!(out, "</section>");
}

fn why(out: &mut String, queue: &Queue) {
    match queue.state {
        QueueState::Sending => put!(out, "being sent"),
        QueueState::Paused => put!(out, "you paused it"),
        QueueState::Waiting => put!(out, "waits for its turn"),
        QueueState::Failing => {}
    }
    if let Some(reason) = &queue.reason {
        if queue.state != QueueState::Failing {
            put!(out, "; ");
        }
        put!(out, "{}", Sentence(&reason.message));
    } else if queue.state == QueueState::Failing {
        put!(out, "the last attempt failed");
    }
    if queue.failures > 0 {
        put!(
            out,
            " <small>{} failed</small>",
            count(queue.failures, "attempt", "attempts")
        );
    }
}

fn waiting_actions(out: &mut String, queue: &Queue) {
    let Queue {
        who, destination, ..
    } = queue;
    let name = queue.label.as_deref().unwrap_or(who);
    put!(out, "<td class=\"acts\">");
    if queue.state != QueueState::Paused && queue.state != QueueState::Sending {
        let retry = Button {
            about: destination,
            ..Button::plain("Try now", "retry", json!({"destination": destination}))
        };
        put!(out, "{retry} ");
    }
    menu(
        out,
        format_args!(
            "what {} has waiting for {}",
            Attribute(name),
            Attribute(destination)
        ),
    );
    if let Some(id) = &queue.oldest_id {
        let question = format!("Cancel the oldest export from {name} to {destination}?");
        put!(
            out,
            "{}{}",
            Button::plain("Show the oldest", "show", json!({"id": id})),
            Button {
                ask: Some((question, "Cancel the oldest")),
                ..Button::plain("Cancel the oldest…", "cancel", json!({"id": id}))
            }
        );
    }
    let question = format!("Cancel everything that waits for {destination}, from whichever app?");
    let all = Button {
        ask: Some((question, "Cancel all")),
        ..Button::plain(
            "Cancel all to this destination…",
            "cancel",
            json!({"destination": destination}),
        )
    };
    put!(out, "{all}</div></details></td>");
}

/// The state of a queue: its class, and words without anything from outside.
pub fn state(queue: &Queue) -> (&'static str, String) {
    let waiting = Number(queue.waiting);
    match queue.state {
        QueueState::Sending => ("ok", format!("sending, {waiting} left")),
        QueueState::Waiting => ("ok", format!("{waiting} waiting")),
        QueueState::Failing => ("bad", format!("failing, {waiting} waiting")),
        QueueState::Paused => ("held", format!("paused, {waiting} waiting")),
    }
}
