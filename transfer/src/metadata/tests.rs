//! Metadata survives its encoding. Damage and lies are tested where agents load it.

use proptest::prelude::*;

use super::*;

/// Few sizes, so that runs are of several regions.
fn region() -> impl Strategy<Value = RemoteRegion> {
    let bytes = prop_oneof![Just(0), Just(4096), Just(u64::MAX), any::<u64>()];
    (any::<[u8; 12]>(), bytes, any::<[bool; 4]>())
        .prop_map(|(secret, bytes, flags)| remote(secret, bytes, flags))
}

fn remote(
    secret: [u8; 12],
    bytes: u64,
    [readable, writable, shareable, is_device]: [bool; 4],
) -> RemoteRegion {
    let secret = RegionSecret(secret);
    let (id, key) = secret.derive();
    RemoteRegion {
        secret,
        id,
        key,
        bytes,
        kind: match is_device {
            true => RemoteKind::Device,
            false => RemoteKind::Host,
        },
        readable,
        writable,
        shareable,
    }
}

/// Metadata of an agent with these regions and nothing else.
fn card(mut regions: Vec<RemoteRegion>) -> PeerCard {
    regions.sort_by_key(RemoteRegion::order);
    PeerCard {
        name: "agent".into(),
        incarnation: Incarnation(1),
        host: HostId([0; 16]),
        addresses: Vec::new(),
        regions: regions.into_iter().map(Arc::new).collect(),
        partial: false,
    }
}

fn parts(region: &RemoteRegion) -> (RegionId, [u8; 16], u64, [bool; 4]) {
    let is_device = region.kind == RemoteKind::Device;
    let flags = [
        region.readable,
        region.writable,
        region.shareable,
        is_device,
    ];
    (region.id, region.key.0, region.bytes, flags)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Encoded, decoded and encoded again: the same bytes, and the same parts.
    #[test]
    fn metadata_is_read_as_it_was_written(
        name in "[a-z:.0-9]{1,40}",
        incarnation in any::<u64>(),
        host in any::<[u8; 16]>(),
        addresses in proptest::collection::vec(
            ("[a-z]{1,8}", proptest::collection::vec(any::<u8>(), 0..40)),
            0..4,
        ),
        regions in proptest::collection::vec(region(), 0..20),
        partial: bool,
    ) {
        let card = PeerCard {
            name,
            incarnation: Incarnation(incarnation),
            host: HostId(host),
            addresses,
            partial,
            ..card(regions)
        };
        let bytes = card.encode();
        let read = PeerCard::decode(&bytes).unwrap();
        prop_assert_eq!(read.encode(), bytes);
        prop_assert_eq!(read.partial, card.partial);
        prop_assert_eq!(read.name, card.name);
        prop_assert_eq!(read.addresses, card.addresses);
        let (found, told) = (read.regions.iter(), card.regions.iter());
        prop_assert!(found.map(|region| parts(region)).eq(told.map(|region| parts(region))));
    }

    /// Whatever follows a valid beginning is read, or refused with a reason; what is read is what would be written.
    #[test]
    fn made_up_regions_are_read_or_refused(
        tail in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..80),
            proptest::collection::vec(0..3_u8, 0..80),
        ],
    ) {
        let mut bytes = card(Vec::new()).encode();
        bytes.truncate(bytes.len() - CHECKSUM_BYTES);
        bytes.extend_from_slice(&tail);
        bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
        match PeerCard::decode(&bytes) {
            Ok(read) => prop_assert_eq!(read.encode(), bytes),
            Err(error) => {
                prop_assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid));
            }
        }
    }
}

/// The n-th of many secrets.
fn secret(n: u64) -> [u8; 12] {
    let mut secret = [0; 12];
    secret[..8].copy_from_slice(&n.to_le_bytes());
    secret
}

/// Of one size, of eight, and each of another: what is beside the secrets is little.
#[test]
fn a_thousand_regions_take_12_to_16_kilobytes() {
    let bytes = |size: fn(u64) -> u64| {
        let region = |n| remote(secret(n), size(n), [true, n % 2 == 0, true, false]);
        let regions = card((0..1000).map(region).collect());
        regions.encode().len() - card(Vec::new()).encode().len()
    };
    assert_eq!(bytes(|_| 1 << 30), 12_000 + 2 * (2 + 5));
    assert!(bytes(|n| 4096 << (n % 8)) < 12_200);
    assert!(bytes(|n| (n * 7919 % 1000 + 1) * 4096) <= 15_500);
}

/// The bytes that `docs/wire-format.md` describes, and the name and key that this secret has in every build.
#[test]
fn the_format_stays_as_it_is() {
    let regions = vec![
        remote([1; 12], 300, [true, false, false, false]),
        remote([2; 12], 301, [true, false, false, false]),
        remote([3; 12], 5, [true, true, true, false]),
        remote([4; 12], 6, [true, false, false, true]),
    ];
    let found = card(regions).encode();
    let mut expected = b"KVFM\x03\0\0\0".to_vec();
    expected.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend_from_slice(&[0; 16]);
    expected.extend_from_slice(b"\x05\0agent\0");
    expected.extend_from_slice(b"\x11\xac\x02");
    expected.extend_from_slice(&[1; 12]);
    expected.extend_from_slice(b"\x11\x01");
    expected.extend_from_slice(&[2; 12]);
    expected.extend_from_slice(b"\x17\x05");
    expected.extend_from_slice(&[3; 12]);
    expected.extend_from_slice(b"\x19\x06");
    expected.extend_from_slice(&[4; 12]);
    assert_eq!(found[..found.len() - CHECKSUM_BYTES], expected);
    let (id, key) = RegionSecret([1; 12]).derive();
    assert_eq!((id.to_string().as_str(), key.0), GOLDEN);
}

/// What version 2 said, and that it had no fourth flag: what is one in version 3 was a count there.
#[test]
fn the_version_before_is_read() {
    let read = |version: u8| {
        let mut bytes = card(Vec::new()).encode();
        bytes.truncate(bytes.len() - CHECKSUM_BYTES);
        bytes[4] = version;
        bytes.extend_from_slice(b"\x0f\x05");
        bytes.extend_from_slice(&[3; 12]);
        bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
        PeerCard::decode(&bytes)
    };
    let found = read(2).unwrap();
    let host = remote([3; 12], 5, [true, true, true, false]);
    assert_eq!(parts(&found.regions[0]), parts(&host));
    let error = read(3).unwrap_err().to_string();
    assert!(error.contains("0 regions in a run"), "{error}");
    let error = read(1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Version, "{error}");
}

/// Of twelve bytes of 1.
const GOLDEN: (&str, [u8; 16]) = (
    "5c5a45f7becd7986",
    [
        95, 154, 209, 162, 250, 161, 127, 125, 208, 164, 200, 21, 136, 59, 199, 214,
    ],
);

/// Regions that no agent writes in this order, runs of nothing, numbers that could be shorter.
#[test]
fn regions_out_of_order_are_refused() {
    let start = card(Vec::new()).encode();
    let start = &start[..start.len() - CHECKSUM_BYTES];
    let region = [7; 12];
    let run = |head: &[u8]| [head, &region].concat();
    for (tail, expected) in [
        (run(b"\x11\x05"), None),
        ([run(b"\x11\x05"), run(b"\x11\x01")].concat(), None),
        // The same size again, a size past the last one, and flags that fall.
        ([run(b"\x11\x05"), run(b"\x11\0")].concat(), Some("after")),
        (
            [
                run(b"\x11\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
                run(b"\x11\x01"),
            ]
            .concat(),
            Some("after"),
        ),
        ([run(b"\x12\x05"), run(b"\x11\x06")].concat(), Some("after")),
        (b"\x01\x05".to_vec(), Some("0 regions in a run")),
        (run(b"\x91\0\x05"), Some("shortest form")),
        (
            run(b"\x11\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"),
            Some("64 bits"),
        ),
        (run(b"\x21\x05"), Some("needs 12 bytes")),
        (run(b"\x80\x80\x80\x01\x05"), Some("expected 1 to")),
    ] {
        let mut bytes = [start, &tail].concat();
        bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
        let read = PeerCard::decode(&bytes);
        match expected {
            None => assert!(read.is_ok(), "{tail:02x?}"),
            Some(text) => {
                let error = read.unwrap_err().to_string();
                assert!(error.contains(text), "{tail:02x?}: {error}");
            }
        }
    }
}
