//! Host memory that devices copy from and to by themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Code, PointerFacts};
use super::gpu::Gpu;
use super::memory::outside;
use crate::region::RegionCore;
use crate::sys::memory::{HostMemory, Mapping};

/// Whose memory it is.
enum Owner {
    Region(Arc<RegionCore>),
    Own(HostMemory),
    /// Kept for ever, because the driver could not be made to let go of it.
    Given,
}

/// Host memory whose pages the driver holds, so that copies of it need no help of the processor's.
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    owner: Owner,
    /// Pinned by us; otherwise its owner had done so.
    is_ours: bool,
    /// Kernels reach it, by the same address.
    is_mapped: bool,
    /// Its region is being deregistered, and counts this as a user.
    is_awaited: AtomicBool,
}

impl Pinned {
    /// All memory of a region.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a region of no host memory, [`ErrorKind::Busy`] when a part of it is pinned by someone
    /// else; otherwise what the driver says.
    pub(crate) fn region(gpu: &Arc<Gpu>, region: &Arc<RegionCore>) -> Result<Self> {
        region.mapping()?;
        Self::new(gpu, Owner::Region(region.clone()))
    }

    /// Memory of our own.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn own(gpu: &Arc<Gpu>, memory: HostMemory) -> Result<Self> {
        Self::new(gpu, Owner::Own(memory))
    }

    fn new(gpu: &Arc<Gpu>, owner: Owner) -> Result<Self> {
        let mut pinned = Self {
            gpu: gpu.clone(),
            owner,
            is_ours: false,
            is_mapped: false,
            is_awaited: AtomicBool::new(false),
        };
        let (memory, bytes) = (pinned.memory()?, pinned.memory()?.bytes());
        provide(memory.mapping(), gpu.node());
        let registered = gpu.enter().and_then(|_entered| {
            // SAFETY: the memory is the owner's, which this keeps: mapped, readable and writable. Memory that is lent to a
            // region is so until that is deregistered, and it waits for this (`await_end`). Unregistered by `drop`.
            unsafe {
                gpu.calls
                    .register_host(memory.base().as_ptr(), bytes as usize)
            }
        });
        match registered {
            Ok(()) => {
                pinned.is_ours = true;
                pinned.is_mapped = pinned.find_mapped();
            }
            Err(Code::HOST_MEMORY_ALREADY_REGISTERED) => pinned.check_covered()?,
            Err(code) => return Err(gpu.fault(&format!("pin {bytes} bytes of host memory"), code)),
        }
        Ok(pinned)
    }

    fn memory(&self) -> Result<&HostMemory> {
        match &self.owner {
            Owner::Own(memory) => Ok(memory),
            Owner::Region(region) => region.host().ok_or_else(|| {
                let text = format!("region {} is no host memory", region.id());
                Error::new(ErrorKind::Unsupported, text)
            }),
            Owner::Given => Err(Error::new(
                ErrorKind::Internal,
                "pinned memory was given up",
            )),
        }
    }

    /// The bytes, for the processor's own copies.
    pub(crate) fn mapping(&self) -> Result<&Mapping> {
        Ok(self.memory()?.mapping())
    }

    /// Whether kernels reach it: it may have no address on the device, or another one.
    fn find_mapped(&self) -> bool {
        let Ok(memory) = self.memory() else {
            return false;
        };
        let base = memory.base().as_ptr();
        let mapped = self.gpu.enter().and_then(|_entered| {
            // SAFETY: the context is current.
            unsafe { self.gpu.calls.device_pointer(base) }
        });
        mapped == Ok(base.addr() as u64)
    }

    /// Whether kernels may read and write it. Not said of memory that others have pinned.
    pub(super) fn is_mapped(&self) -> bool {
        self.is_mapped
    }

    /// Whether what its owner has pinned is all of it.
    fn check_covered(&self) -> Result<()> {
        let memory = self.mapping()?;
        let (start, end) = (memory.address(), memory.address() + memory.len());
        let facts = self.gpu.pointer_facts(start)?;
        let until = facts.start.saturating_add(facts.bytes);
        if facts.memory_type == PointerFacts::HOST && facts.start <= start && until >= end {
            return Ok(());
        }
        let text = "a part of the memory, or of its first or last page, is pinned by someone else";
        Err(Error::new(ErrorKind::Busy, text))
    }

    /// The address of `offset`, after checking that `len` bytes lie there.
    pub(super) fn at(&self, offset: u64, len: u64) -> Result<u64> {
        let memory = self.mapping()?;
        match offset.checked_add(len) {
            Some(end) if end <= memory.len() => Ok(memory.address() + offset),
            _ => Err(outside(offset, len, memory.len())),
        }
    }

    /// Its region is being deregistered: it is used until this is gone.
    pub(crate) fn await_end(&self) {
        if let Owner::Region(region) = &self.owner
            && !self.is_awaited.swap(true, Ordering::AcqRel)
        {
            region.hold();
        }
    }
}

impl Drop for Pinned {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if !self.gpu.process.is_current() {
            return;
        }
        let unpinned = match (self.is_ours, self.memory()) {
            (true, Ok(memory)) => self.gpu.enter().and_then(|_entered| {
                // SAFETY: registered by `new` at this address, unregistered only here; work that names it holds this until
                // it is over.
                unsafe { self.gpu.calls.unregister_host(memory.base().as_ptr()) }
            }),
            _ => Ok(()),
        };
        match unpinned {
            Ok(()) if self.is_awaited.load(Ordering::Acquire) => {
                if let Owner::Region(region) = &self.owner {
                    region.leave();
                }
            }
            Ok(()) => {}
            Err(code) => {
                tracing::error!(
                    code = code.0,
                    "host memory stays pinned, and is never called free"
                );
                // The driver goes on with these pages: what is mapped there later would not be what it copies.
                self.await_end();
                std::mem::forget(std::mem::replace(&mut self.owner, Owner::Given));
            }
        }
    }
}

/// Takes the pages of memory before the driver does, which has the kernel zero one after the other: by several threads, near the
/// device. Memory of others is as they made it, and what is not possible is left to the driver.
fn provide(memory: &Mapping, node: Option<u32>) {
    if memory.is_lent() {
        return;
    }
    let bytes = memory.len();
    if let Some(Err(error)) = node.map(|node| memory.prefer_node(node)) {
        tracing::debug!(%error, bytes, "memory that is pinned is not placed near the device");
    }
    if let Err(error) = memory.populate_all() {
        tracing::debug!(%error, bytes, "pages that are pinned are taken one by one");
    }
}
