//! The end of a cache: what is in host memory alone goes down, the rest is told and synced.

use std::time::{Duration, Instant};

use super::desk::{Health, Reply};
use super::driver::{Closing, Driver, give};
use super::hold::sync;

/// How much of the time for a shutdown is kept for what comes after the last write: the sync, mostly. A quarter of the
/// time when that is less.
const SYNC_TIME_MAX: Duration = Duration::from_secs(2);

impl Driver {
    /// Takes on nothing new, and lets what is in host memory alone go down.
    pub(super) fn begin_close(&mut self, deadline: Instant, reply: Reply<()>) {
        let (now, deadline) = (self.now(), self.time(deadline));
        let left = deadline - now;
        let writing = left - SYNC_TIME_MAX.min(left / 4);
        self.closing = Some(Closing {
            deadline,
            reply,
            retired: false,
        });
        self.manager.handle_retire(now, now + writing);
    }

    /// Nothing more goes down.
    pub(super) fn retired(&mut self, written: u64, left: u32) {
        tracing::info!(written, left, "blocks in host memory alone at the end");
        if let Some(closing) = &mut self.closing {
            closing.retired = true;
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        let Some(closing) = &self.closing else {
            return false;
        };
        let is_idle = self.stores.is_empty() && self.fetches.is_empty() && self.tasks.is_empty();
        closing.retired && is_idle || self.now() >= closing.deadline
    }

    /// Ends what is still under way, tells the world, and syncs the disk.
    pub(super) async fn close(mut self, health: &Health) {
        let now = self.now();
        let operations: Vec<_> = self
            .stores
            .keys()
            .chain(self.fetches.keys())
            .chain(self.flushes.keys())
            .copied()
            .collect();
        for operation in operations {
            self.manager.handle_cancel(now, operation);
        }
        self.publish();
        while let Some(outcome) = self.manager.poll_outcome() {
            self.answer(outcome);
        }
        self.announcer.end();
        self.mover.arena.close();
        let Some(closing) = self.closing.take() else {
            return health.ends_in_order();
        };
        let synced = sync(&self.mover, self.instant(closing.deadline)).await;
        // Whoever hears of the end may open the same directory at once: nothing may hold it any more.
        self.tasks.shutdown().await;
        health.ends_in_order();
        drop(self);
        give(closing.reply, synced);
    }
}
