//! What a demo, a test and a benchmark need around the real parts: work to do, an engine to do it, and a judge.
//!
//! [`workload`] makes or reads requests; [`infinite`] says what a cache without limits would have hit; [`content`] says
//! what every byte of every block must be; [`router`] picks pods; [`engine`] is an engine's block pool without the
//! model; [`report`] is what a run gives; [`cluster`] puts all of it together in virtual time, with faults.
//!
//! This crate does not do the work itself: it opens no socket, reads no clock, and no engine links it.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod content;
pub mod engine;
pub mod infinite;
pub mod report;
pub mod router;
pub mod seed;
pub mod sequence;
pub mod workload;
