//! The certificate that clients see, and its key.
//!
//! Not here: the handshake (`wire`).

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::pem;

/// A PEM file and the certificate and key that were last read from it.
pub struct Identity {
    path: PathBuf,
    config: Mutex<Arc<ServerConfig>>,
}

impl Identity {
    /// Reads a certificate chain and its key (PKCS#1, PKCS#8 or SEC1) from one PEM file. Other
    /// blocks in it are skipped.
    ///
    /// # Errors
    /// The text says what is wrong with the file, and continues a sentence that begins with its path.
    pub fn load(path: PathBuf) -> Result<Self, String> {
        let config = Mutex::new(read(&path)?);
        Ok(Self { path, config })
    }

    /// Reads the file again, for connections that begin from now on. If that fails, the old certificate stays
    /// in use.
    ///
    /// # Errors
    /// As for [`Identity::load`].
    pub fn reload(&self) -> Result<(), String> {
        let config = read(&self.path)?;
        *self.config.lock() = config;
        Ok(())
    }

    /// The PEM file.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// The configuration for a connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.lock().clone()
    }
}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.path).finish()
    }
}

fn read(path: &PathBuf) -> Result<Arc<ServerConfig>, String> {
    let text = fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    let damaged = |error| format!("is damaged: {}", pem::damage(&error));
    let chain = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(damaged)?;
    if chain.is_empty() {
        return Err("holds no certificate: it must have a BEGIN CERTIFICATE block".into());
    }
    let mut keys = PrivateKeyDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(damaged)?;
    let key = match (keys.pop(), keys.is_empty()) {
        (Some(key), true) => key,
        (Some(_), false) => return Err("holds more than one private key".into()),
        (None, _) => {
            return Err(
                "holds no private key: it must have a BEGIN PRIVATE KEY, RSA PRIVATE KEY or EC \
                 PRIVATE KEY block, without a password"
                    .into(),
            );
        }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map(Arc::new)
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                "holds a key that is not the first certificate's: that one must be the server's own"
                    .into()
            }
            error => format!("cannot be used: {error}"),
        })
}
