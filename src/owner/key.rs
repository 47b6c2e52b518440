//! A key of the box's own: 32 random bytes in a file of the data folder, made at the first start.
//!
//! Not here: what is signed with it ([`super::access`]).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A key's length in bytes.
pub const LENGTH: usize = 32;
/// The file with the root key of the owner's tokens.
pub const FILE: &str = "owner.key";

/// Reads the key in this file of the data folder. Makes one if there is no such file: nobody else may be using
/// the folder. Blocks until a new key is on disk.
///
/// # Errors
/// The text says what is wrong with the file, and what to do.
pub fn read_or_make(folder: &Path, name: &str) -> Result<[u8; LENGTH], String> {
    match read(folder, name) {
        Ok(Some(key)) => return Ok(key),
        Ok(None) => {}
        Err(error) => return Err(error),
    }
    let key = random()?;
    write(folder, name, &key).map_err(|error| {
        let file = folder.join(name);
        format!(
            "cannot write {}: {error}; make it a file that this user can write",
            file.display()
        )
    })?;
    Ok(key)
}

/// Reads the key in this file of the data folder. None if there is no such file.
///
/// # Errors
/// The text says what is wrong with the file, and what to do.
pub fn read(folder: &Path, name: &str) -> Result<Option<[u8; LENGTH]>, String> {
    let file = folder.join(name);
    let mut content = Vec::new();
    let read = File::open(&file).and_then(|opened| {
        // One byte more shows that a file is too long.
        opened.take(LENGTH as u64 + 1).read_to_end(&mut content)
    });
    match read {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(format!(
                "cannot read {}: {error}; make it a file that this user can read",
                file.display()
            ));
        }
        Ok(_) => {}
    }
    content.try_into().map(Some).map_err(|_| {
        format!(
            "{} is not a key, which has {LENGTH} bytes: put a copy of it back, or remove it to get a new \
             one at the next start",
            file.display()
        )
    })
}

/// A new key.
///
/// # Errors
/// The system gives no random bytes.
pub fn random() -> Result<[u8; LENGTH], String> {
    let mut key = [0; LENGTH];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut key)
        .map_err(|_| "the system gives no random bytes for a key".to_owned())?;
    Ok(key)
}

fn write(folder: &Path, name: &str, key: &[u8]) -> io::Result<()> {
    // Renamed when it is whole: half a key must not be taken for one after a power cut.
    let unfinished = folder.join(format!("{name}.new"));
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)?;
    file.write_all(key)?;
    file.sync_all()?;
    fs::rename(&unfinished, folder.join(name))?;
    // A rename is durable once its folder is synced.
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_only_its_owner_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path(), FILE), Ok(None));
        let key = read_or_make(folder.path(), FILE).unwrap();
        assert_eq!(read_or_make(folder.path(), FILE), Ok(key));
        assert_ne!(random().unwrap(), key);
        let file = folder.path().join(FILE);
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_no_key_is_named_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        for content in [&b""[..], &[7; 31], &[7; 33]] {
            fs::write(folder.path().join(FILE), content).unwrap();
            let error = read_or_make(folder.path(), FILE).unwrap_err();
            assert!(error.contains("owner.key is not a key"), "{error}");
            assert_eq!(fs::read(folder.path().join(FILE)).unwrap(), content);
        }
    }
}
