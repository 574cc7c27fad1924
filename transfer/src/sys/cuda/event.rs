//! Events: where a stream was at some time.

use std::fmt;
use std::sync::Arc;

use kvcache_core::Result;

use super::calls::{Answer, Handle};
use super::gpu::Gpu;

/// An event of ours. Whoever may still have to ask for it holds it.
pub(super) struct Event {
    gpu: Arc<Gpu>,
    pub(super) raw: Handle,
}

impl Event {
    /// A new one, which was never recorded. The device's context is current.
    pub(super) fn new(gpu: &Arc<Gpu>) -> Answer<Self> {
        // SAFETY: the context is current; destroyed by `drop`.
        let raw = unsafe { gpu.calls.create_event() }?;
        Ok(Self {
            gpu: gpu.clone(),
            raw,
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.gpu.process.is_current() {
            return;
        }
        let destroyed = self.gpu.enter().and_then(|_entered| {
            // SAFETY: created by `new`, destroyed only here. The driver keeps one that a stream has not come to until it has.
            unsafe { self.gpu.calls.destroy_event(self.raw) }
        });
        if let Err(code) = destroyed {
            tracing::warn!(code = code.0, "destroy a CUDA event");
        }
    }
}

/// Where a stream was: over when the device has done all that the stream had been given until then. Clones are the same.
#[derive(Clone)]
pub struct CudaPoint(pub(super) Arc<Event>);

impl CudaPoint {
    /// The device of the stream, by its number in this process.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.0.gpu.ordinal()
    }

    /// Whether the device has come to it.
    ///
    /// # Errors
    /// What the driver says, for a device whose context is beyond use.
    pub fn is_over(&self) -> Result<bool> {
        let gpu = &self.0.gpu;
        let over = gpu.enter().and_then(|_entered| {
            // SAFETY: live for as long as `self`.
            unsafe { gpu.calls.is_over(self.0.raw) }
        });
        over.map_err(|code| gpu.fault("ask for an event", code))
    }
}

impl fmt::Debug for CudaPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaPoint of device {}", self.ordinal())
    }
}
