//! Forms of blocks: 8-bit numbers for cold tiers, and the order of bytes within pages.
//!
//! What is computed here is what CUDA devices compute, bit by bit: a block that one has converted is read by the other.

mod e4m3;
mod grid;
#[cfg(test)]
mod tests;

pub use e4m3::{bf16_of, bf16s_of_e4m3, e4m3_of, e4m3s_of_bf16, of_bf16, of_e4m3};
pub use grid::{GRID_ALIGNMENT, Grid, PageHeads};
