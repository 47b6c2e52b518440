//! Zest messages: a GET as bytes, and bytes as a reply.
//!
//! Zest is the protocol of a Databox's stores and of its arbiter ("Zest: REST over ZeroMQ", Moore et
//! al., 2019): one frame with a header, options and a payload, all numbers big-endian. Its codes and
//! option numbers are those of CoAP (RFC 7252, section 12), as decimal bytes.
//!
//! Not here: how a frame travels (`curve`), and what follows from a reply (`super`).

/// The code of a GET.
const GET: u8 = 1;
/// The host that the asking side is known as.
const URI_HOST: u16 = 3;
/// The path that is asked for.
const URI_PATH: u16 = 11;
/// What kind of payload is meant.
const CONTENT_FORMAT: u16 = 12;
/// JSON, which the arbiter's clients name for all they ask.
const JSON: u16 = 50;

/// The reply's payload is what was asked for.
pub const CONTENT: u8 = 69;
/// The arbiter could not read the request.
pub const BAD_REQUEST: u8 = 128;
/// The arbiter does not know the token, or not as that of this host.
pub const UNAUTHORIZED: u8 = 129;
/// The arbiter failed.
pub const INTERNAL_ERROR: u8 = 160;
/// The arbiter cannot serve now.
pub const UNAVAILABLE: u8 = 163;

/// Encodes a GET of `path` by `host`; `None` where a part is longer than its 16-bit length can say.
pub fn get(token: &[u8], path: &str, host: &str) -> Option<Vec<u8>> {
    let options = [
        (URI_PATH, path.as_bytes()),
        (URI_HOST, host.as_bytes()),
        (CONTENT_FORMAT, &JSON.to_be_bytes()),
    ];
    let mut message = vec![GET, options.len() as u8];
    let mut sized = |before: &[u8], value: &[u8]| {
        message.extend_from_slice(before);
        message.extend_from_slice(&u16::try_from(value.len()).ok()?.to_be_bytes());
        message.extend_from_slice(value);
        Some(())
    };
    sized(&[], token)?;
    for (number, value) in options {
        sized(&number.to_be_bytes(), value)?;
    }
    Some(message)
}

/// What the arbiter answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reply<'a> {
    /// What became of the request, like [`CONTENT`].
    pub code: u8,
    /// Everything after the options.
    pub payload: &'a [u8],
}

impl<'a> Reply<'a> {
    /// Reads a reply; `None` where it ends before its header and options do. Takes as long as there
    /// are options, which are 255 at the most.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let (&[code, options], rest) = message.split_first_chunk()?;
        let mut rest = skip_sized(rest)?;
        for _ in 0..options {
            let (_number, sized) = rest.split_first_chunk::<2>()?;
            rest = skip_sized(sized)?;
        }
        Some(Self {
            code,
            payload: rest,
        })
    }
}

/// What follows a value that has its 16-bit length before it.
fn skip_sized(bytes: &[u8]) -> Option<&[u8]> {
    let (&length, rest) = bytes.split_first_chunk()?;
    rest.get(u16::from_be_bytes(length).into()..)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_get_is_what_the_arbiter_expects_byte_for_byte() {
        let message = get(b"tok", "/store/secret", "export-service").unwrap();
        let expected = [
            &[1, 3, 0, 3][..],
            b"tok",
            &[0, 11, 0, 13],
            b"/store/secret",
            &[0, 3, 0, 14],
            b"export-service",
            &[0, 12, 0, 2, 0, 50],
        ];
        assert_eq!(message, expected.concat());
    }

    #[test]
    fn a_part_too_long_for_its_length_is_not_encoded() {
        assert!(get(&[0; 65_535], "/", "h").is_some());
        assert!(get(&[0; 65_536], "/", "h").is_none());
    }

    #[test]
    fn a_reply_that_is_cut_off_is_none() {
        let whole = [&[69, 1, 0, 1][..], b"t", &[0, 12, 0, 2, 0, 0], b"secret"].concat();
        assert!(Reply::read(&whole).is_some_and(|reply| reply.payload == b"secret"));
        for end in 0..whole.len() - b"secret".len() {
            assert!(Reply::read(&whole[..end]).is_none(), "{end}");
        }
    }

    proptest! {
        #[test]
        fn any_reply_gives_back_its_code_and_payload(
            code: u8,
            token in proptest::collection::vec(any::<u8>(), 0..40),
            options in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..9),
            payload in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut message = vec![code, options.len() as u8];
            message.extend((token.len() as u16).to_be_bytes());
            message.extend(&token);
            for (number, value) in &options {
                message.extend(number.to_be_bytes());
                message.extend((value.len() as u16).to_be_bytes());
                message.extend(value);
            }
            message.extend(&payload);
            let reply = Reply::read(&message);
            let read = reply.map(|reply| (reply.code, reply.payload));
            prop_assert_eq!(read, Some((code, &payload[..])));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(reply) = Reply::read(&bytes) {
                prop_assert!(bytes.ends_with(reply.payload));
            }
        }
    }
}
