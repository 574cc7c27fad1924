//! Numbers beside a table of all there are, grids beside labelled bytes.

use kvcache_core::shape::reshard::PageOrder;
use proptest::prelude::*;

use super::*;

/// The definition: a sign, four bits of exponent with a bias of 7, three of mantissa; all ones are no number.
fn defined(number: u8) -> f64 {
    let (sign, exponent, mantissa) = (number >> 7, number >> 3 & 15, number & 7);
    let size = match exponent {
        0 => f64::from(mantissa) / 8.0 * f64::powi(2.0, -6),
        exponent => (1.0 + f64::from(mantissa) / 8.0) * f64::powi(2.0, i32::from(exponent) - 7),
    };
    if sign == 0 { size } else { -size }
}

fn is_number(number: u8) -> bool {
    number & 0x7f != 0x7f
}

#[test]
fn all_256_numbers_are_what_their_definition_says() {
    for number in 0..=255 {
        match is_number(number) {
            true => {
                assert_eq!(f64::from(of_e4m3(number)), defined(number), "{number:#x}");
                assert_eq!(e4m3_of(of_e4m3(number)), number, "{number:#x}");
            }
            false => {
                assert!(of_e4m3(number).is_nan());
                assert_eq!(e4m3_of(of_e4m3(number)), 0x7f);
            }
        }
    }
    for (value, number) in [
        (1.0, 0x38),
        (-1.0, 0xb8),
        (448.0, 0x7e),
        (-0.0, 0x80),
        (0.001_953_125, 0x01),
        // Ties: to the even one, up and down.
        (1.0625, 0x38),
        (1.1875, 0x3a),
        (0.000_976_562_5, 0x00),
        (0.002_929_687_5, 0x02),
        (f32::INFINITY, 0x7e),
        (f32::NEG_INFINITY, 0xfe),
        (f32::MIN_POSITIVE, 0x00),
    ] {
        assert_eq!(e4m3_of(value), number, "{value}");
    }
}

/// The nearest of the table, of two as near the even one.
fn nearest(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    if value.abs() >= 448.0 {
        return sign | 0x7e;
    }
    let distance = |number: &u8| (defined(*number) - f64::from(value).abs()).abs();
    let near = (0..=0x7e_u8).min_by(|a, b| {
        let order = distance(a).total_cmp(&distance(b));
        order.then((a & 1).cmp(&(b & 1)))
    });
    sign | near.unwrap()
}

/// Every bfloat16, and the floats at, just below and just above the middle between any two numbers.
#[test]
fn rounding_is_to_the_nearest_of_the_table() {
    for bits in 0..=u16::MAX {
        let value = of_bf16(bits);
        let expected = if value.is_nan() { 0x7f } else { nearest(value) };
        assert_eq!(e4m3_of(value), expected, "{value}");
        let same = if value.is_nan() { 0x7fc0 } else { bits };
        assert_eq!(bf16_of(value), same, "{value}");
    }
    for number in 0..0x7e_u8 {
        let middle = ((defined(number) + defined(number + 1)) / 2.0) as f32;
        for value in [middle.next_down(), middle, middle.next_up()] {
            assert_eq!(e4m3_of(value), nearest(value), "{value}");
            assert_eq!(e4m3_of(-value), nearest(-value), "-{value}");
        }
    }
}

#[test]
fn groups_have_scales_of_their_own() {
    // 896, 2 and -0.5, then zeros, then something beyond numbers.
    let values = [0x4460, 0x4000, 0xbf00, 0, 0x8000, 0, 0x7f80, 0x3f80, 0x3f80];
    let (mut numbers, mut scales) = ([0xee; 9], [9.0; 3]);
    e4m3s_of_bf16(&mut numbers, &mut scales, &values, 3).unwrap();
    assert_eq!(scales, [2.0, 0.0, f32::INFINITY]);
    assert_eq!(numbers, [0x7e, 0x38, 0xa8, 0, 0, 0, 0x7f, 0, 0]);
    let mut back = [1; 9];
    bf16s_of_e4m3(&mut back, &numbers, &scales, 3).unwrap();
    assert_eq!(back[..6], [0x4460, 0x4000, 0xbf00, 0, 0, 0]);
    assert_eq!(back[6..], [0x7fc0; 3], "none is kept");
    for (numbers, scales, length) in [(9, 3, 0), (9, 3, 2), (8, 3, 3), (9, 2, 3)] {
        let (mut numbers, mut scales) = (vec![0; numbers], vec![0.0; scales]);
        e4m3s_of_bf16(&mut numbers, &mut scales, &values, length).unwrap_err();
        bf16s_of_e4m3(&mut back, &numbers, &scales, length).unwrap_err();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// The error is half a step at most: a sixteenth of the value, or half the least step of its group.
    #[test]
    fn what_comes_back_is_near(values in proptest::collection::vec(-3e38_f32..3e38, 1..64)) {
        let bits: Vec<u16> = values.iter().map(|value| bf16_of(*value)).collect();
        let (mut numbers, mut scales) = (vec![0; bits.len()], [0.0]);
        e4m3s_of_bf16(&mut numbers, &mut scales, &bits, bits.len()).unwrap();
        let mut back = vec![0; bits.len()];
        bf16s_of_e4m3(&mut back, &numbers, &scales, bits.len()).unwrap();
        for (was, is) in bits.iter().zip(&back) {
            let (was, is) = (f64::from(of_bf16(*was)), f64::from(of_bf16(*is)));
            let step = (was.abs() / 16.0).max(f64::from(scales[0]) / 1024.0);
            // Each of the three roundings to 8 bits or more adds a little.
            prop_assert!((was - is).abs() <= step * 1.07, "{was} became {is}");
        }
    }

    /// Each byte is labelled with its page, head, token and place: it is where its labels say, and back where it was.
    #[test]
    fn heads_and_tokens_change_places(
        pages in 1_u32..4, heads in 1_u32..6, tokens in 1_u32..6, units in 1_u32..4,
    ) {
        let bytes = units * 16;
        let label = |page: u32, head: u32, token: u32, at: u32| {
            (((page * heads + head) * tokens + token) * 13 + at) as u8
        };
        let (mut hnd, mut nhd) = (Vec::new(), Vec::new());
        for page in 0..pages {
            for head in 0..heads {
                for token in 0..tokens {
                    hnd.extend((0..bytes).map(|at| label(page, head, token, at)));
                }
            }
            for token in 0..tokens {
                for head in 0..heads {
                    nhd.extend((0..bytes).map(|at| label(page, head, token, at)));
                }
            }
        }
        let mut there = vec![0; hnd.len()];
        let side = |order| PageHeads { order, held: heads, first: 0 };
        let (hnd_side, nhd_side) = (side(PageOrder::HeadsFirst), side(PageOrder::TokensFirst));
        let forth = Grid::of_heads(pages, tokens, bytes, heads, nhd_side, hnd_side).unwrap();
        forth.apply(&mut there, &hnd).unwrap();
        prop_assert!(there == nhd);
        prop_assert_eq!(forth.moved_bytes(), hnd.len() as u64);
        let mut back = vec![0; hnd.len()];
        let grid = Grid::of_heads(pages, tokens, bytes, heads, hnd_side, nhd_side).unwrap();
        grid.apply(&mut back, &nhd).unwrap();
        prop_assert!(back == hnd);
    }
}

#[test]
fn grids_that_reach_too_far_are_refused() {
    let side = |order| PageHeads {
        order,
        held: 4,
        first: 0,
    };
    let (hnd, nhd) = (side(PageOrder::HeadsFirst), side(PageOrder::TokensFirst));
    let grid = Grid::of_heads(2, 3, 32, 4, nhd, hnd).unwrap();
    Grid::of_heads(2, 3, 32, 5, nhd, hnd).unwrap_err();
    Grid::of_heads(2, 3, 32, 4, nhd, PageHeads { first: 1, ..hnd }).unwrap_err();
    let far = PageHeads {
        first: u32::MAX,
        ..hnd
    };
    Grid::of_heads(2, 3, 32, 4, far, hnd).unwrap_err();
    let bytes = 2 * 3 * 4 * 32;
    grid.check(bytes, bytes).unwrap();
    let changes: [fn(&mut Grid); 8] = [
        |grid| grid.counts[1] = 0,
        |grid| grid.bytes = 0,
        |grid| grid.bytes = 24,
        |grid| grid.target_offset = 16,
        |grid| grid.source_steps[0] += 8,
        |grid| grid.source_steps[2] += 16,
        |grid| grid.target_steps[1] = u64::MAX - 15,
        |grid| grid.counts[0] = u32::MAX,
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut wrong = grid;
        change(&mut wrong);
        assert!(wrong.check(bytes, bytes).is_err(), "{number}");
    }
    grid.check(bytes - 1, bytes).unwrap_err();
    grid.check(bytes, bytes - 1).unwrap_err();
}
