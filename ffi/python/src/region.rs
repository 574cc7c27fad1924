//! Regions: registered memory.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvfabric::transfer::{self, HostMemory, RegionOptions};
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::errors::to_python;
use crate::life::{Life, parse_timeout, patiently};

/// Memory that transfers may name. It is let go when the region is deregistered.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Region {
    life: Arc<Life>,
    /// A region keeps its agent alive.
    _agent: transfer::Agent,
    pub(crate) region: transfer::Region,
    memory: Memory,
}

enum Memory {
    /// Allocated here; the address of its first byte.
    Own { base: usize },
    /// An object's; none once it is let go.
    Lent {
        buffer: Mutex<Option<Buffer>>,
        is_read_only: bool,
    },
}

impl Region {
    /// Registers the memory of a Python object.
    pub(crate) fn of_object(
        life: Arc<Life>,
        agent: &transfer::Agent,
        object: &Bound<'_, PyAny>,
        options: RegionOptions,
    ) -> PyResult<Self> {
        let py = object.py();
        let buffer = Buffer::hold(object)?;
        let is_read_only = buffer.is_read_only();
        let registered = if is_read_only && options.remote_write {
            let text = "peers cannot be allowed to write to memory that is read-only";
            Err(Error::new(ErrorKind::Denied, text))
        } else {
            // SAFETY: the buffer stays held until the region is deregistered and drained (`Region::let_go`), or for
            // ever. Python's references into it are raw addresses. Read-only memory is never written to: peers may
            // not (above), and `Region::check_writable` stands before every transfer whose target it would be.
            unsafe { HostMemory::from_raw(buffer.base(), buffer.len()) }
                .and_then(|memory| agent.register(memory, options))
        };
        match registered {
            Ok(region) => {
                let memory = Memory::Lent {
                    buffer: Mutex::new(Some(buffer)),
                    is_read_only,
                };
                Ok(Self {
                    life,
                    _agent: agent.clone(),
                    region,
                    memory,
                })
            }
            Err(error) => {
                buffer.release(py);
                Err(to_python(error))
            }
        }
    }

    /// Allocates memory that peers on this host can map.
    pub(crate) fn shared(
        life: Arc<Life>,
        agent: &transfer::Agent,
        len: u64,
        options: RegionOptions,
    ) -> Result<Self> {
        let memory = HostMemory::shared(len)?;
        let base = memory.base().as_ptr() as usize;
        let region = agent.register(memory, options)?;
        Ok(Self {
            life,
            _agent: agent.clone(),
            region,
            memory: Memory::Own { base },
        })
    }

    /// # Errors
    /// [`ErrorKind::Denied`] for memory that Python holds to be constant.
    pub(crate) fn check_writable(&self) -> Result<()> {
        match &self.memory {
            Memory::Lent {
                is_read_only: true, ..
            } => {
                let text = format!("region {} is read-only memory", self.region.id());
                Err(Error::new(ErrorKind::Denied, text))
            }
            _ => Ok(()),
        }
    }

    /// Whether it belongs to the agent with this life.
    pub(crate) fn belongs_to(&self, life: &Arc<Life>) -> bool {
        Arc::ptr_eq(&self.life, life)
    }

    /// Nothing moves bytes to or from the memory any more.
    fn let_go(&self, py: Python<'_>) {
        if let Memory::Lent { buffer, .. } = &self.memory {
            let buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(buffer) = buffer {
                buffer.release(py);
            }
        }
    }
}

#[pymethods]
impl Region {
    /// The number that names the region in descriptors, here and at peers.
    #[getter]
    fn id(&self) -> u64 {
        self.region.id().0
    }

    fn __len__(&self) -> usize {
        usize::try_from(self.region.bytes()).unwrap_or(usize::MAX)
    }

    /// The memory as a writable memoryview; only of a region of `Agent.shared_memory`, which the view keeps alive.
    fn view<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let Memory::Own { base } = &slf.get().memory else {
            let text = "the memory belongs to the object that was registered: look at that";
            return Err(to_python(Error::new(ErrorKind::Unsupported, text)));
        };
        let _call = slf.get().life.enter()?;
        let module = slf.py().import("kvfabric._view")?;
        module.call_method1("view_of", (slf, *base, slf.get().__len__()))
    }

    /// Refuses new transfers over the region at once, waits for those in flight, and lets the memory go. `BusyError` when some
    /// are still in flight after `timeout` seconds: the memory is kept, call again.
    #[pyo3(signature = (timeout = 30.0))]
    fn deregister(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let _call = self.life.enter()?;
        let timeout = parse_timeout(timeout)?;
        let drained = patiently(py, timeout, |slice| {
            let result = self.region.deregister().wait(slice);
            result.is_ok().then_some(())
        })?;
        if drained.is_none() {
            let text = format!("region {} has work in flight", self.region.id());
            return Err(to_python(Error::new(ErrorKind::Busy, text)));
        }
        self.let_go(py);
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!(
            "<kvfabric.Region {} of {} bytes>",
            self.region.id(),
            self.region.bytes()
        )
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // In a forked child, after a panic, or with work in flight, the object's memory is kept for ever.
        if self.life.enter().is_err() || self.region.deregister().wait(Duration::ZERO).is_err() {
            return;
        }
        // Python drops its objects with the GIL held, so this only asks for what is there; at the end of the process
        // it may be gone, and with it the need.
        Python::try_attach(|py| self.let_go(py));
    }
}
