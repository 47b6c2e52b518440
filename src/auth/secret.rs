//! The key for checking tokens, which is given, or set by the arbiter's link when it arrives.
//!
//! Not here: asking for it (`arbiter`), and the answer to a request without it (`routes`).

use parking_lot::RwLock;

use super::Key;

/// The key, once there is one. The arbiter's thread writes it, and the pool reads it at every request. Each
/// holds the lock only while copying.
#[derive(Debug)]
pub struct Secret(RwLock<Result<Key, Missing>>);

/// Why there is no key yet, as apps may see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing(pub &'static str);

impl Secret {
    /// A key that was given and never changes.
    pub fn given(key: Key) -> Self {
        Self(RwLock::new(Ok(key)))
    }

    /// A key that is still to be fetched.
    pub fn awaited() -> Self {
        Self(RwLock::new(Err(Missing("the arbiter has not answered"))))
    }

    /// The current key.
    ///
    /// # Errors
    /// Why there is none.
    pub fn key(&self) -> Result<Key, Missing> {
        self.0.read().clone()
    }

    /// From now on this is the key. Tokens that were signed with an earlier one are no longer valid.
    pub fn set(&self, key: Key) {
        *self.0.write() = Ok(key);
    }

    /// Notes why there is no key. An earlier key stays in force.
    pub fn missing(&self, reason: Missing) {
        let mut key = self.0.write();
        if key.is_err() {
            *key = Err(reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stays_until_there_is_another_and_shows_in_no_debug_output() {
        let secret = Secret::awaited();
        secret.missing(Missing("it rains"));
        assert_eq!(secret.key().err(), Some(Missing("it rains")));
        secret.set(Key::derive(b"s3cret"));
        secret.missing(Missing("it snows"));
        assert!(secret.key().is_ok());
        assert!(format!("{secret:?}").contains("Key(hidden)"));
    }
}
