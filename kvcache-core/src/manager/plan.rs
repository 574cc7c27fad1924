//! How far a fetch is, block by block.

use std::collections::BTreeSet;
use std::ops::Range;

use super::command::CommandId;
use super::job::Source;
use super::request::{BlockSource, FetchRequest, PeerHint};
use crate::id::{PeerId, Time};
use crate::key::{BlockInfo, Checksum};

/// A fetch under way.
#[derive(Debug)]
pub(super) struct FetchOperation {
    pub(super) blocks: Vec<BlockInfo>,
    pub(super) steps: Vec<FetchStep>,
    /// Our own tiers that failed to supply a block, by position.
    pub(super) barred: Vec<Barred>,
    /// The peers that may still help, and how deep.
    pub(super) holders: Vec<PeerHint>,
    /// What the object store is said to hold, by position.
    pub(super) shared: Vec<Range<u32>>,
    /// Positions from here on are misses.
    pub(super) cut: u32,
    /// Positions that need a source.
    pub(super) unplanned: BTreeSet<u32>,
    /// Positions before the cut that are not done.
    pub(super) open: u32,
    /// Positions being copied, also behind the cut: their slots are not the engine's yet.
    pub(super) moving: u32,
    /// Engine slots that failed copies may still write to.
    pub(super) unsettled: BTreeSet<u32>,
    /// The commands with its copies.
    pub(super) copies: BTreeSet<CommandId>,
    pub(super) copy_deadline: Time,
}

/// How far one block of a fetch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FetchStep {
    Unplanned,
    /// It is being written into DRAM.
    WaitsForSeal,
    /// A peer was asked for it.
    Asked(CommandId),
    Moving,
    Done(BlockSource),
    Missed,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Barred {
    pub(super) host: bool,
    pub(super) disk: bool,
    pub(super) object: bool,
}

/// What the next attempt for a block is.
pub(super) enum Plan {
    Copy(Source, Option<Checksum>),
    Wait,
    Ask(PeerId),
    Miss,
}

impl FetchOperation {
    pub(super) fn new(request: FetchRequest, copy_deadline: Time) -> Self {
        let count = request.blocks.len();
        Self {
            steps: vec![FetchStep::Unplanned; count],
            barred: vec![Barred::default(); count],
            holders: request.holders,
            shared: request.shared,
            cut: count as u32,
            unplanned: (0..count as u32).collect(),
            open: count as u32,
            moving: 0,
            unsettled: BTreeSet::new(),
            copies: BTreeSet::new(),
            copy_deadline,
            blocks: request.blocks,
        }
    }

    /// Whether nothing is left to wait for.
    pub(super) fn is_done(&self) -> bool {
        self.open == 0 && self.moving == 0
    }

    pub(super) fn set_step(&mut self, position: u32, step: FetchStep) {
        self.steps[position as usize] = step;
    }

    /// The position needs a source again, unless it is of no use any more.
    pub(super) fn reopen(&mut self, position: u32) {
        if position < self.cut {
            self.set_step(position, FetchStep::Unplanned);
            self.unplanned.insert(position);
        } else {
            self.set_step(position, FetchStep::Missed);
        }
    }

    /// Everything from this position on is a miss.
    pub(super) fn cut_at(&mut self, position: u32) {
        for position in position..self.cut {
            match self.steps[position as usize] {
                FetchStep::Done(_) => continue,
                FetchStep::Moving => {}
                FetchStep::Unplanned | FetchStep::WaitsForSeal | FetchStep::Asked(_) => {
                    self.unplanned.remove(&position);
                    self.set_step(position, FetchStep::Missed);
                }
                FetchStep::Missed => {}
            }
            self.open -= 1;
        }
        self.cut = self.cut.min(position);
    }

    /// The peer does not help from this position on.
    pub(super) fn limit_holder(&mut self, peer: PeerId, depth: u32) {
        for holder in self.holders.iter_mut().filter(|holder| holder.peer == peer) {
            holder.depth = holder.depth.min(depth);
        }
    }

    /// Whether the object store is said to hold this position.
    pub(super) fn is_shared(&self, position: u32) -> bool {
        let before = self.shared.partition_point(|range| range.end <= position);
        self.shared
            .get(before)
            .is_some_and(|range| range.contains(&position))
    }

    /// The deepest holder that may have this position; the first among equals.
    pub(super) fn holder_of(&self, position: u32) -> Option<PeerId> {
        let mut best: Option<&PeerHint> = None;
        for holder in self.holders.iter().filter(|holder| holder.depth > position) {
            if best.is_none_or(|best| holder.depth > best.depth) {
                best = Some(holder);
            }
        }
        best.map(|holder| holder.peer)
    }

    /// What the engine is told: verified sources up to the first block without one.
    pub(super) fn sources(&self) -> Vec<BlockSource> {
        let mut sources = vec![BlockSource::Miss; self.steps.len()];
        for (source, step) in sources.iter_mut().zip(&self.steps[..self.cut as usize]) {
            let FetchStep::Done(found) = step else { break };
            *source = *found;
        }
        sources
    }
}
