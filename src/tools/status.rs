//! `status`: whether all is well with the service on this machine, for a person, for cron and for monitoring.
//!
//! Not here: what needs attention, which the service itself says ([`crate::owner`]).

use std::io::{self, Write};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;

use super::ask::ask;
use crate::config::StatusArgs;
use crate::unseen::Shown;

/// Asks the service for its state and prints it. True if nothing needs attention. Blocks for a minute at most.
///
/// # Errors
/// Nothing answers, or the output cannot be written.
pub fn status(arguments: &StatusArgs) -> Result<bool, String> {
    let (code, body) = ask(arguments.folder(), "GET", "/api/status", None)?;
    let status: Value = serde_json::from_str(&body)
        .ok()
        .filter(|_| code == 200)
        .ok_or_else(|| format!("the service answered {code} and no status"))?;
    let mut out = io::stdout().lock();
    let printed = match arguments.json {
        true => out.write_all(body.as_bytes()),
        false => print(&mut out, &status),
    };
    printed.map_err(|error| error.to_string())?;
    // A port that is published on this machine only, as in a container, looks as if it were open to the network.
    let mut attention = items(&status["attention"]).iter();
    Ok(attention.all(|item| item["kind"] == "plain_http"))
}

fn print(out: &mut impl Write, status: &Value) -> io::Result<()> {
    let text = |value: &Value| Shown(value.as_str().unwrap_or("-")).to_string();
    let state = text(&status["state"]);
    writeln!(out, "export-service {}: {state}", text(&status["version"]))?;
    let attention = items(&status["attention"]);
    for item in attention {
        writeln!(out, "!  {}", text(&item["text"]))?;
    }
    if attention.is_empty() {
        writeln!(out, "Nothing needs attention.")?;
    }
    let mut line = |name: &str, value: String| writeln!(out, "{name:<12} {value}");
    line("waiting", waiting(status))?;
    for queue in items(&status["queues"]) {
        line("", self::queue(queue))?;
    }
    for pause in items(&status["pauses"]) {
        let until = pause["until"].as_i64().map_or("resumed".into(), moment);
        line(
            "paused",
            format!("{} until {until}", text(&pause["subject"])),
        )?;
    }
    let store = &status["store"];
    if let Some(taken) = store["bytes"].as_u64() {
        let limit = store["limit"].as_u64().map(bytes).unwrap_or_default();
        line("store", format!("{} of {limit}", bytes(taken)))?;
    }
    if let Some(free) = status["disk_free"].as_u64() {
        line("disk", format!("{} free", bytes(free)))?;
    }
    match status["secret"]["ready"].as_bool() {
        Some(true) => line("secret", "there".into())?,
        _ => line(
            "secret",
            format!("none: {}", text(&status["secret"]["reason"])),
        )?,
    }
    match status["certificate"]["expires_at"].as_i64() {
        Some(expires) => line("certificate", format!("good until {}", moment(expires)))?,
        None => line("certificate", "none: plain HTTP".into())?,
    }
    match status["admin"]["url"].as_str() {
        Some(url) => line("owner's port", Shown(url).to_string()),
        None => line("owner's port", "none: see --admin".into()),
    }
}

fn waiting(status: &Value) -> String {
    let count = status["waiting"].as_u64().unwrap_or(0);
    let size = status["waiting_bytes"].as_u64();
    let size = size.map(|size| format!(", {}", bytes(size)));
    match count {
        0 => "nothing".into(),
        1 => format!("1 export{}", size.unwrap_or_default()),
        _ => format!("{count} exports{}", size.unwrap_or_default()),
    }
}

/// One queue in words: whose, where to, how many, and why they wait.
fn queue(queue: &Value) -> String {
    let text = |name: &str| Shown(queue[name].as_str().unwrap_or_default()).to_string();
    let who = match queue["label"].as_str() {
        Some(label) => format!("{} ({})", Shown(label), text("who")),
        None => text("who"),
    };
    let waiting = queue["waiting"].as_u64().unwrap_or(0);
    let state = text("state");
    let mut line = format!("{who} → {}: {waiting} {state}", text("destination"));
    if let Some(message) = queue["reason"]["message"].as_str() {
        let failures = queue["failures"].as_u64().unwrap_or(0);
        line += &format!(", {failures} failed: {}", Shown(message));
    }
    for (field, words) in [
        ("next_attempt_in", "next try in"),
        ("give_up_in", "given up in"),
    ] {
        if let Some(seconds) = queue[field].as_f64() {
            let seconds = Duration::try_from_secs_f64(seconds.ceil()).unwrap_or_default();
            line += &format!("; {words} {}", humantime::format_duration(seconds));
        }
    }
    line
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// A time in Unix milliseconds, in the format of RFC 3339.
fn moment(millis: i64) -> String {
    let since = Duration::from_millis(u64::try_from(millis).unwrap_or(0));
    match UNIX_EPOCH.checked_add(since) {
        // Beyond the year 9999 it would not be written.
        Some(at) if since < Duration::from_secs(253_402_300_800) => {
            humantime::format_rfc3339_seconds(at).to_string()
        }
        _ => "a day beyond all calendars".into(),
    }
}

/// A size with a unit that gives it one to four digits.
fn bytes(size: u64) -> String {
    let mut rest = size;
    for unit in ["bytes", "KiB", "MiB", "GiB"] {
        if rest < 10_000 {
            return format!("{rest} {unit}");
        }
        rest /= 1024;
    }
    format!("{rest} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_queue_is_told_with_its_reason_and_what_comes_next() {
        let told = queue(&json!({
            "who": "172.18.0.5", "label": "sleep\u{202e}app", "destination": "a.example #3f9a",
            "waiting": 12, "state": "failing", "failures": 3, "next_attempt_in": 8.2, "give_up_in": 86_000.0,
            "reason": { "kind": "connect", "message": "connection refused by a.example:443" },
        }));
        assert_eq!(
            told,
            "sleep\\u{202e}app (172.18.0.5) → a.example #3f9a: 12 failing, 3 failed: connection refused by \
             a.example:443; next try in 9s; given up in 23h 53m 20s"
        );
    }

    #[test]
    fn sizes_and_times_can_be_read() {
        assert_eq!(bytes(9_999), "9999 bytes");
        assert_eq!(bytes(256 * 1024 * 1024), "256 MiB");
        assert_eq!(bytes(u64::MAX), "16777215 TiB");
        assert_eq!(moment(1_800_000_000_000), "2027-01-15T08:00:00Z");
        assert_eq!(moment(-1), "1970-01-01T00:00:00Z");
        moment(i64::MAX);
    }
}
