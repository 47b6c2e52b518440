//! TLS to destinations: which certificates are trusted, the handshake, and why it failed.
//!
//! Mozilla's roots and those of `--ca-file` form one list. Nothing turns verification off.
//!
//! Not here: the connection below ([`super::connect`]), and HTTP over it ([`super::attempt`]).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use time::OffsetDateTime;

use crate::pem;
use crate::socket::Socket;

/// The roots that destinations' certificates are verified against.
#[derive(Clone)]
pub struct Trust {
    verifier: Arc<WebPkiServerVerifier>,
    config: Arc<ClientConfig>,
}

impl Trust {
    /// Trusts Mozilla's roots and every certificate in `more`, which is PEM text.
    ///
    /// # Errors
    /// The text says what is wrong with `more`, and continues a sentence that begins with its path.
    pub fn new(more: Option<&[u8]>) -> Result<Self, String> {
        let mut roots = RootCertStore {
            roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
        };
        if let Some(pem) = more {
            let mut found = false;
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate =
                    certificate.map_err(|error| format!("is not PEM: {}", pem::damage(&error)))?;
                roots
                    .add(certificate)
                    .map_err(|error| format!("holds a certificate that cannot be used: {error}"))?;
                found = true;
            }
            if !found {
                return Err("holds no certificate: it must have a BEGIN CERTIFICATE block".into());
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(|error| error.to_string())?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_webpki_verifier(verifier.clone())
            .with_no_client_auth();
        Ok(Self {
            verifier,
            config: Arc::new(config),
        })
    }
}

impl fmt::Debug for Trust {
    /// Leaves the hundred roots out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trust")
    }
}

/// The message for a failed handshake.
pub fn explain(error: &rustls::Error, host: &str) -> String {
    let certificate = format!("certificate of {host}");
    match error {
        rustls::Error::InvalidCertificate(error) => match error {
            CertificateError::ExpiredContext { not_after, .. } => {
                format!("{certificate} expired on {}", date(*not_after))
            }
            CertificateError::Expired => format!("{certificate} expired"),
            CertificateError::NotValidYetContext { not_before, .. } => format!(
                "{certificate} is not valid before {}: check this box's clock",
                date(*not_before)
            ),
            CertificateError::NotValidYet => {
                format!("{certificate} is not valid yet: check this box's clock")
            }
            CertificateError::NotValidForNameContext { presented, .. } => {
                // A stranger's certificate must not be able to flood a message.
                let names: Vec<_> = presented
                    .iter()
                    .take(5)
                    .map(|name| format!("{name:.80}"))
                    .collect();
                let names = if names.is_empty() {
                    "no name".into()
                } else {
                    names.join(", ")
                };
                format!("{certificate} is for another name: {names}")
            }
            CertificateError::NotValidForName => format!("{certificate} is for another name"),
            CertificateError::UnknownIssuer => format!(
                "{certificate} is self-signed, or of a CA that is not trusted here: if the server is \
                 your own, give its CA's certificate with --ca-file"
            ),
            // How rustls reports a self-signed certificate that may sign others.
            CertificateError::Other(_) | CertificateError::InvalidPurpose => format!(
                "{certificate} is self-signed or not meant for a server: if it is your own server, \
                 give it a certificate of a CA, and that CA's certificate with --ca-file"
            ),
            other => format!("{certificate} is not valid: {other}"),
        },
        other => format!("TLS with {host} failed: {other}"),
    }
}

/// A date in the format of RFC 3339.
pub fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(time) => time.date().to_string(),
        Err(_) => "a day beyond all calendars".into(),
    }
}

/// Makes the TLS handshake with a server. `host` is without brackets. Blocks until the socket's deadline at
/// most.
///
/// # Errors
/// Those of the socket. If the handshake failed, [`cause`] finds why in the error.
pub fn handshake(
    trust: &Trust,
    host: &str,
    socket: Socket,
) -> io::Result<StreamOwned<ClientConnection, Socket>> {
    let name = server_name(host)
        .ok_or_else(|| io::Error::other("the host is no name that a certificate could have"))?;
    let connection = ClientConnection::new(trust.config.clone(), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    stream.conn.complete_io(&mut stream.sock)?;
    Ok(stream)
}

/// The name that a certificate must have.
fn server_name(host: &str) -> Option<ServerName<'static>> {
    // A name in a URL may end with a dot, a certificate's may not.
    ServerName::try_from(host.trim_end_matches('.').to_owned()).ok()
}

/// The rustls error inside an I/O error, which is how rustls reports through a socket.
pub fn cause(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// So far ahead that every certificate has expired by then.
const CENTURIES: Duration = Duration::from_secs(500 * 365 * 24 * 60 * 60);

/// When a verified peer's certificate expires. None if that is unknown. rustls tells this only as the reason
/// why a certificate is not valid, so it is verified for a time far ahead.
pub fn expiry(trust: &Trust, connection: &ClientConnection, host: &str) -> Option<UnixTime> {
    let name = server_name(host)?;
    let certificates = connection.peer_certificates()?;
    let (own, chain) = certificates.split_first()?;
    let later =
        UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs()) + CENTURIES);
    let verdict = trust
        .verifier
        .verify_server_cert(own, chain, &name, &[], later);
    match verdict {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            not_after,
            ..
        })) => Some(not_after),
        _ => None,
    }
}
