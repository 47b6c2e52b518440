//! Macaroons: reading the three formats, minting, and the chain of HMACs that signs them.
//!
//! The formats are those of libmacaroons (its `doc/format.txt`): v1 packets, v2 binary and v2 JSON.
//! The construction is that of "Macaroons: Cookies with Contextual Caveats for Decentralized
//! Authorization in the Cloud" (Birgisson et al., NDSS 2014), first-party caveats only.
//!
//! Not here: what a caveat means ([`super::caveats`]).

use std::fmt;

use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use sha2::Sha256;

use super::Denial;

/// Tokens are URL-safe base64; some minters pad it and some do not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The HMAC key with which libmacaroons derives a root key.
const KEY_GENERATOR: &[u8] = b"macaroons-key-generator";

/// The names of the formats.
const V1: &str = "libmacaroons v1";
const V2: &str = "libmacaroons v2";
const V2_JSON: &str = "libmacaroons v2 JSON";

/// The length of a SHA-256 HMAC in bytes.
const SIGNATURE: usize = 32;

/// The root key that tokens are signed with, derived from the shared secret.
#[derive(Clone)]
pub struct Key([u8; SIGNATURE]);

impl Key {
    /// Derives the root key as libmacaroons does: HMAC-SHA256 of the secret, keyed with a constant.
    pub fn derive(secret: &[u8]) -> Self {
        Self(hmac(KEY_GENERATOR, secret))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(hidden)")
    }
}

/// A macaroon that was read but not yet checked. Nothing in it can be trusted before
/// [`Macaroon::is_signed_by`] has returned true.
pub struct Macaroon {
    format: &'static str,
    identifier: Vec<u8>,
    caveats: Vec<Vec<u8>>,
    signature: [u8; SIGNATURE],
}

impl Macaroon {
    /// Mints a macaroon with an empty location, as the arbiter does.
    pub fn mint(key: &Key, identifier: &str, caveats: impl IntoIterator<Item = String>) -> Self {
        let caveats: Vec<Vec<u8>> = caveats.into_iter().map(String::into_bytes).collect();
        let signature = caveats
            .iter()
            .fold(hmac(&key.0, identifier.as_bytes()), |signature, caveat| {
                hmac(&signature, caveat)
            });
        Self {
            format: V1,
            identifier: identifier.as_bytes().to_vec(),
            caveats,
            signature,
        }
    }

    /// Reads a token in any of the three formats: v2 JSON as plain text, and all of them in URL-safe base64
    /// with or without padding.
    ///
    /// # Errors
    /// [`Denial::Unreadable`], or [`Denial::ThirdParty`] if a caveat needs a discharge.
    pub fn read(token: &str) -> Result<Self, Denial> {
        if token.starts_with('{') {
            return Self::read_json(token.as_bytes());
        }
        let bytes = BASE64.decode(token).map_err(|_| Denial::Unreadable)?;
        match bytes.first() {
            Some(2) => Self::read_v2(&bytes[1..]),
            Some(b'{') => Self::read_json(&bytes),
            _ => Self::read_v1(&bytes),
        }
    }

    /// Whether the chain of HMACs from `key` over identifier and caveats ends in the signature.
    /// Takes the same time wherever the first difference is.
    pub fn is_signed_by(&self, key: &Key) -> bool {
        let mut signer = mac(&key.0, &self.identifier);
        for caveat in &self.caveats {
            signer = mac(&signer.finalize().into_bytes(), caveat);
        }
        signer.verify_slice(&self.signature).is_ok()
    }

    /// The name of the format that it was read from.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// Whom the token was minted for. The arbiter leaves it empty.
    pub fn identifier(&self) -> &[u8] {
        &self.identifier
    }

    /// The caveats in the order they were added.
    pub fn caveats(&self) -> impl Iterator<Item = &[u8]> {
        self.caveats.iter().map(Vec::as_slice)
    }

    /// Writes the macaroon as v1 packets in URL-safe base64.
    ///
    /// `None` if a caveat or the identifier is too long for a packet's four hex digits.
    pub fn to_v1(&self) -> Option<String> {
        let mut packets = Vec::new();
        put_packet(&mut packets, "location", b"")?;
        put_packet(&mut packets, "identifier", &self.identifier)?;
        for caveat in &self.caveats {
            put_packet(&mut packets, "cid", caveat)?;
        }
        put_packet(&mut packets, "signature", &self.signature)?;
        Some(BASE64.encode(packets))
    }

    fn read_v1(bytes: &[u8]) -> Result<Self, Denial> {
        let mut packets = V1Packets(bytes);
        packets.expect(b"location")?;
        let identifier = packets.expect(b"identifier")?.to_vec();
        let mut caveats = Vec::new();
        let signature = loop {
            match packets.next()? {
                (b"cid", id) => caveats.push(id.to_vec()),
                (b"vid" | b"cl", _) => return Err(Denial::ThirdParty),
                (b"signature", signature) => break signature,
                _ => return Err(Denial::Unreadable),
            }
        };
        if !packets.0.is_empty() {
            return Err(Denial::Unreadable);
        }
        Self::new(V1, identifier, caveats, signature)
    }

    fn read_v2(bytes: &[u8]) -> Result<Self, Denial> {
        let mut fields = V2Fields(bytes);
        fields.optional(V2_LOCATION)?;
        let identifier = fields.required(V2_IDENTIFIER)?.to_vec();
        fields.end_of_section()?;
        let mut caveats = Vec::new();
        while !fields.at_end_of_section() {
            let location = fields.optional(V2_LOCATION)?;
            let id = fields.required(V2_IDENTIFIER)?.to_vec();
            if fields.optional(V2_VERIFICATION)?.or(location).is_some() {
                return Err(Denial::ThirdParty);
            }
            fields.end_of_section()?;
            caveats.push(id);
        }
        fields.end_of_section()?;
        let signature = fields.required(V2_SIGNATURE)?;
        if !fields.0.is_empty() {
            return Err(Denial::Unreadable);
        }
        Self::new(V2, identifier, caveats, signature)
    }

    fn read_json(bytes: &[u8]) -> Result<Self, Denial> {
        let json: V2Json = serde_json::from_slice(bytes).map_err(|_| Denial::Unreadable)?;
        // pymacaroons leaves the version out.
        if json.v.is_some_and(|version| version != 2) {
            return Err(Denial::Unreadable);
        }
        let mut caveats = Vec::with_capacity(json.c.len());
        for caveat in json.c {
            if caveat.v.is_some() || caveat.v64.is_some() || caveat.l.is_some() {
                return Err(Denial::ThirdParty);
            }
            caveats.push(json_bytes(caveat.i, caveat.i64)?);
        }
        let identifier = json_bytes(json.i, json.i64)?;
        let signature = json_bytes(json.s, json.s64)?;
        Self::new(V2_JSON, identifier, caveats, &signature)
    }

    fn new(
        format: &'static str,
        identifier: Vec<u8>,
        caveats: Vec<Vec<u8>>,
        signature: &[u8],
    ) -> Result<Self, Denial> {
        Ok(Self {
            format,
            identifier,
            caveats,
            signature: signature.try_into().map_err(|_| Denial::Unreadable)?,
        })
    }
}

fn mac(key: &[u8], message: &[u8]) -> Hmac<Sha256> {
    // HMAC takes a key of any length (RFC 2104 section 3), so this cannot fail.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC accepts every key length");
    mac.update(message);
    mac
}

fn hmac(key: &[u8], message: &[u8]) -> [u8; SIGNATURE] {
    mac(key, message).finalize().into_bytes().into()
}

/// Appends a v1 packet: its length in four hex digits (including these), a key, a space, a value, a newline.
fn put_packet(to: &mut Vec<u8>, key: &str, value: &[u8]) -> Option<()> {
    let length = u16::try_from(4 + key.len() + 1 + value.len() + 1).ok()?;
    to.extend_from_slice(format!("{length:04x}{key} ").as_bytes());
    to.extend_from_slice(value);
    to.push(b'\n');
    Some(())
}

struct V1Packets<'a>(&'a [u8]);

impl<'a> V1Packets<'a> {
    fn next(&mut self) -> Result<(&'a [u8], &'a [u8]), Denial> {
        self.split().ok_or(Denial::Unreadable)
    }

    fn expect(&mut self, key: &[u8]) -> Result<&'a [u8], Denial> {
        match self.next()? {
            (found, value) if found == key => Ok(value),
            _ => Err(Denial::Unreadable),
        }
    }

    fn split(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let digits = str::from_utf8(self.0.get(..4)?).ok()?;
        // from_str_radix would take a sign too.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        let length = usize::from_str_radix(digits, 16).ok()?;
        let packet = self.0.get(4..length)?.strip_suffix(b"\n")?;
        self.0 = &self.0[length..];
        let space = packet.iter().position(|&byte| byte == b' ')?;
        Some((&packet[..space], &packet[space + 1..]))
    }
}

const V2_END: u8 = 0;
const V2_LOCATION: u8 = 1;
const V2_IDENTIFIER: u8 = 2;
const V2_VERIFICATION: u8 = 4;
const V2_SIGNATURE: u8 = 6;

/// The fields of a v2 binary token: a type, a length as a varint, then that many bytes.
struct V2Fields<'a>(&'a [u8]);

impl<'a> V2Fields<'a> {
    fn required(&mut self, kind: u8) -> Result<&'a [u8], Denial> {
        self.optional(kind)?.ok_or(Denial::Unreadable)
    }

    fn optional(&mut self, kind: u8) -> Result<Option<&'a [u8]>, Denial> {
        if self.0.first() != Some(&kind) {
            return Ok(None);
        }
        self.split().map(Some).ok_or(Denial::Unreadable)
    }

    fn at_end_of_section(&self) -> bool {
        self.0.first() == Some(&V2_END)
    }

    fn end_of_section(&mut self) -> Result<(), Denial> {
        self.0 = self.0.strip_prefix(&[V2_END]).ok_or(Denial::Unreadable)?;
        Ok(())
    }

    fn split(&mut self) -> Option<&'a [u8]> {
        let mut length = 0_usize;
        // Three groups of seven bits say up to 2 MiB: far more than any header holds.
        for (index, &byte) in self.0.get(1..)?.iter().take(3).enumerate() {
            length |= usize::from(byte & 0x7f) << (7 * index);
            if byte & 0x80 == 0 {
                let start = index + 2;
                let value = self.0.get(start..start + length)?;
                self.0 = &self.0[start + length..];
                return Some(value);
            }
        }
        None
    }
}

/// A v2 JSON token; a name that ends in `64` holds URL-safe base64 of bytes that are not text.
#[derive(Deserialize)]
struct V2Json {
    v: Option<u8>,
    i: Option<String>,
    i64: Option<String>,
    #[serde(default)]
    c: Vec<V2JsonCaveat>,
    s: Option<String>,
    s64: Option<String>,
}

#[derive(Deserialize)]
struct V2JsonCaveat {
    i: Option<String>,
    i64: Option<String>,
    l: Option<String>,
    v: Option<String>,
    v64: Option<String>,
}

fn json_bytes(text: Option<String>, encoded: Option<String>) -> Result<Vec<u8>, Denial> {
    match (text, encoded) {
        (Some(text), None) => Ok(text.into_bytes()),
        (None, Some(encoded)) => BASE64.decode(encoded).map_err(|_| Denial::Unreadable),
        _ => Err(Denial::Unreadable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn minted(identifier: &str, caveats: &[&str]) -> String {
        let key = Key::derive(b"secret");
        let caveats = caveats.iter().map(|&caveat| caveat.to_owned());
        Macaroon::mint(&key, identifier, caveats).to_v1().unwrap()
    }

    #[test]
    fn a_minted_token_reads_back_and_verifies() {
        let macaroon = Macaroon::read(&minted("me", &["a = 1", "b = 2"]))
            .ok()
            .unwrap();
        assert!(macaroon.is_signed_by(&Key::derive(b"secret")));
        assert!(!macaroon.is_signed_by(&Key::derive(b"other")));
        assert_eq!(macaroon.identifier(), b"me");
        assert_eq!(macaroon.caveats().collect::<Vec<_>>(), [b"a = 1", b"b = 2"]);
    }

    #[test]
    fn a_caveat_too_long_for_a_packet_cannot_be_written() {
        let key = Key::derive(b"secret");
        assert!(
            Macaroon::mint(&key, "", ["x".repeat(70_000)])
                .to_v1()
                .is_none()
        );
    }

    #[test]
    fn the_key_does_not_show_in_debug() {
        assert_eq!(format!("{:?}", Key::derive(b"secret")), "Key(hidden)");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Macaroon::read(&String::from_utf8_lossy(&bytes));
            let _ = Macaroon::read(&BASE64.encode(&bytes));
            let _ = Macaroon::read_v1(&bytes);
            let _ = Macaroon::read_v2(&bytes);
        }

        #[test]
        fn any_identifier_and_caveats_survive_the_round_trip(
            identifier in ".{0,40}",
            caveats in proptest::collection::vec(".{0,60}", 0..6),
        ) {
            let key = Key::derive(b"secret");
            let token = Macaroon::mint(&key, &identifier, caveats.clone()).to_v1().unwrap();
            let read = Macaroon::read(&token).ok().unwrap();
            prop_assert!(read.is_signed_by(&key));
            prop_assert_eq!(read.identifier(), identifier.as_bytes());
            let texts: Vec<_> = read.caveats().map(|c| String::from_utf8_lossy(c).into_owned()).collect();
            prop_assert_eq!(texts, caveats);
        }

        #[test]
        fn a_token_with_one_byte_changed_never_verifies(at in 0_usize..200, flip in 1_u8..=255) {
            let token = minted("someone", &["target = export-service", "method = POST"]);
            let mut bytes = BASE64.decode(token).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            // Only the location, which nobody signs, and the case of hex digits may differ.
            let signed_part = bytes.windows(10).position(|w| w == b"identifier").unwrap_or(0);
            if at > signed_part + 10
                && let Ok(read) = Macaroon::read(&BASE64.encode(&bytes))
            {
                let original = Macaroon::read(&minted("someone", &["target = export-service", "method = POST"])).ok().unwrap();
                let same = read.identifier == original.identifier
                    && read.caveats == original.caveats
                    && read.signature == original.signature;
                prop_assert!(same || !read.is_signed_by(&Key::derive(b"secret")));
            }
        }
    }
}
