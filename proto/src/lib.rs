//! The gRPC messages and services of kvfabric, generated from the `.proto` files beside this crate and committed, so
//! that nobody needs a protobuf compiler.
//!
//! `cargo test -p kvfabric-proto` fails when the committed code differs from what the files generate;
//! `KVFABRIC_REGENERATE=1 cargo test -p kvfabric-proto` writes it anew.
//!
//! This crate does not contain logic.
#![forbid(unsafe_code)]

mod message;

pub use message::Encoded;

/// The version of the gRPC protocols of `kvfabric.v1`. Peers with another one are refused with both versions named.
pub const PROTOCOL_VERSION: u32 = 1;

/// The descriptors of every service, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");

/// Package `kvfabric.v1`: the index and the peer service.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[rustfmt::skip]
#[path = "generated/kvfabric.v1.rs"]
pub mod v1;

/// The service of `kvfabric.v1.Index` for who writes answers to lookups himself: `LookupResponse` is [`Encoded`] here, by itself
/// and in `LookupReply`; all else is as in [`v1`].
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[rustfmt::skip]
#[path = "generated/kvfabric.v1.encoded.rs"]
pub mod v1_encoded;

/// Package `indexer.v1`, llm-d's: pod scores for a text prompt.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
#[rustfmt::skip]
#[path = "generated/indexer.v1.rs"]
pub mod indexer_v1;
