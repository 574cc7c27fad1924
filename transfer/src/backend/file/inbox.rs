//! The way into a file engine: never blocking, never full, and closed with a reason.

use std::collections::{HashSet, LinkedList};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind};

use super::job::FileJob;
use crate::backend::abandoned;
use crate::region::{RegionCore, RegionId};
use crate::request::Priority;

/// What the engine's threads find: jobs that wait for their turn, as many as callers have posted and not given up.
#[derive(Default)]
pub(super) struct Letters {
    jobs: LinkedList<FileJob>,
    /// Those that give way to the others.
    background: LinkedList<FileJob>,
    /// Some job was given up by its caller.
    pub(super) reap: bool,
    /// Regions of which the engine has the kernel hold memory, and those of them that are being deregistered.
    pinned: HashSet<RegionId>,
    gone: Vec<Arc<RegionCore>>,
    /// How many were withdrawn, and of how many of those nothing is held any more.
    withdrawn: u64,
    let_go: u64,
    /// Set when no more jobs are taken.
    pub(super) closed: Option<&'static str>,
}

impl Letters {
    /// The job of this priority that waits longest.
    pub(super) fn next(&mut self, priority: Priority) -> Option<FileJob> {
        self.queue(priority).pop_front()
    }

    /// Those whose callers have given up, if any did since the last time.
    pub(super) fn take_given_up(&mut self) -> LinkedList<FileJob> {
        if !std::mem::take(&mut self.reap) {
            return LinkedList::new();
        }
        let given_up = |job: &mut FileJob| job.waiter.is_abandoned();
        let mut taken: LinkedList<FileJob> = self.jobs.extract_if(given_up).collect();
        taken.extend(self.background.extract_if(given_up));
        taken
    }

    fn queue(&mut self, priority: Priority) -> &mut LinkedList<FileJob> {
        match priority {
            Priority::Normal => &mut self.jobs,
            Priority::Background => &mut self.background,
        }
    }
}

/// A shared box of [`Letters`].
#[derive(Default)]
pub(super) struct Inbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
    changed: Condvar,
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
        letters.queue(job.priority).push_back(job);
        Ok(())
    }

    /// Some job was given up: the engine looks for it, once for all that were meanwhile.
    pub(super) fn reap(&self) {
        self.lock().reap = true;
    }

    /// Settles those who wait and were given up, if any were since the last time.
    pub(super) fn settle_given_up(&self) {
        let given_up = self.lock().take_given_up();
        for job in given_up {
            job.waiter.settle(Err(abandoned()));
        }
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

    /// A region is being deregistered: when memory of it may be held, it counts as used until that is over. Which one it is
    /// then of all that were withdrawn.
    pub(super) fn withdraw(&self, region: &Arc<RegionCore>) -> Option<u64> {
        let mut letters = self.lock();
        if !letters.pinned.remove(&region.id()) {
            return None;
        }
        region.hold();
        letters.gone.push(Arc::clone(region));
        letters.withdrawn += 1;
        Some(letters.withdrawn)
    }

    /// Waits until nothing is held of so many that were withdrawn, or for so long.
    pub(super) fn wait_let_go(&self, withdrawn: u64, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut letters = self.lock();
        while letters.let_go < withdrawn {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return;
            };
            letters = match self.changed.wait_timeout(letters, left) {
                Ok((letters, _)) => letters,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Those that were withdrawn, in their order; each is to be passed to [`Inbox::let_go`].
    pub(super) fn take_gone(&self) -> Vec<Arc<RegionCore>> {
        std::mem::take(&mut self.lock().gone)
    }

    /// Nothing is held any more of the next one that was withdrawn.
    pub(super) fn let_go(&self, region: &RegionCore) {
        region.leave();
        self.lock().let_go += 1;
        self.changed.notify_all();
    }

    /// No memory is held any more: all was taken back at once.
    pub(super) fn unpin_all(&self) {
        let mut letters = self.lock();
        letters.pinned.clear();
        let gone = std::mem::take(&mut letters.gone);
        drop(letters);
        gone.iter().for_each(|region| self.let_go(region));
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

    /// Waits for a job, those that were given up first; none once the inbox is closed and empty.
    pub(super) fn wait(&self) -> Option<FileJob> {
        let mut letters = self.lock();
        loop {
            let mut first = letters.take_given_up();
            first.append(&mut letters.jobs);
            letters.jobs = first;
            let first = letters.next(Priority::Normal);
            if let Some(job) = first.or_else(|| letters.next(Priority::Background)) {
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
