//! A connection's bytes, cut into pieces as the first of them say: the requests are the same however
//! they are cut, none exceeds the limits, and each reads back from what is passed on.

use export_service::answer::{Refusal, refusal};
use export_service::gate::framing::{Framer, Request};

const MAX_BODY: usize = 512;

fn requests(bytes: &[u8], piece: usize) -> (Vec<Request>, Option<Refusal>) {
    let (mut framer, mut found) = (Framer::new(MAX_BODY), Vec::new());
    let mut pieces = bytes.chunks(piece.max(1));
    loop {
        match framer.take() {
            Ok(Some(request)) => found.push(request),
            Ok(None) => match pieces.next() {
                Some(mut piece) => {
                    while !piece.is_empty() {
                        framer.read_from(&mut piece).expect("a slice can be read");
                    }
                }
                None => return (found, None),
            },
            Err(refusal) => return (found, Some(refusal)),
        }
    }
}

pub fn run(bytes: &[u8]) {
    let Some((piece, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = requests(bytes, usize::MAX);
    assert_eq!(whole, requests(bytes, usize::from(*piece)));
    if let Some(refused) = whole.1 {
        assert!((400..600).contains(&refusal(&refused).status));
    }
    for mut request in whole.0 {
        let head = request.normalised_head(1);
        let (method, target) = (request.method().to_owned(), request.target().to_owned());
        let body = request.take_body();
        assert!(body.len() <= MAX_BODY);
        // What is passed on has no Host header; HTTP/1.0 needs none.
        let old = String::from_utf8(head).expect("a head is ASCII").replacen(
            " HTTP/1.1\r\n",
            " HTTP/1.0\r\n",
            1,
        );
        let (mut again, None) = requests(&[old.as_bytes(), &body].concat(), usize::MAX) else {
            panic!("what is passed on is refused");
        };
        let mut twin = again.pop().expect("one request is one request");
        assert!(again.is_empty());
        assert_eq!((twin.method(), twin.target()), (&*method, &*target));
        assert_eq!(twin.take_body(), body);
    }
}
