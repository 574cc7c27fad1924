//! What is told of a driver and of memory, with a driver that has no device behind it.

use std::sync::Arc;

use kvcache_core::ErrorKind;

mod direct;

use super::calls::{Code, PointerFacts};
use super::driver::Cuda;
use super::fake::Fake;
use super::memory::DeviceMemory;

/// What the reason must name, by what the driver answers to its start.
#[test]
fn a_driver_that_does_not_start_is_refused_with_the_reason() {
    let cases = [
        (Code::STUB_LIBRARY, "stub of a toolkit"),
        (Code::SYSTEM_NOT_READY, "fabric manager"),
        (Code::SYSTEM_DRIVER_MISMATCH, "restart after an upgrade"),
        (
            Code::COMPAT_NOT_SUPPORTED_ON_DEVICE,
            "compatibility package",
        ),
        (Code::NOT_PERMITTED, "/dev/nvidia"),
        (Code::DEVICE_UNAVAILABLE, "another process"),
        (Code::UNKNOWN, "/dev/nvidia-uvm"),
        (Code(31_337), "error 31337 of the driver"),
    ];
    for (code, named) in cases {
        let fake = Fake::new(1);
        fake.fail("cuInit", 0, code);
        let reason = Cuda::start(fake.calls(), None).unwrap_err();
        assert!(reason.contains(named), "{reason}");
        assert!(reason.contains(&code.0.to_string()), "{reason}");
    }
}

#[test]
fn no_device_is_told_from_devices_that_are_hidden() {
    let fake = Fake::new(0);
    let reason = Cuda::start(fake.calls(), None).unwrap_err();
    assert_eq!(reason, "no CUDA device in this system");
    for visible in ["", "-1", "7"] {
        let reason = Cuda::start(fake.calls(), Some(visible)).unwrap_err();
        let named = format!("CUDA_VISIBLE_DEVICES={visible:?}");
        assert!(reason.contains(&named), "{reason}");
    }
    // A driver that starts, and then counts none.
    let fake = Fake::new(1);
    fake.fail("cuDeviceGetCount", 0, Code::NO_DEVICE);
    let reason = Cuda::start(fake.calls(), Some("9")).unwrap_err();
    assert!(reason.contains("CUDA_VISIBLE_DEVICES"), "{reason}");
}

/// Its own refusal would say less, so it is not started.
#[test]
fn a_driver_that_is_too_old_is_named_and_not_started() {
    let fake = Fake::new(1);
    fake.set_version(11_020);
    let reason = Cuda::start(fake.calls(), None).unwrap_err();
    assert!(reason.contains("CUDA 11.2, 11.4 is needed"), "{reason}");
    assert_eq!(fake.count("cuInit"), 0);
}

#[test]
fn devices_are_described() {
    let fake = Fake::new(2);
    let report = fake.start().report().unwrap();
    assert_eq!(report.version, (12, 8));
    assert!(report.has_batched_copies);
    assert_eq!(report.devices.len(), 2);
    assert_eq!(report.devices[1].ordinal, 1);
    assert_eq!(report.devices[1].name, "Stand-in 1");
    assert_eq!(report.devices[1].pci, "0000:02:00.0");
    assert_eq!(report.devices[1].compute, (9, 0));
    fake.set_version(12_040);
    assert!(!fake.start().report().unwrap().has_batched_copies);
    assert_eq!(
        fake.count("cuDevicePrimaryCtxRetain"),
        0,
        "a report makes no context"
    );
}

/// The engine's context is shared: retained once for all, and released with the last user.
#[test]
fn a_device_is_retained_once_and_released_at_the_end() {
    let fake = Fake::new(2);
    let cuda = fake.start();
    let memory: Vec<_> = (0..3)
        .map(|_| DeviceMemory::allocate_on(&cuda, 1, 4096).unwrap())
        .collect();
    assert_eq!(fake.count("cuDevicePrimaryCtxRetain"), 1);
    assert_eq!(Arc::strong_count(memory[0].gpu()), 3);
    let refused = cuda.gpu(2).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    drop(memory);
    fake.check_empty();
}

#[test]
fn memory_that_an_engine_lends_is_compared_with_what_the_driver_knows() {
    let fake = Fake::new(2);
    let cuda = fake.start();
    let pool = fake.engine_memory(0, 1 << 20);
    for (offset, bytes) in [(0, 1 << 20), (4096, 8192), ((1 << 20) - 1, 1)] {
        let memory = fake.lend(&cuda, 0, pool + offset, bytes).unwrap();
        assert_eq!((memory.address(), memory.bytes()), (pool + offset, bytes));
        memory.check_there().unwrap();
    }
    let host = Box::new([0_u8; 64]);
    let host = host.as_ptr().addr() as u64;
    fake.engine_pins(host, 64);
    let cases = [
        (0, pool, 0, "memory length"),
        (
            0,
            pool,
            (1 << 20) + 1,
            "its allocation ends after 1048576 bytes",
        ),
        (0, pool + 4096, 1 << 20, "its allocation ends after"),
        (0, pool - 1, 4096, "does not know"),
        (0, pool, u64::MAX, "memory length"),
        (0, u64::MAX - 5, 4096, "past the address space"),
        (1, pool, 4096, "belongs to device 0"),
        (2, pool, 4096, "cuda device"),
        (0, host, 64, "memory of the host"),
        (0, 0, 64, "does not know"),
    ];
    for (ordinal, address, bytes, named) in cases {
        let error = fake.lend(&cuda, ordinal, address, bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    fake.check();
}

/// Pools that grow are mapped piece by piece; allocations that happen to touch are not one.
#[test]
fn memory_mapped_in_pieces_is_one_range_and_touching_allocations_are_not() {
    let fake = Fake::new(1);
    let cuda = fake.start();
    let pool = fake.engine_mappings(0, &[2 << 20, 2 << 20, 4 << 20]);
    fake.lend(&cuda, 0, pool + 100, (8 << 20) - 100).unwrap();
    let error = fake.lend(&cuda, 0, pool + 100, 8 << 20).unwrap_err();
    assert!(error.to_string().contains("does not know"), "{error}");
    // The second piece is an allocation of its own.
    fake.describe(pool, |facts| facts.is_legacy = true);
    let error = fake.lend(&cuda, 0, pool, 4 << 20).unwrap_err();
    assert!(error.to_string().contains("its allocation ends"), "{error}");
}

#[test]
fn managed_memory_and_answers_that_make_no_sense_are_refused() {
    let fake = Fake::new(1);
    let cuda = fake.start();
    let pool = fake.engine_memory(0, 4096);
    fake.describe(pool, |facts| facts.is_managed = true);
    let error = fake.lend(&cuda, 0, pool, 4096).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let lies: [fn(&mut PointerFacts); 3] = [
        |facts| facts.bytes = 0,
        |facts| facts.start += 8,
        |facts| facts.ordinal = -1,
    ];
    for lie in lies {
        let pool = fake.engine_memory(0, 4096);
        fake.describe(pool, lie);
        let error = fake.lend(&cuda, 0, pool, 4096).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    fake.check();
}

#[test]
fn memory_that_cannot_be_had_is_an_error_that_says_so() {
    let fake = Fake::new(1);
    let cuda = fake.start();
    fake.fail("cuMemAlloc", 0, Code::OUT_OF_MEMORY);
    let error = DeviceMemory::allocate_on(&cuda, 0, 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(
        error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"),
        "{error}"
    );
    // What was allocated before the driver fails is not lost.
    fake.fail("cuPointerGetAttributes", 0, Code::UNKNOWN);
    DeviceMemory::allocate_on(&cuda, 0, 1 << 20).unwrap_err();
    fake.check_empty();
}
