//! The devices' side: windows, and legs between them and the devices.

use std::any::Any;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::super::Backend;
use super::super::cuda::{self, CudaBackend};
use super::super::leg::{self, Answer, Control};
use super::window::Window;
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::request::Priority;
use crate::sys::cuda::{DeviceMemory, Gpu};

/// The windows of an agent's devices.
pub(crate) struct Stage {
    cuda: Arc<CudaBackend>,
    windows: Mutex<HashMap<u32, Arc<Window>>>,
}

impl Stage {
    pub(super) fn new(cuda: &Arc<CudaBackend>) -> Self {
        Self {
            cuda: cuda.clone(),
            windows: Mutex::default(),
        }
    }

    /// Makes the windows that a plan needs.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a local side that is not memory of devices alone; [`ErrorKind::Invalid`] for memory that
    /// its engine has freed; otherwise what the system says.
    pub(super) fn prepare(&self, plan: &Plan) -> Result<()> {
        self.check(plan)?;
        for memory in plan.local.iter().filter_map(memory) {
            memory.check_there()?;
            self.make(memory.gpu())?;
        }
        Ok(())
    }

    /// # Errors
    /// [`ErrorKind::Unsupported`] for a local side that is not memory of devices alone.
    pub(super) fn check(&self, plan: &Plan) -> Result<()> {
        match plan.local.iter().find(|target| memory(target).is_none()) {
            None => Ok(()),
            Some(target) => {
                let name = match target {
                    Target::Local(region) => format!("region {} is {}", region.id(), region.kind()),
                    Target::Remote(region) => format!("region {} is a peer's", region.id),
                };
                let text = format!(
                    "staged moves memory of devices, and {name}: ask for it by another request"
                );
                Err(Error::new(ErrorKind::Unsupported, text))
            }
        }
    }

    fn make(&self, gpu: &Arc<Gpu>) -> Result<()> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Vacant(place) = windows.entry(gpu.ordinal()) {
            let bytes = self.cuda.options().window_bytes;
            let window = Window::new(&self.cuda, gpu, bytes)?;
            let (device, pinned) = (gpu.ordinal(), window.is_pinned());
            tracing::info!(device, bytes, pinned, "a window is made");
            place.insert(window);
        }
        Ok(())
    }

    /// A device's.
    pub(super) fn window(&self, ordinal: u32) -> Result<Arc<Window>> {
        let windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.get(&ordinal).cloned().ok_or_else(|| {
            let text = format!("there is no window for CUDA device {ordinal}");
            Error::new(ErrorKind::Internal, text)
        })
    }

    /// Bytes of a window.
    pub(super) fn window_bytes(&self) -> u64 {
        self.cuda.options().window_bytes
    }

    /// What it does for a plan, in words.
    pub(super) fn detail(&self, plan: &Plan, other: &str) -> String {
        let bytes = self.cuda.options().window_bytes >> 20;
        let windows = plan.local.iter().filter_map(memory);
        let pinned = windows.map(|memory| self.window(memory.ordinal()));
        match pinned.flatten().all(|window| window.is_pinned()) {
            true => format!("{other} over {bytes} MiB of pinned memory"),
            false => format!(
                "{other} over {bytes} MiB of memory that could not be pinned, and buffers that are"
            ),
        }
    }

    /// A leg between a window and a device.
    pub(super) fn post(
        &self,
        leg: (Plan, Priority),
        control: &Control,
        keep: impl Any + Send,
    ) -> Result<Answer> {
        leg::post(&*self.cuda, leg, control, keep)
    }

    /// Some job was given up.
    pub(super) fn reap(&self) {
        self.cuda.reap();
    }
}

/// The device memory that a target is.
fn memory(target: &Target) -> Option<&Arc<DeviceMemory>> {
    match target {
        Target::Local(region) => cuda::memory_of(region),
        Target::Remote(_) => None,
    }
}
