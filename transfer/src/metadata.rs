//! What an agent tells its peers so that they can reach it. The format is described in `docs/wire-format.md`.

use std::fmt;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::backend::Operation;
use crate::region::{MemoryKind, REGION_SECRET_BYTES, RegionId, RegionKey, RegionSecret};
use crate::wire::{Reader, put_counted};

mod regions;

/// The version of the metadata format that this build writes. It reads the one before, too.
pub const METADATA_VERSION: u16 = 3;

/// The version before: it knows host memory alone.
const HOST_ALONE: u16 = 2;

/// The longest agent name, in bytes.
pub const AGENT_NAME_BYTES_MAX: usize = 255;

/// The most regions that one agent's metadata may export.
pub const EXPORTED_REGIONS_MAX: usize = 1 << 16;

const MAGIC: [u8; 4] = *b"KVFM";
const ADDRESSES_MAX: usize = 16;
const CHECKSUM_BYTES: usize = 4;

/// The regions are some of the agent's: those that are known stay.
const PARTIAL: u16 = 1;

/// One life of an agent: random, so that a restarted one is not taken for the old.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Incarnation(pub(crate) u64);

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Which running kernel: equal for two processes that could share memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostId(pub(crate) [u8; 16]);

/// What kind of memory a peer's region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RemoteKind {
    /// Host DRAM.
    Host,
    /// Memory of a CUDA device. Which one is the peer's business: numbers of devices mean nothing outside of a process.
    Device,
}

impl RemoteKind {
    /// The kind of one's own region as peers are told; none of places that are never exported.
    pub(crate) fn of(kind: MemoryKind) -> Option<Self> {
        match kind {
            MemoryKind::Host => Some(Self::Host),
            MemoryKind::Device { .. } => Some(Self::Device),
            MemoryKind::File | MemoryKind::Object => None,
        }
    }

    /// Whether a list of kinds has this one.
    pub(crate) fn is_among(self, kinds: &[MemoryKind]) -> bool {
        kinds.iter().any(|&kind| Self::of(kind) == Some(self))
    }
}

impl fmt::Display for RemoteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host memory",
            Self::Device => "memory of a CUDA device",
        })
    }
}

/// A region that a peer exported.
#[derive(Debug)]
pub(crate) struct RemoteRegion {
    /// What the two below are made of.
    pub(crate) secret: RegionSecret,
    pub(crate) id: RegionId,
    pub(crate) key: RegionKey,
    pub(crate) bytes: u64,
    pub(crate) kind: RemoteKind,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// Other processes of its host can map it.
    pub(crate) shareable: bool,
}

impl RemoteRegion {
    /// # Errors
    /// [`ErrorKind::Denied`] when it was not exported for this.
    pub(crate) fn check(&self, operation: Operation) -> Result<()> {
        let (allowed, verb) = match operation {
            Operation::Read => (self.readable, "reading"),
            Operation::Write => (self.writable, "writing"),
        };
        if allowed {
            return Ok(());
        }
        let text = format!("region {} is not exported for {verb}", self.id);
        Err(Error::new(ErrorKind::Denied, text))
    }
}

/// Everything that a peer's metadata says.
#[derive(Debug)]
pub(crate) struct PeerCard {
    pub(crate) name: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) host: HostId,
    /// By fabric.
    pub(crate) addresses: Vec<(String, Vec<u8>)>,
    pub(crate) regions: Vec<Arc<RemoteRegion>>,
    /// Whether it has other regions, too.
    pub(crate) partial: bool,
}

impl PeerCard {
    /// The address for this fabric, if the peer has one.
    pub(crate) fn address(&self, fabric: &str) -> Option<&[u8]> {
        let found = self.addresses.iter().find(|(name, _)| name == fabric);
        found.map(|(_, address)| address.as_slice())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256 + self.regions.len() * REGION_SECRET_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&METADATA_VERSION.to_le_bytes());
        let flags = if self.partial { PARTIAL } else { 0 };
        out.extend_from_slice(&flags.to_le_bytes());
        out.extend_from_slice(&self.incarnation.0.to_le_bytes());
        out.extend_from_slice(&self.host.0);
        put_counted(&mut out, self.name.as_bytes());
        out.push(self.addresses.len() as u8);
        for (fabric, address) in &self.addresses {
            put_counted(&mut out, fabric.as_bytes());
            put_counted(&mut out, address);
        }
        regions::encode(&self.regions, &mut out);
        let checksum = crc32c(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads what [`PeerCard::encode`] wrote, trusting nothing.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        Self::decode_checked(bytes).map_err(|e| e.at("agent metadata"))
    }

    fn decode_checked(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let magic: [u8; 4] = reader.array("magic")?;
        if magic != MAGIC {
            let text = format!("starts with {magic:02x?}, not with {MAGIC:02x?}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        // The checksum is last in every version, so damage is not mistaken for another version.
        let Some((body, tail)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
            return Err(Error::new(ErrorKind::Corrupt, "too short for a checksum"));
        };
        let (found, expected) = (crc32c(body), u32::from_le_bytes(*tail));
        if found != expected {
            let text = format!("checksum is {found:08x}, should be {expected:08x}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let mut reader = Reader::new(body);
        reader.bytes("magic", MAGIC.len())?;
        let version = reader.u16("version")?;
        if !(HOST_ALONE..=METADATA_VERSION).contains(&version) {
            let text = format!(
                "version is {version}, this build reads {HOST_ALONE} and {METADATA_VERSION}"
            );
            return Err(Error::new(ErrorKind::Version, text));
        }
        let flags = reader.u16("flags")?;
        if flags & !PARTIAL != 0 {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("unknown flags {flags:#x}"),
            ));
        }
        let incarnation = Incarnation(reader.u64("incarnation")?);
        let host = HostId(reader.array("host")?);
        let name = reader.text("name")?.to_owned();
        check_name(&name)?;
        let addresses = decode_addresses(&mut reader)?;
        let regions = regions::decode(&mut reader, version != HOST_ALONE)?;
        Ok(Self {
            name,
            incarnation,
            host,
            addresses,
            regions,
            partial: flags & PARTIAL != 0,
        })
    }
}

fn decode_addresses(reader: &mut Reader<'_>) -> Result<Vec<(String, Vec<u8>)>> {
    let count = usize::from(reader.u8("number of addresses")?);
    if count > ADDRESSES_MAX {
        return Err(Error::invalid(
            "number of addresses",
            count,
            0..=ADDRESSES_MAX,
        ));
    }
    let mut addresses = Vec::with_capacity(count);
    for _ in 0..count {
        let fabric = reader.text("fabric")?.to_owned();
        addresses.push((fabric, reader.counted("address")?.to_vec()));
    }
    Ok(addresses)
}

/// # Errors
/// [`ErrorKind::Invalid`] for a name that is empty, too long or unprintable.
pub(crate) fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > AGENT_NAME_BYTES_MAX {
        let text = format!(
            "agent name has {} bytes, expected 1 to {AGENT_NAME_BYTES_MAX}",
            name.len()
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    if name.chars().any(char::is_control) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("agent name {name:?} is not printable"),
        ));
    }
    Ok(())
}

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

#[cfg(test)]
mod tests;
