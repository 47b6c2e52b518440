//! The journal of a service that runs under strace: its changes of files, its syncs, and its answers, in
//! the order in which they happened.
//!
//! A change stands where its call returned, since no other thread can build on it before. A sync covers the
//! changes that had returned when it began. An answer stands where its call began, since its client may
//! have it from then on.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::mem;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::disk::Disk;
use crate::support::{PATIENCE, program};
use serde_json::Value;

/// The calls that change a file or folder, and those by which answers and attempts leave. The model does
/// not know some of them, and a test that meets one fails.
const CALLS: &str = "trace=openat,open,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,\
    fallocate,copy_file_range,sendfile,splice,fsync,fdatasync,sync_file_range,mmap,rename,renameat,\
    renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,sendto,sendmsg";

/// What the service has done.
#[derive(Debug)]
pub enum Event {
    Create(PathBuf),
    Write(PathBuf, u64, Vec<u8>),
    Truncate(PathBuf, u64),
    /// With the number of the event before which it began.
    Sync(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Remove(PathBuf),
    MakeFolder(PathBuf),
    /// The service has answered with this export's id, and its result if it is finished.
    Answered(String, Option<Value>),
    /// The service has sent this export to its destination.
    Sent(String),
    /// A kill has interrupted a call on this file, which may have been carried out.
    Uncertain(PathBuf),
    /// A run of the service has begun. Its results are kept for this long.
    Started(Duration),
    /// A run of the service has ended; the disk's contents were compared.
    Ended,
}

/// Several runs of the service on one folder.
pub struct Journal {
    root: PathBuf,
    /// Each with its time since 1970.
    pub events: Vec<(Duration, Event)>,
}

impl Journal {
    /// The command that runs the program under strace, which writes to this file. Strace is a grandchild,
    /// so that the child is the program.
    pub fn command(trace: &Path) -> Command {
        let mut command = Command::new("strace");
        command
            .env_clear()
            .args(["-D", "-f", "--seccomp-bpf", "-q", "-ttt", "-y", "-xx"])
            .args(["-s", "100000000", "-e", "signal=KILL", "-e", CALLS, "-o"])
            .arg(trace)
            .arg(program());
        command
    }

    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            events: Vec::new(),
        }
    }

    /// Adds a run that has ended, and the disk's state as it is now. `disk` is as it was before the run,
    /// and goes along. Fails if the journal does not explain the state.
    pub fn add(&mut self, trace: &Path, pid: u32, retention: Duration, disk: &mut Disk) {
        wait_for_end(trace, pid);
        let from = self.events.len();
        let time = self.events.last().map_or(Duration::ZERO, |(time, _)| *time);
        self.events.push((time, Event::Started(retention)));
        let mut run = Run {
            journal: self,
            offsets: HashMap::new(),
            unfinished: HashMap::new(),
            time,
        };
        for line in BufReader::new(fs::File::open(trace).unwrap()).lines() {
            run.line(&line.unwrap());
        }
        // A kill can keep strace from saying how a call ended that it had begun to show.
        for (call, began) in mem::take(&mut run.unfinished).into_values() {
            run.returned(&format!("{call}) = ?"), began);
        }
        let time = run.time;
        let mut uncertain = Vec::new();
        for number in from..self.events.len() {
            let event = &self.events[number].1;
            event.happen(number, disk, |_| false);
            if let Event::Uncertain(path) = event {
                uncertain.push(path.clone());
            }
        }
        // What the last calls before a kill have done is seen in the folder.
        let differences = disk.differences();
        let explained = |path: &PathBuf| uncertain.contains(path);
        assert!(
            differences.iter().all(explained),
            "the journal does not explain {differences:?}"
        );
        for path in differences {
            let number = self.events.len();
            let mut record = |event| self.events.push((time, event));
            disk.take(number, &path);
            match fs::read(&path) {
                Ok(bytes) => {
                    record(Event::Create(path.clone()));
                    record(Event::Truncate(path.clone(), bytes.len() as u64));
                    record(Event::Write(path, 0, bytes));
                }
                Err(_) => record(Event::Remove(path)),
            }
        }
        self.events.push((time, Event::Ended));
    }
}

impl Event {
    /// Whether a new database takes the place of another.
    pub fn replaces_database(&self) -> bool {
        matches!(self, Self::Rename(_, to) if to.ends_with("exports.db"))
    }

    /// Without contents.
    pub fn in_short(&self) -> String {
        match self {
            Self::Write(path, at, bytes) => {
                format!("write {} bytes at {at} of {}", bytes.len(), path.display())
            }
            other => format!("{other:?}"),
        }
    }

    /// Carries a change or sync out in the model, unless it is a sync that lies.
    pub fn happen(&self, number: usize, disk: &mut Disk, lies: fn(&Path) -> bool) {
        match self {
            Self::Create(path) => disk.create(number, path),
            Self::Write(path, at, bytes) => disk.write(number, path, *at, bytes),
            Self::Truncate(path, length) => disk.truncate(number, path, *length),
            Self::Sync(path, _) if lies(path) => {}
            Self::Sync(path, began) => disk.sync(*began, path),
            Self::Rename(from, to) => disk.rename(number, from, to),
            Self::Link(from, to) => disk.link(number, from, to),
            Self::Remove(path) => disk.remove(number, path),
            Self::MakeFolder(path) => disk.make_folder(number, path),
            Self::Answered(..)
            | Self::Sent(_)
            | Self::Uncertain(_)
            | Self::Started(_)
            | Self::Ended => {}
        }
    }
}

/// Strace goes on writing for a moment after the program has ended; its last line is about the main thread.
fn wait_for_end(trace: &Path, pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let file = fs::File::open(trace).unwrap();
        let mut end = [0; 200];
        let from = file.metadata().unwrap().len().saturating_sub(200);
        let length = file.read_at(&mut end, from).unwrap();
        let end = String::from_utf8_lossy(&end[..length]);
        let last = end.lines().last().unwrap_or("");
        if last.ends_with("+++") && last.starts_with(&pid.to_string()) {
            return;
        }
        assert!(Instant::now() < deadline, "strace does not end: {end}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// One run while it is read.
struct Run<'a> {
    journal: &'a mut Journal,
    /// Where the next `write` to a file goes, by its descriptor.
    offsets: HashMap<String, u64>,
    /// The beginnings of calls that have not returned, by thread, with the number of the next event then.
    unfinished: HashMap<String, (String, usize)>,
    time: Duration,
}

impl Run<'_> {
    fn line(&mut self, line: &str) {
        let (thread, rest) = line.split_once(' ').unwrap();
        let (time, rest) = rest.trim_start().split_once(' ').unwrap();
        if let Ok(time) = time.parse() {
            self.time = Duration::from_secs_f64(time);
        }
        let began = self.journal.events.len();
        if rest.starts_with("+++") || rest.starts_with("---") {
        } else if let Some(resumed) = rest.strip_prefix("<... ") {
            let (_, end) = resumed.split_once(" resumed>").unwrap();
            let (beginning, began) = self.unfinished.remove(thread).unwrap();
            self.returned(&(beginning + end), began);
        } else if let Some(call) = rest.strip_suffix("<unfinished ...>") {
            self.begins(call);
            self.unfinished
                .insert(thread.to_owned(), (call.to_owned(), began));
        } else if let Some(call) = rest.strip_suffix("<unfinished ...>) = ?") {
            self.begins(call);
            self.returned(&format!("{call}) = ?"), began);
        } else {
            self.begins(rest);
            self.returned(rest, began);
        }
    }

    /// Notes what an answer promises, or what is sent to a destination.
    fn begins(&mut self, call: &str) {
        let is_send = ["sendto(", "sendmsg(", "write(", "writev("]
            .iter()
            .any(|name| call.starts_with(name));
        let Some(string) = call.split('"').nth(1).filter(|_| is_send) else {
            return;
        };
        // An answer or attempt in full: only its beginning is decoded before that is certain.
        let first = unhex(string.get(..16).unwrap_or(""));
        if first != b"HTTP" && first != b"POST" {
            return;
        }
        let text = String::from_utf8(unhex(string)).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        if head.starts_with("HTTP/1.1 200") && body.starts_with('{') {
            let answer: Value = serde_json::from_str(body).unwrap();
            let id = answer["id"].as_str().unwrap().to_owned();
            let result = (answer["state"] == "Finished").then(|| answer["ext_response"].clone());
            self.record(Event::Answered(id, result));
        } else if let Some((_, id)) = head.split_once("webhook-id: ") {
            self.record(Event::Sent(id.lines().next().unwrap().to_owned()));
        }
    }

    fn record(&mut self, event: Event) {
        self.journal.events.push((self.time, event));
    }

    fn returned(&mut self, call: &str, began: usize) {
        let (call, result) = call.rsplit_once(" = ").unwrap();
        let (name, arguments) = call.split_once('(').unwrap();
        let arguments = arguments.trim_end().trim_end_matches(')');
        let strings: Vec<_> = arguments.split('"').skip(1).step_by(2).collect();
        let result = result.trim();
        if result.starts_with('-') {
            return;
        }
        let inside = |path: &PathBuf| path.starts_with(&self.journal.root);
        // Of a call that a kill came before, strace shows no arguments.
        let named = |nth: usize| strings.get(nth).map(|string| path(string));
        let found = match name {
            "mmap" => arguments.split(", ").nth(4).and_then(path_of),
            _ if arguments.starts_with(|first: char| first.is_ascii_digit()) => path_of(arguments),
            _ => named(0),
        };
        let Some(path) = found.filter(inside) else {
            return;
        };
        if result.starts_with('?') {
            if !name.ends_with("sync") {
                self.record(Event::Uncertain(path));
            }
            return;
        }
        let number = |text: &str| text.trim().parse::<u64>().unwrap();
        let last = || number(arguments.rsplit(',').next().unwrap());
        let descriptor = |text: &str| text.split('<').next().unwrap().to_owned();
        match name {
            "openat" | "open" => {
                self.offsets.insert(descriptor(result), 0);
                if arguments.contains("O_CREAT") {
                    self.record(Event::Create(path.clone()));
                }
                if arguments.contains("O_TRUNC") {
                    self.record(Event::Truncate(path, 0));
                }
            }
            "write" | "pwrite64" => {
                let mut bytes = unhex(strings[0]);
                bytes.truncate(usize::try_from(number(result)).unwrap());
                let at = if name == "write" {
                    let at = self.offsets.entry(descriptor(arguments)).or_default();
                    *at += bytes.len() as u64;
                    *at - bytes.len() as u64
                } else {
                    last()
                };
                self.record(Event::Write(path, at, bytes));
            }
            "ftruncate" => self.record(Event::Truncate(path, last())),
            "fsync" | "fdatasync" => self.record(Event::Sync(path, began)),
            "mkdir" | "mkdirat" => self.record(Event::MakeFolder(path)),
            "unlink" | "unlinkat" | "rmdir" => self.record(Event::Remove(path)),
            "rename" | "renameat" | "renameat2" => {
                let to = named(1).unwrap();
                self.record(Event::Rename(path, to));
            }
            "link" | "linkat" => {
                let to = named(1).unwrap();
                self.record(Event::Link(path, to));
            }
            "mmap" if arguments.contains("MAP_PRIVATE") || !arguments.contains("PROT_WRITE") => {}
            // SQLite's index of its log, which is rebuilt at each start.
            "mmap" if path.to_str().unwrap().ends_with("-shm") => {}
            _ => panic!("the model does not know {call} = {result}"),
        }
    }
}

/// The path of the descriptor that is the first argument, like `7<\x2f\x61>`. None if its file was removed.
fn path_of(arguments: &str) -> Option<PathBuf> {
    let (first, rest) = arguments.split_once('<')?;
    let (hex, rest) = rest.split_once('>')?;
    let is_descriptor = first.bytes().all(|byte| byte.is_ascii_digit()) && !first.is_empty();
    (is_descriptor && hex.starts_with('\\') && !rest.starts_with("(deleted)")).then(|| path(hex))
}

fn path(hex: &str) -> PathBuf {
    String::from_utf8(unhex(hex)).unwrap().into()
}

/// Decodes `\x41\x42`.
fn unhex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => byte - b'0',
        b'a'..=b'f' => byte - b'a' + 10,
        _ => panic!("{text} is not in hexadecimal digits"),
    };
    let bytes = text.as_bytes().chunks_exact(4);
    bytes
        .map(|escape| digit(escape[2]) << 4 | digit(escape[3]))
        .collect()
}
