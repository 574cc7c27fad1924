//! Pinned buffers for host memory that is not.

use std::sync::Arc;

use kvcache_core::Result;

use crate::sys::cuda::{Gpu, Pinned};
use crate::sys::memory::HostMemory;

/// Bytes of one buffer: what the processor copies between two looks at the device.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

/// What is taken of a buffer at a time, so that copies begin where the bus likes it.
const STEP_BYTES: u64 = 64;

/// Memory for all buffers of a device.
pub(super) fn memory(gpu: &Arc<Gpu>, bytes: u64) -> Result<Arc<Pinned>> {
    let memory = HostMemory::anonymous(bytes)?;
    Ok(Arc::new(Pinned::own(gpu, memory)?))
}

/// The buffers that nobody uses.
pub(super) struct Chunks {
    free: Vec<u64>,
}

impl Chunks {
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            free: (0..bytes / CHUNK_BYTES)
                .map(|number| number * CHUNK_BYTES)
                .collect(),
        }
    }

    pub(super) fn take(&mut self) -> Option<Chunk> {
        let start = self.free.pop()?;
        Some(Chunk { start, used: 0 })
    }

    /// A buffer that no copy is under way of.
    pub(super) fn give_back(&mut self, chunk: Chunk) {
        self.free.push(chunk.start);
    }
}

/// A buffer, and how much of it is used.
pub(super) struct Chunk {
    /// Bytes from the start of the memory.
    start: u64,
    used: u64,
}

impl Chunk {
    pub(super) fn room(&self) -> u64 {
        CHUNK_BYTES - self.used
    }

    /// Where so many bytes go, which there is room for; from the start of the memory.
    pub(super) fn put(&mut self, bytes: u64) -> u64 {
        assert!(bytes <= self.room(), "{bytes} of {}", self.room());
        let at = self.start + self.used;
        self.used = (self.used + bytes)
            .next_multiple_of(STEP_BYTES)
            .min(CHUNK_BYTES);
        at
    }
}
