//! The inside of a region: what jobs and fabrics hold.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::gate::Gate;
use super::{MemoryKind, RegionId, RegionOptions};
use crate::backend::{Backend, Operation};
use crate::sys::cuda::DeviceMemory;
use crate::sys::memory::{HostMemory, Mapping};

/// Bytes of a [`RegionSecret`].
pub(crate) const REGION_SECRET_BYTES: usize = 12;

/// What a region's name and key are made of: 96 random bits, told to those who may use it. Short, because metadata have
/// one for each region.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RegionSecret(pub(crate) [u8; REGION_SECRET_BYTES]);

impl RegionSecret {
    fn random() -> Result<Self> {
        let mut secret = [0; REGION_SECRET_BYTES];
        getrandom::fill(&mut secret)
            .map_err(|e| Error::new(ErrorKind::Io, format!("draw a region key: {e}")))?;
        Ok(Self(secret))
    }

    /// Hashed, so that neither tells the other or the secret, and no region's tell another's.
    pub(crate) fn derive(&self) -> (RegionId, RegionKey) {
        let mut input = *b"kvfabric region ............";
        input[16..].copy_from_slice(&self.0);
        let hash = blake3::hash(&input);
        let (mut id, mut key) = ([0; 8], [0; 16]);
        id.copy_from_slice(&hash.as_bytes()[..8]);
        key.copy_from_slice(&hash.as_bytes()[8..24]);
        (RegionId(u64::from_le_bytes(id)), RegionKey(key))
    }
}

impl fmt::Debug for RegionSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegionSecret(secret)")
    }
}

/// What lets a peer reach a region: 128 bits that nobody guesses, of a [`RegionSecret`].
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

/// A place that a backend of its own reads and writes: an open file, an object's name.
///
/// The backend finds its own type back through [`Any`].
pub(crate) trait External: Any + Send + Sync {
    /// Which kind.
    fn kind(&self) -> MemoryKind;
    /// Bytes up to which descriptors are accepted now; `u64::MAX` when only the backend can tell.
    fn bytes(&self) -> u64;
    /// Whether other processes of this host can have it in reach, if it is memory.
    fn is_shareable(&self) -> bool {
        false
    }
    /// Who moves bytes to and from it.
    fn backend(&self) -> Arc<dyn Backend>;
    /// The memory of a device that it is, if it is any.
    fn device(&self) -> Option<&Arc<DeviceMemory>> {
        None
    }
}

/// What a region is made of.
pub(crate) enum Body {
    Host(HostMemory),
    External(Arc<dyn External>),
}

/// A registered place, kept alive by every request that names it.
pub(crate) struct RegionCore {
    secret: RegionSecret,
    id: RegionId,
    key: RegionKey,
    options: RegionOptions,
    body: Body,
    pub(super) gate: Gate,
}

impl RegionCore {
    pub(crate) fn new(body: Body, options: RegionOptions) -> Result<Self> {
        let secret = RegionSecret::random()?;
        let (id, key) = secret.derive();
        Ok(Self {
            secret,
            id,
            key,
            options,
            body,
            gate: Gate::default(),
        })
    }

    pub(crate) fn id(&self) -> RegionId {
        self.id
    }

    pub(crate) fn secret(&self) -> RegionSecret {
        self.secret
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

    /// The memory of a device, if it is any.
    pub(crate) fn device(&self) -> Option<&Arc<DeviceMemory>> {
        self.external()?.device()
    }

    /// Where memory of the host or of a device begins, or an error that names the region.
    pub(crate) fn address(&self) -> Result<u64> {
        match self.device() {
            Some(memory) => Ok(memory.address()),
            None => self.mapping().map(Mapping::address),
        }
    }

    /// The host memory, or an error that names the region.
    pub(crate) fn mapping(&self) -> Result<&Mapping> {
        self.host().map(HostMemory::mapping).ok_or_else(|| {
            let text = format!("region {} is no host memory but {}", self.id, self.kind());
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
