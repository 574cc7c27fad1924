//! Checksums of what a plan has moved: asked for where the remote bytes are, compared with the local ones here.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::{Extent, Plan};
use crate::backend::Operation;
use crate::descriptor::Target;
use crate::region::{Body, RegionCore, RegionOptions};
use crate::sys::memory::{HostMemory, Mapping};

/// The most bytes of one checksum: whoever computes one looks up from time to time, and a longer range has several.
pub(crate) const SUM_BYTES_MAX: u64 = 1 << 20;

/// Bytes that a checksum takes.
pub(crate) const SUM_BYTES: u64 = 4;

impl Plan {
    /// What has a checksum of its own, with the pair that it is of.
    fn summed(&self) -> impl Iterator<Item = (u32, Extent)> {
        let pairs = self.pairs.iter().copied().zip(&self.extents);
        pairs.flat_map(|(pair, extent)| {
            let starts = (0..extent.len).step_by(SUM_BYTES_MAX as usize);
            starts.map(move |start| {
                let part = Extent {
                    local_offset: extent.local_offset + start,
                    remote_offset: extent.remote_offset + start,
                    len: (extent.len - start).min(SUM_BYTES_MAX),
                    ..*extent
                };
                (pair, part)
            })
        })
    }

    /// Asks for the checksums of the remote bytes, into memory of its own.
    pub(crate) fn asking_for_sums(&self) -> Result<Self> {
        let answer = |(position, (_, extent)): (u64, (u32, Extent))| Extent {
            local: 0,
            local_offset: position * SUM_BYTES,
            ..extent
        };
        let extents: Vec<Extent> = (0..).zip(self.summed()).map(answer).collect();
        let memory = HostMemory::anonymous(SUM_BYTES * extents.len() as u64)?;
        let memory = RegionCore::new(Body::Host(memory), RegionOptions::default())?;
        Ok(Self {
            operation: Operation::Read,
            local: Arc::from([Target::Local(Arc::new(memory))]),
            remote: self.remote.clone(),
            bytes: self.bytes,
            descriptors: extents.len() as u32,
            extents,
            ways: self.ways.clone(),
            pairs: Vec::new(),
            sums: true,
        })
    }

    /// Compares the local bytes with the checksums that came.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] with the pair of descriptors that differs.
    pub(crate) fn compare(&self, sums: &Self) -> Result<()> {
        let answers = host(&sums.local, 0)?;
        for (position, (pair, extent)) in (0..).zip(self.summed()) {
            let mut answer = [0; SUM_BYTES as usize];
            answers.read(position * SUM_BYTES, &mut answer)?;
            let there = u32::from_le_bytes(answer);
            let here = host(&self.local, extent.local)?.crc32c(extent.local_offset, extent.len)?;
            if here != there {
                let (at, len) = (extent.remote_offset, extent.len);
                let region = match &self.remote[extent.remote as usize] {
                    Target::Remote(region) => region.id,
                    Target::Local(region) => region.id(),
                };
                let text = format!(
                    "descriptor {pair}: checksum {here:08x} here, {there:08x} in region {region} at {at}+{len}"
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        Ok(())
    }
}

fn host(targets: &[Target], position: u32) -> Result<&Mapping> {
    match &targets[position as usize] {
        Target::Local(region) => region.mapping(),
        Target::Remote(region) => {
            let text = format!("region {} is a peer's", region.id);
            Err(Error::new(ErrorKind::Internal, text))
        }
    }
}
