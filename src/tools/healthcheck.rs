//! `healthcheck`: asks a running service on this machine for its status.
//!
//! Not here: the service's answer ([`crate::answer`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ureq::tls::TlsConfig;

use crate::config::HealthcheckArgs;

/// How long a health check may take.
const HEALTH: Duration = Duration::from_secs(3);

/// Asks the service at this address for its status, from the same machine. Blocks for at most three seconds.
///
/// # Errors
/// The URL that was asked, and why it did not answer `active`.
pub fn healthcheck(arguments: &HealthcheckArgs) -> Result<(), String> {
    let address = arguments.address();
    let local = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let scheme = if arguments.is_tls() { "https" } else { "http" };
    let url = format!(
        "{scheme}://{}/status",
        SocketAddr::new(local, address.port())
    );
    // The certificate is for the name that clients use. Nothing secret is sent, and whoever could
    // listen here in the service's place could also end the service.
    let tls = TlsConfig::builder().disable_verification(true).build();
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(HEALTH))
        .proxy(None)
        .tls_config(tls)
        .build();
    let body = ureq::Agent::new_with_config(config)
        .get(&url)
        .call()
        .and_then(|mut response| response.body_mut().read_to_string())
        .map_err(|error| format!("{url}: {error}; is the service running, on this port, and with this --tls-pem or --secrets-dir?"))?;
    if body == "active" {
        Ok(())
    } else {
        Err(format!("{url} does not say that it is active"))
    }
}
