//! What an act of the owner is about: everything, a destination, all destinations of a host, or a sender; pure.
//!
//! Not here: which names there are (`store`), and the acts themselves ([`super`]).

use std::fmt;

use crate::destination::Destination;
use crate::ledger::LedgerKey;

/// What an act is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Everything.
    All,
    /// One destination, by its name: see [`LedgerKey::name`].
    Destination(String),
    /// All destinations of a host. Scheme and port are there if the owner gave them.
    Host(String),
    /// A sender, by its name: see [`crate::ledger::who`].
    Who(String),
}

/// What a person's text means.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning {
    /// This subject, whether or not anything is known of it.
    Subject(Subject),
    /// A sender, a sender's label or a host, whichever is known.
    Name(String),
}

impl Subject {
    /// Reads a text as the owner types it: `all`, a URL, a destination's name, a stored subject like `who:NAME`, or
    /// a bare name.
    ///
    /// # Errors
    /// What is wrong with it. The text does not quote a URL.
    pub fn parse(text: &str, key: &LedgerKey) -> Result<Meaning, String> {
        let text = text.trim();
        if text.is_empty() {
            return Err("the subject is empty: say all, a destination or a sender".into());
        }
        if let Some(subject) = Self::from_stored(text) {
            return match subject {
                Self::Host(host) if has_path(&host) => Err(
                    "a host has no path and no slash behind it: say host:a.example, or give the whole URL".into(),
                ),
                Self::Destination(name) if !has_tag(&name) => Err(
                    "a destination's name ends with # and four hexadecimal digits, as the ledger shows it: give \
                     that, or the whole URL"
                        .into(),
                ),
                Self::Host(host) if host.contains('#') => {
                    Err("a host has no tag: say destination:NAME #tag".into())
                }
                subject => Ok(Meaning::Subject(subject)),
            };
        }
        // A destination's name has a tag, like no URL of a destination.
        if let Some((origin, tag)) = text.rsplit_once('#') {
            if !has_tag(text) {
                return Err("a destination's name ends with # and four hexadecimal digits".into());
            }
            let (origin, tag) = (origin.trim_end(), tag.to_ascii_lowercase());
            return Ok(Meaning::Subject(Self::Destination(format!(
                "{origin} #{tag}"
            ))));
        }
        if let Some((_, behind)) = text.split_once("://") {
            if !behind.contains(['/', '?']) {
                return Ok(Meaning::Subject(Self::Host(text.to_ascii_lowercase())));
            }
            let destination = Destination::parse(text).map_err(|bad| format!("the URL {bad}"))?;
            return Ok(Meaning::Subject(Self::Destination(key.name(&destination))));
        }
        Ok(Meaning::Name(text.to_owned()))
    }

    /// Reads what [`Subject`] displays.
    pub fn from_stored(text: &str) -> Option<Self> {
        if text.eq_ignore_ascii_case("all") {
            return Some(Self::All);
        }
        let (kind, name) = text.split_once(':')?;
        match (kind, name) {
            (_, "") => None,
            ("destination", name) => Some(Self::Destination(name.to_owned())),
            ("host", name) => Some(Self::Host(name.to_ascii_lowercase())),
            ("who", name) => Some(Self::Who(name.to_owned())),
            _ => None,
        }
    }

    /// Whether exports of this sender to this destination are meant, both by name.
    pub fn matches(&self, who: &str, destination: &str) -> bool {
        match self {
            Self::All => true,
            Self::Destination(name) => name == destination,
            Self::Host(host) => is_at(host, destination),
            Self::Who(name) => name == who,
        }
    }

    /// The sender and the destination for the ledger; empty if they are not named.
    pub fn names(&self) -> (&str, &str) {
        match self {
            Self::All => ("", ""),
            Self::Destination(name) | Self::Host(name) => ("", name),
            Self::Who(name) => (name, ""),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Destination(name) => write!(f, "destination:{name}"),
            Self::Host(host) => write!(f, "host:{host}"),
            Self::Who(who) => write!(f, "who:{who}"),
        }
    }
}

fn has_path(host: &str) -> bool {
    let authority = host
        .split_once("://")
        .map_or(host, |(_, authority)| authority);
    authority.contains(['/', '?'])
}

fn has_tag(name: &str) -> bool {
    let tag = name.rsplit_once('#').map_or("", |(_, tag)| tag);
    tag.len() == 4 && tag.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether the destination of this name is at a host: `a.example`, `a.example:8443` and `https://a.example:8443` all
/// mean `a.example:8443 #3f9a`.
pub fn is_at(host: &str, destination: &str) -> bool {
    let origin = destination
        .split_once(" #")
        .map_or(destination, |(origin, _)| origin);
    let (scheme, authority) = origin.split_once("://").unwrap_or(("https", origin));
    let (meant, host) = match host.split_once("://") {
        Some((meant, host)) => (Some(meant), host),
        None => (None, host),
    };
    let without_port = match authority.rsplit_once(':') {
        // A colon before the closing bracket is part of an IPv6 address.
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    };
    let is_scheme = meant.is_none_or(|meant| meant.eq_ignore_ascii_case(scheme));
    // With a scheme, an origin is meant, whose port counts.
    let is_host = host.eq_ignore_ascii_case(authority)
        || meant.is_none() && host.eq_ignore_ascii_case(without_port);
    is_scheme && is_host
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key_file::Key;

    fn key() -> LedgerKey {
        LedgerKey::new(&Key::from([7; 32]))
    }

    fn parsed(text: &str) -> Subject {
        match Subject::parse(text, &key()).unwrap() {
            Meaning::Subject(subject) => subject,
            Meaning::Name(name) => panic!("{name} is a bare name"),
        }
    }

    #[test]
    fn a_subject_is_meant_by_all_the_ways_to_write_it() {
        let url = "https://hooks.example.com/services/s3cret";
        let name = key().name(&Destination::parse(url).unwrap());
        let destination = Subject::Destination(name.clone());
        for text in [
            url,
            &name,
            &name.replace(" #", "#"),
            &format!(" destination:{name}"),
        ] {
            assert_eq!(parsed(text), destination, "{text}");
        }
        assert_eq!(parsed("ALL"), Subject::All);
        assert_eq!(parsed("who:all"), Subject::Who("all".into()));
        assert_eq!(parsed("host:A.example"), Subject::Host("a.example".into()));
        assert_eq!(
            parsed("http://10.0.0.7:9090"),
            Subject::Host("http://10.0.0.7:9090".into())
        );
        for text in ["sleep app", "172.18.0.5", "fe80::1", "hooks.example.com"] {
            let meaning = Subject::parse(text, &key()).unwrap();
            assert_eq!(meaning, Meaning::Name(text.into()));
        }
    }

    #[test]
    fn what_means_nothing_is_refused_without_quoting_it() {
        for text in [
            "",
            "  ",
            "a.example #12",
            "ftp://a.example/s3cret",
            "host:a.example #1234",
            "host:a.example/in",
            "host:https://a.example/",
            "destination:foo",
            "destination:https://a.example/in",
        ] {
            let why = Subject::parse(text, &key()).unwrap_err();
            assert!(!why.contains("s3cret"), "{why}");
        }
    }

    #[test]
    fn a_stored_subject_is_read_as_it_was() {
        for subject in [
            Subject::All,
            Subject::Destination("a.example #3f9a".into()),
            Subject::Host("http://[::1]:80".into()),
            Subject::Who("who:all".into()),
        ] {
            assert_eq!(Subject::from_stored(&subject.to_string()), Some(subject));
        }
        assert_eq!(Subject::from_stored("who:"), None);
    }

    #[test]
    fn a_host_means_all_that_goes_there() {
        for (host, name, matches) in [
            ("a.example", "a.example #3f9a", true),
            ("A.example", "a.example:8443 #3f9a", true),
            ("a.example:8443", "a.example:8443 #3f9a", true),
            ("a.example:8443", "a.example #3f9a", false),
            ("a.example", "http://a.example:9090 #3f9a", true),
            ("http://a.example:9090", "http://a.example:9090 #3f9a", true),
            ("https://a.example", "a.example #3f9a", true),
            ("https://a.example", "http://a.example #3f9a", false),
            ("https://a.example", "a.example:8443 #3f9a", false),
            ("[::1]", "http://[::1]:80 #3f9a", true),
            ("example", "a.example #3f9a", false),
        ] {
            assert_eq!(is_at(host, name), matches, "{host} {name}");
        }
        let who = Subject::Who("sleep".into());
        assert!(who.matches("sleep", "a.example #3f9a") && !who.matches("run", "a.example #3f9a"));
        assert!(Subject::All.matches("", ""));
    }
}
