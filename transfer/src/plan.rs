//! What a request moves: pairs of ranges, neighbours merged.

use std::collections::HashMap;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::RemoteRegion;
use crate::backend::Operation;
use crate::descriptor::{Cursor, PreparedList, Range, Target};

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
        }
    }

    /// Nothing to move, and these regions of a peer: asks which way reaches them.
    pub(crate) fn touching(regions: impl IntoIterator<Item = Arc<RemoteRegion>>) -> Self {
        Self {
            remote: regions.into_iter().map(Target::Remote).collect(),
            ..Self::empty()
        }
    }

    /// Pairs descriptors in order: all of both lists, or those at `positions`. `parts` says how many pairs each part has;
    /// the second value is where each of them ends, in extents.
    pub(crate) fn pair(
        operation: Operation,
        local: &PreparedList,
        remote: &PreparedList,
        positions: Option<&(Vec<u32>, Vec<u32>)>,
        parts: &[u32],
    ) -> Result<(Self, Vec<usize>)> {
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
        let mut part_ends = part_ends(parts, count)?.into_iter().peekable();
        let mut builder = Builder {
            extents: Vec::with_capacity(count),
            ends: Vec::with_capacity(parts.len()),
            bytes: 0,
        };
        let (mut at, mut remote_at) = (local.ranges.cursor(), remote.ranges.cursor());
        for position in 0..count {
            let (own, other) = match positions {
                None => (position as u32, position as u32),
                Some((locals, remotes)) => (locals[position], remotes[position]),
            };
            let own = range_at(&mut at, own, local.ranges.len(), "local")?;
            let other = range_at(&mut remote_at, other, remote.ranges.len(), "remote")?;
            builder.push(position, &own, &other)?;
            if part_ends.next_if_eq(&(position + 1)).is_some() {
                builder.ends.push(builder.extents.len());
            }
        }
        if parts.is_empty() {
            builder.ends.push(builder.extents.len());
        }
        let plan = Self {
            operation,
            local: local.targets.clone(),
            remote: remote.targets.clone(),
            extents: builder.extents,
            bytes: builder.bytes,
            descriptors: count as u32,
        };
        Ok((plan, builder.ends))
    }

    /// The same move for some extents of this plan, or parts of them: names no region that they don't.
    pub(crate) fn with(&self, mut extents: Vec<Extent>) -> Self {
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

fn range_at(list: &mut Cursor<'_>, position: u32, count: usize, side: &str) -> Result<Range> {
    list.at(position)
        .ok_or_else(|| Error::invalid(&format!("{side} position"), position, 0..count))
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

/// Where parts end, counted in pairs.
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
    if !parts.is_empty() && end != pairs {
        let text = format!("the parts have {end} pairs together, the request has {pairs}");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(ends)
}

struct Builder {
    extents: Vec<Extent>,
    /// Where parts end; what follows is not merged with what was before.
    ends: Vec<usize>,
    bytes: u64,
}

impl Builder {
    fn push(&mut self, position: usize, local: &Range, remote: &Range) -> Result<()> {
        if local.len != remote.len {
            let text = format!(
                "pair {position}: {} local bytes against {} remote ones",
                local.len, remote.len
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        self.bytes = self
            .bytes
            .checked_add(local.len)
            .ok_or_else(|| Error::invalid("bytes of a request", "too many", 0..=u64::MAX))?;
        let begins = self.ends.last() == Some(&self.extents.len());
        if let Some(last) = self.extents.last_mut()
            && !begins
            && last.local == local.target
            && last.remote == remote.target
            && last.local_offset + last.len == local.offset
            && last.remote_offset + last.len == remote.offset
        {
            last.len += local.len;
            return Ok(());
        }
        self.extents.push(Extent {
            local: local.target,
            remote: remote.target,
            local_offset: local.offset,
            remote_offset: remote.offset,
            len: local.len,
        });
        Ok(())
    }
}
