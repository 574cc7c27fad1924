//! The settings of `kv-indexer`: one TOML file, then `KVFABRIC_INDEXER_*`, then flags; unknown keys are errors.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Config, ConfigError, Environment, File, FileFormat};
use kvcache_core::prefix::IndexScheme;
use kvcache_core::{Error, ErrorKind, Result};
use serde::Deserialize;

use crate::adapter::{BATCH_BYTES_MAX, Media, MediumUse};
use crate::score::TierWeights;

mod media;
mod sources;
mod tenants;
#[cfg(test)]
mod tests;

pub use media::MediumConfig;
pub use sources::{GroupConfig, ListenerConfig, StaticSource};
pub(crate) use tenants::Tenants;
pub use tenants::{DEFAULT_TENANT, TENANTS_MAX, TenantConfig};

/// What every environment variable of the indexer starts with; `__` stands for the dot of a nested key.
pub const ENVIRONMENT_PREFIX: &str = "KVFABRIC_INDEXER";

/// The most tokens a block may have.
const BLOCK_SIZE_MAX: u32 = 1 << 16;
/// The longest any configured duration may be: a day, in milliseconds.
const DURATION_MS_MAX: u64 = 86_400_000;
/// The least that publishers must be allowed to send at once: below it, ordinary batches would be refused.
const EVENT_BYTES_MIN: u64 = 64 << 10;
/// The most lookups at once that may be configured.
const LOOKUPS_MAX: usize = 1 << 20;

/// Everything `kv-indexer` can be told.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Where gRPC listens; loopback unless told otherwise. Port 0: any free one.
    pub grpc_listen: SocketAddr,
    /// Where Prometheus metrics are served over HTTP, at `/metrics`; absent: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// The scheme of index keys: `xxh3:SEED`, `cbor-fnv:SEED` or `xxh64:SEED`.
    pub key_scheme: String,
    /// Tokens a block.
    pub block_size: u32,
    /// What a block is worth in each tier, for scores.
    pub tier_weights: TierWeightsConfig,
    /// What media that engines name are taken for, in any case of letters, and what blocks there are worth.
    pub media: BTreeMap<String, MediumConfig>,
    /// The same for all media that are neither named there nor known to the indexer.
    pub unknown_media: String,
    /// How long a source may stay disconnected before its entries are dropped.
    pub source_ttl_ms: u64,
    /// The longest message of a publisher that is taken, in bytes; one that announces more is disconnected.
    pub event_bytes_max: usize,
    /// How long a call may take whose client names no deadline.
    pub lookup_deadline_ms: u64,
    /// A reader of a snapshot or of a stream of lookups that takes nothing for so long is cut off.
    pub reader_timeout_ms: u64,
    /// Lookups at once; further ones are refused as busy.
    pub lookups_in_flight_max: usize,
    /// Pods that may be registered at once; further ones are refused as busy.
    pub pods_max: usize,
    /// What all indexes may take together, like `2GiB`, or `unlimited`; absent: half of the memory that the process may
    /// use.
    pub max_bytes: Option<String>,
    /// Who shares the indexer, by name, and how much of `max_bytes` each may have.
    pub tenants: BTreeMap<String, TenantConfig>,
    /// Refuse pods and questions that belong to none of them.
    pub require_tenant: bool,
    /// Where the index keeps a snapshot of itself to begin from after a restart; absent: nowhere.
    pub snapshot_path: Option<PathBuf>,
    /// How often the snapshot is written.
    pub snapshot_interval_ms: u64,
    /// Replicas whose snapshot a starting indexer takes up, tried in this order before its own; `host:port` each.
    #[serde(deserialize_with = "list_or_commas")]
    pub bootstrap_peers: Vec<String>,
    /// What a snapshot says of a source is dropped when its publisher has not confirmed it within so long; until then
    /// lookups are refused.
    pub bootstrap_deadline_ms: u64,
    /// How long the blocks of a prompt are expected where a router said that it sends it.
    pub routing_ttl_ms: u64,
    /// The same for pods that publish no events.
    pub approximate_ttl_ms: u64,
    /// How many blocks a pod that publishes no events is thought to keep: the least recently routed are forgotten.
    pub approximate_blocks_max: usize,
    /// The tokenizers of models whose text prompts `indexer.v1` shall score.
    pub tokenizers: Vec<TokenizerConfig>,
    /// Engines that do not register themselves.
    pub sources: Vec<StaticSource>,
    /// Endpoints that engines connect to by themselves, as with llm-d: their topics say who they are.
    pub listeners: Vec<ListenerConfig>,
}

/// What a block is worth in each tier, one in the accelerator's memory being 1 by default.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TierWeightsConfig {
    /// In the accelerator's memory.
    pub hbm: f64,
    /// In host memory.
    pub dram: f64,
    /// On a local disk.
    pub nvme: f64,
    /// In the shared object store.
    pub object: f64,
}

/// A model's tokenizer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// The model as requests name it.
    pub model: String,
    /// Its `tokenizer.json`.
    pub path: PathBuf,
    /// Whether to add the special tokens that a completion endpoint adds, like a leading BOS.
    #[serde(default)]
    pub add_special_tokens: bool,
}

/// The key and the value that an error is about, if it says where.
fn value_at(told: &Config, error: &ConfigError) -> Option<String> {
    let (ConfigError::At { key, .. } | ConfigError::Type { key, .. }) = error else {
        return None;
    };
    let key = key.as_ref()?;
    let value: config::Value = told.get(key).ok()?;
    Some(match value.kind {
        config::ValueKind::String(text) => format!("{key} is {text:?}"),
        other => format!("{key} is {other}"),
    })
}

/// A list, or what an environment variable and a flag can hold: one text with commas.
fn list_or_commas<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        List(Vec<String>),
        Commas(String),
    }
    Ok(match Given::deserialize(from)? {
        Given::List(list) => list,
        Given::Commas(text) => {
            let parts = text.split(',').map(str::trim);
            let parts = parts.filter(|part| !part.is_empty());
            parts.map(str::to_owned).collect()
        }
    })
}

impl Default for TierWeightsConfig {
    fn default() -> Self {
        use kvcache_core::Tier;
        let weights = TierWeights::default();
        Self {
            hbm: weights.of(Tier::Device),
            dram: weights.of(Tier::Host),
            nvme: weights.of(Tier::Disk),
            object: weights.of(Tier::Object),
        }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            grpc_listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            metrics_listen: None,
            key_scheme: "xxh3:1337".to_owned(),
            block_size: 16,
            tier_weights: TierWeightsConfig::default(),
            media: BTreeMap::new(),
            unknown_media: MediumUse::Refuse.name().to_owned(),
            source_ttl_ms: 30_000,
            event_bytes_max: 16 << 20,
            lookup_deadline_ms: 1_000,
            reader_timeout_ms: 30_000,
            lookups_in_flight_max: 4_096,
            pods_max: 8_192,
            max_bytes: None,
            tenants: BTreeMap::new(),
            require_tenant: false,
            snapshot_path: None,
            snapshot_interval_ms: 60_000,
            bootstrap_peers: Vec::new(),
            bootstrap_deadline_ms: 30_000,
            routing_ttl_ms: 2_000,
            approximate_ttl_ms: 300_000,
            approximate_blocks_max: 65_536,
            tokenizers: Vec::new(),
            sources: Vec::new(),
            listeners: Vec::new(),
        }
    }
}

impl ServerConfig {
    /// Reads the file if there is one, then the environment, then `flags` (key and value, the last word).
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the file and the key: an unknown one, or a value that does not fit.
    pub fn load(file: Option<&Path>, flags: &[(&str, String)]) -> Result<Self> {
        Self::load_with(file, Environment::with_prefix(ENVIRONMENT_PREFIX), flags)
    }

    fn load_with(
        file: Option<&Path>,
        environment: Environment,
        flags: &[(&str, String)],
    ) -> Result<Self> {
        let place = file.map_or_else(String::new, |path| format!(" ({})", path.display()));
        let context = format!("configuration of the indexer{place}");
        let invalid = |error| Error::new(ErrorKind::Invalid, context.clone()).with_source(error);
        let mut builder = Config::builder();
        if let Some(path) = file {
            builder = builder.add_source(File::from(path).format(FileFormat::Toml));
        }
        let environment = environment
            .prefix_separator("_")
            .separator("__")
            .try_parsing(true);
        builder = builder.add_source(environment);
        for (key, value) in flags {
            builder = builder
                .set_override(*key, value.as_str())
                .map_err(invalid)?;
        }
        let told = builder.build().map_err(invalid)?;
        let config = told.clone().try_deserialize::<Self>().map_err(|error| {
            let context = match value_at(&told, &error) {
                Some(value) => format!("{context}: {value}"),
                None => context.clone(),
            };
            Error::new(ErrorKind::Invalid, context).with_source(error)
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the key, the value and what is accepted.
    pub fn check(&self) -> Result<()> {
        let within = |key: &str, value: u64, accepted: std::ops::RangeInclusive<u64>| {
            if accepted.contains(&value) {
                Ok(())
            } else {
                Err(Error::invalid(key, value, accepted))
            }
        };
        within(
            "block_size",
            self.block_size.into(),
            1..=BLOCK_SIZE_MAX.into(),
        )?;
        within("source_ttl_ms", self.source_ttl_ms, 1..=DURATION_MS_MAX)?;
        let event_bytes = EVENT_BYTES_MIN..=BATCH_BYTES_MAX as u64;
        within("event_bytes_max", self.event_bytes_max as u64, event_bytes)?;
        within(
            "lookup_deadline_ms",
            self.lookup_deadline_ms,
            1..=DURATION_MS_MAX,
        )?;
        within(
            "reader_timeout_ms",
            self.reader_timeout_ms,
            1..=DURATION_MS_MAX,
        )?;
        within(
            "snapshot_interval_ms",
            self.snapshot_interval_ms,
            1..=DURATION_MS_MAX,
        )?;
        within(
            "bootstrap_deadline_ms",
            self.bootstrap_deadline_ms,
            1..=DURATION_MS_MAX,
        )?;
        for (key, value) in [
            ("routing_ttl_ms", self.routing_ttl_ms),
            ("approximate_ttl_ms", self.approximate_ttl_ms),
        ] {
            within(key, value, 1..=DURATION_MS_MAX)?;
        }
        let blocks = self.approximate_blocks_max as u64;
        within("approximate_blocks_max", blocks, 1..=1 << 24)?;
        self.check_peers()?;
        let lookups = self.lookups_in_flight_max as u64;
        within("lookups_in_flight_max", lookups, 1..=LOOKUPS_MAX as u64)?;
        within("pods_max", self.pods_max as u64, 1..=u64::from(u32::MAX))?;
        self.scheme()?;
        self.weights()?;
        self.media()?;
        Tenants::new(self)?;
        self.check_listeners()?;
        let mut names = std::collections::BTreeSet::new();
        for (position, source) in self.sources.iter().enumerate() {
            let place = format!("sources[{position}]");
            let pod = source.pod_name().map_err(|error| error.at(&place))?;
            for spec in source.specs().map_err(|error| error.at(&place))? {
                if !names.insert(crate::wire::source_name(&pod, &spec.name)) {
                    let context = format!("{place}: {pod}/{} is there twice", spec.name);
                    return Err(Error::new(ErrorKind::Invalid, context));
                }
            }
        }
        Ok(())
    }

    fn check_peers(&self) -> Result<()> {
        for peer in &self.bootstrap_peers {
            let is_address = peer.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
            });
            if !is_address {
                return Err(Error::invalid(
                    "bootstrap_peers",
                    format!("{peer:?}"),
                    "HOST:PORT",
                ));
            }
        }
        Ok(())
    }

    /// The scheme of index keys.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the key and the value.
    pub fn scheme(&self) -> Result<IndexScheme> {
        IndexScheme::parse(&self.key_scheme).map_err(|error| error.at("key_scheme"))
    }

    /// The weights of tiers.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the tier and the weight.
    pub fn weights(&self) -> Result<TierWeights> {
        let TierWeightsConfig {
            hbm,
            dram,
            nvme,
            object,
        } = self.tier_weights;
        TierWeights::new([hbm, dram, nvme, object]).map_err(|error| error.at("tier_weights"))
    }

    /// What media are taken for.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the key and the value.
    pub fn media(&self) -> Result<Media> {
        let (mut configured, mut weights) = (Vec::new(), Vec::new());
        for (name, told) in &self.media {
            let (taken_for, weight) = told
                .parse(name)
                .map_err(|error| error.at(format_args!("media.{name}")))?;
            configured.push((name.clone(), taken_for));
            weights.extend(weight.map(|weight| (name.clone(), weight)));
        }
        let unknown =
            MediumUse::parse(&self.unknown_media).map_err(|error| error.at("unknown_media"))?;
        Ok(Media::new(configured, unknown).with_weights(weights, self.weights()?))
    }

    /// How long a source may stay disconnected.
    #[must_use]
    pub const fn source_ttl(&self) -> Duration {
        Duration::from_millis(self.source_ttl_ms)
    }

    /// How long a reader may take nothing.
    #[must_use]
    pub const fn reader_timeout(&self) -> Duration {
        Duration::from_millis(self.reader_timeout_ms)
    }

    /// How often the snapshot is written.
    #[must_use]
    pub const fn snapshot_interval(&self) -> Duration {
        Duration::from_millis(self.snapshot_interval_ms)
    }

    /// How long what a snapshot says may stay unconfirmed.
    #[must_use]
    pub const fn bootstrap_deadline(&self) -> Duration {
        Duration::from_millis(self.bootstrap_deadline_ms)
    }

    /// How long a call may take whose client names no deadline.
    #[must_use]
    pub const fn lookup_deadline(&self) -> Duration {
        Duration::from_millis(self.lookup_deadline_ms)
    }
}
