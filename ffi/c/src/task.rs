//! Tasks: what was begun on a node, and how to wait for it.

use std::any::Any;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use kvfabric::life::Life;
use kvfabric::{
    Error, ErrorKind, Fetched, HeldDepth, Operation, Pinned, PromoteReport, Reach, Removed, Result,
    StoreReport,
};

use crate::boundary::{Handle, Out, boundary, enter, into_raw, milliseconds, take};
use crate::status::kvf_status;

/// Where a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_task_state {
    /// Not finished.
    KVF_TASK_RUNNING = 0,
    /// Finished: its report can be asked for.
    KVF_TASK_DONE = 1,
    /// Failed; kvf_task_wait says why.
    KVF_TASK_FAILED = 2,
}

/// Work in progress, on a node or at a peer service. Giving the handle back stops nothing.
pub struct kvf_task {
    life: Arc<Life>,
    /// A task keeps alive what works on it.
    _owner: Arc<dyn Any + Send + Sync>,
    pub(crate) work: Work,
}

impl Handle for kvf_task {
    const NAME: &'static str = "task";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// What the work was, and so which report it has.
pub(crate) enum Work {
    Store(Operation<StoreReport>),
    Fetch(Operation<Fetched>),
    Held(Operation<HeldDepth>),
    Locate(Operation<Reach>),
    Pin(Operation<Pinned>),
    Remove(Operation<Removed>),
    Promote(Operation<PromoteReport>),
    /// What reports nothing but its end.
    End(Operation<()>),
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Self::Store(_) => "store",
            Self::Fetch(_) => "fetch",
            Self::Held(_) => "question what is held",
            Self::Locate(_) => "locate",
            Self::Pin(_) => "pin",
            Self::Remove(_) => "removal",
            Self::Promote(_) => "promotion",
            Self::End(_) => "task without a report",
        }
    }

    /// What all work has in common.
    fn any(&self) -> &dyn Ending {
        match self {
            Self::Store(operation) => operation,
            Self::Fetch(operation) => operation,
            Self::Held(operation) => operation,
            Self::Locate(operation) => operation,
            Self::Pin(operation) => operation,
            Self::Remove(operation) => operation,
            Self::Promote(operation) => operation,
            Self::End(operation) => operation,
        }
    }
}

/// An operation without its report.
trait Ending {
    /// How it ended; none while it runs.
    fn ended(&self) -> Option<Result<()>>;
    /// As `ended`, after waiting for it.
    fn wait_ended(&self, timeout: Duration) -> Option<Result<()>>;
    fn event_fd(&self) -> Result<BorrowedFd<'_>>;
}

impl<T> Ending for Operation<T> {
    fn ended(&self) -> Option<Result<()>> {
        self.poll().map(|outcome| outcome.map(drop))
    }

    fn wait_ended(&self, timeout: Duration) -> Option<Result<()>> {
        self.wait(timeout).map(|outcome| outcome.map(drop))
    }

    fn event_fd(&self) -> Result<BorrowedFd<'_>> {
        Operation::event_fd(self)
    }
}

impl kvf_task {
    /// Work in progress on `owner`, which lives and fails with its handles' `life`.
    pub(crate) fn begin(
        life: &Arc<Life>,
        owner: Arc<dyn Any + Send + Sync>,
        work: Work,
    ) -> *mut Self {
        into_raw(Self {
            life: life.clone(),
            _owner: owner,
            work,
        })
    }

    /// For a report that this task does not have.
    pub(crate) fn other(&self, wanted: &str) -> Error {
        let text = format!("the task is a {}, not a {wanted}", self.work.name());
        Error::new(ErrorKind::Invalid, text)
    }
}

/// The outcome of a task that must be over.
pub(crate) fn outcome<T>(operation: &Operation<T>) -> Result<&T> {
    operation.poll().unwrap_or_else(|| {
        let text = "the task is not finished";
        Err(Error::new(ErrorKind::Busy, text))
    })
}

/// Says where a task stands, without waiting. Failure of the task is no failure of this call.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `state_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_poll(
    task: *const kvf_task,
    state_out: *mut kvf_task_state,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(state_out, "state_out") }?;
        out.write(match task.work.any().ended() {
            None => kvf_task_state::KVF_TASK_RUNNING,
            Some(Ok(())) => kvf_task_state::KVF_TASK_DONE,
            Some(Err(_)) => kvf_task_state::KVF_TASK_FAILED,
        });
        Ok(())
    })
}

/// Waits until a task is finished, at most `timeout_ms`: KVF_OK when it is done, else why it failed.
///
/// KVF_TIMEOUT also when `timeout_ms` ran out, which fails this call and not the task: kvf_task_poll tells the two apart.
///
/// # Safety
/// `task` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_wait(task: *const kvf_task, timeout_ms: u32) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        let ended = task.work.any().wait_ended(milliseconds(timeout_ms));
        ended.unwrap_or_else(|| {
            let text = format!("task not finished after {timeout_ms} ms");
            Err(Error::new(ErrorKind::Timeout, text))
        })
    })
}

/// A descriptor that polls as readable once the task is finished, and stays so. It belongs to the task, lives as long as
/// that, and must be neither read from nor closed.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `fd_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_eventfd(task: *const kvf_task, fd_out: *mut i32) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(fd_out, "fd_out") }?;
        out.write(task.work.any().event_fd()?.as_raw_fd());
        Ok(())
    })
}

/// Gives a task back. If it is running it goes on, and the engine's memory is still its own until it has ended.
///
/// # Safety
/// `task` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_free(task: *mut kvf_task) -> kvf_status {
    boundary(|| take(task, "task", |_| Ok(())))
}
