//! The global index: which pods hold a prefix, how deep, in which tier.
//!
//! Events come in through `source` (ZMQ, vLLM's wire format), are decoded by [`adapter`], put in order by the state
//! machine in [`ingest`] and applied to [`index::KvIndex`]; [`server`] answers lookups over gRPC. Engines and nodes
//! link only the other end: [`publisher`] tells what changed, [`client`] asks and registers.
//!
//! This crate does not move or hold block bytes, and knows nothing of device memory.
#![forbid(unsafe_code)]

pub mod adapter;
#[cfg(feature = "server")]
pub mod cli;
#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod config;
pub mod index;
pub mod ingest;
#[cfg(feature = "server")]
mod metrics;
#[cfg(feature = "client")]
pub mod publisher;
pub mod score;
#[cfg(feature = "server")]
pub mod server;
#[cfg(feature = "server")]
mod snapshot;
#[cfg(feature = "server")]
mod source;
mod sync;
#[cfg(feature = "server")]
mod tokenize;
pub mod wire;
#[cfg(any(feature = "client", feature = "server"))]
mod zmtp;
