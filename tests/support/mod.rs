//! What the tests share: the real program on a port of its own, a scripted destination, and a
//! plain HTTP client.
//!
//! Each service logs at `-vv`, and every log is searched for tokens, secrets and payloads when
//! its service ends: see [`Service`].

// Each test file uses its own part of this.
#![allow(dead_code)]

pub mod network;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use export_service::auth::{Key, Macaroon};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tempfile::TempDir;

/// The macaroon secret of every service here; it must not be in any log.
pub const SECRET: &str = "MARK-secret";
/// Part of every payload here; it must not be in any log.
pub const MARK: &str = "MARK-payload";
/// This machine, whichever address `localhost` resolves to.
const LOOPBACK: &str = "127.0.0.0/8,::1/128";
/// How every v1 token begins; it must not be in any log either.
const TOKEN: &str = "MDAwZWxvY2F0aW9u";

/// The name of the file that fills half of a small disk.
const BALLAST: &str = "ballast";

/// Long enough for anything that has to happen, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test; another build of it can be named, like the static one.
pub fn program() -> PathBuf {
    std::env::var_os("EXPORT_SERVICE_BIN").map_or_else(
        || env!("CARGO_BIN_EXE_export-service").into(),
        PathBuf::from,
    )
}

/// A copy of the program in this folder, to where every user can reach it. Not made by this process: whatever
/// another of its threads started meanwhile would hold the copy open for writing, and such a file cannot be run.
pub fn program_in(folder: &Path) -> PathBuf {
    let copy = folder.join("export-service");
    let done = Command::new("cp").arg(program()).arg(&copy).status();
    assert!(done.unwrap().success());
    copy
}

/// Runs the program that is its arguments as another user, who has this number. Only root can.
pub fn other_user() -> Command {
    let mut command = Command::new("setpriv");
    command
        .env_clear()
        .args(["--reuid=64123", "--clear-groups"]);
    command
}

/// Sets the flag when it is dropped, after a failed assertion too, so that other threads end and are not
/// waited for forever.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reports that this test could not run here. Written without the print macros, whose output is captured,
/// so that a whole run shows it too.
pub fn not_run(why: &str) {
    let current = thread::current();
    let test = current.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "NOT RUN: {test}: {why}");
}

/// Delays the syncs of a running service, as strace's `inject` says: all of them, or those of one `file` of its
/// folder. Returns strace and the lines in which it tells of them; none where it may not do that here.
pub fn delay_syncs(
    service: &Service,
    file: Option<&str>,
    inject: &str,
) -> Option<(Child, std::io::Lines<BufReader<ChildStderr>>)> {
    let mut strace = Command::new("strace")
        .args(["-f", "-p", &service.pid().to_string()])
        .args(["-e", "trace=fsync,fdatasync", "-e"])
        .arg(format!("inject=fsync,fdatasync:{inject}"))
        .args(file.map(|file| format!("--trace-path={}", service.folder().join(file).display())))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(strace.stderr.take().unwrap()).lines();
    // It may begin with the path that it has resolved.
    let attached = lines
        .by_ref()
        .map(Result::unwrap)
        .find(|line| line.contains("Process"));
    if !attached.is_some_and(|line| line.contains("attached")) {
        strace.wait().unwrap();
        not_run("strace may not attach to another process");
        return None;
    }
    Some((strace, lines))
}

/// Waits for a process to end by itself.
pub fn exited(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            panic!("still running");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A number of `/proc/PID/status`, like `Threads` or `VmRSS` (in kB). None if the process has ended; while it
/// ends, it has no memory.
pub fn figure(pid: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut lines = status.lines();
    let line = lines.find(|line| line.starts_with(&format!("{name}:")))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The CPU time that all threads of a process have used so far; the kernel counts in 10 ms. None if it has
/// ended.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    let ticks = fields.split(' ').skip(11).take(2);
    let ticks: u64 = ticks.map(|field| field.parse::<u64>().unwrap()).sum();
    Some(Duration::from_millis(10 * ticks))
}

/// Sends a signal by its name, like `TERM`.
pub fn signal(pid: u32, name: &str) {
    let arguments = [format!("-{name}"), pid.to_string()];
    let sent = Command::new("kill").args(arguments).status().unwrap();
    assert!(sent.success());
}

/// A connection from this address of this machine, like 127.0.0.2.
pub fn connect(from: [u8; 4], to: SocketAddr) -> std::io::Result<TcpStream> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
    // A service that is started meanwhile must not inherit it.
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddr::from((from, 0)))?;
    rustix::net::connect(&socket, &to)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The program with an empty environment, free of the tester's own variables.
pub fn command() -> Command {
    let mut command = Command::new(program());
    command.env_clear().stdin(Stdio::null());
    command
}

/// The Python that `scripts/test` sets up with the real peers' packages.
pub fn python() -> Command {
    let python = root().join("target/venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: scripts/test sets it up",
        python.display()
    );
    Command::new(python)
}

/// The project's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A running service, killed with -9 when it is dropped.
pub struct Service {
    pub address: SocketAddr,
    child: Child,
    log: Arc<Log>,
    secret: Option<&'static str>,
    arguments: Vec<String>,
    folder: Arc<TempDir>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    /// The lines as they were written.
    texts: Vec<String>,
    /// The lines parsed; null if one is not JSON.
    values: Vec<Value>,
    /// No more lines will follow.
    ended: bool,
}

impl Log {
    /// Reads to the end, but not past the first `listening` while `reading` is closed. Each line is parsed
    /// once, here: a slow reader makes the service lose lines.
    fn read(&self, stderr: ChildStderr, reading: &Gate) {
        for text in BufReader::new(stderr).lines() {
            let text = text.unwrap();
            let value: Value = serde_json::from_str(&text).unwrap_or_default();
            let listening = value["event"] == "listening";
            let mut lines = self.lines.lock().unwrap();
            lines.texts.push(text);
            lines.values.push(value);
            drop(lines);
            self.changed.notify_all();
            if listening {
                reading.pass();
            }
        }
        self.lines.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    /// Waits until `found` finds something in the lines that have come since its last call.
    fn find<T>(&self, what: &str, mut found: impl FnMut(&[Value]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lines.lock().unwrap();
        let mut seen = 0;
        loop {
            if let Some(found) = found(&lines.values[seen..]) {
                return found;
            }
            seen = lines.values.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.ended || left.is_zero() {
                let texts = lines.texts.clone();
                // The log is still to be shown when the service is dropped.
                drop(lines);
                panic!("no {what} in {texts:#?}");
            }
            lines = self.changed.wait_timeout(lines, left).unwrap().0;
        }
    }
}

impl Service {
    /// A service with these arguments besides the usual, in a new data folder.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), arguments)
    }

    /// A service that speaks TLS.
    pub fn start_secure(identity: &Identity, arguments: &[&str]) -> Self {
        let pem = identity.pem();
        let tls = ["--tls-pem", pem.to_str().unwrap()];
        Self::start(&[&tls, arguments].concat())
    }

    /// A service whose log is not read from when it listens until the gate is opened.
    pub fn start_with_unread_log(arguments: &[&str]) -> (Self, Gate) {
        let reading = Gate::default();
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let arguments = [&["--allow-network", LOOPBACK], arguments].concat();
        let service = Self::launch_read(folder, command(), Some(SECRET), &arguments, &reading);
        (service, reading)
    }

    /// A service that runs as a user who may have this many threads. `None` unless the tests run as root,
    /// which this needs.
    pub fn start_with_threads(most: u32) -> Option<Self> {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let folder = Arc::new(tempfile::tempdir().unwrap());
        if std::fs::metadata(folder.path()).unwrap().uid() != 0 {
            not_run("only root can run the service as another user");
            return None;
        }
        let everyone = PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(folder.path(), everyone).unwrap();
        let mut command = other_user();
        command
            .args(["prlimit", &format!("--nproc={most}")])
            .arg(program_in(folder.path()));
        let arguments = ["--allow-network", LOOPBACK];
        Some(Self::launch(folder, command, Some(SECRET), &arguments))
    }

    /// Lowers the limit of [`Service::start_with_threads`]: no thread is started while there are this many.
    pub fn limit_threads(&self, most: u32) {
        let done = other_user()
            .args(["prlimit", &format!("--pid={}", self.pid())])
            .arg(format!("--nproc={most}:"))
            .status()
            .unwrap();
        assert!(done.success());
    }

    /// A service that may not send to this machine, unlike the others here.
    pub fn start_bare(arguments: &[&str]) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        Self::launch(folder, command(), Some(SECRET), arguments)
    }

    /// A service that is given no secret.
    pub fn start_without_secret(arguments: &[&str]) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let arguments = [&["--allow-network", LOOPBACK], arguments].concat();
        Self::launch(folder, command(), None, &arguments)
    }

    /// A service whose data folder is a disk of this many bytes, half filled by another program's file.
    /// `None` if the system does not allow such a disk.
    pub fn start_on_small_disk(bytes: u64) -> Option<Self> {
        let own_mounts = ["--map-root-user", "--mount"];
        let tried = Command::new("unshare")
            .args(own_mounts)
            .args(["mount", "-t", "tmpfs", "tmpfs", "/mnt"])
            .output()
            .unwrap();
        if !tried.status.success() {
            not_run(
                "a disk of its own takes a user namespace with mounts, which is not allowed here",
            );
            return None;
        }
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let data = folder.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let script = format!(
            "mount -t tmpfs -o size={bytes} tmpfs {data} &&
             head -c {} /dev/zero >{data}/{BALLAST} && exec {} \"$@\"",
            bytes / 2,
            program().display(),
            data = data.display(),
        );
        // A mount that only this process sees, and that ends with it.
        let mut command = Command::new("unshare");
        command
            .args(own_mounts)
            .args(["sh", "-c", &script, "export-service"]);
        let arguments = ["--allow-network", LOOPBACK];
        Some(Self::launch(folder, command, Some(SECRET), &arguments))
    }

    /// A service that finds names in this file, in the format of `/etc/hosts`, and may send to this
    /// machine.
    pub fn start_with_hosts(hosts: &Path, arguments: &[&str]) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let script = format!(
            "mount --bind {} /etc/hosts && exec {} \"$@\"",
            hosts.display(),
            program().display(),
        );
        let mut command = Command::new("unshare");
        command.args([
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            &script,
            "export-service",
        ]);
        let arguments = [&["--allow-network", LOOPBACK], arguments].concat();
        Self::launch(folder, command, Some(SECRET), &arguments)
    }

    /// Removes the other program's file; see [`Service::start_on_small_disk`].
    pub fn remove_ballast(&self) {
        let seen_by_it = self.folder().strip_prefix("/").unwrap().join(BALLAST);
        std::fs::remove_file(format!(
            "/proc/{}/root/{}",
            self.pid(),
            seen_by_it.display()
        ))
        .unwrap();
    }

    /// A service whose data folder is `data` in this folder, which may hold files already.
    pub fn start_in(folder: Arc<TempDir>, arguments: &[&str]) -> Self {
        let arguments = [&["--allow-network", LOOPBACK], arguments].concat();
        Self::launch(folder, command(), Some(SECRET), &arguments)
    }

    /// The same with these variables in its environment.
    pub fn start_with_variables(variables: &[(&str, &str)]) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let mut command = command();
        command.envs(variables.iter().copied());
        Self::launch(
            folder,
            command,
            Some(SECRET),
            &["--allow-network", LOOPBACK],
        )
    }

    fn launch(
        folder: Arc<TempDir>,
        command: Command,
        secret: Option<&'static str>,
        arguments: &[&str],
    ) -> Self {
        let reading = Gate::default();
        reading.open();
        Self::launch_read(folder, command, secret, arguments, &reading)
    }

    fn launch_read(
        folder: Arc<TempDir>,
        command: Command,
        secret: Option<&'static str>,
        arguments: &[&str],
        reading: &Gate,
    ) -> Self {
        let mut service = Self::spawn(folder, command, secret, arguments, reading);
        let listening = service.event("listening", |_| true);
        service.address = listening["address"].as_str().unwrap().parse().unwrap();
        service
    }

    /// Starts this command, which is the program or runs it, on `data` in this folder. Does not wait until
    /// it listens.
    pub fn begin(folder: Arc<TempDir>, command: Command, arguments: &[&str]) -> Self {
        let reading = Gate::default();
        reading.open();
        let arguments = [&["--allow-network", LOOPBACK], arguments].concat();
        Self::spawn(folder, command, Some(SECRET), &arguments, &reading)
    }

    /// Waits until it listens, after [`Service::begin`]. False if it ended before that.
    pub fn listens(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            let mut values = lines.values.iter();
            if let Some(line) = values.find(|line| line["event"] == "listening") {
                self.address = line["address"].as_str().unwrap().parse().unwrap();
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.ended || left.is_zero() {
                return false;
            }
            lines = self.log.changed.wait_timeout(lines, left).unwrap().0;
        }
    }

    fn spawn(
        folder: Arc<TempDir>,
        mut command: Command,
        secret: Option<&'static str>,
        arguments: &[&str],
        reading: &Gate,
    ) -> Self {
        let mut child = command
            .args([
                "serve",
                "--port",
                "0",
                "--bind",
                "127.0.0.1",
                "--log-format",
                "json",
                "-vv",
            ])
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .args(arguments)
            .envs(secret.map(|secret| ("EXPORT_SECRET", secret)))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Log::default());
        let (stderr, written) = (child.stderr.take().unwrap(), log.clone());
        let reading = reading.clone();
        thread::spawn(move || written.read(stderr, &reading));
        Self {
            address: SocketAddr::from(([0; 4], 0)),
            child,
            log,
            secret,
            arguments: arguments
                .iter()
                .map(|&argument| argument.to_owned())
                .collect(),
            folder,
        }
    }

    /// Waits for a log line with this event for which `wanted` holds.
    pub fn event(&self, event: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.log.find(&format!("{event:?}"), |lines| {
            let mut lines = lines.iter();
            let found = lines.find(|line| line["event"] == event && wanted(line));
            found.cloned()
        })
    }

    /// Waits until there are this many log lines with this event.
    pub fn events(&self, event: &str, count: u64) {
        self.total(event, count, |_| 1);
    }

    /// Waits until this many failed attempts and results are on disk.
    pub fn reports(&self, count: u64) {
        self.total("committed", count, |line| line["reports"].as_u64().unwrap());
    }

    fn total(&self, event: &str, least: u64, of: impl Fn(&Value) -> u64) {
        let mut total = 0;
        self.log.find(&format!("{least} of {event:?}"), |lines| {
            let lines = lines.iter().filter(|line| line["event"] == event);
            total += lines.map(&of).sum::<u64>();
            (total >= least).then_some(())
        });
    }

    /// All log lines so far; all there will ever be, once the service has ended.
    pub fn log(&self) -> Vec<String> {
        self.log.lines.lock().unwrap().texts.clone()
    }

    pub fn folder(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// See [`figure`].
    pub fn figure(&self, name: &str) -> u64 {
        figure(self.pid(), name).unwrap()
    }

    /// How many threads of this name it has.
    pub fn threads(&self, name: &str) -> usize {
        self.thread_states(name).len()
    }

    /// Whether all threads of this name wait for something.
    pub fn waits(&self, name: &str) -> bool {
        self.thread_states(name).iter().all(|state| *state == 'S')
    }

    fn thread_states(&self, name: &str) -> Vec<char> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let stats =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let states = stats.filter_map(|stat| {
            let (thread, state) = stat.split_once(") ")?;
            let (_, found) = thread.split_once('(')?;
            (found == name).then(|| state.chars().next())?
        });
        states.collect()
    }

    /// See [`cpu_time`].
    pub fn cpu_time(&self) -> Duration {
        cpu_time(self.pid()).unwrap()
    }

    /// See [`signal`].
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for the process to end by itself, and for the end of its log.
    pub fn ended(&mut self) -> ExitStatus {
        let status = self.exited();
        self.log_ends();
        status
    }

    /// Waits for the process to end by itself.
    pub fn exited(&mut self) -> ExitStatus {
        exited(&mut self.child)
    }

    fn log_ends(&self) {
        let lines = self.log.lines.lock().unwrap();
        let ended = self
            .log
            .changed
            .wait_timeout_while(lines, PATIENCE, |lines| !lines.ended);
        assert!(ended.unwrap().0.ended, "something still has the log open");
    }

    /// Ends the process at once and starts it again on the same folder.
    pub fn kill_and_restart(self) -> Self {
        self.kill_and_restart_after(|| {})
    }

    /// The same, and runs a function while the service is down.
    pub fn kill_and_restart_after(self, meanwhile: impl FnOnce()) -> Self {
        let (folder, arguments) = (self.folder.clone(), self.arguments.clone());
        let secret = self.secret;
        drop(self);
        meanwhile();
        Self::launch(
            folder,
            command(),
            secret,
            &arguments.iter().map(String::as_str).collect::<Vec<_>>(),
        )
    }

    /// The same, with other arguments and with a secret.
    pub fn kill_and_restart_with(self, arguments: &[&str]) -> Self {
        let folder = self.folder.clone();
        drop(self);
        Self::start_in(folder, arguments)
    }

    /// POSTs JSON with this token to a path.
    pub fn post(&self, path: &str, token: &str, body: &Value) -> Response {
        self.request(
            "POST",
            path,
            &[("X-Api-Key", token)],
            body.to_string().as_bytes(),
        )
    }

    /// Makes any request.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        Response::read(self.send(method, path, headers, body))
    }

    /// Sends any request and leaves the answer for later.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> TcpStream {
        let mut stream = self.connect_from([127, 0, 0, 1]);
        let request = Self::written(method, path, headers, body);
        stream.write_all(&request).unwrap();
        stream
    }

    /// A request as it goes over the wire.
    pub fn written(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n");
        if headers.iter().all(|(name, _)| *name != "Connection") {
            head += "Connection: close\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    /// See [`connect`].
    pub fn connect_from(&self, address: [u8; 4]) -> TcpStream {
        connect(address, self.address).unwrap()
    }

    /// Whether the process has not ended since it was started.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Submits a payload and returns the export's id.
    pub fn submit(&self, url: &str, data: &Value) -> String {
        let body = serde_json::json!({ "uri": url, "data": data });
        let response = self.post("/export", &token(url), &body);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()["id"].as_str().unwrap().to_owned()
    }

    /// Long-polls until the export is finished and returns its `ext_response`.
    pub fn result(&self, url: &str, id: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let body = serde_json::json!({ "id": id });
            let response = self.post("/lp/export?timeout=10", &token(url), &body);
            assert_eq!(response.status, 200, "{}", response.body);
            let json = response.json();
            if json["state"] == "Finished" {
                return json["ext_response"].clone();
            }
            assert!(Instant::now() < deadline, "still {}", response.body);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("{}", self.log().join("\n"));
            return;
        }
        self.log_ends();
        for line in self.log() {
            for secret in [SECRET, MARK, TOKEN, "X-Api-Key: "] {
                assert!(!line.contains(secret), "the log holds {secret:?}: {line}");
            }
        }
    }
}

/// A peer written in Python, which exchanges lines of JSON with the tests.
pub struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts a script in `tests/peers`.
    pub fn start(script: &str, arguments: &[&Path]) -> Self {
        let mut child = python()
            .arg(root().join("tests/peers").join(script))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let requests = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            requests,
            answers,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a value and waits for the answer.
    pub fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.requests, "{request}").unwrap();
        self.line()
    }

    /// Waits for its next line.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        assert!(answer.get("error").is_none(), "{answer}");
        answer
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A token for one destination and both endpoints, like those of the arbiter.
pub fn token(destination: &str) -> String {
    token_of("", destination)
}

/// The same with an identifier.
pub fn token_of(owner: &str, destination: &str) -> String {
    let caveats = [
        "path = *".to_owned(),
        "method = POST".to_owned(),
        "target = export-service".to_owned(),
        format!("destination = {destination}"),
    ];
    Macaroon::mint(&Key::derive(SECRET.as_bytes()), owner, caveats)
        .to_v1()
        .unwrap()
}

/// A payload that no log may hold.
pub fn payload(number: usize) -> Value {
    serde_json::json!({ "text": MARK, "number": number })
}

/// An HTTP response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    /// Reads one response.
    pub fn read(stream: TcpStream) -> Self {
        Self::next(&mut BufReader::new(stream))
    }

    /// Reads one of several responses.
    pub fn next(reader: &mut impl BufRead) -> Self {
        Self::try_next(reader).unwrap()
    }

    /// The same, from a connection that may end before the response does.
    pub fn try_next(reader: &mut impl BufRead) -> std::io::Result<Self> {
        let broken = |part: &str| std::io::Error::other(format!("broken off at {part:?}"));
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.strip_suffix("\r\n") {
                Some(line) => Ok(line.to_owned()),
                None => Err(broken(&line)),
            }
        };
        let status = line()?.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        while let Some((name, value)) = line()?.split_once(": ") {
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut response = Self {
            status,
            headers,
            body: String::new(),
        };
        let length = response.header("content-length").unwrap().parse().unwrap();
        reader.take(length).read_to_string(&mut response.body)?;
        if (response.body.len() as u64) < length {
            return Err(broken(&response.body));
        }
        Ok(response)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The code of an error.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap().to_owned()
    }
}

/// A certificate for this machine and its CA, made by openssl in the layout of a Databox: leaf, key and
/// public key in one file.
pub struct Identity {
    folder: TempDir,
}

impl Identity {
    /// With a key of this kind: `rsa` (PKCS#1), `pkcs8` or `ec` (SEC1).
    pub fn new(key: &str) -> Self {
        let identity = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        identity.renew(key);
        identity
    }

    /// Replaces the CA and the certificate with new ones.
    pub fn renew(&self, key: &str) {
        let script = "
            cd \"$1\"
            curve='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
            names=subjectAltName=DNS:localhost,DNS:export-service,IP:127.0.0.1
            openssl req -x509 $curve -keyout ca.key -out ca.pem -days 2 -subj /CN=Databox
            case $2 in
                ec) kind=$curve ;;
                *) kind='-newkey rsa:2048 -nodes' ;;
            esac
            openssl req $kind -keyout pkcs8.key -out leaf.csr -subj /CN=export-service -addext $names
            openssl x509 -req -in leaf.csr -copy_extensions copy -days 2 \\
                -CA ca.pem -CAkey ca.key -CAcreateserial -out leaf.pem
            case $2 in
                rsa) openssl rsa -in pkcs8.key -traditional -out own.key ;;
                ec) openssl ec -in pkcs8.key -out own.key ;;
                pkcs8) cp pkcs8.key own.key ;;
            esac
            openssl pkey -in pkcs8.key -pubout -out public.pem
            cat leaf.pem own.key public.pem >new.pem
            mv new.pem DATABOX.pem";
        let made = Command::new("sh")
            .args(["-ec", script, "identity"])
            .arg(self.folder.path())
            .arg(key)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "{errors}");
    }

    /// The secrets folder with `DATABOX.pem` in it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The file for the service.
    pub fn pem(&self) -> PathBuf {
        self.folder.path().join("DATABOX.pem")
    }

    /// The CA for its clients.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// What clients need to trust it.
    pub fn trust(&self) -> std::io::Result<Arc<ClientConfig>> {
        let ca = CertificateDer::from_pem_file(self.ca()).map_err(std::io::Error::other)?;
        let mut roots = RootCertStore::empty();
        roots.add(ca).map_err(std::io::Error::other)?;
        let builder = ClientConfig::builder().with_root_certificates(roots);
        Ok(Arc::new(builder.with_no_client_auth()))
    }

    /// openssl's client, connected to a service, with its input and output. It ends when the service closes
    /// the connection.
    pub fn client(&self, service: &Service) -> (ChildStdin, BufReader<ChildStdout>) {
        let mut child = Command::new("openssl")
            .args(["s_client", "-quiet", "-CAfile"])
            .arg(self.ca())
            .args(["-connect", &service.address.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        thread::spawn(move || child.wait());
        (stdin, BufReader::new(stdout))
    }
}

/// A URL where nothing listens, and its address, so that a test can listen there later.
pub fn nowhere() -> (String, SocketAddr) {
    use rustix::net::sockopt::set_socket_reuseaddr;
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    let reserved = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    set_socket_reuseaddr(&reserved, true).unwrap();
    bind(&reserved, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&reserved).unwrap()).unwrap();
    // Bound for as long as the test runs, so that the system gives the port to nobody else; a
    // listener may have the same address as long as this one does not listen.
    std::mem::forget(reserved);
    (format!("http://{address}/in"), address)
}

/// What arrived at a destination.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub head: String,
    pub body: Vec<u8>,
}

impl Arrival {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    pub fn text(&self) -> &str {
        str::from_utf8(&self.body).unwrap()
    }
}

/// How a destination reacts to a request.
pub enum Reaction {
    /// Answers with this status and body.
    Answer(u16, Vec<u8>),
    /// Writes these bytes and closes the connection.
    Raw(Vec<u8>),
}

/// Answers 200 with `ok`.
pub fn ok() -> Reaction {
    Reaction::Answer(200, b"ok".to_vec())
}

/// A destination on a real socket, which does what its script says.
pub struct Destination {
    pub url: String,
    arrivals: Mutex<Receiver<Arrival>>,
}

impl Destination {
    /// A destination whose every request is answered by `script`, which may block.
    pub fn start(script: impl Fn(&Arrival) -> Reaction + Send + Sync + 'static) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), script)
    }

    /// The same at an address of the test's choice.
    pub fn start_at(
        address: SocketAddr,
        script: impl Fn(&Arrival) -> Reaction + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let url = format!("http://{}/in", listener.local_addr().unwrap());
        let (sender, arrivals) = channel();
        let script = Arc::new(script);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (sender, script) = (sender.clone(), script.clone());
                thread::spawn(move || Self::serve(&stream.unwrap(), &sender, &*script));
            }
        });
        Self {
            url,
            arrivals: Mutex::new(arrivals),
        }
    }

    fn serve(
        stream: &TcpStream,
        arrivals: &Sender<Arrival>,
        script: &dyn Fn(&Arrival) -> Reaction,
    ) {
        let mut reader = BufReader::new(stream);
        let mut writer = stream;
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                if reader.read_line(&mut head).unwrap_or(0) == 0 {
                    return;
                }
            }
            let mut arrival = Arrival {
                head,
                body: Vec::new(),
            };
            let length = arrival
                .header("content-length")
                .map_or(0, |text| text.parse().unwrap());
            arrival.body.resize(length, 0);
            if reader.read_exact(&mut arrival.body).is_err() {
                return;
            }
            // Recorded before it is answered, so that a test that has the answer sees the arrival.
            let _ = arrivals.send(arrival.clone());
            let written = match script(&arrival) {
                Reaction::Answer(status, body) => {
                    let head = format!(
                        "HTTP/1.1 {status} Whatever\r\nContent-Length: {}\r\n\r\n",
                        body.len()
                    );
                    writer.write_all(&[head.as_bytes(), &body].concat())
                }
                Reaction::Raw(bytes) => {
                    let _ = writer.write_all(&bytes);
                    return;
                }
            };
            if written.is_err() {
                return;
            }
        }
    }

    /// A destination that answers nothing until the gate is opened, then 200.
    pub fn held() -> (Self, Gate) {
        let gate = Gate::default();
        let passing = gate.clone();
        let destination = Self::start(move |_| {
            passing.pass();
            ok()
        });
        (destination, gate)
    }

    /// Waits for the next request to arrive.
    pub fn arrival(&self) -> Arrival {
        self.arrivals
            .lock()
            .unwrap()
            .recv_timeout(PATIENCE)
            .unwrap()
    }

    /// The requests that have arrived and were not taken yet.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.arrivals.lock().unwrap().try_iter().collect()
    }
}

/// Blocks scripts until it is opened.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// Blocks until the gate is open.
    pub fn pass(&self) {
        let mut open = self.0.0.lock().unwrap();
        while !*open {
            open = self.0.1.wait(open).unwrap();
        }
    }
}

/// Starts the program with this command on a folder, and stops it once it listens. Returns whether it did,
/// its exit code if it ended by itself, and its output.
pub fn try_start(mut command: Command, folder: &Path) -> (bool, Option<i32>, String) {
    let mut child = command
        .args(["serve", "--port", "0", "--bind", "127.0.0.1"])
        .args(["--log-format", "json", "--allow-network", "127.0.0.0/8"])
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
    (listens, child.wait().unwrap().code(), log)
}
