//! libucp itself.

use std::ffi::{CStr, CString};
use std::sync::OnceLock;

use kvcache_core::{Error, ErrorKind, Result};
use libloading::os::unix::{Library as Shared, RTLD_LOCAL, RTLD_NOW};

use super::generated::ucp::{self as ffi, Ucp, ucs_status_t};

/// The name under which every UCX 1.x is found.
const FILE: &str = "libucp.so.0";

/// The loaded library. Never unloaded: UCX leaves hooks in the process.
pub(crate) struct Library {
    pub(super) calls: Ucp,
    version: String,
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
        // SAFETY: the initialisers of UCX's libraries have no preconditions. Its names stay out of the process's own,
        // so that another copy of UCX that is loaded there is not mixed up with this one.
        let file = unsafe { Shared::open(Some(FILE), RTLD_NOW | RTLD_LOCAL) };
        let file = file.map_err(|e| format!("no UCX in this system: {e}"))?;
        // SAFETY: the library is UCX by its name, whose calls have had these types since 1.13; older ones lack one of
        // them or refuse the version that contexts are made with.
        let calls = unsafe { Ucp::from_library(file) };
        let calls = calls
            .map_err(|e| format!("{FILE} is not UCX 1.13 or newer: a call is missing: {e}"))?;
        // SAFETY: no preconditions; the text is a constant of the library, which stays loaded.
        let version = unsafe { calls.ucp_get_version_string() };
        // SAFETY: as above: a terminated text that is never freed.
        let version = unsafe { CStr::from_ptr(version) };
        let version = version.to_string_lossy().into_owned();
        Ok(Self { calls, version })
    }

    /// Such as `1.13.1`.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// What a status means, as an error.
    pub(super) fn error(&self, doing: &str, status: ucs_status_t) -> Error {
        // SAFETY: any number may be asked for; the text is a constant of the library, or of the thread.
        let text = unsafe { self.calls.ucs_status_string(status) };
        // SAFETY: a terminated text that lives at least until the thread's next question.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
        Error::new(kind(status), format!("ucx: {doing}: {text}"))
    }

    /// # Errors
    /// Any status but success.
    pub(super) fn check(&self, doing: &str, status: ucs_status_t) -> Result<()> {
        if status == ffi::UCS_OK {
            return Ok(());
        }
        Err(self.error(doing, status))
    }

    /// The settings of the environment (`UCX_…`), changed by those given here, whose names are without `UCX_`.
    pub(super) fn settings(&'static self, changes: &[(String, String)]) -> Result<Settings> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: neither a prefix nor a file is named, and `raw` is writable for a pointer.
        let status = unsafe {
            self.calls
                .ucp_config_read(std::ptr::null(), std::ptr::null(), &raw mut raw)
        };
        self.check("read the settings", status)?;
        let settings = Settings { library: self, raw };
        for (name, value) in changes {
            settings.change(name, value)?;
        }
        Ok(settings)
    }
}

fn kind(status: ucs_status_t) -> ErrorKind {
    match status {
        ffi::UCS_ERR_NO_MEMORY | ffi::UCS_ERR_NO_RESOURCE | ffi::UCS_ERR_EXCEEDS_LIMIT => {
            ErrorKind::Busy
        }
        ffi::UCS_ERR_UNREACHABLE
        | ffi::UCS_ERR_INVALID_ADDR
        | ffi::UCS_ERR_CANCELED
        | ffi::UCS_ERR_REJECTED
        | ffi::UCS_ERR_NOT_CONNECTED
        | ffi::UCS_ERR_CONNECTION_RESET
        | ffi::UCS_ERR_ENDPOINT_TIMEOUT => ErrorKind::PeerLost,
        ffi::UCS_ERR_INVALID_PARAM | ffi::UCS_ERR_NO_ELEM => ErrorKind::Invalid,
        ffi::UCS_ERR_UNSUPPORTED | ffi::UCS_ERR_NO_DEVICE => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

/// What a context is made with.
pub(super) struct Settings {
    library: &'static Library,
    pub(super) raw: *mut ffi::ucp_config_t,
}

impl Settings {
    fn change(&self, name: &str, value: &str) -> Result<()> {
        let place = format!("setting {name} = {value:?}");
        let text = |what: &str| {
            CString::new(what).map_err(|_| Error::invalid("ucx setting", what, "text without NUL"))
        };
        let (key, value) = (text(name)?, text(value)?);
        // SAFETY: the settings are read and not released, and both texts are terminated.
        let status = unsafe {
            self.library
                .calls
                .ucp_config_modify(self.raw, key.as_ptr(), value.as_ptr())
        };
        self.library.check(&place, status)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        // SAFETY: read by `settings`, and released only here.
        unsafe { self.library.calls.ucp_config_release(self.raw) };
    }
}
