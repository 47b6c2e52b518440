//! The link to a Databox's arbiter, which has the secret that tokens are signed with: one thread
//! that asks for it, keeps it, and holds the connection.
//!
//! The arbiter makes a new secret whenever it is asked, which voids every token that apps hold,
//! and they hold them for good. After a restart of its own it knows no secret, and mints nothing
//! until it is asked again. So it is asked only when it has to be:
//!
//! - where there is no secret yet, or only one for another `ARBITER_TOKEN` or `ZMQ_PUBLIC_KEY`;
//! - where the link was seen down, for whatever reason, and stands again: the arbiter may have been
//!   restarted, and a connection is the only thing that tells. That counts from the first attempt
//!   after a start of this service, and it is written down, so that a restart of this service
//!   meanwhile does not make it forgotten;
//! - where the machine has been booted since (its boot id is kept with the secret): after a power
//!   cut the arbiter was restarted as surely as this service, and may well be up again first.
//!
//! What this cannot notice is an arbiter that is restarted, alone, while this service is off, and
//! is up again before it: nothing it says tells one of its lives from another, and to ask on
//! suspicion would void all tokens at every restart of this service. Then tokens that apps hold are
//! good, but the arbiter mints none until this service is started without the file `secret` in its
//! data folder. On a Databox that file goes with the container, which has no volume.
//!
//! Until a new secret is there the old one stays in force, so that apps are served meanwhile.
//! Requests of apps have no part in any of this: no token, however bad, makes the arbiter be asked.
//!
//! Not here: what is done with the secret (`auth`), and which files the settings are from (`config`).

pub mod curve;
pub mod kept;
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
use crate::delivery::worker::chance;
use crate::logging::millis;
use crate::threads;
use curve::{Connection, Endpoint};
use kept::Keeper;
use zest::Reply;

/// The path of the secret at the arbiter.
const PATH: &str = "/store/secret";

/// The wait after a first failure; it doubles with each that follows.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait, so that a link stands again within a minute of the arbiter's return.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// By how much a wait is longer or shorter, so that services do not come all at once.
const JITTER: f64 = 0.2;
/// How long a link must have stood for its loss to count as a first failure. An arbiter that fails
/// again and again is not to be asked for a new secret each second.
const STOOD: Duration = Duration::from_secs(60);

/// How the arbiter is reached and asked.
pub struct Settings {
    endpoint: Endpoint,
    server_key: [u8; curve::KEY],
    /// The message that asks for the secret. It holds the token.
    request: Vec<u8>,
    /// A hash of token and key, by which a kept secret is known to be for them.
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
            request: zest::get(token, PATH, name)?,
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
    /// The answer is no Zest message, or has no secret in it.
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
                "the answer to the request is no Zest message with a secret; check that it is the \
                 arbiter which listens at --arbiter",
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

/// Starts the link's thread, which goes on for as long as the process does. A secret that was kept
/// is in force when this returns. Without a folder it is kept in memory only.
pub fn start(settings: Settings, folder: Option<PathBuf>, secret: Arc<Secret>) {
    let keeper = folder.map(|folder| Keeper::new(folder, settings.fingerprint.clone()));
    let mut link = Link {
        settings,
        keeper,
        secret,
        known: None,
        must_ask: true,
        logged: None,
    };
    link.take_up_kept();
    threads::spawn("arbiter", move || link.run());
}

struct Link {
    settings: Settings,
    keeper: Option<Keeper>,
    secret: Arc<Secret>,
    /// The secret in force.
    known: Option<Vec<u8>>,
    /// Whether the arbiter may have forgotten the secret in force, or there is none.
    must_ask: bool,
    /// The trouble that was warned of last, if it is not over.
    logged: Option<Trouble>,
}

impl Link {
    fn take_up_kept(&mut self) {
        match self.keeper.as_ref().map(Keeper::find) {
            Some(Ok(Some(found))) => {
                self.must_ask = found.doubt.is_some();
                self.put_in_force(found.secret, "kept");
                if let Some(reason) = found.doubt {
                    log::info!(reason; "the arbiter will be asked for a new secret");
                }
            }
            Some(Err(error)) => {
                log::warn!(file = kept::FILE, reason:% = error; "cannot use the kept secret");
            }
            Some(Ok(None)) | None => {}
        }
    }

    fn put_in_force(&mut self, secret: Vec<u8>, from: &str) {
        self.secret.set(Key::derive(&secret));
        self.known = Some(secret);
        log::info!(from; "secret is there");
    }

    fn run(&mut self) {
        let mut failures = 0_u32;
        loop {
            let mut stood = None;
            let trouble = self.stand(&mut stood);
            failures = match stood {
                Some(since) if since.elapsed() >= STOOD => 1,
                _ => failures.saturating_add(1),
            };
            let wait = backoff(failures, chance());
            self.note(trouble, wait);
            thread::sleep(wait);
        }
    }

    /// Connects, asks if it must, and holds the connection until that fails. `stood` is set once
    /// there is nothing left to ask for.
    fn stand(&mut self, stood: &mut Option<Instant>) -> Trouble {
        let opened = Connection::open(&self.settings.endpoint, self.settings.server_key);
        let mut connection = match opened {
            Ok(connection) => connection,
            Err(error) => return Trouble::Link(error),
        };
        if self.must_ask {
            let answer = match connection.ask(&self.settings.request) {
                Ok(answer) => answer,
                Err(error) => return Trouble::Link(error),
            };
            match read_secret(&answer) {
                Ok(secret) => self.take(secret),
                Err(trouble) => return trouble,
            }
        }
        *stood = Some(Instant::now());
        self.logged = None;
        log::debug!(endpoint:% = self.settings.endpoint; "connected to the arbiter");
        Trouble::Link(connection.hold())
    }

    fn take(&mut self, secret: &[u8]) {
        let kept = self.keeper.as_ref().map(|keeper| keeper.keep(secret));
        if let Some(Err(error)) = kept {
            // What stands there from before is marked as doubtful, or gone.
            log::warn!(
                file = kept::FILE, reason:% = error;
                "cannot keep the secret: after a restart of this service apps need new tokens"
            );
        }
        self.must_ask = false;
        self.put_in_force(secret.to_vec(), "arbiter");
    }

    /// Notes that the link is down: for apps, for the log, and for after a restart.
    fn note(&mut self, trouble: Trouble, wait: Duration) {
        if !self.must_ask {
            self.must_ask = true;
            if let (Some(keeper), Some(known)) = (&self.keeper, &self.known)
                && let Err(error) = keeper.doubt(known)
            {
                log::error!(
                    file = kept::FILE, reason:% = error;
                    "cannot note that the arbiter was away: remove this file before a restart"
                );
            }
        }
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

/// The secret in the answer to the request for it.
fn read_secret(answer: &[u8]) -> Result<&[u8], Trouble> {
    match Reply::read(answer) {
        Some(Reply {
            code: zest::CONTENT,
            payload,
        }) if !payload.is_empty() => Ok(payload),
        Some(Reply { code, .. }) if code != zest::CONTENT => Err(Trouble::Refused(code)),
        _ => Err(Trouble::Unreadable),
    }
}

/// The wait after so many failures in a row; `chance` is evenly spread from 0 to 1.
fn backoff(failures: u32, chance: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(20);
    let wait = (FIRST_WAIT * (1 << doublings)).min(LONGEST_WAIT);
    wait.mul_f64(1.0 + JITTER * (2.0 * chance - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_from_a_second_to_half_a_minute_and_differ_by_a_fifth() {
        let even = |failures| backoff(failures, 0.5).as_secs();
        assert_eq!([1, 2, 3, 4, 5, 6, 7].map(even), [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(even(u32::MAX), 30);
        assert_eq!(backoff(1, 0.0), Duration::from_millis(800));
        assert_eq!(backoff(99, 1.0), Duration::from_secs(36));
    }

    #[test]
    fn only_content_is_a_secret_and_other_answers_say_what_to_check() {
        assert_eq!(read_secret(b"\x45\0\0\0s3cret"), Ok(&b"s3cret"[..]));
        for (answer, words) in [
            (&b"\x45\0\0\0"[..], "no Zest message with a secret"),
            (b"\x45\0", "no Zest message with a secret"),
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
