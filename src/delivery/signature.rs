//! Signatures by which a receiver can tell that an export came from this box: the symmetric "Signature
//! scheme" of Standard Webhooks 1.0.
//!
//! Not here: the headers that carry them ([`super::attempt`]).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The prefix that the standard gives secrets.
const PREFIX: &str = "whsec_";
/// The lengths of a key that the standard permits, in bytes.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The key shared with receivers.
#[derive(Clone)]
pub struct SigningKey(Vec<u8>);

impl SigningKey {
    /// Reads a secret: `whsec_` and base64 of 24 to 64 bytes. `None` for anything else.
    pub fn read(secret: &str) -> Option<Self> {
        let key = STANDARD.decode(secret.strip_prefix(PREFIX)?).ok()?;
        KEY_BYTES.contains(&key.len()).then_some(Self(key))
    }

    /// The value of `webhook-signature` for a message with this id. `timestamp` is in Unix seconds.
    pub fn sign(&self, id: &str, timestamp: u64, payload: &[u8]) -> String {
        // HMAC takes a key of any length (RFC 2104 section 3), so this cannot fail.
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC accepts every key length");
        mac.update(format!("{id}.{timestamp}.").as_bytes());
        mac.update(payload);
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_need_the_prefix_and_a_key_of_the_standards_length() {
        let secret = |bytes: usize| format!("whsec_{}", STANDARD.encode(vec![7; bytes]));
        assert!(SigningKey::read(&secret(24)).is_some());
        assert!(SigningKey::read(&secret(64)).is_some());
        for bad in [
            secret(23),
            secret(65),
            "whsec_!".into(),
            STANDARD.encode([7; 32]),
        ] {
            assert!(SigningKey::read(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_key_does_not_show_in_debug() {
        let key = SigningKey::read("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        assert_eq!(format!("{key:?}"), "SigningKey(hidden)");
    }
}
