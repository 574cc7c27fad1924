//! A job under way: what of it was handed to UCX.

use kvcache_core::Error;

use super::frame::Session;
use crate::backend::Job;
use crate::backend::giving_way::GivingWay;
use crate::plan::Extent;
use crate::request::Priority;
use crate::sys::ucx::Started;

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
    /// It gives way, and waits until fewer operations of such jobs are open.
    pub(super) is_waiting: bool,
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
            is_waiting: false,
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

    /// Whether its operations go behind those of other jobs.
    pub(super) fn gives_way(&self) -> bool {
        self.job.priority() == Priority::Background
    }

    /// Bytes of the extent that are not cut yet; none if nothing is left.
    pub(super) fn left(&self) -> u64 {
        let extent = self.job.plan().extents.get(self.extent);
        extent.map_or(0, |extent| extent.len - self.skip)
    }

    /// Whether it has to let others go first; it is among those who wait then.
    pub(super) fn must_wait(&mut self, number: usize, background: &mut GivingWay<usize>) -> bool {
        if self.is_cut() || !self.gives_way() || background.may_begin(self.left()) {
            return false;
        }
        if !std::mem::replace(&mut self.is_waiting, true) {
            background.wait(number, self.extent > 0 || self.skip > 0);
        }
        true
    }

    /// An operation of it was begun.
    pub(super) fn began(&mut self, started: Started, background: &mut GivingWay<usize>) {
        if started == Started::Over {
            return;
        }
        self.open += 1;
        if self.gives_way() {
            background.begin();
        }
    }

    pub(super) fn is_cut(&self) -> bool {
        self.extent == self.job.plan().extents.len()
    }
}
