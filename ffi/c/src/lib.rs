//! The C ABI of kvfabric: what `include/kvfabric.h` declares.
//!
//! Each entry checks its inputs, catches panics, and writes its outputs last (`boundary`). Handles are boxes that
//! the caller owns; all handles of one agent share its fate: a panic in one poisons all (`life`). Nothing here calls back
//! into the caller.
//!
//! The names are those of the header, which `tests/header.rs` generates and compares.
//!
//! This crate does not decide or move anything: it is a skin of the `kvfabric` crate and of the index client.
#![allow(non_camel_case_types, reason = "the names of the C header")]

pub mod agent;
mod boundary;
mod inbox;
pub mod index;
mod life;
mod options;
pub mod peer;
pub mod region;
pub mod status;
pub mod transfer;

#[cfg(test)]
mod tests;
