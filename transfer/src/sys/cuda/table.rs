//! The driver itself: libcuda, found in the system when it is asked for.
//!
//! Names and types of the calls are compared with those of `cudarc`'s generated binding by the compiler. Its functions are not
//! called: they panic where a library or a call is missing, prefer a toolkit's stub to the driver, and return an enumeration, so
//! that the number of an error which a newer driver has would be undefined behaviour.

use std::ffi::{CStr, c_char, c_uint, c_void};

use cudarc::driver::sys;
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};

use super::calls::{
    Answer, Attribute, Calls, Code, CopyList, Device, Handle, PointerFacts, Threads,
};
use super::filled::{answer, filled, filled_text};

mod attributes;
mod direct;
mod entries;
mod sharing;

use direct::DirectTable;
use entries::{BatchCall, Table};

/// The driver's library, by the name under which only the driver installs it.
const FILE: &str = "libcuda.so.1";

/// The first version with [`Calls::copy_batch`].
const BATCH_SINCE: i32 = 12_080;

/// For all contexts, and so that kernels reach it.
const PORTABLE_AND_MAPPED: c_uint = 1 | 2;
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_DISABLE_TIMING: c_uint = 2;

/// The loaded driver. Never unloaded: it has threads of its own.
pub(super) struct Libcuda {
    table: Table,
    batch: Option<BatchCall>,
    direct: DirectTable,
}

impl Libcuda {
    /// # Errors
    /// The reason, when there is none, or one that lacks a call.
    pub(super) fn load() -> Result<Self, String> {
        // SAFETY: the initialisers of libcuda have no preconditions. Its names stay out of the process's own.
        let library = unsafe { Shared::open(Some(FILE), RTLD_NOW | RTLD_LOCAL) };
        let library = library.map_err(|e| format!("no CUDA driver in this system: {e}"))?;
        // SAFETY: libcuda by its name.
        let table = unsafe { Table::fill(&library) };
        let table = table.map_err(|e| format!("{FILE} is too old: a call is missing: {e}"))?;
        // SAFETY: as above.
        let direct = unsafe { DirectTable::fill(&library) };
        // Its handle is given up, so that it stays loaded.
        let _ = library.into_raw();
        let mut loaded = Self {
            table,
            batch: None,
            direct,
        };
        // A library that has the call for others' sake need not serve it.
        if loaded
            .driver_version()
            .is_ok_and(|version| version >= BATCH_SINCE)
        {
            loaded.batch = loaded.table.cuMemcpyBatchAsync;
        }
        Ok(loaded)
    }
}

impl Calls for Libcuda {
    fn init(&self) -> Answer<()> {
        // SAFETY: no preconditions; may be called again.
        answer(unsafe { (self.table.cuInit)(0) })
    }

    fn driver_version(&self) -> Answer<i32> {
        // SAFETY: the result is writable.
        filled(0, |out| unsafe { (self.table.cuDriverGetVersion)(out) })
    }

    fn device_count(&self) -> Answer<i32> {
        // SAFETY: the result is writable.
        filled(0, |out| unsafe { (self.table.cuDeviceGetCount)(out) })
    }

    fn device(&self, ordinal: i32) -> Answer<Device> {
        // SAFETY: the result is writable; a wrong ordinal is answered with an error.
        filled(0, |out| unsafe { (self.table.cuDeviceGet)(out, ordinal) }).map(Device)
    }

    fn device_name(&self, device: Device) -> Answer<String> {
        // SAFETY: so many bytes are writable; a wrong device is answered with an error.
        filled_text(|out, bytes| unsafe { (self.table.cuDeviceGetName)(out, bytes, device.0) })
    }

    fn device_uuid(&self, device: Device) -> Answer<[u8; 16]> {
        let empty = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the result is writable; a wrong device is answered with an error.
        let uuid = filled(empty, |out| unsafe {
            (self.table.cuDeviceGetUuid_v2)(out, device.0)
        })?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    fn device_pci(&self, device: Device) -> Answer<String> {
        // SAFETY: so many bytes are writable; a wrong device is answered with an error.
        let text = filled_text(|out, bytes| unsafe {
            (self.table.cuDeviceGetPCIBusId)(out, bytes, device.0)
        });
        // The driver writes capitals; `/sys` and everybody who compares has small letters.
        text.map(|address| address.to_ascii_lowercase())
    }

    fn device_bytes(&self, device: Device) -> Answer<u64> {
        // SAFETY: the result is writable; a wrong device is answered with an error.
        let bytes = filled(0, |out| unsafe {
            (self.table.cuDeviceTotalMem_v2)(out, device.0)
        })?;
        Ok(bytes as u64)
    }

    fn attribute(&self, device: Device, attribute: Attribute) -> Answer<i32> {
        let known = attributes::known(attribute);
        // SAFETY: the result is writable; a wrong device is answered with an error.
        filled(0, |out| unsafe {
            (self.table.cuDeviceGetAttribute)(out, known, device.0)
        })
    }

    fn text(&self, code: Code) -> Option<(String, String)> {
        let text = |call: unsafe extern "C" fn(u32, *mut *const c_char) -> u32| {
            // SAFETY: any number may be asked for; the result is writable.
            let found = filled(std::ptr::null(), |out| unsafe { call(code.0, out) });
            let found = found.ok().filter(|text| !text.is_null())?;
            // SAFETY: a terminated text of the library's, which stays loaded.
            Some(
                unsafe { CStr::from_ptr(found) }
                    .to_string_lossy()
                    .into_owned(),
            )
        };
        Some((
            text(self.table.cuGetErrorName)?,
            text(self.table.cuGetErrorString)?,
        ))
    }

    fn pointer_facts(&self, address: u64) -> Answer<PointerFacts> {
        use sys::CUpointer_attribute as Known;
        let mut wanted = [
            Known::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            Known::CU_POINTER_ATTRIBUTE_IS_MANAGED,
            Known::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            Known::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
            Known::CU_POINTER_ATTRIBUTE_RANGE_SIZE,
            Known::CU_POINTER_ATTRIBUTE_BUFFER_ID,
            Known::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
        ];
        // Each answer has a word of its own, the widest there is; narrower ones fill its low bytes.
        let mut words = [0_u64; 7];
        let mut places = words
            .each_mut()
            .map(|word| (word as *mut u64).cast::<c_void>());
        // SAFETY: as many attributes as places, each of which is writable for eight bytes, no answer being longer; any
        // address may be asked about.
        answer(unsafe {
            (self.table.cuPointerGetAttributes)(
                wanted.len() as c_uint,
                wanted.as_mut_ptr(),
                places.as_mut_ptr(),
                address,
            )
        })?;
        let [
            memory_type,
            is_managed,
            ordinal,
            start,
            bytes,
            buffer,
            is_legacy,
        ] = words;
        Ok(PointerFacts {
            memory_type: memory_type as u32,
            is_managed: is_managed != 0,
            ordinal: ordinal as i32,
            start,
            bytes,
            buffer,
            is_legacy: is_legacy != 0,
        })
    }

    fn has_batch(&self) -> bool {
        self.batch.is_some()
    }

    unsafe fn retain_primary(&self, device: Device) -> Answer<Handle> {
        // SAFETY: the result is writable; the caller releases it.
        let call = |out| unsafe { (self.table.cuDevicePrimaryCtxRetain)(out, device.0) };
        filled(std::ptr::null_mut(), call).map(|raw| Handle(raw.cast()))
    }

    unsafe fn release_primary(&self, device: Device) -> Answer<()> {
        // SAFETY: retained, by the caller's promise.
        answer(unsafe { (self.table.cuDevicePrimaryCtxRelease_v2)(device.0) })
    }

    unsafe fn push(&self, context: Handle) -> Answer<()> {
        // SAFETY: a retained context, by the caller's promise.
        answer(unsafe { (self.table.cuCtxPushCurrent_v2)(context.0.cast()) })
    }

    unsafe fn pop(&self) -> Answer<()> {
        // SAFETY: the result is writable; the caller pushed what is popped.
        let call = |out| unsafe { (self.table.cuCtxPopCurrent_v2)(out) };
        filled(std::ptr::null_mut(), call).map(drop)
    }

    fn capture_mode(&self, mode: u32) -> Answer<u32> {
        let mut mode = mode;
        // SAFETY: a number that is read and written; one that is no mode is answered with an error.
        answer(unsafe { (self.table.cuThreadExchangeStreamCaptureMode)(&raw mut mode) })?;
        Ok(mode)
    }

    unsafe fn allocate(&self, bytes: usize) -> Answer<u64> {
        // SAFETY: the result is writable; a context is current by the caller's promise.
        filled(0, |out| unsafe { (self.table.cuMemAlloc_v2)(out, bytes) })
    }

    unsafe fn free(&self, address: u64) -> Answer<()> {
        // SAFETY: allocated and out of use, by the caller's promise.
        answer(unsafe { (self.table.cuMemFree_v2)(address) })
    }

    unsafe fn register_host(&self, base: *mut u8, bytes: usize) -> Answer<()> {
        // SAFETY: mapped for as long as it is registered, by the caller's promise.
        answer(unsafe {
            (self.table.cuMemHostRegister_v2)(base.cast(), bytes, PORTABLE_AND_MAPPED)
        })
    }

    unsafe fn unregister_host(&self, base: *mut u8) -> Answer<()> {
        // SAFETY: registered and out of use, by the caller's promise.
        answer(unsafe { (self.table.cuMemHostUnregister)(base.cast()) })
    }

    unsafe fn device_pointer(&self, base: *mut u8) -> Answer<u64> {
        // SAFETY: the result is writable; memory that is not registered is answered with an error.
        filled(0, |out| unsafe {
            (self.table.cuMemHostGetDevicePointer_v2)(out, base.cast(), 0)
        })
    }

    unsafe fn load_module(&self, image: &CStr) -> Answer<Handle> {
        // SAFETY: the result is writable; the image is text with an end; a context is current by the caller's promise.
        let call = |out| unsafe { (self.table.cuModuleLoadData)(out, image.as_ptr().cast()) };
        filled(std::ptr::null_mut(), call).map(|raw| Handle(raw.cast()))
    }

    unsafe fn function(&self, module: Handle, name: &CStr) -> Answer<Handle> {
        // SAFETY: the result is writable; the name has an end; the module is loaded by the caller's promise.
        let call =
            |out| unsafe { (self.table.cuModuleGetFunction)(out, module.0.cast(), name.as_ptr()) };
        filled(std::ptr::null_mut(), call).map(|raw| Handle(raw.cast()))
    }

    unsafe fn unload_module(&self, module: Handle) -> Answer<()> {
        // SAFETY: loaded and out of use, by the caller's promise.
        answer(unsafe { (self.table.cuModuleUnload)(module.0.cast()) })
    }

    unsafe fn launch(
        &self,
        kernel: Handle,
        threads: Threads,
        arguments: &mut [*mut c_void],
        stream: Handle,
    ) -> Answer<()> {
        let Threads { blocks, each } = threads;
        // SAFETY: the kernel, its arguments and the stream are good by the caller's promise; no more options are given.
        answer(unsafe {
            (self.table.cuLaunchKernel)(
                kernel.0.cast(),
                blocks,
                1,
                1,
                each,
                1,
                1,
                0,
                stream.0.cast(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }

    unsafe fn create_stream(&self) -> Answer<Handle> {
        // SAFETY: the result is writable; a context is current by the caller's promise.
        let call = |out| unsafe { (self.table.cuStreamCreate)(out, STREAM_NON_BLOCKING) };
        filled(std::ptr::null_mut(), call).map(|raw| Handle(raw.cast()))
    }

    unsafe fn destroy_stream(&self, stream: Handle) -> Answer<()> {
        // SAFETY: a live stream, by the caller's promise.
        answer(unsafe { (self.table.cuStreamDestroy_v2)(stream.0.cast()) })
    }

    unsafe fn stream_wait(&self, stream: Handle, event: Handle) -> Answer<()> {
        // SAFETY: both live, by the caller's promise; no flag but the default.
        answer(unsafe { (self.table.cuStreamWaitEvent)(stream.0.cast(), event.0.cast(), 0) })
    }

    unsafe fn stream_context(&self, stream: Handle) -> Answer<Handle> {
        // SAFETY: the result is writable; a live stream, by the caller's promise.
        let call = |out| unsafe { (self.table.cuStreamGetCtx)(stream.0.cast(), out) };
        filled(std::ptr::null_mut(), call).map(|raw| Handle(raw.cast()))
    }

    unsafe fn is_captured(&self, stream: Handle) -> Answer<u32> {
        // SAFETY: the result is writable, as wide as the enumeration; a live stream, by the caller's promise.
        filled(0, |out| unsafe {
            (self.table.cuStreamIsCapturing)(stream.0.cast(), out)
        })
    }

    fn current_device(&self) -> Answer<Device> {
        // SAFETY: the result is writable; without a context the answer is an error.
        filled(0, |out| unsafe { (self.table.cuCtxGetDevice)(out) }).map(Device)
    }

    unsafe fn create_event(&self) -> Answer<Handle> {
        // SAFETY: the result is writable; a context is current by the caller's promise.
        let call = |out| unsafe { (self.table.cuEventCreate)(out, EVENT_DISABLE_TIMING) };
        filled(std::ptr::null_mut(), call).map(|raw| Handle(raw.cast()))
    }

    unsafe fn destroy_event(&self, event: Handle) -> Answer<()> {
        // SAFETY: a live event, by the caller's promise.
        answer(unsafe { (self.table.cuEventDestroy_v2)(event.0.cast()) })
    }

    unsafe fn record(&self, event: Handle, stream: Handle) -> Answer<()> {
        // SAFETY: both live, by the caller's promise.
        answer(unsafe { (self.table.cuEventRecord)(event.0.cast(), stream.0.cast()) })
    }

    unsafe fn is_over(&self, event: Handle) -> Answer<bool> {
        // SAFETY: a live event, by the caller's promise.
        match Code(unsafe { (self.table.cuEventQuery)(event.0.cast()) }) {
            Code(0) => Ok(true),
            Code::NOT_READY => Ok(false),
            code => Err(code),
        }
    }

    unsafe fn copy(&self, target: u64, source: u64, bytes: usize, stream: Handle) -> Answer<()> {
        // SAFETY: ranges and stream are good until the copy is made, by the caller's promise.
        answer(unsafe { (self.table.cuMemcpyAsync)(target, source, bytes, stream.0.cast()) })
    }

    unsafe fn copy_batch(&self, copies: &mut CopyList, stream: Handle) -> Answer<()> {
        let Some(call) = self.batch else {
            return Err(Code::NOT_SUPPORTED);
        };
        // Where memory is, the driver knows by itself of all memory that is copied here.
        let anywhere = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: anywhere,
            dstLocHint: anywhere,
            flags: 0,
        };
        // The attributes apply from the first copy on.
        let (mut first, mut failed) = (0_usize, 0_usize);
        // SAFETY: three lists of as many entries, one attribute with the position where it begins, all of which outlive the
        // call, and which it only reads but for `failed`; ranges and stream are good by the caller's promise.
        answer(unsafe {
            call(
                copies.targets.as_mut_ptr(),
                copies.sources.as_mut_ptr(),
                copies.bytes.as_mut_ptr(),
                copies.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream.0.cast(),
            )
        })
    }
}
