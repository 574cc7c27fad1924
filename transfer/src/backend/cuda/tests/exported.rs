//! Memory of a device that peers are told of: what they learn, who reaches it, and that no way takes it for host memory.

use super::*;
use crate::agent::{PeerCard, PeerHandle, RemoteRegion};
use crate::metadata::RemoteKind;

const BYTES: u64 = 4096;

const EXPORTED: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

/// The ways that know host memory alone and are there without a card, one at a time.
const WAYS: [&str; 3] = ["memcpy", "shm", "cma"];

fn agent(name: &str, way: &str) -> Agent {
    let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    Agent::builder(name)
        .memcpy(way == "memcpy")
        .shm(way == "shm")
        .cma(way == "cma")
        .tcp((way == "tcp").then_some(loopback))
        .build()
        .unwrap()
}

/// An agent with memory of a device that it exports, beside host memory, and one that asks for them.
struct Far {
    bed: Bed,
    device: Region,
    host: Region,
    address: u64,
    near: Agent,
}

impl Far {
    fn new(way: &str) -> Self {
        let far = agent("far", way);
        let fake = Fake::new(1);
        let cuda = fake.start();
        let options = CudaOptions {
            peers: false,
            ..CudaOptions::default()
        };
        far.start_cuda(options, &cuda).unwrap();
        let bed = Bed {
            cuda,
            fake,
            agent: far,
        };
        let address = bed.fake.engine_memory(0, BYTES);
        let memory = bed.fake.lend(&bed.cuda, 0, address, BYTES).unwrap();
        let host = HostMemory::shared(BYTES).unwrap();
        Self {
            device: bed.agent.register_device_with(memory, EXPORTED).unwrap(),
            host: bed.agent.register(host, EXPORTED).unwrap(),
            address,
            near: agent("near", way),
            bed,
        }
    }

    /// What comes of moving `region`'s bytes to or from host memory of the one that asks.
    fn attempt(
        &self,
        peer: &PeerHandle,
        operation: Operation,
        region: &Region,
    ) -> kvcache_core::Result<()> {
        let own = HostMemory::shared(BYTES).unwrap();
        let own = self.near.register(own, RegionOptions::default()).unwrap();
        let pairs = [(own.descriptor(0, BYTES), region.descriptor(0, BYTES))];
        let options = RequestOptions::default();
        let request = self
            .near
            .transfer(operation, &pairs, Side::Peer(peer), options)?;
        let done = request.wait(PATIENCE);
        done.map(drop).map_err(kvcache_core::Error::from)
    }
}

/// The kind travels with the metadata; each way says that it does not reach it, and goes on with host memory.
#[test]
fn a_peers_device_memory_is_refused_by_name() {
    for way in WAYS {
        let far = Far::new(way);
        let card = PeerCard::decode(&far.bed.agent.metadata()).unwrap();
        let kind_of = |region: &Region| {
            let found = card.regions.iter().find(|told| told.id == region.id());
            found.unwrap().kind
        };
        assert_eq!(kind_of(&far.device), RemoteKind::Device);
        assert_eq!(kind_of(&far.host), RemoteKind::Host);
        let peer = far.near.load_peer(&far.bed.agent.metadata()).unwrap();
        for operation in [Read, Write] {
            let error = far.attempt(&peer, operation, &far.device).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            let text = error.to_string();
            for part in [way, "does not reach a peer's memory of a CUDA device"] {
                assert!(text.contains(part), "{text}");
            }
            far.attempt(&peer, operation, &far.host).unwrap();
        }
        let report = far.near.path_to_region(&peer, far.device.id()).unwrap();
        assert_eq!(report.backend, None);
        let (refused, reason) = &report.refused[0];
        assert!(
            *refused == way && reason.contains("CUDA device"),
            "{report:?}"
        );
        let report = far.near.path_to_region(&peer, far.host.id()).unwrap();
        assert_eq!(report.backend, Some(way));
        assert!(far.bed.fake.read(far.address, BYTES) == [0xcd; BYTES as usize]);
        far.bed.fake.check();
    }
}

/// The metadata says that it is host memory: then the owner's end refuses it, and nobody touches an address of a device.
#[test]
fn device_memory_is_not_reached_by_pretending() {
    for way in WAYS {
        let far = Far::new(way);
        let mut card = PeerCard::decode(&far.bed.agent.metadata()).unwrap();
        let told = |region: &RemoteRegion| RemoteRegion {
            secret: region.secret,
            id: region.id,
            key: region.key,
            bytes: region.bytes,
            kind: RemoteKind::Host,
            readable: true,
            writable: true,
            shareable: true,
        };
        card.regions = card.regions.iter().map(|one| told(one).into()).collect();
        let peer = far.near.load_peer(&card.encode()).unwrap();
        for operation in [Read, Write] {
            let error = far.attempt(&peer, operation, &far.device).unwrap_err();
            // Within the host, what the owner cannot hand out is an error of the way.
            let kinds = [ErrorKind::Unsupported, ErrorKind::Io];
            assert!(kinds.contains(&error.kind()), "{way}: {error}");
        }
        far.device.deregister().wait(PATIENCE).unwrap();
        let error = far.attempt(&peer, Read, &far.device).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{way}: {error}");
        assert!(far.bed.fake.read(far.address, BYTES) == [0xcd; BYTES as usize]);
        far.bed.fake.check();
    }
}

/// Nothing but what was asked for is told, and after deregistration nothing at all.
#[test]
fn a_device_region_is_told_of_as_its_options_say() {
    let bed = Bed::new();
    let (own, address) = bed.device(BYTES);
    let memory = bed.fake.lend(&bed.cuda, 0, address, BYTES).unwrap();
    let read_only = RegionOptions {
        remote_read: true,
        remote_write: false,
    };
    let told = bed.agent.register_device_with(memory, read_only).unwrap();
    let regions = || PeerCard::decode(&bed.agent.metadata()).unwrap().regions;
    let found = regions();
    assert_eq!(found.len(), 1);
    assert!(found[0].id == told.id() && found[0].bytes == BYTES);
    assert!(found[0].readable && !found[0].writable && found[0].shareable);
    bed.agent.metadata_of(&[told.id()]).unwrap();
    bed.agent.metadata_of(&[own.id()]).unwrap_err();
    told.deregister().wait(PATIENCE).unwrap();
    assert!(regions().is_empty());
    bed.fake.engine_frees(address);
    drop((own, told));
    bed.end();
}
