//! What routers expect, beside a literal reading of it: few pods of an answer are the first of all.
#![cfg(test)]

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, IndexKey, PodName, Tier, Time};
use kvfabric_indexer::adapter::{SourceEvent, SourceKind, StoredBlocks};
use kvfabric_indexer::index::{
    Answer, Expectation, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, Query, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;
use proptest::prelude::*;

/// Blocks of a prompt, a token each.
const BLOCKS: u32 = 10;
const PODS: usize = 24;
/// The pods from here on publish nothing.
const APPROXIMATE: usize = 20;
/// Blocks that such a pod is thought to keep.
const KEPT: usize = 12;

#[derive(Clone, Debug)]
enum Step {
    Store {
        pod: usize,
        prompt: u32,
        blocks: u32,
    },
    Route {
        pod: usize,
        prompt: u32,
        blocks: u32,
        ttl: u64,
    },
    Wait(u64),
    Gone(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = 1..=BLOCKS;
    prop_oneof![
        4 => (0..APPROXIMATE, 0..3_u32, blocks.clone())
            .prop_map(|(pod, prompt, blocks)| Step::Store { pod, prompt, blocks }),
        6 => (0..PODS, 0..3_u32, blocks, 1..40_u64)
            .prop_map(|(pod, prompt, blocks, ttl)| Step::Route { pod, prompt, blocks, ttl }),
        3 => (1..20_u64).prop_map(Step::Wait),
        1 => (0..APPROXIMATE).prop_map(Step::Gone),
    ]
}

/// The tokens of a prompt; the first blocks of all are the same.
fn tokens(prompt: u32, blocks: u32) -> Vec<u32> {
    (0..blocks)
        .map(|block| {
            if block < 3 {
                block
            } else {
                100 * prompt + block
            }
        })
        .collect()
}

fn name(pod: usize) -> PodName {
    PodName::new(&format!("pod-{pod:02}")).unwrap()
}

fn spec(pod: usize) -> SourceSpec {
    SourceSpec {
        pod: name(pod),
        name: "engine".to_owned(),
        kind: match pod < APPROXIMATE {
            true => SourceKind::Sglang,
            false => SourceKind::Approximate,
        },
        block_size: 1,
    }
}

/// Of one pod: blocks held, and when each of the others stops being expected with how far from the start it is.
#[derive(Clone, Default)]
struct Literal {
    held: BTreeMap<IndexKey, ()>,
    expected: BTreeMap<IndexKey, (Time, Reverse<u32>)>,
}

/// As an answer says it: depth, expected depth, name.
type Row = (Reverse<u32>, Reverse<u32>, PodName);

impl Literal {
    fn row(&self, pod: usize, keys: &[IndexKey], now: Time) -> Option<Row> {
        let depth = keys
            .iter()
            .take_while(|key| self.held.contains_key(key))
            .count();
        let more = keys[depth..].iter().take_while(|key| {
            let until = self.expected.get(key);
            until.is_some_and(|(until, _)| *until > now)
        });
        let more = more.count();
        if depth + more == 0 {
            return None;
        }
        let (depth, expected) = match (pod < APPROXIMATE, more) {
            (true, 0) => (depth, 0),
            (true, more) => (depth, depth + more),
            (false, more) => (more, 0),
        };
        Some((Reverse(depth as u32), Reverse(expected as u32), name(pod)))
    }

    fn route(&mut self, pod: usize, keys: &[IndexKey], until: Time) {
        let depth = keys
            .iter()
            .take_while(|key| self.held.contains_key(key))
            .count();
        for (from_start, key) in (0..).zip(keys).skip(depth) {
            self.expected.insert(*key, (until, Reverse(from_start)));
        }
        while pod >= APPROXIMATE && self.expected.len() > KEPT {
            let first = self
                .expected
                .iter()
                .min_by_key(|(key, turn)| (**turn, **key));
            let first = *first.unwrap().0;
            self.expected.remove(&first);
        }
    }
}

fn rows(answer: &Answer) -> Vec<Row> {
    let pods = answer.pods.iter();
    pods.map(|found| {
        (
            Reverse(found.depth),
            Reverse(found.expected_depth),
            found.pod.clone(),
        )
    })
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random stores, routings, time and departures; each answer of every length, of all pods and of some, beside a map
    /// from pods to blocks and times.
    #[test]
    fn few_pods_are_the_first_of_all_whatever_is_expected(steps in prop::collection::vec(step(), 1..60)) {
        let index = KvIndex::new(IndexConfig {
            scheme: IndexScheme::default(),
            model: String::new(),
            block_size: 1.try_into().unwrap(),
            weights: TierWeights::default(),
            orphan_blocks_max: ORPHAN_BLOCKS_MAX,
        });
        let mut ids: Vec<_> = (0..PODS).map(|pod| index.add_source(spec(pod)).unwrap()).collect();
        let mut literal = vec![Literal::default(); PODS];
        let (mut now, mut keys, mut answer) = (1_000_u64, Vec::new(), Answer::default());
        for step in steps {
            match step {
                Step::Store { pod, prompt, blocks } => {
                    let tokens = tokens(prompt, blocks);
                    keys.clear();
                    index.keys_of(None, None, &tokens, &mut keys);
                    let event = SourceEvent::Stored(StoredBlocks {
                        hashes: keys.iter().map(|key| EngineHash(key.0)).collect(),
                        parent: None,
                        block_size: 1,
                        tokens,
                        tier: Tier::Device,
                        group: None,
                        lora: None,
                        cache_salt: None,
                        identifiers: vec![],
                    });
                    index.apply(ids[pod], &event).unwrap();
                    for key in &keys {
                        literal[pod].held.insert(*key, ());
                        literal[pod].expected.remove(key);
                    }
                }
                Step::Route { pod, prompt, blocks, ttl } => {
                    keys.clear();
                    index.keys_of(None, None, &tokens(prompt, blocks), &mut keys);
                    let with = Expectation {
                        now: Time(now),
                        ttl: Duration::from_nanos(ttl),
                        approximate_blocks_max: KEPT,
                    };
                    index.expect(&name(pod), &keys, &with).unwrap();
                    for literal in &mut literal {
                        literal.expected.retain(|_, (until, _)| until.0 > now);
                    }
                    literal[pod].route(pod, &keys, Time(now + ttl));
                }
                Step::Wait(time) => now += time,
                Step::Gone(pod) => {
                    index.remove_source(ids[pod]);
                    ids[pod] = index.add_source(spec(pod)).unwrap();
                    literal[pod] = Literal::default();
                }
            }
            let some: Vec<PodName> = (0..PODS).step_by(3).map(name).collect();
            for prompt in 0..3 {
                keys.clear();
                index.keys_of(None, None, &tokens(prompt, BLOCKS), &mut keys);
                let all = literal.iter().enumerate();
                let mut wanted: Vec<Row> = all
                    .filter_map(|(pod, literal)| literal.row(pod, &keys, Time(now)))
                    .collect();
                wanted.sort();
                for pods in [&[][..], &some] {
                    let mut wanted = wanted.clone();
                    wanted.retain(|row| pods.is_empty() || pods.contains(&row.2));
                    for pods_max in [0, 1, 2, 5] {
                        index.lookup_at(Time(now), &keys, &Query { pods_max, pods }, &mut answer);
                        let most = if pods_max == 0 { wanted.len() } else { pods_max.min(wanted.len()) };
                        prop_assert_eq!(rows(&answer), &wanted[..most]);
                    }
                }
            }
        }
    }
}
