//! Scattered memory that a frame's payload comes from or goes to.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::descriptor::Target;
use crate::plan::Plan;
use crate::region::RegionUse;
use crate::sys::memory::{Mapping, Sink, Span};

/// Building more ranges than a socket takes at once is wasted work.
const LOOKAHEAD_BYTES: u64 = 1 << 20;

/// Whose memory it is.
enum Owner {
    /// The local side of a request of ours, whose job holds the regions.
    Plan(Arc<Plan>),
    /// Regions of ours that a peer was admitted to.
    Admitted(Vec<RegionUse>),
}

impl Owner {
    fn mapping(&self, position: u32) -> Result<&Mapping> {
        match self {
            Self::Plan(plan) => match &plan.local[position as usize] {
                Target::Local(region) => region.mapping(),
                Target::Remote(region) => {
                    let text = format!("region {} belongs to a peer", region.id);
                    Err(Error::new(ErrorKind::Internal, text))
                }
            },
            Self::Admitted(uses) => uses[position as usize].region().mapping(),
        }
    }
}

/// A range of one of the owner's regions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) region: u32,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Ranges of memory, and how far they are sent or received.
pub(super) struct Scatter {
    owner: Owner,
    pieces: Vec<Piece>,
    /// The first piece that is not finished.
    at: usize,
    /// Bytes of it that are.
    done: u64,
    left: u64,
}

impl Scatter {
    pub(super) fn of_plan(plan: Arc<Plan>, pieces: Vec<Piece>) -> Self {
        Self::new(Owner::Plan(plan), pieces)
    }

    /// # Errors
    /// When a piece lies outside its region.
    pub(super) fn admitted(uses: Vec<RegionUse>, pieces: Vec<Piece>) -> Result<Self> {
        let scatter = Self::new(Owner::Admitted(uses), pieces);
        for piece in &scatter.pieces {
            scatter
                .owner
                .mapping(piece.region)?
                .span(piece.offset, piece.len)?;
        }
        Ok(scatter)
    }

    fn new(owner: Owner, pieces: Vec<Piece>) -> Self {
        let left = pieces.iter().map(|piece| piece.len).sum();
        Self {
            owner,
            pieces,
            at: 0,
            done: 0,
            left,
        }
    }

    /// The CRC-32C of each range.
    pub(super) fn checksums(&self) -> Result<Vec<u32>> {
        let sum = |piece: &Piece| {
            let memory = self.owner.mapping(piece.region)?;
            memory.crc32c(piece.offset, piece.len)
        };
        self.pieces.iter().map(sum).collect()
    }

    /// Bytes that are neither sent nor received.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Whether a region of ours that a peer was admitted to is being deregistered.
    pub(super) fn is_withdrawn(&self) -> bool {
        match &self.owner {
            Owner::Plan(_) => false,
            Owner::Admitted(uses) => uses.iter().any(|used| used.region().is_closed()),
        }
    }

    fn pending(&self) -> impl Iterator<Item = Piece> {
        let mut skip = self.done;
        let mut bytes = 0;
        self.pieces[self.at..]
            .iter()
            .map(move |piece| {
                let rest = Piece {
                    region: piece.region,
                    offset: piece.offset + skip,
                    len: piece.len - skip,
                };
                skip = 0;
                rest
            })
            .take_while(move |piece| {
                let take = bytes < LOOKAHEAD_BYTES;
                bytes += piece.len;
                take
            })
    }

    /// Appends ranges to send next, until `spans` has `spans_max`.
    pub(super) fn spans<'a>(&'a self, spans: &mut Vec<Span<'a>>, spans_max: usize) -> Result<()> {
        for piece in self.pending().take(spans_max.saturating_sub(spans.len())) {
            spans.push(
                self.owner
                    .mapping(piece.region)?
                    .span(piece.offset, piece.len)?,
            );
        }
        Ok(())
    }

    /// Appends ranges to fill next, until `sinks` has `sinks_max`.
    pub(super) fn sinks<'a>(&'a self, sinks: &mut Vec<Sink<'a>>, sinks_max: usize) -> Result<()> {
        for piece in self.pending().take(sinks_max.saturating_sub(sinks.len())) {
            sinks.push(
                self.owner
                    .mapping(piece.region)?
                    .sink(piece.offset, piece.len)?,
            );
        }
        Ok(())
    }

    /// `count` more bytes were sent or received.
    pub(super) fn advance(&mut self, mut count: u64) {
        assert!(
            count <= self.left,
            "{count} bytes moved of {} left",
            self.left
        );
        self.left -= count;
        while count > 0 {
            let rest = self.pieces[self.at].len - self.done;
            if count < rest {
                self.done += count;
                return;
            }
            count -= rest;
            self.at += 1;
            self.done = 0;
        }
    }

    /// Copies received bytes in, in order.
    pub(super) fn fill(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let piece = self.pieces[self.at];
            let count = (piece.len - self.done).min(bytes.len() as u64) as usize;
            let (now, later) = bytes.split_at(count);
            self.owner
                .mapping(piece.region)?
                .write(piece.offset + self.done, now)?;
            self.advance(count as u64);
            bytes = later;
        }
        Ok(())
    }
}
