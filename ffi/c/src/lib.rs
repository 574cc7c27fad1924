//! The C ABI of kvfabric: what `include/kvfabric.h` declares.
//!
//! Each entry checks its inputs, catches panics, and writes its outputs last (`boundary`). Handles are boxes that
//! the caller owns; all handles of one agent share its fate: a panic in one poisons all. Nothing here calls back
//! into the caller.
//!
//! The names are those of the header, which `tests/header.rs` generates and compares.
//!
//! This crate does not decide or move anything: it is a skin of the `kvfabric` crate.
#![allow(non_camel_case_types, reason = "the names of the C header")]

pub mod agent;
pub mod agent_options;
mod begin;
pub mod blocks;
mod boundary;
pub mod device;
pub mod estimate;
pub mod events;
mod handles;
pub mod hbm;
mod inbox;
pub mod index;
pub mod list;
pub mod names;
pub mod node;
mod options;
pub mod pages;
pub mod peer;
pub mod place;
pub mod prefix;
pub mod progress;
pub mod publisher;
pub mod range;
pub mod region;
pub mod reports;
pub mod service;
pub mod status;
pub mod stream;
pub mod task;
pub mod transfer;
pub mod upkeep;

#[cfg(test)]
mod tests;
