//! The little of Python's pickle, protocol 5, that vLLM's `sha256` and `xxhash` algorithms hash.
//!
//! Pickle writes an object that occurs twice as a reference to its first occurrence, and "twice" means the same object
//! in memory, not an equal one. That cannot be known outside the Python process, so values with equal texts in them
//! are refused rather than guessed.

use crate::error::{Error, ErrorKind};

/// Longer values are split into frames at places that depend on Python's buffering.
const FRAME_BYTES_MAX: usize = 64 * 1024;

const PROTOCOL: u8 = 0x80;
const FRAME: u8 = 0x95;
const STOP: u8 = b'.';
const MEMOIZE: u8 = 0x94;
const NONE: u8 = b'N';
const MARK: u8 = b'(';
const BININT: u8 = b'J';
const BININT1: u8 = b'K';
const BININT2: u8 = b'M';
const LONG1: u8 = 0x8a;
const SHORT_BINBYTES: u8 = b'C';
const BINBYTES: u8 = b'B';
const SHORT_BINUNICODE: u8 = 0x8c;
const BINUNICODE: u8 = b'X';
const EMPTY_TUPLE: u8 = b')';
const TUPLE: u8 = b't';
const TUPLE1: u8 = 0x85;
const TUPLE2: u8 = 0x86;
const TUPLE3: u8 = 0x87;

/// Writes one value; the tuples' items go between [`Pickle::open`] and [`Pickle::close`].
pub(super) struct Pickle<'a> {
    body: Vec<u8>,
    /// Texts and byte strings so far, which must all differ.
    seen: Vec<&'a [u8]>,
}

impl<'a> Pickle<'a> {
    pub(super) const fn new() -> Self {
        Self {
            body: Vec::new(),
            seen: Vec::new(),
        }
    }

    pub(super) fn none(&mut self) {
        self.body.push(NONE);
    }

    pub(super) fn int(&mut self, value: i64) {
        let wide = value.to_le_bytes();
        if let Ok(byte) = u8::try_from(value) {
            self.body.extend([BININT1, byte]);
        } else if let Ok(short) = u16::try_from(value) {
            self.body.push(BININT2);
            self.body.extend(short.to_le_bytes());
        } else if let Ok(int) = i32::try_from(value) {
            self.body.push(BININT);
            self.body.extend(int.to_le_bytes());
        } else {
            // The fewest bytes that still show the sign.
            let sign = if value < 0 { 0xff } else { 0 };
            let mut len = wide.len();
            while len > 1 && wide[len - 1] == sign && (wide[len - 2] ^ sign) & 0x80 == 0 {
                len -= 1;
            }
            self.body.extend([LONG1, len as u8]);
            self.body.extend(&wide[..len]);
        }
    }

    pub(super) fn text(&mut self, value: &'a str) -> Result<(), Error> {
        self.object(value.as_bytes(), SHORT_BINUNICODE, BINUNICODE)
    }

    pub(super) fn bytes(&mut self, value: &'a [u8]) -> Result<(), Error> {
        self.object(value, SHORT_BINBYTES, BINBYTES)
    }

    fn object(&mut self, value: &'a [u8], short: u8, long: u8) -> Result<(), Error> {
        if self.seen.contains(&value) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "pickle of a block in which {:?} occurs twice depends on whether Python holds it once; use \
                     sha256_cbor or xxhash_cbor",
                    String::from_utf8_lossy(value)
                ),
            ));
        }
        self.seen.push(value);
        match u8::try_from(value.len()) {
            Ok(len) => self.body.extend([short, len]),
            Err(_) => {
                self.body.push(long);
                self.body.extend((value.len() as u32).to_le_bytes());
            }
        }
        self.body.extend(value);
        self.body.push(MEMOIZE);
        Ok(())
    }

    /// Begins a tuple of so many items.
    pub(super) fn open(&mut self, len: usize) {
        if len > 3 {
            self.body.push(MARK);
        }
    }

    /// Ends a tuple of so many items.
    pub(super) fn close(&mut self, len: usize) {
        let code = match len {
            // The empty tuple is a constant and is not remembered.
            0 => return self.body.push(EMPTY_TUPLE),
            1 => TUPLE1,
            2 => TUPLE2,
            3 => TUPLE3,
            _ => TUPLE,
        };
        self.body.extend([code, MEMOIZE]);
    }

    /// The whole pickle.
    pub(super) fn finish(mut self) -> Result<Vec<u8>, Error> {
        self.body.push(STOP);
        if self.body.len() >= FRAME_BYTES_MAX {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "pickle of a block with {} bytes needs more than one frame",
                    self.body.len()
                ),
            ));
        }
        let mut pickle = vec![PROTOCOL, 5];
        // Python leaves the frame out for bodies under four bytes.
        if self.body.len() >= 4 {
            pickle.push(FRAME);
            pickle.extend((self.body.len() as u64).to_le_bytes());
        }
        pickle.extend(self.body);
        Ok(pickle)
    }
}
