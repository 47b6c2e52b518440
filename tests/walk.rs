//! README can be followed by pasting it: its walk, and what else there can be run on one machine, does what it
//! says there.
//!
//! Not here: whether README's tables are true (tests/readme.rs), and installing, which needs root.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{PATIENCE, nowhere, program, root};
use tempfile::TempDir;

/// The ports that README's blocks use. The first is the service's default. Others that are free take their places.
const PORTS: [&str; 4] = ["8080", "8081", "9090", "4444"];
/// Printed between the paragraphs of a block.
const END: &str = "--- end of a paragraph ---";
/// Blocks that are not run: the program under test is there already, and so is the Python environment.
const LEFT_OUT: [&str; 2] = [
    "cargo build --release --locked\n",
    "python3 -m venv target/venv\n",
];

/// The shell blocks of README's section with this heading, its subsections included.
fn blocks(heading: &str) -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, section) = readme.split_once(&format!("\n{heading}\n")).unwrap();
    let level = heading.split(' ').next().unwrap().len();
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in section.lines() {
        match &mut block {
            None if line == "```sh" => block = Some(String::new()),
            None if line.starts_with('#') && line.split(' ').next().unwrap().len() <= level => {
                break;
            }
            None => {}
            Some(_) if line == "```" => blocks.extend(block.take()),
            Some(text) => text.extend([line, "\n"]),
        }
    }
    blocks.retain(|block| !LEFT_OUT.iter().any(|line| block.starts_with(line)));
    assert!(!blocks.is_empty(), "nothing to run in {heading}");
    blocks
}

/// What a paragraph says that it prints: the comments below its commands.
fn expected(paragraph: &str) -> Vec<&str> {
    let below = paragraph.lines().skip_while(|line| line.starts_with('#'));
    below.filter_map(|line| line.strip_prefix("# ")).collect()
}

/// Whether a line is as expected. `…` is any text, and the width of columns does not count.
fn fits(line: &str, expected: &str) -> bool {
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (line, expected) = (words(line), words(expected));
    let mut parts = expected.split('…');
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let mut parts = parts.peekable();
    while let Some(part) = parts.next() {
        let found = match parts.peek() {
            Some(_) => rest.find(part),
            None if rest.ends_with(part) => return true,
            None => None,
        };
        match found {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

/// Whether lines are as expected. A line of `…` alone is any number of lines.
fn all_fit(lines: &[&str], expected: &[&str]) -> bool {
    match expected {
        [] => lines.is_empty(),
        ["…", rest @ ..] => (0..=lines.len()).any(|skipped| all_fit(&lines[skipped..], rest)),
        [first, rest @ ..] => {
            lines.first().is_some_and(|line| fits(line, first)) && all_fit(&lines[1..], rest)
        }
    }
}

/// A clone of the repository as far as README's blocks need one, with the program under test in it. What they
/// leave running is ended with it.
struct Clone {
    folder: TempDir,
    ports: [(&'static str, String); 4],
}

impl Clone {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        fs::create_dir_all(target.join("release")).unwrap();
        symlink(program(), target.join("release/export-service")).unwrap();
        symlink(root().join("target/venv"), target.join("venv")).unwrap();
        for name in ["scripts", "tests"] {
            symlink(root().join(name), folder.path().join(name)).unwrap();
        }
        let ports = PORTS.map(|port| (port, nowhere().1.port().to_string()));
        Self { folder, ports }
    }

    /// Pastes a block into a fresh terminal, and compares what it prints with what it says.
    fn paste(&self, block: &str) {
        // By way of marks without digits: a free port may hold the digits of another of README's.
        let marks = ["<a>", "<b>", "<c>", "<d>"];
        let mut block = block.to_owned();
        for ((port, _), mark) in self.ports.iter().zip(marks) {
            block = block.replace(port, mark);
        }
        for ((_, free), mark) in self.ports.iter().zip(marks) {
            block = block.replace(mark, free);
        }
        let paragraphs: Vec<_> = block.split("\n\n").collect();
        let script = paragraphs.join(&format!("\nprintf '\\n%s\\n' '{END}'\n\n"));
        // A file: what a block leaves running holds a pipe open.
        let printed = self.folder.path().join("printed");
        let file = File::create(&printed).unwrap();
        // A block that waits for what never comes is ended, with everything that it has started.
        let mut shell = Command::new("timeout");
        shell.arg(PATIENCE.as_secs().to_string()).arg("sh");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("EXPORT_") {
                shell.env_remove(name);
            }
        }
        // Which port is the default is no matter of this test, and it may be taken.
        let port = &self.ports[0].1;
        let done = shell
            .arg("-c")
            .arg(&script)
            .env("DATABOX_LOCAL_PORT", port)
            .env("EXPORT_SERVICE", format!("http://127.0.0.1:{port}"))
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .status()
            .unwrap();
        let printed = fs::read_to_string(printed).unwrap();
        let outputs: Vec<_> = printed.split(END).collect();
        assert_eq!(
            outputs.len(),
            paragraphs.len(),
            "{done}: {script}\n{printed}"
        );
        for (paragraph, output) in paragraphs.iter().zip(outputs) {
            let lines: Vec<_> = output.lines().filter(|line| !line.is_empty()).collect();
            let expected = expected(paragraph);
            assert!(
                all_fit(&lines, &expected),
                "{paragraph}\nprinted\n{output}\n{}",
                self.logs()
            );
        }
    }

    /// The logs of what the blocks run.
    fn logs(&self) -> String {
        fs::read_to_string(self.walk().join("log")).unwrap_or_default()
    }

    fn walk(&self) -> std::path::PathBuf {
        self.folder.path().join("target/walk")
    }

    /// The processes that were left running, of those whose ids are in files.
    fn running(&self) -> Vec<String> {
        let files = fs::read_dir(self.walk()).into_iter().flatten().flatten();
        files
            .map(|file| file.path())
            .filter(|path| path.extension().is_some_and(|kind| kind == "pid"))
            .filter_map(|path| Some(fs::read_to_string(path).ok()?.trim().to_owned()))
            .filter(|pid| is_of(pid, self.folder.path()))
            .collect()
    }
}

/// Whether a process runs in this folder. One that has ended runs nowhere.
fn is_of(pid: &str, folder: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder)
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = Command::new("kill")
            .args(self.running())
            .stderr(Stdio::null())
            .status();
    }
}

/// Pastes all blocks of these sections in order. In the end nothing may run any more.
fn walk(headings: &[&str]) {
    let clone = Clone::new();
    for heading in headings {
        for block in blocks(heading) {
            clone.paste(&block);
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while !clone.running().is_empty() {
        assert!(Instant::now() < deadline, "{:?} still run", clone.running());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_walk_does_what_readme_says_pasted_block_by_block_into_fresh_terminals() {
    walk(&["## A walk with curl"]);
}

#[test]
fn a_script_sends_after_the_walks_start_and_token_as_readme_says() {
    walk(&["### Start", "### A token", "## From scripts", "### Stop"]);
}

#[test]
fn https_can_be_tried_as_readme_says() {
    walk(&["### Start", "### Stop", "### HTTPS"]);
}

#[test]
fn the_test_arbiter_gives_the_secret_and_tokens_as_readme_says() {
    // The blocks before build images.
    let clone = Clone::new();
    let (start, stop) = (blocks("### Start"), blocks("### Stop"));
    let databox = blocks("### Databox");
    let trial = databox.last().unwrap();
    assert!(trial.contains("arbiter.py"), "{trial}");
    for block in start.iter().chain(&stop).chain([trial]) {
        clone.paste(block);
    }
}

#[test]
fn lines_fit_what_readme_shows_of_them() {
    assert!(fits("{\"id\":\"01a2\",\"n\":1}", "{\"id\":\"…\",\"n\":1}"));
    assert!(!fits("{\"id\":\"01a2\",\"n\":2}", "{\"id\":\"…\",\"n\":1}"));
    assert!(fits("a   b", "a b") && !fits("a b c", "a b") && !fits("a", "a b"));
    assert!(all_fit(&["a", "x", "y", "b"], &["a", "…", "b"]));
    assert!(all_fit(&["a"], &["a", "…"]) && !all_fit(&["a", "b"], &["a"]));
    assert_eq!(expected("# why\ncommand\n# output"), ["output"]);
}
