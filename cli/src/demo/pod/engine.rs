//! The simulated engine: its HBM tier is an arena registered with the node, its kernels fill blocks with known bytes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::prefix::data::{ModelIdentity, Shard};
use kvcache_core::prefix::{IndexScheme, Namespace};
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::config::parse_identity;
use kvfabric::transfer::{Descriptor, HostMemory, Region, RegionOptions};
use kvfabric::{FetchBlock, Node, Source, StoreBlock};
use kvfabric_sim::content::Content;
use kvfabric_sim::engine::{ComputeModel, EnginePool, Running};
use kvfabric_sim::sequence::{Sequence, Sequencer};
use tokio::sync::Notify;

use super::quarantine::{self, Doubtful, Held};
use super::translate::{self, count_hits, hints, source_name};
use crate::demo::protocol::{PodCounters, PodSetup, PositionText, Served, Task};

/// How long a request may wait for others to leave the engine's pool.
const ADMISSION_DEADLINE: Duration = Duration::from_secs(60);

/// How long storing a request's blocks may take.
const STORE_DEADLINE: Duration = Duration::from_secs(10);

/// The same where nothing may be lost.
const STORE_DEADLINE_LOSSLESS: Duration = Duration::from_secs(60);

/// An engine and the node under it.
pub(super) struct Engine {
    node: Node,
    hbm: Region,
    sequencer: Sequencer,
    content: Content,
    compute: ComputeModel,
    fetch_deadline: Duration,
    lossless: bool,
    pool: Arc<Mutex<EnginePool>>,
    /// Told whenever slots come back to the pool.
    room: Arc<Notify>,
    events: AtomicU64,
}

impl Engine {
    pub(super) async fn open(setup: PodSetup) -> Result<Self> {
        let identity = ModelIdentity(parse_identity(&setup.node.model_identity)?);
        let block_bytes = usize::try_from(setup.node.block_bytes)
            .map_err(|_| Error::invalid("block_bytes", setup.node.block_bytes, 1..=usize::MAX))?;
        let content = Content::new(&identity.0, block_bytes, setup.layers)?;
        let slots = u32::try_from(setup.hbm_bytes / setup.node.block_bytes).unwrap_or(u32::MAX);
        let scheme = IndexScheme::parse(&setup.node.key_scheme)?;
        let sequencer = Sequencer::new(
            &identity,
            &Shard::whole(1, 1),
            &scheme,
            &Namespace {
                model: scheme.model_in_root(&setup.node.model),
                ..Default::default()
            },
            setup.node.block_tokens,
        )?;
        let node = Node::open(setup.node.clone()).await?;
        let memory = HostMemory::anonymous(u64::from(slots) * setup.node.block_bytes)?;
        let hbm = node.agent().register(memory, RegionOptions::default())?;
        Ok(Self {
            node,
            hbm,
            sequencer,
            content,
            compute: ComputeModel {
                tokens_per_s: setup.prefill_tokens_per_second as u32,
            },
            fetch_deadline: Duration::from_millis(setup.fetch_deadline_ms),
            lossless: setup.lossless,
            pool: Arc::new(Mutex::new(EnginePool::new(slots))),
            room: Arc::new(Notify::new()),
            events: AtomicU64::new(0),
        })
    }

    pub(super) fn peer_address(&self) -> String {
        self.node
            .peer_address()
            .map(|address| address.to_string())
            .unwrap_or_default()
    }

    /// Brings the prompt's blocks in from wherever they are, computes the rest, checks and stores them all.
    pub(super) async fn prefill(&self, task: &Task) -> Result<Served> {
        let sequence = Arc::new(self.sequencer.request(&task.to_request()));
        let reusable = sequence.reusable_blocks();
        let mut running = self.admit(&sequence, reusable).await?;
        let mut doubtful = Doubtful::default();
        let result = self
            .prefill_admitted(task, &mut running, reusable, &mut doubtful)
            .await;
        self.leave(running, doubtful);
        result
    }

    async fn prefill_admitted(
        &self,
        task: &Task,
        running: &mut Running,
        reusable: usize,
        doubtful: &mut Doubtful,
    ) -> Result<Served> {
        let sequence = Arc::clone(running.sequence());
        let mut served = Served {
            accesses: sequence.prompt_blocks() as u64,
            ..Served::default()
        };
        let held = running.hits();
        count_hits(&mut served.hits, "hbm", held as u64);
        let fetched = self
            .fetch(task, running, reusable, &mut served, doubtful)
            .await?;
        let known = held + fetched.len();
        for source in &fetched {
            count_hits(&mut served.hits, source_name(source), 1);
        }
        served.misses = (sequence.prompt_blocks() - known) as u64;
        let block_tokens = self.sequencer.block_tokens() as usize;
        let prompt_tokens = task.to_request().prompt_tokens().len();
        let computed = prompt_tokens - (known * block_tokens).min(prompt_tokens);
        served.computing_us =
            u64::try_from(self.compute.time(computed as u64).as_micros()).unwrap_or(u64::MAX);
        self.compute_blocks(running, known..sequence.prompt_blocks())?;
        self.complete(running, sequence.prompt_blocks(), &mut served)
            .await?;
        Ok(served)
    }

    /// Pulls the prompt's blocks, then writes the answer's. What cannot be pulled is computed; none of it is an access.
    pub(super) async fn decode(&self, task: &Task) -> Result<Served> {
        let sequence = Arc::new(self.sequencer.request(&task.to_request()));
        let mut running = self.admit_with_answer(&sequence).await?;
        let mut doubtful = Doubtful::default();
        let result = self
            .decode_admitted(task, &mut running, &mut doubtful)
            .await;
        self.leave(running, doubtful);
        result
    }

    async fn decode_admitted(
        &self,
        task: &Task,
        running: &mut Running,
        doubtful: &mut Doubtful,
    ) -> Result<Served> {
        let sequence = Arc::clone(running.sequence());
        let (prompt, all) = (sequence.prompt_blocks(), sequence.blocks().len());
        let mut served = Served::default();
        let held = running.hits();
        let fetched = self
            .fetch(task, running, prompt, &mut served, doubtful)
            .await?;
        self.compute_blocks(running, held + fetched.len()..prompt)?;
        self.publish(|pool| pool.seal(running, prompt - held))?;
        self.compute_blocks(running, prompt..all)?;
        self.complete(running, all, &mut served).await?;
        Ok(served)
    }

    /// Checks the first `count` blocks, announces those that are new, and stores them.
    async fn complete(
        &self,
        running: &mut Running,
        count: usize,
        served: &mut Served,
    ) -> Result<()> {
        self.verify(running, count, served)?;
        let unsealed = count - running.sealed();
        self.publish(|pool| pool.seal(running, unsealed))?;
        self.store(running, count).await?;
        served.positions = self
            .node
            .positions()
            .into_iter()
            .map(|at| PositionText {
                source: at.source,
                epoch: at.position.epoch.0,
                next: at.position.next.0,
            })
            .collect();
        Ok(())
    }

    /// Fetches blocks up to `end` into their slots; the sources of as many as came without a hole. Blocks that are
    /// `doubtful` after an error must leave with their slots.
    async fn fetch(
        &self,
        task: &Task,
        running: &mut Running,
        end: usize,
        served: &mut Served,
        doubtful: &mut Doubtful,
    ) -> Result<Vec<Source>> {
        let start = running.hits();
        if start >= end {
            return Ok(Vec::new());
        }
        let blocks = (start..end).map(|position| FetchBlock {
            info: running.sequence().blocks()[position],
            memory: self.memory(running, position).into(),
        });
        let began = Instant::now();
        let hints = hints(task, start)?;
        // The index was asked a moment ago: what it did not name, this pod's own tiers included, nobody holds.
        if hints.is_empty() {
            return Ok(Vec::new());
        }
        let fetch = self
            .node
            .fetch(blocks.collect(), hints, self.fetch_deadline);
        let mut report = match fetch.await {
            Ok(report) => report,
            Err(error) => {
                if error.kind() == ErrorKind::Poisoned {
                    *doubtful = Doubtful::for_ever(start..end);
                }
                return Err(error);
            }
        };
        served.moving_us += u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let depth = report.depth();
        let mut sources = std::mem::take(&mut report.sources);
        sources.truncate(depth);
        if report.unsettled.is_empty() {
            return Ok(sources);
        }
        match self.publish(|pool| quarantine::exchange(pool, running, start, report))? {
            Ok(held) => self.await_drained(held),
            Err((blocks, error)) => {
                *doubtful = blocks;
                return Err(error);
            }
        }
        Ok(sources)
    }

    /// Readmits slots once no transfer can write to them any more.
    fn await_drained(&self, held: Held) {
        let (pool, room) = (Arc::clone(&self.pool), Arc::clone(&self.room));
        tokio::spawn(async move {
            if let Some(slots) = held.drained().await {
                let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
                slots.into_iter().for_each(|slot| pool.readmit(slot));
                drop(pool);
                room.notify_waiters();
            }
        });
    }

    /// What a real engine's kernels would do.
    fn compute_blocks(&self, running: &Running, positions: std::ops::Range<usize>) -> Result<()> {
        let mut bytes = vec![0; self.content.block_bytes()];
        tokio::task::block_in_place(|| {
            for position in positions {
                self.content
                    .fill(&running.sequence().blocks()[position].key, &mut bytes);
                self.hbm
                    .write_at(self.memory(running, position).offset, &bytes)?;
            }
            Ok(())
        })
    }

    /// Compares the first `count` blocks byte for byte with what they must be.
    fn verify(&self, running: &Running, count: usize, served: &mut Served) -> Result<()> {
        let mut bytes = vec![0; self.content.block_bytes()];
        tokio::task::block_in_place(|| {
            for position in 0..count {
                self.hbm
                    .read_at(self.memory(running, position).offset, &mut bytes)?;
                let key = &running.sequence().blocks()[position].key;
                served.verified += 1;
                if let Err(mismatch) = self.content.verify(key, &bytes) {
                    served.verify_failures += 1;
                    tracing::error!(?key, position, %mismatch, "a wrong byte was served");
                }
            }
            Ok(())
        })
    }

    async fn store(&self, running: &Running, count: usize) -> Result<()> {
        let blocks = (0..count).map(|position| StoreBlock {
            info: running.sequence().blocks()[position],
            memory: self.memory(running, position).into(),
        });
        let deadline = if self.lossless {
            STORE_DEADLINE_LOSSLESS
        } else {
            STORE_DEADLINE
        };
        let report = self.node.store(blocks.collect(), deadline).await?;
        if self.lossless && report.refused + report.failed > 0 {
            let text = format!("unbounded, but not every block was stored: {report:?}");
            return Err(Error::new(ErrorKind::NoSpace, text));
        }
        Ok(())
    }

    /// Changes the pool and publishes what that means, in one go: events leave in the order of the changes.
    fn publish<T>(&self, change: impl FnOnce(&mut EnginePool) -> T) -> Result<T> {
        let mut pool = self.lock();
        let changed = change(&mut pool);
        let events = pool.take_events();
        self.events
            .fetch_add(events.len() as u64, Ordering::Relaxed);
        self.node.publish_engine(events)?;
        Ok(changed)
    }

    /// Waits until the pool has room for the prompt.
    async fn admit(&self, sequence: &Arc<Sequence>, reusable: usize) -> Result<Running> {
        self.when_there_is_room(|pool| pool.admit(Arc::clone(sequence), reusable))
            .await
    }

    /// Waits until the pool has room for prompt and answer together: requests that each held room for their prompts and
    /// waited for more could wait for each other for ever.
    async fn admit_with_answer(&self, sequence: &Arc<Sequence>) -> Result<Running> {
        self.when_there_is_room(|pool| {
            let mut running = pool.admit(Arc::clone(sequence), sequence.prompt_blocks())?;
            match pool.extend(&mut running) {
                Ok(()) => Ok(running),
                Err(error) => {
                    pool.finish(running);
                    Err(error)
                }
            }
        })
        .await
    }

    async fn when_there_is_room<T>(
        &self,
        mut change: impl FnMut(&mut EnginePool) -> Result<T>,
    ) -> Result<T> {
        let give_up = tokio::time::Instant::now() + ADMISSION_DEADLINE;
        loop {
            let freed = self.room.notified();
            tokio::pin!(freed);
            // Registered before trying, so that room made in between is not missed.
            freed.as_mut().enable();
            match self.publish(&mut change)? {
                Err(error) if error.kind() == ErrorKind::Busy => {
                    if tokio::time::timeout_at(give_up, freed).await.is_err() {
                        return Err(error.at(format!("after {ADMISSION_DEADLINE:?}")));
                    }
                }
                result => return result,
            }
        }
    }

    fn leave(&self, running: Running, doubtful: Doubtful) {
        let held = quarantine::leave(&mut self.lock(), running, doubtful);
        self.room.notify_waiters();
        if let Some(held) = held {
            self.await_drained(held);
        }
    }

    fn lock(&self) -> MutexGuard<'_, EnginePool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self, running: &Running, position: usize) -> Descriptor {
        let block_bytes = self.content.block_bytes() as u64;
        let slot = running.slots()[position];
        self.hbm
            .descriptor(u64::from(slot.0) * block_bytes, block_bytes)
    }

    /// Everything counted so far.
    pub(super) async fn counters(&self) -> Result<PodCounters> {
        let of_node = self.node.tier_stats().await?.into_iter();
        let named = of_node.map(|(name, value)| (name.to_owned(), value));
        let mut tiers: BTreeMap<String, u64> = named.collect();
        tiers.insert("hbm_evictions".to_owned(), self.lock().evictions());
        Ok(PodCounters {
            backends: translate::backends(self.node.agent().stats()),
            tiers,
            events: self.events.load(Ordering::Relaxed),
        })
    }

    pub(super) async fn shutdown(&self, deadline: Duration) -> Result<()> {
        self.node.shutdown(deadline).await
    }
}
