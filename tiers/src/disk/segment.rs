//! The layout of a segment file: a header page, then equal slots of one header page and one block.

use kvcache_core::{Error, Result};

use crate::checksum::crc32c;
use crate::record::{Expected, RECORD_HEADER_BYTES, Reader, RecordFault, Writer};

/// Everything in a segment begins at a multiple of this many bytes, as direct I/O needs it.
pub const PAGE_BYTES: u64 = 4096;

/// The version of the segment header this build writes, and the only one it reads.
pub(super) const SEGMENT_VERSION: u16 = 1;

/// The largest block accepted, in bytes; far above any engine's, and small enough that no sum of
/// offsets overflows.
pub const BLOCK_BYTES_MAX: u64 = 1 << 32;

const MAGIC: [u8; 8] = *b"KVFSEGMT";
const CRC_AT: usize = RECORD_HEADER_BYTES - 4;

/// Where the records of a segment lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentLayout {
    block_bytes: u64,
    slots: u32,
}

impl SegmentLayout {
    /// The layout of segments of at most `segment_bytes` for blocks of `block_bytes`.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] when not even one block fits, or a block is of no or an
    /// absurd size.
    pub fn new(segment_bytes: u64, block_bytes: u64) -> Result<Self> {
        if block_bytes == 0 || block_bytes > BLOCK_BYTES_MAX {
            return Err(Error::invalid(
                "block_bytes",
                block_bytes,
                1..=BLOCK_BYTES_MAX,
            ));
        }
        let slots = segment_bytes.saturating_sub(PAGE_BYTES) / stride(block_bytes);
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        if slots == 0 {
            let smallest = PAGE_BYTES + stride(block_bytes);
            return Err(Error::invalid("segment_bytes", segment_bytes, smallest..));
        }
        Ok(Self { block_bytes, slots })
    }

    /// How many blocks a segment holds.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Bytes of a whole segment file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        PAGE_BYTES + u64::from(self.slots) * stride(self.block_bytes)
    }

    /// Where the header page of the record at `position` begins.
    ///
    /// # Panics
    /// If a segment has no such position.
    #[must_use]
    pub fn record_offset(&self, position: u32) -> u64 {
        assert!(
            position < self.slots,
            "position {position} of {} slots",
            self.slots
        );
        PAGE_BYTES + u64::from(position) * stride(self.block_bytes)
    }

    /// Where the block's bytes of the record at `position` begin.
    ///
    /// # Panics
    /// If a segment has no such position.
    #[must_use]
    pub fn payload_offset(&self, position: u32) -> u64 {
        self.record_offset(position) + PAGE_BYTES
    }
}

fn stride(block_bytes: u64) -> u64 {
    PAGE_BYTES + block_bytes.next_multiple_of(PAGE_BYTES)
}

/// The name of a segment's file in the tier's directory.
#[must_use]
pub fn file_name(segment: u32) -> String {
    format!("segment-{segment:08}.kvf")
}

/// The segment that a file of this name holds; none for any other file.
#[must_use]
pub fn segment_of_file_name(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("segment-")?.strip_suffix(".kvf")?;
    let segment = digits.parse().ok()?;
    // Only the one spelling that `file_name` has: `+7` or `007` are someone else's files.
    (file_name(segment) == name).then_some(segment)
}

/// The first page of a segment file, less its padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The model whose blocks these are.
    pub model_identity: [u8; 32],
    /// The number in the file's name.
    pub segment: u32,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Records the file has room for.
    pub slots: u32,
}

impl SegmentHeader {
    /// The header as bytes, ending in the checksum of all that is before.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        let mut writer = Writer {
            bytes: &mut bytes,
            at: 0,
        };
        writer.put(&MAGIC);
        writer.put(&SEGMENT_VERSION.to_le_bytes());
        writer.put(&(RECORD_HEADER_BYTES as u16).to_le_bytes());
        writer.put(&self.segment.to_le_bytes());
        writer.put(&self.model_identity);
        writer.put(&self.block_bytes.to_le_bytes());
        writer.put(&self.slots.to_le_bytes());
        let crc = crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header at the start of a segment file.
    ///
    /// # Errors
    /// The first fault found, like [`crate::record::RecordHeader::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordFault> {
        let Some(bytes) = bytes.first_chunk::<RECORD_HEADER_BYTES>() else {
            let (found, needed) = (bytes.len() as u64, RECORD_HEADER_BYTES as u64);
            return Err(RecordFault::Truncated { found, needed });
        };
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(RecordFault::Vacant);
        }
        let mut reader = Reader { bytes, at: 0 };
        if reader.take::<8>() != MAGIC {
            return Err(RecordFault::Magic);
        }
        let version = u16::from_le_bytes(reader.take());
        if version != SEGMENT_VERSION {
            return Err(RecordFault::Version { found: version });
        }
        let mut crc = Reader { bytes, at: CRC_AT };
        if u32::from_le_bytes(crc.take()) != crc32c(&bytes[..CRC_AT]) {
            return Err(RecordFault::HeaderChecksum);
        }
        let header_bytes = u16::from_le_bytes(reader.take());
        if usize::from(header_bytes) != RECORD_HEADER_BYTES {
            let found = header_bytes.into();
            return Err(RecordFault::Unknown {
                field: "header length",
                found,
            });
        }
        Ok(Self {
            segment: u32::from_le_bytes(reader.take()),
            model_identity: reader.take(),
            block_bytes: u64::from_le_bytes(reader.take()),
            slots: u32::from_le_bytes(reader.take()),
        })
    }

    /// Checks that the file is this cache's: its model and its block size.
    pub(crate) fn check(&self, expected: &Expected) -> Result<(), RecordFault> {
        if self.model_identity != expected.model_identity {
            let mut found = [0; 8];
            found.copy_from_slice(&self.model_identity[..8]);
            return Err(RecordFault::ForeignModel { found });
        }
        if self.block_bytes != expected.block_bytes {
            let (found, expected) = (self.block_bytes, expected.block_bytes);
            return Err(RecordFault::Length { found, expected });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
