use proptest::prelude::*;

use super::*;

const IDENTITY: [u8; 32] = [7; 32];
const EXPECTED: Expected = Expected {
    model_identity: IDENTITY,
    block_bytes: 4096,
};

prop_compose! {
    fn headers()(
        key: [u8; 32], parent: Option<[u8; 32]>, index_key: u64, index_parent: Option<u64>,
        payload_bytes: u64, checksum: u32, model_identity: [u8; 32],
    ) -> RecordHeader {
        let info = BlockInfo {
            key: BlockKey(key),
            parent: parent.map(BlockKey),
            index_key: IndexKey(index_key),
            index_parent: index_parent.map(IndexKey),
        };
        RecordHeader { model_identity, info, payload_bytes, checksum: Checksum::crc32c(checksum) }
    }
}

fn ours() -> RecordHeader {
    let info = BlockInfo {
        key: BlockKey([1; 32]),
        parent: Some(BlockKey([2; 32])),
        index_key: IndexKey(3),
        index_parent: Some(IndexKey(4)),
    };
    RecordHeader {
        model_identity: IDENTITY,
        info,
        payload_bytes: 4096,
        checksum: Checksum::crc32c(5),
    }
}

/// Writes `value` at `at` and makes the header's checksum right again, as another writer would.
fn rewritten(at: usize, value: &[u8]) -> [u8; RECORD_HEADER_BYTES] {
    let mut bytes = ours().encode();
    bytes[at..at + value.len()].copy_from_slice(value);
    let crc = crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

proptest! {
    /// Any header, with and without parents.
    #[test]
    fn a_header_reads_back_as_it_was_written(header in headers()) {
        prop_assert_eq!(RecordHeader::decode(&header.encode()), Ok(header));
    }

    /// Each single bit of the header, one at a time.
    #[test]
    fn a_flipped_bit_is_always_a_fault(header in headers(), bit in 0..RECORD_HEADER_BYTES * 8) {
        let mut bytes = header.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(RecordHeader::decode(&bytes).is_err());
    }

    /// Any cut before the end.
    #[test]
    fn a_cut_header_is_truncated(header in headers(), length in 0..RECORD_HEADER_BYTES) {
        let fault = RecordHeader::decode(&header.encode()[..length]).unwrap_err();
        let needed = RECORD_HEADER_BYTES as u64;
        prop_assert_eq!(fault, RecordFault::Truncated { found: length as u64, needed });
    }

    /// A header written over another one, the power lost after any byte.
    #[test]
    fn a_torn_header_is_the_old_one_the_new_one_or_a_fault(
        old in headers(), new in headers(), length in 0..=RECORD_HEADER_BYTES,
    ) {
        let mut bytes = old.encode();
        bytes[..length].copy_from_slice(&new.encode()[..length]);
        if let Ok(read) = RecordHeader::decode(&bytes) {
            prop_assert!(read == old || read == new);
        }
    }

    /// Arbitrary bytes, which must neither panic nor pass.
    #[test]
    fn noise_is_never_a_record(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(RecordHeader::decode(&bytes).is_err());
    }
}

/// The offsets of the documented table, so that a change of the layout cannot go unseen.
#[test]
fn the_layout_is_the_documented_one() {
    let bytes = ours().encode();
    assert_eq!(&bytes[..8], b"KVFBLOCK");
    assert_eq!(bytes[8..10], [1, 0]);
    assert_eq!(bytes[10..12], [0, 1]);
    assert_eq!(bytes[12..16], [3, 0, 0, 0]);
    assert_eq!(bytes[16..48], IDENTITY);
    assert_eq!(bytes[48..80], [1; 32]);
    assert_eq!(bytes[80..112], [2; 32]);
    assert_eq!(bytes[112..120], 3_u64.to_le_bytes());
    assert_eq!(bytes[120..128], 4_u64.to_le_bytes());
    assert_eq!(bytes[128..136], 4096_u64.to_le_bytes());
    assert_eq!(bytes[136..144], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[144..152], 5_u64.to_le_bytes());
    assert_eq!(bytes[152..252], [0; 100]);
}

/// Every field that can be wrong although the header is whole.
#[test]
fn a_whole_header_with_a_foreign_field_is_refused_by_name() {
    let version = RecordHeader::decode(&rewritten(8, &[9, 0])).unwrap_err();
    assert_eq!(version, RecordFault::Version { found: 9 });
    let text = version.to_string();
    assert!(
        text.contains("version 9") && text.contains("version 1"),
        "{text}"
    );

    for (at, field) in [(10, "header length"), (12, "flags")] {
        let fault = RecordHeader::decode(&rewritten(at, &[0xf0])).unwrap_err();
        assert!(matches!(fault, RecordFault::Unknown { field: found, .. } if found == field));
    }
    let algorithm = RecordHeader::decode(&rewritten(136, &[77])).unwrap_err();
    assert_eq!(
        algorithm,
        RecordFault::Unknown {
            field: "checksum algorithm",
            found: 77
        }
    );
    let encoding = RecordHeader::decode(&rewritten(137, &[1])).unwrap_err();
    assert_eq!(
        encoding,
        RecordFault::Unknown {
            field: "payload encoding",
            found: 1
        }
    );

    let foreign = RecordHeader::decode(&rewritten(16, &[8])).unwrap();
    assert!(matches!(
        foreign.check(&EXPECTED),
        Err(RecordFault::ForeignModel { .. })
    ));
    let length = RecordHeader::decode(&rewritten(128, &[1])).unwrap();
    let fault = RecordFault::Length {
        found: 4097,
        expected: 4096,
    };
    assert_eq!(length.check(&EXPECTED), Err(fault));
    assert_eq!(ours().check(&EXPECTED), Ok(()));
}

/// A page that was allocated and never written.
#[test]
fn zeros_are_vacant_and_not_damage() {
    assert_eq!(RecordHeader::decode(&[0; 4096]), Err(RecordFault::Vacant));
}
