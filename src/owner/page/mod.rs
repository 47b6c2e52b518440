//! The owner's page: one document with its style and its script in it, rendered whole for each request, so
//! that it is complete without the script. The script asks for the same page every few seconds and changes
//! what differs.
//!
//! Not here: where the values come from, who may see the page, and what its buttons do (`routes`, `access`,
//! `exports`).

mod chart;
mod flows;
mod ledger;
mod query;
mod sections;
mod text;
mod waiting;

use std::sync::OnceLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::report::{Rows, Status};
use crate::exports::store::flows::{Flow, Part, Refusals};
pub use query::{Query, Range};
use text::{Attribute, put};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// What the page shows.
#[derive(Debug)]
pub struct View<'a> {
    /// What the page's address asked for.
    pub query: &'a Query,
    /// The box's name, as the reader's browser calls it.
    pub host: &'a str,
    /// Where apps reach the service, like `http://127.0.0.1:8080`.
    pub apps_url: &'a str,
    /// The state of the service.
    pub status: &'a Status,
    /// What was sent from whom to where in the last 30 days, the largest first; the page shows all of these.
    pub flows: &'a [Flow],
    /// How many there are.
    pub flows_total: u64,
    /// What left in the time that the bars span ([`Range`]), in spans no longer than one bar.
    pub parts: &'a [Part],
    /// What was refused in the last seven days, the most first; the page shows all of these.
    pub refusals: &'a [Refusals],
    /// The rows of the ledger that the query asked for.
    pub rows: &'a Rows,
    /// What is wrong with the query's filters, if anything is.
    pub wrong_filter: Option<&'a str>,
}

/// The page as HTML.
pub fn render(view: &View<'_>) -> String {
    let mut page = String::with_capacity(64 * 1024);
    let out = &mut page;
    put!(
        out,
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">"
    );
    sections::title(out, view);
    put!(
        out,
        "<style>{STYLE}</style></head><body><a class=\"skip\" href=\"#main\">To the content</a>"
    );
    sections::header(out, view);
    put!(
        out,
        "<p id=\"offline\" role=\"alert\"></p><main id=\"main\" tabindex=\"-1\">"
    );
    sections::attention(out, view);
    if is_fresh(view) {
        sections::first_steps(out, view);
    }
    sections::today(out, view);
    chart::section(out, view);
    flows::section(out, view);
    waiting::section(out, view);
    sections::refused(out, view);
    ledger::section(out, view);
    sections::health(out, view);
    sections::limits(out);
    put!(
        out,
        "</main><div id=\"said\" role=\"status\"></div>\
         <dialog id=\"ask\" aria-labelledby=\"ask-text\"><form method=\"dialog\"><p id=\"ask-text\"></p>\
         <pre id=\"ask-body\" tabindex=\"0\" aria-label=\"Payload\"></pre>\
         <p id=\"ask-label\"><label for=\"ask-name\">Name</label> <input type=\"text\" id=\"ask-name\" maxlength=\"60\" \
         autocomplete=\"off\"></p>\
         <p class=\"row\"><button type=\"submit\" id=\"ask-yes\" value=\"yes\">Yes</button> \
         <button type=\"submit\" id=\"ask-no\" value=\"\" formnovalidate>No</button></p></form></dialog>\
         <script>{SCRIPT}</script></body></html>\n"
    );
    page
}

/// The value of `Content-Security-Policy` for the page: nothing is loaded from anywhere, and only its own
/// style and script are applied.
pub fn content_security_policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        let hash = |text: &str| STANDARD.encode(Sha256::digest(text));
        format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; \
             img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; \
             require-trusted-types-for 'script'; trusted-types 'none'",
            hash(STYLE),
            hash(SCRIPT)
        )
    })
}

/// Whether nothing has happened yet.
fn is_fresh(view: &View<'_>) -> bool {
    view.flows.is_empty() && view.status.queues_total == 0
}

/// A button that POSTs an act.
struct Button<'a> {
    /// Its words.
    words: &'a str,
    /// What it is about, for those who do not see where it stands.
    about: &'a str,
    /// The last part of the act's path.
    act: &'a str,
    /// The act's body.
    body: serde_json::Value,
    /// What is asked before, and the words of the button that says yes.
    ask: Option<(String, &'a str)>,
}

impl<'a> Button<'a> {
    /// One whose words say all, and that asks nothing.
    fn plain(words: &'a str, act: &'a str, body: serde_json::Value) -> Self {
        Self {
            words,
            about: "",
            act,
            body,
            ask: None,
        }
    }
}

impl std::fmt::Display for Button<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "<button type=\"button\" data-act=\"{}\" data-body=\"{}\"",
            Attribute(self.act),
            text::Json(&self.body)
        )?;
        if !self.about.is_empty() {
            write!(
                f,
                " aria-label=\"{}: {}\"",
                Attribute(self.words),
                Attribute(self.about)
            )?;
        }
        if let Some((question, yes)) = &self.ask {
            write!(
                f,
                " data-ask=\"{}\" data-yes=\"{}\"",
                text::Sentence(question),
                Attribute(yes)
            )?;
        }
        write!(f, ">{}</button>", Attribute(self.words))
    }
}

/// Opens a menu of more actions.
fn menu(out: &mut String, about: std::fmt::Arguments<'_>) {
    put!(
        out,
        "<details class=\"menu\"><summary aria-label=\"More actions: {about}\">More</summary><div>"
    );
}

/// An id for the row of a `who` and a destination, by which the script finds it again when rows have moved:
/// an open menu must not become that of another row.
fn key(who: &str, destination: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(who);
    // No text holds this byte.
    hash.update([0xff]);
    hash.update(destination);
    let [a, b, c, d, e, f, g, h, ..] = hash.finalize().0;
    format!("{:016x}", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}
