//! The arbiter's side of a conversation: a greeting, right or wrong, then frames, each as the fuzzer wrote
//! it or encrypted with the arbiter's keys, so that its content is reached too. Nothing panics, and without
//! these keys nobody gets as far as a request.
//!
//! An input is a list of pieces, each after a byte for its kind and a byte for its length.

use std::sync::LazyLock;

use crypto_box::aead::Aead;
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use export_service::arbiter::curve::{Client, Error, RANDOM, key_of_z85};

/// The randomness of the client; fixed, so that its keys are known.
const RANDOM_BYTES: [u8; RANDOM] = [7; RANDOM];

/// The arbiter's two public keys, and what it encrypts with. Made once: they cost more than all the rest.
struct Keys {
    lasting: [u8; 32],
    passing: [u8; 32],
    welcome: SalsaBox,
    session: SalsaBox,
}

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    let client: PublicKey = SecretKey::from_bytes([7; 32]).public_key();
    let lasting = SecretKey::from_bytes([1; 32]);
    let passing = SecretKey::from_bytes([2; 32]);
    Keys {
        lasting: *lasting.public_key().as_bytes(),
        passing: *passing.public_key().as_bytes(),
        welcome: SalsaBox::new(&client, &lasting),
        session: SalsaBox::new(&client, &passing),
    }
});

pub fn run(bytes: &[u8]) {
    if let Ok(text) = str::from_utf8(bytes) {
        let _ = key_of_z85(text);
    }
    let mut client = Client::new(KEYS.lasting, &RANDOM_BYTES);
    let mut count = 0_u64;
    let mut sealed_by_arbiter = false;
    let mut rest = bytes;
    while let [kind, length, after @ ..] = rest {
        let (piece, after) = after.split_at(after.len().min((*length).into()));
        rest = after;
        let counted = |name: &[u8], prefix: &[u8; 16], count: u64| {
            let mut nonce = [0; 24];
            nonce[..16].copy_from_slice(prefix);
            nonce[16..].copy_from_slice(&count.to_be_bytes());
            let sealed = KEYS.session.encrypt(&nonce.into(), piece).unwrap();
            [name, &count.to_be_bytes(), &sealed].concat()
        };
        count += 1;
        let input = match kind % 6 {
            // Unchanged.
            0 => piece.to_vec(),
            // The greeting, with the fuzzer's changes.
            1 => {
                let mut greeting = [0; 64];
                greeting[0] = 0xff;
                greeting[9] = 0x7f;
                greeting[10] = 3;
                greeting[12..17].copy_from_slice(b"CURVE");
                for (byte, change) in greeting.iter_mut().zip(piece) {
                    *byte ^= change;
                }
                greeting.to_vec()
            }
            2 => frame(4, piece),
            // WELCOME with the short-term key; the rest is from the fuzzer.
            3 => {
                let mut content = [0; 128];
                content[..32].copy_from_slice(&KEYS.passing);
                for (byte, change) in content[32..].iter_mut().zip(piece) {
                    *byte ^= change;
                }
                let nonce = *b"WELCOME-0123456789abcdef";
                let sealed = KEYS.welcome.encrypt(&nonce.into(), &content[..]).unwrap();
                sealed_by_arbiter = true;
                frame(4, &[b"\x07WELCOME", &nonce[8..], &sealed].concat())
            }
            4 => frame(4, &counted(b"\x05READY", b"CurveZMQREADY---", count)),
            _ => frame(0, &counted(b"\x07MESSAGE", b"CurveZMQMESSAGES", count)),
        };
        // In two parts, as TCP may deliver it.
        let (first, second) = input.split_at(input.len() / 2);
        let received = client.receive(first).and_then(|()| client.receive(second));
        let output = client.take_output();
        assert!(output.len() <= 1024 + 8 * input.len());
        if let Err(cause) = received {
            let step = client.step();
            let _ = Error { step, cause }.to_string();
            return;
        }
        if client.is_ready() {
            assert!(sealed_by_arbiter);
            if client.take_answer().is_none() && client.take_pong().is_none() {
                client.request(b"request");
            } else {
                client.ping();
            }
            assert!(!client.take_output().is_empty());
        }
    }
}

fn frame(flags: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u64).to_be_bytes();
    [&[flags | 2][..], &length, body].concat()
}
