//! Checksums of memory that only the system can read: it is copied here for that.

use std::sync::Arc;

use kvcache_core::Result;

use super::{Cma, Held, explain};
use crate::backend::Operation;
use crate::backend::copy::{Go, local_memory};
use crate::plan::{Plan, SUM_BYTES_MAX};
use crate::sys::memory::Mapping;
use crate::sys::process_vm::{Batch, PeerProcess};

/// Does what a plan of checksums asks, to its end: it is never left half-way.
pub(super) fn sum(
    peer: &PeerProcess,
    plan: &Plan,
    memory: &[Arc<Held<Cma>>],
    go_on: &dyn Fn() -> Result<Go>,
) -> Result<()> {
    let scratch = Mapping::anonymous(SUM_BYTES_MAX)?;
    let mut batch = Batch::new(Operation::Read, 1);
    for extent in &plan.extents {
        let window = memory[extent.remote as usize].memory()?;
        let mut done = 0;
        while done < extent.len {
            go_on()?;
            batch.clear();
            let (offset, left) = (extent.remote_offset + done, extent.len - done);
            batch.push(&scratch, done, window, offset, left)?;
            let moved = peer.run(&mut batch);
            let moved = moved.map_err(|error| explain::failure(peer.pid(), error))?;
            if moved == 0 {
                return Err(explain::unreachable(peer, extent));
            }
            done += moved;
        }
        let sum = scratch.crc32c(0, extent.len)?;
        local_memory(plan, extent)?.write(extent.local_offset, &sum.to_le_bytes())?;
    }
    Ok(())
}
