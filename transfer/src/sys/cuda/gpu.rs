//! A device's primary context, which it shares with everybody in the process who uses the device.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Answer, Attribute, Calls, Code, Device, Handle, PointerFacts};
use super::direct::Asked;
use super::driver::fault;
use super::ipc::Openings;
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
    /// What is open of other processes' memory.
    pub(super) opened: Openings,
    /// Whose memory this one reaches by itself, of those that were asked about.
    reached: Mutex<HashMap<u32, bool>>,
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
            opened: Openings::default(),
            reached: Mutex::default(),
            calls,
        })
    }

    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// What tells it from all others, in every process.
    pub(super) fn uuid(&self) -> Answer<[u8; 16]> {
        self.calls.device_uuid(self.device)
    }

    /// Its primary context.
    pub(super) fn context(&self) -> Handle {
        self.context
    }

    /// Its address on the PCI bus, if the driver tells.
    pub(crate) fn pci(&self) -> Option<String> {
        self.calls.device_pci(self.device).ok()
    }

    /// Whether this device reaches the other one's memory by itself, which it is told to do when it is first asked: for the life of
    /// the process, and for everybody in it. Otherwise the driver takes the bytes through host memory.
    pub(crate) fn reaches(&self, other: &Self) -> bool {
        if self.ordinal == other.ordinal {
            return true;
        }
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        *reached
            .entry(other.ordinal)
            .or_insert_with(|| self.reach(other))
    }

    fn reach(&self, other: &Self) -> bool {
        let can = self.calls.can_access(self.device, other.device);
        let enabled = match can {
            Ok(true) => self.enter().and_then(|_entered| {
                // SAFETY: both contexts are retained, this one's is current.
                unsafe { self.calls.reach(other.context) }
            }),
            Ok(false) => Err(Code::PEER_ACCESS_UNSUPPORTED),
            Err(code) => Err(code),
        };
        let (from, to) = (other.ordinal, self.ordinal);
        match enabled {
            // An engine may have told it before.
            Ok(()) | Err(Code::PEER_ACCESS_ALREADY_ENABLED) => true,
            Err(code) => {
                let error = self.fault("reach another device's memory", code);
                tracing::warn!(%error, from, to, "copies between two devices go through host memory");
                false
            }
        }
    }

    /// Whose memory this one has been asked to reach, and whether it does.
    pub(crate) fn known_reach(&self) -> Vec<(u32, bool)> {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = reached.iter().map(|(&other, &can)| (other, can)).collect();
        all.sort_unstable();
        all
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
