//! The rivals behind one face, each called as directly as its package allows.

use std::collections::HashMap;
use std::sync::Arc;

use dynamo_kv_router::indexer::{SyncIndexer, WorkerTask};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, RadixTree};
use kv_index::{ChainBlockMap, ChainIndex, ContentHash, SequenceHash, StoredBlock};
use rustc_hash::FxBuildHasher;

use crate::workload::{Stored, WORKERS};

/// Why a measurement could not be made.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Answers a question on any thread; how deep the deepest worker is and how many there are.
pub(crate) type Finder = Arc<dyn Fn(&[LocalBlockHash]) -> (u32, usize) + Send + Sync>;

/// An index under test.
pub(crate) trait Rival {
    /// Brings events into the form that the index takes, before the clock runs.
    fn take(&mut self, events: Vec<RouterEvent>);
    /// Applies what was taken; returns when all is applied.
    fn apply(&mut self) -> Result<(), Failure>;
    /// Removes all that a worker holds.
    fn remove(&mut self, worker: u32) -> Result<(), Failure>;
    /// Blocks by worker.
    fn pairs(&mut self) -> Result<usize, Failure>;
    /// Looks up.
    fn find(&self, question: &[LocalBlockHash]) -> (u32, usize);
    /// The same for another thread; none where the index has one thread only.
    fn finder(&self) -> Option<Finder>;
}

/// Makes a rival by name.
pub(crate) fn rival(name: &str) -> Result<Box<dyn Rival>, Failure> {
    match name {
        "crtc" => Ok(Box::new(Lane::new(ConcurrentRadixTreeCompressed::new()))),
        "radix" => Ok(Box::new(Radix::new())),
        "chain" => Ok(Box::new(Chain::new()?)),
        other => Err(format!("{other:?} is no rival: crtc, radix or chain").into()),
    }
}

/// An event as Dynamo's router has it.
pub(crate) fn event(stored: &Stored, number: u64) -> RouterEvent {
    let blocks = stored.blocks.iter().map(|block| KvCacheStoredBlockData {
        block_hash: ExternalSequenceBlockHash(block.key),
        tokens_hash: LocalBlockHash(block.content),
        mm_extra_info: None,
    });
    let data = KvCacheEventData::Stored(KvCacheStoreData {
        parent_hash: stored.parent.map(ExternalSequenceBlockHash),
        start_position: None,
        blocks: blocks.collect(),
    });
    let event = KvCacheEvent {
        event_id: number,
        data,
        dp_rank: 0,
    };
    RouterEvent::new(stored.worker.into(), event)
}

/// Dynamo's single-threaded index, called without a channel; it frees the events, which it is given by value.
struct Radix {
    index: RadixTree,
    taken: Vec<RouterEvent>,
}

impl Radix {
    fn new() -> Self {
        Self {
            index: RadixTree::new(),
            taken: Vec::new(),
        }
    }
}

impl Rival for Radix {
    fn take(&mut self, events: Vec<RouterEvent>) {
        self.taken = events;
    }

    fn apply(&mut self) -> Result<(), Failure> {
        for event in self.taken.drain(..) {
            self.index
                .apply_event(event)
                .map_err(|error| format!("{error:?}"))?;
        }
        Ok(())
    }

    fn remove(&mut self, worker: u32) -> Result<(), Failure> {
        self.index.remove_worker(worker.into());
        Ok(())
    }

    fn pairs(&mut self) -> Result<usize, Failure> {
        Ok(self.index.current_size())
    }

    fn find(&self, question: &[LocalBlockHash]) -> (u32, usize) {
        let found = self.index.find_matches(question.to_vec(), false).scores;
        (found.values().copied().max().unwrap_or(0), found.len())
    }

    fn finder(&self) -> Option<Finder> {
        None
    }
}

/// One writer thread on a channel, as `ThreadPoolIndexer` has them; questions are answered by whoever asks.
struct Lane<T> {
    index: Arc<T>,
    tasks: flume::Sender<WorkerTask>,
    taken: Vec<RouterEvent>,
}

impl<T: SyncIndexer> Lane<T> {
    fn new(index: T) -> Self {
        let index = Arc::new(index);
        let (tasks, queue) = flume::unbounded();
        let writer = Arc::clone(&index);
        std::thread::spawn(move || writer.worker(queue, None));
        Self {
            index,
            tasks,
            taken: Vec::new(),
        }
    }

    fn ask<R>(
        &self,
        task: impl FnOnce(tokio::sync::oneshot::Sender<R>) -> WorkerTask,
    ) -> Result<R, Failure> {
        let (answer, answered) = tokio::sync::oneshot::channel();
        self.tasks
            .send(task(answer))
            .map_err(|_| "the writer has ended")?;
        Ok(answered.blocking_recv()?)
    }
}

impl<T: SyncIndexer> Rival for Lane<T> {
    fn take(&mut self, events: Vec<RouterEvent>) {
        self.taken = events;
    }

    fn apply(&mut self) -> Result<(), Failure> {
        for event in self.taken.drain(..) {
            self.tasks
                .send(WorkerTask::Event(event))
                .map_err(|_| "the writer has ended")?;
        }
        self.ask(WorkerTask::Flush)?;
        Ok(())
    }

    fn remove(&mut self, worker: u32) -> Result<(), Failure> {
        // Two steps, as the service takes them.
        for sweep_tree in [false, true] {
            self.ask(|resp| WorkerTask::RemoveWorker {
                worker_id: worker.into(),
                sweep_tree,
                resp,
            })?;
        }
        Ok(())
    }

    fn pairs(&mut self) -> Result<usize, Failure> {
        Ok(self.ask(WorkerTask::Stats)?.block_count())
    }

    fn find(&self, question: &[LocalBlockHash]) -> (u32, usize) {
        let found = self.index.find_matches(question, false).scores;
        (found.values().copied().max().unwrap_or(0), found.len())
    }

    fn finder(&self) -> Option<Finder> {
        let index = Arc::clone(&self.index);
        Some(Arc::new(move |question| {
            let found = index.find_matches(question, false).scores;
            (found.values().copied().max().unwrap_or(0), found.len())
        }))
    }
}

/// What SMG's index takes: a worker, blocks and what they follow.
struct ChainEvent {
    worker: u32,
    parent: Option<SequenceHash>,
    blocks: Vec<StoredBlock>,
}

impl ChainEvent {
    fn new(event: RouterEvent) -> Option<Self> {
        let KvCacheEventData::Stored(stored) = event.event.data else {
            return None;
        };
        let blocks = stored.blocks.iter().map(|block| StoredBlock {
            seq_hash: SequenceHash(block.block_hash.0),
            content_hash: ContentHash(block.tokens_hash.0),
        });
        Some(Self {
            worker: event.worker_id as u32,
            parent: stored.parent_hash.map(|hash| SequenceHash(hash.0)),
            blocks: blocks.collect(),
        })
    }
}

/// SMG's index, called without a channel, with its writer's block maps.
struct Chain {
    index: Arc<ChainIndex>,
    maps: HashMap<u32, ChainBlockMap, FxBuildHasher>,
    taken: Vec<ChainEvent>,
}

impl Chain {
    fn new() -> Result<Self, Failure> {
        let index = ChainIndex::new();
        for worker in 0..WORKERS {
            let number = index
                .intern_worker(&format!("worker-{worker}"))
                .map_err(|error| format!("{error:?}"))?;
            if number != worker {
                return Err(format!("worker {worker} has number {number}").into());
            }
        }
        Ok(Self {
            index: Arc::new(index),
            maps: HashMap::default(),
            taken: Vec::new(),
        })
    }
}

fn chain_find(index: &ChainIndex, question: &[LocalBlockHash]) -> (u32, usize) {
    let mut scores: HashMap<u32, u32, FxBuildHasher> = HashMap::default();
    index.score_into(
        question,
        |hash| hash.0,
        false,
        |worker, score| {
            scores.insert(worker, score);
        },
    );
    (scores.values().copied().max().unwrap_or(0), scores.len())
}

impl Rival for Chain {
    fn take(&mut self, events: Vec<RouterEvent>) {
        self.taken = events.into_iter().filter_map(ChainEvent::new).collect();
    }

    fn apply(&mut self) -> Result<(), Failure> {
        for event in &self.taken {
            let ChainEvent {
                worker,
                parent,
                blocks,
            } = event;
            let map = self.maps.entry(*worker).or_insert_with(ChainBlockMap::new);
            self.index
                .apply_stored(*worker, blocks, *parent, map)
                .map_err(|error| format!("{error:?}"))?;
        }
        Ok(())
    }

    fn remove(&mut self, worker: u32) -> Result<(), Failure> {
        if let Some(map) = self.maps.remove(&worker) {
            self.index.remove_worker(worker, map);
        }
        Ok(())
    }

    fn pairs(&mut self) -> Result<usize, Failure> {
        Ok(self.index.current_size())
    }

    fn find(&self, question: &[LocalBlockHash]) -> (u32, usize) {
        chain_find(&self.index, question)
    }

    fn finder(&self) -> Option<Finder> {
        let index = Arc::clone(&self.index);
        Some(Arc::new(move |question| chain_find(&index, question)))
    }
}
