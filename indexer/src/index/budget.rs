//! A bound for what an index takes, and what goes when it is reached.
//!
//! The promise: whenever a call that changes the index has returned, [`KvIndex::bytes`] is at most the bound. Blocks and
//! runs, which are most of it, are given up before more memory is asked for; tables that grow by steps have a part of
//! the bound kept free for them, and when that is not enough, more blocks go before the call returns.
//!
//! Blocks go with all their holders, the least recently used first, and never one that another block comes after. So an
//! answer can only become shorter: never wrong, and never with a hole.

use std::collections::HashMap;

use kvcache_core::{Error, ErrorKind, Result, Tier};

use super::config::{IndexConfig, SourceId, SourceSpec};
use super::hash::KeyState;
use super::leaving::Leaving;
use super::sets::{Holder, SourceNumber};
use super::source::Source;
use super::tree::Stretch;
use super::{KvIndex, State, lock, read, write};
use crate::adapter::{SourceEvent, SourceKind};
use crate::score::TIERS;

#[cfg(test)]
mod tests;

/// The least bound: below it the first chunk of each table would leave little for blocks.
pub const BYTES_MIN: u64 = 16 << 20;

/// The part of the bound that is kept free for tables that grow by steps, and the least of it.
const RESERVE_PART: usize = 8;
const RESERVE_MIN: usize = 4 << 20;
/// The part of the bound that waiting blocks may take.
const WAITING_PART: usize = 16;
/// The most blocks that readers see go at once.
const PIECE_BLOCKS: u32 = 256;
/// So many blocks more than an event needs go with it, so that the next ones find room.
const SPARE_BLOCKS: usize = 512;
/// When memory must come back rather than be reused, at least so many blocks go before it is looked at again.
const STEP_BLOCKS: usize = 1024;
/// While the runs last, the clock moves about so often.
const TICKS: u64 = 256;
/// What a block takes at least that is a run of its own: its header, its segment's columns, its entry.
const RUN_BYTES: usize = 128 + 264 + 16;
/// What a block takes in the table of keys, when that is made for blocks that are there already.
const KEY_BYTES: usize = 12;

/// What the index takes, and what it had to give up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// As [`KvIndex::bytes`].
    pub bytes: u64,
    /// The bound; none when there is none.
    pub bytes_max: Option<u64>,
    /// Entries by tier, by `Tier as usize`.
    pub entries: [u64; TIERS],
    /// Entries that were given up so far, by tier.
    pub evicted: [u64; TIERS],
    /// Distinct blocks that were given up so far.
    pub evicted_blocks: u64,
    /// Waiting blocks that were given up so far.
    pub evicted_waiting: u64,
    /// Events that were refused because they alone exceed the bound.
    pub refused: u64,
}

/// What an index with a bound keeps count of.
pub(super) struct Budget {
    bytes_max: usize,
    /// What all sources take, as of the last change of each.
    source_bytes: usize,
    /// What waits, over all sources.
    waiting_bytes: usize,
    pub(super) by_number: HashMap<SourceNumber, SourceId, KeyState>,
    /// Events since the clock moved.
    events: u64,
    usage: Usage,
    held: Vec<(Holder, Stretch)>,
}

impl Budget {
    /// # Errors
    /// [`ErrorKind::Invalid`] when the bound is below [`BYTES_MIN`].
    fn new(bytes_max: u64) -> Result<Self> {
        Ok(Self {
            bytes_max: check(bytes_max)?,
            source_bytes: 0,
            waiting_bytes: 0,
            by_number: HashMap::default(),
            events: 0,
            usage: Usage::default(),
            held: Vec::new(),
        })
    }

    fn reserve(&self) -> usize {
        (self.bytes_max / RESERVE_PART).max(RESERVE_MIN)
    }

    /// Takes a source in that has changed.
    fn count(&mut self, source: &mut Source) {
        let bytes = source.bytes();
        self.source_bytes = self.source_bytes + bytes - source.counted;
        source.counted = bytes;
        let waiting = source.orphans.bytes();
        self.waiting_bytes = self.waiting_bytes + waiting - source.counted_waiting;
        source.counted_waiting = waiting;
    }

    pub(super) fn remove_source(&mut self, source: &Source) {
        self.source_bytes -= source.counted;
        self.waiting_bytes -= source.counted_waiting;
        self.by_number.remove(&source.number);
    }

    fn bytes(&self) -> usize {
        self.by_number.capacity() * (size_of::<(SourceNumber, SourceId)>() + 1) * 8 / 7
            + self.held.capacity() * size_of::<(Holder, Stretch)>()
    }
}

/// # Errors
/// As for [`Budget::new`].
fn check(bytes_max: u64) -> Result<usize> {
    usize::try_from(bytes_max)
        .ok()
        .filter(|_| bytes_max >= BYTES_MIN)
        .ok_or_else(|| {
            Error::invalid(
                "bytes of an index",
                bytes_max,
                BYTES_MIN..=usize::MAX as u64,
            )
        })
}

impl KvIndex {
    /// An index that never takes more than so many bytes, as [`KvIndex::bytes`] counts them: at the bound it gives up the
    /// least recently used blocks, and none before those that come after it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the bound is below [`BYTES_MIN`]; both are named.
    pub fn bounded(config: IndexConfig, bytes_max: u64) -> Result<Self> {
        Ok(Self::with_budget(config, Some(Budget::new(bytes_max)?)))
    }

    /// Changes the bound of a bounded index; what exceeds the new one is given up before this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the bound is below [`BYTES_MIN`]; [`ErrorKind::Unsupported`] when the index was made
    /// without one; [`ErrorKind::Busy`] when its sources alone take more (then the bound stays as it was).
    pub fn set_bytes_max(&self, bytes_max: u64) -> Result<()> {
        let bytes_max = check(bytes_max)?;
        let mut state = lock(&self.state);
        let Some(budget) = &mut state.budget else {
            let context = "the index was made without a bound for its bytes";
            return Err(Error::new(ErrorKind::Unsupported, context));
        };
        let before = std::mem::replace(&mut budget.bytes_max, bytes_max);
        if self.give_back(&mut state, 0) {
            return Ok(());
        }
        if let Some(budget) = &mut state.budget {
            budget.bytes_max = before;
        }
        Err(exceeded("the sources of the index", bytes_max))
    }

    /// Gives up at least so many of the least recently used blocks of a bounded index, or all there are; how many.
    ///
    /// Their memory is kept for what comes next. Without effect on an index without a bound.
    pub fn evict(&self, blocks: usize) -> usize {
        self.evict_from(&mut lock(&self.state), blocks)
    }

    /// What the index takes, and what it had to give up.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.take_out_all(&mut lock(&self.state));
        let bytes = self.bytes();
        let state = lock(&self.state);
        let budget = state.budget.as_ref();
        Usage {
            bytes,
            bytes_max: budget.map(|budget| budget.bytes_max as u64),
            entries: state.writer.entries,
            ..budget.map_or_else(Usage::default, |budget| budget.usage)
        }
    }

    /// Everything but what sources keep apart.
    pub(super) fn bytes_beside_sources(&self, state: &State) -> usize {
        let view = read(&self.view);
        state.writer.bytes()
            + view.tree.bytes()
            + view.pods.bytes()
            + state.sources.capacity() * (size_of::<(SourceId, Source)>() + 1) * 8 / 7
            + state.budget.as_ref().map_or(0, Budget::bytes)
    }

    /// The same as [`KvIndex::bytes`], without asking every source.
    fn bytes_counted(&self, state: &State) -> usize {
        let sources = state
            .budget
            .as_ref()
            .map_or(0, |budget| budget.source_bytes);
        let leaving: usize = state.leaving.iter().map(Leaving::bytes).sum();
        sources + leaving + self.bytes_beside_sources(state)
    }

    /// Makes room for an event.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when there is none without it either.
    pub(super) fn admit_event(
        &self,
        state: &mut State,
        id: SourceId,
        event: &SourceEvent,
    ) -> Result<()> {
        self.tick(state);
        let Some(budget) = &mut state.budget else {
            return Ok(());
        };
        let SourceEvent::Stored(blocks) = event else {
            return Ok(());
        };
        let Some(source) = state.sources.get_mut(&id) else {
            return Ok(());
        };
        source.orphans.is_closed = budget.waiting_bytes > budget.bytes_max / WAITING_PART;
        let doors = blocks.hashes.len() + source.orphans.len();
        self.admit(state, blocks.hashes.len(), doors)
    }

    /// Makes room for a piece of an image.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when there is none without it either.
    pub(super) fn admit_import(&self, state: &mut State, blocks: usize) -> Result<()> {
        if state.budget.is_none() {
            return Ok(());
        }
        self.tick(state);
        self.admit_keys(state)?;
        self.admit(state, blocks, blocks)
    }

    /// Lets time pass, before an event and after it: so what lookups use in between was used after the one event and before
    /// the other.
    fn tick(&self, state: &mut State) {
        let State {
            writer,
            budget: Some(budget),
            ..
        } = state
        else {
            return;
        };
        budget.events += 1;
        if budget.events > writer.tree.runs() / TICKS {
            budget.events = 0;
            writer.tree.tick(&read(&self.view).tree);
        }
    }

    /// Makes room for a source.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when the other sources alone take all.
    pub(super) fn admit_source(&self, state: &mut State, spec: &SourceSpec) -> Result<()> {
        if state.budget.is_none() {
            return Ok(());
        }
        if spec.kind == SourceKind::Node {
            self.admit_keys(state)?;
        }
        // The tables of sources and pods may double.
        let more = (state.sources.capacity() * 2 + 8) * (size_of::<(SourceId, Source)>() + 2);
        let is_full = state.sources.len() == state.sources.capacity();
        if is_full && !self.give_back(state, more) {
            return self.refuse(
                state,
                &format!("source {:?} of pod {}", spec.name, spec.pod),
            );
        }
        Ok(())
    }

    /// Makes room for the table of all keys, which the first node's source or an import needs.
    fn admit_keys(&self, state: &mut State) -> Result<()> {
        while !state.writer.tree.has_keys() {
            let positions = state.writer.tree.blocks as usize;
            if self.bytes_fit(state, positions * KEY_BYTES) {
                break;
            }
            if Self::has_gone(state) {
                self.take_out_everything(state);
                continue;
            }
            let step = (positions / 16).max(STEP_BLOCKS);
            if self.evict_from(state, step) == 0 {
                return self.refuse(state, "the table of keys");
            }
            self.trim_all(state);
        }
        Ok(())
    }

    fn bytes_fit(&self, state: &State, more: usize) -> bool {
        self.bytes_counted(state) + more <= Self::bytes_max_of(state)
    }

    fn bytes_max_of(state: &State) -> usize {
        let budget = state.budget.as_ref();
        budget.map_or(usize::MAX, |budget| budget.bytes_max)
    }

    fn admit(&self, state: &mut State, blocks: usize, doors: usize) -> Result<()> {
        let Some(reserve) = state.budget.as_ref().map(Budget::reserve) else {
            return Ok(());
        };
        // What does not fit beside nothing need not cost what is there.
        if blocks.saturating_mul(RUN_BYTES) > Self::bytes_max_of(state) {
            return self.refuse(state, &format!("an event of {blocks} blocks"));
        }
        let blocks_at_first = state.writer.tree.blocks as usize;
        let (mut evicted, mut spare) = (0, 0);
        loop {
            let growth = self.growth(state, blocks + spare, doors + spare);
            if growth == 0 || self.bytes_fit(state, growth + reserve) {
                return Ok(());
            }
            if Self::has_gone(state) {
                self.take_out_everything(state);
                continue;
            }
            spare = SPARE_BLOCKS;
            let more = self.evict_from(state, blocks + spare);
            evicted += more;
            // What is left is scattered: it has room for others, but not for all of this.
            if more == 0 || evicted > blocks_at_first / 4 {
                self.trim_all(state);
            }
            if more == 0 {
                let growth = self.growth(state, blocks, doors);
                if self.bytes_fit(state, growth) {
                    return Ok(());
                }
                return self.refuse(state, &format!("an event of {blocks} blocks"));
            }
        }
    }

    /// How much more memory so many blocks and entries into runs may take.
    fn growth(&self, state: &State, blocks: usize, doors: usize) -> usize {
        let view = read(&self.view);
        let tree = &state.writer.tree;
        let doors = if tree.has_doors(&view.tree, doors) {
            0
        } else {
            // The old table is there until all entries are in the new one.
            tree.doors_bytes(doors)
        };
        tree.growth(&view.tree, blocks) + doors
    }

    fn refuse(&self, state: &mut State, what: &str) -> Result<()> {
        match &mut state.budget {
            Some(budget) => {
                budget.usage.refused += 1;
                Err(exceeded(what, budget.bytes_max))
            }
            None => Ok(()),
        }
    }

    /// Ends a change: counts the source in, and keeps the promise.
    pub(super) fn settle(&self, state: &mut State, id: Option<SourceId>) {
        let State {
            sources,
            budget: Some(budget),
            ..
        } = state
        else {
            return;
        };
        if let Some(source) = id.and_then(|id| sources.get_mut(&id)) {
            budget.count(source);
        }
        self.tick(state);
        if !self.bytes_fit(state, 0) {
            self.give_back(state, 0);
        }
    }

    /// Gives blocks up until so many bytes more fit; false when even without any block they do not.
    fn give_back(&self, state: &mut State, more: usize) -> bool {
        if !self.bytes_fit(state, more) {
            self.take_out_everything(state);
        }
        let mut is_first = true;
        while !self.bytes_fit(state, more) {
            if !std::mem::take(&mut is_first) {
                let step = (state.writer.tree.blocks as usize / 16).max(STEP_BLOCKS);
                if self.evict_from(state, step) == 0 {
                    self.drop_waiting(state);
                    self.trim_all(state);
                    return self.bytes_fit(state, more);
                }
            }
            self.trim_all(state);
        }
        true
    }

    fn trim_all(&self, state: &mut State) {
        state.writer.tree.trim(&mut write(&self.view).tree);
    }

    fn drop_waiting(&self, state: &mut State) {
        let State {
            writer,
            sources,
            budget: Some(budget),
            ..
        } = state
        else {
            return;
        };
        for source in sources.values_mut() {
            budget.usage.evicted_waiting += source.drop_waiting(writer) as u64;
            budget.count(source);
        }
    }

    fn evict_from(&self, state: &mut State, blocks: usize) -> usize {
        // Whoever holds what goes below is a source, and what nobody holds any more goes before it.
        self.take_out_all(state);
        let State {
            writer,
            sources,
            budget: Some(budget),
            ..
        } = state
        else {
            return 0;
        };
        let view = read(&self.view);
        let mut evicted = 0;
        while evicted < blocks {
            let most = PIECE_BLOCKS.min((blocks - evicted) as u32);
            let Some(tail) = writer.tree.oldest_leaf(&view.tree, most) else {
                break;
            };
            let mut held = std::mem::take(&mut budget.held);
            writer.tree.holders(&view.tree, tail, &mut held);
            for (holder, part) in held.drain(..) {
                let lost = u64::from(part.len());
                if holder == Holder::SHARED {
                    writer.shared_blocks -= lost;
                    writer.entries[Tier::Object as usize] -= lost;
                    budget.usage.evicted[Tier::Object as usize] += lost;
                    continue;
                }
                let id = budget.by_number.get(&holder.source());
                if let Some(source) = id.and_then(|id| sources.get_mut(id)) {
                    let tier = Tier::ALL[holder.tier()];
                    source.lose(writer, &view.tree, part, tier);
                    if !tier.is_shared() {
                        budget.usage.evicted[tier as usize] += lost;
                    }
                    source.forget_stale_names(writer, &view.tree);
                    budget.count(source);
                }
            }
            budget.held = held;
            let before = writer.tree.blocks;
            writer.tree.drop_tail(&view.tree, tail);
            budget.usage.evicted_blocks += before - writer.tree.blocks;
            evicted += tail.len() as usize;
            Self::finish(writer, &view);
        }
        evicted
    }
}

fn exceeded(what: &str, bytes_max: usize) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!("{what} and nothing else would take more than the {bytes_max} bytes of the index"),
    )
}
