//! The memory of Python objects, held through the buffer protocol.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::ptr::null_mut;

use kvfabric::{Error, ErrorKind};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi::{Py_ssize_t, PyObject};
use pyo3::prelude::*;

use crate::errors::to_python;

/// `PyBUF_SIMPLE`: contiguous bytes, writable or not.
const SIMPLE: c_int = 0;
/// `PyBUF_WRITABLE`.
const WRITABLE: c_int = 1;
/// `PyBUF_FORMAT | PyBUF_C_CONTIGUOUS`: numbers row by row, with their shape and kind.
const NUMBERS: c_int = 0x4 | 0x38;

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
        if let Ok(writable) = Self::ask(object, WRITABLE) {
            return Ok(writable);
        }
        // Read-only memory, or no buffer at all: the second attempt tells.
        Self::ask(object, SIMPLE).map_err(|cause| {
            let text = format!("memory must be a contiguous buffer: {cause}");
            to_python(Error::new(ErrorKind::Invalid, text))
        })
    }

    fn ask(object: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        let mut view = View::empty();
        // SAFETY: `object` is a live object and the GIL is held; `view` is writable, and stays where it is.
        let status = unsafe { PyObject_GetBuffer(object.as_ptr(), &raw mut *view, flags) };
        if status == 0 {
            return Ok(Self {
                view: ManuallyDrop::new(view),
            });
        }
        // A failed call leaves nothing in `view` to be released.
        Err(PyErr::fetch(object.py()))
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

/// Whole numbers that were copied out of an array, row by row. Negative ones appear as huge, which no check lets through.
pub(crate) struct Numbers {
    /// Its extent in each dimension.
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<u64>,
}

impl Numbers {
    /// Copies the numbers of an object with a buffer; none for an object without one.
    ///
    /// # Errors
    /// `InvalidError`, naming `what`, for buffers that are not contiguous or do not hold whole numbers of 32 or 64 bits.
    pub(crate) fn of(object: &Bound<'_, PyAny>, what: &str) -> PyResult<Option<Self>> {
        let py = object.py();
        let buffer = match Buffer::ask(object, NUMBERS) {
            Ok(buffer) => buffer,
            Err(error) if error.is_instance_of::<PyTypeError>(py) => return Ok(None),
            Err(error) => {
                let text = format!("{what} must be a C-contiguous array: {error}");
                return Err(to_python(Error::new(ErrorKind::Invalid, text)));
            }
        };
        let numbers = Self::copy(&buffer);
        buffer.release(py);
        let numbers = numbers.map_err(|found| {
            let accepted = "whole numbers of 32 or 64 bits in this machine's byte order";
            to_python(Error::invalid(what, found, accepted))
        })?;
        Ok(Some(numbers))
    }

    /// Fails with the kind of numbers that it met instead.
    fn copy(buffer: &Buffer) -> Result<Self, String> {
        let view = &buffer.view;
        let format = if view.format.is_null() {
            c"B"
        } else {
            // SAFETY: exporters of a format give a C string that lives as long as the view.
            unsafe { CStr::from_ptr(view.format) }
        };
        let size = usize::try_from(view.itemsize).unwrap_or(0);
        let code = format.to_bytes();
        let code = match code {
            [b'@' | b'=', rest @ ..] => rest,
            [b'<', rest @ ..] if cfg!(target_endian = "little") => rest,
            _ => code,
        };
        let is_integer = matches!(
            code,
            [b'i' | b'I' | b'l' | b'L' | b'q' | b'Q' | b'n' | b'N']
        );
        let is_signed = matches!(code, [b'i' | b'l' | b'q' | b'n']);
        if !is_integer || !matches!(size, 4 | 8) {
            return Err(format!(
                "{:?} of {size} bytes each",
                format.to_string_lossy()
            ));
        }
        let dimensions = usize::try_from(view.ndim).unwrap_or(0);
        let mut shape = Vec::with_capacity(dimensions);
        for dimension in 0..dimensions {
            // SAFETY: `PyBUF_ND` was asked for, so there is one extent for each of `ndim` dimensions.
            let extent = unsafe { view.shape.add(dimension) };
            // SAFETY: as above; valid as long as the view.
            let extent = unsafe { extent.read() };
            shape.push(usize::try_from(extent).unwrap_or(0));
        }
        let count = usize::try_from(view.len).unwrap_or(0) / size;
        let values = if size == 8 {
            let mut values = vec![0_u64; count];
            buffer.copy_to(&mut values);
            values
        } else {
            let mut narrow = vec![0_u32; count];
            buffer.copy_to(&mut narrow);
            let widen = |raw: u32| match is_signed {
                true => i64::from(raw.cast_signed()).cast_unsigned(),
                false => u64::from(raw),
            };
            narrow.into_iter().map(widen).collect()
        };
        Ok(Self { shape, values })
    }
}

/// A number of which every pattern of bytes is one.
trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for u64 {}

impl Buffer {
    /// Copies from its beginning as much as fits `target`.
    fn copy_to<T: Plain>(&self, target: &mut [T]) {
        let bytes = size_of_val(target).min(usize::try_from(self.len()).unwrap_or(usize::MAX));
        if bytes == 0 {
            // An empty array may be nowhere.
            return;
        }
        // SAFETY: the view is contiguous and at least so long, and cannot go away while it is held; the target is at
        // least so long, too, and any bytes are numbers. Other threads may write to the view, so its bytes are copied
        // once, raw, and looked at only afterwards.
        unsafe { std::ptr::copy_nonoverlapping(self.base(), target.as_mut_ptr().cast(), bytes) };
    }
}

/// Numbers below 2^32, of a sequence or an array: see `_Integers` in the stubs.
///
/// # Errors
/// `InvalidError`, naming `what`, the position and the value.
pub(crate) fn integers(object: &Bound<'_, PyAny>, what: &str) -> PyResult<Vec<u32>> {
    let Some(numbers) = Numbers::of(object, what)? else {
        return object.extract();
    };
    if numbers.shape.len() > 1 {
        let found = format!("{} dimensions", numbers.shape.len());
        return Err(to_python(Error::invalid(what, found, "one dimension")));
    }
    let narrow = |(position, value): (usize, &u64)| {
        u32::try_from(*value).map_err(|_| {
            // Shown as the caller wrote it: a negative number was widened to a huge one.
            let found = format!("{} at {position}", value.cast_signed());
            to_python(Error::invalid(what, found, 0..=u32::MAX))
        })
    };
    numbers.values.iter().enumerate().map(narrow).collect()
}
