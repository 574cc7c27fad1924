//! Pods and their sources, by number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, PodName, Result};

use super::compose::Part;
use super::hash::KeyState;
use super::sets::{POD_SOURCES_MAX, PODS_MAX, SourceNumber};
use crate::score::PodWeights;

/// A pod by number: good while the pod has sources, afterwards another pod may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodNumber(pub(super) u32);

#[derive(Clone, Default)]
struct Pod {
    /// None while the number is free.
    name: Option<PodName>,
    /// Orders pods as their names do.
    order: u64,
    /// Which of its source numbers are taken.
    sources: Vec<bool>,
}

/// All pods; readers see them.
pub(super) struct Pods {
    /// The first is nobody's: it stands for the shared tiers.
    pods: Vec<Pod>,
    free: Vec<u32>,
    by_name: BTreeMap<PodName, u32>,
    /// Sources that are being emptied: lookups skip them.
    pub(super) leaving: HashSet<SourceNumber, KeyState>,
    /// Pods whose depth is not that of all their holdings together.
    pub(super) composed: HashMap<u32, Vec<Part>>,
    /// Those that are no pods but pools, which answers have apart; all are among `composed`.
    pub(super) pools: HashSet<u32>,
    /// Of pods with media that weigh something else than their tiers.
    pub(super) weights: HashMap<u32, Arc<PodWeights>>,
}

impl Pods {
    pub(super) fn new() -> Self {
        Self {
            pods: vec![Pod::default()],
            free: Vec::new(),
            by_name: BTreeMap::new(),
            leaving: HashSet::default(),
            composed: HashMap::new(),
            pools: HashSet::new(),
            weights: HashMap::new(),
        }
    }

    pub(super) fn number(&self, name: &PodName) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    pub(super) fn name(&self, number: u32) -> Option<&PodName> {
        self.pods.get(number as usize)?.name.as_ref()
    }

    /// Whether a pod has a source that is not being emptied.
    pub(super) fn is_there(&self, number: u32) -> bool {
        let Some(pod) = self.pods.get(number as usize) else {
            return false;
        };
        let mut taken = (0..pod.sources.len()).filter(|place| pod.sources[*place]);
        taken.any(|place| !self.leaving.contains(&SourceNumber::new(number, place)))
    }

    /// All pods, in the order of their names.
    pub(super) fn by_name(&self) -> impl Iterator<Item = u32> {
        self.by_name.values().copied()
    }

    /// A number that is less than another pod's if the name is.
    pub(super) fn order(&self, number: u32) -> u64 {
        self.pods.get(number as usize).map_or(0, |pod| pod.order)
    }

    /// Gives a new source of a pod its number.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when the pod has [`POD_SOURCES_MAX`] sources or there are [`PODS_MAX`] pods.
    pub(super) fn add(&mut self, name: &PodName) -> Result<SourceNumber> {
        let number = match self.number(name) {
            Some(number) => number,
            None => self.add_pod(name)?,
        };
        let sources = &mut self.pods[number as usize].sources;
        let place = sources
            .iter()
            .position(|is_taken| !is_taken)
            .unwrap_or(sources.len());
        if place >= POD_SOURCES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("pod {name} has {POD_SOURCES_MAX} sources"),
            ));
        }
        if place == sources.len() {
            sources.push(true);
        } else {
            sources[place] = true;
        }
        Ok(SourceNumber::new(number, place))
    }

    fn add_pod(&mut self, name: &PodName) -> Result<u32> {
        if self.by_name.len() >= PODS_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("pod {name}: there are {PODS_MAX} pods"),
            ));
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.pods.push(Pod::default());
            self.pods.len() as u32 - 1
        });
        self.by_name.insert(name.clone(), number);
        self.pods[number as usize].name = Some(name.clone());
        let order_of = |other: Option<(&PodName, &u32)>| {
            other.map(|(_, number)| self.pods[*number as usize].order)
        };
        let before = order_of(self.by_name.range(..name).next_back()).unwrap_or(0);
        let after = order_of(
            self.by_name
                .range((std::ops::Bound::Excluded(name), std::ops::Bound::Unbounded))
                .next(),
        );
        let after = after.unwrap_or(u64::MAX);
        if after - before > 1 {
            self.pods[number as usize].order = before.midpoint(after);
        } else {
            // No number is left between the two, so all get new ones, far apart.
            let step = u64::MAX / (self.by_name.len() as u64 + 1);
            for (order, number) in (1..).zip(self.by_name.values()) {
                self.pods[*number as usize].order = step * order;
            }
        }
        Ok(number)
    }

    /// Takes a source's number back; nothing may refer to it any more.
    pub(super) fn remove(&mut self, source: SourceNumber) {
        let pod = &mut self.pods[source.pod() as usize];
        pod.sources[source.of_pod()] = false;
        if pod.sources.iter().any(|is_taken| *is_taken) {
            return;
        }
        if let Some(name) = std::mem::take(pod).name {
            self.by_name.remove(&name);
            self.composed.remove(&source.pod());
            self.pools.remove(&source.pod());
            self.free.push(source.pod());
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.pods.capacity() * size_of::<Pod>()
            + self.by_name.len() * (size_of::<(PodName, u32)>() * 3 / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names in an order that halves the same gap again and again.
    #[test]
    fn pods_are_ordered_as_their_names() {
        let mut pods = Pods::new();
        let name = |number: u32| PodName::new(&format!("pod-{number:05}")).unwrap();
        let numbers: Vec<u32> = (0..200).flat_map(|at| [at, 10_000 - at]).collect();
        for number in &numbers {
            pods.add(&name(*number)).unwrap();
        }
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        let orders: Vec<u64> = sorted
            .iter()
            .map(|at| pods.order(pods.number(&name(*at)).unwrap()))
            .collect();
        assert!(orders.is_sorted_by(|one, other| one < other));
        let first = pods.number(&name(0)).unwrap();
        pods.remove(SourceNumber::new(first, 0));
        assert_eq!((pods.number(&name(0)), pods.name(first)), (None, None));
        let sources: Vec<_> = (0..POD_SOURCES_MAX)
            .map(|_| pods.add(&name(0)).unwrap())
            .collect();
        assert_eq!(pods.add(&name(0)).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(sources[0].pod(), first, "the number is reused");
    }
}
