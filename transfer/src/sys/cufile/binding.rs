//! What is used of `cufile.h`, as in that of cuFile 1.14 (CUDA 12.9), in the form in which bindgen writes it:
//! `tests/cufile_headers.rs` compares each size, offset, constant and call with the header, where there is one.
//!
//! `cuFileDriverClose` is not here on purpose: others in the process may still use cuFile, which ends by itself with the process.
#![allow(
    non_camel_case_types,
    non_snake_case,
    reason = "the library's own names"
)]
#![allow(clippy::identity_op, reason = "as bindgen writes them")]

use std::ffi::{c_int, c_uint, c_void};

use libc::off_t;

pub(super) const CU_FILE_DRIVER_NOT_INITIALIZED: i32 = 5001;
pub(super) const CU_FILE_DRIVER_INVALID_PROPS: i32 = 5002;
pub(super) const CU_FILE_DRIVER_UNSUPPORTED_LIMIT: i32 = 5003;
pub(super) const CU_FILE_DRIVER_VERSION_MISMATCH: i32 = 5004;
pub(super) const CU_FILE_DRIVER_VERSION_READ_ERROR: i32 = 5005;
pub(super) const CU_FILE_DRIVER_CLOSING: i32 = 5006;
pub(super) const CU_FILE_PLATFORM_NOT_SUPPORTED: i32 = 5007;
pub(super) const CU_FILE_IO_NOT_SUPPORTED: i32 = 5008;
pub(super) const CU_FILE_DEVICE_NOT_SUPPORTED: i32 = 5009;
pub(super) const CU_FILE_NVFS_DRIVER_ERROR: i32 = 5010;
pub(super) const CU_FILE_CUDA_DRIVER_ERROR: i32 = 5011;
pub(super) const CU_FILE_CUDA_POINTER_INVALID: i32 = 5012;
pub(super) const CU_FILE_CUDA_MEMORY_TYPE_INVALID: i32 = 5013;
pub(super) const CU_FILE_CUDA_POINTER_RANGE_ERROR: i32 = 5014;
pub(super) const CU_FILE_CUDA_CONTEXT_MISMATCH: i32 = 5015;
pub(super) const CU_FILE_INVALID_MAPPING_SIZE: i32 = 5016;
pub(super) const CU_FILE_INVALID_MAPPING_RANGE: i32 = 5017;
pub(super) const CU_FILE_INVALID_FILE_TYPE: i32 = 5018;
pub(super) const CU_FILE_INVALID_FILE_OPEN_FLAG: i32 = 5019;
pub(super) const CU_FILE_DIO_NOT_SET: i32 = 5020;
pub(super) const CU_FILE_INVALID_VALUE: i32 = 5022;
pub(super) const CU_FILE_MEMORY_ALREADY_REGISTERED: i32 = 5023;
pub(super) const CU_FILE_MEMORY_NOT_REGISTERED: i32 = 5024;
pub(super) const CU_FILE_PERMISSION_DENIED: i32 = 5025;
pub(super) const CU_FILE_DRIVER_ALREADY_OPEN: i32 = 5026;
pub(super) const CU_FILE_HANDLE_NOT_REGISTERED: i32 = 5027;
pub(super) const CU_FILE_HANDLE_ALREADY_REGISTERED: i32 = 5028;
pub(super) const CU_FILE_DEVICE_NOT_FOUND: i32 = 5029;
pub(super) const CU_FILE_INTERNAL_ERROR: i32 = 5030;
pub(super) const CU_FILE_GETNEWFD_FAILED: i32 = 5031;
pub(super) const CU_FILE_NVFS_SETUP_ERROR: i32 = 5033;
pub(super) const CU_FILE_IO_DISABLED: i32 = 5034;
pub(super) const CU_FILE_GPU_MEMORY_PINNING_FAILED: i32 = 5036;

/// Errors of the library have larger numbers; those of the system are smaller.
pub(super) const CUFILEOP_BASE_ERR: i32 = 5000;

/// A file descriptor of Linux.
pub(super) const CU_FILE_HANDLE_TYPE_OPAQUE_FD: u32 = 1;

/// Bits of `CUfileDrvProps_t.nvfs.dcontrolflags`.
pub(super) const CU_FILE_ALLOW_COMPAT_MODE: u32 = 1;

/// Bits of `CUfileDrvProps_t.nvfs.dstatusflags`.
pub(super) const CU_FILE_LUSTRE_SUPPORTED: u32 = 0;
pub(super) const CU_FILE_WEKAFS_SUPPORTED: u32 = 1;
pub(super) const CU_FILE_NFS_SUPPORTED: u32 = 2;
pub(super) const CU_FILE_GPFS_SUPPORTED: u32 = 3;
pub(super) const CU_FILE_NVME_SUPPORTED: u32 = 4;
pub(super) const CU_FILE_NVMEOF_SUPPORTED: u32 = 5;
pub(super) const CU_FILE_SCSI_SUPPORTED: u32 = 6;
pub(super) const CU_FILE_SCALEFLUX_CSD_SUPPORTED: u32 = 7;
pub(super) const CU_FILE_NVMESH_SUPPORTED: u32 = 8;
pub(super) const CU_FILE_BEEGFS_SUPPORTED: u32 = 9;
pub(super) const CU_FILE_NVME_P2P_SUPPORTED: u32 = 11;
pub(super) const CU_FILE_SCATEFS_SUPPORTED: u32 = 12;

/// Asked of `cuFileGetParameterBool`, since 1.14.
pub(super) const CUFILE_PARAM_FORCE_COMPAT_MODE: u32 = 2;

/// What most calls answer, by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct CUfileError_t {
    pub(super) err: c_int,
    pub(super) cu_err: c_uint,
}

const _: () = {
    ["Size of CUfileError_t"][std::mem::size_of::<CUfileError_t>() - 8usize];
    ["Offset of field: CUfileError_t::err"][std::mem::offset_of!(CUfileError_t, err) - 0usize];
    ["Offset of field: CUfileError_t::cu_err"]
        [std::mem::offset_of!(CUfileError_t, cu_err) - 4usize];
};

/// Of a descriptor.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union CUfileDescr_handle {
    pub(super) fd: c_int,
    pub(super) handle: *mut c_void,
}

/// A file to register.
#[repr(C)]
pub(super) struct CUfileDescr_t {
    pub(super) type_: c_uint,
    pub(super) handle: CUfileDescr_handle,
    pub(super) fs_ops: *const c_void,
}

const _: () = {
    ["Size of CUfileDescr_t"][std::mem::size_of::<CUfileDescr_t>() - 24usize];
    ["Offset of field: CUfileDescr_t::type_"][std::mem::offset_of!(CUfileDescr_t, type_) - 0usize];
    ["Offset of field: CUfileDescr_t::handle"]
        [std::mem::offset_of!(CUfileDescr_t, handle) - 8usize];
    ["Offset of field: CUfileDescr_t::fs_ops"]
        [std::mem::offset_of!(CUfileDescr_t, fs_ops) - 16usize];
};

/// Of `CUfileDrvProps_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct CUfileDrvProps_nvfs {
    pub(super) major_version: c_uint,
    pub(super) minor_version: c_uint,
    pub(super) poll_thresh_size: usize,
    pub(super) max_direct_io_size: usize,
    pub(super) dstatusflags: c_uint,
    pub(super) dcontrolflags: c_uint,
}

/// What the library says of itself when it is open.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct CUfileDrvProps_t {
    pub(super) nvfs: CUfileDrvProps_nvfs,
    pub(super) fflags: c_uint,
    pub(super) max_device_cache_size: c_uint,
    pub(super) per_buffer_cache_size: c_uint,
    pub(super) max_device_pinned_mem_size: c_uint,
    pub(super) max_batch_io_size: c_uint,
    pub(super) max_batch_io_timeout_msecs: c_uint,
}

const _: () = {
    ["Size of CUfileDrvProps_t"][std::mem::size_of::<CUfileDrvProps_t>() - 56usize];
    ["Offset of field: CUfileDrvProps_t::nvfs.major_version"]
        [std::mem::offset_of!(CUfileDrvProps_t, nvfs.major_version) - 0usize];
    ["Offset of field: CUfileDrvProps_t::nvfs.minor_version"]
        [std::mem::offset_of!(CUfileDrvProps_t, nvfs.minor_version) - 4usize];
    ["Offset of field: CUfileDrvProps_t::nvfs.poll_thresh_size"]
        [std::mem::offset_of!(CUfileDrvProps_t, nvfs.poll_thresh_size) - 8usize];
    ["Offset of field: CUfileDrvProps_t::nvfs.max_direct_io_size"]
        [std::mem::offset_of!(CUfileDrvProps_t, nvfs.max_direct_io_size) - 16usize];
    ["Offset of field: CUfileDrvProps_t::nvfs.dstatusflags"]
        [std::mem::offset_of!(CUfileDrvProps_t, nvfs.dstatusflags) - 24usize];
    ["Offset of field: CUfileDrvProps_t::nvfs.dcontrolflags"]
        [std::mem::offset_of!(CUfileDrvProps_t, nvfs.dcontrolflags) - 28usize];
    ["Offset of field: CUfileDrvProps_t::fflags"]
        [std::mem::offset_of!(CUfileDrvProps_t, fflags) - 32usize];
    ["Offset of field: CUfileDrvProps_t::max_device_cache_size"]
        [std::mem::offset_of!(CUfileDrvProps_t, max_device_cache_size) - 36usize];
    ["Offset of field: CUfileDrvProps_t::per_buffer_cache_size"]
        [std::mem::offset_of!(CUfileDrvProps_t, per_buffer_cache_size) - 40usize];
    ["Offset of field: CUfileDrvProps_t::max_device_pinned_mem_size"]
        [std::mem::offset_of!(CUfileDrvProps_t, max_device_pinned_mem_size) - 44usize];
    ["Offset of field: CUfileDrvProps_t::max_batch_io_size"]
        [std::mem::offset_of!(CUfileDrvProps_t, max_batch_io_size) - 48usize];
    ["Offset of field: CUfileDrvProps_t::max_batch_io_timeout_msecs"]
        [std::mem::offset_of!(CUfileDrvProps_t, max_batch_io_timeout_msecs) - 52usize];
};

/// Declares the calls that every version has had, and how they are found.
macro_rules! table {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        pub(super) struct Table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Table {
            /// # Safety
            /// The library is libcufile.
            pub(super) unsafe fn fill(
                library: &libloading::os::unix::Library,
            ) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: libcufile has the call by this name with this type, or not at all.
                        $name: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }?,
                    )*
                })
            }
        }
    };
}

table! {
    cuFileDriverOpen() -> CUfileError_t;
    cuFileDriverGetProperties(*mut CUfileDrvProps_t) -> CUfileError_t;
    cuFileHandleRegister(*mut *mut c_void, *mut CUfileDescr_t) -> CUfileError_t;
    cuFileHandleDeregister(*mut c_void);
    cuFileBufRegister(*const c_void, usize, c_int) -> CUfileError_t;
    cuFileBufDeregister(*const c_void) -> CUfileError_t;
    cuFileRead(*mut c_void, *mut c_void, usize, off_t, off_t) -> isize;
    cuFileWrite(*mut c_void, *const c_void, usize, off_t, off_t) -> isize;
}

/// Since 1.7, and since 1.14.
pub(super) type VersionCall = unsafe extern "C" fn(*mut c_int) -> CUfileError_t;
pub(super) type BoolCall = unsafe extern "C" fn(c_uint, *mut bool) -> CUfileError_t;
