//! A job under way: what of it was handed to the device.

use std::time::Instant;

use kvcache_core::Error;

use super::state::Line;
use crate::backend::Job;
use crate::backend::giving_way::GivingWay;
use crate::plan::Extent;
use crate::request::Priority;

/// Operations of a job that may be open on each rail when they are large: more would only make giving up slower.
const LARGE_WINDOW: usize = 16;

/// Bytes above which a request goes over all rails, and of the pieces in which it does. Such a piece takes 5 µs at 400 Gbit/s,
/// many times what posting it costs; and at the end the rails wait for each other no longer than for one piece.
pub(super) const STRIPE_BYTES: u64 = 256 << 10;

/// Bytes from which operations are large.
const LARGE_BYTES: u64 = 64 << 10;

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The peer was asked for as many of its regions.
    Asking(usize),
    Moving,
}

pub(super) struct Active {
    pub(super) job: Job,
    pub(super) line: Line,
    pub(super) phase: Phase,
    /// Operations that are open.
    pub(super) open: usize,
    /// Any operation was ever begun.
    pub(super) began: bool,
    pub(super) error: Option<Error>,
    /// Extents whose checksums were asked for.
    pub(super) asked: usize,
    /// It counts as a user of the peer's regions.
    pub(super) holds: bool,
    /// It was given up with operations open: they end by force then.
    pub(super) forced_at: Option<Instant>,
    /// It gives way, and waits until fewer operations of such jobs are open.
    pub(super) is_waiting: bool,
    /// Pieces that a rail did not finish.
    pub(super) again: Vec<Extent>,
    /// Rails, as bits, that its pieces go by while any of them is up: those near to the GPU whose memory they are of.
    pub(super) near: u32,
    /// Rails, as bits, that something was written by.
    pub(super) rails: u32,
    extent: usize,
    skip: u64,
}

impl Active {
    pub(super) fn new(job: Job, line: Line) -> Self {
        Self {
            job,
            line,
            phase: Phase::Moving,
            open: 0,
            began: false,
            error: None,
            asked: 0,
            holds: false,
            forced_at: None,
            is_waiting: false,
            again: Vec::new(),
            near: u32::MAX,
            rails: 0,
            extent: 0,
            skip: 0,
        }
    }

    /// The next piece of at most so many bytes, if any is left.
    pub(super) fn cut(&mut self, most: u64) -> Option<Extent> {
        if let Some(piece) = self.again.pop() {
            return Some(piece);
        }
        let extent = *self.job.plan().extents.get(self.extent)?;
        let len = (extent.len - self.skip).min(most);
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
        if let Some(piece) = self.again.last() {
            return piece.len;
        }
        let extent = self.job.plan().extents.get(self.extent);
        extent.map_or(0, |extent| extent.len - self.skip)
    }

    /// Whether it has to let others go first; it is among those who wait then.
    pub(super) fn must_wait(&mut self, number: u64, background: &mut GivingWay<u64>) -> bool {
        if !self.gives_way() || background.may_begin(self.left()) {
            return false;
        }
        if !std::mem::replace(&mut self.is_waiting, true) {
            background.wait(number, self.extent > 0 || self.skip > 0);
        }
        true
    }

    pub(super) fn is_cut(&self) -> bool {
        self.again.is_empty() && self.extent == self.job.plan().extents.len()
    }

    /// Whether it is so large that all rails carry it.
    pub(super) fn is_striped(&self) -> bool {
        self.job.whole().bytes > STRIPE_BYTES
    }

    /// Whether another operation may be begun, with so many rails in use.
    pub(super) fn may_begin(&self, rails: usize) -> bool {
        if self.is_cut() {
            return false;
        }
        self.open < LARGE_WINDOW * rails.max(1) || self.left() < LARGE_BYTES
    }
}
