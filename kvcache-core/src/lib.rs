//! What a KV-cache block is, and what should happen to it next.
//!
//! Everything here is a value or a state machine: time, randomness and the outcome of every effect are arguments, so
//! a seed replays any failure. [`manager::Manager`] takes requests and completions in and hands commands, events and
//! outcomes out; [`prefix`] turns tokens into keys; [`shape`] turns a model's geometry into byte ranges.
//!
//! This crate does not do I/O, start threads, read a clock, or contain `unsafe` code.
#![forbid(unsafe_code)]

pub mod error;
pub mod event;
pub mod evict;
pub mod id;
pub mod key;
pub mod manager;
#[cfg(any(test, feature = "test-util"))]
pub mod model;
pub mod place;
pub mod pool;
pub mod ports;
pub mod prefix;
pub mod shape;
pub mod table;

pub use error::{Error, ErrorKind, Result};
pub use id::{
    Epoch, Generation, LeaseId, OperationId, PeerId, PinId, PodName, Sequence, SlotIndex, Time,
};
pub use key::{BlockInfo, BlockKey, Checksum, ChecksumAlgorithm, EngineHash, IndexKey};
pub use place::Tier;
