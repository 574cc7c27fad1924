//! Depths of pods that are more than the union of their caches: those with data-parallel ranks, with several cache
//! groups, or with blocks larger than the index's.
//!
//! The walk over the chain treats a pod's holdings as one. Of these pods it is not believed; who holds which block is
//! read once more, and what each rank's groups need decides. Other pods cost nothing of this.

use std::collections::HashMap;
use std::ops::Range;

use kvcache_core::{IndexKey, Tier};

use super::View;
use super::arena::get;
use super::groups::{Apart, Group};
use super::lookup::{Depth, Depths, Torn};
use super::pods::PodNumber;
use super::runs::{partition, read_span};
use super::sets::{Holder, SetId, SourceNumber, with_members};
use crate::adapter::GroupRule;
use crate::score::TIERS;
use crate::sync::{Ordering, fence};

/// What serves requests by itself: a rank of a pod, or a pod without ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) rank: Option<u32>,
    pub(super) sources: Vec<SourceNumber>,
    /// Never empty.
    pub(super) groups: Vec<Group>,
    /// The group whose blocks have the index's own keys.
    pub(super) main: Option<u32>,
}

/// How far one part of a pod holds a prefix.
#[derive(Clone, Debug, PartialEq)]
pub struct PartDepth {
    /// The data-parallel rank; none for a pod without ranks.
    pub rank: Option<u32>,
    /// Blocks, from the first, with which all groups' rules are satisfied.
    pub depth: u32,
    /// For how many of those each tier is the fastest that has all that is needed of them.
    pub by_tier: [u32; TIERS],
    /// The groups, by number, where there are several or one with a rule of its own.
    pub groups: Vec<GroupDepth>,
}

/// How far one cache group would allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupDepth {
    /// Its number.
    pub group: u32,
    /// What it needs.
    pub rule: GroupRule,
    /// Blocks, from the first, that its own rule allows.
    pub depth: u32,
}

/// No tier.
const NOWHERE: u8 = u8::MAX;

/// Blocks next to each other that a source holds in a tier.
struct Held {
    source: SourceNumber,
    tier: u8,
    blocks: Range<u32>,
}

/// Which keys a group's blocks have, and at every how many of the index's they end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lane {
    apart: Option<Apart>,
    step: u32,
}

/// The blocks that have the index's own keys.
const OWN: Lane = Lane {
    apart: None,
    step: 1,
};

fn lane_of(part: &Part, group: &Group) -> Lane {
    let is_main = part.main == Some(group.number);
    let (apart, step) = match (is_main, group.stride) {
        (true, 1) => (None, 1),
        (true, stride) => (Some(Apart::Large(stride)), stride),
        (false, _) => (Some(Apart::Group(group.number)), group.step()),
    };
    Lane { apart, step }
}

/// One group of a part, as far as it is held.
struct Track {
    group: Group,
    step: u32,
    /// The fastest tier of each block.
    tiers: Vec<u8>,
    /// How many blocks in a row are held that end before each place.
    in_row: Vec<u32>,
    /// How many of the group's blocks a window needs.
    window: u32,
}

impl Track {
    fn new(group: Group, step: u32, block_size: u32, tiers: Vec<u8>) -> Self {
        let mut in_row = Vec::with_capacity(tiers.len() + 1);
        in_row.push(0);
        for (place, tier) in tiers.iter().enumerate() {
            in_row.push(if *tier == NOWHERE {
                0
            } else {
                in_row[place] + 1
            });
        }
        let window = match group.rule {
            GroupRule::Window { tokens } => {
                (tokens - 1).div_ceil(block_size.saturating_mul(group.stride))
            }
            _ => 0,
        };
        Self {
            group,
            step,
            tiers,
            in_row,
            // Even a window of one token wants to have seen that the group keeps the prefix.
            window: window.max(1),
        }
    }

    /// Whether the group allows the first `depth` blocks of the index.
    fn allows(&self, depth: u32) -> bool {
        let count = (depth / self.step) as usize;
        let is_aligned = match self.group.rule {
            // A state is where it is.
            GroupRule::State => true,
            _ => depth.is_multiple_of(self.group.stride),
        };
        if !is_aligned || count >= self.in_row.len() {
            return false;
        }
        let in_row = self.in_row[count];
        match self.group.rule {
            GroupRule::Full => in_row == count as u32,
            GroupRule::Window { .. } => in_row >= self.window.min(count as u32),
            GroupRule::State => in_row > 0,
            GroupRule::Nothing => true,
        }
    }

    /// Where a block of the index is, if the group needs it for the first `depth`.
    fn needed(&self, block: u32, depth: u32) -> Option<u8> {
        let (place, count) = (block / self.step, depth / self.step);
        let is_needed = match self.group.rule {
            GroupRule::Full => true,
            GroupRule::Window { .. } => place + self.window >= count,
            GroupRule::State => place + 1 == count,
            GroupRule::Nothing => false,
        };
        is_needed.then(|| self.tiers[place as usize])
    }
}

/// The greatest depth up to `blocks` that all groups allow.
fn depth_of(tracks: &[&Track], blocks: u32) -> u32 {
    let depths = (1..=blocks).rev();
    let mut allowed = depths.filter(|depth| tracks.iter().all(|track| track.allows(*depth)));
    allowed.next().unwrap_or(0)
}

/// By tier, the fastest that has all that is needed of a block; one of which nothing is needed counts with the next.
fn by_tier(tracks: &[&Track], depth: u32) -> [u32; TIERS] {
    let mut by_tier = [0; TIERS];
    let mut last = Tier::Device as u8;
    for block in (0..depth).rev() {
        let needed = tracks.iter().filter_map(|track| track.needed(block, depth));
        last = needed.max().unwrap_or(last);
        by_tier[usize::from(last)] += 1;
    }
    by_tier
}

impl Depths {
    /// Puts the pods that are composed of parts where they belong; what is said of the parts goes to `parts`.
    ///
    /// # Errors
    /// [`Torn`] when a writer changed what was read: ask again.
    pub(super) fn compose(
        &mut self,
        view: &View,
        keys: &[IndexKey],
        block_size: u32,
        is_limited: bool,
        parts: &mut HashMap<u32, Vec<PartDepth>>,
    ) -> Result<(), Torn> {
        self.pools.clear();
        let composed = &view.pods.composed;
        if composed.is_empty() {
            return Ok(());
        }
        self.pods
            .retain(|depth| !composed.contains_key(&depth.pod.0));
        let asked: Vec<(u32, &Vec<Part>)> = composed
            .iter()
            .filter(|(pod, _)| {
                !is_limited
                    || self.allowed.binary_search(pod).is_ok()
                    || view.pods.pools.contains(pod)
            })
            .map(|(pod, parts)| (*pod, parts))
            .collect();
        let mut walks: HashMap<Lane, Vec<SourceNumber>> = HashMap::new();
        for part in asked.iter().flat_map(|(_, parts)| *parts) {
            for group in &part.groups {
                for lane in [Some(lane_of(part, group)), nodes_lane(part, group)] {
                    let wanted = lane.map(|lane| walks.entry(lane).or_default());
                    wanted
                        .into_iter()
                        .for_each(|wanted| wanted.extend_from_slice(&part.sources));
                }
            }
        }
        let held = read_lanes(view, keys, walks)?;
        for (pod, of_pod) in asked {
            if view.pods.pools.contains(&pod) {
                let held = of_pod.first().map(|part| held_by(part, &held, keys.len()));
                self.pools.extend(held.map(|tiers| (pod, tiers)));
                continue;
            }
            let of_pod: Vec<PartDepth> = of_pod
                .iter()
                .map(|part| part_depth(part, &held, keys.len() as u32, block_size))
                .filter(|part| part.depth > 0 || !part.groups.is_empty())
                .collect();
            // The deepest, and of equals the first; max_by_key would take the last.
            let best = of_pod.iter().rev().max_by_key(|part| part.depth);
            if let Some(best) = best.filter(|best| best.depth > 0) {
                self.pods.push(Depth {
                    pod: PodNumber(pod),
                    depth: best.depth,
                    by_tier: best.by_tier,
                });
                parts.insert(pod, of_pod);
            }
        }
        self.pods.sort_by_key(|depth| depth.depth);
        Ok(())
    }
}

/// Where nodes have the blocks of a main group whose own are larger.
fn nodes_lane(part: &Part, group: &Group) -> Option<Lane> {
    (part.main == Some(group.number) && group.stride > 1).then_some(OWN)
}

/// The fastest tier of each block in which any source of the part has it.
fn tiers_in(part: &Part, lane: Lane, held: &HashMap<Lane, Vec<Held>>, blocks: u32) -> Vec<u8> {
    let mut tiers = vec![NOWHERE; (blocks / lane.step) as usize];
    for held in held.get(&lane).into_iter().flatten() {
        if part.sources.contains(&held.source) {
            for tier in &mut tiers[held.blocks.start as usize..held.blocks.end as usize] {
                *tier = held.tier.min(*tier);
            }
        }
    }
    tiers
}

/// The fastest tier of each of the group's blocks, holes or not, and how many of the index's one is.
fn tiers_of(
    part: &Part,
    group: &Group,
    held: &HashMap<Lane, Vec<Held>>,
    blocks: u32,
) -> (u32, Vec<u8>) {
    let lane = lane_of(part, group);
    let mut tiers = tiers_in(part, lane, held, blocks);
    if let Some(own) = nodes_lane(part, group) {
        let own = tiers_in(part, own, held, blocks);
        // All of a large block, at the slowest of its parts.
        for (tier, parts) in tiers.iter_mut().zip(own.chunks_exact(lane.step as usize)) {
            *tier = parts.iter().copied().max().unwrap_or(NOWHERE).min(*tier);
        }
    }
    (lane.step, tiers)
}

/// What a pool holds of its main group, by blocks of the index: the fastest tier of each, or none.
fn held_by(part: &Part, held: &HashMap<Lane, Vec<Held>>, blocks: usize) -> Vec<Option<Tier>> {
    let main = part
        .groups
        .iter()
        .find(|group| part.main == Some(group.number));
    let (step, tiers) = main.map_or((1, Vec::new()), |group| {
        tiers_of(part, group, held, blocks as u32)
    });
    let tiers = tiers.into_iter().flat_map(|tier| {
        let tier = Tier::ALL.get(usize::from(tier)).copied();
        std::iter::repeat_n(tier, step as usize)
    });
    tiers.collect()
}

fn part_depth(
    part: &Part,
    held: &HashMap<Lane, Vec<Held>>,
    blocks: u32,
    block_size: u32,
) -> PartDepth {
    let tracks: Vec<Track> = part
        .groups
        .iter()
        .map(|group| {
            let (step, tiers) = tiers_of(part, group, held, blocks);
            Track::new(*group, step, block_size, tiers)
        })
        .collect();
    let all: Vec<&Track> = tracks.iter().collect();
    let depth = depth_of(&all, blocks);
    let is_plain = part.groups.len() == 1 && part.groups[0].rule == GroupRule::Full;
    let groups = tracks.iter().filter(|_| !is_plain).map(|track| GroupDepth {
        group: track.group.number,
        rule: track.group.rule,
        depth: depth_of(&[track], blocks),
    });
    PartDepth {
        rank: part.rank,
        depth,
        by_tier: by_tier(&all, depth),
        groups: groups.collect(),
    }
}

/// Who of those that are asked about holds which blocks, all as of one moment.
///
/// # Errors
/// [`Torn`] when a writer changed what was read: ask again.
fn read_lanes(
    view: &View,
    keys: &[IndexKey],
    walks: HashMap<Lane, Vec<SourceNumber>>,
) -> Result<HashMap<Lane, Vec<Held>>, Torn> {
    let doors = &view.tree.doors;
    let version = doors.version().ok_or(Torn)?;
    let added = doors.added();
    let mut read = Vec::new();
    let mut held = HashMap::with_capacity(walks.len());
    for (lane, mut wanted) in walks {
        wanted.sort_unstable();
        wanted.dedup();
        let steps = keys.chunks_exact(lane.step as usize);
        let own = steps.filter_map(|step| step.last().copied());
        let of_lane: Vec<IndexKey> = match lane.apart {
            Some(apart) => own.map(|key| apart.key(key)).collect(),
            None => own.collect(),
        };
        let mut found = Vec::new();
        read_lane(view, &of_lane, &wanted, &mut read, &mut found)?;
        held.insert(lane, found);
    }
    // Whatever was read before these looks was there at one moment.
    fence(Ordering::Acquire);
    let is_still = |(run, version): &(u32, u32)| {
        let header = view.tree.runs.get(*run);
        header.is_some_and(|header| header.is_still(*version))
    };
    if !doors.is_still(version) || doors.added() != added || !read.iter().all(is_still) {
        return Err(Torn);
    }
    for &(run, _) in &read {
        view.tree.recency.touch(run);
    }
    Ok(held)
}

/// Reads block by block, holes or not.
fn read_lane(
    view: &View,
    keys: &[IndexKey],
    wanted: &[SourceNumber],
    read: &mut Vec<(u32, u32)>,
    found: &mut Vec<Held>,
) -> Result<(), Torn> {
    let mut at = 0;
    while at < keys.len() {
        let Some(door) = view.tree.doors.find(keys[at]) else {
            at += 1;
            continue;
        };
        let header = view.tree.runs.get(door.run).ok_or(Torn)?;
        read.push((door.run, header.version().ok_or(Torn)?));
        let blocks = header.blocks().saturating_sub(door.block) as usize;
        let mut equal = 0;
        while equal < blocks.min(keys.len() - at) {
            if view.key_at(header, door.block + equal as u32)? != keys[at + equal].0 {
                break;
            }
            equal += 1;
        }
        if equal == 0 {
            // The entry is of another time than the run.
            return Err(Torn);
        }
        let pairs = header.span_words(&view.tree.words).ok_or(Torn)?;
        let count = pairs.len() as u32 / 2;
        let mut span = partition(count, |span| get(&pairs[2 * span as usize]) <= door.block);
        let (mut from, end) = (door.block, door.block + equal as u32);
        while from < end {
            let pair = pairs
                .get(2 * span as usize..)
                .filter(|pair| !pair.is_empty());
            let held = read_span(pair.ok_or(Torn)?);
            let to = held.end.min(end);
            if to <= from {
                return Err(Torn);
            }
            let start = at as u32 + from - door.block;
            note(view, held.set, &(start..start + to - from), wanted, found)?;
            (from, span) = (to, span + 1);
        }
        at += equal;
    }
    Ok(())
}

fn note(
    view: &View,
    set: SetId,
    blocks: &Range<u32>,
    wanted: &[SourceNumber],
    found: &mut Vec<Held>,
) -> Result<(), Torn> {
    with_members(&view.tree.words, set, |members| {
        for member in members {
            let holder = Holder::from_raw(get(member));
            let source = holder.source();
            if !holder.is_claim()
                && wanted.binary_search(&source).is_ok()
                && !view.pods.leaving.contains(&source)
            {
                found.push(Held {
                    source,
                    tier: holder.tier() as u8,
                    blocks: blocks.clone(),
                });
            }
        }
    })
    .ok_or(Torn)
}
