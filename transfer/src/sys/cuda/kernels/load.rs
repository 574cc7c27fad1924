//! The kernels on a device.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::sys::cuda::calls::{Answer, Attribute, Handle, Threads};
use crate::sys::cuda::gpu::Gpu;

/// What `scripts/cuda-kernels` makes of `kernels.cu`, with the end that the driver looks for.
const PTX: &str = concat!(include_str!("generated/kernels.ptx"), "\0");

/// Threads of a block.
const BLOCK_THREADS: u32 = 256;

/// Blocks for each of a device's multiprocessors: the rest stays with the engine.
const BLOCKS_EACH: u32 = 2;

/// A kernel of `kernels.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    CopyPieces,
    Rearrange,
    ToE4m3,
    OfE4m3,
    CrcTable,
    CrcRanges,
}

impl Kernel {
    const ALL: [Self; 6] = [
        Self::CopyPieces,
        Self::Rearrange,
        Self::ToE4m3,
        Self::OfE4m3,
        Self::CrcTable,
        Self::CrcRanges,
    ];

    fn name(self) -> &'static CStr {
        match self {
            Self::CopyPieces => c"kvf_copy_pieces",
            Self::Rearrange => c"kvf_rearrange",
            Self::ToE4m3 => c"kvf_to_e4m3",
            Self::OfE4m3 => c"kvf_of_e4m3",
            Self::CrcTable => c"kvf_crc_table",
            Self::CrcRanges => c"kvf_crc_ranges",
        }
    }
}

/// All of them, loaded in a device's context.
pub(crate) struct Kernels {
    gpu: Arc<Gpu>,
    module: Handle,
    functions: [Handle; 6],
    blocks_max: u32,
}

impl Kernels {
    /// Has the driver compile them for the device, which it does once and remembers on disk.
    ///
    /// # Errors
    /// What the driver says: one before CUDA 12.0 cannot read them, a device before compute capability 7.5 cannot run them.
    pub(crate) fn load(gpu: &Arc<Gpu>) -> Result<Arc<Self>> {
        let image = CStr::from_bytes_with_nul(PTX.as_bytes())
            .map_err(|error| Error::new(ErrorKind::Internal, format!("the kernels: {error}")))?;
        let failed = |doing: &str, code| gpu.fault(doing, code);
        let processors = gpu
            .attribute(Attribute::Multiprocessors)
            .map_err(|code| failed("count its multiprocessors", code))?;
        let entered = gpu
            .enter()
            .map_err(|code| failed("enter its context", code))?;
        // SAFETY: the context is current; unloaded by `drop`.
        let module = unsafe { gpu.calls.load_module(image) };
        let module = module.map_err(|code| failed("load kernels", code))?;
        let mut kernels = Self {
            gpu: gpu.clone(),
            module,
            functions: [module; 6],
            blocks_max: processors.unsigned_abs().max(1) * BLOCKS_EACH,
        };
        for kernel in Kernel::ALL {
            // SAFETY: just loaded, in this context.
            let found = unsafe { gpu.calls.function(module, kernel.name()) };
            let what = || format!("find kernel {:?}", kernel.name());
            kernels.functions[kernel as usize] = found.map_err(|code| failed(&what(), code))?;
        }
        drop(entered);
        Ok(Arc::new(kernels))
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Queues a kernel, for about so many threads.
    ///
    /// # Safety
    /// As [`Calls::launch`](crate::sys::cuda::calls::Calls::launch) of the arguments, the memory and the stream; this is kept until the
    /// stream has run it.
    pub(crate) unsafe fn launch(
        &self,
        kernel: Kernel,
        threads: u64,
        arguments: &mut [*mut c_void],
        stream: Handle,
    ) -> Answer<()> {
        let wanted = threads.div_ceil(u64::from(BLOCK_THREADS));
        let threads = Threads {
            blocks: wanted.clamp(1, u64::from(self.blocks_max)) as u32,
            each: BLOCK_THREADS,
        };
        let function = self.functions[kernel as usize];
        // SAFETY: a function of the module that this keeps; the rest is the caller's promise.
        unsafe { self.gpu.calls.launch(function, threads, arguments, stream) }
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if !self.gpu.process.is_current() {
            return;
        }
        let unloaded = self.gpu.enter().and_then(|_entered| {
            // SAFETY: loaded by `load`, unloaded only here; who queued kernels holds this until they have run.
            unsafe { self.gpu.calls.unload_module(self.module) }
        });
        if let Err(code) = unloaded {
            tracing::warn!(code = code.0, device = self.gpu.ordinal(), "unload kernels");
        }
    }
}

/// A value as an argument of a launch, which copies it.
pub(crate) fn argument<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}
