//! The calls of cuFile that are made, as one table: the real library's, or a stand-in's in tests.

use std::ffi::c_void;
use std::io;
use std::os::fd::RawFd;

use kvcache_core::{Error, ErrorKind};

use super::binding::{self as ffi, CUFILEOP_BASE_ERR};

/// What a call answered that is not success: the library's number, and that of the CUDA driver, if it is the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code {
    pub(crate) error: i32,
    pub(crate) cuda: u32,
}

impl Code {
    pub(crate) const ALREADY_OPEN: i32 = ffi::CU_FILE_DRIVER_ALREADY_OPEN;
    pub(crate) const MEMORY_ALREADY_REGISTERED: Self =
        Self::new(ffi::CU_FILE_MEMORY_ALREADY_REGISTERED);

    pub(crate) const fn new(error: i32) -> Self {
        Self { error, cuda: 0 }
    }

    /// What it means, with its number.
    pub(crate) fn words(self) -> String {
        let Self { error, cuda } = self;
        match meaning(error) {
            Some((name, _, text)) if error == ffi::CU_FILE_CUDA_DRIVER_ERROR => {
                format!("{text} ({name}, {error}; the driver's error {cuda})")
            }
            Some((name, _, text)) => format!("{text} ({name}, {error})"),
            None => format!("error {error} of cuFile"),
        }
    }

    fn kind(self) -> ErrorKind {
        meaning(self.error).map_or(ErrorKind::Io, |(_, kind, _)| kind)
    }

    /// As an error.
    pub(crate) fn fault(self, doing: &str) -> Error {
        Error::new(self.kind(), format!("cuFile: {doing}: {}", self.words()))
    }
}

/// The library's name of an error, what a caller can do about it, and what it means.
fn meaning(error: i32) -> Option<(&'static str, ErrorKind, &'static str)> {
    use ErrorKind::{Busy, Denied, Invalid, Io, Unsupported};
    macro_rules! meanings {
        ($($name:ident $kind:ident $text:literal;)*) => {
            match error {
                $(ffi::$name => Some((stringify!($name), $kind, $text)),)*
                _ => None,
            }
        };
    }
    meanings! {
        CU_FILE_DRIVER_NOT_INITIALIZED Unsupported "nvidia-fs is not loaded, and compatibility mode is off";
        CU_FILE_DRIVER_INVALID_PROPS Invalid "a setting of cufile.json that is none";
        CU_FILE_DRIVER_UNSUPPORTED_LIMIT Invalid "a setting of cufile.json that is out of range";
        CU_FILE_DRIVER_VERSION_MISMATCH Unsupported "the library and nvidia-fs are of versions that do not fit";
        CU_FILE_DRIVER_VERSION_READ_ERROR Unsupported "nvidia-fs does not tell its version";
        CU_FILE_DRIVER_CLOSING Unsupported "somebody in this process is closing cuFile";
        CU_FILE_PLATFORM_NOT_SUPPORTED Unsupported "not on this platform";
        CU_FILE_IO_NOT_SUPPORTED Unsupported "not for this file: its file system, or a drive that the GPU does not reach";
        CU_FILE_DEVICE_NOT_SUPPORTED Unsupported "not with this GPU";
        CU_FILE_NVFS_DRIVER_ERROR Io "nvidia-fs refuses it";
        CU_FILE_CUDA_DRIVER_ERROR Io "the CUDA driver refuses it";
        CU_FILE_CUDA_POINTER_INVALID Invalid "no address of a GPU";
        CU_FILE_CUDA_MEMORY_TYPE_INVALID Invalid "memory of a kind that it does not take";
        CU_FILE_CUDA_POINTER_RANGE_ERROR Invalid "a range that goes past its allocation";
        CU_FILE_CUDA_CONTEXT_MISMATCH Invalid "memory of another context";
        CU_FILE_INVALID_MAPPING_SIZE Busy "more than may be pinned (max_device_pinned_mem_size_kb, and the GPU's BAR1)";
        CU_FILE_INVALID_MAPPING_RANGE Invalid "a range outside of what is pinned";
        CU_FILE_INVALID_FILE_TYPE Unsupported "no regular file";
        CU_FILE_INVALID_FILE_OPEN_FLAG Unsupported "a file that is opened otherwise than it wants";
        CU_FILE_DIO_NOT_SET Unsupported "a file that is opened without O_DIRECT";
        CU_FILE_INVALID_VALUE Invalid "an argument that is none";
        CU_FILE_MEMORY_ALREADY_REGISTERED Busy "memory that is registered already";
        CU_FILE_MEMORY_NOT_REGISTERED Invalid "memory that is not registered";
        CU_FILE_PERMISSION_DENIED Denied "the process may not open it, or /dev/nvidia-fs*";
        CU_FILE_DRIVER_ALREADY_OPEN Busy "open already";
        CU_FILE_HANDLE_NOT_REGISTERED Invalid "a file that is not registered";
        CU_FILE_HANDLE_ALREADY_REGISTERED Busy "a file that is registered already";
        CU_FILE_DEVICE_NOT_FOUND Unsupported "no such GPU";
        CU_FILE_INTERNAL_ERROR Io "an error inside of it";
        CU_FILE_GETNEWFD_FAILED Io "no more file descriptors";
        CU_FILE_NVFS_SETUP_ERROR Unsupported "it does not start: the CUDA driver or nvidia-fs is missing, or refuses it";
        CU_FILE_IO_DISABLED Unsupported "switched off for this file in cufile.json";
        CU_FILE_GPU_MEMORY_PINNING_FAILED Busy "memory of the GPU that cannot be pinned";
    }
}

/// Why bytes were not moved.
#[derive(Debug)]
pub(crate) enum Failure {
    /// As the file system says.
    System(io::Error),
    /// As the library says.
    Cufile(Code),
}

impl Failure {
    pub(crate) fn fault(self, doing: String) -> Error {
        match self {
            Self::System(error) => Error::io(doing, error),
            Self::Cufile(code) => code.fault(&doing),
        }
    }
}

/// What a call that moves bytes has answered: how many, −1 with `errno`, or a negated number, mostly of the library's own, sometimes of
/// the system's.
pub(super) fn moved(answer: isize) -> Result<u64, Failure> {
    match answer {
        0.. => Ok(answer as u64),
        -1 => Err(Failure::System(io::Error::last_os_error())),
        _ => {
            let number = i32::try_from(answer.unsigned_abs()).unwrap_or(i32::MAX);
            Err(match number {
                ..=CUFILEOP_BASE_ERR => Failure::System(io::Error::from_raw_os_error(number)),
                _ => Failure::Cufile(Code::new(number)),
            })
        }
    }
}

/// Names a registered file. Means nothing outside of the library, and owns nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle(pub(super) *mut c_void);

// SAFETY: a handle is a name that the library gave; its calls may be made from any thread, and who may use what it names, and for how
// long, is the promise of the type that holds it.
unsafe impl Send for Handle {}
// SAFETY: as above; nothing is ever reached through it here.
unsafe impl Sync for Handle {}

/// What the library says of itself when it is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Properties {
    /// Of the module nvidia-fs: major and minor; zeros without it.
    pub(crate) module: (u32, u32),
    /// The most bytes that go to the module at once.
    pub(crate) call_bytes_max: u64,
    /// Which drives and file systems are reached, as bits.
    pub(crate) reached: u32,
    /// Bytes may go through host memory where there is no other way.
    pub(crate) may_bounce: bool,
}

/// The library.
pub(crate) trait CufileCalls: Send + Sync {
    /// Such as 1140 for 1.14; none if it does not tell.
    fn version(&self) -> Option<i32>;
    /// `cuFileDriverOpen`. Starts CUDA, and prints to standard output and to `cufile.log` in the working folder what goes wrong.
    fn open(&self) -> Result<(), Code>;
    /// `cuFileDriverGetProperties`.
    fn properties(&self) -> Result<Properties, Code>;
    /// `force_compat_mode`; none where the library does not tell.
    fn always_bounces(&self) -> Option<bool>;

    /// `cuFileHandleRegister`.
    ///
    /// # Safety
    /// The descriptor stays open until the handle is deregistered.
    unsafe fn register_file(&self, fd: RawFd) -> Result<Handle, Code>;
    /// `cuFileHandleDeregister`.
    ///
    /// # Safety
    /// Registered, not deregistered, and in no call.
    unsafe fn deregister_file(&self, file: Handle);
    /// `cuFileBufRegister`.
    ///
    /// # Safety
    /// The memory's context is current; it stays allocated until it is deregistered.
    unsafe fn register_memory(&self, address: u64, bytes: usize) -> Result<(), Code>;
    /// `cuFileBufDeregister`.
    ///
    /// # Safety
    /// Registered from this address on, not deregistered, and in no call.
    unsafe fn deregister_memory(&self, address: u64) -> Result<(), Code>;
    /// `cuFileRead`: what has come to `base + offset`, when it returns.
    ///
    /// # Safety
    /// A registered file; `bytes` are allocated from `base + offset` on, and nobody relies on what they are, during the call; the
    /// memory's context is current.
    unsafe fn read(
        &self,
        file: Handle,
        base: u64,
        offset: u64,
        bytes: usize,
        at: u64,
    ) -> Result<u64, Failure>;
    /// `cuFileWrite`, of `base + offset`.
    ///
    /// # Safety
    /// As [`CufileCalls::read`]; the memory is only read.
    unsafe fn write(
        &self,
        file: Handle,
        base: u64,
        offset: u64,
        bytes: usize,
        at: u64,
    ) -> Result<u64, Failure>;
}
