use std::collections::VecDeque;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::backend::verbs::controls::Fragment;

fn message(id: u64, bytes: usize) -> Message {
    let bytes = Bytes::from(vec![id as u8; bytes]);
    Message::Notify { id, bytes }
}

/// Hears a fragment; the number of the message that it was the last one of.
fn hear(listener: &mut Speech, fragment: &[u8]) -> Option<u64> {
    let Fragment::Part { is_last, bytes } = Fragment::decode(fragment).unwrap() else {
        panic!("a fragment of no message");
    };
    match listener.hear(is_last, bytes).unwrap() {
        Some(Message::Notify { id, .. }) => Some(id),
        Some(_) => panic!("another message"),
        None => None,
    }
}

/// What the other side says it has heard must lie between what is known to have arrived and what was said.
#[test]
fn nobody_has_heard_what_was_not_said() {
    for (heard, is_possible) in [
        (0, false),
        (1, true),
        (3, true),
        (4, false),
        (u64::MAX, false),
    ] {
        let mut speech = Speech {
            over: Some(0),
            ..Speech::default()
        };
        (0..3).for_each(|id| speech.put(&message(id, 10)).unwrap());
        while speech.begin().is_some() {}
        speech.arrived(0);
        // Another rail's.
        speech.arrived(1);
        speech.lose(1);
        assert!(speech.resume(1, 77).is_ok());
        speech.lose(0);
        assert!(!speech.wants_to_go_on());
        assert_eq!(speech.resume(0, heard).is_ok(), is_possible, "{heard}");
    }
}

/// A step of one who speaks, of the rail, or of one who listens.
#[derive(Clone, Copy, Debug)]
enum Step {
    Put(usize),
    Begin,
    Deliver,
    Acknowledge,
    /// What is under way on the rail is gone, and so are acknowledgements.
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0_usize..9000).prop_map(Step::Put),
        Just(Step::Begin),
        Just(Step::Begin),
        Just(Step::Deliver),
        Just(Step::Deliver),
        Just(Step::Acknowledge),
        Just(Step::Lose),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Rails are lost again and again, with fragments and acknowledgements under way: each message is heard once, in order.
    #[test]
    fn what_is_said_is_heard_once_and_in_order(steps in steps()) {
        let (mut speech, mut listener) = (Speech::default(), Speech::default());
        let (mut rail, mut acknowledged, mut said, mut heard) = (VecDeque::new(), 0, 0, Vec::new());
        let mut over = 0;
        speech.over = Some(over);
        // At the end all that is left is said.
        let rest = [Step::Lose, Step::Begin, Step::Deliver].into_iter().cycle().take(3000).skip(1);
        for step in steps.into_iter().chain(rest) {
            match step {
                Step::Put(bytes) => {
                    speech.put(&message(said, bytes)).unwrap();
                    said += 1;
                }
                Step::Begin => rail.extend(speech.begin().map(<[u8]>::to_vec)),
                Step::Deliver => {
                    if let Some(fragment) = rail.pop_front() {
                        heard.extend(hear(&mut listener, &fragment));
                        acknowledged += 1;
                    }
                }
                Step::Acknowledge => {
                    (0..std::mem::take(&mut acknowledged)).for_each(|_| speech.arrived(over));
                }
                Step::Lose => {
                    rail.clear();
                    acknowledged = 0;
                    speech.lose(over);
                    speech.resume(over, listener.heard).unwrap();
                    over += 1;
                    speech.over = Some(over);
                }
            }
        }
        prop_assert_eq!(heard, (0..said).collect::<Vec<u64>>());
    }
}
