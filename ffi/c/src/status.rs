//! Status codes, the version, and the text of the last error.

use std::ffi::{CStr, c_char};

use kvfabric::ErrorKind;

use crate::boundary;

/// What became of a call. Numbers are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_status {
    /// It succeeded.
    KVF_OK = 0,
    /// An argument is malformed; repeating the call cannot help.
    KVF_INVALID = 1,
    /// A limit is reached, or something is still in flight; try again after completions.
    KVF_BUSY = 2,
    /// Bytes do not match their checksum, length or version; drop this copy.
    KVF_CORRUPT = 3,
    /// The peer is gone; other holders may do.
    KVF_PEER_LOST = 4,
    /// This backend or build cannot do it, here or ever.
    KVF_UNSUPPORTED = 5,
    /// The deadline passed first.
    KVF_TIMEOUT = 6,
    /// The caller withdrew the request.
    KVF_CANCELLED = 7,
    /// The other side speaks another version; both are named.
    KVF_VERSION = 8,
    /// A disk, arena or store is full.
    KVF_NO_SPACE = 9,
    /// The other side does not allow it: a wrong key, a stranger, read-only memory.
    KVF_DENIED = 10,
    /// Something that this depends on became unusable.
    KVF_POISONED = 11,
    /// What was named does not exist.
    KVF_NOT_FOUND = 12,
    /// The operating system or a store refused.
    KVF_IO = 13,
    /// The call was made in a forked child.
    KVF_FORKED = 14,
    /// A promise of the library was broken; please report it.
    KVF_INTERNAL = 15,
}

impl kvf_status {
    pub(crate) const ALL: [Self; 16] = [
        Self::KVF_OK,
        Self::KVF_INVALID,
        Self::KVF_BUSY,
        Self::KVF_CORRUPT,
        Self::KVF_PEER_LOST,
        Self::KVF_UNSUPPORTED,
        Self::KVF_TIMEOUT,
        Self::KVF_CANCELLED,
        Self::KVF_VERSION,
        Self::KVF_NO_SPACE,
        Self::KVF_DENIED,
        Self::KVF_POISONED,
        Self::KVF_NOT_FOUND,
        Self::KVF_IO,
        Self::KVF_FORKED,
        Self::KVF_INTERNAL,
    ];

    /// The status of this number; none for a number that is not one.
    pub(crate) fn of_code(code: u32) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }

    /// The status of this kind; a kind without a number of its own is an internal error.
    pub(crate) fn of_kind(kind: ErrorKind) -> Self {
        Self::of_code(kind.code()).unwrap_or(Self::KVF_INTERNAL)
    }

    fn name(self) -> &'static CStr {
        match self {
            Self::KVF_OK => c"ok",
            Self::KVF_INVALID => c"invalid",
            Self::KVF_BUSY => c"busy",
            Self::KVF_CORRUPT => c"corrupt",
            Self::KVF_PEER_LOST => c"peer_lost",
            Self::KVF_UNSUPPORTED => c"unsupported",
            Self::KVF_TIMEOUT => c"timeout",
            Self::KVF_CANCELLED => c"cancelled",
            Self::KVF_VERSION => c"version",
            Self::KVF_NO_SPACE => c"no_space",
            Self::KVF_DENIED => c"denied",
            Self::KVF_POISONED => c"poisoned",
            Self::KVF_NOT_FOUND => c"not_found",
            Self::KVF_IO => c"io",
            Self::KVF_FORKED => c"forked",
            Self::KVF_INTERNAL => c"internal",
        }
    }
}

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// The library's version, such as "0.1.0"; valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn kvf_version() -> *const c_char {
    VERSION.as_ptr().cast()
}

/// The short name of a status, such as "peer_lost"; "unknown" for a number that is none. Valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn kvf_status_name(status: u32) -> *const c_char {
    kvf_status::of_code(status)
        .map_or(c"unknown", kvf_status::name)
        .as_ptr()
}

/// What went wrong in the last call of this thread that failed, as a sentence; empty if none has. Valid until the next
/// call of this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn kvf_last_error() -> *const c_char {
    boundary::last_error()
}
