//! Keys of this box's own: random bytes in a file of the data folder, made at the first start. And how a file that
//! only its user may read is replaced.
//!
//! Not here: what a key is for (`ledger`, `owner`), and the arbiter's secret (`arbiter`).

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustls::crypto::ring;

use crate::denied;

const BYTES: usize = 32;

/// A secret key.
#[derive(Clone)]
pub struct Key([u8; BYTES]);

impl Key {
    /// The key in this file, which only its user can read. It is made if there is none. Blocks until it is on
    /// disk.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds something else. The text says what to do.
    pub fn in_file(path: &Path) -> Result<Self, String> {
        let wrong = |what: &str, error: &io::Error| {
            let folder = path.parent().unwrap_or(path);
            let remedy = denied::remedy(folder, path, error);
            let remedy =
                remedy.unwrap_or_else(|| format!("make it a file that this user can {what}"));
            format!("cannot {what} {}: {error}; {remedy}", path.display())
        };
        if let Some(content) = content(path).map_err(|error| wrong("read", &error))? {
            return Self::of(content, path);
        }
        let key = Self::random()?;
        replace_private(path, &path.with_extension("new"), &key.0)
            .map_err(|error| wrong("write", &error))?;
        Ok(key)
    }

    /// The key in the file of a service that may run as another user. None if there is no such file.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else. The text says what to do.
    pub fn read(path: &Path) -> Result<Option<Self>, String> {
        let content = content(path).map_err(|error| {
            format!(
                "cannot read {}: {error}; run this as the user that the service runs as",
                path.display()
            )
        })?;
        content.map(|content| Self::of(content, path)).transpose()
    }

    fn of(content: Vec<u8>, path: &Path) -> Result<Self, String> {
        let key = content.try_into().map_err(|_| {
            format!(
                "{} is not a key, which has {BYTES} bytes: put a copy of it back, or remove it to get a new \
                 one at the next start",
                path.display()
            )
        })?;
        Ok(Self(key))
    }

    /// A new key, for when there is no folder.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn random() -> Result<Self, String> {
        let mut bytes = [0; BYTES];
        let random = ring::default_provider().secure_random;
        random
            .fill(&mut bytes)
            .map_err(|_| "the system gives no random bytes for a key")?;
        Ok(Self(bytes))
    }

    /// The key itself.
    pub fn bytes(&self) -> &[u8; BYTES] {
        &self.0
    }
}

/// What is in the file of a key, or as much as shows that it is none. None if there is no such file.
fn content(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| {
        // One byte more shows that a file is too long.
        file.take(BYTES as u64 + 1).read_to_end(&mut content)
    });
    match read {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => read.map(|_| Some(content)),
    }
}

/// Puts a file that only its user can read in place of the one at `path`. It is written as `unfinished` first, so
/// that a power cut leaves the old one or the new one. Blocks until it is on disk.
///
/// # Errors
/// It cannot be written. The file at `path` is as it was.
pub fn replace_private(path: &Path, unfinished: &Path, bytes: &[u8]) -> io::Result<()> {
    // Somebody else may have created a file that is left over, with other permissions.
    match fs::remove_file(unfinished) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(unfinished, path)?;
    // A rename is durable once its folder is synced.
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

impl From<[u8; BYTES]> for Key {
    fn from(bytes: [u8; BYTES]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_found_again_for_its_user_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.key");
        let made = Key::in_file(&path).unwrap();
        assert_eq!(made.bytes(), Key::in_file(&path).unwrap().bytes());
        assert_ne!(made.bytes(), Key::random().unwrap().bytes());
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_no_key_is_named_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.key");
        assert!(Key::read(&path).unwrap().is_none());
        for content in [&b""[..], &[7; 31], &[7; 33]] {
            fs::write(&path, content).unwrap();
            let error = Key::in_file(&path).unwrap_err();
            assert!(error.contains("own.key is not a key"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }
}
