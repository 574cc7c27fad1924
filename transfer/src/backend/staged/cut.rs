//! A request cut into pieces of at most a chunk each.

use std::sync::Arc;

use super::super::cuda;
use super::window::CHUNK_BYTES;
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::region::RegionCore;

/// The most ranges of a piece.
const RANGES_MAX: usize = 1024;

/// Files are read past the page cache where ranges, and the memory for them, lie at multiples of this.
const PAGE_BYTES: u64 = 4096;

/// What is taken of a chunk at a time where that is not so.
const STEP_BYTES: u64 = 64;

/// A part of a plan that goes through one chunk, between one device and the other side.
pub(super) struct Piece {
    /// The device's number.
    pub(super) ordinal: u32,
    /// With the place of each in the chunk.
    pub(super) ranges: Vec<(Extent, u64)>,
}

/// Cuts a plan whose local side is memory of devices.
pub(super) struct Cut {
    plan: Arc<Plan>,
    /// The extent that comes next, and how much of it is in pieces.
    next: usize,
    done: u64,
}

impl Cut {
    pub(super) fn new(plan: &Arc<Plan>) -> Self {
        Self {
            plan: plan.clone(),
            next: 0,
            done: 0,
        }
    }
}

/// The device that an extent's local side is on.
fn ordinal(plan: &Plan, extent: &Extent) -> Option<u32> {
    local_region(plan, extent)
        .and_then(|region| cuda::memory_of(region))
        .map(|memory| memory.ordinal())
}

/// The region of an extent's local side.
pub(super) fn local_region<'a>(plan: &'a Plan, extent: &Extent) -> Option<&'a Arc<RegionCore>> {
    match &plan.local[extent.local as usize] {
        Target::Local(region) => Some(region),
        Target::Remote(_) => None,
    }
}

/// Where the next range goes: right behind one that it follows on the other side, too; else where both sides have the
/// same place within a page, if it is long, so that no page of it is copied once more.
fn place(ranges: &[(Extent, u64)], used: u64, extent: &Extent) -> u64 {
    if let Some((last, at)) = ranges.last()
        && last.remote == extent.remote
        && last.remote_offset + last.len == extent.remote_offset
    {
        return at + last.len;
    }
    if extent.len < PAGE_BYTES {
        return used.next_multiple_of(STEP_BYTES);
    }
    let phase = extent.remote_offset % PAGE_BYTES;
    let start = used / PAGE_BYTES * PAGE_BYTES + phase;
    if start < used {
        start + PAGE_BYTES
    } else {
        start
    }
}

impl Iterator for Cut {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let mut piece: Option<Piece> = None;
        let mut used = 0;
        while let Some(extent) = self.plan.extents.get(self.next) {
            let rest = Extent {
                local_offset: extent.local_offset + self.done,
                remote_offset: extent.remote_offset + self.done,
                len: extent.len - self.done,
                ..*extent
            };
            let ordinal = ordinal(&self.plan, extent)?;
            let piece = piece.get_or_insert_with(|| Piece {
                ordinal,
                ranges: Vec::new(),
            });
            let at = place(&piece.ranges, used, &rest);
            let is_full = at >= CHUNK_BYTES || piece.ranges.len() == RANGES_MAX;
            if piece.ordinal != ordinal || is_full {
                break;
            }
            let len = rest.len.min(CHUNK_BYTES - at);
            piece.ranges.push((Extent { len, ..rest }, at));
            used = at + len;
            self.done += len;
            if self.done == extent.len {
                (self.next, self.done) = (self.next + 1, 0);
            }
        }
        piece
    }
}

impl Piece {
    /// The device's leg.
    pub(super) fn of_device(&self, plan: &Plan, window: &Arc<RegionCore>, start: u64) -> Plan {
        let ranges = self.ranges.iter();
        let extents = ranges.map(|(extent, at)| Extent {
            remote: 0,
            remote_offset: start + at,
            ..*extent
        });
        let mut leg = plan.with(extents.collect(), Vec::new());
        leg.remote = Arc::from([Target::Local(window.clone())]);
        leg.ways = Arc::from([]);
        leg
    }

    /// The other side's leg: what is side by side there and in the chunk is one range.
    pub(super) fn of_other(&self, plan: &Plan, window: &Arc<RegionCore>, start: u64) -> Plan {
        let mut extents: Vec<Extent> = Vec::new();
        for (extent, at) in &self.ranges {
            let extent = Extent {
                local: 0,
                local_offset: start + at,
                ..*extent
            };
            match extents.last_mut() {
                Some(last)
                    if last.remote == extent.remote
                        && last.remote_offset + last.len == extent.remote_offset
                        && last.local_offset + last.len == extent.local_offset =>
                {
                    last.len += extent.len;
                }
                _ => extents.push(extent),
            }
        }
        let mut leg = plan.with(extents, Vec::new());
        leg.local = Arc::from([Target::Local(window.clone())]);
        leg.ways = Arc::from([]);
        leg
    }
}
