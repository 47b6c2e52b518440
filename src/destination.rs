//! Destinations: what their URLs must look like; pure.
//!
//! Not here: which addresses a host may have (`delivery::addresses`).

use std::fmt;
use std::net::Ipv6Addr;
use std::sync::Arc;

use ureq::http::Uri;

/// The longest URL that is accepted, in bytes.
pub const LONGEST_URL: usize = 8 * 1024;

/// A destination whose URL is well formed. Its text stays exactly as it was given, since tokens name
/// destinations by their exact text.
#[derive(Clone)]
pub struct Destination {
    url: Arc<str>,
    origin: usize,
}

impl Destination {
    /// Checks a URL: `http` or `https`, a possible host, no userinfo, no fragment, ASCII only.
    ///
    /// # Errors
    /// What is wrong with it. The text never quotes the URL, whose path may be a secret.
    pub fn parse(url: &str) -> Result<Self, BadUrl> {
        if has_zone(url) {
            return Err(BadUrl::Zone);
        }
        if url.len() > LONGEST_URL {
            return Err(BadUrl::TooLong);
        }
        // http::Uri accepts bytes over 127 and drops a fragment silently.
        if !url.is_ascii() {
            return Err(BadUrl::NotAscii);
        }
        if url.contains('#') {
            return Err(BadUrl::Fragment);
        }
        let uri: Uri = url.parse().map_err(|_| BadUrl::Malformed)?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(BadUrl::Scheme);
        }
        let authority = uri.authority().ok_or(BadUrl::NoHost)?.as_str();
        if authority.contains('@') {
            return Err(BadUrl::UserInfo);
        }
        let host = uri.host().unwrap_or_default();
        if host.is_empty() || host == "[]" {
            return Err(BadUrl::NoHost);
        }
        // Only a valid port may follow the host.
        let behind = authority.strip_prefix(host).unwrap_or(authority);
        let port = behind.strip_prefix(':').filter(|port| {
            let digits = port.bytes().all(|byte| byte.is_ascii_digit());
            digits && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if !behind.is_empty() && port.is_none() {
            return Err(BadUrl::Port);
        }
        check_host(host)?;
        // The authority follows "scheme://" in the given text.
        let scheme = url.find("://").map_or(0, |at| at + 3);
        let origin = scheme + authority.len();
        Ok(Self {
            url: url.into(),
            origin,
        })
    }

    /// The whole URL, exactly as it was given.
    pub fn as_str(&self) -> &str {
        &self.url
    }

    /// Scheme, host and port, which logs and error messages may show. Paths and queries may not appear
    /// there, because for many webhooks they are the credential.
    pub fn origin(&self) -> &str {
        &self.url[..self.origin]
    }

    /// Whether the URL is `https`.
    pub fn is_encrypted(&self) -> bool {
        self.url
            .as_bytes()
            .get(4)
            .is_some_and(|byte| byte.eq_ignore_ascii_case(&b's'))
    }

    /// The host, without brackets around an IPv6 address, and the port, which may be the scheme's default.
    pub fn host_and_port(&self) -> (&str, u16) {
        let default = if self.is_encrypted() { 443 } else { 80 };
        let port = self.authority()[self.host().len()..].strip_prefix(':');
        let port = port.and_then(|port| port.parse().ok()).unwrap_or(default);
        (bare(self.host()), port)
    }

    /// The host, with brackets around an IPv6 address.
    fn host(&self) -> &str {
        let authority = self.authority();
        match authority.rsplit_once(':') {
            // A colon before the closing bracket is part of an IPv6 address.
            Some((host, port)) if !port.contains(']') => host,
            _ => authority,
        }
    }

    /// The host, and the port if the URL has one, for messages.
    pub fn authority(&self) -> &str {
        self.origin()
            .split_once("://")
            .map_or(self.origin(), |(_, authority)| authority)
    }
}

/// Whether a URL's host is an IPv6 address with a zone, which names a network interface, in any notation
/// (RFC 4007 section 11, RFC 6874).
fn has_zone(url: &str) -> bool {
    let behind = url.split_once("://").map_or("", |(_, behind)| behind);
    let authority = behind.split(['/', '?', '#']).next().unwrap_or_default();
    authority
        .split_once('%')
        .is_some_and(|(address, _)| !authority.contains('@') && address.matches(':').count() > 1)
}

/// Refuses hosts that no look-up can find, which would be tried again for a day. Does not otherwise judge
/// names: whether `_`, `127.1` or `0x7f.1` mean something is up to the look-up.
fn check_host(host: &str) -> Result<(), BadUrl> {
    if host.starts_with('[') {
        return match bare(host).parse::<Ipv6Addr>() {
            Ok(_) => Ok(()),
            Err(_) => Err(BadUrl::Brackets),
        };
    }
    // The DNS's limits for names (RFC 1035, sections 2.3.4 and 3.1). The root's dot may be there.
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| (1..=63).contains(&label.len());
    if name.len() <= 253 && name.split('.').all(is_label) {
        Ok(())
    } else {
        Err(BadUrl::Name)
    }
}

/// A URL's host without the brackets around an IPv6 address (RFC 3986, section 3.2.2).
pub fn bare(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Destination({})", self.origin())
    }
}

/// What is wrong with a destination URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadUrl {
    /// It has more than [`LONGEST_URL`] bytes.
    TooLong,
    /// It has characters outside ASCII.
    NotAscii,
    /// It has a `#`, which is never sent to a server.
    Fragment,
    /// It is not a URL by RFC 3986.
    Malformed,
    /// It is relative, or of another scheme.
    Scheme,
    /// It names no host.
    NoHost,
    /// Its host is an IPv6 address with a zone, which names a network interface.
    Zone,
    /// Its host is in brackets, and not an IPv6 address.
    Brackets,
    /// Its host is neither an address nor a possible DNS name.
    Name,
    /// It holds a user name or a password.
    UserInfo,
    /// Its port is not 1 to 65535.
    Port,
}

impl fmt::Display for BadUrl {
    /// Continues a sentence that begins with the URL's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "is longer than 8,192 bytes",
            Self::NotAscii => {
                "has characters outside ASCII: percent-encode them, and write the host in punycode"
            }
            Self::Fragment => "has a fragment (#…), which no server ever sees: leave it out",
            Self::Malformed => "is not a URL: give one like https://host/path",
            Self::Scheme => "must begin with http:// or https://",
            Self::NoHost => "names no host: give one like https://host/path",
            Self::Zone => {
                "has a zone id (%…) in its host, which says something on one machine only: give an \
                 address without one, not a link-local one"
            }
            Self::Brackets => {
                "has no IPv6 address between the brackets: give one like https://[2001:db8::1]/path"
            }
            Self::Name => {
                "names a host that cannot be: a name has labels of 1 to 63 characters between its dots, \
                 and 253 in all"
            }
            Self::UserInfo => "holds a user name or password, which is not sent: leave it out",
            Self::Port => "has a port that is not 1 to 65535",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_good_url_keeps_its_text_and_shows_its_origin_only() {
        let label = format!("https://{}.example", "x".repeat(63));
        let name = format!("https://{}a.:443", "abc.".repeat(63));
        for (url, origin) in [
            ("https://a.example/x?key=1", "https://a.example"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("http://[::1]:8080/in", "http://[::1]:8080"),
            ("HTTPS://A.example", "HTTPS://A.example"),
            ("http://h/http", "http://h"),
            ("https://a.example?x", "https://a.example"),
            ("https://a.example./", "https://a.example."),
            ("https://_a-.example/%25?b=[::1%25c]", "https://_a-.example"),
            (
                "https://[::FFFF:127.0.0.1]:443",
                "https://[::FFFF:127.0.0.1]:443",
            ),
            ("http://127.1/", "http://127.1"),
            ("http://0x7f.1/", "http://0x7f.1"),
            (&label, &label),
            (&name, &name),
        ] {
            let destination = Destination::parse(url).unwrap();
            assert_eq!(destination.as_str(), url);
            assert_eq!(destination.origin(), origin);
            let (host, port) = destination.host_and_port();
            assert!(
                origin.contains(host) && !host.contains(['[', ']', '/']),
                "{host}"
            );
            assert!(matches!(port, 80 | 443 | 8080), "{port}");
            assert_eq!(
                destination.is_encrypted(),
                origin.to_lowercase().starts_with("https:")
            );
            assert_eq!(format!("{destination:?}"), format!("Destination({origin})"));
        }
    }

    #[test]
    fn each_kind_of_bad_url_is_told_apart() {
        let long = format!("https://a.example/{}", "x".repeat(LONGEST_URL));
        let label = format!("https://{}.example/", "x".repeat(64));
        let name = format!("https://{}aa/", "abc.".repeat(63));
        for (url, expected) in [
            ("", BadUrl::Malformed),
            ("/path", BadUrl::Scheme),
            ("a.example", BadUrl::Scheme),
            ("ftp://a.example/", BadUrl::Scheme),
            ("file:///etc/passwd", BadUrl::Malformed),
            ("https://", BadUrl::Malformed),
            ("https:///path", BadUrl::Malformed),
            ("https://:80/", BadUrl::NoHost),
            ("https://me@a.example/", BadUrl::UserInfo),
            ("https://me:pw@a.example/", BadUrl::UserInfo),
            ("https://a.example/#top", BadUrl::Fragment),
            ("http://[fe80::1%25eth0]/", BadUrl::Zone),
            ("http://[fe80::1%eth0]:80/", BadUrl::Zone),
            ("http://[fe80::1%2]", BadUrl::Zone),
            ("http://[fe80::1%]/", BadUrl::Zone),
            ("http://fe80::1%25eth0/", BadUrl::Zone),
            ("https://[::1%25lo?x", BadUrl::Zone),
            ("https://[]/", BadUrl::NoHost),
            ("https://[v1.x]/", BadUrl::Brackets),
            ("https://[v1.fe80::a+en1]/", BadUrl::Brackets),
            ("https://[1.2.3.4]/", BadUrl::Brackets),
            ("https://[a.example]:443/", BadUrl::Brackets),
            ("https://[::1::2]/", BadUrl::Brackets),
            ("https://[12345::]/", BadUrl::Brackets),
            ("https://a..example/", BadUrl::Name),
            ("https://.a.example/", BadUrl::Name),
            ("https://a.example..:443/", BadUrl::Name),
            ("https://./", BadUrl::Name),
            (&label, BadUrl::Name),
            (&name, BadUrl::Name),
            ("https://a b.example/", BadUrl::Malformed),
            ("https://a%20b.example/", BadUrl::Malformed),
            ("https://a.example:0/", BadUrl::Port),
            ("https://a.example:99999/", BadUrl::Port),
            ("https://a.example:/", BadUrl::Port),
            ("https://a.example:+443/", BadUrl::Port),
            ("https://[2606:4700::1111]x:443/", BadUrl::Port),
            ("https://ä.example/", BadUrl::NotAscii),
            ("https://a.example/a b", BadUrl::Malformed),
            ("https://a.example/\r\nX: y", BadUrl::Malformed),
            (&long, BadUrl::TooLong),
        ] {
            assert_eq!(Destination::parse(url).err(), Some(expected), "{url:.60}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(url in "(http|https|HTTP)?(://)?.{0,60}") {
            if let Ok(destination) = Destination::parse(&url) {
                prop_assert!(destination.as_str().starts_with(destination.origin()));
                prop_assert!(!destination.authority().is_empty());
            }
        }
    }
}
