//! What devices run of ours: `kernels.cu`, as the PTX that `scripts/cuda-kernels` makes of it.

#[cfg(test)]
mod host;
#[cfg(test)]
mod tests;
