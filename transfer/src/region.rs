//! Registered places: host memory, device memory, files, objects.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::Exports;
use crate::sys::memory::Mapping;

mod core;
mod gate;

pub(crate) use self::core::{
    Body, External, REGION_SECRET_BYTES, RegionCore, RegionKey, RegionSecret, RegionUse,
};

/// Names a region; as good as random, so that a stale name meets nothing rather than the wrong memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What kind of place a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Host DRAM.
    Host,
    /// Memory of a CUDA device, by its number in this process.
    Device {
        /// The device's number, counted from 0.
        ordinal: u32,
    },
    /// A file.
    File,
    /// An object in a store.
    Object,
}

impl MemoryKind {
    /// Stands for all devices in lists of kinds.
    pub(crate) const ANY_DEVICE: Self = Self::Device { ordinal: 0 };

    /// Whether a list of kinds has this one.
    pub(crate) fn is_among(self, kinds: &[Self]) -> bool {
        let same = |kind: &Self| std::mem::discriminant(kind) == std::mem::discriminant(&self);
        kinds.iter().any(same)
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host memory"),
            Self::Device { ordinal } => write!(f, "memory of CUDA device {ordinal}"),
            Self::File => f.write_str("a file"),
            Self::Object => f.write_str("an object"),
        }
    }
}

/// What peers may do with a region; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionOptions {
    /// Peers that know the key may read.
    pub remote_read: bool,
    /// Peers that know the key may write.
    pub remote_write: bool,
}

/// A registered region. Clones are handles to the same one.
///
/// Dropping the last handle deregisters it, without telling when: requests in flight keep its memory. For memory
/// made with [`HostMemory::from_raw`](crate::HostMemory::from_raw) call [`Region::deregister`] and wait.
#[derive(Clone)]
pub struct Region(Arc<Registration>);

struct Registration {
    core: Arc<RegionCore>,
    exports: Weak<Exports>,
}

impl Registration {
    fn close(&self) {
        // Held meanwhile, so that nobody takes the region for drained before peers' uses are counted.
        self.core.gate.hold();
        if self.core.gate.close()
            && let Some(exports) = self.exports.upgrade()
        {
            exports.withdraw(&self.core);
        }
        self.core.gate.leave();
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.close();
    }
}

impl Region {
    pub(crate) fn new(core: Arc<RegionCore>, exports: &Arc<Exports>) -> Self {
        Self(Arc::new(Registration {
            core,
            exports: Arc::downgrade(exports),
        }))
    }

    pub(crate) fn core(&self) -> &Arc<RegionCore> {
        &self.0.core
    }

    /// Its name in descriptors.
    #[must_use]
    pub fn id(&self) -> RegionId {
        self.0.core.id()
    }

    /// What kind of place it is.
    #[must_use]
    pub fn kind(&self) -> MemoryKind {
        self.0.core.kind()
    }

    /// Its size in bytes; `u64::MAX` for an object whose size only the store knows.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.core.bytes()
    }

    /// A descriptor of `len` bytes at `offset`; not checked before it is prepared.
    #[must_use]
    pub fn descriptor(&self, offset: u64, len: u64) -> crate::Descriptor {
        crate::Descriptor {
            region: self.id(),
            offset,
            len,
        }
    }

    fn open_mapping(&self) -> Result<&Mapping> {
        if self.0.core.gate.is_closed() {
            let text = format!("region {} is deregistered", self.id());
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        self.0.core.mapping()
    }

    /// Copies `bytes` into host memory at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] outside the region, [`ErrorKind::Unsupported`] when it is no host memory,
    /// [`ErrorKind::NotFound`] after deregistration.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.write(offset, bytes)
    }

    /// Copies host memory from `offset` on into `bytes`.
    ///
    /// # Errors
    /// As [`Region::write_at`].
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.read(offset, bytes)
    }

    /// Sets `len` bytes of host memory to `value`.
    ///
    /// # Errors
    /// As [`Region::write_at`].
    pub fn fill_at(&self, offset: u64, len: u64, value: u8) -> Result<()> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.fill(offset, len, value)
    }

    /// Takes the pages of `len` bytes of host memory at `offset` from the kernel now, so that the first copy into them does
    /// not wait for each; their content stays.
    ///
    /// # Errors
    /// As [`Region::write_at`]; [`ErrorKind::Unsupported`] also for memory made with
    /// [`HostMemory::from_raw`](crate::HostMemory::from_raw) and on Linux before 5.14, [`ErrorKind::Io`] when there is no
    /// memory left.
    pub fn populate(&self, offset: u64, len: u64) -> Result<()> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.populate(offset, len)
    }

    /// The CRC-32C of `len` bytes of host memory.
    ///
    /// # Errors
    /// As [`Region::write_at`].
    pub fn checksum(&self, offset: u64, len: u64) -> Result<u32> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.crc32c(offset, len)
    }

    /// Reads the word at `offset` (a multiple of 8) that peers may change; what its writer wrote before is visible.
    ///
    /// # Errors
    /// As [`Region::write_at`]; [`ErrorKind::Invalid`] also for an unaligned offset.
    pub fn load_u64(&self, offset: u64) -> Result<u64> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.load_u64(offset)
    }

    /// Writes the word at `offset` (a multiple of 8) after everything written before.
    ///
    /// # Errors
    /// As [`Region::load_u64`].
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<()> {
        let _user = RegionUse::begin(self.0.core.clone())?;
        self.open_mapping()?.store_u64(offset, value)
    }

    /// Refuses new requests at once, revokes the key, and returns what tells when none is in flight any more: only
    /// then may memory lent with [`HostMemory::from_raw`](crate::HostMemory::from_raw) be freed.
    pub fn deregister(&self) -> Deregistration {
        self.0.close();
        self.when_deregistered()
    }

    /// What tells when it is deregistered and nothing of it is in flight.
    pub(crate) fn when_deregistered(&self) -> Deregistration {
        Deregistration {
            core: self.0.core.clone(),
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("id", &self.id())
            .field("kind", &self.kind())
            .field("bytes", &self.bytes())
            .finish()
    }
}

/// Completes when nothing uses a deregistered region any more. A future, or waited for with a deadline.
#[must_use = "the memory may be freed only after this completes"]
pub struct Deregistration {
    core: Arc<RegionCore>,
}

impl Deregistration {
    /// Waits at most `timeout`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when something is still in flight: the memory must be kept. Waiting again is fine.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        if self.core.gate.wait(timeout) {
            return Ok(());
        }
        let id = self.core.id();
        let text = match self.core.is_closed() {
            true => format!("region {id} has work in flight after {timeout:?}"),
            false => format!("other ranges of region {id} are registered after {timeout:?}"),
        };
        Err(Error::new(ErrorKind::Busy, text))
    }
}

impl Future for Deregistration {
    type Output = ();

    fn poll(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<()> {
        if self.core.gate.poll(context.waker()) {
            return std::task::Poll::Ready(());
        }
        std::task::Poll::Pending
    }
}
