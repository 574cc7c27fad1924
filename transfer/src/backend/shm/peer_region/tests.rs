//! What a lying peer could hand over as its memory.

use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::*;
use crate::metadata::RemoteKind;
use crate::region::{RegionId, RegionKey, RegionSecret};

const BYTES: u64 = 8192;

fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("test", flags).unwrap();
    ftruncate(&file, bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

/// How mapping `file` ends, when the metadata promised `BYTES` and the peer grants `granted`.
fn map_granted(file: &OwnedFd, granted: u64) -> Result<Mapping> {
    let remote = RemoteRegion {
        secret: RegionSecret([0; 12]),
        id: RegionId(1),
        key: RegionKey([0; 16]),
        bytes: BYTES,
        kind: RemoteKind::Host,
        readable: true,
        writable: true,
        shareable: true,
    };
    map(file, granted, true, &remote)
}

/// Without each of the seals the peer could cut the memory away, and a copy would end this process.
#[test]
fn memory_that_can_shrink_is_refused() {
    let all = SIZE_SEALS | SealFlags::SEAL;
    for missing in [SealFlags::SHRINK, SealFlags::GROW, SealFlags::SEAL] {
        let refused = map_granted(&memory(BYTES, all.difference(missing)), BYTES);
        assert_eq!(
            refused.err().unwrap().kind(),
            ErrorKind::Denied,
            "{missing:?}"
        );
    }
    let mapped = map_granted(&memory(BYTES, all), BYTES).unwrap();
    assert_eq!(mapped.len(), BYTES);
}

/// Less memory than was promised, or than is claimed.
#[test]
fn memory_of_another_size_is_refused() {
    let all = SIZE_SEALS | SealFlags::SEAL;
    for (bytes, granted) in [
        (4096, BYTES),
        (4096, 4096),
        (2 * BYTES, BYTES),
        (BYTES, 4096),
    ] {
        let refused = map_granted(&memory(bytes, all), granted);
        assert_eq!(
            refused.err().unwrap().kind(),
            ErrorKind::Corrupt,
            "{bytes} {granted}"
        );
    }
}
