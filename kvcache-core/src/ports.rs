//! The two questions that tiers and index have for each other, so that neither knows the other.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;

use crate::error::Result;
use crate::event::NodeEvent;
use crate::id::{Epoch, PodName, Sequence};
use crate::key::IndexKey;

/// A pod that holds the first `depth` blocks of the chain that was asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub pod: PodName,
    /// How many blocks, from the first, without a hole.
    pub depth: u32,
    /// Where its peer service listens, `host:port`; none if that is not known: what is known already is used then.
    pub peer_address: Option<String>,
}

/// Who holds a chain of blocks, deepest first; and how much of it shared tiers hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Located {
    /// The pods, deepest first.
    pub holders: Vec<Holder>,
    /// Which blocks, by position, are in a tier that every pod can reach: ascending, apart from each other.
    pub shared: Vec<Range<u32>>,
}

impl Located {
    /// Whether nobody is known to hold anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holders.is_empty() && self.shared.is_empty()
    }
}

/// The answer of a [`Directory`], once it is there.
pub type LocateFuture<'a> = Pin<Box<dyn Future<Output = Result<Located>> + Send + 'a>>;

/// Who holds these blocks? Answered by the global index, or by a test.
pub trait Directory: Send + Sync {
    /// Asks about a chain, given as index keys from its first block on.
    ///
    /// Implementations have a deadline of their own. An error is a miss: the caller does without.
    fn locate(&self, chain: Vec<IndexKey>) -> LocateFuture<'_>;
}

/// Up to where a source has told the world, so that a lookup can ask to be at least that fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The incarnation of the source.
    pub epoch: Epoch,
    /// The next sequence number it will publish: everything before it is out.
    pub next: Sequence,
}

/// Tells the world what changed in a node's tiers.
pub trait EventSink: Send + Sync {
    /// Takes a batch, in order; never blocks. Returns the position after it.
    fn publish(&self, events: Vec<NodeEvent>) -> Position;
}
