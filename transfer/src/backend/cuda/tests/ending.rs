//! Requests that end otherwise than by being done: when their memory is called free, and that no byte lands after that.

use super::*;
use crate::outcome::MemoryFate;
use crate::sys::cuda::fake::{ILLEGAL_ADDRESS, OUT_OF_MEMORY};

const BYTES: u64 = 96 << 20;

/// A large write of which the device has done nothing.
struct Stalled {
    bed: Bed,
    device: Region,
    address: u64,
    host: Region,
    request: Request,
}

fn stalled(deadline: Option<Duration>) -> Stalled {
    let bed = Bed::new();
    bed.fake.set_running(false);
    let (device, address) = bed.device(BYTES);
    let host = bed.host(&pattern(1, BYTES as usize));
    let options = RequestOptions {
        deadline,
        ..RequestOptions::default()
    };
    let pair = (host.descriptor(0, BYTES), device.descriptor(0, BYTES));
    let request = bed.request(Write, &[pair], options).unwrap();
    request.post().unwrap();
    Stalled {
        bed,
        device,
        address,
        host,
        request,
    }
}

impl Stalled {
    /// It has failed, and the device may still copy: nothing is free, and nothing more is queued. Then the device goes on.
    fn drains(self, kind: ErrorKind) {
        let failed = self.request.wait(PATIENCE).unwrap_err();
        assert_eq!((failed.kind(), failed.fate()), (kind, MemoryFate::InFlight));
        // Twice, so that the thread has taken up what it was told in between.
        let asked = self.bed.fake.count("cuEventQuery");
        until(|| self.bed.fake.count("cuEventQuery") >= asked + 2);
        let queued = self.bed.fake.count("cuEventRecord");
        let regions = [&self.host, &self.device].map(Region::deregister);
        for region in &regions {
            assert_eq!(
                region.wait(Duration::ZERO).unwrap_err().kind(),
                ErrorKind::Busy
            );
        }
        assert!(!self.request.wait_drained(Duration::ZERO));
        assert_eq!(self.bed.fake.pinned(), 1, "the device still reads it");
        self.bed.fake.set_running(true);
        assert!(self.request.wait_drained(PATIENCE));
        for region in &regions {
            region.wait(PATIENCE).unwrap();
        }
        assert_eq!(self.bed.fake.pinned(), 0);
        assert_eq!(self.bed.fake.queued(), 0);
        assert_eq!(
            self.bed.fake.count("cuEventRecord"),
            queued,
            "more was queued"
        );
        drop(regions);
        self.bed.fake.engine_frees(self.address);
        let Self {
            bed,
            device,
            host,
            request,
            ..
        } = self;
        drop((device, host, request));
        bed.end();
    }
}

#[test]
fn a_cancelled_request_is_settled_when_the_device_has_done_what_it_was_given() {
    let stalled = stalled(None);
    until(|| stalled.bed.fake.queued() == 8);
    stalled.request.cancel();
    stalled.drains(ErrorKind::Cancelled);
}

#[test]
fn a_request_past_its_deadline_is_settled_when_the_device_has_done_what_it_was_given() {
    let stalled = stalled(Some(Duration::from_millis(200)));
    until(|| stalled.bed.fake.queued() == 8);
    stalled.drains(ErrorKind::Timeout);
}

/// Handles and agent are gone while the device copies: what it copies stays until it is done.
#[test]
fn memory_outlives_its_owners_while_the_device_copies() {
    let stalled = stalled(None);
    let Stalled {
        bed,
        device,
        address,
        host,
        request,
    } = stalled;
    until(|| bed.fake.queued() == 8);
    drop((device, host, request));
    let fake = bed.fake.clone();
    let ended = std::thread::spawn(move || drop(bed));
    assert_eq!(fake.pinned(), 1);
    fake.set_running(true);
    ended.join().unwrap();
    until(|| fake.pinned() == 0);
    fake.engine_frees(address);
    until(|| fake.is_empty());
    fake.check_empty();
}

/// Of those that wait behind it.
#[test]
fn a_request_that_waits_for_its_turn_is_settled_at_once_when_it_is_given_up() {
    let stalled = stalled(None);
    let (bed, host) = (&stalled.bed, &stalled.host);
    until(|| bed.fake.queued() == 8);
    let (other, _) = bed.device(4096);
    let waiting = bed.posted(
        Write,
        &[(host.descriptor(0, 4096), other.descriptor(0, 4096))],
    );
    waiting.cancel();
    assert!(waiting.wait_drained(PATIENCE));
    other.deregister().wait(PATIENCE).unwrap();
    assert_eq!(bed.fake.queued(), 8);
    stalled.request.cancel();
    bed.fake.set_running(true);
    assert!(stalled.request.wait_drained(PATIENCE));
}

/// The driver takes none of it, or only a part: what it took is waited for.
#[test]
fn copies_that_the_driver_refuses_fail_the_request_when_the_others_are_done() {
    for (version, call) in [(12_080, "cuMemcpyBatchAsync"), (12_040, "cuMemcpyAsync")] {
        let fake = Fake::new(1);
        fake.set_version(version);
        let bed = Bed::over(fake, CudaOptions::default());
        bed.fake.set_running(false);
        let (device, address) = bed.device(8192);
        let host = bed.host(&pattern(2, 8192));
        let pair = |n: u64| {
            (
                host.descriptor(n * 1000, 1000),
                device.descriptor(n * 1004, 1000),
            )
        };
        let pairs: Vec<_> = (0..8).map(pair).collect();
        bed.fake
            .fail(call, if version == 12_080 { 0 } else { 3 }, OUT_OF_MEMORY);
        let request = bed.posted(Write, &pairs);
        until(|| bed.fake.count("cuEventRecord") == 1);
        assert!(
            matches!(request.poll(), crate::Status::InFlight),
            "its event is not over"
        );
        bed.fake.set_running(true);
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!(
            (failed.kind(), failed.fate()),
            (ErrorKind::Busy, MemoryFate::Settled)
        );
        assert!(
            failed.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"),
            "{failed}"
        );
        // The next post does it.
        bed.moved(Write, &pairs);
        assert!(bed.fake.read(address + 7 * 1004, 1000) == pattern(2, 8192)[7000..8000]);
        bed.fake.check();
    }
}

/// Nothing was queued: the request has failed, its memory is free, and others go on.
#[test]
fn a_batch_that_cannot_even_be_begun_fails_its_request_alone() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let host = bed.host(&[3; 4096]);
    let pair = [(host.descriptor(0, 4096), device.descriptor(0, 4096))];
    bed.fake.fail("cuEventCreate", 0, OUT_OF_MEMORY);
    let failed = bed.posted(Write, &pair).wait(PATIENCE).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::Busy, MemoryFate::Settled)
    );
    assert_eq!(bed.fake.count("cuMemcpyAsync"), 0);
    bed.moved(Write, &pair);
}

/// Nothing tells any more when the device lets go of the memory: it is never called free, and nothing is begun any more. What was
/// not begun is free.
#[test]
fn a_device_that_breaks_keeps_what_it_was_given_and_takes_nothing_more() {
    for call in ["cuEventQuery", "cuEventRecord"] {
        let bed = Bed::new();
        bed.fake.set_running(false);
        let (device, _) = bed.device(8192);
        let (host, other) = (bed.host(&[4; 8192]), bed.host(&[5; 4096]));
        let pair = [(host.descriptor(0, 4096), device.descriptor(0, 4096))];
        bed.fake.fail(call, 0, ILLEGAL_ADDRESS);
        let broken = bed.posted(Write, &pair);
        let failed = broken.wait(PATIENCE).unwrap_err();
        assert_eq!(
            (failed.kind(), failed.fate()),
            (ErrorKind::Poisoned, MemoryFate::InFlight)
        );
        assert!(
            failed.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"),
            "{failed}"
        );
        bed.fake.set_running(true);
        let pair = [(other.descriptor(0, 4096), device.descriptor(4096, 4096))];
        let refused = bed
            .request(Write, &pair, RequestOptions::default())
            .unwrap();
        let error = refused.post().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Poisoned, "{error}");
        assert!(error.to_string().contains("new process"), "{error}");
        assert!(!broken.wait_drained(Duration::from_millis(50)));
        let kept = host.deregister();
        assert_eq!(
            kept.wait(Duration::ZERO).unwrap_err().kind(),
            ErrorKind::Busy
        );
        other.deregister().wait(PATIENCE).unwrap();
        assert_eq!(bed.fake.pinned(), 1, "what it was given stays pinned");
        bed.fake.check();
    }
}

/// What was read into a buffer after the caller gave up goes nowhere.
#[test]
fn a_staged_read_that_was_given_up_writes_nothing_late() {
    let bed = Bed::with(CudaOptions {
        pin: false,
        ..CudaOptions::default()
    });
    bed.fake.set_running(false);
    let (device, address) = bed.device(4096);
    bed.fake.write(address, &pattern(6, 4096));
    let host = bed.host(&[0; 4096]);
    let request = bed.posted(
        Read,
        &[(host.descriptor(0, 4096), device.descriptor(0, 4096))],
    );
    until(|| bed.fake.queued() == 2);
    request.cancel();
    bed.fake.set_running(true);
    assert!(request.wait_drained(PATIENCE));
    assert!(content(&host) == [0; 4096]);
    bed.moved(
        Read,
        &[(host.descriptor(0, 4096), device.descriptor(0, 4096))],
    );
    assert!(content(&host) == pattern(6, 4096));
}
