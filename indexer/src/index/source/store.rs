//! Stored blocks: where they belong, and which wait.

use kvcache_core::prefix::IndexChain;
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{EngineHash, IndexKey, Result, Tier};

use super::super::config::Applied;
use super::super::groups::Seat;
use super::super::orphans::{Content, Copies};
use super::super::sets::Holder;
use super::super::tree::{Place, Shared, Stretch, Tree};
use super::{Source, Writer};
use crate::adapter::StoredBlocks;

/// A chain that is being followed through an event.
pub(super) struct OpenChain {
    pub(super) chain: IndexChain,
    pub(super) root: u32,
    pub(super) last: Option<Place>,
}

impl Source {
    /// Takes stored blocks in.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the blocks have another size than the index's; both are named.
    pub(in crate::index) fn store(
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
        let seat = self.groups.seat(blocks.group.map(|group| group.number));
        if self.fine.is_some() {
            self.store_parts(writer, shared, blocks, seat, &mut applied)?;
            return Ok(applied);
        }
        match seat {
            Seat::Main => self.store_main(writer, shared, blocks, &mut applied)?,
            Seat::Apart(group) => self.store_apart(writer, shared, blocks, group, &mut applied)?,
            Seat::Nowhere => applied.ignored += blocks.hashes.len() as u32,
        }
        Ok(applied)
    }

    fn store_main(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        applied: &mut Applied,
    ) -> Result<()> {
        if !blocks.tokens.is_empty() {
            self.check_size(writer, blocks)?;
        }
        match self.main_apart() {
            Some(apart) => self.store_large(writer, shared, blocks, apart, applied),
            None => {
                self.store_placed(writer, shared, blocks, applied);
                Ok(())
            }
        }
    }

    fn store_placed(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        applied: &mut Applied,
    ) {
        if blocks.tokens.is_empty() {
            for &hash in &blocks.hashes {
                self.mention(writer, shared, hash, blocks.tier, None, applied);
            }
            return;
        }
        let chain = self.open_chain(writer, shared, blocks.parent, blocks);
        match chain {
            Some(chain) if self.orphans.is_empty() => {
                self.store_chain(writer, shared, chain, blocks, applied);
            }
            chain => self.store_singly(writer, shared, chain, blocks, applied),
        }
    }

    /// The chain that goes on after `parent`, with a reference to its root; `None` when its place is not known.
    pub(super) fn open_chain(
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
        let size = writer.keys.block_size;
        let mut keys = std::mem::take(&mut writer.block_keys);
        let mut stretches = std::mem::take(&mut writer.stretches);
        keys.clear();
        stretches.clear();
        hash_blocks(&mut open.chain, blocks, 0, size, &mut keys);
        // The usual cases, of a source whose names mean the same everywhere: known blocks, then new ones.
        let mut begun = 0;
        if self.names.is_empty() {
            let told = (&blocks.hashes[..], &keys[..]);
            begun = writer
                .tree
                .follow(shared, &mut open.last, told, &mut stretches);
        }
        // Each search below would wait for memory on its own; asked for together they wait once.
        writer.tree.touch_names(&blocks.hashes);
        if self.names.is_empty() && begun < keys.len() {
            let told = (&blocks.hashes[..], &keys[..]);
            begun = writer
                .tree
                .grow(shared, &mut open.last, told, begun, &mut stretches);
        }
        for (position, &hash) in blocks.hashes.iter().enumerate().skip(begun) {
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
    pub(super) fn seat(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        hash: EngineHash,
        last: Option<Place>,
        key: IndexKey,
    ) -> Place {
        let tree = &mut writer.tree;
        if self.names.is_empty()
            && let Some(last) = last
            && let Some(next) = tree.beside(shared, last, true)
            && tree.name(next.position) == Some(hash)
            && tree.key(shared, next.position) == key
        {
            return next;
        }
        let place = |tree: &mut Tree| tree.place(shared, last, key, false);
        self.seat_with(writer, shared, (hash, key), place)
    }

    /// Where the source has put a block of this name already, else where `place` puts it.
    pub(super) fn seat_with(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        (hash, key): (EngineHash, IndexKey),
        place: impl FnOnce(&mut Tree) -> Place,
    ) -> Place {
        if !self.names.is_empty()
            && self.names.contains_key(&hash)
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
        let place = place(tree);
        if named.is_none() && tree.name(place.position).is_none() {
            tree.set_name(place.position, hash);
        } else {
            self.names.insert(hash, (place.position, key));
        }
        place
    }

    /// Notes what chain the blocks are of.
    pub(super) fn keep_root(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        root: u32,
    ) {
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
    pub(super) fn add(
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
        if let Some(noted) = &mut writer.noted {
            noted.extend((blocks.start..blocks.end).map(|block| {
                let place = writer.tree.block(shared, blocks.run, block);
                writer.tree.key(shared, place.position)
            }));
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
                writer.entries[tier as usize] += u64::from(added);
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
            let key = writer.tree.key(shared, place.position);
            self.settle_apart(writer, shared, (hash, key), Some(place), applied);
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

    pub(in crate::index) fn add_copies(
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
    pub(super) fn mention(
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
        self.wait(hash, tier, content, applied);
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
        let keys = blocks.hashes.iter().map(|hash| IndexKey(hash.0));
        writer.tree.touch_keys(keys);
        let mut last = blocks.parent.and_then(|key| self.find(writer, shared, key));
        for hash in &blocks.hashes {
            let place = writer.tree.place(shared, last, IndexKey(hash.0), true);
            if let (None, Some(parent)) = (last, blocks.parent) {
                writer.tree.follow_absent(place, parent.0);
            }
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
}

/// The keys of blocks from one of them on.
fn hash_blocks(
    chain: &mut IndexChain,
    blocks: &StoredBlocks,
    from: usize,
    size: TokensPerBlock,
    keys: &mut Vec<IndexKey>,
) {
    if blocks.identifiers.is_empty() && cfg!(target_endian = "little") {
        let left = &blocks.tokens[from * size.get() as usize..];
        chain.extend_le(bytemuck::cast_slice(left), size, keys);
        return;
    }
    let size = size.get() as usize;
    let tokens = blocks.tokens.chunks_exact(size).enumerate().skip(from);
    keys.extend(tokens.map(|(position, tokens)| {
        let identifiers = blocks
            .identifiers
            .get(position)
            .map_or(&[][..], Vec::as_slice);
        push(chain, tokens, identifiers)
    }));
}

pub(super) fn push(chain: &mut IndexChain, tokens: &[u32], identifiers: &[String]) -> IndexKey {
    if identifiers.is_empty() && cfg!(target_endian = "little") {
        return chain.push_le(bytemuck::cast_slice(tokens), &[]);
    }
    let identifiers: Vec<&str> = identifiers.iter().map(String::as_str).collect();
    chain.push_with(tokens, &identifiers)
}
