//! The certificate that clients see, and its key.
//!
//! Not here: the handshake (`wire`).

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, RootCertStore, ServerConfig};

use crate::pem;

/// A PEM file and the certificate and key that were last read from it.
pub struct Identity {
    path: PathBuf,
    read: Mutex<Read>,
}

/// What was read from the file.
struct Read {
    config: Arc<ServerConfig>,
    expires: Option<SystemTime>,
}

impl Identity {
    /// Reads a certificate chain and its key (PKCS#1, PKCS#8 or SEC1) from one PEM file. Other
    /// blocks in it are skipped.
    ///
    /// # Errors
    /// The text says what is wrong with the file, and continues a sentence that begins with its path.
    pub fn load(path: PathBuf) -> Result<Self, String> {
        let read = Mutex::new(read(&path)?);
        Ok(Self { path, read })
    }

    /// Reads the file again, for connections that begin from now on. If that fails, the old certificate stays
    /// in use.
    ///
    /// # Errors
    /// As for [`Identity::load`].
    pub fn reload(&self) -> Result<(), String> {
        let read = read(&self.path)?;
        *self.read.lock() = read;
        Ok(())
    }

    /// The PEM file.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// The configuration for a connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.read.lock().config.clone()
    }

    /// When the certificate expires. None if that is unknown.
    pub fn expires(&self) -> Option<SystemTime> {
        self.read.lock().expires
    }
}

impl fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.path).finish()
    }
}

fn read(path: &PathBuf) -> Result<Read, String> {
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
    let expires = expiry(&chain[0]);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map(|config| Read {
            config: Arc::new(config),
            expires,
        })
        .map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                "holds a key that is not the first certificate's: that one must be the server's own"
                    .into()
            }
            error => format!("cannot be used: {error}"),
        })
}

/// So far ahead that every certificate has expired by then, since 1970.
const CENTURIES: Duration = Duration::from_secs(500 * 365 * 24 * 60 * 60);

/// When a certificate expires. rustls tells this only as the reason why one is not valid, so it is verified for
/// a time far ahead, against itself.
fn expiry(certificate: &CertificateDer<'static>) -> Option<SystemTime> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).ok()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .ok()?;
    // Its time is looked at before its name.
    let name = ServerName::try_from("export-service").ok()?;
    let later = UnixTime::since_unix_epoch(CENTURIES);
    match verifier.verify_server_cert(certificate, &[], &name, &[], later) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            not_after,
            ..
        })) => UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs())),
        _ => None,
    }
}
