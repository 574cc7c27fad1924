//! libibverbs itself.

use std::ffi::c_int;
use std::sync::OnceLock;

use kvcache_core::{Error, ErrorKind, Result};
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};

use super::generated::ibverbs::{self as ffi, Ibverbs};

/// The name under which every libibverbs is found.
const FILE: &str = "libibverbs.so.1";

/// `ibv_reg_dmabuf_mr`: where the range begins in the descriptor, its bytes, by which address it is known, the descriptor, access.
pub(super) type RegisterDmaBuf =
    unsafe extern "C" fn(*mut ffi::ibv_pd, u64, usize, u64, c_int, c_int) -> *mut ffi::ibv_mr;

/// The loaded library. Never unloaded: it loads the providers of devices, and they stay.
pub(crate) struct Library {
    pub(super) calls: Ibverbs,
    /// From rdma-core 34 on.
    pub(super) register_dma_buf: Option<RegisterDmaBuf>,
}

impl Library {
    /// Loads it, once in the life of the process.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when there is none, or none that fits.
    pub(crate) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        match LIBRARY.get_or_init(Self::load) {
            Ok(library) => Ok(library),
            Err(reason) => Err(Error::new(ErrorKind::Unsupported, reason.clone())),
        }
    }

    fn load() -> Result<Self, String> {
        // SAFETY: the initialisers of libibverbs have no preconditions. Its names stay out of the process's own.
        let file = unsafe { Shared::open(Some(FILE), RTLD_NOW | RTLD_LOCAL) };
        let file = file.map_err(|e| format!("libibverbs not found: {e}"))?;
        // SAFETY: libibverbs has the call by this name with this type, or not at all.
        let register_dma_buf = unsafe { file.get::<RegisterDmaBuf>(b"ibv_reg_dmabuf_mr\0") };
        let register_dma_buf = register_dma_buf.ok().map(|found| *found);
        // SAFETY: the library is libibverbs by its name, whose calls have had these types, by their default versions,
        // since its ABI 1.1; one that lacks any of them is refused.
        let calls = unsafe { Ibverbs::from_library(file) };
        let calls = calls.map_err(|e| format!("{FILE} lacks a call: {e}"))?;
        Ok(Self {
            calls,
            register_dma_buf,
        })
    }
}

/// What the system says of a call that gave no result.
pub(super) fn last(doing: &str) -> Error {
    Error::io(format!("verbs: {doing}"), std::io::Error::last_os_error())
}

/// # Errors
/// What the system says, for a call that returns the number of its error.
pub(super) fn check(doing: &str, code: std::ffi::c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        // Some calls return -1 and set errno, most return the number itself.
        ..0 => Err(last(doing)),
        code => Err(Error::io(
            format!("verbs: {doing}"),
            std::io::Error::from_raw_os_error(code),
        )),
    }
}
