//! Objects: written whole, in one request or in parts, and read in ranges.

use super::*;

impl Bed {
    fn stored(&self, key: &str) -> Vec<u8> {
        std::fs::read(self.path("store").join(key)).unwrap()
    }
}

/// More than a part of an upload, and more than the window; ranges that follow each other in the object and nowhere else.
#[test]
fn an_object_is_written_whole_and_read_in_ranges() {
    const BYTES: usize = (13 << 20) + 55;
    let bed = Bed::with(FileEngineMode::Auto, Bed::small());
    let (device, address) = bed.device(0, &pattern(1, BYTES));
    for len in [1_000_003_u64, BYTES as u64] {
        let object = bed.agent.object("store", "block").unwrap();
        let starts = (0..BYTES as u64).step_by(len as usize);
        let ranges: Vec<_> = starts.map(|at| (at, len.min(BYTES as u64 - at))).collect();
        let mut expected = Vec::new();
        let mut end = 0;
        // The last one goes first.
        let mut pairs = Pairs::new();
        for &(at, len) in ranges.iter().rev() {
            pairs.push((device.descriptor(at, len), object.descriptor(end, len)));
            expected.extend_from_slice(&pattern(1, BYTES)[at as usize..(at + len) as usize]);
            end += len;
        }
        bed.moved(Write, &pairs);
        assert!(bed.stored("block") == expected, "{len}");
        let (back, found) = bed.device(1, &vec![0; BYTES]);
        let pairs: Pairs = pairs
            .iter()
            .map(|(local, remote)| (back.descriptor(local.offset, local.len), *remote))
            .collect();
        bed.moved(Read, &pairs);
        assert!(
            bed.fake.read(found, BYTES as u64) == pattern(1, BYTES),
            "{len}"
        );
        // A part of it, from a place in the middle to one that is not the same.
        bed.moved(
            Read,
            &[(
                back.descriptor(5, 2 << 20),
                object.descriptor(1001, 2 << 20),
            )],
        );
        assert!(bed.fake.read(found + 5, 2 << 20) == expected[1001..1001 + (2 << 20)]);
        bed.fake.engine_frees(found);
    }
    assert_eq!((bed.free(0), bed.free(1)), (2, 2));
    bed.fake.engine_frees(address);
    drop(device);
    bed.end();
}

#[test]
fn objects_that_are_not_there_or_too_short_are_named() {
    let bed = Bed::new();
    let (device, address) = bed.device(0, &pattern(2, 8192));
    let object = bed.agent.object("store", "absent").unwrap();
    let pair = [(device.descriptor(0, 4096), object.descriptor(0, 4096))];
    let failed = bed.posted(Read, &pair).wait(PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::NotFound, "{failed}");
    assert!(failed.to_string().starts_with("staged: "), "{failed}");
    assert!(failed.to_string().contains("absent"), "{failed}");
    bed.moved(Write, &pair);
    let pair = [(device.descriptor(0, 8192), object.descriptor(0, 8192))];
    let failed = bed.posted(Read, &pair).wait(PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Corrupt, "{failed}");
    assert!(failed.to_string().contains("absent"), "{failed}");
    // A write with a gap is none.
    let pair = [(device.descriptor(0, 4096), object.descriptor(1, 4096))];
    let failed = bed.posted(Write, &pair).wait(PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Invalid, "{failed}");
    assert!(bed.stored("absent") == pattern(2, 4096));
    assert!(bed.fake.read(address, 8192) == pattern(2, 8192));
}

/// Given up while the device does nothing: what was begun ends first, and the object is not there.
#[test]
fn an_object_that_is_given_up_does_not_appear() {
    let bed = Bed::new();
    bed.fake.set_running(false);
    let (device, _) = bed.device(0, &pattern(3, 4096));
    let object = bed.agent.object("store", "given-up").unwrap();
    let request = bed.posted(Write, &[(whole(&device), object.descriptor(0, 4096))]);
    until(|| bed.fake.queued() == 2);
    request.cancel();
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Cancelled);
    assert!(
        !request.wait_drained(Duration::from_millis(50)),
        "the device has its memory"
    );
    bed.fake.set_running(true);
    assert!(request.wait_drained(PATIENCE));
    assert!(!bed.path("store").join("given-up").exists());
    until(|| bed.free(0) == 16);
}
