//! Zest messages: encodes requests and decodes replies.
//!
//! Zest is the protocol of a Databox's stores and of its arbiter ("Zest: REST over ZeroMQ", Moore et
//! al., 2019): one frame with a header, options and a payload, all numbers big-endian. Its codes and
//! option numbers are those of CoAP (RFC 7252, section 12), as decimal bytes.
//!
//! Not here: sending frames (`curve`), and what follows from a reply (`super`).

/// The code of a GET.
const GET: u8 = 1;
/// The name by which the arbiter knows the client.
const URI_HOST: u16 = 3;
/// Makes a GET an observe request. Its value says what is to be observed.
const OBSERVE: u16 = 6;
/// The path of the request.
const URI_PATH: u16 = 11;
/// The format of the payload.
const CONTENT_FORMAT: u16 = 12;
/// For how many seconds to observe, in four bytes. 0 means for ever.
const MAX_AGE: u16 = 14;
/// In the reply to an observe request: the public key of the socket that sends what was observed.
const PUBLIC_KEY: u16 = 2048;
/// JSON, which the arbiter's clients give in every request.
const JSON: u16 = 50;

/// The reply's payload is what was asked for.
pub const CONTENT: u8 = 69;
/// The arbiter could not read the request.
pub const BAD_REQUEST: u8 = 128;
/// The arbiter does not know the token, or knows it as another host's.
pub const UNAUTHORIZED: u8 = 129;
/// The arbiter failed.
pub const INTERNAL_ERROR: u8 = 160;
/// The arbiter cannot serve now.
pub const UNAVAILABLE: u8 = 163;

/// Encodes a GET of `path` by `host`. `None` if a part is too long for its 16-bit length.
pub fn get(token: &[u8], path: &str, host: &str) -> Option<Vec<u8>> {
    encode(token, path, host, &[])
}

/// Encodes a request to observe `path` for a second. Its only purpose is the reply's [`Reply::instance`]:
/// what is observed goes to a socket that nobody connects to.
pub fn observe(token: &[u8], path: &str, host: &str) -> Option<Vec<u8>> {
    let second = 1_u32.to_be_bytes();
    encode(token, path, host, &[(OBSERVE, b"data"), (MAX_AGE, &second)])
}

fn encode(token: &[u8], path: &str, host: &str, more: &[(u16, &[u8])]) -> Option<Vec<u8>> {
    let usual = [
        (URI_PATH, path.as_bytes()),
        (URI_HOST, host.as_bytes()),
        (CONTENT_FORMAT, &JSON.to_be_bytes()),
    ];
    let mut message = vec![GET, (usual.len() + more.len()) as u8];
    let mut sized = |before: &[u8], value: &[u8]| {
        message.extend_from_slice(before);
        message.extend_from_slice(&u16::try_from(value.len()).ok()?.to_be_bytes());
        message.extend_from_slice(value);
        Some(())
    };
    sized(&[], token)?;
    for (number, value) in usual.iter().chain(more) {
        sized(&number.to_be_bytes(), value)?;
    }
    Some(message)
}

/// The arbiter's answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The outcome of the request, like [`CONTENT`].
    pub code: u8,
    /// The key that the arbiter created at its start, which tells its runs apart. Never empty. Only in the
    /// reply to an observe request.
    pub instance: Option<&'a [u8]>,
    /// Everything after the options.
    pub payload: &'a [u8],
}

impl<'a> Reply<'a> {
    /// Reads a reply. `None` if it ends before its header and options do. There are at most 255 options.
    pub fn read(message: &'a [u8]) -> Option<Self> {
        let (&[code, options], rest) = message.split_first_chunk()?;
        let (_token, mut rest) = split_sized(rest)?;
        let mut instance = None;
        for _ in 0..options {
            let (&number, sized) = rest.split_first_chunk()?;
            let (value, after) = split_sized(sized)?;
            if u16::from_be_bytes(number) == PUBLIC_KEY && !value.is_empty() {
                instance = Some(value);
            }
            rest = after;
        }
        Some(Self {
            code,
            instance,
            payload: rest,
        })
    }
}

/// A value after its 16-bit length, and what follows it.
fn split_sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u16::from_be_bytes(length).into())
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
    fn an_observe_request_has_the_two_options_more_that_the_arbiter_reads() {
        let message = observe(b"tok", "/status", "export-service").unwrap();
        let expected = [
            &[1, 5, 0, 3][..],
            b"tok",
            &[0, 11, 0, 7],
            b"/status",
            &[0, 3, 0, 14],
            b"export-service",
            &[0, 12, 0, 2, 0, 50],
            &[0, 6, 0, 4],
            b"data",
            &[0, 14, 0, 4, 0, 0, 0, 1],
        ];
        assert_eq!(message, expected.concat());
    }

    #[test]
    fn a_reply_to_an_observe_request_names_the_instance() {
        let instance = |reply| Reply::read(reply).unwrap().instance;
        let reply = b"\x45\x02\0\0\0\x0c\0\x02\0\0\x08\0\0\x03keyuuid";
        assert_eq!(instance(reply), Some(&b"key"[..]));
        assert_eq!(instance(b"\x45\x01\0\0\x08\0\0\0uuid"), None);
        assert_eq!(instance(b"\x45\0\0\0\x08\0\0\x03keyuuid"), None);
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
            options in proptest::collection::vec((prop_oneof![any::<u16>(), Just(2048)], proptest::collection::vec(any::<u8>(), 0..9)), 0..9),
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
            let read = reply.map(|reply| (reply.code, reply.instance, reply.payload));
            let mut keys = options.iter().filter(|(number, value)| *number == 2048 && !value.is_empty());
            let instance = keys.next_back().map(|(_, value)| &value[..]);
            prop_assert_eq!(read, Some((code, instance, &payload[..])));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(reply) = Reply::read(&bytes) {
                prop_assert!(bytes.ends_with(reply.payload));
            }
        }
    }
}
