//! The driver's part in pins, removal and flushes.

use std::time::{Duration, Instant};

use kvcache_core::{BlockKey, Error, ErrorKind, OperationId, PinId, Result};

use super::control::not_flushed;
use super::desk::Reply;
use super::driver::{Driver, give};
use super::execute::Completion;
use super::types::{Pinned, Removed};
use crate::mover::Mover;

/// Flushes under way at once; more are refused as busy.
const FLUSHES_MAX: usize = 64;

/// A flush, and how far it is.
pub(super) struct Flush {
    deadline: Instant,
    reply: Reply<()>,
}

impl Driver {
    pub(super) fn pin(
        &mut self,
        pin: PinId,
        keys: &[BlockKey],
        ttl: Duration,
        reply: Reply<Pinned>,
    ) {
        match self.manager.handle_pin(self.now(), pin, keys, ttl) {
            Ok(()) => {
                self.pins.insert(pin, reply);
            }
            Err(error) => give(reply, Err(error)),
        }
    }

    /// The pin holds: whoever asked for it hears so, or it is taken back.
    pub(super) fn answer_pin(&mut self, pin: PinId, depth: u32) {
        let reply = self.pins.remove(&pin);
        let heard = reply.is_some_and(|reply| reply.send(Ok(Pinned { id: pin, depth })).is_ok());
        if !heard && depth > 0 {
            self.manager.handle_unpin(self.now(), pin);
        }
    }

    pub(super) fn remove(&mut self, keys: &[BlockKey], reply: Reply<Removed>) {
        let removed = self.manager.handle_remove(self.now(), keys);
        give(reply, removed.map(Removed::from));
    }

    pub(super) fn clear(&mut self, reply: Reply<Removed>) {
        let removed = self.manager.handle_clear(self.now());
        give(reply, Ok(removed.into()));
    }

    pub(super) fn flush(&mut self, deadline: Instant, reply: Reply<()>) {
        if self.flushes.len() + self.syncs >= FLUSHES_MAX {
            let context = format!("{FLUSHES_MAX} flushes are under way already");
            return give(reply, Err(Error::new(ErrorKind::Busy, context)));
        }
        match self.manager.handle_flush(self.now(), self.time(deadline)) {
            Ok(operation) => {
                self.flushes.insert(operation, Flush { deadline, reply });
            }
            Err(error) => give(reply, Err(error)),
        }
    }

    /// The copies that a flush waited for have ended, or its time has.
    pub(super) fn answer_flush(&mut self, operation: OperationId, complete: bool) {
        let Some(Flush { deadline, reply }) = self.flushes.remove(&operation) else {
            return;
        };
        if !complete {
            return give(reply, Err(not_flushed()));
        }
        let (mover, deadline) = (self.mover.clone(), self.bounded(deadline));
        self.syncs += 1;
        self.tasks.spawn(async move {
            give(reply, sync(&mover, deadline).await);
            Completion::Synced
        });
    }
}

/// Puts on disk what was written there, by `deadline`.
pub(super) async fn sync(mover: &Mover, deadline: Instant) -> Result<()> {
    let Some(disk) = &mover.disk else {
        return Ok(());
    };
    let deadline = tokio::time::Instant::from_std(deadline);
    tokio::time::timeout_at(deadline, disk.sync())
        .await
        .unwrap_or_else(|_| {
            let context = "the disk tier was not synced before the deadline";
            Err(Error::new(ErrorKind::Timeout, context))
        })
}
