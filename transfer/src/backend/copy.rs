//! Copies between mapped memory: in the calling thread when small, on a thread of the agent's when large.

use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded, select};
use kvcache_core::{Error, ErrorKind, Result};

use super::{Job, Operation, Refusal};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::request::Priority;
use crate::sys::memory::Mapping;

/// Up to this many bytes a copy is done by the poster: at 8 GB/s it takes 32 µs, handing it over costs 10 to 60 µs.
pub(crate) const INLINE_BYTES_MAX: u64 = 256 << 10;

/// Up to this many extents a copy is done by the poster: short extents cost by number, not by byte.
const INLINE_EXTENTS_MAX: usize = 256;

/// Copies that may wait for the copying thread; posts above it are told `Busy`.
const COPIES_WAITING_MAX: usize = 16_384;

/// From this many bytes on, several threads share a copy between regions of one process: starting one takes about as
/// long as 400 KiB, and only what is far more gains by it.
pub(crate) const SHARED_BYTES_MIN: u64 = 8 << 20;

/// The most threads that share a copy.
pub const COPY_THREADS_MAX: usize = 16;

/// Ranges up to this size are copied after those before them in the list, and before those that follow: they may be the
/// words that say whether those are current.
pub(super) const WORD_BYTES_MAX: u64 = 512;

/// Bytes copied between two looks at whether the caller has given up.
pub(crate) const STEP_BYTES: u64 = 1 << 20;

type Work = Box<dyn FnOnce(Job, &Turn<'_>) + Send>;

/// A job with all that it needs to run, on any thread.
struct Task {
    job: Job,
    work: Work,
}

/// Who must be let past while a copy goes on: those that wait for the copying thread, if it is a background copy there.
pub(crate) struct Turn<'a>(Option<&'a Receiver<Task>>);

impl Turn<'_> {
    /// Runs copies that go first; then whether to go on. To be asked from time to time.
    pub(crate) fn go_on(&self, job: &Job) -> Result<()> {
        if let Some(first) = self.0 {
            while let Ok(task) = first.try_recv() {
                (task.work)(task.job, &Turn(None));
            }
        }
        job.go_on()
    }
}

/// Copies that wait for the thread, by priority.
struct Queues {
    normal: Sender<Task>,
    background: Sender<Task>,
}

/// The agent's copying thread.
pub(crate) struct Copier {
    queues: RwLock<Option<Queues>>,
    /// How many share a copy within the process.
    threads: usize,
}

impl Copier {
    /// Starts the thread; it ends after [`Copier::close`], once the copies that wait are done. Large copies within the
    /// process are shared by `threads`.
    pub(crate) fn start(threads: usize) -> Result<(Arc<Self>, JoinHandle<()>)> {
        let (normal, first) = bounded(COPIES_WAITING_MAX);
        let (background, second) = bounded(COPIES_WAITING_MAX);
        let thread = std::thread::Builder::new()
            .name("kvf-copy".into())
            .spawn(move || run(&first, &second))
            .map_err(|e| Error::io("start the copying thread", e))?;
        let queues = Queues { normal, background };
        Ok((
            Arc::new(Self {
                queues: RwLock::new(Some(queues)),
                threads,
            }),
            thread,
        ))
    }

    /// How many threads share a large copy within the process.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn close(&self) {
        *self.queues.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Runs `work`, which settles the job: here if it is small, else on the copying thread.
    pub(crate) fn post(
        &self,
        job: Job,
        work: impl FnOnce(Job, &Turn<'_>) + Send + 'static,
    ) -> Result<(), Refusal> {
        // A part of a large request is large: a post must return soon.
        let plan = job.whole();
        if plan.bytes <= INLINE_BYTES_MAX && plan.extents.len() <= INLINE_EXTENTS_MAX {
            work(job, &Turn(None));
            return Ok(());
        }
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        let Some(queues) = &*queues else {
            return Err(job.refuse(Error::new(ErrorKind::Cancelled, "the agent is closed")));
        };
        let queue = match job.priority() {
            Priority::Normal => &queues.normal,
            Priority::Background => &queues.background,
        };
        queue
            .try_send(Task {
                job,
                work: Box::new(work),
            })
            .map_err(|refused| match refused {
                TrySendError::Full(task) => {
                    let text = format!("{COPIES_WAITING_MAX} copies are waiting");
                    task.job.refuse(Error::new(ErrorKind::Busy, text))
                }
                TrySendError::Disconnected(task) => task.job.refuse(Error::new(
                    ErrorKind::Internal,
                    "the copying thread has ended",
                )),
            })
    }
}

fn run(first: &Receiver<Task>, second: &Receiver<Task>) {
    loop {
        if let Ok(Task { job, work }) = first.try_recv() {
            work(job, &Turn(None));
            continue;
        }
        select! {
            recv(first) -> task => match task {
                Ok(Task { job, work }) => work(job, &Turn(None)),
                Err(_) => break,
            },
            recv(second) -> task => match task {
                Ok(Task { job, work }) => work(job, &Turn(Some(first))),
                Err(_) => break,
            },
        }
    }
    // Closed: what waits is still done.
    for Task { job, work } in first.try_iter().chain(second.try_iter()) {
        work(job, &Turn(None));
    }
}

/// Copies a plan's extents; `remote` finds the memory behind each position of its remote side. Asks `go_on` from time to
/// time, and gives its error back.
pub(crate) fn copy_plan<'a>(
    plan: &Plan,
    go_on: &dyn Fn() -> Result<()>,
    remote: impl Fn(u32) -> Result<&'a Mapping>,
) -> Result<()> {
    copy_extents(plan, &plan.extents, go_on, &remote)
}

/// As [`copy_plan`], some extents of it.
pub(super) fn copy_extents<'a>(
    plan: &Plan,
    extents: &[Extent],
    go_on: &dyn Fn() -> Result<()>,
    remote: &impl Fn(u32) -> Result<&'a Mapping>,
) -> Result<()> {
    let mut since_look = 0;
    for extent in extents {
        let (local, remote) = (local_memory(plan, extent)?, remote(extent.remote)?);
        if plan.sums {
            go_on()?;
            let sum = remote.crc32c(extent.remote_offset, extent.len)?;
            local.write(extent.local_offset, &sum.to_le_bytes())?;
            continue;
        }
        let mut done = 0;
        while done < extent.len {
            if since_look >= STEP_BYTES {
                since_look = 0;
                go_on()?;
            }
            let count = (extent.len - done).min(STEP_BYTES);
            copy_part(plan.operation, extent, done, count, local, remote)?;
            done += count;
            since_look += count;
        }
    }
    Ok(())
}

/// The memory of this agent that an extent names.
pub(crate) fn local_memory<'a>(plan: &'a Plan, extent: &Extent) -> Result<&'a Mapping> {
    match &plan.local[extent.local as usize] {
        Target::Local(local) => local.mapping(),
        Target::Remote(_) => Err(Error::new(
            ErrorKind::Internal,
            "the local side names a peer's region",
        )),
    }
}

pub(super) fn copy_part(
    operation: Operation,
    extent: &Extent,
    done: u64,
    count: u64,
    local: &Mapping,
    remote: &Mapping,
) -> Result<()> {
    let (local_at, remote_at) = (extent.local_offset + done, extent.remote_offset + done);
    match operation {
        Operation::Read => Mapping::copy(remote, remote_at, local, local_at, count),
        Operation::Write => Mapping::copy(local, local_at, remote, remote_at, count),
    }
}
