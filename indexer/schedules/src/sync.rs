//! Atomics and locks whose every use is a choice of the schedule, and sizes with which a few blocks fill a chunk.

use std::cell::Cell;
use std::hash::{BuildHasher, DefaultHasher, Hasher};
use std::sync::LockResult;

use shuttle::rand::Rng;

pub use shuttle::hint::spin_loop;
pub use shuttle::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
pub use shuttle::sync::{MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Two runs, two segments or 64 words.
pub const CHUNK_BITS: u32 = 1;
/// As many chunks as that takes.
pub const CHUNKS_BITS: u32 = 7;
/// So few entries that searches pass others' on their way.
pub const DOORS_MIN: usize = 4;
/// A lookup soon makes the writer wait.
pub const TRIES: u32 = 3;
/// A source that is gone is taken out run by run.
pub const TURN_BLOCKS: u32 = 1;
/// Sets of more holders than this are wide: a lookup for a few pods does not look at everybody in there.
pub const WIDE_MIN: usize = 1;

// All tasks of a schedule are on the thread of their test.
thread_local! {
    static LOCKED: Cell<u64> = const { Cell::new(0) };
}

/// How often any mutex was locked since the last call, by all tasks of this thread.
pub fn take_locked() -> u64 {
    LOCKED.take()
}

/// A mutex that counts.
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// An open one.
    pub fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    /// Waits for the others.
    ///
    /// # Errors
    /// As in the standard library.
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        LOCKED.set(LOCKED.get() + 1);
        self.0.lock()
    }
}

/// Hashes by a number that belongs to the schedule, so that a schedule can be repeated.
pub struct RandomState(u64);

impl RandomState {
    /// The schedule's next number.
    #[expect(
        clippy::new_without_default,
        reason = "as the standard library's is used"
    )]
    pub fn new() -> Self {
        Self(shuttle::rand::thread_rng().r#gen())
    }
}

impl BuildHasher for RandomState {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0);
        hasher
    }
}
