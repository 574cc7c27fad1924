//! What a job holds of its request.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::core::{RequestCore, TRIES_MAX};
use super::rate::Priority;
use crate::backend::{Backend, Point};
use crate::plan::Plan;
use crate::sync::Ordering;

/// Which part of a request a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// A piece, by number, tried for the n-th time.
    Piece { number: u32, tries: u32 },
    /// The checksums of a piece that was moved.
    Check { number: u32, tries: u32 },
    /// The notification of a request in pieces, after all of them.
    Notice,
}

/// A job's hold on its request. If a backend loses it, the request fails and its memory is kept for ever.
pub(crate) struct Ticket {
    core: Arc<RequestCore>,
    plan: Arc<Plan>,
    pub(super) share: Share,
    pub(super) backend: Arc<dyn Backend>,
    open: bool,
}

impl Ticket {
    pub(super) fn new(
        core: Arc<RequestCore>,
        plan: Arc<Plan>,
        share: Share,
        backend: Arc<dyn Backend>,
    ) -> Self {
        Self {
            core,
            plan,
            share,
            backend,
            open: true,
        }
    }

    pub(crate) fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    pub(crate) fn whole(&self) -> &Plan {
        &self.core.plan
    }

    pub(crate) fn priority(&self) -> Priority {
        self.core.priority
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.core.is_abandoned() || self.is_left()
    }

    pub(crate) fn after(&self) -> Option<Point> {
        self.core.lock().after.clone()
    }

    /// All of its piece is queued, and done when a device's stream comes to this point.
    pub(crate) fn queued(&self, point: Point) {
        if let Share::Piece { number, .. } = self.share {
            self.core.queued(number, point);
        }
    }

    /// Whether it is to go on another way.
    fn is_left(&self) -> bool {
        let again = matches!(self.share, Share::Piece { tries, .. } if tries < TRIES_MAX);
        again && self.core.is_left(&self.backend)
    }

    /// A failure that the backend knows of before nothing can land any more. Kept for the settlement where the job may then
    /// go another way.
    pub(crate) fn report(&self, error: Error) {
        if !self.is_left() && !self.core.may_try_again(self, error.kind()) {
            self.abandon(error);
        }
    }

    /// The notification may be on its way from now on.
    pub(crate) fn tell(&self) {
        self.core.tell();
    }

    /// Its notification waits until the peer has taken others.
    pub(crate) fn await_peer(&self) {
        self.core.awaits_peer.store(true, Ordering::Release);
    }

    fn abandon(&self, error: Error) {
        self.core.abandon(error);
    }

    pub(crate) fn settle(mut self, outcome: Result<()>) {
        self.open = false;
        self.core.settle(&self, outcome);
    }

    /// Nothing was started; whoever posted deals with that.
    pub(crate) fn hand_back(mut self) {
        self.open = false;
    }
}

impl Drop for Ticket {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if self.open {
            self.abandon(Error::new(
                ErrorKind::Internal,
                "a backend lost track of a transfer",
            ));
            std::mem::forget((self.core.plan.clone(), self.plan.clone()));
        }
    }
}
