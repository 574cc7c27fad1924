use proptest::prelude::*;

use super::*;

proptest! {
    /// Any sizes that make a layout.
    #[test]
    fn records_are_page_aligned_disjoint_and_within_the_file(
        segment_bytes in 1..1_u64 << 30, block_bytes in 1..1_u64 << 22,
    ) {
        let Ok(layout) = SegmentLayout::new(segment_bytes, block_bytes) else {
            prop_assert!(segment_bytes < 2 * PAGE_BYTES + block_bytes.next_multiple_of(PAGE_BYTES));
            return Ok(());
        };
        prop_assert!(layout.file_bytes() <= segment_bytes);
        let last = layout.slots() - 1;
        for position in [0, last / 2, last] {
            prop_assert_eq!(layout.record_offset(position) % PAGE_BYTES, 0);
            prop_assert_eq!(layout.payload_offset(position) % PAGE_BYTES, 0);
            let end = layout.payload_offset(position) + block_bytes;
            let next = if position == last {
                layout.file_bytes()
            } else {
                layout.record_offset(position + 1)
            };
            prop_assert!(end <= next);
        }
    }

    /// Any header, and any one bit of it flipped.
    #[test]
    fn a_segment_header_reads_back_and_tolerates_no_flipped_bit(
        model_identity: [u8; 32], segment: u32, block_bytes: u64, slots: u32,
        bit in 0..RECORD_HEADER_BYTES * 8,
    ) {
        let header = SegmentHeader { model_identity, segment, block_bytes, slots };
        let mut bytes = header.encode();
        prop_assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(SegmentHeader::decode(&bytes).is_err());
    }

    /// Names that are not ours, and every one that is.
    #[test]
    fn only_the_one_spelling_of_a_file_name_is_ours(segment: u32) {
        prop_assert_eq!(segment_of_file_name(&file_name(segment)), Some(segment));
    }
}

/// Near misses.
#[test]
fn other_file_names_are_not_ours() {
    for name in [
        "segment-7.kvf",
        "segment-+0000007.kvf",
        "segment-00000007.kvf.tmp",
        "x.kvf",
        "",
    ] {
        assert_eq!(segment_of_file_name(name), None, "{name}");
    }
}

/// No room for one block, no block, and a block beyond sense.
#[test]
fn impossible_sizes_are_refused_with_the_value() {
    let error = SegmentLayout::new(8191, 1).unwrap_err();
    assert!(error.context().contains("segment_bytes is 8191"), "{error}");
    for block_bytes in [0, BLOCK_BYTES_MAX + 1, u64::MAX] {
        let error = SegmentLayout::new(u64::MAX, block_bytes).unwrap_err();
        assert!(
            error
                .context()
                .contains(&format!("block_bytes is {block_bytes}")),
            "{error}"
        );
    }
}
