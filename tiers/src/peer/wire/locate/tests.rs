//! Both directions of each message, and every field as it must not be.

use super::*;

fn reach() -> Reach {
    let holder = |name: &str, depth, address: Option<&str>| Holder {
        pod: PodName::new(name).unwrap(),
        depth,
        peer_address: address.map(str::to_owned),
    };
    Reach {
        own: HeldDepth {
            depth: 5,
            host: 2,
            disk: 3,
            expected: 7,
        },
        depth: 9,
        located: Located {
            holders: vec![holder("a:1", 8, Some("10.0.0.1:7")), holder("b", 6, None)],
            shared: vec![0..2, 2..3, 8..9],
        },
    }
}

/// With and without holders and ranges.
#[test]
fn an_answer_of_our_own_is_accepted() {
    for reach in [reach(), Reach::default()] {
        let message = locate_response(&reach);
        assert_eq!(check_locate_response(message).unwrap(), reach);
    }
}

/// A node that does not say what is on its way there.
#[test]
fn what_is_not_told_is_not_expected() {
    let mut message = locate_response(&reach());
    message.own_expected = 0;
    assert_eq!(check_locate_response(message).unwrap().own.expected, 5);
}

/// More than a message may carry: the first of them are sent, and accepted.
#[test]
fn an_answer_is_cut_to_what_is_accepted() {
    let mut long = reach();
    let holder = long.located.holders[0].clone();
    long.located.holders = vec![holder; HOLDERS_MAX + 1];
    long.located.shared = (0..=RANGES_MAX as u32)
        .map(|at| at * 2..at * 2 + 1)
        .collect();
    let read = check_locate_response(locate_response(&long)).unwrap();
    assert_eq!(read.located.holders.len(), HOLDERS_MAX);
    assert_eq!(read.located.shared[..], long.located.shared[..RANGES_MAX]);
}

/// One field at a time; the message names it.
#[test]
fn answers_that_cannot_be_are_refused_by_name() {
    let refuse = |text: &str, lie: fn(&mut v1::LocateResponse)| {
        let mut message = locate_response(&reach());
        lie(&mut message);
        let error = check_locate_response(message).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(text), "{error}");
    };
    refuse("own_depth is 6", |m| m.own_depth = 6);
    refuse("own_depth is 5", |m| m.own_host = u32::MAX);
    refuse("depth is 4", |m| m.depth = 4);
    refuse("holder 1", |m| m.holders[1].pod = "a b".to_owned());
    refuse("holder 0", |m| {
        m.holders[0].peer_address = "x/y".to_owned();
    });
    refuse("holders is 1025", |m| {
        m.holders = vec![m.holders[0].clone(); HOLDERS_MAX + 1];
    });
    refuse("shared ranges is 32769", |m| {
        m.shared = vec![m.shared[0]; RANGES_MAX + 1];
    });
    refuse("shared range 0", |m| m.shared[0].end = 0);
    refuse("shared range 2", |m| m.shared[2].start = 2);
    refuse("shared range 1", |m| m.shared.swap(0, 1));
}

/// Nothing, too much, no time; and more time than there may be, which is cut.
#[test]
fn questions_are_bounded() {
    let ask = |bytes: usize, deadline_ms: u32| {
        check_locate(v1::LocateRequest {
            names: vec![1; bytes].into(),
            deadline_ms,
        })
    };
    for (bytes, deadline_ms, text) in [
        (0, 1, "bytes of names is 0"),
        (NAMES_BYTES_MAX + 1, 1, "bytes of names is 4194305"),
        (1, 0, "deadline_ms is 0"),
    ] {
        let error = ask(bytes, deadline_ms).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(text), "{error}");
    }
    let longest = ask(NAMES_BYTES_MAX, u32::MAX).unwrap();
    assert_eq!(longest.deadline, LOCATE_DEADLINE_MAX);
    let question = LocateQuestion {
        names: Bytes::from_static(b"x"),
        deadline: Duration::from_micros(10),
    };
    assert_eq!(locate_request(&question).deadline_ms, 1, "never no time");
}

/// For this model, for another, and for something that is no identity.
#[test]
fn a_pin_of_another_model_is_refused() {
    let request = unpin_request(PinId(9), &[7; 32]);
    assert_eq!(check_unpin(&request, &[7; 32]).unwrap(), PinId(9));
    let error = check_unpin(&request, &[8; 32]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.context().contains("0707"), "{error}");
    let short = v1::UnpinRequest {
        model_identity: Bytes::from_static(&[7; 31]),
        ..request
    };
    let error = check_unpin(&short, &[7; 32]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}
