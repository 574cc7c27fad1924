//! The one task that owns the manager: requests and completions go in, commands, events and answers
//! come out, in order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::event::NodeEvent;
use kvcache_core::manager::{FetchRequest, Manager};
use kvcache_core::{BlockKey, Checksum, LeaseId, OperationId, PeerId, PinId, Result, Time};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::announce::Announcer;
use super::desk::{Fetch, Health, ReadyLease, Reply, Request, Storing, closed};
use super::execute::Completion;
use super::grants::Grants;
use super::hold::Flush;
use super::types::{Fetched, HeldDepth, Pinned, Stored};
use crate::mover::Mover;
use crate::pages::BlockMemory;

/// Events in one batch for the sink.
const EVENTS_PER_BATCH_MAX: usize = 1024;

/// Requests taken from the queue before their commands are started.
const REQUESTS_PER_TURN_MAX: usize = 64;

/// How far ahead a deadline may lie; later ones count as this.
const DEADLINE_MAX: Duration = Duration::from_secs(24 * 3600);

/// An operation of an engine: its memory, and who waits.
pub(super) struct Operation<T> {
    memory: Vec<BlockMemory>,
    /// Of each block: what a store's bytes must match, if that is known; what a fetch's were found to be, when they have come.
    pub(super) sums: Vec<Option<Checksum>>,
    /// Blocks of a store, by position, whose bytes were something else.
    pub(super) corrupt: Vec<u32>,
    pub(super) reply: Reply<T>,
}

/// The state of the driver's task.
pub(super) struct Driver {
    pub(super) manager: Manager,
    pub(super) mover: Arc<Mover>,
    pub(super) tasks: JoinSet<Completion>,
    pub(super) announcer: Arc<Announcer>,
    requests: mpsc::Receiver<Request>,
    /// What [`Time`] counts from.
    start: Instant,
    pub(super) stores: HashMap<OperationId, Operation<Stored>>,
    pub(super) fetches: HashMap<OperationId, Operation<Fetched>>,
    pub(super) draining: HashMap<OperationId, oneshot::Sender<()>>,
    pub(super) grants: Grants,
    /// Who waits for a pin to hold.
    pub(super) pins: HashMap<PinId, Reply<Pinned>>,
    pub(super) flushes: HashMap<OperationId, Flush>,
    /// Flushes whose copies have ended, and which wait for the disk.
    pub(super) syncs: usize,
    pub(super) closing: Option<Closing>,
}

/// The end that was asked for.
pub(super) struct Closing {
    /// When it must be reached.
    pub(super) deadline: Time,
    pub(super) reply: Reply<()>,
    /// Whether everything has gone down that can.
    pub(super) retired: bool,
}

/// What a driver is made of.
pub(super) struct Parts {
    pub(super) manager: Manager,
    pub(super) mover: Arc<Mover>,
    pub(super) announcer: Arc<Announcer>,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) start: Instant,
    pub(super) leases_per_peer_max: u32,
}

impl Driver {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            manager: parts.manager,
            mover: parts.mover,
            tasks: JoinSet::new(),
            announcer: parts.announcer,
            requests: parts.requests,
            start: parts.start,
            stores: HashMap::new(),
            fetches: HashMap::new(),
            draining: HashMap::new(),
            grants: Grants::new(parts.leases_per_peer_max),
            pins: HashMap::new(),
            flushes: HashMap::new(),
            syncs: 0,
            closing: None,
        }
    }

    /// Runs until shutdown, or until the last handle is gone.
    pub(super) async fn run(mut self, health: Arc<Health>) {
        loop {
            self.pump();
            if self.is_closed() {
                return self.close(&health).await;
            }
            let wake = tokio::time::Instant::from_std(self.wake());
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.take_requests(request),
                    None => return health.ends_in_order(),
                },
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => match done {
                    Ok(completion) => self.complete(completion),
                    Err(error) => {
                        // The command will never be answered, so nothing here can be trusted to end.
                        tracing::error!(%error, "a command ended without an answer; cache stops");
                        return;
                    }
                },
                () = tokio::time::sleep_until(wake) => {
                    let now = self.now();
                    self.manager.handle_timeout(now);
                }
            }
        }
    }

    pub(super) fn now(&self) -> Time {
        self.time(Instant::now())
    }

    pub(super) fn time(&self, instant: Instant) -> Time {
        Time::default()
            + instant
                .saturating_duration_since(self.start)
                .min(DEADLINE_MAX * 365)
    }

    /// The instant that the manager means; bounded, so that it can be added and slept for.
    pub(super) fn instant(&self, time: Time) -> Instant {
        let now = Instant::now();
        now + time.since(self.time(now)).min(DEADLINE_MAX)
    }

    /// A caller's instant, so near that timers can hold it.
    pub(super) fn bounded(&self, instant: Instant) -> Instant {
        self.instant(self.time(instant))
    }

    fn wake(&self) -> Instant {
        let mut wake = self.manager.poll_timeout().unwrap_or(Time::MAX);
        if let Some(closing) = &self.closing {
            wake = wake.min(closing.deadline);
        }
        self.instant(wake)
    }

    /// Carries out everything that the manager has ready.
    fn pump(&mut self) {
        loop {
            let now = self.now();
            let mut idle = true;
            while let Some(command) = self.manager.poll_command(now) {
                self.execute(command);
                idle = false;
            }
            self.publish();
            while let Some(outcome) = self.manager.poll_outcome() {
                self.answer(outcome);
                idle = false;
            }
            if idle {
                return;
            }
        }
    }

    /// Hands events to the sink before the answers of what caused them, so that a caller who asks for
    /// the position afterwards finds its own changes in it.
    pub(super) fn publish(&mut self) {
        publish(&mut self.manager, |events| self.announcer.tell(events));
    }

    fn take_requests(&mut self, first: Request) {
        let mut next = Some(first);
        for _ in 0..REQUESTS_PER_TURN_MAX {
            let Some(request) = next else { return };
            self.take_request(request);
            next = self.requests.try_recv().ok();
        }
        if let Some(request) = next {
            self.take_request(request);
        }
    }

    fn take_request(&mut self, request: Request) {
        let closing = self.closing.is_some();
        match request {
            Request::Store { reply, .. } if closing => refuse(reply),
            Request::Fetch { reply, .. } if closing => refuse(reply),
            Request::Lease { reply, .. } if closing => refuse(reply),
            Request::Pin { reply, .. } if closing => refuse(reply),
            Request::Remove { reply, .. } | Request::Clear { reply } if closing => refuse(reply),
            Request::Flush { reply, .. } | Request::Shutdown { reply, .. } if closing => {
                refuse(reply);
            }
            Request::Store { store, reply } => self.store(store, reply),
            Request::Fetch { fetch, reply } => self.fetch(fetch, reply),
            Request::Lease {
                peer,
                keys,
                ttl,
                reply,
            } => self.lease(peer, &keys, ttl, reply),
            Request::Release { peer, lease } => self.release(peer, lease),
            Request::Pin {
                pin,
                keys,
                ttl,
                reply,
            } => self.pin(pin, &keys, ttl, reply),
            Request::Unpin { pin } => self.manager.handle_unpin(self.now(), pin),
            Request::Remove { keys, reply } => self.remove(&keys, reply),
            Request::Clear { reply } => self.clear(reply),
            Request::Flush { deadline, reply } => self.flush(deadline, reply),
            Request::PeerLost { peer } => {
                self.grants.end_all(peer);
                self.manager.handle_peer_lost(self.now(), peer);
            }
            Request::Lookup { keys, reply } => {
                let held = self.manager.lookup(&keys);
                let depth = HeldDepth {
                    depth: held.depth,
                    host: held.host,
                    disk: held.disk,
                    expected: held.expected,
                };
                give(reply, Ok(depth));
            }
            Request::Stats { reply } => give(reply, Ok(self.manager.stats())),
            Request::Shutdown { deadline, reply } => self.begin_close(deadline, reply),
        }
    }

    fn store(&mut self, store: Storing, reply: Reply<Stored>) {
        let infos = store.blocks.iter().map(|block| block.info).collect();
        let deadline = self.time(store.deadline);
        match self.manager.handle_store(self.now(), infos, deadline) {
            Ok(operation) => {
                let memory = store.blocks.into_iter().map(|block| block.memory);
                let operation_of = Operation {
                    memory: memory.collect(),
                    sums: store.sums,
                    corrupt: Vec::new(),
                    reply,
                };
                self.stores.insert(operation, operation_of);
            }
            Err(error) => give(reply, Err(error)),
        }
    }

    fn fetch(&mut self, fetch: Fetch, reply: Reply<Fetched>) {
        let request = FetchRequest {
            blocks: fetch.blocks.iter().map(|block| block.info).collect(),
            holders: fetch.holders,
            shared: fetch.shared,
        };
        match self
            .manager
            .handle_fetch(self.now(), request, self.time(fetch.deadline))
        {
            Ok(operation) => {
                let memory = fetch.blocks.into_iter().map(|block| block.memory);
                let memory: Vec<BlockMemory> = memory.collect();
                let operation_of = Operation {
                    sums: vec![None; memory.len()],
                    memory,
                    corrupt: Vec::new(),
                    reply,
                };
                self.fetches.insert(operation, operation_of);
            }
            Err(error) => give(reply, Err(error)),
        }
    }

    fn lease(&mut self, peer: PeerId, keys: &[BlockKey], ttl: Duration, reply: Reply<ReadyLease>) {
        let now = self.now();
        let leased = self.grants.check(now, peer);
        match leased.and_then(|()| self.manager.handle_lease(now, peer, keys, ttl)) {
            Ok(lease) => {
                // Readying it may take as long as staging.
                let limits = self.manager.limits();
                let ends = now + limits.stage_wait + ttl.min(limits.lease_ttl);
                self.grants.begin(peer, lease, ends, reply);
            }
            Err(error) => give(reply, Err(error)),
        }
    }

    pub(super) fn release(&mut self, peer: PeerId, lease: LeaseId) {
        self.grants.end(peer, lease);
        self.manager.handle_release(self.now(), peer, lease);
    }

    /// Where the engine has, or wants, a block of an operation that is still under way.
    pub(super) fn engine_memory(
        &self,
        operation: OperationId,
        position: u32,
    ) -> Option<BlockMemory> {
        let memory = match (self.stores.get(&operation), self.fetches.get(&operation)) {
            (Some(store), _) => &store.memory,
            (None, Some(fetch)) => &fetch.memory,
            (None, None) => return None,
        };
        memory.get(position as usize).cloned()
    }
}

/// Hands all of the manager's events on, in batches.
pub(super) fn publish(manager: &mut Manager, mut tell: impl FnMut(Vec<NodeEvent>)) {
    loop {
        let events = std::iter::from_fn(|| manager.poll_event());
        let events: Vec<_> = events.take(EVENTS_PER_BATCH_MAX).collect();
        if events.is_empty() {
            return;
        }
        tell(events);
    }
}

fn refuse<T>(reply: Reply<T>) {
    give(reply, Err(closed()));
}

/// Answers, unless nobody waits any more.
pub(super) fn give<T>(reply: Reply<T>, answer: Result<T>) {
    let _ = reply.send(answer);
}
