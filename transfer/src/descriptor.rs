//! Byte ranges of regions, checked once and used many times.

use std::collections::HashMap;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{PeerCore, PeerHandle, RemoteRegion};
use crate::region::{RegionCore, RegionId};

mod ranges;

pub(crate) use ranges::{Lookup, Range, Ranges, Run};

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

/// Byte ranges of one length at equal steps in a region: what `count` descriptors would say.
///
/// Range `n` begins at `offset + n * stride`. Steps shorter than a range overlap, which is allowed as it is for
/// descriptors; what lands where two of one request overlap is unspecified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Which region, of this agent or of the peer.
    pub region: RegionId,
    /// Bytes from the region's start to the first range.
    pub offset: u64,
    /// Bytes of each range.
    pub len: u64,
    /// Bytes from the start of one range to the start of the next.
    pub stride: u64,
    /// How many ranges.
    pub count: u32,
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

/// Checked descriptors, to be used by any number of requests. Clones share it.
///
/// It keeps its regions' memory alive, not their registration: a request over a deregistered region is refused.
#[derive(Clone)]
pub struct PreparedList(pub(crate) Arc<Prepared>);

pub(crate) struct Prepared {
    /// None: this agent's own regions.
    pub(crate) peer: Option<Arc<PeerCore>>,
    pub(crate) targets: Arc<[Target]>,
    pub(crate) ranges: Ranges,
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
        self.len() == 0
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
        find: impl FnMut(RegionId) -> Result<Target>,
    ) -> Result<Self> {
        let count = descriptors.len();
        if count > DESCRIPTORS_MAX {
            return Err(Error::invalid("descriptors", count, 0..=DESCRIPTORS_MAX));
        }
        let mut table = Table::new(find);
        let mut ranges = Ranges::with_capacity(count);
        for (position, descriptor) in descriptors.enumerate() {
            let Descriptor {
                region,
                offset,
                len,
            } = descriptor;
            let (target, size) = table.position(region).map_err(|e| e.at(place(position)))?;
            let end = offset.checked_add(len);
            if len == 0 || end.is_none_or(|end| end > size) {
                return Err(bad_range(region, offset, len, size).at(place(position)));
            }
            table.count(len)?;
            let range = Range {
                target,
                offset,
                len,
            };
            ranges.push(range, count);
        }
        Ok(table.finish(peer, ranges))
    }

    /// As [`PreparedList::build`], for descriptors at equal steps.
    pub(crate) fn build_strided(
        peer: Option<Arc<PeerCore>>,
        strided: &[Strided],
        find: impl FnMut(RegionId) -> Result<Target>,
    ) -> Result<Self> {
        let mut table = Table::new(find);
        let mut runs = Vec::with_capacity(strided.len().min(DESCRIPTORS_MAX));
        let mut start = 0_u32;
        for (position, entry) in strided.iter().enumerate() {
            let (target, size) = table
                .position(entry.region)
                .map_err(|e| e.at(place(position)))?;
            check_strided(entry, size).map_err(|e| e.at(place(position)))?;
            let next = start.saturating_add(entry.count);
            if next as usize > DESCRIPTORS_MAX {
                let text = format!("{DESCRIPTORS_MAX} in all");
                return Err(Error::invalid("count", entry.count, text).at(place(position)));
            }
            // Ranges may overlap, so together they may be more than a region holds.
            table.count(entry.len.saturating_mul(u64::from(entry.count)))?;
            runs.push(Run {
                start,
                count: entry.count,
                first: Range {
                    target,
                    offset: entry.offset,
                    len: entry.len,
                },
                stride: entry.stride,
            });
            start = next;
        }
        Ok(table.finish(peer, Ranges::Runs(runs)))
    }
}

/// The regions that a list names, and what is counted on the way through it.
struct Table<F> {
    find: F,
    targets: Vec<(Target, u64)>,
    positions: HashMap<RegionId, u32>,
    last: Option<(RegionId, u32)>,
    bytes: u64,
}

impl<F: FnMut(RegionId) -> Result<Target>> Table<F> {
    fn new(find: F) -> Self {
        Self {
            find,
            targets: Vec::new(),
            positions: HashMap::new(),
            last: None,
            bytes: 0,
        }
    }

    /// A region's place in the table, and its bytes.
    fn position(&mut self, region: RegionId) -> Result<(u32, u64)> {
        // Lists mostly stay in one region, so the table is asked only when it changes.
        let target = match self.last {
            Some((id, target)) if id == region => target,
            _ => match self.positions.get(&region) {
                Some(&target) => target,
                None => {
                    let found = (self.find)(region)?;
                    let target = self.targets.len() as u32;
                    let size = found.bytes();
                    self.targets.push((found, size));
                    self.positions.insert(region, target);
                    target
                }
            },
        };
        self.last = Some((region, target));
        Ok((target, self.targets[target as usize].1))
    }

    fn count(&mut self, bytes: u64) -> Result<()> {
        self.bytes = self
            .bytes
            .checked_add(bytes)
            .ok_or_else(|| Error::invalid("bytes of all descriptors", "too many", 0..=u64::MAX))?;
        Ok(())
    }

    fn finish(self, peer: Option<Arc<PeerCore>>, ranges: Ranges) -> PreparedList {
        let targets = self.targets.into_iter().map(|(target, _)| target);
        PreparedList(Arc::new(Prepared {
            peer,
            targets: targets.collect(),
            ranges,
            bytes: self.bytes,
        }))
    }
}

fn place(position: usize) -> String {
    format!("descriptor {position}")
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

fn bad_range(region: RegionId, offset: u64, len: u64, size: u64) -> Error {
    let text = if len == 0 {
        format!("no bytes (region {region}, offset {offset})")
    } else {
        format!("bytes {offset}+{len} lie outside region {region} of {size} bytes")
    };
    Error::new(ErrorKind::Invalid, text)
}

/// All of its ranges lie in a region of `size` bytes if the first and the last do.
fn check_strided(entry: &Strided, size: u64) -> Result<()> {
    let Strided {
        region,
        offset,
        len,
        stride,
        count,
    } = *entry;
    let Some(steps) = count.checked_sub(1) else {
        return Err(Error::invalid("count", count, 1..=DESCRIPTORS_MAX));
    };
    let end = stride
        .checked_mul(u64::from(steps))
        .and_then(|way| way.checked_add(offset))
        .and_then(|last| last.checked_add(len));
    if len == 0 || end.is_none_or(|end| end > size) {
        let text = format!(
            "{count} ranges of {len} bytes, every {stride} from {offset} on, in region {region} of {size} bytes"
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(())
}
