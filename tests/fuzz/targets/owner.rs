//! What reaches the owner's port: the head's values, queries and the bodies of acts. Nothing panics, nobody gets in
//! without a token that was minted with the key, and what is read back from a subject is the same subject.
//!
//! An input is lines: authorization, host, origin, query, the name of an act, and the rest is its body.

use std::time::SystemTime;

use export_service::auth::Key;
use export_service::exports::acts::Act;
use export_service::exports::acts::subject::{Meaning, Subject};
use export_service::key_file;
use export_service::ledger::LedgerKey;
use export_service::owner::access::{Hosts, Origin, authorize, check_act};
use export_service::owner::filter::{Asked, filter};
use export_service::owner::page::Query;

pub fn run(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let mut lines = text.splitn(6, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let (authorization, host, origin) = (line(), line(), line());
    let (query, act, body) = (line(), line(), line());

    let key = Key::derive(b"a key that the fuzzer cannot know");
    let now = SystemTime::UNIX_EPOCH;
    assert!(authorize(Some(authorization), &key, ("GET", "/"), now).is_err());
    let hosts = Hosts::new(vec!["box.example".into()], "export-service".into());
    // Only an address, or one of three names, is this box.
    if hosts.check(Some(host)).is_ok() {
        let plain = host.to_ascii_lowercase();
        let is_name = ["box.example", "export-service", "localhost"]
            .iter()
            .any(|name| plain.contains(name));
        assert!(is_name || plain.contains(['.', ':']), "{host}");
    }
    let from = Origin {
        host: Some(host),
        origin: Some(origin),
        site: None,
        content_type: Some("application/json"),
    };
    if check_act(&from).is_ok() {
        assert!(
            origin
                .to_ascii_lowercase()
                .ends_with(&host.to_ascii_lowercase())
        );
    }

    let asked = Query::parse(query);
    let _ = filter(
        &Asked {
            since: &asked.since,
            until: &asked.until,
            who: &asked.who,
            destination: &asked.destination,
            outcome: &asked.outcome,
            id: &asked.id,
        },
        0,
    );
    let _ = Act::read(act, body.as_bytes());
    let ledger_key = LedgerKey::new(&key_file::Key::from([7; 32]));
    if let Ok(Meaning::Subject(subject)) = Subject::parse(body, &ledger_key) {
        assert_eq!(Subject::from_stored(&subject.to_string()), Some(subject));
    }
}
