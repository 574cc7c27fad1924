//! Requests before and after what an engine computes on a stream of its own. Its kernels write bytes when their turn comes, so that what
//! is copied too early, or computed too early, shows in the bytes.

use super::*;
use crate::outcome::{MemoryFate, Status};
use crate::sys::cuda::fake::{CAPTURE_IMPLICIT, ILLEGAL_ADDRESS, OUT_OF_MEMORY};
use crate::sys::cuda::{CudaPoint, CudaStream};

const LAYERS: usize = 6;
const LAYER: u64 = 8192;

impl Bed {
    fn stream(&self, ordinal: u32) -> (CudaStream, u64) {
        let raw = self.fake.engine_stream(ordinal as i32);
        (self.of(ordinal, raw).unwrap(), raw)
    }

    fn of(&self, ordinal: u32, raw: u64) -> kvcache_core::Result<CudaStream> {
        Fake::stream_of(&self.cuda.gpu(ordinal).unwrap(), raw)
    }

    fn request_of(&self, operation: Operation, one: (&Region, &Region)) -> Request {
        let bytes = one.0.bytes();
        let pair = (one.0.descriptor(0, bytes), one.1.descriptor(0, bytes));
        self.request(operation, &[pair], RequestOptions::default())
            .unwrap()
    }
}

/// All layers of a device's memory and a host's, a part each.
fn layers(bed: &Bed, operation: Operation, host: &Region, device: &Region) -> Request {
    let at = |layer: usize| layer as u64 * LAYER;
    let of = |region: &Region, layer| region.descriptor(at(layer), LAYER);
    let pair = |layer| (of(host, layer), of(device, layer));
    let pairs: Vec<_> = (0..LAYERS).map(pair).collect();
    let options = RequestOptions {
        parts: vec![1; LAYERS],
        ..RequestOptions::default()
    };
    bed.request(operation, &pairs, options).unwrap()
}

/// Pinned and through buffers: what is read is what the engine's stream has computed, although it computes late.
#[test]
fn a_request_begins_after_what_the_stream_was_given() {
    for pin in [true, false] {
        let bed = Bed::with(CudaOptions {
            pin,
            ..CudaOptions::default()
        });
        let (device, address) = bed.device(4096);
        let host = bed.host(&[0; 4096]);
        let (stream, raw) = bed.stream(0);
        let hold = bed.fake.engine_holds(raw);
        bed.fake.engine_writes(raw, address, &pattern(1, 4096));
        let point = stream.point().unwrap();
        // What the stream is given later is not waited for.
        let later = bed.fake.engine_holds(raw);
        let request = bed.request_of(Write, (&device, &host));
        request.post_after(&point).unwrap();
        assert!(!request.wait_drained(Duration::from_millis(20)));
        assert!(!point.is_over().unwrap());
        assert!(matches!(request.poll(), Status::InFlight));
        // Others do not wait with it, in the same direction either.
        let (other, _) = bed.device(4096);
        let aside = bed.host(&[7; 4096]);
        bed.moved(
            Write,
            &[(other.descriptor(0, 4096), aside.descriptor(0, 4096))],
        );
        bed.fake.engine_goes_on(hold);
        assert_eq!(request.wait(PATIENCE).unwrap().backend, "cuda");
        assert!(content(&host) == pattern(1, 4096), "pin: {pin}");
        // The next post waits for nobody.
        bed.fake.write(address, &pattern(2, 4096));
        request.post().unwrap();
        request.wait(PATIENCE).unwrap();
        assert!(content(&host) == pattern(2, 4096));
        bed.fake.engine_goes_on(later);
        bed.fake.check();
    }
}

/// What comes from host memory through buffers is read there after the point, too: the stream may have written it.
#[test]
fn buffers_are_filled_after_the_point() {
    let bed = Bed::with(CudaOptions {
        pin: false,
        ..CudaOptions::default()
    });
    let (device, address) = bed.device(4096);
    let host = bed.host(&[0; 4096]);
    let (stream, raw) = bed.stream(0);
    let hold = bed.fake.engine_holds(raw);
    let request = bed.request_of(Write, (&host, &device));
    request.post_after(&stream.point().unwrap()).unwrap();
    assert!(!request.wait_drained(Duration::from_millis(20)));
    host.write_at(0, &pattern(3, 4096)).unwrap();
    bed.fake.engine_goes_on(hold);
    request.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address, 4096) == pattern(3, 4096));
    bed.fake.check();
}

/// Layer by layer: the stream uses each layer after its copies, which it waits for by itself; the host only sees them queued.
#[test]
fn a_stream_goes_on_when_a_part_is_copied() {
    let bed = Bed::new();
    let bytes = LAYERS as u64 * LAYER;
    let (device, address) = bed.device(bytes);
    let host = bed.host(&pattern(4, bytes as usize));
    let back = bed.host(&vec![0; bytes as usize]);
    let (stream, raw) = bed.stream(0);
    bed.fake.set_running(false);
    let request = layers(&bed, Write, &host, &device);
    // Ordered requests have more in flight: all layers at once.
    request.post_after(&stream.point().unwrap()).unwrap();
    for layer in 0..LAYERS {
        request
            .order_stream(&stream, Some(layer), PATIENCE)
            .unwrap();
        // A layer's kernel changes what was loaded.
        let at = layer as u64 * LAYER;
        bed.fake
            .engine_writes(raw, address + at, &[layer as u8; 16]);
    }
    assert!(matches!(request.poll(), Status::InFlight));
    assert!(bed.fake.read(address, 16) == [0xcd; 16]);
    let save = layers(&bed, Read, &back, &device);
    save.post_after(&stream.point().unwrap()).unwrap();
    bed.fake.set_running(true);
    save.wait(PATIENCE).unwrap();
    request.wait(PATIENCE).unwrap();
    let mut expected = pattern(4, bytes as usize);
    for layer in 0..LAYERS {
        expected[layer * LAYER as usize..][..16].fill(layer as u8);
    }
    assert!(content(&back) == expected);
    assert_eq!(bed.fake.engine_queued(raw), 0);
    // Done already: nothing to wait for, whichever post.
    let waits = bed.fake.count("cuStreamWaitEvent");
    request.order_stream(&stream, None, PATIENCE).unwrap();
    assert_eq!(bed.fake.count("cuStreamWaitEvent"), waits);
    bed.fake.check();
}

/// Whoever is told that the copies will not all be made has a stream that waits for nothing.
#[test]
fn a_stream_waits_for_nothing_of_a_request_that_fails_before() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let host = bed.host(&[1; 4096]);
    let (stream, raw) = bed.stream(0);
    let request = bed.request_of(Write, (&host, &device));
    let never = request.order_stream(&stream, None, PATIENCE).unwrap_err();
    assert_eq!(never.kind(), ErrorKind::Invalid);
    // The driver takes none of its copies.
    bed.fake.fail("cuMemcpyAsync", 0, OUT_OF_MEMORY);
    request.post().unwrap();
    let failed = request.order_stream(&stream, None, PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Busy, "{failed}");
    assert!(request.wait_drained(PATIENCE));
    let none = request
        .order_stream(&stream, Some(1), PATIENCE)
        .unwrap_err();
    assert_eq!(none.kind(), ErrorKind::Invalid);
    assert!(none.to_string().contains("part"), "{none}");
    // The driver does not let its stream wait for the engine's.
    let point = stream.point().unwrap();
    bed.fake.fail("cuStreamWaitEvent", 0, OUT_OF_MEMORY);
    let copies = bed.fake.count("cuMemcpyAsync");
    request.post_after(&point).unwrap();
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::Busy, MemoryFate::Settled)
    );
    assert!(
        failed.to_string().contains("wait for another stream"),
        "{failed}"
    );
    assert_eq!(bed.fake.count("cuMemcpyAsync"), copies);
    assert_eq!(bed.fake.engine_queued(raw), 1, "the point alone");
    bed.fake.check();
}

/// Cancelled or late when the stream waits already: the copies are made all the same, and the stream goes on. The memory is in flight
/// until then. What waits behind the point and was not queued is settled at once.
#[test]
fn a_stream_that_waits_goes_on_whatever_becomes_of_the_request() {
    for is_late in [false, true] {
        let bed = Bed::new();
        let (device, address) = bed.device(4096);
        let host = bed.host(&pattern(5, 4096));
        let ((engine, raw), (first, before)) = (bed.stream(0), bed.stream(0));
        let hold = bed.fake.engine_holds(before);
        let options = RequestOptions {
            deadline: is_late.then_some(Duration::from_millis(100)),
            ..RequestOptions::default()
        };
        let pair = (host.descriptor(0, 4096), device.descriptor(0, 4096));
        let request = bed.request(Write, &[pair], options).unwrap();
        request.post_after(&first.point().unwrap()).unwrap();
        request.order_stream(&engine, None, PATIENCE).unwrap();
        if !is_late {
            request.cancel();
        }
        let kind = if is_late {
            ErrorKind::Timeout
        } else {
            ErrorKind::Cancelled
        };
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!((failed.kind(), failed.fate()), (kind, MemoryFate::InFlight));
        assert!(!request.wait_drained(Duration::from_millis(20)));
        assert_eq!(bed.fake.engine_queued(raw), 1);
        // Now it is too late to be told more.
        let refused = request.order_stream(&engine, None, PATIENCE).unwrap_err();
        assert_eq!(refused.kind(), kind);
        bed.fake.engine_goes_on(hold);
        assert!(request.wait_drained(PATIENCE));
        let behind = engine.point().unwrap();
        until(|| behind.is_over().unwrap());
        assert!(bed.fake.read(address, 4096) == pattern(5, 4096));
        bed.fake.check();
    }
}

/// Through buffers nothing is queued before the point: a request that is given up meanwhile is settled.
#[test]
fn what_the_thread_holds_back_is_given_up_at_once() {
    let bed = Bed::with(CudaOptions {
        pin: false,
        ..CudaOptions::default()
    });
    let (device, address) = bed.device(4096);
    let host = bed.host(&[1; 4096]);
    let (stream, raw) = bed.stream(0);
    let hold = bed.fake.engine_holds(raw);
    let request = bed.request_of(Write, (&host, &device));
    request.post_after(&stream.point().unwrap()).unwrap();
    let waited = request.order_stream(&stream, None, Duration::from_millis(20));
    assert_eq!(waited.unwrap_err().kind(), ErrorKind::Timeout);
    request.cancel();
    assert!(request.wait_drained(PATIENCE));
    bed.fake.engine_goes_on(hold);
    let behind = stream.point().unwrap();
    until(|| behind.is_over().unwrap());
    assert!(bed.fake.read(address, 4096) == [0xcd; 4096]);
    bed.fake.check();
}

/// An engine's event, which it records again before anybody looks at it.
#[test]
fn an_event_counts_as_it_was_when_it_was_named() {
    let bed = Bed::new();
    let (device, address) = bed.device(4096);
    let host = bed.host(&[0; 4096]);
    let (_stream, raw) = bed.stream(0);
    let hold = bed.fake.engine_holds(raw);
    bed.fake.engine_writes(raw, address, &pattern(6, 4096));
    let event = bed.fake.engine_event(raw);
    let gpu = bed.cuda.gpu(0).unwrap();
    let point = Fake::point_of(&gpu, event).unwrap();
    let never = bed.fake.engine_holds(raw);
    bed.fake.engine_records(event, raw);
    let request = bed.request_of(Write, (&device, &host));
    request.post_after(&point).unwrap();
    assert!(!request.wait_drained(Duration::from_millis(20)));
    bed.fake.engine_goes_on(hold);
    request.wait(PATIENCE).unwrap();
    assert!(content(&host) == pattern(6, 4096));
    bed.fake.engine_goes_on(never);
    bed.fake.check();
    let none = Fake::point_of(&gpu, 0).unwrap_err();
    assert!(none.to_string().contains("event"), "{none}");
}

/// No transfer gets into anybody's graph, and none is waited for by one.
#[test]
fn what_is_captured_is_refused_by_name() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let host = bed.host(&[0; 4096]);
    let (stream, raw) = bed.stream(0);
    let request = bed.request_of(Write, (&host, &device));
    request.post().unwrap();
    bed.fake.engine_captures(raw, true);
    let named = format!("stream {raw:#x} of cuda device 0 is being captured");
    let refused = stream.point().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains(&named), "{refused}");
    let refused = request.order_stream(&stream, None, PATIENCE).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains(&named), "{refused}");
    bed.fake.engine_captures(raw, false);
    stream.point().unwrap();
    bed.fake.fail("cuStreamIsCapturing", 0, CAPTURE_IMPLICIT);
    let refused = bed.of(0, 0).unwrap().point().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(
        refused
            .to_string()
            .contains("waits for a stream that is being captured"),
        "{refused}"
    );
    let event = bed.fake.engine_event(raw);
    bed.fake.engine_captures_event(event);
    let refused = Fake::point_of(&bed.cuda.gpu(0).unwrap(), event).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(
        refused.to_string().contains("recorded into a graph"),
        "{refused}"
    );
    bed.fake.check();
}

#[test]
fn streams_of_other_devices_and_contexts_are_refused_by_name() {
    let bed = Bed::new();
    let other = bed.fake.engine_stream(1);
    let refused = bed.of(0, other).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    let named = format!("stream {other:#x} of cuda device 0: it belongs to device 1, not to 0");
    assert!(refused.to_string().contains(&named), "{refused}");
    let elsewhere = bed.fake.engine_stream_elsewhere(0);
    let refused = bed.of(0, elsewhere).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(
        refused.to_string().contains("than the primary one"),
        "{refused}"
    );
    bed.fake.check();
}

/// The default streams, by all their names; and a stream of the other device, as its own.
#[test]
fn default_streams_and_those_of_other_devices_are_waited_for() {
    let bed = Bed::new();
    let (device, address) = bed.device(4096);
    let host = bed.host(&[0; 4096]);
    let other = bed.stream(1);
    let mut streams: Vec<_> = (0..3).map(|raw| (bed.of(0, raw).unwrap(), raw)).collect();
    streams.push(other);
    for (seed, (stream, raw)) in streams.into_iter().enumerate() {
        // Default streams come into being with their first work.
        stream.point().unwrap();
        let hold = bed.fake.engine_holds(raw);
        bed.fake
            .engine_writes(raw, address, &pattern(seed as u8, 4096));
        let request = bed.request_of(Write, (&device, &host));
        request.post_after(&stream.point().unwrap()).unwrap();
        request.order_stream(&stream, None, PATIENCE).unwrap();
        assert!(!request.wait_drained(Duration::from_millis(10)));
        bed.fake.engine_goes_on(hold);
        request.wait(PATIENCE).unwrap();
        assert!(content(&host) == pattern(seed as u8, 4096), "{raw}");
    }
    bed.fake.check();
}

#[test]
fn requests_without_a_gpu_have_no_streams() {
    let bed = Bed::new();
    let (stream, _) = bed.stream(0);
    let (one, other) = (bed.host(&[1; 4096]), bed.host(&[2; 4096]));
    let request = bed.request_of(Write, (&one, &other));
    let point = stream.point().unwrap();
    let refused = [
        request.post_after(&point).unwrap_err(),
        request
            .order_stream(&stream, None, PATIENCE)
            .unwrap_err()
            .into(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("not for memcpy"), "{error}");
    }
}

/// A context that breaks while a request waits for the engine: it is never called free.
#[test]
fn a_device_that_breaks_before_the_point_keeps_the_memory() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let host = bed.host(&[1; 4096]);
    let (stream, raw) = bed.stream(0);
    bed.fake.engine_holds(raw);
    let request = bed.request_of(Write, (&host, &device));
    let point = stream.point().unwrap();
    request.post_after(&point).unwrap();
    request.order_stream(&stream, None, PATIENCE).unwrap();
    bed.fake.fail("cuEventQuery", 0, ILLEGAL_ADDRESS);
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(
        (failed.kind(), failed.fate()),
        (ErrorKind::Poisoned, MemoryFate::InFlight)
    );
    assert!(!request.wait_drained(Duration::from_millis(20)));
    bed.fake.check();
}

/// Every event and stream is given back.
#[test]
fn nothing_is_left_of_points() {
    let bed = Bed::new();
    let (device, address) = bed.device(LAYERS as u64 * LAYER);
    let host = bed.host(&vec![1; (LAYERS as u64 * LAYER) as usize]);
    let (stream, raw) = bed.stream(0);
    let event = bed.fake.engine_event(raw);
    let points: [CudaPoint; 2] = [
        stream.point().unwrap(),
        Fake::point_of(&bed.cuda.gpu(0).unwrap(), event).unwrap(),
    ];
    let request = layers(&bed, Write, &host, &device);
    for point in &points {
        request.post_after(point).unwrap();
        request.order_stream(&stream, None, PATIENCE).unwrap();
        request.wait(PATIENCE).unwrap();
        assert!(request.wait_drained(PATIENCE));
    }
    let behind = stream.point().unwrap();
    until(|| behind.is_over().unwrap());
    drop(behind);
    // Never come to.
    bed.fake.engine_holds(raw);
    drop(stream.point().unwrap());
    drop((points, stream, request));
    bed.fake.engine_drops_event(event);
    bed.fake.engine_frees(address);
    drop((device, host));
    bed.end();
}
