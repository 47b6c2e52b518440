//! The owner's page, as a browser shows it. Real Chromium, driven by the scripts in `tests/page/`; they look
//! at the page's accessibility tree as axe does, and at its HTML as html-validate does.
//!
//! `scripts/test` sets up what these need.

mod support;

#[path = "page/examples.rs"]
mod examples;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use export_service::owner::page;
use support::{SECRET, Service, program, root};

/// A script of `tests/page/` under node, with the packages that `scripts/test` has installed.
fn node(script: &str) -> Command {
    let packages = root().join("target/page/node_modules");
    assert!(
        packages.exists(),
        "{} is missing: scripts/test sets it up",
        packages.display()
    );
    let mut command = Command::new("node");
    command
        .arg(root().join("tests/page").join(script))
        .env("NODE_PATH", packages)
        .stdin(Stdio::null());
    command
}

/// Where the screenshots are put, to be looked at.
fn pictures() -> PathBuf {
    let folder = root().join("target/page/pictures");
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

/// The example pages as files, to be looked at in any browser too.
fn examples() -> PathBuf {
    static WRITTEN: OnceLock<PathBuf> = OnceLock::new();
    let written = WRITTEN.get_or_init(|| {
        let folder = root().join("target/page/examples");
        std::fs::create_dir_all(&folder).unwrap();
        for example in examples::all(now()) {
            let file = folder.join(format!("{}.html", example.name));
            std::fs::write(file, example.html()).unwrap();
        }
        folder
    });
    written.clone()
}

#[test]
fn every_state_of_the_page_is_valid_accessible_small_and_runs_nothing_of_anybody_else() {
    let done = node("examples.js")
        .arg(examples())
        .arg(pictures())
        .arg(page::content_security_policy())
        .status()
        .unwrap();
    assert!(done.success());
}

#[test]
fn the_page_keeps_what_its_reader_does_sends_what_its_buttons_say_and_tells_when_it_is_offline() {
    let done = node("behaviour.js")
        .arg(examples())
        .arg(page::content_security_policy())
        .status()
        .unwrap();
    assert!(done.success());
}

#[test]
fn every_act_on_the_page_of_a_real_service_has_its_effect_at_the_destination() {
    let service = Service::start(&["--admin", "127.0.0.1:0"]);
    let listening = service.event("listening for the owner", |_| true);
    let owner = format!("http://{}/", listening["address"].as_str().unwrap());
    let link = Command::new(program())
        .env_clear()
        .arg("link")
        .arg("--data-dir")
        .arg(service.folder())
        .output()
        .unwrap();
    let link = String::from_utf8(link.stdout).unwrap();
    let token = link.lines().last().unwrap();
    let done = node("service.js")
        .arg(program())
        .args([&format!("http://{}", service.address), &owner, token])
        .arg(pictures())
        .env("EXPORT_SECRET", SECRET)
        .status()
        .unwrap();
    assert!(done.success());
}
