//! What a source takes away: single copies, a tier, everything.

use std::collections::HashMap;

use kvcache_core::{EngineHash, IndexKey, Tier};

use super::super::config::Applied;
use super::super::groups::{Apart, Seat};
use super::super::hash::KeyState;
use super::super::orphans::{Copies, Orphans};
use super::super::sets::Holder;
use super::super::tree::{Place, Shared, Stretch};
use super::{Source, Writer, shrink};
use crate::adapter::{RemovedBlocks, SourceKind};

impl Source {
    /// Takes a copy of each block away.
    pub(in crate::index) fn remove(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &RemovedBlocks,
    ) -> Applied {
        let seat = match self.is_node() {
            true => Seat::Main,
            false => self.groups.seat(blocks.group),
        };
        let ignored = Applied {
            ignored: blocks.hashes.len() as u32,
            ..Applied::default()
        };
        match seat {
            Seat::Nowhere if !self.groups.known().is_empty() => return ignored,
            // Nothing of theirs was taken in.
            Seat::Apart(_) if self.fine.is_some() => return ignored,
            _ => {}
        }
        if let Some(mut fine) = self.fine.take() {
            let applied = self.remove_fine(writer, shared, blocks, &mut fine);
            self.fine = Some(fine);
            return applied;
        }
        match seat {
            Seat::Apart(group) => self.remove_apart(writer, shared, blocks, Apart::Group(group)),
            Seat::Main if self.stride > 1 => {
                self.remove_apart(writer, shared, blocks, Apart::Large(self.stride))
            }
            // Of a source whose stored blocks name no group, a removal's means nothing.
            Seat::Main | Seat::Nowhere => {
                self.remove_named(writer, shared, &blocks.hashes, blocks.tier)
            }
        }
    }

    fn remove_apart(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &RemovedBlocks,
        apart: Apart,
    ) -> Applied {
        let names = blocks.hashes.iter().map(|hash| apart.name(*hash));
        let names: Vec<EngineHash> = names.collect();
        self.remove_named(writer, shared, &names, blocks.tier)
    }

    fn remove_named(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        hashes: &[EngineHash],
        tier: Tier,
    ) -> Applied {
        let mut applied = Applied::default();
        writer.tree.touch_names(hashes);
        writer
            .tree
            .touch_keys(hashes.iter().map(|hash| IndexKey(hash.0)));
        let mut stretch: Option<(Stretch, usize)> = None;
        let mut last: Option<Place> = None;
        for (position, &hash) in hashes.iter().enumerate() {
            let guess = last.and_then(|last| self.beside(writer, shared, last, hash));
            let found = guess.or_else(|| self.find(writer, shared, hash));
            last = found;
            if let (Some((stretch, _)), Some(place)) = (&mut stretch, found)
                && self.more.is_empty()
                && stretch.extend(place)
            {
                continue;
            }
            if let Some((stretch, from)) = stretch.take() {
                let taken = &hashes[from..position];
                self.take(writer, shared, stretch, tier, taken, &mut applied);
            }
            match found {
                Some(place) => stretch = Some((Stretch::of(place), position)),
                None => self.take_orphan(hash, tier, &mut applied),
            }
        }
        if let Some((stretch, from)) = stretch {
            let taken = &hashes[from..];
            self.take(writer, shared, stretch, tier, taken, &mut applied);
        }
        applied
    }

    /// The neighbour with this name: blocks are mostly removed one after the other.
    fn beside(
        &self,
        writer: &Writer,
        shared: &Shared,
        place: Place,
        hash: EngineHash,
    ) -> Option<Place> {
        if !self.names.is_empty() {
            return None;
        }
        [false, true].into_iter().find_map(|is_after| {
            let beside = writer.tree.beside(shared, place, is_after)?;
            let is_it = if self.is_node() {
                writer.tree.key(shared, beside.position).0 == hash.0
            } else {
                writer.tree.name(beside.position) == Some(hash)
            };
            is_it.then_some(beside)
        })
    }

    /// Takes a copy of the blocks that these hashes name.
    pub(super) fn take(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        tier: Tier,
        hashes: &[EngineHash],
        applied: &mut Applied,
    ) {
        if tier.is_shared() {
            self.take_shared(writer, shared, blocks, hashes, applied);
            return;
        }
        if !self.more.is_empty() && blocks.len() == 1 {
            let place = writer.tree.block(shared, blocks.run, blocks.start);
            let copy = (place.position, tier as u8);
            if let Some(more) = self.more.get_mut(&copy) {
                *more -= 1;
                if *more == 0 {
                    self.more.remove(&copy);
                }
                return;
            }
        }
        writer.unchanged.clear();
        let holder = Holder::new(self.number, tier);
        self.leave_roots(writer, shared, blocks, holder);
        let removed = writer
            .tree
            .remove(shared, blocks, holder, &mut writer.unchanged);
        self.count_out(blocks.run, removed);
        self.entries -= u64::from(removed);
        writer.entries[tier as usize] -= u64::from(removed);
        applied.removed += removed;
        if removed < blocks.len() {
            // It does not hold some of them there; a hash may still wait under this name.
            let unknown = blocks.len() - removed;
            if self.orphans.is_empty() {
                applied.unknown += unknown;
            } else {
                let is_waiting = |hash: &&EngineHash| self.orphans.contains(**hash);
                let waiting: Vec<EngineHash> = hashes.iter().filter(is_waiting).copied().collect();
                applied.unknown += unknown - (waiting.len() as u32).min(unknown);
                for hash in waiting {
                    self.take_orphan(hash, tier, applied);
                }
            }
        }
        if !self.names.is_empty() {
            self.forget_names(writer, shared, hashes);
        }
    }

    /// Whoever deletes from a shared tier says so, not only who stored.
    fn take_shared(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        hashes: &[EngineHash],
        applied: &mut Applied,
    ) {
        if self.is_node() {
            writer.share(shared, blocks, false, applied);
            return;
        }
        for &hash in hashes {
            let Some(place) = self.find_held(writer, shared, hash) else {
                self.take_orphan(hash, Tier::Object, applied);
                continue;
            };
            let claim = Holder::new(self.number, Tier::Object);
            self.leave_roots(writer, shared, Stretch::of(place), claim);
            writer.unchanged.clear();
            // The claim last: it keeps the block's place known until then.
            writer.share(shared, Stretch::of(place), false, applied);
            if !writer.tree.holds_in(shared, place, claim) {
                continue;
            }
            let taken =
                writer
                    .tree
                    .remove(shared, Stretch::of(place), claim, &mut writer.unchanged);
            self.count_out(place.run, taken);
            if !self.names.is_empty() {
                self.forget_names(writer, shared, &[hash]);
            }
        }
    }

    pub(super) fn count_out(&mut self, run: u32, removed: u32) {
        if removed == 0 {
            return;
        }
        if let Some(count) = self.runs.get_mut(&run) {
            *count -= removed;
            if *count == 0 {
                self.runs.remove(&run);
                shrink(&mut self.runs);
            }
        }
    }

    pub(super) fn take_orphan(&mut self, hash: EngineHash, tier: Tier, applied: &mut Applied) {
        let Some(copies) = self.orphans.copies_mut(hash) else {
            // Deleting from a shared tier what a node has not stored itself is no mistake.
            if !(self.is_node() && tier.is_shared()) {
                applied.unknown += 1;
            }
            return;
        };
        match copies[tier as usize].checked_sub(1) {
            None => applied.unknown += 1,
            Some(left) => {
                copies[tier as usize] = left;
                if *copies == Copies::default() {
                    self.orphans.forget(hash);
                }
            }
        }
    }

    /// Forgets own names of blocks that the source holds no more.
    pub(super) fn forget_names(&mut self, writer: &Writer, shared: &Shared, hashes: &[EngineHash]) {
        for hash in hashes {
            if let Some(&(position, key)) = self.names.get(hash) {
                let tree = &writer.tree;
                let is_held = tree.key(shared, position) == key
                    && tree
                        .place_if_there(position)
                        .is_some_and(|place| tree.holds(shared, place, self.number));
                if !is_held {
                    self.names.remove(hash);
                }
            }
        }
        shrink(&mut self.names);
    }

    /// Gives back the roots of blocks that are about to lose this holder and have no other of the source.
    fn leave_roots(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
    ) {
        if self.roots.is_empty() {
            return;
        }
        for block in blocks.start..blocks.end {
            let place = writer.tree.block(shared, blocks.run, block);
            let others = Tier::ALL
                .into_iter()
                .map(|tier| Holder::new(self.number, tier))
                .filter(|other| *other != holder);
            let is_last = !others
                .into_iter()
                .any(|other| writer.tree.holds_in(shared, place, other));
            if is_last && let Some(root) = self.roots.remove(&place.position) {
                writer.roots.release(root);
            }
        }
    }

    /// Empties the tiers that a clear of this kind of source empties.
    pub(in crate::index) fn clear(&mut self, writer: &mut Writer, shared: &Shared) {
        // vLLM resets its accelerator's cache only; SGLang its host's cache with it.
        let tiers: &[Tier] = match self.spec.kind {
            SourceKind::Node => return self.forget(writer, shared, false),
            SourceKind::Sglang => &[Tier::Device, Tier::Host, Tier::Disk],
            _ => &[Tier::Device],
        };
        self.empty(writer, shared, tiers, false);
        self.orphans.clear(tiers);
        if let Some(mut fine) = self.fine.take() {
            self.clear_fine(writer, shared, tiers, &mut fine);
            self.fine = Some(fine);
        }
    }

    /// Forgets everything; what the source put in shared tiers stays. With `is_hidden` lookups skip the source already, so
    /// that they need not wait until all is done.
    pub(in crate::index) fn forget(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        is_hidden: bool,
    ) {
        self.empty(writer, shared, &Tier::ALL, is_hidden);
        assert!(
            self.runs.is_empty() && self.entries == 0,
            "a source that is gone holds blocks"
        );
        for root in std::mem::take(&mut self.roots).into_values() {
            writer.roots.release(root);
        }
        self.forget_fine(writer);
        self.names = HashMap::with_hasher(KeyState::random());
        self.runs.shrink_to_fit();
        self.orphans = Orphans::new(self.orphans.blocks_max());
        self.groups.reset(writer.keys.block_size.get());
        (self.newest, self.is_sized) = (None, false);
        self.media.clear();
        self.evicted.set(0);
    }

    /// Takes a run's blocks from a source that lookups skip; how many entries those were.
    pub(in crate::index) fn leave_run(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        run: u32,
    ) -> u32 {
        let entries = self.empty_run(writer, shared, run, &Tier::ALL);
        writer.finish(shared);
        entries
    }

    fn empty_run(&mut self, writer: &mut Writer, shared: &Shared, run: u32, tiers: &[Tier]) -> u32 {
        let mut entries = 0;
        for &tier in tiers {
            let holder = Holder::new(self.number, tier);
            let Some(blocks) = writer.tree.held_stretch(shared, run, holder) else {
                continue;
            };
            self.leave_roots(writer, shared, blocks, holder);
            writer.unchanged.clear();
            let removed = writer
                .tree
                .bury(shared, blocks, holder, &mut writer.unchanged);
            self.count_out(run, removed);
            entries += removed;
            if !tier.is_shared() {
                self.entries -= u64::from(removed);
                writer.entries[tier as usize] -= u64::from(removed);
            }
        }
        entries
    }

    fn empty(&mut self, writer: &mut Writer, shared: &Shared, tiers: &[Tier], is_hidden: bool) {
        let runs: Vec<u32> = self.runs.keys().copied().collect();
        for run in runs {
            self.empty_run(writer, shared, run, tiers);
            if is_hidden {
                writer.finish(shared);
            }
        }
        self.more
            .retain(|(_, tier), _| tiers.iter().all(|emptied| *emptied as u8 != *tier));
        self.more.shrink_to_fit();
        if !self.names.is_empty() {
            let hashes: Vec<EngineHash> = self.names.keys().copied().collect();
            self.forget_names(writer, shared, &hashes);
        }
    }
}
