//! Blocks of an engine that are smaller than the index's: the engine's own chain, as far as it is known.
//!
//! So many *parts* make one block of the index, which is held when all of them are: where the slowest of them is. A part
//! may belong to several blocks, since prompts may part in the middle of one. This is the engine's chain by the engine's
//! names; `source::fine` makes of it what the index holds.

use std::collections::HashMap;

use kvcache_core::{EngineHash, IndexKey, Tier};

use super::hash::KeyState;
use super::orphans::{Copies, content_bytes};

/// One of the engine's blocks.
pub(super) struct Part {
    pub(super) parent: Option<EngineHash>,
    pub(super) root: u32,
    /// Which part of a block of the index it is, from 0.
    pub(super) place: u32,
    pub(super) copies: Copies,
    /// Its own; none of a block's last part, which needs them once.
    pub(super) tokens: Box<[u32]>,
    pub(super) identifiers: Vec<String>,
    /// Of a block's last part, the block.
    pub(super) key: Option<IndexKey>,
    pub(super) children: Vec<EngineHash>,
}

impl Part {
    /// The fastest tier of the pod's own that has a copy.
    fn own_tier(&self) -> Option<Tier> {
        let own = Tier::ALL.into_iter().filter(|tier| !tier.is_shared());
        own.into_iter().find(|tier| self.copies[*tier as usize] > 0)
    }

    fn is_shared(&self) -> bool {
        let mut shared = Tier::ALL.into_iter().filter(|tier| tier.is_shared());
        shared.any(|tier| self.copies[tier as usize] > 0)
    }

    fn bytes(&self) -> usize {
        content_bytes(&self.tokens, &self.identifiers)
    }
}

/// Where all parts of a block are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Whole {
    /// The slowest of the fastest own tiers of its parts; none when a part is in none.
    pub(super) own: Option<Tier>,
    /// Every part is in a shared tier.
    pub(super) is_shared: bool,
}

/// The chain of one source.
pub(super) struct Fine {
    /// Parts in a block of the index.
    parts: u32,
    by_name: HashMap<EngineHash, Part, KeyState>,
    /// The last part of each block of the index that is known.
    ends: HashMap<IndexKey, EngineHash, KeyState>,
    /// Of all parts' contents and children.
    content_bytes: usize,
}

impl Fine {
    pub(super) fn new(parts: u32) -> Self {
        let state = KeyState::random();
        Self {
            parts,
            by_name: HashMap::with_hasher(state),
            ends: HashMap::with_hasher(state),
            content_bytes: 0,
        }
    }

    pub(super) fn parts(&self) -> u32 {
        self.parts
    }

    pub(super) fn get(&self, name: EngineHash) -> Option<&Part> {
        self.by_name.get(&name)
    }

    pub(super) fn get_mut(&mut self, name: EngineHash) -> Option<&mut Part> {
        self.by_name.get_mut(&name)
    }

    /// The last part of a block.
    pub(super) fn end_of(&self, key: IndexKey) -> Option<EngineHash> {
        self.ends.get(&key).copied()
    }

    /// The last parts of all blocks.
    pub(super) fn ends(&self) -> Vec<EngineHash> {
        self.ends.values().copied().collect()
    }

    /// The parts at the start of a chain.
    pub(super) fn starts(&self) -> Vec<EngineHash> {
        let parts = self.by_name.iter();
        let starts = parts.filter(|(_, part)| part.parent.is_none());
        starts.map(|(name, _)| *name).collect()
    }

    pub(super) fn roots(&self) -> impl Iterator<Item = u32> + '_ {
        self.by_name.values().map(|part| part.root)
    }

    pub(super) fn insert(&mut self, name: EngineHash, part: Part) {
        if let Some(parent) = part.parent
            && let Some(parent) = self.by_name.get_mut(&parent)
        {
            parent.children.push(name);
        }
        if let Some(key) = part.key {
            self.ends.insert(key, name);
        }
        self.content_bytes += part.bytes() + size_of::<EngineHash>();
        self.by_name.insert(name, part);
    }

    /// The part and those before it in its block, itself first.
    pub(super) fn of_block(&self, last: EngineHash) -> impl Iterator<Item = &Part> {
        let mut next = self.get(last);
        std::iter::from_fn(move || {
            let part = next?;
            next = match part.place {
                0 => None,
                _ => part.parent.and_then(|parent| self.get(parent)),
            };
            Some(part)
        })
    }

    /// The key of the block before the one that a part belongs to; none at the start of a sequence.
    pub(super) fn before(&self, name: EngineHash) -> Option<IndexKey> {
        let first = self.of_block(name).last()?;
        self.get(first.parent?)?.key
    }

    /// Where a block is whose last part this is.
    pub(super) fn whole(&self, end: EngineHash) -> Whole {
        let mut whole = Whole {
            own: Some(Tier::Device),
            is_shared: true,
        };
        let mut parts = 0;
        for part in self.of_block(end) {
            parts += 1;
            whole.own = whole
                .own
                .zip(part.own_tier())
                .map(|(one, other)| one.max(other));
            whole.is_shared &= part.is_shared();
        }
        if parts == self.parts {
            whole
        } else {
            Whole::default()
        }
    }

    /// The last parts of the blocks that a part belongs to.
    pub(super) fn ends_with(&self, name: EngineHash) -> Vec<EngineHash> {
        let mut ends = Vec::new();
        let mut open = vec![name];
        while let Some(name) = open.pop() {
            match self.get(name) {
                Some(part) if part.key.is_some() => ends.push(name),
                Some(part) => open.extend_from_slice(&part.children),
                None => {}
            }
        }
        ends
    }

    /// The last parts of the blocks that come directly after the one that ends here.
    pub(super) fn ends_after(&self, end: EngineHash) -> Vec<EngineHash> {
        let children = self.get(end).map_or(&[][..], |part| &part.children);
        children
            .iter()
            .flat_map(|child| self.ends_with(*child))
            .collect()
    }

    /// Forgets a part of which no copy is left and that nothing known comes after, and those before it that are so;
    /// returns their roots.
    pub(super) fn prune(&mut self, name: EngineHash) -> Vec<u32> {
        let mut roots = Vec::new();
        let mut next = Some(name);
        while let Some(name) = next {
            let is_over = self.get(name).is_some_and(|part| {
                part.children.is_empty() && part.copies.iter().all(|copies| *copies == 0)
            });
            let Some(part) = is_over.then(|| self.by_name.remove(&name)).flatten() else {
                break;
            };
            self.content_bytes -= part.bytes() + size_of::<EngineHash>();
            if let Some(key) = part.key {
                self.ends.remove(&key);
            }
            roots.push(part.root);
            if let Some(parent) = part.parent.and_then(|parent| self.by_name.get_mut(&parent)) {
                parent.children.retain(|child| *child != name);
            }
            next = part.parent;
        }
        if self.by_name.len() * 8 < self.by_name.capacity() {
            self.by_name.shrink_to(self.by_name.len() * 2);
            self.ends.shrink_to(self.ends.len() * 2);
        }
        roots
    }

    /// Forgets the copies of a block that the index gave up: of its last part, and of those before it that are part of
    /// nothing else; returns the roots of parts that are gone.
    pub(super) fn lose(&mut self, key: IndexKey, tier: Tier) -> Vec<u32> {
        let mut roots = Vec::new();
        let mut next = self.end_of(key);
        while let Some(name) = next
            && let Some(part) = self.by_name.get_mut(&name)
        {
            let is_first = part.place == 0;
            if tier.is_shared() {
                part.copies[tier as usize] = 0;
            } else {
                let own = Tier::ALL.into_iter().filter(|tier| !tier.is_shared());
                own.for_each(|tier| part.copies[tier as usize] = 0);
            }
            let parent = part.parent.filter(|_| !is_first);
            roots.extend(self.prune(name));
            let is_free = |parent: &EngineHash| {
                self.get(*parent)
                    .is_some_and(|parent| parent.children.is_empty())
            };
            next = parent.filter(is_free);
        }
        roots
    }

    /// Forgets all copies in these tiers; the names of parts that have none left.
    pub(super) fn clear(&mut self, tiers: &[Tier]) -> Vec<EngineHash> {
        let mut over = Vec::new();
        for (name, part) in &mut self.by_name {
            tiers
                .iter()
                .for_each(|tier| part.copies[*tier as usize] = 0);
            if part.copies.iter().all(|copies| *copies == 0) {
                over.push(*name);
            }
        }
        over
    }

    pub(super) fn bytes(&self) -> usize {
        let by_name = self.by_name.capacity() * (size_of::<(EngineHash, Part)>() + 1);
        let ends = self.ends.capacity() * (size_of::<(IndexKey, EngineHash)>() + 1);
        (by_name + ends) * 8 / 7 + self.content_bytes
    }
}
