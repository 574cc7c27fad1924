//! What the tests of several agents share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use kvfabric_transfer::{
    Agent, AgentBuilder, Descriptor, HostMemory, Operation, PeerHandle, Region, RegionOptions,
    Request, RequestOptions, Side, UcxOptions, VerbsConnect, VerbsOptions,
};

pub(crate) mod child;
pub(crate) mod hold;
pub(crate) mod overtaking;
pub(crate) mod proxy;
pub(crate) mod sockets;

/// Longer than anything that works takes; shorter than a test run's patience.
pub(crate) const WAIT: Duration = Duration::from_secs(20);

pub(crate) const OPEN: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

/// The ways that connect two agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Memcpy,
    Shm,
    Cma,
    Tcp,
    Ucx,
    /// Where there is an RDMA device; not among [`WAYS`].
    Verbs,
}

pub(crate) const WAYS: [Way; 5] = [Way::Memcpy, Way::Shm, Way::Cma, Way::Tcp, Way::Ucx];

impl Way {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Shm => "shm",
            Self::Cma => "cma",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
            Self::Verbs => "verbs",
        }
    }

    pub(crate) fn builder(self, name: &str) -> AgentBuilder {
        let builder = Agent::builder(name)
            .memcpy(self == Self::Memcpy)
            .shm(self == Self::Shm)
            .cma(self == Self::Cma)
            .tcp((self == Self::Tcp).then_some(loopback()))
            .ucx((self == Self::Ucx).then(UcxOptions::default))
            .verbs((self == Self::Verbs).then(verbs_options));
        match self {
            // An emulated machine that is busy otherwise takes seconds to connect, and to hand out a region.
            Self::Verbs => builder.connect_within(WAIT / 2),
            _ => builder,
        }
    }

    pub(crate) fn agent(self, name: &str) -> Agent {
        self.builder(name).build().unwrap()
    }

    /// Memory of the kind that the way is for.
    pub(crate) fn memory(self, bytes: u64) -> HostMemory {
        match self {
            Self::Cma => HostMemory::anonymous(bytes).unwrap(),
            Self::Memcpy | Self::Shm | Self::Tcp | Self::Ucx | Self::Verbs => {
                HostMemory::shared(bytes).unwrap()
            }
        }
    }
}

/// The defaults, with queue pairs connected as `KVFABRIC_RDMA_CONNECT` says: so cases run both ways.
pub(crate) fn verbs_options() -> VerbsOptions {
    let said = std::env::var("KVFABRIC_RDMA_CONNECT").ok();
    let connect = said.map(|way| way.parse::<VerbsConnect>().unwrap());
    VerbsOptions {
        connect: connect.unwrap_or_default(),
        ..VerbsOptions::default()
    }
}

/// Whether RDMA is there; told aloud when it is not. With `KVFABRIC_RDMA` set it must be.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn has_rdma() -> bool {
    tell();
    match Way::Verbs.builder("probe").build() {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("KVFABRIC_RDMA").is_none(), "{error}");
            eprintln!("SKIPPED: {error}");
            false
        }
    }
}

/// What the crate logs, as `RUST_LOG` says, is printed with the test's own words.
pub(crate) fn tell() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let lines = tracing_subscriber::fmt().with_env_filter(filter);
    // Another test of the process may have done so.
    let _ = lines.with_test_writer().try_init();
}

/// Any free port of this host.
pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

/// An initiator, and a target with one region that the initiator knows.
pub(crate) struct Pair {
    pub(crate) initiator: Agent,
    pub(crate) target: Agent,
    pub(crate) local: Region,
    pub(crate) remote: Region,
    pub(crate) peer: PeerHandle,
}

impl Pair {
    pub(crate) fn new(way: Way, bytes: u64) -> Self {
        Self::with_options(way, bytes, OPEN)
    }

    pub(crate) fn with_options(way: Way, bytes: u64, options: RegionOptions) -> Self {
        let (initiator, target) = (way.agent("initiator"), way.agent("target"));
        let memory = way.memory(bytes);
        Self::over(initiator, target, memory, options)
    }

    pub(crate) fn of(initiator: Agent, target: Agent, bytes: u64, options: RegionOptions) -> Self {
        let memory = HostMemory::shared(bytes).unwrap();
        Self::over(initiator, target, memory, options)
    }

    fn over(initiator: Agent, target: Agent, memory: HostMemory, options: RegionOptions) -> Self {
        let bytes = memory.bytes();
        let local = initiator
            .register(
                HostMemory::anonymous(bytes).unwrap(),
                RegionOptions::default(),
            )
            .unwrap();
        let remote = target.register(memory, options).unwrap();
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        Self {
            initiator,
            target,
            local,
            remote,
            peer,
        }
    }

    pub(crate) fn moves(
        &self,
        operation: Operation,
        pairs: &[(u64, u64, u64)],
        options: RequestOptions,
    ) -> Request {
        let pairs: Vec<(Descriptor, Descriptor)> = pairs
            .iter()
            .map(|&(local, remote, len)| {
                (
                    self.local.descriptor(local, len),
                    self.remote.descriptor(remote, len),
                )
            })
            .collect();
        self.initiator
            .transfer(operation, &pairs, Side::Peer(&self.peer), options)
            .unwrap()
    }
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

/// All of a region.
pub(crate) fn contents(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.bytes() as usize];
    region.read_at(0, &mut bytes).unwrap();
    bytes
}
