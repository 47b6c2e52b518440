//! The link to a Databox's arbiter, which issues the secret that tokens are signed with: one thread that
//! connects, asks for the secret if necessary, caches it, and holds the connection.
//!
//! Each request for the secret makes the arbiter create a new one. That invalidates all tokens that apps hold,
//! and they hold them for good. A restart makes the arbiter forget all secrets, and then it mints no tokens
//! until it is asked again. So on each connection it is first asked which instance it is: the reply to an
//! observe request has a key that it creates at its start. It is asked for the secret only if
//!
//! - none is cached for this `ARBITER_TOKEN` and `ZMQ_PUBLIC_KEY`;
//! - another instance issued the cached secret, which means that the arbiter was restarted. One that only
//!   stalled, or could not be reached for a while, still has the secret;
//! - it did not know this service (129), which means that it has dropped the registration and with it the
//!   secret. It is asked every second or two until this service is registered: a refused request creates
//!   nothing, and an app's library may remember for good that it was refused a token.
//!
//! If the instance is unknown, because the arbiter names none or an earlier release cached the secret, a
//! restart can only be guessed. It is assumed after a connection was lost or could not be made, which is
//! written down to outlive a restart of this service, and after a boot of the machine. A restart while this
//! service is off goes unnoticed.
//!
//! The cached secret stays in force until there is a new one, so that apps are served meanwhile. Requests
//! of apps do not affect any of this: no token, however bad, causes a request to the arbiter.
//!
//! Not here: how the secret is used (`auth`), and which files the settings come from (`config`).

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
/// The path that is observed to learn the instance. An arbiter that takes the request for a plain GET
/// creates nothing.
const INSTANCE_PATH: &str = "/status";

/// The wait after a first failure. It doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait, so that the link is up within a minute of the arbiter's return.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The wait after the arbiter did not know this service.
const UNREGISTERED_WAIT: Duration = Duration::from_millis(1500);
/// How long a link must have been up for its loss to count as a first failure. An arbiter that keeps
/// failing must not be asked for a new secret each second.
const STEADY: Duration = Duration::from_secs(60);

/// What it takes to reach and ask the arbiter.
pub struct Settings {
    endpoint: Endpoint,
    server_key: [u8; curve::KEY],
    /// The message that asks for the secret. Like the next one it contains the token.
    ask_secret: Vec<u8>,
    /// The message that asks which instance the arbiter is.
    ask_instance: Vec<u8>,
    /// A hash of token and key, which tells whether a cached secret is for them.
    fingerprint: String,
}

impl Settings {
    /// Settings for asking under this service's name. `None` if name or token are too long to be sent.
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

/// Why the link is down, or there is no secret.
#[derive(Debug, PartialEq)]
enum LinkError {
    /// The connection or its handshake failed.
    Link(curve::Error),
    /// The answer is not a Zest message, or lacks the secret that it should have.
    Unreadable,
    /// The answer has this code instead of that for content.
    Refused(u8),
}

impl LinkError {
    /// The reason as apps may see it.
    fn public_reason(&self) -> Missing {
        Missing(match self {
            Self::Link(error) => error.public_reason(),
            Self::Unreadable => "the arbiter's answer cannot be understood",
            Self::Refused(zest::UNAUTHORIZED) => "the arbiter does not know this service",
            Self::Refused(_) => "the arbiter does not give it",
        })
    }
}

impl fmt::Display for LinkError {
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

/// The arbiter's answer when it is asked which instance it is.
#[derive(Debug, PartialEq)]
enum Instance {
    /// The key that it created at its start.
    Key(Vec<u8>),
    /// It names none, as it does not support the request.
    Unnamed,
    /// It does not know this service.
    Unregistered,
}

/// Why the arbiter has to be asked for a new secret. `None` if the cached one is valid.
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

/// Starts the link's thread, which runs until the process ends. A cached secret is in force when this
/// returns. Without a folder, secrets are cached in memory only.
pub fn start(settings: Settings, folder: Option<PathBuf>, secret: Arc<Secret>) {
    let file = folder.map(|folder| SecretFile::new(folder, settings.fingerprint.clone()));
    let mut link = Link {
        settings,
        file,
        secret,
        cached: None,
        logged: None,
    };
    link.load_cached();
    threads::spawn("arbiter", move || link.run());
}

struct Link {
    settings: Settings,
    file: Option<SecretFile>,
    secret: Arc<Secret>,
    /// The secret in force.
    cached: Option<Cached>,
    /// The error that was last warned of, if it is not over.
    logged: Option<LinkError>,
}

impl Link {
    fn load_cached(&mut self) {
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
            let mut up_since = None;
            let error = self.connect_and_hold(&mut up_since);
            let wait = if error == LinkError::Refused(zest::UNAUTHORIZED) {
                failures = 0;
                jittered(UNREGISTERED_WAIT, jitter())
            } else {
                failures = match up_since {
                    Some(since) if since.elapsed() >= STEADY => 1,
                    _ => failures.saturating_add(1),
                };
                backoff(FIRST_WAIT, LONGEST_WAIT, failures, jitter())
            };
            self.note(error, wait);
            thread::sleep(wait);
        }
    }

    /// Connects, asks what is necessary, and holds the connection until it fails. Sets `up_since` once the
    /// secret in force is the arbiter's.
    fn connect_and_hold(&mut self, up_since: &mut Option<Instant>) -> LinkError {
        let opened = Connection::open(&self.settings.endpoint, self.settings.server_key);
        let mut connection = match opened {
            Ok(connection) => connection,
            Err(error) => return LinkError::Link(error),
        };
        if let Err(error) = self.ensure_secret(&mut connection) {
            return error;
        }
        *up_since = Some(Instant::now());
        // The end of something that was warned of is logged at a level that is always shown.
        let level = match self.logged.take() {
            Some(_) => log::Level::Info,
            None => log::Level::Debug,
        };
        log::log!(level, endpoint:% = self.settings.endpoint; "connected to the arbiter");
        LinkError::Link(connection.hold())
    }

    /// Makes sure that the secret in force is the one that the arbiter has.
    fn ensure_secret(&mut self, connection: &mut Connection) -> Result<(), LinkError> {
        let mut instance = self.ask_instance(connection)?;
        if let Some(reason) = reason_to_ask(self.cached.as_ref(), &instance) {
            if instance == Instance::Unregistered {
                // If it is the same instance later on, that no longer means that it has the secret.
                self.change_cached(|cached| {
                    cached.instance = None;
                    cached.stale = Some(reason);
                });
            }
            let answer = ask(connection, &self.settings.ask_secret)?;
            self.take(read_secret(&answer)?, &instance, reason);
            if instance == Instance::Unregistered {
                // This service was registered between the two requests.
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

    /// Writes a new secret down, then puts it in force, so that a restart does not invalidate tokens that were
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

    fn ask_instance(&self, connection: &mut Connection) -> Result<Instance, LinkError> {
        read_instance(&ask(connection, &self.settings.ask_instance)?)
    }

    /// Changes what is known of the secret in force, and writes it down if it differs.
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
            // What the file still says is marked as stale or of another instance, or it is gone.
            Err(error) => log::warn!(
                file = secret_file::FILE, reason:% = error;
                "cannot keep the secret: after a restart of this service apps need new tokens"
            ),
            Ok(()) => {}
        }
    }

    /// Notes that the link is down: for apps, for the log, and for after a restart.
    fn note(&mut self, error: LinkError, wait: Duration) {
        self.change_cached(|cached| {
            cached
                .stale
                .get_or_insert("the connection to the arbiter was lost");
        });
        self.secret.missing(error.public_reason());
        let retry_ms = millis(wait);
        if self.logged.as_ref() == Some(&error) {
            log::debug!(reason:% = error, retry_ms; "no link to the arbiter");
        } else {
            log::warn!(reason:% = error, retry_ms; "no link to the arbiter");
            self.logged = Some(error);
        }
    }
}

fn ask(connection: &mut Connection, request: &[u8]) -> Result<Vec<u8>, LinkError> {
    connection.ask(request).map_err(LinkError::Link)
}

/// The instance in the answer to the request for it.
fn read_instance(answer: &[u8]) -> Result<Instance, LinkError> {
    let reply = Reply::read(answer).ok_or(LinkError::Unreadable)?;
    Ok(match (reply.code, reply.instance) {
        (zest::CONTENT, Some(key)) => Instance::Key(key.to_vec()),
        (zest::UNAUTHORIZED, _) => Instance::Unregistered,
        _ => Instance::Unnamed,
    })
}

/// The secret in the answer to the request for it.
fn read_secret(answer: &[u8]) -> Result<&[u8], LinkError> {
    match Reply::read(answer) {
        Some(reply) if reply.code != zest::CONTENT => Err(LinkError::Refused(reply.code)),
        Some(reply) if !reply.payload.is_empty() => Ok(reply.payload),
        _ => Err(LinkError::Unreadable),
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
            // If it is not, a lost connection does.
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
        assert_eq!(read_instance(b"\x45\xff"), Err(LinkError::Unreadable));
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
            let error = read_secret(answer).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(words), "{message}");
            assert!(!format!("{message}{error:?}").contains("s3cret"));
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
