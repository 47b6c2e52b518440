//! A start either has a sound store or says why it cannot: README "When it does not start".

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use support::{
    Destination, MARK, Service, command, nowhere, other_user, payload, program, program_in, token,
};
use tempfile::TempDir;

/// Whether the program starts on a folder with this command, and what it prints. If it does not start, the
/// exit code must be 1.
fn try_start(command: Command, folder: &Path) -> (bool, String) {
    let (listens, code, log) = support::try_start(command, folder);
    assert!(listens || code == Some(1), "{code:?}: {log}");
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

/// A folder, left by a kill, in which this many exports wait for a destination that is down.
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

/// Damages pages of a store that nobody has open: calls `damage` with each page of this table or index, by
/// kind, in order.
fn damage(folder: &Path, name: &str, kind: &str, damage: impl FnOnce(&mut [u8], &[usize])) {
    let file = folder.join("exports.db");
    // Moves the write-ahead log into the file. The program's own SQLite has no dbstat.
    let sql = format!(
        "SELECT pageno FROM dbstat WHERE name = '{name}' AND pagetype = '{kind}' ORDER BY path"
    );
    let asked = Command::new("sqlite3")
        .arg(&file)
        .arg(sql)
        .output()
        .unwrap();
    let pages: Vec<usize> = String::from_utf8(asked.stdout)
        .unwrap()
        .lines()
        .map(|line| 4096 * (line.parse::<usize>().unwrap() - 1))
        .collect();
    assert!(!pages.is_empty());
    let mut bytes = fs::read(&file).unwrap();
    damage(&mut bytes, &pages);
    fs::write(&file, bytes).unwrap();
}

/// This many exports wait, and only the first has been tried; then the service is killed.
fn left_waiting(destination: &Destination, count: usize, bytes: usize) -> (Service, Vec<String>) {
    let mut service = Service::start(&[]);
    let data =
        |number| serde_json::json!({"text": MARK, "number": number, "more": "x".repeat(bytes)});
    let ids: Vec<_> = (0..count)
        .map(|number| service.submit(&destination.url, &data(number)))
        .collect();
    destination.arrival();
    service.signal("KILL");
    service.ended();
    (service, ids)
}

/// The results of all, `lost` and others; `None` for an export that is no longer known.
fn results(service: &Service, url: &str, ids: &[String]) -> Vec<Option<String>> {
    let result = |id: &String| {
        let poll = service.post("/lp/export", &token(url), &serde_json::json!({"id": id}));
        (poll.status == 200).then(|| {
            let result = service.result(url, id);
            let kind = result["error"]["kind"].as_str();
            kind.map_or_else(|| result["status"].to_string(), str::to_owned)
        })
    };
    ids.iter().map(result).collect()
}

/// Has this many exports wait, damages the store, and starts the service again. Returns the ids and results.
fn damaged_waiting(
    count: usize,
    bytes: usize,
    name: &str,
    kind: &str,
    damage_pages: impl FnOnce(&mut [u8], &[usize]),
) -> (Destination, Service, Vec<String>, Vec<Option<String>>) {
    let (destination, gate) = Destination::held();
    let (service, ids) = left_waiting(&destination, count, bytes);
    damage(&service.folder(), name, kind, damage_pages);
    gate.open();
    let service = service.kill_and_restart();
    let results = results(&service, &destination.url, &ids);
    (destination, service, ids, results)
}

fn damaged_files(folder: &Path) -> usize {
    let names = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_str().unwrap().contains("exports.db.damaged-"))
        .count()
}

#[test]
fn a_damaged_payload_loses_only_its_own_export() {
    let (destination, service, _, results) =
        damaged_waiting(20, 10_000, "exports", "overflow", |bytes, pages| {
            // One that says where the payload goes on; that the last page of one was zeroed cannot be told.
            let goes_on = |page: &&usize| bytes[**page..][..4] != [0; 4];
            let page = *pages.iter().skip(25).find(goes_on).unwrap();
            bytes[page..][..4096].fill(0);
        });
    let url = &destination.url;
    let lost: Vec<_> = results
        .iter()
        .filter(|result| *result == &Some("lost".into()))
        .collect();
    assert_eq!(lost.len(), 1, "{results:?}");
    assert!(results.iter().all(Option::is_some));
    assert_eq!(damaged_files(&service.folder()), 1);
    assert!(service.log().concat().contains(".recover"));
    // It is repaired, and stays so.
    let more = service.submit(url, &payload(1));
    assert_eq!(service.result(url, &more)["status_code"], 200);
    let service = service.kill_and_restart();
    assert_eq!(service.result(url, &more)["status_code"], 200);
    assert_eq!(damaged_files(&service.folder()), 1);
}

#[test]
fn a_damaged_result_is_reported_as_lost_and_loses_no_other() {
    let destination = Destination::start(|_| support::Reaction::Answer(200, vec![b'x'; 20_000]));
    let url = &destination.url;
    let mut service = Service::start(&[]);
    let ids: Vec<_> = (0..3)
        .map(|number| {
            let id = service.submit(url, &payload(number));
            assert_eq!(service.result(url, &id)["status_code"], 200);
            id
        })
        .collect();
    service.signal("KILL");
    service.ended();
    damage(&service.folder(), "exports", "overflow", |bytes, pages| {
        let goes_on = |page: &&usize| bytes[**page..][..4] != [0; 4];
        let page = *pages.iter().find(goes_on).unwrap();
        bytes[page..][..4096].fill(0);
    });
    let service = service.kill_and_restart();
    let mut results: Vec<_> = results(&service, url, &ids).into_iter().flatten().collect();
    results.sort();
    assert_eq!(results, ["\"200 OK\"", "\"200 OK\"", "lost"]);
    assert_eq!(destination.arrivals().len(), 3, "nothing is sent again");
}

#[test]
fn a_damaged_page_of_the_table_loses_only_what_is_on_it() {
    for which in 0..3 {
        let mut all = 0;
        let (destination, service, ids, results) =
            damaged_waiting(150, 1, "exports", "leaf", |bytes, pages| {
                all = pages.len();
                bytes[pages[which * (all - 1) / 2]] = 0;
            });
        let kept = results.iter().flatten().count();
        eprintln!("{all} pages, of 150 exports {kept} kept");
        assert!((90..150).contains(&kept), "{results:?}");
        for (id, result) in ids.iter().zip(&results) {
            let named = |line: &String| line.contains(id) && line.contains("and is lost");
            assert_eq!(service.log().iter().any(named), result.is_none(), "{id}");
        }
        let more = service.submit(&destination.url, &payload(1));
        assert_eq!(service.result(&destination.url, &more)["status_code"], 200);
    }
}

#[test]
fn rows_that_are_out_of_order_do_not_keep_the_repair_from_ending() {
    let (destination, gate) = Destination::held();
    let (service, ids) = left_waiting(&destination, 150, 1);
    damage(&service.folder(), "exports", "internal", |bytes, pages| {
        // The highest row number in the first subtree: some of the next one's are said to be there.
        let root = &mut bytes[pages[0]..][..4096];
        let cell = usize::from(u16::from_be_bytes([root[12], root[13]]));
        root[cell + 4] += 5;
    });
    // So that the repair comes before any row is written.
    damage(&service.folder(), "unfinished", "leaf", |bytes, pages| {
        bytes[pages[0]] = 0;
    });
    gate.open();
    let service = service.kill_and_restart();
    let results = results(&service, &destination.url, &ids);
    let kept = results.iter().flatten().count();
    assert_eq!(kept, 145, "{results:?}");
    assert_eq!(damaged_files(&service.folder()), 1);
}

#[test]
fn a_damaged_index_loses_nothing() {
    // The first is at byte 8192.
    for index in [
        "sqlite_autoindex_exports_1",
        "unfinished",
        "finished",
        "repeats",
        "queues",
        "sqlite_autoindex_queues_1",
        "running",
    ] {
        let (destination, service, _, results) =
            damaged_waiting(60, 1, index, "leaf", |bytes, pages| bytes[pages[0]] = 0);
        assert!(
            results
                .iter()
                .all(|result| *result == Some("\"200 OK\"".into())),
            "{index}: {results:?}"
        );
        // Even if nothing had to be read there until now.
        let body = serde_json::json!({"uri": destination.url, "data": payload(1)}).to_string();
        let token = token(&destination.url);
        let headers = [("X-Api-Key", token.as_str()), ("Idempotency-Key", "key")];
        let accepted = service.request("POST", "/lp/export", &headers, body.as_bytes());
        assert_eq!(accepted.status, 200);
        assert_eq!(damaged_files(&service.folder()), 1, "{index}");
    }
}

#[test]
fn damage_to_the_first_byte_of_the_third_page_loses_at_most_one_export() {
    let (.., results) = damaged_waiting(60, 1, "exports", "leaf", |bytes, _| bytes[8192] = 0);
    assert!(
        results
            .iter()
            .flatten()
            .filter(|result| result.contains("200"))
            .count()
            >= 59
    );
}

#[test]
fn a_write_ahead_log_that_is_only_partly_readable_is_warned_about() {
    let (_service, folder, ..) = waiting(5);
    let log = folder.join("exports.db-wal");
    let whole = fs::read(&log).unwrap();
    let file = fs::read(folder.join("exports.db")).unwrap();
    let start = |log_content: &[u8]| {
        fs::write(folder.join("exports.db"), &file).unwrap();
        let _ = fs::remove_file(folder.join("exports.db-shm"));
        fs::write(&log, log_content).unwrap();
        let (listens, said) = try_start(command(), &folder);
        assert!(listens, "{said}");
        said
    };
    assert!(!start(&whole).contains("SQLite's log"));
    let mut damaged = whole.clone();
    damaged[32 + 4120 + 500] ^= 1;
    assert!(start(&damaged).contains("SQLite's log was damaged"));
    let torn = &whole[..whole.len() - 5];
    assert!(start(torn).contains("ends in the middle of a write"));
}

#[test]
fn a_reader_that_stalls_is_warned_about_and_cannot_fill_the_disk() {
    let destination = Destination::start(|_| support::ok());
    let service = Service::start(&["--max-store", "4000000"]);
    let url = &destination.url;
    let large = serde_json::json!({"text": MARK, "more": "x".repeat(300_000)});
    let submit = || {
        let body = serde_json::json!({"uri": url, "data": large});
        let accepted = service.post("/export", &token(url), &body);
        if accepted.status == 200 {
            let id = accepted.json()["id"].as_str().unwrap().to_owned();
            assert_eq!(service.result(url, &id)["status_code"], 200);
        }
        accepted.status
    };
    assert_eq!(submit(), 200);
    let reader = rusqlite::Connection::open(service.folder().join("exports.db")).unwrap();
    reader
        .execute_batch("BEGIN; SELECT count(*) FROM exports")
        .unwrap();
    let refused = (0..100).map(|_| submit()).position(|status| status != 200);
    let log = fs::metadata(service.folder().join("exports.db-wal"))
        .unwrap()
        .len();
    eprintln!("{refused:?} exports of 300 kB were delivered beside the reader: {log} bytes of log");
    assert!(refused.is_some());
    assert!(log < 10_000_000);
    let warning = service.event(
        "SQLite's log cannot be emptied while somebody else reads the store, keeps the payloads of \
         finished exports, and counts against --max-store: end what has the file open",
        |_| true,
    );
    assert!(warning["bytes"].as_u64().unwrap() > 4_000_000);
    reader.execute_batch("COMMIT").unwrap();
    let deadline = std::time::Instant::now() + support::PATIENCE;
    while submit() != 200 {
        assert!(std::time::Instant::now() < deadline, "it is still full");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn a_stalled_disk_is_waited_for_and_delays_no_request_that_does_not_need_it() {
    let (url, _) = nowhere();
    let service = Service::start(&[]);
    // Longer than any step of a request may wait.
    let delay = "delay_enter=15000000:when=1";
    let Some((mut strace, mut lines)) = support::delay_syncs(&service, None, delay) else {
        return;
    };
    let answered = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // More than there are links, and threads that answer.
        let all: Vec<_> = (0..100)
            .map(|number| {
                let (service, url, answered) = (&service, &url, &answered);
                scope.spawn(move || {
                    service.submit(url, &payload(number));
                    answered.store(true, Ordering::Relaxed);
                })
            })
            .collect();
        // The first sync of each thread is delayed.
        for line in &mut lines {
            if line.unwrap().contains("sync(") {
                break;
            }
        }
        assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
        assert!(!answered.load(Ordering::Relaxed));
        for one in all {
            one.join().unwrap();
        }
    });
    assert_eq!(service.request("GET", "/status", &[], b"").status, 200);
    strace.kill().unwrap();
    strace.wait().unwrap();
}

/// The program under strace, which makes the `nth` call of `call` fail. Strace is a grandchild, so that the
/// child is the program.
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

/// The paths that were synced, in order, and whether the call failed. A line is like `7 fsync(3</tmp/x>) = 0`. When
/// another thread's call comes between, how it ended is in a second line: `7 <... fsync resumed>) = 0`.
fn synced(trace: &str) -> Vec<(PathBuf, bool)> {
    let mut syncs = Vec::new();
    let mut unfinished = BTreeMap::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else {
            continue;
        };
        let failed = rest.contains("EIO");
        if rest.contains("sync resumed>") {
            if let Some(begun) = unfinished.remove(thread) {
                let (_, ended): &mut (PathBuf, bool) = &mut syncs[begun];
                *ended = failed;
            }
        } else if let Some((_, rest)) = rest.split_once("sync(")
            && let Some((_, rest)) = rest.split_once('<')
            && let Some((path, _)) = rest.split_once('>')
        {
            if rest.contains("<unfinished") {
                unfinished.insert(thread, syncs.len());
            }
            syncs.push((path.into(), failed));
        }
    }
    syncs
}

/// Makes each sync of a start fail in turn. Returns what a start syncs, in order.
fn each_sync_that_fails_refuses_the_start(
    call: &str,
    new: impl Fn() -> (TempDir, PathBuf),
) -> Vec<PathBuf> {
    for nth in 1.. {
        let (held, folder) = new();
        let trace = held.path().join("trace");
        let (listens, log) = try_start(failing(call, nth, &trace), &folder);
        let trace = fs::read_to_string(trace).unwrap();
        let syncs = synced(&trace);
        let Some(failed) = syncs.iter().position(|(_, failed)| *failed) else {
            assert!(listens, "{log}");
            return syncs.into_iter().map(|(path, _)| path).collect();
        };
        let path = &syncs[failed].0;
        eprintln!("{call} {nth} of {}: listens {listens}", path.display());
        // SQLite ignores a failed sync of the folder, so that has to be done again.
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
fn what_a_kill_left_behind_is_synced_before_any_of_it_is_shown() {
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
    // With a write-ahead log beside it.
    if fs::metadata(&log).map_or(0, |log| log.len()) == 0 {
        fs::write(&log, [7; 5000]).unwrap();
    }
    let logged = fs::read(&log).unwrap();
    all_ways();
    assert_eq!(fs::read(&log).unwrap(), logged, "the log is as it was");
    // The write-ahead log alone is a sign too, if an earlier release has left the lock file empty.
    let lock = folder.join("lock");
    let mark = fs::read(&lock).unwrap();
    fs::write(&lock, "").unwrap();
    all_ways();
    // And so is the lock file alone.
    fs::remove_file(&log).unwrap();
    fs::write(&lock, mark).unwrap();
    all_ways();

    // Each remedy in the message works.
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
fn a_folder_that_cannot_be_written_is_refused_and_the_obstructing_file_named() {
    let (_service, folder, ..) = waiting(1);
    let file = folder.join("exports.db");
    // Else the first page may be in the write-ahead log, and a damaged one in the file is not looked at.
    let moved = Command::new("sqlite3")
        .arg(&file)
        .arg("PRAGMA wal_checkpoint(TRUNCATE)")
        .output()
        .unwrap();
    assert!(moved.status.success());
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
    let copy = program_in(held.path());
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

#[test]
fn a_folder_that_was_restored_as_root_is_refused_with_the_file_its_owner_and_the_command_that_mends_it()
 {
    let held = tempfile::tempdir().unwrap();
    if !as_other_user(held.path()) {
        return support::not_run("only root can run the service as another user");
    }
    let folder = held.path().join("data");
    fs::create_dir(&folder).unwrap();
    let copy = program_in(held.path());
    let start = || {
        let mut command = other_user();
        command.arg(&copy);
        try_start(command, &folder)
    };
    let owned_by = |name: &str, user: u32| {
        std::os::unix::fs::chown(folder.join(name), Some(user), Some(user)).unwrap();
    };
    let refused = |name: &str| {
        let (listens, log) = start();
        assert!(!listens, "it started");
        let file = folder.join(name);
        let file = file.to_str().unwrap().trim_end_matches('/');
        for words in [
            file,
            "ermission denied",
            "belongs to root with mode ",
            "this service runs as user 64123: as root, run `chown -R 64123:0 ",
        ] {
            assert!(log.contains(words), "no {words:?} in {log}");
        }
    };
    // The folder itself, also if its files are the service's.
    refused("");
    owned_by("", 64123);
    assert!(start().0);
    owned_by("", 0);
    refused("");
    owned_by("", 64123);
    // Each file that a start needs, as a copy made by root leaves it.
    for name in [
        "lock",
        "exports.db",
        "exports.db-wal",
        "ledger.key",
        "owner.key",
    ] {
        let path = folder.join(name);
        let closed: std::fs::Permissions = PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, closed).unwrap();
        owned_by(name, 0);
        refused(name);
        owned_by(name, 64123);
    }
    assert!(start().0);
    // One that does not exist yet, where this user may not make it.
    let above = held.path().join("closed");
    fs::create_dir(&above).unwrap();
    let mut command = other_user();
    command.arg(&copy);
    let (listens, log) = try_start(command, &above.join("data"));
    assert!(
        !listens && log.contains("`install -d -m 700 -o 64123 -g 0 "),
        "{log}"
    );
}

/// Opens a folder to another user. False if this user cannot become another.
fn as_other_user(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
    fs::metadata(folder).unwrap().uid() == 0
}
