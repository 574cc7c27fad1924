//! Requests that end otherwise than by being done: when their memory is called free, and that no byte lands after that.

use super::*;
use crate::outcome::MemoryFate;
use crate::sys::cuda::fake::{ILLEGAL_ADDRESS, OUT_OF_MEMORY};

const BYTES: usize = 12 << 20;

/// It ends in the middle, or may not be written: the piece is named, everything else of the request ends, and the window is free.
#[test]
fn a_file_that_fails_ends_the_request() {
    for operation in [Read, Write] {
        let bed = Bed::with(FileEngineMode::Auto, Bed::small());
        let (device, address) = bed.device(0, &pattern(1, BYTES));
        let _full = bed.file("blocks", &pattern(2, BYTES));
        let options = FileOptions {
            read_only: true,
            ..FileOptions::default()
        };
        let file = bed.agent.open_file(bed.path("blocks"), &options).unwrap();
        let shortened = std::fs::File::options()
            .write(true)
            .open(bed.path("blocks"));
        shortened.unwrap().set_len(5_000_000).unwrap();
        let request = bed.posted(operation, &[(whole(&device), whole(&file))]);
        let failed = request.wait(PATIENCE).unwrap_err();
        let (kind, words) = match operation {
            Read => (ErrorKind::Corrupt, "the file ends there"),
            Write => (ErrorKind::Denied, "is open for reading only"),
        };
        assert_eq!(failed.kind(), kind, "{failed}");
        let text = failed.to_string();
        assert!(
            text.starts_with("staged: ") && text.contains("blocks") && text.contains(words),
            "{failed}"
        );
        assert!(request.wait_drained(PATIENCE));
        until(|| bed.free(0) == 2);
        // Behind the end nothing was made up.
        let moved = bed.fake.read(address, BYTES as u64);
        assert!(moved[6 << 20..] == pattern(1, BYTES)[6 << 20..]);
        let small = bed.file("small", &pattern(9, 4096));
        bed.moved(Read, &[(device.descriptor(0, 4096), whole(&small))]);
        bed.fake.check();
    }
}

/// The driver refuses a copy: the request fails with its reason, and the next one goes.
#[test]
fn a_copy_that_the_driver_refuses_ends_the_request() {
    for operation in [Read, Write] {
        let bed = Bed::with(FileEngineMode::Auto, Bed::small());
        let (device, _) = bed.device(0, &pattern(3, BYTES));
        let file = bed.file("blocks", &pattern(4, BYTES));
        for call in ["cuMemcpyAsync", "cuMemcpyBatchAsync"] {
            bed.fake.fail(call, 3, OUT_OF_MEMORY);
        }
        let pair = [(whole(&device), whole(&file))];
        let request = bed.posted(operation, &pair);
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Busy, "{failed}");
        assert!(
            failed.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"),
            "{failed}"
        );
        assert!(request.wait_drained(PATIENCE));
        until(|| bed.free(0) == 2);
        bed.moved(operation, &pair);
        bed.fake.check();
    }
}

/// Nothing tells any more when the device lets go: neither of the memory nor of the window is anything called free. The other device
/// goes on.
#[test]
fn a_device_that_breaks_keeps_its_window() {
    let bed = Bed::with(FileEngineMode::Auto, Bed::small());
    let (device, _) = bed.device(0, &pattern(5, BYTES));
    let (other, _) = bed.device(1, &pattern(6, BYTES));
    let file = bed.file("blocks", &pattern(7, BYTES));
    bed.fake.fail("cuEventQuery", 0, ILLEGAL_ADDRESS);
    let request = bed.posted(Read, &[(whole(&device), whole(&file))]);
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::Poisoned, MemoryFate::InFlight),
        "{failed}"
    );
    assert!(!request.wait_drained(Duration::from_millis(50)));
    let kept = device.deregister();
    assert_eq!(
        kept.wait(Duration::ZERO).unwrap_err().kind(),
        ErrorKind::Busy
    );
    assert!(
        bed.free(0) < 2,
        "a chunk that the device may write is lent again"
    );
    bed.moved(Read, &[(whole(&other), whole(&file))]);
}

/// A read of which nothing has come to the device yet, with its window full.
fn stalled(deadline: Option<Duration>) -> (Bed, Region, u64, Request) {
    let bed = Bed::with(FileEngineMode::Auto, Bed::small());
    bed.fake.set_running(false);
    let (device, address) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(8, BYTES));
    let options = RequestOptions {
        deadline,
        ..RequestOptions::default()
    };
    let pair = [(whole(&device), whole(&file))];
    let request = bed.request(Read, &pair, options).unwrap();
    request.post().unwrap();
    (bed, device, address, request)
}

/// It has failed, and the device may still copy: nothing is free, and no further piece is begun. Then the device goes on.
fn drains((bed, device, address, request): (Bed, Region, u64, Request), kind: ErrorKind) {
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (kind, MemoryFate::InFlight),
        "{failed}"
    );
    let gone = device.deregister();
    assert_eq!(
        gone.wait(Duration::from_millis(50)).unwrap_err().kind(),
        ErrorKind::Busy
    );
    assert!(!request.wait_drained(Duration::ZERO));
    bed.fake.set_running(true);
    assert!(request.wait_drained(PATIENCE));
    gone.wait(PATIENCE).unwrap();
    // What is there now stays: nothing comes late.
    bed.fake.write(address, &vec![0xee; BYTES]);
    until(|| bed.free(0) == 2);
    assert_eq!(bed.fake.queued(), 0);
    assert!(bed.fake.read(address, BYTES as u64) == vec![0xee; BYTES]);
    bed.fake.check();
}

#[test]
fn a_cancelled_request_is_free_when_the_device_has_let_go() {
    let stalled = stalled(None);
    until(|| stalled.0.fake.queued() == 4);
    stalled.3.cancel();
    drains(stalled, ErrorKind::Cancelled);
}

#[test]
fn a_request_past_its_deadline_is_free_when_the_device_has_let_go() {
    drains(
        stalled(Some(Duration::from_millis(300))),
        ErrorKind::Timeout,
    );
}

/// It is still moved: whoever deregisters waits for all pieces, also for those that were not begun.
#[test]
fn a_region_that_is_deregistered_meanwhile_is_moved_to_the_end() {
    let (bed, device, address, request) = stalled(None);
    until(|| bed.fake.queued() == 4);
    let gone = device.deregister();
    assert_eq!(
        gone.wait(Duration::ZERO).unwrap_err().kind(),
        ErrorKind::Busy
    );
    bed.fake.set_running(true);
    gone.wait(PATIENCE).unwrap();
    request.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address, BYTES as u64) == pattern(8, BYTES));
}

/// A request that nobody holds any more, of an agent that nobody holds any more, is moved to its end, and then nothing is left.
#[test]
fn a_request_that_was_dropped_is_finished() {
    let (bed, device, address, request) = stalled(None);
    until(|| bed.fake.queued() == 4);
    let (fake, cuda) = (bed.fake.clone(), bed.cuda.clone());
    drop((device, request, bed));
    fake.set_running(true);
    until(|| fake.read(address, BYTES as u64) == pattern(8, BYTES));
    drop(cuda);
    fake.engine_frees(address);
    until(|| fake.is_empty());
    until(|| fake.pinned() == 0);
    fake.check_empty();
}
