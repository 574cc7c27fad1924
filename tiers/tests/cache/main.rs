//! The cache with the real transfer agent: memory, files, objects in a local directory, and peers over gRPC on
//! loopback.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::single_range_in_vec_init,
    reason = "everything here is a test or serves one"
)]

use kvfabric_transfer::FileEngineMode;

/// How the disk tier reads and writes here; `on_threads` runs the same tests with the other engine.
const ENGINE: FileEngineMode = FileEngineMode::Auto;

mod broken;
mod device;
mod ending;
mod fabric;
mod faults;
mod hbm;
mod hbm_events;
mod keeping;
mod landing;
mod locating;
mod lying_peer;
mod peers;
mod property;
mod scatter;
mod support;
mod tiers;
