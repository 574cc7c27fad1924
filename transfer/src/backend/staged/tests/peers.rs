//! Peers: their host memory from devices of this agent, and their devices from either memory, over every way there is in a process.

use super::*;
use crate::agent::{AgentBuilder, PeerHandle};
use crate::outcome::MemoryFate;
use crate::request::NOTIFICATION_BYTES_MAX;
use crate::sys::cuda::fake::{ILLEGAL_ADDRESS, OUT_OF_MEMORY};

pub(super) const EXPORTED: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

/// An agent with a driver of its own.
pub(super) struct End {
    pub(super) fake: Fake,
    cuda: Cuda,
    agent: Agent,
}

fn builder(name: &str, way: &str) -> AgentBuilder {
    let builder = Agent::builder(name)
        .memcpy(way == "memcpy")
        .shm(way == "shm")
        .cma(way == "cma");
    let address = (way == "tcp").then(|| "127.0.0.1:0".parse().unwrap());
    builder.tcp(address).slow_after(None)
}

impl End {
    pub(super) fn new(name: &str, way: &str) -> Self {
        let agent = builder(name, way).build().unwrap();
        let fake = Fake::new(2);
        let cuda = fake.start();
        // As on another machine: nobody opens the other's devices.
        let options = CudaOptions {
            peers: false,
            ..Bed::small()
        };
        agent.start_cuda(options, &cuda).unwrap();
        Self { fake, cuda, agent }
    }

    pub(super) fn device(
        &self,
        ordinal: u32,
        content: &[u8],
        options: RegionOptions,
    ) -> (Region, u64) {
        let bytes = content.len() as u64;
        let address = self.fake.engine_memory(ordinal as i32, bytes);
        self.fake.write(address, content);
        let memory = self.fake.lend(&self.cuda, ordinal, address, bytes).unwrap();
        (
            self.agent.register_device_with(memory, options).unwrap(),
            address,
        )
    }

    pub(super) fn host(&self, content: &[u8]) -> Region {
        let memory = HostMemory::shared(content.len() as u64).unwrap();
        let region = self.agent.register(memory, EXPORTED).unwrap();
        region.write_at(0, content).unwrap();
        region
    }

    pub(super) fn knows(&self, other: &Self) -> PeerHandle {
        self.agent.load_peer(&other.agent.metadata()).unwrap()
    }

    fn request(
        &self,
        operation: Operation,
        peer: &PeerHandle,
        pairs: &[(Descriptor, Descriptor)],
        options: RequestOptions,
    ) -> Result<Request> {
        let (locals, remotes): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        let local = self.agent.prepare(Side::Local, &locals)?;
        let remote = self.agent.prepare(Side::Peer(peer), &remotes)?;
        self.agent.request(operation, &local, &remote, options)
    }

    fn posted(
        &self,
        operation: Operation,
        peer: &PeerHandle,
        pairs: &[(Descriptor, Descriptor)],
    ) -> Request {
        let request = self
            .request(operation, peer, pairs, RequestOptions::default())
            .unwrap();
        request.post().unwrap();
        request
    }

    pub(super) fn moved(
        &self,
        operation: Operation,
        peer: &PeerHandle,
        pairs: &[(Descriptor, Descriptor)],
    ) -> &'static str {
        let request = self.posted(operation, peer, pairs);
        let done = request.wait(PATIENCE).unwrap();
        assert!(request.wait_drained(PATIENCE));
        done.backend
    }

    fn free(&self, ordinal: u32) -> u64 {
        let staged = self.agent.staged_backend().unwrap();
        staged.stage.window(ordinal).unwrap().free()
    }
}

fn content(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.bytes() as usize];
    region.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Far more than the window, both ways, with a notification behind it; and the report says which way and why no other.
#[test]
fn devices_reach_a_peers_host_memory_over_any_way() {
    const BYTES: usize = (9 << 20) + 321;
    for way in ["memcpy", "shm", "cma", "tcp"] {
        let (owner, user) = (End::new("owner", way), End::new("user", way));
        let far = owner.host(&vec![0; BYTES]);
        let (from, _) = user.device(0, &pattern(1, BYTES), EXPORTED);
        let (to, address) = user.device(1, &vec![0; BYTES], EXPORTED);
        let peer = user.knows(&owner);
        let notice = vec![7; NOTIFICATION_BYTES_MAX];
        let options = RequestOptions {
            notification: Some(notice.clone().into()),
            ..RequestOptions::default()
        };
        let request = user
            .request(Write, &peer, &[(whole(&from), whole(&far))], options)
            .unwrap();
        let estimate = request.estimate().unwrap();
        assert_eq!(estimate.backend, "staged", "{way}");
        assert!(
            estimate
                .detail
                .starts_with("staged over 2 MiB of pinned memory"),
            "{}",
            estimate.detail
        );
        let (_, reason) = estimate
            .refused
            .iter()
            .find(|(name, _)| *name == way)
            .unwrap();
        assert!(
            reason.contains("does not move memory of CUDA device 0"),
            "{way}: {reason}"
        );
        request.post().unwrap();
        assert_eq!(request.wait(PATIENCE).unwrap().backend, "staged");
        let told = owner.agent.wait_notifications(PATIENCE);
        assert_eq!(
            (told.len(), &*told[0].peer, &told[0].bytes[..]),
            (1, "user", &notice[..])
        );
        assert!(content(&far) == pattern(1, BYTES), "{way}");
        assert_eq!(
            user.moved(Read, &peer, &[(whole(&to), whole(&far))]),
            "staged"
        );
        assert!(
            user.fake.read(address, BYTES as u64) == pattern(1, BYTES),
            "{way}"
        );
        assert_eq!((user.free(0), user.free(1)), (2, 2));
        // What devices need not touch goes as it always did.
        let near = user.host(&vec![0; BYTES]);
        assert_eq!(user.moved(Read, &peer, &[(whole(&near), whole(&far))]), way);
        user.fake.check();
    }
}

/// From host memory by TCP alone, and from devices through both agents' host memory.
#[test]
fn a_peers_device_is_reached_from_either_memory() {
    const BYTES: usize = (9 << 20) + 77;
    let (owner, user) = (End::new("owner", "tcp"), End::new("user", "tcp"));
    let (far, there) = owner.device(0, &pattern(2, BYTES), EXPORTED);
    let (other, beside) = owner.device(1, &pattern(3, 4096), EXPORTED);
    let plain = owner.host(&pattern(4, 4096));
    let peer = user.knows(&owner);
    let near = user.host(&vec![0; BYTES]);
    assert_eq!(
        user.moved(Read, &peer, &[(whole(&near), whole(&far))]),
        "tcp"
    );
    assert!(content(&near) == pattern(2, BYTES));
    near.write_at(0, &pattern(5, BYTES)).unwrap();
    assert_eq!(
        user.moved(Write, &peer, &[(whole(&near), whole(&far))]),
        "tcp"
    );
    assert!(owner.fake.read(there, BYTES as u64) == pattern(5, BYTES));
    let (device, address) = user.device(0, &vec![0; BYTES], EXPORTED);
    assert_eq!(
        user.moved(Read, &peer, &[(whole(&device), whole(&far))]),
        "staged"
    );
    assert!(user.fake.read(address, BYTES as u64) == pattern(5, BYTES));
    // Two devices and host memory of the peer, in one frame.
    let part = |at: u64| near.descriptor(at, 1000);
    let pairs = [
        (part(0), far.descriptor(11, 1000)),
        (part(1000), other.descriptor(5, 1000)),
        (part(2000), plain.descriptor(9, 1000)),
        (part(3000), far.descriptor(70_000, 1000)),
    ];
    user.moved(Read, &peer, &pairs);
    let found = &content(&near)[..4000];
    assert!(found[..1000] == pattern(5, BYTES)[11..1011]);
    assert!(found[1000..2000] == pattern(3, 4096)[5..1005]);
    assert!(found[2000..3000] == pattern(4, 4096)[9..1009]);
    assert!(found[3000..] == pattern(5, BYTES)[70_000..71_000]);
    near.write_at(0, &pattern(6, 4000)).unwrap();
    user.moved(Write, &peer, &pairs);
    assert!(owner.fake.read(beside + 5, 1000) == pattern(6, 4000)[1000..2000]);
    assert!(content(&plain)[9..1009] == pattern(6, 4000)[2000..3000]);
    assert!(owner.fake.read(there + 70_000, 1000) == pattern(6, 4000)[3000..]);
    owner.fake.check();
    user.fake.check();
}

/// Ways that only know host memory say so, and where no other is there is no path.
#[test]
fn a_peers_device_is_refused_by_ways_for_host_memory() {
    for way in ["memcpy", "shm", "cma"] {
        let (owner, user) = (End::new("owner", way), End::new("user", way));
        let (far, _) = owner.device(0, &[1; 4096], EXPORTED);
        let peer = user.knows(&owner);
        let (near, host) = (
            user.device(0, &[2; 4096], EXPORTED).0,
            user.host(&[3; 4096]),
        );
        for local in [&near, &host] {
            let pair = [(whole(local), whole(&far))];
            let refused = user.request(Read, &peer, &pair, RequestOptions::default());
            let error = refused.unwrap_err().to_string();
            assert!(
                error.contains("does not reach a peer's memory of a CUDA device"),
                "{way}: {error}"
            );
        }
    }
}

/// The owner decides: by key, by what a region is exported for, and by whether it is still there.
#[test]
fn the_owner_admits_to_its_devices() {
    let (owner, user) = (End::new("owner", "tcp"), End::new("user", "tcp"));
    let readable = RegionOptions {
        remote_read: true,
        remote_write: false,
    };
    let (far, address) = owner.device(0, &pattern(1, 4096), readable);
    let (gone, _) = owner.device(0, &pattern(2, 4096), EXPORTED);
    let (freed, its) = owner.device(0, &pattern(3, 4096), EXPORTED);
    let peer = user.knows(&owner);
    let near = user.host(&[0; 4096]);
    let error = user.request(
        Write,
        &peer,
        &[(whole(&near), whole(&far))],
        RequestOptions::default(),
    );
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Denied);
    let checked = RequestOptions {
        checksum: true,
        ..RequestOptions::default()
    };
    let error = user
        .request(Read, &peer, &[(whole(&near), whole(&far))], checked)
        .unwrap_err();
    assert!(error.to_string().contains("checksums"), "{error}");
    gone.deregister().wait(PATIENCE).unwrap();
    owner.fake.engine_frees(its);
    for (region, kind) in [(&gone, ErrorKind::Denied), (&freed, ErrorKind::Invalid)] {
        for operation in [Read, Write] {
            let failed = user.posted(operation, &peer, &[(whole(&near), whole(region))]);
            let failed = failed.wait(PATIENCE).unwrap_err();
            assert_eq!(
                (failed.kind(), failed.fate()),
                (kind, MemoryFate::Settled),
                "{failed}"
            );
        }
    }
    user.moved(Read, &peer, &[(whole(&near), whole(&far))]);
    assert!(content(&near) == pattern(1, 4096));
    assert!(owner.fake.read(address, 4096) == pattern(1, 4096));
    owner.fake.check();
}

/// A write into a peer's device that does nothing yet.
fn stalled(from_device: bool) -> (End, End, (Region, u64), Request) {
    const BYTES: usize = 6 << 20;
    let (owner, user) = (End::new("owner", "tcp"), End::new("user", "tcp"));
    owner.fake.set_running(false);
    let far = owner.device(0, &vec![0; BYTES], EXPORTED);
    let peer = user.knows(&owner);
    let near = match from_device {
        true => user.device(0, &pattern(8, BYTES), EXPORTED).0,
        false => user.host(&pattern(8, BYTES)),
    };
    let request = user.posted(Write, &peer, &[(whole(&near), whole(&far.0))]);
    until(|| owner.fake.queued() > 0);
    (owner, user, far, request)
}

/// The owner's device may still take what was sent: it is no settled write before that.
#[test]
fn a_cancelled_write_lands_nothing_once_it_is_settled() {
    for from_device in [false, true] {
        let (owner, user, (_region, address), request) = stalled(from_device);
        request.cancel();
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!(
            (failed.kind(), failed.fate()),
            (ErrorKind::Cancelled, MemoryFate::InFlight)
        );
        assert!(
            !request.wait_drained(Duration::from_millis(100)),
            "{from_device}"
        );
        owner.fake.set_running(true);
        assert!(request.wait_drained(PATIENCE));
        owner.fake.write(address, &vec![0xee; 6 << 20]);
        // Whatever is queued still would land now.
        owner.fake.advance(1000);
        assert!(
            owner.fake.read(address, 6 << 20) == vec![0xee; 6 << 20],
            "{from_device}"
        );
        if from_device {
            until(|| user.free(0) == 2);
        }
        owner.fake.check();
    }
}

/// What the device has been given ends first; what comes after that is refused.
#[test]
fn a_region_that_its_owner_deregisters_is_free_when_its_device_has_let_go() {
    let (owner, user, (region, address), request) = stalled(true);
    let gone = region.deregister();
    assert_eq!(
        gone.wait(Duration::from_millis(50)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    owner.fake.set_running(true);
    gone.wait(PATIENCE).unwrap();
    owner.fake.write(address, &vec![0xee; 6 << 20]);
    let failed = request.wait(PATIENCE).unwrap_err();
    assert!(
        [ErrorKind::Denied, ErrorKind::NotFound].contains(&failed.kind()),
        "{failed}"
    );
    assert!(failed.to_string().starts_with("staged: "), "{failed}");
    assert!(request.wait_drained(PATIENCE));
    assert!(owner.fake.read(address, 6 << 20) == vec![0xee; 6 << 20]);
    until(|| user.free(0) == 2);
}

/// Its device refuses, or breaks: the request hears why; the owner keeps what a broken device may still write.
#[test]
fn an_owners_device_that_fails_fails_the_request() {
    for (call, code, kind) in [
        ("cuMemcpyBatchAsync", OUT_OF_MEMORY, ErrorKind::Busy),
        ("cuEventQuery", ILLEGAL_ADDRESS, ErrorKind::Io),
    ] {
        for operation in [Read, Write] {
            let (owner, user) = (End::new("owner", "tcp"), End::new("user", "tcp"));
            let (far, _) = owner.device(0, &pattern(1, 4096), EXPORTED);
            let peer = user.knows(&owner);
            let (near, _) = user.device(0, &pattern(2, 4096), EXPORTED);
            if code == OUT_OF_MEMORY {
                owner.fake.fail("cuMemcpyAsync", 0, code);
            }
            owner.fake.fail(call, 0, code);
            let failed = user.posted(operation, &peer, &[(whole(&near), whole(&far))]);
            let failed = failed.wait(PATIENCE).unwrap_err();
            assert_eq!(failed.kind(), kind, "{call}: {failed}");
            until(|| user.free(0) == 2);
            let free = far.deregister().wait(Duration::from_millis(100));
            assert_eq!(free.is_ok(), code == OUT_OF_MEMORY, "{call}");
        }
    }
}

/// Gone in the middle: what was under way ends with that, and its window is free. One that has come again is another one.
#[test]
fn a_peer_that_is_gone_ends_the_request() {
    let (owner, user, far, request) = stalled(true);
    let fake = owner.fake.clone();
    drop(owner);
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::PeerLost, "{failed}");
    fake.set_running(true);
    drop(far);
    assert!(request.wait_drained(PATIENCE));
    until(|| user.free(0) == 2);
    let again = End::new("owner", "tcp");
    let (far, address) = again.device(0, &[0; 4096], EXPORTED);
    let peer = user.knows(&again);
    let (near, _) = user.device(0, &pattern(9, 4096), EXPORTED);
    assert_eq!(
        user.moved(Write, &peer, &[(whole(&near), whole(&far))]),
        "staged"
    );
    assert!(again.fake.read(address, 4096) == pattern(9, 4096));
}

/// The caller ends the connections while the owner's device does nothing.
#[test]
fn a_peer_that_is_forgotten_ends_the_request() {
    let (owner, user, (region, _), request) = stalled(true);
    let peer = user.knows(&owner);
    user.agent.forget_peer(&peer);
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::PeerLost, "{failed}");
    assert!(request.wait_drained(PATIENCE));
    until(|| user.free(0) == 2);
    // The owner's device still has its copies.
    let gone = region.deregister();
    assert_eq!(
        gone.wait(Duration::from_millis(50)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    owner.fake.set_running(true);
    gone.wait(PATIENCE).unwrap();
}
