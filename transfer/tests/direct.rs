//! Memory of GPUs that network cards read and write: over `ucx`, or the way that `KVFABRIC_DIRECT` names, with a stand-in for the driver
//! whose memory lies in the process, so that the same cards reach it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by panicking, and the other process speaks by printing"
)]

mod support;

use std::rc::Rc;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::Operation::{Read, Write};
use kvfabric_transfer::backend::conformance;
use kvfabric_transfer::{
    Agent, CudaOptions, CudaStandIn, Deregistration, Descriptor, DeviceMemory, HostMemory,
    MemoryKind, Operation, PeerHandle, Region, RegionId, Request, RequestOptions, Side, Strided,
};

use support::child::{Again, ROLE, hex, unhex};
use support::{OPEN, WAIT, Way, contents, has_rdma, pattern};

const BYTES: u64 = 4 << 20;

/// So much that it takes an emulated card a while.
const LONG: u64 = 32 << 20;

/// The way that is tested; none where there is no card for it.
fn way() -> Option<Way> {
    match std::env::var("KVFABRIC_DIRECT").as_deref() {
        Ok("verbs") => has_rdma().then_some(Way::Verbs),
        Ok("ucx") | Err(_) => Some(Way::Ucx),
        Ok(other) => panic!("KVFABRIC_DIRECT={other}"),
    }
}

/// An agent, and the driver that it uses.
struct Node {
    way: Way,
    agent: Agent,
    gpu: Rc<CudaStandIn>,
}

impl Node {
    fn new(way: Way, name: &str) -> Self {
        let gpu = CudaStandIn::new(1);
        gpu.open_memory();
        Self::with(way, name, gpu)
    }

    fn with(way: Way, name: &str, gpu: CudaStandIn) -> Self {
        let agent = way.builder(name).connect_within(WAIT).build().unwrap();
        // The cards are to do it, and not the GPU itself.
        let options = CudaOptions {
            peers: false,
            ..CudaOptions::default()
        };
        gpu.serve(&agent, options).unwrap();
        let gpu = Rc::new(gpu);
        Self { way, agent, gpu }
    }

    fn host(&self, bytes: u64) -> Memory {
        let memory = HostMemory::anonymous(bytes).unwrap();
        Memory {
            region: self.agent.register(memory, OPEN).unwrap(),
            device: None,
        }
    }

    /// Memory that an engine has, from so many bytes after its first page's start on.
    fn device(&self, bytes: u64) -> Memory {
        self.export(self.gpu.lend(0, bytes).unwrap())
    }

    /// Memory that is freed with its region.
    fn allocated(&self, bytes: u64) -> Memory {
        self.export(self.gpu.allocate(0, bytes).unwrap())
    }

    fn export(&self, memory: DeviceMemory) -> Memory {
        let address = memory.address();
        Memory {
            region: self.agent.register_device_with(memory, OPEN).unwrap(),
            device: Some((self.gpu.clone(), address)),
        }
    }

    fn load(&self, far: &Self) -> PeerHandle {
        self.agent.load_peer(&far.agent.metadata()).unwrap()
    }

    fn moves(
        &self,
        operation: Operation,
        (local, remote): (&Memory, &Memory),
        peer: &PeerHandle,
        options: RequestOptions,
    ) -> Result<Request> {
        // What a card does not move would go through host memory.
        let options = RequestOptions {
            backends: vec![self.way.name().to_owned()],
            ..options
        };
        let len = local.region.bytes().min(remote.region.bytes());
        let pair = (
            local.region.descriptor(0, len),
            remote.region.descriptor(0, len),
        );
        self.agent
            .transfer(operation, &[pair], Side::Peer(peer), options)
    }
}

/// Memory of either kind, and a look into it.
struct Memory {
    region: Region,
    device: Option<(Rc<CudaStandIn>, u64)>,
}

impl Memory {
    fn get(&self) -> Vec<u8> {
        match &self.device {
            Some((gpu, address)) => gpu.read(*address, self.region.bytes()),
            None => contents(&self.region),
        }
    }

    fn put(&self, bytes: &[u8]) {
        match &self.device {
            Some((gpu, address)) => gpu.write(*address, bytes),
            None => self.region.write_at(0, bytes).unwrap(),
        }
    }
}

/// The suite of all backends, with memory of GPUs on both sides.
struct Both {
    near: Node,
    far: Node,
}

impl conformance::Fixture for Both {
    fn backend(&self) -> &'static str {
        self.near.way.name()
    }

    fn agent(&self) -> &Agent {
        &self.near.agent
    }

    fn peer(&self) -> Option<&dyn conformance::Receiver> {
        Some(&self.far.agent)
    }

    fn place(&self, bytes: u64) -> Result<conformance::Place> {
        let owner = Box::new(self.far.allocated(bytes));
        let peer = Some(self.near.load(&self.far));
        Ok(conformance::Place { owner, peer })
    }

    /// What stands still on an emulated card would go through host memory.
    fn ways(&self) -> Vec<String> {
        vec![self.near.way.name().to_owned()]
    }

    fn memory(&self, bytes: u64) -> Result<Box<dyn conformance::Memory>> {
        Ok(Box::new(self.near.allocated(bytes)))
    }
}

impl conformance::Owned for Memory {
    fn id(&self) -> RegionId {
        self.region.id()
    }

    fn kind(&self) -> MemoryKind {
        self.region.kind()
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let (gpu, address) = self.device.as_ref().unwrap();
        bytes.copy_from_slice(&gpu.read(address + offset, bytes.len() as u64));
        Ok(())
    }
}

impl conformance::Memory for Memory {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let (gpu, address) = self.device.as_ref().unwrap();
        gpu.write(address + offset, bytes);
        Ok(())
    }

    fn deregister(&self) -> Deregistration {
        self.region.deregister()
    }
}

#[test]
fn device_memory_on_both_sides_passes_the_suite_of_all_backends() {
    let Some(way) = way() else { return };
    let (near, far) = (Node::new(way, "near"), Node::new(way, "far"));
    let both = Both { near, far };
    let report = conformance::run(&both).unwrap_or_else(|error| panic!("{error}"));
    let without = ["checksums are compared, or refused with the reason"];
    assert_eq!(report.skipped, without);
    both.near.gpu.check();
    both.far.gpu.check();
}

fn refused(made: Result<Request>) -> Error {
    let made = made.and_then(|request| Ok(request.wait(WAIT).map(drop)?));
    made.unwrap_err()
}

/// Device and device, device and host, host and device: all bytes, and those of scattered ranges alone.
#[test]
fn device_memory_moves_on_either_side() {
    let Some(way) = way() else { return };
    let (near, far) = (Node::new(way, "near"), Node::new(way, "far"));
    for (is_local, is_remote) in [(true, true), (true, false), (false, true)] {
        let make = |node: &Node, is_device| match is_device {
            true => node.device(BYTES),
            false => node.host(BYTES),
        };
        let (local, remote) = (make(&near, is_local), make(&far, is_remote));
        let peer = near.load(&far);
        let data = pattern(BYTES as usize, 1);
        local.put(&data);
        let request = near.moves(Write, (&local, &remote), &peer, RequestOptions::default());
        let done = request.unwrap().wait(WAIT).unwrap();
        assert_eq!(done.backend, way.name());
        assert!(remote.get() == data);
        let other = pattern(BYTES as usize, 2);
        remote.put(&other);
        let request = near.moves(Read, (&local, &remote), &peer, RequestOptions::default());
        request.unwrap().wait(WAIT).unwrap();
        assert!(local.get() == other);
        // Ranges at steps there, in a row here.
        let (len, count, stride) = (1000_u64, 300_u32, 4099_u64);
        let steps = Strided {
            region: remote.region.id(),
            offset: 77,
            len,
            stride,
            count,
        };
        let row = Strided {
            region: local.region.id(),
            offset: 5,
            stride: len,
            ..steps
        };
        local.put(&data);
        let there = near
            .agent
            .prepare_strided(Side::Peer(&peer), &[steps])
            .unwrap();
        let here = near.agent.prepare_strided(Side::Local, &[row]).unwrap();
        let options = RequestOptions::default();
        let request = near.agent.request(Write, &here, &there, options).unwrap();
        request.post().unwrap();
        request.wait(WAIT).unwrap();
        let mut expected = other;
        for at in 0..count as usize {
            let (to, from) = (77 + at * stride as usize, 5 + at * len as usize);
            expected[to..to + 1000].copy_from_slice(&data[from..from + 1000]);
        }
        assert!(remote.get() == expected);
        for memory in [&local, &remote] {
            memory.region.deregister().wait(WAIT).unwrap();
        }
    }
    near.gpu.check();
    far.gpu.check();
}

/// A device that does not order what cards write: the driver is asked before the notification is there, and before a read is done.
/// One that does is not asked.
#[test]
fn nobody_is_told_before_kernels_see_what_was_written() {
    let Some(way) = way() else { return };
    for is_flushed in [true, false] {
        let made = |name| {
            let gpu = CudaStandIn::new(1);
            gpu.open_memory();
            gpu.set_flushed(is_flushed);
            Node::with(way, name, gpu)
        };
        let (near, far) = (made("near"), made("far"));
        let (local, remote) = (near.device(BYTES), far.device(BYTES));
        let peer = near.load(&far);
        let notified = || RequestOptions {
            notification: Some(b"there"[..].into()),
            ..RequestOptions::default()
        };
        let both = (&local, &remote);
        for round in 1..3 {
            let request = near.moves(Write, both, &peer, notified()).unwrap();
            request.wait(WAIT).unwrap();
            assert_eq!(far.agent.notifications().len(), 1);
            assert_eq!(far.gpu.flushes(), if is_flushed { round } else { 0 });
        }
        assert_eq!(near.gpu.flushes(), 0);
        let request = near.moves(Read, both, &peer, RequestOptions::default());
        request.unwrap().wait(WAIT).unwrap();
        assert_eq!(near.gpu.flushes(), u64::from(is_flushed));
        if is_flushed {
            far.gpu.fail_next_flush();
            let error = refused(near.moves(Write, both, &peer, notified()));
            assert!(error.to_string().contains("card has written"), "{error}");
            assert!(far.agent.notifications().is_empty());
            near.gpu.fail_next_flush();
            let error = refused(near.moves(Read, both, &peer, RequestOptions::default()));
            assert!(error.to_string().contains("card has written"), "{error}");
        }
        near.gpu.check();
        far.gpu.check();
    }
}

/// The region and its kind are named, on either side; without checksums the same request goes.
#[test]
fn checksums_are_refused_by_name() {
    let Some(way) = way() else { return };
    let (near, far) = (Node::new(way, "near"), Node::new(way, "far"));
    for (local, remote) in [
        (near.device(BYTES), far.host(BYTES)),
        (near.host(BYTES), far.device(BYTES)),
    ] {
        let peer = near.load(&far);
        let checked = RequestOptions {
            checksum: true,
            ..RequestOptions::default()
        };
        let error = refused(near.moves(Read, (&local, &remote), &peer, checked));
        let device = [&local, &remote]
            .into_iter()
            .find(|one| one.device.is_some());
        let id = device.unwrap().region.id().to_string();
        for part in ["computes no checksums of memory of", "CUDA device", &id] {
            assert!(error.to_string().contains(part), "{error}");
        }
        let plain = near.moves(Read, (&local, &remote), &peer, RequestOptions::default());
        plain.unwrap().wait(WAIT).unwrap();
    }
}

/// Memory that no card of this machine reaches, as that of a GPU is to soft cards: refused with what was tried, on either side.
#[test]
fn memory_that_no_card_reaches_is_refused_with_the_reasons() {
    let Some(way) = way() else { return };
    let hidden = |name| Node::with(way, name, CudaStandIn::new(1));
    let (near, far) = (hidden("near"), hidden("far"));
    for (local, remote) in [
        (near.device(BYTES), far.host(BYTES)),
        (near.host(BYTES), far.device(BYTES)),
    ] {
        let peer = near.load(&far);
        for operation in [Read, Write] {
            let error = refused(near.moves(
                operation,
                (&local, &remote),
                &peer,
                RequestOptions::default(),
            ));
            let parts: &[&str] = match way {
                Way::Verbs => &[
                    "as a dma-buf: ",
                    "by address: ",
                    "nvidia_peermem is not loaded",
                ],
                _ => &["knows no memory of CUDA devices", "built without CUDA"],
            };
            for part in parts {
                assert!(error.to_string().contains(part), "{part}: {error}");
            }
        }
        for memory in [&local, &remote] {
            memory.region.deregister().wait(WAIT).unwrap();
        }
    }
    near.gpu.check();
    far.gpu.check();
}

/// An engine that frees memory while it is registered is told so by the next request that names it.
#[test]
fn memory_that_was_freed_is_refused() {
    let Some(way) = way() else { return };
    let (near, far) = (Node::new(way, "near"), Node::new(way, "far"));
    let (local, remote) = (near.device(BYTES), far.host(BYTES));
    let peer = near.load(&far);
    let (gpu, address) = local.device.as_ref().unwrap();
    gpu.free(*address);
    let error = refused(near.moves(Write, (&local, &remote), &peer, RequestOptions::default()));
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("was freed"), "{error}");
    let gone = far.device(BYTES);
    let peer = near.load(&far);
    let (gpu, address) = gone.device.as_ref().unwrap();
    gpu.free(*address);
    let here = near.host(BYTES);
    let error = refused(near.moves(Write, (&here, &gone), &peer, RequestOptions::default()));
    assert!(error.to_string().contains("was freed"), "{error}");
}

/// Memory of a GPU is deregistered while a long write to it is under way: its owner gets it back, and no byte of it changes then.
#[test]
fn device_memory_that_is_deregistered_early_is_written_no_more() {
    let Some(way) = way() else { return };
    let (near, far) = (Node::new(way, "near"), Node::new(way, "far"));
    let (local, remote) = (near.device(LONG), far.device(LONG));
    let peer = near.load(&far);
    local.put(&vec![1; LONG as usize]);
    let request = near.moves(Write, (&local, &remote), &peer, RequestOptions::default());
    let request = request.unwrap();
    remote.region.deregister().wait(WAIT).unwrap();
    remote.put(&vec![2; LONG as usize]);
    if let Err(error) = request.wait(WAIT) {
        let kinds = [ErrorKind::Denied, ErrorKind::NotFound, ErrorKind::PeerLost];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
    assert!(request.wait_drained(WAIT));
    assert!(remote.get().iter().all(|&byte| byte == 2));
    local.region.deregister().wait(WAIT).unwrap();
    far.gpu.check();
}

/// A long read into memory of a GPU is given up: once its memory is settled it does not change, and the path goes on.
#[test]
fn a_read_into_device_memory_lands_no_later_than_it_is_settled() {
    let Some(way) = way() else { return };
    let (near, far) = (Node::new(way, "near"), Node::new(way, "far"));
    let (local, remote) = (near.device(LONG), far.device(LONG));
    let peer = near.load(&far);
    remote.put(&vec![1; LONG as usize]);
    for _ in 0..2 {
        let request = near.moves(Read, (&local, &remote), &peer, RequestOptions::default());
        let request = request.unwrap();
        request.cancel();
        if let Err(error) = request.wait(WAIT) {
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        }
        assert!(request.wait_drained(WAIT));
        local.put(&vec![2; LONG as usize]);
        let pair = [(
            local.region.descriptor(0, 8),
            remote.region.descriptor(0, 8),
        )];
        let small = near
            .agent
            .transfer(Read, &pair, Side::Peer(&peer), RequestOptions::default());
        small.unwrap().wait(WAIT).unwrap();
        let here = local.get();
        assert!(here[..8] == [1; 8] && here[8..].iter().all(|&byte| byte == 2));
    }
}

/// What a target in another process does: offers memory of a GPU, says so, and waits.
#[test]
fn body_of_another_process() {
    if std::env::var(ROLE).as_deref() != Ok("direct target") {
        return;
    }
    let node = Node::new(way().unwrap(), "target");
    let _memory = node.device(LONG);
    println!("METADATA {}", hex(&node.agent.metadata()));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// The target's process is killed in the middle of a write between memory of GPUs: the request fails, its memory is settled and
/// given back, and another target is reached.
#[test]
fn a_peer_killed_in_the_middle_of_a_write_of_device_memory_is_lost() {
    let Some(way) = way() else { return };
    let near = Node::new(way, "near");
    let local = near.device(LONG);
    for kills in [true, false] {
        let mut target = Again::start("body_of_another_process", "direct target");
        let metadata = unhex(&target.expect("METADATA "));
        let peer = near.agent.load_peer(&metadata).unwrap();
        let bytes = if kills { LONG } else { 1 << 20 };
        let there = Descriptor {
            region: peer.regions()[0].0,
            offset: 0,
            len: bytes,
        };
        let pairs = [(local.region.descriptor(0, bytes), there)];
        let options = RequestOptions {
            deadline: Some(3 * WAIT),
            ..RequestOptions::default()
        };
        let request = near
            .agent
            .transfer(Write, &pairs, Side::Peer(&peer), options);
        let request = request.unwrap();
        if kills {
            target.kill();
            let error = request.wait(3 * WAIT).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
            assert!(request.wait_drained(WAIT));
            near.agent.forget_peer(&peer);
        } else {
            request.wait(WAIT).unwrap();
        }
    }
    local.region.deregister().wait(WAIT).unwrap();
}
