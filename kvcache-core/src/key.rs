//! The two identities of a block, and the checksum that travels with its bytes.
//!
//! A collision of [`IndexKey`]s costs a wrong route; bytes are only ever found by [`BlockKey`].

use std::fmt;

/// Names stored bytes: 256 cryptographic bits over tokens, parents and everything else that shapes the bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey(pub [u8; 32]);

impl BlockKey {
    /// The key as 64 lower-case hexadecimal digits, as in object names.
    #[must_use]
    pub fn to_hex(&self) -> String {
        use fmt::Write;
        self.0
            .iter()
            .fold(String::with_capacity(64), |mut text, byte| {
                // Writing to a `String` cannot fail.
                let _ = write!(text, "{byte:02x}");
                text
            })
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..8] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("…")
    }
}

/// Places a block in the global index: a fast chained hash of the tokens up to its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IndexKey(pub u64);

/// A block's hash as an engine announced it: opaque, and only comparable within one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineHash(pub u64);

impl EngineHash {
    /// The last eight bytes, big-endian, shorter digests padded on the left: as vLLM shortens them itself.
    #[must_use]
    pub fn from_digest(digest: &[u8]) -> Self {
        let tail = &digest[digest.len().saturating_sub(8)..];
        Self(
            tail.iter()
                .fold(0, |value, byte| (value << 8) | u64::from(*byte)),
        )
    }
}

/// How a checksum is computed; the number is part of every wire and disk format.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChecksumAlgorithm {
    /// CRC-32C (Castagnoli), in the low 32 bits.
    Crc32c = 1,
}

impl ChecksumAlgorithm {
    /// The algorithm with this number, if this version knows it.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Crc32c),
            _ => None,
        }
    }
}

/// A checksum over a block's bytes, in the order of its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checksum {
    /// How it was computed.
    pub algorithm: ChecksumAlgorithm,
    /// The value, in the low bits.
    pub value: u64,
}

impl Checksum {
    /// A CRC-32C.
    #[must_use]
    pub const fn crc32c(value: u32) -> Self {
        Self {
            algorithm: ChecksumAlgorithm::Crc32c,
            value: value as u64,
        }
    }
}

/// What a node is told of a block when its bytes are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInfo {
    /// Names the bytes.
    pub key: BlockKey,
    /// The block before it in its sequence; none for the first.
    pub parent: Option<BlockKey>,
    /// Its place in the global index, so that a node can announce it without keeping tokens.
    pub index_key: IndexKey,
    /// Its parent's place in the global index.
    pub index_parent: Option<IndexKey>,
}
