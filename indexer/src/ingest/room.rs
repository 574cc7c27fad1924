//! Bytes that wait, of all sources together.
//!
//! Each source has bounds of its own; what many strangers may do at once needs one over all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Room for what sources keep until it can be applied.
#[derive(Debug)]
pub struct Room {
    used: AtomicUsize,
    bytes_max: usize,
}

impl Room {
    /// Room for so many bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicUsize::new(0),
            bytes_max,
        })
    }

    /// Bytes that are taken.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| {
            let sum = used.checked_add(bytes)?;
            (sum <= self.bytes_max).then_some(sum)
        };
        let order = Ordering::Relaxed;
        self.used.fetch_update(order, order, fits).is_ok()
    }
}

/// What one source has taken of a room; dropping it gives that back.
#[derive(Debug)]
pub(super) struct Share {
    room: Arc<Room>,
    bytes: usize,
}

impl Share {
    pub(super) const fn new(room: Arc<Room>) -> Self {
        Self { room, bytes: 0 }
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes more; false when there is no room.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        let is_taken = self.room.take(bytes);
        if is_taken {
            self.bytes += bytes;
        }
        is_taken
    }

    /// Gives some back.
    pub(super) fn shrink(&mut self, bytes: usize) {
        assert!(bytes <= self.bytes, "more given back than taken");
        self.bytes -= bytes;
        self.room.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(self.bytes);
    }
}
