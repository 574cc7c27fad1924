//! One exception class per error kind, all below `Error`.

use kvfabric::{Error, ErrorKind};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

pyo3::create_exception!(
    kvfabric,
    KvfabricError,
    PyException,
    "What every error of this package is; `code` is its number, the same as in C."
);

macro_rules! kinds {
    ($($kind:ident, $class:ident, $doc:literal;)*) => {
        $(pyo3::create_exception!(kvfabric, $class, KvfabricError, $doc);)*

        /// Adds the classes to the module, each with its `code`.
        pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
            let py = module.py();
            module.add("KvfabricError", py.get_type::<KvfabricError>())?;
            $(
                let class = py.get_type::<$class>();
                class.setattr("code", ErrorKind::$kind.code())?;
                module.add(stringify!($class), class)?;
            )*
            Ok(())
        }

        fn raise(kind: ErrorKind, text: String) -> PyErr {
            match kind {
                $(ErrorKind::$kind => $class::new_err(text),)*
                // A kind that has no class yet is still an error of this package.
                _ => KvfabricError::new_err(text),
            }
        }
    };
}

kinds! {
    Invalid, InvalidError, "An argument is malformed; repeating the call cannot help.";
    Busy, BusyError, "A limit is reached, or something is still in flight; try again after completions.";
    Corrupt, CorruptError, "Bytes do not match their checksum, length or version; drop this copy.";
    PeerLost, PeerLostError, "The peer is gone; other holders may do.";
    Unsupported, UnsupportedError, "This backend or build cannot do it, here or ever.";
    Timeout, DeadlineError, "The deadline passed first.";
    Cancelled, CancelledError, "The caller withdrew the request.";
    Version, VersionError, "The other side speaks another version; both are named.";
    NoSpace, NoSpaceError, "A disk, arena or store is full.";
    Denied, DeniedError, "The other side does not allow it: a wrong key, a stranger, read-only memory.";
    Poisoned, PoisonedError, "Something that this depends on became unusable.";
    NotFound, NotFoundError, "What was named does not exist.";
    Io, IoError, "The operating system or a store refused.";
    Forked, ForkedError, "The call was made in a forked child.";
    Internal, InternalError, "A promise of the library was broken; please report it.";
}

/// The exception of an error.
pub(crate) fn to_python(error: impl Into<Error>) -> PyErr {
    let error = error.into();
    raise(error.kind(), error.to_string())
}
