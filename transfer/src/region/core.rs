//! The inside of a region: what jobs and fabrics hold.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::gate::Gate;
use super::{MemoryKind, RegionId, RegionOptions};
use crate::backend::{Backend, Operation};
use crate::sys::memory::{HostMemory, Mapping};

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
    pub(super) gate: Gate,
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
