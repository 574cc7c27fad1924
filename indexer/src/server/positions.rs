//! How far the sources of answered pods are applied.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kvcache_core::PodName;
use kvfabric_proto::v1;

use super::hub::{Pod, PodSource};
use super::lookup::answered;
use crate::index::Answer;
use crate::source::Progress;

/// A pod that was asked, by the name it was asked by.
struct Asked {
    name: PodName,
    /// None when the pod is not known any more.
    pod: Option<Arc<Pod>>,
    /// Its sources' among all.
    progress: Range<usize>,
}

/// What was read before an answer was found: all that it promises is in the answer.
#[derive(Default)]
pub(super) struct Positions {
    /// In the order of the answer.
    asked: Vec<Asked>,
    progress: Vec<Progress>,
}

impl Positions {
    /// Forgets all; nobody shall be kept for a thread's next lookup.
    pub(super) fn clear(&mut self) {
        self.asked.clear();
        self.progress.clear();
    }

    /// Reads how far these pods' sources are.
    pub(super) fn read<'a>(
        &mut self,
        pods: &BTreeMap<PodName, Arc<Pod>>,
        names: impl Iterator<Item = &'a PodName>,
    ) {
        self.clear();
        for name in names {
            let pod = pods.get(name).cloned();
            let from = self.progress.len();
            let sources = pod.iter().flat_map(|pod| &pod.sources);
            let now = sources.map(|source| *source.state.progress.borrow());
            self.progress.extend(now);
            self.asked.push(Asked {
                name: name.clone(),
                pod,
                progress: from..self.progress.len(),
            });
        }
    }

    /// Whether they are those of the answered pods.
    pub(super) fn are_of(&self, answer: &Answer) -> bool {
        let names = self.asked.iter().map(|asked| &asked.name);
        names.eq(answered(answer))
    }

    /// Leaves those of the answered pods, which were read among others.
    pub(super) fn keep(&mut self, answer: &Answer) {
        let asked = self.asked.drain(..);
        let mut by_name: HashMap<_, _> = asked.map(|asked| (asked.name.clone(), asked)).collect();
        let kept = answered(answer).map(|found| {
            by_name.remove(found).unwrap_or_else(|| Asked {
                name: found.clone(),
                pod: None,
                progress: 0..0,
            })
        });
        self.asked.extend(kept);
    }

    /// The answered pods, then pools, in the order of the answer; none for one that is not known any more.
    pub(super) fn pods(&self) -> impl Iterator<Item = Option<&Pod>> {
        self.asked.iter().map(|asked| asked.pod.as_deref())
    }

    /// How far each source of the answered pods is, and what that is worth at `now`.
    pub(super) fn to_wire(
        &self,
        now: Instant,
    ) -> (Vec<v1::SourcePosition>, Vec<v1::SourceFreshness>) {
        let mut positions = Vec::with_capacity(self.progress.len());
        let mut freshness = Vec::with_capacity(self.progress.len());
        for (source, progress) in self.sources() {
            positions.push(v1::SourcePosition {
                source: source.name.clone(),
                epoch: progress.position.epoch.0,
                next_sequence: progress.position.next.0,
            });
            freshness.push(source.freshness(progress, now));
        }
        (positions, freshness)
    }

    fn sources(&self) -> impl Iterator<Item = (&PodSource, &Progress)> {
        self.asked.iter().flat_map(|asked| {
            let sources = asked.pod.iter().flat_map(|pod| &pod.sources);
            sources.zip(&self.progress[asked.progress.clone()])
        })
    }
}
