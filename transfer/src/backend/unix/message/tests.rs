//! Every message survives its encoding; nothing that arrives can panic.

use proptest::prelude::*;

use super::*;
use crate::sys::cuda::Form;

fn messages() -> Vec<Message> {
    vec![
        Message::Hello {
            name: "peer".into(),
            wanted: Incarnation(7),
        },
        Message::Map {
            id: 1,
            region: RegionId(2),
            key: RegionKey([3; 16]),
        },
        Message::Unmapped {
            region: RegionId(4),
        },
        Message::Notify {
            id: 5,
            bytes: Bytes::from_static(b"done"),
        },
        Message::Done {
            id: 6,
            outcome: Outcome::Done,
        },
        Message::Done {
            id: 7,
            outcome: Outcome::Granted {
                bytes: 8,
                writable: true,
            },
        },
        Message::Done {
            id: 8,
            outcome: Outcome::Located {
                address: 9,
                bytes: 10,
                writable: false,
            },
        },
        Message::Done {
            id: 0,
            outcome: Outcome::Welcome {
                nonce_at: 11,
                nonce: [12; NONCE_BYTES],
            },
        },
        Message::Done {
            id: 9,
            outcome: Outcome::of(Err(Error::new(ErrorKind::Denied, "no"))),
        },
        Message::Revoke {
            region: RegionId(10),
        },
        Message::Piece {
            id: 13,
            region: RegionId(14),
            key: RegionKey([15; 16]),
            number: 16,
        },
        device(None),
        device(Some(Form::Allocation {
            name: [17; 64],
            bytes: 18,
        })),
        device(Some(Form::Pieces {
            count: 19,
            bytes: 20,
        })),
    ]
}

fn device(form: Option<Form>) -> Message {
    let offer = |form| Offer {
        device: [21; 16],
        offset: 22,
        form,
    };
    let outcome = Outcome::Device {
        bytes: 23,
        writable: true,
        offer: form.map(offer),
    };
    Message::Done { id: 24, outcome }
}

/// Those that only go over a network.
fn over_a_network() -> Vec<Message> {
    vec![
        Message::Sums {
            id: 13,
            region: RegionId(14),
            key: RegionKey([15; 16]),
            ranges: vec![(0, 16), (u64::MAX, 17)],
        },
        Message::Done {
            id: 13,
            outcome: Outcome::Summed {
                sums: vec![18, u32::MAX],
            },
        },
        Message::Done {
            id: 14,
            outcome: Outcome::Keyed {
                address: 19,
                bytes: 20,
                writable: true,
                key: vec![21; 22],
            },
        },
    ]
}

/// Encoded, decoded and encoded again: the same bytes. Every shorter or longer text is refused.
#[test]
fn a_message_is_read_as_it_was_written() {
    for message in messages().into_iter().chain(over_a_network()) {
        let bytes = message.encode();
        assert!(bytes.len() <= MESSAGE_BYTES_MAX);
        assert_eq!(Message::decode(&bytes).unwrap().encode(), bytes);
        // A notification's bytes are the rest, whatever their number.
        if !matches!(message, Message::Notify { .. }) {
            for len in 0..bytes.len() {
                assert_eq!(
                    Message::decode(&bytes[..len]).unwrap_err().kind(),
                    ErrorKind::Corrupt
                );
            }
            let longer = [&bytes[..], &[0]].concat();
            assert_eq!(
                Message::decode(&longer).unwrap_err().kind(),
                ErrorKind::Corrupt
            );
        }
    }
}

/// The version is refused by number.
#[test]
fn a_greeting_of_another_version_is_refused_with_both_named() {
    let mut bytes = messages()[0].encode();
    bytes[5..7].copy_from_slice(&55_u16.to_le_bytes());
    let error = Message::decode(&bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Version);
    assert!(error.to_string().contains("55"), "{error}");
    assert!(error.to_string().contains(&VERSION.to_string()), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Random bytes behind each kind are decoded or refused.
    #[test]
    fn random_bytes_never_panic(
        kind in any::<u8>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = Message::decode(&[&[kind % 9], &bytes[..]].concat());
    }
}
