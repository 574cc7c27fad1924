//! The kernels' own source, run by the processor ([`super::host`]), beside Rust that does the same another way; and that the PTX is
//! made of that source.

use std::ffi::c_void;

use kvcache_core::shape::TokensPerBlock;
use kvcache_core::shape::reshard::{BlockForm, PageOrder, Piece, Reshard};
use proptest::prelude::*;

use super::grid::RawGrid;
use super::host::launch;
use crate::convert::{Grid, PageHeads, bf16s_of_e4m3, e4m3s_of_bf16, of_bf16};

/// `struct piece`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawPiece([u64; 3]);

/// `struct crc_range`.
#[repr(C)]
struct RawRange([u64; 3]);

fn argument<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// Bytes at a multiple of 16.
struct Aligned(Vec<u128>);

impl Aligned {
    fn of(bytes: &[u8]) -> Self {
        let word = |part: &[u8]| {
            let mut word = [0; 16];
            word[..part.len()].copy_from_slice(part);
            u128::from_ne_bytes(word)
        };
        Self(bytes.chunks(16).map(word).collect())
    }

    fn address(&mut self) -> u64 {
        self.0.as_mut_ptr().expose_provenance() as u64
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    (0..bytes).map(next).collect()
}

fn copy(pieces: &[RawPiece], blocks: u32) {
    let mut list = pieces.to_vec();
    let (mut list, mut count) = (list.as_mut_ptr(), list.len() as u32);
    // SAFETY: a list and how many there are; the callers' pieces lie in memory of theirs.
    unsafe {
        launch(
            "kvf_copy_pieces",
            blocks,
            64,
            &mut [argument(&mut list), argument(&mut count)],
        );
    }
}

fn rearrange(target: &mut Aligned, source: &mut Aligned, grid: &Grid) {
    let mut raw = RawGrid::of(grid, target.address(), source.address());
    // SAFETY: the grid, which the caller has checked against both sides.
    unsafe { launch("kvf_rearrange", 2, 96, &mut [argument(&mut raw)]) };
}

fn to_e4m3(values: &[u16], length: usize) -> (Vec<u8>, Vec<f32>) {
    let groups = values.len() / length;
    let (mut numbers, mut scales) = (vec![0xee; values.len()], vec![9.0; groups]);
    let (mut to, mut of) = (numbers.as_mut_ptr(), scales.as_mut_ptr());
    let (mut from, mut groups, mut length) = (values.as_ptr(), groups as u32, length as u32);
    // SAFETY: as many numbers and values as groups times their length, and a scale for each group.
    unsafe {
        launch(
            "kvf_to_e4m3",
            2,
            64,
            &mut [
                argument(&mut to),
                argument(&mut of),
                argument(&mut from),
                argument(&mut groups),
                argument(&mut length),
            ],
        );
    }
    (numbers, scales)
}

fn from_e4m3(numbers: &[u8], scales: &[f32], length: usize) -> Vec<u16> {
    let mut values = vec![0xeeee_u16; numbers.len()];
    let (mut to, mut from, mut of) = (values.as_mut_ptr(), numbers.as_ptr(), scales.as_ptr());
    let (mut groups, mut length) = (scales.len() as u32, length as u32);
    // SAFETY: as in `to_e4m3`.
    unsafe {
        launch(
            "kvf_of_e4m3",
            2,
            64,
            &mut [
                argument(&mut to),
                argument(&mut from),
                argument(&mut of),
                argument(&mut groups),
                argument(&mut length),
            ],
        );
    }
    values
}

fn table() -> Vec<u32> {
    let mut table = vec![0_u32; 4 * 256];
    let mut start = table.as_mut_ptr();
    // SAFETY: room for four tables of 256.
    unsafe { launch("kvf_crc_table", 1, 256, &mut [argument(&mut start)]) };
    table
}

/// Checksums of ranges of one memory, none of them empty.
fn checksums(table: &[u32], memory: &mut Aligned, ranges: &[(u64, u64)]) -> Vec<u32> {
    let (start, mut first) = (memory.address(), 0);
    let raw = ranges.iter().map(|(offset, bytes)| {
        let range = RawRange([start + offset, *bytes, first]);
        first += bytes.div_ceil(1024);
        range
    });
    let raw: Vec<RawRange> = raw.collect();
    let mut sums = vec![0_u32; raw.len()];
    let (mut table, mut list) = (table.as_ptr(), raw.as_ptr());
    let (mut count, mut out) = (raw.len() as u32, sums.as_mut_ptr());
    // SAFETY: the table, a list and how many there are, as many sums, all of them zero, and how many segments there are.
    unsafe {
        launch(
            "kvf_crc_ranges",
            2,
            64,
            &mut [
                argument(&mut table),
                argument(&mut list),
                argument(&mut count),
                argument(&mut out),
                argument(&mut first),
            ],
        );
    }
    sums
}

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// As `scripts/cuda-kernels` writes it; that compares all of it, where the compiler can be had.
#[test]
fn the_ptx_is_made_of_this_source() {
    let ptx = include_str!("generated/kernels.ptx");
    let made_of = crc32c(include_bytes!("kernels.cu"));
    let line = format!("// kernels.cu: CRC-32C {made_of:08x}");
    assert!(
        ptx.lines().any(|said| said == line),
        "run scripts/cuda-kernels: the PTX does not say {line:?}"
    );
    // Nothing in it is contracted, approximated or flushed to zero.
    for word in ["fma.", "mad.rn", ".approx", ".ftz", ".full"] {
        assert!(!ptx.contains(word), "{word}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 48, ..ProptestConfig::default() })]

    /// Whatever the alignment of either side; what lies between the pieces stays.
    #[test]
    fn pieces_are_copied_and_nothing_else(
        lens in proptest::collection::vec(
            (prop_oneof![0_u64..20, 0_u64..3000], 0_u64..40, 0_u64..5000),
            0..12,
        ),
        seed: u32,
    ) {
        const SOURCE: usize = 8192;
        let mut source = Aligned::of(&pattern(seed, SOURCE));
        let room: u64 = lens.iter().map(|(len, gap, _)| len + gap).sum();
        let mut target = Aligned::of(&pattern(!seed, room as usize + 64));
        let (mut expected, from) = (target.bytes(), source.bytes());
        let (mut at, mut pieces) = (0, Vec::new());
        for (len, gap, offset) in lens {
            at += gap;
            pieces.push(RawPiece([target.address() + at, source.address() + offset, len]));
            let (to, offset, count) = (at as usize, offset as usize, len as usize);
            expected[to..to + count].copy_from_slice(&from[offset..offset + count]);
            at += len;
        }
        copy(&pieces, 1 + seed % 3);
        prop_assert!(target.bytes() == expected);
    }

    #[test]
    fn runs_go_where_the_reference_puts_them(
        counts in [1_u32..5, 1_u32..5, 1_u32..5],
        units in 1_u32..5,
        order in 0_usize..6,
        gaps in [0_u64..3, 0_u64..3, 0_u64..3],
        offsets in (0_u64..4, 0_u64..4),
        seed: u32,
    ) {
        const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let bytes = units * 16;
        // Axes lie within each other in some order, the target's without gaps.
        let steps = |order: [usize; 3], gaps: [u64; 3]| {
            let (mut steps, mut step) = ([0; 3], u64::from(bytes));
            for axis in order.into_iter().rev() {
                steps[axis] = step + gaps[axis] * 16;
                step = steps[axis] * u64::from(counts[axis]);
            }
            (steps, step)
        };
        let (source_steps, source_bytes) = steps([0, 1, 2], gaps);
        let (target_steps, target_bytes) = steps(ORDERS[order], [0; 3]);
        let grid = Grid {
            bytes,
            counts,
            target_offset: offsets.0 * 16,
            target_steps,
            source_offset: offsets.1 * 16,
            source_steps,
        };
        let from = pattern(seed, (source_bytes + offsets.1 * 16) as usize);
        let mut expected = pattern(!seed, (target_bytes + offsets.0 * 16) as usize + 48);
        let (mut source, mut target) = (Aligned::of(&from), Aligned::of(&expected));
        grid.apply(&mut expected, &from).unwrap();
        rearrange(&mut target, &mut source, &grid);
        prop_assert!(target.bytes() == expected);
    }

    /// Any bits are values, among them those that are no numbers.
    #[test]
    fn numbers_become_what_the_reference_makes_of_them(
        groups in 1_usize..5, length in 1_usize..100, seed: u32, exponents in 0_u16..4,
    ) {
        // Few exponents together, or all there are.
        let value = |bits: &[u8]| {
            let bits = u16::from_le_bytes([bits[0], bits[1]]);
            match exponents {
                0 => bits,
                near => bits & 0x83ff | 0x3c00 >> near,
            }
        };
        let bytes = pattern(seed, groups * length * 2);
        let values: Vec<u16> = bytes.chunks(2).map(value).collect();
        let (numbers, scales) = to_e4m3(&values, length);
        let (mut own_numbers, mut own_scales) = (vec![0; values.len()], vec![0.0; groups]);
        e4m3s_of_bf16(&mut own_numbers, &mut own_scales, &values, length).unwrap();
        prop_assert_eq!(&numbers, &own_numbers);
        let bits = |scales: &[f32]| scales.iter().map(|scale| scale.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&scales), bits(&own_scales));
        let mut own_values = vec![0; values.len()];
        bf16s_of_e4m3(&mut own_values, &numbers, &scales, length).unwrap();
        prop_assert_eq!(from_e4m3(&numbers, &scales, length), own_values);
    }

    #[test]
    fn checksums_are_those_of_the_tiers(
        ranges in proptest::collection::vec((0_u64..2000, 1_u64..6000), 1..8), seed: u32,
    ) {
        let content = pattern(seed, 8000);
        let mut memory = Aligned::of(&content);
        let expected = ranges.iter().map(|(offset, bytes)| {
            crc32c(&content[*offset as usize..(offset + bytes) as usize])
        });
        let expected: Vec<u32> = expected.collect();
        prop_assert_eq!(checksums(&table(), &mut memory, &ranges), expected);
    }
}

/// A scale of 1, because each group's largest is 448: each bfloat16 up to that, with both signs, becomes the nearest number.
#[test]
fn every_bfloat16_is_rounded_as_by_the_reference() {
    const LARGEST: u16 = 0x43e0;
    assert_eq!(of_bf16(LARGEST), 448.0);
    let mut values: Vec<u16> = (0..=LARGEST)
        .flat_map(|size| [size, size | 0x8000])
        .collect();
    values.resize(values.len().next_multiple_of(1000), 0);
    let grouped = values
        .chunks(1000)
        .flat_map(|group| [&[LARGEST], group].concat());
    let values: Vec<u16> = grouped.collect();
    let (numbers, scales) = to_e4m3(&values, 1001);
    assert!(scales.iter().all(|scale| *scale == 1.0));
    for (value, number) in values.iter().zip(&numbers) {
        assert_eq!(
            *number,
            crate::convert::e4m3_of(of_bf16(*value)),
            "{value:#x}"
        );
    }
    // And each number back, by scales of several sizes.
    let all: Vec<u8> = (0..9).flat_map(|_| 0..=255).collect();
    // Among them two that lead to ties, and two that lead to no number.
    let scales = [
        1.0,
        0.0,
        1.0e-40,
        0.3,
        7.0e35,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        f32::INFINITY,
        f32::NAN,
    ];
    let mut expected = vec![0; all.len()];
    bf16s_of_e4m3(&mut expected, &all, &scales, 256).unwrap();
    assert_eq!(from_e4m3(&all, &scales, 256), expected);
}

/// Golden: the check value of the polynomial; a block of 2 MiB, of many segments.
#[test]
fn checksums_of_known_bytes() {
    let table = table();
    let mut digits = Aligned::of(b"123456789");
    assert_eq!(checksums(&table, &mut digits, &[(0, 9)]), [0xe306_9283]);
    let mut zeros = Aligned::of(&[0; 32]);
    assert_eq!(checksums(&table, &mut zeros, &[(0, 32)]), [0x8a91_36aa]);
    let content = pattern(3, 2 << 20);
    let mut block = Aligned::of(&content);
    let sums = checksums(&table, &mut block, &[(0, 2 << 20), (77, 1 << 20)]);
    assert_eq!(
        sums,
        [crc32c(&content), crc32c(&content[77..77 + (1 << 20)])]
    );
}

/// From four ranks to two and to eight, by the pieces that the core lists.
#[test]
fn heads_go_to_other_ranks() {
    const SOURCES: u32 = 4;
    for (order, targets) in [
        (PageOrder::HeadsFirst, 2),
        (PageOrder::TokensFirst, 2),
        (PageOrder::HeadsFirst, 8),
        (PageOrder::TokensFirst, 8),
    ] {
        let form = BlockForm {
            layers: 2,
            tokens: TokensPerBlock::try_from(4).unwrap(),
            heads: 8,
            head_bytes: 32,
            order,
        };
        let reshard = Reshard::new(form, SOURCES, targets).unwrap();
        let rank = |rank| Aligned::of(&pattern(rank + 1, reshard.source_bytes() as usize));
        let mut sources: Vec<Aligned> = (0..SOURCES).map(rank).collect();
        for target_rank in 0..targets {
            let mut target = Aligned::of(&vec![0; reshard.target_bytes() as usize]);
            let mut expected = target.bytes();
            let pieces = reshard.pieces(target_rank).unwrap();
            let raw = |piece: &Piece| {
                let source = &mut sources[piece.source_rank as usize];
                let (to, from) = (piece.target_offset as usize, piece.source_offset as usize);
                let len = piece.len as usize;
                expected[to..to + len].copy_from_slice(&source.bytes()[from..from + len]);
                RawPiece([
                    target.address() + piece.target_offset,
                    source.address() + piece.source_offset,
                    piece.len,
                ])
            };
            let raw: Vec<RawPiece> = pieces.iter().map(raw).collect();
            copy(&raw, 2);
            assert!(
                target.bytes() == expected,
                "{order:?} {targets} {target_rank}"
            );
        }
    }
}

/// From two ranks to one, and to the other order of the page at the same time: each head of each token is labelled.
#[test]
fn heads_change_rank_and_order_at_once() {
    let (pages, tokens, held) = (3_u32, 5_u32, 4_u32);
    let label = |page: u32, head: u32, token: u32| [(page * 64 + head * 8 + token) as u8; 16];
    let mut target = Aligned::of(&vec![0; (pages * tokens * 2 * held * 16) as usize]);
    for rank in 0..2 {
        let mut content = Vec::new();
        for page in 0..pages {
            for head in 0..held {
                content
                    .extend((0..tokens).flat_map(|token| label(page, rank * held + head, token)));
            }
        }
        let to = PageHeads {
            order: PageOrder::TokensFirst,
            held: 2 * held,
            first: rank * held,
        };
        let from = PageHeads {
            order: PageOrder::HeadsFirst,
            held,
            first: 0,
        };
        let grid = Grid::of_heads(pages, tokens, 16, held, to, from).unwrap();
        grid.check(target.bytes().len() as u64, content.len() as u64)
            .unwrap();
        rearrange(&mut target, &mut Aligned::of(&content), &grid);
    }
    let mut expected = Vec::new();
    for page in 0..pages {
        for token in 0..tokens {
            expected.extend((0..2 * held).flat_map(|head| label(page, head, token)));
        }
    }
    assert!(target.bytes() == expected);
}
