//! The processes that are measured: the program as a service, and this program again as one of the limits.
//! What they use is read from `/proc`.

use std::collections::HashMap;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use tempfile::TempDir;

use crate::load::{Client, Server, Work};
use crate::support::{self, PATIENCE, SECRET};

/// Limits that no row reaches, so that they are not what is measured.
const NO_LIMITS: [&str; 10] = [
    "--max-store",
    "100000000000",
    "--max-pending",
    "100000000",
    "--max-connections",
    "2000",
    "--max-connections-per-peer",
    "2000",
    "--attempt-timeout",
    "10m",
];

/// How often a service that starts is tried.
const TRY_EVERY: Duration = Duration::from_micros(200);

/// strace, which is no parent of the service and stops it only at the calls that are counted.
const TRACE: [&str; 4] = ["-D", "-f", "--seccomp-bpf", "-qq"];
/// The file in which they are.
const SYNCS: &str = "syncs";

/// A new folder, on the disk that the project is on.
pub fn new_folder() -> Arc<TempDir> {
    Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap())
}

/// What is counted of a service, at some cost.
#[derive(Clone, Copy, Default)]
pub enum Counted {
    #[default]
    Nothing,
    /// By strace, which stops the service at each.
    Syncs,
    /// By this program, which is the service then.
    Allocations,
}

impl Counted {
    /// A program that serves, without its arguments.
    fn command(self, folder: &Path) -> Command {
        match self {
            Self::Nothing => Command::new(support::program()),
            Self::Syncs => {
                let mut command = Command::new("strace");
                command
                    .args(TRACE)
                    .args(["-e", "trace=fsync,fdatasync", "-o"])
                    .arg(folder.join(SYNCS))
                    .arg(support::program());
                command
            }
            Self::Allocations => {
                let mut command = Command::new(env::current_exe().unwrap());
                command.arg("counted");
                command
            }
        }
    }
}

/// How the program is started.
#[derive(Default)]
pub struct Setup<'a> {
    /// Where its data folder is; a new folder if none is given.
    pub folder: Option<Arc<TempDir>>,
    pub arguments: &'a [&'a str],
    /// For a service with `--tls-pem`.
    pub trust: Option<Arc<ClientConfig>>,
    pub counted: Counted,
}

/// The service, killed when this is dropped.
pub struct Service {
    pub server: Server,
    /// From its start to its first answer.
    pub start: Duration,
    process: Process,
    folder: Arc<TempDir>,
}

impl Service {
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_as(Setup {
            arguments,
            ..Setup::default()
        })
    }

    pub fn start_as(setup: Setup<'_>) -> Self {
        let folder = setup.folder.unwrap_or_else(new_folder);
        let (_, address) = support::nowhere();
        let mut command = setup.counted.command(folder.path());
        command
            .args(["serve", "-q", "--bind", "127.0.0.1", "--port"])
            .arg(address.port().to_string())
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .args(["--allow-network", "127.0.0.0/8"])
            .args(NO_LIMITS)
            .args(setup.arguments)
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("EXPORT_SECRET", SECRET);
        let log = folder.path().join("log");
        let server = Server {
            address,
            trust: setup.trust,
        };
        let started = Instant::now();
        let mut process = Process::start(command.stderr(File::create(&log).unwrap()));
        while server.try_client().is_err() {
            let ended = process.child.try_wait().unwrap();
            if ended.is_some() || started.elapsed() > PATIENCE {
                let log = fs::read_to_string(&log).unwrap();
                panic!("the service does not start: {log}");
            }
            thread::sleep(TRY_EVERY);
        }
        Self {
            server,
            start: started.elapsed(),
            process,
            folder,
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn client(&self) -> Client {
        self.server.client()
    }

    /// Its database.
    pub fn database(&self) -> PathBuf {
        self.folder.path().join("data/exports.db")
    }

    /// Ends it as a signal to stop does, and returns its folder.
    pub fn stop(mut self) -> Arc<TempDir> {
        support::signal(self.pid(), "TERM");
        assert!(support::exited(&mut self.process.child).success());
        self.folder.clone()
    }

    /// See [`support::figure`].
    pub fn figure(&self, name: &str) -> f64 {
        support::figure(self.pid(), name).unwrap() as f64
    }

    /// Its resident memory in MB.
    pub fn memory(&self) -> f64 {
        self.figure("VmRSS") * 1024.0 / 1e6
    }

    /// How many syncs it has made, if they are counted.
    pub fn syncs(&self) -> usize {
        let calls = fs::read_to_string(self.folder.path().join(SYNCS)).unwrap();
        let begun = |line: &&str| line.contains("fsync(") || line.contains("fdatasync(");
        calls.lines().filter(begun).count()
    }

    /// How many allocations it has made, and of how many bytes, if they are counted.
    pub fn allocations(&mut self) -> [f64; 2] {
        let answer = self.process.ask("");
        let (count, bytes) = answer.split_once(' ').unwrap();
        [count, bytes].map(|number| number.parse().unwrap())
    }
}

/// Whether syncs can be counted here.
pub fn can_count_syncs() -> bool {
    let tried = Command::new("strace")
        .args(TRACE)
        .args(["-o", "/dev/null", "true"])
        .stderr(Stdio::null())
        .status();
    tried.is_ok_and(|status| status.success())
}

/// Another process, killed when this is dropped.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            child,
            input,
            output,
        }
    }

    /// This program, as one of the [`crate::limits`].
    pub fn limit(arguments: &[impl AsRef<OsStr>]) -> Self {
        Self::start(Command::new(env::current_exe().unwrap()).args(arguments))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        self.output.next().unwrap().unwrap()
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        self.line()
    }

    /// Has a limit that is no server work for this long.
    pub fn work(&mut self, time: Duration) -> Work {
        let answer = self.ask(&time.as_micros().to_string());
        let numbers = answer.split(' ').map(|number| number.parse().unwrap());
        let numbers: Vec<u64> = numbers.collect();
        Work {
            operations: numbers[0] as usize,
            wall: Duration::from_micros(numbers[1]),
            p50: Duration::from_micros(numbers[2]),
            p99: Duration::from_micros(numbers[3]),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A limit that is a server, in a process.
pub struct LimitServer {
    pub server: Server,
    process: Process,
}

impl LimitServer {
    pub fn start(arguments: &[impl AsRef<OsStr>], trust: Option<Arc<ClientConfig>>) -> Self {
        let mut process = Process::limit(arguments);
        let address: SocketAddr = process.line().parse().unwrap();
        let server = Server { address, trust };
        Self { server, process }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// What each thread of a process has used so far: CPU time in ns, and context switches.
pub struct Usage(HashMap<PathBuf, [u64; 2]>);

impl Usage {
    pub fn of(pid: u32) -> Self {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let threads = threads.filter_map(|thread| {
            let thread = thread.ok()?.path();
            // It is gone if the thread has ended meanwhile.
            let used = Self::of_thread(&thread)?;
            Some((thread, used))
        });
        Self(threads.collect())
    }

    fn of_thread(thread: &Path) -> Option<[u64; 2]> {
        // More exact than the ticks in `stat`.
        let times = fs::read_to_string(thread.join("schedstat")).ok()?;
        let nanoseconds = times.split(' ').next()?.parse().ok()?;
        let status = fs::read_to_string(thread.join("status")).ok()?;
        let switches = status.lines().filter_map(|line| {
            let (name, count) = line.split_once(':')?;
            let count: u64 = count.trim().parse().ok()?;
            name.ends_with("ctxt_switches").then_some(count)
        });
        Some([nanoseconds, switches.sum()])
    }

    /// What the threads that are there now have used since `before`: CPU time in µs, and context switches.
    pub fn since(&self, before: &Self) -> [f64; 2] {
        let mut sum = [0; 2];
        for (thread, now) in &self.0 {
            let then = before.0.get(thread).copied().unwrap_or_default();
            for (sum, (now, then)) in sum.iter_mut().zip(now.iter().zip(then)) {
                *sum += now.saturating_sub(then);
            }
        }
        let [nanoseconds, switches] = sum;
        [nanoseconds as f64 / 1e3, switches as f64]
    }
}
