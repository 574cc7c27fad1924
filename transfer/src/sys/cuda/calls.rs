//! The calls of the CUDA driver that are made, as one table: the real driver's, or a stand-in's in tests.

use std::ffi::{CStr, c_void};

use super::direct::DirectCalls;
use super::sharing::SharingCalls;

/// What a call answered that is not success, by the driver's number. Newer drivers know more of them than any header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Code(pub(crate) u32);

impl Code {
    pub(crate) const INVALID_VALUE: Self = Self(1);
    pub(crate) const OUT_OF_MEMORY: Self = Self(2);
    pub(crate) const STUB_LIBRARY: Self = Self(34);
    pub(crate) const DEVICE_UNAVAILABLE: Self = Self(46);
    pub(crate) const NO_DEVICE: Self = Self(100);
    pub(crate) const INVALID_DEVICE: Self = Self(101);
    pub(crate) const MAP_FAILED: Self = Self(205);
    pub(crate) const PEER_ACCESS_UNSUPPORTED: Self = Self(217);
    pub(crate) const INVALID_HANDLE: Self = Self(400);
    pub(crate) const NOT_READY: Self = Self(600);
    pub(crate) const PEER_ACCESS_ALREADY_ENABLED: Self = Self(704);
    pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: Self = Self(712);
    pub(crate) const NOT_PERMITTED: Self = Self(800);
    pub(crate) const NOT_SUPPORTED: Self = Self(801);
    pub(crate) const SYSTEM_NOT_READY: Self = Self(802);
    pub(crate) const SYSTEM_DRIVER_MISMATCH: Self = Self(803);
    pub(crate) const COMPAT_NOT_SUPPORTED_ON_DEVICE: Self = Self(804);
    pub(crate) const CAPTURE_IMPLICIT: Self = Self(906);
    pub(crate) const CAPTURED_EVENT: Self = Self(907);
    pub(crate) const UNKNOWN: Self = Self(999);
}

/// The result of a call.
pub(crate) type Answer<T> = Result<T, Code>;

/// A device, as the driver numbers it in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device(pub(crate) i32);

/// Names something of the driver's: a context, a stream, an event. Means nothing outside of it, and owns nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle(pub(super) *mut c_void);

// SAFETY: a handle is a number that the driver gave; its calls may be made from any thread, and who may use what the number
// names, and for how long, is the promise of the types that hold it.
unsafe impl Send for Handle {}
// SAFETY: as above; nothing is ever reached through it here.
unsafe impl Sync for Handle {}

impl Handle {
    /// What another owner names by a number.
    pub(super) fn of(number: u64) -> Self {
        Self(std::ptr::without_provenance_mut(number as usize))
    }
}

/// Facts about a device that have no call of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Attribute {
    ComputeMajor,
    ComputeMinor,
    /// Whether one address names the same byte for the host and all devices.
    UnifiedAddressing,
    /// How many blocks of threads run side by side, at least.
    Multiprocessors,
    /// Whether its memory can be given as dma-bufs.
    DmaBuf,
    /// Whether a module of the kernel lets network cards reach its memory.
    PeerMemory,
    /// The same for memory that is mapped in pieces.
    PeerMemoryMapped,
    /// How writes of network cards are made visible, as bits.
    RemoteFlushes,
    /// For whom they are ordered anyway, as a number that grows with the circle.
    RemoteOrdering,
}

/// What the driver knows of an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PointerFacts {
    /// 0: memory that it does not know, 1: of the host, 2: of a device.
    pub(crate) memory_type: u32,
    /// Memory that moves between host and devices by itself.
    pub(crate) is_managed: bool,
    /// The device that it belongs to.
    pub(crate) ordinal: i32,
    /// Where the allocation or mapping that it lies in begins, and its bytes.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    /// Which allocation, as no other in this process.
    pub(crate) buffer: u64,
    /// Allocated by `cuMemAlloc` and the like: one piece, that other processes can open.
    pub(crate) is_legacy: bool,
}

impl PointerFacts {
    pub(crate) const HOST: u32 = 1;
    pub(crate) const DEVICE: u32 = 2;
}

/// Copies to be made, in the form of the batched call: three lists of one length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CopyList {
    pub(super) targets: Vec<u64>,
    pub(super) sources: Vec<u64>,
    pub(super) bytes: Vec<usize>,
}

impl CopyList {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn push(&mut self, target: u64, source: u64, bytes: usize) {
        self.targets.push(target);
        self.sources.push(source);
        self.bytes.push(bytes);
    }
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Threads {
    /// Blocks of them.
    pub(crate) blocks: u32,
    /// Threads of a block: a multiple of 32, up to 256.
    pub(crate) each: u32,
}

/// The driver. Calls that take a handle, or that need a current context, are unsafe: only what owns the handle knows that it is
/// still good. Those that only ask are not: the driver answers a wrong number with an error.
pub(crate) trait Calls: DirectCalls + SharingCalls {
    /// `cuInit`.
    fn init(&self) -> Answer<()>;
    /// `cuDriverGetVersion`: 1000 × major + 10 × minor of the newest CUDA that it serves. Works before `init`.
    fn driver_version(&self) -> Answer<i32>;
    /// `cuDeviceGetCount`.
    fn device_count(&self) -> Answer<i32>;
    /// `cuDeviceGet`.
    fn device(&self, ordinal: i32) -> Answer<Device>;
    /// `cuDeviceGetName`.
    fn device_name(&self, device: Device) -> Answer<String>;
    /// `cuDeviceGetUuid_v2`.
    fn device_uuid(&self, device: Device) -> Answer<[u8; 16]>;
    /// `cuDeviceGetPCIBusId`, such as `0000:17:00.0`.
    fn device_pci(&self, device: Device) -> Answer<String>;
    /// `cuDeviceTotalMem_v2`, in bytes.
    fn device_bytes(&self, device: Device) -> Answer<u64>;
    /// `cuDeviceGetAttribute`.
    fn attribute(&self, device: Device, attribute: Attribute) -> Answer<i32>;
    /// `cuGetErrorName` and `cuGetErrorString`; none for a number that the driver does not know.
    fn text(&self, code: Code) -> Option<(String, String)>;
    /// `cuPointerGetAttributes`. An address that it does not know is no error: its type is 0. Needs a current context.
    fn pointer_facts(&self, address: u64) -> Answer<PointerFacts>;
    /// Whether [`Calls::copy_batch`] is there: CUDA 12.8 and later.
    fn has_batch(&self) -> bool;

    /// `cuDevicePrimaryCtxRetain`.
    ///
    /// # Safety
    /// Each success is followed by one [`Calls::release_primary`], after all that was made in the context is gone.
    unsafe fn retain_primary(&self, device: Device) -> Answer<Handle>;
    /// `cuDevicePrimaryCtxRelease_v2`.
    ///
    /// # Safety
    /// Retained by this owner, and not released by it.
    unsafe fn release_primary(&self, device: Device) -> Answer<()>;
    /// `cuCtxPushCurrent_v2`: the thread's calls are about this context from now on.
    ///
    /// # Safety
    /// A context that is retained, until it is popped.
    unsafe fn push(&self, context: Handle) -> Answer<()>;
    /// `cuCtxPopCurrent_v2`.
    ///
    /// # Safety
    /// The thread's current context was pushed by this caller.
    unsafe fn pop(&self) -> Answer<()>;
    /// `cuThreadExchangeStreamCaptureMode`: sets how calls of this thread bear on graphs that others capture; what it was.
    fn capture_mode(&self, mode: u32) -> Answer<u32>;

    /// `cuMemAlloc_v2`, in the current context.
    ///
    /// # Safety
    /// A context is current.
    unsafe fn allocate(&self, bytes: usize) -> Answer<u64>;
    /// `cuMemFree_v2`.
    ///
    /// # Safety
    /// Allocated in the current context, not freed, and used by nothing that is still to run.
    unsafe fn free(&self, address: u64) -> Answer<()>;
    /// `cuMemHostRegister_v2` for all contexts (`CU_MEMHOSTREGISTER_PORTABLE`).
    ///
    /// # Safety
    /// A context is current; the range is mapped, readable and writable, until it is unregistered.
    unsafe fn register_host(&self, base: *mut u8, bytes: usize) -> Answer<()>;
    /// `cuMemHostUnregister`.
    ///
    /// # Safety
    /// Registered at exactly this address, and used by nothing that is still to run.
    unsafe fn unregister_host(&self, base: *mut u8) -> Answer<()>;

    /// `cuMemHostGetDevicePointer_v2`: by which address the current context's device reaches registered memory.
    ///
    /// # Safety
    /// A context is current.
    unsafe fn device_pointer(&self, base: *mut u8) -> Answer<u64>;

    /// `cuModuleLoadData`: the driver compiles PTX for the current context's device.
    ///
    /// # Safety
    /// A context is current.
    unsafe fn load_module(&self, image: &CStr) -> Answer<Handle>;
    /// `cuModuleGetFunction`: a kernel, which lives as long as its module.
    ///
    /// # Safety
    /// The module is loaded, its context current.
    unsafe fn function(&self, module: Handle, name: &CStr) -> Answer<Handle>;
    /// `cuModuleUnload`.
    ///
    /// # Safety
    /// Loaded, its context current, and nothing of it is still to run.
    unsafe fn unload_module(&self, module: Handle) -> Answer<()>;
    /// `cuLaunchKernel`, along one axis and without shared memory. The arguments are copied before it returns.
    ///
    /// # Safety
    /// A kernel of a loaded module, and the arguments that it takes, in its order; all memory that it reaches with them is valid for
    /// what it does until the stream has run it; the stream is live and of the current context.
    unsafe fn launch(
        &self,
        kernel: Handle,
        threads: Threads,
        arguments: &mut [*mut c_void],
        stream: Handle,
    ) -> Answer<()>;

    /// `cuStreamCreate` with `CU_STREAM_NON_BLOCKING`: waits for nobody's default stream.
    ///
    /// # Safety
    /// A context is current.
    unsafe fn create_stream(&self) -> Answer<Handle>;
    /// `cuStreamDestroy_v2`: what is queued still runs.
    ///
    /// # Safety
    /// Created by [`Calls::create_stream`], not destroyed, its context current.
    unsafe fn destroy_stream(&self, stream: Handle) -> Answer<()>;
    /// `cuStreamWaitEvent`: what the stream is given from now on is done when what was last recorded in the event is; at once if nothing
    /// was. The two may be of different devices.
    ///
    /// # Safety
    /// Both live; the event's last record is in no graph that is being captured.
    unsafe fn stream_wait(&self, stream: Handle, event: Handle) -> Answer<()>;
    /// `cuStreamGetCtx`.
    ///
    /// # Safety
    /// A live stream, a context is current.
    unsafe fn stream_context(&self, stream: Handle) -> Answer<Handle>;
    /// `cuStreamIsCapturing`: 0 if not.
    ///
    /// # Safety
    /// A live stream, a context is current.
    unsafe fn is_captured(&self, stream: Handle) -> Answer<u32>;
    /// `cuCtxGetDevice`: the current context's.
    fn current_device(&self) -> Answer<Device>;

    /// `cuEventCreate` with `CU_EVENT_DISABLE_TIMING`.
    ///
    /// # Safety
    /// A context is current.
    unsafe fn create_event(&self) -> Answer<Handle>;
    /// `cuEventDestroy_v2`.
    ///
    /// # Safety
    /// Created by [`Calls::create_event`], not destroyed.
    unsafe fn destroy_event(&self, event: Handle) -> Answer<()>;
    /// `cuEventRecord`: the event is over when all that was queued before it is.
    ///
    /// # Safety
    /// Both live and of the current context.
    unsafe fn record(&self, event: Handle, stream: Handle) -> Answer<()>;
    /// `cuEventQuery`: whether it is over; true of one that was never recorded.
    ///
    /// # Safety
    /// A live event.
    unsafe fn is_over(&self, event: Handle) -> Answer<bool>;
    /// `cuMemcpyAsync`. Blocks the caller when either side is host memory that is not registered.
    ///
    /// # Safety
    /// Both ranges are valid for the copy until the stream has made it; the stream is live and of the current context.
    unsafe fn copy(&self, target: u64, source: u64, bytes: usize, stream: Handle) -> Answer<()>;
    /// `cuMemcpyBatchAsync`: in no order among themselves; each source is read in the stream's order.
    ///
    /// # Safety
    /// As [`Calls::copy`], of every entry; [`Calls::has_batch`] said that it is there.
    unsafe fn copy_batch(&self, copies: &mut CopyList, stream: Handle) -> Answer<()>;
}
