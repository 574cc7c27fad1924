//! Checksums of what arrives: asked for, they pass where bytes are whole and name what differs.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::backend::sim::{Chance, ExchangeConfig, LinkProfile, SimNetwork};
use kvfabric_transfer::{
    Agent, FileOptions, HostMemory, MemoryFate, Operation, RegionOptions, RequestOptions, Side,
};

use support::{OPEN, Pair, WAIT, WAYS, Way, contents, pattern};

const BYTES: u64 = 6 << 20;

fn checked() -> RequestOptions {
    RequestOptions {
        checksum: true,
        ..RequestOptions::default()
    }
}

/// Neighbours and others, shorter and longer than what has one checksum.
const PIECES: [(u64, u64, u64); 5] = [
    (0, 7, 1),
    (1, 8, 4096),
    (8192, 16_384, 1 << 20),
    (2 << 20, 3 << 20, (1 << 20) + 1),
    (4 << 20, 5 << 20, 77),
];

/// Both directions, with parts and a notification, which comes once all is compared.
#[test]
fn what_arrives_whole_passes() {
    let small = PIECES.map(|(local, remote, len)| (local, remote, len.min(4096)));
    for (way, pieces) in WAYS
        .into_iter()
        .flat_map(|way| [(way, PIECES), (way, small)])
    {
        let pair = Pair::new(way, BYTES);
        for operation in [Operation::Read, Operation::Write] {
            let (from, to) = match operation {
                Operation::Read => (&pair.remote, &pair.local),
                Operation::Write => (&pair.local, &pair.remote),
            };
            let bytes = pattern(BYTES as usize, 5);
            from.write_at(0, &bytes).unwrap();
            to.fill_at(0, BYTES, 0).unwrap();
            let options = RequestOptions {
                notification: Some(Bytes::from_static(b"compared")),
                parts: vec![2, 1, 2],
                ..checked()
            };
            let request = pair.moves(operation, &pieces, options);
            for part in 0..3 {
                request.wait_part(part, WAIT).unwrap();
            }
            let done = request.wait(WAIT).unwrap();
            assert_eq!((done.backend, done.failovers), (way.name(), 0));
            let told = pair.target.wait_notifications(WAIT);
            assert_eq!(told[0].bytes, b"compared"[..], "{way:?}");
            let found = contents(to);
            for (local, remote, len) in pieces {
                let (at, origin) = match operation {
                    Operation::Read => (local, remote),
                    Operation::Write => (remote, local),
                };
                let range = |at: u64| at as usize..(at + len) as usize;
                assert!(
                    found[range(at)] == bytes[range(origin)],
                    "{way:?} {operation:?}"
                );
            }
        }
    }
}

/// Two descriptors are for the same place and bring different bytes, so one of them does not find its own there.
#[test]
fn a_difference_names_its_descriptor() {
    for way in WAYS {
        let pair = Pair::new(way, BYTES);
        for operation in [Operation::Read, Operation::Write] {
            let from = match operation {
                Operation::Read => &pair.remote,
                Operation::Write => &pair.local,
            };
            from.write_at(0, &pattern(BYTES as usize, 9)).unwrap();
            let len = 300_000;
            let places = [(0, 0), (1 << 20, 1 << 20), (2 << 20, 1 << 20)];
            let pieces = places.map(|(source, place)| match operation {
                Operation::Read => (place, source, len),
                Operation::Write => (source, place, len),
            });
            let options = RequestOptions {
                notification: Some(Bytes::from_static(b"never")),
                ..checked()
            };
            let request = pair.moves(operation, &pieces, options);
            let failed = request.wait(WAIT).unwrap_err();
            assert_eq!(failed.kind(), ErrorKind::Corrupt, "{way:?}");
            assert_eq!(failed.fate(), MemoryFate::Settled, "{way:?}");
            let text = failed.to_string();
            assert!(
                text.contains("descriptor 1: ") || text.contains("descriptor 2: "),
                "{way:?}: {text}"
            );
            assert!(pair.target.notifications().is_empty(), "{way:?}");
            // Without checksums nobody notices.
            let request = pair.moves(operation, &pieces, RequestOptions::default());
            request.wait(WAIT).unwrap();
        }
    }
}

/// The one descriptor is overwritten behind its first MiB, which has a checksum of its own.
#[test]
fn a_difference_far_into_a_descriptor_is_found() {
    for way in WAYS {
        let pair = Pair::new(way, BYTES);
        let bytes = pattern(BYTES as usize, 11);
        pair.remote.write_at(0, &bytes).unwrap();
        let behind = (3 << 20) - 64;
        let pieces = [(0, 0, 3 << 20), (behind, 4 << 20, 64)];
        let request = pair.moves(Operation::Read, &pieces, checked());
        let failed = request.wait(WAIT).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Corrupt, "{way:?}");
        let text = failed.to_string();
        // Which one was overwritten is the way's own affair, and usually the first.
        let first = text.contains("descriptor 0: ") && text.contains("at 2097152+1048576");
        assert!(first || text.contains("descriptor 1: "), "{way:?}: {text}");
    }
}

/// A network that inverts bits: what was damaged is named, and is what differs. It moves 64 KiB at a time.
#[test]
fn damage_on_the_way_is_found() {
    let link = LinkProfile {
        corruption: Chance::from_millionths(150_000).unwrap(),
        ..LinkProfile::perfect()
    };
    let (mut passed, mut found) = (0, 0);
    for seed in 0..40 {
        let network = SimNetwork::new(seed, ExchangeConfig::over(link.clone())).unwrap();
        let build = |name| {
            let builder = Agent::builder(name).memcpy(false).shm(false);
            builder.simulated(&network).build().unwrap()
        };
        let pair = Pair::of(build("a"), build("b"), 1 << 20, OPEN);
        for operation in [Operation::Read, Operation::Write] {
            pair.local.write_at(0, &pattern(1 << 20, seed)).unwrap();
            pair.remote.write_at(0, &pattern(1 << 20, !seed)).unwrap();
            let pieces: Vec<_> = (0..16).map(|n| (n << 16, (15 - n) << 16, 1000)).collect();
            let outcome = pair.moves(operation, &pieces, checked()).wait(WAIT);
            let (local, remote) = (contents(&pair.local), contents(&pair.remote));
            let differs = |&(own, other, len): &(u64, u64, u64)| {
                let range = |at: u64| at as usize..(at + len) as usize;
                local[range(own)] != remote[range(other)]
            };
            match (outcome, pieces.iter().position(differs)) {
                (Ok(_), None) => passed += 1,
                (Err(failed), Some(first)) => {
                    found += 1;
                    assert_eq!(failed.kind(), ErrorKind::Corrupt);
                    let text = failed.to_string();
                    assert!(text.contains(&format!("descriptor {first}: ")), "{text}");
                }
                (outcome, differs) => panic!("seed {seed}: {outcome:?}, differs: {differs:?}"),
            }
        }
    }
    assert!(passed > 5 && found > 5, "{passed} passed, {found} damaged");
}

/// A request that cannot be checked is refused with the reason, not moved unchecked.
#[test]
fn what_cannot_be_checked_is_refused() {
    let write_only = RegionOptions {
        remote_read: false,
        remote_write: true,
    };
    for way in WAYS {
        let pair = Pair::with_options(way, 4096, write_only);
        let ask = |options: RequestOptions| {
            let pairs = [(pair.local.descriptor(0, 64), pair.remote.descriptor(0, 64))];
            let side = Side::Peer(&pair.peer);
            pair.initiator
                .transfer(Operation::Write, &pairs, side, options)
        };
        let refused = ask(checked()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied, "{way:?}");
        ask(RequestOptions::default()).unwrap().wait(WAIT).unwrap();
    }
    // Nobody is at the other end of a file.
    let pair = Pair::new(Way::Memcpy, 4096);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, [0; 4096]).unwrap();
    let file = pair
        .initiator
        .open_file(&path, &FileOptions::default())
        .unwrap();
    let pairs = [(pair.local.descriptor(0, 64), file.descriptor(0, 64))];
    let refused = pair
        .initiator
        .transfer(Operation::Write, &pairs, Side::Local, checked())
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(
        refused.to_string().contains("file: compares no checksums"),
        "{refused}"
    );
}

/// Copies within an agent are compared, too.
#[test]
fn a_copy_of_its_own_is_compared() {
    let agent = Agent::builder("alone").build().unwrap();
    let region = |seed| {
        let memory = HostMemory::anonymous(BYTES).unwrap();
        let region = agent.register(memory, RegionOptions::default()).unwrap();
        region.write_at(0, &pattern(BYTES as usize, seed)).unwrap();
        region
    };
    let (from, to) = (region(1), region(2));
    let copy = |pairs: &[(u64, u64)]| {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|&(at, origin)| (to.descriptor(at, 1 << 20), from.descriptor(origin, 1 << 20)))
            .collect();
        let request = agent.transfer(Operation::Read, &pairs, Side::Local, checked());
        request.unwrap().wait(WAIT)
    };
    copy(&[(0, 0), (1 << 20, 3 << 20)]).unwrap();
    let failed = copy(&[(0, 0), (0, 1 << 20)]).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Corrupt);
    assert!(failed.to_string().contains("descriptor 0: "), "{failed}");
}
