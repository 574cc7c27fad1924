//! `kv-bench replay`: a workload as the KV events of some pods, with the lookups that route it.

mod demo;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use kvcache_core::event::EngineEvent;
use kvcache_core::prefix::{IndexScheme, Namespace};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{EngineHash, Error, ErrorKind, IndexKey, PodName, Result, Tier};
use kvfabric_indexer::adapter::{SourceKind, decode_batch, encode_engine_batch};
use kvfabric_indexer::index::{
    Answer, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, Query, SourceId, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;
use kvfabric_sim::infinite::InfiniteCache;
use kvfabric_sim::workload::trace::Trace;
use kvfabric_sim::workload::{
    BLOCK_TOKENS_DEFAULT, REQUESTS_DEFAULT, Request, TRACE_BLOCK_TOKENS, Workload, WorkloadKind,
};

use crate::recorder::{OutputArgs, Recorder};
use crate::report::{Case, OURS};
use crate::statistics::{Percentiles, Samples};

/// Replays a workload into the index, or runs the demo and takes its figures.
#[derive(Args, Clone, Debug)]
pub(crate) struct ReplayArgs {
    /// The generated workload.
    #[arg(long, value_enum, default_value_t = Generator::Chat, conflicts_with = "trace")]
    workload: Generator,
    /// Replay this trace (JSON lines in Mooncake's schema) instead.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Fixes the generated workload.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Stop after this many requests.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_requests: Option<u32>,
    /// Pods that the blocks are spread over.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pods: u32,
    /// Run `kvfabric demo` with so many prefill and decode pods instead, and take its report.
    #[arg(long, value_name = "P:D", conflicts_with = "pods")]
    demo: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Generated workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Generator {
    /// Conversations of several turns over shared system prompts.
    Chat,
    /// Loops of a model and its tools over a growing context.
    Agent,
    /// Questions over shared documents.
    Rag,
}

impl Generator {
    const fn kind(self) -> WorkloadKind {
        match self {
            Self::Chat => WorkloadKind::Chat,
            Self::Agent => WorkloadKind::Agent,
            Self::Rag => WorkloadKind::Rag,
        }
    }
}

impl ReplayArgs {
    /// What is replayed, as part of a case's name.
    fn subject_matter(&self) -> String {
        match &self.trace {
            None => self.workload.kind().name().to_owned(),
            Some(path) => path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        }
    }

    fn requests(&self) -> Result<(u32, Box<dyn Iterator<Item = Request>>)> {
        let most = self.max_requests.map_or(usize::MAX, |count| count as usize);
        Ok(match &self.trace {
            Some(path) => {
                let requests = Trace::load(path)?.into_requests();
                (TRACE_BLOCK_TOKENS, Box::new(requests.take(most)))
            }
            None => {
                let count = self.max_requests.unwrap_or(REQUESTS_DEFAULT);
                let workload = Workload::new(self.workload.kind(), self.seed, count);
                (
                    BLOCK_TOKENS_DEFAULT,
                    Box::new(workload.requests()?.take(most)),
                )
            }
        })
    }
}

/// Replays into the index, or through the demo.
///
/// # Errors
/// `Invalid` or `NotFound` naming the trace; `Internal` when the index found another number of hits than there are.
pub(crate) fn run(args: &ReplayArgs, recorder: &mut Recorder) -> Result<()> {
    if let Some(pods) = &args.demo {
        return demo::run(args, pods, recorder);
    }
    let (block_tokens, requests) = args.requests()?;
    let requests: Vec<Request> = requests.collect();
    recorder.expect_steps(requests.len() as u64);
    recorder.say(args.subject_matter());
    let mut replay = Replay::new(args.pods, block_tokens)?;
    for request in &requests {
        if recorder.stop().is_set() {
            break;
        }
        replay.serve(request)?;
        recorder.step();
    }
    replay.check()?;
    replay.record(&format!("replay-{}", args.subject_matter()), recorder);
    Ok(())
}

/// Lookups of one round of percentiles.
const LOOKUPS_PER_ROUND: usize = 200;

/// Pods without limits: what was stored once stays. So the deepest pod must have what an infinite cache has.
struct Replay {
    index: KvIndex,
    pods: Vec<Pod>,
    infinite: InfiniteCache,
    accesses: u64,
    hits: u64,
    events: u64,
    blocks: u64,
    applying: Duration,
    lookups: u64,
    looking: Duration,
    round: Samples,
    latency: Percentiles,
    keys: Vec<IndexKey>,
    answer: Answer,
}

struct Pod {
    source: SourceId,
    holds: HashSet<IndexKey>,
}

impl Replay {
    fn new(pods: u32, block_tokens: u32) -> Result<Self> {
        let index = KvIndex::new(IndexConfig {
            scheme: IndexScheme::default(),
            model: String::new(),
            block_size: TokensPerBlock::try_from(block_tokens)?,
            weights: TierWeights::default(),
            orphan_blocks_max: ORPHAN_BLOCKS_MAX,
        });
        let pod = |number| {
            let source = index.add_source(SourceSpec {
                pod: PodName::new(&format!("pod-{number}"))?,
                name: "engine".to_owned(),
                kind: SourceKind::Vllm,
                block_size: block_tokens,
            })?;
            Ok(Pod {
                source,
                holds: HashSet::new(),
            })
        };
        let pods = (0..pods).map(pod).collect::<Result<_>>()?;
        Ok(Self {
            index,
            pods,
            infinite: InfiniteCache::new(block_tokens),
            accesses: 0,
            hits: 0,
            events: 0,
            blocks: 0,
            applying: Duration::ZERO,
            lookups: 0,
            looking: Duration::ZERO,
            round: Samples::default(),
            latency: Percentiles::default(),
            keys: Vec::new(),
            answer: Answer::default(),
        })
    }

    /// Looks a request up, counts its hits, and lets the pod that serves it tell of its new blocks.
    fn serve(&mut self, request: &Request) -> Result<()> {
        let block_tokens = self.index.config().block_size.get();
        let prompt = request.prompt_tokens();
        let start = Instant::now();
        self.keys.clear();
        self.index.keys_of(None, None, &prompt, &mut self.keys);
        self.index
            .lookup(&self.keys, &Query::default(), &mut self.answer);
        let time = start.elapsed();
        self.looking += time;
        self.lookups += 1;
        self.round.push_us(time);
        if self.lookups.is_multiple_of(LOOKUPS_PER_ROUND as u64) {
            self.latency.push_round(&std::mem::take(&mut self.round));
        }
        let best = self.answer.pods.first();
        let depth = best.map_or(0, |pod| pod.depth) as usize;
        self.accesses += request.prompt_blocks(block_tokens) as u64;
        self.hits += depth.min(request.reusable_blocks(block_tokens)) as u64;
        self.infinite.observe(request);
        // Pods take turns: so each comes to hold much of what the others hold, as in a cluster that shares by fetching.
        let pod = request.id as usize % self.pods.len();
        let payload = self.pods[pod].announce(&request.all_tokens(), block_tokens);
        if let Some(payload) = payload {
            self.apply(pod, &payload)?;
        }
        Ok(())
    }

    /// Takes a batch in as it would come from the wire.
    fn apply(&mut self, pod: usize, payload: &[u8]) -> Result<()> {
        let start = Instant::now();
        for event in decode_batch(payload, SourceKind::Vllm)?.events {
            let applied = self.index.apply(self.pods[pod].source, &event?)?;
            self.events += 1;
            self.blocks += u64::from(applied.stored);
        }
        self.applying += start.elapsed();
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let expected = self.infinite.total();
        if (self.accesses, self.hits) == (expected.accesses, expected.hits) {
            return Ok(());
        }
        let found = (self.accesses, self.hits);
        let context = format!("(accesses, hits) are {found:?}, an infinite cache has {expected:?}");
        Err(Error::new(ErrorKind::Internal, context))
    }

    fn record(mut self, name: &str, recorder: &mut Recorder) {
        self.latency.push_round(&std::mem::take(&mut self.round));
        let case = Case {
            subject: OURS,
            name,
        };
        let ratio = |hits: u64| hits as f64 / self.accesses as f64;
        let figures = [
            ("requests", "requests", self.lookups as f64),
            ("block_accesses", "blocks", self.accesses as f64),
            ("hit_ratio", "ratio", ratio(self.hits)),
            ("infinite_hit_ratio", "ratio", self.infinite.total().ratio()),
            ("blocks", "blocks", self.blocks as f64),
            (
                "events_per_s",
                "events/s",
                self.events as f64 / self.applying.as_secs_f64(),
            ),
            (
                "blocks_per_s",
                "blocks/s",
                self.blocks as f64 / self.applying.as_secs_f64(),
            ),
            (
                "lookups_per_s",
                "lookups/s",
                self.lookups as f64 / self.looking.as_secs_f64(),
            ),
        ];
        for (metric, unit, value) in figures {
            recorder.extend(case.single(metric, unit, value));
        }
        recorder.extend(case.row("p50_us", "µs", &self.latency.p50));
        recorder.extend(case.row("p99_us", "µs", &self.latency.p99));
    }
}

impl Pod {
    /// A batch that tells of the blocks that the pod had not; none when it had all.
    fn announce(&mut self, tokens: &[u32], block_tokens: u32) -> Option<Vec<u8>> {
        let Ok(block_size) = TokensPerBlock::try_from(block_tokens) else {
            return None;
        };
        let root = IndexScheme::default().root(&Namespace::default());
        let keys: Vec<IndexKey> = root.chain(tokens, block_size).collect();
        // A pod holds whole prefixes, so the new blocks are all behind the known ones.
        let known = keys
            .iter()
            .take_while(|key| self.holds.contains(key))
            .count();
        let new = keys.get(known..).filter(|new| !new.is_empty())?;
        self.holds.extend(new);
        let start = known * block_tokens as usize;
        let event = EngineEvent::Stored {
            hashes: new.iter().map(|key| EngineHash(key.0)).collect(),
            parent: known.checked_sub(1).map(|last| EngineHash(keys[last].0)),
            tokens: tokens[start..keys.len() * block_tokens as usize].to_vec(),
            block_size: block_tokens,
            tier: Tier::Device,
        };
        Some(encode_engine_batch(0.0, &[event]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Replays each generator over several pods; the index finds what the independent counter says.
    #[test]
    fn hits_are_those_of_an_infinite_cache() {
        for kind in WorkloadKind::ALL {
            let mut replay = Replay::new(3, BLOCK_TOKENS_DEFAULT).unwrap();
            for request in Workload::new(kind, 1, 60).requests().unwrap() {
                replay.serve(&request).unwrap();
            }
            replay.check().unwrap();
            assert!(replay.hits > 0 && replay.hits < replay.accesses, "{kind}");
            assert_eq!(replay.blocks, replay.index.entries());
            assert!(
                replay
                    .pods
                    .iter()
                    .filter(|pod| !pod.holds.is_empty())
                    .count()
                    > 1
            );
        }
    }

    /// A hit more than there can be is an error that names both counts.
    #[test]
    fn a_hit_that_cannot_be_is_found() {
        let mut replay = Replay::new(1, BLOCK_TOKENS_DEFAULT).unwrap();
        for request in Workload::new(WorkloadKind::Chat, 1, 5).requests().unwrap() {
            replay.serve(&request).unwrap();
        }
        replay.hits += 1;
        assert_eq!(replay.check().unwrap_err().kind(), ErrorKind::Internal);
    }
}
