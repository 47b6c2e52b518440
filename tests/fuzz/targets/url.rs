//! Destination URLs: an accepted URL keeps its text, and its origin shows no secrets.

use export_service::destination::Destination;

pub fn run(bytes: &[u8]) {
    let Ok(url) = str::from_utf8(bytes) else {
        return;
    };
    if let Ok(destination) = Destination::parse(url) {
        assert_eq!(destination.as_str(), url);
        assert!(url.starts_with(destination.origin()));
        assert!(!destination.authority().is_empty());
        assert!(!destination.authority().contains(['@', '/', '?', '#']));
    }
}
