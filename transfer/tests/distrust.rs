//! Metadata that was damaged, comes from another version, or lies.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, METADATA_VERSION, Operation, RegionOptions, RequestOptions, Side};
use proptest::prelude::*;

use support::{Pair, WAIT, WAYS, Way};

/// The end of metadata with one region: a run's count and flags, the region's size, its secret.
const CHECKSUM: usize = 4;
const SECRET: usize = CHECKSUM + 12;
/// A size of 4,096 takes two bytes.
const BYTES: usize = SECRET + 2;
const FLAGS: usize = BYTES + 1;

/// The metadata with bytes changed and a checksum that fits again.
fn forged(metadata: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = metadata.to_vec();
    change(&mut bytes);
    let end = bytes.len() - CHECKSUM;
    let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes[..end]) as u32;
    bytes[end..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Loads forged metadata into a new agent and tries a transfer of `len` bytes; how that ends.
fn attempt(
    way: Way,
    pair: &Pair,
    forged: &[u8],
    operation: Operation,
    range: (u64, u64),
) -> ErrorKind {
    let agent = way.agent("liar");
    let bytes = kvfabric_transfer::HostMemory::anonymous(1 << 20).unwrap();
    let own = agent.register(bytes, RegionOptions::default()).unwrap();
    let peer = agent.load_peer(forged).unwrap();
    let pairs = [(
        own.descriptor(0, range.1),
        pair.remote.descriptor(range.0, range.1),
    )];
    let options = RequestOptions::default();
    match agent.transfer(operation, &pairs, Side::Peer(&peer), options) {
        Err(error) => error.kind(),
        Ok(request) => request.wait(WAIT).unwrap_err().kind(),
    }
}

/// The metadata says that the region is larger than it is, so only the target can notice.
#[test]
fn bytes_outside_the_region_are_refused_by_the_target() {
    for way in WAYS {
        let pair = Pair::new(way, 4096);
        let metadata = pair.target.metadata();
        let at = metadata.len() - BYTES;
        let largest = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        let forged = forged(&metadata, |bytes| {
            bytes.splice(at..at + 2, *largest);
        });
        for range in [
            (4096, 8),
            (4090, 64),
            (0, 8192),
            (u64::MAX - 8, 8),
            (1 << 40, 4096),
        ] {
            for operation in [Operation::Read, Operation::Write] {
                let kind = attempt(way, &pair, &forged, operation, range);
                // Memory of another size than promised is not even accepted.
                let expected = match way {
                    Way::Shm | Way::Cma | Way::Ucx | Way::Verbs => ErrorKind::Corrupt,
                    Way::Memcpy | Way::Tcp => ErrorKind::Invalid,
                };
                assert_eq!(kind, expected, "{way:?} {range:?}");
            }
        }
    }
}

/// Memory that was handed out and is not what the metadata said is not used, so the target gets it back at once, also
/// when the agent that asked is still there.
#[test]
fn memory_that_was_handed_out_in_vain_is_not_in_use() {
    for way in [Way::Shm, Way::Cma] {
        let pair = Pair::new(way, 4096);
        let metadata = pair.target.metadata();
        let at = metadata.len() - BYTES;
        let forged = forged(&metadata, |bytes| bytes[at] ^= 1);
        assert_eq!(
            attempt(way, &pair, &forged, Operation::Read, (0, 64)),
            ErrorKind::Corrupt
        );
        pair.remote.deregister().wait(WAIT).unwrap();
    }
}

/// The metadata says that a read-only region may be written.
#[test]
fn a_read_only_region_is_not_writable_by_pretending() {
    for way in WAYS {
        let read_only = RegionOptions {
            remote_read: true,
            remote_write: false,
        };
        let pair = Pair::with_options(way, 4096, read_only);
        let metadata = pair.target.metadata();
        let at = metadata.len() - FLAGS;
        let forged = forged(&metadata, |bytes| bytes[at] |= 2);
        let kind = attempt(way, &pair, &forged, Operation::Write, (0, 64));
        assert_eq!(kind, ErrorKind::Denied, "{way:?}");
        assert_eq!(pair.remote.load_u64(0).unwrap(), 0);
    }
}

/// Connects to a target as a stranger, says `bytes`, and returns what it answers until it closes.
fn stranger(pair: &Pair, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(pair.target.tcp_address().unwrap()).unwrap();
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A reset is a way to close, too.
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// The answer carries the target's own version, and names both.
#[test]
fn a_stranger_of_another_version_is_told_both() {
    let pair = Pair::new(Way::Tcp, 4096);
    let answer = stranger(&pair, b"KVFT\x4d\x00\x00\x00");
    assert_eq!(answer[..6], *b"KVFT\x01\x00");
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("version 77, this build 1"), "{text:?}");
}

/// Noise, a greeting to someone else, and frames before a greeting; afterwards the target serves its peers as before.
#[test]
fn a_stranger_that_talks_nonsense_is_shut_out() {
    let pair = Pair::new(Way::Tcp, 4096);
    stranger(&pair, &support::pattern(100_000, 1));
    stranger(&pair, b"KVFT\x01\x00\xff\xff");
    let elsewhere = [&b"KVFT\x01\x00\x14\x00"[..], &[7; 16], &b"\x02\x00me"[..]].concat();
    let answer = stranger(&pair, &elsewhere);
    assert!(
        String::from_utf8_lossy(&answer).contains("is gone"),
        "{answer:?}"
    );
    let request = pair.moves(Operation::Read, &[(0, 0, 4096)], RequestOptions::default());
    assert_eq!(request.wait(WAIT).unwrap().bytes, 4096);
}

/// Every single bit that flips is noticed.
#[test]
fn damaged_metadata_is_corrupt() {
    let pair = Pair::new(Way::Tcp, 4096);
    let metadata = pair.target.metadata();
    for position in 0..metadata.len() {
        for bit in 0..8 {
            let mut damaged = metadata.to_vec();
            damaged[position] ^= 1 << bit;
            let error = pair.initiator.load_peer(&damaged).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {position}: {error}");
        }
    }
    for len in 0..metadata.len() {
        let error = pair.initiator.load_peer(&metadata[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{len} bytes: {error}");
    }
}

/// The version is the two bytes after the magic.
#[test]
fn metadata_of_another_version_names_both() {
    let agent = Agent::builder("reader").build().unwrap();
    let metadata = Agent::builder("writer").build().unwrap().metadata();
    let other = METADATA_VERSION + 6;
    let forged = forged(&metadata, |bytes| {
        bytes[4..6].copy_from_slice(&other.to_le_bytes())
    });
    let error = agent.load_peer(&forged).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Version);
    let text = error.to_string();
    assert!(text.contains(&other.to_string()), "{text}");
    assert!(text.contains(&METADATA_VERSION.to_string()), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Random bytes, behind a valid start and before a valid checksum, are read or refused; nothing else.
    #[test]
    fn random_metadata_never_panics(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let agent = Agent::builder("reader").shm(false).build().unwrap();
        let mut bytes = b"KVFM\x03\x00\x00\x00".to_vec();
        bytes.extend_from_slice(&tail);
        bytes.extend_from_slice(&[0; 4]);
        let whole = forged(&bytes, |_| {});
        if let Err(error) = agent.load_peer(&whole) {
            prop_assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid));
        }
    }
}
