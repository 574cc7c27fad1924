//! What one source says it holds, and where its blocks belong.
//!
//! A source's blocks are where its number is among the holders; kept apart is only what that cannot tell: copies beyond
//! the first, names that are another block's or another source's, and which runs to go through when the source goes.

use std::collections::HashMap;
use std::mem::size_of;

use kvcache_core::prefix::IndexChain;
use kvcache_core::{EngineHash, Error, ErrorKind, IndexKey, Result, Tier};

use super::config::{Applied, SourceSpec};
use super::hash::KeyState;
use super::image::ImageBlock;
use super::orphans::{Content, Copies, Orphans};
use super::roots::{Keys, Roots};
use super::sets::{Holder, SourceNumber};
use super::tree::{Place, Shared, Stretch, Tree};
use crate::adapter::{CacheGroup, RemovedBlocks, SourceKind, StoredBlocks};

/// Everything that only the writer has and all sources share.
pub(super) struct Writer {
    pub(super) tree: Tree,
    pub(super) roots: Roots,
    pub(super) keys: Keys,
    /// Entries of all sources, and those in shared tiers.
    pub(super) entries: u64,
    /// Blocks in shared tiers.
    pub(super) shared_blocks: u64,
    /// Kept between events, so that they do not allocate.
    block_keys: Vec<IndexKey>,
    stretches: Vec<Stretch>,
    unchanged: Vec<(u32, u32)>,
}

impl Writer {
    pub(super) fn new(keys: Keys) -> Self {
        Self {
            tree: Tree::new(),
            roots: Roots::default(),
            keys,
            entries: 0,
            shared_blocks: 0,
            block_keys: Vec::new(),
            stretches: Vec::new(),
            unchanged: Vec::new(),
        }
    }

    /// Ends an event: readers see it.
    pub(super) fn finish(&mut self, shared: &Shared) {
        while let Some(root) = self.tree.ended_roots.pop() {
            self.roots.release(root);
        }
        self.tree.finish(shared);
    }

    pub(super) fn bytes(&self) -> usize {
        self.tree.bytes()
    }

    /// Takes blocks of shared tiers in, wherever they belong.
    pub(super) fn share_keys(
        &mut self,
        shared: &Shared,
        keys: impl Iterator<Item = IndexKey>,
    ) -> Applied {
        let mut applied = Applied::default();
        for key in keys {
            let place = self.tree.place(shared, None, key, true);
            self.share(shared, Stretch::of(place), true, &mut applied);
        }
        applied
    }

    fn share(&mut self, shared: &Shared, blocks: Stretch, is_stored: bool, applied: &mut Applied) {
        self.unchanged.clear();
        if is_stored {
            let stored = self
                .tree
                .insert(shared, blocks, Holder::SHARED, &mut self.unchanged);
            applied.stored += stored;
            self.shared_blocks += u64::from(stored);
            self.entries += u64::from(stored);
        } else {
            let removed = self
                .tree
                .remove(shared, blocks, Holder::SHARED, &mut self.unchanged);
            applied.removed += removed;
            self.shared_blocks -= u64::from(removed);
            self.entries -= u64::from(removed);
        }
    }
}

/// What the index knows of a source beside who holds what.
pub(super) struct Source {
    pub(super) spec: SourceSpec,
    pub(super) number: SourceNumber,
    /// The cache group that the index follows; the first one that forms prefixes.
    pub(super) group: Option<u32>,
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
    /// The last block stored, which the next event probably goes on from.
    newest: Option<(EngineHash, u32)>,
}

/// A chain that is being followed through an event.
struct OpenChain {
    chain: IndexChain,
    root: u32,
    last: Option<Place>,
}

impl Source {
    pub(super) fn new(spec: SourceSpec, number: SourceNumber, orphans_max: usize) -> Self {
        let state = KeyState::random();
        Self {
            spec,
            number,
            group: None,
            runs: HashMap::with_hasher(state),
            more: HashMap::with_hasher(state),
            names: HashMap::with_hasher(state),
            roots: HashMap::with_hasher(state),
            orphans: Orphans::new(orphans_max),
            entries: 0,
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
        if let Some(&(position, key)) = self.names.get(&hash) {
            let place = tree.place_of(position);
            // The position may be another block's by now.
            if tree.key(shared, position) == key && tree.holds(shared, place, self.number) {
                return Some(place);
            }
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

    pub(super) fn root_of(&self, writer: &Writer, shared: &Shared, place: Place) -> Option<u32> {
        let apart = self.roots.get(&place.position).copied();
        apart.or_else(|| writer.tree.root(shared, place.run))
    }

    /// Takes stored blocks in.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the blocks have another size than the index's; both are named.
    pub(super) fn store(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
    ) -> Result<Applied> {
        let mut applied = Applied::default();
        if self.is_node() {
            self.store_keys(writer, shared, blocks, &mut applied);
            return Ok(applied);
        }
        if !self.follows(blocks.group) {
            applied.ignored += blocks.hashes.len() as u32;
            return Ok(applied);
        }
        if blocks.tokens.is_empty() {
            for &hash in &blocks.hashes {
                self.mention(writer, shared, hash, blocks.tier, None, &mut applied);
            }
            return Ok(applied);
        }
        let block_size = writer.keys.block_size.get();
        if blocks.block_size != block_size {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the source's blocks have {} tokens, the index's {block_size}",
                    blocks.block_size
                ),
            ));
        }
        if blocks.tokens.len() != blocks.hashes.len() * block_size as usize {
            return Err(Error::invalid(
                "stored blocks' tokens",
                blocks.tokens.len(),
                blocks.hashes.len() * block_size as usize,
            ));
        }
        let chain = self.open_chain(writer, shared, blocks.parent, blocks);
        match chain {
            Some(chain) if self.orphans.is_empty() => {
                self.store_chain(writer, shared, chain, blocks, &mut applied);
            }
            chain => self.store_singly(writer, shared, chain, blocks, &mut applied),
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

    /// The chain that goes on after `parent`, with a reference to its root; `None` when its place is not known.
    fn open_chain(
        &self,
        writer: &mut Writer,
        shared: &Shared,
        parent: Option<EngineHash>,
        blocks: &StoredBlocks,
    ) -> Option<OpenChain> {
        let Some(parent) = parent else {
            let (lora, salt) = (blocks.lora.as_deref(), blocks.cache_salt.as_deref());
            let root = writer.roots.acquire(&writer.keys, lora, salt);
            return Some(OpenChain {
                chain: IndexChain::new(writer.roots.get(root)),
                root,
                last: None,
            });
        };
        let last = self.find_held(writer, shared, parent)?;
        let root = self.root_of(writer, shared, last)?;
        writer.roots.add(root);
        let key = writer.tree.key(shared, last.position);
        Some(OpenChain {
            chain: IndexChain::after(writer.roots.get(root), key),
            root,
            last: Some(last),
        })
    }

    /// Stores blocks all of whose places are known in advance: the usual case, so it works on all of them at once.
    fn store_chain(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        mut open: OpenChain,
        blocks: &StoredBlocks,
        applied: &mut Applied,
    ) {
        let size = writer.keys.block_size.get() as usize;
        let mut keys = std::mem::take(&mut writer.block_keys);
        let mut stretches = std::mem::take(&mut writer.stretches);
        keys.clear();
        stretches.clear();
        hash_blocks(&mut open.chain, blocks, 0, size, &mut keys);
        // Each search below would wait for memory on its own; asked for together they wait once.
        let seen = blocks
            .hashes
            .iter()
            .zip(&keys)
            .fold(0, |seen, (hash, key)| {
                seen ^ writer.tree.touch(shared, *hash, *key)
            });
        std::hint::black_box(seen);
        for (position, &hash) in blocks.hashes.iter().enumerate() {
            let settled = self.seat(writer, shared, hash, open.last, keys[position]);
            let known = writer.tree.key(shared, settled.position);
            if known != keys[position] {
                // What follows, follows the block as it was placed first.
                open.chain = IndexChain::after(writer.roots.get(open.root), known);
                keys.truncate(position + 1);
                hash_blocks(&mut open.chain, blocks, position + 1, size, &mut keys);
            }
            if !stretches
                .last_mut()
                .is_some_and(|last: &mut Stretch| last.extend(settled))
            {
                stretches.push(Stretch::of(settled));
            }
            open.last = Some(settled);
        }
        for &stretch in &stretches {
            self.keep_root(writer, shared, stretch, open.root);
            self.add(writer, shared, stretch, blocks.tier, applied);
        }
        if let (Some(last), Some(&hash)) = (open.last, blocks.hashes.last()) {
            self.newest = Some((hash, last.position));
        }
        writer.roots.release(open.root);
        (writer.block_keys, writer.stretches) = (keys, stretches);
    }

    /// Stores blocks one after the other: some of them may have to wait, and others may wait for them.
    fn store_singly(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        mut open: Option<OpenChain>,
        blocks: &StoredBlocks,
        applied: &mut Applied,
    ) {
        let size = writer.keys.block_size.get() as usize;
        let mut parent = blocks.parent;
        let tokens = blocks.tokens.chunks_exact(size);
        for (position, (&hash, tokens)) in blocks.hashes.iter().zip(tokens).enumerate() {
            let identifiers = blocks
                .identifiers
                .get(position)
                .map_or(&[][..], Vec::as_slice);
            if open.is_none() {
                open = self.open_chain(writer, shared, parent, blocks);
            }
            if let Some(open) = &mut open {
                let key = push(&mut open.chain, tokens, identifiers);
                let place = self.seat(writer, shared, hash, open.last, key);
                let known = writer.tree.key(shared, place.position);
                open.chain = IndexChain::after(writer.roots.get(open.root), known);
                open.last = Some(place);
                self.keep_root(writer, shared, Stretch::of(place), open.root);
                self.add(writer, shared, Stretch::of(place), blocks.tier, applied);
                self.settle(writer, shared, (hash, place), open.root, applied);
            } else {
                let content = parent.map(|parent| Content {
                    parent,
                    tokens: tokens.into(),
                    identifiers: identifiers.to_vec(),
                });
                self.mention(writer, shared, hash, blocks.tier, content, applied);
            }
            parent = Some(hash);
        }
        if let Some(open) = open {
            writer.roots.release(open.root);
        }
    }

    /// Where a block of this name goes: where the source has put it already, else where its key says.
    fn seat(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        hash: EngineHash,
        last: Option<Place>,
        key: IndexKey,
    ) -> Place {
        let tree = &mut writer.tree;
        if self.names.is_empty() {
            if let Some(last) = last
                && let Some(next) = tree.beside(shared, last, true)
                && tree.name(next.position) == Some(hash)
                && tree.key(shared, next.position) == key
            {
                return next;
            }
        } else if self.names.contains_key(&hash)
            && let Some(known) = self.find_held(writer, shared, hash)
        {
            return known;
        }
        let tree = &mut writer.tree;
        let named = tree.find_name(hash);
        if let Some(position) = named {
            let known = tree.place_of(position);
            // The first placing stands: it had everything that shaped the block.
            if tree.key(shared, position) == key || tree.holds(shared, known, self.number) {
                return known;
            }
        }
        let place = tree.place(shared, last, key, false);
        if named.is_none() && tree.name(place.position).is_none() {
            tree.set_name(place.position, hash);
        } else {
            self.names.insert(hash, (place.position, key));
        }
        place
    }

    /// Notes what chain the blocks are of.
    fn keep_root(&mut self, writer: &mut Writer, shared: &Shared, blocks: Stretch, root: u32) {
        match writer.tree.root(shared, blocks.run) {
            Some(known) if known == root => {}
            None => {
                writer.roots.add(root);
                writer.tree.set_root(shared, blocks.run, root);
            }
            Some(_) => {
                for block in blocks.start..blocks.end {
                    let position = writer.tree.block(shared, blocks.run, block).position;
                    writer.roots.add(root);
                    if let Some(before) = self.roots.insert(position, root) {
                        writer.roots.release(before);
                    }
                }
            }
        }
    }

    /// Counts a copy of each block in.
    fn add(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        tier: Tier,
        applied: &mut Applied,
    ) {
        if tier.is_shared() {
            // What others delete from a shared tier is stored anew, however often this source has said so.
            writer.share(shared, blocks, true, applied);
        }
        let holder = Holder::new(self.number, tier);
        writer.unchanged.clear();
        let added = writer
            .tree
            .insert(shared, blocks, holder, &mut writer.unchanged);
        if added > 0 {
            *self.runs.entry(blocks.run).or_default() += added;
            if !tier.is_shared() {
                self.entries += u64::from(added);
                writer.entries += u64::from(added);
                applied.stored += added;
            }
        }
        if self.is_counted(tier) {
            for &(start, end) in &writer.unchanged {
                for block in start..end {
                    let position = writer.tree.block(shared, blocks.run, block).position;
                    let more = self.more.entry((position, tier as u8)).or_default();
                    *more = more.saturating_add(1);
                }
            }
        }
    }

    /// Places those that waited for a block, and those that waited for them.
    fn settle(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        placed: (EngineHash, Place),
        root: u32,
        applied: &mut Applied,
    ) {
        if self.orphans.is_empty() {
            return;
        }
        let mut settled = vec![placed];
        while let Some((hash, place)) = settled.pop() {
            // Counted while it waited itself.
            if let Some(copies) = self.orphans.forget(hash) {
                self.add_copies(writer, shared, place, &copies, applied);
            }
            let parent_key = writer.tree.key(shared, place.position);
            let children: Vec<(EngineHash, IndexKey)> = self
                .orphans
                .children(hash)
                .map(|(child, content)| {
                    let mut chain = IndexChain::after(writer.roots.get(root), parent_key);
                    (
                        child,
                        push(&mut chain, &content.tokens, &content.identifiers),
                    )
                })
                .collect();
            for (child, key) in children {
                let at = self.seat(writer, shared, child, Some(place), key);
                self.keep_root(writer, shared, Stretch::of(at), root);
                if let Some(copies) = self.orphans.forget(child) {
                    self.add_copies(writer, shared, at, &copies, applied);
                }
                settled.push((child, at));
            }
        }
    }

    pub(super) fn add_copies(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        place: Place,
        copies: &Copies,
        applied: &mut Applied,
    ) {
        for tier in Tier::ALL {
            let count = copies[tier as usize];
            if count == 0 {
                continue;
            }
            self.add(writer, shared, Stretch::of(place), tier, applied);
            if count > 1 && self.is_counted(tier) {
                let more = self.more.entry((place.position, tier as u8)).or_default();
                *more = more.saturating_add(count - 1);
            }
        }
    }

    /// Counts one more copy of a block that is told without its place; where that is unknown it waits, with `content`.
    fn mention(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        hash: EngineHash,
        tier: Tier,
        content: Option<Content>,
        applied: &mut Applied,
    ) {
        if let Some(place) = self.find_held(writer, shared, hash) {
            self.add(writer, shared, Stretch::of(place), tier, applied);
            return;
        }
        if !self.orphans.contains(hash) {
            if !self.orphans.insert(hash) {
                applied.refused += 1;
                return;
            }
            applied.orphaned += 1;
        }
        let is_counted = self.is_counted(tier);
        if let Some(copies) = self.orphans.copies_mut(hash) {
            let copies = &mut copies[tier as usize];
            if *copies == 0 || is_counted {
                *copies = copies.saturating_add(1);
            }
        }
        if content.is_some_and(|content| !self.orphans.attach(hash, content)) {
            applied.refused += 1;
        }
    }

    /// Takes a node's blocks in, whose names are keys.
    fn store_keys(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        applied: &mut Applied,
    ) {
        let mut stretches = std::mem::take(&mut writer.stretches);
        stretches.clear();
        let seen = blocks.hashes.iter().fold(0, |seen, hash| {
            seen ^ writer.tree.touch_key(IndexKey(hash.0))
        });
        std::hint::black_box(seen);
        let mut last = blocks.parent.and_then(|key| self.find(writer, shared, key));
        for hash in &blocks.hashes {
            let place = writer.tree.place(shared, last, IndexKey(hash.0), true);
            if !stretches
                .last_mut()
                .is_some_and(|last: &mut Stretch| last.extend(place))
            {
                stretches.push(Stretch::of(place));
            }
            last = Some(place);
        }
        for &stretch in &stretches {
            if blocks.tier.is_shared() {
                writer.share(shared, stretch, true, applied);
            } else {
                self.add(writer, shared, stretch, blocks.tier, applied);
            }
        }
        writer.stretches = stretches;
    }

    /// Takes a copy of each block away.
    pub(super) fn remove(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &RemovedBlocks,
    ) -> Applied {
        let mut applied = Applied::default();
        if !self.is_node()
            && let (Some(number), Some(followed)) = (blocks.group, self.group)
            && number != followed
        {
            applied.ignored += blocks.hashes.len() as u32;
            return applied;
        }
        let seen = blocks.hashes.iter().fold(0, |seen, hash| {
            seen ^ writer.tree.touch_name(*hash) ^ writer.tree.touch_key(IndexKey(hash.0))
        });
        std::hint::black_box(seen);
        let mut stretch: Option<(Stretch, usize)> = None;
        let mut last: Option<Place> = None;
        for (position, &hash) in blocks.hashes.iter().enumerate() {
            let guess = last.and_then(|last| self.beside(writer, shared, last, hash));
            let found = guess.or_else(|| self.find(writer, shared, hash));
            last = found;
            if let (Some((stretch, _)), Some(place)) = (&mut stretch, found)
                && self.more.is_empty()
                && stretch.extend(place)
            {
                continue;
            }
            if let Some((stretch, from)) = stretch.take() {
                let hashes = &blocks.hashes[from..position];
                self.take(writer, shared, stretch, blocks.tier, hashes, &mut applied);
            }
            match found {
                Some(place) => stretch = Some((Stretch::of(place), position)),
                None => self.take_orphan(hash, blocks.tier, &mut applied),
            }
        }
        if let Some((stretch, from)) = stretch {
            let hashes = &blocks.hashes[from..];
            self.take(writer, shared, stretch, blocks.tier, hashes, &mut applied);
        }
        applied
    }

    /// The neighbour with this name: blocks are mostly removed one after the other.
    fn beside(
        &self,
        writer: &Writer,
        shared: &Shared,
        place: Place,
        hash: EngineHash,
    ) -> Option<Place> {
        if !self.names.is_empty() {
            return None;
        }
        [false, true].into_iter().find_map(|is_after| {
            let beside = writer.tree.beside(shared, place, is_after)?;
            let is_it = if self.is_node() {
                writer.tree.key(shared, beside.position).0 == hash.0
            } else {
                writer.tree.name(beside.position) == Some(hash)
            };
            is_it.then_some(beside)
        })
    }

    /// Takes a copy of the blocks that these hashes name.
    fn take(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        tier: Tier,
        hashes: &[EngineHash],
        applied: &mut Applied,
    ) {
        if tier.is_shared() {
            self.take_shared(writer, shared, blocks, hashes, applied);
            return;
        }
        if !self.more.is_empty() && blocks.len() == 1 {
            let place = writer.tree.block(shared, blocks.run, blocks.start);
            let copy = (place.position, tier as u8);
            if let Some(more) = self.more.get_mut(&copy) {
                *more -= 1;
                if *more == 0 {
                    self.more.remove(&copy);
                }
                return;
            }
        }
        writer.unchanged.clear();
        let holder = Holder::new(self.number, tier);
        self.leave_roots(writer, shared, blocks, holder);
        let removed = writer
            .tree
            .remove(shared, blocks, holder, &mut writer.unchanged);
        self.count_out(blocks.run, removed);
        self.entries -= u64::from(removed);
        writer.entries -= u64::from(removed);
        applied.removed += removed;
        if removed < blocks.len() {
            // It does not hold some of them there; a hash may still wait under this name.
            let unknown = blocks.len() - removed;
            if self.orphans.is_empty() {
                applied.unknown += unknown;
            } else {
                let is_waiting = |hash: &&EngineHash| self.orphans.contains(**hash);
                let waiting: Vec<EngineHash> = hashes.iter().filter(is_waiting).copied().collect();
                applied.unknown += unknown - (waiting.len() as u32).min(unknown);
                for hash in waiting {
                    self.take_orphan(hash, tier, applied);
                }
            }
        }
        if !self.names.is_empty() {
            self.forget_names(writer, shared, hashes);
        }
    }

    /// Whoever deletes from a shared tier says so, not only who stored.
    fn take_shared(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        hashes: &[EngineHash],
        applied: &mut Applied,
    ) {
        if self.is_node() {
            writer.share(shared, blocks, false, applied);
            return;
        }
        for &hash in hashes {
            let Some(place) = self.find_held(writer, shared, hash) else {
                self.take_orphan(hash, Tier::Object, applied);
                continue;
            };
            let claim = Holder::new(self.number, Tier::Object);
            self.leave_roots(writer, shared, Stretch::of(place), claim);
            writer.unchanged.clear();
            // The claim last: it keeps the block's place known until then.
            writer.share(shared, Stretch::of(place), false, applied);
            if !writer.tree.holds_in(shared, place, claim) {
                continue;
            }
            let taken =
                writer
                    .tree
                    .remove(shared, Stretch::of(place), claim, &mut writer.unchanged);
            self.count_out(place.run, taken);
            if !self.names.is_empty() {
                self.forget_names(writer, shared, &[hash]);
            }
        }
    }

    fn count_out(&mut self, run: u32, removed: u32) {
        if removed == 0 {
            return;
        }
        if let Some(count) = self.runs.get_mut(&run) {
            *count -= removed;
            if *count == 0 {
                self.runs.remove(&run);
                shrink(&mut self.runs);
            }
        }
    }

    fn take_orphan(&mut self, hash: EngineHash, tier: Tier, applied: &mut Applied) {
        let Some(copies) = self.orphans.copies_mut(hash) else {
            // Deleting from a shared tier what a node has not stored itself is no mistake.
            if !(self.is_node() && tier.is_shared()) {
                applied.unknown += 1;
            }
            return;
        };
        match copies[tier as usize].checked_sub(1) {
            None => applied.unknown += 1,
            Some(left) => {
                copies[tier as usize] = left;
                if *copies == Copies::default() {
                    self.orphans.forget(hash);
                }
            }
        }
    }

    /// Forgets own names of blocks that the source holds no more.
    fn forget_names(&mut self, writer: &Writer, shared: &Shared, hashes: &[EngineHash]) {
        for hash in hashes {
            if let Some(&(position, key)) = self.names.get(hash) {
                let place = writer.tree.place_of(position);
                let is_held = writer.tree.key(shared, position) == key
                    && writer.tree.holds(shared, place, self.number);
                if !is_held {
                    self.names.remove(hash);
                }
            }
        }
        shrink(&mut self.names);
    }

    /// Gives back the roots of blocks that are about to lose this holder and have no other of the source.
    fn leave_roots(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        holder: Holder,
    ) {
        if self.roots.is_empty() {
            return;
        }
        for block in blocks.start..blocks.end {
            let place = writer.tree.block(shared, blocks.run, block);
            let others = Tier::ALL
                .into_iter()
                .map(|tier| Holder::new(self.number, tier))
                .filter(|other| *other != holder);
            let is_last = !others
                .into_iter()
                .any(|other| writer.tree.holds_in(shared, place, other));
            if is_last && let Some(root) = self.roots.remove(&place.position) {
                writer.roots.release(root);
            }
        }
    }

    /// Empties the tiers that a clear of this kind of source empties.
    pub(super) fn clear(&mut self, writer: &mut Writer, shared: &Shared) {
        // vLLM resets its accelerator's cache only; SGLang its host's cache with it.
        let tiers: &[Tier] = match self.spec.kind {
            SourceKind::Node => return self.forget(writer, shared),
            SourceKind::Sglang => &[Tier::Device, Tier::Host, Tier::Disk],
            _ => &[Tier::Device],
        };
        self.empty(writer, shared, tiers);
        self.orphans.clear(tiers);
    }

    /// Forgets everything; what the source put in shared tiers stays.
    pub(super) fn forget(&mut self, writer: &mut Writer, shared: &Shared) {
        self.empty(writer, shared, &Tier::ALL);
        assert!(
            self.runs.is_empty() && self.entries == 0,
            "a source that is gone holds blocks"
        );
        for root in std::mem::take(&mut self.roots).into_values() {
            writer.roots.release(root);
        }
        self.names = HashMap::with_hasher(KeyState::random());
        self.runs.shrink_to_fit();
        self.orphans = Orphans::new(self.orphans.blocks_max());
        (self.group, self.newest) = (None, None);
    }

    fn empty(&mut self, writer: &mut Writer, shared: &Shared, tiers: &[Tier]) {
        let runs: Vec<u32> = self.runs.keys().copied().collect();
        for run in runs {
            for &tier in tiers {
                let holder = Holder::new(self.number, tier);
                let Some(blocks) = writer.tree.held_stretch(shared, run, holder) else {
                    continue;
                };
                self.leave_roots(writer, shared, blocks, holder);
                writer.unchanged.clear();
                let removed = writer
                    .tree
                    .remove(shared, blocks, holder, &mut writer.unchanged);
                self.count_out(run, removed);
                if !tier.is_shared() {
                    self.entries -= u64::from(removed);
                    writer.entries -= u64::from(removed);
                }
            }
        }
        self.more
            .retain(|(_, tier), _| tiers.iter().all(|emptied| *emptied as u8 != *tier));
        self.more.shrink_to_fit();
        if !self.names.is_empty() {
            let hashes: Vec<EngineHash> = self.names.keys().copied().collect();
            self.forget_names(writer, shared, &hashes);
        }
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
        let place = self.seat(writer, shared, block.hash, previous, block.key);
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
        (runs + more + names + roots) * 8 / 7 + self.orphans.bytes()
    }
}

/// The keys of blocks from one of them on.
fn hash_blocks(
    chain: &mut IndexChain,
    blocks: &StoredBlocks,
    from: usize,
    size: usize,
    keys: &mut Vec<IndexKey>,
) {
    let tokens = blocks.tokens.chunks_exact(size).enumerate().skip(from);
    keys.extend(tokens.map(|(position, tokens)| {
        let identifiers = blocks
            .identifiers
            .get(position)
            .map_or(&[][..], Vec::as_slice);
        push(chain, tokens, identifiers)
    }));
}

fn push(chain: &mut IndexChain, tokens: &[u32], identifiers: &[String]) -> IndexKey {
    if identifiers.is_empty() {
        return chain.push(tokens);
    }
    let identifiers: Vec<&str> = identifiers.iter().map(String::as_str).collect();
    chain.push_with(tokens, &identifiers)
}

/// Tables smaller than this keep their memory.
const CAPACITY_KEPT: usize = 1024;

/// Gives memory back when a table has become much too large.
fn shrink<K: Eq + std::hash::Hash, V>(map: &mut HashMap<K, V, KeyState>) {
    if map.len() * 8 < map.capacity() && map.capacity() > CAPACITY_KEPT {
        map.shrink_to(map.len() * 2);
    }
}
