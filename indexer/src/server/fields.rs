//! Fields of protobuf messages, appended one after the other.
//!
//! A generated message wants a value for each field first, an allocation for each text and list, and a second walk for the
//! lengths: three times the work where an answer has hundreds of small messages.

use bytes::{BufMut, Bytes};
use prost::Message;
use prost::encoding::{self, WireType, encode_key, encode_varint};

/// What is kept for the next message at most, in bytes.
const KEPT_MAX: usize = 1 << 20;

/// Bytes of a message as far as it is written. Used again they keep their memory.
///
/// As generated messages do, it leaves out what is 0, empty or false.
#[derive(Debug, Default)]
pub(super) struct Fields(Vec<u8>);

impl Fields {
    /// Begins anew.
    pub(super) fn clear(&mut self) {
        self.0.clear();
        self.0.shrink_to(KEPT_MAX);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }

    /// Fields that are written already.
    pub(super) fn append(&mut self, fields: &[u8]) {
        self.0.extend_from_slice(fields);
    }

    pub(super) fn uint(&mut self, tag: u32, value: u64) {
        if value != 0 {
            encode_key(tag, WireType::Varint, &mut self.0);
            encode_varint(value, &mut self.0);
        }
    }

    pub(super) fn flag(&mut self, tag: u32, value: bool) {
        self.uint(tag, value.into());
    }

    pub(super) fn double(&mut self, tag: u32, value: f64) {
        if value != 0.0 {
            encode_key(tag, WireType::SixtyFourBit, &mut self.0);
            self.0.put_f64_le(value);
        }
    }

    pub(super) fn text(&mut self, tag: u32, text: &str) {
        if !text.is_empty() {
            encode_key(tag, WireType::LengthDelimited, &mut self.0);
            encode_varint(text.len() as u64, &mut self.0);
            self.append(text.as_bytes());
        }
    }

    /// A generated message.
    pub(super) fn message(&mut self, tag: u32, message: &impl Message) {
        encoding::message::encode(tag, message, &mut self.0);
    }

    /// A message that `write` makes.
    pub(super) fn nested(&mut self, tag: u32, write: impl FnOnce(&mut Self)) {
        encode_key(tag, WireType::LengthDelimited, &mut self.0);
        // Most lengths have one byte; the others are made room for.
        let place = self.len();
        self.0.push(0);
        write(self);
        let length = self.len() - place - 1;
        if length < 0x80 {
            self.0[place] = length as u8;
            return;
        }
        let mut encoded = Vec::new();
        encode_varint(length as u64, &mut encoded);
        self.0.splice(place..=place, encoded);
    }
}
