//! Which calls of the driver are used, and with which types.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use cudarc::driver::sys;
use libloading::os::unix::Library as Shared;

/// As of CUDA 12.8.
pub(super) type BatchCall = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> u32;

/// Declares the table and how it is filled; each entry must be what `cudarc` says, but for the type of its result.
macro_rules! table {
    ($($name:ident($($argument:ty),*);)*) => {
        #[allow(non_snake_case, reason = "the driver's own names")]
        pub(super) struct Table {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> u32,)*
            pub(super) cuGetErrorName: unsafe extern "C" fn(u32, *mut *const c_char) -> u32,
            pub(super) cuGetErrorString: unsafe extern "C" fn(u32, *mut *const c_char) -> u32,
            pub(super) cuThreadExchangeStreamCaptureMode: unsafe extern "C" fn(*mut u32) -> u32,
            pub(super) cuStreamIsCapturing: unsafe extern "C" fn(sys::CUstream, *mut u32) -> u32,
            pub(super) cuMemcpyBatchAsync: Option<BatchCall>,
        }

        // The compiler compares each with the generated binding.
        const _: () = {
            $(let _: unsafe fn($($argument),*) -> sys::CUresult = sys::$name;)*
        };

        impl Table {
            /// # Safety
            /// The library is libcuda.
            pub(super) unsafe fn fill(library: &Shared) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: libcuda has the call by this name with this type, or not at all.
                        $name: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }?,
                    )*
                    // SAFETY: as above; these take or fill an enumeration of 32 bits, which is a plain number here.
                    cuGetErrorName: *unsafe { library.get(b"cuGetErrorName\0") }?,
                    // SAFETY: as above.
                    cuGetErrorString: *unsafe { library.get(b"cuGetErrorString\0") }?,
                    // SAFETY: as above.
                    cuThreadExchangeStreamCaptureMode: *unsafe {
                        library.get(b"cuThreadExchangeStreamCaptureMode\0")
                    }?,
                    // SAFETY: as above.
                    cuStreamIsCapturing: *unsafe { library.get(b"cuStreamIsCapturing\0") }?,
                    // SAFETY: as above; the name without a version keeps the type of CUDA 12.8 in later drivers.
                    cuMemcpyBatchAsync: unsafe { library.get(b"cuMemcpyBatchAsync\0") }
                        .ok()
                        .map(|found| *found),
                })
            }
        }
    };
}

table! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut sys::CUdevice, c_int);
    cuDeviceGetName(*mut c_char, c_int, sys::CUdevice);
    cuDeviceGetUuid_v2(*mut sys::CUuuid, sys::CUdevice);
    cuDeviceGetPCIBusId(*mut c_char, c_int, sys::CUdevice);
    cuDeviceTotalMem_v2(*mut usize, sys::CUdevice);
    cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice);
    cuPointerGetAttributes(c_uint, *mut sys::CUpointer_attribute, *mut *mut c_void, sys::CUdeviceptr);
    cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice);
    cuDevicePrimaryCtxRelease_v2(sys::CUdevice);
    cuCtxPushCurrent_v2(sys::CUcontext);
    cuCtxPopCurrent_v2(*mut sys::CUcontext);
    cuMemAlloc_v2(*mut sys::CUdeviceptr, usize);
    cuMemFree_v2(sys::CUdeviceptr);
    cuIpcGetMemHandle(*mut sys::CUipcMemHandle, sys::CUdeviceptr);
    cuIpcOpenMemHandle_v2(*mut sys::CUdeviceptr, sys::CUipcMemHandle, c_uint);
    cuIpcCloseMemHandle(sys::CUdeviceptr);
    cuMemRetainAllocationHandle(*mut sys::CUmemGenericAllocationHandle, *mut c_void);
    cuMemRelease(sys::CUmemGenericAllocationHandle);
    cuMemExportToShareableHandle(
        *mut c_void,
        sys::CUmemGenericAllocationHandle,
        sys::CUmemAllocationHandleType,
        c_ulonglong
    );
    cuMemImportFromShareableHandle(
        *mut sys::CUmemGenericAllocationHandle,
        *mut c_void,
        sys::CUmemAllocationHandleType
    );
    cuMemAddressReserve(*mut sys::CUdeviceptr, usize, usize, sys::CUdeviceptr, c_ulonglong);
    cuMemAddressFree(sys::CUdeviceptr, usize);
    cuMemMap(sys::CUdeviceptr, usize, usize, sys::CUmemGenericAllocationHandle, c_ulonglong);
    cuMemUnmap(sys::CUdeviceptr, usize);
    cuMemSetAccess(sys::CUdeviceptr, usize, *const sys::CUmemAccessDesc, usize);
    cuDeviceCanAccessPeer(*mut c_int, sys::CUdevice, sys::CUdevice);
    cuCtxEnablePeerAccess(sys::CUcontext, c_uint);
    cuMemcpyPeerAsync(
        sys::CUdeviceptr, sys::CUcontext,
        sys::CUdeviceptr, sys::CUcontext,
        usize,
        sys::CUstream
    );
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemHostGetDevicePointer_v2(*mut sys::CUdeviceptr, *mut c_void, c_uint);
    cuModuleLoadData(*mut sys::CUmodule, *const c_void);
    cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char);
    cuModuleUnload(sys::CUmodule);
    cuLaunchKernel(
        sys::CUfunction,
        c_uint, c_uint, c_uint,
        c_uint, c_uint, c_uint,
        c_uint,
        sys::CUstream,
        *mut *mut c_void,
        *mut *mut c_void
    );
    cuStreamCreate(*mut sys::CUstream, c_uint);
    cuStreamDestroy_v2(sys::CUstream);
    cuStreamWaitEvent(sys::CUstream, sys::CUevent, c_uint);
    cuStreamGetCtx(sys::CUstream, *mut sys::CUcontext);
    cuCtxGetDevice(*mut sys::CUdevice);
    cuEventCreate(*mut sys::CUevent, c_uint);
    cuEventDestroy_v2(sys::CUevent);
    cuEventRecord(sys::CUevent, sys::CUstream);
    cuEventQuery(sys::CUevent);
    cuMemcpyAsync(sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream);
}
