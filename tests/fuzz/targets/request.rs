//! Whole requests with a genuine token: target, headers and body, with a NUL between each. An
//! accepted payload is a part of the input, or the text of a string in it.

use std::sync::Arc;
use std::time::SystemTime;

use export_service::answer::refusal;
use export_service::auth::secret::Secret;
use export_service::auth::{Key, Macaroon};
use export_service::routes::{Command, Policy, Request, command};

pub fn run(bytes: &[u8]) {
    let mut parts = bytes.splitn(4, |&byte| byte == 0);
    // Header values and targets are already text when they get here.
    let mut text = || str::from_utf8(parts.next().unwrap_or_default()).unwrap_or_default();
    let (target, authorization, idempotency_key) = (text(), text(), text());
    let body = parts.next().unwrap_or_default();
    let key = Key::derive(b"key");
    let policy = Policy {
        name: "export-service".into(),
        secret: Arc::new(Secret::given(key.clone())),
    };
    let caveats = [
        "target = export-service",
        "method = POST",
        "path = *",
        "destination = http://a/",
    ];
    let token = Macaroon::mint(&key, "", caveats.map(str::to_owned)).to_v1();
    let request = Request {
        method: "POST",
        target: if target.is_empty() {
            "/lp/export?timeout=1"
        } else {
            target
        },
        api_key: token.as_deref().filter(|_| authorization.is_empty()),
        authorization: Some(authorization),
        idempotency_key: Some(idempotency_key).filter(|key| !key.is_empty()),
        body,
    };
    match command(&request, &policy, SystemTime::UNIX_EPOCH) {
        Ok(Command::Submit(submission, wait)) => {
            assert_eq!(submission.destination.as_str(), "http://a/");
            assert!(wait.as_secs() <= 60);
            let sent = submission.payload;
            let quoted = body.contains(&b'\\') || body.windows(sent.len()).any(|part| part == sent);
            assert!(quoted, "the payload was changed");
        }
        Ok(_) => {}
        Err(refused) => {
            assert!(
                (400..500).contains(&refusal(&refused).status),
                "{refused:?}"
            );
        }
    }
}
