//! The service's process over all its runs, its clock and its log.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::model::Model;
use crate::support::{self, Identity, MARK, SECRET};

/// How v1 tokens begin.
const TOKEN: &str = "MDAwZWxvY2F0aW9u";
/// Where Debian's package `faketime` has its library.
const FAKETIME: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
];
/// The log file is rotated at this size.
const LOG_FILE: u64 = 16 * 1024 * 1024;
/// The longest that a stop or a start may take.
const RESTART: Duration = Duration::from_secs(60);

/// The service.
pub struct Process {
    pub address: SocketAddr,
    pub folder: PathBuf,
    pub identity: Identity,
    pub log: Arc<Log>,
    model: Arc<Model>,
    arguments: Vec<String>,
    child: Mutex<Option<Child>>,
    /// Counted up before each stop and after each start: odd while the service may be unreachable.
    epoch: AtomicUsize,
    /// The clock's offset is read from this file; none where it cannot be changed.
    clock: Option<PathBuf>,
    /// When the clock was set, and in which run.
    clock_set: Mutex<Vec<(Instant, usize)>>,
}

impl Process {
    /// Starts the service with a new data folder in `folder`.
    pub fn start(folder: &Path, model: Arc<Model>, arguments: &[&str]) -> Self {
        let identity = Identity::new("ec");
        let (_, address) = support::nowhere();
        let clock = folder.join("clock");
        let library = FAKETIME.iter().find(|path| Path::new(path).exists());
        let mut process = Self {
            address,
            folder: folder.to_owned(),
            identity,
            log: Arc::new(Log::new(folder)),
            model,
            arguments: arguments.iter().map(|&text| text.to_owned()).collect(),
            child: Mutex::new(None),
            epoch: AtomicUsize::new(1),
            clock: library.map(|_| clock),
            clock_set: Mutex::new(Vec::new()),
        };
        process.write_clock(0);
        process.launch();
        let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid())).unwrap();
        if !maps.contains("faketime") {
            process.clock = None;
            eprintln!("NOT RUN: the clock cannot be set: no libfaketime, or a static program");
        }
        process
    }

    /// Starts it again after [`Process::stop`].
    pub fn launch(&self) {
        let mut command = support::command();
        command
            .args(["serve", "--bind", "127.0.0.1"])
            .args(["--port", &self.address.port().to_string()])
            .arg("--data-dir")
            .arg(self.data())
            .arg("--tls-pem")
            .arg(self.identity.pem())
            .args(&self.arguments)
            .env("EXPORT_SECRET", SECRET)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(clock) = &self.clock {
            let library = FAKETIME.iter().find(|path| Path::new(path).exists());
            command
                .env("LD_PRELOAD", library.unwrap())
                .env("FAKETIME_TIMESTAMP_FILE", clock)
                .env("FAKETIME_CACHE_DURATION", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        let mut child = command.spawn().unwrap();
        PID.store(child.id().cast_signed(), Ordering::Relaxed);
        let (stderr, log, model) = (
            child.stderr.take().unwrap(),
            self.log.clone(),
            self.model.clone(),
        );
        let listening = Arc::new(AtomicBool::new(false));
        let heard = listening.clone();
        thread::spawn(move || log.read(stderr, &heard, &model));
        let deadline = Instant::now() + RESTART;
        while !listening.load(Ordering::Relaxed) {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the service did not start: {status}");
            }
            assert!(Instant::now() < deadline, "the service does not start");
            thread::sleep(Duration::from_millis(5));
        }
        *self.child.lock().unwrap() = Some(child);
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Stops the service with this signal, and starts it again after a while.
    pub fn restart(&self, signal: &str, down: Duration) {
        self.stop(signal);
        thread::sleep(down);
        self.launch();
    }

    /// Stops the service; how it ends must fit the signal.
    pub fn stop(&self, signal: &str) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let mut child = self.child.lock().unwrap().take().unwrap();
        support::signal(child.id(), signal);
        let deadline = Instant::now() + RESTART;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() >= deadline {
                self.model.broken(format!("{signal} did not end it"));
                child.kill().unwrap();
            }
            thread::sleep(Duration::from_millis(5));
        };
        PID.store(0, Ordering::Relaxed);
        // What libfaketime leaves behind when it is killed.
        for name in ["faketime_shm", "sem.faketime_sem"] {
            let _ = fs::remove_file(format!("/dev/shm/{name}_{}", child.id()));
        }
        let expected = match signal {
            "KILL" => status.signal() == Some(9),
            _ => status.success(),
        };
        if !expected {
            self.model.broken(format!("{signal} ended it: {status}"));
        }
    }

    /// Notes it if the process has ended by itself, and starts it again.
    pub fn check_running(&self) {
        let mut child = self.child.lock().unwrap();
        let ended = child.as_mut().and_then(|child| child.try_wait().unwrap());
        if let Some(status) = ended {
            *child = None;
            drop(child);
            self.model.broken(format!("it ended by itself: {status}"));
            self.epoch.fetch_add(1, Ordering::SeqCst);
            self.launch();
        }
    }

    /// Replaces the certificate and tells the service.
    pub fn renew_certificate(&self) {
        self.identity.renew("ec");
        self.log.wait_for("certificate read again", || {
            support::signal(self.pid(), "HUP");
        });
    }

    /// Sets the clock to this many seconds ahead, or back if negative.
    pub fn set_clock(&self, offset: i64) {
        self.write_clock(offset);
        // Between two runs, what all runs have stored may be affected, of which 1 is the first.
        let run = match self.epoch() % 2 {
            0 => self.run(),
            _ => 0,
        };
        self.clock_set.lock().unwrap().push((Instant::now(), run));
    }

    fn write_clock(&self, offset: i64) {
        if let Some(clock) = &self.clock {
            // Replaced at once: half of it would be another time.
            let new = clock.with_extension("new");
            fs::write(&new, format!("{offset:+}\n")).unwrap();
            fs::rename(new, clock).unwrap();
        }
    }

    pub fn has_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Whether the clock was set since then, and what was stored in `run` may not have moved with it.
    pub fn was_clock_set(&self, since: Instant, run: usize) -> bool {
        let set = self.clock_set.lock().unwrap();
        set.iter().any(|&(at, during)| {
            // A second for the library to read the file again.
            at + Duration::from_secs(2) >= since && during != run
        })
    }

    /// Odd while the service may be unreachable; another number after each restart.
    pub fn epoch(&self) -> usize {
        self.epoch.load(Ordering::SeqCst)
    }

    /// The number of this run.
    pub fn run(&self) -> usize {
        self.epoch() / 2
    }

    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap().as_ref().map_or(0, Child::id)
    }
}

/// The service's process, 0 if there is none; for [`kill_service`].
static PID: AtomicI32 = AtomicI32::new(0);

/// Kills the service, whatever else is going on.
pub fn kill_service() {
    if let Some(pid) = rustix::process::Pid::from_raw(PID.load(Ordering::Relaxed)) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// The log of all runs, which is read, searched, written to a file, and counted.
pub struct Log {
    file: PathBuf,
    /// While this is set nobody reads.
    pub paused: AtomicBool,
    pub bytes: AtomicU64,
    pub lines: AtomicU64,
    last: Mutex<Vec<(String, bool)>>,
}

impl Log {
    fn new(folder: &Path) -> Self {
        Self {
            file: folder.join("service.log"),
            paused: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            lines: AtomicU64::new(0),
            last: Mutex::new(Vec::new()),
        }
    }

    fn read(&self, stderr: ChildStderr, listening: &AtomicBool, model: &Model) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(&self.file)
            .unwrap();
        for line in BufReader::new(stderr).split(b'\n') {
            let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
            writeln!(file, "{line}").unwrap();
            self.bytes
                .fetch_add(line.len() as u64 + 1, Ordering::Relaxed);
            self.lines.fetch_add(1, Ordering::Relaxed);
            if line.contains(" listening ") {
                listening.store(true, Ordering::Relaxed);
            }
            // Whether an export may be given up is checked where its result is.
            let is_error = line.contains(" ERROR ") && !line.contains(" ERROR given up ");
            if line.contains("panic") || is_error {
                model.broken(format!("log: {line}"));
            }
            if [SECRET, MARK, TOKEN].iter().any(|what| line.contains(what)) {
                model.broken("the log holds a secret, a token or a payload".into());
            }
            for (text, found) in self.last.lock().unwrap().iter_mut() {
                *found |= line.contains(text.as_str());
            }
            if file.metadata().unwrap().len() > LOG_FILE {
                fs::rename(&self.file, self.file.with_extension("log.1")).unwrap();
                file = File::create(&self.file).unwrap();
            }
            while self.paused.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Waits for a line that comes after `cause` was run.
    fn wait_for(&self, text: &str, cause: impl FnOnce()) {
        self.last.lock().unwrap().push((text.to_owned(), false));
        cause();
        let deadline = Instant::now() + RESTART;
        while !self.last.lock().unwrap().iter().all(|(_, found)| *found) {
            assert!(Instant::now() < deadline, "no {text:?} in the log");
            thread::sleep(Duration::from_millis(20));
        }
        self.last.lock().unwrap().clear();
    }
}
