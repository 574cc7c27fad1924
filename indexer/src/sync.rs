//! What the index shares between threads is made of these parts, and how much of it comes at once.
//!
//! They are those of the standard library. `schedules/` compiles the index with others in this module's place, which let a
//! test choose who runs when, and with chunks so small that a few blocks fill them.

pub(crate) use std::hash::RandomState;
pub(crate) use std::hint::spin_loop;
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A chunk has 2 to this power runs, twice as many segments, and 32 times as many words.
pub(crate) const CHUNK_BITS: u32 = 13;
/// There are at most 2 to this power chunks of runs and of words, and an eighth of that of segments.
pub(crate) const CHUNKS_BITS: u32 = 13;
/// Entries of runs that there is room for at least.
pub(crate) const DOORS_MIN: usize = 64;
/// How often a lookup tries to read between events before it makes the writer wait.
pub(crate) const TRIES: u32 = 64;
/// After taking out so many blocks of a source that is gone, the next event has its turn.
pub(crate) const TURN_BLOCKS: u32 = if cfg!(test) { 2 } else { 1024 };
/// Sets of more holders than this are wide: a lookup for a few pods does not look at everybody in there.
pub(crate) const WIDE_MIN: usize = if cfg!(test) { 2 } else { 64 };
