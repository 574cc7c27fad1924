//! The question the index is for: who holds this prefix, how deep, in which tier?

use std::ops::Range;

use kvcache_core::{IndexKey, PodName};

use super::holders::SetId;
use super::table::Table;
use crate::score::{TIERS, TierWeights};

/// What to leave out of an answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query<'a> {
    /// At most so many pods, deepest first; 0 means all.
    pub pods_max: usize,
    /// Only these pods, unknown ones being ignored; empty means all.
    pub pods: &'a [PodName],
}

/// What a pod holds of the prefix that was asked about.
#[derive(Clone, Debug, PartialEq)]
pub struct PodDepth {
    /// Who.
    pub pod: PodName,
    /// Blocks, from the first, that the pod holds without a hole in tiers that it reaches by itself; at least 1.
    pub depth: u32,
    /// For how many of those each tier is the pod's fastest, by `Tier as usize`; they add up to `depth`.
    pub by_tier: [u32; TIERS],
    /// Σ weight × `by_tier`.
    pub score: f64,
}

/// The answer to a lookup; used again it keeps its memory, so that lookups do not allocate.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Pods that hold at least the first block, deepest first, ties by name.
    pub pods: Vec<PodDepth>,
    /// Blocks, from the first, that shared tiers hold: answered once, as every pod reaches them.
    pub shared_depth: u32,
    /// Which blocks, by position, shared tiers hold, holes or not: ascending, apart from each other.
    pub shared: Vec<Range<u32>>,
    scratch: Scratch,
}

#[derive(Clone, Debug, Default)]
struct Scratch {
    /// By pod slot; all zero between lookups.
    walks: Vec<Walk>,
    /// The pod slots whose walk is not zero.
    touched: Vec<u32>,
    /// One bit per pod slot; only looked at when the query names pods.
    allowed: Vec<u64>,
}

/// How far one pod has been followed.
#[derive(Clone, Copy, Debug, Default)]
struct Walk {
    depth: u32,
    /// The fastest tier found so far for the run of blocks that ends at `depth`.
    tier: u8,
    by_tier: [u32; TIERS],
}

/// Blocks next to each other that have the same holders.
struct Run {
    set: SetId,
    start: u32,
    end: u32,
}

impl Answer {
    /// Follows the chain until nobody holds it any more, or to its end where shared tiers hold anything.
    pub(super) fn fill(
        &mut self,
        table: &Table,
        keys: &[IndexKey],
        query: &Query<'_>,
        weights: &TierWeights,
    ) {
        self.pods.clear();
        self.shared_depth = 0;
        self.shared.clear();
        // What a shared tier holds can be had behind any hole, so only its absence ends the walk early.
        let is_shared = table.shared_entries() > 0;
        self.scratch.prepare(table, query);
        let mut run: Option<Run> = None;
        for (position, &key) in keys.iter().enumerate() {
            let Some(set) = table.holders(key) else {
                if let Some(run) = run.take() {
                    self.walk(table, &run, query);
                }
                if is_shared {
                    continue;
                }
                break;
            };
            let position = position as u32;
            match &mut run {
                // Whoever was followed to here goes on, and whoever was not stays behind.
                Some(run) if run.set == set => run.end = position + 1,
                _ => {
                    if let Some(run) = run.take()
                        && !self.walk(table, &run, query)
                        && !is_shared
                    {
                        break;
                    }
                    run = Some(Run {
                        set,
                        start: position,
                        end: position + 1,
                    });
                }
            }
        }
        if let Some(run) = run {
            self.walk(table, &run, query);
        }
        self.collect(table, query, weights);
    }

    /// Takes everyone who holds the run, and all blocks before it, to its end; false when there is none.
    fn walk(&mut self, table: &Table, run: &Run, query: &Query<'_>) -> bool {
        let mut is_held = false;
        let length = run.end - run.start;
        for holder in table.sets.members(run.set).as_slice() {
            if holder.slot() == 0 {
                if self.shared_depth == run.start {
                    self.shared_depth = run.end;
                    is_held = true;
                }
                match self.shared.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => self.shared.push(run.start..run.end),
                }
                continue;
            }
            let source = &table.sources[holder.slot()];
            if !source.is_alive || !(query.pods.is_empty() || self.scratch.is_allowed(source.pod)) {
                continue;
            }
            let walk = &mut self.scratch.walks[source.pod as usize];
            let tier = holder.tier();
            if walk.depth == run.start {
                if run.start == 0 {
                    self.scratch.touched.push(source.pod);
                }
                walk.depth = run.end;
                walk.tier = tier as u8;
                walk.by_tier[tier] += length;
                is_held = true;
            } else if walk.depth == run.end && tier < usize::from(walk.tier) {
                // A faster tier of the same pod holds the run too.
                walk.by_tier[usize::from(walk.tier)] -= length;
                walk.by_tier[tier] += length;
                walk.tier = tier as u8;
            }
        }
        is_held
    }

    fn collect(&mut self, table: &Table, query: &Query<'_>, weights: &TierWeights) {
        for pod in self.scratch.touched.drain(..) {
            let Walk { depth, by_tier, .. } = std::mem::take(&mut self.scratch.walks[pod as usize]);
            if let Some(name) = &table.pods[pod as usize].name {
                let score = weights.score(&by_tier);
                self.pods.push(PodDepth {
                    pod: name.clone(),
                    depth,
                    by_tier,
                    score,
                });
            }
        }
        let order = |one: &PodDepth, other: &PodDepth| {
            other
                .depth
                .cmp(&one.depth)
                .then_with(|| one.pod.cmp(&other.pod))
        };
        if query.pods_max != 0 && query.pods_max < self.pods.len() {
            self.pods.select_nth_unstable_by(query.pods_max, order);
            self.pods.truncate(query.pods_max);
        }
        self.pods.sort_unstable_by(order);
    }
}

impl Scratch {
    fn prepare(&mut self, table: &Table, query: &Query<'_>) {
        self.walks.resize(table.pods.len(), Walk::default());
        if !query.pods.is_empty() {
            self.allowed.clear();
            self.allowed.resize(table.pods.len().div_ceil(64), 0);
            for pod in query.pods {
                if let Some(slot) = table.pod_slot(pod) {
                    self.allowed[slot as usize / 64] |= 1 << (slot % 64);
                }
            }
        }
    }

    fn is_allowed(&self, pod: u32) -> bool {
        self.allowed[pod as usize / 64] & (1 << (pod % 64)) != 0
    }
}
