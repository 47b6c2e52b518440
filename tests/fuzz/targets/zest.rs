//! Replies of the arbiter, and requests to it: a reply's payload is the end of the message, and an
//! encoded request reads back as it was.

use export_service::arbiter::zest::{Reply, get, observe};

pub fn run(bytes: &[u8]) {
    if let Some(reply) = Reply::read(bytes) {
        assert_eq!(Some(&reply.code), bytes.first());
        assert!(bytes.ends_with(reply.payload));
        assert!(reply.instance.is_none_or(|key| !key.is_empty()));
    }
    // Requests have the same layout as replies, and no payload.
    let (token, host) = bytes.split_at(bytes.len() / 2);
    let Ok(host) = str::from_utf8(host) else {
        return;
    };
    let messages = [
        get(token, "/store/secret", host),
        observe(token, "/status", host),
    ];
    for message in messages.into_iter().flatten() {
        let read = Reply::read(&message).expect("a request is readable");
        assert!(read.code == 1 && read.instance.is_none() && read.payload.is_empty());
        assert!(message[4..].starts_with(token));
    }
}
