//! Structures that begin with their size, so that they can grow without breaking programs built before.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use kvfabric::{Error, ErrorKind, Result};

use crate::boundary::{check_aligned, null};

/// The largest structure that is looked at: a size above it is garbage rather than a later version.
const SIZE_MAX: usize = 4096;

/// A structure of the header whose first field is `size_t size`.
///
/// # Safety
/// `repr(C)`, its first field is a `usize`, and every bit pattern is a valid value.
pub(crate) unsafe trait SizePrefixed: Copy {
    /// The size of its first published version.
    const SIZE_MIN: usize;
    /// Its name in the header.
    const NAME: &'static str;
}

/// Copies a caller's structure. What an older caller's lacks is zero; what a newer caller's has more must be zero.
///
/// # Safety
/// `options` is null, or readable for the number of bytes that its first field tells, and nobody changes it meanwhile.
pub(crate) unsafe fn read<T: SizePrefixed>(options: *const T) -> Result<T> {
    check_aligned(options, T::NAME)?;
    if options.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: not null and aligned (checked above), readable for at least its first field by contract.
    let size = unsafe { options.cast::<usize>().read() };
    if !(T::SIZE_MIN..=SIZE_MAX).contains(&size) {
        let field = format!("{}.size", T::NAME);
        return Err(Error::invalid(&field, size, T::SIZE_MIN..=SIZE_MAX));
    }
    // SAFETY: readable for `size` bytes by contract; bytes have no alignment.
    let bytes = unsafe { std::slice::from_raw_parts(options.cast::<u8>(), size) };
    if let Some(position) = bytes
        .iter()
        .skip(size_of::<T>())
        .position(|byte| *byte != 0)
    {
        let text = format!(
            "{}: byte {} is set, which this version does not know",
            T::NAME,
            size_of::<T>() + position
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    let mut copy = MaybeUninit::<T>::zeroed();
    let known = size.min(size_of::<T>());
    // SAFETY: the source is readable for `known <= size` bytes, the copy has `size_of::<T>() >= known`, and a
    // local variable overlaps nothing of the caller's.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.as_mut_ptr().cast(), known) };
    // SAFETY: every byte was zeroed or copied, and every bit pattern is valid by the trait's contract.
    Ok(unsafe { copy.assume_init() })
}

/// As [`read`], for options that a caller can do without.
///
/// # Safety
/// As [`read`].
pub(crate) unsafe fn read_optional<T: SizePrefixed>(options: *const T) -> Result<Option<T>> {
    if options.is_null() {
        return Ok(None);
    }
    // SAFETY: passed on to the caller, word for word.
    unsafe { read(options) }.map(Some)
}

/// A caller's structure to fill, which may be of an earlier or a later version than this library.
pub(crate) struct OutSized<T> {
    place: NonNull<T>,
    size: usize,
}

impl<T: SizePrefixed> OutSized<T> {
    /// # Safety
    /// `place` is null, or readable and writable for the number of bytes that its first field tells, for as long as the
    /// result is used.
    pub(crate) unsafe fn new(place: *mut T) -> Result<Self> {
        check_aligned(place, T::NAME)?;
        let place = NonNull::new(place).ok_or_else(|| null(T::NAME))?;
        // SAFETY: not null and aligned (checked above), readable for at least its first field by contract.
        let size = unsafe { place.cast::<usize>().read() };
        if !(T::SIZE_MIN..=SIZE_MAX).contains(&size) {
            let field = format!("{}.size", T::NAME);
            return Err(Error::invalid(&field, size, T::SIZE_MIN..=SIZE_MAX));
        }
        Ok(Self { place, size })
    }

    /// Writes what the caller has room for, except the size, which stays as it is; what this version does not know becomes
    /// zero.
    pub(crate) fn write(self, value: T) {
        const FIRST: usize = size_of::<usize>();
        let known = self.size.min(size_of::<T>());
        let source = (&raw const value).cast::<u8>();
        let target = self.place.as_ptr().cast::<u8>();
        // SAFETY: the value has at least `known` bytes, which include the first field.
        let source = unsafe { source.add(FIRST) };
        // SAFETY: writable for `size >= known` bytes by the contract of `new`, which include the first field.
        let fields = unsafe { target.add(FIRST) };
        // SAFETY: both sides have `known` bytes, less the first field; a local variable overlaps nothing of the caller's.
        unsafe { std::ptr::copy_nonoverlapping(source, fields, known - FIRST) };
        // SAFETY: within the `size` bytes that are writable by the contract of `new`, or at their end.
        let unknown = unsafe { target.add(known) };
        // SAFETY: the rest of the `size` bytes that are writable by the contract of `new`; none if nothing is unknown.
        unsafe { std::ptr::write_bytes(unknown, 0, self.size - known) };
    }
}

/// Fields kept for later versions must be zero, or a later meaning would change what an old program does.
pub(crate) fn check_reserved(reserved: u32, name: &str) -> Result<()> {
    if reserved == 0 {
        return Ok(());
    }
    Err(Error::invalid(&format!("{name}.reserved"), reserved, 0..=0))
}
