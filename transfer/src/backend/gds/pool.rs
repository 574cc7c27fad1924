//! The threads that wait in cuFile, and what waits for them.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvcache_core::{Error, ErrorKind};

use super::calls::{Call, Outcome, Places, cut};
use super::file;
use crate::backend::{Job, Refusal, abandoned, direct};
use crate::request::Priority;
use crate::sys::fork::Process;

/// A request, for as long as calls of it are to be made or under way: whoever of those that hold it lets go last settles it.
struct Task {
    job: Job,
    failure: Mutex<Option<Error>>,
}

impl Task {
    /// Notes the first failure.
    fn fail(&self, error: Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }

    fn has_failed(&self) -> bool {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.is_some()
    }

    /// Settles it, if nobody else holds it: then no call of it is under way, and none will be.
    fn let_go(this: Arc<Self>) {
        let Some(Self { job, failure }) = Arc::into_inner(this) else {
            return;
        };
        let outcome = match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => direct::land(job.plan()),
        };
        job.settle(outcome);
    }
}

/// A call that waits for its turn.
struct Waiting {
    /// Dropped before the request can be settled.
    call: Call,
    task: Arc<Task>,
}

#[derive(Default)]
struct Letters {
    normal: VecDeque<Waiting>,
    /// Those that give way to the others.
    background: VecDeque<Waiting>,
    in_background: u32,
    is_closed: bool,
}

impl Letters {
    fn queue(&mut self, priority: Priority) -> &mut VecDeque<Waiting> {
        match priority {
            Priority::Normal => &mut self.normal,
            Priority::Background => &mut self.background,
        }
    }

    /// The call whose turn it is.
    fn next(&mut self, background_max: u32) -> Option<(Waiting, Priority)> {
        if let Some(first) = self.normal.pop_front() {
            return Some((first, Priority::Normal));
        }
        if self.in_background >= background_max {
            return None;
        }
        let first = self.background.pop_front()?;
        self.in_background += 1;
        Some((first, Priority::Background))
    }

    /// What matches is taken from the queues.
    fn take(&mut self, is_meant: impl Fn(&Task) -> bool) -> Vec<Waiting> {
        let mut taken = Vec::new();
        for queue in [&mut self.normal, &mut self.background] {
            for waiting in std::mem::take(queue) {
                match is_meant(&waiting.task) {
                    true => taken.push(waiting),
                    false => queue.push_back(waiting),
                }
            }
        }
        taken
    }
}

#[derive(Default)]
struct Shared {
    letters: Mutex<Letters>,
    arrived: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What waits of a request is not done any more.
    fn end(&self, task: &Arc<Task>, error: Error) {
        task.fail(error);
        let taken = self.lock().take(|other| std::ptr::eq(other, &**task));
        drop(taken);
    }

    fn run(&self, background_max: u32) {
        let mut letters = self.lock();
        loop {
            if let Some((waiting, priority)) = letters.next(background_max) {
                drop(letters);
                self.serve(waiting, priority);
                letters = self.lock();
                if priority == Priority::Background {
                    letters.in_background -= 1;
                    self.arrived.notify_one();
                }
            } else if letters.is_closed {
                return;
            } else {
                letters = self
                    .arrived
                    .wait(letters)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn serve(&self, Waiting { call, task }: Waiting, priority: Priority) {
        if task.job.is_abandoned() {
            drop(call);
            self.end(&task, abandoned());
        } else if task.has_failed() {
            drop(call);
        } else {
            let (plan, remote) = (task.job.plan(), call.remote as usize);
            let path = file(&plan.remote[remote]).map(|file| file.path().display().to_string());
            match call.make(plan.operation, &path.unwrap_or_default()) {
                Outcome::Done => {}
                Outcome::Rest(call) => {
                    let task = task.clone();
                    // Its turn is over, so that nothing waits behind a call that comes in small pieces.
                    let mut letters = self.lock();
                    letters.queue(priority).push_back(Waiting { call, task });
                    drop(letters);
                    self.arrived.notify_one();
                }
                Outcome::Failed(error, is_own) => self.fail(&task, remote, error, is_own),
            }
        }
        Task::let_go(task);
    }

    /// A call failed. The request's caller hears of it at once if others of its calls are under way.
    fn fail(&self, task: &Arc<Task>, remote: usize, error: Error, is_own: bool) {
        let error = error.at(super::NAME);
        if is_own && let Ok(target) = file(&task.job.plan().remote[remote]) {
            target.give_up(error.context());
        }
        let said = Error::new(error.kind(), error.to_string());
        self.end(task, error);
        if Arc::strong_count(task) > 1 {
            task.job.report(said);
        }
    }
}

/// Lets go of calls that were taken from the queues.
fn end_all(taken: Vec<Waiting>, error: impl Fn() -> Error) {
    for Waiting { call, task } in taken {
        drop(call);
        task.fail(error());
        Task::let_go(task);
    }
}

/// A bounded number of threads, started with the first request.
pub(super) struct Pool {
    shared: Arc<Shared>,
    count: NonZeroU32,
    threads: Mutex<Vec<JoinHandle<()>>>,
    process: Process,
}

impl Pool {
    pub(super) fn new(count: NonZeroU32) -> Self {
        Self {
            shared: Arc::default(),
            count,
            threads: Mutex::default(),
            process: Process::current(),
        }
    }

    fn start(&self) -> kvcache_core::Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.count.get();
        // What gives way to others has half of them at most.
        let background_max = (count / 2).max(1);
        while threads.len() < count as usize {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new()
                .name("kvf-gds".to_owned())
                .spawn(move || shared.run(background_max))
                .map_err(|error| Error::io("start a thread for cuFile", error));
            match thread {
                Ok(thread) => threads.push(thread),
                // Fewer do as well.
                Err(error) if !threads.is_empty() => {
                    tracing::warn!(%error, "fewer threads for cuFile");
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) fn post(&self, job: Job, places: &Places) -> Result<(), Refusal> {
        if let Err(error) = self.start() {
            return Err(job.refuse(error));
        }
        let calls = cut(job.plan(), places);
        let priority = job.priority();
        let task = Arc::new(Task {
            job,
            failure: Mutex::default(),
        });
        let mut letters = self.shared.lock();
        let queue = letters.queue(priority);
        queue.extend(calls.into_iter().map(|call| Waiting {
            call,
            task: task.clone(),
        }));
        drop(letters);
        self.shared.arrived.notify_all();
        // Of a request without bytes this is the last hold.
        Task::let_go(task);
        Ok(())
    }

    /// Some job was given up: one that has no call under way ends here, whatever the threads wait for.
    pub(super) fn reap(&self) {
        let given_up = self.shared.lock().take(|task| task.job.is_abandoned());
        end_all(given_up, abandoned);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // A forked child has no such threads.
        if !self.process.is_current() {
            return;
        }
        let mut letters = self.shared.lock();
        letters.is_closed = true;
        let left = letters.take(|_| true);
        drop(letters);
        self.shared.arrived.notify_all();
        end_all(left, || Error::new(ErrorKind::Cancelled, "gds: closed"));
        let threads = self
            .threads
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // The last owner can be a request that ends on one of them.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread for cuFile panicked");
            }
        }
    }
}
