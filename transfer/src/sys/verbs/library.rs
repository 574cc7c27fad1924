//! libibverbs itself.

use std::sync::OnceLock;

use kvcache_core::{Error, ErrorKind, Result};
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};

use super::generated::ibverbs::Ibverbs;

/// The name under which every libibverbs is found.
const FILE: &str = "libibverbs.so.1";

/// The loaded library. Never unloaded: it loads the providers of devices, and they stay.
pub(crate) struct Library {
    pub(super) calls: Ibverbs,
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
        // SAFETY: the library is libibverbs by its name, whose calls have had these types, by their default versions,
        // since its ABI 1.1; one that lacks any of them is refused.
        let calls = unsafe { Ibverbs::from_library(file) };
        let calls = calls.map_err(|e| format!("{FILE} lacks a call: {e}"))?;
        Ok(Self { calls })
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
