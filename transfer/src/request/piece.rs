//! The pieces in which a request is handed to its backend.

use std::sync::Arc;

use crate::plan::{Extent, Plan};

/// Bytes that a request with a rate hands over at a time.
const PACED_BYTES: u64 = 1 << 20;

/// The most pieces that a rate makes of a request: a larger one has larger pieces.
const PACED_PIECES_MAX: u64 = 4096;

/// What is handed over at once, and settled at once.
pub(super) struct Piece {
    pub(super) plan: Arc<Plan>,
    /// Which of the caller's parts it belongs to.
    pub(super) part: u32,
}

/// Cuts a plan: at the ends of the caller's parts (`ends`, in extents), and if it is `paced` into small pieces.
pub(super) fn cut(plan: &Arc<Plan>, ends: &[usize], paced: bool) -> Vec<Piece> {
    let limit = match paced {
        true => PACED_BYTES.max(plan.bytes / PACED_PIECES_MAX),
        false => u64::MAX,
    };
    if ends.len() <= 1 && plan.bytes <= limit {
        let plan = plan.clone();
        return vec![Piece { plan, part: 0 }];
    }
    let mut pieces = Vec::with_capacity(ends.len());
    let mut start = 0;
    for (part, &end) in ends.iter().enumerate() {
        let (mut gathered, mut bytes) = (Gathered::default(), 0);
        for (at, extent) in (start..end).zip(&plan.extents[start..end]) {
            let mut done = 0;
            while done < extent.len {
                let len = (extent.len - done).min(limit - bytes);
                gathered.extents.push(Extent {
                    local_offset: extent.local_offset + done,
                    remote_offset: extent.remote_offset + done,
                    len,
                    ..*extent
                });
                gathered.pairs.extend(plan.pairs.get(at));
                (done, bytes) = (done + len, bytes + len);
                if bytes == limit {
                    pieces.push(piece(plan, std::mem::take(&mut gathered), part));
                    bytes = 0;
                }
            }
        }
        if !gathered.extents.is_empty() {
            pieces.push(piece(plan, gathered, part));
        }
        start = end;
    }
    pieces
}

/// Extents, and the pairs that they are of if those are wanted.
#[derive(Default)]
struct Gathered {
    extents: Vec<Extent>,
    pairs: Vec<u32>,
}

fn piece(plan: &Plan, gathered: Gathered, part: usize) -> Piece {
    Piece {
        plan: Arc::new(plan.with(gathered.extents, gathered.pairs)),
        part: part as u32,
    }
}

#[cfg(test)]
mod tests {
    //! Plans of made-up extents, cut in every way.

    use proptest::prelude::*;

    use super::*;
    use crate::agent::RemoteRegion;
    use crate::backend::Operation;
    use crate::descriptor::Target;
    use crate::metadata::RemoteKind;
    use crate::region::{RegionId, RegionKey, RegionSecret};

    const REGIONS: u32 = 3;

    fn targets() -> Arc<[Target]> {
        let region = |id| RemoteRegion {
            secret: RegionSecret([0; 12]),
            id: RegionId(id),
            key: RegionKey([0; 16]),
            bytes: u64::MAX,
            kind: RemoteKind::Host,
            readable: true,
            writable: true,
            shareable: false,
        };
        (0..u64::from(REGIONS))
            .map(|id| Target::Remote(Arc::new(region(id))))
            .collect()
    }

    fn id(targets: &[Target], position: u32) -> u64 {
        match &targets[position as usize] {
            Target::Remote(region) => region.id.0,
            Target::Local(_) => u64::MAX,
        }
    }

    /// (region, offset) of both sides and length, with what continues the one before put together again.
    fn moves<'a>(plans: impl Iterator<Item = &'a Plan>) -> Vec<[u64; 5]> {
        let mut moves: Vec<[u64; 5]> = Vec::new();
        for plan in plans {
            for extent in &plan.extents {
                let (local, remote) = (
                    id(&plan.local, extent.local),
                    id(&plan.remote, extent.remote),
                );
                let (own, other, len) = (extent.local_offset, extent.remote_offset, extent.len);
                match moves.last_mut() {
                    Some(last)
                        if last[..2] == [local, remote]
                            && [last[2] + last[4], last[3] + last[4]] == [own, other] =>
                    {
                        last[4] += len;
                    }
                    _ => moves.push([local, remote, own, other, len]),
                }
            }
        }
        moves
    }

    fn extent() -> impl Strategy<Value = Extent> {
        let place = (0..REGIONS, 0..1_u64 << 40);
        (place.clone(), place, 1..4 * PACED_BYTES).prop_map(
            |((local, local_offset), (remote, remote_offset), len)| Extent {
                local,
                remote,
                local_offset,
                remote_offset,
                len,
            },
        )
    }

    proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

            /// Nothing is lost, moved twice, or put into another part, and no piece is larger than the rate wants.
            #[test]
            fn the_pieces_are_the_plan(
                extents in proptest::collection::vec(extent(), 1..40),
                marks in proptest::collection::btree_set(1..40_usize, 0..6),
                paced: bool,
            ) {
                let count = extents.len();
                let mut ends: Vec<usize> = marks.into_iter().filter(|&end| end < count).collect();
                ends.push(count);
                let plan = Plan {
                    local: targets(),
                    remote: targets(),
                    bytes: extents.iter().map(|extent| extent.len).sum(),
                    operation: Operation::Read,
                    descriptors: count as u32,
                    extents,
                    ..Plan::empty()
                };
                let plan = Arc::new(plan);
                let pieces = cut(&plan, &ends, paced);
                prop_assert_eq!(
                    moves(pieces.iter().map(|piece| &*piece.plan)),
                    moves(std::iter::once(&*plan))
                );
                let mut start = 0;
                for (part, &end) in ends.iter().enumerate() {
                    let wanted: u64 = plan.extents[start..end].iter().map(|extent| extent.len).sum();
                    let of_part = pieces.iter().filter(|piece| piece.part == part as u32);
                    prop_assert_eq!(of_part.map(|piece| piece.plan.bytes).sum::<u64>(), wanted);
                    start = end;
                }
                for piece in &pieces {
                    prop_assert!(!paced || piece.plan.bytes <= PACED_BYTES);
    // A piece names no region that it does not need, unless it is the plan itself.
                    let whole = Arc::ptr_eq(&piece.plan, &plan);
                    prop_assert!(whole || piece.plan.remote.len() <= piece.plan.extents.len());
                }
            }
        }
}
