//! The geometry by itself: what is refused, what merges, how bytes pair and sum.

use kvcache_core::ErrorKind;
use kvfabric_transfer::{HostMemory, Region, RegionOptions};

use super::*;
use crate::checksum::crc32c;

fn agent_and_region(bytes: u64) -> (Agent, Region) {
    let agent = Agent::builder("pages").build().unwrap();
    let memory = HostMemory::anonymous(bytes).unwrap();
    let region = agent.register(memory, RegionOptions::default()).unwrap();
    (agent, region)
}

fn segment(region: &Region, offset: u64, stride: u64, len: u64) -> Segment {
    Segment {
        region: region.id(),
        offset,
        stride,
        len,
    }
}

/// Each rule broken by the second of two segments, so that a message without its position shows.
#[test]
fn segments_that_cannot_be_are_refused_by_position() {
    let (agent, region) = agent_and_region(4096);
    let good = segment(&region, 0, 100, 100);
    let refuse = |bad: Segment, kind: ErrorKind, blocks: u32, text: &str| {
        let error = Pages::new(&agent, vec![good, bad], blocks).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let text_found = error.to_string();
        assert!(text_found.contains("segment 1"), "{error}");
        assert!(text_found.contains(text), "{error}");
    };
    let invalid = ErrorKind::Invalid;
    refuse(segment(&region, 0, 100, 0), invalid, 2, "len is 0");
    refuse(segment(&region, 0, 99, 100), invalid, 2, "stride is 99");
    refuse(segment(&region, 3997, 100, 100), invalid, 1, "3997+100");
    refuse(
        segment(&region, 1, 999, 100),
        invalid,
        5,
        "3997+100 lie outside",
    );
    refuse(segment(&region, 1, u64::MAX / 2, 1), invalid, 4, "2^64");
    let unknown = Segment {
        region: RegionId(region.id().0 ^ 1),
        ..good
    };
    refuse(unknown, ErrorKind::NotFound, 2, "region");
    let last_byte = segment(&region, 3996 - 999, 999, 100);
    assert_eq!(Pages::new(&agent, vec![last_byte], 2).unwrap().blocks(), 2);
}

/// None, and one more than there may be; then no blocks, and a block past the last.
#[test]
fn counts_out_of_range_are_refused() {
    let (agent, region) = agent_and_region(4096);
    let one = segment(&region, 0, 4, 4);
    for segments in [Vec::new(), vec![one; SEGMENTS_MAX + 1]] {
        let count = segments.len();
        let error = Pages::new(&agent, segments, 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(
            error.context().contains(&format!("segments is {count}")),
            "{error}"
        );
    }
    assert!(Pages::new(&agent, vec![one], 0).is_err());
    let pages = Pages::new(&agent, vec![one], 7).unwrap();
    let error = pages.block(7).unwrap_err();
    assert!(error.context().contains("block number is 7"), "{error}");
}

/// Two halves of one page, which follow each other in every block; then in the first block only.
#[test]
fn segments_that_follow_each_other_in_every_block_are_one_piece() {
    let (agent, region) = agent_and_region(4096);
    let first = segment(&region, 16, 64, 24);
    let together = segment(&region, 40, 64, 40);
    let pages = Pages::new(&agent, vec![first, together], 8).unwrap();
    let block = pages.block(3).unwrap();
    let ranges: Vec<_> = block.ranges().collect();
    assert_eq!(ranges, [region.descriptor(16 + 3 * 64, 64)]);
    for apart in [segment(&region, 40, 80, 40), segment(&region, 40, 64, 41)] {
        let pages = Pages::new(&agent, vec![first, apart], 8).unwrap();
        assert_eq!(pages.block(3).unwrap().pieces(), 2);
    }
}

/// Two blocks cut at different places: the pieces cover both, in order, and each pair is equally long.
#[test]
fn pairs_are_cut_where_either_side_is() {
    let (agent, region) = agent_and_region(4096);
    let cut = |lens: &[u64], start: u64| {
        let segments = lens.iter().zip(0..).map(|(len, at)| {
            let offset = start + at * 200;
            segment(&region, offset, 1000, *len)
        });
        let pages = Pages::new(&agent, segments.collect(), 2).unwrap();
        pages.block(1).unwrap()
    };
    let (a, b) = (cut(&[10, 50, 40], 0), cut(&[60, 1, 39], 900));
    let mut pairs = Vec::new();
    pair(&a, &b, &mut pairs);
    let at = |offset: u64, len: u64| region.descriptor(1000 + offset, len);
    let expected = [
        (at(0, 10), at(900, 10)),
        (at(200, 50), at(910, 50)),
        (at(400, 1), at(1100, 1)),
        (at(401, 39), at(1300, 39)),
    ];
    assert_eq!(pairs, expected);
}

/// The pieces' bytes copied together and summed at once, against the sum over the pieces.
#[test]
fn the_checksum_is_of_the_pieces_one_after_the_other() {
    let (agent, region) = agent_and_region(4096);
    let bytes: Vec<u8> = (0..4096_u32).map(|at| ((at * 7) >> 2) as u8).collect();
    region.write_at(0, &bytes).unwrap();
    let segments = vec![
        segment(&region, 2000, 300, 17),
        segment(&region, 0, 500, 256),
        segment(&region, 3000, 64, 64),
    ];
    let block = Pages::new(&agent, segments, 4).unwrap().block(2).unwrap();
    let joined = [&bytes[2600..2617], &bytes[1000..1256], &bytes[3128..3192]].concat();
    assert_eq!(block.crc32c(&agent).unwrap(), crc32c(&joined));
    assert_eq!(block.bytes(), joined.len() as u64);
}

/// A wrong size, too many pieces, and pages of which one region has been deregistered.
#[test]
fn memory_that_cannot_be_used_names_its_block() {
    let (agent, region) = agent_and_region(4096);
    let good: BlockMemory = region.descriptor(0, 128).into();
    let wrong: BlockMemory = region.descriptor(0, 127).into();
    let segments = vec![segment(&region, 0, 256, 64), segment(&region, 128, 256, 64)];
    let scattered = Pages::new(&agent, segments, 4).unwrap().block(0).unwrap();
    let found = |memory: &[&BlockMemory], pieces_max| {
        check(&agent, memory.iter().copied(), 128, pieces_max)
    };
    found(&[&good, &scattered], 2).unwrap();
    let error = found(&[&good, &wrong], 2).unwrap_err();
    assert!(error.to_string().contains("block 1"), "{error}");
    let error = found(&[&good, &scattered], 1).unwrap_err();
    assert!(
        error.to_string().contains("pieces of memory is 2"),
        "{error}"
    );
    drop(region);
    let error = found(&[&scattered], 2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
