//! The regions of metadata: runs of one size and one permission, and in a run what tells its regions apart.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::{EXPORTED_REGIONS_MAX, RemoteKind, RemoteRegion};
use crate::region::{RegionId, RegionSecret};
use crate::wire::{Reader, put_varint};

const READABLE: u8 = 1;
const WRITABLE: u8 = 2;
const SHAREABLE: u8 = 4;
const DEVICE: u8 = 8;

/// A run begins with its count and, in so many low bits, its flags.
const FLAG_BITS: u32 = 4;

/// As many as there were when all regions were of host memory.
const FLAG_BITS_OF_HOST: u32 = 3;

impl RemoteRegion {
    /// Regions that are alike, one after the other, rising.
    pub(crate) fn order(&self) -> (u8, u64, RegionId) {
        (self.flags(), self.bytes, self.id)
    }

    fn flags(&self) -> u8 {
        let flag = |set, flag| if set { flag } else { 0 };
        flag(self.readable, READABLE)
            | flag(self.writable, WRITABLE)
            | flag(self.shareable, SHAREABLE)
            | flag(self.kind == RemoteKind::Device, DEVICE)
    }

    fn of(secret: RegionSecret, bytes: u64, flags: u8) -> Self {
        let (id, key) = secret.derive();
        Self {
            secret,
            id,
            key,
            bytes,
            kind: match flags & DEVICE {
                0 => RemoteKind::Host,
                _ => RemoteKind::Device,
            },
            readable: flags & READABLE != 0,
            writable: flags & WRITABLE != 0,
            shareable: flags & SHAREABLE != 0,
        }
    }
}

/// Which run: flags and size. Runs rise, so of a size only what it is more than the one before is said.
type Kind = (u8, u64);

fn rise(before: Option<Kind>, (flags, bytes): Kind) -> u64 {
    match before {
        Some((same, less)) if same == flags => bytes - less,
        _ => bytes,
    }
}

/// Appends regions, which are in [`RemoteRegion::order`].
pub(super) fn encode(regions: &[Arc<RemoteRegion>], out: &mut Vec<u8>) {
    let kind = |region: &RemoteRegion| (region.flags(), region.bytes);
    let mut before = None;
    for run in regions.chunk_by(|a, b| kind(a) == kind(b)) {
        let (flags, bytes) = kind(&run[0]);
        put_varint(out, (run.len() as u64) << FLAG_BITS | u64::from(flags));
        put_varint(out, rise(before, (flags, bytes)));
        run.iter()
            .for_each(|region| out.extend_from_slice(&region.secret.0));
        before = Some((flags, bytes));
    }
}

/// Reads runs up to the end. Whether they say what kind of memory it is depends on the version.
pub(super) fn decode(reader: &mut Reader<'_>, says_kind: bool) -> Result<Vec<Arc<RemoteRegion>>> {
    let flag_bits = match says_kind {
        true => FLAG_BITS,
        false => FLAG_BITS_OF_HOST,
    };
    let mut regions = Vec::new();
    let mut before: Option<Kind> = None;
    while reader.left() > 0 {
        let head = reader.varint("region run")?;
        let (count, flags) = (head >> flag_bits, (head & ((1 << flag_bits) - 1)) as u8);
        let room = EXPORTED_REGIONS_MAX - regions.len();
        if count == 0 || count > room as u64 {
            let read = regions.len();
            let text = format!("{count} regions in a run after {read}, expected 1 to {room}");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let rise = reader.varint("region size")?;
        let bytes = match before {
            Some((last, _)) if last > flags => None,
            Some((last, less)) if last == flags => less.checked_add(rise).filter(|_| rise > 0),
            _ => Some(rise),
        };
        let Some(bytes) = bytes else {
            let text = format!("a run of flags {flags} and size +{rise} after {before:?}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        // What is left of the input bounds what is allocated.
        for _ in 0..count {
            let secret = RegionSecret(reader.array("region secret")?);
            regions.push(Arc::new(RemoteRegion::of(secret, bytes, flags)));
        }
        before = Some((flags, bytes));
    }
    Ok(regions)
}
