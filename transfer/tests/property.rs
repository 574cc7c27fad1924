//! Random lists of descriptors against the obvious model: a vector that is copied piece by piece.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use kvfabric_transfer::{Operation, RequestOptions, Side};
use proptest::prelude::*;

use support::{Pair, WAIT, WAYS, contents, pattern};

const BYTES: u64 = 96 << 10;

/// Disjoint ranges of the destination in random order, each with a random place in the source.
fn pieces() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
    let lengths = proptest::collection::vec((1..6000_u64, 0..300_u64, any::<u64>()), 1..60);
    (lengths, any::<bool>()).prop_perturb(|(lengths, adjacent), mut random| {
        let mut pieces = Vec::new();
        let mut at = 0;
        for (len, gap, place) in lengths {
            if at + len > BYTES {
                break;
            }
            let source = if adjacent {
                at
            } else {
                place % (BYTES - len + 1)
            };
            pieces.push((source, at, len));
            at += len + if adjacent { 0 } else { gap };
        }
        if !adjacent {
            for position in (1..pieces.len()).rev() {
                pieces.swap(position, random.random_range(0..=position));
            }
        }
        pieces
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Exactly the bytes that the model copies change, in the place where the model changes them.
    #[test]
    fn any_list_of_descriptors_copies_what_the_model_copies(
        pieces in pieces(),
        seed in any::<u64>(),
        read in any::<bool>(),
    ) {
        for way in WAYS {
            let pair = Pair::new(way, BYTES);
            let (source, target) =
                if read { (&pair.remote, &pair.local) } else { (&pair.local, &pair.remote) };
            let from = pattern(BYTES as usize, seed);
            let mut model = pattern(BYTES as usize, !seed);
            source.write_at(0, &from).unwrap();
            target.write_at(0, &model).unwrap();
            let mut pairs = Vec::new();
            for &(place, at, len) in &pieces {
                let range = at as usize..(at + len) as usize;
                model[range].copy_from_slice(&from[place as usize..(place + len) as usize]);
                let (local, remote) = if read { (at, place) } else { (place, at) };
                pairs.push((pair.local.descriptor(local, len), pair.remote.descriptor(remote, len)));
            }
            let operation = if read { Operation::Read } else { Operation::Write };
            let side = Side::Peer(&pair.peer);
            let request =
                pair.initiator.transfer(operation, &pairs, side, RequestOptions::default()).unwrap();
            request.wait(WAIT).unwrap();
            prop_assert!(contents(target) == model, "{:?}", way);
            prop_assert!(contents(source) == from, "{:?}", way);
        }
    }
}
