//! A request on one connection or several: how much of it is cut into frames, and how many of those are open.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, Result};

use super::frame::{Access, CHUNK_BYTES_MAX, CHUNK_RANGES_MAX, WireRange};
use super::scatter::Piece;
use crate::backend::{Job, Operation, abandoned};
use crate::descriptor::Target;
use crate::plan::{Plan, SUM_BYTES, SUM_BYTES_MAX};
use crate::request::Priority;

/// A request. Each connection that it is queued on cuts from it what that has room for.
pub(super) struct Active {
    pub(super) plan: Arc<Plan>,
    pub(super) priority: Priority,
    /// Bytes that a connection may have open when it takes more of this request, so that one does not take what others could.
    pub(super) share: u64,
    state: Mutex<ActiveState>,
}

pub(super) struct ActiveState {
    /// None once it is settled.
    pub(super) job: Option<Job>,
    /// Up to where it is cut.
    at: Place,
    /// Chunks of a read that a connection did not bring before it ended.
    returned: Vec<Chunk>,
    all_cut: bool,
    /// Frames not answered, on all connections.
    open: usize,
    error: Option<Error>,
    /// Its caller wants the memory back: what still arrives is dropped.
    yields: bool,
    /// A notification has still to be sent, alone.
    notify: bool,
}

/// A place between the bytes of a plan: an extent, and bytes of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    extent: usize,
    skip: u64,
}

/// What one frame moves.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chunk {
    from: Place,
    pub(super) bytes: u64,
    /// Its notification goes along.
    pub(super) notifies: bool,
}

/// What follows from a change of a request's state; done without its lock.
pub(super) enum Next {
    Nothing,
    Notify,
    Settle(Job, Result<()>),
}

impl ActiveState {
    /// A frame is over.
    pub(super) fn close(&mut self) {
        self.open -= 1;
    }

    /// Nothing more is cut, and it ends with this error, or one that came before.
    pub(super) fn fail(&mut self, error: impl FnOnce() -> Error) {
        self.all_cut = true;
        self.error.get_or_insert_with(error);
    }

    /// A connection has ended before it brought this.
    pub(super) fn hand_back(&mut self, chunk: Chunk) {
        if self.error.is_none() {
            self.returned.push(chunk);
            self.all_cut = false;
        }
    }

    /// Has what still arrives dropped, if its caller has given up. Whether that is so.
    pub(super) fn yield_memory(&mut self) -> bool {
        let given_up = self.job.as_ref().is_some_and(Job::is_abandoned);
        if given_up {
            self.yields = true;
            self.fail(abandoned);
        }
        given_up
    }

    /// A connection could not send the notification, which it had been given, before it ended or stood still.
    pub(super) fn hand_back_notice(&mut self) {
        self.open -= 1;
        self.notify = true;
    }

    /// The peer has the data, and had no room for the notification that came along.
    pub(super) fn repeat_notice(&mut self) {
        self.notify = true;
    }

    pub(super) fn is_all_cut(&self) -> bool {
        self.all_cut
    }

    /// Whether the request is over, or its notification due.
    pub(super) fn next(&mut self) -> Next {
        if !self.all_cut || self.open > 0 {
            return Next::Nothing;
        }
        if self.error.is_none() && self.notify {
            // Those who give up later are found where the notification waits.
            if self.job.as_ref().is_none_or(Job::is_abandoned) {
                self.fail(abandoned);
                return self.next();
            }
            self.notify = false;
            self.open = 1;
            if let Some(job) = &self.job {
                job.awaits_peer();
            }
            return Next::Notify;
        }
        match self.job.take() {
            None => Next::Nothing,
            Some(job) => Next::Settle(job, self.error.take().map_or(Ok(()), Err)),
        }
    }
}

impl Active {
    /// A request that is queued on so many connections.
    pub(super) fn new(job: Job, connections: usize) -> Self {
        let plan = job.plan().clone();
        let share_bytes = plan.bytes.div_ceil(connections.max(1) as u64);
        let (notify, priority) = (job.notifies(), job.priority());
        let state = ActiveState {
            job: Some(job),
            at: Place::default(),
            returned: Vec::new(),
            all_cut: plan.extents.is_empty(),
            open: 0,
            error: None,
            yields: false,
            notify,
        };
        Self {
            plan,
            priority,
            share: match connections {
                1 => u64::MAX,
                _ => share_bytes.max(CHUNK_BYTES_MAX),
            },
            state: Mutex::new(state),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ActiveState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what arrives is to be put into its memory.
    pub(super) fn is_live(&self) -> bool {
        let state = self.lock();
        state.job.is_some() && !state.yields
    }

    /// Cuts no more if its caller has given up; what follows from that.
    pub(super) fn give_up(&self) -> Option<Next> {
        let mut state = self.lock();
        if !state.job.as_ref().is_none_or(Job::is_abandoned) {
            return None;
        }
        state.fail(abandoned);
        Some(state.next())
    }

    /// As [`Active::give_up`], while its notification is all that is left to be sent or answered.
    pub(super) fn give_up_notice(&self) -> Option<Next> {
        let mut state = self.lock();
        if !state.job.as_ref().is_none_or(Job::is_abandoned) {
            return None;
        }
        state.close();
        state.fail(abandoned);
        Some(state.next())
    }

    /// Cuts the next chunk; none when there is nothing left to cut.
    pub(super) fn cut(&self, state: &mut ActiveState) -> Option<Cut> {
        if state.job.as_ref().is_some_and(Job::is_abandoned) {
            state.fail(abandoned);
        }
        if state.all_cut || state.job.is_none() {
            return None;
        }
        let whole = state.at == Place::default();
        let mut cut = match state.returned.pop() {
            Some(mut chunk) => self.cut_from(&mut chunk.from, chunk.bytes),
            None => self.cut_from(&mut state.at, CHUNK_BYTES_MAX),
        };
        state.all_cut = state.at.extent == self.plan.extents.len() && state.returned.is_empty();
        state.open += 1;
        // What fits one write carries its notification along: one round trip instead of two.
        if whole && state.all_cut && self.plan.operation == Operation::Write && state.notify {
            state.notify = false;
            let notification = state.job.as_ref().and_then(Job::notification);
            cut.access.notification = notification.map(|bytes| bytes.to_vec());
            cut.chunk.notifies = true;
        }
        Some(cut)
    }

    /// A chunk that begins at `at`, which moves to its end.
    fn cut_from(&self, at: &mut Place, bytes_max: u64) -> Cut {
        let mut cut = Cut::default();
        cut.chunk.from = *at;
        // Targets of the plan, by position in the access table.
        let mut targets: Vec<u32> = Vec::new();
        while cut.chunk.bytes < bytes_max && cut.access.ranges.len() < CHUNK_RANGES_MAX {
            let Some(extent) = self.plan.extents.get(at.extent) else {
                break;
            };
            let len = (extent.len - at.skip).min(bytes_max - cut.chunk.bytes);
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
            cut.access.ranges.push(WireRange {
                region,
                len: len as u32,
                offset: extent.remote_offset + at.skip,
            });
            cut.pieces.push(Piece {
                region: extent.local,
                offset: extent.local_offset + at.skip,
                len: if self.plan.sums { SUM_BYTES } else { len },
            });
            cut.chunk.bytes += len;
            at.skip += len;
            if at.skip == extent.len {
                at.extent += 1;
                at.skip = 0;
            }
        }
        cut
    }
}

const _: () = assert!(SUM_BYTES_MAX <= CHUNK_BYTES_MAX);

/// The part of a request that one frame asks for or brings.
#[derive(Default)]
pub(super) struct Cut {
    pub(super) access: Access,
    pub(super) pieces: Vec<Piece>,
    pub(super) chunk: Chunk,
}
