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
}
