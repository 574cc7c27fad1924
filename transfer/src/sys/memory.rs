//! Byte ranges that other threads, other processes or the kernel may change at any time.
//!
//! There is never a Rust reference into them: bytes go in and out by raw copies between checked bounds.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags};

mod first_touch;

pub use super::host::HostMemory;
pub(crate) use super::host::SIZE_SEALS;

/// Bytes copied out at a time to compute a checksum: fits the first-level cache.
const CHECKSUM_STEP_BYTES: usize = 16 << 10;

/// The size of a huge page. Memory of that length and more asks for them: a device is told of far fewer pieces (a disk's queue
/// may hold no more than 256 of them in all), they are held faster, and copies miss fewer translations.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A range of addresses; mapped here and unmapped when dropped, or lent by a caller.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    ownership: Ownership,
    writable: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ownership {
    Mapped,
    Lent,
}

// SAFETY: a mapping is plain addresses valid in every thread; all access is by raw copies, which
// tolerate concurrent writers (the bytes are then unspecified, never the control flow).
unsafe impl Send for Mapping {}
// SAFETY: as above: no method gives out a reference into the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed private memory, not inherited by forked children.
    pub(crate) fn anonymous(len: u64) -> Result<Self> {
        let len = checked_len(len)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping at an address the kernel chooses overlaps nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE)
        };
        Self::mapped(base, len, true)
    }

    /// Maps `len` bytes of `file` from its start. The caller has made sure that the file can't shrink.
    pub(crate) fn of_file(file: impl AsFd, len: u64, writable: bool) -> Result<Self> {
        let len = checked_len(len)?;
        let mut protection = ProtFlags::READ;
        protection.set(ProtFlags::WRITE, writable);
        // SAFETY: a new shared mapping at an address the kernel chooses overlaps nothing.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        Self::mapped(base, len, writable)
    }

    fn mapped(base: rustix::io::Result<*mut c_void>, len: usize, writable: bool) -> Result<Self> {
        let base = base.map_err(|e| Error::io(format!("map {len} bytes"), e.into()))?;
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(Error::new(
                ErrorKind::Internal,
                "the kernel mapped memory at address 0",
            ));
        };
        let mapping = Self {
            base,
            len,
            ownership: Ownership::Mapped,
            writable,
        };
        // SAFETY: the range was mapped just now and is ours.
        let advised =
            unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxDontFork) };
        advised.map_err(|e| Error::io("keep mapped memory from forked children", e.into()))?;
        if len >= HUGE_PAGE_BYTES {
            // SAFETY: as above. A wish: kernels without huge pages, or told to give none, refuse it or do nothing.
            let _ =
                unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        }
        Ok(mapping)
    }

    /// Memory of someone else's.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `len` bytes until the mapping is dropped.
    pub(crate) unsafe fn lent(base: *mut u8, len: u64) -> Result<Self> {
        let len = checked_len(len)?;
        let Some(base) = NonNull::new(base) else {
            return Err(Error::new(ErrorKind::Invalid, "memory address is null"));
        };
        if (base.as_ptr() as usize).checked_add(len).is_none() {
            return Err(Error::invalid(
                "memory length",
                len,
                "not past the address space",
            ));
        }
        Ok(Self {
            base,
            len,
            ownership: Ownership::Lent,
            writable: true,
        })
    }

    /// Whether it is someone else's.
    pub(crate) fn is_lent(&self) -> bool {
        self.ownership == Ownership::Lent
    }

    /// Where it begins.
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Where it begins, as a number for another process.
    pub(crate) fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The address of `offset`, after checking that `len` bytes lie there.
    fn at(&self, offset: u64, len: u64) -> Result<NonNull<u8>> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.len as u64) {
            return Err(out_of_bounds(offset, len, self.len as u64));
        }
        // SAFETY: `offset <= self.len` was checked just now, so the result stays within the range
        // or one past its end.
        Ok(unsafe { self.base.add(offset as usize) })
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Denied, "memory is mapped read-only"))
    }

    /// Copies `bytes` in at `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_writable()?;
        let target = self.at(offset, bytes.len() as u64)?;
        // SAFETY: `target` is valid for the length (checked by `at`, writable checked above); a
        // caller's slice cannot overlap memory that is only ever handed out by copies. For lent
        // memory the lender's contract forbids slices into it, and `copy` tolerates overlap.
        unsafe { std::ptr::copy(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies out from `offset` until `bytes` is full.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let source = self.at(offset, bytes.len() as u64)?;
        // SAFETY: `source` is valid for the length (checked by `at`); overlap is tolerated as above.
        unsafe { std::ptr::copy(source.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies `len` bytes between two mappings, which may be the same one and overlap.
    pub(crate) fn copy(
        from: &Self,
        from_offset: u64,
        to: &Self,
        to_offset: u64,
        len: u64,
    ) -> Result<()> {
        to.check_writable()?;
        let source = from.at(from_offset, len)?;
        let target = to.at(to_offset, len)?;
        // SAFETY: both ends are valid for `len` bytes (checked by `at`), the target is writable
        // (checked above), and `copy` is defined for overlapping ranges.
        unsafe { std::ptr::copy(source.as_ptr(), target.as_ptr(), len as usize) };
        // The next copy may be of the word that says whether these bytes were current: it must be read after them.
        fence(Ordering::AcqRel);
        Ok(())
    }

    /// Sets `len` bytes to `value`.
    pub(crate) fn fill(&self, offset: u64, len: u64, value: u8) -> Result<()> {
        self.check_writable()?;
        let target = self.at(offset, len)?;
        // SAFETY: the target is valid for `len` bytes (checked by `at`) and writable.
        unsafe { std::ptr::write_bytes(target.as_ptr(), value, len as usize) };
        Ok(())
    }

    /// Takes the pages of `len` bytes at `offset` from the kernel now, to be written; their content stays.
    pub(crate) fn populate(&self, offset: u64, len: u64) -> Result<()> {
        if self.ownership == Ownership::Lent {
            let text = "memory of someone else's is theirs to populate";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        self.check_writable()?;
        let into_page = offset % page_bytes()?;
        let (offset, len) = (offset - into_page, len.saturating_add(into_page));
        let target = self.at(offset, len)?;
        // SAFETY: the range lies in this mapping (checked by `at`) and begins at a page, as the mapping does; the call
        // provides pages and changes no byte.
        let provided = unsafe {
            let start = target.as_ptr().cast();
            rustix::mm::madvise(start, len as usize, Advice::LinuxPopulateWrite)
        };
        provided.map_err(|error| match error {
            // Before Linux 5.14.
            rustix::io::Errno::INVAL => {
                Error::new(ErrorKind::Unsupported, "the kernel cannot populate memory")
            }
            error => Error::io(format!("populate {len} bytes of memory"), error.into()),
        })
    }

    /// The CRC-32C of `len` bytes.
    pub(crate) fn crc32c(&self, offset: u64, len: u64) -> Result<u32> {
        self.at(offset, len)?;
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        let mut step = [0_u8; CHECKSUM_STEP_BYTES];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(CHECKSUM_STEP_BYTES as u64) as usize;
            self.read(offset + done, &mut step[..count])?;
            digest.update(&step[..count]);
            done += count as u64;
        }
        Ok(digest.finalize() as u32)
    }

    /// The aligned 8-byte word at `offset`, as an atomic.
    fn word(&self, offset: u64) -> Result<&AtomicU64> {
        let address = self.at(offset, 8)?.cast::<AtomicU64>();
        if !address.is_aligned() {
            return Err(Error::invalid("word offset", offset, "a multiple of 8"));
        }
        // SAFETY: eight valid, aligned bytes (checked above) that live as long as `self`; an atomic
        // may be changed by others at any time, and every bit pattern is a valid value.
        Ok(unsafe { address.as_ref() })
    }

    /// Reads a word that others may change; what they wrote before it is visible after.
    pub(crate) fn load_u64(&self, offset: u64) -> Result<u64> {
        Ok(self.word(offset)?.load(Ordering::Acquire))
    }

    /// Writes a word; whoever reads it with [`Mapping::load_u64`] sees what was written before.
    pub(crate) fn store_u64(&self, offset: u64, value: u64) -> Result<()> {
        self.check_writable()?;
        self.word(offset)?.store(value, Ordering::Release);
        // What is written after this word must not be seen before it: readers compare the word once they have copied.
        fence(Ordering::AcqRel);
        Ok(())
    }

    /// A checked range for the kernel to read from.
    pub(crate) fn span(&self, offset: u64, len: u64) -> Result<Span<'_>> {
        let base = self.at(offset, len)?;
        Ok(Span {
            raw: iovec(base, len),
            owner: PhantomData,
        })
    }

    /// A checked range for the kernel to write to.
    pub(crate) fn sink(&self, offset: u64, len: u64) -> Result<Sink<'_>> {
        self.check_writable()?;
        let base = self.at(offset, len)?;
        Ok(Sink {
            raw: iovec(base, len),
            owner: PhantomData,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.ownership == Ownership::Lent {
            return;
        }
        // SAFETY: the range was mapped by `mapped` with this length and is unmapped only here;
        // whoever copies holds a reference to `self`, so nobody does any more.
        let status = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(error) = status {
            tracing::warn!(%error, "unmap memory");
        }
    }
}

fn iovec(base: NonNull<u8>, len: u64) -> libc::iovec {
    libc::iovec {
        iov_base: base.as_ptr().cast(),
        iov_len: len as usize,
    }
}

/// A range that the kernel may read from, in the form of its vectored calls.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    raw: libc::iovec,
    owner: PhantomData<&'a Mapping>,
}

impl<'a> Span<'a> {
    /// Private bytes.
    pub(crate) fn of_bytes(bytes: &'a [u8]) -> Self {
        let base = bytes.as_ptr().cast_mut().cast();
        let raw = libc::iovec {
            iov_base: base,
            iov_len: bytes.len(),
        };
        Self {
            raw,
            owner: PhantomData,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Copies bytes out, from `at` on, as many as fit; how many.
    pub(crate) fn copy_out(&self, at: usize, bytes: &mut [u8]) -> usize {
        assert!(at <= self.raw.iov_len, "{at} of {}", self.raw.iov_len);
        let count = bytes.len().min(self.raw.iov_len - at);
        // SAFETY: `at` is within the range, checked above.
        let from = unsafe { self.raw.iov_base.cast::<u8>().add(at) };
        // SAFETY: the range is valid for `'a` and `count` bytes of it follow; `bytes` is a slice that holds them; `copy`
        // tolerates overlap.
        unsafe { std::ptr::copy(from, bytes.as_mut_ptr(), count) };
        count
    }

    /// The kernel's view of it.
    pub(crate) fn raw(&self) -> libc::iovec {
        self.raw
    }
}

/// A range that the kernel may write to, in the form of its vectored calls.
#[repr(transparent)]
pub(crate) struct Sink<'a> {
    raw: libc::iovec,
    owner: PhantomData<&'a Mapping>,
}

impl<'a> Sink<'a> {
    /// Private bytes.
    pub(crate) fn of_bytes(bytes: &'a mut [u8]) -> Self {
        let raw = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        Self {
            raw,
            owner: PhantomData,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Copies bytes in, from `at` on.
    pub(crate) fn copy_in(&self, at: usize, bytes: &[u8]) {
        let len = self.raw.iov_len;
        assert!(at <= len && bytes.len() <= len - at, "{at} of {len}");
        // SAFETY: `at` is within the range, checked above.
        let to = unsafe { self.raw.iov_base.cast::<u8>().add(at) };
        // SAFETY: the range is writable for `'a`, nobody holds a reference into it, and the bytes fit, checked above; `copy`
        // tolerates overlap.
        unsafe { std::ptr::copy(bytes.as_ptr(), to, bytes.len()) };
    }

    /// The kernel's view of it.
    pub(crate) fn raw(&self) -> libc::iovec {
        self.raw
    }
}

fn checked_len(len: u64) -> Result<usize> {
    match usize::try_from(len) {
        Ok(len) if len > 0 && len <= isize::MAX as usize => Ok(len),
        _ => Err(Error::invalid("memory length", len, 1..=isize::MAX)),
    }
}

fn out_of_bounds(offset: u64, len: u64, size: u64) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("bytes {offset}+{len} lie outside the {size} bytes of the region"),
    )
}

/// Bytes of a page. Of the C library: rustix reads the kernel's own table, which valgrind changes, and dies of it there.
fn page_bytes() -> Result<u64> {
    // SAFETY: asks for a number.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    match u64::try_from(bytes) {
        Ok(bytes) if bytes.is_power_of_two() => Ok(bytes),
        _ => Err(Error::invalid("bytes of a page", bytes, "a power of two")),
    }
}
