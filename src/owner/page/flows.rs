//! The section of who sends where.
//!
//! Not here: what waits (`waiting`), although its state is shown.

use serde_json::json;

use super::sections::{count, resume, who};
use super::text::{Attribute, Bytes, Component, Day, Json, Number, Shown, Span, put};
use super::waiting::state;
use super::{Button, View, key, menu};
use crate::export::DAY;
use crate::exports::store::flows::Flow;
use crate::owner::report::{Activity, Pause, Queue};

/// Who sends where.
pub fn section(out: &mut String, view: &View<'_>) {
    put!(
        out,
        "<section id=\"flows\" aria-labelledby=\"flows-h\"><h2 id=\"flows-h\">Who sends where</h2>"
    );
    if view.flows.is_empty() {
        put!(
            out,
            "<p class=\"quiet\">No app has sent anything in the last 30 days.</p></section>"
        );
        return;
    }
    put!(
        out,
        "<table class=\"cards\"><caption class=\"hidden\">Who sent what where, in the last 30 days</caption>\
         <thead><tr><th scope=\"col\">Who</th><th scope=\"col\">Destination</th>\
         <th scope=\"col\" class=\"n\">Today</th><th scope=\"col\" class=\"n\">30 days</th>\
         <th scope=\"col\">Last</th><th scope=\"col\">State</th><th scope=\"col\">Actions</th></tr></thead><tbody>"
    );
    for flow in view.flows {
        put!(
            out,
            "<tr id=\"f{}\"><th scope=\"row\">",
            key(&flow.who, &flow.destination)
        );
        who(out, &flow.who, flow.label.as_deref());
        put!(
            out,
            "</th><td><a href=\"/?who={}&amp;destination={}#ledger\">{}</a>",
            Component(&flow.who),
            Component(&flow.destination),
            Shown(&flow.destination)
        );
        let is_new = view.status.new_destinations.contains(&flow.destination);
        if is_new {
            put!(out, " <b class=\"new\">new</b>");
        }
        put!(out, "</td>");
        for amount in [flow.today, flow.all] {
            put!(
                out,
                "<td class=\"n\">{} <small>{}</small></td>",
                Bytes(amount.bytes_out),
                count(amount.delivered, "export", "exports")
            );
        }
        match flow.last_at {
            Some(at) => put!(
                out,
                "<td>{} ago</td>",
                Span(view.status.now.saturating_sub(at) as f64 / 1000.0)
            ),
            // Longer ago than the newest rows of a busy box.
            None if flow.last_day >= view.status.now.div_euclid(DAY) => put!(out, "<td>today</td>"),
            None => put!(out, "<td>{}</td>", Day(flow.last_day.saturating_mul(DAY))),
        }
        flow_state(out, view, flow);
        flow_actions(out, view, flow, is_new);
        put!(out, "</tr>");
    }
    put!(out, "</tbody></table>");
    let more = view.flows_total.saturating_sub(view.flows.len() as u64);
    if more > 0 {
        put!(
            out,
            "<p class=\"quiet\">And {} more: <code>export-service ledger --summary=destination</code> has all.</p>",
            Number(more)
        );
    }
    put!(out, "</section>");
}

fn queue_of<'a>(view: &'a View<'_>, flow: &Flow) -> Option<&'a Queue> {
    let mut queues = view.status.queues.iter();
    queues.find(|queue| queue.who == flow.who && queue.destination == flow.destination)
}

fn flow_state(out: &mut String, view: &View<'_>, flow: &Flow) {
    let (class, words) = match queue_of(view, flow) {
        Some(queue) => state(queue),
        None if view.status.state == Activity::Paused || pause_of(view, flow).is_some() => {
            ("held", "paused".to_owned())
        }
        None if flow.today.failed > 0 => (
            "bad",
            format!("{} given up today", Number(flow.today.failed)),
        ),
        None => ("ok", "nothing waits".to_owned()),
    };
    put!(out, "<td><span class=\"state {class}\">{words}</span></td>");
}

/// The pause of this flow alone, not that of everything.
fn pause_of<'a>(view: &'a View<'_>, flow: &Flow) -> Option<&'a Pause> {
    let host = flow
        .destination
        .rsplit_once(" #")
        .map_or("", |(host, _)| host);
    view.status
        .pauses
        .iter()
        .find(|pause| match pause.subject.split_once(':') {
            Some(("destination", name)) => name == flow.destination,
            Some(("host", name)) => name == host,
            Some(("who", name)) => name == flow.who,
            _ => false,
        })
}

fn flow_actions(out: &mut String, view: &View<'_>, flow: &Flow, is_new: bool) {
    let Flow {
        who, destination, ..
    } = flow;
    let name = flow.label.as_deref().unwrap_or(who);
    put!(out, "<td class=\"acts\">");
    if is_new {
        let button = Button {
            words: "I know it",
            about: destination,
            act: "seen",
            body: json!({"destination": destination}),
            ask: None,
        };
        put!(out, "{button} ");
    }
    menu(
        out,
        format_args!("{} to {}", Attribute(name), Attribute(destination)),
    );
    if let Some(pause) = pause_of(view, flow) {
        put!(out, "{}", resume(&pause.subject, "Resume", ""));
    } else {
        let subject = format!("destination:{destination}");
        put!(
            out,
            "{}{}",
            Button::plain(
                "Pause this destination for 1 hour",
                "pause",
                json!({"subject": subject, "for": "1h"})
            ),
            Button::plain(
                "Pause this destination until I resume",
                "pause",
                json!({"subject": subject})
            ),
        );
        let subject = format!("who:{who}");
        let pause = Button::plain(
            "Pause this app until I resume",
            "pause",
            json!({"subject": subject}),
        );
        put!(out, "{pause}");
    }
    put!(
        out,
        "<button type=\"button\" data-act=\"label\" data-body=\"{}\" data-name=\"{}\" \
         data-ask=\"What do you call {}?\" \
         data-yes=\"Save\">Give the app a name</button>",
        Json(&json!({"who": who})),
        Attribute(flow.label.as_deref().unwrap_or_default()),
        Attribute(who)
    );
    let forget = |words, body, what: &str| Button {
        ask: Some((format!("Forget {what}?"), "Forget it")),
        ..Button::plain(words, "forget", body)
    };
    put!(
        out,
        "{}{}</div></details></td>",
        forget(
            "Forget this destination…",
            json!({"destination": destination}),
            destination
        ),
        forget("Forget this app…", json!({"who": who}), name)
    );
}
