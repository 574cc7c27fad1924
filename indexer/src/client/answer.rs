//! What the index answers.

use std::ops::Range;
use std::time::Duration;

use kvcache_core::{PodName, Result, Tier};
use kvfabric_proto::v1;

use crate::wire::{self, CacheGroup, SourcePosition};

/// What one pod holds of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PodDepth {
    /// Which pod.
    pub pod: PodName,
    /// Blocks from the first, without a hole, in tiers it reaches by itself.
    pub depth: u32,
    /// For how many of those each tier is the fastest, in the order of [`kvcache_core::Tier::ALL`]; they add up to
    /// `depth`.
    pub by_tier: [u32; 4],
    /// Sum of weight × `by_tier`, with the index's weights.
    pub score: f64,
    /// Where its peer service listens, if it has one.
    pub peer_address: Option<String>,
    /// How `score` comes about, fastest tier first: blocks and what each is worth. Empty unless asked for.
    pub terms: Vec<ScoreTerm>,
    /// What `depth` is made of, when the pod has data-parallel ranks, several cache groups or larger blocks.
    pub parts: Vec<PartDepth>,
    /// Blocks, from the first, that the pod holds or is expected to hold; 0 when none is expected beyond `depth`.
    pub expected_depth: u32,
    /// The pod publishes nothing: all of this is only what routing decisions make likely.
    pub is_approximate: bool,
}

/// A data-parallel rank of a pod, or a pod without ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct PartDepth {
    /// The rank, if there are any.
    pub rank: Option<u32>,
    /// Blocks, from the first, that the rules of all cache groups allow.
    pub depth: u32,
    /// For how many of those each tier is the fastest; they add up to `depth`.
    pub by_tier: [u32; 4],
    /// Sum of weight × `by_tier`.
    pub score: f64,
    /// What each cache group by itself would allow. Empty unless asked for.
    pub groups: Vec<(CacheGroup, u32)>,
}

/// Blocks × weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreTerm {
    /// Where the blocks are.
    pub tier: Tier,
    /// How many.
    pub blocks: u32,
    /// What one is worth there.
    pub weight: f64,
    /// The medium whose weight it is; none when it is the tier's own.
    pub medium: Option<String>,
}

/// How much the position of a source is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    /// How long the newest live batch took from its publisher's timestamp until it was applied.
    pub lag: Duration,
    /// How long ago the publisher was last heard of; what it did since is unknown.
    pub heard: Option<Duration>,
    /// Whether the publisher is connected.
    pub is_connected: bool,
    /// Connected, and all that is known to have been published is applied.
    pub is_current: bool,
    /// Entries of the source that the index gave up for lack of room and that the source has not withdrawn since, as far as
    /// is known: while it is not 0, the pod may hold more than is answered.
    pub evicted: u64,
}

impl Freshness {
    fn from_wire(wire: &v1::SourceFreshness) -> Self {
        Self {
            lag: Duration::from_micros(wire.lag_us),
            heard: wire.heard_us.map(Duration::from_micros),
            is_connected: wire.connected,
            is_current: wire.current,
            evicted: wire.evicted,
        }
    }
}

/// What a pool holds that some pods share; never part of a pod's depth or score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolDepth {
    /// Which.
    pub pool: PodName,
    /// Blocks, from the first, without a hole.
    pub depth: u32,
    /// Which blocks, by position, holes or not: ascending, apart from each other.
    pub held: Vec<Range<u32>>,
    /// For how many of those each tier is the fastest.
    pub by_tier: [u32; 4],
    /// The pods known now that may use it, of those that were asked about if any were named.
    pub pods: Vec<PodName>,
    /// Where its peer service listens, if it has one.
    pub peer_address: Option<String>,
}

/// The index's answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LookupAnswer {
    /// Deepest first; ties by pod name.
    pub pods: Vec<PodDepth>,
    /// How many of the first blocks shared tiers hold.
    pub shared_depth: u32,
    /// Which blocks, by position, shared tiers hold, holes or not: ascending, apart from each other.
    pub shared: Vec<Range<u32>>,
    /// Full blocks in the prompt.
    pub blocks: u32,
    /// Tokens a block in the index.
    pub block_size: u32,
    /// How far every source of the answered pods is applied.
    pub positions: Vec<SourcePosition>,
    /// One for each of `positions`, in their order.
    pub freshness: Vec<Freshness>,
    /// Pools that hold anything of the prompt, each once, however many pods may use it.
    pub pools: Vec<PoolDepth>,
}

impl LookupAnswer {
    pub(super) fn from_wire(wire: v1::LookupResponse) -> Result<Self> {
        let pods = wire
            .pods
            .into_iter()
            .map(pod_from_wire)
            .collect::<Result<_>>()?;
        Ok(Self {
            pods,
            pools: wire
                .pools
                .into_iter()
                .map(pool_from_wire)
                .collect::<Result<_>>()?,
            shared_depth: wire.shared_depth,
            shared: ranges_from_wire(&wire.shared),
            blocks: wire.blocks,
            block_size: wire.block_size,
            positions: wire
                .positions
                .into_iter()
                .map(SourcePosition::from_wire)
                .collect(),
            freshness: wire.freshness.iter().map(Freshness::from_wire).collect(),
        })
    }
}

fn ranges_from_wire(ranges: &[v1::BlockRange]) -> Vec<Range<u32>> {
    let ranges = ranges.iter().map(|range| range.start..range.end);
    ranges.collect()
}

fn pool_from_wire(wire: v1::PoolDepth) -> Result<PoolDepth> {
    Ok(PoolDepth {
        pool: PodName::new(&wire.pool)?,
        depth: wire.depth,
        held: ranges_from_wire(&wire.held),
        by_tier: tiers_from_wire(&wire.by_tier)?,
        pods: wire
            .pods
            .iter()
            .map(|pod| PodName::new(pod))
            .collect::<Result<_>>()?,
        peer_address: Some(wire.peer_address).filter(|address| !address.is_empty()),
    })
}

fn tiers_from_wire(told: &[v1::TierDepth]) -> Result<[u32; 4]> {
    let mut by_tier = [0; 4];
    for depth in told {
        by_tier[wire::tier_from_wire(depth.tier)? as usize] = depth.blocks;
    }
    Ok(by_tier)
}

fn pod_from_wire(wire: v1::PodDepth) -> Result<PodDepth> {
    let by_tier = tiers_from_wire(&wire.by_tier)?;
    let parts = wire.parts.iter().map(|part| {
        let groups = part.groups.iter().filter_map(|found| {
            let group = found.group.as_ref()?;
            Some(wire::group_from_wire(group).map(|group| (group, found.depth)))
        });
        Ok(PartDepth {
            rank: part.data_parallel_rank,
            depth: part.depth,
            by_tier: tiers_from_wire(&part.by_tier)?,
            score: part.score,
            groups: groups.collect::<Result<_>>()?,
        })
    });
    Ok(PodDepth {
        parts: parts.collect::<Result<_>>()?,
        expected_depth: wire.expected_depth,
        is_approximate: wire.approximate,
        pod: PodName::new(&wire.pod)?,
        depth: wire.depth,
        by_tier,
        score: wire.score,
        peer_address: Some(wire.peer_address).filter(|address| !address.is_empty()),
        terms: wire
            .terms
            .iter()
            .map(|term| {
                Ok(ScoreTerm {
                    tier: wire::tier_from_wire(term.tier)?,
                    blocks: term.blocks,
                    weight: term.weight,
                    medium: Some(term.medium.clone()).filter(|medium| !medium.is_empty()),
                })
            })
            .collect::<Result<_>>()?,
    })
}
