//! Destinations' responses: they read the same in pieces of any size, nothing is lost or added, and
//! what is written for ureq is a head and chunks.

use export_service::delivery::response::Reader;

pub fn run(bytes: &[u8]) {
    let Some((&piece, input)) = bytes.split_first() else {
        return;
    };
    let all = read(input, input.len().max(1));
    assert_eq!(read(input, usize::from(piece) + 1), all);
}

/// The status line and the body, whether the response is complete, and how much of the input was
/// used; `None` if it is not a response.
pub fn read(input: &[u8], piece: usize) -> Option<(Vec<u8>, Vec<u8>, bool, usize)> {
    let (mut reader, mut out) = (Reader::new(), Vec::new());
    let mut used = 0;
    for part in input.chunks(piece) {
        let taken = reader.feed(part, &mut out).ok()?;
        assert!(taken == part.len() || reader.is_over());
        used += taken;
        if reader.is_over() {
            break;
        }
    }
    if !reader.is_over() && !reader.end(true, &mut out) {
        assert!(out.is_empty(), "no response, and something to read");
        return None;
    }
    let end = out.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let (head, mut rest) = out.split_at(end);
    assert!(head.starts_with(b"HTTP/1.1 ") && head.is_ascii());
    let mut body = Vec::new();
    while !rest.is_empty() {
        let line = rest
            .iter()
            .position(|byte| *byte == b'\r')
            .expect("a chunk's size");
        let text = str::from_utf8(&rest[..line]).expect("digits");
        let size = usize::from_str_radix(text, 16).expect("digits");
        body.extend_from_slice(&rest[line + 2..][..size]);
        rest = &rest[line + size + 4..];
        assert!(size > 0 || rest.is_empty());
    }
    Some((head.to_vec(), body, reader.is_done(), used))
}
