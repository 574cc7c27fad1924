//! Checksums, computed where the memory is: asked for here, answered there.

use std::collections::HashSet;

use kvcache_core::{Error, ErrorKind, Result};

use super::state::{Line, State};
use crate::backend::far_sums::{self, QUESTIONS_MAX, Summing};
use crate::backend::unix::{Message, Outcome};
use crate::region::{RegionId, RegionKey};

impl State {
    /// Goes on asking for the checksums of a job: whether all have come.
    pub(super) fn ask_for_sums(&mut self, number: u64, asked: &mut usize) -> Result<bool> {
        let Some(active) = self.jobs.get(&number) else {
            return Ok(false);
        };
        let (plan, line) = (active.job.plan().clone(), active.line);
        let (mut first, mut open) = (active.asked, active.open);
        while first < plan.extents.len() && open < QUESTIONS_MAX {
            let (summing, region) = Summing::next(&plan, number, first)?;
            let gone = || Error::new(ErrorKind::PeerLost, "the path is closed");
            let using = self.using.get_mut(&line).ok_or_else(gone)?;
            let id = using.shared.unanswered.number();
            let (ranges, end) = (summing.ranges(&plan), summing.end());
            using.summing.insert(id, summing);
            let message = Message::Sums {
                id,
                region: region.id,
                key: region.key,
                ranges,
            };
            using.unasked.push_back(message);
            self.ask_questions(line);
            (first, open, *asked) = (end, open + 1, *asked + 1);
            if let Some(active) = self.jobs.get_mut(&number) {
                (active.asked, active.open) = (first, open);
            }
        }
        Ok(first == plan.extents.len() && open == 0)
    }

    /// Checksums have come: puts them where their job wants them.
    pub(super) fn summed(&mut self, summing: &Summing<u64>, outcome: Outcome) {
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
    pub(super) fn forget_sums(&mut self, line: Line, job: u64) {
        if let Some(using) = self.using.get_mut(&line) {
            let of_it = using.summing.extract_if(|_, summing| summing.job == job);
            let gone: HashSet<u64> = of_it.map(|(id, _)| id).collect();
            // What was not asked yet is not.
            let is_gone =
                |one: &Message| matches!(one, Message::Sums { id, .. } if gone.contains(id));
            using.unasked.retain(|question| !is_gone(question));
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
