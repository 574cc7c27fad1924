//! Answers as messages.

use std::ops::Range;

use kvcache_core::Tier;
use kvfabric_proto::{Encoded, v1};

use super::fields::Fields;
use super::positions::Positions;
use crate::index::{Answer, GroupDepth, PartDepth, PodDepth};
use crate::score::{PodWeights, TIERS, TierWeights};
use crate::wire::{CacheGroup, group_to_wire, tier_to_wire};

/// An answer, and what belongs to it beside what the index knows.
pub(super) struct Told<'a> {
    pub(super) answer: &'a Answer,
    pub(super) positions: &'a Positions,
    pub(super) pools: Vec<v1::PoolDepth>,
    /// What blocks are worth where their pod has no weights of its own.
    pub(super) weights: &'a TierWeights,
    /// Full blocks in the prompt.
    pub(super) blocks: u32,
    pub(super) block_size: u32,
    /// Whether to say how scores come about.
    pub(super) explain: bool,
}

impl Told<'_> {
    /// The `LookupResponse`, its fields by the numbers that `index.proto` gives them, in their order.
    pub(super) fn encode(&self, fields: &mut Fields) -> Encoded {
        fields.clear();
        for (found, address) in self.answer.pods.iter().zip(self.positions.addresses()) {
            fields.nested(1, |pod| self.write_pod(found, address, pod));
        }
        fields.uint(2, self.answer.shared_depth.into());
        fields.uint(3, self.blocks.into());
        fields.uint(4, self.block_size.into());
        fields.append(self.positions.positions());
        for range in &self.answer.shared {
            fields.message(6, &range_to_wire(range));
        }
        fields.append(self.positions.freshness());
        for pool in &self.pools {
            fields.message(8, pool);
        }
        Encoded::new(fields.to_bytes())
    }

    /// A `PodDepth`.
    fn write_pod(&self, found: &PodDepth, address: &str, pod: &mut Fields) {
        pod.text(1, found.pod.as_str());
        pod.uint(2, found.depth.into());
        for tier in tiers(&found.by_tier) {
            pod.message(3, &tier);
        }
        pod.double(4, found.score);
        pod.text(5, address);
        if self.explain {
            for term in self.terms(found) {
                pod.message(6, &term);
            }
        }
        for part in &found.parts {
            pod.message(7, &self.part_to_wire(found, part));
        }
        pod.uint(8, found.expected_depth.into());
        pod.flag(9, found.is_approximate);
    }

    /// What a pod's blocks are worth.
    fn weights_of<'a>(&'a self, found: &'a PodDepth) -> &'a TierWeights {
        let own = found.weights.as_deref();
        own.map_or(self.weights, PodWeights::weights)
    }

    /// How a score comes about.
    fn terms<'a>(&'a self, found: &'a PodDepth) -> impl Iterator<Item = v1::ScoreTerm> + 'a {
        let (weights, own) = (self.weights_of(found), found.weights.as_deref());
        let held = Tier::ALL.into_iter().zip(found.by_tier);
        held.filter(|(_, blocks)| *blocks > 0)
            .map(move |(tier, blocks)| v1::ScoreTerm {
                tier: tier_to_wire(tier).into(),
                blocks,
                weight: weights.of(tier),
                medium: own
                    .and_then(|own| own.medium(tier))
                    .unwrap_or_default()
                    .to_owned(),
            })
    }

    fn part_to_wire(&self, found: &PodDepth, part: &PartDepth) -> v1::PartDepth {
        let groups = part.groups.iter().filter(|_| self.explain);
        v1::PartDepth {
            data_parallel_rank: part.rank,
            depth: part.depth,
            by_tier: tiers(&part.by_tier).collect(),
            score: self.weights_of(found).score(&part.by_tier),
            groups: groups.map(group_depth_to_wire).collect(),
        }
    }
}

pub(super) fn range_to_wire(range: &Range<u32>) -> v1::BlockRange {
    v1::BlockRange {
        start: range.start,
        end: range.end,
    }
}

/// The tiers that have blocks, fastest first.
pub(super) fn tiers(by_tier: &[u32; TIERS]) -> impl Iterator<Item = v1::TierDepth> {
    let held = Tier::ALL.into_iter().zip(*by_tier);
    held.filter(|(_, blocks)| *blocks > 0)
        .map(|(tier, blocks)| v1::TierDepth {
            tier: tier_to_wire(tier).into(),
            blocks,
        })
}

fn group_depth_to_wire(found: &GroupDepth) -> v1::GroupDepth {
    let group = CacheGroup {
        number: found.group,
        rule: found.rule,
        block_size: 0,
    };
    v1::GroupDepth {
        group: Some(group_to_wire(&group)),
        depth: found.depth,
    }
}

#[cfg(test)]
mod tests;
