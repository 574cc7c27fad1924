//! The ledger of an engine.

use std::collections::HashMap;
use std::mem::size_of;
use std::sync::Arc;

use kvcache_core::prefix::IndexChain;
use kvcache_core::{EngineHash, Error, ErrorKind, IndexKey, Result, Tier};

use super::copies::{Copies, add_copy, take_copy};
use super::orphans::{Content, Orphans};
use super::roots::{Keys, Roots};
use crate::adapter::{CacheGroup, RemovedBlocks, SourceKind, StoredBlocks};
use crate::index::Applied;
use crate::index::table::{Change, KeyState, shrink};

/// Where a block of the source belongs.
#[derive(Clone, Copy)]
struct Placed {
    key: IndexKey,
    /// The chain it is part of, for blocks that will follow it.
    root: u32,
    copies: Copies,
}

/// The ledger of an engine: its hashes are bridged to index keys by the tokens that come with them.
pub(in crate::index) struct EngineLedger {
    kind: SourceKind,
    keys: Arc<Keys>,
    placed: HashMap<EngineHash, Placed, KeyState>,
    orphans: Orphans,
    roots: Roots,
    /// The cache group that the index follows; the first one that forms prefixes.
    group: Option<u32>,
}

impl EngineLedger {
    pub(in crate::index) fn new(kind: SourceKind, keys: Arc<Keys>, orphans_max: usize) -> Self {
        Self {
            kind,
            keys,
            placed: HashMap::with_hasher(KeyState::random()),
            orphans: Orphans::new(orphans_max),
            roots: Roots::default(),
            group: None,
        }
    }

    pub(in crate::index) fn orphans(&self) -> usize {
        self.orphans.len()
    }

    /// Takes stored blocks in; what may appear in the index by that is appended to `changes`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the blocks have another size than the index's; both are named.
    pub(in crate::index) fn store(
        &mut self,
        blocks: &StoredBlocks,
        changes: &mut Vec<Change>,
    ) -> Result<Applied> {
        let mut applied = Applied::default();
        if !self.follows(blocks.group) {
            applied.ignored += blocks.hashes.len() as u32;
            return Ok(applied);
        }
        let block_size = self.keys.block_size.get();
        if blocks.tokens.is_empty() {
            for &hash in &blocks.hashes {
                self.count(hash, blocks.tier, None, changes, &mut applied);
            }
            return Ok(applied);
        }
        if blocks.block_size != block_size {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the source's blocks have {} tokens, the index's {block_size}",
                    blocks.block_size
                ),
            ));
        }
        let tokens = blocks.tokens.chunks_exact(block_size as usize);
        if tokens.len() != blocks.hashes.len() {
            return Err(Error::invalid(
                "stored blocks' tokens",
                blocks.tokens.len(),
                blocks.hashes.len(),
            ));
        }
        let mut chain = self.open_chain(blocks.parent, blocks);
        let mut parent = blocks.parent;
        for (position, (&hash, tokens)) in blocks.hashes.iter().zip(tokens).enumerate() {
            let identifiers = blocks
                .identifiers
                .get(position)
                .map_or(&[][..], Vec::as_slice);
            if chain.is_none() {
                chain = self.open_chain(parent, blocks);
            }
            let mut content = None;
            if let Some(chain) = &mut chain {
                let key = self.place(chain, hash, tokens, identifiers);
                self.settle(hash, key, chain.root, changes);
            } else {
                content = parent.map(|parent| Content {
                    parent,
                    tokens: tokens.into(),
                    identifiers: identifiers.to_vec(),
                });
            }
            self.count(hash, blocks.tier, content, changes, &mut applied);
            parent = Some(hash);
        }
        if let Some(chain) = chain {
            self.roots.release(chain.root);
        }
        Ok(applied)
    }

    /// Whether the index follows the group that an event is about.
    fn follows(&mut self, group: Option<CacheGroup>) -> bool {
        match group {
            None => true,
            Some(group) if !group.is_prefix => false,
            Some(group) => *self.group.get_or_insert(group.number) == group.number,
        }
    }

    /// The chain that goes on after `parent`; `None` when its place is not known.
    fn open_chain(
        &mut self,
        parent: Option<EngineHash>,
        blocks: &StoredBlocks,
    ) -> Option<OpenChain> {
        let Some(parent) = parent else {
            let root = self.roots.acquire(&self.keys, blocks);
            return Some(OpenChain {
                chain: IndexChain::new(self.roots.get(root)),
                root,
            });
        };
        let &Placed { key, root, .. } = self.placed.get(&parent)?;
        self.roots.add(root);
        Some(OpenChain {
            chain: IndexChain::after(self.roots.get(root), key),
            root,
        })
    }

    /// The key of the chain's next block.
    fn place(
        &self,
        open: &mut OpenChain,
        hash: EngineHash,
        tokens: &[u32],
        identifiers: &[String],
    ) -> IndexKey {
        if let Some(known) = self.placed.get(&hash) {
            // The first placing stands: it had everything that shaped the block.
            open.chain = IndexChain::after(self.roots.get(open.root), known.key);
            return known.key;
        }
        if identifiers.is_empty() {
            open.chain.push(tokens)
        } else {
            let identifiers: Vec<&str> = identifiers.iter().map(String::as_str).collect();
            open.chain.push_with(tokens, &identifiers)
        }
    }

    /// Notes the place of a block, and of those that waited for it.
    fn settle(&mut self, hash: EngineHash, key: IndexKey, root: u32, changes: &mut Vec<Change>) {
        self.settle_one(hash, key, root, changes);
        if self.orphans.is_empty() {
            return;
        }
        let mut settled = vec![(hash, key)];
        while let Some((hash, key)) = settled.pop() {
            let mut children = Vec::new();
            for (child, content) in self.orphans.children(hash) {
                let identifiers: Vec<&str> =
                    content.identifiers.iter().map(String::as_str).collect();
                let mut chain = IndexChain::after(self.roots.get(root), key);
                children.push((child, chain.push_with(&content.tokens, &identifiers)));
            }
            for (child, key) in children {
                self.settle_one(child, key, root, changes);
                settled.push((child, key));
            }
        }
    }

    fn settle_one(
        &mut self,
        hash: EngineHash,
        key: IndexKey,
        root: u32,
        changes: &mut Vec<Change>,
    ) {
        if self.placed.contains_key(&hash) {
            return;
        }
        let copies = self.orphans.forget(hash).unwrap_or_default();
        self.roots.add(root);
        self.placed.insert(hash, Placed { key, root, copies });
        let tiers = Tier::ALL
            .into_iter()
            .filter(|tier| copies[*tier as usize] > 0);
        changes.extend(tiers.map(|tier| Change {
            key,
            tier,
            is_stored: true,
        }));
    }

    /// Counts one more copy of a block; one whose place is unknown becomes an orphan with `content`.
    fn count(
        &mut self,
        hash: EngineHash,
        tier: Tier,
        content: Option<Content>,
        changes: &mut Vec<Change>,
        applied: &mut Applied,
    ) {
        let is_counted = self.kind.is_counted() && !tier.is_shared();
        if let Some(placed) = self.placed.get_mut(&hash) {
            // What others delete from a shared tier is stored anew, however often this source has said so.
            if add_copy(&mut placed.copies, tier, is_counted) || tier.is_shared() {
                changes.push(Change {
                    key: placed.key,
                    tier,
                    is_stored: true,
                });
            }
            return;
        }
        if !self.orphans.contains(hash) {
            if !self.orphans.insert(hash) {
                applied.refused += 1;
                return;
            }
            applied.orphaned += 1;
        }
        if let Some(copies) = self.orphans.copies_mut(hash) {
            add_copy(copies, tier, is_counted);
        }
        if content.is_some_and(|content| !self.orphans.attach(hash, content)) {
            applied.refused += 1;
        }
    }

    /// Takes a copy of each block away; what leaves the index by that is appended to `changes`.
    pub(in crate::index) fn remove(
        &mut self,
        blocks: &RemovedBlocks,
        changes: &mut Vec<Change>,
    ) -> Applied {
        let mut applied = Applied::default();
        if let (Some(number), Some(followed)) = (blocks.group, self.group)
            && number != followed
        {
            applied.ignored += blocks.hashes.len() as u32;
            return applied;
        }
        for &hash in &blocks.hashes {
            self.remove_copy(hash, blocks.tier, changes, &mut applied);
        }
        applied
    }

    fn remove_copy(
        &mut self,
        hash: EngineHash,
        tier: Tier,
        changes: &mut Vec<Change>,
        applied: &mut Applied,
    ) {
        if let Some(placed) = self.placed.get_mut(&hash) {
            match take_copy(&mut placed.copies, tier) {
                // Whoever deletes from a shared tier says so, not only who stored.
                None if tier.is_shared() => {
                    changes.push(Change {
                        key: placed.key,
                        tier,
                        is_stored: false,
                    });
                }
                None => applied.unknown += 1,
                Some(0) => {
                    changes.push(Change {
                        key: placed.key,
                        tier,
                        is_stored: false,
                    });
                    if placed.copies == Copies::default() {
                        let root = placed.root;
                        self.placed.remove(&hash);
                        shrink(&mut self.placed);
                        self.roots.release(root);
                    }
                }
                Some(_) => {}
            }
        } else if let Some(copies) = self.orphans.copies_mut(hash) {
            match take_copy(copies, tier) {
                None => applied.unknown += 1,
                Some(_) if *copies == Copies::default() => {
                    self.orphans.forget(hash);
                }
                Some(_) => {}
            }
        } else {
            applied.unknown += 1;
        }
    }

    /// Empties the tiers that a clear of this kind of engine empties.
    pub(in crate::index) fn clear(&mut self, changes: &mut Vec<Change>) {
        // vLLM resets its accelerator's cache only; SGLang its host's cache with it.
        let tiers: &[Tier] = match self.kind {
            SourceKind::Sglang => &[Tier::Device, Tier::Host, Tier::Disk],
            _ => &[Tier::Device],
        };
        let roots = &mut self.roots;
        self.placed.retain(|_, placed| {
            for &tier in tiers {
                if std::mem::take(&mut placed.copies[tier as usize]) > 0 {
                    changes.push(Change {
                        key: placed.key,
                        tier,
                        is_stored: false,
                    });
                }
            }
            let is_held = placed.copies != Copies::default();
            if !is_held {
                roots.release(placed.root);
            }
            is_held
        });
        shrink(&mut self.placed);
        self.orphans.clear(tiers);
    }

    /// Forgets everything; what the source held itself is appended to `changes`, what it put in shared tiers stays.
    pub(in crate::index) fn forget(&mut self, changes: &mut Vec<Change>) {
        for placed in self.placed.values() {
            for tier in Tier::ALL {
                if !tier.is_shared() && placed.copies[tier as usize] > 0 {
                    changes.push(Change {
                        key: placed.key,
                        tier,
                        is_stored: false,
                    });
                }
            }
        }
        *self = Self::new(self.kind, Arc::clone(&self.keys), self.orphans.blocks_max());
    }

    pub(in crate::index) fn bytes(&self) -> usize {
        self.placed.capacity() * (size_of::<(EngineHash, Placed)>() + 1) * 8 / 7
            + self.orphans.bytes()
    }
}

struct OpenChain {
    chain: IndexChain,
    root: u32,
}
