//! What the manager wants done, and what the driver answers.

use std::fmt;
use std::time::Duration;

use crate::error::ErrorKind;
use crate::id::{LeaseId, PeerId, Time};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::place::{Place, SegmentId, Tier};

/// One command that is answered; never reused by a manager.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

impl fmt::Display for CommandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One block to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// The block, as records and objects describe it.
    pub info: BlockInfo,
    /// Where its bytes are.
    pub from: Place,
    /// Where they are to go.
    pub to: Place,
    /// What the bytes must match after the copy; none: the checksum is computed, returned and with that becomes known.
    ///
    /// It is none from engines, whose bytes nobody has seen yet, and from objects, whose records carry their own.
    pub checksum: Option<Checksum>,
}

/// Something for the driver to do. Every one but [`Command::Release`] must be answered, whatever happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Copy and verify these blocks, in any order; answered by [`Manager::handle_copied`](super::Manager::handle_copied).
    ///
    /// All moves go between the same two kinds of place, so that one transfer request can carry them.
    Copy {
        /// Names the command in its answer.
        id: CommandId,
        /// One entry a block; at most `batch_blocks_max`.
        moves: Vec<Move>,
        /// A move that is not done by then should fail with [`ErrorKind::Timeout`].
        deadline: Time,
    },
    /// Ask a peer for a lease; answered by [`Manager::handle_leased`](super::Manager::handle_leased).
    Lease {
        /// Names the command in its answer.
        id: CommandId,
        /// Whom to ask.
        peer: PeerId,
        /// The blocks wanted, in order: the peer grants as many of the first ones as it has.
        keys: Vec<BlockKey>,
        /// How long it should last.
        ttl: Duration,
        /// When the answer must be here.
        deadline: Time,
    },
    /// Give a lease back to the peer that granted it. Not answered, and it may be lost: the lease ends by itself.
    Release {
        /// Who granted it.
        peer: PeerId,
        /// Its number for the lease.
        lease: LeaseId,
    },
    /// Delete a segment's records so that it can be filled anew; answered by
    /// [`Manager::handle_segment_dropped`](super::Manager::handle_segment_dropped).
    DropSegment {
        /// Names the command in its answer.
        id: CommandId,
        /// Which one; nothing reads or writes it.
        segment: SegmentId,
    },
}

/// Why a block was not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveFailure {
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::NotFound`] speak of the source: that copy is forgotten.
    /// [`ErrorKind::NoSpace`] speaks of the target.
    pub kind: ErrorKind,
    /// Whether nothing is at work on source or target any more. If not, both stay out of use until
    /// [`Manager::handle_drained`](super::Manager::handle_drained).
    pub settled: bool,
}

impl MoveFailure {
    /// A failure after which source and target may be used again.
    #[must_use]
    pub const fn settled(kind: ErrorKind) -> Self {
        Self {
            kind,
            settled: true,
        }
    }

    /// A failure after which the transfer may still be at work.
    #[must_use]
    pub const fn unsettled(kind: ErrorKind) -> Self {
        Self {
            kind,
            settled: false,
        }
    }
}

/// A lease that a peer granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantedLease {
    /// The peer's number for it.
    pub lease: LeaseId,
    /// How long it lasts, counted by us from when we asked, which is never too long.
    pub ttl: Duration,
    /// The granted blocks: the first ones of those asked for.
    pub blocks: Vec<GrantedBlock>,
}

/// One block of a lease that a peer granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantedBlock {
    /// What its bytes must match.
    pub checksum: Checksum,
    /// The tier it was in at the peer when it was asked for.
    pub tier: Tier,
}
