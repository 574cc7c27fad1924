//! How far the sources of answered pods are applied.

use std::collections::HashMap;
use std::ops::Range;

use kvcache_core::PodName;
use tokio::time::Instant;

use super::fields::Fields;
use super::hub::{Pod, PodSource, Pods};
use super::lookup::answered;
use crate::index::Answer;
use crate::source::Seen;

/// What is said of one pod: nothing of one that is not known any more.
#[derive(Clone, Debug, Default)]
struct Place {
    address: Range<usize>,
    positions: Range<usize>,
    freshness: Range<usize>,
}

/// What was read of pods' sources, as the fields of a `LookupResponse` that tell it.
#[derive(Debug, Default)]
pub(super) struct Positions {
    /// Who was read of, if that is to be known when the index is asked again.
    names: Vec<PodName>,
    places: Vec<Place>,
    addresses: String,
    positions: Fields,
    freshness: Fields,
}

impl Positions {
    pub(super) fn clear(&mut self) {
        self.names.clear();
        self.places.clear();
        self.addresses.clear();
        self.positions.clear();
        self.freshness.clear();
    }

    /// Reads how far these pods' sources are, and what that is worth at `now`.
    pub(super) fn read<'a>(
        &mut self,
        pods: &Pods,
        names: impl Iterator<Item = &'a PodName>,
        now: Instant,
    ) {
        self.clear();
        // What belongs to a pod is behind several pointers, and rarely in the cache: in steps that go through all pods, the
        // memory of many is waited for at once.
        let known: Vec<Option<&Pod>> = names.map(|name| Some(&**pods.get(name)?)).collect();
        let sources = known.iter().flatten().flat_map(|pod| &pod.sources);
        let sources: Vec<&PodSource> = sources.collect();
        let seen = sources.iter().map(|source| source.seen(now.into_std()));
        let seen: Vec<Seen> = seen.collect();
        let mut seen = sources.into_iter().zip(&seen);
        for pod in known {
            let from = self.ends();
            if let Some(pod) = pod {
                let address = pod.registration.peer_address.as_deref();
                self.addresses.push_str(address.unwrap_or_default());
                for (source, seen) in seen.by_ref().take(pod.sources.len()) {
                    self.add_source(source, seen);
                }
            }
            self.add_place(&from);
        }
    }

    fn add_source(&mut self, source: &PodSource, seen: &Seen) {
        self.positions.nested(5, |fields| {
            fields.text(1, &source.name);
            fields.uint(2, seen.position.epoch.0);
            fields.uint(3, seen.position.next.0);
        });
        self.freshness.message(7, &seen.freshness);
    }

    /// Where the next pod begins.
    fn ends(&self) -> [usize; 3] {
        [
            self.addresses.len(),
            self.positions.len(),
            self.freshness.len(),
        ]
    }

    /// What came since `from` is of one pod.
    fn add_place(&mut self, from: &[usize; 3]) {
        let to = self.ends();
        self.places.push(Place {
            address: from[0]..to[0],
            positions: from[1]..to[1],
            freshness: from[2]..to[2],
        });
    }

    /// Notes who was read of.
    pub(super) fn remember<'a>(&mut self, names: impl Iterator<Item = &'a PodName>) {
        self.names.extend(names.cloned());
    }

    /// Whether those who were remembered are the answered pods.
    pub(super) fn are_of(&self, answer: &Answer) -> bool {
        self.names.iter().eq(answered(answer))
    }

    /// Leaves those of the answered pods, which were read and remembered among others.
    pub(super) fn keep(&mut self, answer: &Answer) {
        let all = std::mem::take(self);
        let by_name: HashMap<_, _> = all.names.iter().zip(&all.places).collect();
        for found in answered(answer) {
            let from = self.ends();
            if let Some(place) = by_name.get(found) {
                self.addresses
                    .push_str(&all.addresses[place.address.clone()]);
                let positions = &all.positions.as_slice()[place.positions.clone()];
                self.positions.append(positions);
                let freshness = &all.freshness.as_slice()[place.freshness.clone()];
                self.freshness.append(freshness);
            }
            self.add_place(&from);
        }
    }

    /// Where the answered pods' peer services listen, then the pools', in the order of the answer; empty where there is none.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &str> {
        let places = self.places.iter();
        places.map(|place| &self.addresses[place.address.clone()])
    }

    /// How far each source of the answered pods is: fields `positions`.
    pub(super) fn positions(&self) -> &[u8] {
        self.positions.as_slice()
    }

    /// What that is worth: fields `freshness`.
    pub(super) fn freshness(&self) -> &[u8] {
        self.freshness.as_slice()
    }
}

#[cfg(test)]
mod tests;
