//! Byte ranges of regions, checked once and used many times.

use std::collections::HashMap;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{PeerCore, PeerHandle, RemoteRegion};
use crate::region::{RegionCore, RegionId};

/// The most descriptors that one list may have.
pub const DESCRIPTORS_MAX: usize = 1 << 20;

/// A byte range of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Which region, of this agent or of the peer.
    pub region: RegionId,
    /// Bytes from the region's start.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// Whose regions a list of descriptors names.
#[derive(Clone, Copy, Debug)]
pub enum Side<'a> {
    /// This agent's.
    Local,
    /// A peer's, as its metadata exported them.
    Peer(&'a PeerHandle),
}

/// A region that an extent names.
#[derive(Clone)]
pub(crate) enum Target {
    /// One of this agent.
    Local(Arc<RegionCore>),
    /// One that a peer exported.
    Remote(Arc<RemoteRegion>),
}

impl Target {
    fn bytes(&self) -> u64 {
        match self {
            Self::Local(region) => region.bytes(),
            Self::Remote(region) => region.bytes,
        }
    }
}

/// A checked descriptor: its region by position in the list's table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) target: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Checked descriptors, to be used by any number of requests. Clones share it.
///
/// It keeps its regions' memory alive, not their registration: a request over a deregistered region is refused.
#[derive(Clone)]
pub struct PreparedList(pub(crate) Arc<Prepared>);

pub(crate) struct Prepared {
    /// None: this agent's own regions.
    pub(crate) peer: Option<Arc<PeerCore>>,
    pub(crate) targets: Arc<[Target]>,
    pub(crate) ranges: Vec<Range>,
    pub(crate) bytes: u64,
}

impl PreparedList {
    /// How many descriptors it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.ranges.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.ranges.is_empty()
    }

    /// Bytes of all descriptors together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Checks `descriptors` against the regions that `find` knows.
    pub(crate) fn build(
        peer: Option<Arc<PeerCore>>,
        descriptors: impl ExactSizeIterator<Item = Descriptor>,
        mut find: impl FnMut(RegionId) -> Result<Target>,
    ) -> Result<Self> {
        let count = descriptors.len();
        if count > DESCRIPTORS_MAX {
            return Err(Error::invalid("descriptors", count, 0..=DESCRIPTORS_MAX));
        }
        let mut targets: Vec<(Target, u64)> = Vec::new();
        let mut positions: HashMap<RegionId, u32> = HashMap::new();
        let mut last = None;
        let mut bytes = 0_u64;
        let mut ranges = Vec::with_capacity(count);
        for (
            position,
            Descriptor {
                region,
                offset,
                len,
            },
        ) in descriptors.enumerate()
        {
            // Lists mostly stay in one region, so the table is asked only when it changes.
            let target = match last {
                Some((id, target)) if id == region => target,
                _ => match positions.get(&region) {
                    Some(&target) => target,
                    None => {
                        let found =
                            find(region).map_err(|e| e.at(format!("descriptor {position}")))?;
                        let target = targets.len() as u32;
                        let size = found.bytes();
                        targets.push((found, size));
                        positions.insert(region, target);
                        target
                    }
                },
            };
            last = Some((region, target));
            let size = targets[target as usize].1;
            let end = offset.checked_add(len);
            if len == 0 || end.is_none_or(|end| end > size) {
                return Err(bad_range(position, region, offset, len, size));
            }
            bytes = bytes.checked_add(len).ok_or_else(|| {
                Error::invalid("bytes of all descriptors", "too many", 0..=u64::MAX)
            })?;
            ranges.push(Range {
                target,
                offset,
                len,
            });
        }
        let targets = targets.into_iter().map(|(target, _)| target).collect();
        Ok(Self(Arc::new(Prepared {
            peer,
            targets,
            ranges,
            bytes,
        })))
    }
}

impl std::fmt::Debug for PreparedList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedList")
            .field(
                "peer",
                &self.0.peer.as_ref().map(|peer| peer.name().to_owned()),
            )
            .field("descriptors", &self.len())
            .field("bytes", &self.bytes())
            .finish()
    }
}

fn bad_range(position: usize, region: RegionId, offset: u64, len: u64, size: u64) -> Error {
    let text = if len == 0 {
        format!("descriptor {position}: no bytes (region {region}, offset {offset})")
    } else {
        format!(
            "descriptor {position}: bytes {offset}+{len} lie outside region {region} of {size} bytes"
        )
    };
    Error::new(ErrorKind::Invalid, text)
}
