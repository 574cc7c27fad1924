//! Copies from a peer's memory, by one-sided reads under a lease.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvcache_core::manager::MoveFailure;
use kvcache_core::place::Place;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Descriptor, Operation, RegionId};

use super::local::all_failed;
use super::transport::{Unsettled, transfer};
use super::{Job, Memory, Moved, Mover};
use crate::arena::GENERATION_BYTES;
use crate::disk::PAGE_BYTES;
use crate::peer::{HeldLease, LeasedBlock};

impl Mover {
    /// Reads the bytes first and the generation words afterwards: a slot that still has the leased
    /// generation then was not given to another block before the bytes were read.
    pub(super) async fn peer_to_memory(
        &self,
        job: &Job,
        to: &[Memory],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        let (lease, blocks) = self.leased(job)?;
        let deadline = job.deadline.min(lease.expires);
        self.begin_fill(to)?;
        let mut pairs = Vec::with_capacity(blocks.len());
        for (block, to) in blocks.iter().zip(to) {
            let bytes = self.expected.block_bytes;
            self.pair(to, remote(block.region, block.offset, bytes), &mut pairs);
        }
        let peer = Some(&lease.link.handle);
        let read = transfer(&self.agent, Operation::Read, pairs, peer, deadline).await;
        if let Err(failed) = read {
            return Ok(self.read_failed(&lease, failed, job.moves.len(), unsettled));
        }
        let words = match self.generations(&lease, &blocks, deadline, unsettled).await {
            Ok(words) => words,
            Err(failure) => return Ok(all_failed(job.moves.len(), failure)),
        };
        if Instant::now() >= deadline {
            // The holder may have begun to reuse the slots while we read: nothing of it counts.
            return Ok(all_failed(
                job.moves.len(),
                MoveFailure::settled(ErrorKind::Timeout),
            ));
        }
        let fresh = words.iter().zip(&blocks);
        let fresh: Vec<bool> = fresh
            .map(|(word, block)| *word == block.generation)
            .collect();
        let sums = self.sum_each(job, to, &fresh).await;
        let mut results = Vec::with_capacity(job.moves.len());
        for (position, one) in job.moves.iter().enumerate() {
            let block = &blocks[position];
            if !fresh[position] {
                self.faults.generation.fetch_add(1, Ordering::Relaxed);
                results.push(Err(MoveFailure::settled(ErrorKind::NotFound)));
                continue;
            }
            let place = || format!("peer {}", lease.link.pod);
            results.push(match self.verify(one, sums[position], place) {
                Ok(sum) if sum != block.checksum => {
                    let what = "bytes do not match the checksum of the lease";
                    Err(self.corrupt(one, &place(), what))
                }
                verified => verified,
            });
        }
        Ok(results)
    }

    /// The one lease of the command's moves, and the leased block of each.
    pub(super) fn leased(&self, job: &Job) -> Result<(Arc<HeldLease>, Vec<LeasedBlock>)> {
        let mut lease: Option<Arc<HeldLease>> = None;
        let mut blocks = Vec::with_capacity(job.moves.len());
        for one in &job.moves {
            let Place::Peer {
                peer,
                lease: id,
                position,
            } = one.from
            else {
                let context = format!("a read from a peer that begins at {:?}", one.from);
                return Err(Error::new(ErrorKind::Internal, context));
            };
            let held = self.peers.held(peer, id)?;
            if lease
                .as_ref()
                .is_some_and(|first| !Arc::ptr_eq(first, &held))
            {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "a read under more than one lease",
                ));
            }
            let block = held.blocks.get(position as usize).copied().ok_or_else(|| {
                let context = format!("lease {id} has no block {position}");
                Error::new(ErrorKind::NotFound, context)
            })?;
            blocks.push(block);
            lease = Some(held);
        }
        let lease = lease.ok_or_else(|| Error::new(ErrorKind::Internal, "an empty read"))?;
        Ok((lease, blocks))
    }

    async fn generations(
        &self,
        lease: &HeldLease,
        blocks: &[LeasedBlock],
        deadline: Instant,
        unsettled: &mut Unsettled,
    ) -> Result<Vec<u64>, MoveFailure> {
        let per_page = (PAGE_BYTES / GENERATION_BYTES) as usize;
        let pages = self
            .pages
            .take(blocks.len().div_ceil(per_page), deadline)
            .await
            .map_err(|error| MoveFailure::settled(error.kind()))?;
        let at = |position: usize| {
            let offset = (position % per_page) as u64 * GENERATION_BYTES;
            (position / per_page, offset)
        };
        let pairs = blocks.iter().enumerate().map(|(position, block)| {
            let (page, offset) = at(position);
            let mut local = pages.descriptor(page, PAGE_BYTES);
            (local.offset, local.len) = (local.offset + offset, GENERATION_BYTES);
            let region = block.generation_region;
            (
                local,
                remote(region, block.generation_offset, GENERATION_BYTES),
            )
        });
        let peer = Some(&lease.link.handle);
        let read = transfer(
            &self.agent,
            Operation::Read,
            pairs.collect(),
            peer,
            deadline,
        )
        .await;
        if let Err(failed) = read {
            let failures = self.read_failed(lease, failed, 1, unsettled);
            unsettled.hold(pages);
            let failure = failures.into_iter().find_map(Result::err);
            return Err(failure.unwrap_or(MoveFailure::settled(ErrorKind::PeerLost)));
        }
        (0..blocks.len())
            .map(|position| {
                let (page, offset) = at(position);
                let mut word = [0; GENERATION_BYTES as usize];
                pages
                    .read(page, offset, &mut word)
                    .map_err(|error| MoveFailure::settled(error.kind()))?;
                Ok(u64::from_le_bytes(word))
            })
            .collect()
    }

    fn read_failed(
        &self,
        lease: &HeldLease,
        failed: super::transport::Failed,
        count: usize,
        unsettled: &mut Unsettled,
    ) -> Vec<Moved> {
        tracing::debug!(pod = %lease.link.pod, error = %failed.error, "read from a peer failed");
        if failed.error.kind() == ErrorKind::PeerLost {
            self.peers.lost(&lease.link);
        }
        let mut failure = unsettled.note(failed);
        if matches!(failure.kind, ErrorKind::Denied | ErrorKind::Invalid) {
            // The holder's region is gone or smaller than its lease said: it restarted, or it lies.
            failure.kind = ErrorKind::PeerLost;
        }
        all_failed(count, failure)
    }
}

pub(super) fn remote(region: u64, offset: u64, len: u64) -> Descriptor {
    Descriptor {
        region: RegionId(region),
        offset,
        len,
    }
}
