//! The cache groups of one source: what each needs, and how its blocks are kept apart from the other groups'.
//!
//! All groups of an engine name the same block by the same hash. The first group that keeps every block is the *main*
//! one: its blocks are where every other pod's are. A block of another group has a key and a name of its own, each made
//! by turning fixed bits of the main one's, so that it is one more block to the index and is found from a prompt's keys.
//! A block that is larger than the index's has one entry, where the index's block with the same end would be; of main
//! groups these are kept apart, too, since two of them may differ behind a common beginning.

use kvcache_core::{EngineHash, IndexKey};

use crate::adapter::{CacheGroup, GroupRule};

/// The most groups that one source's events may name; those of more are refused.
pub(super) const GROUPS_MAX: usize = 64;

/// A group that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) number: u32,
    pub(super) rule: GroupRule,
    /// Blocks of the index in one of the group's.
    pub(super) stride: u32,
}

impl Group {
    /// At every how many of the index's blocks one of a group that is apart may end.
    pub(super) const fn step(&self) -> u32 {
        match self.rule {
            // A state may be at the end of any block.
            GroupRule::State => 1,
            _ => self.stride,
        }
    }
}

/// All groups of a source that are known, ascending by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Groups {
    known: Vec<Group>,
    /// The group that has the index's own keys: the first that keeps every block.
    main: Option<u32>,
    /// Those that hold whatever events say.
    told: Vec<CacheGroup>,
}

/// Where a group's blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seat {
    /// Where every other pod's are.
    Main,
    /// Apart.
    Apart(u32),
    /// Nowhere: they matter to nobody.
    Nowhere,
}

impl Groups {
    pub(super) fn main(&self) -> Option<u32> {
        self.main
    }

    /// The groups that an answer must satisfy.
    pub(super) fn known(&self) -> &[Group] {
        &self.known
    }

    /// The same as events would tell them, in an index whose blocks have so many tokens.
    pub(super) fn told(&self, block_size: u32) -> Vec<CacheGroup> {
        let known = self.known.iter().map(|group| CacheGroup {
            number: group.number,
            rule: group.rule,
            block_size: group.stride * block_size,
        });
        known.collect()
    }

    /// The main group, as an image says; it needs every block.
    pub(super) fn set_main(&mut self, main: Option<u32>, block_size: u32) {
        let Some(number) = main else {
            return;
        };
        self.known.retain(|known| known.number != number);
        self.main = None;
        let group = CacheGroup {
            number,
            rule: GroupRule::Full,
            block_size,
        };
        self.learn(&group, block_size);
    }

    /// Sets what holds whatever events say; what they said is forgotten.
    pub(super) fn tell(&mut self, groups: &[CacheGroup], block_size: u32) {
        self.told = groups.to_vec();
        self.reset(block_size);
    }

    /// Forgets what events said.
    pub(super) fn reset(&mut self, block_size: u32) {
        self.known.clear();
        self.main = None;
        for group in std::mem::take(&mut self.told) {
            self.learn(&group, block_size);
            self.told.push(group);
        }
    }

    /// Whether an event about this group says anything new.
    #[inline]
    pub(super) fn is_new(&self, group: Option<&CacheGroup>) -> bool {
        group.is_some_and(|group| {
            group.rule != GroupRule::Nothing
                && !self.known.iter().any(|known| known.number == group.number)
        })
    }

    /// Takes a group in, in an index whose blocks have so many tokens; false when there are too many.
    pub(super) fn learn(&mut self, group: &CacheGroup, block_size: u32) -> bool {
        if !self.is_new(Some(group)) {
            return true;
        }
        if self.known.len() >= GROUPS_MAX {
            return false;
        }
        let at = self
            .known
            .partition_point(|known| known.number < group.number);
        let known = Group {
            number: group.number,
            rule: group.rule,
            stride: (group.block_size / block_size).max(1),
        };
        self.known.insert(at, known);
        if group.rule == GroupRule::Full && self.main.is_none() {
            self.main = Some(group.number);
        }
        true
    }

    /// Where the blocks of a group are.
    #[inline]
    pub(super) fn seat(&self, number: Option<u32>) -> Seat {
        match number {
            None => Seat::Main,
            Some(number) if self.main == Some(number) => Seat::Main,
            Some(number) if self.known.iter().any(|known| known.number == number) => {
                Seat::Apart(number)
            }
            Some(_) => Seat::Nowhere,
        }
    }

    /// The groups whose blocks are apart.
    pub(super) fn apart(&self) -> impl Iterator<Item = u32> + '_ {
        let numbers = self.known.iter().map(|known| known.number);
        numbers.filter(|number| self.main != Some(*number))
    }
}

/// Bits that look random, the same everywhere and always: an image has names and keys that were made with them.
const fn bits(seed: u64) -> u64 {
    // Steele, Lea and Flood's SplitMix64.
    let mut bits = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Which blocks are kept apart from the index's own, and from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Apart {
    /// Those of a group beside the main one.
    Group(u32),
    /// Those of main groups, each as large as so many of the index's.
    Large(u32),
}

impl Apart {
    const fn seed(self) -> u64 {
        match self {
            Self::Group(number) => number as u64,
            Self::Large(stride) => 1 << 40 | stride as u64,
        }
    }

    /// The key of a block that is apart, from the index's own, and back.
    pub(super) const fn key(self, key: IndexKey) -> IndexKey {
        IndexKey(key.0 ^ bits(2 * self.seed() + 1))
    }

    /// The name of a block that is apart, from the engine's.
    pub(super) const fn name(self, name: EngineHash) -> EngineHash {
        EngineHash(name.0 ^ bits(2 * self.seed() + 2))
    }
}
