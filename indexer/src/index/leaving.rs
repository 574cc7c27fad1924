//! Sources that go: lookups skip them at once, what they held is taken out little by little.
//!
//! A removal must not keep events waiting for as long as a pod's hundreds of thousands of blocks take. So it only marks
//! the source, and every event that comes later takes some of its runs out. Until then they cost memory, and nothing else:
//! holders that lookups skip. Names of blocks that nobody holds any more stay longer, until they are a quarter of all or no
//! events come; then they are swept out, table by table. An index with a bound takes all of that out before it gives up
//! anything that is held.

use kvcache_core::PodName;

use super::source::{Source, Writer};
use super::tree::Shared;
use super::{KvIndex, SourceId, State, lock, read, write};
use crate::adapter::SourceKind;
use crate::sync::TURN_BLOCKS;

/// The most sources that leave at a time; with one more the oldest is taken out in one go.
const LEAVING_MAX: usize = 64;

/// Blocks that are taken out under one lock while no events come.
const TIDY_BLOCKS: u32 = 16 * TURN_BLOCKS;

/// Tables of names that are swept with an event, and under one lock while no events come.
const SWEPT_TABLES: usize = 1;
const TIDY_TABLES: usize = 32;

/// A source that is gone for everybody outside.
pub(super) struct Leaving {
    source: Source,
    /// Runs that it still has entries in.
    runs: Vec<u32>,
}

impl Leaving {
    fn new(source: Source) -> Self {
        let runs = source.runs().collect();
        Self { source, runs }
    }

    pub(super) fn entries(&self) -> u64 {
        self.source.entries
    }

    pub(super) fn bytes(&self) -> usize {
        self.source.bytes() + self.runs.capacity() * size_of::<u32>()
    }

    /// Takes out runs with about so many blocks; false when none is left.
    fn take_out(&mut self, writer: &mut Writer, shared: &Shared, blocks: u32) -> bool {
        let mut taken = 0;
        while taken < blocks {
            let Some(run) = self.runs.pop() else {
                return false;
            };
            taken += self.source.leave_run(writer, shared, run);
        }
        true
    }
}

impl KvIndex {
    /// Removes a source with its entries; lookups stop seeing them at once.
    ///
    /// What it put in shared tiers stays. The memory comes back with later events, or with [`Self::tidy`].
    pub fn remove_source(&self, id: SourceId) {
        let mut state = lock(&self.state);
        let Some(mut source) = state.sources.remove(&id) else {
            return;
        };
        source.forget_fine(&mut state.writer);
        if let Some(of_pod) = state.by_pod.get_mut(&source.spec.pod) {
            of_pod.retain(|other| *other != id);
            if of_pod.is_empty() {
                state.by_pod.remove(&source.spec.pod);
            }
        }
        let pod = source.spec.pod.clone();
        write(&self.view).pods.leaving.insert(source.number);
        self.expected.forget(&pod);
        self.compose_pod(&state, &pod);
        if let Some(budget) = &mut state.budget {
            budget.remove_source(&source);
        }
        state.leaving.push_back(Leaving::new(source));
        if state.leaving.len() > LEAVING_MAX {
            self.take_out(&mut state, u32::MAX);
        }
        self.settle(&mut state, None);
    }

    /// Removes all sources of a pod.
    pub fn remove_pod(&self, pod: &PodName) {
        let of_pod = lock(&self.state).by_pod.get(pod).cloned();
        for id in of_pod.unwrap_or_default() {
            self.remove_source(id);
        }
    }

    /// Takes out what sources that are gone held, and gives back what imports needed and any memory that nothing is in; to
    /// be called when all imports are done, and when no events come.
    ///
    /// Names of what they held, as long as they are less than a quarter of all, stay with the memory of their blocks.
    pub fn tidy(&self) {
        let mut state = lock(&self.state);
        self.tidy_all(&mut state);
    }

    fn tidy_all(&self, state: &mut State) {
        self.take_out_all(state);
        while state.writer.tree.is_sweep_due() {
            self.sweep(state, usize::MAX);
        }
        self.forget_keys(state);
        self.trim(&mut state.writer);
        self.settle(state, None);
    }

    /// As [`Self::tidy`], and gives back those names too, and what tables have for growing: for an index that hardly
    /// anything will be added to. [`Self::tidy_some`] comes to the same in time.
    pub fn compact(&self) {
        let mut state = lock(&self.state);
        self.take_out_everything(&mut state);
        state.writer.tree.tighten();
        self.tidy_all(&mut state);
    }

    /// Takes out some of what sources that are gone held, and with the last of it gives back the memory that nothing is in,
    /// which events do too; then, with more calls, the memory that tables have for growing and do not use. True if there is
    /// more to do now. For when no events come.
    pub fn tidy_some(&self) -> bool {
        let mut state = lock(&self.state);
        if state.leaving.is_empty() && state.writer.tree.has_buried() {
            self.sweep(&mut state, TIDY_TABLES);
            self.settle(&mut state, None);
            return true;
        }
        if state.leaving.is_empty() {
            let has_more = state.writer.tree.tighten_some();
            self.settle(&mut state, None);
            return has_more;
        }
        self.take_out(&mut state, TIDY_BLOCKS);
        let has_more = !state.leaving.is_empty() || state.writer.tree.has_buried();
        if !has_more {
            self.trim(&mut state.writer);
        }
        self.settle(&mut state, None);
        has_more
    }

    /// Takes out some of what sources that are gone held, or of the names that it had.
    pub(super) fn take_out_some(&self, state: &mut State) {
        if !state.leaving.is_empty() {
            self.take_out(state, TURN_BLOCKS);
        } else if state.writer.tree.is_swept() {
            self.sweep(state, SWEPT_TABLES);
        }
    }

    /// Sweeps names out of so many tables that lead nowhere, and gives back the memory of which nothing is left.
    fn sweep(&self, state: &mut State, tables: usize) {
        if !state.writer.tree.sweep_some(tables) {
            self.trim(&mut state.writer);
        }
    }

    /// Begins to sweep names out when enough of them lead nowhere; when most do, that is done at once.
    pub(super) fn begin_sweep(&self, state: &mut State) {
        let tree = &state.writer.tree;
        if tree.is_sweep_due() && !tree.is_swept() {
            let tables = if tree.are_most_buried() {
                usize::MAX
            } else {
                SWEPT_TABLES
            };
            self.sweep(state, tables);
        }
    }

    /// Takes out whatever nobody holds.
    pub(super) fn take_out_everything(&self, state: &mut State) {
        self.take_out_all(state);
        while state.writer.tree.has_buried() {
            self.sweep(state, usize::MAX);
        }
    }

    /// Whether [`Self::take_out_everything`] has anything to do.
    pub(super) fn has_gone(state: &State) -> bool {
        !state.leaving.is_empty() || state.writer.tree.has_buried()
    }

    pub(super) fn take_out_all(&self, state: &mut State) {
        while !state.leaving.is_empty() {
            self.take_out(state, u32::MAX);
        }
    }

    /// Takes out blocks of the source that left first, which is forgotten when it has no more.
    fn take_out(&self, state: &mut State, blocks: u32) {
        let State {
            writer, leaving, ..
        } = &mut *state;
        let Some(first) = leaving.front_mut() else {
            return;
        };
        let view = read(&self.view);
        let is_more = first.take_out(writer, &view.tree, blocks);
        if !is_more {
            first.source.forget(writer, &view.tree, true);
        }
        Self::finish(writer, &view);
        drop(view);
        if is_more {
            return;
        }
        if let Some(gone) = leaving.pop_front() {
            let number = gone.source.number;
            let mut view = write(&self.view);
            view.pods.leaving.remove(&number);
            view.pods.remove(number);
        }
        self.forget_keys(state);
        self.begin_sweep(state);
        self.trim(&mut state.writer);
    }

    /// Forgets where keys are when nobody speaks keys any more.
    fn forget_keys(&self, state: &mut State) {
        let mut sources = state.sources.values();
        if !sources.any(|source| source.spec.kind == SourceKind::Node) {
            state.writer.tree.forget_keys();
        }
    }
}
