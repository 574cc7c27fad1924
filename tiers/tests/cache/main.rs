//! The cache with the real transfer agent: memory, files, objects in a local directory, and peers over gRPC on
//! loopback.

mod faults;
mod lying_peer;
mod peers;
mod property;
mod support;
mod tiers;
