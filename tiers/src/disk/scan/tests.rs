use kvcache_core::{BlockKey, IndexKey};
use proptest::prelude::*;

use super::*;
use crate::checksum::crc32c;
use crate::record::RECORD_HEADER_BYTES;

const IDENTITY: [u8; 32] = [7; 32];
const BLOCK: usize = 5000;
const SEGMENT: u32 = 3;

fn layout() -> SegmentLayout {
    SegmentLayout::new(100_000, BLOCK as u64).unwrap()
}

fn payload(block: u8) -> Vec<u8> {
    (0..BLOCK)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add(block))
        .collect()
}

fn header(block: u8) -> RecordHeader {
    RecordHeader {
        model_identity: IDENTITY,
        info: BlockInfo {
            key: BlockKey([block; 32]),
            parent: None,
            index_key: IndexKey(block.into()),
            index_parent: None,
        },
        payload_bytes: BLOCK as u64,
        checksum: Checksum::crc32c(crc32c(&payload(block))),
    }
}

/// A segment file with so many records, as the mover writes it.
fn file(blocks: u8) -> Vec<u8> {
    let layout = layout();
    let mut bytes = vec![0; layout.file_bytes() as usize];
    let (block_bytes, slots) = (layout.block_bytes(), layout.slots());
    let head = SegmentHeader {
        model_identity: IDENTITY,
        segment: SEGMENT,
        block_bytes,
        slots,
    }
    .encode();
    bytes[..head.len()].copy_from_slice(&head);
    for block in 0..blocks {
        let at = layout.record_offset(block.into()) as usize;
        bytes[at..at + RECORD_HEADER_BYTES].copy_from_slice(&header(block).encode());
        let at = layout.payload_offset(block.into()) as usize;
        bytes[at..at + BLOCK].copy_from_slice(&payload(block));
    }
    bytes
}

fn scan(bytes: &[u8]) -> ScanReport {
    let page = |at: usize| &bytes[at.min(bytes.len())..(at + PAGE_BYTES as usize).min(bytes.len())];
    let mut scanner = Scanner::new(layout(), IDENTITY, SEGMENT, bytes.len() as u64);
    if let Verdict::Scan { records } = scanner.start(page(0)) {
        for position in 0..records {
            scanner.record(position, page(layout().record_offset(position) as usize));
        }
    }
    scanner.finish()
}

fn positions(report: &ScanReport) -> Vec<u32> {
    report.blocks.iter().map(|block| block.position).collect()
}

/// A file as it was written, partly filled.
#[test]
fn every_written_record_is_found_and_vacant_ones_are_no_faults() {
    let report = scan(&file(4));
    assert_eq!(positions(&report), [0, 1, 2, 3]);
    assert_eq!(report.blocks[2].info, header(2).info);
    assert_eq!(report.blocks[2].checksum, header(2).checksum);
    assert_eq!(report.faults, []);
}

/// The header page of another version, model and block size, each whole in itself.
#[test]
fn a_foreign_file_is_skipped_as_a_whole_and_counted_once() {
    let mut version = file(3);
    version[8] = 2;
    let report = scan(&version);
    assert_eq!((report.blocks.len(), report.faults.len()), (0, 1));
    assert_eq!(
        report.faults[0].to_string(),
        "segment-00000003.kvf:0: written in version 2, this build reads version 1"
    );

    for head in [
        SegmentHeader {
            model_identity: [8; 32],
            segment: 3,
            block_bytes: 5000,
            slots: 7,
        },
        SegmentHeader {
            model_identity: IDENTITY,
            segment: 3,
            block_bytes: 4999,
            slots: 7,
        },
    ] {
        let mut bytes = file(3);
        bytes[..RECORD_HEADER_BYTES].copy_from_slice(&head.encode());
        let report = scan(&bytes);
        assert_eq!((report.blocks.len(), report.faults.len()), (0, 1));
    }
}

/// One record of another version and one of another model among good ones.
#[test]
fn a_foreign_record_costs_only_itself() {
    let mut bytes = file(4);
    bytes[layout().record_offset(1) as usize + 8] = 9;
    let foreign = RecordHeader {
        model_identity: [8; 32],
        ..header(2)
    };
    let at = layout().record_offset(2) as usize;
    bytes[at..at + RECORD_HEADER_BYTES].copy_from_slice(&foreign.encode());
    let report = scan(&bytes);
    assert_eq!(positions(&report), [0, 3]);
    let places: Vec<_> = report.faults.iter().map(|fault| fault.offset).collect();
    assert_eq!(
        places,
        [layout().record_offset(1), layout().record_offset(2)]
    );
    assert!(report.faults[0].to_string().contains("version 9"));
}

/// A header page destroyed from the outside.
#[test]
fn a_damaged_first_page_costs_no_block() {
    let mut bytes = file(4);
    bytes[20] ^= 1;
    let report = scan(&bytes);
    assert_eq!(positions(&report), [0, 1, 2, 3]);
    assert_eq!(report.faults.len(), 1);
    assert_eq!(report.faults[0].offset, 0);
}

proptest! {
    /// The file cut anywhere, as a full disk or a lost tail leaves it.
    #[test]
    fn a_cut_file_serves_exactly_the_records_that_are_whole(
        blocks in 1..7_u8, length in 0..100_000_usize,
    ) {
        let bytes = file(blocks);
        let bytes = &bytes[..length.min(bytes.len())];
        let report = scan(bytes);
        let whole: Vec<u32> = (0..u32::from(blocks))
            .filter(|position| {
                bytes.len() >= RECORD_HEADER_BYTES
                    && layout().payload_offset(*position) + BLOCK as u64 <= bytes.len() as u64
            })
            .collect();
        prop_assert_eq!(positions(&report), whole);
        let cut = (bytes.len() as u64) < layout().file_bytes();
        prop_assert_eq!(report.faults.is_empty(), !cut);
        prop_assert!(report.faults.iter().all(|fault| fault.offset <= bytes.len() as u64));
    }

    /// A flipped bit anywhere: a block found is the block that was written, and at most one is lost.
    #[test]
    fn a_flipped_bit_costs_at_most_its_record(bit in 0..100_000_usize * 8) {
        let mut bytes = file(4);
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let report = scan(&bytes);
        let version_of_file = (8..10).contains(&(bit / 8));
        prop_assert!(report.blocks.len() >= 3 || version_of_file);
        for found in &report.blocks {
            let written = header(found.position as u8);
            prop_assert_eq!(found.info, written.info);
            prop_assert_eq!(found.checksum, written.checksum);
        }
        if report.blocks.len() < 4 {
            prop_assert_eq!(report.faults.len(), 1);
        }
    }

    /// Records partly written when the process died: the header is written after the bytes, but a
    /// disk may keep either.
    #[test]
    fn a_torn_write_yields_no_block_with_a_checksum_of_its_own(
        position in 0..4_u32, keep in 0..RECORD_HEADER_BYTES,
    ) {
        let mut bytes = file(4);
        let at = layout().record_offset(position) as usize;
        bytes[at + keep..at + RECORD_HEADER_BYTES].fill(0);
        let report = scan(&bytes);
        let survives = bytes[at..at + RECORD_HEADER_BYTES] == header(position as u8).encode();
        prop_assert_eq!(positions(&report).contains(&position), survives);
        prop_assert_eq!(report.blocks.len(), if survives { 4 } else { 3 });
    }

    /// Files of noise of any length.
    #[test]
    fn noise_yields_no_block(bytes in prop::collection::vec(any::<u8>(), 0..20_000)) {
        prop_assert_eq!(scan(&bytes).blocks.len(), 0);
    }
}
