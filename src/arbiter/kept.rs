//! The arbiter's secret in the data folder, so that tokens outlive a restart of this service.
//!
//! One file, `secret`, readable by its user alone, replaced as a whole or not at all. It says for
//! which `ARBITER_TOKEN` and `ZMQ_PUBLIC_KEY` the secret is (by a hash of them), and since which
//! boot of the machine the arbiter is known to have held on to it.
//!
//! Not here: when the secret is asked for (`super`).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// The file's name in the data folder.
pub const FILE: &str = "secret";
/// What the file is called until it is written.
const UNFINISHED: &str = "secret.new";

/// Where the secret is kept, and for whom.
pub struct Keeper {
    folder: PathBuf,
    fingerprint: String,
    /// The machine's boot of now; empty where the system does not tell.
    boot: String,
}

/// The secret that was found.
pub struct Found {
    /// The secret itself.
    pub secret: Vec<u8>,
    /// Why the arbiter must be asked again, if it may have forgotten this one.
    pub doubt: Option<&'static str>,
}

/// What stands in the file.
#[derive(Serialize, Deserialize)]
struct Kept {
    secret: String,
    fingerprint: String,
    /// The boot during which the connection was not seen down since the secret came; nothing once
    /// it was.
    boot: Option<String>,
}

impl Keeper {
    /// A keeper of secrets for what has this fingerprint.
    pub fn new(folder: PathBuf, fingerprint: String) -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            folder,
            fingerprint,
            boot: boot.trim().to_owned(),
        }
    }

    /// Reads the secret; `None` where there is none, or one for another token or key.
    ///
    /// # Errors
    /// Where the file cannot be read, or is none of ours.
    pub fn find(&self) -> io::Result<Option<Found>> {
        let text = match fs::read(self.folder.join(FILE)) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Neither serde_json's message nor base64's is passed on: they may quote the secret.
        let strange = || io::Error::new(ErrorKind::InvalidData, "its content is not understood");
        let kept: Kept = serde_json::from_slice(&text).map_err(|_| strange())?;
        if kept.fingerprint != self.fingerprint {
            return Ok(None);
        }
        let secret = STANDARD.decode(kept.secret).map_err(|_| strange())?;
        if secret.is_empty() {
            // Anybody could mint with that.
            return Err(strange());
        }
        let doubt = match kept.boot {
            None => Some("the connection to the arbiter was lost since it came"),
            // Then no boot is known to be this one.
            _ if self.boot.is_empty() => Some("the system does not tell its boots apart"),
            Some(boot) if boot != self.boot => Some("the machine was started since it came"),
            Some(_) => None,
        };
        Ok(Some(Found { secret, doubt }))
    }

    /// Keeps a secret that was just given. Blocks until it is on the disk.
    ///
    /// # Errors
    /// Where it is not; what was kept before is still there then.
    pub fn keep(&self, secret: &[u8]) -> io::Result<()> {
        self.write(secret, Some(self.boot.clone()))
    }

    /// Notes that the arbiter may have forgotten the secret. Where that cannot be written, the
    /// secret is removed instead: it must not be taken for a good one after a restart.
    ///
    /// # Errors
    /// Where neither was possible.
    pub fn doubt(&self, secret: &[u8]) -> io::Result<()> {
        self.write(secret, None)
            .or_else(|_| fs::remove_file(self.folder.join(FILE)))
    }

    fn write(&self, secret: &[u8], boot: Option<String>) -> io::Result<()> {
        let kept = Kept {
            secret: STANDARD.encode(secret),
            fingerprint: self.fingerprint.clone(),
            boot,
        };
        let unfinished = self.folder.join(UNFINISHED);
        // Strings alone: nothing here can fail.
        let text = serde_json::to_string(&kept).expect("a kept secret serialises") + "\n";
        write_private(&unfinished, text.as_bytes())?;
        fs::rename(&unfinished, self.folder.join(FILE))?;
        // A rename is on the disk once its folder is.
        File::open(&self.folder)?.sync_all()
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // One that was left over may have been made by somebody else, with rights of its own.
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn keeper(folder: &Path, fingerprint: &str) -> Keeper {
        Keeper::new(folder.to_owned(), fingerprint.to_owned())
    }

    #[test]
    fn a_secret_is_found_again_by_the_same_fingerprint_only() {
        let folder = tempfile::tempdir().unwrap();
        let ours = keeper(folder.path(), "ours");
        assert!(ours.find().unwrap().is_none());
        ours.keep(b"\0s3cret\xff").unwrap();
        let found = ours.find().unwrap().unwrap();
        assert_eq!(
            (&found.secret[..], found.doubt),
            (&b"\0s3cret\xff"[..], None)
        );
        assert!(keeper(folder.path(), "another").find().unwrap().is_none());
        let mode = fs::metadata(folder.path().join(FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_doubt_outlives_a_restart_until_there_is_another_secret() {
        let folder = tempfile::tempdir().unwrap();
        let ours = keeper(folder.path(), "ours");
        ours.keep(b"old").unwrap();
        ours.doubt(b"old").unwrap();
        let found = ours.find().unwrap().unwrap();
        assert_eq!(&found.secret[..], b"old");
        assert!(found.doubt.unwrap().contains("was lost"));
        ours.keep(b"new").unwrap();
        assert_eq!(ours.find().unwrap().unwrap().doubt, None);
    }

    #[test]
    fn a_secret_of_another_boot_or_of_an_unknown_one_is_doubtful() {
        let folder = tempfile::tempdir().unwrap();
        let mut ours = keeper(folder.path(), "ours");
        ours.keep(b"old").unwrap();
        for (boot, words) in [("another", "was started"), ("", "does not tell")] {
            ours.boot = boot.into();
            assert!(ours.find().unwrap().unwrap().doubt.unwrap().contains(words));
        }
        ours.keep(b"old").unwrap();
        assert!(ours.find().unwrap().unwrap().doubt.is_some());
    }

    #[test]
    fn a_doubt_that_cannot_be_written_removes_the_secret() {
        let folder = tempfile::tempdir().unwrap();
        let ours = keeper(folder.path(), "ours");
        ours.keep(b"old").unwrap();
        // A folder where the new file has to be cannot be removed as a file can.
        fs::create_dir(folder.path().join(UNFINISHED)).unwrap();
        assert!(ours.keep(b"new").is_err());
        ours.doubt(b"old").unwrap();
        assert!(ours.find().unwrap().is_none());
    }

    #[test]
    fn a_file_of_another_kind_is_an_error_that_does_not_quote_it() {
        let folder = tempfile::tempdir().unwrap();
        for text in [
            "s3cret",
            r#"{"secret":"s3cret!","fingerprint":"ours"}"#,
            r#"{"secret":"","fingerprint":"ours"}"#,
            "{}",
        ] {
            fs::write(folder.path().join(FILE), text).unwrap();
            let error = keeper(folder.path(), "ours").find().err().unwrap();
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }
}
