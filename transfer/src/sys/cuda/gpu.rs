//! A device's primary context, which it shares with everybody in the process who uses the device.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Answer, Attribute, Calls, Code, Device, Handle, PointerFacts};
use super::direct::Asked;
use super::driver::fault;
use crate::sys::fork::Process;

/// Calls that a graph's capture forbids to other threads are allowed to this one: it has no part in anybody's graph.
const CAPTURE_RELAXED: u32 = 2;

/// A device in use.
pub(crate) struct Gpu {
    pub(super) calls: Arc<dyn Calls>,
    pub(super) process: Process,
    device: Device,
    ordinal: u32,
    context: Handle,
    pub(super) direct: Asked,
}

impl Gpu {
    pub(super) fn retain(calls: Arc<dyn Calls>, device: Device, ordinal: u32) -> Result<Self> {
        let failed = |code| fault(&*calls, &format!("use device {ordinal}"), code);
        if calls
            .attribute(device, Attribute::UnifiedAddressing)
            .map_err(failed)?
            == 0
        {
            let text = format!("cuda device {ordinal} has no unified addresses");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        // SAFETY: released by `drop`, when nothing that was made in it holds this any more.
        let context = unsafe { calls.retain_primary(device) }.map_err(failed)?;
        Ok(Self {
            process: Process::current(),
            device,
            ordinal,
            context,
            direct: Asked::default(),
            calls,
        })
    }

    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Its primary context.
    pub(super) fn context(&self) -> Handle {
        self.context
    }

    /// Its address on the PCI bus, if the driver tells.
    pub(crate) fn pci(&self) -> Option<String> {
        self.calls.device_pci(self.device).ok()
    }

    /// An error of this device.
    pub(super) fn fault(&self, doing: &str, code: Code) -> Error {
        fault(&*self.calls, doing, code).at(format!("device {}", self.ordinal))
    }

    /// Makes this thread's calls be about the device until the result is dropped, and leaves graphs that others capture alone.
    pub(super) fn enter(&self) -> Answer<Entered<'_>> {
        // SAFETY: retained for as long as `self`, which outlives what is returned; that pops it.
        unsafe { self.calls.push(self.context) }?;
        let mut entered = Entered {
            gpu: self,
            mode: None,
            thread: PhantomData,
        };
        entered.mode = Some(self.calls.capture_mode(CAPTURE_RELAXED)?);
        Ok(entered)
    }

    /// The memory node that the device is attached to; none where the system does not tell.
    pub(super) fn node(&self) -> Option<u32> {
        let address = self.calls.device_pci(self.device).ok()?;
        let path = format!("/sys/bus/pci/devices/{address}/numa_node");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Runs a call of another library that wants the device to be the thread's current one.
    ///
    /// # Errors
    /// What the driver says; nothing was run then.
    pub(crate) fn within<R>(&self, call: impl FnOnce() -> R) -> Result<R> {
        let entered = self.enter();
        let _entered = entered.map_err(|code| self.fault("make it current", code))?;
        Ok(call())
    }

    /// A fact about the device.
    pub(super) fn attribute(&self, attribute: Attribute) -> Answer<i32> {
        self.calls.attribute(self.device, attribute)
    }

    /// What the driver knows of an address.
    pub(crate) fn pointer_facts(&self, address: u64) -> Result<PointerFacts> {
        let facts = self
            .enter()
            .and_then(|_entered| self.calls.pointer_facts(address));
        facts.map_err(|code| self.fault(&format!("ask about address {address:#x}"), code))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if !self.process.is_current() {
            return;
        }
        // SAFETY: retained by `retain`, released only here; what was made in the context held this and is gone.
        if let Err(code) = unsafe { self.calls.release_primary(self.device) } {
            tracing::warn!(
                code = code.0,
                device = self.ordinal,
                "release a CUDA context"
            );
        }
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu {}", self.ordinal)
    }
}

/// A device is current on this thread.
pub(super) struct Entered<'a> {
    gpu: &'a Gpu,
    /// The thread's mode before.
    mode: Option<u32>,
    /// Of this thread alone.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(mode) = self.mode
            && let Err(code) = self.gpu.calls.capture_mode(mode)
        {
            tracing::warn!(code = code.0, "set a thread's capture mode back");
        }
        // SAFETY: pushed by `enter` on this very thread, which this cannot leave; what was pushed later was popped before.
        if let Err(code) = unsafe { self.gpu.calls.pop() } {
            tracing::warn!(code = code.0, "leave a CUDA context");
        }
    }
}
