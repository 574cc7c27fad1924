//! A large fleet: a trace's conversations, each at home on one pod, the pods copied; who are the best sixteen?
//!
//! All requests of the conversation trace begin with the same block, so every pod answers every question, which is what
//! makes a large fleet hard: only the deepest may cost anything.

use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

use kvcache_core::{EngineHash, IndexKey, PodName, Result, Tier};
use kvfabric_indexer::adapter::{SourceEvent, SourceKind, StoredBlocks};
use kvfabric_indexer::index::{Answer, Depths, KvIndex, Query, SourceId, SourceSpec};
use kvfabric_sim::workload::Prompt;
use kvfabric_sim::workload::trace::Trace;

use crate::recorder::Recorder;
use crate::report::{Case, OURS};
use crate::statistics::{Percentiles, Samples};

use super::fill::{BLOCK_TOKENS, append_tokens, empty_index};
use super::lookup::ROUNDS;
use super::workload::{scramble, step};
use super::wrong;

/// How many pods are asked for.
const BEST: usize = 16;
/// Steps of progress that this takes.
pub(super) const STEPS: u64 = 2;
/// Of the stand-in: requests for each pod, blocks that a turn adds, and turns of a conversation.
const REQUESTS_PER_POD: u64 = 12;
const TURN_BLOCKS: u64 = 8;
const TURNS: u64 = 4;

/// Prompts as block ids; the first block is everybody's, and an id stands for all before it too.
type Requests = Vec<Vec<u64>>;

/// Loads the trace, or makes a stand-in of its shape.
///
/// # Errors
/// `NotFound` or `Invalid` naming the file; `Invalid` for a trace whose requests do not share their first block.
pub(super) fn requests(trace: Option<&Path>, pods: u32) -> Result<Requests> {
    let Some(path) = trace else {
        return Ok(stand_in(pods));
    };
    let mut requests = Requests::new();
    for request in Trace::load(path)?.into_requests() {
        if let Prompt::Ids(ids) = request.prompt {
            requests.push(ids);
        }
    }
    let first = requests.first().and_then(|ids| ids.first()).copied();
    let is_shared = |ids: &Vec<u64>| ids.len() > 1 && ids.first().copied() == first;
    match requests.iter().position(|ids| !is_shared(ids)) {
        None if first.is_some() => Ok(requests),
        place => Err(kvcache_core::Error::invalid(
            "trace",
            format!("{}, request {}", path.display(), place.unwrap_or_default()),
            "requests of two blocks or more that all begin with the same",
        )),
    }
}

/// Conversations of a few turns over one first block.
fn stand_in(pods: u32) -> Requests {
    let conversations = u64::from(pods) * REQUESTS_PER_POD / TURNS;
    let turns = (0..TURNS).flat_map(|turn| (0..conversations).map(move |talk| (turn, talk)));
    let request = |(turn, talk): (u64, u64)| {
        let own = TURN_BLOCKS * TURNS * talk + 1;
        [0].into_iter()
            .chain(own..own + TURN_BLOCKS * (turn + 1))
            .collect()
    };
    turns.map(request).collect()
}

/// An index that a fleet has told of a trace.
struct Fleet {
    index: KvIndex,
    sources: Vec<SourceId>,
    pods: u32,
    blocks: u64,
}

impl Fleet {
    /// So many pods, each `copies` times.
    fn new(pods: u32, copies: u32) -> Result<Self> {
        let index = empty_index()?;
        let add = |number| {
            index.add_source(SourceSpec {
                pod: PodName::new(&format!("pod-{number}"))?,
                name: "engine".to_owned(),
                kind: SourceKind::Vllm,
                block_size: BLOCK_TOKENS,
            })
        };
        let sources = (0..pods * copies).map(add).collect::<Result<_>>()?;
        Ok(Self {
            index,
            sources,
            pods,
            blocks: 0,
        })
    }

    /// The pod of a request; its copies are so many pods further on each.
    fn home(&self, ids: &[u64]) -> usize {
        (step(ids[1]) % u64::from(self.pods)) as usize
    }

    /// Lets the pods of every request, in order, tell of the blocks that they had not.
    fn tell(&mut self, requests: &Requests) -> Result<()> {
        let mut held = vec![HashSet::<u64>::new(); self.pods as usize];
        for ids in requests {
            let home = self.home(ids);
            let known = ids.iter().take_while(|id| held[home].contains(*id)).count();
            if known == ids.len() {
                continue;
            }
            held[home].extend(&ids[known..]);
            let event = stored(ids, known);
            for source in self.sources.iter().skip(home).step_by(self.pods as usize) {
                self.blocks += u64::from(self.index.apply(*source, &event)?.stored);
            }
        }
        Ok(())
    }

    fn keys(&self, ids: &[u64]) -> Vec<IndexKey> {
        let mut keys = Vec::with_capacity(ids.len());
        self.index.keys_of(None, None, &tokens(ids), &mut keys);
        keys
    }
}

fn tokens(ids: &[u64]) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(ids.len() * BLOCK_TOKENS as usize);
    let contents = ids.iter().map(|id| step(*id));
    contents.for_each(|content| append_tokens(content, &mut tokens));
    tokens
}

/// The blocks from one on, named by hashes that say nothing.
fn stored(ids: &[u64], from: usize) -> SourceEvent {
    let hash = |id: &u64| EngineHash(scramble(*id));
    SourceEvent::Stored(StoredBlocks {
        hashes: ids[from..].iter().map(hash).collect(),
        parent: from.checked_sub(1).map(|last| hash(&ids[last])),
        tokens: tokens(&ids[from..]),
        block_size: BLOCK_TOKENS,
        tier: Tier::Device,
        group: None,
        lora: None,
        cache_salt: None,
        identifiers: Vec::new(),
    })
}

/// Fills an index from each pod once, then from so many copies, and asks every request's question for the best.
///
/// # Errors
/// `Internal` when an answer is not what its pod has stored; those of [`requests`].
pub(super) fn measure(
    trace: Option<&Path>,
    pods: u32,
    copies: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    if trace.is_none() {
        say_stand_in();
    }
    let requests = requests(trace, pods)?;
    for copies in [1, copies] {
        if recorder.stop().is_set() {
            return Ok(());
        }
        let suffix = if trace.is_some() { "" } else { "-stand-in" };
        let name = format!("pods-{}{suffix}", pods * copies);
        recorder.say(name.as_str());
        let mut fleet = Fleet::new(pods, copies)?;
        let started = Instant::now();
        fleet.tell(&requests)?;
        let time = started.elapsed();
        ask_all(&fleet, &requests, &name, recorder)?;
        let case = Case {
            subject: OURS,
            name: &name,
        };
        let blocks = fleet.blocks as f64;
        recorder.extend(case.single("blocks", "blocks", blocks));
        recorder.extend(case.single("blocks_per_s", "blocks/s", blocks / time.as_secs_f64()));
        let bytes = fleet.index.bytes() as f64;
        recorder.extend(case.single("index_bytes_per_pair", "bytes", bytes / blocks));
        recorder.step();
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "nobody shall take one for the other")]
fn say_stand_in() {
    eprintln!("kv-bench: no --trace, so the fleet's conversations are a stand-in of its shape");
}

fn ask_all(fleet: &Fleet, requests: &Requests, name: &str, recorder: &mut Recorder) -> Result<()> {
    let questions: Vec<Vec<IndexKey>> = requests.iter().map(|ids| fleet.keys(ids)).collect();
    let (mut by_number, mut by_name) = (Percentiles::default(), Percentiles::default());
    let (mut depths, mut answer) = (Depths::default(), Answer::default());
    let query = Query {
        pods_max: BEST,
        ..Query::default()
    };
    for _ in 0..ROUNDS {
        let (mut numbers, mut names) = (Samples::default(), Samples::default());
        for keys in &questions {
            if recorder.stop().is_set() {
                return Ok(());
            }
            let started = Instant::now();
            fleet.index.depths(keys, BEST, &[], &mut depths);
            numbers.push_us(started.elapsed());
            let started = Instant::now();
            fleet.index.lookup(keys, &query, &mut answer);
            names.push_us(started.elapsed());
            let wanted = (BEST.min(fleet.sources.len()), keys.len() as u32);
            let found = [
                (
                    depths.pods.len(),
                    depths.pods.first().map_or(0, |p| p.depth),
                ),
                (
                    answer.pods.len(),
                    answer.pods.first().map_or(0, |p| p.depth),
                ),
            ];
            if found != [wanted; 2] {
                return Err(wrong(format!(
                    "(pods, depth) are {found:?} instead of {wanted:?}"
                )));
            }
        }
        by_number.push_round(&numbers);
        by_name.push_round(&names);
    }
    for (name, percentiles) in [(name, by_number), (&format!("{name}-names"), by_name)] {
        let case = Case {
            subject: OURS,
            name,
        };
        recorder.extend(case.row("p50_us", "µs", &percentiles.p50));
        recorder.extend(case.row("p99_us", "µs", &percentiles.p99));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::io::Write;

    use super::*;

    /// The best sixteen, walked block by block through a map of who stored what.
    fn literal(fleet: &Fleet, requests: &Requests, asked: &[u64]) -> Vec<(Reverse<u32>, String)> {
        let mut held = vec![HashSet::<u64>::new(); fleet.sources.len()];
        for ids in requests {
            let homes = (fleet.home(ids)..fleet.sources.len()).step_by(fleet.pods as usize);
            homes.for_each(|home| held[home].extend(ids));
        }
        let depth = |held: &HashSet<u64>| asked.iter().take_while(|id| held.contains(*id)).count();
        let pods = held.iter().enumerate();
        let mut all: Vec<_> = pods
            .map(|(pod, held)| (Reverse(depth(held) as u32), format!("pod-{pod}")))
            .filter(|(depth, _)| depth.0 > 0)
            .collect();
        all.sort();
        all.truncate(BEST);
        all
    }

    /// A small fleet, some prompts cut short and some with blocks that nobody has, so that answers end at every depth.
    #[test]
    fn the_best_sixteen_are_those_of_a_literal_walk() {
        let requests = stand_in(40);
        for copies in [1, 3] {
            let mut fleet = Fleet::new(40, copies).unwrap();
            fleet.tell(&requests).unwrap();
            let (mut answer, mut depths) = (Answer::default(), Depths::default());
            for (number, ids) in requests.iter().enumerate() {
                let mut asked = ids[..1 + number % ids.len()].to_vec();
                asked.push(u64::MAX >> 12);
                let keys = fleet.keys(&asked);
                let query = Query {
                    pods_max: BEST,
                    ..Query::default()
                };
                fleet.index.lookup(&keys, &query, &mut answer);
                let found = answer.pods.iter();
                let found: Vec<_> = found
                    .map(|pod| (Reverse(pod.depth), pod.pod.to_string()))
                    .collect();
                let wanted = literal(&fleet, &requests, &asked);
                assert_eq!(found, wanted, "{asked:?}");
                // By number the same depths, in any order among equals.
                fleet.index.depths(&keys, BEST, &[], &mut depths);
                let found: Vec<_> = depths.pods.iter().map(|pod| Reverse(pod.depth)).collect();
                let wanted: Vec<_> = wanted.iter().map(|(depth, _)| *depth).collect();
                assert_eq!(found, wanted, "{asked:?}");
            }
        }
    }

    /// A trace whose requests begin with the same block is taken, any other is refused by request.
    #[test]
    fn a_trace_must_share_its_first_block() {
        let line = |ids: &str| {
            format!(
                "{{\"timestamp\":0,\"input_length\":1024,\"output_length\":1,\"hash_ids\":[{ids}]}}\n"
            )
        };
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all((line("0, 1") + &line("0, 2")).as_bytes())
            .unwrap();
        let loaded = requests(Some(file.path()), 1).unwrap();
        assert_eq!(loaded, [vec![0, 1], vec![0, 2]]);
        file.write_all(line("3, 4").as_bytes()).unwrap();
        let refusal = requests(Some(file.path()), 1).unwrap_err().to_string();
        assert!(refusal.contains("request 2"), "{refusal}");
    }
}
