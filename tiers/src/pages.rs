//! Where an engine has its blocks: mostly in many places each, one a layer.
//!
//! A block's bytes are those of its ranges, one after the other, in order. Checksums are over that,
//! and everything that this crate keeps itself (slots, records, objects) is contiguous.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Descriptor, RegionId, Side};

use crate::checksum::Shift;

/// The most segments of one [`Pages`]: four for each of a thousand layers.
pub const SEGMENTS_MAX: usize = 4096;

/// One part of every block: of block `b` the `len` bytes at `offset + b * stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The region, of the cache's agent.
    pub region: RegionId,
    /// Where block 0 has this part, in bytes from the region's start.
    pub offset: u64,
    /// Bytes from one block's part to the next one's; at least `len`.
    pub stride: u64,
    /// Bytes of the part.
    pub len: u64,
}

/// An engine's paged memory: how the bytes of numbered blocks lie in its regions. Clones share it.
///
/// It names regions and keeps none of them: memory that was deregistered is refused when it is used.
#[derive(Clone, Debug)]
pub struct Pages(Arc<Layout>);

#[derive(Debug)]
struct Layout {
    parts: Vec<Part>,
    blocks: u32,
    block_bytes: u64,
}

#[derive(Debug)]
struct Part {
    segment: Segment,
    /// What this part's bytes do to the checksum of those before them.
    shift: Shift,
}

impl Pages {
    /// `blocks` blocks, each made of these segments in order. Segments that always follow each other
    /// in memory become one.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for no block, no segment or more than [`SEGMENTS_MAX`], and, with the
    /// segment's position, for one without bytes, with a stride below its length, or that ends outside
    /// its region; [`ErrorKind::NotFound`] for a region that `agent` does not have.
    pub fn new(agent: &Agent, segments: Vec<Segment>, blocks: u32) -> Result<Self> {
        if blocks == 0 {
            return Err(Error::invalid("blocks", 0, 1..=u32::MAX));
        }
        if segments.is_empty() || segments.len() > SEGMENTS_MAX {
            let accepted = 1..=SEGMENTS_MAX;
            return Err(Error::invalid("segments", segments.len(), accepted));
        }
        let mut block_bytes = 0_u64;
        let mut merged: Vec<Segment> = Vec::with_capacity(segments.len());
        for (position, segment) in segments.into_iter().enumerate() {
            let at = |error: Error| error.at(format_args!("segment {position}"));
            segment.check(blocks).map_err(at)?;
            let ends = segment.ends(blocks);
            agent.prepare(Side::Local, &ends).map_err(at)?;
            block_bytes = block_bytes.checked_add(segment.len).ok_or_else(|| {
                at(Error::invalid(
                    "len",
                    segment.len,
                    ..=u64::MAX - block_bytes,
                ))
            })?;
            match merged.last_mut() {
                Some(last) if segment.follows(last) => last.len += segment.len,
                _ => merged.push(segment),
            }
        }
        let parts = merged.into_iter().map(|segment| Part {
            segment,
            shift: Shift::by(segment.len),
        });
        Ok(Self(Arc::new(Layout {
            parts: parts.collect(),
            blocks,
            block_bytes,
        })))
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.0.block_bytes
    }

    /// How many blocks there are.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.0.blocks
    }

    /// Where block `number` is.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for one that there is not.
    pub fn block(&self, number: u32) -> Result<BlockMemory> {
        if number >= self.0.blocks {
            return Err(Error::invalid("block number", number, 0..self.0.blocks));
        }
        Ok(BlockMemory(Place::Paged(self.clone(), number)))
    }

    /// Whether the agent still has all of it; looks at the first and the last block, between which the
    /// others lie.
    fn check(&self, agent: &Agent) -> Result<()> {
        let parts = self.0.parts.iter();
        let ends: Vec<_> = parts
            .flat_map(|part| part.segment.ends(self.0.blocks))
            .collect();
        agent.prepare(Side::Local, &ends).map(|_| ())
    }
}

impl Segment {
    fn check(&self, blocks: u32) -> Result<()> {
        if self.len == 0 {
            return Err(Error::invalid("len", 0, 1..=u64::MAX));
        }
        if blocks > 1 && self.stride < self.len {
            return Err(Error::invalid("stride", self.stride, self.len..));
        }
        let last = u64::from(blocks - 1);
        let end = last
            .checked_mul(self.stride)
            .and_then(|start| start.checked_add(self.offset))
            .and_then(|start| start.checked_add(self.len));
        if end.is_none() {
            let Self { offset, stride, .. } = self;
            let context =
                format!("block {last} at offset {offset} + {last} * {stride} is past 2^64 bytes");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(())
    }

    /// Block `number`'s part.
    fn range(&self, number: u32) -> Descriptor {
        Descriptor {
            region: self.region,
            offset: self.offset + u64::from(number) * self.stride,
            len: self.len,
        }
    }

    fn ends(&self, blocks: u32) -> [Descriptor; 2] {
        [self.range(0), self.range(blocks - 1)]
    }

    /// Whether in every block this part begins where the one before it ends. Then both fit into the
    /// stride only if blocks do not overlap.
    fn follows(&self, before: &Self) -> bool {
        self.region == before.region
            && self.stride == before.stride
            && before.offset + before.len == self.offset
            && before
                .len
                .checked_add(self.len)
                .is_some_and(|len| len <= self.stride)
    }
}

/// Where an engine has, or wants, one block. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BlockMemory(Place);

#[derive(Clone, Debug)]
enum Place {
    Whole(Descriptor),
    Paged(Pages, u32),
}

/// A block in one piece; checked when it is stored or fetched.
impl From<Descriptor> for BlockMemory {
    fn from(whole: Descriptor) -> Self {
        Self(Place::Whole(whole))
    }
}

impl BlockMemory {
    /// Bytes of the block.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.0 {
            Place::Whole(whole) => whole.len,
            Place::Paged(pages, _) => pages.block_bytes(),
        }
    }

    /// In how many pieces it is.
    pub(crate) fn pieces(&self) -> usize {
        match &self.0 {
            Place::Whole(_) => 1,
            Place::Paged(pages, _) => pages.0.parts.len(),
        }
    }

    /// The piece at `position`, of [`BlockMemory::pieces`].
    fn piece(&self, position: usize) -> Descriptor {
        match &self.0 {
            Place::Whole(whole) => *whole,
            Place::Paged(pages, number) => pages.0.parts[position].segment.range(*number),
        }
    }

    /// Its pieces, in order.
    pub(crate) fn ranges(&self) -> impl ExactSizeIterator<Item = Descriptor> {
        (0..self.pieces()).map(|position| self.piece(position))
    }

    /// The CRC-32C of the pieces' bytes, one after the other, as they are now.
    ///
    /// # Errors
    /// As [`Agent::checksum`].
    pub(crate) fn crc32c(&self, agent: &Agent) -> Result<u32> {
        match &self.0 {
            Place::Whole(whole) => agent.checksum(*whole),
            Place::Paged(pages, number) => {
                let mut parts = pages.0.parts.iter();
                parts.try_fold(0, |before, part| {
                    let sum = agent.checksum(part.segment.range(*number))?;
                    Ok(part.shift.append(before, sum))
                })
            }
        }
    }
}

impl BlockMemory {
    /// The CRC-32C of the block, from those of its pieces in order, of which it takes as many as it has.
    pub(crate) fn join(&self, sums: &mut impl Iterator<Item = u32>) -> u32 {
        match &self.0 {
            Place::Whole(_) => sums.next().unwrap_or_default(),
            Place::Paged(pages, _) => {
                let parts = pages.0.parts.iter().zip(sums);
                parts.fold(0, |before, (part, sum)| part.shift.append(before, sum))
            }
        }
    }
}

/// Pairs the bytes of two blocks of equal size: the ranges of both, cut wherever either of them is.
pub(crate) fn pair(
    first: &BlockMemory,
    second: &BlockMemory,
    pairs: &mut Vec<(Descriptor, Descriptor)>,
) {
    let (mut firsts, mut seconds) = (first.ranges(), second.ranges());
    let (mut left, mut right) = (firsts.next(), seconds.next());
    while let (Some(a), Some(b)) = (left, right) {
        let len = a.len.min(b.len);
        pairs.push((Descriptor { len, ..a }, Descriptor { len, ..b }));
        left = rest(a, len).or_else(|| firsts.next());
        right = rest(b, len).or_else(|| seconds.next());
    }
    assert!(
        left.is_none() && right.is_none(),
        "{} bytes paired with {}",
        first.bytes(),
        second.bytes()
    );
}

/// What is left of a range after its first `len` bytes.
fn rest(range: Descriptor, len: u64) -> Option<Descriptor> {
    (range.len > len).then(|| Descriptor {
        offset: range.offset + len,
        len: range.len - len,
        ..range
    })
}

/// Whether every block's memory is of a block's size, in at most `pieces_max` pieces, and registered
/// with the agent.
///
/// # Errors
/// [`ErrorKind::Invalid`], with the block's position where it is one block's fault.
pub(crate) fn check<'a>(
    agent: &Agent,
    memory: impl Iterator<Item = &'a BlockMemory>,
    block_bytes: u64,
    pieces_max: usize,
) -> Result<()> {
    let mut whole = Vec::new();
    let mut checked: Option<&Pages> = None;
    for (position, memory) in memory.enumerate() {
        let at = |error: Error| error.at(format_args!("block {position}"));
        if memory.bytes() != block_bytes {
            return Err(at(Error::invalid(
                "bytes of memory",
                memory.bytes(),
                [block_bytes],
            )));
        }
        if memory.pieces() > pieces_max {
            let pieces = memory.pieces();
            return Err(at(Error::invalid(
                "pieces of memory",
                pieces,
                1..=pieces_max,
            )));
        }
        match &memory.0 {
            Place::Whole(range) => whole.push(*range),
            // Blocks mostly come from one engine's pages, which are looked at once.
            Place::Paged(pages, _) => {
                if checked.is_none_or(|known| !Arc::ptr_eq(&known.0, &pages.0)) {
                    pages.check(agent).map_err(|error| at(unusable(&error)))?;
                    checked = Some(pages);
                }
            }
        }
    }
    match agent.prepare(Side::Local, &whole) {
        Ok(_) => Ok(()),
        Err(error) => Err(unusable(&error)),
    }
}

/// Whatever is wrong with it is the caller's mistake; the text says which descriptor and why.
fn unusable(error: &Error) -> Error {
    let context = format!("memory of the blocks: {}", error.context());
    Error::new(ErrorKind::Invalid, context)
}

#[cfg(test)]
mod tests;
