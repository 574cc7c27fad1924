//! Memory of GPUs, given to network cards: as a dma-buf, or through a module of the kernel that knows the GPU's addresses.

use std::fmt;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ibverbs as ffi;
use super::memory::{Access, Domain, pin};
use crate::sys::cuda::DeviceMemory;

/// Where modules tell of themselves that let cards reach memory of GPUs by its address: NVIDIA's own, and the older one. The same
/// places that NCCL looks at.
const PEER_MODULES: [(&str, &str); 3] = [
    ("nvidia_peermem", "sys/module/nvidia_peermem"),
    ("nv_peer_mem", "sys/kernel/mm/memory_peers/nv_mem"),
    ("nv_peer_mem", "sys/kernel/mm/memory_peers/nv_mem_nc"),
];

/// The loaded module that lets cards reach memory of GPUs by its address, if there is one. `root` is where `sys` is.
fn peer_module(root: &Path) -> Option<&'static str> {
    let found = PEER_MODULES
        .iter()
        .find(|(_, path)| root.join(path).exists());
    found.map(|(name, _)| *name)
}

/// Whether a device takes dma-bufs, or why not: it is given none, and says whether it would have looked.
pub(crate) fn takes_dma_bufs(domain: &Domain) -> Result<(), String> {
    let library = domain.context.library;
    let call = library.register_dma_buf.ok_or_else(no_call)?;
    // SAFETY: the domain is kept; no descriptor is -1, so nothing is registered.
    let raw = unsafe { call(domain.raw.as_ptr(), 0, 0, 0, -1, 0) };
    let cause = std::io::Error::last_os_error();
    if let Some(raw) = NonNull::new(raw) {
        // SAFETY: registered above, of nothing, and ended once.
        unsafe { library.calls.ibv_dereg_mr(raw.as_ptr()) };
        return Ok(());
    }
    match cause.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => Err(format!(
            "the kernel's driver of {} takes none ({cause})",
            domain.context.name()
        )),
        _ => Ok(()),
    }
}

fn no_call() -> String {
    "libibverbs is older than rdma-core 34, which has ibv_reg_dmabuf_mr".to_owned()
}

/// How a card came to memory of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    DmaBuf,
    PeerMemory(Option<&'static str>),
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DmaBuf => f.write_str("dma-buf"),
            Self::PeerMemory(Some(module)) => write!(f, "address, by the module {module}"),
            Self::PeerMemory(None) => f.write_str("address, by no module that is known here"),
        }
    }
}

/// Registers memory of a GPU with a card: as a dma-buf if both sides can, else by its address.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with what came of either.
///
/// # Safety
/// The memory stays what it is until the registration has ended.
pub(super) unsafe fn register(
    domain: &Domain,
    memory: &DeviceMemory,
    access: Access,
) -> Result<NonNull<ffi::ibv_mr>> {
    memory.open_to_cards();
    let card = domain.context.name();
    // SAFETY: passed on to the caller.
    let by_dma_buf = unsafe { by_dma_buf(domain, memory, access) };
    let (raw, how) = match by_dma_buf {
        Ok(raw) => (raw, How::DmaBuf),
        Err(first) => {
            let module = peer_module(Path::new("/"));
            // SAFETY: passed on to the caller.
            let by_address = unsafe { by_address(domain, memory, access) };
            let raw = by_address.map_err(|second| {
                let (bytes, device) = (memory.bytes(), memory.ordinal());
                let module = match module {
                    Some(name) => format!("{name} is loaded"),
                    None => "nvidia_peermem is not loaded".to_owned(),
                };
                let text = format!(
                    "verbs: {card} does not reach {bytes} bytes of CUDA device {device}: as a dma-buf: {first}; by address: {second} ({module})"
                );
                Error::new(ErrorKind::Unsupported, text)
            })?;
            tracing::debug!(reason = first, "memory of a GPU is no dma-buf");
            (raw, How::PeerMemory(module))
        }
    };
    tracing::info!(
        card,
        device = memory.ordinal(),
        bytes = memory.bytes(),
        by = %how,
        remote_writes = ?memory.gpu().direct().remote_writes,
        "a network card reaches memory of a GPU"
    );
    Ok(raw)
}

/// # Safety
/// As [`register`].
unsafe fn by_dma_buf(
    domain: &Domain,
    memory: &DeviceMemory,
    access: Access,
) -> Result<NonNull<ffi::ibv_mr>, String> {
    let call = domain
        .context
        .library
        .register_dma_buf
        .ok_or_else(no_call)?;
    let buffer = memory.dma_buf().map_err(|error| error.to_string())?;
    // The card keeps what the descriptor stands for; peers name bytes by their addresses on the GPU.
    // SAFETY: the domain is kept, the descriptor is open, and the memory stays what it is by the caller's word.
    let raw = unsafe {
        call(
            domain.raw.as_ptr(),
            buffer.offset,
            memory.bytes() as usize,
            memory.address(),
            buffer.fd().as_raw_fd(),
            access.flags().cast_signed(),
        )
    };
    NonNull::new(raw).ok_or_else(|| refused(&std::io::Error::last_os_error()))
}

/// # Safety
/// As [`register`].
unsafe fn by_address(
    domain: &Domain,
    memory: &DeviceMemory,
    access: Access,
) -> Result<NonNull<ffi::ibv_mr>, String> {
    memory
        .check_peer_memory()
        .map_err(|error| error.to_string())?;
    let range = (memory.address(), memory.bytes());
    // SAFETY: passed on to the caller.
    unsafe { pin(domain, range, access) }.map_err(|cause| refused(&cause))
}

/// What the system's answer means here.
fn refused(cause: &std::io::Error) -> String {
    let meaning = match cause.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => {
            "; the kernel's driver of the card cannot"
        }
        Some(libc::EFAULT) => "; the kernel finds no memory there that cards may reach",
        Some(libc::ENOMEM) => {
            "; `ulimit -l`, or the GPU's window on the bus is full (BAR1 in nvidia-smi -q)"
        }
        _ => "",
    };
    format!("{cause}{meaning}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of the places, and none.
    #[test]
    fn a_module_that_is_loaded_is_named() {
        for (name, path) in PEER_MODULES {
            let root = tempfile::tempdir().unwrap();
            assert_eq!(peer_module(root.path()), None);
            std::fs::create_dir_all(root.path().join(path)).unwrap();
            assert_eq!(peer_module(root.path()), Some(name));
        }
    }
}
