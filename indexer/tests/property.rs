//! The index beside a literal reading of the same events: a map from (source, tier, block) to copies, walked block by
//! block for every question.
#![cfg(test)]

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

/// The index under test, and the reading to compare with.
struct Both {
    index: KvIndex,
    ids: Vec<SourceId>,
    literal: Literal,
    /// The same without evictions.
    complete: Literal,
    answer: Answer,
    /// Events that are yet to be applied all at once; none when each is applied by itself.
    together: Option<RefCell<Vec<(SourceId, SourceEvent)>>>,
}

fn spec(source: usize) -> SourceSpec {
    let (pod, name, kind) = SOURCES[source];
    let pod = PodName::new(pod).unwrap();
    SourceSpec {
        pod,
        name: name.to_owned(),
        kind,
        block_size: BLOCK_SIZE,
    }
}

fn stored(source: usize, blocks: &[Block], tier: Tier, with_tokens: bool) -> StoredBlocks {
    let is_node = SOURCES[source].2 == SourceKind::Node;
    let with_tokens = with_tokens && !is_node;
    let salt = SALTS[blocks[0].salt].filter(|_| blocks[0].depth == 1 && !is_node);
    StoredBlocks {
        hashes: blocks.iter().map(|block| block.hash(source)).collect(),
        parent: blocks[0].parent().map(|parent| parent.hash(source)),
        tokens: if with_tokens {
            blocks.iter().flat_map(|block| block.tokens()).collect()
        } else {
            vec![]
        },
        block_size: if with_tokens { BLOCK_SIZE } else { 0 },
        tier,
        group: Some(CacheGroup {
            number: 0,
            rule: GroupRule::Full,
            block_size: BLOCK_SIZE,
        }),
        lora: None,
        cache_salt: salt.map(str::to_owned),
        identifiers: vec![],
    }
}

impl Both {
    fn new(bytes_max: Option<u64>) -> Self {
        let config = IndexConfig {
            scheme: IndexScheme::default(),
            model: String::new(),
            block_size: BLOCK_SIZE.try_into().unwrap(),
            weights: TierWeights::default(),
            orphan_blocks_max: 10_000,
        };
        let index = match bytes_max {
            Some(bytes_max) => KvIndex::bounded(config, bytes_max).unwrap(),
            None => KvIndex::new(config),
        };
        let ids = (0..SOURCES.len())
            .map(|source| index.add_source(spec(source)).unwrap())
            .collect();
        Self {
            index,
            ids,
            literal: Literal::default(),
            complete: Literal::default(),
            answer: Answer::default(),
            together: None,
        }
    }

    fn apply(&self, source: usize, event: SourceEvent) {
        match &self.together {
            Some(together) => together.borrow_mut().push((self.ids[source], event)),
            None => {
                self.index.apply(self.ids[source], &event).unwrap();
            }
        }
    }

    /// The index, after all events.
    fn index(&self) -> &KvIndex {
        if let Some(together) = &self.together {
            let events = together.take();
            let mut applied = 0;
            self.index.apply_all(&events, |outcome| {
                outcome.unwrap();
                applied += 1;
            });
            assert_eq!(applied, events.len());
        }
        &self.index
    }

    /// The step with the block that it picks.
    fn resolve(&self, step: &Step) -> Option<Step> {
        let picked = |pick: usize| {
            let all = held(&self.literal);
            all.iter().nth(pick.checked_rem(all.len())?).copied()
        };
        Some(match *step {
            Step::StoreHeld { pick } => {
                let (source, last, tier) = picked(pick)?;
                let count = 1;
                Step::Store {
                    source,
                    last,
                    count,
                    tier,
                }
            }
            Step::RemoveHeld { pick } => {
                let (source, block, tier) = picked(pick)?;
                Step::Remove {
                    source,
                    block,
                    tier,
                }
            }
            _ => step.clone(),
        })
    }

    fn step(&mut self, step: &Step) {
        let Some(step) = self.resolve(step) else {
            return;
        };
        match step {
            Step::Store {
                source,
                last,
                count,
                tier,
            } => {
                let blocks = &last.prompt()[last.depth - count..];
                self.store(source, blocks, tier, true);
            }
            Step::Mention {
                source,
                block,
                tier,
            } => self.store(source, &[block], tier, false),
            Step::Remove {
                source,
                block,
                tier,
            } => {
                let hashes = vec![block.hash(source)];
                self.apply(
                    source,
                    SourceEvent::Removed(RemovedBlocks {
                        hashes,
                        tier,
                        group: Some(0),
                    }),
                );
                self.read(|literal| literal.remove(source, block, tier));
            }
            Step::Clear { source } => self.clear(source),
            Step::Restart { source } => {
                self.index().clear_source(self.ids[source]);
                self.forget(source);
            }
            Step::Replace { source } => {
                self.index().remove_source(self.ids[source]);
                self.forget(source);
                self.ids[source] = self.index().add_source(spec(source)).unwrap();
            }
            Step::RemovePod { source } => {
                let pod = SOURCES[source].0;
                self.index().remove_pod(&PodName::new(pod).unwrap());
                assert_eq!(self.index().pod_entries(&PodName::new(pod).unwrap()), 0);
                for source in (0..SOURCES.len()).filter(|source| SOURCES[*source].0 == pod) {
                    self.forget(source);
                    self.ids[source] = self.index().add_source(spec(source)).unwrap();
                }
            }
            Step::Evict { blocks } => self.evict(blocks),
            Step::OtherGroup { source, block } if SOURCES[source].2 != SourceKind::Node => {
                let mut blocks = stored(source, &[block], Tier::Device, true);
                blocks.group = Some(CacheGroup {
                    number: 1,
                    rule: GroupRule::Nothing,
                    block_size: BLOCK_SIZE,
                });
                self.apply(source, SourceEvent::Stored(blocks));
            }
            Step::OtherGroup { .. } | Step::StoreHeld { .. } | Step::RemoveHeld { .. } => {}
        }
    }

    fn store(&mut self, source: usize, blocks: &[Block], tier: Tier, with_tokens: bool) {
        let event = stored(source, blocks, tier, with_tokens);
        self.apply(source, SourceEvent::Stored(event));
        self.read(|literal| literal.store(source, blocks, tier, with_tokens));
    }

    /// Reads an event, with and without evictions.
    fn read(&mut self, event: impl Fn(&mut Literal)) {
        event(&mut self.literal);
        event(&mut self.complete);
    }

    fn forget(&mut self, source: usize) {
        self.read(|literal| {
            literal.sources.remove(&source);
        });
    }

    /// The keys of all blocks that anybody holds at their place.
    fn keys_there(&self) -> BTreeSet<IndexKey> {
        let shared = self.index().export_shared().into_iter().flatten();
        let mut keys: BTreeSet<IndexKey> = shared.map(|(key, _)| key).collect();
        for id in &self.ids {
            let image = self.index().export(*id).unwrap();
            let blocks = image.pieces.iter().flat_map(|piece| &piece.blocks);
            keys.extend(blocks.map(|block| block.key));
        }
        keys
    }

    /// Lets the index choose what to give up; no block must go before one that comes after it.
    fn evict(&mut self, blocks: usize) {
        // What a node has put in a shared tier and another one deleted there is in no tier, though nobody told the node.
        let there = self.keys_there();
        let mut before = self.literal.placed();
        before.retain(|block| there.contains(&block.index_key()));
        let evicted = self.index().evict(blocks);
        let left = self.keys_there();
        let (left, gone): (BTreeSet<Block>, BTreeSet<Block>) = before
            .into_iter()
            .partition(|block| left.contains(&block.index_key()));
        if self.index().usage().bytes_max.is_none() {
            assert_eq!((evicted, gone.len()), (0, 0));
        } else {
            assert!(
                left.is_empty() || evicted >= blocks,
                "{evicted} of {blocks}"
            );
        }
        for block in &left {
            let parent = block.parent();
            assert!(
                parent.is_none_or(|parent| !gone.contains(&parent)),
                "{parent:?} went before {block:?}"
            );
        }
        for block in gone {
            self.literal.evict(block);
        }
    }

    fn clear(&mut self, source: usize) {
        self.apply(source, SourceEvent::Cleared);
        match SOURCES[source].2 {
            SourceKind::Vllm | SourceKind::VllmFull => {
                self.read(|literal| literal.clear(source, &[Tier::Device]));
            }
            SourceKind::Sglang => {
                let tiers = [Tier::Device, Tier::Host, Tier::Disk];
                self.read(|literal| literal.clear(source, &tiers));
            }
            SourceKind::Node | SourceKind::Approximate => {
                self.read(|literal| literal.clear(source, &Tier::ALL))
            }
        }
    }

    fn check(&mut self) {
        assert_eq!(self.index().entries(), self.literal.entries());
        let one_pod = [
            PodName::new("pod-b").unwrap(),
            PodName::new("nobody").unwrap(),
        ];
        for (salt, salt_name) in SALTS.into_iter().enumerate() {
            for path in 0..1 << DEPTH {
                let prompt = Block::new(salt, DEPTH, path).prompt();
                let tokens: Vec<u32> = prompt.iter().flat_map(|block| block.tokens()).collect();
                let mut keys = Vec::new();
                self.index.keys_of(None, salt_name, &tokens, &mut keys);
                let (wanted, shared) = self.literal.depths(&prompt);

                self.index
                    .lookup(&keys, &Query::default(), &mut self.answer);
                assert_eq!(self.found(), wanted, "{prompt:?}");
                assert_eq!(self.answer.shared_depth, shared);
                // Of shared tiers nothing is compared: who has lost its name for a block cannot delete it for others.
                let (complete, _) = self.complete.depths(&prompt);
                for (pod, depth, _) in &wanted {
                    let is_in = |(other, most, _): &(String, u32, _)| other == pod && depth <= most;
                    assert!(complete.iter().any(is_in), "{pod} does not hold {depth}");
                }
                for pod in &self.answer.pods {
                    assert_eq!(pod.score, TierWeights::default().score(&pod.by_tier));
                }

                self.index.lookup(
                    &keys,
                    &Query {
                        pods_max: 2,
                        pods: &[],
                    },
                    &mut self.answer,
                );
                assert_eq!(self.found(), wanted[..wanted.len().min(2)]);

                self.index.lookup(
                    &keys,
                    &Query {
                        pods_max: 0,
                        pods: &one_pod,
                    },
                    &mut self.answer,
                );
                let only: Vec<_> = wanted
                    .into_iter()
                    .filter(|(pod, ..)| pod == "pod-b")
                    .collect();
                assert_eq!(self.found(), only);
                assert_eq!(self.answer.shared_depth, shared);
            }
        }
    }

    fn found(&self) -> Vec<(String, u32, [u32; 4])> {
        let pods = self.answer.pods.iter();
        pods.map(|pod| (pod.pod.to_string(), pod.depth, pod.by_tier))
            .collect()
    }
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

/// How often a history came into each state.
#[derive(Default)]
struct Reached(BTreeMap<&'static str, u32>);

impl Reached {
    fn count(&mut self, state: &'static str, is_reached: bool) {
        *self.0.entry(state).or_default() += u32::from(is_reached);
    }

    /// The states that a step leads from and to.
    #[expect(clippy::too_many_lines, reason = "a few lines a state")]
    fn look(&mut self, step: &Step, before: &Literal, after: &Literal, gone: &BTreeSet<Held>) {
        let (old, new) = (held(before), held(after));
        let holds = |all: &BTreeSet<Held>, source, block| {
            all.iter().any(|held| (held.0, held.1) == (source, block))
        };
        let placed = |literal: &Literal, (source, block, _): &Held| {
            let literal = literal.sources.get(source);
            literal.is_some_and(|literal| literal.placed.contains(block))
        };
        let is_hole = |all: &BTreeSet<Held>, literal: &Literal, held: &Held| {
            let parent = held.1.parent().filter(|_| placed(literal, held));
            parent.is_some_and(|parent| !holds(all, held.0, parent))
        };
        self.count(
            "stored again after it was removed",
            new.difference(&old).any(|held| gone.contains(held)),
        );
        self.count(
            "a second copy",
            after
                .sources
                .values()
                .any(|s| s.copies.values().any(|copies| *copies > 1)),
        );
        self.count("a hole", new.iter().any(|held| is_hole(&new, after, held)));
        self.count(
            "a hole filled",
            old.intersection(&new).any(|held| {
                is_hole(&old, before, held) && !is_hole(&new, after, held) && placed(after, held)
            }),
        );
        self.count(
            "a child before its parent",
            new.iter().any(|held| !placed(after, held)),
        );
        self.count(
            "the parent comes",
            old.intersection(&new)
                .any(|held| !placed(before, held) && placed(after, held)),
        );
        let sibling = |block: Block| {
            let other = block.path ^ 1 << (block.depth - 1);
            Block::new(block.salt, block.depth, other)
        };
        self.count(
            "a branch",
            new.iter().any(|held| holds(&new, held.0, sibling(held.1))),
        );
        self.count(
            "held by four sources",
            new.iter().any(|held| {
                let holders: BTreeSet<_> =
                    new.iter().filter(|h| h.1 == held.1).map(|h| h.0).collect();
                holders.len() >= 4
            }),
        );
        self.count(
            "shared behind a hole",
            after.shared.iter().any(|block| {
                block
                    .parent()
                    .is_some_and(|parent| !after.shared.contains(&parent))
            }),
        );
        let has_any = |source: usize| old.iter().any(|held| held.0 == source);
        match *step {
            Step::Remove {
                source,
                block,
                tier,
            } => {
                self.count("removed unheld", !old.contains(&(source, block, tier)));
                let two = before
                    .sources
                    .get(&source)
                    .is_some_and(|s| s.copies(block, tier) > 1);
                self.count("one of two copies removed", two);
            }
            Step::Clear { source } => {
                self.count("cleared", has_any(source));
                self.count(
                    "a clear leaves a tier",
                    new.iter().any(|held| held.0 == source),
                );
            }
            Step::Restart { source } => self.count("restarted", has_any(source)),
            Step::Replace { source } => self.count("replaced", has_any(source)),
            Step::RemovePod { source } => self.count("a pod goes", has_any(source)),
            Step::Mention { source, block, .. } => {
                let is_known = before
                    .sources
                    .get(&source)
                    .is_some_and(|s| s.placed.contains(&block));
                self.count("a known block without tokens", is_known);
                self.count("an unknown block without tokens", !is_known);
            }
            _ => {}
        }
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

/// Forty histories from a fixed seed, each state counted: what the generator never reaches the comparison says nothing of.
#[test]
fn random_histories_reach_every_state() {
    let mut runner = TestRunner::deterministic();
    let mut reached = Reached::default();
    for _ in 0..40 {
        let histories = proptest::collection::vec(step(), 300..400);
        let steps = histories.new_tree(&mut runner).unwrap().current();
        let (mut both, mut gone) = (Both::new(None), BTreeSet::new());
        for step in &steps {
            let before = both.literal.clone();
            let Some(step) = both.resolve(step) else {
                continue;
            };
            both.step(&step);
            reached.look(&step, &before, &both.literal, &gone);
            gone.extend(held(&before).difference(&held(&both.literal)).copied());
        }
    }
    println!("{:#?}", reached.0);
    assert_eq!(reached.0.len(), 18);
    let rare: Vec<_> = reached.0.iter().filter(|(_, count)| **count < 40).collect();
    assert!(rare.is_empty(), "hardly ever reached: {rare:?}");
}
