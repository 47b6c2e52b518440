//! README's list of promises and their tests is true, and promises that belong to no other theme.

mod support;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::process::Command;

use serde_json::json;
use support::{Destination, MARK, Response, Service, nowhere, ok, payload, program, root, token};

/// Whether a file of tests has one with this name.
fn has_test(text: &str, name: &str) -> bool {
    let definition = format!("fn {name}(");
    text.match_indices(&definition).any(|(at, _)| {
        let mut before = text[..at].lines().rev().map(str::trim);
        // Behind the attribute there may be others, like `ignore`.
        before.by_ref().take(4).any(|line| line == "#[test]")
    })
}

#[test]
fn every_test_that_readme_names_exists() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let section = readme
        .split_once("\n## What it promises and how that is tested\n")
        .unwrap()
        .1;
    let section = section.split("\n## ").next().unwrap();
    let mut files = HashMap::new();
    let (mut named, mut missing) = (0, Vec::new());
    for row in section.lines().filter(|line| line.starts_with("| ")) {
        let [promise, tests] = row
            .trim_matches(['|', ' '])
            .split(" | ")
            .collect::<Vec<_>>()[..]
        else {
            panic!("not a promise and its tests: {row}");
        };
        if promise == "promise" {
            continue;
        }
        // A file, then tests in it, each between backticks.
        let mut file = None;
        for word in tests.split('`').skip(1).step_by(2) {
            if word.ends_with(".rs") {
                file = Some(word);
                continue;
            }
            named += 1;
            let file = file.expect("a test's file comes first");
            let text = files
                .entry(file)
                .or_insert_with(|| fs::read_to_string(root().join(file)).unwrap_or_default());
            if !has_test(text, word) {
                missing.push(format!("{file}: {word}"));
            }
        }
        assert!(file.is_some(), "no test: {row}");
    }
    assert!(named > 100, "only {named} tests are named");
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn what_contributing_and_security_name_exists() {
    for page in ["CONTRIBUTING.md", "SECURITY.md"] {
        let text = fs::read_to_string(root().join(".github").join(page)).unwrap();
        let words: Vec<_> = text.split('`').skip(1).step_by(2).collect();
        for word in &words {
            let is_file = ["src/", "tests/", "scripts/"]
                .iter()
                .any(|top| word.starts_with(top));
            let file = word.split(' ').next().unwrap();
            assert!(!is_file || root().join(file).exists(), "{page}: {word}");
        }
        // Only tests have such names.
        let tests = words.iter().filter(|word| word.matches('_').count() > 4);
        for test in tests {
            let named = words.iter().filter(|word| word.ends_with(".rs"));
            let mut files = named.map(|file| fs::read_to_string(root().join(file)).unwrap());
            assert!(files.any(|file| has_test(&file, test)), "{page}: {test}");
        }
    }
}

#[test]
fn a_proxy_in_the_environment_is_sent_nothing() {
    let proxy = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    proxy.set_nonblocking(true).unwrap();
    let url = format!("http://{}", proxy.local_addr().unwrap());
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];
    let lower = names.map(str::to_ascii_lowercase);
    let variables: Vec<_> = names
        .into_iter()
        .chain(lower.iter().map(String::as_str))
        .map(|name| (name, url.as_str()))
        .collect();
    let destination = Destination::start(|_| ok());
    let service = Service::start_with_variables(&variables);
    let id = service.submit(&destination.url, &payload(1));
    assert_eq!(service.result(&destination.url, &id)["status_code"], 200);
    assert_eq!(destination.arrivals().len(), 1);
    let check = Command::new(program())
        .args(["check", "--allow-network", "127.0.0.0/8", &destination.url])
        .envs(variables)
        .output()
        .unwrap();
    assert!(check.status.success());
    assert!(proxy.accept().is_err(), "the proxy was connected to");
}

#[test]
fn fields_that_are_not_known_are_ignored() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let body = json!({"uri": url, "data": payload(1), "method": "PUT", "more": [{"id": 5}]});
    let answer = service.post("/lp/export", &token(url), &body).json();
    assert_eq!(answer["state"], "Finished");
    let arrival = destination.arrival();
    assert!(arrival.head.starts_with("POST "));
    assert_eq!(arrival.text(), payload(1).to_string());
}

#[test]
fn a_body_that_breaks_off_gets_400_and_is_not_accepted() {
    let destination = Destination::start(|_| ok());
    let service = Service::start(&[]);
    let url = &destination.url;
    let body = json!({"uri": url, "data": payload(1)}).to_string();
    let token = token(url);
    let whole = Service::written("POST", "/export", &[("X-Api-Key", &token)], body.as_bytes());
    let mut stream = service.connect_from([127, 0, 0, 1]);
    stream.write_all(&whole[..whole.len() - 1]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let answer = Response::read(stream);
    assert_eq!((answer.status, answer.code().as_str()), (400, "incomplete"));
    let id = service.submit(url, &payload(2));
    service.result(url, &id);
    let arrivals = destination.arrivals();
    assert_eq!(arrivals.len(), 1);
    assert_eq!(arrivals[0].text(), payload(2).to_string());
}

#[test]
fn a_backup_that_was_made_while_the_service_ran_is_restored_as_readme_says() {
    let (url, address) = nowhere();
    let service = Service::start(&[]);
    let ids: Vec<_> = (0..3)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    let data = service.folder();
    let sqlite = |command: &str| {
        let asked = Command::new("sqlite3")
            .current_dir(&data)
            .args(["exports.db", command])
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&asked.stderr);
        assert!(asked.status.success(), "{errors}");
        String::from_utf8(asked.stdout).unwrap()
    };
    sqlite(".backup copy.db");
    let overview = "SELECT seq, id, destination, status, attempts, owner FROM overview";
    let overview = sqlite(overview);
    for (id, line) in ids.iter().zip(overview.lines()) {
        let shown = line.contains(id) && line.contains(&url) && line.contains("|waiting|");
        assert!(shown && !line.contains(MARK), "{line}");
    }
    assert_eq!(overview.lines().count(), 3);
    // Not in the copy.
    let later = service.submit(&url, &payload(3));
    let service = service.kill_and_restart_after(|| {
        for name in ["exports.db", "exports.db-wal", "exports.db-shm"] {
            let _ = fs::remove_file(data.join(name));
        }
        fs::rename(data.join("copy.db"), data.join("exports.db")).unwrap();
    });
    let destination = Destination::start_at(address, |_| ok());
    for id in &ids {
        assert_eq!(service.result(&url, id)["status_code"], 200);
    }
    assert_eq!(destination.arrivals().len(), 3);
    let poll = service.post("/export", &token(&url), &json!({"id": later}));
    assert_eq!(poll.status, 404);
}
