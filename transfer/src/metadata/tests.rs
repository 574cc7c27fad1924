//! Metadata survives its encoding. Damage and lies are tested where agents load it.

use proptest::prelude::*;

use super::*;

fn region() -> impl Strategy<Value = RemoteRegion> {
    (
        any::<u64>(),
        any::<[u8; 16]>(),
        any::<u64>(),
        any::<[bool; 3]>(),
    )
        .prop_map(
            |(id, key, bytes, [readable, writable, shareable])| RemoteRegion {
                id: RegionId(id),
                key: RegionKey(key),
                bytes,
                readable,
                writable,
                shareable,
            },
        )
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
            regions: regions.into_iter().map(Arc::new).collect(),
            partial,
        };
        let bytes = card.encode();
        let read = PeerCard::decode(&bytes).unwrap();
        prop_assert_eq!(read.encode(), bytes);
        prop_assert_eq!(read.partial, card.partial);
        prop_assert_eq!(read.name, card.name);
        prop_assert_eq!(read.addresses, card.addresses);
        prop_assert_eq!(read.regions.len(), card.regions.len());
    }
}

/// A thousand regions fit into 33 KiB.
#[test]
fn a_region_takes_33_bytes() {
    let region = |id| RemoteRegion {
        id: RegionId(id),
        key: RegionKey([0; 16]),
        bytes: 1 << 30,
        readable: true,
        writable: false,
        shareable: true,
    };
    let card = |count| PeerCard {
        name: "agent".into(),
        incarnation: Incarnation(1),
        host: HostId([0; 16]),
        addresses: Vec::new(),
        regions: (0..count).map(|id| Arc::new(region(id))).collect(),
        partial: false,
    };
    assert_eq!(card(1000).encode().len() - card(0).encode().len(), 33_000);
}
