//! What a file engine is asked to do, whoever asks.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::open::OpenFile;
use crate::backend::{Job, Operation, Refusal};
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::request::Priority;

use super::FileTarget;

/// Which way the bytes go, or that they are to be made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileOperation {
    /// From the file into memory.
    Read,
    /// From memory into the file.
    Write,
    /// Everything written before reaches the device (`fdatasync`).
    Sync,
}

/// Memory lent to the engine, and its place in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Position in [`FileJob::files`].
    pub(super) file: u32,
    /// Position in [`FileJob::memory`]; behind its end for memory of no region.
    pub(super) local: u32,
    /// The first byte in memory.
    pub(super) base: *mut u8,
    /// How many bytes.
    pub(super) len: usize,
    /// The first byte in the file.
    pub(super) offset: u64,
}

// SAFETY: a piece is a number that names memory; who may touch that memory, and for how long, is the promise made with
// `FileJob`, not a property of the thread that holds the number.
unsafe impl Send for Piece {}

/// Who waits for a job; told on the engine's thread, so it must not block.
pub(super) trait Waiter: Send {
    /// Whether nobody waits any more: settle as soon as the memory is out of use.
    fn is_abandoned(&self) -> bool;
    /// The terminal outcome: no byte of the job's memory is touched after this.
    fn settle(self: Box<Self>, outcome: Result<()>);
    /// The job was not taken.
    fn refuse(self: Box<Self>, error: Error) -> Refusal;
}

/// One read, write or sync.
///
/// The memory that `pieces` name stays valid until the waiter is settled, or for ever if it never is.
pub(super) struct FileJob {
    pub(super) operation: FileOperation,
    pub(super) files: Vec<Arc<OpenFile>>,
    /// The regions in which the bytes lie.
    pub(super) memory: Arc<[Target]>,
    /// Where the bytes are; empty for a sync.
    pub(super) pieces: Vec<Piece>,
    pub(super) priority: Priority,
    pub(super) waiter: Box<dyn Waiter>,
}

/// A transfer's job, which keeps the memory of its plan registered.
struct Transfer(Job);

impl Waiter for Transfer {
    fn is_abandoned(&self) -> bool {
        self.0.is_abandoned()
    }

    fn settle(self: Box<Self>, outcome: Result<()>) {
        self.0.settle(outcome);
    }

    fn refuse(self: Box<Self>, error: Error) -> Refusal {
        self.0.refuse(error)
    }
}

impl FileJob {
    /// The file job of a transfer.
    ///
    /// # Errors
    /// The job itself, with the reason, when a side of it is nothing that this engine reaches.
    pub(super) fn of_transfer(job: Job) -> Result<Self, (Job, Error)> {
        let parts = match parts(job.plan()) {
            Ok(parts) => parts,
            Err(error) => return Err((job, error)),
        };
        let operation = match job.plan().operation {
            Operation::Read => FileOperation::Read,
            Operation::Write => FileOperation::Write,
        };
        let (files, pieces) = parts;
        Ok(Self {
            operation,
            files,
            memory: Arc::clone(&job.plan().local),
            pieces,
            priority: job.priority(),
            waiter: Box::new(Transfer(job)),
        })
    }
}

fn parts(plan: &Plan) -> Result<(Vec<Arc<OpenFile>>, Vec<Piece>)> {
    let files = plan.remote.iter().map(file).collect::<Result<Vec<_>>>()?;
    let pieces = plan.extents.iter().map(|extent| {
        let Target::Local(region) = &plan.local[extent.local as usize] else {
            return Err(Error::new(
                ErrorKind::Internal,
                "a local side names a peer's memory",
            ));
        };
        // The mapping belongs to the region, which the plan keeps alive and the job keeps entered.
        let mapping = region.mapping()?;
        let range = match plan.operation {
            Operation::Read => mapping.sink(extent.local_offset, extent.len)?.raw(),
            Operation::Write => mapping.span(extent.local_offset, extent.len)?.raw(),
        };
        Ok(Piece {
            file: extent.remote,
            local: extent.local,
            base: range.iov_base.cast::<u8>(),
            len: range.iov_len,
            offset: extent.remote_offset,
        })
    });
    Ok((files, pieces.collect::<Result<Vec<_>>>()?))
}

fn file(target: &Target) -> Result<Arc<OpenFile>> {
    let external = match target {
        Target::Local(region) => region.external(),
        Target::Remote(_) => None,
    };
    external
        .and_then(|external| {
            let any: &dyn std::any::Any = &**external;
            any.downcast_ref::<FileTarget>()
        })
        .map(|target| Arc::clone(&target.file))
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                "the file engine only reaches own files",
            )
        })
}
