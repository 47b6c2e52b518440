//! The arbiter's secret, cached in the data folder, so that tokens outlive a restart of this service.
//!
//! There is one file, `secret`, which only its user can read and which is replaced atomically. It says for
//! which `ARBITER_TOKEN` and `ZMQ_PUBLIC_KEY` the secret is (by a hash of them), which instance of the
//! arbiter issued it, and during which boot of the machine the connection has always been up. A file of an
//! earlier release has no instance, and is read as that of an arbiter that names none.
//!
//! Not here: when the secret is asked for (`super`).

use std::fs;
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::denied;
use crate::key_file::replace_private;

/// The file's name in the data folder.
pub const FILE: &str = "secret";
/// The file's name while it is written.
const UNFINISHED: &str = "secret.new";

/// The file for the secrets of one token and key.
pub struct SecretFile {
    folder: PathBuf,
    fingerprint: String,
    /// The id of the machine's current boot; empty if the system does not tell.
    boot: String,
}

/// A secret, and what is known of the arbiter that issued it.
#[derive(Clone, PartialEq, Eq)]
pub struct Cached {
    /// The secret itself; never empty.
    pub secret: Vec<u8>,
    /// The instance of the arbiter that issued it. `None` if that arbiter names none.
    pub instance: Option<Vec<u8>>,
    /// Why the arbiter may have been restarted since, for when its instance is unknown.
    pub stale: Option<&'static str>,
}

/// The file's content, as JSON.
#[derive(Serialize, Deserialize)]
struct Content {
    secret: String,
    fingerprint: String,
    instance: Option<String>,
    /// The boot during which the secret arrived, if the connection has been up ever since.
    boot: Option<String>,
}

impl SecretFile {
    /// The file for the secrets of the token and key with this fingerprint.
    pub fn new(folder: PathBuf, fingerprint: String) -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            folder,
            fingerprint,
            boot: boot.trim().to_owned(),
        }
    }

    /// Reads the secret. `None` if there is none, or it is for another token or key.
    ///
    /// # Errors
    /// The file cannot be read or understood.
    pub fn read(&self) -> io::Result<Option<Cached>> {
        let path = self.folder.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(match denied::remedy(&self.folder, &path, &error) {
                    Some(remedy) => io::Error::new(error.kind(), format!("{error}; {remedy}")),
                    None => error,
                });
            }
        };
        // The messages of serde_json and base64 are not passed on: they may quote the secret.
        let strange = || io::Error::new(ErrorKind::InvalidData, "its content is not understood");
        let content: Content = serde_json::from_slice(&text).map_err(|_| strange())?;
        if content.fingerprint != self.fingerprint {
            return Ok(None);
        }
        let decode = |text: String| STANDARD.decode(text).map_err(|_| strange());
        let secret = decode(content.secret)?;
        if secret.is_empty() {
            // Anybody could mint tokens with that.
            return Err(strange());
        }
        let stale = match content.boot {
            None => Some("the connection to the arbiter was lost"),
            // Without its id, no boot is known to be this one.
            _ if self.boot.is_empty() => Some("the system does not tell its boots apart"),
            Some(boot) if boot != self.boot => Some("the machine was started"),
            Some(_) => None,
        };
        Ok(Some(Cached {
            secret,
            instance: content.instance.map(decode).transpose()?,
            stale,
        }))
    }

    /// Writes a secret and what is known of it. Blocks until it is on disk. If a stale one cannot be
    /// written, removes the file instead: its earlier content must not be believed after a restart.
    ///
    /// # Errors
    /// Neither was possible. The file has its earlier content.
    pub fn write(&self, cached: &Cached) -> io::Result<()> {
        let written = self.replace(cached);
        match cached.stale {
            Some(_) => written.or_else(|_| fs::remove_file(self.folder.join(FILE))),
            None => written,
        }
    }

    fn replace(&self, cached: &Cached) -> io::Result<()> {
        let content = Content {
            secret: STANDARD.encode(&cached.secret),
            fingerprint: self.fingerprint.clone(),
            instance: cached.instance.as_ref().map(|key| STANDARD.encode(key)),
            boot: cached.stale.is_none().then(|| self.boot.clone()),
        };
        let unfinished = self.folder.join(UNFINISHED);
        // Strings always serialise.
        let text = serde_json::to_string(&content).expect("strings serialise") + "\n";
        replace_private(&self.folder.join(FILE), &unfinished, text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn file(folder: &Path, fingerprint: &str) -> SecretFile {
        SecretFile::new(folder.to_owned(), fingerprint.to_owned())
    }

    fn fresh(secret: &[u8]) -> Cached {
        Cached {
            secret: secret.to_vec(),
            instance: Some(b"\xfffirst".to_vec()),
            stale: None,
        }
    }

    fn stale(secret: &[u8]) -> Cached {
        Cached {
            stale: Some("it rained"),
            ..fresh(secret)
        }
    }

    #[test]
    fn a_secret_is_found_again_by_the_same_fingerprint_only() {
        let folder = tempfile::tempdir().unwrap();
        let ours = file(folder.path(), "ours");
        assert!(ours.read().unwrap().is_none());
        let cached = fresh(b"\0s3cret\xff");
        ours.write(&cached).unwrap();
        assert!(ours.read().unwrap() == Some(cached));
        assert!(file(folder.path(), "another").read().unwrap().is_none());
        let mode = fs::metadata(folder.path().join(FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn that_a_secret_is_stale_outlives_a_restart_until_there_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let ours = file(folder.path(), "ours");
        ours.write(&fresh(b"old")).unwrap();
        ours.write(&stale(b"old")).unwrap();
        let found = ours.read().unwrap().unwrap();
        assert!(found.secret == b"old" && found.instance == fresh(b"").instance);
        assert!(found.stale.unwrap().contains("was lost"));
        ours.write(&fresh(b"new")).unwrap();
        assert_eq!(ours.read().unwrap().unwrap().stale, None);
    }

    #[test]
    fn a_secret_of_another_boot_or_of_an_unknown_one_is_stale() {
        let folder = tempfile::tempdir().unwrap();
        let mut ours = file(folder.path(), "ours");
        ours.write(&fresh(b"old")).unwrap();
        for (boot, words) in [("another", "was started"), ("", "does not tell")] {
            ours.boot = boot.into();
            assert!(ours.read().unwrap().unwrap().stale.unwrap().contains(words));
        }
        ours.write(&fresh(b"old")).unwrap();
        assert!(ours.read().unwrap().unwrap().stale.is_some());
    }

    #[test]
    fn a_stale_secret_that_cannot_be_written_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let ours = file(folder.path(), "ours");
        ours.write(&fresh(b"old")).unwrap();
        // A folder where the new file has to be cannot be removed as a file can.
        fs::create_dir(folder.path().join(UNFINISHED)).unwrap();
        assert!(ours.write(&fresh(b"new")).is_err());
        assert!(ours.read().unwrap() == Some(fresh(b"old")));
        ours.write(&stale(b"old")).unwrap();
        assert!(ours.read().unwrap().is_none());
    }

    #[test]
    fn a_file_without_an_instance_is_read_as_the_earlier_release_meant_it() {
        let folder = tempfile::tempdir().unwrap();
        let ours = file(folder.path(), "ours");
        for (boot, is_stale) in [
            (format!("{:?}", ours.boot), false),
            ("null".into(), true),
            (r#""another""#.into(), true),
        ] {
            let text = format!(r#"{{"secret":"czNjcmV0","fingerprint":"ours","boot":{boot}}}"#);
            fs::write(folder.path().join(FILE), text).unwrap();
            let found = ours.read().unwrap().unwrap();
            assert!(found.secret == b"s3cret" && found.instance.is_none());
            assert_eq!(found.stale.is_some(), is_stale);
        }
    }

    #[test]
    fn a_file_of_another_kind_is_an_error_that_does_not_quote_it() {
        let folder = tempfile::tempdir().unwrap();
        for text in [
            "s3cret",
            r#"{"secret":"s3cret!","fingerprint":"ours"}"#,
            r#"{"secret":"","fingerprint":"ours"}"#,
            r#"{"secret":"czNjcmV0","fingerprint":"ours","instance":"s3cret!"}"#,
            "{}",
        ] {
            fs::write(folder.path().join(FILE), text).unwrap();
            let error = file(folder.path(), "ours").read().err().unwrap();
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }
}
