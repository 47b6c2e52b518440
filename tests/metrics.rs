//! What the metrics say to Prometheus, and README's alerts.

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use export_service::metrics::{Gauges, Metrics};
use support::root;

/// A program of Prometheus: the one that `scripts/test` has unpacked, or else an installed one.
fn of_prometheus(name: &str) -> Command {
    let unpacked = root().join("target/prometheus/usr/bin").join(name);
    Command::new(if unpacked.exists() {
        unpacked
    } else {
        PathBuf::from(name)
    })
}

/// Everything that it printed, if it succeeded.
fn printed(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

/// What promtool says of these metrics: nothing, if they are as they should be.
fn complaints(metrics: &str) -> String {
    let mut promtool = of_prometheus("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(metrics.as_bytes()).unwrap();
    drop(input);
    printed(&promtool.wait_with_output().unwrap())
}

/// The blocks of YAML in README's section on metrics: the configuration of Prometheus, and its rules.
fn blocks() -> [String; 2] {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let section = readme.split_once("\n### Metrics\n").unwrap().1;
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```yaml\n").skip(1);
    let blocks: Vec<_> = blocks
        .map(|block| block.split_once("```").unwrap().0.to_owned())
        .collect();
    blocks.try_into().unwrap()
}

/// Runs promtool in this folder.
fn promtool(folder: &Path, arguments: &[&str]) -> String {
    let output = of_prometheus("promtool")
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    printed(&output)
}

#[test]
fn promtool_has_nothing_to_say_against_the_metrics() {
    let gauges = Gauges {
        disk_free: Some(1),
        ..Gauges::default()
    };
    let text = Metrics::default().render(&gauges);
    assert_eq!(complaints(&text), "");
}

#[test]
fn the_configuration_and_the_five_alerts_of_readme_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    let [configuration, rules] = blocks();
    let token = folder.path().join("token");
    fs::write(&token, "token").unwrap();
    let credentials = "/etc/prometheus/export-service.token";
    assert!(configuration.contains(credentials));
    let configuration = configuration.replace(credentials, token.to_str().unwrap());
    fs::write(folder.path().join("prometheus.yml"), configuration).unwrap();
    fs::write(folder.path().join("rules.yml"), &rules).unwrap();
    let said = promtool(folder.path(), &["check", "config", "prometheus.yml"]);
    assert!(said.contains("5 rules found"), "{said}");

    let text = Metrics::default().render(&Gauges::default());
    let named = rules.split("export_service_").skip(1).map(|rest| {
        let name: String = rest
            .chars()
            .take_while(|sign| sign.is_ascii_lowercase() || *sign == '_')
            .collect();
        format!("# TYPE export_service_{name} ")
    });
    for metric in named {
        assert!(text.contains(&metric), "{metric}");
    }
}

#[test]
fn the_alerts_are_raised_when_they_should_be_and_not_by_a_fresh_or_paused_service() {
    let folder = tempfile::tempdir().unwrap();
    let [_, rules] = blocks();
    fs::write(folder.path().join("rules.yml"), rules).unwrap();
    let cases = root().join("tests/metrics/alerts.yml");
    fs::copy(cases, folder.path().join("alerts.yml")).unwrap();
    let said = promtool(folder.path(), &["test", "rules", "alerts.yml"]);
    assert!(said.contains("SUCCESS"), "{said}");
}
