//! One of the connections to a peer, and whether it stands still.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::active::Active;
use super::connection::{Connection, Role};

/// One connection.
pub(super) struct Lane {
    pub(super) connection: Arc<Connection>,
    pub(super) to: SocketAddr,
    seen: Mutex<Seen>,
    /// It stands still while others do not.
    avoided: AtomicBool,
}

/// What was last seen of a connection.
struct Seen {
    received: u64,
    /// When it had received more than before, or nothing was asked of it.
    at: Instant,
}

impl Lane {
    pub(super) fn new(connection: Arc<Connection>, to: SocketAddr) -> Self {
        let seen = Seen {
            received: 0,
            at: Instant::now(),
        };
        Self {
            connection,
            to,
            seen: Mutex::new(seen),
            avoided: AtomicBool::new(false),
        }
    }

    /// Puts what is left of a request at the end of the queue. Whether the connection takes it.
    pub(super) fn queue(&self, active: &Arc<Active>) -> bool {
        let mut outbox = self.connection.outbox();
        if outbox.ended {
            return false;
        }
        outbox.queue(active.clone());
        drop(outbox);
        self.connection.pump_later();
        true
    }

    /// Whether nothing has come for as long as `after` of what was asked all that time. Remembers what is seen now.
    pub(super) fn look(&self, now: Instant, after: Duration) -> bool {
        let received = self.connection.moved()[1];
        let Role::Initiator(initiator) = &self.connection.role else {
            return false;
        };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match initiator.owed_since() {
            Some(since) if received == seen.received => now >= seen.at.max(since) + after,
            _ => {
                *seen = Seen { received, at: now };
                false
            }
        }
    }

    /// Has it avoided, and what it owes brought by others, or used again.
    pub(super) fn avoid(&self, avoided: bool) {
        let before = self.avoided.swap(avoided, Ordering::AcqRel);
        if avoided {
            if !before {
                tracing::warn!(to = %self.to, "a tcp connection stands still; the others to the peer go on");
            }
            self.connection.hand_over();
        }
    }

    /// Whether it stood still when it was last looked at, and nothing has come since.
    pub(super) fn is_avoided(&self) -> bool {
        if !self.avoided.load(Ordering::Acquire) {
            return false;
        }
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let moves = self.connection.moved()[1] != seen.received;
        if moves {
            self.avoided.store(false, Ordering::Release);
        }
        !moves
    }
}
