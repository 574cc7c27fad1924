//! What one source says it holds, and where its blocks belong.
//!
//! A source's blocks are where its number is among the holders; kept apart is only what that cannot tell: copies beyond
//! the first, names that are another block's or another source's, and which runs to go through when the source goes.

mod apart;
mod evict;
mod fine;
mod parts;
mod remove;
mod store;
mod writer;

use std::collections::HashMap;
use std::mem::size_of;

use kvcache_core::{EngineHash, IndexKey, Tier};

use super::config::SourceSpec;
use super::fine::Fine;
use super::groups::{Apart, Groups};
use super::hash::KeyState;
use super::image::ImageBlock;
use super::orphans::Orphans;
use super::sets::SourceNumber;
use super::tree::{Place, Shared, Stretch};
use crate::adapter::SourceKind;
use crate::score::MediumWeight;

pub use self::evict::Evicted;
pub(super) use self::writer::Writer;

/// How large a source's blocks are beside the index's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Blocks of the index in one of the source's.
    stride: u32,
    /// Blocks of the source in one of the index's; one of both is 1.
    parts: u32,
}

impl Size {
    pub(super) const ONE: Self = Self {
        stride: 1,
        parts: 1,
    };

    /// None for sizes of which neither is a whole number of the other.
    pub(super) const fn of(theirs: u32, own: u32) -> Option<Self> {
        if theirs == 0 {
            None
        } else if theirs.is_multiple_of(own) {
            let stride = theirs / own;
            Some(Self { stride, parts: 1 })
        } else if own.is_multiple_of(theirs) {
            let parts = own / theirs;
            Some(Self { stride: 1, parts })
        } else {
            None
        }
    }

    fn fine(self) -> Option<Box<Fine>> {
        (self.parts > 1).then(|| Box::new(Fine::new(self.parts)))
    }
}

/// What the index knows of a source beside who holds what.
pub(super) struct Source {
    pub(super) spec: SourceSpec,
    pub(super) number: SourceNumber,
    pub(super) groups: Groups,
    /// Blocks of the index in one of the source's.
    pub(super) stride: u32,
    /// The source's own chain, where its blocks are smaller than the index's.
    fine: Option<Box<Fine>>,
    /// Whether an event has said how large they are.
    is_sized: bool,
    /// The data-parallel rank that it tells of, once known.
    pub(super) rank: Option<u32>,
    /// The media that its events have named, where media have weights of their own.
    pub(super) media: Vec<MediumWeight>,
    /// How many entries and claims of the source a run has.
    runs: HashMap<u32, u32, KeyState>,
    /// Copies beyond the first, by position and tier.
    more: HashMap<(u32, u8), u32, KeyState>,
    /// Names that mean another block than elsewhere, or a block that has another name elsewhere.
    names: HashMap<EngineHash, (u32, IndexKey), KeyState>,
    /// The root of blocks whose run says another one.
    roots: HashMap<u32, u32, KeyState>,
    pub(super) orphans: Orphans,
    /// Blocks by tier, those in shared ones left out.
    pub(super) entries: u64,
    /// Entries that the budget took and that the source has not withdrawn since, as far as it is known.
    pub(super) evicted: Evicted,
    /// What [`Self::bytes`] was when it was last added up.
    pub(super) counted: usize,
    /// The same of what waits.
    pub(super) counted_waiting: usize,
    /// Own names of blocks that the budget took, at most so many.
    stale_names: usize,
    /// The last block stored, which the next event probably goes on from.
    newest: Option<(EngineHash, u32)>,
}

impl Source {
    pub(super) fn new(
        spec: SourceSpec,
        number: SourceNumber,
        size: Size,
        orphans_max: usize,
    ) -> Self {
        let state = KeyState::random();
        Self {
            spec,
            number,
            groups: Groups::default(),
            stride: size.stride,
            fine: size.fine(),
            is_sized: false,
            rank: None,
            media: Vec::new(),
            runs: HashMap::with_hasher(state),
            more: HashMap::with_hasher(state),
            names: HashMap::with_hasher(state),
            roots: HashMap::with_hasher(state),
            orphans: Orphans::new(orphans_max),
            entries: 0,
            evicted: Evicted::default(),
            counted: 0,
            counted_waiting: 0,
            stale_names: 0,
            newest: None,
        }
    }

    fn is_counted(&self, tier: Tier) -> bool {
        self.spec.kind.is_counted() && !tier.is_shared()
    }

    pub(super) fn is_node(&self) -> bool {
        self.spec.kind == SourceKind::Node
    }

    /// The block that a hash names for this source, held or not.
    fn find(&self, writer: &Writer, shared: &Shared, hash: EngineHash) -> Option<Place> {
        let tree = &writer.tree;
        if self.is_node() {
            return tree.find_key(shared, IndexKey(hash.0));
        }
        // The position may be another block's by now, or nobody's.
        if let Some(&(position, key)) = self.names.get(&hash)
            && let Some(place) = tree.place_if_there(position)
            && tree.key(shared, position) == key
            && tree.holds(shared, place, self.number)
        {
            return Some(place);
        }
        tree.find_name(hash).map(|position| tree.place_of(position))
    }

    /// The block that a hash names for this source, which holds it.
    fn find_held(&self, writer: &Writer, shared: &Shared, hash: EngineHash) -> Option<Place> {
        if let Some((name, position)) = self.newest
            && name == hash
            && writer.tree.name(position) == Some(hash)
            && self.names.is_empty()
        {
            let place = writer.tree.place_of(position);
            if writer.tree.holds(shared, place, self.number) {
                return Some(place);
            }
        }
        self.find(writer, shared, hash)
            .filter(|place| writer.tree.holds(shared, *place, self.number))
    }

    /// Whether the main group's blocks are kept apart.
    pub(super) fn main_apart(&self) -> Option<Apart> {
        (self.stride > 1).then_some(Apart::Large(self.stride))
    }

    pub(super) fn root_of(&self, writer: &Writer, shared: &Shared, place: Place) -> Option<u32> {
        let apart = self.roots.get(&place.position).copied();
        apart.or_else(|| writer.tree.root(shared, place.run))
    }

    /// The runs that the source has anything in.
    pub(super) fn runs(&self) -> impl Iterator<Item = u32> + '_ {
        self.runs.keys().copied()
    }

    /// Copies beyond the first.
    pub(super) fn more(&self, position: u32, tier: Tier) -> u32 {
        self.more.get(&(position, tier as u8)).copied().unwrap_or(0)
    }

    /// The names that the source has for blocks which are named otherwise elsewhere.
    pub(super) fn own_names(&self) -> HashMap<u32, EngineHash> {
        self.names
            .iter()
            .map(|(hash, (position, _))| (*position, *hash))
            .collect()
    }

    /// Puts a block of an image where it belongs; its copies are still to be added.
    pub(super) fn take_up_block(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        previous: Option<Place>,
        block: &ImageBlock,
        root: Option<u32>,
    ) -> Place {
        if self.is_node() {
            return writer.tree.place(shared, previous, block.key, true);
        }
        let place = if block.is_apart {
            let before = previous.map(|previous| writer.tree.key(shared, previous.position));
            self.seat_before(writer, shared, (block.hash, block.key), before)
        } else {
            self.seat(writer, shared, block.hash, previous, block.key)
        };
        if let Some(root) = root {
            self.keep_root(writer, shared, Stretch::of(place), root);
        }
        place
    }

    pub(super) fn bytes(&self) -> usize {
        // A hash table has a control byte per place, and one in eight places stays empty.
        let runs = self.runs.capacity() * (size_of::<(u32, u32)>() + 1);
        let more = self.more.capacity() * (size_of::<((u32, u8), u32)>() + 1);
        let names = self.names.capacity() * (size_of::<(EngineHash, (u32, IndexKey))>() + 1);
        let roots = self.roots.capacity() * (size_of::<(u32, u32)>() + 1);
        let fine = self.fine.as_ref().map_or(0, |fine| fine.bytes());
        (runs + more + names + roots) * 8 / 7 + self.orphans.bytes() + fine
    }
}

/// Tables smaller than this keep their memory.
const CAPACITY_KEPT: usize = 1024;

/// Gives memory back when a table has become much too large.
fn shrink<K: Eq + std::hash::Hash, V>(map: &mut HashMap<K, V, KeyState>) {
    if map.len() * 8 < map.capacity() && map.capacity() > CAPACITY_KEPT {
        map.shrink_to(map.len() * 2);
    }
}
