//! The simulated network as a fabric between agents of one process.
//!
//! Time is virtual: nothing waits for a latency, the network jumps to whatever is due next. A thread drives it; while
//! it is paused only [`SimNetwork::advance`] does, so that a test decides what is in flight when.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result, Time};

use super::exchange::{Direction, Effect, Exchange, ExchangeConfig, SimTransfer, SimTransferId};
use super::network::{LinkProfile, SimNode};
use crate::agent::{AgentBuilder, Exports, PeerCard, RemoteRegion};
use crate::backend::{Backend, Capabilities, Channel, Fabric, Job, Operation, Refusal, abandoned};
use crate::descriptor::Target;
use crate::region::{MemoryKind, RegionUse};
use crate::sys::memory::Mapping;

/// The name in reports, statistics and metadata.
const NAME: &str = "sim";

/// A simulated network that agents of this process join. Clones are handles to the same one.
#[derive(Clone)]
pub struct SimNetwork(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    driver: Option<JoinHandle<()>>,
}

struct Shared {
    /// Tells this network from others in metadata.
    id: u64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    exchange: Exchange,
    now: Time,
    paused: bool,
    closed: bool,
    members: BTreeMap<String, Member>,
    running: BTreeMap<SimTransferId, Running>,
    channels: u64,
}

struct Member {
    node: SimNode,
    exports: Weak<Exports>,
}

/// A job on its way.
struct Running {
    job: Job,
    /// By position in the plan's remote side.
    remote: Vec<RegionUse>,
    /// Where each extent starts in the transfer.
    starts: Vec<u64>,
    channel: u64,
    from: Arc<str>,
    peer: Arc<Exports>,
    failure: Option<Error>,
    cancelled: bool,
}

/// What is told to jobs, and dropped, once the lock is free: it can call anybody's waker, and end agents.
type Settled = Vec<Running>;

impl SimNetwork {
    /// A network without members: the same seed and the same posts, made while it is paused, give the same trace.
    ///
    /// # Errors
    /// `Invalid` for a zero among the settings, `Io` when the system gives no thread or randomness.
    pub fn new(seed: u64, config: ExchangeConfig) -> Result<Self> {
        let mut id = [0; 8];
        getrandom::fill(&mut id)
            .map_err(|error| Error::new(ErrorKind::Io, format!("draw a network id: {error}")))?;
        let state = State {
            exchange: Exchange::new(seed, config)?,
            now: Time(0),
            paused: false,
            closed: false,
            members: BTreeMap::new(),
            running: BTreeMap::new(),
            channels: 0,
        };
        let shared = Arc::new(Shared {
            id: u64::from_le_bytes(id),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let driven = Arc::clone(&shared);
        let driver = std::thread::Builder::new()
            .name("kvf-sim".to_owned())
            .spawn(move || driven.drive())
            .map_err(|error| Error::io("start the simulated network's thread", error))?;
        Ok(Self(Arc::new(Handle {
            shared,
            driver: Some(driver),
        })))
    }

    /// Stops time: posts only queue up.
    pub fn pause(&self) {
        self.lock().paused = true;
    }

    /// Lets time run again.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.0.shared.changed.notify_all();
    }

    /// Lets this much virtual time pass, on the calling thread.
    pub fn advance(&self, time: Duration) {
        let mut state = self.lock();
        let until = state.now + time;
        while let Some(due) = state.exchange.poll_timeout().filter(|due| *due <= until) {
            let settled = state.step(due);
            drop(state);
            settle(settled);
            state = self.lock();
        }
        state.now = state.now.max(until);
    }

    /// Waits until nothing is under way, at most `timeout` of real time; whether that came true.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut state = self.lock();
        while state.exchange.poll_timeout().is_some() || !state.running.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = match self.0.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    /// Cuts both directions between two members.
    ///
    /// # Errors
    /// `NotFound` for a name that is no member's.
    pub fn partition(&self, one: &str, other: &str) -> Result<()> {
        let mut state = self.lock();
        let (one, other) = (state.node(one)?, state.node(other)?);
        state.exchange.partition(one, other);
        Ok(())
    }

    /// Mends [`SimNetwork::partition`].
    ///
    /// # Errors
    /// `NotFound` for a name that is no member's.
    pub fn heal(&self, one: &str, other: &str) -> Result<()> {
        let mut state = self.lock();
        let (one, other) = (state.node(one)?, state.node(other)?);
        state.exchange.heal(one, other);
        Ok(())
    }

    /// Gives the direction `from` → `to` its own behaviour.
    ///
    /// # Errors
    /// `NotFound` for a name that is no member's, `Invalid` for a link without bandwidth.
    pub fn set_link(&self, from: &str, to: &str, profile: LinkProfile) -> Result<()> {
        let mut state = self.lock();
        let (from, to) = (state.node(from)?, state.node(to)?);
        state.exchange.set_link(from, to, profile)
    }

    /// A hash over every step of the network so far: equal runs have equal digests.
    #[must_use]
    pub fn trace_digest(&self) -> u64 {
        self.lock().exchange.trace_digest()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.shared.lock()
    }

    fn join(&self, exports: &Arc<Exports>) -> Result<Arc<dyn Fabric>> {
        let name = exports.name().to_string();
        let mut state = self.lock();
        if let Some(old) = state.members.get(&name) {
            if old.exports.strong_count() > 0 {
                let text = format!("an agent {name:?} is already on the simulated network");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            let node = old.node;
            state.exchange.kill(node);
        }
        let node = state.exchange.add_node(&name)?;
        state.members.insert(
            name,
            Member {
                node,
                exports: Arc::downgrade(exports),
            },
        );
        drop(state);
        Ok(Arc::new(SimFabric {
            network: self.clone(),
            node,
            own_name: exports.name().clone(),
        }))
    }
}

impl std::fmt::Debug for SimNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimNetwork")
            .field("now", &self.lock().now)
            .finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(driver) = self.driver.take() {
            // The last handle can go with a job that the driver settles.
            if driver.thread().id() != std::thread::current().id() && driver.join().is_err() {
                tracing::error!("the simulated network's thread panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drive(&self) {
        let mut state = self.lock();
        loop {
            if state.closed {
                let settled = state.close();
                drop(state);
                settle(settled);
                return;
            }
            let due = if state.paused {
                None
            } else {
                state.exchange.poll_timeout()
            };
            let Some(due) = due else {
                self.changed.notify_all();
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let settled = state.step(due);
            drop(state);
            settle(settled);
            state = self.lock();
        }
    }
}

fn settle(settled: Settled) {
    for Running {
        job,
        remote,
        failure,
        ..
    } in settled
    {
        drop(remote);
        job.settle(failure.map_or(Ok(()), Err));
    }
}

impl State {
    fn node(&self, name: &str) -> Result<SimNode> {
        self.members
            .get(name)
            .map(|member| member.node)
            .ok_or_else(|| {
                let text = format!("no agent {name:?} is on the simulated network");
                Error::new(ErrorKind::NotFound, text)
            })
    }

    /// Moves time to `due` and does what is due then.
    fn step(&mut self, due: Time) -> Settled {
        self.now = self.now.max(due);
        self.exchange.handle_timeout(self.now);
        self.take_effects()
    }

    fn take_effects(&mut self) -> Settled {
        let mut settled = Settled::new();
        while let Some(effect) = self.exchange.poll_effect() {
            match effect {
                Effect::Landed {
                    transfer,
                    offset,
                    len,
                    corruption,
                } => {
                    if let Some(running) = self.running.get_mut(&transfer)
                        && let Err(error) = running.land(offset, len, corruption)
                    {
                        running.failure.get_or_insert(error);
                    }
                }
                Effect::Notified { transfer } => {
                    if let Some(running) = self.running.get_mut(&transfer) {
                        running.notify();
                    }
                }
                Effect::Finished {
                    transfer,
                    failure,
                    settled: free,
                    ..
                } => {
                    if let Some(running) = self.running.get_mut(&transfer) {
                        running.finish(failure, free);
                        if free {
                            self.end(transfer, &mut settled);
                        }
                    }
                }
                Effect::Drained { transfer } => self.end(transfer, &mut settled),
                Effect::Message { .. } => {}
            }
        }
        settled
    }

    fn end(&mut self, transfer: SimTransferId, settled: &mut Settled) {
        if let Some(running) = self.running.remove(&transfer) {
            settled.push(running);
        }
    }

    /// Withdraws the jobs that `wanted` names.
    fn cancel(&mut self, wanted: impl Fn(&Running) -> Option<Error>) -> Settled {
        let ids: Vec<SimTransferId> = self.running.keys().copied().collect();
        for id in ids {
            let Some(running) = self.running.get_mut(&id) else {
                continue;
            };
            if running.cancelled {
                continue;
            }
            if let Some(error) = wanted(running) {
                running.cancelled = true;
                running.failure.get_or_insert(error);
                self.exchange.handle_cancel(self.now, id);
            }
        }
        self.take_effects()
    }

    /// Nobody drives any more, so nothing lands any more either.
    fn close(&mut self) -> Settled {
        let mut settled: Settled = std::mem::take(&mut self.running).into_values().collect();
        for running in &mut settled {
            let error = Error::new(ErrorKind::Cancelled, "the simulated network was closed");
            running.failure.get_or_insert(error);
        }
        settled
    }
}

impl Running {
    /// Copies bytes `offset..offset + len` of the transfer, and spoils one bit if asked to.
    fn land(&self, offset: u64, len: u64, corruption: Option<u64>) -> Result<()> {
        let plan = self.job.plan();
        let wrong = corruption.map(|random| (offset + random / 8 % len, random % 8));
        let mut done = offset;
        let end = offset + len;
        while done < end {
            let position = self.starts.partition_point(|start| *start <= done) - 1;
            let extent = &plan.extents[position];
            let within = done - self.starts[position];
            let count = (extent.len - within).min(end - done);
            let Target::Local(local) = &plan.local[extent.local as usize] else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "a local side names a peer's memory",
                ));
            };
            let local = (local.mapping()?, extent.local_offset + within);
            let remote = self.remote[extent.remote as usize].region().mapping()?;
            let remote = (remote, extent.remote_offset + within);
            let (from, to) = match plan.operation {
                Operation::Read => (remote, local),
                Operation::Write => (local, remote),
            };
            Mapping::copy(from.0, from.1, to.0, to.1, count)?;
            if let Some((byte, bit)) = wrong
                && (done..done + count).contains(&byte)
            {
                let place = to.1 + (byte - done);
                let mut value = [0];
                to.0.read(place, &mut value)?;
                to.0.write(place, &[value[0] ^ (1 << bit)])?;
            }
            done += count;
        }
        Ok(())
    }

    fn notify(&mut self) {
        if let Some(bytes) = self.job.notification()
            && let Err(error) = self.peer.deliver(&self.from, bytes.clone())
        {
            self.failure.get_or_insert(error);
        }
    }

    fn finish(&mut self, failure: Option<ErrorKind>, free: bool) {
        let Some(kind) = failure else { return };
        let peer = self.peer.name();
        let error = match kind {
            ErrorKind::PeerLost => format!("agent {peer:?} does not answer"),
            kind => format!("simulated transfer with agent {peer:?} ended: {kind}"),
        };
        self.failure.get_or_insert(Error::new(kind, error));
        // Whoever asked learns of it now; the memory follows when the network has let go of it.
        if let Some(error) = self.failure.as_ref().filter(|_| !free) {
            self.job.report(Error::new(error.kind(), error.to_string()));
        }
    }
}

struct SimFabric {
    network: SimNetwork,
    node: SimNode,
    own_name: Arc<str>,
}

impl Fabric for SimFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.network.0.shared.id.to_le_bytes().to_vec())
    }

    fn connect(&self, peer: &PeerCard, _timeout: Duration) -> Result<Arc<dyn Channel>> {
        let own = self.network.0.shared.id.to_le_bytes();
        if peer.address(NAME) != Some(own.as_slice()) {
            let text = "not on this simulated network";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let mut state = self.network.lock();
        let node = state.node(&peer.name)?;
        let exports = state
            .members
            .get(&peer.name)
            .and_then(|member| member.exports.upgrade());
        let Some(exports) = exports.filter(|found| found.incarnation() == peer.incarnation) else {
            let text = format!("agent {:?} has left the simulated network", peer.name);
            return Err(Error::new(ErrorKind::PeerLost, text));
        };
        exports.check_allowed(&self.own_name)?;
        state.channels += 1;
        Ok(Arc::new(SimChannel {
            network: self.network.clone(),
            number: state.channels,
            nodes: (self.node, node),
            own_name: self.own_name.clone(),
            peer: Arc::downgrade(&exports),
            capabilities: Capabilities {
                remote: &[MemoryKind::Host],
                notifications: true,
            },
        }))
    }

    fn close(&self) {
        let mut state = self.network.lock();
        state.exchange.kill(self.node);
        state.members.remove(&*self.own_name);
    }
}

struct SimChannel {
    network: SimNetwork,
    number: u64,
    nodes: (SimNode, SimNode),
    own_name: Arc<str>,
    peer: Weak<Exports>,
    capabilities: Capabilities,
}

impl SimChannel {
    fn peer(&self) -> Result<Arc<Exports>> {
        self.peer.upgrade().ok_or_else(|| {
            Error::new(
                ErrorKind::PeerLost,
                "the agent has left the simulated network",
            )
        })
    }

    fn admit(&self, job: &Job) -> Result<(Arc<Exports>, Vec<RegionUse>)> {
        let peer = self.peer()?;
        let plan = job.plan();
        let remote = plan.remote.iter().map(|target| match target {
            Target::Remote(region) => peer.admit(region.id, &region.key, plan.operation),
            Target::Local(region) => RegionUse::begin(Arc::clone(region)),
        });
        let remote = remote.collect::<Result<Vec<_>>>()?;
        Ok((peer, remote))
    }
}

impl Backend for SimChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        let (peer, remote) = match self.admit(&job) {
            Ok(admitted) => admitted,
            Err(error) => return Err(job.refuse(error)),
        };
        let plan = Arc::clone(job.plan());
        let starts = plan.extents.iter().scan(0, |end, extent| {
            let start = *end;
            *end += extent.len;
            Some(start)
        });
        let transfer = SimTransfer {
            initiator: self.nodes.0,
            peer: self.nodes.1,
            direction: match plan.operation {
                Operation::Read => Direction::Read,
                Operation::Write => Direction::Write,
            },
            bytes: plan.bytes,
            notify: job.notification().is_some(),
            // The agent watches over the deadline, in real time.
            deadline: Time::MAX,
        };
        let mut state = self.network.lock();
        let now = state.now;
        let id = match state.exchange.handle_transfer(now, transfer) {
            Ok(id) => id,
            Err(error) => return Err(job.refuse(error)),
        };
        let running = Running {
            job,
            remote,
            starts: starts.collect(),
            channel: self.number,
            from: self.own_name.clone(),
            peer,
            failure: None,
            cancelled: false,
        };
        state.running.insert(id, running);
        drop(state);
        self.network.0.shared.changed.notify_all();
        Ok(())
    }

    fn reap(&self) {
        let settled = self
            .network
            .lock()
            .cancel(|running| running.job.is_abandoned().then(abandoned));
        settle(settled);
        self.network.0.shared.changed.notify_all();
    }
}

impl Channel for SimChannel {
    fn check(&self) -> Result<()> {
        self.peer().map(drop)
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        "simulated, in virtual time".to_owned()
    }

    fn close(&self) {
        let lost = |running: &Running| {
            let ours = running.channel == self.number;
            ours.then(|| Error::new(ErrorKind::PeerLost, "the connection was closed"))
        };
        let settled = self.network.lock().cancel(lost);
        settle(settled);
        self.network.0.shared.changed.notify_all();
    }
}

impl AgentBuilder {
    /// Joins a simulated network: other members are reached over it before any other way.
    #[must_use]
    pub fn simulated(self, network: &SimNetwork) -> Self {
        let network = network.clone();
        self.with_fabric(move |exports| network.join(exports))
    }
}
