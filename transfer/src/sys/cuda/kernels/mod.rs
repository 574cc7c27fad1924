//! What devices run of ours: `kernels.cu`, as the PTX that `scripts/cuda-kernels` makes of it.

mod grid;
#[cfg(test)]
mod host;
mod lists;
mod load;
#[cfg(test)]
mod tests;

pub(crate) use grid::RawGrid;
pub(crate) use lists::{Lists, Upload};
pub(crate) use load::{Kernel, Kernels, argument};
