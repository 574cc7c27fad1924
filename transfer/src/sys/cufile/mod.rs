//! cuFile (GPUDirect Storage), by the library of the system, found when it is asked for: files that a GPU's memory is read from and
//! written to, behind safe functions.
//!
//! Only its synchronous calls are used. One that has returned is over: no byte of it can land any more, which neither of the other two
//! ways promises. `cuFileBatchIOCancel` says nothing of entries that a drive has begun (NIXL's pull request 2146 is about what comes of
//! that), and blocks for ever where compatibility mode has fewer buffers than a batch has entries (NIXL's pull request 2070); calls on
//! streams tell of errors by a word that is written later, if at all (MagnumIO's issue 18), and cannot be taken back.

mod binding;
mod calls;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
pub(crate) mod fake;
mod library;
mod memory;
mod report;
#[cfg(test)]
mod tests;

pub(crate) use calls::Failure;
pub(crate) use memory::{CufileFile, CufileMemory};
pub(crate) use report::Cufile;
pub use report::{StorageBounce, StorageReport, storage_probe};
