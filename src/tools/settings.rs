//! `serve --check`: the settings in force, and where each comes from.
//!
//! Not here: whether they can work ([`crate::config`]).

use std::fmt::Write as _;
use std::path::Path;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

use crate::config::{Config, SecretSource};

/// A table of all settings of a command. Of secrets only whether they are set.
pub fn settings(command: &Command, matches: &ArgMatches, config: &Config) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str, source: &str| {
        // Writing to a String cannot fail.
        let line = format!("{name:<28} {value:<28} {source}");
        let _ = writeln!(text, "{}", line.trim_end());
    };
    for argument in command.get_arguments() {
        let id = argument.get_id().as_str();
        let (Some(flag), false) = (argument.get_long(), argument.is_hide_set()) else {
            continue;
        };
        if matches!(flag, "help" | "version" | "check") {
            continue;
        }
        let values = matches.get_raw(id).into_iter().flatten();
        let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
        let value = values.join(",");
        let value = match value.as_str() {
            "" => "-".to_owned(),
            _ if argument.is_hide_env_values_set() => "set".to_owned(),
            // A value may hold anything.
            value => value.escape_debug().to_string(),
        };
        let variable = argument.get_env().unwrap_or_default().to_string_lossy();
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => format!("--{flag}"),
            Some(ValueSource::EnvVariable) => variable.into_owned(),
            _ => "default".to_owned(),
        };
        row(&format!("--{flag}"), &value, &source);
    }
    let secret = match config.secret {
        SecretSource::Given(_) => "given",
        SecretSource::Arbiter(_) => "asked from the arbiter",
    };
    row("macaroon secret", secret, "");
    let identity = config.connections.identity.as_ref();
    let file = identity.map(|identity| identity.path().as_path());
    let file = file.map_or("none: plain HTTP".into(), Path::to_string_lossy);
    row("certificate", &file, "");
    text
}
