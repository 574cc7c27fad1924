//! Keeps blocks in host memory, on NVMe and in a shared object store, and brings them back, verified.
//!
//! A [`Cache`] stores blocks from an engine's memory and fetches them into it, from wherever they
//! are: its own tiers, a peer's memory, or the object store. What lives where is decided by
//! `kvcache_core::manager`; bytes are moved by `kvfabric_transfer`; this crate says which bytes those
//! are, and checks every one of them on arrival. Any doubt is a miss.
//!
//! This crate does not decide what to evict or where to route, and it opens no file and no socket for
//! block bytes: the transfer agent does. gRPC carries greetings and leases only.
#![forbid(unsafe_code)]

mod arena;
mod cache;
mod checksum;
pub mod config;
pub mod disk;
mod hbm;
mod mover;
mod numbers;
pub mod object;
mod pages;
mod peer;
pub mod record;
mod scratch;

pub use cache::{
    Cache, CacheStats, FetchBlock, FetchReport, HeldDepth, Pinned, Reach, Removed, Source,
    StoreBlock, StoreReport,
};
pub use config::{CacheConfig, DiskConfig, NameReader, ObjectConfig, PeerLimits};
pub use hbm::{HbmFetch, HbmStats, HbmTier, PromoteReport, seen_from};
pub use pages::{BlockMemory, Pages, SEGMENTS_MAX, Segment};
pub use peer::{PeerServer, PeerService};
