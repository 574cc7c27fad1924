//! 8-bit numbers: E4M3 without infinities (OCP), with a scale for each group.

use kvcache_core::{Error, Result};

/// The largest number.
const E4M3_MAX: f32 = 448.0;

/// What stands for no number. Always the same, as processors and devices make different ones.
const E4M3_NAN: u8 = 0x7f;
const BF16_NAN: u16 = 0x7fc0;
const F32_NAN: u32 = 0x7fc0_0000;

/// The least exponent; below it all steps are as long as there.
const EXPONENT_MIN: i32 = -6;
const EXPONENT_BIAS: i32 = 7;
const MANTISSA_BITS: i32 = 3;

/// The nearest E4M3 number, ties to even. What is too large, an infinity included, becomes ±448.
#[must_use]
pub fn e4m3_of(value: f32) -> u8 {
    if value.is_nan() {
        return E4M3_NAN;
    }
    let sign = u8::from(value.is_sign_negative()) << 7;
    let size = f64::from(value).abs();
    if size >= f64::from(E4M3_MAX) {
        return sign | 0x7e;
    }
    let exponent = ((size.to_bits() >> 52) as i32 - 1023).max(EXPONENT_MIN);
    // Both exact: a number of 24 bits, divided by a power of two.
    let step = f64::from(exponent - MANTISSA_BITS).exp2();
    let steps = (size / step).round_ties_even() as i32;
    // 8 to 16 steps from the power of two below, or fewer below the least one: a carry leads to the next exponent.
    sign | ((exponent + EXPONENT_BIAS) * 8 + steps - 8) as u8
}

/// The value of an E4M3 number.
#[must_use]
pub fn of_e4m3(number: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(number >> 3 & 0xf), number & 7);
    let size = match (exponent, mantissa) {
        (15, 7) => return f32::from_bits(F32_NAN),
        (0, mantissa) => f32::from(mantissa) * (EXPONENT_MIN as f32 - 3.0).exp2(),
        (exponent, mantissa) => {
            f32::from(8 + mantissa) * ((exponent - EXPONENT_BIAS - MANTISSA_BITS) as f32).exp2()
        }
    };
    if number & 0x80 == 0 { size } else { -size }
}

/// The nearest bfloat16, as its bits, ties to even.
#[must_use]
pub fn bf16_of(value: f32) -> u16 {
    if value.is_nan() {
        return BF16_NAN;
    }
    let (high, low) = ((value.to_bits() >> 16) as u16, value.to_bits() as u16);
    // The next one up, in size, may be an infinity.
    let up = low > 0x8000 || (low == 0x8000 && high & 1 == 1);
    if up { high + 1 } else { high }
}

/// The value of a bfloat16, by its bits.
#[must_use]
pub fn of_bf16(number: u16) -> f32 {
    f32::from_bits(u32::from(number) << 16)
}

fn check(count: usize, numbers: usize, scales: usize, length: usize) -> Result<()> {
    if length == 0 || !count.is_multiple_of(length) {
        return Err(Error::invalid(
            "numbers",
            count,
            format!("a multiple of the group's {length}"),
        ));
    }
    let others = [
        ("8-bit numbers", numbers, count),
        ("scales", scales, count / length),
    ];
    for (name, have, need) in others {
        if have != need {
            return Err(Error::invalid(name, have, need));
        }
    }
    Ok(())
}

/// Turns groups of `length` bfloat16, by their bits, into E4M3 numbers with a scale for each group: a value is its number times the
/// group's scale, which is the group's largest size over 448.
///
/// A group of zeros has the scale 0. A group with an infinity or with something that is no number keeps none of its numbers.
///
/// # Errors
/// [`ErrorKind::Invalid`](kvcache_core::ErrorKind::Invalid) unless there are whole groups, as many numbers, and a scale for each group.
pub fn e4m3s_of_bf16(
    numbers: &mut [u8],
    scales: &mut [f32],
    values: &[u16],
    length: usize,
) -> Result<()> {
    check(values.len(), numbers.len(), scales.len(), length)?;
    let targets = numbers.chunks_exact_mut(length).zip(scales);
    for ((numbers, scale), values) in targets.zip(values.chunks_exact(length)) {
        // Sizes of bfloat16 are in the order of their bits, what is no number above all.
        let largest = values.iter().map(|value| value & 0x7fff).max().unwrap_or(0);
        *scale = match of_bf16(largest) {
            largest if largest.is_nan() => f32::from_bits(F32_NAN),
            largest => largest / E4M3_MAX,
        };
        for (number, value) in numbers.iter_mut().zip(values) {
            *number = match largest {
                0 => 0,
                _ => e4m3_of(of_bf16(*value) / *scale),
            };
        }
    }
    Ok(())
}

/// The way back: the nearest bfloat16 of each number times its group's scale.
///
/// # Errors
/// As [`e4m3s_of_bf16`].
pub fn bf16s_of_e4m3(
    values: &mut [u16],
    numbers: &[u8],
    scales: &[f32],
    length: usize,
) -> Result<()> {
    check(values.len(), numbers.len(), scales.len(), length)?;
    let sources = numbers.chunks_exact(length).zip(scales);
    for (values, (numbers, scale)) in values.chunks_exact_mut(length).zip(sources) {
        for (value, number) in values.iter_mut().zip(numbers) {
            *value = bf16_of(of_e4m3(*number) * scale);
        }
    }
    Ok(())
}
