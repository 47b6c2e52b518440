//! README is in step with the code: errors, kinds of failure, metrics, the ledger, and its links.
//!
//! Not here: settings (tests/operating.rs), promises (tests/promises.rs), Prometheus (tests/metrics.rs), and what
//! can be run (tests/walk.rs).

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use export_service::metrics::{Gauges, Metrics};
use support::{Service, root};

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// The section with this heading, up to the next one that is not below it.
fn section(heading: &str) -> String {
    let level = heading.split(' ').next().unwrap();
    let readme = readme();
    let (_, rest) = readme
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("README has no {heading}"));
    let below = |line: &&str| match line.split(' ').next() {
        Some(word) => !word.starts_with('#') || word.len() > level.len(),
        None => true,
    };
    rest.lines()
        .take_while(below)
        .collect::<Vec<_>>()
        .join("\n")
}

/// The cells of the rows of all tables of a section, without heads.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let section = section(heading);
    let lines: Vec<_> = section.lines().collect();
    let is_head = |at: usize| {
        lines
            .get(at + 1)
            .is_some_and(|next| next.starts_with("|---"))
    };
    let rows = lines
        .iter()
        .enumerate()
        .filter(|(at, line)| line.starts_with("| ") && !is_head(*at));
    rows.map(|(_, line)| {
        let line = line.trim_matches(['|', ' ']);
        line.split(" | ").map(str::to_owned).collect()
    })
    .collect()
}

/// What stands between backticks.
fn codes(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The pairs of status and code that a source file gives out.
fn given_out(file: &str) -> BTreeSet<(String, String)> {
    let source = fs::read_to_string(root().join(file)).unwrap();
    let source = source.split("#[cfg(test)]").next().unwrap();
    let pairs = source.split("=> (").skip(1).filter_map(|rest| {
        let (status, rest) = rest.split_once(", \"")?;
        let (code, _) = rest.split_once('"')?;
        status.parse::<u16>().ok()?;
        Some((status.to_owned(), code.to_owned()))
    });
    pairs.collect()
}

/// The pairs of status and code in the table of a section.
fn told(heading: &str) -> BTreeSet<(String, String)> {
    let rows = rows(heading);
    let rows = rows.iter().filter(|row| row[0].parse::<u16>().is_ok());
    rows.flat_map(|row| codes(&row[1]).map(|code| (row[0].clone(), code.to_owned())))
        .collect()
}

#[test]
fn every_error_of_the_apps_port_is_in_readme_with_its_status_and_no_other() {
    let given_out = given_out("src/answer.rs");
    assert!(given_out.len() > 20, "{given_out:?}");
    assert_eq!(told("### Errors"), given_out);
}

#[test]
fn every_error_of_the_owners_port_is_in_readme_with_its_status_and_no_other() {
    let mut all = given_out("src/owner/access.rs");
    all.extend(given_out("src/exports/acts/mod.rs"));
    // Those that routes writes itself.
    let routes = fs::read_to_string(root().join("src/owner/routes.rs")).unwrap();
    for rest in routes.split("error_body(\"").skip(1) {
        let code = rest.split('"').next().unwrap();
        let status = match code {
            "malformed" => "400",
            "storage_failed" => "503",
            _ => panic!("what is the status of {code}?"),
        };
        all.insert((status.into(), code.into()));
    }
    assert_eq!(told("## The owner's port"), all);
}

#[test]
fn every_kind_of_failure_is_in_readme() {
    let source = fs::read_to_string(root().join("src/delivery/attempt.rs")).unwrap();
    let (_, names) = source.split_once("fn name(self)").unwrap();
    let (names, _) = names.split_once("    }\n").unwrap();
    let rows = rows("### When an attempt fails");
    let told: BTreeSet<_> = rows.iter().flat_map(|row| codes(&row[0])).collect();
    for name in names.split('"').skip(1).step_by(2) {
        assert!(told.contains(name), "{name} is not in {told:?}");
    }
}

#[test]
fn every_metric_is_in_readme_with_its_type_labels_and_meaning() {
    let text = Metrics::default().render(&Gauges {
        disk_free: Some(1),
        pending_bytes: Some(1),
        ..Gauges::default()
    });
    let mut wanted = Vec::new();
    for about in text.split("# HELP ").skip(1) {
        let (name, rest) = about.split_once(' ').unwrap();
        let (help, rest) = rest.split_once('\n').unwrap();
        let (kind, samples) = rest.split_once('\n').unwrap();
        let kind = kind.rsplit(' ').next().unwrap();
        let mut labels = BTreeSet::new();
        for sample in samples.lines().filter_map(|line| line.split_once('{')) {
            let inside = sample.1.rsplit_once('}').unwrap().0;
            labels.extend(
                inside
                    .split("\",")
                    .map(|label| label.split('=').next().unwrap()),
            );
        }
        labels.remove("le");
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        let name = name.strip_prefix("export_service_").unwrap_or(name);
        let help = help.strip_suffix('.').unwrap_or(help);
        wanted.push(format!(
            "| `{name}` | {kind} | {} | {help} |",
            labels.join(", ")
        ));
    }
    assert!(wanted.len() > 25);
    let section = section("## Metrics");
    let told: Vec<_> = section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    assert_eq!(told, wanted, "README should have\n{}", wanted.join("\n"));
}

#[test]
fn every_column_and_event_of_the_ledger_is_in_readme_and_no_other() {
    let service = Service::start(&[]);
    let sqlite = Command::new("sqlite3")
        .arg(service.folder().join("exports.db"))
        .arg("SELECT name FROM pragma_table_info('ledger')")
        .output()
        .unwrap();
    let columns = String::from_utf8(sqlite.stdout).unwrap();
    let rows = rows("## What left the box");
    let told: Vec<_> = rows.iter().flat_map(|row| codes(&row[0])).collect();
    assert_eq!(told, columns.lines().collect::<Vec<_>>());

    let source = fs::read_to_string(root().join("src/ledger.rs")).unwrap();
    let (_, names) = source.split_once("pub fn name(self)").unwrap();
    let (names, _) = names.split_once("    }\n").unwrap();
    let events: BTreeSet<_> = names.split('"').skip(1).step_by(2).collect();
    assert!(events.len() > 10);
    let row = rows.iter().find(|row| row[0] == "`event`").unwrap();
    assert_eq!(codes(&row[1]).collect::<BTreeSet<_>>(), events);
}

/// What a heading is linked by.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    heading
        .chars()
        .filter(kept)
        .collect::<String>()
        .replace(' ', "-")
}

#[test]
fn every_link_of_readme_leads_somewhere() {
    let readme = readme();
    let mut in_code = false;
    let mut anchors = BTreeSet::new();
    for line in readme.lines() {
        in_code ^= line.starts_with("```");
        if line.starts_with('#') && !in_code {
            assert!(anchors.insert(anchor(line)), "{line} is there twice");
        }
    }
    let links = readme
        .split("](")
        .skip(1)
        .map(|rest| rest.split(')').next().unwrap());
    let pictures = readme
        .split("src=\"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap());
    let mut dead: Vec<&str> = links
        .chain(pictures)
        .filter(|link| match link.strip_prefix('#') {
            Some(anchor) => !anchors.contains(anchor),
            None if link.starts_with("https://") => false,
            None => !root().join(link.split('#').next().unwrap()).exists(),
        })
        .collect();
    dead.dedup();
    assert!(dead.is_empty(), "{dead:?}");
}
