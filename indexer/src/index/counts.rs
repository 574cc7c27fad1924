//! How much there is.

use kvcache_core::PodName;

use super::config::SourceId;
use super::leaving::Leaving;
use super::source::{Evicted, Source};
use super::{KvIndex, lock};

impl KvIndex {
    /// Entries: blocks by source and tier, and those in shared tiers.
    #[must_use]
    pub fn entries(&self) -> u64 {
        let state = lock(&self.state);
        let leaving: u64 = state.leaving.iter().map(Leaving::entries).sum();
        let all: u64 = state.writer.entries.iter().sum();
        all - leaving
    }

    /// Distinct blocks that somebody holds. What sources that are gone held is taken out first, however much it is.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        let mut state = lock(&self.state);
        self.take_out_all(&mut state);
        state.writer.tree.blocks
    }

    /// Entries of a pod's sources; 0 for a pod that has none.
    #[must_use]
    pub fn pod_entries(&self, pod: &PodName) -> u64 {
        let state = lock(&self.state);
        let of_pod = state.by_pod.get(pod).map_or(&[][..], Vec::as_slice);
        of_pod
            .iter()
            .filter_map(|id| state.sources.get(id))
            .map(|source| source.entries)
            .sum()
    }

    /// Blocks of a source that wait for the block before them; 0 when the source is gone.
    #[must_use]
    pub fn orphans(&self, id: SourceId) -> u64 {
        let state = lock(&self.state);
        state
            .sources
            .get(&id)
            .map_or(0, |source| source.orphans.len() as u64)
    }

    /// What was given up of a source for lack of room, as it stands whenever it is read; of a source that is gone: nothing.
    #[must_use]
    pub fn evicted(&self, id: SourceId) -> Evicted {
        let state = lock(&self.state);
        let source = state.sources.get(&id);
        source.map_or_else(Evicted::default, |source| source.evicted.clone())
    }

    /// About how many bytes the index takes: tables by their capacity, what waits by its content.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let state = lock(&self.state);
        let leaving = state.leaving.iter().map(Leaving::bytes);
        let sources = state.sources.values().map(Source::bytes).chain(leaving);
        let sources: usize = sources.sum();
        (sources + self.bytes_beside_sources(&state)) as u64
    }
}
