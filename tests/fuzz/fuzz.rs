//! libFuzzer's way to the targets; `FUZZ_TARGET` in the environment names the one to run.
#![no_main]

mod targets;

use std::env;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use targets::{ALL, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let wanted = env::var("FUZZ_TARGET").unwrap_or_default();
    let found = ALL.iter().find(|(name, _)| *name == wanted);
    found.expect("FUZZ_TARGET names no target").1
});

fuzz_target!(|bytes: &[u8]| TARGET(bytes));
