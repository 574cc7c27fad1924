//! Host memory that can be registered: private, shared, or lent.

use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::fs::{MemfdFlags, SealFlags};

use super::memory::Mapping;

/// What keeps a peer from cutting memory away under us.
pub(crate) const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Memory of this host to register with an agent.
///
/// Only [`HostMemory::shared`] and [`HostMemory::of_file`] can be mapped by other processes of this host; other kinds are
/// reached over `cma`, where the kernel allows it, or `tcp`.
pub struct HostMemory {
    mapping: Mapping,
    shared: Option<OwnedFd>,
}

impl HostMemory {
    /// Zeroed memory, private to this process.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for no bytes, [`kvcache_core::ErrorKind::Io`] when the system has none left.
    pub fn anonymous(bytes: u64) -> Result<Self> {
        Ok(Self {
            mapping: Mapping::anonymous(bytes)?,
            shared: None,
        })
    }

    /// Zeroed memory that processes of this host may map; its size is sealed.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for no bytes, [`kvcache_core::ErrorKind::Io`] when the system has none left.
    pub fn shared(bytes: u64) -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("kvfabric", flags)
            .map_err(|e| Error::io("create shared memory", e.into()))?;
        rustix::fs::ftruncate(&file, bytes)
            .map_err(|e| Error::io(format!("size shared memory to {bytes} bytes"), e.into()))?;
        rustix::fs::fcntl_add_seals(&file, SIZE_SEALS | SealFlags::SEAL)
            .map_err(|e| Error::io("seal the size of shared memory", e.into()))?;
        let mapping = Mapping::of_file(&file, bytes, true)?;
        Ok(Self {
            mapping,
            shared: Some(file),
        })
    }

    /// Shared memory that someone else made, such as an engine's cache pool: a memfd whose size is sealed, and whose seals
    /// are sealed. All of it is mapped anew, so whoever made it may unmap it.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for an empty file, and for one whose size may change;
    /// [`kvcache_core::ErrorKind::Io`] when it cannot be mapped to be read and written.
    pub fn of_file(file: OwnedFd) -> Result<Self> {
        let sealed = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        if !sealed.contains(SIZE_SEALS | SealFlags::SEAL) {
            let text = "the file's size may change: make it with memfd_create, and seal it against shrinking, growing and \
                        other seals";
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let found = rustix::fs::fstat(&file)
            .map_err(|e| Error::io("ask how large shared memory is", e.into()))?;
        let bytes = u64::try_from(found.st_size).unwrap_or_default();
        let mapping = Mapping::of_file(&file, bytes, true)?;
        Ok(Self {
            mapping,
            shared: Some(file),
        })
    }

    /// Memory that someone else owns, such as an engine's cache pool.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `bytes` bytes until the region made of it has been
    /// deregistered and [`crate::Deregistration`] has completed (not merely until it was dropped). No
    /// Rust reference may point into the range while a transfer that names it is in flight.
    ///
    /// Its pages must not be exchanged meanwhile, by `MADV_DONTNEED` or another mapping over them: devices and the kernel
    /// go on with those that they hold, and what they read and write would not be what the program sees.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for a null address or no bytes.
    pub unsafe fn from_raw(base: *mut u8, bytes: u64) -> Result<Self> {
        // SAFETY: passed on to the caller, word for word.
        let mapping = unsafe { Mapping::lent(base, bytes)? };
        Ok(Self {
            mapping,
            shared: None,
        })
    }

    /// Its size in bytes, never zero.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.mapping.len()
    }

    /// Where it begins in this process: valid as long as the region made of it, or a list or request over it, is
    /// alive. Others may change the bytes at any time, so they must only be copied, never borrowed.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.mapping.base()
    }

    /// Whether other processes of this host can map it.
    #[must_use]
    pub fn is_shareable(&self) -> bool {
        self.shared.is_some()
    }

    /// A part of it, as someone else's memory; the test keeps both in order.
    #[cfg(test)]
    pub(crate) fn lend(&self, offset: u64, bytes: u64) -> Result<Self> {
        assert!(offset + bytes <= self.bytes(), "a part of it");
        let base = self.base().as_ptr().wrapping_add(offset as usize);
        // SAFETY: lies within this memory (checked above), which is only ever touched by raw copies, and which the test
        // keeps longer than what it registers.
        unsafe { Self::from_raw(base, bytes) }
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(crate) fn shared_file(&self) -> Option<&OwnedFd> {
        self.shared.as_ref()
    }
}

impl std::fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostMemory")
            .field("bytes", &self.bytes())
            .field("shareable", &self.is_shareable())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    //! Pages, as the file under shared memory counts them.

    use super::*;

    fn provided(memory: &HostMemory) -> u64 {
        let file = memory.shared_file().expect("shared memory");
        let found = rustix::fs::fstat(file).expect("asked");
        found.st_blocks as u64 * 512
    }

    #[test]
    fn pages_are_provided_where_they_are_asked_for_and_nowhere_else() {
        let memory = HostMemory::shared(64 << 20).expect("memory");
        memory.mapping().write(0, b"kept").expect("written");
        let before = provided(&memory);
        match memory.mapping().populate(100, 8 << 20) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return,
            populated => populated.expect("populated"),
        }
        let after = provided(&memory);
        assert!(after >= 8 << 20, "{before} to {after}");
        assert!(after < 32 << 20, "{before} to {after}");
        let mut bytes = [0; 4];
        memory.mapping().read(0, &mut bytes).expect("read");
        assert_eq!(&bytes, b"kept");
    }

    #[test]
    fn pages_outside_of_the_memory_are_refused() {
        let memory = HostMemory::shared(1 << 20).expect("memory");
        for (offset, len) in [(1 << 20, 1), (0, (1 << 20) + 1), (4096, u64::MAX)] {
            let refused = memory.mapping().populate(offset, len).expect_err("outside");
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{offset} {len}");
        }
    }

    /// By the kernel's own list of this process's memory: long memory asks for huge pages, and short memory does not.
    #[test]
    fn long_memory_asks_for_huge_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        // Neighbours of one kind are told of together.
        let holds = |line: &str, address: u64| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            let number = |text| u64::from_str_radix(text, 16).ok();
            range.is_some_and(|(from, to)| {
                number(from).is_some_and(|from| from <= address)
                    && number(to).is_some_and(|to| address < to)
            })
        };
        let asks = |memory: &HostMemory| {
            let address = memory.mapping().address();
            let list = std::fs::read_to_string("/proc/self/smaps").expect("the list");
            let own = list.lines().skip_while(|line| !holds(line, address));
            let flags = own.filter_map(|line| line.strip_prefix("VmFlags:")).next();
            flags.is_some_and(|flags| flags.split(' ').any(|flag| flag == "hg"))
        };
        let shared = |bytes| HostMemory::shared(bytes).expect("memory");
        let own = |bytes| HostMemory::anonymous(bytes).expect("memory");
        assert!(asks(&shared(4 << 20)) && asks(&own(4 << 20)));
        assert!(!asks(&shared(1 << 20)));
    }
}
