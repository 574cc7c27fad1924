//! Keeps blocks in host memory, on NVMe and in object stores, and brings them back, verified.
#![forbid(unsafe_code)]

mod checksum;
pub mod disk;
pub mod object;
pub mod record;
