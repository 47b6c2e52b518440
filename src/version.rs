//! Which program this is.
//!
//! Not here: anything that it does.

use std::sync::LazyLock;

/// The version of this program.
pub const NUMBER: &str = env!("CARGO_PKG_VERSION");
/// The commit that it was built from, if the build was told: `EXPORT_SERVICE_COMMIT`.
pub const COMMIT: &str = match option_env!("EXPORT_SERVICE_COMMIT") {
    Some(commit) if !commit.is_empty() => commit,
    _ => "unknown",
};

/// What `--version` prints behind the program's name.
pub fn full() -> &'static str {
    static FULL: LazyLock<String> = LazyLock::new(|| {
        let sqlite = rusqlite::version();
        format!("{NUMBER} (commit {COMMIT}, SQLite {sqlite})")
    });
    &FULL
}
