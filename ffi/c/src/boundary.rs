//! The edge itself: panics become statuses, pointers become references, outputs are written last.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use kvfabric::{Error, ErrorKind, Result};

use crate::handles;
use crate::status::kvf_status;
use kvfabric::life::{Began, Life};

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs a call: an error or a panic becomes its status and this thread's last error.
pub(crate) fn boundary(body: impl FnOnce() -> Result<()>) -> kvf_status {
    // Unwind safety: whatever a panic left half-done belongs to a handle, and the handle's `Call` poisons it.
    let result = catch_unwind(AssertUnwindSafe(body));
    let error = match result {
        Ok(Ok(())) => return kvf_status::KVF_OK,
        Ok(Err(error)) => error,
        Err(panic) => Error::new(ErrorKind::Internal, panic_text(&*panic)),
    };
    remember(&error);
    kvf_status::of_kind(error.kind())
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("without a message"))
}

fn remember(error: &Error) {
    let mut text = error.to_string().into_bytes();
    text.retain(|byte| *byte != 0);
    let text = CString::new(text).unwrap_or_default();
    // A thread that is ending has no place for it any more, and nobody to read it.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
}

pub(crate) fn last_error() -> *const c_char {
    // The pointer stays valid when the cell is left: the text is on the heap until it is replaced.
    LAST_ERROR
        .try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// What the caller holds a handle on.
pub(crate) trait Handle: Any + Send + Sync {
    /// Its name in the header, without the prefix.
    const NAME: &'static str;

    /// Whether it may still be used.
    fn life(&self) -> &Arc<Life>;
}

/// A handle in use by a call. Freeing it meanwhile lets the call come to its end.
pub(crate) struct Entered<H: Handle> {
    handle: Arc<H>,
    began: Began,
}

impl<H: Handle> Drop for Entered<H> {
    fn drop(&mut self) {
        self.handle.life().end_call(self.began);
    }
}

impl<H: Handle> Deref for Entered<H> {
    type Target = H;

    fn deref(&self) -> &H {
        &self.handle
    }
}

/// Begins to use a handle.
pub(crate) fn enter<H: Handle>(handle: *const H, name: &str) -> Result<Entered<H>> {
    let handle = handles::find(handle, name)?;
    let began = handle.life().begin_call()?;
    Ok(Entered { handle, began })
}

/// As [`enter`], for handles that a call can do without.
pub(crate) fn enter_optional<H: Handle>(
    handle: *const H,
    name: &str,
) -> Result<Option<Entered<H>>> {
    if handle.is_null() {
        return Ok(None);
    }
    enter(handle, name).map(Some)
}

/// Gives a handle to the caller.
pub(crate) fn into_raw<H: Handle>(handle: H) -> *mut H {
    handles::add(handle)
}

/// Takes a handle back after `ready` has agreed; null is nothing. A poisoned or forked one stays, and is never dropped.
pub(crate) fn take<H: Handle>(
    handle: *mut H,
    name: &str,
    ready: impl FnOnce(&H) -> Result<()>,
) -> Result<()> {
    let Some(entered) = enter_optional(handle, name)? else {
        return Ok(());
    };
    ready(&entered)?;
    // Whoever else frees it at the same time is told so there; who still uses it keeps it until then.
    handles::remove(handle, name)
}

/// A place for one output.
pub(crate) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// # Safety
    /// `place` is null, or writable for one `T` for as long as the result is used.
    pub(crate) unsafe fn new(place: *mut T, name: &str) -> Result<Self> {
        check_aligned(place, name)?;
        NonNull::new(place).map(Self).ok_or_else(|| null(name))
    }

    /// As [`Out::new`], for an output that the caller may not want.
    ///
    /// # Safety
    /// As [`Out::new`].
    pub(crate) unsafe fn optional(place: *mut T, name: &str) -> Result<Option<Self>> {
        check_aligned(place, name)?;
        Ok(NonNull::new(place).map(Self))
    }

    /// Writes the output: the last thing a call does.
    pub(crate) fn write(self, value: T) {
        // SAFETY: writable for one `T` by the contract of `new`; aligned and not null, checked there.
        unsafe { self.0.write(value) };
    }
}

/// A caller's array to fill.
pub(crate) struct OutArray<T> {
    first: *mut T,
    capacity: usize,
}

impl<T: Copy> OutArray<T> {
    /// # Safety
    /// `first` is null, or writable for `capacity` values for as long as the result is used.
    pub(crate) unsafe fn new(first: *mut T, capacity: usize, name: &str) -> Result<Self> {
        check_array(first, capacity, name)?;
        Ok(Self { first, capacity })
    }

    pub(crate) fn is_null(&self) -> bool {
        self.first.is_null()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Fills the beginning of the array.
    pub(crate) fn write(self, values: &[T]) {
        assert!(
            values.len() <= self.capacity,
            "more values than fit were about to be written"
        );
        if values.is_empty() {
            return;
        }
        // SAFETY: writable for `capacity` values by the contract of `new`, and no more are written (checked
        // above), so it is not null; `copy` tolerates overlap.
        unsafe { std::ptr::copy(values.as_ptr(), self.first, values.len()) };
    }
}

/// A caller's array to read.
///
/// # Safety
/// `first` is null, or readable for `count` values that nobody changes for as long as the result is used.
pub(crate) unsafe fn slice<'a, T>(first: *const T, count: usize, name: &str) -> Result<&'a [T]> {
    check_array(first, count, name)?;
    if count == 0 {
        return Ok(&[]);
    }
    // SAFETY: not null, aligned and within half the address space (checked above); readable and unchanged by this
    // function's contract.
    Ok(unsafe { std::slice::from_raw_parts(first, count) })
}

/// A caller's text.
///
/// # Safety
/// `text` is null, or a string with a terminating NUL that nobody changes for as long as the result is used.
pub(crate) unsafe fn text<'a>(text: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: passed on to the caller, word for word.
    unsafe { optional_text(text, name) }?.ok_or_else(|| null(name))
}

/// As [`text`], for texts that a call can do without.
///
/// # Safety
/// As [`text`].
pub(crate) unsafe fn optional_text<'a>(text: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not null (checked above); terminated and unchanged by this function's contract.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|e| {
        Error::new(ErrorKind::Invalid, format!("{name} is not UTF-8: {text:?}")).with_source(e)
    })
}

/// A caller's array for values of which it may not know how many there are.
pub(crate) struct Listing<T> {
    array: OutArray<T>,
    count_out: Out<usize>,
}

impl<T: Copy> Listing<T> {
    const IS_BYTES: bool = size_of::<T>() == 1;
    const UNIT: &str = if Self::IS_BYTES { "bytes" } else { "entries" };
    /// What the header calls the place for the count.
    const COUNT_NAME: &str = if Self::IS_BYTES {
        "len_out"
    } else {
        "count_out"
    };

    /// # Safety
    /// `first` is null, or writable for `capacity` values, and `count_out` is null or writable, for as long as the result is
    /// used.
    pub(crate) unsafe fn new(
        first: *mut T,
        capacity: usize,
        count_out: *mut usize,
        name: &str,
    ) -> Result<Self> {
        // SAFETY: null or writable for `capacity` values, by this function's contract.
        let array = unsafe { OutArray::new(first, capacity, name) }?;
        // SAFETY: null or writable, by this function's contract.
        let count_out = unsafe { Out::new(count_out, Self::COUNT_NAME) }?;
        Ok(Self { array, count_out })
    }

    /// Without an array the count alone is told; an array that is too small is refused, and the count is told as well.
    pub(crate) fn fill(self, values: &[T], name: &str) -> Result<()> {
        if self.array.is_null() {
            self.count_out.write(values.len());
            return Ok(());
        }
        if values.len() > self.array.capacity() {
            let (count, capacity) = (values.len(), self.array.capacity());
            self.count_out.write(count);
            let unit = Self::UNIT;
            let text = format!("{name}: {count} {unit} do not fit into a buffer of {capacity}");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        self.array.write(values);
        self.count_out.write(values.len());
        Ok(())
    }
}

impl Listing<u8> {
    /// As [`Listing::fill`], for text; the length counts the terminating NUL.
    pub(crate) fn fill_text(self, text: &str, name: &str) -> Result<()> {
        let mut bytes: Vec<u8> = text.bytes().filter(|byte| *byte != 0).collect();
        bytes.push(0);
        self.fill(&bytes, name)
    }
}

/// The text with its terminating NUL, or nothing if it does not fit: half a name or address is worse than none.
pub(crate) fn fixed<const CAPACITY: usize>(text: &str) -> [c_char; CAPACITY] {
    let mut fixed = [0; CAPACITY];
    if text.len() < CAPACITY {
        for (place, byte) in fixed.iter_mut().zip(text.bytes()) {
            *place = byte as c_char;
        }
    }
    fixed
}

/// A caller's milliseconds.
pub(crate) fn milliseconds(count: u32) -> Duration {
    Duration::from_millis(count.into())
}

pub(crate) fn null(name: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("{name} is null"))
}

pub(crate) fn check_aligned<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_aligned() {
        return Ok(());
    }
    let text = format!(
        "{name} is {pointer:p}, expected a multiple of {}",
        align_of::<T>()
    );
    Err(Error::new(ErrorKind::Invalid, text))
}

fn check_array<T>(first: *const T, count: usize, name: &str) -> Result<()> {
    if first.is_null() && count > 0 {
        return Err(null(name));
    }
    check_aligned(first, name)?;
    match count.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Error::invalid(
            name,
            count,
            0..=isize::MAX as usize / size_of::<T>().max(1),
        )),
    }
}
