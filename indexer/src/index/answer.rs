//! What a lookup answers: pods by name, with scores, in an order that is the same everywhere.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use kvcache_core::{IndexKey, PodName, Tier};

use super::View;
use super::compose::PartDepth;
use super::config::IndexConfig;
use super::lookup::{Depth, Depths, Torn, Wanted};
use super::pods::PodNumber;
use crate::score::{PodWeights, TIERS};

/// What to leave out of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// At most so many pods, deepest first; 0 means all.
    pub pods_max: usize,
    /// Only these pods, unknown ones being ignored; empty means all.
    pub pods: &'a [PodName],
}

/// What a pod holds of the prefix that was asked about.
#[derive(Clone, Debug, PartialEq)]
pub struct PodDepth {
    /// Who.
    pub pod: PodName,
    /// Blocks, from the first, that the pod holds without a hole in tiers that it reaches by itself; at least 1,
    /// unless some are only expected.
    pub depth: u32,
    /// For how many of those each tier is the pod's fastest, by `Tier as usize`; they add up to `depth`.
    pub by_tier: [u32; TIERS],
    /// Σ weight × `by_tier`.
    pub score: f64,
    /// What the pod's blocks are worth where its media have weights of their own; none: what their tiers are.
    pub weights: Option<Arc<PodWeights>>,
    /// What the depth is made of, where the pod has data-parallel ranks (it is then the deepest rank's), several cache
    /// groups or blocks larger than the index's; empty otherwise.
    pub parts: Vec<PartDepth>,
    /// Blocks, from the first, that the pod holds or is expected to hold; 0 when none is expected beyond `depth`.
    pub expected_depth: u32,
    /// The pod publishes nothing: all of this is only what routing decisions make likely.
    pub is_approximate: bool,
}

/// What a pool holds of the prefix that was asked about: answered once, however many pods may use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolDepth {
    /// Which.
    pub pool: PodName,
    /// Blocks, from the first, without a hole.
    pub depth: u32,
    /// Which blocks, by position, holes or not: ascending, apart from each other; never empty.
    pub held: Vec<Range<u32>>,
    /// For how many of those each tier is the fastest, by `Tier as usize`.
    pub by_tier: [u32; TIERS],
}

impl PoolDepth {
    /// None when it holds nothing.
    fn new(pool: &PodName, tiers: &[Option<Tier>]) -> Option<Self> {
        let mut found = Self {
            pool: pool.clone(),
            depth: tiers.iter().take_while(|tier| tier.is_some()).count() as u32,
            held: Vec::new(),
            by_tier: [0; TIERS],
        };
        for (block, tier) in (0..).zip(tiers) {
            let Some(tier) = tier else {
                continue;
            };
            found.by_tier[*tier as usize] += 1;
            match found.held.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => found.held.push(block..block + 1),
            }
        }
        (!found.held.is_empty()).then_some(found)
    }
}

/// The answer to a lookup; used again it keeps its memory, so that lookups do not allocate.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Pods that hold at least the first block, deepest first, ties by name.
    pub pods: Vec<PodDepth>,
    /// Blocks, from the first, that shared tiers hold: answered once, as every pod reaches them.
    pub shared_depth: u32,
    /// Which blocks, by position, shared tiers hold, holes or not: ascending, apart from each other.
    pub shared: Vec<Range<u32>>,
    /// Pools that hold anything of the prefix, by name.
    pub pools: Vec<PoolDepth>,
    depths: Depths,
    ranks: Vec<Rank>,
    parts: HashMap<u32, Vec<PartDepth>>,
}

impl Answer {
    /// The same with names and scores, in an order that is the same everywhere.
    ///
    /// # Errors
    /// [`Torn`] as for [`Depths::fill`].
    pub(super) fn fill(
        &mut self,
        view: &View,
        keys: &[IndexKey],
        query: &Query<'_>,
        config: &IndexConfig,
    ) -> Result<(), Torn> {
        let weights = &config.weights;
        let depths = &mut self.depths;
        let named = query.pods.iter().filter_map(|pod| view.pods.number(pod));
        depths.allow(named.map(PodNumber));
        let is_limited = !query.pods.is_empty();
        let wanted = Wanted {
            pods: query.pods_max,
            is_limited,
        };
        depths.fill(view, keys, wanted)?;
        self.parts.clear();
        let block_size = config.block_size.get();
        depths.compose(view, keys, block_size, is_limited, &mut self.parts)?;
        self.shared_depth = depths.shared_depth;
        self.shared.clone_from(&depths.shared);
        self.pools.clear();
        for (pool, tiers) in &depths.pools {
            let name = view.pods.name(*pool);
            self.pools
                .extend(name.and_then(|name| PoolDepth::new(name, tiers)));
        }
        self.pools.sort_by(|one, other| one.pool.cmp(&other.pool));
        // They are ascending by depth: of all but so many nothing need be known but that others are deeper.
        let found = &depths.pods;
        let most = if query.pods_max == 0 {
            found.len()
        } else {
            query.pods_max.min(found.len())
        };
        let least = most
            .checked_sub(1)
            .map_or(0, |last| found[found.len() - 1 - last].depth);
        let first = found.partition_point(|depth| depth.depth < least);
        self.ranks.clear();
        self.ranks.extend((first..found.len()).map(|place| Rank {
            depth: std::cmp::Reverse(found[place].depth),
            order: view.pods.order(found[place].pod.0),
            place,
        }));
        self.ranks.sort_unstable();
        self.pods.clear();
        for rank in &self.ranks[..most.min(self.ranks.len())] {
            let Depth {
                pod,
                depth,
                by_tier,
            } = found[rank.place];
            if let Some(name) = view.pods.name(pod.0) {
                let own = view.pods.weights.get(&pod.0);
                let weights = own.map_or(weights, |own| own.weights());
                let score = weights.score(&by_tier);
                self.pods.push(PodDepth {
                    pod: name.clone(),
                    depth,
                    by_tier,
                    score,
                    weights: own.cloned(),
                    parts: self.parts.remove(&pod.0).unwrap_or_default(),
                    expected_depth: 0,
                    is_approximate: false,
                });
            }
        }
        Ok(())
    }
}

/// Where a found pod comes in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    depth: std::cmp::Reverse<u32>,
    order: u64,
    place: usize,
}
