//! The sections of the page but for the bars and the ledger.

use serde_json::json;

use super::text::{Attribute, Bytes, Number, Sentence, Shown, Span, Time, put};
use super::{Button, View, is_fresh};
use crate::owner::report::{Activity, Pause, Totals};

/// Days before its end from which the certificate's end is a warning.
const CERTIFICATE_WARNING: i64 = 14 * 86_400_000;

/// The title and the icon, which change when something is wrong.
pub fn title(out: &mut String, view: &View<'_>) {
    let status = view.status;
    let (colour, words) = match (status.attention.len(), status.state) {
        (_, Activity::Paused) => ("8b6f00", "Paused".to_owned()),
        (0, Activity::Sending) => ("2a8a5f", "Sending".to_owned()),
        (1, Activity::Sending) => ("c2410c", "1 needs attention".to_owned()),
        (n, Activity::Sending) => ("c2410c", format!("{n} need attention")),
    };
    put!(
        out,
        "<title>{words} – what left {}</title><link rel=\"icon\" href=\"data:image/svg+xml,\
         %3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E\
         %3Ccircle cx='8' cy='8' r='7' fill='%23{colour}'/%3E%3C/svg%3E\">",
        Attribute(view.host)
    );
}

/// The header: whether exports are sent, and the pause menu.
pub fn header(out: &mut String, view: &View<'_>) {
    let status = view.status;
    put!(
        out,
        "<header id=\"top\"><h1>What left <span>{}</span></h1>",
        Shown(view.host)
    );
    let all = status.pauses.iter().find(|pause| pause.subject == "all");
    match (status.state, all) {
        (Activity::Sending, _) => {
            put!(out, "<p class=\"state ok\"><b>Sending</b>");
        }
        (Activity::Paused, pause) => {
            put!(out, "<p class=\"state held\"><b>Paused ");
            until(out, pause.and_then(|pause| pause.until));
            put!(out, "</b>");
        }
    }
    if status.waiting > 0 {
        put!(
            out,
            " <span class=\"quiet\">{} waiting, {}</span>",
            Number(status.waiting),
            Bytes(status.waiting_bytes)
        );
    }
    put!(out, "</p>");
    if status.state == Activity::Paused {
        put!(out, "{}", resume("all", "Resume", ""));
    } else {
        put!(
            out,
            "<details class=\"menu\" id=\"pause\"><summary>Pause</summary><div>\
             <button type=\"button\" data-act=\"pause\" data-body=\"{{&quot;subject&quot;:&quot;all&quot;,&quot;for&quot;:&quot;10m&quot;}}\">For 10 minutes</button>\
             <button type=\"button\" data-act=\"pause\" data-body=\"{{&quot;subject&quot;:&quot;all&quot;,&quot;for&quot;:&quot;1h&quot;}}\">For 1 hour</button>\
             <button type=\"button\" data-act=\"pause\" data-body=\"{{&quot;subject&quot;:&quot;all&quot;}}\" data-morning>Until tomorrow, 8:00</button>\
             <button type=\"button\" data-act=\"pause\" data-body=\"{{&quot;subject&quot;:&quot;all&quot;}}\">Until I resume</button></div></details>"
        );
    }
    let others: Vec<_> = status
        .pauses
        .iter()
        .filter(|pause| pause.subject != "all")
        .collect();
    if !others.is_empty() {
        put!(out, "<ul class=\"pauses\">");
        for pause in others {
            put!(out, "<li>{} paused ", Shown(bare(pause)));
            until(out, pause.until);
            put!(
                out,
                " {}</li>",
                resume(&pause.subject, "Resume", bare(pause))
            );
        }
        put!(out, "</ul>");
    }
    put!(
        out,
        "<noscript><p>JavaScript is off, so this page shows how things were at {} and has no buttons. \
         The commands do the same: <code>export-service pause --for 1h</code>, <code>resume</code>, \
         <code>retry</code>, <code>cancel</code>, <code>show</code>, <code>forget</code>, <code>label</code>, \
         <code>seen</code>.</p></noscript></header>",
        Time(status.now)
    );
}

/// What a pause is about, as its owner would type it.
fn bare(pause: &Pause) -> &str {
    pause
        .subject
        .split_once(':')
        .map_or(&pause.subject, |(_, name)| name)
}

fn until(out: &mut String, until: Option<i64>) {
    match until {
        Some(until) => put!(out, "until {}", Time(until)),
        None => put!(out, "until you resume"),
    }
}

pub fn resume<'a>(subject: &str, words: &'a str, about: &'a str) -> Button<'a> {
    Button {
        words,
        about,
        act: "resume",
        body: json!({"subject": subject}),
        ask: None,
    }
}

/// What needs the owner's attention.
pub fn attention(out: &mut String, view: &View<'_>) {
    let status = view.status;
    put!(
        out,
        "<section id=\"attention\" aria-labelledby=\"attention-h\"><h2 id=\"attention-h\">Needs attention</h2>"
    );
    if !status.attention.is_empty() {
        put!(out, "<ul id=\"todo\">");
        for item in &status.attention {
            put!(out, "<li><span>{}</span> ", Sentence(&item.text));
            if let Some(act) = &item.act {
                let button = Button {
                    words: &act.label,
                    about: &item.text,
                    act: &act.act,
                    body: act.body.clone(),
                    ask: None,
                };
                put!(out, "{button}");
            }
            put!(out, "</li>");
        }
        put!(out, "</ul>");
    } else if is_fresh(view) {
        put!(out, "<p class=\"fine\">Nothing has left this box yet.</p>");
    } else if status.state == Activity::Paused {
        put!(
            out,
            "<p>Nothing leaves, since you have paused everything. {} waiting.</p>",
            count(status.waiting, "export is", "exports are")
        );
    } else if status.waiting > 0 {
        put!(
            out,
            "<p class=\"fine\">Nothing. {} on the way.</p>",
            count(status.waiting, "export is", "exports are")
        );
    } else {
        put!(
            out,
            "<p class=\"fine\">Everything that was to leave has left.</p>"
        );
    }
    put!(out, "</section>");
}

pub fn count(number: u64, one: &str, many: &str) -> String {
    format!(
        "{} {}",
        Number(number),
        if number == 1 { one } else { many }
    )
}

/// How to send the first export.
pub fn first_steps(out: &mut String, view: &View<'_>) {
    let url = Attribute(view.apps_url);
    // Verifying is not left out: the certificate of a box at home has a name that curl is to be told.
    put!(
        out,
        "<section id=\"first\" aria-labelledby=\"first-h\"><h2 id=\"first-h\">Send a first export</h2>\
         <p>With the secret in <code>EXPORT_SECRET</code>, on this machine:</p>\
         <div class=\"wide\" role=\"region\" tabindex=\"0\" aria-label=\"Commands\"><pre>\
         export-service sink &amp;\n\
         TOKEN=$(export-service token --destination http://127.0.0.1:9090/in --path '*' --expires 1h)\n\
         curl -u \"$TOKEN:\" {url}/lp/export -d '{{&quot;uri&quot;:&quot;http://127.0.0.1:9090/in&quot;,\
         &quot;data&quot;:{{&quot;celsius&quot;:21.5}}}}'</pre></div>\
         <p>It appears below as soon as it has left. If it is refused or does not arrive, curl and this page say \
         why; <code>127.0.0.1</code> is a private address, which has to be allowed with \
         <code>--allow-network 127.0.0.1/32</code>.</p></section>"
    );
}

/// What has left today, beside a usual day.
pub fn today(out: &mut String, view: &View<'_>) {
    let (today, usual) = (&view.status.today, &view.status.usual);
    put!(
        out,
        "<section id=\"today\" aria-labelledby=\"today-h\"><h2 id=\"today-h\">Today</h2><dl class=\"tiles\">"
    );
    // On the first day there is nothing to compare with.
    let is_first = *usual == Totals::default();
    let mut tile = |words: &str, value: &str, usual: &str, new: usize| {
        put!(out, "<div><dt>{words}</dt><dd>{value}");
        if new > 0 {
            put!(out, " <b class=\"new\">{new} new</b>");
        }
        if !is_first {
            put!(out, " <small>usually {usual}</small>");
        }
        put!(out, "</dd></div>");
    };
    let bytes = |bytes| Bytes(bytes).to_string();
    tile(
        "left the box",
        &bytes(today.bytes_out),
        &bytes(usual.bytes_out),
        0,
    );
    let new = view.status.new_destinations.len();
    for (words, value, usual, new) in [
        ("exports delivered", today.delivered, usual.delivered, 0),
        ("destinations", today.destinations, usual.destinations, new),
        ("failed", today.failed, usual.failed, 0),
        ("refused", today.refused, usual.refused, 0),
    ] {
        tile(
            words,
            &Number(value).to_string(),
            &Number(usual).to_string(),
            new,
        );
    }
    put!(out, "</dl></section>");
}

/// A `who`, with the owner's own name for it first.
pub fn who(out: &mut String, who: &str, label: Option<&str>) {
    match label {
        Some(label) => put!(out, "<b>{}</b> <small>{}</small>", Shown(label), Shown(who)),
        None => put!(out, "{}", Shown(who)),
    }
}

/// What was refused, and what to do about it.
pub fn refused(out: &mut String, view: &View<'_>) {
    put!(
        out,
        "<section id=\"refused\" aria-labelledby=\"refused-h\"><h2 id=\"refused-h\">Refused in the last 7 days</h2>"
    );
    if view.refusals.is_empty() {
        put!(
            out,
            "<p class=\"quiet\">No request was refused.</p></section>"
        );
        return;
    }
    put!(
        out,
        "<table class=\"cards\"><caption class=\"hidden\">Requests that were refused, by reason and sender</caption>\
         <thead><tr><th scope=\"col\">Sender</th><th scope=\"col\">Reason</th>\
         <th scope=\"col\" class=\"n\">Requests</th><th scope=\"col\">Last</th><th scope=\"col\">What to do</th>\
         </tr></thead><tbody>"
    );
    for refusal in view.refusals {
        put!(out, "<tr><th scope=\"row\">");
        if refusal.who.is_empty() {
            put!(out, "others");
        } else {
            who(out, &refusal.who, refusal.label.as_deref());
        }
        put!(
            out,
            "</th><td><code>{}</code></td><td class=\"n\">{}</td><td>{} ago</td><td>{}</td></tr>",
            Shown(&refusal.reason),
            Number(refusal.count),
            Span(view.status.now.saturating_sub(refusal.last_at) as f64 / 1000.0),
            remedy(&refusal.reason)
        );
    }
    put!(out, "</tbody></table></section>");
}

/// What the owner can do about requests that are refused with this code.
fn remedy(code: &str) -> &'static str {
    match code {
        "unauthorized" => {
            "Its token does not allow this: <code>export-service check --token TOKEN URL</code> says which \
             caveat fails. If you do not know the sender, find out what runs there."
        }
        "no_secret" => "Tokens cannot be checked yet: see Secret, below.",
        "too_many_pending" | "overloaded" => {
            "The app sends faster than its destination takes it: see what waits, above."
        }
        "store_full" => {
            "The store is full: see what waits, above; cancel it, or raise <code>--max-store</code>."
        }
        "disk_full" => "The disk is full: make room on it.",
        "storage_failed" => "The store could not be written: the log says why.",
        "too_large" | "head_too_large" => {
            "The app sends more at a time than is allowed: it has to send less, or you raise \
             <code>--max-body</code>."
        }
        "no_such_export" => {
            "The app asks for an export that has expired or is another's: nothing to do."
        }
        "idempotency_conflict" => {
            "The app uses one Idempotency-Key for different data: tell its author."
        }
        "busy" | "stopping" | "unanswered" | "too_slow" | "incomplete" => {
            "The app will try again. If there are many, it opens too many connections, or its network is slow."
        }
        _ => "The app does not speak as the service expects: tell its author this code.",
    }
}

/// The state of the service itself.
pub fn health(out: &mut String, view: &View<'_>) {
    let status = view.status;
    put!(
        out,
        "<section id=\"health\" aria-labelledby=\"health-h\"><h2 id=\"health-h\">Health</h2><dl class=\"facts\">\
         <div><dt>Certificate</dt><dd>"
    );
    match status.certificate.expires_at {
        None => put!(out, "none: apps talk to the service over plain HTTP"),
        Some(at) if at <= status.now => put!(
            out,
            "<span class=\"state bad\">expired {}</span>: renew it, then send SIGHUP",
            Time(at)
        ),
        Some(at) if at - status.now < CERTIFICATE_WARNING => put!(
            out,
            "<span class=\"state bad\">expires {}</span>: renew it, then send SIGHUP",
            Time(at)
        ),
        Some(at) => put!(out, "good until {}", Time(at)),
    }
    put!(out, "</dd></div><div><dt>Secret</dt><dd>");
    match (status.secret.ready, &status.secret.reason) {
        (true, _) => put!(out, "there: apps’ tokens can be checked"),
        (false, Some(reason)) => put!(
            out,
            "<span class=\"state bad\">missing</span>, since {}",
            Sentence(reason)
        ),
        (false, None) => put!(out, "<span class=\"state bad\">missing</span>"),
    }
    put!(
        out,
        "</dd></div><div><dt>Store</dt><dd>{}",
        Bytes(status.store.bytes)
    );
    if let Some(limit) = status.store.limit {
        put!(out, " of {}", Bytes(limit));
    }
    put!(
        out,
        ", of that the ledger {}",
        Bytes(status.store.ledger_bytes)
    );
    if status.store.ledger_limit > 0 {
        put!(out, " of {}", Bytes(status.store.ledger_limit));
    }
    put!(out, "</dd></div><div><dt>Disk</dt><dd>");
    match status.disk_free {
        Some(free) => put!(out, "{} free", Bytes(free)),
        None => put!(out, "its free space is not known"),
    }
    put!(
        out,
        "</dd></div><div><dt>Ledger</dt><dd>{}",
        count(status.ledger.rows, "row", "rows")
    );
    if let Some(at) = status.ledger.first_at {
        put!(out, " since {}", Time(at));
    }
    if let Some(head) = &status.ledger.head {
        put!(
            out,
            ", head <code id=\"head\" data-seq=\"{}\" data-hash=\"{}\">{}:{}</code> <span id=\"remembered\"></span>",
            head.seq,
            Attribute(&head.hash),
            head.seq,
            Attribute(&head.hash)
        );
    }
    put!(
        out,
        "</dd></div><div><dt>Version</dt><dd>{}</dd></div></dl></section>",
        Attribute(&status.version)
    );
}

/// What the page cannot show.
pub fn limits(out: &mut String) {
    put!(
        out,
        "<footer><h2>What this page cannot show</h2><p>What was in an export that has left: only its size and a \
         digest are kept. What leaves by any other way than this service. What a destination does with what it \
         got. Rows that whoever is root on this box never let be written, or has rewritten since a head that you \
         remember: <code>export-service ledger --verify</code> finds the rest.</p></footer>"
    );
}
