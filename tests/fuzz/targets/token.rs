//! Tokens in all three formats, and the caveats in them: nothing panics, no token that was not minted with the
//! key is ever signed by it, and what is said of a caveat can be shown in a terminal.

use std::time::SystemTime;

use export_service::auth::{Key, Macaroon, Request, authorize, caveats};
use export_service::unseen;

pub fn run(bytes: &[u8]) {
    let key = Key::derive(b"a key that the fuzzer cannot know");
    let request = Request {
        target: "export-service",
        method: "POST",
        path: "/export",
    };
    let now = SystemTime::UNIX_EPOCH;
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    assert!(authorize(text, &key, &request, now).is_err());
    if let Ok(macaroon) = Macaroon::read(text) {
        // Not signed, but its caveats must still be readable, and what differs can be told.
        let granted = caveats::check(&macaroon, &request, now);
        if let Err(denial) = granted.and_then(|grant| grant.check("https://a.example/")) {
            assert!(!denial.explained().contains(unseen::is_unseen));
        }
        for caveat in macaroon.caveats() {
            assert!(!caveats::meaning(caveat, now).contains(unseen::is_unseen));
        }
    }
    // A minted token with these caveats reads back as what was minted.
    let caveats: Vec<String> = text.split('\n').map(str::to_owned).collect();
    if let Some(token) = Macaroon::mint(&key, "me", caveats.clone()).to_v1() {
        let read = Macaroon::read(&token).expect("a minted token is readable");
        assert!(read.is_signed_by(&key));
        assert!(read.caveats().eq(caveats.iter().map(String::as_bytes)));
    }
}
