//! Registered places: host memory, files, objects.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::Exports;
use crate::backend::{Backend, Operation};
use crate::sys::memory::{HostMemory, Mapping};

/// Names a region; random, so that a stale name meets nothing rather than the wrong memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// What lets a peer reach a region: 128 random bits.
#[derive(Clone, Copy)]
pub(crate) struct RegionKey(pub(crate) [u8; 16]);

impl RegionKey {
    /// Compares in time that does not depend on where the first difference is.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        let differences = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0, |all, (a, b)| all | (a ^ b));
        differences == 0
    }
}

impl fmt::Debug for RegionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegionKey(secret)")
    }
}

/// What kind of place a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Host DRAM.
    Host,
    /// A file.
    File,
    /// An object in a store.
    Object,
}

/// What peers may do with a region; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionOptions {
    /// Peers that know the key may read.
    pub remote_read: bool,
    /// Peers that know the key may write.
    pub remote_write: bool,
}

/// A place that a backend of its own reads and writes: an open file, an object's name.
///
/// The backend finds its own type back through [`Any`].
pub(crate) trait External: Any + Send + Sync {
    /// Which kind.
    fn kind(&self) -> MemoryKind;
    /// Bytes up to which descriptors are accepted now; `u64::MAX` when only the backend can tell.
    fn bytes(&self) -> u64;
    /// Who moves bytes to and from it.
    fn backend(&self) -> Arc<dyn Backend>;
}

/// What a region is made of.
pub(crate) enum Body {
    Host(HostMemory),
    External(Arc<dyn External>),
}

/// A registered place, kept alive by every request that names it.
pub(crate) struct RegionCore {
    id: RegionId,
    key: RegionKey,
    options: RegionOptions,
    body: Body,
    gate: Gate,
}

impl RegionCore {
    pub(crate) fn new(body: Body, options: RegionOptions) -> Result<Self> {
        let mut random = [0; 24];
        getrandom::fill(&mut random)
            .map_err(|e| Error::new(ErrorKind::Io, format!("draw a region key: {e}")))?;
        let (mut id, mut key) = ([0; 8], [0; 16]);
        id.copy_from_slice(&random[..8]);
        key.copy_from_slice(&random[8..]);
        Ok(Self {
            id: RegionId(u64::from_le_bytes(id)),
            key: RegionKey(key),
            options,
            body,
            gate: Gate::default(),
        })
    }

    pub(crate) fn id(&self) -> RegionId {
        self.id
    }

    pub(crate) fn key(&self) -> RegionKey {
        self.key
    }

    pub(crate) fn options(&self) -> RegionOptions {
        self.options
    }

    pub(crate) fn kind(&self) -> MemoryKind {
        match &self.body {
            Body::Host(_) => MemoryKind::Host,
            Body::External(external) => external.kind(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        match &self.body {
            Body::Host(memory) => memory.bytes(),
            Body::External(external) => external.bytes(),
        }
    }

    pub(crate) fn host(&self) -> Option<&HostMemory> {
        match &self.body {
            Body::Host(memory) => Some(memory),
            Body::External(_) => None,
        }
    }

    pub(crate) fn external(&self) -> Option<&Arc<dyn External>> {
        match &self.body {
            Body::Host(_) => None,
            Body::External(external) => Some(external),
        }
    }

    /// The host memory, or an error that names the region.
    pub(crate) fn mapping(&self) -> Result<&Mapping> {
        self.host().map(HostMemory::mapping).ok_or_else(|| {
            let text = format!("region {} is no host memory but {:?}", self.id, self.kind());
            Error::new(ErrorKind::Unsupported, text)
        })
    }

    /// Whether peers may do this.
    pub(crate) fn allows(&self, operation: Operation) -> bool {
        match operation {
            Operation::Read => self.options.remote_read,
            Operation::Write => self.options.remote_write,
        }
    }

    /// Counts one more user; refused once the region is being deregistered.
    pub(crate) fn enter(&self) -> Result<()> {
        if self.gate.enter() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotFound,
            format!("region {} is deregistered", self.id),
        ))
    }

    /// Whether it is being deregistered.
    pub(crate) fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Counts one user less.
    pub(crate) fn leave(&self) {
        self.gate.leave();
    }

    /// Counts one more user while the region is being deregistered, for as long as a peer may still use it.
    pub(crate) fn hold(&self) {
        self.gate.hold();
    }
}

/// Keeps a region from being given back while someone uses it. Ends the use when dropped.
pub(crate) struct RegionUse(Arc<RegionCore>);

impl RegionUse {
    pub(crate) fn begin(region: Arc<RegionCore>) -> Result<Self> {
        region.enter()?;
        Ok(Self(region))
    }

    pub(crate) fn region(&self) -> &Arc<RegionCore> {
        &self.0
    }
}

impl Drop for RegionUse {
    fn drop(&mut self) {
        self.0.leave();
    }
}

const CLOSED: u64 = 1 << 63;

/// Counts users, and tells when the last has left after closing.
#[derive(Default)]
struct Gate {
    users: AtomicU64,
    waiting: Mutex<Vec<Waker>>,
    emptied: Condvar,
}

impl Gate {
    fn enter(&self) -> bool {
        if self.users.fetch_add(1, Ordering::AcqRel) & CLOSED == 0 {
            return true;
        }
        self.leave();
        false
    }

    /// Counts a user even when closed: for one who must end something first.
    fn hold(&self) {
        self.users.fetch_add(1, Ordering::AcqRel);
    }

    fn leave(&self) {
        let before = self.users.fetch_sub(1, Ordering::AcqRel);
        assert!(
            before & !CLOSED > 0,
            "a region was left more often than entered"
        );
        if before == CLOSED | 1 {
            self.wake();
        }
    }

    fn wake(&self) {
        let wakers = std::mem::take(&mut *self.wakers());
        self.emptied.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn wakers(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses everyone from now on. Whether this call closed it.
    fn close(&self) -> bool {
        self.users.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    fn is_closed(&self) -> bool {
        self.users.load(Ordering::Acquire) & CLOSED != 0
    }

    fn is_drained(&self) -> bool {
        self.users.load(Ordering::Acquire) == CLOSED
    }

    fn wait(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut guard = self.wakers();
        while !self.is_drained() {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return false;
            };
            guard = match self.emptied.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    fn poll(&self, waker: &Waker) -> bool {
        let mut wakers = self.wakers();
        if self.is_drained() {
            return true;
        }
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            wakers.push(waker.clone());
        }
        false
    }
}

/// A registered region. Clones are handles to the same one.
///
/// Dropping the last handle deregisters it, without telling when: requests in flight keep its memory. For memory
/// made with [`HostMemory::from_raw`] call [`Region::deregister`] and wait.
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
        self.0.core.id
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
    /// then may memory lent with [`HostMemory::from_raw`] be freed.
    pub fn deregister(&self) -> Deregistration {
        self.0.close();
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
        let text = format!(
            "region {} has work in flight after {timeout:?}",
            self.core.id
        );
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
