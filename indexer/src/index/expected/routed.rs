//! Who was sent which blocks, and until when they count: by pod for what comes and goes, by block for lookups.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use kvcache_core::{IndexKey, PodName, Time};

use crate::index::hash::KeyState;

/// When a block is given up, and how far from the start of its prompt it is: tails go before heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    until: Time,
    from_start: std::cmp::Reverse<u32>,
}

pub(super) struct OfPod {
    /// What stands for the pod in [`Routed::by_key`].
    number: u32,
    pub(super) blocks: HashMap<IndexKey, Turn, KeyState>,
    turns: BTreeSet<(Turn, IndexKey)>,
}

impl OfPod {
    /// Whether the block was not expected before.
    fn insert(&mut self, key: IndexKey, turn: Turn) -> bool {
        let before = self.blocks.insert(key, turn);
        if let Some(before) = before {
            self.turns.remove(&(before, key));
        }
        self.turns.insert((turn, key));
        before.is_none()
    }

    /// Whether the block was expected.
    fn remove(&mut self, key: IndexKey) -> bool {
        let turn = self.blocks.remove(&key);
        if let Some(turn) = turn {
            self.turns.remove(&(turn, key));
        }
        turn.is_some()
    }

    fn pop(&mut self) -> Option<IndexKey> {
        let (_, key) = self.turns.pop_first()?;
        self.blocks.remove(&key);
        Some(key)
    }

    fn pop_expired(&mut self, now: Time) -> Option<IndexKey> {
        let (turn, _) = self.turns.first()?;
        if turn.until <= now { self.pop() } else { None }
    }

    pub(super) fn is_expected(&self, key: IndexKey, now: Time) -> bool {
        self.blocks.get(&key).is_some_and(|turn| turn.until > now)
    }
}

/// The pods that anything is expected of.
#[derive(Default)]
pub(super) struct Routed {
    pub(super) by_name: BTreeMap<PodName, OfPod>,
    /// Who is expected to hold a block, by the pods' numbers: a lookup asks after those of its prompt only.
    by_key: HashMap<IndexKey, Vec<u32>, KeyState>,
    by_number: HashMap<u32, PodName>,
    /// The number of the next pod.
    next: u32,
}

/// One pod fewer is expected to hold a block.
fn leave(by_key: &mut HashMap<IndexKey, Vec<u32>, KeyState>, key: IndexKey, number: u32) {
    if let Entry::Occupied(mut entry) = by_key.entry(key) {
        let numbers = entry.get_mut();
        if let Some(place) = numbers.iter().position(|known| *known == number) {
            numbers.swap_remove(place);
        }
        if numbers.is_empty() {
            entry.remove();
        }
    }
}

impl Routed {
    pub(super) fn forget(&mut self, pod: &PodName) {
        if let Some(of_pod) = self.by_name.remove(pod) {
            self.by_number.remove(&of_pod.number);
            for key in of_pod.blocks.keys() {
                leave(&mut self.by_key, *key, of_pod.number);
            }
        }
    }

    pub(super) fn confirm(&mut self, pod: &PodName, keys: &[IndexKey]) {
        if let Some(of_pod) = self.by_name.get_mut(pod) {
            for key in keys {
                if of_pod.remove(*key) {
                    leave(&mut self.by_key, *key, of_pod.number);
                }
            }
        }
    }

    /// Lets go of what nobody expects any more at `now`, and of pods of which nothing is left.
    pub(super) fn expire(&mut self, now: Time) {
        let Self {
            by_name,
            by_key,
            by_number,
            ..
        } = self;
        by_name.retain(|_, of_pod| {
            while let Some(key) = of_pod.pop_expired(now) {
                leave(by_key, key, of_pod.number);
            }
            if of_pod.blocks.is_empty() {
                by_number.remove(&of_pod.number);
            }
            !of_pod.blocks.is_empty()
        });
    }

    /// Expects blocks of a pod until their turn, of all the pod's no more than `most`.
    pub(super) fn record(
        &mut self,
        pod: &PodName,
        blocks: &[(u32, IndexKey)],
        most: usize,
        until: Time,
    ) {
        let of_pod = self.by_name.entry(pod.clone()).or_insert_with(|| {
            self.next = self.next.wrapping_add(1);
            self.by_number.insert(self.next, pod.clone());
            OfPod {
                number: self.next,
                blocks: HashMap::default(),
                turns: BTreeSet::new(),
            }
        });
        for (from_start, key) in blocks.iter().take(most) {
            let from_start = std::cmp::Reverse(*from_start);
            if of_pod.insert(*key, Turn { until, from_start }) {
                self.by_key.entry(*key).or_default().push(of_pod.number);
            }
        }
        while of_pod.blocks.len() > most
            && let Some(key) = of_pod.pop()
        {
            leave(&mut self.by_key, key, of_pod.number);
        }
    }

    /// The pods that are expected to hold any of these blocks, by name; only `named` ones when there are any.
    pub(super) fn expecting(&self, keys: &[IndexKey], named: &[PodName]) -> Vec<PodName> {
        let held = keys.iter().filter_map(|key| self.by_key.get(key));
        let mut numbers: Vec<u32> = Vec::new();
        for of_key in held {
            // The next block is mostly expected of the same pods.
            let is_known = |number: &u32| numbers.binary_search(number).is_ok();
            if !of_key.iter().all(is_known) {
                numbers.extend_from_slice(of_key);
                numbers.sort_unstable();
                numbers.dedup();
            }
        }
        let names = numbers.iter();
        let mut names: Vec<PodName> = names
            .filter_map(|number| self.by_number.get(number).cloned())
            .collect();
        if !named.is_empty() {
            let named: HashSet<&PodName> = named.iter().collect();
            names.retain(|name| named.contains(name));
        }
        names.sort_unstable();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str) -> PodName {
        PodName::new(name).unwrap()
    }

    /// Three pods with blocks of their own and one in common: by the block, after confirmation, after their time and
    /// after one is gone.
    #[test]
    fn only_pods_that_expect_a_block_of_the_prompt_are_asked() {
        let mut routed = Routed::default();
        let expect = |routed: &mut Routed, name: &str, keys: &[u64], until: u64| {
            let blocks: Vec<(u32, IndexKey)> =
                (0..).zip(keys.iter().map(|key| IndexKey(*key))).collect();
            routed.record(&pod(name), &blocks, 4, Time(until));
        };
        expect(&mut routed, "a", &[1, 2], 10);
        expect(&mut routed, "b", &[1, 3], 20);
        expect(&mut routed, "c", &[4, 5], 20);
        let asked = |routed: &Routed, keys: &[u64], named: &[&str]| {
            let keys: Vec<IndexKey> = keys.iter().map(|key| IndexKey(*key)).collect();
            let named: Vec<PodName> = named.iter().map(|name| pod(name)).collect();
            let pods = routed.expecting(&keys, &named);
            let pods: Vec<String> = pods.iter().map(|pod| pod.as_str().to_owned()).collect();
            pods.join(" ")
        };
        assert_eq!(asked(&routed, &[1, 2, 3], &[]), "a b");
        assert_eq!(asked(&routed, &[9, 5, 1], &[]), "a b c");
        assert_eq!(asked(&routed, &[9, 5, 1], &["c", "b", "d"]), "b c");
        assert_eq!(asked(&routed, &[9], &[]), "");
        routed.confirm(&pod("b"), &[IndexKey(1), IndexKey(7)]);
        assert_eq!(asked(&routed, &[1], &[]), "a");
        routed.expire(Time(10));
        assert_eq!(asked(&routed, &[1, 2, 3, 4], &[]), "b c");
        routed.forget(&pod("c"));
        assert_eq!(asked(&routed, &[1, 2, 3, 4], &[]), "b");
        // The tail of a longer prompt gives way.
        expect(&mut routed, "b", &[11, 12, 13, 14], 30);
        assert_eq!(asked(&routed, &[3], &[]), "");
        assert_eq!(asked(&routed, &[14], &[]), "b");
        routed.expire(Time(30));
        assert!(
            routed.by_key.is_empty() && routed.by_number.is_empty() && routed.by_name.is_empty()
        );
    }
}
