//! Destination URLs: what is accepted keeps its text and shows an origin without secrets.
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
