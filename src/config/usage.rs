//! Says what is wrong with a command line in the form of this program's other errors, whose first line tells it all.
//!
//! Says also which variable a refused value came from, since on an installed box all settings are variables.
//!
//! Not here: values that can be read and cannot work ([`super`]).

use std::error::Error as _;
use std::ffi::OsString;

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::variables;

/// What is wrong, without `error:` before it. Of a value that cannot be read: the setting, the value, and what to give.
pub fn explain(error: &clap::Error) -> String {
    of_value(error).unwrap_or_else(|| {
        let text = error.to_string();
        text.strip_prefix("error: ")
            .unwrap_or(&text)
            .trim_end()
            .to_owned()
    })
}

/// Says which variable the setting came from that a message begins with, unless it was given as a flag. `has` tells
/// whether there is a variable of this name.
pub fn with_source(
    message: &str,
    command: &Command,
    arguments: &[OsString],
    has: impl Fn(&str) -> bool,
) -> String {
    let source = || {
        let flag = message.split([' ', ':']).next()?;
        let long = flag.strip_prefix("--")?;
        let settings = variables::settings(command);
        let setting = settings
            .iter()
            .find(|setting| setting.get_long() == Some(long))?;
        let variable = setting.get_env()?.to_str()?;
        let is_given = arguments.iter().any(|argument| {
            let rest = argument
                .to_str()
                .and_then(|argument| argument.strip_prefix(flag));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        });
        (!is_given && has(variable)).then(|| variable.to_owned())
    };
    match source() {
        Some(variable) => format!("{message} (set by {variable})"),
        None => message.to_owned(),
    }
}

/// What is wrong with a value.
fn of_value(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    // Like `--log-format <LOG_FORMAT>`.
    let setting = text(ContextKind::InvalidArg)?;
    let setting = setting.split(' ').next().unwrap_or(setting);
    let value = text(ContextKind::InvalidValue)?;
    let what = match (error.kind(), error.get(ContextKind::ValidValue)) {
        (ErrorKind::ValueValidation, _) => error.source()?.to_string(),
        (ErrorKind::InvalidValue, Some(ContextValue::Strings(valid))) if !valid.is_empty() => {
            format!("give {}", valid.join(" or "))
        }
        _ => return None,
    };
    Some(match value {
        "" => format!("{setting} is empty: {what}"),
        // A value may hold anything.
        value => format!("{setting} {}: {what}", value.escape_debug()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Cli;
    use clap::{CommandFactory, Parser};

    fn explained(arguments: &[&str]) -> String {
        let arguments = ["export-service"].iter().chain(arguments);
        explain(&Cli::try_parse_from(arguments).err().unwrap())
    }

    #[test]
    fn a_value_that_cannot_be_read_is_named_with_what_to_give() {
        for (arguments, message) in [
            (
                ["--retention", "soon"],
                "--retention soon: give a time with its unit, like 30s, 15m, 24h or 7d",
            ),
            (
                ["--retention", ""],
                "--retention is empty: give a time with its unit, like 30s, 15m, 24h or 7d",
            ),
            (
                ["--port", "70000"],
                "--port 70000: give a port from 0 to 65535",
            ),
            (
                ["--max-body", "1.5M"],
                "--max-body 1.5M: give bytes, as a whole number or like 64KiB or 1M",
            ),
            (["--threads", "many"], "--threads many: give a whole number"),
            (
                ["--log-format", "x\u{1b}"],
                "--log-format x\\u{1b}: give text or json",
            ),
            (
                ["--log-format", ""],
                "--log-format is empty: give text or json",
            ),
            (
                ["--bind", "box.lan"],
                "--bind box.lan: give localhost or another IP address of this machine, or 0.0.0.0 to be reached \
                 from others",
            ),
        ] {
            assert_eq!(explained(&arguments), message);
        }
    }

    #[test]
    fn a_value_is_told_with_the_variable_that_gave_it_unless_a_flag_did() {
        let told = |message: &str, arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            let has = |name: &str| name == "EXPORT_RETENTION" || name == "DATABOX_LOCAL_PORT";
            with_source(message, &Cli::command(), &arguments, has)
        };
        for message in [
            "--retention soon: give",
            "--retention is 0, so",
            "--retention is empty: give",
        ] {
            assert_eq!(
                told(message, &["--retry-on", "503"]),
                format!("{message} (set by EXPORT_RETENTION)")
            );
            assert_eq!(told(message, &["--retention", "soon"]), message);
            assert_eq!(told(message, &["--retention=soon"]), message);
        }
        assert_eq!(
            told("--port http: give", &[]),
            "--port http: give (set by DATABOX_LOCAL_PORT)"
        );
        for message in [
            "--bind box: give",
            "the macaroon secret is empty",
            "--nope",
            "",
            "--",
        ] {
            assert_eq!(told(message, &[]), message);
        }
    }

    #[test]
    fn what_is_no_matter_of_a_value_is_told_with_the_usage() {
        for (arguments, begins) in [
            (
                vec!["--no-such-flag"],
                "unexpected argument '--no-such-flag' found\n\nUsage: ",
            ),
            (
                vec!["--retention"],
                "a value is required for '--retention <RETENTION>'",
            ),
            (
                vec!["token"],
                "the following required arguments were not provided:\n  --destination",
            ),
            (
                vec!["-q", "-v"],
                "the argument '--quiet...' cannot be used with",
            ),
        ] {
            let message = explained(&arguments);
            assert!(message.starts_with(begins), "{message}");
            assert!(message.ends_with("try '--help'."), "{message}");
        }
    }
}
