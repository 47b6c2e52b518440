//! Where the key comes from that tokens are checked with: it was given, or the arbiter's link puts
//! it here as soon as it has it.
//!
//! Not here: asking for it (`arbiter`), and what a request without it is answered (`routes`).

use parking_lot::RwLock;

use super::Key;

/// The key, once there is one. Shared between the arbiter's thread, which writes, and the pool,
/// which reads at every request; each holds the lock for the time of a copy.
#[derive(Debug)]
pub struct Secret(RwLock<Result<Key, Missing>>);

/// Why there is no key yet, in words that give nothing away to an app.
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

    /// The key of now.
    ///
    /// # Errors
    /// Why there is none.
    pub fn key(&self) -> Result<Key, Missing> {
        self.0.read().clone()
    }

    /// From now on this is the key; tokens of an earlier one are good no more.
    pub fn set(&self, key: Key) {
        *self.0.write() = Ok(key);
    }

    /// Notes why there is no key; an earlier key stays.
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
