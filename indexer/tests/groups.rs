//! Cache groups, ranks and larger blocks beside a literal reading of the same events: a map from (source, tier, group,
//! block) to copies, and each group's rule tried for every depth.
#![cfg(test)]

use std::collections::{BTreeMap, BTreeSet};

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, PodName, Tier};
use kvfabric_indexer::adapter::{
    CacheGroup, GroupRule, RemovedBlocks, SourceEvent, SourceKind, StoredBlocks,
};
use kvfabric_indexer::index::{
    Answer, BYTES_MIN, IndexConfig, KvIndex, Query, SourceId, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;
use proptest::prelude::*;

/// Tokens a block of the index.
const UNIT: u32 = 4;
/// Prompts are paths of this length in a binary tree.
const DEPTH: u32 = 8;

const FULL: GroupRule = GroupRule::Full;
const STATE: GroupRule = GroupRule::State;

const fn window(tokens: u32) -> GroupRule {
    GroupRule::Window { tokens }
}

/// An engine: its pod and rank, what its events name as groups, and how many blocks of the index each group's have.
struct Engine {
    pod: &'static str,
    rank: Option<u32>,
    groups: &'static [(Option<u32>, GroupRule, u32)],
}

const fn engine(
    pod: &'static str,
    rank: Option<u32>,
    groups: &'static [(Option<u32>, GroupRule, u32)],
) -> Engine {
    Engine { pod, rank, groups }
}

const ENGINES: [Engine; 10] = [
    engine("plain", None, &[(None, FULL, 1)]),
    engine("large", None, &[(None, FULL, 2)]),
    // Needs ceil(8 / 4) blocks.
    engine(
        "window",
        None,
        &[(Some(0), FULL, 1), (Some(1), window(9), 1)],
    ),
    engine(
        "hybrid",
        None,
        &[
            (Some(0), window(6), 1),
            (Some(1), FULL, 1),
            (Some(2), STATE, 1),
        ],
    ),
    engine("only-window", None, &[(Some(0), window(12), 1)]),
    // Needs ceil(16 / 8) of its own blocks.
    engine(
        "both-large",
        None,
        &[(Some(3), FULL, 2), (Some(7), window(17), 2)],
    ),
    engine("two-full", None, &[(Some(0), FULL, 1), (Some(1), FULL, 2)]),
    engine("ranks", Some(0), &[(Some(0), FULL, 1)]),
    engine("ranks", Some(3), &[(Some(0), FULL, 1)]),
    engine("ranks", Some(1), &[(Some(0), FULL, 1), (Some(1), STATE, 1)]),
];

/// A block of a group: the way to its end from the root, one bit per block of the index.
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

    /// All engines hash alike, and all groups of one name a block by its end.
    const fn hash(self) -> EngineHash {
        EngineHash((self.depth as u64) << 32 | self.path as u64 | 1 << 60)
    }

    fn tokens(self) -> Vec<u32> {
        (1..=self.depth)
            .flat_map(|depth| [self.path >> (depth - 1) & 1, 7, 7, depth])
            .collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Blocks from the root to an end; those whose bit is not set are not kept where a group may have holes.
    Store {
        engine: usize,
        group: usize,
        last: End,
        kept: u32,
        tier: Tier,
    },
    Remove {
        engine: usize,
        group: usize,
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
    // Few branches, so that what is removed was often stored.
    (1..=DEPTH, 0..4_u32).prop_map(|(depth, path)| End::new(depth, path))
}

fn step() -> impl Strategy<Value = Step> {
    let engine = 0..ENGINES.len();
    let tier = || prop_oneof![2 => Just(Tier::Device), 1 => Just(Tier::Host)];
    prop_oneof![
        30 => (engine.clone(), 0..3_usize, end(), any::<u32>(), tier())
            .prop_map(|(engine, group, last, kept, tier)| Step::Store {
                engine, group: group % ENGINES[engine].groups.len(), last, kept, tier
            }),
        20 => (engine.clone(), 0..3_usize, end(), tier()).prop_map(|(engine, group, end, tier)| {
            Step::Remove { engine, group: group % ENGINES[engine].groups.len(), end, tier }
        }),
        1 => engine.clone().prop_map(Step::Clear),
        1 => engine.clone().prop_map(Step::Restart),
        1 => engine.clone().prop_map(Step::Replace),
        2 => engine.prop_map(Step::Resume),
    ]
}

/// Copies by group, tier and block.
type Copies = BTreeMap<(usize, Tier, End), u32>;

struct Both {
    index: KvIndex,
    ids: Vec<SourceId>,
    literal: Vec<Copies>,
    answer: Answer,
}

fn spec(engine: usize) -> SourceSpec {
    SourceSpec {
        pod: PodName::new(ENGINES[engine].pod).unwrap(),
        name: format!("engine-{engine}"),
        kind: SourceKind::Vllm,
        block_size: UNIT,
    }
}

/// The groups that an engine is told to have, as events name them.
fn groups_of(engine: usize) -> Vec<CacheGroup> {
    let groups = ENGINES[engine].groups.iter();
    groups
        .filter_map(|(number, rule, stride)| {
            Some(CacheGroup {
                number: (*number)?,
                rule: *rule,
                block_size: UNIT * stride,
            })
        })
        .collect()
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

impl Both {
    fn new() -> Self {
        let index = KvIndex::new(config());
        let mut both = Self {
            index,
            ids: Vec::new(),
            literal: vec![Copies::new(); ENGINES.len()],
            answer: Answer::default(),
        };
        for engine in 0..ENGINES.len() {
            let id = both.add(engine);
            both.ids.push(id);
        }
        both
    }

    fn add(&self, engine: usize) -> SourceId {
        let id = self.index.add_source(spec(engine)).unwrap();
        self.index.set_rank(id, ENGINES[engine].rank).unwrap();
        self.index.set_groups(id, &groups_of(engine)).unwrap();
        id
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Store {
                engine,
                group,
                last,
                kept,
                tier,
            } => {
                self.store(engine, group, last, kept, tier);
            }
            Step::Remove {
                engine,
                group,
                end,
                tier,
            } => {
                let event = SourceEvent::Removed(RemovedBlocks {
                    hashes: vec![end.hash()],
                    tier,
                    group: ENGINES[engine].groups[group].0,
                });
                self.index.apply(self.ids[engine], &event).unwrap();
                if let Some(copies) = self.literal[engine].get_mut(&(group, tier, end)) {
                    *copies -= 1;
                }
                self.literal[engine].retain(|_, copies| *copies > 0);
            }
            Step::Clear(engine) => {
                self.index
                    .apply(self.ids[engine], &SourceEvent::Cleared)
                    .unwrap();
                self.literal[engine].retain(|(_, tier, _), _| *tier != Tier::Device);
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
                let id = self.add(engine);
                self.ids[engine] = id;
                self.index.follow_group(id, image.group).unwrap();
                self.index.take_learnt(id, &image.learnt).unwrap();
                for piece in &image.pieces {
                    self.index.import(id, piece).unwrap();
                }
                self.index.tidy();
            }
        }
    }

    fn store(&mut self, engine: usize, group: usize, last: End, kept: u32, tier: Tier) {
        let (number, rule, stride) = ENGINES[engine].groups[group];
        let count = last.depth / stride;
        let ends: Vec<End> = (1..=count)
            .map(|end| End::new(end * stride, last.path))
            .collect();
        // Without a group that keeps every block nobody could tell which ones are left out.
        let can_skip = rule != FULL && ENGINES[engine].groups.len() > 1;
        let is_kept = |place: usize| !can_skip || kept >> place & 1 == 1;
        let kept: Vec<End> = (0..ends.len())
            .filter(|place| is_kept(*place))
            .map(|place| ends[place])
            .collect();
        let is_whole = kept.len() == ends.len() && count > 0;
        let tokens = ends.last().filter(|_| is_whole).map(|end| end.tokens());
        let event = SourceEvent::Stored(StoredBlocks {
            hashes: kept.iter().map(|end| end.hash()).collect(),
            parent: None,
            block_size: if is_whole { UNIT * stride } else { 0 },
            tokens: tokens.unwrap_or_default(),
            tier,
            group: number.map(|number| CacheGroup {
                number,
                rule,
                block_size: UNIT * stride,
            }),
            lora: None,
            cache_salt: None,
            identifiers: vec![],
        });
        self.index.apply(self.ids[engine], &event).unwrap();
        for end in kept {
            *self.literal[engine].entry((group, tier, end)).or_default() += 1;
        }
    }

    /// Where a group's block is, if the engine has it.
    fn fastest(&self, engine: usize, group: usize, end: End) -> Option<Tier> {
        let copies = &self.literal[engine];
        let tiers = [Tier::Device, Tier::Host].into_iter();
        tiers
            .filter(|tier| copies.contains_key(&(group, *tier, end)))
            .min()
    }

    /// By block of the index, the slowest of what the groups need of it for this depth; none when something is missing.
    fn tiers(&self, engine: usize, prompt: End, depth: u32) -> Option<Vec<Option<Tier>>> {
        let mut needed: Vec<Option<Tier>> = vec![None; depth as usize];
        for (group, (_, rule, stride)) in ENGINES[engine].groups.iter().enumerate() {
            if !depth.is_multiple_of(*stride) {
                return None;
            }
            let first = match rule {
                GroupRule::Full => 0,
                GroupRule::Window { tokens } => {
                    let blocks = (tokens - 1).div_ceil(UNIT * stride);
                    (depth / stride).saturating_sub(blocks) * stride
                }
                GroupRule::State => depth - 1,
                GroupRule::Nothing => depth,
            };
            for block in (first..depth).step_by(*stride as usize) {
                let end = End::new(block + stride, prompt.path);
                let tier = self.fastest(engine, group, end)?;
                for part in block..block + stride {
                    let needed = &mut needed[part as usize];
                    *needed = Some(needed.map_or(tier, |other| other.max(tier)));
                }
            }
        }
        Some(needed)
    }

    fn depth(&self, engine: usize, prompt: End) -> (u32, [u32; 4]) {
        for depth in (1..=prompt.depth).rev() {
            let Some(tiers) = self.tiers(engine, prompt, depth) else {
                continue;
            };
            let mut by_tier = [0; 4];
            let mut last = None;
            for tier in tiers.into_iter().rev() {
                last = tier.or(last);
                by_tier[last.unwrap() as usize] += 1;
            }
            return (depth, by_tier);
        }
        (0, [0; 4])
    }

    fn check(&mut self) {
        let prompts = (0..8).flat_map(|path| [DEPTH, 5].map(|depth| End::new(depth, path)));
        for prompt in prompts {
            let mut keys = Vec::new();
            self.index.keys_of(None, None, &prompt.tokens(), &mut keys);
            let mut wanted: Vec<(String, u32, [u32; 4])> = Vec::new();
            let pods: BTreeSet<&str> = ENGINES.iter().map(|engine| engine.pod).collect();
            for pod in pods {
                let mut ranks: Vec<usize> = (0..ENGINES.len())
                    .filter(|engine| ENGINES[*engine].pod == pod)
                    .collect();
                ranks.sort_by_key(|engine| ENGINES[*engine].rank);
                let depths = ranks.into_iter().map(|engine| self.depth(engine, prompt));
                let mut best = (0, [0; 4]);
                for depth in depths {
                    if depth.0 > best.0 {
                        best = depth;
                    }
                }
                if best.0 > 0 {
                    wanted.push((pod.to_owned(), best.0, best.1));
                }
            }
            wanted.sort_by_key(|(pod, depth, _)| (std::cmp::Reverse(*depth), pod.clone()));
            self.index
                .lookup(&keys, &Query::default(), &mut self.answer);
            assert_eq!(self.found(), wanted, "{prompt:?}");
            let two = Query {
                pods_max: 2,
                pods: &[],
            };
            self.index.lookup(&keys, &two, &mut self.answer);
            assert_eq!(self.found(), wanted[..wanted.len().min(2)]);
            let one = [PodName::new("ranks").unwrap()];
            let one = Query {
                pods_max: 0,
                pods: &one,
            };
            self.index.lookup(&keys, &one, &mut self.answer);
            wanted.retain(|(pod, ..)| pod == "ranks");
            assert_eq!(self.found(), wanted);
            if let Some(pod) = self.answer.pods.first() {
                for part in &pod.parts {
                    let is_part = |engine: &&Engine| engine.rank == part.rank;
                    let engine = ENGINES
                        .iter()
                        .position(|engine| is_part(&engine) && engine.pod == "ranks");
                    assert_eq!(
                        (part.depth, part.by_tier),
                        self.depth(engine.unwrap(), prompt)
                    );
                }
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
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Long random histories of engines of every make; after each fifth event every prompt is asked for.
    #[test]
    fn a_prefix_counts_only_as_far_as_every_groups_rule_allows(
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut both = Both::new();
        for (position, step) in steps.iter().enumerate() {
            both.step(step);
            if position % 5 == 4 {
                both.check();
            }
        }
        both.check();
        for id in &both.ids {
            both.index.remove_source(*id);
        }
        prop_assert_eq!((both.index.entries(), both.index.blocks()), (0, 0));
    }
}

/// One long prompt of an engine whose blocks are as large as the index's, and of one whose are twice as large.
#[test]
fn a_larger_block_takes_no_more_memory_than_any_other() {
    const BLOCKS: u32 = 200_000;
    let bytes_per_block = |engine: usize| {
        let both = Both::new();
        let before = both.index.bytes();
        let size = UNIT * ENGINES[engine].groups[0].2;
        for first in (0..BLOCKS).step_by(1000) {
            let event = SourceEvent::Stored(StoredBlocks {
                hashes: (first..first + 1000)
                    .map(|block| EngineHash(u64::from(block) + 1))
                    .collect(),
                parent: (first > 0).then(|| EngineHash(u64::from(first))),
                tokens: (first * size..(first + 1000) * size).collect(),
                block_size: size,
                tier: Tier::Device,
                group: None,
                lora: None,
                cache_salt: None,
                identifiers: vec![],
            });
            let applied = both.index.apply(both.ids[engine], &event).unwrap();
            assert_eq!(applied.stored, 1000);
        }
        (both.index.bytes() - before) / u64::from(BLOCKS)
    };
    let (plain, large) = (bytes_per_block(0), bytes_per_block(1));
    assert!(
        large <= plain + plain / 4,
        "{large} bytes, {plain} of others"
    );
}

/// Ten blocks of a long prompt, of one of an engine's groups.
fn ten_blocks(engine: usize, first: u32, group: usize) -> SourceEvent {
    let (number, rule, _) = ENGINES[engine].groups[group];
    let hashes = (first..first + 10).map(|block| EngineHash(u64::from(block) + 1));
    SourceEvent::Stored(StoredBlocks {
        hashes: hashes.collect(),
        parent: (first > 0).then(|| EngineHash(u64::from(first))),
        tokens: (first * UNIT..(first + 10) * UNIT).collect(),
        block_size: UNIT,
        tier: Tier::Device,
        group: number.map(|number| CacheGroup {
            number,
            rule,
            block_size: UNIT,
        }),
        lora: None,
        cache_salt: None,
        identifiers: vec![],
    })
}

/// What a block of a window takes beside one of the main group: of a window that keeps every block, and of one that keeps
/// the last 64 of a prompt that grows.
#[test]
fn a_block_of_a_window_takes_little_beside_the_main_groups() {
    const BLOCKS: u32 = 100_000;
    // In bytes.
    const BLOCK_MAX: u64 = 60;
    let window = ENGINES
        .iter()
        .position(|engine| engine.pod == "window")
        .unwrap();
    let fill = |both: &Both, groups: usize, kept: u32| {
        let before = both.index.bytes();
        for first in (0..BLOCKS).step_by(10) {
            for group in 0..groups {
                both.index
                    .apply(both.ids[window], &ten_blocks(window, first, group))
                    .unwrap();
            }
            if groups == 2 && first >= kept {
                let gone = first - kept..first - kept + 10;
                let event = SourceEvent::Removed(RemovedBlocks {
                    hashes: gone.map(|block| EngineHash(u64::from(block) + 1)).collect(),
                    tier: Tier::Device,
                    group: ENGINES[window].groups[1].0,
                });
                assert_eq!(
                    both.index.apply(both.ids[window], &event).unwrap().removed,
                    10
                );
            }
        }
        both.index.bytes() - before
    };
    let (main, whole, sliding) = (Both::new(), Both::new(), Both::new());
    let alone = fill(&main, 1, 0);
    let beside = fill(&whole, 2, u32::MAX) - alone;
    let each = beside / u64::from(BLOCKS);
    assert!(
        each <= BLOCK_MAX,
        "{each} bytes a block beside the main group's"
    );
    // Of what slid out of the window nothing is left but what tables take in steps of megabytes.
    let slid = fill(&sliding, 2, 60).saturating_sub(alone);
    assert!(slid <= 3 << 20, "{slid} bytes of a window of 60 blocks");
    println!("{each} bytes a block of a window; {slid} bytes of one that slides");
    for both in [&whole, &sliding] {
        let mut keys = Vec::new();
        both.index.keys_of(
            None,
            None,
            &(0..BLOCKS * UNIT).collect::<Vec<u32>>(),
            &mut keys,
        );
        let mut answer = Answer::default();
        both.index.lookup(&keys, &Query::default(), &mut answer);
        assert_eq!(answer.pods[0].depth, BLOCKS);
    }
}

/// A window and a main group in an index with a bound, which takes what was used least recently of both.
#[test]
fn windows_are_given_up_like_other_blocks() {
    let index = KvIndex::bounded(config(), BYTES_MIN).unwrap();
    let window = ENGINES
        .iter()
        .position(|engine| engine.pod == "window")
        .unwrap();
    let id = index.add_source(spec(window)).unwrap();
    index.set_groups(id, &groups_of(window)).unwrap();
    const PROMPT: u32 = 100;
    let tokens =
        |prompt: u32| -> Vec<u32> { (0..PROMPT * UNIT).map(|token| token + prompt).collect() };
    let depth = |prompt: u32| {
        let (mut keys, mut answer) = (Vec::new(), Answer::default());
        index.keys_of(None, None, &tokens(prompt), &mut keys);
        index.lookup(&keys, &Query::default(), &mut answer);
        answer.pods.first().map_or(0, |found| found.depth)
    };
    for prompt in 0..5_000 {
        for group in groups_of(window) {
            let first = u64::from(prompt * PROMPT);
            let event = SourceEvent::Stored(StoredBlocks {
                hashes: (first..first + u64::from(PROMPT))
                    .map(|hash| EngineHash(hash + 1))
                    .collect(),
                parent: None,
                tokens: tokens(prompt),
                block_size: UNIT,
                tier: Tier::Device,
                group: Some(group),
                lora: None,
                cache_salt: None,
                identifiers: vec![],
            });
            index.apply(id, &event).unwrap();
            assert!(index.bytes() <= BYTES_MIN);
        }
        assert_eq!(depth(prompt), PROMPT, "what was stored last is there");
    }
    assert!(index.usage().evicted_blocks > 0);
    // Whatever is left of the first ones is nothing that the rule does not allow.
    assert_eq!(depth(0), 0);
    index.remove_source(id);
    index.tidy();
    assert_eq!((index.entries(), index.blocks()), (0, 0));
}
