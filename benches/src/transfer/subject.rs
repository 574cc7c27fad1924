//! What is measured: ours and the references, made ready for one case.

use std::time::Duration;

use kvcache_core::Result;

use crate::clock::process_cpu;

/// CPU time of both ends so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpu {
    /// Of the process that asks for transfers.
    pub(super) initiator: Duration,
    /// Of the process that it moves to and from; none where there is no other.
    pub(super) target: Option<Duration>,
}

impl Cpu {
    /// Of this process alone.
    pub(super) fn own() -> Self {
        Self {
            initiator: process_cpu(),
            target: None,
        }
    }

    /// Of this process, and what another one told.
    pub(super) fn with(target: Duration) -> Self {
        Self {
            target: Some(target),
            ..Self::own()
        }
    }

    /// What was spent since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        let target = self.target.zip(before.target);
        Self {
            initiator: self.initiator.saturating_sub(before.initiator),
            target: target.map(|(now, then)| now.saturating_sub(then)),
        }
    }

    pub(super) fn total(self) -> Duration {
        self.initiator + self.target.unwrap_or_default()
    }
}

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
    fn cpu(&mut self) -> Result<Cpu> {
        Ok(Cpu::own())
    }

    /// Whether it is another project's program: when that fails, it is left out and said aloud.
    fn is_rival(&self) -> bool {
        false
    }

    /// What the last move took, when it was measured elsewhere than around the call.
    fn own_time(&self) -> Option<Duration> {
        None
    }

    /// When the first request of the last [`Subject::move_all`] was done; none if nobody looked.
    fn first_done(&self) -> Option<Duration> {
        None
    }
}
