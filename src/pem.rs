//! What is wrong with a PEM file, in words that show nothing of it.
//!
//! Not here: which blocks a file needs (`gate::tls`, `delivery::tls`).

use rustls::pki_types::pem::Error;

/// Why a file could not be read as PEM. Where a line break is missing, a key is part of the line that rustls's
/// own text quotes.
pub fn damage(error: &Error) -> String {
    match error {
        Error::MissingSectionEnd { .. } => "a block in it has no end".into(),
        Error::IllegalSectionStart { .. } => {
            "a BEGIN line in it does not end with five hyphens".into()
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use crate::delivery::tls::Trust;
    use crate::gate::tls::Identity;
    use std::fs;

    #[test]
    fn an_error_shows_no_key_of_which_the_line_breaks_were_lost() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("server.pem");
        for text in [
            "-----BEGIN PRIVATE KEY-----MIIEvQ\n-----END PRIVATE KEY-----\n",
            "-----BEGIN PRIVATE KEY----- MIIEvQ -----END PRIVATE KEY-----\n",
            "-----BEGIN PRIVATE KEY-----\nMIIEvQ!\n-----END PRIVATE KEY-----\n",
        ] {
            fs::write(&file, text).unwrap();
            let errors = [
                Identity::load(file.clone()).err().unwrap(),
                Trust::new(Some(text.as_bytes())).err().unwrap(),
            ];
            for error in errors {
                // As text, or as a list of numbers.
                assert!(
                    !error.contains("MII") && !error.contains("77, 73, 73"),
                    "{error}"
                );
            }
        }
    }
}
