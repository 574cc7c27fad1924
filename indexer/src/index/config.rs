//! What an index and its sources are made with, and what applying an event did.

use kvcache_core::PodName;
use kvcache_core::prefix::IndexScheme;
use kvcache_core::shape::TokensPerBlock;

use crate::adapter::{CacheGroup, GroupRule, SourceKind};
use crate::score::TierWeights;

/// The default of [`IndexConfig::orphan_blocks_max`]: about 5 MiB a source with blocks of 64 tokens.
pub const ORPHAN_BLOCKS_MAX: usize = 16_384;

/// The most sources one index takes.
pub const SOURCES_MAX: usize = 1 << 20;

/// What an index is for.
#[derive(Clone, Debug)]
pub struct IndexConfig {
    /// How tokens become keys; everybody who shares the index names the same scheme.
    pub scheme: IndexScheme,
    /// The model's name, as far as the scheme mixes it into keys; empty where one is served only.
    pub model: String,
    /// Tokens a block.
    pub block_size: TokensPerBlock,
    /// What a block is worth by tier.
    pub weights: TierWeights,
    /// How many blocks of a source may wait for the block before them; more are refused and counted.
    pub orphan_blocks_max: usize,
}

/// A source of events, as it is registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpec {
    /// Whose caches it tells of.
    pub pod: PodName,
    /// Unique within the pod.
    pub name: String,
    /// How its events are meant.
    pub kind: SourceKind,
    /// Tokens a block of this source.
    pub block_size: u32,
}

/// What a source's events have told of it beside blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learnt {
    /// The data-parallel rank that it tells of, if any.
    pub rank: Option<u32>,
    /// The cache groups, ascending by number.
    pub groups: Vec<CacheGroup>,
    /// Tokens a block of the source; 0 while nothing was told.
    pub block_size: u32,
    /// The media that its events have named, where media have weights of their own.
    pub media: Vec<String>,
}

impl Learnt {
    /// Whether it is a source as every one was before ranks, groups and sizes were told: one chain of the index's blocks.
    #[must_use]
    pub fn is_plain(&self, block_size: u32) -> bool {
        let is_full = |group: &CacheGroup| group.rule == GroupRule::Full;
        self.rank.is_none_or(|rank| rank == 0)
            && self.groups.len() <= 1
            && self.groups.iter().all(is_full)
            && [0, block_size].contains(&self.block_size)
    }
}

/// A registered source; never given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceId(pub(super) u64);

/// What became of the blocks of one event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Entries that appeared in the index.
    pub stored: u32,
    /// Entries that left it.
    pub removed: u32,
    /// Blocks that now wait for the block before them.
    pub orphaned: u32,
    /// Blocks that would have to wait, but too many do.
    pub refused: u32,
    /// Removals of blocks of which the source has no copy.
    pub unknown: u32,
    /// Removals of blocks that were evicted before: nothing is left to remove, and nothing is wrong.
    pub evicted_before: u32,
    /// Blocks of cache groups that the index does not follow.
    pub ignored: u32,
}
