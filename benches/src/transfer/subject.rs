//! What is measured: ours and the references, made ready for one case.

use std::time::Duration;

use kvcache_core::Result;

use crate::clock::process_cpu;

/// Somebody who moves the blocks of one plan. Its source is filled when it is made.
pub(super) trait Subject {
    /// As in reports.
    fn name(&self) -> &'static str;

    /// Overwrites the target, so that bytes of an earlier iteration cannot pass for moved ones.
    fn poison(&mut self) -> Result<()>;

    /// Moves everything once: this is timed. Returns the bytes moved.
    fn move_all(&mut self) -> Result<u64>;

    /// Moves one block and returns when it is there: this is timed too.
    fn move_block(&mut self, position: u32) -> Result<u64>;

    /// Compares the target with what it must be.
    fn verify(&mut self) -> Result<()>;

    /// CPU time so far of all processes that take part.
    fn cpu(&mut self) -> Result<Duration> {
        Ok(process_cpu())
    }
}
