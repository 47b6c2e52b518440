//! Settings that work and may not be meant; pure.
//!
//! Not here: what cannot work ([`super`]), and variables that are no settings ([`super::variables`]).

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// The shortest secret, in bytes, that is not warned of: 128 bits if it is random.
const SHORTEST_SECRET: usize = 16;

/// A setting that works and may not be meant. Neither part shows a secret.
#[derive(Debug, PartialEq)]
pub struct Warning {
    /// What comes of it, and what to do instead.
    pub what: &'static str,
    /// The setting.
    pub setting: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.what)
    }
}

/// What to warn of when a service listens on this address, has a certificate or not, may send to these networks, and
/// was given this secret, if any.
pub fn of(
    bind: IpAddr,
    has_certificate: bool,
    allowed: &[IpNet],
    secret: Option<&str>,
) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mut warn = |what, setting| warnings.push(Warning { what, setting });
    if !has_certificate && !bind.is_loopback() {
        warn(
            "whoever is in the network can read tokens and data, as this is plain HTTP: give a certificate with \
             --tls-pem or listen on 127.0.0.1 (in a container, publish the port there)",
            format!("--bind {bind}"),
        );
    }
    for network in allowed.iter().filter(|network| network.prefix_len() == 0) {
        warn(
            "exports may go to every address, at home and by plain HTTP too: name the networks that they need",
            format!("--allow-network {network}"),
        );
    }
    if secret.is_some_and(|secret| secret.len() < SHORTEST_SECRET) {
        warn(
            "the secret is short enough to be guessed, and whoever does can mint tokens: make one with \
             `openssl rand -hex 32` (tokens minted before are void then)",
            "--secret".into(),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warned(
        bind: &str,
        has_certificate: bool,
        allowed: &[&str],
        secret: Option<&str>,
    ) -> Vec<String> {
        let allowed: Vec<_> = allowed
            .iter()
            .map(|network| network.parse().unwrap())
            .collect();
        let warnings = of(bind.parse().unwrap(), has_certificate, &allowed, secret);
        warnings
            .into_iter()
            .map(|warning| warning.setting)
            .collect()
    }

    #[test]
    fn settings_that_may_not_be_meant_are_warned_of_and_others_are_not() {
        let none: [&str; 0] = [];
        assert_eq!(
            warned(
                "127.0.0.1",
                false,
                &["10.0.0.0/8"],
                Some("0123456789abcdef")
            ),
            none
        );
        assert_eq!(warned("::1", false, &[], None), none);
        assert_eq!(warned("0.0.0.0", true, &[], None), none);
        assert_eq!(warned("0.0.0.0", false, &[], None), ["--bind 0.0.0.0"]);
        assert_eq!(warned("::", false, &[], None), ["--bind ::"]);
        assert_eq!(
            warned("192.168.1.2", false, &[], None),
            ["--bind 192.168.1.2"]
        );
        assert_eq!(
            warned("::1", false, &["0.0.0.0/0", "::1/128", "::/0"], None),
            ["--allow-network 0.0.0.0/0", "--allow-network ::/0"]
        );
        assert_eq!(
            warned("::1", false, &[], Some("0123456789abcde")),
            ["--secret"]
        );
    }
}
