//! Memory of devices that network cards read and write themselves (GPUDirect RDMA): how a card is given the memory, and when
//! what it has written is visible to kernels.
//!
//! What holds here is from NVIDIA's "GPUDirect RDMA" (sections "Synchronization and Memory Ordering" and "Pinning GPU memory") and
//! from the driver's reference, and was never seen on a device:
//!
//! - Copies of the driver that touch memory which cards read must be over when their call returns: that is what
//!   `CU_POINTER_ATTRIBUTE_SYNC_MEMOPS` asks for. It holds for one allocation by `cuMemAlloc`; memory that was mapped in pieces has it
//!   only by a flag of the whole context (UCX 1.22, `uct_cuda_copy_sync_memops`), which belongs to the engine: we leave that alone.
//! - Kernels that begin after a card has told of the end of its writes see them. A kernel that runs already may not, until
//!   `cuFlushGPUDirectRDMAWrites` has returned: unless the device says that it orders them by itself. NCCL flushes on devices
//!   before compute capability 9.0 (`ncclTopoNeedFlush`), which is what those devices say.
//! - A range to be given as a dma-buf begins and ends at pages of the host (`cuMemGetHandleForAddressRange`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Answer, Attribute, Code};
use super::gpu::Gpu;
use super::memory::DeviceMemory;

/// The driver's calls for this, none of which every driver has.
pub(crate) trait DirectCalls: Send + Sync {
    /// `cuMemGetHandleForAddressRange` with `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD` and no flags; CUDA 11.7 and later.
    ///
    /// The flag that has the range reached by the PCI bus where there is another way
    /// (`CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE`, CUDA 12.8) is never given: such a descriptor is for
    /// `mlx5dv_reg_dmabuf_mr` with a second interface of the card; by `ibv_reg_dmabuf_mr` it is taken, and operations then fail (UCX 1.22,
    /// `uct_cuda_copy_md_get_dmabuf_fd`).
    fn dma_buf(&self, address: u64, bytes: usize) -> Answer<OwnedFd>;
    /// `cuPointerSetAttribute` with `CU_POINTER_ATTRIBUTE_SYNC_MEMOPS`. Needs a current context.
    fn synchronize_copies(&self, address: u64) -> Answer<()>;
    /// `cuFlushGPUDirectRDMAWrites` of the current context, for that device.
    fn flush_remote_writes(&self) -> Answer<()>;
    /// Whether memory of devices is memory of the process, which a stand-in may have.
    fn is_of_process(&self) -> bool {
        false
    }
}

/// Natively ordered for the device itself, as `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING` counts.
const ORDERED_FOR_OWNER: i32 = 100;
/// Of `CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS`: by a call of the host.
const FLUSHED_BY_HOST: i32 = 1;

/// When kernels see what a card has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteWrites {
    /// As soon as the card has told that it is done: the device orders them.
    Ordered,
    /// After a call of the driver, which is made before anybody is told.
    Flushed,
    /// Kernels that begin afterwards see them, those that run may not: the device neither orders nor flushes.
    Unordered,
}

/// What a device lets network cards do with its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaDirect {
    /// It gives its memory as dma-bufs (driver of CUDA 11.7 and later, the open kernel modules, Linux 5.12).
    pub dma_buf: bool,
    /// Cards reach its memory through a module of the kernel (`nvidia-peermem`).
    pub peer_memory: bool,
    /// The latter holds for memory that is mapped in pieces, too, if it was allocated for that.
    pub peer_memory_mapped: bool,
    /// When kernels see what a card has written.
    pub remote_writes: RemoteWrites,
}

impl CudaDirect {
    pub(super) fn of(attribute: impl Fn(Attribute) -> Answer<i32>) -> Self {
        // A driver that does not know the question has not what is asked for.
        let number = |wanted| attribute(wanted).unwrap_or(0);
        let flushes = number(Attribute::RemoteFlushes) & FLUSHED_BY_HOST != 0;
        Self {
            dma_buf: number(Attribute::DmaBuf) != 0,
            peer_memory: number(Attribute::PeerMemory) != 0,
            peer_memory_mapped: number(Attribute::PeerMemoryMapped) != 0,
            remote_writes: match number(Attribute::RemoteOrdering) {
                ORDERED_FOR_OWNER.. => RemoteWrites::Ordered,
                _ if flushes => RemoteWrites::Flushed,
                _ => RemoteWrites::Unordered,
            },
        }
    }
}

/// What a device is asked once.
#[derive(Default)]
pub(super) struct Asked(OnceLock<CudaDirect>);

/// A range of memory for a card, as a file descriptor.
pub(crate) struct DmaBuf {
    fd: OwnedFd,
    /// Where the range begins in it.
    pub(crate) offset: u64,
}

impl DmaBuf {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Gpu {
    /// What network cards may do with its memory.
    pub(crate) fn direct(&self) -> CudaDirect {
        *self
            .direct
            .0
            .get_or_init(|| CudaDirect::of(|attribute| self.attribute(attribute)))
    }

    /// Waits until kernels of this device see what cards have written into its memory, where that is not so anyway.
    ///
    /// # Errors
    /// What the driver says: running kernels may not see it then.
    pub(crate) fn land_remote_writes(&self) -> Result<()> {
        if self.direct().remote_writes != RemoteWrites::Flushed {
            return Ok(());
        }
        let flushed = self
            .enter()
            .and_then(|_entered| self.calls.flush_remote_writes());
        flushed.map_err(|code| self.fault("make what a card has written visible", code))
    }
}

impl DeviceMemory {
    /// Prepares it for cards that read and write it: copies of the driver with it are over when their calls return.
    pub(crate) fn open_to_cards(&self) {
        let gpu = self.gpu();
        let asked = gpu
            .enter()
            .and_then(|_entered| gpu.calls.synchronize_copies(self.address()));
        if let Err(code) = asked {
            let error = gpu.fault("set CU_POINTER_ATTRIBUTE_SYNC_MEMOPS", code);
            tracing::warn!(%error, "copies within a device that are not waited for may be missing in what a card reads");
        }
    }

    /// Whether it is memory of the process: that of a stand-in for the driver, for tests.
    pub(crate) fn is_of_process(&self) -> bool {
        self.gpu().calls.is_of_process()
    }

    /// It as a dma-buf, of the pages that it lies in.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where there are none, with the reason; otherwise what the driver says.
    pub(crate) fn dma_buf(&self) -> Result<DmaBuf> {
        let gpu = self.gpu();
        if !gpu.direct().dma_buf {
            let text = format!(
                "cuda device {} gives no dma-bufs: they need a driver of CUDA 11.7, the open kernel modules and Linux 5.12",
                self.ordinal()
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let page = rustix::param::page_size() as u64;
        let start = self.address() - self.address() % page;
        let end = (self.address() + self.bytes()).next_multiple_of(page);
        let bytes = end - start;
        let fd = gpu
            .enter()
            .and_then(|_entered| gpu.calls.dma_buf(start, bytes as usize));
        let doing = format!("give {bytes} bytes at {start:#x} as a dma-buf");
        Ok(DmaBuf {
            fd: fd.map_err(|code| gpu.fault(&doing, code))?,
            offset: self.address() - start,
        })
    }

    /// Whether a card may reach it through a module of the kernel.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the reason.
    pub(crate) fn check_peer_memory(&self) -> Result<()> {
        let (direct, device) = (self.gpu().direct(), self.ordinal());
        let lacking = |text: &str| {
            let text = format!("cuda device {device} {text}");
            Err(Error::new(ErrorKind::Unsupported, text))
        };
        if !direct.peer_memory {
            return lacking("says that it has no GPUDirect RDMA");
        }
        let is_mapped = !self.gpu().pointer_facts(self.address())?.is_legacy;
        if is_mapped && !direct.peer_memory_mapped {
            return lacking("gives cards no memory that is mapped in pieces");
        }
        Ok(())
    }
}

/// An error of calls that a driver lacks.
pub(super) const LACKING: Code = Code::NOT_SUPPORTED;
