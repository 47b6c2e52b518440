//! Which addresses a destination's name may have; pure.
//!
//! Not here: looking names up and connecting ([`super::connect`]).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Whether a URL's host, without brackets, is a literal address: in the usual notation, or in one that
/// systems also take for an IPv4 address (one to four numbers, decimal, octal or hexadecimal, as in
/// inet_aton(3)).
pub fn is_literal(host: &str) -> bool {
    let number = |text: &str| match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        _ if !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) => None,
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None if text.starts_with('0') => u32::from_str_radix(text, 8).ok(),
        None => text.parse().ok(),
    };
    let numeric = || {
        let numbers: Option<Vec<_>> = host.split('.').map(number).collect();
        let numbers = numbers.unwrap_or_default();
        // The last number stands for all bytes that are left.
        numbers.split_last().is_some_and(|(last, bytes)| {
            bytes.len() < 4
                && bytes.iter().all(|byte| *byte < 256)
                && u64::from(*last) < 1 << (8 * (4 - bytes.len()))
        })
    };
    host.parse::<IpAddr>().is_ok() || numeric()
}

/// The IPv4 blocks that are not the public internet (IANA's special-purpose registry, RFC 6890
/// and its successors), and what to call them.
const SPECIAL_V4: [(Ipv4Net, &str); 16] = [
    (v4([0, 0, 0, 0], 8), "no host's address"),
    (v4([10, 0, 0, 0], 8), "in your home network"),
    (v4([100, 64, 0, 0], 10), "in your provider's network"),
    (v4([127, 0, 0, 0], 8), "this machine"),
    (v4([169, 254, 0, 0], 16), "link-local"),
    (v4([172, 16, 0, 0], 12), "in your home network"),
    (v4([192, 0, 0, 0], 24), "reserved for protocols"),
    (v4([192, 0, 2, 0], 24), "reserved for documentation"),
    (v4([192, 88, 99, 0], 24), "a former 6to4 relay"),
    (v4([192, 168, 0, 0], 16), "in your home network"),
    (v4([198, 18, 0, 0], 15), "reserved for benchmarks"),
    (v4([198, 51, 100, 0], 24), "reserved for documentation"),
    (v4([203, 0, 113, 0], 24), "reserved for documentation"),
    (v4([224, 0, 0, 0], 4), "a multicast address"),
    (v4([255, 255, 255, 255], 32), "the broadcast address"),
    (v4([240, 0, 0, 0], 4), "reserved"),
];

/// The only IPv6 block that is the public internet.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0], 3);

/// Blocks within it that are not: documentation, and addresses that embed an IPv4 address or are no host's.
const SPECIAL_V6: [(Ipv6Net, &str); 4] = [
    // Teredo tunnels, ORCHIDs, benchmarks and more.
    (v6([0x2001, 0, 0], 23), "reserved for protocols"),
    (v6([0x2001, 0xdb8, 0], 32), "reserved for documentation"),
    (v6([0x2002, 0, 0], 16), "a 6to4 tunnel"),
    (v6([0x3fff, 0, 0], 20), "reserved for documentation"),
];

/// NAT64 (RFC 6052): homes whose network is IPv6 only reach IPv4 hosts through it.
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0], 96);

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6([a, b, c]: [u16; 3], prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), prefix)
}

/// Which addresses may be sent to, beside public ones over TLS.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Networks that are allowed even if they are private, also over plain HTTP.
    pub allowed: Vec<IpNet>,
    /// The ports this service listens on: no export may be a request to the service itself.
    pub own_ports: Vec<u16>,
}

impl Rules {
    /// Judges one address of a destination. `encrypted` says whether the URL is `https`, `is_own` whether an
    /// address is one of this machine's.
    ///
    /// # Errors
    /// Why nothing may be sent there.
    pub fn judge(
        &self,
        address: SocketAddr,
        encrypted: bool,
        is_own: impl Fn(IpAddr) -> bool,
    ) -> Result<(), Forbidden> {
        let ip = canonical(address.ip());
        if self.own_ports.contains(&address.port()) && (ip.is_unspecified() || is_own(ip)) {
            return Err(Forbidden::Itself(address));
        }
        if self
            .allowed
            .iter()
            .any(|net| net.contains(&ip) || net.contains(&address.ip()))
        {
            return Ok(());
        }
        if let Some(what) = special(ip) {
            return Err(Forbidden::Network(ip, what));
        }
        if encrypted {
            Ok(())
        } else {
            Err(Forbidden::Plain(ip))
        }
    }
}

/// Why nothing may be sent to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// It is not public. The text says what it is instead.
    Network(IpAddr, &'static str),
    /// It is public, and the URL is plain `http`.
    Plain(IpAddr),
    /// It is this service's own.
    Itself(SocketAddr),
}

impl std::error::Error for Forbidden {}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(ip, what) => {
                write!(
                    f,
                    "{ip} is {what}; start with --allow-network {} to permit it",
                    IpNet::from(*ip)
                )
            }
            Self::Plain(ip) => write!(
                f,
                "plain http to {ip} could be read on its way: use https, or start with \
                 --allow-network {} to permit it",
                IpNet::from(*ip)
            ),
            Self::Itself(address) => {
                write!(
                    f,
                    "{address} is this service itself, which is never a destination"
                )
            }
        }
    }
}

/// The address that packets are sent to: the IPv4 address that an IPv6 one embeds, if it does.
fn canonical(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip else {
        return ip;
    };
    if let Some(mapped) = v6.to_ipv4_mapped() {
        return mapped.into();
    }
    // Not ::a.b.c.d, which is deprecated (RFC 4291) and leads nowhere.
    if NAT64.contains(&v6) {
        let [.., a, b, c, d] = v6.octets();
        return Ipv4Addr::new(a, b, c, d).into();
    }
    ip
}

/// What an address is, if it is not on the public internet.
fn special(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) => SPECIAL_V4
            .iter()
            .find(|(net, _)| net.contains(&ip))
            .map(|(_, what)| *what),
        IpAddr::V6(ip) if ip.is_loopback() => Some("this machine"),
        IpAddr::V6(ip) if ip.is_unspecified() => Some("no host's address"),
        IpAddr::V6(ip) if ip.is_multicast() => Some("a multicast address"),
        IpAddr::V6(ip) if ip.is_unicast_link_local() => Some("link-local"),
        IpAddr::V6(ip) if ip.is_unique_local() => Some("in your home network"),
        IpAddr::V6(ip) if !GLOBAL_V6.contains(&ip) => Some("reserved"),
        IpAddr::V6(ip) => SPECIAL_V6
            .iter()
            .find(|(net, _)| net.contains(&ip))
            .map(|(_, what)| *what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_are_told_from_names_in_every_spelling() {
        for literal in [
            "127.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f000001",
            "0X7F.1",
            "0177.0.0.1",
            "017700000001",
            "0",
        ] {
            assert!(is_literal(literal), "{literal}");
        }
        for name in [
            "localhost",
            "a.example",
            "1.example",
            "127.0.0.1.",
            "127..1",
            "256.0.0.1",
            "1.2.65536",
            "4294967296",
            "0x",
            "0x+1",
            "+1",
            "089",
            "1.2.3.4.5",
            "cafe",
            "",
        ] {
            assert!(!is_literal(name), "{name}");
        }
    }

    fn judged(address: &str, allowed: &[&str], encrypted: bool) -> Result<(), Forbidden> {
        let allowed = allowed.iter().map(|net| net.parse().unwrap()).collect();
        let ip: IpAddr = address.parse().unwrap();
        let rules = Rules {
            allowed,
            own_ports: vec![8080],
        };
        rules.judge(SocketAddr::new(ip, 443), encrypted, |_| false)
    }

    #[test]
    fn only_public_addresses_may_be_sent_to() {
        for private in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.5",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.0.170",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "febf::1",
            "fc00::1",
            "fd12:3456::1",
            "ff02::1",
            "fec0::1",
            "100::1",
            "64:ff9b:1::1",
            "5f00::1",
            "2001::1",
            "2001:10::1",
            "2001:2f::1",
            "2001:2::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "3fff::1",
            "4000::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:a9fe:a9fe",
            "::127.0.0.1",
            "::a00:1",
            "::1.1.1.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::192.168.0.1",
        ] {
            let verdict = judged(private, &[], true);
            assert!(
                matches!(verdict, Err(Forbidden::Network(..))),
                "{private}: {verdict:?}"
            );
        }
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.255.255",
            "192.169.0.1",
            "198.17.255.255",
            "198.20.0.1",
            "223.255.255.255",
            "2000::1",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2606:4700::1111",
            "2a00::1",
            "3ffe::1",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
        ] {
            assert_eq!(judged(public, &[], true), Ok(()), "{public}");
            let plain = judged(public, &[], false);
            assert!(
                matches!(plain, Err(Forbidden::Plain(_))),
                "{public}: {plain:?}"
            );
        }
    }

    #[test]
    fn an_allowed_network_permits_plain_http_and_embedded_spellings_too() {
        for address in ["10.0.0.5", "::ffff:10.0.0.5", "64:ff9b::10.0.0.5"] {
            assert_eq!(judged(address, &["10.0.0.5/32"], false), Ok(()));
            assert!(judged(address, &["10.0.0.6/32"], false).is_err());
        }
        assert_eq!(
            judged("fd00::7", &["192.168.0.0/16", "fd00::/8"], false),
            Ok(())
        );
        assert_eq!(judged("1.1.1.1", &["0.0.0.0/0"], false), Ok(()));
    }

    #[test]
    fn the_service_itself_is_never_a_destination() {
        let rules = Rules {
            allowed: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
            own_ports: vec![8081, 8080],
        };
        let own = |ip: IpAddr| ip == IpAddr::from([192, 168, 1, 2]) || ip.is_loopback();
        for address in [
            "192.168.1.2:8080",
            "127.0.0.1:8080",
            "0.0.0.0:8080",
            "[::1]:8080",
            "[::ffff:127.0.0.1]:8080",
            "[::]:8080",
            "192.168.1.2:8081",
        ] {
            let address = address.parse().unwrap();
            assert_eq!(
                rules.judge(address, true, own),
                Err(Forbidden::Itself(address))
            );
        }
        assert_eq!(
            rules.judge("192.168.1.3:8080".parse().unwrap(), true, own),
            Ok(())
        );
        assert_eq!(
            rules.judge("192.168.1.2:8082".parse().unwrap(), true, own),
            Ok(())
        );
    }

    #[test]
    fn a_refusal_says_which_setting_permits_the_address() {
        let message = |address| judged(address, &[], true).unwrap_err().to_string();
        assert_eq!(
            message("10.0.0.5"),
            "10.0.0.5 is in your home network; start with --allow-network 10.0.0.5/32 to permit it"
        );
        assert!(message("fd00::1").contains("--allow-network fd00::1/128"));
    }

    proptest! {
        #[test]
        fn an_ipv4_address_is_judged_alike_in_all_its_spellings(bits in any::<u32>(), encrypted in any::<bool>()) {
            let ip = Ipv4Addr::from_bits(bits);
            let mapped = judged(&format!("::ffff:{ip}"), &[], encrypted);
            prop_assert_eq!(judged(&ip.to_string(), &[], encrypted), mapped);
            prop_assert_eq!(judged(&format!("64:ff9b::{ip}"), &[], encrypted), mapped);
        }
    }
}
