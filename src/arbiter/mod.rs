//! The link to a Databox's arbiter, which issues the secret that tokens are signed with: one thread
//! that connects, asks for the secret when it must, caches it, and holds the connection.
//!
//! The arbiter makes a new secret at every request, which voids every token that apps hold, and
//! they hold them for good. A restart makes it forget all secrets, and then it mints no tokens until
//! it is asked again. So once there is a connection it is first asked which instance it is (the
//! reply to an observe request has a key that it makes at its start), and for the secret only
//!
//! - where none is cached for this `ARBITER_TOKEN` and `ZMQ_PUBLIC_KEY`;
//! - where the instance is not the one that issued the cached secret: it was restarted, at whatever
//!   time. One that stalled, or could not be reached for a while, still has the secret;
//! - where it did not know this service (129): it has dropped the registration, and with it the
//!   secret. It is asked every second or two until it is told of this service: nothing is made by a
//!   request that is refused, and an app's library may remember for good that it was refused a token.
//!
//! Where an instance is not known, because the arbiter names none or the cached secret is of a
//! release that did not ask, a restart can only be guessed. Then one is assumed after a connection
//! was lost or could not be made, which is written down to outlive a restart of this service, and
//! after a boot of the machine. One that happens while this service is off goes unnoticed.
//!
//! Until a new secret is there the cached one stays in force, so that apps are served meanwhile.
//! Requests of apps have no part in any of this: no token, however bad, makes the arbiter be asked.
//!
//! Not here: what is done with the secret (`auth`), and which files the settings are from (`config`).

pub mod curve;
pub mod secret_file;
pub mod zest;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use crate::auth::Key;
use crate::auth::secret::{Missing, Secret};
use crate::backoff::{backoff, jitter, jittered};
use crate::logging::millis;
use crate::threads;
use curve::{Connection, Endpoint};
use secret_file::{Cached, SecretFile};
use zest::Reply;

/// The path of the secret at the arbiter. A GET of it makes a new one.
const SECRET_PATH: &str = "/store/secret";
/// What is observed to learn the instance. An arbiter that takes the request for a plain GET makes
/// nothing of it either.
const INSTANCE_PATH: &str = "/status";

/// The wait after a first failure; it doubles with each that follows.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait, so that a link stands again within a minute of the arbiter's return.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The wait after the arbiter did not know this service.
const UNREGISTERED_WAIT: Duration = Duration::from_millis(1500);
/// How long a link must have stood for its loss to count as a first failure. An arbiter that fails
/// again and again is not to be asked for a new secret each second.
const STOOD: Duration = Duration::from_secs(60);

/// How the arbiter is reached and asked.
pub struct Settings {
    endpoint: Endpoint,
    server_key: [u8; curve::KEY],
    /// The message that asks for the secret. It holds the token, as the next one does.
    ask_secret: Vec<u8>,
    /// The message that asks which instance the arbiter is.
    ask_instance: Vec<u8>,
    /// A hash of token and key, by which a cached secret is known to be for them.
    fingerprint: String,
}

impl Settings {
    /// Settings for asking by this service's name; `None` where name or token are too long to be sent.
    pub fn new(
        endpoint: Endpoint,
        server_key: [u8; curve::KEY],
        token: &[u8],
        name: &str,
    ) -> Option<Self> {
        let hash = Sha256::new()
            .chain_update(server_key)
            .chain_update(token)
            .finalize();
        Some(Self {
            endpoint,
            server_key,
            ask_secret: zest::get(token, SECRET_PATH, name)?,
            ask_instance: zest::observe(token, INSTANCE_PATH, name)?,
            fingerprint: STANDARD.encode(hash),
        })
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Settings({}, hidden)", self.endpoint)
    }
}

/// Why the link does not stand, or gives no secret.
#[derive(Debug, PartialEq)]
enum Trouble {
    /// The connection or its handshake failed.
    Link(curve::Error),
    /// The answer is no Zest message, or no secret although it should be one.
    Unreadable,
    /// The answer has another code than that of content.
    Refused(u8),
}

impl Trouble {
    /// The same in words that are fit for an app.
    fn in_general(&self) -> Missing {
        Missing(match self {
            Self::Link(error) => error.in_general(),
            Self::Unreadable => "the arbiter's answer cannot be understood",
            Self::Refused(zest::UNAUTHORIZED) => "the arbiter does not know this service",
            Self::Refused(_) => "the arbiter does not give it",
        })
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(error) => error.fmt(f),
            Self::Unreadable => f.write_str(
                "the answer to the request is no Zest message, or has no secret in it; check that \
                 it is the arbiter which listens at --arbiter",
            ),
            Self::Refused(zest::UNAUTHORIZED) => f.write_str(
                "the arbiter refused ARBITER_TOKEN (129, unauthorized); check that it is this \
                 service's, and that the arbiter knows it by --name",
            ),
            Self::Refused(code) => {
                let meaning = match *code {
                    zest::BAD_REQUEST => ", bad request",
                    zest::INTERNAL_ERROR => ", internal error",
                    zest::UNAVAILABLE => ", unavailable",
                    _ => "",
                };
                write!(
                    f,
                    "the arbiter answered the request with {code}{meaning}; its own log may say more"
                )
            }
        }
    }
}

/// What the arbiter says when it is asked which instance it is.
#[derive(Debug, PartialEq)]
enum Instance {
    /// The key that it made when it was started.
    Key(Vec<u8>),
    /// It names none: an arbiter that does not know the request.
    Unnamed,
    /// It does not know this service.
    Unregistered,
}

/// Why the arbiter has to be asked for a new secret; `None` where the cached one is as good as ever.
fn reason_to_ask(cached: Option<&Cached>, instance: &Instance) -> Option<&'static str> {
    let Some(cached) = cached else {
        return Some("none was cached");
    };
    match (&cached.instance, instance) {
        (_, Instance::Unregistered) => Some("the arbiter did not know this service"),
        (Some(issuer), Instance::Key(key)) => {
            (issuer != key).then_some("the arbiter was restarted")
        }
        _ => cached.stale,
    }
}

/// Starts the link's thread, which goes on for as long as the process does. A secret that was cached
/// is in force when this returns. Without a folder it is cached in memory only.
pub fn start(settings: Settings, folder: Option<PathBuf>, secret: Arc<Secret>) {
    let file = folder.map(|folder| SecretFile::new(folder, settings.fingerprint.clone()));
    let mut link = Link {
        settings,
        file,
        secret,
        cached: None,
        logged: None,
    };
    link.take_up_cached();
    threads::spawn("arbiter", move || link.run());
}

struct Link {
    settings: Settings,
    file: Option<SecretFile>,
    secret: Arc<Secret>,
    /// The secret in force.
    cached: Option<Cached>,
    /// The trouble that was warned of last, if it is not over.
    logged: Option<Trouble>,
}

impl Link {
    fn take_up_cached(&mut self) {
        match self.file.as_ref().map(SecretFile::read) {
            Some(Ok(Some(cached))) => {
                self.secret.set(Key::derive(&cached.secret));
                self.cached = Some(cached);
                log::info!(from = "kept"; "secret is there");
            }
            Some(Err(error)) => {
                log::warn!(file = secret_file::FILE, reason:% = error; "cannot use the kept secret");
            }
            Some(Ok(None)) | None => {}
        }
    }

    fn run(&mut self) {
        let mut failures = 0_u32;
        loop {
            let mut stood = None;
            let trouble = self.stand(&mut stood);
            let wait = if trouble == Trouble::Refused(zest::UNAUTHORIZED) {
                failures = 0;
                jittered(UNREGISTERED_WAIT, jitter())
            } else {
                failures = match stood {
                    Some(since) if since.elapsed() >= STOOD => 1,
                    _ => failures.saturating_add(1),
                };
                backoff(FIRST_WAIT, LONGEST_WAIT, failures, jitter())
            };
            self.note(trouble, wait);
            thread::sleep(wait);
        }
    }

    /// Connects, asks what it must, and holds the connection until that fails. `stood` is set once
    /// there is nothing left to ask for.
    fn stand(&mut self, stood: &mut Option<Instant>) -> Trouble {
        let opened = Connection::open(&self.settings.endpoint, self.settings.server_key);
        let mut connection = match opened {
            Ok(connection) => connection,
            Err(error) => return Trouble::Link(error),
        };
        if let Err(trouble) = self.settle(&mut connection) {
            return trouble;
        }
        *stood = Some(Instant::now());
        // Where something was warned of, its end is worth a line that is always seen.
        let level = match self.logged.take() {
            Some(_) => log::Level::Info,
            None => log::Level::Debug,
        };
        log::log!(level, endpoint:% = self.settings.endpoint; "connected to the arbiter");
        Trouble::Link(connection.hold())
    }

    /// Makes sure that the secret in force is the one that the arbiter knows.
    fn settle(&mut self, connection: &mut Connection) -> Result<(), Trouble> {
        let mut instance = self.ask_instance(connection)?;
        if let Some(reason) = reason_to_ask(self.cached.as_ref(), &instance) {
            if instance == Instance::Unregistered {
                // That it is the same instance later on means nothing then.
                self.change_cached(|cached| {
                    cached.instance = None;
                    cached.stale = Some(reason);
                });
            }
            let answer = ask(connection, &self.settings.ask_secret)?;
            self.take(read_secret(&answer)?, &instance, reason);
            if instance == Instance::Unregistered {
                // It was told of this service between the two requests.
                instance = self.ask_instance(connection)?;
            }
        }
        self.change_cached(|cached| {
            cached.stale = None;
            if let Instance::Key(key) = instance {
                cached.instance = Some(key);
            }
        });
        Ok(())
    }

    /// Writes a new secret down, then puts it in force: a restart is not to void tokens that were
    /// minted in between.
    fn take(&mut self, secret: &[u8], instance: &Instance, reason: &'static str) {
        self.cached = Some(Cached {
            secret: secret.to_vec(),
            instance: match instance {
                Instance::Key(key) => Some(key.clone()),
                Instance::Unnamed | Instance::Unregistered => None,
            },
            stale: None,
        });
        self.write_cached();
        self.secret.set(Key::derive(secret));
        log::info!(from = "arbiter", reason; "secret is there");
    }

    fn ask_instance(&self, connection: &mut Connection) -> Result<Instance, Trouble> {
        read_instance(&ask(connection, &self.settings.ask_instance)?)
    }

    /// Changes what is known of the secret in force, and writes that down if it is news.
    fn change_cached(&mut self, change: impl FnOnce(&mut Cached)) {
        let Some(cached) = &mut self.cached else {
            return;
        };
        let before = cached.clone();
        change(cached);
        if *cached != before {
            self.write_cached();
        }
    }

    fn write_cached(&self) {
        let (Some(file), Some(cached)) = (&self.file, &self.cached) else {
            return;
        };
        match file.write(cached) {
            Err(error) if cached.stale.is_some() => log::error!(
                file = secret_file::FILE, reason:% = error;
                "cannot note that the arbiter was away: remove this file before a restart"
            ),
            // What stands there from before is marked as stale, is of another instance, or is gone.
            Err(error) => log::warn!(
                file = secret_file::FILE, reason:% = error;
                "cannot keep the secret: after a restart of this service apps need new tokens"
            ),
            Ok(()) => {}
        }
    }

    /// Notes that the link is down: for apps, for the log, and for after a restart.
    fn note(&mut self, trouble: Trouble, wait: Duration) {
        self.change_cached(|cached| {
            cached
                .stale
                .get_or_insert("the connection to the arbiter was lost");
        });
        self.secret.missing(trouble.in_general());
        let retry_ms = millis(wait);
        if self.logged.as_ref() == Some(&trouble) {
            log::debug!(reason:% = trouble, retry_ms; "no link to the arbiter");
        } else {
            log::warn!(reason:% = trouble, retry_ms; "no link to the arbiter");
            self.logged = Some(trouble);
        }
    }
}

fn ask(connection: &mut Connection, request: &[u8]) -> Result<Vec<u8>, Trouble> {
    connection.ask(request).map_err(Trouble::Link)
}

/// The instance in the answer to the request for it.
fn read_instance(answer: &[u8]) -> Result<Instance, Trouble> {
    let reply = Reply::read(answer).ok_or(Trouble::Unreadable)?;
    Ok(match (reply.code, reply.instance) {
        (zest::CONTENT, Some(key)) => Instance::Key(key.to_vec()),
        (zest::UNAUTHORIZED, _) => Instance::Unregistered,
        _ => Instance::Unnamed,
    })
}

/// The secret in the answer to the request for it.
fn read_secret(answer: &[u8]) -> Result<&[u8], Trouble> {
    match Reply::read(answer) {
        Some(reply) if reply.code != zest::CONTENT => Err(Trouble::Refused(reply.code)),
        Some(reply) if !reply.payload.is_empty() => Ok(reply.payload),
        _ => Err(Trouble::Unreadable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arbiter_that_does_not_know_this_service_is_asked_every_second_or_two() {
        for jitter in [0.0, 1.0] {
            let wait = jittered(UNREGISTERED_WAIT, jitter).as_secs_f64();
            assert!((1.0..=2.0).contains(&wait), "{wait}");
        }
    }

    #[test]
    fn the_secret_is_asked_for_only_where_the_arbiter_has_or_may_have_forgotten_it() {
        let key = |key: &str| Instance::Key(key.into());
        let (lost, fresh) = (Some("lost"), None);
        for (issuer, stale, instance, wanted) in [
            // An instance that is known decides, whatever else has happened.
            (Some("a"), fresh, key("a"), None),
            (Some("a"), lost, key("a"), None),
            (Some("a"), fresh, key("b"), Some("restarted")),
            (Some("a"), lost, key("b"), Some("restarted")),
            // Where it is not, a lost connection does.
            (None, fresh, key("a"), None),
            (None, lost, key("a"), Some("lost")),
            (Some("a"), fresh, Instance::Unnamed, None),
            (Some("a"), lost, Instance::Unnamed, Some("lost")),
            (None, fresh, Instance::Unnamed, None),
            (None, lost, Instance::Unnamed, Some("lost")),
            // Without the registration there is no secret, the same instance or not.
            (Some("a"), fresh, Instance::Unregistered, Some("know")),
            (None, fresh, Instance::Unregistered, Some("know")),
        ] {
            let cached = Cached {
                secret: b"s3cret".into(),
                instance: issuer.map(Into::into),
                stale,
            };
            let reason = reason_to_ask(Some(&cached), &instance);
            let right = match (reason, wanted) {
                (Some(reason), Some(words)) => reason.contains(words),
                (None, None) => true,
                _ => false,
            };
            assert!(right, "{issuer:?} {stale:?} {instance:?}: {reason:?}");
        }
        for instance in [key("a"), Instance::Unnamed, Instance::Unregistered] {
            assert!(reason_to_ask(None, &instance).is_some());
        }
    }

    #[test]
    fn an_instance_is_a_key_in_content_and_an_arbiter_without_one_is_no_fault() {
        let key = b"\0\x01\0\0\x08\0\0\x03key";
        for (code, more, instance) in [
            (69, &key[1..], Instance::Key(b"key".into())),
            (69, b"\0\0\0uuid", Instance::Unnamed),
            (65, b"\0\0\0", Instance::Unnamed),
            (128, b"\0\0\0", Instance::Unnamed),
            (160, &key[1..], Instance::Unnamed),
            (129, b"\0\0\0", Instance::Unregistered),
        ] {
            let answer = [&[code][..], more].concat();
            assert_eq!(read_instance(&answer), Ok(instance), "{code}");
        }
        assert_eq!(read_instance(b"\x45\xff"), Err(Trouble::Unreadable));
    }

    #[test]
    fn only_content_is_a_secret_and_other_answers_say_what_to_check() {
        assert_eq!(read_secret(b"\x45\0\0\0s3cret"), Ok(&b"s3cret"[..]));
        for (answer, words) in [
            (&b"\x45\0\0\0"[..], "no Zest message, or has no secret"),
            (b"\x45\0", "no Zest message, or has no secret"),
            (b"\x81\0\0\0s3cret", "ARBITER_TOKEN (129, unauthorized)"),
            (b"\x80\0\0\0", "128, bad request"),
            (b"\xa3\0\0\0", "163, unavailable"),
            (b"\xa0\0\0\0", "160, internal error"),
            (b"\x01\0\0\0", "with 1;"),
        ] {
            let trouble = read_secret(answer).unwrap_err();
            let message = trouble.to_string();
            assert!(message.contains(words), "{message}");
            assert!(!format!("{message}{trouble:?}").contains("s3cret"));
        }
    }

    #[test]
    fn settings_show_neither_token_nor_key_and_differ_by_both() {
        let settings = |key, token| {
            let endpoint = "tcp://arbiter:4444".parse().unwrap();
            Settings::new(endpoint, [key; 32], token, "export-service").unwrap()
        };
        let shown = format!("{:?}", settings(1, b"s3cret"));
        assert_eq!(shown, "Settings(arbiter:4444, hidden)");
        let fingerprint = |key, token| settings(key, token).fingerprint;
        assert_eq!(fingerprint(1, b"s3cret"), fingerprint(1, b"s3cret"));
        assert_ne!(fingerprint(1, b"s3cret"), fingerprint(2, b"s3cret"));
        assert_ne!(fingerprint(1, b"s3cret"), fingerprint(1, b"other"));
    }
}
