//! Destination URLs: an accepted URL keeps its text, and its origin shows no secrets.
#![no_main]

use export_service::destination::Destination;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|url: &str| {
    if let Ok(destination) = Destination::parse(url) {
        assert_eq!(destination.as_str(), url);
        assert!(url.starts_with(destination.origin()));
        assert!(!destination.authority().is_empty());
        assert!(!destination.authority().contains(['@', '/', '?', '#']));
    }
});
