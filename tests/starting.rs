//! A start is sure of what it found, or says why there is none: the store, and README "When it does
//! not start".

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{SECRET, Service, command, nowhere, payload, program, token};
use tempfile::TempDir;

/// Starts the service on a folder by `command`, until it listens or ends. Returns whether it listened,
/// and its log.
fn try_start(mut command: Command, folder: &Path) -> (bool, String) {
    let mut child = command
        .args([
            "serve",
            "--port",
            "0",
            "--bind",
            "127.0.0.1",
            "--log-format",
            "json",
        ])
        .arg("--data-dir")
        .arg(folder)
        .env("EXPORT_SECRET", SECRET)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut listens = false;
    while !listens && lines.read_line(&mut log).unwrap() > 0 {
        listens = log.contains(r#""event":"listening""#);
    }
    if listens {
        child.kill().unwrap();
    }
    lines.read_to_string(&mut log).unwrap();
    let status = child.wait().unwrap();
    assert!(listens || status.code() == Some(1), "{status}: {log}");
    (listens, log)
}

/// Asserts that a start on this folder is refused with a message that says all of this.
fn refused(folder: &Path, words: &[&str]) {
    let (listens, log) = try_start(command(), folder);
    assert!(!listens, "it started");
    for word in words {
        assert!(log.contains(word), "no {word:?} in {log}");
    }
}

/// A folder in which so many exports wait for a destination that is down, left by a kill.
fn waiting(count: usize) -> (Service, PathBuf, String, Vec<String>) {
    let (url, _) = nowhere();
    let mut service = Service::start(&[]);
    let ids = (0..count)
        .map(|number| service.submit(&url, &payload(number)))
        .collect();
    service.signal("KILL");
    service.ended();
    let folder = service.folder();
    (service, folder, url, ids)
}

/// The program under strace, which has the `nth` call of `call` fail. Strace is a grandchild, so that
/// the child is the program.
fn failing(call: &str, nth: usize, trace: &Path) -> Command {
    let mut command = Command::new("strace");
    command
        .args(["-D", "-f", "-qq", "-y", "-o"])
        .arg(trace)
        .args(["-e", "trace=fsync,fdatasync", "-e"])
        .arg(format!("inject={call}:error=EIO:when={nth}"))
        .arg(program());
    command
}

/// The path in a line like `7 fsync(3</tmp/x>) = 0`, and whether the call failed.
fn synced(line: &str) -> Option<(PathBuf, bool)> {
    let (_, rest) = line.split_once("sync(")?;
    let (_, rest) = rest.split_once('<')?;
    let (path, rest) = rest.split_once('>')?;
    Some((path.into(), rest.contains("EIO")))
}

/// Has each sync of a start fail in turn. Returns what a start syncs, in order.
fn each_sync_that_fails_refuses_the_start(
    call: &str,
    new: impl Fn() -> (TempDir, PathBuf),
) -> Vec<PathBuf> {
    for nth in 1.. {
        let (held, folder) = new();
        let trace = held.path().join("trace");
        let (listens, log) = try_start(failing(call, nth, &trace), &folder);
        let trace = fs::read_to_string(trace).unwrap();
        let syncs: Vec<_> = trace.lines().filter_map(synced).collect();
        let Some(failed) = syncs.iter().position(|(_, failed)| *failed) else {
            assert!(listens, "{log}");
            return syncs.into_iter().map(|(path, _)| path).collect();
        };
        let path = &syncs[failed].0;
        eprintln!("{call} {nth} of {}: listens {listens}", path.display());
        // SQLite takes no notice where it is the folder's, so that has to be done again.
        let again = syncs[failed + 1..].contains(&(path.clone(), false)) && path.is_dir();
        assert!(!listens || again, "{trace}");
        if !listens {
            let named = [path, &folder].map(|path| log.contains(path.to_str().unwrap()));
            assert!(named.contains(&true), "{log}");
        }
    }
    unreachable!()
}

#[test]
fn a_new_folder_is_not_served_from_unless_each_sync_succeeds() {
    for call in ["fsync", "fdatasync"] {
        let syncs = each_sync_that_fails_refuses_the_start(call, || {
            let held = tempfile::tempdir().unwrap();
            let folder = held.path().join("new/data");
            (held, folder)
        });
        let synced: BTreeSet<_> = syncs.iter().map(|path| path.file_name()).collect();
        for name in ["data", "new", "exports.db", "exports.db-wal", "lock"] {
            assert!(synced.contains(&Some(name.as_ref())), "{name} in {syncs:?}");
        }
    }
}

#[test]
fn what_a_kill_left_behind_is_synced_before_anything_of_it_is_shown() {
    let (_service, left, ..) = waiting(3);
    let copy = || {
        let held = tempfile::tempdir().unwrap();
        let folder = held.path().join("data");
        fs::create_dir(&folder).unwrap();
        for name in ["lock", "exports.db", "exports.db-wal"] {
            fs::copy(left.join(name), folder.join(name)).unwrap();
        }
        (held, folder)
    };
    let syncs = each_sync_that_fails_refuses_the_start("fsync", copy);
    each_sync_that_fails_refuses_the_start("fdatasync", copy);
    let first = |name: &str| {
        let is = |path: &PathBuf| path.file_name() == Some(name.as_ref());
        syncs
            .iter()
            .position(is)
            .unwrap_or_else(|| panic!("{name} in {syncs:?}"))
    };
    let parent = syncs[first("data")].parent().unwrap();
    let parent = first(parent.file_name().unwrap().to_str().unwrap());
    let found = ["exports.db-wal", "exports.db", "data"].map(first);
    // All of it at once, before SQLite adds to it.
    assert_eq!(found.iter().chain([&parent]).max(), Some(&3), "{syncs:?}");
}

#[test]
fn a_folder_whose_database_is_gone_or_empty_is_not_taken_for_a_new_one() {
    let (_service, folder, ..) = waiting(1);
    let file = folder.join("exports.db");
    let whole = fs::read(&file).unwrap();
    let log = folder.join("exports.db-wal");
    let words = ["exports.db", "put a copy of it back", "remove lock"];
    let all_ways = || {
        fs::remove_file(&file).unwrap();
        refused(&folder, &words);
        refused(&folder, &["is gone"]);
        for content in ["", "\0", "SQLite format 3"] {
            fs::write(&file, content).unwrap();
            refused(&folder, &words);
            assert_eq!(fs::read(&file).unwrap(), content.as_bytes());
        }
    };
    // With a log beside it.
    if fs::metadata(&log).map_or(0, |log| log.len()) == 0 {
        fs::write(&log, [7; 5000]).unwrap();
    }
    let logged = fs::read(&log).unwrap();
    all_ways();
    assert_eq!(fs::read(&log).unwrap(), logged, "the log is as it was");
    // That alone is a sign too, where an earlier release has left the lock file empty.
    let lock = folder.join("lock");
    let mark = fs::read(&lock).unwrap();
    fs::write(&lock, "").unwrap();
    all_ways();
    // And so is the lock file alone.
    fs::remove_file(&log).unwrap();
    fs::write(&lock, mark).unwrap();
    all_ways();

    // Either of what the message says helps.
    fs::write(&file, whole).unwrap();
    assert!(try_start(command(), &folder).0);
    for name in ["lock", "exports.db", "exports.db-wal"] {
        let _ = fs::remove_file(folder.join(name));
    }
    assert!(try_start(command(), &folder).0);
}

#[test]
fn a_folder_of_a_release_that_left_the_lock_file_empty_is_taken_over() {
    let (service, folder, url, ids) = waiting(2);
    fs::write(folder.join("lock"), "").unwrap();
    let service = service.kill_and_restart();
    assert_eq!(service.event("starting", |_| true)["unfinished"], 2);
    let poll = service.post("/export", &token(&url), &serde_json::json!({"id": ids[1]}));
    assert_eq!(poll.status, 200);
    assert!(fs::metadata(folder.join("lock")).unwrap().len() > 0);
}

#[test]
fn a_store_that_is_removed_while_the_service_runs_ends_it() {
    for name in ["exports.db", "exports.db-wal"] {
        let (url, _) = nowhere();
        let mut service = Service::start(&[]);
        service.submit(&url, &payload(1));
        fs::remove_file(service.folder().join(name)).unwrap();
        // With nothing to do, within a minute.
        assert_eq!(service.ended().code(), Some(70));
        let log = service.log().concat();
        assert!(log.contains("the store was removed or replaced"), "{log}");
    }
}

#[test]
fn nothing_is_accepted_into_a_store_that_was_replaced() {
    let (url, _) = nowhere();
    let mut service = Service::start(&[]);
    service.submit(&url, &payload(1));
    let file = service.folder().join("exports.db");
    fs::rename(&file, service.folder().join("moved")).unwrap();
    fs::copy(service.folder().join("moved"), &file).unwrap();
    let mut stream = std::net::TcpStream::connect(service.address).unwrap();
    let body = serde_json::json!({"uri": url, "data": payload(2)}).to_string();
    let token = token(&url);
    let headers = [("X-Api-Key", token.as_str())];
    let request = Service::written("POST", "/export", &headers, body.as_bytes());
    std::io::Write::write_all(&mut stream, &request).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(!answer.contains(" 200 "), "{answer}");
    assert_eq!(service.ended().code(), Some(70));
}

#[test]
fn a_folder_that_cannot_be_written_is_refused_with_the_file_that_is_in_the_way() {
    let (_service, folder, ..) = waiting(1);
    let file = folder.join("exports.db");
    let shm = folder.join("exports.db-shm");
    let _ = fs::remove_file(&shm);
    fs::create_dir(&shm).unwrap();
    refused(&folder, &["exports.db-shm"]);
    fs::remove_dir(&shm).unwrap();

    let whole = fs::read(&file).unwrap();
    // The versions of the format that are needed to write and to read it.
    for at in [18, 19] {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x80;
        fs::write(&file, flipped).unwrap();
        refused(&folder, &["exports.db"]);
    }
    fs::write(&file, whole).unwrap();
    assert!(try_start(command(), &folder).0);
}

#[test]
fn a_file_that_the_services_user_may_not_write_is_named() {
    let (_service, left, ..) = waiting(1);
    let held = tempfile::tempdir().unwrap();
    if !as_other_user(held.path()) {
        return support::not_run("only root can run the service as another user");
    }
    let folder = held.path().join("data");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
    let copy = held.path().join("export-service");
    fs::copy(program(), &copy).unwrap();
    let names = ["lock", "exports.db", "exports.db-wal"];
    let start = |closed: &str| {
        for name in names {
            let path = folder.join(name);
            fs::copy(left.join(name), &path).unwrap();
            let mode = if name == closed { 0o444 } else { 0o666 };
            fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        }
        let _ = fs::remove_file(folder.join("exports.db-shm"));
        let mut command = other_user();
        command.arg(&copy);
        try_start(command, &folder)
    };
    for closed in names {
        let (listens, log) = start(closed);
        assert!(!listens);
        assert!(
            log.contains("ermission denied") && log.contains(closed),
            "{log}"
        );
    }
    assert!(start("none").0);
}

fn other_user() -> Command {
    let mut command = Command::new("setpriv");
    command
        .env_clear()
        .args(["--reuid=64123", "--clear-groups"]);
    command
}

/// Opens a folder to the other user; false where this one cannot become another.
fn as_other_user(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
    fs::metadata(folder).unwrap().uid() == 0
}
