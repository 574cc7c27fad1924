//! The settings of `kv-indexer`: one TOML file, environment and flags.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

/// Everything `kv-indexer` can be told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Where gRPC listens; loopback unless told otherwise. Port 0: any free one.
    pub grpc_listen: SocketAddr,
    /// Where Prometheus metrics are served; absent: nowhere.
    pub metrics_listen: Option<SocketAddr>,
    /// The scheme of index keys: `xxh3:SEED`, `cbor-fnv:SEED` or `xxh64:SEED`.
    pub key_scheme: String,
    /// Tokens a block.
    pub block_size: u32,
    /// A `tokenizer.json` for each model that `indexer.v1` shall score text prompts of.
    pub tokenizers: BTreeMap<String, PathBuf>,
    /// How long a source may stay disconnected before its entries are dropped, in milliseconds.
    pub source_ttl_ms: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            grpc_listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            metrics_listen: None,
            key_scheme: "xxh3:1337".to_owned(),
            block_size: 16,
            tokenizers: BTreeMap::new(),
            source_ttl_ms: 30_000,
        }
    }
}
