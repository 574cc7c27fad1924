//! Regions: registered memory.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvfabric::transfer::{self, Deregistration, HostMemory, RegionOptions, RegisteredRange};
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::errors::to_python;
use crate::fabric::Fabric;
use crate::life::{answered, enter, parse_timeout, patiently};

/// Memory that transfers may name. It is let go when the region is deregistered.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Region {
    pub(crate) held: Arc<Held>,
}

/// A region and its memory: kept by the region's object, by lists that name it, and by transfers.
pub(crate) struct Held {
    fabric: Arc<Fabric>,
    pub(crate) region: transfer::Region,
    lease: Lease,
    base: usize,
    memory: Memory,
}

/// What of the region the memory is, and how it is given back.
enum Lease {
    /// All of it.
    Whole,
    /// A range of it, beside those of others.
    Part {
        offset: u64,
        len: u64,
        held: Mutex<Part>,
    },
}

enum Part {
    Registered(RegisteredRange),
    /// Given back, and perhaps still in use.
    Leaving(Deregistration),
    /// While it is being given back, under the lock.
    Nothing,
}

enum Memory {
    /// Mapped here.
    Own,
    /// A buffer's; none once it is let go.
    Lent {
        buffer: Mutex<Option<Buffer>>,
        is_read_only: bool,
    },
    /// None: a file or an object.
    Elsewhere,
    /// Someone else's; what keeps it, until it is let go.
    Promised { keep: Mutex<Option<Py<PyAny>>> },
    /// The same of a GPU.
    OnDevice { keep: Mutex<Option<Py<PyAny>>> },
}

/// Memory by its address, and the object that keeps it.
pub(crate) struct Promise {
    pub(crate) address: usize,
    pub(crate) len: u64,
    pub(crate) keep: Py<PyAny>,
}

impl Promise {
    pub(crate) fn new(py: Python<'_>, address: usize, len: u64, keep: Option<Py<PyAny>>) -> Self {
        let keep = keep.unwrap_or_else(|| py.None());
        Self { address, len, keep }
    }
}

impl Region {
    /// Registers the memory of a Python object: a tensor's, or else its buffer's.
    pub(crate) fn of_object(
        fabric: &Arc<Fabric>,
        object: &Bound<'_, PyAny>,
        options: RegionOptions,
    ) -> PyResult<Self> {
        if let Some(promise) = tensor(object)? {
            return Self::promised(fabric, promise, options).map_err(to_python);
        }
        let buffer = Buffer::hold(object)?;
        let is_read_only = buffer.is_read_only();
        let registered = if is_read_only && options.remote_write {
            let text = "peers cannot be allowed to write to memory that is read-only";
            Err(Error::new(ErrorKind::Denied, text))
        } else {
            // SAFETY: the buffer stays held until the region is deregistered and drained (`Held::let_go`), or for
            // ever. Python's references into it are raw addresses. Read-only memory is never written to: peers may
            // not (above), and `Held::check_writable` stands before every transfer whose target it would be.
            unsafe { HostMemory::from_raw(buffer.base(), buffer.len()) }
                .and_then(|memory| fabric.agent.register(memory, options))
        };
        match registered {
            Ok(region) => {
                let base = buffer.base() as usize;
                let memory = Memory::Lent {
                    buffer: Mutex::new(Some(buffer)),
                    is_read_only,
                };
                Ok(Self::hold(fabric, region, base, memory))
            }
            Err(error) => {
                buffer.release(object.py());
                Err(to_python(error))
            }
        }
    }

    /// Registers memory that its caller promises to keep.
    pub(crate) fn promised(
        fabric: &Arc<Fabric>,
        promise: Promise,
        options: RegionOptions,
    ) -> Result<Self> {
        let Promise { address, len, keep } = promise;
        // SAFETY: the caller of `Agent.register_address` promises that these bytes stay mapped and writable until the
        // region is deregistered; a tensor's are, because its storage is kept alive.
        let memory = unsafe { HostMemory::from_raw(address as *mut u8, len) }?;
        let region = fabric.agent.register(memory, options)?;
        let keep = Mutex::new(Some(keep));
        Ok(Self::hold(
            fabric,
            region,
            address,
            Memory::Promised { keep },
        ))
    }

    /// As [`Region::promised`], in one region with what it lies in.
    pub(crate) fn range(
        fabric: &Arc<Fabric>,
        promise: Promise,
        options: RegionOptions,
    ) -> Result<Self> {
        let Promise { address, len, keep } = promise;
        // SAFETY: as in `promised`, until the range is given back and its region drained.
        let memory = unsafe { HostMemory::from_raw(address as *mut u8, len) }?;
        let range = fabric.agent.register_range(memory, options)?;
        let region = range.region().clone();
        let lease = Lease::Part {
            offset: range.offset(),
            len: range.bytes(),
            held: Mutex::new(Part::Registered(range)),
        };
        let keep = Mutex::new(Some(keep));
        let memory = Memory::Promised { keep };
        Ok(Self::hold_as(fabric, region, lease, (address, memory)))
    }

    /// Allocates memory that peers on this host can map.
    pub(crate) fn shared(fabric: &Arc<Fabric>, len: u64, options: RegionOptions) -> Result<Self> {
        let memory = HostMemory::shared(len)?;
        let base = memory.base().as_ptr() as usize;
        let region = fabric.agent.register(memory, options)?;
        Ok(Self::hold(fabric, region, base, Memory::Own))
    }

    /// Registers shared memory that someone else made.
    pub(crate) fn of_file(fabric: &Arc<Fabric>, fd: RawFd, options: RegionOptions) -> Result<Self> {
        if fd < 0 {
            return Err(Error::invalid("fd", fd, 0..));
        }
        // SAFETY: borrowed for the duplication only, during which the caller, who has the number, keeps it open. If it does
        // not, the kernel says so, or another file of this process is looked at and refused.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let file = borrowed
            .try_clone_to_owned()
            .map_err(|e| Error::io(format!("duplicate file descriptor {fd}"), e))?;
        let memory = HostMemory::of_file(file)?;
        let base = memory.base().as_ptr() as usize;
        let region = fabric.agent.register(memory, options)?;
        Ok(Self::hold(fabric, region, base, Memory::Own))
    }

    /// A file or an object.
    pub(crate) fn place(fabric: &Arc<Fabric>, region: transfer::Region) -> Self {
        Self::hold(fabric, region, 0, Memory::Elsewhere)
    }

    /// Memory of a GPU.
    pub(crate) fn on_device(
        fabric: &Arc<Fabric>,
        region: transfer::Region,
        address: u64,
        keep: Py<PyAny>,
    ) -> Self {
        let keep = Mutex::new(Some(keep));
        let memory = Memory::OnDevice { keep };
        Self::hold(fabric, region, address as usize, memory)
    }

    fn hold(fabric: &Arc<Fabric>, region: transfer::Region, base: usize, memory: Memory) -> Self {
        Self::hold_as(fabric, region, Lease::Whole, (base, memory))
    }

    fn hold_as(
        fabric: &Arc<Fabric>,
        region: transfer::Region,
        lease: Lease,
        (base, memory): (usize, Memory),
    ) -> Self {
        let held = Arc::new(Held {
            fabric: fabric.clone(),
            region,
            lease,
            base,
            memory,
        });
        fabric.remember(&held);
        Self { held }
    }
}

/// A tensor's memory, if `object` looks like a tensor: nothing is imported to find out.
fn tensor(object: &Bound<'_, PyAny>) -> PyResult<Option<Promise>> {
    if !object.hasattr("data_ptr")? || !object.hasattr("element_size")? {
        return Ok(None);
    }
    let device = object.getattr("device")?.getattr("type")?.to_string();
    if device != "cpu" {
        let text =
            format!("the tensor is on device {device:?}; only memory of the CPU is registered");
        return Err(to_python(Error::new(ErrorKind::Unsupported, text)));
    }
    if !object.call_method0("is_contiguous")?.is_truthy()? {
        let text = "the tensor is not contiguous: register what it is a view of";
        return Err(to_python(Error::new(ErrorKind::Invalid, text)));
    }
    let address: usize = object.call_method0("data_ptr")?.extract()?;
    let elements: u64 = object.call_method0("numel")?.extract()?;
    let element_size: u64 = object.call_method0("element_size")?.extract()?;
    let len = elements
        .checked_mul(element_size)
        .ok_or_else(|| to_python(Error::invalid("elements", elements, "fewer")))?;
    // The storage rather than the tensor, which may be given another one.
    let keep = if object.hasattr("untyped_storage")? {
        object.call_method0("untyped_storage")?
    } else {
        object.clone()
    };
    Ok(Some(Promise {
        address,
        len,
        keep: keep.unbind(),
    }))
}

impl Held {
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

    /// Whether it is of this agent.
    pub(crate) fn is_of(&self, fabric: &Arc<Fabric>) -> bool {
        Arc::ptr_eq(&self.fabric, fabric)
    }

    /// Where it begins in its region.
    pub(crate) fn offset(&self) -> u64 {
        match &self.lease {
            Lease::Whole => 0,
            Lease::Part { offset, .. } => *offset,
        }
    }

    fn len(&self) -> usize {
        let len = match &self.lease {
            Lease::Whole => self.region.bytes(),
            Lease::Part { len, .. } => *len,
        };
        usize::try_from(len).unwrap_or(usize::MAX)
    }

    /// Gives it back, and waits at most `timeout` until its memory is free.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when it is not then.
    fn deregister(&self, timeout: Duration) -> Result<()> {
        let Lease::Part { held, .. } = &self.lease else {
            return self.region.deregister().wait(timeout);
        };
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        *held = match std::mem::replace(&mut *held, Part::Nothing) {
            Part::Registered(range) => Part::Leaving(range.deregister()),
            left => left,
        };
        match &*held {
            Part::Leaving(leaving) => leaving.wait(timeout),
            Part::Registered(_) | Part::Nothing => Ok(()),
        }
    }

    /// Nothing moves bytes to or from the memory any more.
    fn let_go(&self, py: Python<'_>) {
        match &self.memory {
            Memory::Own | Memory::Elsewhere => {}
            Memory::Lent { buffer, .. } => {
                let buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(buffer) = buffer {
                    buffer.release(py);
                }
            }
            Memory::Promised { keep } | Memory::OnDevice { keep } => {
                let keep = keep.lock().unwrap_or_else(PoisonError::into_inner).take();
                // Dropped after the lock: an object's end may run any Python code.
                drop(keep);
            }
        }
    }

    /// The memory is never let go.
    #[expect(
        clippy::mem_forget,
        reason = "work in flight may still use the memory, so it is kept for ever"
    )]
    fn leak(&self) {
        if let Memory::Promised { keep } | Memory::OnDevice { keep } = &self.memory {
            std::mem::forget(keep.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // In a forked child, after a panic, or with work in flight, the object's memory is kept for ever. A child must not
        // wait for any lock either: the thread that held it may not exist there.
        if self.fabric.life.enter().is_err() {
            self.leak();
            return;
        }
        self.fabric.forget(self.region.id());
        if self.deregister(Duration::ZERO).is_err() {
            self.leak();
            return;
        }
        // Python drops its objects with the GIL held, so this only asks for what is there; at the end of the process
        // it may be gone, and with it the need.
        Python::try_attach(|py| self.let_go(py));
    }
}

#[pymethods]
impl Region {
    /// The number that names the region in descriptors, here and at peers.
    #[getter]
    fn id(&self) -> u64 {
        self.held.region.id().0
    }

    /// Where it begins in the region that descriptors name by its number; 0 but for ranges that share one.
    #[getter]
    fn offset(&self) -> u64 {
        self.held.offset()
    }

    /// Where it begins in this process, or on its GPU; 0 for files and objects.
    #[getter]
    fn address(&self) -> usize {
        self.held.base
    }

    /// Its size in bytes.
    #[getter]
    fn len(&self) -> usize {
        self.held.len()
    }

    fn __len__(&self) -> usize {
        self.held.len()
    }

    /// The memory as a writable memoryview, which keeps it mapped; only of `Agent.shared_memory` and `Agent.register_file`.
    fn view<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let held = &slf.get().held;
        if !matches!(held.memory, Memory::Own) {
            let text = match held.memory {
                Memory::Elsewhere => "files and objects have no memory to look at",
                _ => "the memory belongs to the object that was registered: look at that",
            };
            return Err(to_python(Error::new(ErrorKind::Unsupported, text)));
        }
        let _call = enter(&held.fabric.life)?;
        let module = slf.py().import("kvfabric._view")?;
        module.call_method1("view_of", (slf, held.base, held.len()))
    }

    /// Has everything that was written to a file before brought to its device; `DeadlineError` when it is not there after
    /// `timeout` seconds.
    #[pyo3(signature = (timeout = 30.0))]
    fn sync(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let held = &self.held;
        let _call = enter(&held.fabric.life)?;
        let timeout = parse_timeout(timeout)?;
        let synced = held.region.sync().map_err(to_python)?;
        answered(py, timeout, synced)
    }

    /// Refuses new transfers over the region at once, waits for those in flight, and lets the memory go. `BusyError` when some
    /// are still in flight after `timeout` seconds: the memory is kept, call again.
    #[pyo3(signature = (timeout = 30.0))]
    fn deregister(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let held = &self.held;
        let _call = enter(&held.fabric.life)?;
        let timeout = parse_timeout(timeout)?;
        let drained = patiently(py, timeout, |slice| {
            held.deregister(slice).is_ok().then_some(())
        })?;
        if drained.is_none() {
            let text = format!(
                "region {} has work in flight, or other ranges of it are registered",
                held.region.id()
            );
            return Err(to_python(Error::new(ErrorKind::Busy, text)));
        }
        held.let_go(py);
        Ok(())
    }

    fn __repr__(&self) -> String {
        let region = &self.held.region;
        format!(
            "<kvfabric.Region {} of {} bytes>",
            region.id(),
            self.held.len()
        )
    }
}
