//! Memory that the kernel knows: its pages are looked up and held once, not with every call.
//!
//! A direct call on memory that the kernel does not know makes it find and hold each page, which takes most of the
//! processor's part of a call. So memory of a region that is used again and again is registered with the ring, in
//! [`CHUNK_BYTES`] each, once as many bytes have moved there that this pays. Chunks are known by their region's name, which no
//! other region ever has, and never by their address alone: memory that comes to the same place later is another region.
//!
//! The kernel holds these pages until the ring lets go of them. A region that is deregistered counts as used until then
//! ([`Inbox::withdraw`]).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::Arc;

use io_uring::IoUring;

use super::inbox::Inbox;
use super::plan::vector;
use crate::region::{RegionCore, RegionId};

/// Bytes of a region that are registered together: few calls lie across two, and to hold 4,096 pages takes less than one
/// millisecond.
pub(super) const CHUNK_BYTES: u64 = 16 << 20;
/// Bytes that have to be moved in a chunk before it is registered, so that this costs little beside what was moved.
const BYTES_BEFORE: u64 = CHUNK_BYTES / 2;
/// The most chunks: 64 GiB.
const CHUNKS_MAX: u16 = 4096;

/// What is known of a chunk.
enum Chunk {
    /// Not registered; so many bytes were moved there.
    Moved(u64),
    /// Registered with this number.
    At(u16),
    /// The kernel does not take it: memory that may only be read, a file's.
    Refused,
}

/// The chunks that a ring knows.
pub(super) struct Pinned {
    regions: HashMap<RegionId, HashMap<u64, Chunk>>,
    /// Numbers that were given back, and the next one that never was given.
    free: Vec<u16>,
    next: u16,
    /// No more are registered: the kernel has no such table, or no more memory may be held.
    is_over: bool,
}

impl Pinned {
    pub(super) fn new(ring: &IoUring) -> Self {
        let table = ring.submitter().register_buffers_sparse(CHUNKS_MAX.into());
        if let Err(error) = &table {
            tracing::info!(%error, "this kernel's rings do not know memory; calls name it each time");
        }
        Self {
            regions: HashMap::new(),
            free: Vec::new(),
            next: 0,
            is_over: table.is_err(),
        }
    }

    /// The number of the registered memory in which these bytes of a region lie; none when they lie in none.
    pub(super) fn find(
        &mut self,
        ring: &IoUring,
        inbox: &Inbox,
        region: &Arc<RegionCore>,
        range: libc::iovec,
    ) -> Option<u16> {
        let mapping = region.host()?.mapping();
        let offset = (range.iov_base as u64).checked_sub(mapping.address())?;
        let last = (offset + range.iov_len as u64).checked_sub(1)?;
        let number = offset / CHUNK_BYTES;
        if last / CHUNK_BYTES != number || last >= mapping.len() {
            return None;
        }
        let chunks = match self.regions.entry(region.id()) {
            Entry::Occupied(known) => known.into_mut(),
            // From now on it is told when the region is deregistered.
            Entry::Vacant(new) if !self.is_over && inbox.pin(region) => new.insert(HashMap::new()),
            Entry::Vacant(_) => return None,
        };
        let chunk = chunks.entry(number).or_insert(Chunk::Moved(0));
        match chunk {
            Chunk::At(slot) => return Some(*slot),
            Chunk::Moved(bytes) => {
                *bytes += range.iov_len as u64;
                if *bytes < BYTES_BEFORE || self.is_over {
                    return None;
                }
            }
            Chunk::Refused => return None,
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.next < CHUNKS_MAX => {
                self.next += 1;
                self.next - 1
            }
            None => return None,
        };
        let start = number * CHUNK_BYTES;
        let len = CHUNK_BYTES.min(mapping.len() - start);
        let base = (mapping.address() + start) as *mut u8;
        match set(ring, slot, vector(base, len as usize)) {
            Ok(()) => {
                *chunk = Chunk::At(slot);
                return Some(slot);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                self.is_over = true;
                tracing::warn!(
                    %error,
                    "no more memory may be held for the file engine (ulimit -l); calls name it each time"
                );
            }
            Err(error) => {
                tracing::debug!(%error, region = %region.id(), "memory is not registered with the ring")
            }
        }
        *chunk = Chunk::Refused;
        self.free.push(slot);
        None
    }

    /// Lets go of a region's memory.
    pub(super) fn forget(&mut self, ring: &IoUring, region: RegionId) {
        for chunk in self.regions.remove(&region).into_iter().flatten() {
            let (_, Chunk::At(slot)) = chunk else {
                continue;
            };
            match set(ring, slot, vector(std::ptr::null_mut(), 0)) {
                Ok(()) => self.free.push(slot),
                // It stays held until the ring ends; its number is not given to anything else.
                Err(error) => {
                    tracing::error!(%error, %region, "memory could not be taken back from the ring")
                }
            }
        }
    }
}

/// Has the kernel hold this memory under a number, in place of what it had there; nothing for an empty range.
fn set(ring: &IoUring, slot: u16, memory: libc::iovec) -> io::Result<()> {
    // SAFETY: the range lies in the mapping of a region that a job in hand keeps from being given back, so it is there during
    // this call. From then on the kernel holds the pages themselves: whatever becomes of the mapping, a call under this
    // number reads and writes those. That it does so only while the region is used is ensured by its owner: numbers are
    // found by the region's name, for calls of jobs that have entered it.
    unsafe {
        ring.submitter()
            .register_buffers_update(slot.into(), &[memory], None)
    }
}

#[cfg(test)]
mod tests;
