//! The peer tier: other nodes' memory, found and leased over gRPC, read one-sided.

mod client;
mod roster;
mod server;
mod wire;

pub(crate) use client::{HeldLease, Peers};
pub use server::PeerServer;
pub(crate) use server::Serving;
pub(crate) use wire::LeasedBlock;
