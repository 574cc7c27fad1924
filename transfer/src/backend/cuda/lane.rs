//! A device's thread: queues copies, and sees them done.
//!
//! It asks for events that are recorded behind the copies, in the order of each stream: for a moment without a pause, and then
//! ever less often, as the wait gets longer. Without copies in flight it sleeps until a job comes.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use super::fragments;
use super::options::CudaOptions;
use super::staging;
use super::task::{Ending, Moves, Task, Way};
use super::worker::Worker;
use crate::backend::{Job, Refusal};
use crate::request::Priority;
use crate::sys::cuda::{Gpu, Keep, Pinned, Stream};
use crate::sys::fork::Process;

/// What the thread finds: jobs for their streams, as many as callers have posted.
#[derive(Default)]
pub(super) struct Letters {
    pub(super) tasks: VecDeque<(Way, Priority, Task)>,
    /// What is dropped on the thread, because that may take as long as the device is busy.
    pub(super) let_go: Vec<Keep>,
    /// Some job was given up by its caller.
    pub(super) reap: bool,
    pub(super) is_closed: bool,
    /// Why nothing is taken any more.
    pub(super) broken: Option<String>,
    /// The thread sleeps until it is told to go on.
    pub(super) is_asleep: bool,
}

/// Between callers and the thread.
#[derive(Default)]
pub(super) struct Shared {
    letters: Mutex<Letters>,
    arrived: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut Letters)) {
        change(&mut self.lock());
        self.arrived.notify_one();
    }

    /// Sleeps until something arrives, or for so long if a time is given. Whether something is there.
    pub(super) fn sleep(&self, longest: Option<Duration>) {
        let mut letters = self.lock();
        if letters.is_new() {
            return;
        }
        match longest {
            Some(longest) => drop(self.arrived.wait_timeout(letters, longest)),
            None => {
                letters.is_asleep = true;
                while !letters.is_new() {
                    let woken = self.arrived.wait(letters);
                    letters = woken.unwrap_or_else(PoisonError::into_inner);
                }
                letters.is_asleep = false;
            }
        }
    }

    /// Nothing is taken any more; what was not begun.
    pub(super) fn break_down(&self, reason: &str) -> VecDeque<(Way, Priority, Task)> {
        let mut letters = self.lock();
        letters.broken.get_or_insert_with(|| reason.to_owned());
        std::mem::take(&mut letters.tasks)
    }
}

impl Letters {
    fn is_new(&self) -> bool {
        !self.tasks.is_empty() || !self.let_go.is_empty() || self.reap || self.is_closed
    }
}

/// A device and its thread. Ends with its last owner, of which every job holds one.
pub(super) struct Lane {
    shared: Arc<Shared>,
    gpu: Arc<Gpu>,
    staging_bytes: u64,
    staging: Mutex<Option<Arc<Pinned>>>,
    has_batch: bool,
    process: Process,
    thread: Option<JoinHandle<()>>,
}

impl Lane {
    pub(super) fn start(gpu: &Arc<Gpu>, options: &CudaOptions) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let streams =
            || -> Result<_> { Ok([Stream::new(gpu)?, Stream::new(gpu)?, Stream::new(gpu)?]) };
        let (mut free, mut ordered) = (streams()?, streams()?);
        fragments::arm(gpu, options.fragments, &mut free, &mut ordered)?;
        let has_batch = free[0].has_batch();
        let worker = Worker::new(shared.clone(), free, ordered, options);
        let thread = std::thread::Builder::new()
            .name(format!("kvf-cuda-{}", gpu.ordinal()))
            .spawn(move || worker.run())
            .map_err(|error| Error::io("start a thread for a CUDA device", error))?;
        Ok(Self {
            shared,
            gpu: gpu.clone(),
            staging_bytes: options.staging_bytes,
            staging: Mutex::default(),
            has_batch,
            process: Process::current(),
            thread: Some(thread),
        })
    }

    /// Whether many ranges are copied in one call.
    pub(super) fn has_batch(&self) -> bool {
        self.has_batch
    }

    /// The buffers, made at first use.
    pub(super) fn staging(&self) -> Result<Arc<Pinned>> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(staging) = &*staging {
            return Ok(staging.clone());
        }
        let made = staging::memory(&self.gpu, self.staging_bytes)?;
        *staging = Some(made.clone());
        Ok(made)
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Drops this on the thread; here if there is none any more.
    pub(super) fn let_go(&self, thing: Keep) {
        let mut letters = self.shared.lock();
        if letters.broken.is_none() {
            letters.let_go.push(thing);
            drop(letters);
            self.shared.arrived.notify_one();
        }
    }

    pub(super) fn post(
        &self,
        job: Job,
        moves: Moves,
        ending: Option<Box<dyn Ending>>,
    ) -> Result<(), Refusal> {
        let mut letters = self.shared.lock();
        if let Some(reason) = &letters.broken {
            let text = format!("cuda device {}: {reason}", self.gpu.ordinal());
            drop(letters);
            return Err(job.refuse(Error::new(ErrorKind::Poisoned, text)));
        }
        let (way, priority) = (Way::of(job.plan()), job.priority());
        let task = Task::new(job, moves, ending);
        letters.tasks.push_back((way, priority, task));
        drop(letters);
        self.shared.arrived.notify_one();
        Ok(())
    }

    /// Some job was given up.
    pub(super) fn reap(&self) {
        self.shared.tell(|letters| letters.reap = true);
    }

    #[cfg(test)]
    pub(super) fn is_asleep(&self) -> bool {
        self.shared.lock().is_asleep
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // A forked child has no such thread, and perhaps a lock that nobody opens.
        if !self.process.is_current() {
            return;
        }
        self.shared.tell(|letters| letters.is_closed = true);
        if let Some(thread) = self.thread.take() {
            // The last owner can be a job that ends on this thread.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!(
                    device = self.gpu.ordinal(),
                    "a thread of a CUDA device panicked"
                );
            }
        }
    }
}
