//! The way to the thread of a ring.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::Duration;

use super::inbox::Inbox;
use crate::backend::Keeper;
use crate::region::RegionCore;

/// How long a region that is deregistered is waited for until the ring lets go of it, which takes a wake-up: so nearly
/// always nothing is in flight any more when the call returns. What takes longer counts as in flight.
const LET_GO_MAX: Duration = Duration::from_secs(1);

/// The thread's inbox, and what wakes it.
pub(super) struct Door {
    pub(super) inbox: Arc<Inbox>,
    pub(super) wake: OwnedFd,
    thread: OnceLock<ThreadId>,
}

impl Door {
    pub(super) const fn new(inbox: Arc<Inbox>, wake: OwnedFd) -> Self {
        Self {
            inbox,
            wake,
            thread: OnceLock::new(),
        }
    }

    /// The calling thread is the one that looks into the inbox.
    pub(super) fn is_opened_here(&self) {
        self.thread.get_or_init(|| std::thread::current().id());
    }

    pub(super) fn knock(&self) {
        // A full counter means that a wake-up is pending already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Keeper for Door {
    fn withdraw(&self, region: &Arc<RegionCore>) {
        let Some(withdrawn) = self.inbox.withdraw(region) else {
            return;
        };
        self.knock();
        // Whoever is told of an end may deregister there, on the thread itself, which goes on only then.
        if self.thread.get() != Some(&std::thread::current().id()) {
            self.inbox.wait_let_go(withdrawn, LET_GO_MAX);
        }
    }
}
