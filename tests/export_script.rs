//! `scripts/export`, as cron and people at a shell use it: with the system's shell and tools, and with busybox's.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use export_service::auth::{Key, Macaroon};
use support::{Destination, PATIENCE, Reaction, SECRET, Service, exited, nowhere, ok, signal};
use support::{root, token};
use tempfile::TempDir;

/// Which shell and tools run the script.
#[derive(Clone, Copy, Debug)]
enum Tools {
    /// Those of the system, as its first line says.
    System,
    /// Those of busybox alone, and curl.
    Busybox,
}

/// The script with a token, a service and a folder for its temporary files.
struct Script {
    tools: Tools,
    service: String,
    folder: TempDir,
}

impl Script {
    fn new(tools: Tools, service: &Service, token: &str) -> Self {
        Self::at(tools, format!("http://{}", service.address), token)
    }

    fn at(tools: Tools, service: String, token: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("token"), format!("{token}\n")).unwrap();
        fs::create_dir(folder.path().join("tmp")).unwrap();
        fs::write(folder.path().join(".curlrc"), "fail\n").unwrap();
        let script = Self {
            tools,
            service,
            folder,
        };
        if let Tools::Busybox = tools {
            let bin = script.bin();
            fs::create_dir(&bin).unwrap();
            let installed = Command::new("busybox")
                .args(["--install", "-s"])
                .arg(&bin)
                .status();
            let installed = installed.expect("busybox is missing: scripts/test installs it");
            assert!(installed.success());
            let curl = Command::new("sh")
                .args(["-c", "command -v curl"])
                .output()
                .unwrap();
            let curl = String::from_utf8(curl.stdout).unwrap();
            symlink(curl.trim(), bin.join("curl")).unwrap();
        }
        script
    }

    fn bin(&self) -> PathBuf {
        self.folder.path().join("bin")
    }

    /// Where its temporary files are.
    fn tmp(&self) -> PathBuf {
        self.folder.path().join("tmp")
    }

    /// Starts it with a signal handling of its own, whatever these tests were started with.
    fn start(&self, arguments: &[&str]) -> Running {
        let mut command = Command::new("/usr/bin/env");
        command.arg("--default-signal=INT,HUP,TERM");
        let script = root().join("scripts/export");
        match self.tools {
            Tools::System => command.arg(script),
            Tools::Busybox => command.env("PATH", self.bin()).arg("sh").arg(script),
        };
        let mut child = command
            .arg("--token-file")
            .arg(self.folder.path().join("token"))
            .args(arguments)
            .env("EXPORT_SERVICE", &self.service)
            .env("TMPDIR", self.tmp())
            // Neither is to come between the script and its service.
            .env("http_proxy", "http://127.0.0.1:1")
            .env("HOME", self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        Running { child, errors }
    }

    fn run(&self, arguments: &[&str], data: &[u8]) -> Ended {
        let mut running = self.start(arguments);
        running.give(data);
        running.ended()
    }
}

/// A script that runs.
struct Running {
    child: Child,
    errors: BufReader<ChildStderr>,
}

impl Running {
    /// Gives it its whole input. It may end without reading that.
    fn give(&mut self, data: &[u8]) {
        let _ = self.child.stdin.take().unwrap().write_all(data);
    }

    /// Waits for the next line on stderr.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.errors.read_line(&mut line).unwrap();
        line
    }

    fn ended(mut self) -> Ended {
        // In threads, since a pipe that is full holds the script up.
        let mut out = self.child.stdout.take().unwrap();
        let out = thread::spawn(move || {
            let mut text = Vec::new();
            out.read_to_end(&mut text).unwrap();
            text
        });
        let mut errors = String::new();
        self.errors.read_to_string(&mut errors).unwrap();
        let code = exited(&mut self.child).code();
        Ended {
            code,
            out: out.join().unwrap(),
            errors,
        }
    }
}

/// How a script ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    out: Vec<u8>,
    errors: String,
}

impl Ended {
    fn text(&self) -> String {
        String::from_utf8(self.out.clone()).unwrap()
    }
}

const BOTH: [Tools; 2] = [Tools::System, Tools::Busybox];

#[test]
fn without_waiting_it_prints_the_id_of_what_is_queued_and_all_of_it_arrives_in_order() {
    for tools in BOTH {
        let (url, address) = nowhere();
        let service = Service::start(&[]);
        let script = Script::new(tools, &service, &token(&url));
        let mut ids = Vec::new();
        for number in 0..3 {
            let data = format!("{{\"number\":{number}}}");
            let ended = script.run(&["--no-wait", &url], data.as_bytes());
            assert_eq!((ended.code, ended.errors.as_str()), (Some(0), ""));
            ids.push(ended.text().trim_end().to_owned());
        }
        let destination = Destination::start_at(address, |_| ok());
        for (number, id) in ids.iter().enumerate() {
            let arrival = destination.arrival();
            assert_eq!(arrival.text(), format!("{{\"number\":{number}}}"));
            assert_eq!(arrival.header("webhook-id"), Some(id.as_str()));
        }
    }
}

#[test]
fn without_waiting_it_tells_of_what_may_not_be_sent_there_at_all() {
    for tools in BOTH {
        let url = "https://10.0.0.1/in";
        let service = Service::start(&[]);
        let script = Script::new(tools, &service, &token(url));
        let ended = script.run(&["--no-wait", url], b"{}");
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let id = ended.text();
        let words = format!("export: export {} was given up: ", id.trim_end());
        assert!(
            ended.errors.starts_with(&words) && ended.errors.contains("--allow-network"),
            "{ended:?}"
        );
    }
}

#[test]
fn what_answers_and_is_not_the_service_has_queued_nothing() {
    for tools in BOTH {
        let other = Destination::start(|_| ok());
        let script = Script::at(tools, other.url.clone(), &token(&other.url));
        for arguments in [&["--no-wait"][..], &[]] {
            let ended = script.run(&[arguments, &[&other.url]].concat(), b"{}");
            assert_eq!((ended.code, &ended.out[..]), (Some(2), &b""[..]));
            assert!(ended.errors.contains("is not export-service"), "{ended:?}");
        }
    }
}

#[test]
fn it_says_why_it_still_waits_and_again_when_the_reason_changes() {
    for tools in BOTH {
        let (url, address) = nowhere();
        let service = Service::start(&[]);
        let script = Script::new(tools, &service, &token(&url));
        let mut running = script.start(&[&url]);
        running.give(b"{}");
        let line = running.line();
        assert!(
            line.contains(" waits: connection refused by 127.0.0.1:")
                && line.contains(" attempt")
                && line.contains(", next in "),
            "{line}"
        );
        assert!(!line.contains("/in"), "a path may be a password: {line}");
        let answers = Arc::new(AtomicU8::new(0));
        let answering = answers.clone();
        let _destination =
            Destination::start_at(address, move |_| match answering.load(Ordering::SeqCst) {
                0 => Reaction::Raw(Vec::new()),
                _ => ok(),
            });
        let line = running.line();
        assert!(line.contains(" waits: "), "{line}");
        assert!(!line.contains("refused"), "{line}");
        answers.store(1, Ordering::SeqCst);
        let ended = running.ended();
        assert_eq!(
            (ended.code, ended.text().as_str(), ended.errors.as_str()),
            (Some(0), "ok", "")
        );
        // One long poll after the other, however often the queue was tried.
        let log = service.log();
        let polls = log
            .iter()
            .filter(|line| line.contains("\"event\":\"poll\""));
        assert!((1..12).contains(&polls.count()), "{log:#?}");
    }
}

#[test]
fn a_signal_or_its_own_timeout_ends_it_with_what_becomes_of_the_export() {
    for tools in BOTH {
        for stop in ["INT", "TERM", "HUP", ""] {
            let (destination, gate) = Destination::held();
            let service = Service::start(&[]);
            let script = Script::new(tools, &service, &token(&destination.url));
            let timeout: &[&str] = match stop {
                "" => &["--timeout", "3"],
                _ => &[],
            };
            let mut running = script.start(&[timeout, &[&destination.url]].concat());
            running.give(b"{}");
            if !stop.is_empty() {
                // Until it waits, and so has the id.
                let line = running.line();
                assert!(line.contains("has not answered yet"), "{line}");
                signal(running.child.id(), stop);
            }
            let ended = running.ended();
            assert_eq!(ended.code, Some(3), "{stop}: {ended:?}");
            let id = destination
                .arrival()
                .header("webhook-id")
                .map(str::to_owned);
            let words = format!("; export {} is queued and will be sent\n", id.unwrap());
            assert!(ended.errors.ends_with(&words), "{stop}: {ended:?}");
            assert_eq!(fs::read_dir(script.tmp()).unwrap().count(), 0);
            gate.open();
        }
    }
}

#[test]
fn a_signal_while_it_still_reads_its_input_ends_it_at_once() {
    for tools in BOTH {
        let service = Service::start(&[]);
        let url = "http://127.0.0.1:1/";
        let script = Script::new(tools, &service, &token(url));
        let running = script.start(&[url]);
        // Its folder is the last that it makes before it reads.
        let deadline = Instant::now() + PATIENCE;
        let reads = || {
            let folder = fs::read_dir(script.tmp()).unwrap().next()?;
            fs::metadata(folder.unwrap().path().join("input")).ok()
        };
        while reads().is_none() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        signal(running.child.id(), "TERM");
        let ended = running.ended();
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert_eq!(ended.errors, "export: interrupted; nothing was queued\n");
        assert_eq!(fs::read_dir(script.tmp()).unwrap().count(), 0);
    }
}

/// A service that takes requests and closes the connection without an answer. Returns its URL.
fn silent_service() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().read(&mut [0; 65536]);
        }
    });
    url
}

#[test]
fn when_the_answer_to_a_submission_is_lost_it_says_with_which_key_a_repeat_is_safe() {
    for tools in BOTH {
        let destination = Destination::start(|_| ok());
        let url = &destination.url;
        let token = token(url);
        let script = Script::at(tools, silent_service(), &token);
        let ended = script.run(&["--no-wait", "--timeout", "1", url], b"[1]");
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.errors.contains("may be queued or not"), "{ended:?}");
        let (_, key) = ended.errors.split_once("--key ").unwrap();
        let (key, _) = key.split_once(',').unwrap();

        let service = Service::start(&[]);
        let script = Script::new(tools, &service, &token);
        let ids = [1, 2].map(|_| script.run(&["--no-wait", "--key", key, url], b"[1]").out);
        assert_eq!(ids[0], ids[1]);
        let waited = script.run(&["--key", key, url], b"[1]");
        assert_eq!((waited.code, &waited.out[..]), (Some(0), &b"ok"[..]));
        assert_eq!(destination.arrivals().len(), 1);
        let other = script.run(&["--key", key, url], b"[2]");
        assert_eq!(other.code, Some(2), "{other:?}");
        assert!(
            other.errors.contains("was used for other data"),
            "{other:?}"
        );
    }
}

#[test]
fn a_service_that_cannot_be_asked_has_queued_nothing_and_it_says_what_to_do() {
    for tools in BOTH {
        let (at, _) = nowhere();
        let script = Script::at(tools, at.trim_end_matches("/in").to_owned(), "a token");
        for arguments in [&["--no-wait"][..], &[]] {
            let arguments = [arguments, &["--timeout", "1", "http://127.0.0.1:1/"]].concat();
            let ended = script.run(&arguments, b"{}");
            assert_eq!((ended.code, &ended.out[..]), (Some(2), &b""[..]));
            for words in [
                "cannot be asked: curl: (7)",
                "start export-service there",
                "--service",
            ] {
                assert!(ended.errors.contains(words), "{words}: {ended:?}");
            }
            assert!(ended.errors.contains("nothing was queued"), "{ended:?}");
        }
    }
}

#[test]
fn an_export_is_still_queued_when_the_service_has_gone_or_the_token_expired_meanwhile() {
    let (destination, _gate) = Destination::held();
    let service = Service::start(&[]);
    let script = Script::new(Tools::System, &service, &token(&destination.url));
    let mut running = script.start(&["--timeout=8", &destination.url]);
    running.give(b"{}");
    running.line();
    let id = destination
        .arrival()
        .header("webhook-id")
        .unwrap()
        .to_owned();
    drop(service);
    let ended = running.ended();
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.errors.contains("cannot be asked"), "{ended:?}");
    let words = format!("export {id} is queued and will be sent\n");
    assert!(ended.errors.ends_with(&words), "{ended:?}");

    let (destination, _gate) = Destination::held();
    let service = Service::start(&[]);
    // Long enough to be queued, and shorter than the first two polls.
    let end = SystemTime::now() + Duration::from_secs(10);
    let caveats = [
        "path = *".to_owned(),
        "method = POST".to_owned(),
        "target = export-service".to_owned(),
        format!("destination = {}", destination.url),
        format!("time < {}", humantime::format_rfc3339(end)),
    ];
    let minted = Macaroon::mint(&Key::derive(SECRET.as_bytes()), "", caveats);
    let script = Script::new(Tools::System, &service, &minted.to_v1().unwrap());
    let ended = script.run(&[&destination.url], b"{}");
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert!(ended.errors.contains("has expired"), "{ended:?}");
    assert!(
        ended.errors.ends_with("is queued and will be sent\n"),
        "{ended:?}"
    );
}

#[test]
fn an_input_that_is_no_json_is_refused_in_its_own_terms() {
    for tools in BOTH {
        let destination = Destination::start(|_| ok());
        let service = Service::start(&[]);
        let script = Script::new(tools, &service, &token(&destination.url));
        for (data, words) in [
            (&b""[..], "the input is empty"),
            (b" \n\t\n", "the input is empty"),
            (b"{}\n{}\n", "the input holds more than one JSON value"),
            (b"[1],[2]", "the input holds more than one JSON value"),
            // Around it there is an object, to which this would add a field.
            (
                b"{},\"id\":\"\"",
                "the input holds more than one JSON value",
            ),
            (
                b"{\"a\" 1}",
                "the input is not valid JSON; see line 1, column 6",
            ),
            (b"{\"a\":[1", "brackets do not match"),
            (b"{\"a\":1}}", "brackets do not match"),
            (
                b"{\n  \"a\": x\n}\n",
                "the input is not valid JSON; see line 2, column 8",
            ),
            (
                b"celsius: 21.5",
                "the input is not valid JSON; see line 1, column 1",
            ),
            (
                b"21.5",
                "the input must be a string holding JSON text, a JSON object or an array",
            ),
            (
                b"\"no\"",
                "the input is a string, but what it holds is not valid JSON; see line 1,",
            ),
            (
                b"{\"a\":\"\0\"}",
                "the input is not valid JSON; see line 1,",
            ),
            (b"\xef\xbb\xbf{}", "byte order mark"),
            (b"\xff\xfe{\0}\0", "byte order mark"),
        ] {
            let text = String::from_utf8_lossy(data);
            let ended = script.run(&[&destination.url], data);
            assert_eq!(ended.code, Some(2), "{text:?}: {ended:?}");
            assert!(ended.errors.contains(words), "{text:?}: {ended:?}");
        }
        // Brackets and commas inside strings are none.
        let data = br#" [ {"a,]": "\\\"},{[" }, [], {} ] "#;
        let ended = script.run(&[&destination.url], data);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let sent: Vec<_> = destination.arrivals().into_iter().map(|a| a.body).collect();
        assert_eq!(sent, [data.trim_ascii()]);
    }
}

#[test]
fn options_may_stand_anywhere_and_what_makes_no_sense_is_explained() {
    let destination = Destination::start(|_| ok());
    let url = destination.url.as_str();
    let service = Service::start(&[]);
    let script = Script::new(Tools::System, &service, &token(url));
    let at = format!("http://{}/", service.address);
    let ended = script.run(&["--key=a", url, "--service", &at, "--timeout=60"], b"{}");
    assert_eq!(
        (ended.code, &ended.out[..]),
        (Some(0), &b"ok"[..]),
        "{ended:?}"
    );
    for (arguments, words) in [
        (
            &[url, "data.json"][..],
            "data.json is one argument too many",
        ),
        (&[url, "--no-such"], "there is no option --no-such"),
        (
            &["--timeout", "1m", url],
            "--timeout 1m: give whole seconds",
        ),
        (
            &["--timeout", "-1", url],
            "--timeout -1: give whole seconds",
        ),
        (
            &["--timeout", "99999999999999999999", url],
            "give whole seconds",
        ),
        (&["--timeout", "08", url], "give whole seconds"),
        (&["--key", "a b", url], "visible ASCII"),
        (&["--key", "a\r\nX: b", url], "visible ASCII"),
        (&["--key", &"k".repeat(256), url], "255"),
        (&[url, "--key"], "--key needs a value"),
        (&["--key=", url], "--key needs a value"),
        (&[], "the destination is missing"),
        (&["hooks.example.com"], "begins with http:// or https://"),
        (&["http://a.example/ b"], "a character that no URL has"),
        (
            &["http://a.example/\",\"id\":\"b"],
            "a character that no URL has",
        ),
        (
            &["--token-file", "/nonexistent", url],
            "cannot read the token file /nonexistent",
        ),
        (
            &["--token-file", "/dev/null", url],
            "the token file /dev/null is empty",
        ),
        (
            &["--service", "ftp-like://x", url],
            "is no URL of export-service",
        ),
        (&["--token-file", "/tmp", url], "cannot read the token file"),
    ] {
        let ended = script.run(arguments, b"{}");
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended:?}");
        assert!(ended.errors.contains(words), "{arguments:?}: {ended:?}");
    }
    let help = script.run(&["--help"], b"");
    assert_eq!(help.code, Some(0));
    for words in [
        "--no-wait",
        "--timeout",
        "--key",
        "  3  the export is queued",
    ] {
        assert!(help.text().contains(words), "{words}");
    }
}

#[test]
fn bodies_are_printed_byte_for_byte_and_what_is_said_of_them_begins_a_line() {
    let destination = Destination::start(|arrival| match arrival.text() {
        "[1]" => Reaction::Answer(404, b"no line end".to_vec()),
        "[2]" => Reaction::Answer(404, b"a line\n".to_vec()),
        "[3]" => Reaction::Answer(404, Vec::new()),
        "[4]" => Reaction::Answer(200, vec![b'x'; 2000]),
        "[5]" => Reaction::Answer(
            200,
            b"\"state\":\"Pending\"\\u0000\0\x01\x1f\x7f\t\r\n\xc3\xa9\n\n".to_vec(),
        ),
        "[6]" => Reaction::Answer(500, vec![0xff, 0, 0xfe]),
        _ => ok(),
    });
    let service = Service::start(&["--max-response", "1000"]);
    for tools in BOTH {
        let script = Script::new(tools, &service, &token(&destination.url));
        for (data, code, out, errors) in [
            ("[1]", 1, &b"no line end"[..], "\nexport: 404 Not Found\n"),
            ("[2]", 1, b"a line\n", "export: 404 Not Found\n"),
            ("[3]", 1, b"", "export: 404 Not Found\n"),
            (
                "[4]",
                0,
                &[b'x'; 1000],
                "\nexport: this is only the beginning of the answer\n",
            ),
            (
                "[5]",
                0,
                b"\"state\":\"Pending\"\\u0000\0\x01\x1f\x7f\t\r\n\xc3\xa9\n\n",
                "",
            ),
            (
                "[6]",
                1,
                &[0xff, 0, 0xfe],
                "\nexport: 500 Internal Server Error\n",
            ),
        ] {
            let ended = script.run(&[&destination.url], data.as_bytes());
            assert_eq!(
                (ended.code, &ended.out[..]),
                (Some(code), out),
                "{tools:?} {ended:?}"
            );
            assert_eq!(ended.errors, errors);
        }
    }
}

/// The files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn while_it_waits_its_token_is_in_no_file_and_no_process_list_and_its_files_are_its_users_alone() {
    for tools in BOTH {
        let (destination, gate) = Destination::held();
        let service = Service::start(&[]);
        let token = token(&destination.url);
        let script = Script::new(tools, &service, &token);
        let mut running = script.start(&[&destination.url]);
        running.give(b"{}");
        running.line();
        let found = files(&script.tmp());
        assert!(!found.is_empty());
        for file in &found {
            let folder = fs::metadata(file.parent().unwrap()).unwrap();
            assert_eq!(folder.permissions().mode() & 0o077, 0, "{file:?}");
            let content = fs::read(file).unwrap_or_default();
            let holds = content
                .windows(token.len())
                .any(|part| part == token.as_bytes());
            assert!(!holds, "{file:?}");
        }
        for process in fs::read_dir("/proc").unwrap() {
            let line = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&line).contains(&token));
        }
        gate.open();
        assert_eq!(running.ended().code, Some(0));
        assert!(files(&script.tmp()).is_empty());
    }
}

#[test]
fn its_messages_name_it_as_it_was_called() {
    let folder = tempfile::tempdir().unwrap();
    let installed = folder.path().join("export-service-send");
    symlink(root().join("scripts/export"), &installed).unwrap();
    let run =
        |argument: &str| -> Output { Command::new(&installed).arg(argument).output().unwrap() };
    let help = String::from_utf8(run("--help").stdout).unwrap();
    assert!(
        help.starts_with("usage: export-service-send --token-file"),
        "{help}"
    );
    let wrong = String::from_utf8(run("--no-such").stderr).unwrap();
    assert!(
        wrong.starts_with("export-service-send: there is no option"),
        "{wrong}"
    );
}
