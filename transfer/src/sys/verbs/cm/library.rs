//! librdmacm itself.

use std::sync::OnceLock;

use kvcache_core::{Error, ErrorKind, Result};
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};

use super::events::Events;
use super::ffi::Rdmacm;

/// The name under which every librdmacm is found.
const FILE: &str = "librdmacm.so.1";

/// The loaded library. Never unloaded: it keeps devices open.
pub(super) struct Library {
    pub(super) calls: Rdmacm,
}

impl Library {
    /// Loads it, once in the life of the process.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when there is none, or none that fits.
    pub(super) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        match LIBRARY.get_or_init(|| Self::load(FILE)) {
            Ok(library) => Ok(library),
            Err(reason) => Err(Error::new(ErrorKind::Unsupported, reason.clone())),
        }
    }

    fn load(name: &str) -> Result<Self, String> {
        // SAFETY: the initialisers of librdmacm have no preconditions. Its names stay out of the process's own.
        let file = unsafe { Shared::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
        let file = file.map_err(|e| format!("librdmacm not found: {e}"))?;
        // SAFETY: the library is librdmacm by its name, whose calls have had these types since its ABI 1.0; one that lacks any
        // of them is refused.
        let calls = unsafe { Rdmacm::from_library(file) };
        let calls = calls.map_err(|e| format!("{name} lacks a call: {e}"))?;
        Ok(Self { calls })
    }
}

/// Whether queue pairs can be connected by rdma_cm here.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without the library, or without the kernel's part of it (`rdma_ucm`).
pub(crate) fn available() -> Result<()> {
    Events::new().map(|_| ())
}

/// # Errors
/// What the system says, for a call that returns -1.
pub(super) fn check(doing: &str, code: std::ffi::c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let cause = std::io::Error::last_os_error();
    Err(Error::io(format!("rdma_cm: {doing}"), cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library that is not there, and one that is there and is another one.
    #[test]
    fn what_is_missing_is_told() {
        let reason = |name| Library::load(name).err().unwrap();
        let none = reason("librdmacm.so.none");
        assert!(none.contains("librdmacm not found: "), "{none}");
        let other = reason("libc.so.6");
        assert!(other.contains("libc.so.6 lacks a call: "), "{other}");
        assert!(other.contains("rdma_create_event_channel"), "{other}");
    }
}
