//! Readers beside a writer, under schedules chosen at random and by PCT: every answer is that of the index between two
//! events, one that it was in while the reader asked, and no reader is behind what another one has seen.
//!
//! The answers are compared with a literal reading of the events. `KVFABRIC_SCHEDULES` says how many schedules of each sort
//! a scenario gets.
#![cfg(test)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, PodName, Tier};
use kvfabric_index_schedules::adapter::{
    CacheGroup, GroupRule, RemovedBlocks, SourceEvent, SourceKind, StoredBlocks,
};
use kvfabric_index_schedules::index::{Answer, IndexConfig, KvIndex, Query, SourceId, SourceSpec};
use kvfabric_index_schedules::score::TierWeights;
use kvfabric_index_schedules::sync::take_locked;
use shuttle::rand::Rng as _;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};

/// Schedules of each sort in a scenario.
const SCHEDULES: usize = 400;
/// How many changes of priority a PCT schedule has.
const PCT_DEPTH: usize = 4;
const BLOCK_SIZE: u32 = 1;

/// Who tells; each is a pod with one source.
type Pod = &'static str;
/// Blocks, one a letter; a block is all letters up to its own.
type Chain = &'static str;

#[derive(Clone, Copy, Debug)]
enum Event {
    /// The blocks of a chain from one on.
    Store(Pod, Chain, usize),
    /// The same into the tier that all share.
    Share(Pod, Chain, usize),
    /// The blocks of a chain from one on, the last one first.
    Remove(Pod, Chain, usize),
    Unshare(Pod, Chain, usize),
    /// One block, the last of a chain.
    RemoveOne(Pod, Chain),
    Clear(Pod),
    RemovePod(Pod),
    /// A pod comes again, with nothing.
    AddPod(Pod),
}

/// What is compared: pods by name with their depths, and the depth of the shared tier.
type Found = (BTreeMap<String, u32>, u32);

/// The events, read literally.
#[derive(Clone, Default)]
struct Literal {
    copies: BTreeMap<(Pod, String), u32>,
    shared: BTreeSet<String>,
}

fn blocks(chain: Chain, from: usize) -> impl DoubleEndedIterator<Item = String> {
    (from..chain.len()).map(move |last| chain[..=last].to_owned())
}

impl Literal {
    fn apply(&mut self, event: Event) {
        match event {
            Event::Store(pod, chain, from) => {
                for block in blocks(chain, from) {
                    *self.copies.entry((pod, block)).or_default() += 1;
                }
            }
            Event::Share(_, chain, from) => self.shared.extend(blocks(chain, from)),
            Event::Remove(pod, chain, from) => {
                for block in blocks(chain, from) {
                    self.remove(pod, block);
                }
            }
            Event::Unshare(_, chain, from) => {
                for block in blocks(chain, from) {
                    self.shared.remove(&block);
                }
            }
            Event::RemoveOne(pod, chain) => self.remove(pod, chain.to_owned()),
            Event::Clear(pod) | Event::RemovePod(pod) => {
                self.copies.retain(|(holder, _), _| *holder != pod);
            }
            Event::AddPod(_) => {}
        }
    }

    fn remove(&mut self, pod: Pod, block: String) {
        let copies = self.copies.get_mut(&(pod, block));
        *copies.expect("a scenario removes what is there") -= 1;
        self.copies.retain(|_, copies| *copies > 0);
    }

    fn answer(&self, prompt: Chain) -> Found {
        let pods: BTreeSet<Pod> = self.copies.keys().map(|(pod, _)| *pod).collect();
        let held = |pod: Pod| {
            blocks(prompt, 0)
                .take_while(|block| self.copies.contains_key(&(pod, block.clone())))
                .count() as u32
        };
        let depths = pods.into_iter().map(|pod| (pod.to_owned(), held(pod)));
        let shared = blocks(prompt, 0).take_while(|block| self.shared.contains(block));
        (
            depths.filter(|(_, depth)| *depth > 0).collect(),
            shared.count() as u32,
        )
    }
}

fn hash(block: &str) -> EngineHash {
    let mixed = block.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    EngineHash(mixed)
}

fn stored(chain: Chain, from: usize, tier: Tier) -> SourceEvent {
    SourceEvent::Stored(StoredBlocks {
        hashes: blocks(chain, from).map(|block| hash(&block)).collect(),
        parent: (from > 0).then(|| hash(&chain[..from])),
        tokens: chain[from..].bytes().map(u32::from).collect(),
        block_size: BLOCK_SIZE,
        tier,
        group: Some(CacheGroup {
            number: 0,
            rule: GroupRule::Full,
            block_size: BLOCK_SIZE,
        }),
        lora: None,
        cache_salt: None,
        identifiers: vec![],
    })
}

fn removed(hashes: Vec<EngineHash>, tier: Tier) -> SourceEvent {
    SourceEvent::Removed(RemovedBlocks {
        hashes,
        tier,
        group: Some(0),
    })
}

/// The index's writer.
struct Writer {
    index: Arc<KvIndex>,
    ids: BTreeMap<Pod, SourceId>,
}

impl Writer {
    fn new() -> Self {
        let index = KvIndex::new(IndexConfig {
            scheme: IndexScheme::default(),
            model: String::new(),
            block_size: BLOCK_SIZE.try_into().unwrap(),
            weights: TierWeights::default(),
            orphan_blocks_max: 100,
        });
        let mut writer = Self {
            index: Arc::new(index),
            ids: BTreeMap::new(),
        };
        for pod in ["x", "y", "z"] {
            writer.apply(Event::AddPod(pod));
        }
        writer
    }

    fn apply(&mut self, event: Event) {
        let hashes = |chain, from| {
            let blocks = blocks(chain, from).rev();
            blocks.map(|block| hash(&block)).collect()
        };
        let (pod, told) = match event {
            Event::Store(pod, chain, from) => (pod, stored(chain, from, Tier::Device)),
            Event::Share(pod, chain, from) => (pod, stored(chain, from, Tier::Object)),
            Event::Remove(pod, chain, from) => (pod, removed(hashes(chain, from), Tier::Device)),
            Event::Unshare(pod, chain, from) => (pod, removed(hashes(chain, from), Tier::Object)),
            Event::RemoveOne(pod, chain) => (pod, removed(vec![hash(chain)], Tier::Device)),
            Event::Clear(pod) => (pod, SourceEvent::Cleared),
            Event::RemovePod(pod) => return self.index.remove_pod(&PodName::new(pod).unwrap()),
            Event::AddPod(pod) => {
                let id = self.index.add_source(SourceSpec {
                    pod: PodName::new(pod).unwrap(),
                    name: "engine".to_owned(),
                    kind: SourceKind::Vllm,
                    block_size: BLOCK_SIZE,
                });
                self.ids.insert(pod, id.unwrap());
                return;
            }
        };
        let applied = self.index.apply(self.ids[pod], &told).unwrap();
        assert_eq!(
            (applied.orphaned, applied.refused, applied.unknown),
            (0, 0, 0)
        );
    }
}

/// What happens before, beside the readers, and what each reader asks, one question after the other.
#[derive(Clone, Copy)]
struct Scenario {
    before: &'static [Event],
    beside: &'static [Event],
    readers: &'static [&'static [Chain]],
}

/// What the schedules of a scenario have reached.
#[derive(Default)]
struct Reached {
    /// How often the answer was that before any event, between two, and after the last.
    first: AtomicU64,
    between: AtomicU64,
    last: AtomicU64,
    /// Lookups that made the writer wait.
    waited: AtomicU64,
}

impl Scenario {
    /// One schedule.
    fn run(self, reached: &Reached) {
        let mut writer = Writer::new();
        let mut literal = Literal::default();
        for event in self.before {
            writer.apply(*event);
            literal.apply(*event);
        }
        let mut states = vec![literal.clone()];
        for event in self.beside {
            literal.apply(*event);
            states.push(literal.clone());
        }
        let states = Arc::new(states);
        // How many events were begun, and how many must be seen; not part of what is scheduled.
        let (begun, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        take_locked();
        let readers = self.readers.iter().map(|questions| {
            let (index, states) = (Arc::clone(&writer.index), Arc::clone(&states));
            let (begun, seen) = (Arc::clone(&begun), Arc::clone(&seen));
            shuttle::thread::spawn(move || {
                let mut counts = [0; 3];
                for prompt in *questions {
                    let state = ask(&index, &states, prompt, &begun, &seen);
                    let last = states.len() - 1;
                    counts[if state == 0 {
                        0
                    } else {
                        1 + usize::from(state == last)
                    }] += 1;
                }
                counts
            })
        });
        let readers: Vec<_> = readers.collect();
        for (number, event) in self.beside.iter().enumerate() {
            begun.store(number + 1, Ordering::Relaxed);
            writer.apply(*event);
            seen.fetch_max(number + 1, Ordering::Relaxed);
        }
        for reader in readers {
            let [first, between, last] = reader.join().unwrap();
            reached.first.fetch_add(first, Ordering::Relaxed);
            reached.between.fetch_add(between, Ordering::Relaxed);
            reached.last.fetch_add(last, Ordering::Relaxed);
        }
        // Removing a pod takes the lock once to see its sources, once for each of them.
        let by_writer = self.beside.iter();
        let by_writer = by_writer.map(|event| 1 + u64::from(matches!(event, Event::RemovePod(_))));
        let waited = take_locked() - by_writer.sum::<u64>();
        reached.waited.fetch_add(waited, Ordering::Relaxed);
        let all = self.readers.iter().flat_map(|questions| questions.iter());
        for prompt in all {
            ask(&writer.index, &states, prompt, &begun, &seen);
        }
    }

    /// All schedules.
    fn check(self) -> Reached {
        let schedules = std::env::var("KVFABRIC_SCHEDULES").map(|text| text.parse().unwrap());
        let schedules = schedules.unwrap_or(SCHEDULES);
        let reached = Arc::new(Reached::default());
        self.check_with(RandomScheduler::new(schedules), &reached);
        self.check_with(PctScheduler::new(PCT_DEPTH, schedules), &reached);
        Arc::into_inner(reached).expect("no schedule is left")
    }

    fn check_with(self, scheduler: impl Scheduler + 'static, reached: &Arc<Reached>) {
        let mut config = Config::new();
        // Weaker orders are looked at elsewhere.
        config.silence_warnings = true;
        let reached = Arc::clone(reached);
        Runner::new(scheduler, config).run(move || self.run(&reached));
    }
}

/// Asks, and finds the state that the answer is of.
fn ask(
    index: &KvIndex,
    states: &[Literal],
    prompt: Chain,
    begun: &AtomicUsize,
    seen: &AtomicUsize,
) -> usize {
    let tokens: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let (mut keys, mut answer) = (Vec::new(), Answer::default());
    index.keys_of(None, None, &tokens, &mut keys);
    // All pods, or the best one: for that sets of two are wide here.
    let query = Query {
        pods_max: usize::from(shuttle::rand::thread_rng().r#gen::<bool>()),
        ..Query::default()
    };
    let first = seen.load(Ordering::Relaxed);
    index.lookup(&keys, &query, &mut answer);
    let last = begun.load(Ordering::Relaxed);
    let pods = answer.pods.iter();
    let pods = pods.map(|pod| (pod.pod.to_string(), pod.depth)).collect();
    let found = (pods, answer.shared_depth);
    let wanted: Vec<Found> = states[first..=last]
        .iter()
        .map(|state| {
            let (pods, shared) = state.answer(prompt);
            if query.pods_max == 0 {
                return (pods, shared);
            }
            let best = pods
                .iter()
                .min_by_key(|(pod, depth)| (Reverse(**depth), *pod));
            let best = best.map(|(pod, depth)| (pod.clone(), *depth));
            (best.into_iter().collect(), shared)
        })
        .collect();
    let Some(state) = wanted.iter().position(|wanted| *wanted == found) else {
        panic!("{prompt:?}: {found:?} is none of {wanted:?}, after events {first} to {last}");
    };
    seen.fetch_max(first + state, Ordering::Relaxed);
    first + state
}

impl Reached {
    /// Some lookup must have met every part of the history, and some have given up, or the schedules show nothing.
    fn assert_all(&self) {
        self.assert_met(&[&self.first, &self.between, &self.last, &self.waited]);
    }

    /// The same where no event changes so much that a lookup would have to give up.
    fn assert_answers(&self) {
        self.assert_met(&[&self.first, &self.between, &self.last]);
    }

    fn assert_met(&self, counts: &[&AtomicU64]) {
        let counts: Vec<u64> = counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        println!("answers from before, between, after; waited: {counts:?}");
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    }
}

/// Two runs with a common beginning.
const FORKED: [Event; 2] = [
    Event::Store("x", "abcdefgh", 0),
    Event::Store("x", "abcdEFGH", 4),
];
/// More than two segments.
const LONG: Chain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP";

/// A pod stores blocks in two runs, one of which is new for one of the readers' prompts.
#[test]
fn a_store_over_two_runs_is_seen_whole() {
    let scenario = Scenario {
        before: &FORKED,
        beside: &[
            Event::Store("y", "abcdEFGH", 0),
            Event::Store("y", "abcdefXYZ", 4),
        ],
        readers: &[&["abcdEFGH", "abcdefXYZ"]],
    };
    scenario.check().assert_all();
}

/// A pod removes blocks in two runs, then stores them again and another removes the same.
#[test]
fn a_removal_over_two_runs_is_seen_whole() {
    let scenario = Scenario {
        before: &[FORKED[0], FORKED[1], Event::Store("y", "abcdEFGH", 0)],
        beside: &[
            Event::Remove("y", "abcdEFGH", 0),
            Event::Store("y", "abcdEFGH", 0),
            Event::Remove("x", "abcdEFGH", 4),
        ],
        readers: &[&["abcdEFGH", "abcdEFGH"]],
    };
    scenario.check().assert_all();
}

/// A run ends with its only holder in the same event that takes the run before it from that holder: by name, by a clear.
#[test]
fn a_removal_that_ends_a_run_is_seen_whole() {
    let scenario = Scenario {
        before: &[
            Event::Store("x", "abcdefgh", 0),
            Event::Store("y", "abcdEFGH", 0),
        ],
        beside: &[
            Event::Remove("y", "abcdEFGH", 0),
            Event::Store("y", "abcdEFGH", 0),
            Event::Clear("y"),
        ],
        readers: &[&["abcdEFGH", "abcdEFGH"], &["abcdEFGH"]],
    };
    scenario.check().assert_all();
}

/// A pod that holds both runs goes; while it is taken out, event by event, others come, the last with the number that is
/// free then.
#[test]
fn a_pod_goes_from_all_runs_at_once_and_nobody_inherits_its_blocks() {
    let scenario = Scenario {
        before: &[
            FORKED[0],
            Event::Store("y", "abcdefgh", 0),
            Event::Store("y", "abcdEFGH", 4),
            Event::Store("y", "abcdIJ", 4),
        ],
        beside: &[
            Event::RemovePod("y"),
            Event::AddPod("v"),
            Event::Store("v", "abc", 0),
            Event::Store("v", "abcd", 3),
            Event::Store("x", "abcdK", 4),
            Event::Store("x", "abcdKL", 5),
            Event::AddPod("w"),
            Event::Store("w", "abc", 0),
        ],
        readers: &[&["abcdEFGH", "abcdIJ"], &["abcdefgh", "abcdIJ"]],
    };
    scenario.check().assert_answers();
}

/// A hole is made in the middle, stored again by one pod and by another.
#[test]
fn a_hole_and_its_filling_are_seen_whole() {
    let scenario = Scenario {
        before: &[FORKED[0], Event::Store("y", "abcdefgh", 0)],
        beside: &[
            Event::RemoveOne("y", "abc"),
            Event::RemoveOne("x", "abc"),
            Event::Store("y", "abc", 2),
            Event::Store("x", "abc", 2),
        ],
        readers: &[&["abcdefgh", "abcdefgh"]],
    };
    scenario.check().assert_all();
}

/// A chain of more segments than a chunk has comes and goes and comes again, so that chunks appear and are given back.
#[test]
fn chunks_that_come_and_go_are_not_seen() {
    let scenario = Scenario {
        before: &[Event::Store("x", "abcd", 0)],
        beside: &[
            Event::Store("y", LONG, 0),
            Event::Clear("y"),
            Event::Store("z", LONG, 0),
        ],
        readers: &[&[LONG; 12]],
    };
    scenario.check().assert_all();
}

/// So many holes that a run's stretches move into a list, and so few that they move back.
#[test]
fn a_run_whose_holders_differ_block_by_block_is_seen_whole() {
    let scenario = Scenario {
        before: &[
            Event::Store("x", "abcdefghij", 0),
            Event::Store("y", "abcdefghij", 0),
            Event::Store("z", "abcdefghij", 0),
            Event::RemoveOne("z", "abcdefghi"),
        ],
        beside: &[
            Event::RemoveOne("y", "abcdefg"),
            Event::RemoveOne("z", "abcde"),
            Event::Clear("y"),
            Event::Clear("z"),
        ],
        readers: &[&["abcdefghij", "abcdefghij"]],
    };
    scenario.check().assert_all();
}

/// Chains end, so that the entries of others move, and so many come that the table is exchanged.
#[test]
fn entries_that_move_are_found_all_the_time() {
    let scenario = Scenario {
        before: &[
            Event::Store("x", "abc", 0),
            Event::Store("x", "bcd", 0),
            Event::Store("x", "cde", 0),
            Event::Store("x", "def", 0),
        ],
        beside: &[
            Event::Remove("x", "abc", 0),
            Event::Store("x", "efg", 0),
            Event::Remove("x", "bcd", 0),
            Event::Store("x", "fgh", 0),
            Event::Store("x", "ghi", 0),
            Event::Store("y", "hij", 0),
        ],
        readers: &[&[
            "def", "cde", "hij", "fgh", "abc", "cde", "efg", "hij", "def", "hij", "cde", "hij",
        ]],
    };
    scenario.check().assert_all();
}

/// The shared tier holds what no pod does, behind a hole and in a run of its own.
#[test]
fn what_all_share_is_of_the_same_moment() {
    let scenario = Scenario {
        before: &[FORKED[0], Event::Share("x", "abcdef", 0)],
        beside: &[
            Event::Unshare("x", "abcdef", 2),
            Event::Share("x", "abcdEF", 0),
            Event::Unshare("x", "abcdEF", 0),
        ],
        readers: &[&["abcdEF", "abcdef"]],
    };
    scenario.check().assert_all();
}

/// Many short events and two readers, neither of which may fall behind the other.
#[test]
fn no_reader_is_behind_what_another_has_seen() {
    let scenario = Scenario {
        before: &FORKED,
        beside: &[
            Event::Store("y", "abcd", 0),
            Event::Store("y", "abcdEF", 4),
            Event::RemoveOne("x", "abcdEFG"),
            Event::Remove("y", "abcdEF", 0),
            Event::Store("z", "abcdefgh", 0),
        ],
        readers: &[&["abcdEFGH", "abcdEFGH"], &["abcdEFGH", "abcdefgh"]],
    };
    scenario.check().assert_all();
}
