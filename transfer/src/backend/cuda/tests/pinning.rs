//! Host memory that is pinned, was pinned by others, or cannot be.

use super::*;
use crate::sys::cuda::fake::{NOT_SUPPORTED, OUT_OF_MEMORY};

/// Moves all of a region to a device and back, and compares.
fn round_trip(bed: &Bed, host: &Region, seed: u8) {
    let bytes = host.bytes();
    let (device, address) = bed.device(bytes);
    let sent = pattern(seed, bytes as usize);
    host.write_at(0, &sent).unwrap();
    let whole = [(host.descriptor(0, bytes), device.descriptor(0, bytes))];
    bed.moved(Write, &whole);
    assert!(bed.fake.read(address, bytes) == sent);
    host.fill_at(0, bytes, 0).unwrap();
    bed.moved(Read, &whole);
    assert!(content(host) == sent);
    drop(device);
    bed.fake.engine_frees(address);
}

/// Once, whole, at the first request; until it is deregistered.
#[test]
fn a_region_is_pinned_once_for_all_its_requests() {
    let bed = Bed::new();
    let hosts: Vec<_> = (0..3).map(|n| bed.host(&vec![n; 3 << 20])).collect();
    for seed in 0..4 {
        hosts.iter().for_each(|host| round_trip(&bed, host, seed));
    }
    assert_eq!(
        (bed.fake.count("cuMemHostRegister"), bed.fake.pinned()),
        (3, 3)
    );
    for (left, host) in (0..3).rev().zip(&hosts) {
        host.deregister().wait(PATIENCE).unwrap();
        assert_eq!(bed.fake.pinned(), left, "it is free, and still pinned");
    }
    drop(hosts);
    bed.end();
}

/// The driver finds all pages there, and does not have the kernel make one after the other.
#[test]
fn pages_are_there_before_they_are_pinned() {
    let bed = Bed::new();
    let bytes = 96 << 20;
    let memory = HostMemory::anonymous(bytes).unwrap();
    let host = bed.agent.register(memory, RegionOptions::default());
    let host = host.unwrap();
    let resident = || host.core().mapping().unwrap().resident_bytes();
    assert_eq!(resident(), 0);
    let (device, address) = bed.device(4096);
    bed.moved(
        Read,
        &[(host.descriptor(0, 4096), device.descriptor(0, 4096))],
    );
    assert_eq!(resident(), bytes);
    drop(device);
    bed.fake.engine_frees(address);
    drop(host);
    bed.end();
}

/// It goes through buffers, once for all: the driver is not asked again with each request.
#[test]
fn memory_that_cannot_be_pinned_goes_through_buffers() {
    for code in [NOT_SUPPORTED, OUT_OF_MEMORY] {
        let bed = Bed::new();
        let host = bed.host(&vec![0; 5 << 20]);
        bed.fake.fail("cuMemHostRegister", 0, code);
        round_trip(&bed, &host, 1);
        round_trip(&bed, &host, 2);
        // The region, in vain, and the buffers.
        assert_eq!(
            (bed.fake.count("cuMemHostRegister"), bed.fake.pinned()),
            (2, 1)
        );
        host.deregister().wait(PATIENCE).unwrap();
        drop(host);
        bed.end();
    }
}

/// Two ranges of one pool that an engine lends apart: whichever comes second shares a page with the first.
#[test]
fn memory_of_which_others_pinned_a_part_goes_through_buffers() {
    let bed = Bed::new();
    let pool = HostMemory::anonymous(4 << 20).unwrap();
    let register = |offset, bytes| {
        let part = pool.lend(offset, bytes).unwrap();
        bed.agent.register(part, RegionOptions::default()).unwrap()
    };
    let (whole, part) = (register(0, 4 << 20), register(1 << 20, 3 << 20));
    let within = register(100, 5000);
    round_trip(&bed, &part, 1);
    round_trip(&bed, &whole, 2);
    assert_eq!(
        bed.fake.pinned(),
        2,
        "the part, and the buffers for the whole"
    );
    round_trip(&bed, &within, 3);
    for region in [whole, part, within] {
        region.deregister().wait(PATIENCE).unwrap();
    }
    assert_eq!(bed.fake.pinned(), 1);
    bed.fake.check();
}

/// Pinned by its engine: used as it is, and left as it was.
#[test]
fn memory_that_its_owner_has_pinned_is_used_and_left_pinned() {
    let bed = Bed::new();
    let pool = HostMemory::anonymous(2 << 20).unwrap();
    let start = pool.base().addr().get() as u64;
    bed.fake.engine_pins(start, 2 << 20);
    let region = pool.lend(4096, 1 << 20).unwrap();
    let region = bed
        .agent
        .register(region, RegionOptions::default())
        .unwrap();
    round_trip(&bed, &region, 1);
    assert_eq!(bed.fake.pinned(), 0, "no buffers, nothing of ours");
    region.deregister().wait(PATIENCE).unwrap();
    assert_eq!(bed.fake.count("cuMemHostUnregister"), 0);
    bed.fake.check();
}

/// Regions outlive their agent, and the device's one keeps the backend: host memory is let go of with the agent.
#[test]
fn nothing_stays_pinned_when_the_agent_is_gone() {
    let bed = Bed::new();
    let host = bed.host(&vec![0; 1 << 20]);
    let (device, _) = bed.device(1 << 20);
    bed.moved(
        Write,
        &[(host.descriptor(0, 1 << 20), device.descriptor(0, 1 << 20))],
    );
    assert_eq!(bed.fake.pinned(), 1);
    let Bed { fake, agent, .. } = bed;
    drop(agent);
    host.deregister().wait(PATIENCE).unwrap();
    assert_eq!(fake.pinned(), 0, "it is free, and still pinned");
    drop(device);
    fake.check();
}

/// The driver goes on with pages that it does not let go of: the memory is never called free.
#[test]
fn memory_that_stays_pinned_is_never_called_free() {
    let bed = Bed::new();
    let host = bed.host(&vec![0; 1 << 20]);
    round_trip(&bed, &host, 1);
    bed.fake.fail("cuMemHostUnregister", 0, NOT_SUPPORTED);
    let kept = host.deregister();
    assert_eq!(
        kept.wait(Duration::from_millis(50)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    assert_eq!(bed.fake.pinned(), 1);
}

/// Callers who use a region for the first time, and one who deregisters it meanwhile: whatever comes first, it is free and
/// unpinned at the end.
#[test]
fn a_region_that_is_deregistered_while_it_is_pinned_is_let_go() {
    for round in 0..50 {
        let bed = Bed::new();
        let (device, _) = bed.device(4096);
        let host = bed.host(&[round; 4096]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let pair = (host.descriptor(0, 4096), device.descriptor(0, 4096));
                    if let Ok(request) = bed.request(Write, &[pair], RequestOptions::default())
                        && request.post().is_ok()
                    {
                        request.wait(PATIENCE).unwrap();
                    }
                });
            }
            scope.spawn(|| host.deregister().wait(PATIENCE).unwrap());
        });
        host.deregister().wait(PATIENCE).unwrap();
        let buffers = bed.fake.pinned();
        assert!(buffers <= 1, "{buffers}");
        bed.fake.check();
    }
}

#[test]
fn nonsense_in_the_options_is_refused() {
    for options in [
        CudaOptions {
            staging_bytes: 0,
            ..CudaOptions::default()
        },
        CudaOptions {
            staging_bytes: (1 << 20) + 1,
            ..CudaOptions::default()
        },
        CudaOptions {
            staging_bytes: 2 << 30,
            ..CudaOptions::default()
        },
        CudaOptions {
            polling: Duration::from_secs(1),
            ..CudaOptions::default()
        },
    ] {
        let agent = Agent::builder("cuda").build().unwrap();
        let error = agent
            .start_cuda(options, &Fake::new(1).start())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
}
