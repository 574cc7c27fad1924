//! An index under the workload's events.

use std::time::{Duration, Instant};

use clap::ValueEnum;
use kvcache_core::prefix::IndexScheme;
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{EngineHash, IndexKey, PodName, Result, Tier};
use kvfabric_indexer::adapter::{SourceEvent, SourceKind, StoredBlocks};
use kvfabric_indexer::index::{
    Depths, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, SourceId, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;

use crate::clock::process_cpu;
use crate::stop::Stop;

use super::workload::{Stored, WORKERS, Workload, chain, scramble};
use super::{Origin, wrong};

/// Tokens of a block, where the events carry tokens.
pub(super) const BLOCK_TOKENS: u32 = 16;
/// Words of a block's content, where that stands for its tokens.
const CONTENT_WORDS: u32 = 2;
/// Events that are made before the clock runs, then applied.
const EVENTS_PER_BATCH: usize = 4096;

/// What ingestion took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Meter {
    pub(super) events: u64,
    pub(super) blocks: u64,
    pub(super) time: Duration,
    pub(super) cpu: Duration,
}

/// An index with a source for each worker.
pub(super) struct Filled {
    pub(super) index: KvIndex,
    pub(super) pods: Vec<PodName>,
    sources: Vec<SourceId>,
    origin: Origin,
}

/// The tokens of a block with this content.
pub(super) fn append_tokens(content: u64, tokens: &mut Vec<u32>) {
    tokens.extend((0..u64::from(BLOCK_TOKENS)).map(|at| scramble(content.wrapping_add(at)) as u32));
}

impl Origin {
    /// As the command line has it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Hashes => "hashes",
            Self::Engine => "engine",
        }
    }

    const fn block_tokens(self) -> u32 {
        match self {
            Self::Hashes => CONTENT_WORDS,
            Self::Engine | Self::Node => BLOCK_TOKENS,
        }
    }

    /// What a block of this content is told by; of a node nothing.
    fn append(self, content: u64, tokens: &mut Vec<u32>) {
        match self {
            Self::Hashes => tokens.extend([content as u32, (content >> 32) as u32]),
            Self::Engine => append_tokens(content, tokens),
            Self::Node => {}
        }
    }

    fn event(self, stored: &Stored) -> SourceEvent {
        let is_engine = self != Self::Node;
        let block_tokens = self.block_tokens();
        let mut tokens = Vec::new();
        if is_engine {
            tokens.reserve_exact(stored.blocks.len() * block_tokens as usize);
            for block in &stored.blocks {
                self.append(block.content, &mut tokens);
            }
        }
        SourceEvent::Stored(StoredBlocks {
            hashes: stored
                .blocks
                .iter()
                .map(|block| EngineHash(block.key))
                .collect(),
            parent: stored.parent.map(EngineHash),
            tokens,
            block_size: if is_engine { block_tokens } else { 0 },
            tier: if is_engine { Tier::Device } else { Tier::Host },
            group: None,
            lora: None,
            cache_salt: None,
            identifiers: Vec::new(),
        })
    }

    /// Makes a batch of events and lets go of them, so that what the allocator keeps of that is not taken for the index's.
    pub(super) fn rehearse(self, workload: &Workload) {
        let events = workload.events().take(EVENTS_PER_BATCH);
        drop(events.map(|stored| self.event(&stored)).collect::<Vec<_>>());
    }
}

/// How events are given to the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Calls {
    /// Many in a call, as a reader of a queue has them.
    Together,
    /// Each in a call of its own.
    Single,
}

impl Calls {
    /// As the command line has it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::Single => "single",
        }
    }
}

/// The workload's names of pods.
pub(super) fn pod_name(worker: u32) -> Result<PodName> {
    PodName::new(&format!("worker-{worker}"))
}

fn empty_config(block_tokens: u32) -> Result<IndexConfig> {
    Ok(IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: TokensPerBlock::try_from(block_tokens)?,
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    })
}

/// An index without sources.
pub(super) fn empty_index() -> Result<KvIndex> {
    Ok(KvIndex::new(empty_config(BLOCK_TOKENS)?))
}

impl Filled {
    /// An empty index with a source for each worker.
    pub(super) fn new(workload: &Workload, origin: Origin) -> Result<Self> {
        Self::bounded(workload, origin, None)
    }

    /// An empty index that takes at most so many bytes.
    ///
    /// # Errors
    /// `Invalid` when they are too few for any index.
    pub(super) fn bounded(
        workload: &Workload,
        origin: Origin,
        bytes_max: Option<u64>,
    ) -> Result<Self> {
        assert!(workload.pairs() > 0, "every workload has blocks");
        let config = empty_config(origin.block_tokens())?;
        let index = match bytes_max {
            Some(bytes_max) => KvIndex::bounded(config, bytes_max)?,
            None => KvIndex::new(config),
        };
        let kind = match origin {
            Origin::Node => SourceKind::Node,
            Origin::Hashes | Origin::Engine => SourceKind::Vllm,
        };
        let pods: Vec<PodName> = (0..WORKERS).map(pod_name).collect::<Result<_>>()?;
        let sources = pods.iter().map(|pod| {
            index.add_source(SourceSpec {
                pod: pod.clone(),
                name: kind.name().to_owned(),
                kind,
                block_size: origin.block_tokens(),
            })
        });
        let sources = sources.collect::<Result<_>>()?;
        Ok(Self {
            index,
            pods,
            sources,
            origin,
        })
    }

    /// Applies all events, adding to `meter` what that took: they are made before the clock runs. False when stopped.
    ///
    /// # Errors
    /// `Internal` when the index does not take a block.
    pub(super) fn ingest(
        &self,
        mut events: impl Iterator<Item = Stored>,
        calls: Calls,
        meter: &mut Meter,
        stop: &Stop,
    ) -> Result<bool> {
        let mut batch: Vec<(SourceId, SourceEvent)> = Vec::with_capacity(EVENTS_PER_BATCH);
        loop {
            batch.clear();
            for stored in events.by_ref().take(EVENTS_PER_BATCH) {
                let source = self.sources[stored.worker as usize];
                batch.push((source, self.origin.event(&stored)));
            }
            if batch.is_empty() {
                return Ok(true);
            }
            if stop.is_set() {
                return Ok(false);
            }
            let (cpu, start) = (process_cpu(), Instant::now());
            meter.blocks += self.apply(&batch, calls)?;
            meter.time += start.elapsed();
            meter.cpu += process_cpu().saturating_sub(cpu);
            meter.events += batch.len() as u64;
        }
    }

    /// Applies events; how many blocks they stored.
    fn apply(&self, batch: &[(SourceId, SourceEvent)], calls: Calls) -> Result<u64> {
        let mut blocks = 0;
        if calls == Calls::Single {
            for (source, event) in batch {
                blocks += u64::from(self.index.apply(*source, event)?.stored);
            }
            return Ok(blocks);
        }
        let mut outcome = Ok(());
        self.index.apply_all(batch, |applied| match applied {
            Ok(applied) => blocks += u64::from(applied.stored),
            Err(error) => outcome = Err(error),
        });
        outcome.map(|()| blocks)
    }

    /// Compares what the index says it took with the workload.
    ///
    /// # Errors
    /// `Internal` with both numbers.
    pub(super) fn check(&self, workload: &Workload, meter: &Meter) -> Result<()> {
        let expected = (workload.events_count(), workload.pairs(), workload.pairs());
        let found = (meter.events, meter.blocks, self.index.entries());
        if found == expected {
            return Ok(());
        }
        Err(wrong(format!(
            "(events, blocks stored, entries) are {found:?}, the workload has {expected:?}"
        )))
    }

    /// The keys of a prompt with these contents, appended to `keys`: a router hashes once, for whatever index it asks.
    pub(super) fn hash(&self, contents: &[u64], keys: &mut Vec<IndexKey>) {
        match self.origin {
            Origin::Node => {
                let mut parent = None;
                keys.extend(contents.iter().map(|content| {
                    let key = chain(parent, *content);
                    parent = Some(key);
                    IndexKey(key)
                }));
            }
            origin => {
                let words = contents.len() * origin.block_tokens() as usize;
                let mut tokens = Vec::with_capacity(words);
                contents
                    .iter()
                    .for_each(|content| origin.append(*content, &mut tokens));
                self.index.keys_of(None, None, &tokens, keys);
            }
        }
    }

    /// Looks up all pods, into the caller's memory.
    pub(super) fn ask(&self, keys: &[IndexKey], depths: &mut Depths) {
        self.index.depths(keys, 0, &[], depths);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills an index from nodes and from engines, in both ways; all hold every pair and answer with the depth that is there.
    #[test]
    fn all_origins_store_every_pair_and_find_every_match() {
        let workload = Workload::new(1, 4, 16);
        for (origin, calls) in [
            (Origin::Node, Calls::Single),
            (Origin::Engine, Calls::Single),
            (Origin::Engine, Calls::Together),
            (Origin::Hashes, Calls::Together),
        ] {
            let filled = Filled::new(&workload, origin).unwrap();
            let mut meter = Meter::default();
            assert!(
                filled
                    .ingest(workload.events(), calls, &mut meter, &Stop::default())
                    .unwrap()
            );
            filled.check(&workload, &meter).unwrap();
            let (mut keys, mut found) = (Vec::new(), Depths::default());
            filled.hash(&workload.query(3, 2048, 1024), &mut keys);
            filled.ask(&keys, &mut found);
            let deepest = found.pods.iter().filter(|pod| pod.depth == 1024).count();
            assert_eq!((keys.len(), found.pods[0].depth, deepest), (2048, 1024, 4));
        }
    }

    /// An index that lacks the last event is not taken for full.
    #[test]
    fn a_missing_event_is_found() {
        let workload = Workload::new(1, 1, 16);
        let filled = Filled::new(&workload, Origin::Node).unwrap();
        let mut meter = Meter::default();
        let some = workload.events_count() as usize - 1;
        filled
            .ingest(
                workload.events().take(some),
                Calls::Together,
                &mut meter,
                &Stop::default(),
            )
            .unwrap();
        let error = filled.check(&workload, &meter).unwrap_err();
        assert!(error.to_string().contains("the workload has"), "{error}");
    }
}
