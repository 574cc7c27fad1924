//! What a backend is handed, and hands back.

use std::sync::Arc;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::backend::Point;
use crate::plan::Plan;
use crate::request::{Priority, Ticket};

/// One posted request. Holds the regions it names until it is settled.
pub(crate) struct Job {
    holder: Holder,
    /// Delivered to the peer after the data.
    notification: Option<Bytes>,
}

/// Whose job it is.
enum Holder {
    Request(Ticket),
    /// Another backend's, of whose job it is a leg.
    Leg(Box<dyn Leg>),
}

/// A part of another backend's job, which notifies nobody.
pub(crate) trait Leg: Send + Sync {
    /// What to move.
    fn plan(&self) -> &Arc<Plan>;
    /// Who goes first.
    fn priority(&self) -> Priority;
    /// Whether nobody waits any more.
    fn is_abandoned(&self) -> bool;
    /// As [`Job::settle`].
    fn settle(self: Box<Self>, outcome: Result<()>);
    /// As [`Job::report`].
    fn report(&self, error: Error);
    /// Nothing was started.
    fn hand_back(self: Box<Self>);
}

impl Job {
    pub(crate) fn new(ticket: Ticket, notification: Option<Bytes>) -> Self {
        Self {
            holder: Holder::Request(ticket),
            notification,
        }
    }

    pub(crate) fn of_leg(leg: Box<dyn Leg>) -> Self {
        Self {
            holder: Holder::Leg(leg),
            notification: None,
        }
    }

    /// What to move.
    pub(crate) fn plan(&self) -> &Arc<Plan> {
        match &self.holder {
            Holder::Request(ticket) => ticket.plan(),
            Holder::Leg(leg) => leg.plan(),
        }
    }

    /// The whole request that this job is all or a part of.
    pub(crate) fn whole(&self) -> &Plan {
        match &self.holder {
            Holder::Request(ticket) => ticket.whole(),
            Holder::Leg(leg) => leg.plan(),
        }
    }

    /// Whether it is all of its request, and not a part.
    pub(crate) fn is_whole(&self) -> bool {
        std::ptr::eq(&**self.plan(), self.whole())
    }

    /// Whether it gives way to others.
    pub(crate) fn priority(&self) -> Priority {
        match &self.holder {
            Holder::Request(ticket) => ticket.priority(),
            Holder::Leg(leg) => leg.priority(),
        }
    }

    /// Where a device's stream has to be before it begins.
    pub(crate) fn after(&self) -> Option<Point> {
        match &self.holder {
            Holder::Request(ticket) => ticket.after(),
            Holder::Leg(_) => None,
        }
    }

    /// All of it is queued on a device, which will have done it at this point.
    pub(crate) fn queued(&self, point: Point) {
        if let Holder::Request(ticket) = &self.holder {
            ticket.queued(point);
        }
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
        if let Holder::Request(ticket) = &self.holder {
            ticket.await_peer();
        }
    }

    /// What to deliver to the peer once the data is in place. Whoever takes it may send it: the job is then not repeated
    /// another way.
    pub(crate) fn notification(&self) -> Option<&Bytes> {
        if let (Some(_), Holder::Request(ticket)) = (&self.notification, &self.holder) {
            ticket.tell();
        }
        self.notification.as_ref()
    }

    /// Whether the caller no longer waits (deadline or cancel). Settle soon.
    pub(crate) fn is_abandoned(&self) -> bool {
        match &self.holder {
            Holder::Request(ticket) => ticket.is_abandoned(),
            Holder::Leg(leg) => leg.is_abandoned(),
        }
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
        match self.holder {
            Holder::Request(ticket) => ticket.settle(outcome),
            Holder::Leg(leg) => leg.settle(outcome),
        }
    }

    /// Reports a failure now, although the job's memory may still be in use; `settle` must follow, with the same error.
    pub(crate) fn report(&self, error: Error) {
        match &self.holder {
            Holder::Request(ticket) => ticket.report(error),
            Holder::Leg(leg) => leg.report(error),
        }
    }

    /// Nothing was started, and nothing will be.
    pub(crate) fn refuse(self, error: Error) -> Refusal {
        match self.holder {
            Holder::Request(ticket) => ticket.hand_back(),
            Holder::Leg(leg) => leg.hand_back(),
        }
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
