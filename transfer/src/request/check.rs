//! What has arrived is compared with what was sent, if the request asks for that.

use std::sync::Arc;
use std::time::Instant;

use kvcache_core::Result;

use super::core::{Failed, RequestCore};
use super::later::Due;
use super::ticket::{Share, Ticket};
use crate::backend::{Backend, Job};
use crate::outcome::Status;
use crate::plan::Plan;

/// More than this is compared on a thread that nobody else waits for.
const AT_ONCE_BYTES_MAX: u64 = 256 << 10;

/// A piece that was moved, with the checksums of its other side.
pub(super) struct Compare {
    pub(super) core: Arc<RequestCore>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) piece: u32,
    /// How often it was tried.
    pub(super) tries: u32,
    pub(super) sums: Arc<Plan>,
}

impl RequestCore {
    /// A piece was moved: asks for the checksums of its other side.
    pub(super) fn check(self: &Arc<Self>, backend: &Arc<dyn Backend>, piece: u32, tries: u32) {
        if !matches!(self.lock().status, Status::InFlight) {
            // Nobody waits for it.
            return self.settle_piece(piece, Ok(()));
        }
        let ask = |plan: Plan| {
            let share = Share::Check {
                number: piece,
                tries,
            };
            let ticket = Ticket::new(self.clone(), Arc::new(plan), share, backend.clone());
            let posted = backend.post(Job::new(ticket, None));
            posted.map_err(|refusal| refusal.into_error())
        };
        if let Err(error) = self.plan_of(piece).asking_for_sums().and_then(ask) {
            self.piece_failed(Failed {
                backend,
                piece,
                tries,
                error,
                began: true,
            });
        }
    }

    /// The checksums are there, or will not be.
    pub(super) fn sums_came(self: &Arc<Self>, compare: Compare, outcome: Result<()>) {
        if let Err(error) = outcome {
            return compare.failed(error);
        }
        if compare.sums.bytes <= AT_ONCE_BYTES_MAX {
            return compare.run();
        }
        // Without room there, here.
        if let Err(Due::Compare(compare)) = self.later.add(Instant::now(), Due::Compare(compare)) {
            compare.run();
        }
    }
}

impl Compare {
    pub(super) fn run(self) {
        match self.core.plan_of(self.piece).compare(&self.sums) {
            Ok(()) => self.core.settle_piece(self.piece, Ok(())),
            Err(error) => self.failed(error),
        }
    }

    pub(super) fn failed(self, error: kvcache_core::Error) {
        self.core.piece_failed(Failed {
            backend: &self.backend,
            piece: self.piece,
            tries: self.tries,
            error: self.core.why_left(&self.backend, error),
            began: true,
        });
    }
}
