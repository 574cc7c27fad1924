//! What pods are expected to hold because prompts were just sent there: kept apart from what events confirm.
//!
//! Of a pod that publishes events, a block is expected until it is stored for real, its time is over, or the pod begins
//! anew or goes. Of an approximate pod, which publishes nothing, these expectations are all there is: the blocks routed
//! there last, as many as it is thought to keep.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result, Time};

use self::routed::Routed;
use super::answer::{Answer, PodDepth, Query};
use super::{KvIndex, lock};
use crate::adapter::SourceKind;
use crate::score::TIERS;
use crate::sync::{AtomicU64, Ordering, RwLock, RwLockReadGuard, RwLockWriteGuard};

mod routed;

/// The most blocks that are expected of one pod that publishes events.
pub const EXPECTED_BLOCKS_MAX: usize = 1 << 16;

/// How long a block is expected, and of how many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// From when on.
    pub now: Time,
    /// For how long.
    pub ttl: Duration,
    /// How many blocks of an approximate pod are believed to be kept; the least recently routed give way.
    pub approximate_blocks_max: usize,
}

/// What a routing decision came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Blocks, from the first, that events confirm.
    pub depth: u32,
    /// How many of the others are expected now.
    pub expected: u32,
}

/// All expectations of one index.
pub(super) struct Expected {
    pods: RwLock<Routed>,
    /// Pods in there: where there are none, nobody takes the lock.
    count: AtomicU64,
}

impl Expected {
    pub(super) fn new() -> Self {
        Self {
            pods: RwLock::new(Routed::default()),
            count: AtomicU64::new(0),
        }
    }

    // Nothing in there is ever half-way changed for long: a panic elsewhere need not end every answer.
    fn read(&self) -> RwLockReadGuard<'_, Routed> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Routed> {
        self.pods.write().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    pub(super) fn of_pod(&self, pod: &PodName) -> bool {
        !self.is_empty() && self.read().by_name.contains_key(pod)
    }

    /// Events have confirmed these.
    pub(super) fn confirm(&self, pod: &PodName, keys: &[IndexKey]) {
        self.write().confirm(pod, keys);
    }

    pub(super) fn forget(&self, pod: &PodName) {
        if self.is_empty() {
            return;
        }
        let mut pods = self.write();
        pods.forget(pod);
        self.count
            .store(pods.by_name.len() as u64, Ordering::Relaxed);
    }

    fn record(&self, pod: &PodName, blocks: &[(u32, IndexKey)], most: usize, with: &Expectation) {
        let mut pods = self.write();
        // Whoever is not routed to any more is let go here: the map stays as large as the traffic.
        pods.expire(with.now);
        let ttl = u64::try_from(with.ttl.as_nanos()).unwrap_or(u64::MAX);
        pods.record(pod, blocks, most, Time(with.now.0.saturating_add(ttl)));
        self.count
            .store(pods.by_name.len() as u64, Ordering::Relaxed);
    }
}

impl KvIndex {
    /// Notes that a prompt goes to a pod: what the pod does not hold of it is expected there for a while.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the pod has no source.
    pub fn expect(&self, pod: &PodName, keys: &[IndexKey], with: &Expectation) -> Result<Recorded> {
        let is_approximate = self.is_approximate(pod).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("pod {pod} is not registered"))
        })?;
        let mut answer = Answer::default();
        let only = std::slice::from_ref(pod);
        self.lookup(
            keys,
            &Query {
                pods_max: 0,
                pods: only,
            },
            &mut answer,
        );
        let depth = answer.pods.first().map_or(0, |found| found.depth);
        let rest = (0..).zip(keys.iter().copied()).skip(depth as usize);
        let rest: Vec<(u32, IndexKey)> = rest.collect();
        let most = match is_approximate {
            true => with.approximate_blocks_max,
            false => EXPECTED_BLOCKS_MAX,
        };
        self.expected.record(pod, &rest, most, with);
        Ok(Recorded {
            depth,
            expected: rest.len().min(most) as u32,
        })
    }

    /// Blocks that are expected of pods now; those whose time is over are counted until the next decision.
    #[must_use]
    pub fn expected_blocks(&self) -> u64 {
        let pods = self.expected.read();
        let blocks = pods.by_name.values().map(|of_pod| of_pod.blocks.len());
        blocks.map(|blocks| blocks as u64).sum()
    }

    /// As [`Self::lookup`], with what is expected at `now` beside what is held.
    ///
    /// Pods that are only expected to hold something come after those that hold, most expected first; those that
    /// publish nothing come where their expected depth puts them.
    pub fn lookup_at(&self, now: Time, keys: &[IndexKey], query: &Query<'_>, answer: &mut Answer) {
        // Whoever is expected to hold nothing more is never before who was already before them, so the best of all and
        // those with expectations are enough.
        self.lookup(keys, query, answer);
        if self.expected.is_empty() {
            return;
        }
        let expecting = self.expected.read().expecting(keys, query.pods);
        if expecting.is_empty() {
            return;
        }
        let mut held = Answer::default();
        if query.pods_max != 0 {
            let only = Query {
                pods_max: 0,
                pods: &expecting,
            };
            self.lookup(keys, &only, &mut held);
        }
        let mut places: HashMap<PodName, usize> = (0..)
            .zip(&answer.pods)
            .map(|(at, found)| (found.pod.clone(), at))
            .collect();
        // Those that the best have left out.
        for found in held.pods {
            if !places.contains_key(&found.pod) {
                places.insert(found.pod.clone(), answer.pods.len());
                answer.pods.push(found);
            }
        }
        self.add_expected(now, keys, &expecting, &places, answer);
        answer.pods.sort_by(|one, other| {
            let of = |found: &PodDepth| std::cmp::Reverse((found.depth, found.expected_depth));
            of(one)
                .cmp(&of(other))
                .then_with(|| one.pod.cmp(&other.pod))
        });
        if query.pods_max != 0 {
            answer.pods.truncate(query.pods_max);
        }
    }

    /// Adds what these pods are expected to hold beyond what they do; `places` says where those that hold anything are.
    fn add_expected(
        &self,
        now: Time,
        keys: &[IndexKey],
        expecting: &[PodName],
        places: &HashMap<PodName, usize>,
        answer: &mut Answer,
    ) {
        let pods = self.expected.read();
        for pod in expecting {
            let Some(of_pod) = pods.by_name.get(pod) else {
                continue;
            };
            let place = places.get(pod).copied();
            let held = place.map_or(0, |place| answer.pods[place].depth);
            let more = keys[held as usize..].iter();
            let more = more
                .take_while(|key| of_pod.is_expected(**key, now))
                .count() as u32;
            if more == 0 {
                continue;
            }
            match place {
                Some(place) => answer.pods[place].expected_depth = held + more,
                None => answer.pods.push(self.only_expected(pod, more)),
            }
        }
    }

    fn only_expected(&self, pod: &PodName, blocks: u32) -> PodDepth {
        let mut found = PodDepth {
            pod: pod.clone(),
            depth: 0,
            by_tier: [0; TIERS],
            score: 0.0,
            weights: None,
            parts: Vec::new(),
            expected_depth: blocks,
            is_approximate: false,
        };
        if self.is_approximate(pod) == Some(true) {
            found.is_approximate = true;
            (found.depth, found.by_tier[0], found.expected_depth) = (blocks, blocks, 0);
            found.score = self.config.weights.score(&found.by_tier);
        }
        found
    }

    /// Whether a pod publishes nothing; none when it has no source.
    fn is_approximate(&self, pod: &PodName) -> Option<bool> {
        let state = lock(&self.state);
        let first = state.by_pod.get(pod)?.first()?;
        let source = state.sources.get(first)?;
        Some(source.spec.kind == SourceKind::Approximate)
    }
}
