//! A grid as the kernel takes it.

use crate::convert::Grid;

/// `struct grid` of `kernels.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RawGrid {
    pub(crate) target: u64,
    pub(crate) source: u64,
    pub(crate) target_steps: [u64; 3],
    pub(crate) source_steps: [u64; 3],
    pub(crate) counts: [u32; 3],
    pub(crate) bytes: u32,
}

impl RawGrid {
    /// Between memories that begin at these addresses.
    pub(crate) fn of(grid: &Grid, target: u64, source: u64) -> Self {
        Self {
            target: target + grid.target_offset,
            source: source + grid.source_offset,
            target_steps: grid.target_steps,
            source_steps: grid.source_steps,
            counts: grid.counts,
            bytes: grid.bytes,
        }
    }
}
