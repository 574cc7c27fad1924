//! The calls for memory that network cards reach, each of which a driver may lack.

use std::ffi::{c_ulonglong, c_void};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use cudarc::driver::sys;
use libloading::os::unix::Library as Shared;

use super::super::calls::Answer;
use super::super::direct::{DirectCalls, LACKING};
use super::{Libcuda, answer};

type RangeCall = unsafe extern "C" fn(
    *mut c_void,
    sys::CUdeviceptr,
    usize,
    sys::CUmemRangeHandleType,
    c_ulonglong,
) -> u32;
type SetCall =
    unsafe extern "C" fn(*const c_void, sys::CUpointer_attribute, sys::CUdeviceptr) -> u32;
type FlushCall = unsafe extern "C" fn(
    sys::CUflushGPUDirectRDMAWritesTarget,
    sys::CUflushGPUDirectRDMAWritesScope,
) -> u32;

// The compiler compares each with the generated binding.
const _: unsafe fn(
    *mut c_void,
    sys::CUdeviceptr,
    usize,
    sys::CUmemRangeHandleType,
    c_ulonglong,
) -> sys::CUresult = sys::cuMemGetHandleForAddressRange;
const _: unsafe fn(*const c_void, sys::CUpointer_attribute, sys::CUdeviceptr) -> sys::CUresult =
    sys::cuPointerSetAttribute;
const _: unsafe fn(
    sys::CUflushGPUDirectRDMAWritesTarget,
    sys::CUflushGPUDirectRDMAWritesScope,
) -> sys::CUresult = sys::cuFlushGPUDirectRDMAWrites;

pub(super) struct DirectTable {
    range: Option<RangeCall>,
    set: Option<SetCall>,
    flush: Option<FlushCall>,
}

impl DirectTable {
    /// # Safety
    /// The library is libcuda.
    pub(super) unsafe fn fill(library: &Shared) -> Self {
        Self {
            // SAFETY: libcuda has the call by this name with this type, but for its result, an enumeration of 32 bits, or not
            // at all.
            range: unsafe { library.get(b"cuMemGetHandleForAddressRange\0") }
                .ok()
                .map(|found| *found),
            // SAFETY: as above.
            set: unsafe { library.get(b"cuPointerSetAttribute\0") }
                .ok()
                .map(|found| *found),
            // SAFETY: as above.
            flush: unsafe { library.get(b"cuFlushGPUDirectRDMAWrites\0") }
                .ok()
                .map(|found| *found),
        }
    }
}

impl DirectCalls for Libcuda {
    fn dma_buf(&self, address: u64, bytes: usize) -> Answer<OwnedFd> {
        let call = self.direct.range.ok_or(LACKING)?;
        let kind = sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        let mut fd: RawFd = -1;
        // SAFETY: a dma-buf's handle is one descriptor, which is writable; a wrong range is answered with an error.
        answer(unsafe { call((&raw mut fd).cast(), address, bytes, kind, 0) })?;
        // SAFETY: made by the call just now, for the caller to close.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn synchronize_copies(&self, address: u64) -> Answer<()> {
        let call = self.direct.set.ok_or(LACKING)?;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS;
        let on: u32 = 1;
        // SAFETY: the attribute's value is one number of 32 bits, read during the call; any address may be named.
        answer(unsafe { call((&raw const on).cast(), attribute, address) })
    }

    fn flush_remote_writes(&self) -> Answer<()> {
        let call = self.direct.flush.ok_or(LACKING)?;
        let target = sys::CUflushGPUDirectRDMAWritesTarget::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
        let scope = sys::CUflushGPUDirectRDMAWritesScope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER;
        // SAFETY: no memory is named; without a current context it is answered with an error.
        answer(unsafe { call(target, scope) })
    }
}
