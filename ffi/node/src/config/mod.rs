//! What a node is made of: one TOML file, overridden by the environment, overridden by flags.

mod identity;
mod listen;
mod load;
mod sections;

use std::net::SocketAddr;
use std::time::Duration;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::prefix::data::Shard;
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{Error, ErrorKind, PodName, Result};
use kvfabric_tiers::{CacheConfig, DiskConfig, ObjectConfig};
use kvfabric_transfer::{DirectMode, FileEngineMode};
use serde::{Deserialize, Serialize};

pub use identity::parse_identity;
pub use load::Overrides;
use sections::default_lookup_deadline_ms;
pub use sections::{
    DirectSetting, DiskEngineSetting, DiskSection, EngineSection, FabricSection, HbmSection,
    HostSection, IndexSection, ObjectChecksumSetting, ObjectSection, ShardSection, StorageSetting,
    VerbsConnectSetting,
};

/// Environment variables that override the file begin so; `__` stands between a table and its key, as in
/// `KVFABRIC_NODE_HOST__BYTES`.
pub const ENVIRONMENT_PREFIX: &str = "KVFABRIC_NODE";

/// The name under which a node's agent knows its object store.
pub(crate) const OBJECT_STORE: &str = "object";

/// Everything a node must know. Unknown keys are errors that name the key.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The name by which routers and peers know this pod, often `ip:port`.
    pub pod: String,
    /// The model's name, as routers ask for it.
    pub model: String,
    /// What shapes the bytes (weights, dtype, quantisation, layout): 64 hexadecimal digits. Blocks are shared only
    /// between nodes with the same one.
    pub model_identity: String,
    /// Bytes of a block, all layers together.
    pub block_bytes: u64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Which part of each block's bytes this pod's engine holds.
    #[serde(default)]
    pub shard: ShardSection,
    /// How index keys are made; the indexer must use the same.
    #[serde(default = "default_key_scheme")]
    pub key_scheme: String,
    /// The DRAM tier.
    pub host: HostSection,
    /// The HBM tier; none without it, unless the engine lends memory for it.
    pub hbm: Option<HbmSection>,
    /// The NVMe tier; none without it.
    pub disk: Option<DiskSection>,
    /// The shared object tier; none without it.
    pub object: Option<ObjectSection>,
    /// How bytes move between pods.
    #[serde(default)]
    pub fabric: FabricSection,
    /// Where peers ask for leases. Port 0 lets the system choose.
    /// "off": not at all.
    #[serde(default = "default_peer_listen", with = "listen")]
    pub peer_listen: Option<SocketAddr>,
    /// The global index; a node without one keeps its tiers to itself and asks nobody.
    pub index: Option<IndexSection>,
    /// The engine that this pod serves; only for nodes that are told of blocks by the engine's own hashes.
    pub engine: Option<EngineSection>,
    /// Where Prometheus metrics are served over HTTP; not at all without it.
    pub metrics_listen: Option<SocketAddr>,
}

fn default_key_scheme() -> String {
    "xxh3:1337".to_owned()
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "serde calls it for an optional field"
)]
fn default_peer_listen() -> Option<SocketAddr> {
    Some(SocketAddr::from(([127, 0, 0, 1], 0)))
}

impl NodeConfig {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the field and its value.
    pub fn check(&self) -> Result<()> {
        self.identity()?;
        self.scheme()?;
        self.shard()?;
        self.check_reachable()?;
        if let Some(engine) = &self.engine {
            engine.check().map_err(|error| error.at("engine"))?;
        }
        TokensPerBlock::try_from(self.block_tokens)?;
        if let Some(hbm) = &self.hbm {
            if hbm.bytes < self.block_bytes {
                return Err(Error::invalid("hbm.bytes", hbm.bytes, self.block_bytes..));
            }
            if !self.fabric.cuda {
                let text = "[hbm] is given without fabric.cuda";
                return Err(Error::new(ErrorKind::Invalid, text));
            }
        }
        self.cache_config()?.check()
    }

    /// What is announced to peers and to the index must be an address that they can connect to.
    fn check_reachable(&self) -> Result<()> {
        let unspecified = |field: &str, value: &str| {
            let accepted = "the address that others reach this host by: it is announced to them";
            Err(Error::new(
                ErrorKind::Invalid,
                format!("{field} is {value}, expected {accepted}"),
            ))
        };
        if let Some(address) = self.peer_listen
            && address.ip().is_unspecified()
        {
            return unspecified("peer_listen", &address.to_string());
        }
        let Some(index) = &self.index else {
            return Ok(());
        };
        if ["*", "0.0.0.0", "[::]", "::"].contains(&index.publish_host.as_str()) {
            return unspecified("index.publish_host", &index.publish_host);
        }
        if index.lookup_deadline_ms == 0 {
            return Err(Error::invalid("index.lookup_deadline_ms", 0, 1..));
        }
        Ok(())
    }

    /// The 32 bytes of `model_identity`.
    pub(crate) fn identity(&self) -> Result<[u8; 32]> {
        parse_identity(&self.model_identity)
    }

    /// The scheme of index keys.
    pub(crate) fn scheme(&self) -> Result<IndexScheme> {
        IndexScheme::parse(&self.key_scheme).map_err(|error| error.at("key_scheme"))
    }

    /// The part of each block's bytes that is held here.
    pub(crate) fn shard(&self) -> Result<Shard> {
        self.shard.to_shard().map_err(|error| error.at("shard"))
    }

    /// The part that the tiers are made of.
    pub(crate) fn cache_config(&self) -> Result<CacheConfig> {
        let pod = PodName::new(&self.pod)?;
        let mut cache = CacheConfig::new(pod, self.identity()?, self.block_bytes, self.host.bytes);
        cache.disk = self.disk.as_ref().map(|disk| DiskConfig {
            path: disk.path.clone(),
            bytes: disk.bytes,
            segment_bytes: disk.segment_bytes,
            direct: match disk.direct {
                DirectSetting::Auto => DirectMode::Auto,
                DirectSetting::On => DirectMode::On,
                DirectSetting::Off => DirectMode::Off,
            },
            engine: match disk.engine {
                DiskEngineSetting::Auto => FileEngineMode::Auto,
                DiskEngineSetting::IoUring => FileEngineMode::Uring,
                DiskEngineSetting::Threads => FileEngineMode::Blocking,
            },
        });
        cache.object = self.object.as_ref().map(|object| ObjectConfig {
            store_name: OBJECT_STORE.to_owned(),
            prefix: object.prefix.clone(),
        });
        cache.peer_listen = self.peer_listen;
        cache.device_sums = self.fabric.cuda_sums;
        cache.locate_timeout = self.lookup_deadline();
        Ok(cache)
    }

    /// How long one question to the index may take.
    pub(crate) fn lookup_deadline(&self) -> Duration {
        let default = default_lookup_deadline_ms();
        Duration::from_millis(
            self.index
                .as_ref()
                .map_or(default, |i| i.lookup_deadline_ms),
        )
    }
}
