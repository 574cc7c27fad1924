//! From bytes to greetings, commands and messages, without I/O.

use bytes::{Buf, Bytes, BytesMut};
use kvcache_core::{Error, ErrorKind, Result};

use super::{COMMAND_BYTES_MAX, FRAMES_MAX, READ_BYTES};

/// Bytes of a greeting: signature, version, mechanism, role, filler.
pub(super) const GREETING_BYTES: usize = 64;
/// Where the version begins, the mechanism, and what follows it.
const VERSION_AT: usize = 10;
const MECHANISM_AT: usize = 12;
const MECHANISM_END: usize = 32;
/// Frame flags: more frames follow, the length has eight bytes, it is a command.
pub(super) const MORE: u8 = 1;
pub(super) const LONG: u8 = 2;
pub(super) const COMMAND: u8 = 4;
/// The first byte of a message of a subscriber.
#[cfg(feature = "server")]
pub(super) const SUBSCRIBE: u8 = 1;
/// A frame below this is copied out of the buffer, so that a small one never keeps a big buffer alive.
const COPY_BELOW: usize = 16 << 10;

/// What a peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// The first bytes of a connection.
    Greeting {
        /// The protocol's minor version; the major one is 3.
        minor: u8,
    },
    /// For the protocol itself.
    Command {
        /// Like `READY`.
        name: Bytes,
        /// What follows the name.
        body: Bytes,
    },
    /// The frames of one message.
    Message(Vec<Bytes>),
}

/// Cuts what arrives into [`Received`]; refuses what no peer of ours sends.
///
/// It never holds more than has arrived, and of one message never more than its bound.
#[derive(Debug)]
pub(crate) struct Decoder {
    buffer: BytesMut,
    message_bytes_max: usize,
    is_greeted: bool,
    /// The frames of the message that is on its way, and their bytes.
    frames: Vec<Bytes>,
    message_bytes: usize,
}

/// A frame's first bytes.
struct Header {
    flags: u8,
    /// Bytes of flags and length.
    bytes: usize,
    length: u64,
}

impl Decoder {
    pub(crate) fn new(message_bytes_max: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            message_bytes_max,
            is_greeted: false,
            frames: Vec::new(),
            message_bytes: 0,
        }
    }

    /// Where to put what arrives next.
    pub(crate) fn space(&mut self) -> &mut BytesMut {
        if self.buffer.is_empty() && self.buffer.capacity() > 4 * READ_BYTES {
            // What a large message needed is not kept for small ones.
            self.buffer = BytesMut::new();
        }
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 {
            self.buffer.reserve(READ_BYTES);
        }
        &mut self.buffer
    }

    /// Bytes held: of what is not cut yet, and of the message on its way.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.buffer.capacity() + self.message_bytes
    }

    /// What has arrived completely, if anything.
    ///
    /// # Errors
    /// `Version` for a protocol other than ZMTP 3; `Unsupported` for another mechanism than NULL; `Invalid` naming the
    /// value and its bound; `Corrupt` for bytes that are not the protocol's. The peer is not to be read on after that.
    pub(crate) fn next(&mut self) -> Result<Option<Received>> {
        if !self.is_greeted {
            let greeting = self.greeting()?;
            self.is_greeted = greeting.is_some();
            return Ok(greeting);
        }
        loop {
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            // Fits, as it is below a bound that does.
            let length = header.length as usize;
            if self.buffer.len() < header.bytes + length {
                return Ok(None);
            }
            self.buffer.advance(header.bytes);
            let body = if length < COPY_BELOW {
                let copy = Bytes::copy_from_slice(&self.buffer[..length]);
                self.buffer.advance(length);
                copy
            } else {
                self.buffer.split_to(length).freeze()
            };
            if header.flags & COMMAND != 0 {
                return command(body).map(Some);
            }
            self.message_bytes += length;
            self.frames.push(body);
            if header.flags & MORE == 0 {
                self.message_bytes = 0;
                return Ok(Some(Received::Message(std::mem::take(&mut self.frames))));
            }
        }
    }

    fn greeting(&mut self) -> Result<Option<Received>> {
        let arrived = &self.buffer[..self.buffer.len().min(GREETING_BYTES)];
        // Refused as soon as it shows: a peer of another protocol may never send as much as a greeting.
        let is_signed = arrived.first().is_none_or(|byte| *byte == 0xff)
            && arrived.get(9).is_none_or(|byte| *byte == 0x7f);
        if !is_signed {
            return Err(corrupt(format!(
                "it begins with {:02x?}",
                &arrived[..arrived.len().min(10)]
            )));
        }
        if let Some(&major) = arrived.get(VERSION_AT)
            && major < 3
        {
            let context = format!("the peer speaks ZMTP {major}, expected 3");
            return Err(Error::new(ErrorKind::Version, context));
        }
        if arrived.len() < GREETING_BYTES {
            return Ok(None);
        }
        let mechanism = arrived[MECHANISM_AT..MECHANISM_END].trim_ascii_end();
        let mechanism = mechanism
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        if mechanism != b"NULL" {
            let name = String::from_utf8_lossy(mechanism);
            let context = format!("the peer wants mechanism {name:?}, only \"NULL\" is supported");
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let minor = arrived[VERSION_AT + 1];
        self.buffer.advance(GREETING_BYTES);
        Ok(Some(Received::Greeting { minor }))
    }

    /// The header of the frame at the front, checked before any of its body is waited for.
    fn header(&self) -> Result<Option<Header>> {
        let Some(&flags) = self.buffer.first() else {
            return Ok(None);
        };
        let is_command = flags & COMMAND != 0;
        if flags > (MORE | LONG | COMMAND) || (is_command && flags & MORE != 0) {
            return Err(corrupt(format!("a frame with flags {flags:#04x}")));
        }
        let (bytes, length) = if flags & LONG == 0 {
            match self.buffer.get(1) {
                Some(length) => (2, u64::from(*length)),
                None => return Ok(None),
            }
        } else {
            match self.buffer.get(1..9) {
                Some(mut raw) => (9, raw.get_u64()),
                None => return Ok(None),
            }
        };
        if is_command {
            within("bytes of a command", length, COMMAND_BYTES_MAX)?;
            if !self.frames.is_empty() {
                return Err(corrupt("a command in the middle of a message"));
            }
        } else {
            within(
                "frames of a message",
                self.frames.len() as u64 + 1,
                FRAMES_MAX,
            )?;
            let total = length.saturating_add(self.message_bytes as u64);
            within("bytes of a message", total, self.message_bytes_max)?;
        }
        Ok(Some(Header {
            flags,
            bytes,
            length,
        }))
    }
}

fn command(body: Bytes) -> Result<Received> {
    let length = body.first().map_or(0, |length| usize::from(*length));
    if length == 0 || body.len() <= length {
        return Err(corrupt(format!(
            "a command of {} bytes without a name",
            body.len()
        )));
    }
    Ok(Received::Command {
        name: body.slice(1..=length),
        body: body.slice(1 + length..),
    })
}

/// The value of a property in the body of a READY command.
///
/// # Errors
/// `Corrupt` when the body is no list of properties.
pub(super) fn property(mut body: Bytes, wanted: &[u8]) -> Result<Option<Bytes>> {
    let cut_short = || corrupt("a READY command with a property that is cut short");
    let mut found = None;
    while body.has_remaining() {
        let length = usize::from(body.get_u8());
        if body.len() < length + 4 {
            return Err(cut_short());
        }
        let name = body.split_to(length);
        let length = body.get_u32() as usize;
        if body.len() < length {
            return Err(cut_short());
        }
        let value = body.split_to(length);
        if name.eq_ignore_ascii_case(wanted) {
            found = Some(value);
        }
    }
    Ok(found)
}

fn within(what: &str, value: u64, most: usize) -> Result<()> {
    if value <= most as u64 {
        Ok(())
    } else {
        Err(Error::invalid(what, value, 0..=most))
    }
}

pub(super) fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("not what ZMTP allows: {what}"))
}
