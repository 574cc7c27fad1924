//! Memory of others that is registered by ranges: one registration serves all ranges within it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvcache_core::Result;

use super::{Agent, AgentCore};
use crate::descriptor::Descriptor;
use crate::region::{Deregistration, Region, RegionOptions};
use crate::sys::memory::HostMemory;

/// The ranges that an agent has registered with [`Agent::register_range`].
#[derive(Default)]
pub(super) struct Ranges(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// By their first address, and the number of their registration.
    all: BTreeMap<(u64, u64), Entry>,
    next: u64,
    /// The longest that there ever was: how far before an address a range may begin that reaches it.
    longest: u64,
}

struct Entry {
    end: u64,
    options: RegionOptions,
    region: Region,
    /// How many hold it.
    holders: u64,
}

impl Ranges {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many registrations there are, for all ranges together.
    #[cfg(test)]
    fn registrations(&self) -> usize {
        self.lock().all.len()
    }
}

impl Known {
    /// A registration that all of a range lies in.
    fn around(&self, start: u64, end: u64, options: RegionOptions) -> Option<(u64, u64)> {
        let first = start.saturating_sub(self.longest);
        let candidates = self.all.range((first, 0)..=(start, u64::MAX)).rev();
        // Whoever holds a range may have deregistered its region by itself.
        let serves = |entry: &Entry| {
            entry.options == options && entry.end >= end && !entry.region.core().is_closed()
        };
        let mut found = candidates.filter(|(_, entry)| serves(entry));
        found.next().map(|(key, _)| *key)
    }
}

/// A range that was registered with [`Agent::register_range`]. Dropping it gives it back, without telling when its memory is
/// free; call [`RegisteredRange::deregister`] and wait for that.
#[must_use = "dropping it deregisters the range"]
pub struct RegisteredRange {
    agent: Weak<AgentCore>,
    key: (u64, u64),
    region: Region,
    offset: u64,
    bytes: u64,
    is_held: bool,
}

impl RegisteredRange {
    /// The region that it lies in, perhaps with other ranges.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Bytes from the region's start to the range's.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A descriptor of `len` bytes at `offset` of the range; not checked before it is prepared, and then against the
    /// region.
    #[must_use]
    pub fn descriptor(&self, offset: u64, len: u64) -> Descriptor {
        self.region
            .descriptor(self.offset.saturating_add(offset), len)
    }

    /// Gives the range back. What is returned completes when its memory may be freed: as long as other ranges of the same
    /// region are registered, all of its memory stays in reach of peers, so that is when the last of them is given back and
    /// nothing is in flight any more.
    pub fn deregister(mut self) -> Deregistration {
        self.let_go();
        self.region.when_deregistered()
    }

    fn let_go(&mut self) {
        if !std::mem::replace(&mut self.is_held, false) {
            return;
        }
        let Some(agent) = self.agent.upgrade() else {
            // Nobody can find it there any more.
            drop(self.region.deregister());
            return;
        };
        let mut known = agent.ranges.lock();
        let Some(entry) = known.all.get_mut(&self.key) else {
            return;
        };
        entry.holders -= 1;
        if entry.holders == 0 {
            // Under the lock: whoever registers the same memory next must not find it open.
            known.all.remove(&self.key);
            drop(self.region.deregister());
        }
    }
}

impl Drop for RegisteredRange {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl std::fmt::Debug for RegisteredRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegisteredRange")
            .field("region", &self.region.id())
            .field("offset", &self.offset)
            .field("bytes", &self.bytes)
            .finish()
    }
}

impl Agent {
    /// Registers memory of someone else's ([`HostMemory::from_raw`]) by its range: one that lies in a range that was
    /// registered in this way, and still is, with the same options, gets that one's region. So a pool and its thousand
    /// tensors are one region, in metadata and for peers. Ranges that merely touch or overlap get regions of their own.
    ///
    /// The lender's promise holds until the returned range's [`Deregistration`] has completed. Memory that the agent
    /// has allocated itself ([`HostMemory::shared`] and others) is always a region of its own.
    ///
    /// # Errors
    /// As [`Agent::register`].
    pub fn register_range(
        &self,
        memory: HostMemory,
        options: RegionOptions,
    ) -> Result<RegisteredRange> {
        self.core().check()?;
        let (start, bytes) = (memory.mapping().address(), memory.bytes());
        let is_lent = memory.mapping().is_lent();
        let end = start + bytes;
        let mut known = self.core().ranges.lock();
        let found = known.around(start, end, options).filter(|_| is_lent);
        let (key, region) = match found.and_then(|key| Some((key, known.all.get_mut(&key)?))) {
            Some((key, entry)) => {
                entry.holders += 1;
                (key, entry.region.clone())
            }
            None => {
                let region = self.register(memory, options)?;
                let key = (start, known.next);
                known.next += 1;
                known.longest = known.longest.max(bytes);
                let entry = Entry {
                    end,
                    options,
                    region: region.clone(),
                    holders: 1,
                };
                known.all.insert(key, entry);
                (key, region)
            }
        };
        Ok(RegisteredRange {
            agent: Arc::downgrade(self.core()),
            key,
            region,
            offset: start - key.0,
            bytes,
            is_held: true,
        })
    }
}

#[cfg(test)]
mod tests;
