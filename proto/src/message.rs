//! A message that is not taken apart.

use prost::bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::encoding::{DecodeContext, WireType, bytes, fixed32, fixed64, skip_field, uint64};
use prost::{DecodeError, Message};

/// Any message as it is on the wire: for those that somebody writes at once, without a value for each field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded(Bytes);

impl Encoded {
    /// The message that these bytes are.
    #[must_use]
    pub const fn new(message: Bytes) -> Self {
        Self(message)
    }
}

impl Message for Encoded {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        buf.put_slice(&self.0);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        let mut all = BytesMut::from(std::mem::take(&mut self.0));
        match wire_type {
            WireType::Varint => {
                let mut value = 0;
                uint64::merge(wire_type, &mut value, buf, context)?;
                uint64::encode(tag, &value, &mut all);
            }
            WireType::SixtyFourBit => {
                let mut value = 0;
                fixed64::merge(wire_type, &mut value, buf, context)?;
                fixed64::encode(tag, &value, &mut all);
            }
            WireType::ThirtyTwoBit => {
                let mut value = 0;
                fixed32::merge(wire_type, &mut value, buf, context)?;
                fixed32::encode(tag, &value, &mut all);
            }
            WireType::LengthDelimited => {
                let mut value = Bytes::new();
                bytes::merge(wire_type, &mut value, buf, context)?;
                bytes::encode(tag, &value, &mut all);
            }
            // No message of ours has groups, which nobody writes any more: unknown fields are left out.
            WireType::StartGroup | WireType::EndGroup => {
                skip_field(wire_type, tag, buf, context)?;
            }
        }
        self.0 = all.freeze();
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0 = Bytes::new();
    }
}
