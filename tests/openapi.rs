//! `tests/openapi/openapi.yaml`, the description of both ports, is true: schemathesis makes requests of it to the real
//! program, and the source has no path and no error code that it leaves out.
//!
//! `scripts/test` installs schemathesis. For a longer run with other requests:
//! `EXPORT_SCHEMATHESIS='--max-examples 1000 --seed 7' cargo test --test openapi`.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use support::{Destination, Reaction, Service, command, nowhere, payload, python, root, token};

/// Requests that are made up for each operation.
const EXAMPLES: &str = "15";
/// Exports that wait when schemathesis begins, for polls and for the owner's acts.
const WAITING: usize = 20;

fn description() -> Value {
    let printed = python()
        .arg(root().join("tests/openapi/description.py"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(printed.status.success());
    serde_json::from_slice(&printed.stdout).unwrap()
}

/// A service with exports that wait, others that were answered in every way, and an owner's port.
struct Tested {
    service: Service,
    destination: Destination,
    dead: String,
    waiting: Vec<String>,
}

impl Tested {
    fn start() -> Self {
        let answered = AtomicUsize::new(0);
        let destination =
            Destination::start(
                move |arrival| match answered.fetch_add(1, Ordering::Relaxed) % 4 {
                    0 => Reaction::Answer(500, b"\xff\xfe".to_vec()),
                    1 => Reaction::Answer(204, Vec::new()),
                    2 => Reaction::Answer(200, vec![b'x'; 100]),
                    _ => Reaction::Answer(200, arrival.body.clone()),
                },
            );
        let service = Service::start(&["--admin", "127.0.0.1:0", "--max-response", "64"]);
        let (dead, _) = nowhere();
        let waiting = (0..WAITING).map(|number| service.submit(&dead, &payload(number)));
        let waiting = waiting.collect();
        Self {
            service,
            destination,
            dead,
            waiting,
        }
    }

    /// Runs schemathesis on the operations of one port. A failure is told with the requests that show it.
    fn holds(&self, port: &str, address: &str, header: &str, phases: &str) {
        let more = std::env::var("EXPORT_SCHEMATHESIS").unwrap_or_default();
        let folder = root().join("tests/openapi");
        let live = &self.destination.url;
        let tokens = json!({ live: token(live), &self.dead: token(&self.dead) });
        let run = python()
            .args(["-m", "schemathesis.cli", "--config-file"])
            .arg(folder.join("schemathesis.toml"))
            .args(["run", "--no-color", "--url", &format!("http://{address}")])
            .args(["--include-tag", port, "--phases", phases, "-H", header])
            .args(["--max-examples", EXAMPLES])
            // The last of several counts.
            .args(more.split_whitespace())
            .arg(folder.join("openapi.yaml"))
            // Where it would look for files of its own.
            .current_dir(self.service.folder())
            .env("SCHEMATHESIS_HOOKS", "hooks")
            .env("PYTHONPATH", &folder)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("EXPORT_TOKENS", tokens.to_string())
            .env("EXPORT_IDS", self.waiting.join(" "))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&run.stdout);
        let errors = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{told}{errors}");
    }
}

#[test]
fn every_answer_of_the_apps_port_is_as_described() {
    let tested = Tested::start();
    let address = tested.service.address.to_string();
    let header = format!("X-Api-Key: {}", token(&tested.destination.url));
    tested.holds(
        "apps",
        &address,
        &header,
        "examples,coverage,fuzzing,stateful",
    );
}

#[test]
fn every_answer_of_the_owners_port_is_as_described() {
    let tested = Tested::start();
    let listening = tested.service.event("listening for the owner", |_| true);
    let link = command()
        .args(["link", "--data-dir"])
        .arg(tested.service.folder())
        .output()
        .unwrap();
    let link = String::from_utf8(link.stdout).unwrap();
    let header = format!("Authorization: Bearer {}", link.lines().last().unwrap());
    let address = listening["address"].as_str().unwrap();
    tested.holds("owner", address, &header, "examples,coverage,fuzzing");
}

/// The text of all files of the program, without their own tests.
fn source() -> String {
    fn files(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => files(&path, found),
                false if path.extension().is_some_and(|end| end == "rs") => found.push(path),
                false => {}
            }
        }
    }
    let mut found = Vec::new();
    files(&root().join("src"), &mut found);
    let texts = found.iter().map(|file| {
        let text = fs::read_to_string(file).unwrap();
        let own_tests = text.find("#[cfg(test)]").unwrap_or(text.len());
        text[..own_tests].to_owned()
    });
    texts.collect()
}

/// The text of a function, up to the next line that is a closing brace as far in as the function begins.
fn function<'a>(text: &'a str, head: &str) -> &'a str {
    let at = text.find(head).unwrap_or_else(|| panic!("no {head}"));
    let indent = text[..at].rsplit('\n').next().unwrap();
    let end = text[at..].find(&format!("\n{indent}}}")).unwrap();
    &text[at..at + end]
}

/// The words in quotes.
fn quoted(text: &str) -> BTreeSet<String> {
    let words = text.split('"').skip(1).step_by(2);
    words.map(str::to_owned).collect()
}

/// The values of all lists of `code`s, and those of `kind`s or others by their key, anywhere in a description.
fn listed(node: &Value, key: &str, found: &mut BTreeSet<String>) {
    if let Some(words) = node[key]["enum"].as_array() {
        found.extend(words.iter().map(|word| word.as_str().unwrap().to_owned()));
    }
    match node {
        Value::Object(members) => members.values().for_each(|item| listed(item, key, found)),
        Value::Array(items) => items.iter().for_each(|item| listed(item, key, found)),
        _ => {}
    }
}

fn words_of(node: &Value, key: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    listed(node, key, &mut found);
    found
}

#[test]
fn every_error_code_of_the_source_is_described_with_its_status() {
    let description = description();
    let responses = description["components"]["responses"].as_object().unwrap();
    let mut described = BTreeSet::new();
    for name in ["NoSuchPath", "MethodNotAllowed"] {
        let status = if name == "NoSuchPath" { "404" } else { "405" };
        for code in words_of(&responses[name], "code") {
            described.insert((status.to_owned(), code));
        }
    }
    for (_, path) in description["paths"].as_object().unwrap() {
        for operation in ["get", "post"].iter().filter_map(|method| path.get(method)) {
            for (status, response) in operation["responses"].as_object().unwrap() {
                let name = response["$ref"]
                    .as_str()
                    .map(|name| name.rsplit('/').next().unwrap());
                let response = name.map_or(response, |name| &responses[name]);
                for code in words_of(response, "code") {
                    described.insert((status.clone(), code));
                }
            }
        }
    }
    // `(404, "no_such_path")` and `error_body("malformed", …)`, however they are broken into lines.
    let source = source();
    let mut pieces: Vec<_> = source.split('(').collect();
    pieces.retain(|piece| piece.trim_start().starts_with(['4', '5']));
    let written = pieces.iter().filter_map(|piece| {
        let (status, rest) = piece.split_once(',')?;
        let status = status.trim();
        let code = rest.trim_start().strip_prefix('"')?.split('"').next()?;
        let is_code = code
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        let is_status = status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit());
        (is_status && is_code).then(|| (status.to_owned(), code.to_owned()))
    });
    let mut written: BTreeSet<_> = written.collect();
    let direct = source.split("error_body(\"").skip(1);
    let direct: BTreeSet<_> = direct.map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(direct, BTreeSet::from(["malformed", "storage_failed"]));
    assert!(written.len() > 30, "{written:?}");
    // What `/readyz` says in words.
    written.remove(&("503".to_owned(), "waiting".to_owned()));
    assert_eq!(described, written);
}

#[test]
fn every_path_of_the_source_is_described_and_no_other() {
    let description = description();
    let described: BTreeSet<_> = description["paths"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    let read = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let apps = read("src/routes.rs");
    let owner = read("src/owner/routes.rs");
    let acts = read("src/exports/acts/mod.rs");
    let mut written = quoted(function(&apps, "pub fn command("));
    written.extend(quoted(function(&owner, "fn answer(")));
    written.retain(|word| word.starts_with('/') && word != "/api/");
    let names = acts.split_once("pub const NAMES: ").unwrap().1;
    let names = quoted(names.split(';').nth(1).unwrap());
    written.extend(names.iter().map(|name| format!("/api/{name}")));
    assert_eq!(described, written);
}

#[test]
fn every_kind_of_failure_and_every_event_of_the_ledger_is_described() {
    let description = description();
    let schemas = &description["components"]["schemas"];
    let read = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let attempt = read("src/delivery/attempt.rs");
    let mut kinds = quoted(function(&attempt, "pub fn name(self)"));
    kinds.insert("status".to_owned());
    let mut of_pending = kinds.clone();
    of_pending.insert("paused".to_owned());
    assert_eq!(words_of(&schemas["LastError"], "kind"), of_pending);
    kinds.extend(["bad_uri", "cancelled"].map(str::to_owned));
    assert_eq!(words_of(&schemas["Result"], "kind"), kinds);
    let ledger = read("src/ledger.rs");
    let events = quoted(function(&ledger, "pub fn name(self)"));
    assert_eq!(words_of(&schemas["Row"], "event"), events);
}
