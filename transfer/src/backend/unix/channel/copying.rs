//! A job that is being moved, and what becomes of it.

use std::sync::Arc;

use kvcache_core::Result;

use super::UnixChannel;
use crate::backend::Job;
use crate::backend::copy::{Place, Progress, Turn, Work};
use crate::backend::unix::{Access, Held};

/// A job's bytes on their way.
pub(crate) struct Copying<A: Access> {
    pub(super) channel: Arc<UnixChannel<A>>,
    pub(super) regions: Vec<Arc<Held<A>>>,
    pub(super) place: Place,
}

impl<A: Access> Copying<A> {
    /// The regions of the plan's remote side, in its order.
    pub(crate) fn held(&self) -> &[Arc<Held<A>>] {
        &self.regions
    }

    /// Whether it may go on.
    ///
    /// # Errors
    /// Why the path was lost, where memory is used in place.
    pub(crate) fn check(&self) -> Result<()> {
        match A::IN_PLACE && self.channel.lost.get().is_some() {
            true => Err(self.channel.loss()),
            false => Ok(()),
        }
    }
}

impl<A: Access> Work for Copying<A> {
    fn go_on(&mut self, job: &Job, turn: &Turn<'_>) -> Result<Progress> {
        let place = &mut self.place;
        self.channel.copy(job, &self.regions, place, turn)
    }

    fn end(&mut self, job: Job, outcome: Result<()>) {
        self.regions.clear();
        match outcome {
            Ok(()) => self.channel.notify(job),
            Err(error) => job.settle(Err(error)),
        }
    }
}
