//! The backend over a driver that has no device behind it: see [`Fake`].

use std::time::Duration;

use kvcache_core::ErrorKind;

use super::CudaOptions;
use crate::agent::Agent;
use crate::backend::Operation::{self, Read, Write};
use crate::backend::conformance::{self, Fixture, Place, Receiver};
use crate::backend::trials::{PATIENCE, pattern, until};
use crate::descriptor::{Descriptor, Side};
use crate::region::{MemoryKind, Region, RegionOptions};
use crate::request::{Priority, Request, RequestOptions};
use crate::sys::cuda::fake::Fake;
use crate::sys::cuda::{Cuda, DeviceMemory};
use crate::sys::memory::HostMemory;

mod compute;
mod devices;
mod ending;
mod exported;
mod fragments;
mod order;
mod peers;
mod pinning;
mod processes;
mod refusals;

/// A driver, and an agent that uses it.
struct Bed {
    fake: Fake,
    cuda: Cuda,
    agent: Agent,
}

impl Bed {
    fn new() -> Self {
        Self::with(CudaOptions::default())
    }

    fn with(options: CudaOptions) -> Self {
        Self::over(Fake::new(2), options)
    }

    fn over(fake: Fake, options: CudaOptions) -> Self {
        let agent = Agent::builder("cuda").build().unwrap();
        let cuda = fake.start();
        agent.start_cuda(options, &cuda).unwrap();
        Self { cuda, fake, agent }
    }

    /// Memory of device 0 that an engine lends, and where it is.
    fn device(&self, bytes: u64) -> (Region, u64) {
        let address = self.fake.engine_memory(0, bytes);
        let memory = self.fake.lend(&self.cuda, 0, address, bytes).unwrap();
        (self.agent.register_device(memory).unwrap(), address)
    }

    fn host(&self, content: &[u8]) -> Region {
        let memory = HostMemory::anonymous(content.len() as u64).unwrap();
        let region = self.agent.register(memory, RegionOptions::default());
        let region = region.unwrap();
        region.write_at(0, content).unwrap();
        region
    }

    fn request(
        &self,
        operation: Operation,
        pairs: &[(Descriptor, Descriptor)],
        options: RequestOptions,
    ) -> kvcache_core::Result<Request> {
        let (locals, remotes): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        let local = self.agent.prepare(Side::Local, &locals)?;
        let remote = self.agent.prepare(Side::Local, &remotes)?;
        self.agent.request(operation, &local, &remote, options)
    }

    fn posted(&self, operation: Operation, pairs: &[(Descriptor, Descriptor)]) -> Request {
        let request = self.request(operation, pairs, RequestOptions::default());
        let request = request.unwrap();
        request.post().unwrap();
        request
    }

    fn moved(&self, operation: Operation, pairs: &[(Descriptor, Descriptor)]) {
        let request = self.posted(operation, pairs);
        let done = request.wait(PATIENCE).unwrap();
        assert_eq!(done.backend, "cuda");
        assert!(request.wait_drained(PATIENCE));
    }

    /// Everybody lets go, and nothing is left.
    fn end(self) {
        let fake = self.fake.clone();
        drop(self);
        until(|| fake.is_empty());
        fake.check_empty();
    }
}

fn content(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.bytes() as usize];
    region.read_at(0, &mut bytes).unwrap();
    bytes
}

impl Fixture for Bed {
    fn backend(&self) -> &'static str {
        "cuda"
    }

    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn peer(&self) -> Option<&dyn Receiver> {
        None
    }

    fn place(&self, bytes: u64) -> kvcache_core::Result<Place> {
        let memory = DeviceMemory::allocate_on(&self.cuda, 0, bytes)?;
        Ok(Place {
            owner: Box::new(self.agent.register_device(memory)?),
            peer: None,
        })
    }
}

/// With pinned memory and without, with the batched copy, without it, and with one that the driver only seems to have.
#[test]
fn the_suite_of_all_backends_holds() {
    let staged = || CudaOptions {
        pin: false,
        staging_bytes: 2 << 20,
        ..CudaOptions::default()
    };
    for (version, options) in [
        (12_080, CudaOptions::default()),
        (11_080, CudaOptions::default()),
        (13_000, staged()),
        (12_040, staged()),
    ] {
        let fake = Fake::new(1);
        fake.set_version(version);
        let bed = Bed::over(fake, options);
        let report = conformance::run(&bed).unwrap_or_else(|error| panic!("{version}: {error}"));
        let without_peers = ["notification", "inbox", "checksums"];
        for case in &report.skipped {
            assert!(
                without_peers.iter().any(|word| case.contains(word)),
                "{case}"
            );
        }
        assert_eq!(report.passed.len(), 11);
        let batches = bed.fake.count("cuMemcpyBatchAsync");
        assert_eq!(batches > 0, version >= 12_080, "{version}: {batches}");
        bed.end();
    }
}

/// Whichever side names the device, and whichever way the bytes go.
#[test]
fn the_device_may_be_on_either_side() {
    let bed = Bed::new();
    let (device, address) = bed.device(5000);
    assert_eq!(device.kind(), MemoryKind::Device { ordinal: 0 });
    for (seed, is_local, operation) in [
        (1, true, Read),
        (2, true, Write),
        (3, false, Read),
        (4, false, Write),
    ] {
        let host = bed.host(&pattern(seed, 5000));
        bed.fake.write(address, &pattern(seed + 100, 5000));
        let sides = (device.descriptor(7, 4000), host.descriptor(9, 4000));
        let pair = if is_local { sides } else { (sides.1, sides.0) };
        bed.moved(operation, &[pair]);
        let to_device = is_local == (operation == Read);
        let (mut on_host, mut on_device) = (pattern(seed, 5000), pattern(seed + 100, 5000));
        match to_device {
            true => on_device[7..4007].copy_from_slice(&on_host[9..4009]),
            false => on_host[9..4009].copy_from_slice(&on_device[7..4007]),
        }
        assert!(content(&host) == on_host, "{seed}: host");
        assert!(bed.fake.read(address, 5000) == on_device, "{seed}: device");
    }
    bed.fake.engine_frees(address);
    drop(device);
    bed.end();
}

#[test]
fn scattered_ranges_move_within_a_device() {
    let bed = Bed::new();
    let ((one, from), (other, to)) = (bed.device(64 << 10), bed.device(64 << 10));
    bed.fake.write(from, &pattern(5, 64 << 10));
    let slot = |number: u64| number * 1024;
    let pairs: Vec<_> = (0..60)
        .map(|number| {
            let target = number * 37 % 60;
            (
                other.descriptor(slot(target), 1000),
                one.descriptor(slot(number) + 3, 1000),
            )
        })
        .collect();
    bed.moved(Read, &pairs);
    for number in 0..60 {
        let target = to + slot(number * 37 % 60);
        let moved = bed.fake.read(target, 1000);
        assert!(
            moved == bed.fake.read(from + slot(number) + 3, 1000),
            "{number}"
        );
        assert!(
            bed.fake.read(target + 1000, 24) == [0xcd; 24],
            "after {number}"
        );
    }
    // One region on both sides.
    bed.moved(
        Write,
        &[(one.descriptor(0, 1000), one.descriptor(2000, 1000))],
    );
    assert!(bed.fake.read(from + 2000, 1000) == pattern(5, 1000));
    bed.fake.check();
}

/// A driver that has the call and refuses it: the copies are made all the same, and it is not asked again.
#[test]
fn a_batch_that_the_driver_does_not_serve_is_copied_one_by_one() {
    let bed = Bed::new();
    let (device, address) = bed.device(4096);
    let host = bed.host(&pattern(6, 4096));
    let unsupported = crate::sys::cuda::fake::NOT_SUPPORTED;
    bed.fake.fail("cuMemcpyBatchAsync", 0, unsupported);
    let pairs = |gap: u64| {
        let pair = |n: u64| {
            (
                host.descriptor(n * 500, 400),
                device.descriptor(n * (400 + gap), 400),
            )
        };
        (0..4).map(pair).collect::<Vec<_>>()
    };
    bed.moved(Write, &pairs(8));
    bed.moved(Write, &pairs(16));
    assert_eq!(bed.fake.count("cuMemcpyBatchAsync"), 1);
    assert_eq!(bed.fake.count("cuMemcpyAsync"), 8);
    for n in 0..4 {
        let moved = bed.fake.read(address + n * 416, 400);
        assert!(moved == pattern(6, 4096)[n as usize * 500..][..400], "{n}");
    }
    bed.fake.check();
}

/// More than the window: it is queued in batches, and neither the driver nor the buffers are overrun.
#[test]
fn what_is_queued_is_bounded() {
    const BYTES: usize = 96 << 20;
    for (pin, most) in [(true, 4), (false, 2)] {
        let bed = Bed::with(CudaOptions {
            pin,
            staging_bytes: 2 << 20,
            ..CudaOptions::default()
        });
        bed.fake.set_running(false);
        let (device, address) = bed.device(BYTES as u64);
        let host = bed.host(&pattern(7, BYTES));
        let whole = |region: &Region| region.descriptor(0, BYTES as u64);
        let request = bed.posted(Write, &[(whole(&host), whole(&device))]);
        // A copy and an event of each batch.
        until(|| bed.fake.queued() == 2 * most);
        let queued = bed.fake.count("cuEventRecord");
        assert_eq!(queued, most as u64);
        bed.fake.set_running(true);
        request.wait(PATIENCE).unwrap();
        assert!(bed.fake.read(address, BYTES as u64) == pattern(7, BYTES));
        bed.fake.check();
    }
}

#[test]
fn what_is_in_the_background_gives_way() {
    const LARGE: usize = 64 << 20;
    let bed = Bed::new();
    bed.fake.set_running(false);
    let (device, address) = bed.device(LARGE as u64);
    let (large, small) = (bed.host(&pattern(8, LARGE)), bed.host(&pattern(9, 4096)));
    let options = RequestOptions {
        priority: Priority::Background,
        ..RequestOptions::default()
    };
    let whole = (
        large.descriptor(0, LARGE as u64 - 4096),
        device.descriptor(4096, LARGE as u64 - 4096),
    );
    let background = bed.request(Write, &[whole], options).unwrap();
    background.post().unwrap();
    until(|| bed.fake.queued() == 4);
    let normal = bed.posted(
        Write,
        &[(small.descriptor(0, 4096), device.descriptor(0, 4096))],
    );
    until(|| bed.fake.queued() == 6);
    // What was ahead, and the small one.
    bed.fake.advance(6);
    normal.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address, 4096) == pattern(9, 4096));
    assert!(matches!(background.poll(), crate::Status::InFlight));
    bed.fake.set_running(true);
    background.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address + 4096, 1 << 20) == pattern(8, 1 << 20));
    bed.fake.check();
}

/// Callers of several threads, both ways and within, pinned and not.
#[test]
fn many_callers_share_a_device() {
    const SLOT: u64 = 100_000;
    let bed = Bed::with(CudaOptions {
        staging_bytes: 1 << 20,
        ..CudaOptions::default()
    });
    let (device, _) = bed.device(16 * SLOT);
    std::thread::scope(|scope| {
        for caller in 0..8_u64 {
            let (bed, device) = (&bed, &device);
            scope.spawn(move || {
                for round in 0..20 {
                    let seed = (caller * 20 + round) as u8;
                    let host = bed.host(&pattern(seed, SLOT as usize));
                    if caller % 2 == 0 {
                        // An engine has pinned a part of it: it goes through buffers.
                        bed.fake.engine_pins_part(&host);
                    }
                    let back = bed.host(&vec![0; SLOT as usize]);
                    let (first, second) = (caller * 2 * SLOT, (caller * 2 + 1) * SLOT);
                    let range = |region: &Region, at: u64| region.descriptor(at, SLOT);
                    bed.moved(Write, &[(range(&host, 0), range(device, first))]);
                    bed.moved(Read, &[(range(device, second), range(device, first))]);
                    bed.moved(Read, &[(range(&back, 0), range(device, second))]);
                    assert!(
                        content(&back) == pattern(seed, SLOT as usize),
                        "{caller} {round}"
                    );
                    bed.fake.engine_unpins_part(&host);
                    for region in [host, back] {
                        region.deregister().wait(PATIENCE).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(bed.fake.pinned(), 1, "the buffers alone are pinned");
    bed.fake.check();
}

/// It sleeps without a limit, and asks nothing of the driver, until something comes.
#[test]
fn a_thread_without_work_sleeps() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let host = bed.host(&[0; 4096]);
    for _ in 0..3 {
        bed.moved(
            Write,
            &[(host.descriptor(0, 4096), device.descriptor(0, 4096))],
        );
        let started = bed
            .agent
            .core()
            .extension::<super::Started>(|| unreachable!());
        let lanes = started.unwrap();
        let lane = lanes.0.lanes.lock().unwrap()[&0].clone();
        until(|| lane.is_asleep());
        let asked = bed.fake.count("cuEventQuery");
        for _ in 0..1000 {
            std::thread::yield_now();
        }
        assert!(lane.is_asleep());
        assert_eq!(bed.fake.count("cuEventQuery"), asked);
    }
}
