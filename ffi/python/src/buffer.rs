//! The memory of Python objects, held through the buffer protocol.

use std::ffi::{c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr::null_mut;

use kvfabric::{Error, ErrorKind};
use pyo3::ffi::{Py_ssize_t, PyObject};
use pyo3::prelude::*;

use crate::errors::to_python;

/// `PyBUF_SIMPLE`: contiguous bytes, writable or not.
const SIMPLE: c_int = 0;
/// `PyBUF_WRITABLE`.
const WRITABLE: c_int = 1;

// The stable ABI of Python 3.9 has no buffers: they became part of it in 3.11. But every CPython since 3.3 exports these
// two, and `Py_buffer` has had one layout all the time, which 3.11 promised for good; so one wheel serves all.
unsafe extern "C" {
    fn PyObject_GetBuffer(object: *mut PyObject, view: *mut View, flags: c_int) -> c_int;
    fn PyBuffer_Release(view: *mut View);
}

/// `Py_buffer`, field by field. Only what exporters fill in is ever read.
#[repr(C)]
struct View {
    buf: *mut c_void,
    obj: *mut PyObject,
    len: Py_ssize_t,
    itemsize: Py_ssize_t,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut Py_ssize_t,
    strides: *mut Py_ssize_t,
    suboffsets: *mut Py_ssize_t,
    internal: *mut c_void,
}

impl View {
    fn empty() -> Box<Self> {
        Box::new(Self {
            buf: null_mut(),
            obj: null_mut(),
            len: 0,
            itemsize: 0,
            readonly: 0,
            ndim: 0,
            format: null_mut(),
            shape: null_mut(),
            strides: null_mut(),
            suboffsets: null_mut(),
            internal: null_mut(),
        })
    }
}

/// A hold on an object's memory: while it exists the object lives and its memory neither moves nor shrinks.
///
/// Letting go needs the GIL, so dropping it leaks: use [`Buffer::release`].
pub(crate) struct Buffer {
    /// Boxed, because exporters may rely on the address of the view.
    view: ManuallyDrop<Box<View>>,
}

// SAFETY: the view is plain addresses; Python's own state behind it is touched only by `release`, with the GIL held.
unsafe impl Send for Buffer {}
// SAFETY: as above: shared use only reads the addresses.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Holds the memory of `object`, which must be contiguous; writable memory if there is a choice.
    pub(crate) fn hold(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut view = View::empty();
        // SAFETY: `object` is a live object and the GIL is held; `view` is writable, and stays where it is.
        let status = unsafe { PyObject_GetBuffer(object.as_ptr(), &raw mut *view, WRITABLE) };
        if status == 0 {
            return Ok(Self {
                view: ManuallyDrop::new(view),
            });
        }
        // Read-only memory, or no buffer at all: the second attempt tells.
        drop(PyErr::take(object.py()));
        // SAFETY: as above; a failed call leaves nothing in `view` to be released.
        let status = unsafe { PyObject_GetBuffer(object.as_ptr(), &raw mut *view, SIMPLE) };
        if status == 0 {
            return Ok(Self {
                view: ManuallyDrop::new(view),
            });
        }
        let cause = PyErr::take(object.py());
        let cause = cause.map_or_else(String::new, |error| format!(": {error}"));
        let text = format!("memory must be a contiguous buffer{cause}");
        Err(to_python(Error::new(ErrorKind::Invalid, text)))
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.view.buf.cast()
    }

    pub(crate) fn len(&self) -> u64 {
        // Negative lengths do not exist.
        u64::try_from(self.view.len).unwrap_or(0)
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.view.readonly != 0
    }

    /// Lets go.
    pub(crate) fn release(mut self, _py: Python<'_>) {
        // SAFETY: filled by `PyObject_GetBuffer` in `hold` and released only here, as `self` is consumed; the GIL is
        // held, as the token proves.
        unsafe { PyBuffer_Release(&raw mut **self.view) };
        // SAFETY: not used after this, as `self` is consumed and `Buffer` has no `Drop`.
        unsafe { ManuallyDrop::drop(&mut self.view) };
    }
}
