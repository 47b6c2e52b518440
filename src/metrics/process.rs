//! What Linux knows of this process, under the names that Prometheus' own clients use.
//!
//! Not here: anything that the service itself counts ([`super::Metrics`]).

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::text::Text;

/// Ticks a second in `/proc`, the same on every platform that this program is built for, whatever the
/// kernel's own clock does.
const TICKS: f64 = 100.0;

/// What is read of `/proc/self/stat`.
#[derive(Debug, PartialEq)]
struct Stat {
    /// Seconds of processor time.
    cpu: f64,
    threads: f64,
    /// Seconds from the boot to the start of the process.
    started: f64,
    virtual_bytes: f64,
}

/// Adds the metrics of the process. What cannot be read is left out.
pub fn render(mut text: Text) -> String {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let status = read("/proc/self/status");
    if let Some(stat) = stat(&read("/proc/self/stat")) {
        text.counter("cpu_seconds_total: Processor time, of user and system.")
            .value(stat.cpu);
        text.gauge("threads: Threads.").value(stat.threads);
        text.gauge("virtual_memory_bytes: Virtual memory.")
            .value(stat.virtual_bytes);
        if let Some(boot) = number_after(&read("/proc/stat"), "btime") {
            text.gauge("start_time_seconds: When the process was started.")
                .value(boot + stat.started);
        }
    }
    if let Some(kibibytes) = number_after(&status, "VmRSS:") {
        text.gauge("resident_memory_bytes: Resident memory.")
            .value(kibibytes * 1024.0);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them is that of the folder.
        text.gauge("open_fds: Open file descriptors.")
            .value(open.count().saturating_sub(1) as f64);
    }
    if let Some(most) = getrlimit(Resource::Nofile).current {
        text.gauge("max_fds: How many file descriptors may be open.")
            .value(most as f64);
    }
    text.into_string()
}

/// Reads `/proc/self/stat`: see proc_pid_stat(5), which counts its fields from 1.
fn stat(line: &str) -> Option<Stat> {
    // The second field is a name in parentheses, which may itself hold blanks and parentheses.
    let (_, rest) = line.rsplit_once(')')?;
    let fields: Vec<f64> = rest
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Stat {
        cpu: (field(14)? + field(15)?) / TICKS,
        threads: field(20)?,
        started: field(22)? / TICKS,
        virtual_bytes: field(23)?,
    })
}

/// The number in the line that begins with this word.
fn number_after(text: &str, word: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(word))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_name_looks_like_fields_is_read_right() {
        let line = "7 (a) R 9 (b) S 1 7 7 0 -1 4194304 100 0 0 0 150 50 0 0 20 0 12 0 4200 1048576 300 \
                    18446744073709551615 1 1";
        let found = Stat {
            cpu: 2.0,
            threads: 12.0,
            started: 42.0,
            virtual_bytes: 1_048_576.0,
        };
        assert_eq!(stat(line), Some(found));
        assert_eq!(stat(""), None);
        assert_eq!(stat("7 (a) S 1 7"), None);
    }

    #[test]
    fn a_number_is_found_by_the_first_word_of_its_line() {
        let status = "VmHWM:\t  9 kB\nVmRSS:\t    1234 kB\n";
        assert_eq!(number_after(status, "VmRSS:"), Some(1234.0));
        assert_eq!(number_after(status, "VmSwap:"), None);
        assert_eq!(number_after("VmRSS:\n", "VmRSS:"), None);
    }
}
