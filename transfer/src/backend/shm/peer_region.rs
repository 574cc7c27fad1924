//! A region of the peer in this process's address space.

use std::os::fd::OwnedFd;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};

use crate::agent::RemoteRegion;
use crate::sys::memory::{Mapping, SIZE_SEALS};

/// Maps what the peer sent, after checking that it is what the metadata promised and can't be cut away under us.
pub(super) fn map(
    file: &OwnedFd,
    bytes: u64,
    writable: bool,
    remote: &RemoteRegion,
) -> Result<Mapping> {
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
    Mapping::of_file(file, bytes, writable).map_err(|e| e.at(place()))
}

#[cfg(test)]
mod tests;
