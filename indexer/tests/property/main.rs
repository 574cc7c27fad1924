//! The index beside a literal reading of the same events: a map from (source, tier, block) to copies, walked block by
//! block for every question.
#![cfg(test)]

mod both;
mod reached;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use kvcache_core::prefix::{IndexScheme, Namespace};
use kvcache_core::{EngineHash, IndexKey, PodName, Tier};
use kvfabric_indexer::adapter::{
    CacheGroup, GroupRule, RemovedBlocks, SourceEvent, SourceKind, StoredBlocks,
};
use kvfabric_indexer::index::{
    Answer, BYTES_MIN, IndexConfig, KvIndex, Query, SourceId, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use both::{Both, spec, stored};

const BLOCK_SIZE: u32 = 4;
/// Prompts are paths of this length in a binary tree, so that many share a beginning.
const DEPTH: usize = 6;
/// Salts that keep equal prompts apart.
const SALTS: [Option<&str>; 2] = [None, Some("tenant")];

const SOURCES: [(&str, &str, SourceKind); 7] = [
    ("pod-a", "engine", SourceKind::Vllm),
    ("pod-a", "node", SourceKind::Node),
    ("pod-b", "engine", SourceKind::Vllm),
    ("pod-b", "node", SourceKind::Node),
    ("pod-c", "engine", SourceKind::Sglang),
    ("pod-d", "engine", SourceKind::VllmFull),
    ("pod-d", "more", SourceKind::Vllm),
];

/// A block: the way to it from the root, and whose salt it is under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Block {
    salt: usize,
    /// At least 1: the number of blocks up to this one.
    depth: usize,
    /// One bit per level.
    path: u32,
}

impl Block {
    fn new(salt: usize, depth: usize, path: u32) -> Self {
        Self {
            salt,
            depth,
            path: path & ((1 << depth) - 1),
        }
    }

    fn parent(self) -> Option<Self> {
        (self.depth > 1).then(|| Self::new(self.salt, self.depth - 1, self.path))
    }

    fn tokens(self) -> [u32; BLOCK_SIZE as usize] {
        let branch = self.path >> (self.depth - 1) & 1;
        [branch, 7, 7, self.depth as u32]
    }

    /// The prompt that ends with this block.
    fn prompt(self) -> Vec<Block> {
        (1..=self.depth)
            .map(|depth| Self::new(self.salt, depth, self.path))
            .collect()
    }

    fn index_key(self) -> IndexKey {
        let namespace = Namespace {
            cache_salt: SALTS[self.salt],
            ..Namespace::default()
        };
        let tokens: Vec<u32> = self.prompt().into_iter().flat_map(Self::tokens).collect();
        let root = IndexScheme::default().root(&namespace);
        root.chain(&tokens, BLOCK_SIZE.try_into().unwrap())
            .last()
            .unwrap()
    }

    /// The block's name in a source: index keys in nodes, in engines something that no two of them share.
    fn hash(self, source: usize) -> EngineHash {
        match SOURCES[source].2 {
            SourceKind::Node => EngineHash(self.index_key().0),
            _ => EngineHash(
                (self.salt << 40 | source << 32 | self.depth << 16) as u64 + u64::from(self.path),
            ),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// `count` blocks along a path, the last of them being `last`.
    Store {
        source: usize,
        last: Block,
        count: usize,
        tier: Tier,
    },
    /// A block known or not, told without tokens.
    Mention {
        source: usize,
        block: Block,
        tier: Tier,
    },
    Remove {
        source: usize,
        block: Block,
        tier: Tier,
    },
    /// Another copy of a block that is held, and one copy less: random blocks are mostly not.
    StoreHeld {
        pick: usize,
    },
    RemoveHeld {
        pick: usize,
    },
    Clear {
        source: usize,
    },
    /// The source begins a new epoch.
    Restart {
        source: usize,
    },
    /// The source is removed and registered anew.
    Replace {
        source: usize,
    },
    RemovePod {
        source: usize,
    },
    /// The index gives up so many of the least recently used leaves; without a bound none.
    Evict {
        blocks: usize,
    },
    /// Another cache group of the model; must not disturb.
    OtherGroup {
        source: usize,
        block: Block,
    },
}

fn block() -> impl Strategy<Value = Block> {
    (0..SALTS.len(), 1..=DEPTH, any::<u32>())
        .prop_map(|(salt, depth, path)| Block::new(salt, depth, path))
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![4 => Just(Tier::Device), 2 => Just(Tier::Host), 1 => Just(Tier::Disk), 1 => Just(Tier::Object)]
}

fn step() -> impl Strategy<Value = Step> {
    let source = 0..SOURCES.len();
    prop_oneof![
        30 => (source.clone(), block(), 1..=DEPTH, tier()).prop_map(|(source, last, count, tier)| {
            Step::Store { source, last, count: count.min(last.depth), tier }
        }),
        3 => (source.clone(), block(), tier())
            .prop_map(|(source, block, tier)| Step::Mention { source, block, tier }),
        25 => (source.clone(), block(), tier())
            .prop_map(|(source, block, tier)| Step::Remove { source, block, tier }),
        6 => any::<usize>().prop_map(|pick| Step::StoreHeld { pick }),
        8 => any::<usize>().prop_map(|pick| Step::RemoveHeld { pick }),
        1 => source.clone().prop_map(|source| Step::Clear { source }),
        1 => source.clone().prop_map(|source| Step::Restart { source }),
        1 => source.clone().prop_map(|source| Step::Replace { source }),
        1 => source.clone().prop_map(|source| Step::RemovePod { source }),
        3 => (1..20_usize).prop_map(|blocks| Step::Evict { blocks }),
        1 => (source, block()).prop_map(|(source, block)| Step::OtherGroup { source, block }),
    ]
}

/// One source, read literally.
#[derive(Clone, Default)]
struct LiteralSource {
    copies: BTreeMap<(Block, Tier), u32>,
    /// Blocks whose tokens were told while they were held.
    told: BTreeSet<Block>,
    /// Blocks whose place in the index is known.
    placed: BTreeSet<Block>,
}

impl LiteralSource {
    fn copies(&self, block: Block, tier: Tier) -> u32 {
        self.copies.get(&(block, tier)).copied().unwrap_or(0)
    }

    fn forget_unheld(&mut self) {
        self.copies.retain(|_, copies| *copies > 0);
        let held: BTreeSet<Block> = self.copies.keys().map(|(block, _)| *block).collect();
        self.told.retain(|block| held.contains(block));
        self.placed.retain(|block| held.contains(block));
    }
}

#[derive(Clone, Default)]
struct Literal {
    sources: BTreeMap<usize, LiteralSource>,
    shared: BTreeSet<Block>,
}

impl Literal {
    fn store(&mut self, source: usize, blocks: &[Block], tier: Tier, with_tokens: bool) {
        let kind = SOURCES[source].2;
        let literal = self.sources.entry(source).or_default();
        for &block in blocks {
            let copies = literal.copies.entry((block, tier)).or_default();
            if *copies == 0 || (kind == SourceKind::Vllm && tier != Tier::Object) {
                *copies += 1;
            }
            if with_tokens || kind == SourceKind::Node {
                literal.told.insert(block);
            }
            // A block has a place once its tokens are told and the block before it has one; a node's are keys already.
            while let Some(&next) = literal.told.iter().find(|block| {
                let parent = block.parent().filter(|_| kind != SourceKind::Node);
                !literal.placed.contains(block)
                    && parent.is_none_or(|parent| literal.placed.contains(&parent))
            }) {
                literal.placed.insert(next);
                if literal.copies(next, Tier::Object) > 0 {
                    self.shared.insert(next);
                }
            }
            if tier == Tier::Object && literal.placed.contains(&block) {
                self.shared.insert(block);
            }
        }
    }

    fn remove(&mut self, source: usize, block: Block, tier: Tier) {
        let kind = SOURCES[source].2;
        let literal = self.sources.entry(source).or_default();
        if tier == Tier::Object && (kind == SourceKind::Node || literal.placed.contains(&block)) {
            self.shared.remove(&block);
        }
        if let Some(copies) = literal.copies.get_mut(&(block, tier)) {
            *copies -= 1;
        }
        literal.forget_unheld();
    }

    fn clear(&mut self, source: usize, tiers: &[Tier]) {
        let literal = self.sources.entry(source).or_default();
        literal.copies.retain(|(_, tier), _| !tiers.contains(tier));
        literal.forget_unheld();
    }

    /// Blocks that somebody holds, or claims to have stored, at their place.
    fn placed(&self) -> BTreeSet<Block> {
        let of_sources = self.sources.values().flat_map(|literal| &literal.placed);
        of_sources.chain(&self.shared).copied().collect()
    }

    /// Nobody holds the block any more, and nobody is said to have removed it.
    fn evict(&mut self, block: Block) {
        self.shared.remove(&block);
        for literal in self.sources.values_mut() {
            if literal.placed.remove(&block) {
                literal.copies.retain(|(other, _), _| *other != block);
                literal.told.remove(&block);
            }
        }
    }

    /// The fastest tier in which a pod holds a block by itself.
    fn fastest(&self, pod: &str, block: Block) -> Option<Tier> {
        let of_pod = self
            .sources
            .iter()
            .filter(|(source, _)| SOURCES[**source].0 == pod);
        let tiers = of_pod.flat_map(|(_, literal)| {
            let placed = literal.placed.contains(&block);
            Tier::ALL
                .into_iter()
                .filter(move |tier| placed && !tier.is_shared() && literal.copies(block, *tier) > 0)
        });
        tiers.min()
    }

    fn depths(&self, prompt: &[Block]) -> (Vec<(String, u32, [u32; 4])>, u32) {
        let mut found = Vec::new();
        let pods: BTreeSet<&str> = SOURCES.iter().map(|(pod, ..)| *pod).collect();
        for pod in pods {
            let mut by_tier = [0; 4];
            for block in prompt {
                match self.fastest(pod, *block) {
                    Some(tier) => by_tier[tier as usize] += 1,
                    None => break,
                }
            }
            let depth: u32 = by_tier.iter().sum();
            if depth > 0 {
                found.push((pod.to_owned(), depth, by_tier));
            }
        }
        found.sort_by_key(|(pod, depth, _)| (std::cmp::Reverse(*depth), pod.clone()));
        let shared = prompt
            .iter()
            .take_while(|block| self.shared.contains(block))
            .count();
        (found, shared as u32)
    }

    /// Entries of all sources in their own tiers, and of the shared ones.
    fn entries(&self) -> u64 {
        let own: usize = self
            .sources
            .values()
            .map(|literal| {
                let held = literal.copies.keys();
                held.filter(|(block, tier)| !tier.is_shared() && literal.placed.contains(block))
                    .count()
            })
            .sum();
        (own + self.shared.len()) as u64
    }
}

type Held = (usize, Block, Tier);

fn held(literal: &Literal) -> BTreeSet<Held> {
    let sources = literal.sources.iter();
    sources
        .flat_map(|(source, literal)| {
            literal
                .copies
                .keys()
                .map(move |(block, tier)| (*source, *block, *tier))
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Long random histories of every kind of source, an event a call or many; after each tenth event every prompt is
    /// asked for.
    #[test]
    fn every_lookup_is_what_a_literal_reading_of_the_events_says(
        steps in proptest::collection::vec(step(), 1..400),
        is_together in any::<bool>(),
    ) {
        let mut both = Both::new(None);
        both.together = is_together.then(RefCell::default);
        for (position, step) in steps.iter().enumerate() {
            both.step(step);
            if position % 10 == 9 {
                both.check();
            }
        }
        both.check();
        for source in 0..SOURCES.len() {
            both.step(&Step::RemovePod { source });
        }
        prop_assert_eq!(both.index().entries(), both.literal.shared.len() as u64);
        prop_assert_eq!(both.index().blocks(), both.literal.shared.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The same histories with evictions in between: each is of leaves, and what is left is answered as before, which is
    /// never more than the events say.
    #[test]
    fn evicted_blocks_are_leaves_and_what_is_left_is_answered_exactly(
        steps in proptest::collection::vec(step(), 1..400),
    ) {
        let mut both = Both::new(Some(BYTES_MIN));
        for (position, step) in steps.iter().enumerate() {
            both.step(step);
            if position % 10 == 9 {
                both.check();
            }
        }
        both.check();
        both.evict(usize::MAX);
        both.check();
        prop_assert_eq!((both.index().entries(), both.index().blocks()), (0, 0));
    }
}

/// A source is registered with the sizes of its blocks, and its events may contradict that.
#[test]
fn another_block_size_is_refused_with_both_sizes_named() {
    let both = Both::new(None);
    let mut other = spec(0);
    (other.name, other.block_size) = ("other".to_owned(), 6);
    let refusal = both.index().add_source(other).unwrap_err().to_string();
    assert!(
        refusal.contains("6 tokens") && refusal.contains('4') && refusal.contains("pod-a"),
        "{refusal}"
    );

    let mut blocks = stored(0, &[Block::new(0, 1, 0)], Tier::Device, true);
    (blocks.tokens, blocks.block_size) = (vec![1; 6], 6);
    let refusal = both
        .index
        .apply(both.ids[0], &SourceEvent::Stored(blocks))
        .unwrap_err();
    assert!(
        refusal.context().contains("6 tokens") && refusal.context().contains("pod-a"),
        "{refusal}"
    );
    assert_eq!(both.index().entries(), 0);
}

/// Ten orphans and room for three; then the parents come.
#[test]
fn orphans_are_bounded_and_those_within_the_bound_are_resolved() {
    let index = KvIndex::new(IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: BLOCK_SIZE.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: 3,
    });
    let id = index.add_source(spec(0)).unwrap();
    let prompt = Block::new(0, DEPTH, 0).prompt();
    let mut refused = 0;
    for block in prompt[1..].iter().rev() {
        let event = SourceEvent::Stored(stored(0, &[*block], Tier::Device, true));
        refused += index.apply(id, &event).unwrap().refused;
    }
    assert_eq!((refused, index.orphans(id), index.entries()), (2, 3, 0));
    let before_bytes = index.bytes();
    let first = stored(0, &prompt[..3], Tier::Device, true);
    let applied = index.apply(id, &SourceEvent::Stored(first)).unwrap();
    assert_eq!(
        (applied.stored, index.orphans(id), index.entries()),
        (6, 0, 6)
    );
    assert!(before_bytes > 0);
}
