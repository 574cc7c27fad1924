//! Memory of a peer's devices, on the same machine: as it is within a process, and opened by handles, which tests force where both
//! agents are in one process. Two processes are in `processes`.

use std::sync::atomic::Ordering;

use super::*;
use crate::agent::{PeerCard, PeerHandle};
use crate::backend::cuda::Started;
use crate::metadata::RemoteKind;

const OPEN: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

/// How the one that is asked has its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Allocation,
    Pieces,
}

/// An agent that asks, another one with memory of a device, and the driver of both.
pub(super) struct Two {
    pub(super) near: Bed,
    far: Agent,
    kind: Kind,
}

impl Two {
    fn new(is_apart: bool, kind: Kind) -> Self {
        let fake = Fake::new(2);
        let cuda = fake.start();
        // No other way would take a notification.
        let agent = |name| {
            let agent = Agent::builder(name).memcpy(false).shm(false).cma(false);
            let agent = agent.build().unwrap();
            agent.start_cuda(CudaOptions::default(), &cuda).unwrap();
            agent
        };
        let (near, far) = (agent("near"), agent("far"));
        let near = Bed {
            fake,
            cuda,
            agent: near,
        };
        if is_apart {
            near.fake.force_opening();
        }
        for agent in [&near.agent, &far] {
            let started = agent.core().extension::<Started>(|| unreachable!());
            started.unwrap().0.apart.store(is_apart, Ordering::Relaxed);
        }
        Self { near, far, kind }
    }

    /// Memory of the far agent, some way into what an engine has made, and where it is.
    fn lent(&self, bytes: u64, options: RegionOptions) -> (Region, u64) {
        let fake = &self.near.fake;
        let start = match self.kind {
            Kind::Allocation => fake.engine_memory(0, bytes + 4096),
            Kind::Pieces => {
                let count = (bytes + 4096).div_ceil(8192);
                fake.engine_mappings(0, &vec![8192; count as usize])
            }
        };
        let address = start + 512;
        let memory = fake.lend(&self.near.cuda, 0, address, bytes).unwrap();
        (
            self.far.register_device_with(memory, options).unwrap(),
            address,
        )
    }

    fn peer(&self) -> PeerHandle {
        self.near.agent.load_peer(&self.far.metadata()).unwrap()
    }

    fn request(
        &self,
        peer: &PeerHandle,
        operation: Operation,
        pairs: &[(Descriptor, Descriptor)],
    ) -> kvcache_core::Result<Request> {
        let options = RequestOptions::default();
        let agent = &self.near.agent;
        agent.transfer(operation, pairs, Side::Peer(peer), options)
    }

    fn moved(&self, peer: &PeerHandle, operation: Operation, pairs: &[(Descriptor, Descriptor)]) {
        let request = self.request(peer, operation, pairs).unwrap();
        let done = request.wait(PATIENCE).unwrap();
        assert_eq!(done.backend, "cuda");
        assert!(request.wait_drained(PATIENCE));
    }
}

impl Fixture for Two {
    fn backend(&self) -> &'static str {
        "cuda"
    }

    fn agent(&self) -> &Agent {
        &self.near.agent
    }

    fn peer(&self) -> Option<&dyn conformance::Receiver> {
        Some(&self.far)
    }

    fn place(&self, bytes: u64) -> kvcache_core::Result<Place> {
        let (region, address) = self.lent(bytes, OPEN);
        let fake = self.near.fake.clone();
        let owner = Box::new(Lent {
            region,
            address,
            fake,
        });
        let peer = Some(self.peer());
        Ok(Place { owner, peer })
    }
}

/// A region of the far agent, and where it is.
struct Lent {
    region: Region,
    address: u64,
    fake: Fake,
}

impl conformance::Owned for Lent {
    fn id(&self) -> crate::region::RegionId {
        self.region.id()
    }

    fn kind(&self) -> MemoryKind {
        self.region.kind()
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> kvcache_core::Result<()> {
        let found = self
            .fake
            .read_across(self.address + offset, bytes.len() as u64);
        bytes.copy_from_slice(&found);
        Ok(())
    }
}

#[test]
fn a_peers_device_memory_passes_the_suite_of_all_backends() {
    for (is_apart, kind) in [
        (false, Kind::Allocation),
        (true, Kind::Allocation),
        (true, Kind::Pieces),
    ] {
        let two = Two::new(is_apart, kind);
        let report = conformance::run(&two).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        let without = ["checksums are compared, or refused with the reason"];
        assert_eq!(report.skipped, without, "{is_apart} {kind:?}");
        let opened = two.near.fake.count("cuIpcOpenMemHandle");
        assert_eq!(opened > 0, is_apart && kind == Kind::Allocation, "{opened}");
        let imported = two.near.fake.count("cuMemImportFromShareableHandle");
        assert_eq!(imported > 0, is_apart && kind == Kind::Pieces, "{imported}");
        two.near.fake.check();
    }
}

/// From and to memory of the own device too; a region that is taken back is closed before its owner hears that it is free.
#[test]
fn a_region_counts_as_used_until_it_is_closed() {
    for (is_apart, kind, open) in [
        (false, Kind::Allocation, (0, 0)),
        (true, Kind::Allocation, (1, 0)),
        (true, Kind::Pieces, (0, 1)),
    ] {
        let two = Two::new(is_apart, kind);
        let fake = &two.near.fake;
        let (region, address) = two.lent(20_000, OPEN);
        let (own, at) = two.near.device(20_000);
        fake.write(at, &pattern(4, 20_000));
        let peer = two.peer();
        two.moved(
            &peer,
            Write,
            &[(own.descriptor(0, 20_000), region.descriptor(0, 20_000))],
        );
        assert!(two.near.fake.read(at, 20_000) == pattern(4, 20_000));
        let host = two.near.host(&[0; 20_000]);
        two.moved(
            &peer,
            Read,
            &[(host.descriptor(7, 10_000), region.descriptor(3, 10_000))],
        );
        assert!(content(&host)[7..10_007] == pattern(4, 20_000)[3..10_003]);
        assert_eq!(fake.opened(), open, "{kind:?}");
        // In use: nothing is done before the test says so.
        fake.set_running(false);
        let pairs = [(host.descriptor(0, 64), region.descriptor(0, 64))];
        let request = two.request(&peer, Read, &pairs).unwrap();
        until(|| fake.queued() > 0);
        let gone = region.deregister();
        let error = gone.wait(Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        assert_eq!(fake.opened(), open, "{kind:?}");
        fake.set_running(true);
        request.wait(PATIENCE).unwrap();
        gone.wait(PATIENCE).unwrap();
        assert_eq!(fake.opened(), (0, 0), "{kind:?}");
        let error = two.request(&peer, Read, &pairs).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
        fake.check();
        if kind == Kind::Allocation {
            // Nobody has it open, or this is noted down.
            fake.engine_frees(address - 512);
            fake.check();
        }
    }
}

/// Each has a reason by which it can be told, and none is taken for an answer of the device.
#[test]
fn what_cannot_be_opened_says_why() {
    let not_open = |code, named: &str| {
        let two = Two::new(true, Kind::Allocation);
        let (region, _) = two.lent(4096, OPEN);
        let host = two.near.host(&[0; 4096]);
        let code = crate::sys::cuda::fake::code(code);
        two.near.fake.fail("cuIpcOpenMemHandle", 0, code);
        let peer = two.peer();
        let pairs = [(host.descriptor(0, 64), region.descriptor(0, 64))];
        let error = two.request(&peer, Read, &pairs).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(named), "{error}");
        let report = two.near.agent.path_to_region(&peer, region.id()).unwrap();
        let left = report.refused.iter().find(|(way, _)| *way == "cuda");
        let said = |(_, reason): &(&str, String)| reason.contains(named);
        assert!(
            report.backend == Some("cuda") || left.is_some_and(said),
            "{report:?}"
        );
        // What was granted in vain is not in use.
        region.deregister().wait(PATIENCE).unwrap();
        two.near.fake.check();
    };
    not_open(400, "its owner has ended or freed it");
    not_open(
        205,
        "containers that share neither IPC nor process namespaces",
    );
    not_open(801, "does not let processes share memory of devices");
}

/// The owner's engine has freed it; the driver has no handle for it; its device is not seen here; it is not to be written.
#[test]
fn what_is_not_granted_says_why() {
    let two = Two::new(true, Kind::Allocation);
    let fake = &two.near.fake;
    let host = two.near.host(&[0; 4096]);
    let refused = |region: &Region, operation, kind, named: &str| {
        let pairs = [(host.descriptor(0, 64), region.descriptor(0, 64))];
        let error = two.request(&two.peer(), operation, &pairs).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(named), "{named}: {error}");
    };
    let pool = fake.engine_pool(0, 8192);
    let memory = fake.lend(&two.near.cuda, 0, pool, 8192).unwrap();
    let pool = two.far.register_device_with(memory, OPEN).unwrap();
    refused(
        &pool,
        Read,
        ErrorKind::Unsupported,
        "a pool of cudaMallocAsync",
    );
    let (freed, address) = two.lent(4096, OPEN);
    fake.engine_frees(address - 512);
    refused(
        &freed,
        Read,
        ErrorKind::Io,
        "was freed while it was registered",
    );
    // A process with one device, which is not the one.
    let other = Two::new(true, Kind::Allocation);
    let start = other.near.fake.engine_memory(1, 4096);
    let memory = other
        .near
        .fake
        .lend(&other.near.cuda, 1, start, 4096)
        .unwrap();
    let region = other.far.register_device_with(memory, OPEN).unwrap();
    let fake = Fake::new(1);
    let blind = Agent::builder("blind").build().unwrap();
    blind
        .start_cuda(CudaOptions::default(), &fake.start())
        .unwrap();
    let own = blind
        .register(HostMemory::shared(64).unwrap(), RegionOptions::default())
        .unwrap();
    let peer = blind.load_peer(&other.far.metadata()).unwrap();
    let pairs = [(own.descriptor(0, 64), region.descriptor(0, 64))];
    let options = RequestOptions::default();
    let error = blind
        .transfer(Read, &pairs, Side::Peer(&peer), options)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(
        error
            .to_string()
            .contains("does not see (CUDA_VISIBLE_DEVICES)"),
        "{error}"
    );
}

/// The metadata says that a region may be written, or is of another size, than the owner says.
#[test]
fn metadata_that_lie_of_device_memory_are_refused() {
    let two = Two::new(true, Kind::Pieces);
    let read_only = RegionOptions {
        remote_read: true,
        remote_write: false,
    };
    let (region, address) = two.lent(8192, read_only);
    let host = two.near.host(&[1; 8192]);
    for (writable, bytes, operation, kind) in [
        // What is open is not asked for again, so the size goes first.
        (false, 8000, Read, ErrorKind::Corrupt),
        (true, 8192, Write, ErrorKind::Denied),
    ] {
        let mut card = PeerCard::decode(&two.far.metadata()).unwrap();
        let told = &card.regions[0];
        let lie = crate::agent::RemoteRegion {
            secret: told.secret,
            id: told.id,
            key: told.key,
            bytes,
            kind: RemoteKind::Device,
            readable: true,
            writable,
            shareable: true,
        };
        card.regions = vec![lie.into()];
        let peer = two.near.agent.load_peer(&card.encode()).unwrap();
        let pairs = [(host.descriptor(0, 64), region.descriptor(0, 64))];
        let error = match two.request(&peer, operation, &pairs) {
            Err(error) => error,
            Ok(request) => request.wait(PATIENCE).unwrap_err().into(),
        };
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert!(two.near.fake.read(address, 64) == [0xcd; 64]);
    region.deregister().wait(PATIENCE).unwrap();
    two.near.fake.check();
}

/// A piece fails half-way: what was mapped is unmapped, and nothing of the owner's is held.
#[test]
fn pieces_that_cannot_be_mapped_leave_nothing() {
    for call in [
        "cuMemExportToShareableHandle",
        "cuMemImportFromShareableHandle",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemAddressReserve",
    ] {
        let two = Two::new(true, Kind::Pieces);
        let (region, _) = two.lent(20_000, OPEN);
        let host = two.near.host(&[0; 64]);
        let after = u64::from(!matches!(call, "cuMemSetAccess" | "cuMemAddressReserve"));
        two.near
            .fake
            .fail(call, after, crate::sys::cuda::fake::OUT_OF_MEMORY);
        let pairs = [(host.descriptor(0, 64), region.descriptor(0, 64))];
        let error = two.request(&two.peer(), Read, &pairs).unwrap_err();
        assert!(
            error.to_string().contains("OUT_OF_MEMORY"),
            "{call}: {error}"
        );
        region.deregister().wait(PATIENCE).unwrap();
        assert_eq!(two.near.fake.opened(), (0, 0), "{call}");
        two.near.fake.check();
    }
}
