//! Every message survives its encoding; nothing that arrives can panic.

use proptest::prelude::*;

use super::*;

fn access() -> impl Strategy<Value = Access> {
    let ranges = proptest::collection::vec((any::<u32>(), 1..=u32::MAX, any::<u64>()), 1..40);
    let notification = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..100));
    let regions = proptest::collection::vec((any::<u64>(), any::<[u8; 16]>()), 1..5);
    (regions, ranges, notification).prop_map(|(regions, ranges, notification)| {
        let regions: Vec<_> = regions
            .into_iter()
            .take(ranges.len())
            .map(|(id, key)| (RegionId(id), RegionKey(key)))
            .collect();
        let count = regions.len() as u32;
        let ranges = ranges
            .into_iter()
            .map(|(region, len, offset)| WireRange {
                region: region % count,
                len,
                offset,
            })
            .collect();
        Access {
            regions,
            ranges,
            notification,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Encoded and decoded again, everything is the same.
    #[test]
    fn an_access_is_read_as_it_was_written(access in access()) {
        let mut bytes = Vec::new();
        access.encode(&mut bytes);
        let read = Access::decode(&bytes).unwrap();
        prop_assert_eq!(&read.ranges, &access.ranges);
        prop_assert_eq!(&read.notification, &access.notification);
        prop_assert_eq!(read.regions.len(), access.regions.len());
        for (read, written) in read.regions.iter().zip(&access.regions) {
            prop_assert_eq!(read.0, written.0);
            prop_assert!(read.1.matches(&written.1));
        }
    }

    /// Random bytes are decoded or refused.
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Header::decode(&bytes);
        let _ = Access::decode(&bytes);
        let _ = decode_outcome(&bytes);
        let _ = Greeting::decode(&bytes);
    }

    /// Valid bytes with one change are decoded or refused, and never name a region that isn't there.
    #[test]
    fn a_damaged_access_names_only_regions_that_it_has(
        access in access(),
        position in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let mut bytes = Vec::new();
        access.encode(&mut bytes);
        let at = position.index(bytes.len());
        bytes[at] = value;
        if let Ok(read) = Access::decode(&bytes) {
            let count = read.regions.len() as u32;
            prop_assert!(read.ranges.iter().all(|range| range.region < count && range.len > 0));
        }
    }

    /// A header says what it said.
    #[test]
    fn a_header_is_read_as_it_was_written(
        kind in 1..=5_u8,
        head_bytes in 0..=HEAD_BYTES_MAX as u32,
        id in any::<u64>(),
        payload_bytes in 0..=CHUNK_BYTES_MAX,
    ) {
        let kinds = [
            FrameKind::Read,
            FrameKind::Write,
            FrameKind::Notify,
            FrameKind::Data,
            FrameKind::Done,
        ];
        let kind = kinds[usize::from(kind) - 1];
        let header = Header { kind, head_bytes, id, payload_bytes };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        prop_assert_eq!(bytes.len(), HEADER_BYTES);
        prop_assert_eq!(Header::decode(&bytes).unwrap(), header);
    }
}

/// Lengths above the limits are refused before anything is allocated for them.
#[test]
fn lengths_above_the_limits_are_refused() {
    for (head_bytes, payload_bytes) in [
        (HEAD_BYTES_MAX as u32 + 1, 0),
        (0, CHUNK_BYTES_MAX + 1),
        (u32::MAX, u64::MAX),
    ] {
        let header = Header {
            kind: FrameKind::Write,
            head_bytes,
            id: 1,
            payload_bytes,
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        assert_eq!(
            Header::decode(&bytes).unwrap_err().kind(),
            ErrorKind::Invalid
        );
    }
}

/// A greeting of another version is refused, and both versions are named.
#[test]
fn another_version_is_refused_with_both_named() {
    let greeting = Greeting {
        name: "peer".into(),
        incarnation: Incarnation(1),
        wanted: Incarnation(2),
    };
    let mut bytes = greeting.encode();
    let (preamble, body) = bytes.split_first_chunk::<PREAMBLE_BYTES>().unwrap();
    assert_eq!(decode_preamble(preamble).unwrap(), body.len());
    assert_eq!(Greeting::decode(body).unwrap(), greeting);
    bytes[4..6].copy_from_slice(&77_u16.to_le_bytes());
    let (preamble, _) = bytes.split_first_chunk::<PREAMBLE_BYTES>().unwrap();
    let error = decode_preamble(preamble).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Version);
    assert!(error.to_string().contains("77"), "{error}");
    assert!(
        error.to_string().contains(&PROTOCOL_VERSION.to_string()),
        "{error}"
    );
}

/// Outcomes keep their kind and text; texts are cut to their limit, never inside a character.
#[test]
fn an_outcome_keeps_its_kind() {
    for kind in [
        ErrorKind::Denied,
        ErrorKind::NotFound,
        ErrorKind::Busy,
        ErrorKind::Invalid,
    ] {
        let mut bytes = Vec::new();
        encode_outcome(&Err(Error::new(kind, "ä".repeat(1000))), &mut bytes);
        assert!(bytes.len() <= CONTEXT_BYTES_MAX + 6);
        assert_eq!(decode_outcome(&bytes).unwrap().unwrap_err().kind(), kind);
    }
    let mut bytes = Vec::new();
    encode_outcome(&Ok(()), &mut bytes);
    assert!(decode_outcome(&bytes).unwrap().is_ok());
}
