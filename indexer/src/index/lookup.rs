//! The question the index is for: who holds this prefix, how deep, in which tier? Pods are numbers here; `answer` names them.

use std::hint::black_box;
use std::ops::Range;

use kvcache_core::{IndexKey, Tier};

use super::View;
use super::arena::get;
use super::best::without_shared;
use super::blocks::SEGMENT_BLOCKS;
use super::pods::PodNumber;
use super::runs::{Header, partition, read_span};
use super::sets::{SetId, first_word, is_plain, with_members};
use crate::score::TIERS;
use crate::sync::{AtomicU64, Ordering, fence};

/// How far one pod holds a prefix, the pod by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Who.
    pub pod: PodNumber,
    /// Blocks, from the first, without a hole; at least 1.
    pub depth: u32,
    /// For how many of those each tier is the pod's fastest, by `Tier as usize`; they add up to `depth`.
    pub by_tier: [u32; TIERS],
}

impl Depth {
    pub(super) const fn new(pod: u32) -> Self {
        Self {
            pod: PodNumber(pod),
            depth: 0,
            by_tier: [0; TIERS],
        }
    }

    /// So many blocks, which a tier has; without a branch or an address that depends on it, as many are made in a row.
    #[inline]
    pub(super) fn at(pod: u32, tier: usize, blocks: u32) -> Self {
        Self {
            pod: PodNumber(pod),
            depth: blocks,
            by_tier: std::array::from_fn(|other| if other == tier { blocks } else { 0 }),
        }
    }

    /// So many blocks deeper, which a tier has.
    #[inline]
    pub(super) const fn deeper(mut self, tier: usize, blocks: u32) -> Self {
        self.depth += blocks;
        self.by_tier[tier] += blocks;
        self
    }
}

/// The shortest answer to a lookup: pods by number, without names and scores. Used again it keeps its memory.
#[derive(Clone, Debug, Default)]
pub struct Depths {
    /// Pods that hold at least the first block, deepest first.
    pub pods: Vec<Depth>,
    /// Blocks, from the first, that shared tiers hold.
    pub shared_depth: u32,
    /// Which blocks, by position, shared tiers hold, holes or not: ascending, apart from each other.
    pub shared: Vec<Range<u32>>,
    /// Pools, and the fastest tier of each block that they hold.
    pub(super) pools: Vec<(u32, Vec<Option<Tier>>)>,
    /// The pods that may be answered, ascending; only looked at when there are any named.
    pub(super) allowed: Vec<u32>,
    /// Sets put aside, and how many blocks in a row have each.
    pub(super) wide: Vec<(SetId, u32)>,
    /// Runs that were read, and as of which version.
    read: Vec<(u32, u32)>,
}

/// What was read changed meanwhile.
pub(super) struct Torn;

/// Who is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// So many of the best, at least, if there are; 0 means all.
    pub(super) pods: usize,
    /// Only pods in [`Depths::allowed`].
    pub(super) is_limited: bool,
}

/// How a walk through the chain stands.
pub(super) struct Walk<'a> {
    pub(super) view: &'a View,
    pub(super) wanted: Wanted,
    pub(super) depths: &'a mut Depths,
    /// Pods from here on have been followed to the end of what was walked; those before stay behind.
    pub(super) alive: usize,
    /// Blocks next to each other that have the same holders, not followed yet.
    pending: (SetId, Range<u32>),
}

impl Depths {
    /// Follows the chain until nobody holds it any more, or to its end where shared tiers hold anything.
    ///
    /// The pods come least deep first.
    ///
    /// # Errors
    /// [`Torn`] when a writer changed what was read: ask again.
    pub(super) fn fill(
        &mut self,
        view: &View,
        keys: &[IndexKey],
        mut wanted: Wanted,
    ) -> Result<(), Torn> {
        if wanted.pods > 0 {
            // Of these the walk is not believed, so that others may come in their place.
            wanted.pods += view.pods.composed.len();
        }
        self.pods.clear();
        self.wide.clear();
        self.shared.clear();
        self.read.clear();
        self.shared_depth = 0;
        let doors = &view.tree.doors;
        let version = doors.version().ok_or(Torn)?;
        let added = doors.added();
        // What a shared tier holds can be had behind any hole, so only its absence ends the walk early.
        let is_shared = view.shared_blocks.load(Ordering::Relaxed) > 0;
        let mut walk = Walk {
            view,
            wanted,
            depths: self,
            alive: 0,
            pending: (SetId::EMPTY, 0..0),
        };
        walk.run_through(keys, is_shared)?;
        // Whatever was read before these looks was there at one moment: when the last entry was searched for.
        fence(Ordering::Acquire);
        let is_shared_now = view.shared_blocks.load(Ordering::Relaxed) > 0;
        if !doors.is_still(version)
            || is_shared != is_shared_now
            || is_shared && doors.added() != added
        {
            return Err(Torn);
        }
        for &(run, version) in &self.read {
            if !view
                .tree
                .runs
                .get(run)
                .is_some_and(|header| header.is_still(version))
            {
                return Err(Torn);
            }
        }
        for &(run, _) in &self.read {
            view.tree.recency.touch(run);
        }
        Ok(())
    }

    /// Brings the deepest to the front, and leaves out all but so many; 0 means all.
    pub(super) fn deepest_first(&mut self, pods_max: usize) {
        let pods = &mut self.pods;
        let Some(last) = pods.len().checked_sub(1) else {
            return;
        };
        let deepest = pods[last].depth;
        let others = pods.partition_point(|found| found.depth < deepest);
        let is_two_depths = others == 0 || pods[0].depth == pods[others - 1].depth;
        let moved = match is_two_depths {
            // Mostly the one that has the conversation, and all that have the beginning.
            true => others.min(pods.len() - others),
            false => pods.len() / 2,
        };
        let moved = match pods_max {
            0 => moved,
            most => moved.min(most),
        };
        (0..moved).for_each(|place| pods.swap(place, last - place));
        if pods_max != 0 {
            pods.truncate(pods_max);
        }
    }
}

impl Walk<'_> {
    fn run_through(&mut self, keys: &[IndexKey], is_shared: bool) -> Result<(), Torn> {
        let mut at = 0;
        while at < keys.len() {
            let Some(door) = self.view.tree.doors.find(keys[at]) else {
                self.follow(SetId::EMPTY, at as u32, at as u32 + 1)?;
                if !is_shared {
                    break;
                }
                at += 1;
                continue;
            };
            let header = self.view.tree.runs.get(door.run).ok_or(Torn)?;
            let version = header.version().ok_or(Torn)?;
            self.depths.read.push((door.run, version));
            self.view.look_ahead(header, keys, at == 0);
            let equal = self.equal(header, door.block, &keys[at..])?;
            if equal == 0 {
                // The entry is of another time than the run.
                return Err(Torn);
            }
            self.spans(header, door.block, door.block + equal, at as u32)?;
            at += equal as usize;
            if !is_shared && self.is_over() {
                break;
            }
        }
        let (set, blocks) = std::mem::replace(&mut self.pending, (SetId::EMPTY, 0..0));
        self.take(set, blocks)?;
        self.end_wide().ok_or(Torn)
    }

    /// Whether nobody is followed any more.
    fn is_over(&self) -> bool {
        let is_nobody_next = self.pending.0.is_empty() && !self.pending.1.is_empty();
        let is_nobody_left = self.alive == self.depths.pods.len() && self.depths.wide.is_empty();
        is_nobody_next || self.pending.1.start > 0 && is_nobody_left
    }

    /// How many keys are those of a run's blocks from `start` on.
    fn equal(&self, header: &Header, start: u32, keys: &[IndexKey]) -> Result<u32, Torn> {
        let view = self.view;
        let blocks = header.blocks();
        let most = blocks.saturating_sub(start).min(keys.len() as u32);
        if header.is_told() {
            for at in 0..most {
                if view.key_at(header, start + at)? != keys[at as usize].0 {
                    return Ok(at);
                }
            }
            return Ok(most);
        }
        if most == 0 {
            return Ok(0);
        }
        // A key is made from all keys before it, so those before an equal one are equal too; and full segments say of
        // their last key what most others do not, so that nearly always two places of the keys are read.
        let words = &view.tree.words;
        let first = start / SEGMENT_BLOCKS;
        let skipped = (first + 1) * SEGMENT_BLOCKS - 1 - start;
        let behind = keys[..most as usize].get(skipped as usize..);
        let alike = header.alike(words, first, behind.unwrap_or_default());
        let segment = first + alike.ok_or(Torn)?;
        let from = (segment * SEGMENT_BLOCKS).max(start);
        let asked = |block: u32| keys[(block - start) as usize];
        if from > start && view.key_at(header, from - 1)? != asked(from - 1).0 {
            return self.equal_halving(header, start, &keys[..(from - 1 - start) as usize]);
        }
        let until = ((segment + 1) * SEGMENT_BLOCKS).min(start + most);
        if until <= from {
            return Ok(from - start);
        }
        let held = view.keys_of(header, segment)?;
        let held = held.get((from % SEGMENT_BLOCKS) as usize..).ok_or(Torn)?;
        let asked = &keys[(from - start) as usize..(until - start) as usize];
        let pairs = held.iter().zip(asked);
        let equal = pairs.filter(|(held, asked)| held.load(Ordering::Relaxed) == asked.0);
        Ok(from - start + equal.count() as u32)
    }

    /// The same by halving, for chains that are unlike where their segments' ends seemed alike.
    fn equal_halving(&self, header: &Header, start: u32, keys: &[IndexKey]) -> Result<u32, Torn> {
        let (mut low, mut high) = (0, keys.len() as u32);
        while low < high {
            let middle = low.midpoint(high);
            if self.view.key_at(header, start + middle)? == keys[middle as usize].0 {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Follows everybody through blocks of a run, the first of which is the `at`th that was asked for.
    fn spans(&mut self, header: &Header, start: u32, end: u32, at: u32) -> Result<(), Torn> {
        let pairs = header.span_words(&self.view.tree.words).ok_or(Torn)?;
        let count = pairs.len() as u32 / 2;
        let mut span = partition(count, |span| get(&pairs[2 * span as usize]) <= start);
        let mut from = start;
        while from < end {
            let held = match pairs.get(2 * span as usize..) {
                Some(pair) if !pair.is_empty() => read_span(pair),
                // Blocks of an event that is not through have no holders yet.
                _ => return Err(Torn),
            };
            let to = held.end.min(end);
            if to <= from {
                return Err(Torn);
            }
            self.follow(held.set, at + from - start, at + to - start)?;
            (from, span) = (to, span + 1);
        }
        Ok(())
    }

    /// Notes who holds the next blocks; equal neighbours are followed together.
    fn follow(&mut self, set: SetId, start: u32, end: u32) -> Result<(), Torn> {
        if self.pending.0 == set && self.pending.1.end == start && start > 0 {
            self.pending.1.end = end;
            return Ok(());
        }
        let (before, blocks) = std::mem::replace(&mut self.pending, (set, start..end));
        self.take(before, blocks)
    }

    /// Takes everybody who holds the blocks, and all before them, to their end.
    fn take(&mut self, set: SetId, blocks: Range<u32>) -> Result<(), Torn> {
        if blocks.is_empty() {
            return Ok(());
        }
        let words = &self.view.tree.words;
        with_members(words, set, |members| {
            let own = without_shared(members);
            if own.len() < members.len() {
                self.share(&blocks);
            }
            let count = blocks.end - blocks.start;
            if blocks.start > 0 && self.depths.wide.is_empty() {
                self.narrow(own, count);
            } else if self.is_wide(own) {
                self.depths.wide.push((set, count));
            } else {
                self.start(own, is_plain(words, set), count);
                return self.start_behind(own);
            }
            Some(())
        })
        .flatten()
        .ok_or(Torn)
    }

    fn share(&mut self, blocks: &Range<u32>) {
        if self.depths.shared_depth == blocks.start {
            self.depths.shared_depth = blocks.end;
        }
        match self.depths.shared.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ => self.depths.shared.push(blocks.clone()),
        }
    }
}

impl View {
    /// The key of a block of a run.
    #[inline]
    pub(super) fn key_at(&self, header: &Header, block: u32) -> Result<u64, Torn> {
        let keys = self.keys_of(header, block / SEGMENT_BLOCKS)?;
        let key = keys.get((block % SEGMENT_BLOCKS) as usize).ok_or(Torn)?;
        Ok(key.load(Ordering::Relaxed))
    }

    /// The keys of a segment of a run.
    #[inline]
    fn keys_of(&self, header: &Header, ordinal: u32) -> Result<&[AtomicU64], Torn> {
        let segment = header.segment(&self.tree.words, ordinal).ok_or(Torn)?;
        self.tree.keys.segment(segment).ok_or(Torn)
    }

    /// Reads what a lookup will want of a run, and behind the first one, so that memory is asked for all of it at once.
    ///
    /// Prompts often begin with a run that many hold to its end; where they leave a later one is not to be guessed.
    #[inline]
    fn look_ahead(&self, header: &Header, keys: &[IndexKey], is_first: bool) {
        let behind = keys.get(header.blocks() as usize).filter(|_| is_first);
        let entry = behind.map(|key| self.tree.doors.look_ahead(*key));
        let words = &self.tree.words;
        let set = header.span(words, 0).map(|span| span.set);
        let length = set.and_then(|set| first_word(words, set));
        black_box((entry, length));
    }
}

impl Depths {
    /// Answers only these pods, when asked with `is_limited`.
    pub(super) fn allow(&mut self, pods: impl Iterator<Item = PodNumber>) {
        self.allowed.clear();
        self.allowed.extend(pods.map(|pod| pod.0));
        self.allowed.sort_unstable();
    }
}
