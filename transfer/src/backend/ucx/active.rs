//! A job under way: what of it was handed to UCX.

use kvcache_core::Error;

use super::frame::Session;
use crate::backend::Job;
use crate::plan::Extent;

/// Bytes in one operation: a larger one would keep others waiting where UCX copies by itself.
const PIECE_BYTES_MAX: u64 = 1 << 20;

/// Operations of one job that may be open.
pub(super) const WINDOW: usize = 64;

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The peer was asked for as many of its regions.
    Asking(usize),
    Moving,
    /// All is written; waits until it is there.
    Flushing,
}

pub(super) struct Active {
    pub(super) job: Job,
    pub(super) session: Session,
    pub(super) phase: Phase,
    /// Operations that are open, or questions for checksums.
    pub(super) open: usize,
    pub(super) error: Option<Error>,
    /// It counts as a user of the peer's regions.
    pub(super) holds: bool,
    /// Extents whose checksums were asked for.
    pub(super) asked: usize,
    extent: usize,
    skip: u64,
}

impl Active {
    pub(super) fn new(job: Job, session: Session) -> Self {
        Self {
            job,
            session,
            phase: Phase::Moving,
            open: 0,
            error: None,
            holds: false,
            asked: 0,
            extent: 0,
            skip: 0,
        }
    }

    /// The next piece, if any is left.
    pub(super) fn cut(&mut self) -> Option<Extent> {
        let extent = *self.job.plan().extents.get(self.extent)?;
        let len = (extent.len - self.skip).min(PIECE_BYTES_MAX);
        let piece = Extent {
            local_offset: extent.local_offset + self.skip,
            remote_offset: extent.remote_offset + self.skip,
            len,
            ..extent
        };
        self.skip += len;
        if self.skip == extent.len {
            self.extent += 1;
            self.skip = 0;
        }
        Some(piece)
    }

    pub(super) fn is_cut(&self) -> bool {
        self.extent == self.job.plan().extents.len()
    }
}
