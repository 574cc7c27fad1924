//! Memory for network cards, with a driver that has no device behind it.

use super::super::direct::RemoteWrites;
use super::*;

const BYTES: u64 = 10_000;

fn started() -> (Fake, Cuda) {
    let fake = Fake::new(1);
    fake.open_memory();
    let cuda = fake.start();
    (fake, cuda)
}

/// The driver takes whole pages alone; the range's place in them is told.
#[test]
fn a_dma_buf_is_of_the_pages_around_the_range() {
    let (fake, cuda) = started();
    let start = fake.engine_memory(0, 1 << 16);
    for (skip, bytes) in [(0, 1 << 16), (300, BYTES), (4096, 1), (65_535, 1)] {
        let memory = fake.lend(&cuda, 0, start + skip, bytes).unwrap();
        assert_eq!(memory.dma_buf().unwrap().offset, skip % 4096);
    }
    fake.check();
}

/// A device that gives none, and a driver without the call: each with its reason.
#[test]
fn a_dma_buf_that_cannot_be_had_is_refused_with_the_reason() {
    let (fake, cuda) = started();
    let start = fake.engine_memory(0, BYTES);
    let memory = fake.lend(&cuda, 0, start, BYTES).unwrap();
    fake.fail("cuMemGetHandleForAddressRange", 0, Code::NOT_SUPPORTED);
    let error = memory.dma_buf().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("as a dma-buf"), "{error}");
    let (fake, cuda) = started();
    fake.set_direct(false, true, true);
    let start = fake.engine_memory(0, BYTES);
    let memory = fake.lend(&cuda, 0, start, BYTES).unwrap();
    let error = memory.dma_buf().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("CUDA 11.7"), "{error}");
    assert_eq!(fake.count("cuMemGetHandleForAddressRange"), 0);
}

/// One allocation, and memory that is mapped in pieces, by what the device says of each.
#[test]
fn peer_memory_depends_on_how_memory_was_allocated() {
    for (peer, mapped) in [(true, true), (true, false), (false, true)] {
        let (fake, cuda) = started();
        fake.set_direct(true, peer, mapped);
        let one = fake.engine_memory(0, BYTES);
        let one = fake.lend(&cuda, 0, one, BYTES).unwrap();
        assert_eq!(one.check_peer_memory().is_ok(), peer);
        let pieces = fake.engine_memory(0, BYTES);
        fake.describe(pieces, |facts| facts.is_legacy = false);
        let pieces = fake.lend(&cuda, 0, pieces, BYTES).unwrap();
        assert_eq!(pieces.check_peer_memory().is_ok(), peer && mapped);
    }
}

/// Copies with memory that cards read are waited for; where that cannot be had the memory is given all the same.
#[test]
fn memory_for_cards_has_its_copies_waited_for() {
    let (fake, cuda) = started();
    let start = fake.engine_memory(0, BYTES);
    fake.lend(&cuda, 0, start, BYTES).unwrap().open_to_cards();
    assert!(fake.is_synchronized(start));
    let pieces = fake.engine_memory(0, BYTES);
    fake.describe(pieces, |facts| facts.is_legacy = false);
    fake.lend(&cuda, 0, pieces, BYTES).unwrap().open_to_cards();
    assert!(!fake.is_synchronized(pieces));
    fake.check();
}

/// What the device says decides whether the driver is asked, and what it answers counts.
#[test]
fn what_cards_have_written_is_flushed_where_the_device_does_not_order_it() {
    for (flushes, ordering, expected) in [
        (1, 0, RemoteWrites::Flushed),
        (3, 0, RemoteWrites::Flushed),
        (2, 0, RemoteWrites::Unordered),
        (0, 0, RemoteWrites::Unordered),
        (1, 100, RemoteWrites::Ordered),
        (0, 200, RemoteWrites::Ordered),
    ] {
        let (fake, cuda) = started();
        fake.set_remote_writes(flushes, ordering);
        let gpu = cuda.gpu(0).unwrap();
        assert_eq!(gpu.direct().remote_writes, expected, "{flushes} {ordering}");
        assert_eq!(cuda.report().unwrap().devices[0].direct, gpu.direct());
        gpu.land_remote_writes().unwrap();
        let asked = expected == RemoteWrites::Flushed;
        assert_eq!(
            fake.count("cuFlushGPUDirectRDMAWrites"),
            u64::from(asked),
            "{flushes} {ordering}"
        );
        fake.fail(
            "cuFlushGPUDirectRDMAWrites",
            0,
            super::super::fake::ILLEGAL_ADDRESS,
        );
        assert_eq!(gpu.land_remote_writes().is_err(), asked);
        fake.check();
    }
}
