//! Lists of all kinds, paired in every way, against the obvious model.

use proptest::prelude::*;

use super::*;
use crate::descriptor::{Descriptor, Strided};
use crate::metadata::RemoteKind;
use crate::region::{RegionId, RegionSecret};

const REGION_BYTES: u64 = 64;

fn find(id: RegionId) -> Result<Target> {
    let secret = RegionSecret([id.0 as u8; 12]);
    let (_, key) = secret.derive();
    Ok(Target::Remote(Arc::new(RemoteRegion {
        secret,
        id,
        key,
        bytes: REGION_BYTES,
        kind: RemoteKind::Host,
        readable: true,
        writable: true,
        shareable: false,
    })))
}

/// Descriptors of one length in one region, or of several; few places, so that many are neighbours.
fn descriptors() -> impl Strategy<Value = Vec<Descriptor>> {
    let alike = proptest::collection::vec((Just(0_u64), 0..12_u64, Just(4_u64)), 1..40);
    let mixed = proptest::collection::vec((0..3_u64, 0..12_u64, 4..6_u64), 1..40);
    let nearly = (alike.clone(), 0..40_usize, 0..3_u64).prop_map(|(mut list, at, region)| {
        let at = at % list.len();
        list[at].0 = region;
        list
    });
    prop_oneof![alike, nearly, mixed].prop_map(|list| {
        let descriptor = |(region, place, len)| Descriptor {
            region: RegionId(region),
            offset: place * 4,
            len,
        };
        list.into_iter().map(descriptor).collect()
    })
}

/// (local region, offset, remote region, offset, length) of each extent.
type Move = (u64, u64, u64, u64, u64);

fn moves(plan: &Plan) -> Vec<Move> {
    let id = |targets: &[Target], position: u32| match &targets[position as usize] {
        Target::Remote(region) => region.id.0,
        Target::Local(region) => region.id().0,
    };
    let extent = |extent: &Extent| {
        let (local, remote) = (
            id(&plan.local, extent.local),
            id(&plan.remote, extent.remote),
        );
        (
            local,
            extent.local_offset,
            remote,
            extent.remote_offset,
            extent.len,
        )
    };
    plan.extents.iter().map(extent).collect()
}

/// What the pairs of each part come to, and where the parts end.
fn model(
    pairs: &[(Descriptor, Descriptor)],
    parts: &[u32],
    checked: bool,
) -> (Vec<Move>, Vec<usize>) {
    let (mut moves, mut ends, mut rest) = (Vec::new(), Vec::new(), pairs);
    let all = [pairs.len() as u32];
    for &count in if parts.is_empty() { &all } else { parts } {
        let mut part: Vec<Move> = Vec::new();
        let (these, others) = rest.split_at(count as usize);
        rest = others;
        for (own, other) in these {
            match part.last_mut() {
                Some(last)
                    if !checked
                        && (last.0, last.1 + last.4) == (own.region.0, own.offset)
                        && (last.2, last.3 + last.4) == (other.region.0, other.offset) =>
                {
                    last.4 += own.len;
                }
                _ => part.push((
                    own.region.0,
                    own.offset,
                    other.region.0,
                    other.offset,
                    own.len,
                )),
            }
        }
        moves.extend(part);
        ends.push(moves.len());
    }
    (moves, ends)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// All of both lists or chosen positions, in parts or not; unequal lengths are refused with their position.
    #[test]
    fn lists_are_paired_as_the_model_pairs_them(
        local in descriptors(),
        remote in descriptors(),
        chosen in proptest::option::of(proptest::collection::vec((any::<u32>(), any::<u32>()), 1..40)),
        mut parts in proptest::collection::vec(1..8_u32, 0..6),
        checked: bool,
    ) {
        let count = local.len().min(remote.len());
        let (local, remote) = (&local[..count], &remote[..count]);
        let positions: Vec<(usize, usize)> = match &chosen {
            None => (0..count).map(|n| (n, n)).collect(),
            Some(chosen) => {
                let place = |n: u32| n as usize % count;
                chosen.iter().map(|&(a, b)| (place(a), place(b))).collect()
            }
        };
        let mut left = positions.len() as u32;
        parts.retain_mut(|part| {
            *part = (*part).min(left);
            left -= *part;
            *part > 0
        });
        if let Some(last) = parts.last_mut() {
            *last += left;
        }
        let pairs: Vec<_> = positions.iter().map(|&(a, b)| (local[a], remote[b])).collect();
        let unequal = pairs.iter().position(|(own, other)| own.len != other.len);
        let own = PreparedList::build(None, local.iter().copied(), find).unwrap();
        let other = PreparedList::build(None, remote.iter().copied(), find).unwrap();
        let positions = chosen.map(|_| positions.iter().map(|&(a, b)| (a as u32, b as u32)).unzip());
        let options = PairOptions {
            positions: positions.as_ref(),
            parts: &parts,
            checked,
        };
        let paired = Plan::pair(Operation::Read, &own, &other, options);
        match (paired, unequal) {
            (Ok((plan, ends)), None) => {
                prop_assert_eq!((moves(&plan), ends), model(&pairs, &parts, checked));
                prop_assert_eq!(plan.bytes, pairs.iter().map(|pair| pair.0.len).sum::<u64>());
                prop_assert_eq!(plan.descriptors as usize, pairs.len());
                let numbered = if checked { pairs.len() } else { 0 };
                prop_assert!(plan.pairs.iter().copied().eq(0..numbered as u32));
            }
            (Err(error), Some(position)) => {
                let text = error.to_string();
                prop_assert!(text.contains(&format!("pair {position}: ")), "{}", text);
            }
            (paired, unequal) => {
                prop_assert!(false, "{:?} {:?}", paired.map(drop), unequal);
            }
        }
    }
}

/// Of both kinds of lists, and of both sides, the position that does not exist is named.
#[test]
fn a_position_that_does_not_exist_is_named() {
    let descriptor = |place: u64| Descriptor {
        region: RegionId(0),
        offset: place * 4,
        len: 4,
    };
    let list = || {
        PreparedList::build(
            None,
            (0..3).map(descriptor).collect::<Vec<_>>().into_iter(),
            find,
        )
    };
    let strided = Strided {
        region: RegionId(0),
        offset: 0,
        len: 4,
        stride: 8,
        count: 3,
    };
    let runs = || PreparedList::build_strided(None, &[strided], find);
    for (local, remote) in [
        (list(), list()),
        (list(), runs()),
        (runs(), list()),
        (runs(), runs()),
    ] {
        let (local, remote) = (local.unwrap(), remote.unwrap());
        for (positions, side) in [
            ((vec![0, 3], vec![0, 2]), "local position"),
            ((vec![0, 2], vec![0, u32::MAX]), "remote position"),
        ] {
            let options = PairOptions {
                positions: Some(&positions),
                ..PairOptions::default()
            };
            let paired = Plan::pair(Operation::Read, &local, &remote, options);
            let text = paired.err().unwrap().to_string();
            assert!(text.contains(side), "{text}");
        }
    }
}
