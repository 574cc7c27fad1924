//! Answers of a few pods beside the whole answer: the best of many are the first of all.
#![cfg(test)]

use std::cmp::Reverse;
use std::collections::BTreeMap;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, IndexKey, PodName, Tier};
use kvfabric_indexer::adapter::{RemovedBlocks, SourceEvent, SourceKind, StoredBlocks};
use kvfabric_indexer::index::{
    Answer, Depths, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, PodDepth, PodNumber, Query, SourceId,
    SourceSpec,
};
use kvfabric_indexer::score::TierWeights;
use proptest::prelude::*;

const BLOCK_SIZE: u32 = 1;
/// Blocks of the one prompt.
const BLOCKS: usize = 24;

/// Who holds a stretch of blocks.
#[derive(Clone, Debug)]
struct Stretch {
    blocks: usize,
    /// A pod in so many holds them: 1 is everybody.
    one_in: u64,
    seed: u64,
    /// Whether the shared tier has them too.
    is_shared: bool,
}

/// What makes a fleet.
#[derive(Clone, Debug)]
struct Fleet {
    pods: usize,
    stretches: Vec<Stretch>,
    /// A pod in so many has two ranks, is in two tiers, has left; 0 is none.
    ranked: u64,
    tiered: u64,
    leaving: u64,
}

fn fleet() -> impl Strategy<Value = Fleet> {
    let stretch = (
        prop_oneof![1 => Just(1_usize), 1 => 1..6_usize],
        prop_oneof![6 => Just(1_u64), 3 => 1..4_u64, 3 => 4..40_u64, 2 => 40..400_u64],
        any::<u64>(),
        prop::bool::weighted(0.1),
    );
    let stretch = stretch.prop_map(|(blocks, one_in, seed, is_shared)| Stretch {
        blocks,
        one_in,
        seed,
        is_shared,
    });
    let some = prop_oneof![3 => Just(0_u64), 1 => 2..30_u64];
    (
        prop_oneof![1 => 1..60_usize, 3 => 60..400_usize],
        prop_oneof![3 => prop::collection::vec(stretch.clone(), 1..8), 1 => prop::collection::vec(stretch, 8..BLOCKS)],
        some.clone(),
        some.clone(),
        some,
    )
        .prop_map(|(pods, stretches, ranked, tiered, leaving)| Fleet {
            pods,
            stretches,
            ranked,
            tiered,
            leaving,
        })
}

/// Mixes two numbers.
fn mix(one: u64, other: u64) -> u64 {
    let mixed = (one ^ other.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 7
}

fn is_one(number: u64, in_so_many: u64) -> bool {
    in_so_many > 0 && number.is_multiple_of(in_so_many)
}

struct Built {
    index: KvIndex,
    keys: Vec<IndexKey>,
    names: Vec<PodName>,
}

impl Fleet {
    fn build(&self) -> Built {
        let index = KvIndex::new(IndexConfig {
            scheme: IndexScheme::default(),
            model: String::new(),
            block_size: BLOCK_SIZE.try_into().unwrap(),
            weights: TierWeights::default(),
            orphan_blocks_max: ORPHAN_BLOCKS_MAX,
        });
        // In an order that is not that of the names.
        let name = |pod: usize| {
            PodName::new(&format!(
                "pod-{}",
                mix(pod as u64, 7) % 100_000 * 1000 + pod as u64
            ))
        };
        let names: Vec<PodName> = (0..self.pods).map(|pod| name(pod).unwrap()).collect();
        let mut sources = BTreeMap::new();
        for (pod, name) in names.iter().enumerate() {
            let ranks = if is_one(mix(pod as u64, 1), self.ranked) {
                2
            } else {
                1
            };
            for rank in 0..ranks {
                let id = index.add_source(SourceSpec {
                    pod: name.clone(),
                    name: format!("engine-{rank}"),
                    kind: SourceKind::Sglang,
                    block_size: BLOCK_SIZE,
                });
                let id = id.unwrap();
                if ranks > 1 {
                    index.set_rank(id, Some(rank)).unwrap();
                }
                sources.insert((pod, rank), id);
            }
        }
        for ((pod, rank), id) in &sources {
            self.tell(&index, *pod, u64::from(*rank), *id);
        }
        for (pod, name) in names.iter().enumerate() {
            if is_one(mix(pod as u64, 2), self.leaving) {
                index.remove_pod(name);
            }
        }
        let tokens: Vec<u32> = (0..BLOCKS as u32).collect();
        let mut keys = Vec::new();
        index.keys_of(None, None, &tokens, &mut keys);
        Built { index, keys, names }
    }

    /// All blocks, then without those that the pod does not hold.
    fn tell(&self, index: &KvIndex, pod: usize, rank: u64, id: SourceId) {
        let hash = |block: usize| EngineHash(block as u64 + 1);
        let stored = |tier| {
            SourceEvent::Stored(StoredBlocks {
                hashes: (0..BLOCKS).map(hash).collect(),
                parent: None,
                tokens: (0..BLOCKS as u32).collect(),
                block_size: BLOCK_SIZE,
                tier,
                group: None,
                lora: None,
                cache_salt: None,
                identifiers: Vec::new(),
            })
        };
        let is_tiered = is_one(mix(pod as u64, 3), self.tiered);
        let tiers = [Tier::Device, Tier::Host];
        let tiers = &tiers[..1 + usize::from(is_tiered)];
        for tier in tiers {
            index.apply(id, &stored(*tier)).unwrap();
        }
        let mut from = 0;
        for stretch in &self.stretches {
            let to = (from + stretch.blocks).min(BLOCKS);
            for tier in tiers {
                let number = mix(mix(pod as u64, rank), stretch.seed ^ *tier as u64);
                if !is_one(number, stretch.one_in) {
                    let removed = RemovedBlocks {
                        hashes: (from..to).map(hash).collect(),
                        tier: *tier,
                        group: None,
                    };
                    index.apply(id, &SourceEvent::Removed(removed)).unwrap();
                }
            }
            if stretch.is_shared && pod == 0 {
                let mut shared = match stored(Tier::Object) {
                    SourceEvent::Stored(shared) => shared,
                    _ => unreachable!("an event of stored blocks"),
                };
                shared.hashes.drain(to..);
                shared.hashes.drain(..from);
                shared.parent = from.checked_sub(1).map(hash);
                shared.tokens = (from as u32..to as u32).collect();
                index.apply(id, &SourceEvent::Stored(shared)).unwrap();
            }
            from = to;
        }
    }
}

impl Built {
    fn lookup(
        &self,
        pods_max: usize,
        pods: &[PodName],
    ) -> (Vec<PodDepth>, Vec<std::ops::Range<u32>>) {
        let mut answer = Answer::default();
        self.index
            .lookup(&self.keys, &Query { pods_max, pods }, &mut answer);
        (answer.pods, answer.shared)
    }

    fn depths(&self, pods_max: usize, pods: &[PodNumber]) -> Vec<(Reverse<u32>, [u32; 4])> {
        let mut depths = Depths::default();
        self.index.depths(&self.keys, pods_max, pods, &mut depths);
        assert!(depths.pods.is_sorted_by_key(|found| Reverse(found.depth)));
        let mut found: Vec<_> = depths
            .pods
            .iter()
            .map(|found| (Reverse(found.depth), found.by_tier))
            .collect();
        found.sort();
        found
    }

    /// Compares answers of a few of these pods, or of all if none are named, with the first of the whole answer.
    fn check(&self, pods: &[PodName]) -> std::result::Result<(), TestCaseError> {
        let (all, shared) = self.lookup(0, &[]);
        let mut whole = all;
        whole.retain(|found| pods.is_empty() || pods.contains(&found.pod));
        let numbers = pods.iter().filter_map(|pod| self.index.pod_number(pod));
        let numbers: Vec<PodNumber> = numbers.collect();
        for pods_max in [1, 2, 3, 16, 33, 100, 0] {
            let first = if pods_max == 0 {
                whole.len()
            } else {
                pods_max.min(whole.len())
            };
            let found = self.lookup(pods_max, pods);
            prop_assert_eq!(
                (&found.0[..], &found.1),
                (&whole[..first], &shared),
                "best {}",
                pods_max
            );
            if pods.is_empty() == numbers.is_empty() {
                let found = self.depths(pods_max, &numbers);
                let depths: Vec<_> = found.iter().map(|found| found.0.0).collect();
                let wanted: Vec<_> = whole[..first].iter().map(|found| found.depth).collect();
                prop_assert_eq!(depths, wanted, "best {} by number", pods_max);
                let is_known = |found: &(Reverse<u32>, [u32; 4])| {
                    whole
                        .iter()
                        .any(|pod| (pod.depth, pod.by_tier) == (found.0.0, found.1))
                };
                prop_assert!(found.iter().all(is_known), "best {} by number", pods_max);
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Fleets of up to 400 pods, stretches that all, many or few hold, with holes, tiers, ranks, shared blocks and pods that are
    /// leaving; asked for up to 100 of all pods and of candidates.
    #[test]
    fn the_best_few_are_the_first_of_all(
        fleet in fleet(),
        named in 1..30_u64,
        seed in any::<u64>(),
    ) {
        let built = fleet.build();
        built.check(&[])?;
        let names = built.names.iter().enumerate();
        let candidates = names.filter(|(pod, _)| is_one(mix(*pod as u64, seed), named));
        let candidates: Vec<PodName> = candidates.map(|(_, name)| name.clone()).collect();
        if !candidates.is_empty() {
            built.check(&candidates)?;
        }
    }
}
