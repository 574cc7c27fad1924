//! Two agents of one process, over each way that connects them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, Descriptor, HostMemory, MemoryFate, Operation, PeerHandle, Region, RegionOptions,
    RequestOptions, Side, Status,
};

const WAIT: Duration = Duration::from_secs(20);
const OPEN: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Memcpy,
    Shm,
    Tcp,
}

const WAYS: [Way; 3] = [Way::Memcpy, Way::Shm, Way::Tcp];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }

    fn agent(self, name: &str) -> Agent {
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Agent::builder(name)
            .memcpy(self == Self::Memcpy)
            .shm(self == Self::Shm)
            .tcp((self == Self::Tcp).then_some(loopback))
            .build()
            .unwrap()
    }
}

/// An initiator, and a target with one region that the initiator knows.
struct Pair {
    initiator: Agent,
    target: Agent,
    local: Region,
    remote: Region,
    peer: PeerHandle,
}

impl Pair {
    fn new(way: Way, bytes: u64) -> Self {
        Self::with_options(way, bytes, OPEN)
    }

    fn with_options(way: Way, bytes: u64, options: RegionOptions) -> Self {
        let (initiator, target) = (way.agent("initiator"), way.agent("target"));
        let local = initiator
            .register(
                HostMemory::anonymous(bytes).unwrap(),
                RegionOptions::default(),
            )
            .unwrap();
        let remote = target
            .register(HostMemory::shared(bytes).unwrap(), options)
            .unwrap();
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        Self {
            initiator,
            target,
            local,
            remote,
            peer,
        }
    }

    fn moves(
        &self,
        operation: Operation,
        pairs: &[(u64, u64, u64)],
        options: RequestOptions,
    ) -> kvfabric_transfer::Request {
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

fn pattern(len: usize, seed: u64) -> Vec<u8> {
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

fn contents(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.bytes() as usize];
    region.read_at(0, &mut bytes).unwrap();
    bytes
}

/// A megabyte and a bit goes over and comes back, over each way; the report names the way.
#[test]
fn bytes_written_to_a_peer_are_read_back_from_it() {
    for way in WAYS {
        let len = (1 << 20) + 4097;
        let pair = Pair::new(way, len);
        let data = pattern(len as usize, 7);
        pair.local.write_at(0, &data).unwrap();
        let done = pair.moves(Operation::Write, &[(0, 0, len)], RequestOptions::default());
        let done = done.wait(WAIT).unwrap();
        assert_eq!((done.backend, done.bytes), (way.name(), len));
        assert_eq!(contents(&pair.remote), data, "{way:?}");
        pair.local.fill_at(0, len, 0).unwrap();
        let read = pair.moves(Operation::Read, &[(0, 0, len)], RequestOptions::default());
        read.wait(WAIT).unwrap();
        assert_eq!(contents(&pair.local), data, "{way:?}");
        assert_eq!(pair.initiator.path_to(&pair.peer).backend, Some(way.name()));
    }
}
