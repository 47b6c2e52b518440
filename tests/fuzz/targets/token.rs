//! Tokens in all three formats, and the caveats in them: nothing panics, and no token that was
//! not minted with the key is ever signed by it.

use std::time::SystemTime;

use export_service::auth::{Key, Macaroon, Request, authorize, caveats};

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
        // Not signed, but its caveats must still be readable.
        let _ = caveats::check(&macaroon, &request, now)
            .map(|grant| grant.allows("https://a.example/"));
    }
    // A minted token with these caveats reads back as what was minted.
    let caveats: Vec<String> = text.split('\n').map(str::to_owned).collect();
    if let Some(token) = Macaroon::mint(&key, "me", caveats.clone()).to_v1() {
        let read = Macaroon::read(&token).expect("a minted token is readable");
        assert!(read.is_signed_by(&key));
        assert!(read.caveats().eq(caveats.iter().map(String::as_bytes)));
    }
}
