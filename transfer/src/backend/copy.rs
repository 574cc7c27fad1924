//! Copies between mapped memory: in the calling thread when small; when large on a thread of the agent's, or
//! on one that waits for them.

mod queue;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use self::queue::{Hands, Queue};
use super::{Job, Operation, Refusal};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::request::Priority;
use crate::sys::memory::Mapping;

/// Up to this many bytes a copy is done by the poster: at 8 GB/s it takes 32 µs, handing it over costs 10 to 60 µs.
pub(crate) const INLINE_BYTES_MAX: u64 = 256 << 10;

/// Up to this many extents a copy is done by the poster: short extents cost by number, not by byte.
const INLINE_EXTENTS_MAX: usize = 256;

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

/// Whether a copy goes on now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Go {
    On,
    /// The thread is wanted back.
    Later,
}

/// How far a copy came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Done,
    /// It was told [`Go::Later`].
    Paused,
}

/// A copy that can be left to another thread half-way.
pub(crate) trait Work: Send {
    /// Begins or goes on, asking `turn` from time to time.
    fn go_on(&mut self, job: &Job, turn: &Turn<'_>) -> Result<Progress>;

    /// Whether it can be left half-way at all.
    fn may_pause(&self, plan: &Plan) -> bool {
        let _ = plan;
        true
    }

    /// The copy is over; settles the job.
    fn end(&mut self, job: Job, outcome: Result<()>);
}

/// A job with all that it needs to run, on any thread.
struct Task {
    job: Job,
    work: Box<dyn Work>,
}

impl Task {
    /// Copies until that is over or the thread is wanted back; then the task that is left.
    fn run(mut self, turn: &Turn<'_>) -> Option<Self> {
        let outcome = match self.work.go_on(&self.job, turn) {
            Ok(Progress::Paused) => return Some(self),
            Ok(Progress::Done) => Ok(()),
            Err(error) => Err(error),
        };
        self.work.end(self.job, outcome);
        None
    }
}

/// Who must be let past while a copy goes on, and until when its thread can be had.
pub(crate) struct Turn<'a>(Manners<'a>);

enum Manners<'a> {
    /// Nobody, to its end.
    Whole,
    /// All that wait for the copying thread: this is a background copy there.
    Last(&'a Queue<Task>),
    /// The thread is lent, until then or until that is so.
    Lent(Instant, &'a dyn Fn() -> bool),
}

impl Turn<'_> {
    /// Runs copies that go first; then whether to go on. To be asked from time to time.
    ///
    /// # Errors
    /// When the job's caller no longer waits.
    pub(crate) fn go_on(&self, job: &Job) -> Result<Go> {
        match &self.0 {
            Manners::Last(queue) => {
                while let Some(task) = queue.first() {
                    task.run(&Turn(Manners::Whole));
                }
            }
            Manners::Lent(until, done) if done() || Instant::now() >= *until => {
                return Ok(Go::Later);
            }
            Manners::Whole | Manners::Lent(..) => {}
        }
        job.go_on().map(|()| Go::On)
    }
}

/// The agent's copying thread.
pub(crate) struct Copier {
    queue: Arc<Queue<Task>>,
    /// How many share a copy within the process.
    threads: usize,
}

impl Copier {
    /// Starts the thread; it ends after [`Copier::close`], once the copies that wait are done. Large copies within the
    /// process are shared by `threads`.
    pub(crate) fn start(threads: usize) -> Result<(Arc<Self>, JoinHandle<()>)> {
        let queue = Arc::new(Queue::new());
        let own = queue.clone();
        let thread = std::thread::Builder::new()
            .name("kvf-copy".into())
            .spawn(move || run(&own))
            .map_err(|e| Error::io("start the copying thread", e))?;
        Ok((Arc::new(Self { queue, threads }), thread))
    }

    /// How many threads share a large copy within the process.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn close(&self) {
        self.queue.close();
    }

    /// Starts `work`, which settles the job: here if it is small, else on the copying thread or one that is lent.
    pub(crate) fn post(&self, job: Job, mut work: impl Work + 'static) -> Result<(), Refusal> {
        // A part of a large request is large: a post must return soon.
        let plan = job.whole();
        if plan.bytes <= INLINE_BYTES_MAX && plan.extents.len() <= INLINE_EXTENTS_MAX {
            let outcome = work.go_on(&job, &Turn(Manners::Whole)).map(drop);
            work.end(job, outcome);
            return Ok(());
        }
        // Parts of a request are copied in their order, so by one thread.
        let hands = match work.may_pause(plan) && job.is_whole() {
            true => Hands::Any,
            false => Hands::Own,
        };
        let (priority, work) = (job.priority(), Box::new(work));
        let pushed = self.queue.push(Task { job, work }, priority, hands);
        pushed.map_err(|task| {
            let text = "the agent is closed";
            task.job.refuse(Error::new(ErrorKind::Cancelled, text))
        })
    }

    /// Lends the calling thread until `done` or `until`, as long as there is something to copy: so whoever waits for a copy
    /// need not wake the copying thread and be woken by it.
    pub(crate) fn assist(&self, until: Instant, done: &dyn Fn() -> bool) {
        while !done()
            && Instant::now() < until
            && let Some(task) = self.queue.lend()
        {
            if let Some(rest) = task.run(&Turn(Manners::Lent(until, done)))
                && let Err(rest) = self.queue.put_back(rest)
            {
                rest.run(&Turn(Manners::Whole));
            }
        }
    }
}

fn run(queue: &Queue<Task>) {
    while let Some((task, priority)) = queue.next() {
        task.run(&Turn(match priority {
            Priority::Normal => Manners::Whole,
            Priority::Background => Manners::Last(queue),
        }));
    }
}

/// The first byte of a plan that is not copied yet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub(crate) extent: usize,
    pub(crate) done: u64,
}

impl Place {
    /// So many bytes further.
    pub(crate) fn advance(&mut self, extents: &[Extent], mut bytes: u64) {
        while bytes > 0 {
            let count = bytes.min(extents[self.extent].len - self.done);
            bytes -= count;
            self.done += count;
            if self.done == extents[self.extent].len {
                self.extent += 1;
                self.done = 0;
            }
        }
    }
}

/// Copies a plan's extents from `place` on; `remote` finds the memory behind each position of its remote side. Asks `go_on`
/// from time to time, gives its error back, and does as it says.
pub(crate) fn copy_plan<'a>(
    plan: &Plan,
    place: &mut Place,
    go_on: &dyn Fn() -> Result<Go>,
    remote: impl Fn(u32) -> Result<&'a Mapping>,
) -> Result<Progress> {
    copy_extents(plan, &plan.extents, place, go_on, &remote)
}

/// As [`copy_plan`], some extents of it.
pub(super) fn copy_extents<'a>(
    plan: &Plan,
    extents: &[Extent],
    place: &mut Place,
    go_on: &dyn Fn() -> Result<Go>,
    remote: &impl Fn(u32) -> Result<&'a Mapping>,
) -> Result<Progress> {
    let mut since_look = 0;
    while let Some(extent) = extents.get(place.extent) {
        if (plan.sums || since_look >= STEP_BYTES) && go_on()? == Go::Later {
            return Ok(Progress::Paused);
        }
        let (local, remote) = (local_memory(plan, extent)?, remote(extent.remote)?);
        if plan.sums {
            let sum = remote.crc32c(extent.remote_offset, extent.len)?;
            local.write(extent.local_offset, &sum.to_le_bytes())?;
            place.extent += 1;
            continue;
        }
        if since_look >= STEP_BYTES {
            since_look = 0;
        }
        let count = (extent.len - place.done).min(STEP_BYTES);
        copy_part(plan.operation, extent, place.done, count, local, remote)?;
        place.done += count;
        since_look += count;
        if place.done == extent.len {
            *place = Place {
                extent: place.extent + 1,
                done: 0,
            };
        }
    }
    Ok(Progress::Done)
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

#[cfg(test)]
mod tests;
