//! Workload KVI-1: no randomness and no seed, so that every index that is measured with it sees the same blocks.
//!
//! 64 workers store sequences of blocks. A sequence is one of 200 prompts of 64 blocks and a tail of 64 to 512 blocks
//! of its own; 8 sequences of each worker have tails of 1,088. A worker tells of a prompt once, when it first uses it,
//! then of the tail, in events of at most 16 blocks of one sort; workers take turns, one event each. With R replicas,
//! groups of R workers store the same sequences. Block content is a mix of small numbers; a block's key is the XXH3
//! chain of the contents up to it.
//!
//! This file depends on nothing of ours: the rivals' package includes it too.

use std::ops::Range;

/// Who stores blocks.
pub(super) const WORKERS: u32 = 64;
/// Sequences a worker in the workload's real size.
pub(super) const SEQUENCES_FULL: u32 = 500;
/// Blocks an event.
pub(super) const EVENT_BLOCKS: usize = 16;
const PROMPTS: u32 = 200;
const PROMPT_BLOCKS: usize = 64;
const DEEP_SEQUENCES: u32 = 8;
const DEEP_TAIL_BLOCKS: usize = 1088;
const TAIL_BLOCKS: Range<usize> = 64..513;
const CHAIN_SEED: u64 = 1337;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What each number of a mix is for.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Purpose {
    Prompt = 1,
    TailLength = 2,
    PromptBlock = 3,
    TailBlock = 4,
    Query = 5,
    Unknown = 6,
}

/// SplitMix64's mixing function.
pub(super) const fn scramble(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// One step of SplitMix64.
pub(super) const fn step(state: u64) -> u64 {
    scramble(state.wrapping_add(GOLDEN))
}

fn mix(purpose: Purpose, a: u64, b: u64) -> u64 {
    step(step(step(purpose as u64) ^ a) ^ b)
}

/// The key of the block with this content after `parent`.
pub(super) fn chain(parent: Option<u64>, content: u64) -> u64 {
    let Some(parent) = parent else {
        return content;
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&parent.to_le_bytes());
    bytes[8..].copy_from_slice(&content.to_le_bytes());
    xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, CHAIN_SEED)
}

/// A block, by what is in it and by all that leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) content: u64,
    pub(super) key: u64,
}

/// A worker has stored some blocks of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) worker: u32,
    pub(super) parent: Option<u64>,
    pub(super) blocks: Vec<Block>,
}

/// The workload in some size.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    sequences: u32,
    replicas: u32,
    event_blocks: usize,
    prompts: Vec<Vec<Block>>,
}

impl Workload {
    pub(super) fn new(sequences: u32, replicas: u32, event_blocks: usize) -> Self {
        assert!(
            sequences > 0 && replicas > 0 && event_blocks > 0,
            "an empty workload"
        );
        assert!(
            WORKERS.is_multiple_of(replicas),
            "{replicas} replicas of {WORKERS} workers"
        );
        let prompt = |number: u32| {
            let contents = (0..PROMPT_BLOCKS).map(|at| prompt_content(number, at));
            let mut parent = None;
            let blocks = contents.map(|content| {
                let key = chain(parent, content);
                parent = Some(key);
                Block { content, key }
            });
            blocks.collect()
        };
        let prompts = (0..PROMPTS).map(prompt).collect();
        Self {
            sequences,
            replicas,
            event_blocks,
            prompts,
        }
    }

    /// Every sequence, the deep ones last.
    fn all(&self) -> Range<u32> {
        0..self.sequences + DEEP_SEQUENCES
    }

    fn group(&self, worker: u32) -> u32 {
        worker / self.replicas
    }

    fn prompt(&self, group: u32, sequence: u32) -> usize {
        (mix(Purpose::Prompt, group.into(), sequence.into()) % u64::from(PROMPTS)) as usize
    }

    fn tail_blocks(&self, group: u32, sequence: u32) -> usize {
        if (self.sequences..self.sequences + DEEP_SEQUENCES).contains(&sequence) {
            return DEEP_TAIL_BLOCKS;
        }
        let more = mix(Purpose::TailLength, group.into(), sequence.into());
        TAIL_BLOCKS.start + (more % TAIL_BLOCKS.len() as u64) as usize
    }

    /// Everything that is stored at first.
    pub(super) fn events(&self) -> Events<'_> {
        Events::new(self, self.all(), false)
    }

    /// A fifth more, to be stored beside lookups.
    pub(super) fn extra_events(&self) -> Events<'_> {
        let start = self.all().end;
        Events::new(self, start..start + self.sequences.div_ceil(5), true)
    }

    /// Blocks of each part of a worker's sequences: a prompt when it is first used, each tail.
    fn parts(&self, worker: u32) -> impl Iterator<Item = usize> + '_ {
        let group = self.group(worker);
        let mut seen = vec![false; PROMPTS as usize];
        self.all().flat_map(move |sequence| {
            let is_known = std::mem::replace(&mut seen[self.prompt(group, sequence)], true);
            let prompt = if is_known { 0 } else { PROMPT_BLOCKS };
            [prompt, self.tail_blocks(group, sequence)]
        })
    }

    /// Pairs of a worker and a block that it stores.
    pub(super) fn pairs(&self) -> u64 {
        (0..WORKERS)
            .flat_map(|worker| self.parts(worker))
            .sum::<usize>() as u64
    }

    /// How many events that takes.
    pub(super) fn events_count(&self) -> u64 {
        let events = (0..WORKERS)
            .flat_map(|worker| self.parts(worker))
            .map(|blocks| blocks.div_ceil(self.event_blocks));
        events.sum::<usize>() as u64
    }

    /// The contents of a prompt of `blocks`, of which exactly the first `matching` are stored.
    pub(super) fn query(&self, number: u64, blocks: usize, matching: usize) -> Vec<u64> {
        assert!(
            matching <= PROMPT_BLOCKS + DEEP_TAIL_BLOCKS,
            "nobody stores {matching} blocks"
        );
        let groups = u64::from(WORKERS / self.replicas);
        let size = (blocks * 4096 + matching) as u64;
        let mut tried = 0;
        let (group, sequence) = loop {
            let choice = mix(
                Purpose::Query,
                number.wrapping_mul(131).wrapping_add(tried),
                size,
            );
            let group = (choice % groups) as u32;
            if matching > PROMPT_BLOCKS + TAIL_BLOCKS.end - 1 {
                let deep = step(choice) % u64::from(DEEP_SEQUENCES);
                break (group, self.sequences + deep as u32);
            }
            let sequence = (step(choice) % u64::from(self.sequences)) as u32;
            if PROMPT_BLOCKS + self.tail_blocks(group, sequence) >= matching {
                break (group, sequence);
            }
            tried += 1;
        };
        let prompt = &self.prompts[self.prompt(group, sequence)];
        (0..blocks)
            .map(|at| match at {
                at if at >= matching => mix(
                    Purpose::Unknown,
                    number,
                    at as u64 + ((blocks as u64) << 32),
                ),
                at if at < PROMPT_BLOCKS => prompt[at].content,
                at => tail_content(group, sequence, at - PROMPT_BLOCKS),
            })
            .collect()
    }
}

fn prompt_content(prompt: u32, at: usize) -> u64 {
    mix(Purpose::PromptBlock, prompt.into(), at as u64)
}

fn tail_content(group: u32, sequence: u32, at: usize) -> u64 {
    let owner = u64::from(group) << 32 | u64::from(sequence);
    mix(Purpose::TailBlock, owner, at as u64)
}

/// Events of all workers in turns.
pub(super) struct Events<'a> {
    workload: &'a Workload,
    workers: Vec<Worker>,
    turn: usize,
}

/// How far a worker is.
struct Worker {
    sequences: Range<u32>,
    knows_prompt: Vec<bool>,
    /// The next block of the first sequence left, and the key before it; none when it has yet to begin.
    next: Option<(usize, Option<u64>)>,
}

impl<'a> Events<'a> {
    fn new(workload: &'a Workload, sequences: Range<u32>, is_later: bool) -> Self {
        let worker = |number| {
            let mut knows_prompt = vec![false; PROMPTS as usize];
            if is_later {
                let group = workload.group(number);
                for sequence in workload.all() {
                    knows_prompt[workload.prompt(group, sequence)] = true;
                }
            }
            Worker {
                sequences: sequences.clone(),
                knows_prompt,
                next: None,
            }
        };
        Self {
            workload,
            workers: (0..WORKERS).map(worker).collect(),
            turn: 0,
        }
    }

    /// The next event of a worker; none when it has told everything.
    fn advance(&mut self, number: u32) -> Option<Stored> {
        let workload = self.workload;
        let group = workload.group(number);
        let worker = &mut self.workers[number as usize];
        if worker.sequences.is_empty() {
            return None;
        }
        let sequence = worker.sequences.start;
        let prompt = workload.prompt(group, sequence);
        let blocks = &workload.prompts[prompt];
        let (at, parent) = worker.next.take().unwrap_or_else(|| {
            if std::mem::replace(&mut worker.knows_prompt[prompt], true) {
                (PROMPT_BLOCKS, blocks.last().map(|block| block.key))
            } else {
                (0, None)
            }
        });
        let total = PROMPT_BLOCKS + workload.tail_blocks(group, sequence);
        let part_end = if at < PROMPT_BLOCKS {
            PROMPT_BLOCKS
        } else {
            total
        };
        let end = part_end.min(at + workload.event_blocks);
        let mut last = parent;
        let told = (at..end).map(|at| {
            let block = if at < PROMPT_BLOCKS {
                blocks[at]
            } else {
                let content = tail_content(group, sequence, at - PROMPT_BLOCKS);
                Block {
                    content,
                    key: chain(last, content),
                }
            };
            last = Some(block.key);
            block
        });
        let told = told.collect();
        if end == total {
            worker.sequences.start += 1;
        } else {
            worker.next = Some((end, last));
        }
        Some(Stored {
            worker: number,
            parent,
            blocks: told,
        })
    }
}

impl Iterator for Events<'_> {
    type Item = Stored;

    fn next(&mut self) -> Option<Stored> {
        for _ in 0..self.workers.len() {
            let number = self.turn as u32;
            self.turn = (self.turn + 1) % self.workers.len();
            if let Some(event) = self.advance(number) {
                return Some(event);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The counts that are published with the workload.
    #[test]
    fn the_full_workload_has_the_published_counts() {
        let full = Workload::new(SEQUENCES_FULL, 1, EVENT_BLOCKS);
        assert_eq!((full.events_count(), full.pairs()), (673_172, 10_530_536));
    }

    /// Walks every event of small workloads and compares with the counts, the chain and the order of turns.
    #[test]
    fn events_are_chains_told_in_turns() {
        for (replicas, event_blocks) in [(1, 16), (4, 16), (1, 1)] {
            let workload = Workload::new(2, replicas, event_blocks);
            let (mut events, mut pairs) = (0, HashSet::new());
            for event in workload.events() {
                if events < u64::from(WORKERS) {
                    assert_eq!(u64::from(event.worker), events);
                }
                events += 1;
                assert!((1..=event_blocks).contains(&event.blocks.len()));
                let mut parent = event.parent;
                assert!(parent.is_none_or(|key| pairs.contains(&(event.worker, key))));
                for block in &event.blocks {
                    assert_eq!(block.key, chain(parent, block.content));
                    parent = Some(block.key);
                    assert!(pairs.insert((event.worker, block.key)), "told twice");
                }
            }
            assert_eq!(
                (events, pairs.len() as u64),
                (workload.events_count(), workload.pairs())
            );
            let keys: HashSet<u64> = pairs.iter().map(|(_, key)| *key).collect();
            assert!(keys.len() * replicas as usize <= pairs.len());
        }
    }

    /// Follows queries through the stored keys: exactly the promised number of blocks is there.
    #[test]
    fn a_query_matches_as_many_blocks_as_it_says() {
        let workload = Workload::new(3, 1, EVENT_BLOCKS);
        let stored: HashSet<u64> = workload
            .events()
            .flat_map(|event| event.blocks)
            .map(|block| block.key)
            .collect();
        for (blocks, matching) in [(128, 64), (512, 256), (2048, 1024), (512, 0), (512, 512)] {
            for number in 0..5 {
                let query = workload.query(number, blocks, matching);
                let mut parent = None;
                let keys = query.iter().map(|content| {
                    parent = Some(chain(parent, *content));
                    parent
                });
                let depth = keys
                    .take_while(|key| key.is_some_and(|k| stored.contains(&k)))
                    .count();
                assert_eq!((query.len(), depth), (blocks, matching));
            }
        }
    }

    /// Nothing of the later stream was stored before, and it continues prompts that were.
    #[test]
    fn the_later_stream_is_new() {
        let workload = Workload::new(5, 1, EVENT_BLOCKS);
        let known = workload
            .events()
            .flat_map(|e| e.blocks.into_iter().map(move |b| (e.worker, b.key)));
        let known: HashSet<_> = known.collect();
        let mut count = 0;
        for event in workload.extra_events() {
            count += 1;
            assert!(
                event
                    .blocks
                    .iter()
                    .all(|block| !known.contains(&(event.worker, block.key)))
            );
        }
        assert!(count >= WORKERS as usize * 4);
    }
}
