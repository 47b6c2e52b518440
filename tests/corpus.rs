//! What the fuzzer starts from, and what it has found, as ordinary tests: `tests/fuzz/corpus`.

#[path = "fuzz/targets/mod.rs"]
mod targets;

use std::fs;
use std::panic;
use std::path::Path;

#[test]
fn every_input_of_the_fuzzers_corpora_passes_its_target() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let mut names = targets::ALL.map(|(name, _)| name.to_owned()).to_vec();
    names.sort();
    let mut folders: Vec<_> = fs::read_dir(&corpora)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();
    assert_eq!(folders, names);
    let mut failed = Vec::new();
    for (name, target) in targets::ALL {
        for input in fs::read_dir(corpora.join(name)).unwrap() {
            let input = input.unwrap().path();
            let bytes = fs::read(&input).unwrap();
            // All of those that fail are named.
            if panic::catch_unwind(|| target(&bytes)).is_err() {
                failed.push(input);
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
