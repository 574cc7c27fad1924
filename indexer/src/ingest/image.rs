//! What a publisher held before the oldest batch that it keeps: in the place of batches that nobody has any more.

use std::sync::Arc;

use bytes::Bytes;
use kvcache_core::{Epoch, Sequence, Time};

use super::room::{Room, Share};
use super::{Action, ClearReason, Ingest, IngestConfig, Replay};

/// One piece of an image, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePiece {
    /// The batch that follows the image.
    pub cut: Sequence,
    /// The piece's number, from 0.
    pub number: u32,
    /// How many pieces the image has.
    pub count: u32,
    /// A batch of the publisher's that stores what it held.
    pub payload: Bytes,
}

/// An image while it comes.
#[derive(Debug)]
pub(super) struct Image {
    cut: u64,
    count: u32,
    share: Share,
    pieces: Vec<Bytes>,
}

impl Image {
    /// The image with one more piece; none when that does not continue it, or is too much.
    fn with(
        image: Option<Self>,
        piece: ImagePiece,
        config: &IngestConfig,
        room: &Arc<Room>,
    ) -> Option<Self> {
        let mut image = match image {
            Some(image) if piece.number > 0 => image,
            _ => Self {
                cut: piece.cut.0,
                count: piece.count,
                share: Share::new(room.clone()),
                pieces: Vec::new(),
            },
        };
        let is_next = piece.number as usize == image.pieces.len()
            && (piece.cut.0, piece.count) == (image.cut, image.count)
            && piece.number < piece.count;
        let bytes = piece.payload.len();
        let fits = image.share.bytes() + bytes <= config.image_bytes_max && image.share.grow(bytes);
        if !is_next || !fits {
            return None;
        }
        image.pieces.push(piece.payload);
        Some(image)
    }

    fn is_whole_before(&self, sequence: u64) -> bool {
        self.cut == sequence && self.pieces.len() == self.count as usize
    }
}

impl Ingest {
    /// One piece of an image, before the batches of the replay asked for; `epoch` as in [`Ingest::handle_frame`].
    ///
    /// It is used when the batch it goes before has come, so that the publisher can be recognised by that.
    pub fn handle_image(&mut self, now: Time, epoch: Option<Epoch>, piece: ImagePiece) {
        self.touch(now);
        if matches!(self.replay, Replay::Idle | Replay::Discard) {
            return;
        }
        if self.is_replay_of_another(epoch) {
            return;
        }
        let is_news = self.next.is_none_or(|next| piece.cut.0 >= next);
        let image = self.image.take().filter(|_| is_news);
        self.image = Image::with(image, piece, &self.config, &self.room).filter(|_| is_news);
    }

    /// The publisher's next batch is a later one than the next to apply, or the first of all: what was before it is in
    /// the image, or lost.
    pub(super) fn begin_at(&mut self, sequence: u64) {
        let image = self.image.take();
        if let Some(image) = image.filter(|image| image.is_whole_before(sequence)) {
            self.reset_silently();
            self.stats.images += 1;
            let pieces = image.pieces;
            self.actions.push_back(Action::Replace { pieces });
        } else if self.next.is_some() {
            self.reset(ClearReason::HistoryLost);
        }
    }
}
