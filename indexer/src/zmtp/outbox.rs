//! What is to be written to a peer, in order, without copying what is long.

use std::collections::VecDeque;
use std::io::{Error, IoSlice, Result};
use std::pin::Pin;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::AsyncWrite;

use super::decode::{LONG, MORE};

/// Pieces that are written with one call.
const PIECES_AT_ONCE: usize = 32;

/// Pieces of frames; headers and what is short are pieces of their own.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pieces: VecDeque<Bytes>,
    bytes: usize,
}

impl Outbox {
    /// Bytes that are not written yet.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// The frames of one message.
    pub(super) fn push_message(&mut self, frames: &[Bytes]) {
        for (position, frame) in frames.iter().enumerate() {
            let more = if position + 1 < frames.len() { MORE } else { 0 };
            self.push_frame(more, frame.clone());
        }
    }

    /// One frame with these flags, apart from that for its length.
    pub(super) fn push_frame(&mut self, flags: u8, body: Bytes) {
        let mut header = BytesMut::with_capacity(9);
        match u8::try_from(body.len()) {
            Ok(length) => header.put_slice(&[flags, length]),
            Err(_) => {
                header.put_u8(flags | LONG);
                header.put_u64(body.len() as u64);
            }
        }
        self.push(header.freeze());
        self.push(body);
    }

    /// Writes some of it; how much.
    ///
    /// # Cancel safety
    /// What is written is gone from here in the same step.
    pub(super) async fn write<W: AsyncWrite + Unpin>(&mut self, to: &mut W) -> Result<usize> {
        let written = std::future::poll_fn(|context| {
            let mut slices = [IoSlice::new(&[]); PIECES_AT_ONCE];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                *slice = IoSlice::new(piece);
                count += 1;
            }
            Pin::new(&mut *to).poll_write_vectored(context, &slices[..count])
        })
        .await?;
        if written == 0 {
            return Err(Error::from(std::io::ErrorKind::WriteZero));
        }
        self.advance(written);
        Ok(written)
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(piece) = self.pieces.front_mut() {
            if written < piece.len() {
                piece.advance(written);
                return;
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Messages of any frames, written in pieces of any length, against the concatenation that the protocol says.
        #[test]
        fn what_is_written_is_what_was_pushed(
            messages in prop::collection::vec(prop::collection::vec(0_usize..700, 1..5), 0..20),
            mut steps in prop::collection::vec(1_usize..900, 1..20),
        ) {
            let (mut outbox, mut literal) = (Outbox::default(), Vec::new());
            for frames in &messages {
                let bodies: Vec<_> = frames.iter().map(|len| Bytes::from(vec![*len as u8; *len])).collect();
                outbox.push_message(&bodies);
                for (position, body) in bodies.iter().enumerate() {
                    let more = u8::from(position + 1 < bodies.len());
                    if body.len() < 256 {
                        literal.extend([more, body.len() as u8]);
                    } else {
                        literal.push(more | 2);
                        literal.extend((body.len() as u64).to_be_bytes());
                    }
                    literal.extend_from_slice(body);
                }
            }
            prop_assert_eq!(outbox.bytes(), literal.len());
            let mut written = Vec::new();
            while outbox.bytes() > 0 {
                // A writer that takes as much as the step says.
                let most = steps.pop().unwrap_or(1000);
                let mut taken = vec![0; most.min(outbox.bytes())];
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                let count = runtime.block_on(async {
                    let mut room = std::io::Cursor::new(taken.as_mut_slice());
                    outbox.write(&mut room).await.unwrap()
                });
                written.extend_from_slice(&taken[..count]);
            }
            prop_assert_eq!(written, literal);
        }
    }
}
