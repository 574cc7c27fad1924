//! What a request moves: pairs of ranges, neighbours merged.

use std::collections::HashMap;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::RemoteRegion;
use crate::backend::Operation;
use crate::descriptor::{Lookup, PreparedList, Range, Ranges, Target};

mod sums;

pub(crate) use sums::{SUM_BYTES, SUM_BYTES_MAX};

/// The most parts that a request may have.
pub const PARTS_MAX: usize = 4096;

/// Bytes to move between one local and one remote range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Position in [`Plan::local`].
    pub(crate) local: u32,
    /// Position in [`Plan::remote`].
    pub(crate) remote: u32,
    /// Bytes from the local region's start.
    pub(crate) local_offset: u64,
    /// Bytes from the remote region's start.
    pub(crate) remote_offset: u64,
    /// How many bytes; never 0.
    pub(crate) len: u64,
}

/// What a request moves. Keeps the regions of both sides alive.
pub(crate) struct Plan {
    pub(crate) operation: Operation,
    /// The regions of this agent that hold the local side: always [`Target::Local`].
    pub(crate) local: Arc<[Target]>,
    /// The other side's: a peer's regions, or own files, objects or memory.
    pub(crate) remote: Arc<[Target]>,
    /// In the order of the descriptors; adjacent ones on both sides are one extent.
    pub(crate) extents: Vec<Extent>,
    pub(crate) bytes: u64,
    /// Pairs of descriptors that it was made of.
    pub(crate) descriptors: u32,
    /// Backends that may move it; all if there are none.
    pub(crate) ways: Arc<[String]>,
    /// If it is checked: which pair each extent is of. Neighbours are not merged then.
    pub(crate) pairs: Vec<u32>,
    /// Not the remote bytes are to be moved: of each extent their CRC-32C, to four local bytes, little-endian.
    pub(crate) sums: bool,
}

/// How lists are paired.
#[derive(Clone, Copy, Default)]
pub(crate) struct PairOptions<'a> {
    /// Which ranges of both; none: all, in order.
    pub(crate) positions: Option<&'a (Vec<u32>, Vec<u32>)>,
    /// How many pairs each part has; none: one part.
    pub(crate) parts: &'a [u32],
    /// Whether what arrives is checked.
    pub(crate) checked: bool,
}

impl Plan {
    /// Nothing to move: carries a notification.
    pub(crate) fn empty() -> Self {
        let none: Arc<[Target]> = Arc::from([]);
        Self {
            operation: Operation::Write,
            local: none.clone(),
            remote: none,
            extents: Vec::new(),
            bytes: 0,
            descriptors: 0,
            ways: Arc::from([]),
            pairs: Vec::new(),
            sums: false,
        }
    }

    /// Whether what arrives is checked.
    pub(crate) fn is_checked(&self) -> bool {
        !self.pairs.is_empty()
    }

    /// Whether a backend may move it.
    pub(crate) fn wants(&self, backend: &str) -> bool {
        self.ways.is_empty() || self.ways.iter().any(|way| way == backend)
    }

    /// Nothing to move, and these regions of a peer: asks which way reaches them.
    pub(crate) fn touching(regions: impl IntoIterator<Item = Arc<RemoteRegion>>) -> Self {
        Self {
            remote: regions.into_iter().map(Target::Remote).collect(),
            ..Self::empty()
        }
    }

    /// Pairs descriptors in order. The second value is where each part ends, in extents.
    pub(crate) fn pair(
        operation: Operation,
        local: &PreparedList,
        remote: &PreparedList,
        options: PairOptions<'_>,
    ) -> Result<(Self, Vec<usize>)> {
        let positions = options.positions;
        let (local, remote) = (&*local.0, &*remote.0);
        let (count, remote_count) = match positions {
            None => (local.ranges.len(), remote.ranges.len()),
            Some((locals, remotes)) => (locals.len(), remotes.len()),
        };
        if count != remote_count {
            let text =
                format!("{count} local descriptors are paired with {remote_count} remote ones");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let pairing = Pairing {
            positions,
            part_ends: part_ends(options.parts, count)?,
            merges: !options.checked,
            counts: [local.ranges.len(), remote.ranges.len()],
        };
        let paired = match (&local.ranges, &remote.ranges) {
            (Ranges::Uniform(local), Ranges::Uniform(remote)) => pairing.pair(local, remote),
            (local, remote) => pairing.pair(local.cursor(), remote.cursor()),
        }?;
        let plan = Self {
            operation,
            local: local.targets.clone(),
            remote: remote.targets.clone(),
            extents: paired.extents,
            bytes: paired.bytes,
            descriptors: count as u32,
            pairs: match options.checked {
                true => (0..count as u32).collect(),
                false => Vec::new(),
            },
            ..Self::empty()
        };
        Ok((plan, paired.ends))
    }

    /// The same move for some extents of this plan, or parts of them: names no region that they don't.
    pub(crate) fn with(&self, mut extents: Vec<Extent>, pairs: Vec<u32>) -> Self {
        let (mut local, mut remote) = (Used::new(&self.local), Used::new(&self.remote));
        for extent in &mut extents {
            extent.local = local.position(extent.local);
            extent.remote = remote.position(extent.remote);
        }
        Self {
            operation: self.operation,
            local: local.targets.into(),
            remote: remote.targets.into(),
            bytes: extents.iter().map(|extent| extent.len).sum(),
            descriptors: extents.len() as u32,
            extents,
            ways: self.ways.clone(),
            pairs,
            sums: false,
        }
    }

    /// Counts the transfer as a user of every region of this agent that it names.
    pub(crate) fn enter(&self) -> Result<()> {
        for (position, region) in self.own_regions().enumerate() {
            if let Err(error) = region.enter() {
                self.own_regions()
                    .take(position)
                    .for_each(|entered| entered.leave());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes [`Plan::enter`] back.
    pub(crate) fn leave(&self) {
        self.own_regions().for_each(|region| region.leave());
    }

    fn own_regions(&self) -> impl Iterator<Item = &crate::region::RegionCore> {
        self.local
            .iter()
            .chain(self.remote.iter())
            .filter_map(|target| match target {
                Target::Local(region) => Some(&**region),
                Target::Remote(_) => None,
            })
    }
}

/// The regions of a plan that a part of it names.
struct Used<'a> {
    all: &'a [Target],
    positions: HashMap<u32, u32>,
    targets: Vec<Target>,
}

impl<'a> Used<'a> {
    fn new(all: &'a [Target]) -> Self {
        Self {
            all,
            positions: HashMap::new(),
            targets: Vec::new(),
        }
    }

    fn position(&mut self, target: u32) -> u32 {
        *self.positions.entry(target).or_insert_with(|| {
            self.targets.push(self.all[target as usize].clone());
            (self.targets.len() - 1) as u32
        })
    }
}

/// Where parts end, counted in pairs; all pairs are one part if there are none.
fn part_ends(parts: &[u32], pairs: usize) -> Result<Vec<usize>> {
    if parts.len() > PARTS_MAX {
        return Err(Error::invalid("parts", parts.len(), 0..=PARTS_MAX));
    }
    let mut end = 0_usize;
    let mut ends = Vec::with_capacity(parts.len());
    for (number, &count) in parts.iter().enumerate() {
        end += count as usize;
        if count == 0 {
            let text = format!("part {number} has no pairs");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        ends.push(end);
    }
    if parts.is_empty() {
        return Ok(vec![pairs]);
    }
    if end != pairs {
        let text = format!("the parts have {end} pairs together, the request has {pairs}");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(ends)
}

/// How two lists are paired.
struct Pairing<'a> {
    /// Which ranges of both; none: all, in order.
    positions: Option<&'a (Vec<u32>, Vec<u32>)>,
    /// Where the parts end, in pairs; the last is where all end.
    part_ends: Vec<usize>,
    /// Whether neighbours become one extent.
    merges: bool,
    /// How many ranges the lists have, the local one's first.
    counts: [usize; 2],
}

struct Paired {
    extents: Vec<Extent>,
    /// Where parts end, in extents; what follows is not merged with what was before.
    ends: Vec<usize>,
    bytes: u64,
}

impl Pairing<'_> {
    /// Made for each kind of list by itself: there may be a million ranges.
    fn pair(&self, mut local: impl Lookup, mut remote: impl Lookup) -> Result<Paired> {
        let count = self.part_ends.last().copied().unwrap_or(0);
        let mut paired = Paired {
            extents: Vec::with_capacity(count),
            ends: Vec::with_capacity(self.part_ends.len()),
            bytes: 0,
        };
        let mut start = 0;
        for &end in &self.part_ends {
            let mut open: Option<Extent> = None;
            for position in start..end {
                let (own, other) = match self.positions {
                    None => (position as u32, position as u32),
                    Some((locals, remotes)) => (locals[position], remotes[position]),
                };
                let (Some(own), Some(other)) = (local.at(own), remote.at(other)) else {
                    return Err(self.missing((own, local.at(own)), other));
                };
                if own.len != other.len {
                    return Err(unequal(position, own.len, other.len));
                }
                paired.bytes = paired.bytes.checked_add(own.len).ok_or_else(too_much)?;
                if let Some(last) = &mut open {
                    if self.merges && last.continues(&own, &other) {
                        last.len += own.len;
                        continue;
                    }
                    paired.extents.push(*last);
                }
                open = Some(Extent::of(&own, &other));
            }
            paired.extents.extend(open);
            paired.ends.push(paired.extents.len());
            start = end;
        }
        Ok(paired)
    }

    #[cold]
    fn missing(&self, (own, found): (u32, Option<Range>), other: u32) -> Error {
        let [local, remote] = self.counts;
        match found {
            None => Error::invalid("local position", own, 0..local),
            Some(_) => Error::invalid("remote position", other, 0..remote),
        }
    }
}

impl Extent {
    fn of(local: &Range, remote: &Range) -> Self {
        Self {
            local: local.target,
            remote: remote.target,
            local_offset: local.offset,
            remote_offset: remote.offset,
            len: local.len,
        }
    }

    /// Whether both sides go on where this ends.
    fn continues(&self, local: &Range, remote: &Range) -> bool {
        self.local_offset + self.len == local.offset
            && self.remote_offset + self.len == remote.offset
            && self.local == local.target
            && self.remote == remote.target
    }
}

#[cold]
fn unequal(position: usize, local: u64, remote: u64) -> Error {
    let text = format!("pair {position}: {local} local bytes against {remote} remote ones");
    Error::new(ErrorKind::Invalid, text)
}

#[cold]
fn too_much() -> Error {
    Error::invalid("bytes of a request", "too many", 0..=u64::MAX)
}

#[cfg(test)]
mod tests;
