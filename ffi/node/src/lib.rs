//! A kvfabric node: the tiers, the fabric and the index of one pod, joined.
//!
//! [`Node::open`] reads a [`NodeConfig`], opens the tiers (recovering what the disk holds), serves peers, publishes
//! events and registers with the index. An engine registers its memory with [`Node::agent`], hands blocks over with
//! [`Node::store`] and takes them back with [`Node::fetch`]. The C ABI and the Python package are skins of this crate.
//!
//! Callers that are not asynchronous use an [`AttachedNode`], which has threads of its own and answers with
//! [`Operation`]s to poll, wait for or hand to an event loop.
//!
//! This crate does not decide anything: what to keep, evict, fetch or trust is settled below it.
#![forbid(unsafe_code)]

mod attached;
mod blocks;
pub mod config;
mod connection;
pub mod identity;
mod index;
pub mod life;
mod logs;
mod metrics;
pub mod names;
mod node;
mod operation;
mod parts;
mod ports;
mod publisher;
mod runtime;

#[cfg(test)]
mod tests;

pub use attached::{AttachedNode, Fetched};
pub use blocks::{Namespace, Prefix};
pub use config::NodeConfig;
pub use connection::{IndexConnection, PeerConnection};
pub use node::{Lookup, Node};
pub use operation::Operation;
pub use publisher::{EnginePublisher, EnginePublisherConfig};
pub use runtime::Runtime;

// What a caller needs to use a node, so that an engine depends on one crate.
pub use kvcache_core::event::EngineEvent;
pub use kvcache_core::id::POD_NAME_BYTES_MAX;
pub use kvcache_core::ports::{Holder, Located};
pub use kvcache_core::prefix::IndexScheme;
pub use kvcache_core::shape::TokensPerBlock;
pub use kvcache_core::{
    BlockInfo, BlockKey, EngineHash, Error, ErrorKind, IndexKey, PinId, PodName, Result, Tier,
};
pub use kvfabric_indexer::client::{LookupAnswer, LookupRequest, PodDepth, Prompt, SourcePosition};
pub use kvfabric_tiers::{
    BlockMemory, FetchBlock, FetchReport, HbmStats, HeldDepth, Pages, Pinned, PromoteReport, Reach,
    Removed, Segment, Source, StoreBlock, StoreReport,
};
pub use kvfabric_transfer as transfer;
