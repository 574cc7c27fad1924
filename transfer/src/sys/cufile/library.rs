//! libcufile itself.

use std::os::fd::RawFd;

use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};

use super::binding::{
    self as ffi, BoolCall, CUfileDescr_handle, CUfileDescr_t, CUfileDrvProps_t, CUfileError_t,
    Table, VersionCall,
};
use super::calls::{Code, CufileCalls, Failure, Handle, Properties, moved};

/// The name under which all versions so far are found.
const FILE: &str = "libcufile.so.0";

/// Words behind the properties that we know, for a library that knows more of them.
const ROOM: usize = 512;

/// The loaded library. Never unloaded: it has threads of its own.
pub(super) struct Libcufile {
    table: Table,
    version: Option<VersionCall>,
    flag: Option<BoolCall>,
}

impl Libcufile {
    /// # Errors
    /// The reason, when there is none, or one that lacks a call.
    pub(super) fn load() -> Result<Self, String> {
        // SAFETY: the initialisers of libcufile have no preconditions. Its names stay out of the process's own.
        let library = unsafe { Shared::open(Some(FILE), RTLD_NOW | RTLD_LOCAL) };
        let library = library.map_err(|e| format!("no cuFile in this system: {e}"))?;
        // SAFETY: libcufile by its name.
        let table = unsafe { Table::fill(&library) };
        let table = table.map_err(|e| format!("{FILE} is too old: a call is missing: {e}"))?;
        let loaded = Self {
            table,
            // SAFETY: libcufile has the call by this name with this type, or not at all.
            version: unsafe { library.get(b"cuFileGetVersion\0") }
                .ok()
                .map(|found| *found),
            // SAFETY: as above; the parameter's enumeration is a plain number here.
            flag: unsafe { library.get(b"cuFileGetParameterBool\0") }
                .ok()
                .map(|found| *found),
        };
        // Its handle is given up, so that it stays loaded.
        let _ = library.into_raw();
        Ok(loaded)
    }
}

fn answer(answer: CUfileError_t) -> Result<(), Code> {
    match answer.err {
        0 => Ok(()),
        error => Err(Code {
            error,
            cuda: answer.cu_err,
        }),
    }
}

/// Properties with room behind them.
#[derive(Clone, Copy)]
#[repr(C)]
struct Roomy {
    known: CUfileDrvProps_t,
    more: [u64; ROOM],
}

impl CufileCalls for Libcufile {
    fn version(&self) -> Option<i32> {
        let call = self.version?;
        let mut version = 0;
        // SAFETY: the result is writable.
        answer(unsafe { call(&raw mut version) }).ok()?;
        Some(version)
    }

    fn open(&self) -> Result<(), Code> {
        // SAFETY: no preconditions; may be called again.
        answer(unsafe { (self.table.cuFileDriverOpen)() })
    }

    fn properties(&self) -> Result<Properties, Code> {
        let mut found = Roomy {
            known: CUfileDrvProps_t::default(),
            more: [0; ROOM],
        };
        // SAFETY: writable for what is known of the structure, and for much more behind that.
        answer(unsafe { (self.table.cuFileDriverGetProperties)((&raw mut found).cast()) })?;
        let nvfs = found.known.nvfs;
        Ok(Properties {
            module: (nvfs.major_version, nvfs.minor_version),
            call_bytes_max: (nvfs.max_direct_io_size as u64).saturating_mul(1024),
            reached: nvfs.dstatusflags,
            may_bounce: nvfs.dcontrolflags >> ffi::CU_FILE_ALLOW_COMPAT_MODE & 1 != 0,
        })
    }

    fn always_bounces(&self) -> Option<bool> {
        let call = self.flag?;
        let mut is_forced = false;
        // SAFETY: the result is writable, for a `bool` of C, which the library sets to one.
        let asked = unsafe { call(ffi::CUFILE_PARAM_FORCE_COMPAT_MODE, &raw mut is_forced) };
        answer(asked).ok()?;
        Some(is_forced)
    }

    unsafe fn register_file(&self, fd: RawFd) -> Result<Handle, Code> {
        let mut descriptor = CUfileDescr_t {
            type_: ffi::CU_FILE_HANDLE_TYPE_OPAQUE_FD,
            handle: CUfileDescr_handle {
                handle: std::ptr::null_mut(),
            },
            fs_ops: std::ptr::null(),
        };
        descriptor.handle.fd = fd;
        let mut file = std::ptr::null_mut();
        // SAFETY: both are writable, the descriptor is open by the caller's promise, and no operations of a file system are named.
        answer(unsafe { (self.table.cuFileHandleRegister)(&raw mut file, &raw mut descriptor) })?;
        Ok(Handle(file))
    }

    unsafe fn deregister_file(&self, file: Handle) {
        // SAFETY: registered, and in no call, by the caller's promise.
        unsafe { (self.table.cuFileHandleDeregister)(file.0) }
    }

    unsafe fn register_memory(&self, address: u64, bytes: usize) -> Result<(), Code> {
        let base = std::ptr::without_provenance(address as usize);
        // SAFETY: memory of a device that stays allocated, by the caller's promise; no flag.
        answer(unsafe { (self.table.cuFileBufRegister)(base, bytes, 0) })
    }

    unsafe fn deregister_memory(&self, address: u64) -> Result<(), Code> {
        let base = std::ptr::without_provenance(address as usize);
        // SAFETY: registered, and in no call, by the caller's promise.
        answer(unsafe { (self.table.cuFileBufDeregister)(base) })
    }

    unsafe fn read(
        &self,
        file: Handle,
        base: u64,
        offset: u64,
        bytes: usize,
        at: u64,
    ) -> Result<u64, Failure> {
        let base = std::ptr::without_provenance_mut(base as usize);
        // SAFETY: file and memory are good by the caller's promise; an offset that is none is answered with an error.
        let answer =
            unsafe { (self.table.cuFileRead)(file.0, base, bytes, at as i64, offset as i64) };
        moved(answer)
    }

    unsafe fn write(
        &self,
        file: Handle,
        base: u64,
        offset: u64,
        bytes: usize,
        at: u64,
    ) -> Result<u64, Failure> {
        let base = std::ptr::without_provenance(base as usize);
        // SAFETY: as for reading.
        let answer =
            unsafe { (self.table.cuFileWrite)(file.0, base, bytes, at as i64, offset as i64) };
        moved(answer)
    }
}
