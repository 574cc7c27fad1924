//! What a backend is handed, and hands back.

use std::sync::Arc;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::plan::Plan;
use crate::request::{Priority, Ticket};

/// One posted request. Holds the regions it names until it is settled.
pub(crate) struct Job {
    ticket: Ticket,
    /// Delivered to the peer after the data.
    notification: Option<Bytes>,
}

impl Job {
    pub(crate) fn new(ticket: Ticket, notification: Option<Bytes>) -> Self {
        Self {
            ticket,
            notification,
        }
    }

    /// What to move.
    pub(crate) fn plan(&self) -> &Arc<Plan> {
        self.ticket.plan()
    }

    /// The whole request that this job is all or a part of.
    pub(crate) fn whole(&self) -> &Plan {
        self.ticket.whole()
    }

    /// Whether it is all of its request, and not a part.
    pub(crate) fn is_whole(&self) -> bool {
        std::ptr::eq(&**self.plan(), self.whole())
    }

    /// Whether it gives way to others.
    pub(crate) fn priority(&self) -> Priority {
        self.ticket.priority()
    }

    /// Whether there is something to deliver to the peer.
    pub(crate) fn notifies(&self) -> bool {
        self.notification.is_some()
    }

    /// How long that is.
    pub(crate) fn notification_bytes(&self) -> usize {
        self.notification.as_ref().map_or(0, Bytes::len)
    }

    /// Its bytes are in place, and its notification waits until the peer has taken others: nothing stands still meanwhile.
    pub(crate) fn awaits_peer(&self) {
        self.ticket.await_peer();
    }

    /// What to deliver to the peer once the data is in place. Whoever takes it may send it: the job is then not repeated
    /// another way.
    pub(crate) fn notification(&self) -> Option<&Bytes> {
        if self.notification.is_some() {
            self.ticket.tell();
        }
        self.notification.as_ref()
    }

    /// Whether the caller no longer waits (deadline or cancel). Settle soon.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.ticket.is_abandoned()
    }

    /// # Errors
    /// When the caller no longer waits, so that whoever moves bytes can stop.
    pub(crate) fn go_on(&self) -> Result<()> {
        if self.is_abandoned() {
            return Err(abandoned());
        }
        Ok(())
    }

    /// The terminal outcome: no byte of the job's memory is touched after this.
    pub(crate) fn settle(self, outcome: Result<()>) {
        self.ticket.settle(outcome);
    }

    /// Reports a failure now, although the job's memory may still be in use; `settle` must follow, with the same error.
    pub(crate) fn report(&self, error: Error) {
        self.ticket.report(error);
    }

    /// Nothing was started, and nothing will be.
    pub(crate) fn refuse(self, error: Error) -> Refusal {
        self.ticket.hand_back();
        Refusal(error)
    }
}

/// Why a job was not accepted. [`Job::refuse`] makes one.
pub(crate) struct Refusal(pub(super) Error);

impl Refusal {
    pub(crate) fn into_error(self) -> Error {
        self.0
    }
}

/// The error of a job whose caller gave up before it was finished.
pub(crate) fn abandoned() -> Error {
    Error::new(ErrorKind::Cancelled, "given up by the caller")
}
