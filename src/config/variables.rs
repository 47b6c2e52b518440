//! Finds variables that look like settings and are none; pure. A misspelt one would be ignored without a word.
//!
//! Not here: the names of the variables, which are in the declarations of the settings ([`super`]).

use std::ffi::{OsStr, OsString};

use clap::{Arg, Command};

/// How the variables of this program begin, but for those that a Databox sets.
const PREFIX: &str = "EXPORT_";
/// Variables that are this or begin with it and a `_` are not settings: scripts read them, and Docker and Kubernetes
/// set such ones for a service of this name.
const OTHERS: &str = "EXPORT_SERVICE";

/// The names among these that look like settings of this program and are none, each with what may have been meant.
/// None if there are no such names.
pub fn unknown(command: &Command, names: impl Iterator<Item = OsString>) -> Option<String> {
    let settings = settings(command);
    let is_known = |name: &OsStr| {
        settings
            .iter()
            .any(|setting| setting.get_env() == Some(name))
    };
    let mut unknown: Vec<_> = names
        .filter(|name| !is_known(name))
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| name.starts_with(PREFIX))
        .filter(|name| {
            let rest = name.strip_prefix(OTHERS);
            !rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        })
        .collect();
    unknown.sort();
    let shown = unknown.iter().map(|name| {
        let shown = name.escape_debug();
        match nearest(name, &settings) {
            Some(meant) => format!("{shown} (did you mean {meant}?)"),
            None => shown.to_string(),
        }
    });
    let shown = shown.collect::<Vec<_>>().join(", ");
    (!shown.is_empty()).then_some(shown)
}

/// All settings that have a variable, those of subcommands too.
pub fn settings(command: &Command) -> Vec<&Arg> {
    let own = command
        .get_arguments()
        .filter(|argument| argument.get_env().is_some());
    let below = command.get_subcommands().flat_map(settings);
    own.chain(below).collect()
}

/// The variable whose name is nearly this one, or whose flag is: `EXPORT_PORT` means that of `--port`.
fn nearest(name: &str, settings: &[&Arg]) -> Option<String> {
    let name = name.strip_prefix(PREFIX)?;
    let visible = settings.iter().filter(|setting| !setting.is_hide_set());
    let near = visible.filter_map(|setting| {
        let variable = setting.get_env()?.to_str()?;
        let flag = setting
            .get_long()
            .map(|flag| flag.replace('-', "_").to_uppercase());
        let spellings = [variable.strip_prefix(PREFIX).map(str::to_owned), flag];
        let distances = spellings.iter().flatten().filter_map(|known| {
            let distance = distance(name.as_bytes(), known.as_bytes());
            let begins =
                !name.is_empty() && (known.starts_with(name) || name.starts_with(known.as_str()));
            (begins || distance <= (known.len() / 3).max(2)).then_some(distance)
        });
        distances.min().map(|distance| (distance, variable))
    });
    near.min().map(|(_, variable)| variable.to_owned())
}

/// How many characters have to be inserted, deleted or replaced to make one text of the other (Levenshtein).
fn distance(one: &[u8], other: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (at, byte) in one.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = at + 1;
        for (to, known) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(byte != known);
            diagonal = row[to + 1];
            row[to + 1] = replaced.min(row[to] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Cli;
    use clap::CommandFactory;
    use proptest::prelude::*;

    fn told(names: &[&str]) -> Option<String> {
        unknown(&Cli::command(), names.iter().map(OsString::from))
    }

    #[test]
    fn a_variable_that_is_nearly_a_setting_is_told_with_the_one_that_was_meant() {
        for (name, meant) in [
            ("EXPORT_ALLOW_NETWORK", "EXPORT_ALLOW_NETWORKS"),
            ("EXPORT_ALLOWED_NETWORKS", "EXPORT_ALLOW_NETWORKS"),
            ("EXPORT_SECERT", "EXPORT_SECRET"),
            ("EXPORT_SECRETS", "EXPORT_SECRET"),
            ("EXPORT_BNID", "EXPORT_BIND"),
            ("EXPORT_DATA", "EXPORT_DATA_DIR"),
            ("EXPORT_DATADIR", "EXPORT_DATA_DIR"),
            ("EXPORT_RETRY", "EXPORT_RETRY_ON"),
            ("EXPORT_MAX_BODY_SIZE", "EXPORT_MAX_BODY"),
            (
                "EXPORT_MAX_CONNECTIONS_PEER",
                "EXPORT_MAX_CONNECTIONS_PER_PEER",
            ),
            ("EXPORT_MAX_RESPONSES", "EXPORT_MAX_RESPONSE"),
            ("EXPORT_ADMIN_HOSTS", "EXPORT_ADMIN_HOST"),
            ("EXPORT_PORT", "DATABOX_LOCAL_PORT"),
            ("EXPORT_NAME", "DATABOX_LOCAL_NAME"),
            ("EXPORT_ARBITER", "DATABOX_ARBITER_ENDPOINT"),
        ] {
            assert_eq!(
                told(&[name]).unwrap(),
                format!("{name} (did you mean {meant}?)")
            );
        }
        let several = told(&[
            "EXPORT_TEA\u{1b}POT",
            "EXPORT_COFFEE",
            "PATH",
            "EXPORT_TOKEN",
        ]);
        assert_eq!(several.unwrap(), "EXPORT_COFFEE, EXPORT_TEA\\u{1b}POT");
    }

    #[test]
    fn settings_and_what_others_read_are_no_mistakes() {
        let names = [
            "EXPORT_SECRET",
            "EXPORT_TOKEN",
            "EXPORT_MAX_RELIEVED",
            "DATABOX_LOCAL_PORT",
            "DATABOX_ANYTHING",
            "EXPORT_SERVICE",
            "EXPORT_SERVICE_BIN",
            "EXPORT_SERVICE_PORT_8080_TCP",
            "EXPORTED",
            "HOME",
        ];
        assert_eq!(told(&names), None);
        assert_eq!(
            told(&["EXPORT_SERVICES", "EXPORT_"]).unwrap(),
            "EXPORT_, EXPORT_SERVICES"
        );
    }

    proptest! {
        #[test]
        fn a_distance_is_that_of_the_plain_definition(one in "[ab]{0,6}", other in "[abc]{0,6}") {
            fn plain(one: &[u8], other: &[u8]) -> usize {
                let (Some((first, one_rest)), Some((second, other_rest))) = (one.split_first(), other.split_first())
                else {
                    return one.len().max(other.len());
                };
                let replaced = plain(one_rest, other_rest) + usize::from(first != second);
                replaced.min(plain(one_rest, other) + 1).min(plain(one, other_rest) + 1)
            }
            let (one, other) = (one.as_bytes(), other.as_bytes());
            prop_assert_eq!(distance(one, other), plain(one, other));
        }
    }
}
