//! Checksums, computed where the memory is: asked for here, answered there.

use kvcache_core::{Error, ErrorKind, Result};

use super::frame::Session;
use super::state::State;
use crate::backend::far_sums::{self, QUESTIONS_MAX, Summing};
use crate::backend::unix::{Message, Outcome};
use crate::region::{RegionId, RegionKey};

impl State {
    /// Goes on asking for the checksums of a job: whether all have come.
    pub(super) fn ask_for_sums(&mut self, number: usize, asked: &mut usize) -> Result<bool> {
        let Some(active) = self.jobs.get(&number) else {
            return Ok(false);
        };
        let (plan, session) = (active.job.plan().clone(), active.session);
        let (mut first, mut open) = (active.asked, active.open);
        while first < plan.extents.len() && open < QUESTIONS_MAX {
            let (summing, region) = Summing::next(&plan, number, first)?;
            let gone = || Error::new(ErrorKind::PeerLost, "the path is closed");
            let using = self.using.get_mut(&session).ok_or_else(gone)?;
            let id = using.shared.unanswered.number();
            let (ranges, end) = (summing.ranges(&plan), summing.end());
            using.summing.insert(id, summing);
            let message = Message::Sums {
                id,
                region: region.id,
                key: region.key,
                ranges,
            };
            self.ask(session, message)?;
            (first, open, *asked) = (end, open + 1, *asked + 1);
            if let Some(active) = self.jobs.get_mut(&number) {
                (active.asked, active.open) = (first, open);
            }
        }
        Ok(first == plan.extents.len() && open == 0)
    }

    /// Checksums have come: puts them where their job wants them.
    pub(super) fn summed(&mut self, summing: &Summing<usize>, outcome: Outcome) {
        let Some(active) = self.jobs.get_mut(&summing.job) else {
            return;
        };
        active.open -= 1;
        let kept = summing.keep(active.job.plan(), outcome);
        if let Err(error) = kept {
            active.error.get_or_insert(error);
        }
        self.ready.push_back(summing.job);
    }

    /// A job is over: answers that it did not wait for are for nobody.
    pub(super) fn forget_sums(&mut self, session: Session, job: usize) {
        if let Some(using) = self.using.get_mut(&session) {
            using.summing.retain(|_, summing| summing.job != job);
        }
    }

    /// The checksums of memory of ours.
    pub(super) fn sum(
        &self,
        id: RegionId,
        key: &RegionKey,
        ranges: &[(u64, u64)],
    ) -> Result<Outcome> {
        far_sums::answer(&self.exports, id, key, ranges)
    }
}
