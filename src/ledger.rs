//! The ledger's vocabulary: what a row says, how a chain of hashes makes tampering evident, and the names under
//! which senders and destinations appear; no I/O.
//!
//! Each row has a hash over the hash before it, its number and the hash of its body. So a row that is changed,
//! removed or moved no longer fits, and the last hash (the head) stands for all rows. Whoever can write the file
//! can also compute a new chain; only a head that somebody has remembered shows that.
//!
//! Not here: the tables ([`crate::exports::store`]), and when a row is written (`exports`).

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use hmac::{Hmac, KeyInit, Mac};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::destination::Destination;
use crate::key_file::Key;

/// SHA-256 of a row's body, or of the chain up to a row.
pub type Hash = [u8; 32];

/// The hash before the first row.
pub const ORIGIN: Hash = [0; 32];

/// The file of the data folder with the [`LedgerKey`].
pub const KEY_FILE: &str = "ledger.key";

/// Clients and reasons that are told apart in a minute of refused requests. Those beyond are `others`.
const MOST_REFUSALS: usize = 36;

/// The longest name of a sender, in characters. An identifier may have thousands.
const LONGEST_NAME: usize = 200;

/// What a row tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An attempt to send an export.
    Attempt,
    /// An export ended without an answer.
    GivenUp,
    /// Requests were refused, counted for a minute.
    Refused,
    /// The owner paused something.
    Pause,
    /// The owner, or the end of its time, ended a pause.
    Resume,
    /// The owner had something tried at once.
    Retry,
    /// The owner cancelled an export.
    Cancel,
    /// The owner had something forgotten.
    Forget,
    /// The owner named a sender.
    Label,
    /// The owner knows a destination.
    Seen,
    /// The owner looked at a payload.
    Show,
    /// Rows were emptied, as there was no room for more.
    Pruned,
    /// Old rows were deleted.
    Expired,
}

impl Event {
    /// Its name in the store and in all output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attempt => "attempt",
            Self::GivenUp => "given up",
            Self::Refused => "refused",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Retry => "retry",
            Self::Cancel => "cancel",
            Self::Forget => "forget",
            Self::Label => "label",
            Self::Seen => "seen",
            Self::Show => "show",
            Self::Pruned => "pruned",
            Self::Expired => "expired",
        }
    }
}

/// A row that is to be written. What does not apply is `None` or empty.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Unix milliseconds by the wall clock.
    pub at: i64,
    /// What it tells of.
    pub event: Event,
    /// The export's id.
    pub export: Option<Uuid>,
    /// The sender: see [`who`].
    pub who: String,
    /// The destination: see [`LedgerKey::name`].
    pub destination: String,
    /// What an attempt did.
    pub attempt: Option<Sent>,
    /// How an attempt or an export ended: a status, or the kind of the failure.
    pub outcome: String,
    /// Anything else, for people.
    pub note: String,
    /// How many requests were refused, or rows lost their body in the same commit; for [`Event::Expired`], the
    /// number of the last row. Stored as an attempt's number.
    pub count: u64,
    /// Whether the export ended with this, and if so, whether its destination has answered. Not stored.
    pub delivered: Option<bool>,
}

impl Entry {
    /// A row about no export, which the other fields are added to.
    pub fn new(event: Event, at: i64) -> Self {
        Self {
            at,
            event,
            export: None,
            who: String::new(),
            destination: String::new(),
            attempt: None,
            outcome: String::new(),
            note: String::new(),
            count: 0,
            delivered: None,
        }
    }

    /// The body as it is stored and hashed.
    pub fn fields(&self) -> [Field<'_>; FIELDS] {
        let sent = self.attempt.as_ref();
        let integer = |number: Option<u64>| match number {
            // Sizes and times in milliseconds are far below the limit.
            Some(number) => Field::Integer(i64::try_from(number).unwrap_or(i64::MAX)),
            None => Field::Null,
        };
        [
            Field::Integer(self.at),
            Field::text(self.event.name()),
            self.export
                .as_ref()
                .map_or(Field::Null, |id| Field::Blob(id.as_bytes())),
            Field::text(&self.who),
            Field::text(&self.destination),
            sent.map_or(Field::Null, |sent| Field::text(&sent.address)),
            integer(sent.map(|sent| sent.bytes_out)),
            integer(sent.map(|sent| sent.bytes_in)),
            sent.and_then(|sent| sent.digest.as_ref())
                .map_or(Field::Null, |digest| Field::Blob(digest)),
            Field::text(&self.outcome),
            integer(sent.map(|sent| sent.ms)),
            integer(match sent {
                Some(sent) => Some(u64::from(sent.attempt)),
                None => (self.count > 0).then_some(self.count),
            }),
            Field::text(&self.note),
        ]
    }
}

/// What an attempt did.
#[derive(Clone, Debug)]
pub struct Sent {
    /// The address and port that it was connected to; empty if there was no connection.
    pub address: String,
    /// Bytes of the payload that may have left: all or none.
    pub bytes_out: u64,
    /// Bytes of the answer's body that arrived and were kept.
    pub bytes_in: u64,
    /// See [`LedgerKey::digest`]. None if there was no payload.
    pub digest: Option<Digest>,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// Which attempt on the export it was, from 1.
    pub attempt: u32,
}

/// How many columns a body has.
pub const FIELDS: usize = 13;

/// One column of a body.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Field<'a> {
    /// It does not apply.
    Null,
    /// A number.
    Integer(i64),
    /// A text.
    Text(&'a str),
    /// Bytes.
    Blob(&'a [u8]),
}

impl<'a> Field<'a> {
    /// A text. Null if it is empty.
    pub fn text(text: &'a str) -> Self {
        match text {
            "" => Self::Null,
            text => Self::Text(text),
        }
    }

    /// How many bytes it takes in the store, about.
    fn size(&self) -> usize {
        match self {
            Self::Null => 1,
            Self::Integer(_) => 5,
            Self::Text(text) => 1 + text.len(),
            Self::Blob(bytes) => 1 + bytes.len(),
        }
    }
}

/// The hash of a body. Each field is hashed with its type and length, so that no two bodies are alike. `buffer` is for
/// use again: hashing all at once is faster than field by field.
pub fn body_hash(fields: &[Field<'_>; FIELDS], buffer: &mut Vec<u8>) -> Hash {
    buffer.clear();
    let mut add = |kind: u8, bytes: &[u8]| {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        buffer.push(kind);
        buffer.extend_from_slice(&length.to_le_bytes());
        buffer.extend_from_slice(bytes);
    };
    for field in fields {
        match field {
            Field::Null => add(0, &[]),
            Field::Integer(number) => add(1, &number.to_le_bytes()),
            Field::Text(text) => add(2, text.as_bytes()),
            Field::Blob(bytes) => add(3, bytes),
        }
    }
    Sha256::digest(buffer).into()
}

/// The hash of the chain up to a row.
pub fn link(before: &Hash, seq: i64, body: &Hash) -> Hash {
    Sha256::new()
        .chain_update(before)
        .chain_update(seq.to_le_bytes())
        .chain_update(body)
        .finalize()
        .into()
}

/// How many bytes a row with this body takes in the store, about.
pub fn row_size(fields: &[Field<'_>; FIELDS]) -> u64 {
    // Its number, the hashes' header and the hash itself.
    let rest = 8 + 2 + size_of::<Hash>();
    (fields.iter().map(Field::size).sum::<usize>() + rest) as u64
}

/// How many bytes a row takes whose body is gone, about.
pub const STUB: u64 = 60;

/// The name of a sender: the macaroon's identifier, or the client's address if that is empty, as it is on a
/// Databox.
pub fn who(owner: &[u8], peer: &str) -> String {
    match (owner, peer) {
        ([], "") => "unknown".into(),
        ([], peer) => peer.to_owned(),
        (owner, _) => cut(&String::from_utf8_lossy(owner)),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(LONGEST_NAME) {
        Some((at, _)) => format!("{}… ({} bytes)", &text[..at], text.len()),
        None => text.to_owned(),
    }
}

/// Refused requests by client and reason since they were last taken. They are counted, not listed: otherwise an
/// app could fill the disk with them.
#[derive(Default)]
pub struct Refusals(Mutex<HashMap<(Option<IpAddr>, &'static str), u64>>);

impl Refusals {
    /// Counts a request of this client that was refused with this code.
    pub fn count(&self, client: IpAddr, code: &'static str) {
        let mut counts = self.0.lock();
        let mut key = (Some(client.to_canonical()), code);
        if counts.len() >= MOST_REFUSALS && !counts.contains_key(&key) {
            key.0 = None;
        }
        *counts.entry(key).or_default() += 1;
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Takes all of them.
    pub fn take(&self) -> Refused {
        Refused(std::mem::take(&mut *self.0.lock()))
    }

    /// Gives back what was taken and could not be written.
    pub fn give_back(&self, refused: Refused) {
        let mut counts = self.0.lock();
        for (key, count) in refused.0 {
            *counts.entry(key).or_default() += count;
        }
    }
}

/// What was taken of [`Refusals`].
pub struct Refused(HashMap<(Option<IpAddr>, &'static str), u64>);

impl Refused {
    /// These as rows with this time.
    pub fn rows(&self, at: i64) -> Vec<Entry> {
        let rows = self.0.iter().map(|((client, code), count)| Entry {
            who: client.map_or_else(|| "others".into(), |client| client.to_string()),
            outcome: (*code).into(),
            count: *count,
            note: match count {
                1 => "1 request".into(),
                count => format!("{count} requests"),
            },
            ..Entry::new(Event::Refused, at)
        });
        rows.collect()
    }
}

/// A keyed digest of a payload.
pub type Digest = [u8; 16];

/// The box's own key for digests and tags. Without it, a short payload or path could be found by hashing guesses.
#[derive(Clone)]
pub struct LedgerKey(Hmac<Sha256>);

impl LedgerKey {
    /// Derives it from the content of its file.
    pub fn new(key: &Key) -> Self {
        // HMAC takes a key of any length (RFC 2104 section 3), so this cannot fail.
        Self(Hmac::new_from_slice(key.bytes()).expect("HMAC accepts every key length"))
    }

    fn mac(&self, purpose: &[u8], text: &[u8]) -> Hash {
        let mut mac = self.0.clone();
        mac.update(purpose);
        mac.update(text);
        mac.finalize().into_bytes().into()
    }

    /// The first half of a payload's HMAC-SHA-256: equal payloads have equal digests.
    pub fn digest(&self, payload: &[u8]) -> Digest {
        let mac = self.mac(b"payload", payload);
        std::array::from_fn(|at| mac[at])
    }

    /// The name of a destination: its origin and a tag of the whole URL, since with webhooks the path is the
    /// password. `https://` and its port are left out.
    pub fn name(&self, destination: &Destination) -> String {
        let [first, second, ..] = self.mac(b"destination", destination.as_str().as_bytes());
        let (_, port) = destination.host_and_port();
        let origin = match (destination.is_encrypted(), port) {
            (true, 443) => destination.authority().trim_end_matches(":443"),
            (true, _) => destination.authority(),
            (false, _) => destination.origin(),
        };
        let mut name = String::with_capacity(origin.len() + " #3f9a".len());
        name.push_str(origin);
        name.push_str(" #");
        for nibble in [first >> 4, first & 15, second >> 4, second & 15] {
            // Below 16, so it has a digit.
            name.push(char::from_digit(nibble.into(), 16).unwrap_or('?'));
        }
        name
    }
}

impl fmt::Debug for LedgerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LedgerKey(hidden)")
    }
}

/// An address as rows show it. An IPv4 address stays one if it was connected to by IPv6.
pub fn address(peer: SocketAddr) -> String {
    SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> LedgerKey {
        LedgerKey::new(&Key::from([7; 32]))
    }

    #[test]
    fn a_destinations_name_shows_no_path_and_tells_paths_apart() {
        let name = |url: &str| key().name(&Destination::parse(url).unwrap());
        let one = name("https://hooks.example.com/services/s3cret");
        let other = name("https://hooks.example.com/services/other?q=s3cret");
        assert!(
            one.starts_with("hooks.example.com #") && one.len() == 23,
            "{one}"
        );
        assert_ne!(one, other);
        assert!(name("https://a.example:443/").starts_with("a.example #"));
        assert!(name("https://a.example:8443/").starts_with("a.example:8443 #"));
        assert!(name("http://10.0.0.7:9090/x").starts_with("http://10.0.0.7:9090 #"));
        assert!(!name("https://a.example?s3cret").contains("s3cret"));
    }

    #[test]
    fn senders_are_named_by_identifier_or_address() {
        assert_eq!(who(b"sleep", "10.0.0.1"), "sleep");
        assert_eq!(who(b"", "10.0.0.1"), "10.0.0.1");
        assert_eq!(who(b"", ""), "unknown");
        assert_eq!(who(b"a\xff", ""), "a\u{fffd}");
        let long = who(&[b'x'; 5000], "");
        assert!(long.ends_with("… (5000 bytes)") && long.len() < 300);
    }

    #[test]
    fn bodies_whose_fields_run_together_differ() {
        let entry = |who: &str, destination: &str| Entry {
            who: who.into(),
            destination: destination.into(),
            ..Entry::new(Event::Attempt, 1)
        };
        let hash = |entry: &Entry| body_hash(&entry.fields(), &mut Vec::new());
        assert_ne!(hash(&entry("ab", "c")), hash(&entry("a", "bc")));
        assert_ne!(hash(&entry("", "a")), hash(&entry("a", "")));
        assert_eq!(hash(&entry("a", "b")), hash(&entry("a", "b")));
        let first = link(&ORIGIN, 1, &hash(&entry("a", "b")));
        assert_ne!(first, link(&ORIGIN, 2, &hash(&entry("a", "b"))));
    }

    #[test]
    fn refusals_of_many_clients_take_a_few_rows() {
        let refusals = Refusals::default();
        for number in 0..1000_u32 {
            refusals.count(std::net::Ipv4Addr::from(number).into(), "unauthorized");
            refusals.count(
                std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
                "too_slow",
            );
        }
        let taken = refusals.take();
        let rows = taken.rows(7);
        assert_eq!(rows.len(), MOST_REFUSALS + 1);
        assert_eq!(rows.iter().map(|row| row.count).sum::<u64>(), 2000);
        let local = rows.iter().find(|row| row.who == "127.0.0.1").unwrap();
        assert_eq!((local.count, local.outcome.as_str()), (1000, "too_slow"));
        assert!(rows.iter().any(|row| row.who == "others"));
        assert!(refusals.is_empty());
        refusals.give_back(taken);
        assert_eq!(refusals.take().rows(7).len(), rows.len());
    }

    #[test]
    fn equal_payloads_have_equal_digests_under_one_key_only() {
        let other = LedgerKey::new(&Key::from([8; 32]));
        assert_eq!(key().digest(b"{}"), key().digest(b"{}"));
        assert_ne!(key().digest(b"{}"), key().digest(b"[]"));
        assert_ne!(key().digest(b"{}"), other.digest(b"{}"));
        assert_eq!(format!("{other:?}"), "LedgerKey(hidden)");
    }
}
