//! How far each subscriber has got.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// The subscribers, and the sequence number after the last batch that each was sent.
#[derive(Debug, Default)]
pub(super) struct Readers {
    places: Mutex<Places>,
    advanced: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Places {
    next: BTreeMap<u64, u64>,
    came: u64,
}

/// One subscriber; dropping it takes it out.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    readers: &'a Readers,
    id: u64,
    sent: u64,
    queued: u64,
}

impl Readers {
    fn places(&self) -> MutexGuard<'_, Places> {
        // Each change is one call that does not panic half-way.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a subscriber that is sent what comes from `next` on.
    pub(super) fn enter(&self, next: u64) -> Reader<'_> {
        let mut places = self.places();
        places.came += 1;
        let id = places.came;
        places.next.insert(id, next);
        Reader {
            readers: self,
            id,
            sent: next,
            queued: next,
        }
    }

    /// Waits until each was sent everything before `next`.
    pub(super) async fn reached(&self, next: u64) {
        let mut advanced = self.advanced.subscribe();
        while !self.places().next.values().all(|sent| *sent >= next) {
            // The sender lives as long as `self`, so this cannot fail.
            let _ = advanced.changed().await;
        }
    }
}

impl Reader<'_> {
    /// The sequence number after the last batch that it was given.
    pub(super) const fn queued(&self) -> u64 {
        self.queued
    }

    /// All that it was given is sent; returns where to go on.
    pub(super) fn sent(&mut self) -> u64 {
        if self.sent != self.queued {
            self.sent = self.queued;
            self.readers.places().next.insert(self.id, self.sent);
            self.readers.advanced.send_replace(());
        }
        self.sent
    }

    /// It was given everything before `next`.
    pub(super) const fn queue(&mut self, next: u64) {
        self.queued = next;
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.readers.places().next.remove(&self.id);
        self.readers.advanced.send_replace(());
    }
}
