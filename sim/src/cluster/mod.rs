//! A whole cluster in virtual time: real managers and engine pools, a faulty network, disks that flip bits, pods that
//! die, and a judge that knows what every byte must be.
//!
//! Everything follows from [`Config`], so a seed replays a failure exactly. Checked all the time: no wrong byte is ever
//! accepted, every store and fetch ends before its deadline, no hit is claimed for a block that nobody computed, no
//! arena slot is read or written under another use. Checked at the end: accesses add up, nothing stays pinned, leased or
//! quarantined, and what was announced is what is there.

mod audit;
mod compute;
mod config;
mod copy;
mod directory;
mod disturb;
mod drive;
mod lease;
mod memory;
mod outcome;
mod pod;
mod serve;
mod upkeep;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use kvcache_core::manager::CommandId;
use kvcache_core::place::SegmentId;
use kvcache_core::prefix::data::{ModelIdentity, Shard};
use kvcache_core::prefix::{IndexScheme, Namespace};
use kvcache_core::{PeerId, Time};
use kvfabric_transfer::backend::sim::{Exchange, SimNode, SimTransferId};

pub use config::{Config, Faults, Sabotage};

use crate::content::Content;
use crate::infinite::{Accesses, InfiniteCache};
use crate::report::Tally;
use crate::router::Router;
use crate::seed::Random;
use crate::sequence::Sequencer;
use crate::workload::{Request, Requests};
use directory::{Announcement, Directory};
use lease::Message;
use memory::{Memory, Objects};
use pod::{Active, Pod, RemoteCopy};

/// A run that takes more steps than this makes no progress.
const STEPS_MAX: u64 = 5_000_000;

/// The managers check all of their own counts after so many steps: it is slow, and some sums must be caught in between.
const STEPS_BETWEEN_CHECKS: u64 = 32;

/// After the last request everything must have come to rest within this time.
const REST_WAIT: Duration = Duration::from_secs(120);

/// What a run came to; equal settings give equal summaries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Things that happened.
    pub steps: u64,
    /// Requests that ended.
    pub requests: u64,
    /// Accesses by source, each counted once at the pod that worked on the prompt.
    pub tally: Tally,
    /// What a cache without limits would have hit.
    pub infinite: Accesses,
    /// Blocks whose every byte was compared.
    pub verified_blocks: u64,
    /// Pods that died.
    pub kills: u64,
    /// Pairs of pods that were cut off from each other.
    pub partitions: u64,
    /// Pods that were told to end.
    pub retirements: u64,
    /// Of these, pods that reached their end and were not killed before.
    pub retired: u64,
    /// Blocks written down by pods that ended in order.
    pub written_at_the_end: u64,
    /// Blocks found on disk when a pod came back.
    pub found_on_disk: u64,
    /// Pins that kept at least one block.
    pub pinned: u64,
    /// Flushes that waited for everything in time.
    pub flushed: u64,
    /// Blocks of fetches that ended.
    pub fetched_blocks: u64,
    /// Fetches after which a transfer was still at work.
    pub unsettled: u64,
    /// The managers' counters, added up over all incarnations of all pods, by name.
    pub counters: BTreeMap<&'static str, u64>,
    /// When it ended.
    pub at: Time,
    /// Over every step of the network.
    pub network_digest: u64,
}

/// Something that must never happen did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Replays it.
    pub seed: u64,
    /// At which step.
    pub step: u64,
    /// When, in virtual time.
    pub at: Time,
    /// What.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            step,
            at,
            what,
        } = self;
        write!(
            f,
            "seed {seed}, step {step}, {} ns: {what} (KVFABRIC_SEED={seed} replays it)",
            at.0
        )
    }
}

impl std::error::Error for Failure {}

type Check<T = ()> = Result<T, String>;

/// Something that happens at a time.
#[derive(Debug)]
enum Due {
    /// A local copy has run its time.
    Copied(PeerId, CommandId),
    /// A local copy that was given up has come to its end.
    Drained(PeerId, CommandId),
    /// A lease was not answered in time.
    Unanswered(PeerId, CommandId),
    SegmentDropped(PeerId, CommandId, SegmentId),
    Announced(PeerId, Vec<Announcement>),
    /// A request's pod has computed what was missing.
    Computed {
        request: u64,
        stay: u32,
    },
    /// A request is to be started (again).
    Start(u64),
    /// The others notice that a pod is gone.
    Gone(PeerId),
    Restart(usize),
    Heal(SimNode, SimNode),
    Disturb,
    /// Somebody wants something of a pod beside stores and fetches.
    Upkeep,
    /// A pod has written down what it could, and ends.
    Retired(PeerId),
}

/// A cluster before or while it runs.
pub struct Cluster {
    config: Config,
    now: Time,
    random: Random,
    exchange: Exchange,
    pods: Vec<Pod>,
    /// Which pod each incarnation is, or was.
    incarnations: Vec<usize>,
    agenda: BTreeMap<(Time, u64), Due>,
    scheduled: u64,
    messages: Vec<Message>,
    transfers: BTreeMap<SimTransferId, RemoteCopy>,
    objects: Objects,
    directory: Directory,
    requests: Requests,
    waiting: Option<Request>,
    active: BTreeMap<u64, Active>,
    ended: BTreeSet<u64>,
    /// Whether the audit's latest read brought the block; none while it is under way.
    audited: Option<bool>,
    next_pin: u64,
    content: Content,
    sequencer: Sequencer,
    router: Router,
    infinite: InfiniteCache,
    summary: Summary,
}

impl Cluster {
    /// A cluster with empty caches.
    ///
    /// # Errors
    /// `Invalid` naming the setting that is out of its range.
    pub fn new(config: Config) -> kvcache_core::Result<Self> {
        let identity = ModelIdentity([0x51; 32]);
        let shard = Shard::whole(config.layers, 1);
        let scheme = IndexScheme::default();
        let namespace = Namespace::default();
        let mut requests = config.workload.requests()?;
        let mut cluster = Self {
            now: Time(0),
            random: Random::stream(config.seed, 0xc105),
            exchange: Exchange::new(config.seed, config.fabric.clone())?,
            pods: Vec::new(),
            incarnations: Vec::new(),
            agenda: BTreeMap::new(),
            scheduled: 0,
            messages: Vec::new(),
            transfers: BTreeMap::new(),
            objects: Objects::new(),
            directory: Directory::default(),
            waiting: requests.next(),
            requests,
            active: BTreeMap::new(),
            ended: BTreeSet::new(),
            audited: None,
            next_pin: 0,
            content: Content::new(&identity.0, config.block_bytes, config.layers)?,
            sequencer: Sequencer::new(&identity, &shard, &scheme, &namespace, config.block_tokens)?,
            router: Router::new(config.policy, config.seed),
            infinite: InfiniteCache::new(config.block_tokens),
            summary: Summary::default(),
            config,
        };
        for position in 0..cluster.config.prefill_pods + cluster.config.decode_pods {
            let pod = cluster.start_pod(position, None)?;
            cluster.pods.push(pod);
        }
        Ok(cluster)
    }

    /// Serves the whole workload, lets everything come to rest, and checks what is left.
    ///
    /// A broken promise inside a manager or an engine pool panics there; say the seed before.
    ///
    /// # Errors
    /// What must never happen, with the seed that replays it.
    pub fn run(mut self) -> Result<Summary, Failure> {
        match self.run_checked() {
            Ok(()) => Ok(self.summary),
            Err(what) => Err(Failure {
                seed: self.config.seed,
                step: self.summary.steps,
                at: self.now,
                what,
            }),
        }
    }

    fn run_checked(&mut self) -> Check {
        if self.config.faults.disturbance_gap.is_some() {
            self.schedule_disturbance();
        }
        self.schedule_upkeep();
        self.issue()?;
        self.pump()?;
        while self.waiting.is_some() || !self.active.is_empty() {
            self.step()?;
        }
        self.rest()?;
        self.audit()?;
        self.summary.infinite = self.infinite.total();
        self.summary.network_digest = self.exchange.trace_digest();
        self.summary.at = self.now;
        Ok(())
    }

    /// Adds a manager's counters to those of the run: at its end, or when its pod dies.
    fn add_counters(&mut self, position: usize) {
        for (name, value) in self.pods[position].manager.stats().entries() {
            *self.summary.counters.entry(name).or_default() += value;
        }
    }

    fn schedule(&mut self, after: Duration, due: Due) {
        self.schedule_at(self.now + after, due);
    }

    fn schedule_at(&mut self, at: Time, due: Due) {
        self.scheduled += 1;
        self.agenda.insert((at, self.scheduled), due);
    }

    /// A duration up to this one.
    fn some_time(&mut self, most: Duration) -> Duration {
        Duration::from_nanos(self.random.below(most.as_nanos() as u64 + 1))
    }

    /// Which pod an incarnation is, if it lives.
    fn living(&self, peer: PeerId) -> Option<usize> {
        let position = *self.incarnations.get(peer.0 as usize)?;
        let pod = &self.pods[position];
        (pod.alive && pod.peer == peer).then_some(position)
    }

    fn start_pod(&mut self, position: usize, memory: Option<Memory>) -> kvcache_core::Result<Pod> {
        let name = format!("pod-{position}");
        let peer = PeerId(self.incarnations.len() as u32);
        self.incarnations.push(position);
        let node = self.exchange.add_node(&name)?;
        let Config {
            limits,
            block_bytes,
            engine_slots,
            ..
        } = &self.config;
        let mut fresh = Memory::new(*block_bytes, *engine_slots, limits.host_slots);
        if let Some(old) = memory {
            fresh.disk = old.disk;
        }
        self.directory.join(peer);
        let mut pod = Pod::start(&name, peer, node, limits, fresh, *engine_slots)?;
        pod.recover(self.now);
        Ok(pod)
    }
}
