//! How a transfer ended, and what may be done with its memory.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind};

/// What may be done with the memory of a transfer that did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryFate {
    /// Nothing is posted, or all of it has drained: the memory may be reused.
    ///
    /// After a failed write the target's bytes are unspecified.
    Settled,
    /// Work may still land: keep the memory until [`crate::Request::drained`] completes.
    InFlight,
}

/// Why a transfer failed. Cloning is cheap.
#[derive(Clone)]
pub struct TransferError {
    error: Arc<Error>,
    fate: MemoryFate,
}

impl TransferError {
    pub(crate) fn new(error: Error, fate: MemoryFate) -> Self {
        Self {
            error: Arc::new(error),
            fate,
        }
    }

    pub(crate) fn with_fate(&self, fate: MemoryFate) -> Self {
        Self {
            error: self.error.clone(),
            fate,
        }
    }

    /// What went wrong, and where.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// What may be done with the memory.
    #[must_use]
    pub fn fate(&self) -> MemoryFate {
        self.fate
    }
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl fmt::Debug for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (memory {:?})", self.error, self.fate)
    }
}

impl std::error::Error for TransferError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.error)
    }
}

impl From<TransferError> for Error {
    fn from(failed: TransferError) -> Self {
        match Arc::try_unwrap(failed.error) {
            Ok(error) => error,
            Err(shared) => Self::new(shared.kind(), shared.to_string()),
        }
    }
}

/// A transfer that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Bytes moved.
    pub bytes: u64,
    /// The name of the backend that moved them, the last of several.
    pub backend: &'static str,
    /// From the post to the terminal completion.
    pub elapsed: Duration,
    /// How often it, or a piece of it, was tried again after a failure; the backend above is the last one then.
    pub failovers: u32,
}

/// What a post that was done took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// When it was posted, counted from the start of the agent.
    pub posted: Duration,
    /// How long the call of [`crate::Request::post`] took. A small copy is done within it.
    pub post: Duration,
    /// From the post to the terminal completion.
    pub transfer: Duration,
    /// Bytes moved.
    pub bytes: u64,
    /// Pairs of descriptors that were moved, before neighbours were merged.
    pub descriptors: u32,
    /// The name of the backend that moved them.
    pub path: &'static str,
    /// How often it, or a piece of it, was tried again after a failure.
    pub failovers: u32,
    /// The backend that it was on before, if it failed over ([`Completion::failovers`]), and what was wrong with that one:
    /// [`ErrorKind::Timeout`] means that it stood still. The last one of several; the log has all, and their words.
    pub left: Option<(&'static str, ErrorKind)>,
}

/// Where a request stands.
#[derive(Clone, Debug)]
pub enum Status {
    /// Not posted.
    Idle,
    /// Posted, not finished.
    InFlight,
    /// Finished; the request may be posted again.
    Done(Completion),
    /// Failed; it may be posted again once its memory is settled.
    Failed(TransferError),
}
