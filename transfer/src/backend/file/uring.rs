//! The io_uring engine: one thread, one ring, a bounded number of calls in the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use io_uring::{IoUring, opcode, squeue, types};
use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::EventfdFlags;

use super::door::Door;
use super::inbox::Inbox;
use super::job::{FileJob, FileOperation, Waiter};
use super::pinned::Pinned;
use super::plan::{Call, calls};
use super::ring::ring;
use crate::backend::{Keeper, abandoned};
use crate::descriptor::Target;
use crate::region::RegionCore;
use crate::request::Priority;

/// Calls in the kernel at once: enough to fill an NVMe drive, few enough that no job waits behind a wall of others.
const CALLS_MAX: usize = 64;
/// As [`CALLS_MAX`], for jobs that give way: what others may find in the kernel before them.
const BACKGROUND_CALLS_MAX: usize = 16;
/// Jobs of a priority whose calls are worked out; more wait in the inbox.
const JOBS_OPEN_MAX: usize = 1024;
/// The wake-up's number; calls have their slot's.
const WAKE: u64 = u64::MAX;
/// The number of cancellations, whose answers do not matter: the cancelled call answers for itself.
const CANCELLATION: u64 = u64::MAX - 1;

/// A running ring.
pub(super) struct Uring {
    door: Arc<Door>,
    thread: Option<JoinHandle<()>>,
}

impl Uring {
    /// Starts the thread and its ring.
    ///
    /// # Errors
    /// `Unsupported` when the kernel refuses a ring or lacks one of the operations.
    pub(super) fn start(inbox: Arc<Inbox>) -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags)
            .map_err(|error| Error::io("make an eventfd for the file engine", error.into()))?;
        let door = Arc::new(Door::new(inbox, wake));
        let (started, outcome) = mpsc::sync_channel(1);
        let own = Arc::clone(&door);
        // The ring is made on its own thread: with a single issuer the kernel wants it so.
        let thread = std::thread::Builder::new()
            .name("kvf-file".to_owned())
            .spawn(move || match ring() {
                Ok(ring) => {
                    // The receiver waits below.
                    let _ = started.send(Ok(()));
                    own.is_opened_here();
                    Worker::new(ring, own).run();
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            })
            .map_err(|error| Error::io("start the file engine's thread", error))?;
        match outcome.recv() {
            Ok(Ok(())) => Ok(Self {
                door,
                thread: Some(thread),
            }),
            Ok(Err(error)) => {
                Err(Error::new(ErrorKind::Unsupported, "io_uring").with_source(error))
            }
            Err(_) => Err(Error::new(
                ErrorKind::Internal,
                "the file engine died at its start",
            )),
        }
    }

    /// What is told of regions that are deregistered.
    pub(super) fn keeper(&self) -> Arc<dyn Keeper> {
        Arc::<Door>::clone(&self.door)
    }

    /// Makes the thread look into its inbox.
    pub(super) fn wake(&self) {
        self.door.knock();
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.wake();
        if let Some(thread) = self.thread.take() {
            // The last owner can be a waiter that runs on that very thread.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("the file engine's thread panicked");
            }
        }
    }
}

/// A job whose calls are being made.
struct Active {
    waiting: VecDeque<Call>,
    memory: Arc<[Target]>,
    priority: Priority,
    in_kernel: usize,
    waiter: Box<dyn Waiter>,
    /// Why no more calls are made; told when the kernel has answered for all of them.
    failure: Option<Error>,
}

struct Worker {
    ring: IoUring,
    door: Arc<Door>,
    jobs: BTreeMap<u64, Active>,
    /// How many of them there are, and how many that give way.
    open: usize,
    background_open: usize,
    started: u64,
    /// Jobs with calls to make, in turn.
    turns: VecDeque<u64>,
    /// Those of them that give way to the others, and how many calls they have in the kernel.
    background: VecDeque<u64>,
    background_calls: usize,
    /// The calls in the kernel, by slot, with their job.
    slots: Vec<Option<(u64, Call)>>,
    free: Vec<usize>,
    wake_armed: bool,
    pinned: Pinned,
}

impl Worker {
    fn new(ring: IoUring, door: Arc<Door>) -> Self {
        Self {
            pinned: Pinned::new(&ring),
            ring,
            door,
            jobs: BTreeMap::new(),
            open: 0,
            background_open: 0,
            started: 0,
            turns: VecDeque::new(),
            background: VecDeque::new(),
            background_calls: 0,
            slots: (0..CALLS_MAX).map(|_| None).collect(),
            free: (0..CALLS_MAX).rev().collect(),
            wake_armed: false,
        }
    }

    fn run(mut self) {
        loop {
            let closed = self.take_letters();
            self.issue();
            if closed && self.jobs.is_empty() {
                return self.end();
            }
            if let Err(error) = self.wait() {
                self.break_down(&error);
                return self.end();
            }
            self.complete();
        }
    }

    /// The kernel lets go of all memory with the ring.
    fn end(self) {
        drop(self.ring);
        self.door.inbox.unpin_all();
    }

    /// Takes what came in; true when the engine is to end.
    fn take_letters(&mut self) -> bool {
        let (jobs, given_up, reap, closed) = {
            let door = Arc::clone(&self.door);
            let mut letters = door.inbox.lock();
            let reap = letters.reap;
            let closed = letters.closed;
            let given_up = letters.take_given_up();
            let mut jobs = Vec::new();
            for priority in [Priority::Normal, Priority::Background] {
                let room = JOBS_OPEN_MAX.saturating_sub(*self.open(priority));
                // When nothing is taken any more, all that wait are failed below.
                let most = closed.map_or(room, |_| usize::MAX);
                jobs.extend(std::iter::from_fn(|| letters.next(priority)).take(most));
            }
            (jobs, given_up, reap, closed)
        };
        let given_up = given_up.into_iter();
        given_up.for_each(|job| job.waiter.settle(Err(abandoned())));
        for region in self.door.inbox.take_gone() {
            self.pinned.forget(&self.ring, region.id());
            self.door.inbox.let_go(&region);
        }
        for job in jobs {
            self.admit(job);
        }
        if reap || closed.is_some() {
            for id in self.jobs.keys().copied().collect::<Vec<_>>() {
                if let Some(why) = closed {
                    let text = format!("file engine: {why}");
                    self.fail(id, Error::new(ErrorKind::Cancelled, text));
                } else if self
                    .jobs
                    .get(&id)
                    .is_some_and(|job| job.waiter.is_abandoned())
                {
                    self.fail(id, abandoned());
                }
            }
        }
        closed.is_some()
    }

    fn admit(&mut self, job: FileJob) {
        match calls(&job) {
            Ok(calls) => {
                let id = self.started;
                self.started += 1;
                let waiting = calls.into();
                let active = Active {
                    waiting,
                    memory: job.memory,
                    priority: job.priority,
                    in_kernel: 0,
                    waiter: job.waiter,
                    failure: None,
                };
                let priority = active.priority;
                self.jobs.insert(id, active);
                *self.open(priority) += 1;
                self.turns(priority).push_back(id);
            }
            Err(error) => {
                job.waiter.settle(Err(error));
            }
        }
    }

    /// Makes no more calls for a job, withdraws those under way, and settles it once the kernel has answered for each.
    fn fail(&mut self, id: u64, error: Error) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        if job.failure.is_some() {
            return;
        }
        job.failure = Some(error);
        job.waiting.clear();
        if job.in_kernel > 0 {
            self.cancel_calls(id);
        } else {
            self.settle_if_over(id);
        }
    }

    fn cancel_calls(&mut self, id: u64) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|(job, _)| *job == id) {
                let entry = opcode::AsyncCancel::new(slot as u64)
                    .build()
                    .user_data(CANCELLATION);
                self.push(&entry);
            }
        }
    }

    fn open(&mut self, priority: Priority) -> &mut usize {
        match priority {
            Priority::Normal => &mut self.open,
            Priority::Background => &mut self.background_open,
        }
    }

    fn turns(&mut self, priority: Priority) -> &mut VecDeque<u64> {
        match priority {
            Priority::Normal => &mut self.turns,
            Priority::Background => &mut self.background,
        }
    }

    /// The job whose turn it is.
    fn next(&mut self) -> Option<u64> {
        let first = self.turns.pop_front();
        if first.is_some() || self.background_calls >= BACKGROUND_CALLS_MAX {
            return first;
        }
        self.background.pop_front()
    }

    /// Hands calls to the kernel, one a job in turn, as long as slots are free.
    fn issue(&mut self) {
        while !self.free.is_empty() {
            let Some(id) = self.next() else {
                return;
            };
            let Some(job) = self.jobs.get_mut(&id) else {
                continue;
            };
            let Some(call) = job.waiting.pop_front() else {
                continue;
            };
            job.in_kernel += 1;
            let (priority, more) = (job.priority, !job.waiting.is_empty());
            if more {
                self.turns(priority).push_back(id);
            }
            if priority == Priority::Background {
                self.background_calls += 1;
            }
            let Some(slot) = self.free.pop() else { return };
            self.enter(slot, id, call);
        }
    }

    fn enter(&mut self, slot: usize, id: u64, mut call: Call) {
        call.begin();
        let descriptor = types::Fd(call.descriptor);
        let (vectors, count) = (call.vectors.as_ptr(), call.vectors.len() as u32);
        let known = self.known(id, &call);
        let entry = match (call.operation, known) {
            (FileOperation::Read, Some((number, range))) => {
                let (base, len) = (range.iov_base.cast(), range.iov_len as u32);
                opcode::ReadFixed::new(descriptor, base, len, number)
                    .offset(call.offset)
                    .build()
            }
            (FileOperation::Write, Some((number, range))) => {
                let (base, len) = (
                    range.iov_base.cast::<u8>().cast_const(),
                    range.iov_len as u32,
                );
                opcode::WriteFixed::new(descriptor, base, len, number)
                    .offset(call.offset)
                    .build()
            }
            (FileOperation::Read, None) => opcode::Readv::new(descriptor, vectors, count)
                .offset(call.offset)
                .build(),
            (FileOperation::Write, None) => opcode::Writev::new(descriptor, vectors, count)
                .offset(call.offset)
                .build(),
            (FileOperation::Sync, _) => opcode::Fsync::new(descriptor)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        // The call lives in its slot until the kernel answers, and with it the vectors' heap and any bounce buffer.
        self.slots[slot] = Some((id, call));
        self.push(&entry.user_data(slot as u64));
    }

    /// The memory of a call that the ring knows, with its number there.
    fn known(&mut self, id: u64, call: &Call) -> Option<(u16, libc::iovec)> {
        let range = call.direct_range()?;
        let job = self.jobs.get(&id)?;
        let Target::Local(region) = job.memory.get(call.local as usize)? else {
            return None;
        };
        let region: &Arc<RegionCore> = region;
        let number = self
            .pinned
            .find(&self.ring, &self.door.inbox, region, range)?;
        Some((number, range))
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: an entry names only what stays put until its answer: vectors and bounce buffers kept in `slots`,
            // descriptors kept open by the job's file, and memory lent until the waiter is told that it is free.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            // Full: let the kernel take what is there. Its refusal comes back from the next wait.
            if self.ring.submit().is_err() {
                self.complete();
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.wake_armed {
            self.wake_armed = true;
            let events = libc::POLLIN as u32;
            let entry = opcode::PollAdd::new(types::Fd(self.door.wake.as_raw_fd()), events).build();
            self.push(&entry.user_data(WAKE));
        }
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            // A signal, a full completion queue, short memory: look at what is there and come again.
            Err(error)
                if [libc::EINTR, libc::EBUSY, libc::EAGAIN]
                    .map(Some)
                    .contains(&error.raw_os_error()) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn complete(&mut self) {
        let answers: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (number, result) in answers {
            match number {
                WAKE => {
                    self.wake_armed = false;
                    let mut count = [0; 8];
                    // Empty already is fine.
                    let _ = rustix::io::read(&self.door.wake, &mut count);
                }
                CANCELLATION => {}
                slot => self.complete_call(slot as usize, result),
            }
        }
    }

    fn complete_call(&mut self, slot: usize, result: i32) {
        let Some((id, mut call)) = self.slots.get_mut(slot).and_then(Option::take) else {
            return;
        };
        self.free.push(slot);
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        job.in_kernel -= 1;
        let priority = job.priority;
        if priority == Priority::Background {
            self.background_calls -= 1;
        }
        if job.failure.is_none() {
            match call.advance(result) {
                Ok(true) => {}
                Ok(false) => {
                    // The rest of a short call goes first: its siblings are done or on their way.
                    job.waiting.push_front(call);
                    self.turns(priority).push_front(id);
                    return;
                }
                Err(error) => self.fail(id, error),
            }
        }
        self.settle_if_over(id);
    }

    fn settle_if_over(&mut self, id: u64) {
        let over = |job: &Active| job.in_kernel == 0 && job.waiting.is_empty();
        if !self.jobs.get(&id).is_some_and(over) {
            return;
        }
        if let Some(job) = self.jobs.remove(&id) {
            *self.open(job.priority) -= 1;
            job.waiter.settle(job.failure.map_or(Ok(()), Err));
        }
    }

    /// The ring is unusable: jobs that the kernel may still work on are never settled, so their memory is never called
    /// free; the deadline tells who waits for them.
    fn break_down(&mut self, error: &io::Error) {
        tracing::error!(%error, jobs = self.jobs.len(), "the file engine's ring broke down");
        self.door.inbox.close("its ring broke down");
        self.take_letters();
        // Vectors and bounce buffers may be read by the kernel as well: they live as long as the process.
        for call in self.slots.drain(..).flatten() {
            Box::leak(Box::new(call));
        }
        for (_, job) in std::mem::take(&mut self.jobs) {
            Box::leak(Box::new(job));
        }
    }
}
