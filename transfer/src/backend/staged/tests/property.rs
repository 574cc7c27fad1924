//! Random ranges against the obvious model: vectors that are copied piece by piece.

use proptest::prelude::*;

use super::peers::{EXPORTED, End};
use super::*;

const BYTES: u64 = 5 << 20;

/// Ranges of the target that do not overlap, each with a place in the source, in random order. Some are pages at places of
/// pages, as caches have them; most are not.
fn ranges() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
    let length = prop_oneof![
        1..300_u64,
        1..9000_u64,
        Just(4096),
        Just(65_536),
        900_000..1_200_000_u64
    ];
    let piece = (
        length,
        prop_oneof![Just(0), 1..5000_u64],
        any::<u64>(),
        any::<bool>(),
    );
    (proptest::collection::vec(piece, 1..50), any::<bool>()).prop_perturb(
        |(pieces, shuffled), mut random| {
            let mut ranges = Vec::new();
            let mut at = 0;
            for (len, gap, place, follows) in pieces {
                if at + len > BYTES {
                    break;
                }
                let source = match (follows, ranges.last()) {
                    (true, Some((last, _, before))) if last + before + len <= BYTES => {
                        last + before
                    }
                    _ => place % (BYTES - len + 1),
                };
                ranges.push((source, at, len));
                at += len + gap;
            }
            if shuffled {
                for position in (1..ranges.len()).rev() {
                    ranges.swap(position, random.random_range(0..=position));
                }
            }
            ranges
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Exactly the bytes that the model copies change, both ways.
    #[test]
    fn any_list_of_ranges_is_copied_as_the_model_does(
        ranges in ranges(),
        seed in any::<u8>(),
        blocking in any::<bool>(),
        background in any::<bool>(),
    ) {
        let mode = match blocking {
            true => FileEngineMode::Blocking,
            false => FileEngineMode::Auto,
        };
        let bed = Bed::with(mode, Bed::small());
        let (source, target) = (pattern(seed, BYTES as usize), pattern(!seed, BYTES as usize));
        let mut model = target.clone();
        for &(from, to, len) in &ranges {
            model[to as usize..(to + len) as usize].copy_from_slice(&source[from as usize..(from + len) as usize]);
        }
        let options = || RequestOptions {
            priority: if background { Priority::Background } else { Priority::Normal },
            ..RequestOptions::default()
        };
        // From the device into the file.
        let (device, _) = bed.device(0, &source);
        let file = bed.file("written", &target);
        let pairs: Pairs = ranges.iter().map(|&(from, to, len)| (device.descriptor(from, len), file.descriptor(to, len))).collect();
        let request = bed.request(Write, &pairs, options()).unwrap();
        request.post().unwrap();
        request.wait(PATIENCE).unwrap();
        prop_assert!(std::fs::read(bed.path("written")).unwrap() == model, "written");
        // From a file into the device.
        let (device, address) = bed.device(0, &target);
        let file = bed.file("read", &source);
        let pairs: Pairs = ranges.iter().map(|&(from, to, len)| (device.descriptor(to, len), file.descriptor(from, len))).collect();
        let request = bed.request(Read, &pairs, options()).unwrap();
        request.post().unwrap();
        request.wait(PATIENCE).unwrap();
        prop_assert!(bed.fake.read(address, BYTES) == model, "read");
        prop_assert_eq!(bed.free(0), 2);
        bed.fake.check();
    }

    /// The same between devices of two agents, and to a peer's host memory.
    #[test]
    fn any_list_of_ranges_goes_to_a_peer_as_the_model_does(
        ranges in ranges(),
        seed in any::<u8>(),
        to_device in any::<bool>(),
        reads in any::<bool>(),
    ) {
        let way = if to_device { "tcp" } else { "shm" };
        let (owner, user) = (End::new("owner", way), End::new("user", way));
        let (source, target) = (pattern(seed, BYTES as usize), pattern(!seed, BYTES as usize));
        let mut model = target.clone();
        for &(from, to, len) in &ranges {
            model[to as usize..(to + len) as usize].copy_from_slice(&source[from as usize..(from + len) as usize]);
        }
        let (here, there) = if reads { (&target, &source) } else { (&source, &target) };
        let (near, address) = user.device(0, here, EXPORTED);
        let (far, far_address) = match to_device {
            true => owner.device(1, there, EXPORTED),
            false => (owner.host(there), 0),
        };
        let peer = user.knows(&owner);
        let pairs: Pairs = ranges
            .iter()
            .map(|&(from, to, len)| match reads {
                true => (near.descriptor(to, len), far.descriptor(from, len)),
                false => (near.descriptor(from, len), far.descriptor(to, len)),
            })
            .collect();
        let operation = if reads { Read } else { Write };
        prop_assert_eq!(user.moved(operation, &peer, &pairs), "staged");
        let found = match (reads, to_device) {
            (true, _) => user.fake.read(address, BYTES),
            (false, true) => owner.fake.read(far_address, BYTES),
            (false, false) => {
                let mut bytes = vec![0; BYTES as usize];
                far.read_at(0, &mut bytes).unwrap();
                bytes
            }
        };
        prop_assert!(found == model, "{} {}", reads, to_device);
        user.fake.check();
        owner.fake.check();
    }
}
