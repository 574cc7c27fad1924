use proptest::prelude::*;

use super::super::appointment::TICKET_BYTES;
use super::*;

fn question() -> Question {
    Question {
        name: "a".to_owned(),
        wanted: Incarnation(9),
        connect: VerbsConnect::RdmaCm,
        offers: vec![offer(17), offer(18)],
    }
}

fn offer(pair: u32) -> Offer {
    Offer {
        end: End {
            pair,
            first: 0x00ff_ffff,
            lid: 3,
            gid: [7; 16],
        },
        is_ethernet: true,
        mtu: 3,
        reads_served: 16,
        appointment: None,
    }
}

fn body(message: &[u8]) -> &[u8] {
    whole(message).unwrap().unwrap()
}

/// Question and answers, there and back, with every cut in between taken for unfinished.
#[test]
fn greetings_survive_the_way() {
    let asked = question();
    let bytes = asked.encode();
    for cut in 0..bytes.len() {
        assert_eq!(whole(&bytes[..cut]).unwrap(), None);
    }
    assert_eq!(Question::decode(body(&bytes)).unwrap(), asked);
    let told = Offer {
        appointment: Some(Appointment {
            at: "[fd00::7]:9".parse().unwrap(),
            ticket: [8; TICKET_BYTES],
        }),
        ..offer(4)
    };
    let taken = vec![(1, offer(3)), (7, told)];
    let answer = encode_answer(&Ok(taken.clone()));
    assert_eq!(decode_answer(body(&answer)).unwrap(), taken);
    // Each offer at most once, in order, and one at least.
    for wrong in [
        vec![],
        vec![(1, offer(3)), (1, offer(4))],
        vec![(8, offer(3))],
    ] {
        let answer = encode_answer(&Ok(wrong.clone()));
        assert!(decode_answer(body(&answer)).is_err(), "{wrong:?}");
    }
    let refused = Error::new(ErrorKind::Denied, "not on the list");
    let error = decode_answer(body(&encode_answer(&Err(refused)))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("not on the list"), "{error}");
}

/// Another protocol, another version, a number that no device has, a message longer than any.
#[test]
fn strangers_are_refused_with_the_reason() {
    let bytes = question().encode();
    let changed = |at: usize, to: u8| {
        let mut bytes = bytes.clone();
        bytes[2 + at] = to;
        Question::decode(body(&bytes)).unwrap_err()
    };
    assert_eq!(changed(0, b'X').kind(), ErrorKind::Corrupt);
    assert_eq!(changed(4, 9).kind(), ErrorKind::Version);
    let connect = 4 + 2 + 8 + 3;
    assert!(changed(connect, 2).to_string().contains("way to connect"));
    let rails = connect + 1;
    assert!(changed(rails, 0).to_string().contains("rails"));
    assert!(changed(rails, 9).to_string().contains("rails"));
    let pair = rails + 1;
    assert!(changed(pair + 3, 1).to_string().contains("queue pair"));
    let link = pair + 4 + 4 + 2 + 16;
    assert!(changed(link, 2).to_string().contains("link"));
    assert!(changed(link + 1, 0).to_string().contains("mtu"));
    assert!(changed(link + 3, 2).to_string().contains("appointment"));
    assert!(whole(&[0xff, 0xff, 0]).is_err());
}

proptest! {
    /// What others send is refused or understood, never believed beyond its end.
    #[test]
    fn no_bytes_break_the_decoders(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = whole(&bytes);
        let _ = Question::decode(&bytes);
        let _ = decode_answer(&bytes);
    }

    /// A question that is cut off or changed in one place.
    #[test]
    fn damaged_questions_are_refused_or_read(at in 0_usize..90, to in any::<u8>(), cut in any::<bool>()) {
        let message = question().encode();
        let mut bytes = body(&message).to_vec();
        let at = at.min(bytes.len() - 1);
        if cut {
            bytes.truncate(at);
            prop_assert!(Question::decode(&bytes).is_err());
        } else {
            bytes[at] = to;
            let _ = Question::decode(&bytes);
        }
    }
}

/// One key of four bytes for each rail, and nothing more.
#[test]
fn keys_come_one_for_each_rail() {
    let bytes = [1, 0, 0, 0, 0, 0, 0, 2];
    assert_eq!(decode_keys(&bytes, 2).unwrap(), [1, 2 << 24]);
    for (bytes, rails) in [(&bytes[..], 1), (&bytes[..], 3), (&bytes[..7], 2), (&[], 1)] {
        let error = decode_keys(bytes, rails).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}
