//! Reading and writing of fixed-layout little-endian formats, without trust in what is read.

use kvcache_core::{Error, ErrorKind, Result};

/// Reads values off the front of a byte string; every lack of bytes is an error that says where.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(crate) fn bytes(&mut self, field: &str, count: usize) -> Result<&'a [u8]> {
        let end = self
            .at
            .checked_add(count)
            .filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            let (at, left) = (self.at, self.left());
            let text = format!("{field} at byte {at} needs {count} bytes, {left} are left");
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        let found = &self.bytes[self.at..end];
        self.at = end;
        Ok(found)
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(field, N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, field: &str) -> Result<u8> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(crate) fn u16(&mut self, field: &str) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u32(&mut self, field: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(crate) fn u64(&mut self, field: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// A number in as many bytes as it needs, seven bits in each, the lowest first; the top bit says that more follow.
    pub(crate) fn varint(&mut self, field: &str) -> Result<u64> {
        let at = self.at;
        let mut value = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit, and a last byte of 0 would be one too many.
            if bits > u64::MAX >> shift || (byte == 0 && shift > 0) {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        let text = format!("{field} at byte {at} is not a number of 64 bits in its shortest form");
        Err(Error::new(ErrorKind::Corrupt, text))
    }

    /// Bytes after their count (u16).
    pub(crate) fn counted(&mut self, field: &str) -> Result<&'a [u8]> {
        let count = self.u16(field)?;
        self.bytes(field, usize::from(count))
    }

    /// UTF-8 after its count (u16).
    pub(crate) fn text(&mut self, field: &str) -> Result<&'a str> {
        let at = self.at;
        std::str::from_utf8(self.counted(field)?).map_err(|error| {
            let text = format!("{field} at byte {at} is not UTF-8");
            Error::new(ErrorKind::Corrupt, text).with_source(error)
        })
    }

    /// # Errors
    /// When bytes are left over.
    pub(crate) fn end(&self, what: &str) -> Result<()> {
        if self.left() == 0 {
            return Ok(());
        }
        let text = format!(
            "{what} has {} bytes too many after byte {}",
            self.left(),
            self.at
        );
        Err(Error::new(ErrorKind::Corrupt, text))
    }
}

/// Appends a number as [`Reader::varint`] reads it.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends bytes after their count (u16); longer ones are cut, so callers check first.
pub(crate) fn put_counted(out: &mut Vec<u8>, bytes: &[u8]) {
    let count = bytes.len().min(usize::from(u16::MAX));
    out.extend_from_slice(&(count as u16).to_le_bytes());
    out.extend_from_slice(&bytes[..count]);
}
