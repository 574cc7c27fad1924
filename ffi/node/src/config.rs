//! What a node is made of: one TOML file, overridden by the environment, overridden by flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::prefix::data::Shard;
use kvcache_core::shape::{Tensor, TokensPerBlock};
use kvcache_core::{Error, ErrorKind, PodName, Result};
use kvfabric_tiers::{CacheConfig, DiskConfig, ObjectConfig};
use kvfabric_transfer::DirectMode;
use serde::{Deserialize, Serialize};

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
    /// Where Prometheus metrics are served over HTTP; not at all without it.
    pub metrics_listen: Option<SocketAddr>,
}

/// One rank's part of each block; the default is all of it. Two ranks never share or overwrite bytes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShardSection {
    /// The rank in its tensor-parallel group, from 0.
    pub tensor_rank: u32,
    /// Ranks in that group.
    pub tensor_size: u32,
    /// Layers of the model.
    pub layers: u32,
    /// KV heads of the model, all ranks together; 1 for one latent shared by all.
    pub kv_heads: u32,
}

impl Default for ShardSection {
    fn default() -> Self {
        Self {
            tensor_rank: 0,
            tensor_size: 1,
            layers: 1,
            kv_heads: 1,
        }
    }
}

impl ShardSection {
    fn to_shard(&self) -> Result<Shard> {
        if self.layers == 0 {
            return Err(Error::invalid("layers", 0, 1..));
        }
        let tensor = Tensor::new(self.tensor_rank, self.tensor_size)?;
        let heads = tensor.heads(self.kv_heads)?;
        Ok(Shard {
            tensor,
            heads,
            ..Shard::whole(self.layers, self.kv_heads)
        })
    }
}

/// The DRAM tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HostSection {
    /// Bytes, rounded down to whole blocks.
    pub bytes: u64,
}

/// The NVMe tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSection {
    /// A folder of this node's own; made if it is not there.
    pub path: PathBuf,
    /// Bytes of all segments together.
    pub bytes: u64,
    /// Bytes of one segment, in which space comes back.
    pub segment_bytes: u64,
    /// Past the page cache: "auto", "on" or "off".
    #[serde(default)]
    pub direct: DirectSetting,
}

/// Whether files are read and written past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectSetting {
    /// Where the file system can.
    #[default]
    Auto,
    /// Always; an error where it cannot be.
    On,
    /// Never.
    Off,
}

/// The shared object tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectSection {
    /// `file:///folder` or `s3://bucket`. Credentials come from the environment (`AWS_…`), never from this file.
    pub url: String,
    /// What every object's name begins with.
    #[serde(default)]
    pub prefix: String,
    /// Accept a service without TLS: for stores on this host or on a network that is trusted.
    #[serde(default)]
    pub allow_http: bool,
}

/// How bytes move between pods.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FabricSection {
    /// Shared memory with pods on this host.
    pub shm: bool,
    /// Where TCP is served. Port 0 lets the system choose; "off": not at all.
    #[serde(with = "listen")]
    pub tcp_listen: Option<SocketAddr>,
}

impl Default for FabricSection {
    fn default() -> Self {
        Self {
            shm: true,
            tcp_listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        }
    }
}

/// The global index.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IndexSection {
    /// Its gRPC address, `http://host:port`.
    pub address: String,
    /// The address on which this node publishes events; the ports are the system's choice.
    #[serde(default = "default_publish_host")]
    pub publish_host: String,
    /// How long one question may take.
    #[serde(default = "default_lookup_deadline_ms")]
    pub lookup_deadline_ms: u64,
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

fn default_publish_host() -> String {
    "127.0.0.1".to_owned()
}

const fn default_lookup_deadline_ms() -> u64 {
    500
}

impl NodeConfig {
    /// Reads `file` if one is given, then the environment, then `overrides` (`host.bytes` = `1073741824`).
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the key or the value and where it came from; [`ErrorKind::NotFound`] for a file
    /// that is not there.
    pub fn load(file: Option<&Path>, overrides: &[(String, String)]) -> Result<Self> {
        let mut builder = config::Config::builder();
        if let Some(file) = file {
            // Asked first, because the reader's own error does not say which kind it is.
            std::fs::metadata(file)
                .map_err(|e| Error::io(format!("configuration file {}", file.display()), e))?;
            builder = builder.add_source(config::File::from(file).format(config::FileFormat::Toml));
        }
        builder = builder.add_source(
            config::Environment::with_prefix(ENVIRONMENT_PREFIX)
                .prefix_separator("_")
                .separator("__"),
        );
        let place = || match file {
            Some(file) => format!("configuration ({}, environment, flags)", file.display()),
            None => "configuration (environment, flags)".to_owned(),
        };
        let invalid = |error: config::ConfigError| {
            Error::new(ErrorKind::Invalid, format!("{}: {error}", place()))
        };
        for (key, value) in overrides {
            builder = builder.set_override(key, value.as_str()).map_err(invalid)?;
        }
        let config: Self = builder
            .build()
            .and_then(|c| c.try_deserialize())
            .map_err(invalid)?;
        config.check().map_err(|error| error.at(place()))?;
        Ok(config)
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the field and its value.
    pub fn check(&self) -> Result<()> {
        self.identity()?;
        self.scheme()?;
        self.shard()?;
        self.check_reachable()?;
        TokensPerBlock::try_from(self.block_tokens)?;
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
        });
        cache.object = self.object.as_ref().map(|object| ObjectConfig {
            store_name: OBJECT_STORE.to_owned(),
            prefix: object.prefix.clone(),
        });
        cache.peer_listen = self.peer_listen;
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

/// The 32 bytes of a model identity, written as 64 hexadecimal digits.
///
/// # Errors
/// [`ErrorKind::Invalid`] with the text.
pub fn parse_identity(text: &str) -> Result<[u8; 32]> {
    let wrong = || {
        Error::invalid(
            "model_identity",
            format!("{text:?}"),
            "64 hexadecimal digits",
        )
    };
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(wrong());
    }
    let mut identity = [0; 32];
    for (byte, pair) in identity.iter_mut().zip(digits.chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
    }
    Ok(identity)
}

/// An address, or "off".
mod listen {
    use std::net::SocketAddr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    const OFF: &str = "off";

    #[expect(clippy::ref_option, reason = "serde asks for this signature")]
    pub(super) fn serialize<S: Serializer>(
        address: &Option<SocketAddr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => serializer.collect_str(address),
            None => serializer.serialize_str(OFF),
        }
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(
        deserializer: D,
    ) -> Result<Option<SocketAddr>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == OFF {
            return Ok(None);
        }
        let wrong = |_| D::Error::custom(format!("{text:?} is neither ADDRESS:PORT nor \"off\""));
        text.parse().map(Some).map_err(wrong)
    }
}
