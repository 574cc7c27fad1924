//! The header that makes stored bytes describe themselves: on disk before every block, and at the
//! start of every object. `docs/disk-format.md` has the table.

use std::fmt;

use kvcache_core::{BlockInfo, BlockKey, Checksum, ChecksumAlgorithm, IndexKey};

use crate::checksum::crc32c;

/// The bytes of an encoded header, its own checksum included.
pub const RECORD_HEADER_BYTES: usize = 256;

/// The version this build writes, and the only one it reads.
pub const RECORD_VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"KVFBLOCK";
const FLAG_PARENT: u32 = 1;
const FLAG_INDEX_PARENT: u32 = 2;
const FLAGS_KNOWN: u32 = FLAG_PARENT | FLAG_INDEX_PARENT;
/// The payload is the block's bytes as they are; other numbers are left for encodings to come.
const ENCODING_RAW: u8 = 0;
const CRC_AT: usize = RECORD_HEADER_BYTES - 4;

/// What a stored block says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The model whose bytes these are.
    pub model_identity: [u8; 32],
    /// The block and its parent, by data key and by index key.
    pub info: BlockInfo,
    /// Bytes of the payload that follows.
    pub payload_bytes: u64,
    /// The checksum of the payload.
    pub checksum: Checksum,
}

/// Why bytes are not a record that may be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordFault {
    /// Nothing was ever written here: all zeros. Not damage.
    Vacant,
    /// The bytes end before the record does.
    Truncated {
        /// Bytes that are there.
        found: u64,
        /// Bytes a whole record needs.
        needed: u64,
    },
    /// It does not begin like a record.
    Magic,
    /// Written by another version of the format.
    Version {
        /// The version named in the bytes.
        found: u16,
    },
    /// The header does not match its own checksum: torn or damaged.
    HeaderChecksum,
    /// A checksum algorithm, payload encoding or flag that this version does not know.
    Unknown {
        /// The header field.
        field: &'static str,
        /// Its number.
        found: u64,
    },
    /// The bytes of another model.
    ForeignModel {
        /// The first eight bytes of its identity.
        found: [u8; 8],
    },
    /// A block of another size.
    Length {
        /// Bytes named in the header.
        found: u64,
        /// Bytes of a block here.
        expected: u64,
    },
    /// Another block than the one asked for.
    Key {
        /// The key in the header.
        found: BlockKey,
    },
}

impl fmt::Display for RecordFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vacant => f.write_str("nothing was written here"),
            Self::Truncated { found, needed } => {
                write!(f, "truncated: {found} of {needed} bytes are there")
            }
            Self::Magic => f.write_str("does not begin like a record"),
            Self::Version { found } => {
                write!(
                    f,
                    "written in version {found}, this build reads version {RECORD_VERSION}"
                )
            }
            Self::HeaderChecksum => f.write_str("header does not match its checksum"),
            Self::Unknown { field, found } => write!(f, "{field} {found} is not known"),
            Self::ForeignModel { found } => {
                write!(
                    f,
                    "belongs to another model, identity {:016x}…",
                    u64::from_be_bytes(*found)
                )
            }
            Self::Length { found, expected } => {
                write!(f, "payload of {found} bytes, expected {expected}")
            }
            Self::Key { found } => write!(f, "holds block {found:?}, not the one asked for"),
        }
    }
}

/// What a record must match to be served here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    /// The model of this cache.
    pub(crate) model_identity: [u8; 32],
    /// Bytes of every block of this cache.
    pub(crate) block_bytes: u64,
}

impl RecordHeader {
    /// The header as bytes, ending in the checksum of all that is before.
    #[must_use]
    pub fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        let mut writer = Writer {
            bytes: &mut bytes,
            at: 0,
        };
        let mut flags = 0;
        if self.info.parent.is_some() {
            flags |= FLAG_PARENT;
        }
        if self.info.index_parent.is_some() {
            flags |= FLAG_INDEX_PARENT;
        }
        writer.put(&MAGIC);
        writer.put(&RECORD_VERSION.to_le_bytes());
        writer.put(&(RECORD_HEADER_BYTES as u16).to_le_bytes());
        writer.put(&u32::to_le_bytes(flags));
        writer.put(&self.model_identity);
        writer.put(&self.info.key.0);
        writer.put(&self.info.parent.map_or([0; 32], |key| key.0));
        writer.put(&self.info.index_key.0.to_le_bytes());
        writer.put(&self.info.index_parent.map_or(0, |key| key.0).to_le_bytes());
        writer.put(&self.payload_bytes.to_le_bytes());
        writer.put(&[
            self.checksum.algorithm as u8,
            ENCODING_RAW,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
        writer.put(&self.checksum.value.to_le_bytes());
        let crc = crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header at the start of `bytes` and checks everything that it says about itself.
    ///
    /// # Errors
    /// The first fault found; magic and version are looked at before the checksum, because another
    /// version may keep its checksum elsewhere.
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
        if version != RECORD_VERSION {
            return Err(RecordFault::Version { found: version });
        }
        let mut crc = Reader { bytes, at: CRC_AT };
        if u32::from_le_bytes(crc.take()) != crc32c(&bytes[..CRC_AT]) {
            return Err(RecordFault::HeaderChecksum);
        }
        Self::decode_fields(&mut reader)
    }

    fn decode_fields(reader: &mut Reader<'_>) -> Result<Self, RecordFault> {
        let header_bytes = u16::from_le_bytes(reader.take());
        if usize::from(header_bytes) != RECORD_HEADER_BYTES {
            return Err(unknown("header length", header_bytes.into()));
        }
        let flags = u32::from_le_bytes(reader.take());
        if flags & !FLAGS_KNOWN != 0 {
            return Err(unknown("flags", flags.into()));
        }
        let model_identity = reader.take();
        let key = BlockKey(reader.take());
        let parent = BlockKey(reader.take());
        let index_key = IndexKey(u64::from_le_bytes(reader.take()));
        let index_parent = IndexKey(u64::from_le_bytes(reader.take()));
        let payload_bytes = u64::from_le_bytes(reader.take());
        let [algorithm, encoding, ..] = reader.take::<8>();
        let algorithm = ChecksumAlgorithm::from_number(algorithm)
            .ok_or(unknown("checksum algorithm", algorithm.into()))?;
        if encoding != ENCODING_RAW {
            return Err(unknown("payload encoding", encoding.into()));
        }
        Ok(Self {
            model_identity,
            info: BlockInfo {
                key,
                parent: (flags & FLAG_PARENT != 0).then_some(parent),
                index_key,
                index_parent: (flags & FLAG_INDEX_PARENT != 0).then_some(index_parent),
            },
            payload_bytes,
            checksum: Checksum {
                algorithm,
                value: u64::from_le_bytes(reader.take()),
            },
        })
    }

    /// Checks that the record is of this cache's model and block size.
    pub(crate) fn check(&self, expected: &Expected) -> Result<(), RecordFault> {
        if self.model_identity != expected.model_identity {
            let mut found = [0; 8];
            found.copy_from_slice(&self.model_identity[..8]);
            return Err(RecordFault::ForeignModel { found });
        }
        if self.payload_bytes != expected.block_bytes {
            let (found, expected) = (self.payload_bytes, expected.block_bytes);
            return Err(RecordFault::Length { found, expected });
        }
        Ok(())
    }
}

fn unknown(field: &'static str, found: u64) -> RecordFault {
    RecordFault::Unknown { field, found }
}

/// Writes fields one after the other; the layout above adds up to less than the array by far.
pub(crate) struct Writer<'a> {
    pub(crate) bytes: &'a mut [u8; RECORD_HEADER_BYTES],
    pub(crate) at: usize,
}

impl Writer<'_> {
    pub(crate) fn put(&mut self, field: &[u8]) {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
    }
}

/// Reads the same fields back.
pub(crate) struct Reader<'a> {
    pub(crate) bytes: &'a [u8; RECORD_HEADER_BYTES],
    pub(crate) at: usize,
}

impl Reader<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        field
    }
}

#[cfg(test)]
mod tests;
