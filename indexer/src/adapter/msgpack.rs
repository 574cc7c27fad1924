//! A borrowed reader and a small writer of MessagePack, as far as KV events need it.
//!
//! A value tree would cost one allocation per token. The reader walks the bytes instead: a length is believed only
//! once that many bytes are known to be there, and nothing here allocates.

use kvcache_core::{Error, ErrorKind, Result};

/// How deep a skipped value may nest: events have four levels; the rest is room for fields yet unknown.
pub(super) const DEPTH_MAX: u32 = 32;

/// The next value, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Head<'a> {
    Nil,
    Bool,
    /// An integer of any width; a negative one as its two's complement.
    Int {
        bits: u64,
        negative: bool,
    },
    Float(f64),
    Str(&'a [u8]),
    Bin(&'a [u8]),
    /// So many values follow.
    Array(u32),
    /// So many pairs follow.
    Map(u32),
    /// An extension type; its payload is skipped.
    Extension,
}

impl Head<'_> {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool => "a boolean",
            Self::Int { .. } => "an integer",
            Self::Float(_) => "a float",
            Self::Str(_) => "a string",
            Self::Bin(_) => "bytes",
            Self::Array(_) => "an array",
            Self::Map(_) => "a map",
            Self::Extension => "an extension value",
        }
    }
}

/// A place in a message. Copying it is how a caller looks ahead.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub(super) const fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// An error that names this place in the message.
    pub(super) fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::new(
            ErrorKind::Invalid,
            format!("byte {}: {what}", self.position),
        )
    }

    pub(super) fn expected(&self, wanted: &str, found: &Head<'_>) -> Error {
        self.error(format_args!("{} where {wanted} belongs", found.name()))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        if length > self.remaining() {
            return Err(self.error(format_args!(
                "cut short: {length} bytes announced, {} left",
                self.remaining()
            )));
        }
        let taken = &self.bytes[self.position..self.position + length];
        self.position += length;
        Ok(taken)
    }

    fn unsigned(&mut self, width: usize) -> Result<u64> {
        Ok(self
            .take(width)?
            .iter()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    }

    fn signed(&mut self, width: usize) -> Result<Head<'a>> {
        let shift = 64 - 8 * width;
        let value = ((self.unsigned(width)? << shift) as i64) >> shift;
        Ok(Head::Int {
            bits: value as u64,
            negative: value < 0,
        })
    }

    /// A number of values that follow. Each takes at least a byte, so more than the message has left is a lie.
    fn count(&self, count: u64, values_each: u64) -> Result<u32> {
        match u32::try_from(count) {
            Ok(small) if count * values_each <= self.remaining() as u64 => Ok(small),
            _ => Err(self.error(format_args!(
                "{count} entries announced, {} bytes left",
                self.remaining()
            ))),
        }
    }

    /// Reads the next value; of arrays and maps only the head, their entries come next.
    pub(super) fn head(&mut self) -> Result<Head<'a>> {
        let marker = self.take(1)?[0];
        Ok(match marker {
            0x00..=0x7f => Head::Int {
                bits: u64::from(marker),
                negative: false,
            },
            0x80..=0x8f => Head::Map(self.count(u64::from(marker & 0x0f), 2)?),
            0x90..=0x9f => Head::Array(self.count(u64::from(marker & 0x0f), 1)?),
            0xa0..=0xbf => Head::Str(self.take(usize::from(marker & 0x1f))?),
            0xc0 => Head::Nil,
            0xc1 => return Err(self.error("the marker 0xc1, which MessagePack never uses")),
            0xc2 | 0xc3 => Head::Bool,
            0xc4..=0xc6 => {
                let length = self.unsigned(1 << (marker - 0xc4))? as usize;
                Head::Bin(self.take(length)?)
            }
            0xc7..=0xc9 => {
                let length = self.unsigned(1 << (marker - 0xc7))? as usize;
                // One byte more: the extension's type.
                self.take(1)?;
                self.take(length)?;
                Head::Extension
            }
            0xca => Head::Float(f64::from(f32::from_bits(self.unsigned(4)? as u32))),
            0xcb => Head::Float(f64::from_bits(self.unsigned(8)?)),
            0xcc..=0xcf => Head::Int {
                bits: self.unsigned(1 << (marker - 0xcc))?,
                negative: false,
            },
            0xd0..=0xd3 => self.signed(1 << (marker - 0xd0))?,
            0xd4..=0xd8 => {
                self.take(1 + (1 << (marker - 0xd4)))?;
                Head::Extension
            }
            0xd9..=0xdb => {
                let length = self.unsigned(1 << (marker - 0xd9))? as usize;
                Head::Str(self.take(length)?)
            }
            0xdc | 0xdd => {
                let count = self.unsigned(2 << (marker - 0xdc))?;
                Head::Array(self.count(count, 1)?)
            }
            0xde | 0xdf => {
                let count = self.unsigned(2 << (marker - 0xde))?;
                Head::Map(self.count(count, 2)?)
            }
            0xe0..=0xff => Head::Int {
                bits: i64::from(marker as i8) as u64,
                negative: true,
            },
        })
    }

    /// Steps over the next value, whatever it is, without recursion.
    pub(super) fn skip(&mut self) -> Result<()> {
        // How many values each open array or map still lacks; the first entry is the value itself.
        let mut open = [0_u64; DEPTH_MAX as usize];
        open[0] = 1;
        let mut depth = 0;
        loop {
            while open[depth] == 0 {
                if depth == 0 {
                    return Ok(());
                }
                depth -= 1;
            }
            open[depth] -= 1;
            let values = match self.head()? {
                Head::Array(count) => u64::from(count),
                Head::Map(count) => 2 * u64::from(count),
                _ => continue,
            };
            depth += 1;
            if depth == open.len() {
                return Err(self.error(format_args!("nested deeper than {DEPTH_MAX}")));
            }
            open[depth] = values;
        }
    }

    /// An array's length; nil counts as none.
    pub(super) fn array_or_nil(&mut self, what: &str) -> Result<Option<u32>> {
        let place = *self;
        match self.head()? {
            Head::Array(count) => Ok(Some(count)),
            Head::Nil => Ok(None),
            other => Err(place.expected(what, &other)),
        }
    }

    /// A non-negative integer below 2^32; nil counts as none.
    pub(super) fn u32_or_nil(&mut self, what: &str) -> Result<Option<u32>> {
        let place = *self;
        match self.head()? {
            Head::Nil => Ok(None),
            Head::Int {
                bits,
                negative: false,
            } => match u32::try_from(bits) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(place.error(format_args!("{what} is {bits}, beyond 32 bits"))),
            },
            Head::Int { bits, .. } => {
                Err(place.error(format_args!("{what} is {}, below 0", bits as i64)))
            }
            other => Err(place.expected(what, &other)),
        }
    }

    /// A string of at most `bytes_max` bytes; nil counts as none.
    pub(super) fn text_or_nil(&mut self, what: &str, bytes_max: usize) -> Result<Option<&'a str>> {
        let place = *self;
        match self.head()? {
            Head::Nil => Ok(None),
            Head::Str(text) if text.len() > bytes_max => Err(place.error(format_args!(
                "{what} has {} bytes, more than {bytes_max}",
                text.len()
            ))),
            Head::Str(text) => match std::str::from_utf8(text) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(place.error(format_args!("{what} is not UTF-8"))),
            },
            other => Err(place.expected(what, &other)),
        }
    }
}

/// Writes the shortest encoding of each value, as vLLM's encoder does.
#[derive(Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(capacity),
        }
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    pub(super) fn nil(&mut self) {
        self.bytes.push(0xc0);
    }

    pub(super) fn float(&mut self, value: f64) {
        self.bytes.push(0xcb);
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    pub(super) fn unsigned(&mut self, value: u64) {
        if let Ok(small) = u8::try_from(value) {
            if small >= 0x80 {
                self.bytes.push(0xcc);
            }
            self.bytes.push(small);
        } else if let Ok(small) = u16::try_from(value) {
            self.bytes.push(0xcd);
            self.bytes.extend_from_slice(&small.to_be_bytes());
        } else if let Ok(small) = u32::try_from(value) {
            self.bytes.push(0xce);
            self.bytes.extend_from_slice(&small.to_be_bytes());
        } else {
            self.bytes.push(0xcf);
            self.bytes.extend_from_slice(&value.to_be_bytes());
        }
    }

    /// A string of ours: a field's name or a tag, all shorter than 32 bytes.
    pub(super) fn text(&mut self, text: &str) {
        assert!(text.len() < 32, "{text:?} needs a longer encoding");
        self.bytes.push(0xa0 | text.len() as u8);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    pub(super) fn array(&mut self, count: usize) {
        self.container(count, 0x90, 0xdc);
    }

    pub(super) fn map(&mut self, count: usize) {
        self.container(count, 0x80, 0xde);
    }

    fn container(&mut self, count: usize, small: u8, large: u8) {
        assert!(
            u32::try_from(count).is_ok(),
            "{count} entries do not fit a message"
        );
        if count < 16 {
            self.bytes.push(small | count as u8);
        } else if let Ok(count) = u16::try_from(count) {
            self.bytes.push(large);
            self.bytes.extend_from_slice(&count.to_be_bytes());
        } else {
            self.bytes.push(large + 1);
            self.bytes.extend_from_slice(&(count as u32).to_be_bytes());
        }
    }
}
