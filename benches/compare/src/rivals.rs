//! The rivals behind one face, each driven as its own service drives it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc;

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
    /// Applies events, freeing them; returns when all are applied.
    fn apply(&mut self, events: Vec<RouterEvent>) -> Result<(), Failure>;
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
        "radix" => Ok(Box::new(Radix(RadixTree::new()))),
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

struct Radix(RadixTree);

impl Rival for Radix {
    fn apply(&mut self, events: Vec<RouterEvent>) -> Result<(), Failure> {
        for event in events {
            self.0
                .apply_event(event)
                .map_err(|error| format!("{error:?}"))?;
        }
        Ok(())
    }

    fn remove(&mut self, worker: u32) -> Result<(), Failure> {
        self.0.remove_worker(worker.into());
        Ok(())
    }

    fn pairs(&mut self) -> Result<usize, Failure> {
        Ok(self.0.current_size())
    }

    fn find(&self, question: &[LocalBlockHash]) -> (u32, usize) {
        let found = self.0.find_matches(question.to_vec(), false).scores;
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
}

impl<T: SyncIndexer> Lane<T> {
    fn new(index: T) -> Self {
        let index = Arc::new(index);
        let (tasks, queue) = flume::unbounded();
        let writer = Arc::clone(&index);
        std::thread::spawn(move || writer.worker(queue, None));
        Self { index, tasks }
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
    fn apply(&mut self, events: Vec<RouterEvent>) -> Result<(), Failure> {
        for event in events {
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

enum ChainTask {
    Event(RouterEvent),
    Flush(mpsc::Sender<()>),
    Remove(u32, mpsc::Sender<()>),
}

/// SMG's index with one writer thread that keeps the workers' block maps.
struct Chain {
    index: Arc<ChainIndex>,
    tasks: flume::Sender<ChainTask>,
}

impl Chain {
    fn new() -> Result<Self, Failure> {
        let index = Arc::new(ChainIndex::new());
        for worker in 0..WORKERS {
            let number = index
                .intern_worker(&format!("worker-{worker}"))
                .map_err(|error| format!("{error:?}"))?;
            if number != worker {
                return Err(format!("worker {worker} has number {number}").into());
            }
        }
        let (tasks, queue) = flume::unbounded();
        let writer = Arc::clone(&index);
        std::thread::spawn(move || chain_writer(&writer, &queue));
        Ok(Self { index, tasks })
    }

    fn wait(&self, task: impl FnOnce(mpsc::Sender<()>) -> ChainTask) -> Result<(), Failure> {
        let (done, is_done) = mpsc::channel();
        self.tasks
            .send(task(done))
            .map_err(|_| "the writer has ended")?;
        Ok(is_done.recv()?)
    }
}

fn chain_writer(index: &ChainIndex, queue: &flume::Receiver<ChainTask>) {
    let mut maps: HashMap<u32, ChainBlockMap, FxBuildHasher> = HashMap::default();
    let mut blocks = Vec::new();
    while let Ok(task) = queue.recv() {
        match task {
            ChainTask::Event(event) => {
                let worker = event.worker_id as u32;
                let map = maps.entry(worker).or_insert_with(ChainBlockMap::new);
                let KvCacheEventData::Stored(stored) = event.event.data else {
                    continue;
                };
                blocks.clear();
                blocks.extend(stored.blocks.iter().map(|block| StoredBlock {
                    seq_hash: SequenceHash(block.block_hash.0),
                    content_hash: ContentHash(block.tokens_hash.0),
                }));
                let parent = stored.parent_hash.map(|hash| SequenceHash(hash.0));
                if index.apply_stored(worker, &blocks, parent, map).is_err() {
                    // What is missing is found when the pairs are counted.
                    return;
                }
            }
            ChainTask::Flush(done) => drop(done.send(())),
            ChainTask::Remove(worker, done) => {
                if let Some(map) = maps.remove(&worker) {
                    index.remove_worker(worker, map);
                }
                drop(done.send(()));
            }
        }
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
    fn apply(&mut self, events: Vec<RouterEvent>) -> Result<(), Failure> {
        for event in events {
            self.tasks
                .send(ChainTask::Event(event))
                .map_err(|_| "the writer has ended")?;
        }
        self.wait(ChainTask::Flush)
    }

    fn remove(&mut self, worker: u32) -> Result<(), Failure> {
        self.wait(|done| ChainTask::Remove(worker, done))
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
