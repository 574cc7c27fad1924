//! A request on a connection: how much of it is cut into frames, and how many of those are open.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, Result};

use super::frame::{Access, CHUNK_BYTES_MAX, CHUNK_RANGES_MAX, WireRange};
use super::scatter::Piece;
use crate::backend::{Job, Operation, abandoned};
use crate::descriptor::Target;
use crate::plan::{Plan, SUM_BYTES, SUM_BYTES_MAX};
use crate::request::Priority;

/// A request on this connection.
pub(super) struct Active {
    pub(super) plan: Arc<Plan>,
    pub(super) priority: Priority,
    state: Mutex<ActiveState>,
}

pub(super) struct ActiveState {
    /// None once it is settled.
    pub(super) job: Option<Job>,
    /// The first extent that is not wholly cut, and the bytes of it that are.
    extent: usize,
    skip: u64,
    pub(super) all_cut: bool,
    /// Frames not answered.
    pub(super) open: usize,
    pub(super) error: Option<Error>,
    /// A notification has still to be sent, alone.
    notify: bool,
}

/// What follows from a change of a request's state; done without its lock.
pub(super) enum Next {
    Nothing,
    Notify,
    Settle(Job, Result<()>),
}

impl ActiveState {
    /// Whether the request is over, or its notification due.
    pub(super) fn next(&mut self) -> Next {
        if !self.all_cut || self.open > 0 {
            return Next::Nothing;
        }
        if self.error.is_none() && self.notify {
            self.notify = false;
            self.open = 1;
            return Next::Notify;
        }
        match self.job.take() {
            None => Next::Nothing,
            Some(job) => Next::Settle(job, self.error.take().map_or(Ok(()), Err)),
        }
    }
}

impl Active {
    pub(super) fn new(job: Job) -> Self {
        let plan = job.plan().clone();
        let (notify, priority) = (job.notifies(), job.priority());
        let state = ActiveState {
            job: Some(job),
            extent: 0,
            skip: 0,
            all_cut: plan.extents.is_empty(),
            open: 0,
            error: None,
            notify,
        };
        Self {
            plan,
            priority,
            state: Mutex::new(state),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ActiveState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the request still owns its memory.
    pub(super) fn is_live(&self) -> bool {
        self.lock().job.is_some()
    }

    /// Cuts no more if its caller has given up; what follows from that.
    pub(super) fn give_up(&self) -> Option<Next> {
        let mut state = self.lock();
        if !state.job.as_ref().is_none_or(Job::is_abandoned) {
            return None;
        }
        state.all_cut = true;
        state.error.get_or_insert_with(abandoned);
        Some(state.next())
    }

    /// Cuts the next chunk; none when there is nothing left to cut.
    pub(super) fn cut(&self, state: &mut ActiveState) -> Option<Cut> {
        if let Some(job) = &state.job
            && job.is_abandoned()
        {
            state.all_cut = true;
            state.error.get_or_insert_with(abandoned);
        }
        if state.all_cut || state.job.is_none() {
            return None;
        }
        let whole = state.extent == 0 && state.skip == 0;
        let mut cut = Cut::default();
        // Targets of the plan, by position in the access table.
        let mut targets: Vec<u32> = Vec::new();
        while cut.bytes < CHUNK_BYTES_MAX && cut.access.ranges.len() < CHUNK_RANGES_MAX {
            let Some(extent) = self.plan.extents.get(state.extent) else {
                break;
            };
            let len = (extent.len - state.skip).min(CHUNK_BYTES_MAX - cut.bytes);
            if self.plan.sums && len < extent.len {
                // A range has one checksum.
                break;
            }
            let region = match targets.iter().rposition(|&target| target == extent.remote) {
                Some(position) => position as u32,
                None => {
                    if let Target::Remote(region) = &self.plan.remote[extent.remote as usize] {
                        cut.access.regions.push((region.id, region.key));
                    }
                    targets.push(extent.remote);
                    (targets.len() - 1) as u32
                }
            };
            let offset = extent.remote_offset + state.skip;
            cut.access.ranges.push(WireRange {
                region,
                len: len as u32,
                offset,
            });
            let offset = extent.local_offset + state.skip;
            cut.pieces.push(Piece {
                region: extent.local,
                offset,
                len: if self.plan.sums { SUM_BYTES } else { len },
            });
            cut.bytes += len;
            state.skip += len;
            if state.skip == extent.len {
                state.extent += 1;
                state.skip = 0;
            }
        }
        state.all_cut = state.extent == self.plan.extents.len();
        state.open += 1;
        // What fits one write carries its notification along: one round trip instead of two.
        if whole && state.all_cut && self.plan.operation == Operation::Write && state.notify {
            state.notify = false;
            let notification = state.job.as_ref().and_then(Job::notification);
            cut.access.notification = notification.map(|bytes| bytes.to_vec());
        }
        Some(cut)
    }
}

const _: () = assert!(SUM_BYTES_MAX <= CHUNK_BYTES_MAX);

/// The part of a request that one frame asks for or brings.
#[derive(Default)]
pub(super) struct Cut {
    pub(super) access: Access,
    pub(super) pieces: Vec<Piece>,
    pub(super) bytes: u64,
}
