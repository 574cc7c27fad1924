//! The way into a file engine: bounded, never blocking, and closed with a reason.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, ErrorKind};

use super::job::FileJob;
use crate::region::{RegionCore, RegionId};
use crate::request::Priority;

/// The most jobs an engine holds, waiting and under way; more are refused as `Busy`.
pub const FILE_JOBS_MAX: usize = 16 << 10;

/// What the engine's threads find.
#[derive(Default)]
pub(super) struct Letters {
    pub(super) jobs: VecDeque<FileJob>,
    /// Those that give way to the others.
    pub(super) background: VecDeque<FileJob>,
    /// Some job was given up by its caller.
    pub(super) reap: bool,
    /// Regions of which the engine has the kernel hold memory, and those of them that are being deregistered.
    pinned: HashSet<RegionId>,
    gone: Vec<Arc<RegionCore>>,
    /// Set when no more jobs are taken.
    pub(super) closed: Option<&'static str>,
    unsettled: usize,
}

/// A shared box of [`Letters`].
#[derive(Default)]
pub(super) struct Inbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
}

impl Inbox {
    pub(super) fn lock(&self) -> MutexGuard<'_, Letters> {
        // Every change to the letters is complete before anything can panic.
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a job in, or hands it back with the reason.
    pub(super) fn submit(&self, job: FileJob) -> Result<(), (FileJob, Error)> {
        let mut letters = self.lock();
        if let Some(reason) = letters.closed {
            let error = Error::new(ErrorKind::Poisoned, format!("file engine: {reason}"));
            return Err((job, error));
        }
        if letters.unsettled >= FILE_JOBS_MAX {
            let text = format!("the file engine holds {FILE_JOBS_MAX} jobs");
            return Err((job, Error::new(ErrorKind::Busy, text)));
        }
        letters.unsettled += 1;
        match job.priority {
            Priority::Normal => letters.jobs.push_back(job),
            Priority::Background => letters.background.push_back(job),
        }
        Ok(())
    }

    /// Counts one job less.
    pub(super) fn settled(&self) {
        self.lock().unsettled -= 1;
    }

    /// Notes that memory of a region may be held; not of one that is being deregistered already.
    pub(super) fn pin(&self, region: &RegionCore) -> bool {
        let mut letters = self.lock();
        let is_there = !region.is_closed();
        if is_there {
            letters.pinned.insert(region.id());
        }
        is_there
    }

    #[cfg(test)]
    pub(super) fn is_pinned(&self, region: RegionId) -> bool {
        self.lock().pinned.contains(&region)
    }

    /// A region is being deregistered: when memory of it may be held, it counts as used until that is over. Whether it is so.
    pub(super) fn withdraw(&self, region: &Arc<RegionCore>) -> bool {
        let mut letters = self.lock();
        let is_pinned = letters.pinned.remove(&region.id());
        if is_pinned {
            region.hold();
            letters.gone.push(Arc::clone(region));
        }
        is_pinned
    }

    /// Those that were withdrawn; each is to be left when nothing of it is held any more.
    pub(super) fn take_gone(&self) -> Vec<Arc<RegionCore>> {
        std::mem::take(&mut self.lock().gone)
    }

    /// No memory is held any more: all was taken back at once.
    pub(super) fn unpin_all(&self) {
        let mut letters = self.lock();
        letters.pinned.clear();
        let gone = std::mem::take(&mut letters.gone);
        drop(letters);
        gone.iter().for_each(|region| region.leave());
    }

    /// Takes no more jobs.
    pub(super) fn close(&self, reason: &'static str) {
        self.lock().closed.get_or_insert(reason);
        self.arrived.notify_all();
    }

    /// Makes one of those in [`Inbox::wait`] look again.
    pub(super) fn wake(&self) {
        self.arrived.notify_one();
    }

    /// Waits for a job; none once the inbox is closed and empty.
    pub(super) fn wait(&self) -> Option<FileJob> {
        let mut letters = self.lock();
        loop {
            let first = letters.jobs.pop_front();
            if let Some(job) = first.or_else(|| letters.background.pop_front()) {
                return Some(job);
            }
            if letters.closed.is_some() {
                return None;
            }
            letters = self
                .arrived
                .wait(letters)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
