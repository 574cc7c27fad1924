//! What tests of several backends share.

use std::time::{Duration, Instant};

use crate::descriptor::Descriptor;
use crate::region::Region;

/// Far beyond what a loaded machine needs.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that comes by itself.
pub(super) fn until(done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "it does not come");
        std::thread::yield_now();
    }
}

/// Bytes that tell their place and their seed.
pub(super) fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at / 251) as u8 ^ (at % 251) as u8 ^ seed)
        .collect()
}

pub(super) fn whole(region: &Region) -> Descriptor {
    region.descriptor(0, region.bytes())
}
