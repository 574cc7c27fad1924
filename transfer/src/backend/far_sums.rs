//! Checksums that a peer computes where its memory is, over backends that ask for them in messages.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::Operation;
use super::copy::local_memory;
use super::unix::{Outcome, SUMS_MAX};
use crate::agent::{Exports, RemoteRegion};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan, SUM_BYTES_MAX};
use crate::region::{RegionId, RegionKey};

/// Questions of one job that may be open.
pub(super) const QUESTIONS_MAX: usize = 4;

/// A question for checksums of some of a job's extents, one after the other.
pub(super) struct Summing<J> {
    pub(super) job: J,
    first: usize,
    count: usize,
}

impl<J> Summing<J> {
    /// The question for the extents from `first` on, and the region that it is about: only one, and no more bytes than one
    /// checksum may have, so that whoever computes them looks up from time to time.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] for a plan between two places of this agent.
    pub(super) fn next(plan: &Plan, job: J, first: usize) -> Result<(Self, &Arc<RemoteRegion>)> {
        let remote = plan.extents[first].remote;
        let Target::Remote(region) = &plan.remote[remote as usize] else {
            let text = "a plan between two places of this agent";
            return Err(Error::new(ErrorKind::Internal, text));
        };
        let mut bytes = 0;
        let fits = plan.extents[first..].iter().take_while(|extent| {
            bytes += extent.len;
            extent.remote == remote && bytes <= SUM_BYTES_MAX
        });
        let count = fits.take(SUMS_MAX).count().max(1);
        Ok((Self { job, first, count }, region))
    }

    fn extents<'a>(&self, plan: &'a Plan) -> &'a [Extent] {
        &plan.extents[self.first..self.end()]
    }

    /// The first extent behind those that it is for.
    pub(super) fn end(&self) -> usize {
        self.first + self.count
    }

    /// What is asked for: offsets in the region, and lengths.
    pub(super) fn ranges(&self, plan: &Plan) -> Vec<(u64, u64)> {
        let extents = self.extents(plan).iter();
        extents.map(|e| (e.remote_offset, e.len)).collect()
    }

    /// Puts the peer's answer where the job wants its checksums.
    ///
    /// # Errors
    /// What the peer answered; [`ErrorKind::Corrupt`] for another answer than checksums, or another number of them.
    pub(super) fn keep(&self, plan: &Plan, outcome: Outcome) -> Result<()> {
        let sums = match outcome {
            Outcome::Summed { sums } if sums.len() == self.count => sums,
            Outcome::Failed { code, text } => return Err(Outcome::failure(code, &text)),
            _ => {
                let text = "a question for checksums is answered by something else";
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        };
        for (extent, sum) in self.extents(plan).iter().zip(sums) {
            local_memory(plan, extent)?.write(extent.local_offset, &sum.to_le_bytes())?;
        }
        Ok(())
    }
}

/// The checksums of memory of ours.
///
/// # Errors
/// As [`Exports::admit`] for a read; [`ErrorKind::Invalid`] for more bytes than a question may be about, and for ranges outside
/// the region.
pub(super) fn answer(
    exports: &Exports,
    id: RegionId,
    key: &RegionKey,
    ranges: &[(u64, u64)],
) -> Result<Outcome> {
    let lens = ranges.iter().map(|(_, len)| *len);
    let bytes = lens.fold(0, u64::saturating_add);
    if bytes > SUM_BYTES_MAX {
        return Err(Error::invalid(
            "bytes to be summed",
            bytes,
            0..=SUM_BYTES_MAX,
        ));
    }
    let region = exports.admit(id, key, Operation::Read)?;
    let memory = region.region().mapping()?;
    let sums = ranges
        .iter()
        .map(|(offset, len)| memory.crc32c(*offset, *len));
    Ok(Outcome::Summed {
        sums: sums.collect::<Result<_>>()?,
    })
}
