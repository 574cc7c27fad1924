//! The index's own files, built with [`sync`] in place of `crate::sync` there: every access to shared memory asks the test who
//! goes on.
//!
//! `tests/` holds the scenarios. What they show holds for sequentially consistent memory; what weaker orders
//! allow, `orders` explores for the pieces in which readers and the writer meet.
// The files bring their own unit tests, which are made where they belong.
#![cfg(not(test))]
#![forbid(unsafe_code)]
#![allow(
    dead_code,
    unreachable_pub,
    reason = "the rest of the crate that these files are of uses what is unused here"
)]

#[path = "../../src/adapter/mod.rs"]
pub mod adapter;
#[path = "../../src/index/mod.rs"]
pub mod index;
#[path = "../../src/score.rs"]
pub mod score;
pub mod sync;
