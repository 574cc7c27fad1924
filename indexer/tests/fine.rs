//! Engines whose blocks are smaller than the index's, beside a literal reading of the same events: a map from (engine,
//! tier, block) to copies; a block of the index is held when each of its parts is, where the slowest of them is.
#![cfg(test)]

use std::collections::BTreeMap;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, ErrorKind, PodName, Tier};
use kvfabric_indexer::adapter::{
    CacheGroup, GroupRule, RemovedBlocks, SourceEvent, SourceKind, StoredBlocks,
};
use kvfabric_indexer::index::{
    Answer, BYTES_MIN, ImagePart, IndexConfig, KvIndex, Query, SourceId, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;
use proptest::prelude::*;

/// Tokens of a quarter of the index's block: the smallest that any engine here has.
const QUARTER: u32 = 2;
/// Tokens a block of the index.
const UNIT: u32 = 4 * QUARTER;
/// The longest prompt, in quarters.
const DEPTH: u32 = 16;

/// An engine: its kind, how many quarters its blocks have, and what its hashes begin with.
struct Engine {
    kind: SourceKind,
    quarters: u32,
    seed: u64,
}

const fn engine(kind: SourceKind, quarters: u32, seed: u64) -> Engine {
    Engine {
        kind,
        quarters,
        seed,
    }
}

const ENGINES: [Engine; 6] = [
    engine(SourceKind::Vllm, 4, 1),
    engine(SourceKind::Vllm, 2, 2),
    engine(SourceKind::Vllm, 2, 2),
    engine(SourceKind::Vllm, 2, 3),
    engine(SourceKind::Sglang, 1, 4),
    engine(SourceKind::Vllm, 1, 5),
];

/// A place in a prompt: the way there from the start, one bit per quarter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct End {
    depth: u32,
    path: u32,
}

impl End {
    const fn new(depth: u32, path: u32) -> Self {
        Self {
            depth,
            path: path & ((1 << depth) - 1),
        }
    }

    const fn hash(self, engine: usize) -> EngineHash {
        let seed = ENGINES[engine].seed << 56;
        EngineHash(seed | (self.depth as u64) << 32 | self.path as u64)
    }

    /// From a depth on.
    fn tokens(self, from: u32) -> Vec<u32> {
        (from..self.depth)
            .flat_map(|quarter| [self.path >> quarter & 1, quarter])
            .collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Blocks of a prompt, from the `from`th of the engine's on, whatever is before them.
    Store {
        engine: usize,
        from: u32,
        last: End,
        tier: Tier,
    },
    Remove {
        engine: usize,
        end: End,
        tier: Tier,
    },
    Clear(usize),
    Restart(usize),
    Replace(usize),
    /// Another source goes on from its image.
    Resume(usize),
}

fn end() -> impl Strategy<Value = End> {
    // Few branches, at the start of a block, in its middle and late.
    (1..=DEPTH, 0..16_u32).prop_map(|(depth, bits)| {
        let path = bits & 1 | (bits & 2) << 1 | (bits & 4) << 4 | (bits & 8) << 8;
        End::new(depth, path)
    })
}

fn step() -> impl Strategy<Value = Step> {
    let engine = 0..ENGINES.len();
    let tier = || prop_oneof![3 => Just(Tier::Device), 2 => Just(Tier::Host)];
    // Mostly from the start, as engines do.
    let from = prop_oneof![2 => Just(0_u32), 1 => 0..DEPTH];
    prop_oneof![
        30 => (engine.clone(), from, end(), tier())
            .prop_map(|(engine, from, last, tier)| Step::Store { engine, from, last, tier }),
        30 => (engine.clone(), end(), tier())
            .prop_map(|(engine, end, tier)| Step::Remove { engine, end, tier }),
        1 => engine.clone().prop_map(Step::Clear),
        1 => engine.clone().prop_map(Step::Restart),
        1 => engine.clone().prop_map(Step::Replace),
        2 => engine.prop_map(Step::Resume),
    ]
}

/// Copies by tier and block.
type Copies = BTreeMap<(Tier, End), u32>;

struct Both {
    index: KvIndex,
    ids: Vec<SourceId>,
    literal: Vec<Copies>,
    answer: Answer,
}

fn config() -> IndexConfig {
    IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: UNIT.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: 10_000,
    }
}

fn pod(engine: usize) -> PodName {
    PodName::new(&format!("pod-{engine}")).unwrap()
}

impl Both {
    fn new(index: KvIndex) -> Self {
        let mut both = Self {
            index,
            ids: Vec::new(),
            literal: vec![Copies::new(); ENGINES.len()],
            answer: Answer::default(),
        };
        both.ids = (0..ENGINES.len()).map(|engine| both.add(engine)).collect();
        both
    }

    fn add(&self, engine: usize) -> SourceId {
        let spec = SourceSpec {
            pod: pod(engine),
            name: "engine".to_owned(),
            kind: ENGINES[engine].kind,
            // What is registered may be wrong: the first event says.
            block_size: if engine == 2 {
                UNIT
            } else {
                ENGINES[engine].quarters * QUARTER
            },
        };
        self.index.add_source(spec).unwrap()
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Store {
                engine,
                from,
                last,
                tier,
            } => self.store(engine, from, last, tier),
            Step::Remove { engine, end, tier } => {
                let depth = end.depth.next_multiple_of(ENGINES[engine].quarters);
                let end = End::new(depth, end.path);
                let event = SourceEvent::Removed(RemovedBlocks {
                    hashes: vec![end.hash(engine)],
                    tier,
                    group: None,
                });
                self.index.apply(self.ids[engine], &event).unwrap();
                let copies = &mut self.literal[engine];
                if let Some(copies) = copies.get_mut(&(tier, end)) {
                    *copies -= 1;
                }
                copies.retain(|_, copies| *copies > 0);
            }
            Step::Clear(engine) => {
                self.index
                    .apply(self.ids[engine], &SourceEvent::Cleared)
                    .unwrap();
                let is_all = ENGINES[engine].kind == SourceKind::Sglang;
                self.literal[engine].retain(|(tier, _), _| !is_all && *tier != Tier::Device);
            }
            Step::Restart(engine) => {
                self.index.clear_source(self.ids[engine]);
                self.literal[engine].clear();
            }
            Step::Replace(engine) => {
                self.index.remove_source(self.ids[engine]);
                self.ids[engine] = self.add(engine);
                self.literal[engine].clear();
            }
            Step::Resume(engine) => {
                let image = self.index.export(self.ids[engine]).unwrap();
                self.index.remove_source(self.ids[engine]);
                self.ids[engine] = self.add(engine);
                let id = self.ids[engine];
                self.index.take_learnt(id, &image.learnt).unwrap();
                for piece in &image.pieces {
                    let applied = self.index.import(id, piece).unwrap();
                    assert_eq!(applied.refused, 0, "{piece:?}");
                }
                self.index.tidy();
            }
        }
    }

    fn store(&mut self, engine: usize, from: u32, last: End, tier: Tier) {
        let quarters = ENGINES[engine].quarters;
        let count = last.depth / quarters;
        let from = from.min(count);
        let ends: Vec<End> = (from + 1..=count)
            .map(|end| End::new(end * quarters, last.path))
            .collect();
        let Some(end) = ends.last() else {
            return;
        };
        let parent = End::new(from * quarters, last.path);
        let event = SourceEvent::Stored(StoredBlocks {
            hashes: ends.iter().map(|end| end.hash(engine)).collect(),
            parent: (from > 0).then(|| parent.hash(engine)),
            block_size: quarters * QUARTER,
            tokens: end.tokens(from * quarters),
            tier,
            group: None,
            lora: None,
            cache_salt: None,
            identifiers: vec![],
        });
        self.index.apply(self.ids[engine], &event).unwrap();
        for end in ends {
            let copies = self.literal[engine].entry((tier, end)).or_default();
            *copies = if ENGINES[engine].kind.is_counted() {
                *copies + 1
            } else {
                1
            };
        }
    }

    /// By block of the index, where the slowest of its parts is, up to the first that has none.
    fn literal(&self, engine: usize, prompt: End) -> Vec<Tier> {
        let quarters = ENGINES[engine].quarters;
        let part = |depth: u32| {
            let end = End::new(depth, prompt.path);
            let mut tiers = [Tier::Device, Tier::Host].into_iter();
            tiers.find(|tier| self.literal[engine].contains_key(&(*tier, end)))
        };
        let block = |block: u32| {
            let mut slowest = Tier::Device;
            for depth in (4 * block + quarters..=4 * block + 4).step_by(quarters as usize) {
                slowest = slowest.max(part(depth)?);
            }
            Some(slowest)
        };
        (0..prompt.depth / 4).map_while(block).collect()
    }

    fn found(&mut self, prompt: End) -> Vec<(u32, [u32; 4])> {
        let mut keys = Vec::new();
        self.index.keys_of(None, None, &prompt.tokens(0), &mut keys);
        self.index
            .lookup(&keys, &Query::default(), &mut self.answer);
        let of = |engine: usize| {
            let mut pods = self.answer.pods.iter();
            let found = pods.find(|found| found.pod == pod(engine));
            found.map_or((0, [0; 4]), |found| (found.depth, found.by_tier))
        };
        (0..ENGINES.len()).map(of).collect()
    }

    /// Compares all engines; `is_exact` when nothing was given up.
    fn check(&mut self, prompt: End, is_exact: bool) -> Result<u32, TestCaseError> {
        let found = self.found(prompt);
        for (engine, (depth, by_tier)) in found.iter().enumerate() {
            let literal = self.literal(engine, prompt);
            if is_exact {
                let mut expected = [0; 4];
                literal
                    .iter()
                    .for_each(|tier| expected[*tier as usize] += 1);
                prop_assert_eq!(
                    (*depth, *by_tier),
                    (literal.len() as u32, expected),
                    "engine {} at {:?}",
                    engine,
                    prompt
                );
            } else {
                prop_assert!(
                    *depth <= literal.len() as u32,
                    "engine {engine} at {prompt:?}"
                );
            }
        }
        Ok(found.iter().skip(1).map(|(depth, _)| depth).sum())
    }

    /// Everybody goes: nothing is left.
    fn end(mut self) -> Result<(), TestCaseError> {
        for id in std::mem::take(&mut self.ids) {
            self.index.remove_source(id);
        }
        prop_assert_eq!((self.index.entries(), self.index.blocks()), (0, 0));
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Random histories over engines of three sizes, two of which share their names.
    #[test]
    fn blocks_of_smaller_parts_are_held_as_a_literal_reading_says(
        steps in prop::collection::vec((step(), end()), 1..120)
    ) {
        let mut both = Both::new(KvIndex::new(config()));
        for (step, prompt) in &steps {
            both.step(step);
            both.check(*prompt, true)?;
            both.check(End::new(DEPTH, prompt.path), true)?;
        }
        both.end()?;
    }

    /// The same with blocks given up in between: answers are shorter then, never longer, and whoever begins anew is whole.
    #[test]
    fn what_is_given_up_of_smaller_blocks_is_missed_and_never_invented(
        steps in prop::collection::vec((step(), end(), 0..12_usize), 1..120)
    ) {
        let mut both = Both::new(KvIndex::bounded(config(), BYTES_MIN).unwrap());
        for (step, prompt, evicted) in &steps {
            both.step(step);
            both.index.evict(evicted.saturating_sub(8));
            both.check(*prompt, false)?;
        }
        for engine in 0..ENGINES.len() {
            both.step(&Step::Restart(engine));
        }
        for (step, prompt, _) in &steps {
            both.step(step);
            both.check(*prompt, true)?;
        }
        both.end()?;
    }
}

/// Sizes that fit no whole number of times, of a registration and of events; and several cache groups.
#[test]
fn sizes_that_cannot_be_meant_are_refused_with_both_sizes() {
    let index = KvIndex::new(config());
    let spec = |name: &str, block_size| SourceSpec {
        pod: PodName::new("p").unwrap(),
        name: name.to_owned(),
        kind: SourceKind::Vllm,
        block_size,
    };
    for odd in [0, 3, 5, 12] {
        let error = index.add_source(spec("odd", odd)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let said = error.to_string();
        assert!(
            said.contains(&format!("{odd} tokens")) && said.contains('8'),
            "{said}"
        );
    }
    let node = SourceSpec {
        kind: SourceKind::Node,
        ..spec("node", 4)
    };
    assert!(
        index.add_source(node).is_err(),
        "a node's blocks are the index's"
    );
    let id = index.add_source(spec("engine", 4)).unwrap();
    let event = |block_size: u32, group| {
        SourceEvent::Stored(StoredBlocks {
            hashes: vec![EngineHash(1)],
            parent: None,
            tokens: vec![7; block_size as usize],
            block_size,
            tier: Tier::Device,
            group,
            lora: None,
            cache_salt: None,
            identifiers: vec![],
        })
    };
    index.apply(id, &event(4, None)).unwrap();
    let said = index.apply(id, &event(2, None)).unwrap_err().to_string();
    assert!(
        said.contains("2 tokens") && said.contains("source's 4"),
        "{said}"
    );
    let window = CacheGroup {
        number: 1,
        rule: GroupRule::Window { tokens: 9 },
        block_size: 4,
    };
    let said = index
        .apply(id, &event(4, Some(window)))
        .unwrap_err()
        .to_string();
    assert!(said.contains("cache group 1"), "{said}");
}

/// Parts that begin elsewhere than they say, with tokens that are not theirs, without what they follow, or twice: each is
/// refused by itself, and what follows it too.
#[test]
fn parts_of_an_image_that_do_not_fit_are_refused() {
    let mut both = Both::new(KvIndex::new(config()));
    both.store(1, 0, End::new(8, 0), Tier::Device);
    let image = both.index.export(both.ids[1]).unwrap();
    let piece = &image.pieces[0];
    assert_eq!(
        (image.pieces.len(), piece.parts.len(), piece.blocks.len()),
        (1, 4, 0)
    );
    let refused = |change: &dyn Fn(&mut Vec<ImagePart>)| {
        let both = Both::new(KvIndex::new(config()));
        let mut piece = piece.clone();
        change(&mut piece.parts);
        let applied = both.index.import(both.ids[1], &piece).unwrap();
        (applied.refused, applied.stored)
    };
    assert_eq!(refused(&|_| ()), (0, 2));
    assert_eq!(refused(&|parts| drop(parts.remove(0))), (3, 0));
    assert_eq!(refused(&|parts| parts[2].tokens.push(1)), (2, 1));
    assert_eq!(refused(&|parts| parts[3].key = None), (1, 1));
    assert_eq!(refused(&|parts| parts[1].parent = None), (3, 0));
    assert_eq!(refused(&|parts| parts.push(parts[3].clone())), (1, 2));
    assert_eq!(refused(&|parts| parts[3].copies = [0; 4]), (0, 1));
    let mut astray = piece.clone();
    astray.parts[0].namespace = 7;
    let error = both.index.import(both.ids[1], &astray).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    // The source's blocks are not smaller, as far as is known.
    assert_eq!(both.index.import(both.ids[0], piece).unwrap().refused, 4);
}
