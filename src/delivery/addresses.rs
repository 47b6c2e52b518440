//! Where a POST may go; pure. So far: what a destination URL must look like.
//!
//! Not here: looking names up and connecting ([`super::attempt`]).

use std::fmt;
use std::sync::Arc;

use ureq::http::Uri;

/// Longer URLs are refused: every waiting export keeps its own in memory.
pub const LONGEST_URL: usize = 8 * 1024;

/// A destination whose URL is well formed. The text is kept exactly as it was given, since
/// tokens name destinations by their exact text.
#[derive(Clone)]
pub struct Destination {
    url: Arc<str>,
    origin: usize,
}

impl Destination {
    /// Checks a URL: `http` or `https`, a host, no userinfo, no fragment, ASCII only.
    ///
    /// # Errors
    /// What is wrong with it; the text never quotes the URL, whose path may be a secret.
    pub fn parse(url: &str) -> Result<Self, BadUrl> {
        if url.len() > LONGEST_URL {
            return Err(BadUrl::TooLong);
        }
        // http::Uri lets bytes over 127 pass and drops a fragment without a word.
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
        // What stands behind the host must be a port that fits, or nothing.
        let behind = authority.strip_prefix(host).unwrap_or(authority);
        if !behind.is_empty() && uri.port_u16().is_none_or(|port| port == 0) {
            return Err(BadUrl::Port);
        }
        // The authority stands once in the text as it was given, right behind "scheme://".
        let origin = url
            .find(authority)
            .map_or(url.len(), |at| at + authority.len());
        Ok(Self {
            url: url.into(),
            origin,
        })
    }

    /// The whole URL, exactly as it was given.
    pub fn as_str(&self) -> &str {
        &self.url
    }

    /// Scheme, host and port: what logs and error messages may show. Paths and queries stay
    /// out of them, because with many webhooks they are the credential.
    pub fn origin(&self) -> &str {
        &self.url[..self.origin]
    }

    /// Host and port if one is given, for messages.
    pub fn authority(&self) -> &str {
        self.origin()
            .split_once("://")
            .map_or(self.origin(), |(_, authority)| authority)
    }
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
    /// It is no URL by RFC 3986.
    Malformed,
    /// It is relative, or of another scheme.
    Scheme,
    /// It names no host.
    NoHost,
    /// It holds a user name or a password.
    UserInfo,
    /// Its port is not 1 to 65535.
    Port,
}

impl fmt::Display for BadUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "`uri` is longer than 8,192 bytes",
            Self::NotAscii => "`uri` has characters outside ASCII: percent-encode them, and write the host in punycode",
            Self::Fragment => "`uri` has a fragment (#…), which no server ever sees: leave it out",
            Self::Malformed => "`uri` is not a URL: give one like https://host/path",
            Self::Scheme => "`uri` must begin with http:// or https://",
            Self::NoHost => "`uri` names no host: give one like https://host/path",
            Self::UserInfo => "`uri` holds a user name or password, which is not sent: leave it out",
            Self::Port => "`uri` has a port that is not 1 to 65535",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_good_url_keeps_its_text_and_shows_its_origin_only() {
        for (url, origin) in [
            ("https://a.example/x?key=1", "https://a.example"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("http://[::1]:8080/in", "http://[::1]:8080"),
            ("HTTPS://A.example", "HTTPS://A.example"),
            ("https://a.example?x", "https://a.example"),
        ] {
            let destination = Destination::parse(url).unwrap();
            assert_eq!(destination.as_str(), url);
            assert_eq!(destination.origin(), origin);
            assert_eq!(format!("{destination:?}"), format!("Destination({origin})"));
        }
    }

    #[test]
    fn each_kind_of_bad_url_is_told_apart() {
        let long = format!("https://a.example/{}", "x".repeat(LONGEST_URL));
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
            ("https://a.example:0/", BadUrl::Port),
            ("https://a.example:99999/", BadUrl::Port),
            ("https://a.example:/", BadUrl::Port),
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
