//! How an agent is made.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};

use super::core::AgentLooks;
use super::{Agent, AgentCore, CONNECT_TIMEOUT, Exports, Timer};
use crate::backend::copy::{COPY_THREADS_MAX, Copier};
use crate::backend::cuda::CudaOptions;
use crate::backend::tcp::TlsOptions;
use crate::backend::ucx::{self, UcxOptions};
use crate::backend::verbs::{self, VerbsOptions};
use crate::backend::{Fabric, cma, memcpy, shm, tcp};
use crate::estimate::PathCost;
use crate::look::{self, LOOK_DEFAULT, Looks};
use crate::metadata::check_name;
use crate::reactor::Reactor;
use crate::stats::Stats;
use crate::sys::cuda::Cuda;
use crate::sys::fork::Process;

/// Threads that share a large copy, unless told otherwise: more fill a memory channel, and leave less to others.
const COPY_THREADS_DEFAULT_MAX: usize = 4;

/// How long each way to a peer may take to connect, unless [`AgentBuilder::connect_within`] says otherwise.
pub const CONNECT_WITHIN_DEFAULT: Duration = CONNECT_TIMEOUT;

/// The longest that [`AgentBuilder::connect_within`] takes.
const CONNECT_WITHIN_MAX: Duration = Duration::from_secs(60);

/// How long a path may stand still before requests go another way, unless [`AgentBuilder::slow_after`] says otherwise.
pub const SLOW_AFTER_DEFAULT: Duration = Duration::from_secs(2);

type Step = Box<dyn FnOnce(&Agent) -> Result<()> + Send>;
type MakeFabric = Box<dyn FnOnce(&Arc<Exports>) -> Result<Arc<dyn Fabric>> + Send>;

/// What an agent should be able to do. By default: copies within the process, and within the host shared memory and system
/// calls that copy.
pub struct AgentBuilder {
    name: String,
    shm: bool,
    cma: Option<bool>,
    memcpy: bool,
    copy_threads: Option<usize>,
    tcp: Option<SocketAddr>,
    tcp_advertised: Option<SocketAddr>,
    tcp_rails: Vec<SocketAddr>,
    tcp_connections: usize,
    tcp_congestion: Option<String>,
    tcp_tls: Option<TlsOptions>,
    ucx: Option<UcxOptions>,
    verbs: Option<VerbsOptions>,
    cuda: Option<CudaOptions>,
    slow_after: Option<Duration>,
    look: Duration,
    connect_within: Duration,
    allowed: Option<BTreeSet<String>>,
    preferred: Vec<String>,
    costs: Vec<(String, PathCost)>,
    fabrics: Vec<MakeFabric>,
    steps: Vec<Step>,
}

impl AgentBuilder {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            shm: true,
            cma: None,
            memcpy: true,
            copy_threads: None,
            tcp: None,
            tcp_advertised: None,
            tcp_rails: Vec::new(),
            tcp_connections: 1,
            tcp_congestion: None,
            tcp_tls: None,
            ucx: None,
            verbs: None,
            cuda: None,
            slow_after: Some(SLOW_AFTER_DEFAULT),
            look: LOOK_DEFAULT,
            connect_within: CONNECT_TIMEOUT,
            allowed: None,
            preferred: Vec::new(),
            costs: Vec::new(),
            fabrics: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// Whether peers on this host are reached through shared memory. Default: yes.
    #[must_use]
    pub fn shm(mut self, enabled: bool) -> Self {
        self.shm = enabled;
        self
    }

    /// Whether memory of peers on this host that can't be shared is read and written with `process_vm_readv` and
    /// `process_vm_writev`. Default: as [`AgentBuilder::shm`].
    #[must_use]
    pub fn cma(mut self, enabled: bool) -> Self {
        self.cma = Some(enabled);
        self
    }

    /// Whether agents of this process are reached by plain copies. Default: yes.
    #[must_use]
    pub fn memcpy(mut self, enabled: bool) -> Self {
        self.memcpy = enabled;
        self
    }

    /// How many threads share a copy of 8 MiB or more between regions of this process, from 1 to [`COPY_THREADS_MAX`].
    /// Default: half of the processors, from 1 to 4.
    #[must_use]
    pub fn copy_threads(mut self, threads: usize) -> Self {
        self.copy_threads = Some(threads);
        self
    }

    /// Serves and reaches peers over TCP, listening on this address (port 0: any free one). Default: not at all.
    /// Without [`AgentBuilder::tcp_tls`], traffic is neither encrypted nor authenticated beyond region keys: stay on loopback
    /// or a trusted network.
    #[must_use]
    pub fn tcp(mut self, listen: Option<SocketAddr>) -> Self {
        self.tcp = listen;
        self
    }

    /// The address that peers are told, where it differs from the one listened on. Needed when that is unspecified.
    #[must_use]
    pub fn tcp_advertise(mut self, address: Option<SocketAddr>) -> Self {
        self.tcp_advertised = address;
        self
    }

    /// Further addresses to serve TCP on, at most 15: those of other network cards of this host. Peers are told all of them,
    /// and spread their connections over them. Default: none.
    #[must_use]
    pub fn tcp_rails(mut self, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.tcp_rails = addresses.into_iter().collect();
        self
    }

    /// How many TCP connections are made to a peer, at most 16; at least one to each of its addresses is. Large requests are
    /// striped over them, in frames of 1 MiB, and those of middle size take turns; small ones and notifications stay on the
    /// first. Default: 1.
    #[must_use]
    pub fn tcp_connections(mut self, count: usize) -> Self {
        self.tcp_connections = count;
        self
    }

    /// The congestion control of TCP connections, both those that are made and those that are accepted, such as "cubic" or
    /// "bbr". Default: the system's. The path report names what is in force.
    #[must_use]
    pub fn tcp_congestion(mut self, name: Option<&str>) -> Self {
        self.tcp_congestion = name.map(str::to_owned);
        self
    }

    /// Encrypts all TCP connections, both those that are made and those that are accepted, with TLS 1.3, and has both sides
    /// show certificates: each one's must come from an authority that the other believes, and have the name of its agent.
    /// Who does not is told why and turned away, as is who does not speak TLS. Default: neither.
    #[must_use]
    pub fn tcp_tls(mut self, options: Option<TlsOptions>) -> Self {
        self.tcp_tls = options;
        self
    }

    /// Reaches peers over UCX, and lets them reach this agent. Default: not at all. Tried before TCP. Whoever reaches the
    /// ports that UCX opens can read and write memory: for trusted networks only.
    #[must_use]
    pub fn ucx(mut self, options: Option<UcxOptions>) -> Self {
        self.ucx = options;
        self
    }

    /// Copies between host memory and memory of CUDA devices that is registered with [`Agent::register_device`], by the driver of
    /// the system, and to and from that of peers on this machine. Default: not at all. Where there is no driver, or no device, [`AgentBuilder::build`] says why.
    #[must_use]
    pub fn cuda(mut self, options: Option<CudaOptions>) -> Self {
        self.cuda = options;
        self
    }

    /// Reaches peers by RDMA, and lets them reach this agent: over InfiniBand or RoCE, with libibverbs alone. Default: not at
    /// all, because registered memory is pinned, and peers reach it by keys of 32 bits: for trusted networks only. Tried
    /// before UCX.
    #[must_use]
    pub fn verbs(mut self, options: Option<VerbsOptions>) -> Self {
        self.verbs = options;
        self
    }

    /// How long a path to a peer may stand still, with nothing of it arriving, before the requests on it that can be repeated
    /// go another way, if there is one; none: for ever. Default: [`SLOW_AFTER_DEFAULT`].
    #[must_use]
    pub fn slow_after(mut self, after: Option<Duration>) -> Self {
        self.slow_after = after;
        self
    }

    /// How long those who wait for a request or a notification look for it before they sleep, at most
    /// [`crate::LOOK_MAX`]; zero turns it off. What comes within that time costs no wake-up, which takes longer than many
    /// a transfer; the price is that time of a processor, which whoever else has work for it is let to at once. Waits look
    /// only while that has paid lately, and with one processor not at all. Default: [`LOOK_DEFAULT`].
    #[must_use]
    pub fn look(mut self, longest: Duration) -> Self {
        self.look = longest;
        self
    }

    /// How long each way to a peer may take to connect, and over RDMA and UCX the peer to hand out a region, which pins it
    /// where it was not used before: at most a minute. Ways are tried one after the other, so what is given here delays the
    /// next one where a peer does not answer. Default: 2 s.
    #[must_use]
    pub fn connect_within(mut self, limit: Duration) -> Self {
        self.connect_within = limit;
        self
    }

    /// Only agents of these names may connect. Default: all that know a region's key.
    #[must_use]
    pub fn allow_peers(mut self, names: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.allowed = Some(names.into_iter().map(Into::into).collect());
        self
    }

    /// Which ways to peers go first, by name and the best first; the others follow in the usual order. Each must be
    /// enabled.
    #[must_use]
    pub fn prefer(mut self, backends: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.preferred = backends.into_iter().map(Into::into).collect();
        self
    }

    /// What a backend is taken to cost in estimates ([`crate::Request::estimate`]) until transfers have shown it.
    #[must_use]
    pub fn assume_cost(mut self, backend: &str, cost: PathCost) -> Self {
        self.costs.push((backend.to_owned(), cost));
        self
    }

    /// Adds a step that ends the building of the agent.
    pub(crate) fn on_build(
        mut self,
        step: impl FnOnce(&Agent) -> Result<()> + Send + 'static,
    ) -> Self {
        self.steps.push(Box::new(step));
        self
    }

    /// Adds a way to reach peers, tried before the built-in ones.
    pub(crate) fn with_fabric(
        mut self,
        make: impl FnOnce(&Arc<Exports>) -> Result<Arc<dyn Fabric>> + Send + 'static,
    ) -> Self {
        self.fabrics.push(Box::new(make));
        self
    }

    fn check(&self) -> Result<()> {
        check_name(&self.name)?;
        let (limit, allowed) = (
            self.connect_within.as_nanos(),
            1..=CONNECT_WITHIN_MAX.as_nanos(),
        );
        if !allowed.contains(&limit) {
            return Err(Error::invalid("connect within, in ns", limit, allowed));
        }
        Ok(())
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a bad name or a time limit out of bounds,
    /// [`kvcache_core::ErrorKind::Unsupported`] when UCX, RDMA or CUDA is asked for and is not there, or a congestion control that the
    /// system refuses, [`kvcache_core::ErrorKind::Io`] when the address is in use (it is named) or the system refuses threads or
    /// sockets.
    pub fn build(self) -> Result<Agent> {
        self.check()?;
        let process = Process::current();
        let longest = look::longest(self.look)?;
        let looks = AgentLooks {
            requests: Looks::new(longest),
            notifications: Looks::new(longest),
        };
        let exports = Arc::new(Exports::new(&self.name, self.allowed)?);
        let (timer, timer_thread) = Timer::start()?;
        let (copier, copier_thread) = Copier::start(copy_threads(self.copy_threads)?)?;
        let (reactor, reactor_thread) = Reactor::start()?;
        // From here on the agent owns what was started, so that its drop ends it when the rest fails.
        let agent = Agent(Arc::new(AgentCore {
            process,
            started: Instant::now(),
            exports: exports.clone(),
            stats: Stats::default(),
            timer,
            later: Arc::default(),
            rates: Default::default(),
            copier: copier.clone(),
            reactor: reactor.clone(),
            looks,
            own: memcpy::own(copier.clone()),
            extensions: Mutex::new(HashMap::new()),
            slow_after: self.slow_after,
            connect_within: self.connect_within,
            ranges: Default::default(),
            peers: Mutex::new(HashMap::new()),
            threads: Mutex::new(vec![timer_thread, copier_thread, reactor_thread]),
        }));
        for make in self.fabrics {
            exports.add_fabric(make(&exports)?);
        }
        if self.memcpy {
            exports.add_fabric(memcpy::fabric(&exports, copier.clone()));
        }
        if self.shm {
            exports.add_fabric(shm::fabric(&exports, &reactor, copier.clone())?);
        }
        if self.cma.unwrap_or(self.shm) {
            exports.add_fabric(cma::fabric(&exports, &reactor, copier)?);
        }
        if let Some(options) = &self.verbs {
            exports.add_fabric(verbs::fabric(&exports, options)?);
        }
        if let Some(options) = &self.ucx {
            exports.add_fabric(ucx::fabric(&exports, options)?);
        }
        if let Some(address) = self.tcp {
            exports.add_fabric(tcp::fabric(
                &exports,
                &reactor,
                tcp::Listen {
                    address,
                    advertised: self.tcp_advertised,
                    rails: self.tcp_rails,
                    connections: self.tcp_connections,
                    congestion: self.tcp_congestion,
                    tls: self.tcp_tls,
                },
            )?);
        }
        start_cuda(&agent, self.cuda)?;
        exports.order(&self.preferred)?;
        for (backend, cost) in self.costs {
            agent.core().stats.assume(&backend, cost)?;
        }
        self.steps.into_iter().try_for_each(|step| step(&agent))?;
        Ok(agent)
    }
}

/// Starts CUDA, if that is wanted.
fn start_cuda(agent: &Agent, options: Option<CudaOptions>) -> Result<()> {
    match options {
        Some(options) => agent.start_cuda(options, &Cuda::get()?),
        None => Ok(()),
    }
}

fn copy_threads(wanted: Option<usize>) -> Result<usize> {
    match wanted {
        Some(threads) if (1..=COPY_THREADS_MAX).contains(&threads) => Ok(threads),
        Some(threads) => Err(Error::invalid(
            "copy threads",
            threads,
            1..=COPY_THREADS_MAX,
        )),
        None => {
            let processors = std::thread::available_parallelism().map_or(1, |count| count.get());
            Ok((processors / 2).clamp(1, COPY_THREADS_DEFAULT_MAX))
        }
    }
}

impl std::fmt::Debug for AgentBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentBuilder")
            .field("name", &self.name)
            .field("shm", &self.shm)
            .field("cma", &self.cma)
            .field("memcpy", &self.memcpy)
            .field("tcp", &self.tcp)
            .field("ucx", &self.ucx)
            .field("verbs", &self.verbs)
            .field("cuda", &self.cuda)
            .finish_non_exhaustive()
    }
}
