//! The checksum that travels with a block's bytes, over bytes that this process holds privately.
//!
//! Bytes in registered memory are summed by the transfer crate, which reads them without ever making
//! a reference to memory that another process may write.

use crc_fast::CrcAlgorithm;

/// CRC-32C (Castagnoli, reflected; the one of iSCSI and of the block checksums) of `bytes`.
#[must_use]
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    // The crate answers every width in 64 bits; a 32-bit sum is in the low half.
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The polynomial of CRC-32C, its lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// 1 as such a polynomial.
const ONE: u32 = 1 << 31;

/// What appending a fixed number of bytes does to the CRC-32C of what is before them.
///
/// A sum is a remainder modulo the polynomial; `n` bytes behind it multiply it by x^8n. That factor is
/// worked out once, so that sums of many pieces of equal length are joined quickly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shift(u32);

impl Shift {
    /// For `bytes` bytes.
    pub(crate) fn by(bytes: u64) -> Self {
        let (mut factor, mut power) = (ONE, ONE >> 8);
        let mut left = bytes;
        while left > 0 {
            if left & 1 == 1 {
                factor = product(factor, power);
            }
            power = product(power, power);
            left >>= 1;
        }
        Self(factor)
    }

    /// The sum of some bytes followed by as many as this is for, from the sums of both.
    pub(crate) fn append(self, before: u32, bytes: u32) -> u32 {
        product(self.0, before) ^ bytes
    }
}

/// The product of two polynomials, modulo that of CRC-32C.
fn product(first: u32, mut second: u32) -> u32 {
    let mut product = 0;
    for bit in (0..u32::BITS).rev() {
        // Both branches are taken about as often: arithmetic instead of jumps.
        product ^= second & (first >> bit & 1).wrapping_neg();
        second = second >> 1 ^ POLYNOMIAL & (second & 1).wrapping_neg();
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compared with the check value and the 32-byte vectors of RFC 3720, appendix B.4.
    #[test]
    fn crc32c_equals_the_published_vectors() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    /// Every cut of some bytes into two, nothing and all of them included, against the sum of the whole.
    #[test]
    fn sums_of_pieces_join_to_the_sum_of_the_whole() {
        let bytes: Vec<u8> = (0..600_u32).map(|at| ((at * at) >> 3) as u8).collect();
        for cut in 0..=bytes.len() {
            let (before, after) = bytes.split_at(cut);
            let joined = Shift::by(after.len() as u64).append(crc32c(before), crc32c(after));
            assert_eq!(joined, crc32c(&bytes), "cut at {cut}");
        }
    }

    /// Against the crate that sums, for a length that no buffer has.
    #[test]
    fn a_shift_by_terabytes_equals_the_crates() {
        let bytes = (5 << 40) + 12_345;
        let theirs =
            crc_fast::checksum_combine(CrcAlgorithm::Crc32Iscsi, 0x1234_5678, 0x9abc_def0, bytes);
        let ours = Shift::by(bytes).append(0x1234_5678, 0x9abc_def0);
        assert_eq!(u64::from(ours), theirs);
    }
}
