//! TLS to destinations: which certificates are trusted, the handshake, and what went wrong in it.
//!
//! Mozilla's roots and those of `--ca-file` are one list; nothing turns verification off.
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

use crate::socket::Socket;

/// What certificates of destinations are verified against, and how.
#[derive(Clone)]
pub struct Trust {
    verifier: Arc<WebPkiServerVerifier>,
    config: Arc<ClientConfig>,
}

impl Trust {
    /// Trusts Mozilla's roots and every certificate in `more`, which is PEM text.
    ///
    /// # Errors
    /// What is wrong with `more`, as the end of a sentence about it.
    pub fn new(more: Option<&[u8]>) -> Result<Self, String> {
        let mut roots = RootCertStore {
            roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
        };
        if let Some(pem) = more {
            let mut found = false;
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|error| format!("is not PEM: {error}"))?;
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
    /// Without the hundred roots.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trust")
    }
}

/// Puts a failed handshake into words.
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
                // What a stranger wrote into a certificate is not to flood a message.
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
            // What rustls says of a self-signed certificate that may sign others.
            CertificateError::Other(_) | CertificateError::InvalidPurpose => format!(
                "{certificate} is self-signed or not meant for a server: if it is your own server, \
                 give it a certificate of a CA, and that CA's certificate with --ca-file"
            ),
            other => format!("{certificate} is not valid: {other}"),
        },
        other => format!("TLS with {host} failed: {other}"),
    }
}

/// A day in the notation of RFC 3339.
pub fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(time) => time.date().to_string(),
        Err(_) => "a day beyond all calendars".into(),
    }
}

/// Agrees with a server on TLS. `host` is without brackets. Blocks until the socket's deadline at the
/// most.
///
/// # Errors
/// Those of the socket; what [`cause`] finds in it, where the two find no common ground.
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
    // A certificate's name has no dot at its end, as a name in a URL may.
    ServerName::try_from(host.trim_end_matches('.').to_owned()).ok()
}

/// The rustls error inside an I/O error, which is how rustls reports through a socket.
pub fn cause(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Far enough ahead that every certificate has expired by then.
const CENTURIES: Duration = Duration::from_secs(500 * 365 * 24 * 60 * 60);

/// When the certificate that a verified peer has shown expires. rustls does not tell, except as
/// the reason why it is not valid at some later time; so that is what it is asked for.
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
