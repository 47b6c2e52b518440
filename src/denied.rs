//! What keeps the service's user from its data folder or a file there, where that is a matter of owner and mode: as
//! after a restore, a copy or a first start as root.
//!
//! Not here: every other reason why a file cannot be used, which the system's own error tells.

use std::fs::{self, Metadata};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{getegid, geteuid};

use crate::unseen::escaped;

/// Who owns what cannot be used, its mode, the user that this process runs as, and the command that mends it. `path`
/// is the data folder or in it. None if the error is another one, or owner and mode are not its reason. Blocks for
/// looking at the files.
pub fn remedy(folder: &Path, path: &Path, error: &Error) -> Option<String> {
    if error.kind() != ErrorKind::PermissionDenied {
        return None;
    }
    let seen = |at: &Path| fs::metadata(at).ok();
    // What is not there yet, or lies in a folder that cannot be entered, is a matter of the folder above it.
    let (at, metadata) = path.ancestors().find_map(|at| Some((at, seen(at)?)))?;
    let found = Found {
        what: match at == path {
            true => "it".into(),
            false => escaped(&at.display().to_string()),
        },
        owner: metadata.uid(),
        mode: metadata.mode() & 0o7777,
        lacks: lacks(&metadata),
        place: match fs::metadata(folder) {
            Ok(_) if at.starts_with(folder) => Place::Inside,
            Err(error) if error.kind() == ErrorKind::NotFound => Place::Above,
            _ => Place::Elsewhere,
        },
    };
    let user = (geteuid().as_raw(), getegid().as_raw());
    explain(
        &found,
        user,
        &quoted(&folder.display().to_string()),
        &quoted(&at.display().to_string()),
    )
}

/// What was found that denies the access.
struct Found {
    what: String,
    owner: u32,
    mode: u32,
    /// What its owner may not do with it, for `chmod`.
    lacks: Option<&'static str>,
    place: Place,
}

/// Where it is.
enum Place {
    /// It is the data folder, or in it.
    Inside,
    /// It is above the data folder, which does not exist.
    Above,
    /// It is on the way to the data folder.
    Elsewhere,
}

fn lacks(metadata: &Metadata) -> Option<&'static str> {
    let (needed, change) = match metadata.is_dir() {
        true => (0o700, "u+rwx"),
        false => (0o600, "u+rw"),
    };
    (metadata.mode() & needed != needed).then_some(change)
}

fn explain(found: &Found, (user, group): (u32, u32), folder: &str, at: &str) -> Option<String> {
    let Found {
        what,
        owner,
        mode,
        lacks,
        place,
    } = found;
    let mends = match place {
        _ if *owner == user => format!("run `chmod {} {at}`", (*lacks)?),
        Place::Inside => format!("as root, run `chown -R {user}:{group} {folder}`"),
        // Nothing above it is the service's to change.
        Place::Above => format!("as root, run `install -d -m 700 -o {user} -g {group} {folder}`"),
        Place::Elsewhere => "let this user through there".into(),
    };
    let (owner, user) = (name(*owner), name(user));
    Some(format!(
        "{what} belongs to {owner} with mode {mode:03o}, and this service runs as {user}: {mends}"
    ))
}

/// A path as a shell takes it, for a command that somebody may paste.
fn quoted(path: &str) -> String {
    let is_plain = |character: char| character.is_alphanumeric() || "/._-+".contains(character);
    match path.chars().all(is_plain) {
        true => path.to_owned(),
        false => format!("'{}'", escaped(path).replace('\'', r"'\''")),
    }
}

fn name(user: u32) -> String {
    match user {
        0 => "root".into(),
        user => format!("user {user}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_command_is_one_word_for_the_shell() {
        assert_eq!(quoted("/var/lib/export-service"), "/var/lib/export-service");
        assert_eq!(quoted("/srv/my data"), "'/srv/my data'");
        assert_eq!(quoted("/a\n;rm"), "'/a\\u{a};rm'");
        assert_eq!(quoted("/it's"), r"'/it'\''s'");
    }

    fn explained(
        owner: u32,
        mode: u32,
        lacks: Option<&'static str>,
        place: Place,
    ) -> Option<String> {
        let what = "it".to_owned();
        let found = Found {
            what,
            owner,
            mode,
            lacks,
            place,
        };
        explain(&found, (10001, 100), "/data", "/data/lock")
    }

    #[test]
    fn what_belongs_to_another_is_given_to_the_services_user_and_what_is_its_own_gets_a_mode() {
        assert_eq!(
            explained(0, 0o600, None, Place::Inside).unwrap(),
            "it belongs to root with mode 600, and this service runs as user 10001: as root, \
             run `chown -R 10001:100 /data`"
        );
        assert_eq!(
            explained(10001, 0o400, Some("u+rw"), Place::Inside).unwrap(),
            "it belongs to user 10001 with mode 400, and this service runs as user 10001: run `chmod u+rw /data/lock`"
        );
        // Owner and mode are right: something else denies it, like an immutable file or a security module.
        assert_eq!(explained(10001, 0o600, None, Place::Inside), None);
    }

    #[test]
    fn nothing_above_the_data_folder_is_to_be_changed() {
        let above = explained(0, 0o755, None, Place::Above).unwrap();
        assert!(
            above.ends_with(": as root, run `install -d -m 700 -o 10001 -g 100 /data`"),
            "{above}"
        );
        let elsewhere = explained(0, 0o700, None, Place::Elsewhere).unwrap();
        assert!(
            elsewhere.ends_with("this service runs as user 10001: let this user through there"),
            "{elsewhere}"
        );
    }

    #[test]
    fn other_errors_are_no_matter_of_owner_and_mode() {
        let folder = tempfile::tempdir().unwrap();
        for kind in [
            ErrorKind::NotFound,
            ErrorKind::StorageFull,
            ErrorKind::ReadOnlyFilesystem,
        ] {
            assert_eq!(remedy(folder.path(), folder.path(), &kind.into()), None);
        }
    }
}
