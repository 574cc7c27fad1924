//! What kernels read beside the memory that they work on: lists, written by the processor and copied to the device.

use std::sync::Arc;

use kvcache_core::Result;

use super::load::Kernels;
use crate::sys::cuda::calls::{Answer, Handle};
use crate::sys::cuda::memory::DeviceMemory;
use crate::sys::cuda::pinned::Pinned;
use crate::sys::memory::HostMemory;

/// Places for lists: the same number on the device and in pinned memory.
pub(crate) struct Lists {
    pub(crate) kernels: Arc<Kernels>,
    host: Pinned,
    device: DeviceMemory,
    slot_bytes: u64,
}

impl Lists {
    /// # Errors
    /// What the driver says.
    pub(crate) fn new(kernels: &Arc<Kernels>, slots: u64, slot_bytes: u64) -> Result<Arc<Self>> {
        let (gpu, bytes) = (kernels.gpu(), slots * slot_bytes);
        Ok(Arc::new(Self {
            kernels: kernels.clone(),
            host: Pinned::own(gpu, HostMemory::anonymous(bytes)?)?,
            device: DeviceMemory::allocate_in(gpu.clone(), bytes)?,
            slot_bytes,
        }))
    }

    pub(crate) fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Writes words into a slot that nothing uses; what is to be queued before whoever reads them.
    pub(crate) fn write(&self, slot: u64, words: &[u64]) -> Result<Upload> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (at, len) = (slot * self.slot_bytes, bytes.len() as u64);
        self.host.mapping()?.write(at, &bytes)?;
        Ok(Upload {
            source: self.host.at(at, len)?,
            target: self.device.at(at, len)?,
            bytes: bytes.len(),
        })
    }

    /// Reads words back that were copied to the host's side of a slot.
    pub(crate) fn read(&self, slot: u64, words: &mut [u64]) -> Result<()> {
        let mut bytes = vec![0; words.len() * 8];
        self.host
            .mapping()?
            .read(slot * self.slot_bytes, &mut bytes)?;
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut raw = [0; 8];
            raw.copy_from_slice(bytes);
            *word = u64::from_ne_bytes(raw);
        }
        Ok(())
    }
}

/// A list on its way to the device.
#[derive(Clone, Copy)]
pub(crate) struct Upload {
    source: u64,
    /// Where it will be, on the device.
    pub(crate) target: u64,
    bytes: usize,
}

impl Upload {
    /// Queues the copy to the device.
    ///
    /// # Safety
    /// The slot is nobody else's until the stream has made the copy and what reads it has run; `lists` is kept until then; the stream
    /// is live and of the current context.
    pub(crate) unsafe fn queue(&self, lists: &Lists, stream: Handle) -> Answer<()> {
        let calls = &lists.kernels.gpu().calls;
        // SAFETY: both ranges were checked to lie in the slot, by `Lists::write`; the rest is the caller's promise.
        unsafe { calls.copy(self.target, self.source, self.bytes, stream) }
    }

    /// Queues the copy back from the device.
    ///
    /// # Safety
    /// As [`Upload::queue`].
    pub(crate) unsafe fn queue_back(&self, lists: &Lists, stream: Handle) -> Answer<()> {
        let calls = &lists.kernels.gpu().calls;
        // SAFETY: as in `queue`.
        unsafe { calls.copy(self.source, self.target, self.bytes, stream) }
    }
}
