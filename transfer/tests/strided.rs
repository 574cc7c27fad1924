//! Lists of ranges at equal steps, against the same ranges written out.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    DESCRIPTORS_MAX, Descriptor, Operation, RegionOptions, RequestOptions, Side, Strided,
};
use proptest::prelude::*;

use support::{Pair, WAIT, Way, contents, pattern};

const BYTES: u64 = 64 << 10;

fn expand(strided: &[Strided]) -> Vec<Descriptor> {
    let ranges = |entry: &Strided| {
        let entry = *entry;
        (0..u64::from(entry.count)).map(move |n| Descriptor {
            region: entry.region,
            offset: entry.offset + n * entry.stride,
            len: entry.len,
        })
    };
    strided.iter().flat_map(ranges).collect()
}

/// Entries of one length whose ranges lie in the region.
fn entries() -> impl Strategy<Value = (u64, Vec<(u64, u64, u32)>)> {
    (1..700_u64).prop_flat_map(|len| {
        let entry = (0..2000_u64, 1..40_u32).prop_flat_map(move |(stride, count)| {
            let way = stride * u64::from(count - 1) + len;
            let count = if way > BYTES { 1 } else { count };
            let room = BYTES - len - stride * u64::from(count - 1);
            (0..=room).prop_map(move |offset| (offset, stride, count))
        });
        (Just(len), proptest::collection::vec(entry, 1..12))
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 128,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// The remote side strided, the local one packed; then the other way round, and then by chosen positions, out of
    /// order and repeated.
    #[test]
    fn strided_lists_move_what_the_same_descriptors_written_out_move(
        (len, entries) in entries(),
        chosen in proptest::collection::vec(any::<prop::sample::Index>(), 0..50),
        seed in any::<u64>(),
    ) {
        let pair = Pair::new(Way::Memcpy, BYTES);
        let count: u32 = entries.iter().map(|entry| entry.2).sum();
        let packed = pair
            .initiator
            .register(
                kvfabric_transfer::HostMemory::anonymous(u64::from(count) * len).unwrap(),
                RegionOptions::default(),
            )
            .unwrap();
        let strided: Vec<_> = entries
            .iter()
            .map(|&(offset, stride, count)| Strided {
                region: pair.remote.id(), offset, len, stride, count,
            })
            .collect();
        let in_row = Strided { region: packed.id(), offset: 0, len, stride: len, count };
        let side = Side::Peer(&pair.peer);
        let compressed = pair.initiator.prepare_strided(side, &strided).unwrap();
        let listed = pair.initiator.prepare(side, &expand(&strided)).unwrap();
        prop_assert_eq!((compressed.len(), compressed.bytes()), (listed.len(), listed.bytes()));
        let own = pair.initiator.prepare_strided(Side::Local, &[in_row]).unwrap();
        pair.remote.write_at(0, &pattern(BYTES as usize, seed)).unwrap();

        let positions: Vec<u32> =
            chosen.iter().map(|index| index.index(count as usize) as u32).collect();
        let firsts: Vec<u32> = (0..positions.len().min(count as usize) as u32).collect();
        let positions = positions[..firsts.len()].to_vec();
        for positions in [None, Some((firsts, positions))] {
            let mut found = Vec::new();
            for remote in [&compressed, &listed] {
                packed.fill_at(0, packed.bytes(), 0xee).unwrap();
                let options =
                    RequestOptions { positions: positions.clone(), ..RequestOptions::default() };
                let read =
                    pair.initiator.request(Operation::Read, &own, remote, options).unwrap();
                read.post().unwrap();
                read.wait(WAIT).unwrap();
                found.push(contents(&packed));
            }
            prop_assert!(found[0] == found[1]);
        }
        // Ranges that overlap are written in order by a copy within the process, so this is one answer too.
        packed.write_at(0, &pattern(packed.bytes() as usize, !seed)).unwrap();
        let mut found = Vec::new();
        for remote in [&compressed, &listed] {
            pair.remote.fill_at(0, BYTES, 0).unwrap();
            let options = RequestOptions::default();
            let write = pair.initiator.request(Operation::Write, &own, remote, options).unwrap();
            write.post().unwrap();
            write.wait(WAIT).unwrap();
            found.push(contents(&pair.remote));
        }
        prop_assert!(found[0] == found[1]);
    }
}

/// What can't be: no ranges, no bytes, too many ranges, steps out of the region or round the end of numbers.
#[test]
fn bad_entries_are_refused_with_their_position() {
    let pair = Pair::new(Way::Memcpy, BYTES);
    let good = Strided {
        region: pair.local.id(),
        offset: 0,
        len: 1024,
        stride: 1024,
        count: 64,
    };
    let whole = pair.initiator.prepare_strided(Side::Local, &[good]);
    assert_eq!(whole.unwrap().bytes(), BYTES);
    let many = DESCRIPTORS_MAX as u32;
    for bad in [
        Strided { count: 0, ..good },
        Strided { len: 0, ..good },
        Strided { offset: 1, ..good },
        Strided {
            stride: 1025,
            ..good
        },
        Strided { count: 65, ..good },
        Strided {
            stride: u64::MAX / 2,
            ..good
        },
        Strided {
            offset: u64::MAX,
            ..good
        },
        Strided {
            stride: 0,
            count: many,
            ..good
        },
    ] {
        let error = pair
            .initiator
            .prepare_strided(Side::Local, &[good, bad])
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
        assert!(error.to_string().contains("descriptor 1"), "{error}");
    }
    let most = Strided {
        stride: 0,
        count: many,
        ..good
    };
    let list = pair.initiator.prepare_strided(Side::Local, &[most]);
    assert_eq!(list.unwrap().len(), DESCRIPTORS_MAX);
    let strange = Strided {
        region: pair.remote.id(),
        ..good
    };
    let error = pair
        .initiator
        .prepare_strided(Side::Local, &[strange])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// A position past the end of a strided list, as of any other.
#[test]
fn a_position_outside_a_strided_list_is_refused() {
    let pair = Pair::new(Way::Memcpy, BYTES);
    let entry = |region: &kvfabric_transfer::Region| Strided {
        region: region.id(),
        offset: 0,
        len: 64,
        stride: 128,
        count: 10,
    };
    let own = pair
        .initiator
        .prepare_strided(Side::Local, &[entry(&pair.local)])
        .unwrap();
    let other = pair
        .initiator
        .prepare_strided(
            Side::Peer(&pair.peer),
            &[entry(&pair.remote), entry(&pair.remote)],
        )
        .unwrap();
    for (position, accepted) in [(19, true), (20, false), (u32::MAX, false)] {
        let options = RequestOptions {
            positions: Some((vec![9], vec![position])),
            ..RequestOptions::default()
        };
        let made = pair
            .initiator
            .request(Operation::Read, &own, &other, options);
        assert_eq!(made.is_ok(), accepted, "{position}");
        if let Err(error) = made {
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}
