//! The index's own files that readers and the writer meet in, built with loom's atomics in place of `crate::sync` there:
//! each scenario is run in every order, of threads and of memory, that loom knows the language to allow.
//!
//! That is publication (a run, then the entry that leads to it), the version of a run's header, the version of the entries, and
//! a list of holders that is taken back and given out again while somebody reads it. The whole index is too much for loom;
//! `schedules` runs it, under orders of threads only.
//!
//! This crate does not say anything of what loom does not model: loads that see what is stored later in the order of all
//! (load buffering), and `OnceLock`, in which chunks of memory appear, is the standard library's.
// The files bring their own unit tests, which are made where they belong.
#![cfg(not(test))]
#![forbid(unsafe_code)]
#![allow(
    dead_code,
    unreachable_pub,
    reason = "the rest of the crate that these files are of uses what is unused here"
)]
#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "the scenarios are tests: what is wrong there shall panic"
)]

#[path = "../../src/index/arena.rs"]
mod arena;
#[path = "../../src/index/doors.rs"]
mod doors;
#[path = "../../src/index/hash.rs"]
mod hash;
#[path = "../../src/index/runs.rs"]
mod runs;
pub mod scenarios;
#[path = "../../src/index/sets.rs"]
mod sets;
#[path = "../../src/source/shown.rs"]
mod shown;
pub mod sync;

/// What runs need to know of their blocks; the keys themselves are not in these scenarios.
mod blocks {
    pub(super) const SEGMENT_BITS: u32 = 20;
    pub(super) const SEGMENT_BLOCKS: u32 = 16;
}
