//! Memory that a device may read and write.

use std::ptr::NonNull;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::context::Context;
use super::device;
use super::generated::ibverbs as ffi;
use super::library::{check, last};
use crate::region::RegionCore;
use crate::sys::cuda::DeviceMemory;
use crate::sys::memory::Mapping;

/// Memory and queue pairs that may be used together.
pub(crate) struct Domain {
    pub(super) context: Arc<Context>,
    pub(super) raw: NonNull<ffi::ibv_pd>,
}

// SAFETY: as for the context.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        // SAFETY: the device is open, and the domain keeps it so.
        let raw = unsafe { context.library.calls.ibv_alloc_pd(context.raw.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| last("make a protection domain"))?;
        Ok(Self {
            context: context.clone(),
            raw,
        })
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if !self.context.process.is_current() {
            return;
        }
        let calls = &self.context.library.calls;
        // SAFETY: made by `new`; memory and queue pairs hold the domain, so there are none any more.
        let code = unsafe { calls.ibv_dealloc_pd(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(code, "give a protection domain back");
        }
    }
}

/// What peers may do with memory. The owner may always do both.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl Access {
    pub(super) fn flags(self) -> u32 {
        let flag = |set, flag| if set { flag } else { 0 };
        ffi::IBV_ACCESS_LOCAL_WRITE
            | flag(self.read, ffi::IBV_ACCESS_REMOTE_READ)
            | flag(self.write, ffi::IBV_ACCESS_REMOTE_WRITE)
    }
}

/// What keeps memory where it is.
enum Kept {
    Region(Arc<RegionCore>),
    Own(Mapping),
}

impl Kept {
    /// Where it begins, and its bytes.
    fn range(&self) -> Result<(u64, u64)> {
        match self {
            Self::Own(mapping) => Ok((mapping.address(), mapping.len())),
            Self::Region(region) => Ok((region.address()?, region.bytes())),
        }
    }

    /// The memory of a device that it is.
    fn device(&self) -> Option<&DeviceMemory> {
        match self {
            Self::Own(_) => None,
            Self::Region(region) => region.device().map(|memory| &**memory),
        }
    }
}

/// Registers memory by its address.
///
/// # Safety
/// The range stays what it is until the registration has ended: mapped, or of a device.
pub(super) unsafe fn pin(
    domain: &Domain,
    (address, bytes): (u64, u64),
    access: Access,
) -> std::io::Result<NonNull<ffi::ibv_mr>> {
    // SAFETY: the caller keeps the range; what the system does not find there it refuses.
    let raw = unsafe {
        domain.context.library.calls.ibv_reg_mr(
            domain.raw.as_ptr(),
            std::ptr::with_exposed_provenance_mut(address as usize),
            bytes as usize,
            access.flags().cast_signed(),
        )
    };
    NonNull::new(raw).ok_or_else(std::io::Error::last_os_error)
}

fn not_pinned(bytes: u64, cause: std::io::Error) -> Error {
    if cause.raw_os_error() == Some(libc::ENOMEM) {
        let text = format!("verbs: pin {bytes} bytes: more than this process may (`ulimit -l`)");
        return Error::new(ErrorKind::NoSpace, text).with_source(cause);
    }
    Error::io(format!("verbs: register {bytes} bytes"), cause)
}

/// Registered memory. While this lives the device may use it; it is pinned.
pub(crate) struct Memory {
    domain: Arc<Domain>,
    raw: NonNull<ffi::ibv_mr>,
    pub(super) local_key: u32,
    remote_key: u32,
    /// Its first address, as the device knows it, and its bytes.
    address: u64,
    bytes: u64,
    /// None once the registration has failed to end: what was here is then kept for good.
    kept: Option<Kept>,
    is_registered: bool,
}

// SAFETY: the keys never change, the mapping is shared by raw copies alone, and the registration ends in `drop`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Registers all of a region: memory of the host, or of a GPU.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] above the limit of pinned memory (`ulimit -l`), [`ErrorKind::Io`] when the device refuses it;
    /// [`ErrorKind::Unsupported`] when it does not reach memory of this GPU, with what was tried.
    pub(crate) fn of_region(
        domain: &Arc<Domain>,
        region: &Arc<RegionCore>,
        access: Access,
    ) -> Result<Self> {
        Self::new(domain, Kept::Region(region.clone()), access)
    }

    /// Registers memory for messages.
    pub(crate) fn own(domain: &Arc<Domain>, bytes: u64) -> Result<Self> {
        let mapping = Mapping::anonymous(bytes)?;
        Self::new(domain, Kept::Own(mapping), Access::default())
    }

    fn new(domain: &Arc<Domain>, kept: Kept, access: Access) -> Result<Self> {
        let (address, bytes) = kept.range()?;
        let raw = match kept.device() {
            // SAFETY: the memory is kept as it is by `kept`, which lives as long as the registration.
            Some(memory) => unsafe { device::register(domain, memory, access) },
            // SAFETY: the range is mapped for as long as `kept`, which lives as long as the registration.
            None => unsafe { pin(domain, (address, bytes), access) }
                .map_err(|cause| not_pinned(bytes, cause)),
        }?;
        // SAFETY: registered just now.
        let described = unsafe { raw.as_ref() };
        Ok(Self {
            domain: domain.clone(),
            raw,
            local_key: described.lkey,
            remote_key: described.rkey,
            address,
            bytes,
            kept: Some(kept),
            is_registered: true,
        })
    }

    /// What lets a peer use it.
    pub(crate) fn remote_key(&self) -> u32 {
        self.remote_key
    }

    /// Bytes that are registered, and where: checked to be within.
    pub(super) fn at(&self, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.bytes) {
            let text = format!("{len} bytes at {offset} of {} registered ones", self.bytes);
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        Ok(self.address + offset)
    }

    /// The memory itself.
    pub(crate) fn mapping(&self) -> Result<&Mapping> {
        match &self.kept {
            Some(Kept::Own(mapping)) => Ok(mapping),
            Some(Kept::Region(region)) => region.mapping(),
            None => {
                let text = "memory that could not be deregistered";
                Err(Error::new(ErrorKind::Internal, text))
            }
        }
    }

    /// Ends the registration: no byte is read or written there any more when this returns, whatever keys peers have.
    ///
    /// # Errors
    /// What the system says; the memory must then stay as it is for ever, and is leaked.
    pub(crate) fn deregister(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.is_registered, false) {
            return Ok(());
        }
        if !self.domain.context.process.is_current() {
            return Ok(());
        }
        let calls = &self.domain.context.library.calls;
        // SAFETY: registered by `new`, ended once, here; queue pairs hold memory that posted work names, so none does.
        let code = unsafe { calls.ibv_dereg_mr(self.raw.as_ptr()) };
        let ended = check("deregister memory", code);
        if ended.is_err() {
            self.keep();
        }
        ended
    }

    /// The device may still use the memory: it stays mapped for good.
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn keep(&mut self) {
        std::mem::forget(self.kept.take());
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "memory stays registered");
        }
    }
}
