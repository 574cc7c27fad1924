//! The peer tier: other nodes' memory, found and leased over gRPC, read one-sided.

mod client;
mod roster;
mod server;
mod service;
mod wire;

pub(crate) use client::{HeldLease, Peers};
pub(crate) use roster::check_address;
pub use server::PeerServer;
pub(crate) use server::Serving;
pub use service::PeerService;
pub(crate) use wire::LeasedBlock;
