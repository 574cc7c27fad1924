//! What a cache is made of, and the bounds it keeps.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvcache_core::manager::Limits;
use kvcache_core::{BlockInfo, Error, PodName, Result};
use kvfabric_transfer::{DirectMode, FileEngineMode};

use crate::disk::{BLOCK_BYTES_MAX, SegmentLayout};

/// The fewest blocks a host arena must have room for.
pub const HOST_SLOTS_MIN: u64 = 2;

/// The fewest segments a disk tier must have room for: one is filled while another is dropped.
pub const SEGMENTS_MIN: u64 = 2;

/// Turns an engine's packed names of blocks into blocks.
type ReadNames = dyn Fn(&[u8]) -> Result<Vec<BlockInfo>> + Send + Sync;

/// How the peer service understands what others call blocks.
///
/// Whoever asks where blocks are knows what its engine calls them, and mostly not their keys; what it sends is opaque to
/// this crate.
#[derive(Clone)]
pub struct NameReader(Arc<ReadNames>);

impl NameReader {
    /// Names are read by `read`, whose errors go back to whoever asked. It may take a while, but must not block.
    pub fn new(read: impl Fn(&[u8]) -> Result<Vec<BlockInfo>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// The blocks that these names mean, in order.
    pub(crate) fn read(&self, names: &[u8]) -> Result<Vec<BlockInfo>> {
        (self.0)(names)
    }
}

impl fmt::Debug for NameReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NameReader")
    }
}

/// What a [`crate::Cache`] is made of.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// The name by which peers and the index know this node.
    pub pod: PodName,
    /// What shapes the bytes of the model served here: blocks are only shared under the same one.
    pub model_identity: [u8; 32],
    /// Bytes of every block.
    pub block_bytes: u64,
    /// Bytes of host memory for blocks; rounded down to whole blocks.
    pub host_bytes: u64,
    /// The NVMe tier, if there is one.
    pub disk: Option<DiskConfig>,
    /// The shared object tier, if there is one.
    pub object: Option<ObjectConfig>,
    /// Where to serve peers; port 0 lets the system choose. None: peers cannot read from here.
    pub peer_listen: Option<SocketAddr>,
    /// Bounds and waits of the manager. Its sizes (`block_bytes`, `host_slots`, the disk's, `object`)
    /// are computed from the fields above, whatever is written here.
    pub limits: Limits,
    /// Bounds of what passes between this node and its peers.
    pub peers: PeerLimits,
    /// The deadline of one question to the directory.
    pub locate_timeout: Duration,
    /// Whether devices sum blocks that land in their memory, by kernels of ours; otherwise those blocks are summed in host memory first,
    /// as by default: no device has run the kernels yet.
    pub device_sums: bool,
    /// How names of blocks are read that others ask the peer service about; without it they are refused.
    pub names: Option<NameReader>,
}

/// The NVMe tier: a directory of segment files.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The directory; made when it is not there. Used by one process at a time.
    pub path: PathBuf,
    /// Bytes that all segment files together may take.
    pub bytes: u64,
    /// Bytes of one segment file: space comes back in this unit.
    pub segment_bytes: u64,
    /// Whether files are read and written past the page cache.
    pub direct: DirectMode,
    /// Who makes the calls to the kernel. An agent has one engine for all its files, so this counts only if no file was
    /// opened with it before.
    pub engine: FileEngineMode,
}

/// The shared object tier: a prefix in a store that the agent knows.
#[derive(Clone, Debug)]
pub struct ObjectConfig {
    /// The store's name, as it was given to the agent's builder.
    pub store_name: String,
    /// What every object's name begins with; empty for nothing.
    pub prefix: String,
}

/// Bounds of what passes between this node and its peers.
#[derive(Clone, Debug)]
pub struct PeerLimits {
    /// Leases granted to any one peer at one time; more are refused as busy.
    pub leases_per_peer_max: u32,
    /// The deadline of one call to a peer: greeting it, or giving a lease back.
    pub call_timeout: Duration,
    /// How long a peer is left alone when it could not be reached, or greeted us and then failed; doubles with each failure
    /// in a row. One that had served us is tried anew at once.
    pub backoff: Duration,
    /// How long a peer is left alone at most.
    pub backoff_max: Duration,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self {
            leases_per_peer_max: 128,
            call_timeout: Duration::from_secs(1),
            backoff: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
        }
    }
}

impl CacheConfig {
    /// A cache in host memory alone, with default bounds; set the fields that shall differ.
    #[must_use]
    pub fn new(pod: PodName, model_identity: [u8; 32], block_bytes: u64, host_bytes: u64) -> Self {
        Self {
            pod,
            model_identity,
            block_bytes,
            host_bytes,
            disk: None,
            object: None,
            peer_listen: None,
            limits: Limits::default(),
            peers: PeerLimits::default(),
            locate_timeout: Duration::from_millis(500),
            device_sums: false,
            names: None,
        }
    }

    /// Checks what can be checked without touching the disk or the agent.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`], naming the field, its value and what is accepted.
    pub fn check(&self) -> Result<()> {
        if self.block_bytes == 0 || self.block_bytes > BLOCK_BYTES_MAX {
            let accepted = 1..=BLOCK_BYTES_MAX;
            return Err(Error::invalid("block_bytes", self.block_bytes, accepted));
        }
        if self.host_bytes / self.block_bytes < HOST_SLOTS_MIN {
            let accepted = self.block_bytes * HOST_SLOTS_MIN..;
            return Err(Error::invalid("host_bytes", self.host_bytes, accepted));
        }
        let durations = [
            ("peers.call_timeout", self.peers.call_timeout),
            ("peers.backoff", self.peers.backoff),
            ("peers.backoff_max", self.peers.backoff_max),
            ("locate_timeout", self.locate_timeout),
        ];
        for (field, duration) in durations {
            if duration.is_zero() {
                return Err(Error::invalid(field, "0 s", "more than 0 s"));
            }
        }
        if self.peers.leases_per_peer_max == 0 {
            return Err(Error::invalid("peers.leases_per_peer_max", 0, 1..));
        }
        self.manager_limits().map(|_| ())
    }

    /// Where records lie in this cache's segment files, if it has a disk tier.
    pub(crate) fn segment_layout(&self) -> Result<Option<SegmentLayout>> {
        let Some(disk) = &self.disk else {
            return Ok(None);
        };
        let layout = SegmentLayout::new(disk.segment_bytes, self.block_bytes);
        layout.map(Some).map_err(|error| error.at("disk"))
    }

    /// The manager's limits: those configured, with the sizes that follow from the tiers.
    pub(crate) fn manager_limits(&self) -> Result<Limits> {
        let host_slots = self.host_bytes / self.block_bytes;
        let mut limits = Limits {
            block_bytes: self.block_bytes,
            host_slots: u32::try_from(host_slots).unwrap_or(u32::MAX),
            disk_segments: 0,
            object: self.object.is_some(),
            ..self.limits.clone()
        };
        if let (Some(disk), Some(layout)) = (&self.disk, self.segment_layout()?) {
            let segments = disk.bytes / layout.file_bytes();
            limits.disk_segments = u32::try_from(segments).unwrap_or(u32::MAX);
            limits.disk_segment_slots = layout.slots();
            if segments < SEGMENTS_MIN {
                let accepted = layout.file_bytes() * SEGMENTS_MIN..;
                return Err(Error::invalid("disk.bytes", disk.bytes, accepted));
            }
        }
        limits.check()?;
        Ok(limits)
    }
}
