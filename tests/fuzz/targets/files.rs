//! Files that the service reads at its start: a certificate with its key, CA certificates, and the cached
//! secret. No content is too strange for an error, no error shows a secret, and a secret that was read is
//! read again after it was written.
//!
//! An input is a byte for the kind of file, and its content.

use std::fs;

use export_service::arbiter::secret_file::{FILE, SecretFile};
use export_service::delivery::tls::Trust;
use export_service::gate::tls::Identity;

pub fn run(bytes: &[u8]) {
    let Some((kind, content)) = bytes.split_first() else {
        return;
    };
    match kind % 3 {
        0 => certificate(content),
        1 => {
            if let Err(error) = Trust::new(Some(content)) {
                assert_shows_no_key(&error, content);
            }
        }
        _ => secret(content),
    }
}

fn certificate(content: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("server.pem");
    fs::write(&file, content).expect("a file");
    match Identity::load(file) {
        Ok(identity) => identity.reload().expect("what was read once"),
        Err(error) => assert_shows_no_key(&error, content),
    }
}

/// Nothing that may be of a key is in the error, as text or as numbers.
fn assert_shows_no_key(error: &str, content: &[u8]) {
    assert!(!error.contains("45, 45, 45"), "{error}");
    let text = String::from_utf8_lossy(content);
    let is_base64 = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
    let mut words = text.split(|c| !is_base64(c)).filter(|word| word.len() > 20);
    assert!(!words.any(|word| error.contains(word)), "{error}");
}

fn secret(content: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = SecretFile::new(folder.path().to_owned(), "ours".into());
    fs::write(folder.path().join(FILE), content).expect("a file");
    match file.read() {
        Ok(Some(cached)) => {
            assert!(!cached.secret.is_empty());
            file.write(&cached).expect("a file");
            let again = file.read().expect("what was written").expect("a secret");
            assert!(again.secret == cached.secret && again.instance == cached.instance);
            assert_eq!(again.stale.is_some(), cached.stale.is_some());
        }
        Ok(None) => {}
        Err(error) => assert_eq!(error.to_string(), "its content is not understood"),
    }
}
