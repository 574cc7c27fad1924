//! The tests of `cache` once more, with a disk tier on blocking threads: what nodes have where io_uring is refused.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::single_range_in_vec_init,
    reason = "everything here is a test or serves one"
)]

use kvfabric_transfer::FileEngineMode;

/// How the disk tier reads and writes here.
const ENGINE: FileEngineMode = FileEngineMode::Blocking;

#[path = "cache/broken.rs"]
mod broken;
#[path = "cache/ending.rs"]
mod ending;
#[path = "cache/faults.rs"]
mod faults;
#[path = "cache/keeping.rs"]
mod keeping;
#[path = "cache/locating.rs"]
mod locating;
#[path = "cache/peers.rs"]
mod peers;
#[path = "cache/property.rs"]
mod property;
#[path = "cache/scatter.rs"]
mod scatter;
#[path = "cache/support.rs"]
mod support;
#[path = "cache/tiers.rs"]
mod tiers;
