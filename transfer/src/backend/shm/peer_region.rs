//! A region of the peer in this process's address space.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};

use super::link::Link;
use super::message::Message;
use crate::agent::RemoteRegion;
use crate::region::RegionId;
use crate::sys::memory::{Mapping, SIZE_SEALS};

/// Unmapped when the last copy is done with it; the peer hears of that, because it may be waiting to give the memory
/// up.
pub(super) struct PeerRegion {
    id: RegionId,
    mapping: Option<Mapping>,
    link: Arc<Link>,
}

impl PeerRegion {
    /// Maps what the peer sent, after checking that it is what the metadata promised and can't be cut away under us.
    pub(super) fn map(
        file: &OwnedFd,
        bytes: u64,
        writable: bool,
        remote: &RemoteRegion,
        link: &Arc<Link>,
    ) -> Result<Self> {
        let place = || format!("shared memory of region {}", remote.id);
        let seals = fcntl_get_seals(file)
            .map_err(|e| Error::io("ask for the seals of shared memory", e.into()).at(place()))?;
        if !seals.contains(SIZE_SEALS | SealFlags::SEAL) {
            let text = format!("its size is not sealed ({seals:?})");
            return Err(Error::new(ErrorKind::Denied, text).at(place()));
        }
        let found = fstat(file)
            .map_err(|e| Error::io("size", e.into()).at(place()))?
            .st_size;
        if u64::try_from(found) != Ok(bytes) || bytes != remote.bytes {
            let text = format!("{found} bytes, {bytes} granted, {} exported", remote.bytes);
            return Err(Error::new(ErrorKind::Corrupt, text).at(place()));
        }
        let mapping = Mapping::of_file(file, bytes, writable).map_err(|e| e.at(place()))?;
        Ok(Self {
            id: remote.id,
            mapping: Some(mapping),
            link: link.clone(),
        })
    }

    pub(super) fn mapping(&self) -> Result<&Mapping> {
        self.mapping.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("region {} is unmapped", self.id),
            )
        })
    }
}

impl Drop for PeerRegion {
    fn drop(&mut self) {
        self.mapping = None;
        // The peer may be gone: then there is nobody to tell.
        let _ = self.link.send(&Message::Unmapped { region: self.id }, None);
    }
}

#[cfg(test)]
mod tests;
