//! The driver's calls about memory of other processes and other devices.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cudarc::driver::sys;

use super::Libcuda;
use crate::sys::cuda::calls::{Answer, Code, Device, Handle};
use crate::sys::cuda::filled::{answer, filled};
use crate::sys::cuda::sharing::{IPC_NAME_BYTES, MappingFacts, PieceHandle, SharingCalls};

/// The only flag there is; the call wants it.
const LAZY_PEER_ACCESS: c_uint = 1;
/// The handles that go from process to process as descriptors.
const FILE_DESCRIPTOR: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

impl SharingCalls for Libcuda {
    fn mapping_facts(&self, address: u64) -> Answer<MappingFacts> {
        use sys::CUpointer_attribute as Known;
        let mut wanted = [
            Known::CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR,
            Known::CU_POINTER_ATTRIBUTE_MAPPING_SIZE,
            Known::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES,
        ];
        let mut words = [0_u64; 3];
        let mut places = words
            .each_mut()
            .map(|word| (word as *mut u64).cast::<c_void>());
        // SAFETY: as in `pointer_facts`.
        answer(unsafe {
            (self.table.cuPointerGetAttributes)(
                wanted.len() as c_uint,
                wanted.as_mut_ptr(),
                places.as_mut_ptr(),
                address,
            )
        })?;
        let [start, bytes, handles] = words;
        Ok(MappingFacts {
            start,
            bytes,
            is_shareable: handles as u32 & FILE_DESCRIPTOR.0 != 0,
        })
    }

    fn can_access(&self, device: Device, other: Device) -> Answer<bool> {
        // SAFETY: the result is writable; a wrong device is answered with an error.
        let can = filled(0, |out| unsafe {
            (self.table.cuDeviceCanAccessPeer)(out, device.0, other.0)
        })?;
        Ok(can != 0)
    }

    unsafe fn name_memory(&self, start: u64) -> Answer<[u8; IPC_NAME_BYTES]> {
        let empty = sys::CUipcMemHandle {
            reserved: [0; IPC_NAME_BYTES],
        };
        // SAFETY: the result is writable; an allocation's start, by the caller's promise.
        let name = filled(empty, |out| unsafe {
            (self.table.cuIpcGetMemHandle)(out, start)
        })?;
        Ok(name.reserved.map(|byte| byte as u8))
    }

    unsafe fn open_memory(&self, name: &[u8; IPC_NAME_BYTES]) -> Answer<u64> {
        let name = sys::CUipcMemHandle {
            reserved: name.map(|byte| byte as c_char),
        };
        // SAFETY: the result is writable; a name that the driver does not know is answered with an error; a context is current by the
        // caller's promise.
        filled(0, |out| unsafe {
            (self.table.cuIpcOpenMemHandle_v2)(out, name, LAZY_PEER_ACCESS)
        })
    }

    unsafe fn close_memory(&self, start: u64) -> Answer<()> {
        // SAFETY: opened and out of use, by the caller's promise.
        answer(unsafe { (self.table.cuIpcCloseMemHandle)(start) })
    }

    unsafe fn retain_piece(&self, address: u64) -> Answer<PieceHandle> {
        let place = std::ptr::without_provenance_mut(address as usize);
        // SAFETY: the result is writable; the address is only looked up.
        let call = |out| unsafe { (self.table.cuMemRetainAllocationHandle)(out, place) };
        filled(0, call).map(PieceHandle)
    }

    unsafe fn release_piece(&self, piece: PieceHandle) -> Answer<()> {
        // SAFETY: held, by the caller's promise.
        answer(unsafe { (self.table.cuMemRelease)(piece.0) })
    }

    unsafe fn export_piece(&self, piece: PieceHandle) -> Answer<OwnedFd> {
        // SAFETY: the result is writable for a descriptor; a handle that is held, by the caller's promise.
        let file: c_int = filled(-1, |out: *mut c_int| unsafe {
            (self.table.cuMemExportToShareableHandle)(out.cast(), piece.0, FILE_DESCRIPTOR, 0)
        })?;
        if file < 0 {
            return Err(Code::UNKNOWN);
        }
        // SAFETY: a descriptor that the call has just made, for whoever asked for it.
        Ok(unsafe { OwnedFd::from_raw_fd(file) })
    }

    unsafe fn import_piece(&self, file: BorrowedFd<'_>) -> Answer<PieceHandle> {
        let file = std::ptr::without_provenance_mut(file.as_raw_fd() as usize);
        // SAFETY: the result is writable; a descriptor goes in place of a pointer, and one that is none of the driver's is answered
        // with an error.
        let call = |out| unsafe {
            (self.table.cuMemImportFromShareableHandle)(out, file, FILE_DESCRIPTOR)
        };
        filled(0, call).map(PieceHandle)
    }

    unsafe fn reserve(&self, bytes: u64) -> Answer<u64> {
        // SAFETY: the result is writable; any length may be asked for.
        filled(0, |out| unsafe {
            (self.table.cuMemAddressReserve)(out, bytes as usize, 0, 0, 0)
        })
    }

    unsafe fn unreserve(&self, start: u64, bytes: u64) -> Answer<()> {
        // SAFETY: reserved, by the caller's promise.
        answer(unsafe { (self.table.cuMemAddressFree)(start, bytes as usize) })
    }

    unsafe fn map_piece(&self, start: u64, bytes: u64, piece: PieceHandle) -> Answer<()> {
        // SAFETY: reserved and free, by the caller's promise; a handle that is held.
        answer(unsafe { (self.table.cuMemMap)(start, bytes as usize, 0, piece.0, 0) })
    }

    unsafe fn unmap(&self, start: u64, bytes: u64) -> Answer<()> {
        // SAFETY: mapped and out of use, by the caller's promise.
        answer(unsafe { (self.table.cuMemUnmap)(start, bytes as usize) })
    }

    unsafe fn allow_access(&self, start: u64, bytes: u64, ordinal: i32) -> Answer<()> {
        let access = sys::CUmemAccessDesc {
            location: sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: ordinal,
            },
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: mapped, by the caller's promise; one description, which is copied.
        answer(unsafe { (self.table.cuMemSetAccess)(start, bytes as usize, &raw const access, 1) })
    }

    unsafe fn reach(&self, other: Handle) -> Answer<()> {
        // SAFETY: retained, by the caller's promise.
        answer(unsafe { (self.table.cuCtxEnablePeerAccess)(other.0.cast(), 0) })
    }

    unsafe fn copy_across(
        &self,
        to: (Handle, u64),
        from: (Handle, u64),
        bytes: usize,
        stream: Handle,
    ) -> Answer<()> {
        // SAFETY: valid until the stream has made the copy, and both contexts retained, by the caller's promise.
        answer(unsafe {
            (self.table.cuMemcpyPeerAsync)(
                to.1,
                to.0.0.cast(),
                from.1,
                from.0.0.cast(),
                bytes,
                stream.0.cast(),
            )
        })
    }
}
