//! The section of the ledger: its newest rows, filters, and the way to older ones.

use super::View;
use super::query::Query;
use super::sections::who;
use super::text::{Attribute, Bytes, Component, Number, Shown, Time, put};
use crate::exports::store::evidence::Shown as Row;

/// The section of the ledger.
pub fn section(out: &mut String, view: &View<'_>) {
    put!(
        out,
        "<section id=\"ledger\" aria-labelledby=\"ledger-h\"><h2 id=\"ledger-h\">Ledger</h2>"
    );
    filters(out, view.query);
    if let Some(wrong) = view.wrong_filter {
        put!(
            out,
            "<p class=\"state bad\">{}</p>",
            super::text::Sentence(wrong)
        );
    }
    if view.rows.rows.is_empty() {
        let words = match (view.query.is_filtered(), view.query.before) {
            (true, _) => "No row matches these filters.",
            (_, Some(_)) => "There are no older rows.",
            _ => "No rows yet.",
        };
        put!(out, "<p class=\"quiet\">{words}</p>");
    } else {
        table(out, &view.rows.rows);
    }
    let filters = view.query.filter_query();
    let and = if filters.is_empty() { "" } else { "&amp;" };
    put!(out, "<p class=\"row\"><span>");
    if view.query.before.is_some() {
        let newest = view.query.link(view.query.range, None, "ledger");
        put!(out, "<a href=\"{newest}\">Newest</a> ");
    }
    if let Some(next) = view.rows.next {
        let older = view.query.link(view.query.range, Some(next), "ledger");
        put!(out, "<a href=\"{older}\">Older</a>");
    }
    put!(
        out,
        "</span><span>The newest 1,000 of these as <a href=\"/api/ledger?limit=1000{and}{filters}&amp;format=csv\" \
         download=\"ledger.csv\">CSV</a> or <a href=\"/api/ledger?limit=1000{and}{filters}\">JSON</a></span></p></section>"
    );
}

fn filters(out: &mut String, query: &Query) {
    put!(
        out,
        "<form action=\"/#ledger\" class=\"filters\"><label>Who <input type=\"text\" name=\"who\" value=\"{}\"></label>\
         <label>Destination <input type=\"text\" name=\"destination\" value=\"{}\"></label>\
         <label>Outcome <select name=\"outcome\">",
        Attribute(&query.who),
        Attribute(&query.destination)
    );
    for (value, words) in [("", "any"), ("failed", "failed"), ("refused", "refused")] {
        let selected = if value == query.outcome {
            " selected"
        } else {
            ""
        };
        put!(out, "<option value=\"{value}\"{selected}>{words}</option>");
    }
    put!(
        out,
        "</select></label><label>From <input name=\"since\" type=\"{}\" value=\"{}\"></label>\
         <label>Before <input name=\"until\" type=\"{}\" value=\"{}\"></label>",
        input_type(&query.since),
        Attribute(&query.since),
        input_type(&query.until),
        Attribute(&query.until)
    );
    if !query.id.is_empty() {
        put!(
            out,
            "<label>Export <input type=\"text\" name=\"id\" value=\"{}\"></label>",
            Attribute(&query.id)
        );
    }
    put!(out, "<button type=\"submit\">Filter</button>");
    if query.is_filtered() {
        put!(out, " <a href=\"/#ledger\">All rows</a>");
    }
    put!(out, "</form>");
}

/// An input for days shows nothing of a text that is none.
fn input_type(value: &str) -> &'static str {
    let is_day = value.is_empty()
        || value.len() == 10
            && value.bytes().enumerate().all(|(at, byte)| match at {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            });
    if is_day { "date" } else { "text" }
}

fn table(out: &mut String, rows: &[Row]) {
    put!(
        out,
        "<table class=\"cards\"><caption class=\"hidden\">Rows of the ledger, the newest first</caption><thead><tr>\
         <th scope=\"col\">Time</th><th scope=\"col\">Who</th><th scope=\"col\">Destination</th>\
         <th scope=\"col\">What</th><th scope=\"col\">Outcome</th><th scope=\"col\" class=\"n\">Out</th>\
         <th scope=\"col\" class=\"n\">In</th><th scope=\"col\" class=\"n\">Took</th><th scope=\"col\">Digest</th>\
         </tr></thead><tbody>"
    );
    for row in rows {
        put!(
            out,
            "<tr id=\"r{}\"><th scope=\"row\">{}</th><td>",
            row.seq,
            Time(row.at)
        );
        if let Some(sender) = &row.who {
            who(out, sender, row.label.as_deref());
        }
        put!(out, "</td><td>");
        if let Some(destination) = &row.destination {
            put!(out, "{}", Shown(destination));
        }
        if let Some(address) = &row.address {
            put!(out, " <small>{}</small>", Shown(address));
        }
        put!(out, "</td><td>");
        match &row.export {
            Some(id) => put!(
                out,
                "<a href=\"/?id={}#ledger\">{}</a>",
                Component(id),
                Shown(&row.event)
            ),
            None => put!(out, "{}", Shown(&row.event)),
        }
        let attempt = row.attempt.filter(|&attempt| attempt > 1);
        if let Some(attempt) = attempt.filter(|_| row.event == "attempt") {
            put!(out, " {}", Number(attempt.unsigned_abs()));
        }
        if let Some(note) = &row.note {
            put!(out, " <small>{}</small>", Shown(note));
        }
        put!(out, "</td><td>");
        if let Some(outcome) = &row.outcome {
            put!(
                out,
                "<span class=\"state {}\">{}</span>",
                class(outcome),
                Shown(outcome)
            );
        }
        put!(out, "</td>");
        for bytes in [row.bytes_out, row.bytes_in] {
            match bytes {
                Some(bytes) => put!(out, "<td class=\"n\">{}</td>", Bytes(bytes.unsigned_abs())),
                None => put!(out, "<td></td>"),
            }
        }
        match row.ms {
            Some(ms) => put!(out, "<td class=\"n\">{} ms</td>", Number(ms.unsigned_abs())),
            None => put!(out, "<td></td>"),
        }
        match &row.digest {
            Some(digest) => put!(
                out,
                "<td><code title=\"{}\">{}</code></td></tr>",
                Attribute(digest),
                Attribute(digest.get(..8).unwrap_or(digest))
            ),
            None => put!(out, "<td></td></tr>"),
        }
    }
    put!(out, "</tbody></table>");
}

fn class(outcome: &str) -> &'static str {
    if outcome.len() == 3 && outcome.starts_with('2') {
        "ok"
    } else {
        "bad"
    }
}
