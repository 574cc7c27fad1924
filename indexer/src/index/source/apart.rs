//! Blocks that are not as the index's own: larger ones, and those of groups beside the main one.

use kvcache_core::prefix::IndexChain;
use kvcache_core::{EngineHash, Error, ErrorKind, IndexKey, Result};

use super::super::config::{Applied, Learnt};
use super::super::groups::{Apart, Seat};
use super::super::tree::{Place, Shared, Stretch, Tree};
use super::store::push;
use super::{Size, Source, Writer};
use crate::adapter::StoredBlocks;

impl Source {
    /// Whether an event may say something of the source that is not known yet.
    #[inline]
    pub(in crate::index) fn has_news(&self, blocks: &StoredBlocks) -> bool {
        !self.is_sized || self.groups.is_new(blocks.group.as_ref())
    }

    /// Takes the size of the source's blocks from its first event about them; whether it was another one before.
    pub(in crate::index) fn learn_size(&mut self, blocks: &StoredBlocks, own: u32) -> bool {
        let group = blocks.group.map(|group| group.number);
        let is_main = self.groups.seat(group) == Seat::Main;
        if self.is_sized || self.is_node() || blocks.tokens.is_empty() || !is_main {
            return false;
        }
        let Some(size) = Size::of(blocks.block_size, own) else {
            return false;
        };
        self.is_sized = true;
        if self.fine.as_ref().map_or(1, |fine| fine.parts()) != size.parts {
            self.fine = size.fine();
        }
        std::mem::replace(&mut self.stride, size.stride) != size.stride
    }

    /// Whether its blocks are smaller than the index's.
    pub(in crate::index) fn is_fine(&self) -> bool {
        self.fine.is_some()
    }

    /// Takes the size of the source's blocks from an image, before any of them.
    pub(in crate::index) fn set_size(&mut self, size: Size) {
        (self.is_sized, self.stride, self.fine) = (true, size.stride, size.fine());
    }

    /// Tokens that a block has which waits, in an index whose blocks have so many.
    pub(in crate::index) fn tokens_told(&self, own: u32) -> u32 {
        self.fine.as_ref().map_or(own, |fine| own / fine.parts())
    }

    /// What the source's events have told of it, in an index whose blocks have so many tokens.
    pub(in crate::index) fn learnt(&self, own: u32) -> Learnt {
        Learnt {
            rank: self.rank,
            groups: self.groups.told(own),
            media: self
                .media
                .iter()
                .map(|known| known.medium.clone())
                .collect(),
            block_size: match &self.fine {
                _ if !self.is_sized => 0,
                Some(fine) => own / fine.parts(),
                None => self.stride * own,
            },
        }
    }

    /// Whether the source's blocks fit: a whole number of the index's, the same in every event.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the sizes.
    pub(super) fn check_size(&self, writer: &Writer, blocks: &StoredBlocks) -> Result<()> {
        let (told, own) = (blocks.block_size, writer.keys.block_size.get());
        if told != own * self.stride {
            let known = own * self.stride;
            let context = format!(
                "an event's blocks have {told} tokens, the source's {known}, the index's {own}"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        check_tokens(blocks)
    }

    /// Takes blocks of the main group in that are larger than the index's.
    ///
    /// # Errors
    /// As [`Self::store_alone`].
    pub(super) fn store_large(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        apart: Apart,
        applied: &mut Applied,
    ) -> Result<()> {
        if !blocks.tokens.is_empty() {
            return self.store_alone(writer, shared, blocks, apart, applied);
        }
        for &hash in &blocks.hashes {
            let name = apart.name(hash);
            self.mention(writer, shared, name, blocks.tier, None, applied);
        }
        Ok(())
    }

    /// Takes blocks of a group in that is apart from the main one.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when they can only be placed by their tokens, and are no whole number of the index's.
    pub(super) fn store_apart(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        group: u32,
        applied: &mut Applied,
    ) -> Result<()> {
        if self.groups.main().is_some() || blocks.tokens.is_empty() {
            for &hash in &blocks.hashes {
                let name = Apart::Group(group).name(hash);
                let at = self.find_held(writer, shared, name);
                match at.or_else(|| self.beside_main(writer, shared, hash, group)) {
                    Some(place) => {
                        self.add(writer, shared, Stretch::of(place), blocks.tier, applied)
                    }
                    // The main group's block has not come yet.
                    None => self.mention(writer, shared, name, blocks.tier, None, applied),
                }
            }
            return Ok(());
        }
        self.store_alone(writer, shared, blocks, Apart::Group(group), applied)
    }

    /// The seat of a group's block, which is known by the main group's block of the same hash.
    fn beside_main(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        hash: EngineHash,
        group: u32,
    ) -> Option<Place> {
        let (name, main) = (Apart::Group(group), self.main_apart());
        let of_main = self.find_held(writer, shared, main.map_or(hash, |main| main.name(hash)))?;
        let key = writer.tree.key(shared, of_main.position);
        let key = main.map_or(key, |main| main.key(key));
        let before = self.key_before(writer, shared, of_main, group);
        Some(self.seat_apart(writer, shared, name, (hash, key), before))
    }

    /// The key that lookups look for directly before a group's block, which is beside a block of the main group.
    fn key_before(
        &self,
        writer: &Writer,
        shared: &Shared,
        of_main: Place,
        group: u32,
    ) -> Option<IndexKey> {
        if self.step_of(group) != self.stride {
            return None;
        }
        let key = writer.tree.key_before(shared, of_main)?;
        let key = self.main_apart().map_or(key, |main| main.key(key));
        Some(Apart::Group(group).key(key))
    }

    /// At every how many of the index's blocks lookups look for one of a group.
    fn step_of(&self, group: u32) -> u32 {
        let known = self.groups.known().iter();
        let group = known.into_iter().find(|known| known.number == group);
        group.map_or(1, |group| group.step())
    }

    fn seat_apart(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        apart: Apart,
        (hash, key): (EngineHash, IndexKey),
        before: Option<IndexKey>,
    ) -> Place {
        self.seat_before(writer, shared, (apart.name(hash), apart.key(key)), before)
    }

    /// The seat of a block that is apart, by its own name and key; lookups that come from `before` find it.
    pub(super) fn seat_before(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        block: (EngineHash, IndexKey),
        before: Option<IndexKey>,
    ) -> Place {
        let place = |tree: &mut Tree| tree.place_apart(shared, before, block.1);
        let place = self.seat_with(writer, shared, block, place);
        writer.tree.let_in(shared, before, place);
        place
    }

    /// Takes blocks in that only their tokens can place.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when they are no whole number of the index's.
    fn store_alone(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        apart: Apart,
        applied: &mut Applied,
    ) -> Result<()> {
        let size = writer.keys.block_size.get();
        if blocks.block_size == 0 || !blocks.block_size.is_multiple_of(size) {
            let context = format!(
                "blocks of {} tokens, the index has {size}",
                blocks.block_size
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        check_tokens(blocks)?;
        let parent = blocks.parent.map(|parent| apart.name(parent));
        let Some(open) = self.open_chain(writer, shared, parent, blocks) else {
            for &hash in &blocks.hashes {
                self.mention(writer, shared, apart.name(hash), blocks.tier, None, applied);
            }
            return Ok(());
        };
        let (mut chain, mut last) = (open.chain, open.last);
        if let Some(last) = last {
            let key = apart.key(writer.tree.key(shared, last.position));
            chain = IndexChain::after(writer.roots.get(open.root), key);
        }
        let tokens = blocks.tokens.chunks_exact(blocks.block_size as usize);
        for (position, (&hash, tokens)) in blocks.hashes.iter().zip(tokens).enumerate() {
            // What shaped a block shaped all its parts, as far as is told.
            let identifiers = blocks.identifiers.get(position);
            let identifiers = identifiers.map_or(&[][..], Vec::as_slice);
            let keys = tokens.chunks_exact(size as usize);
            let keys: Vec<IndexKey> = keys
                .map(|part| push(&mut chain, part, identifiers))
                .collect();
            let Some(&key) = keys.last() else {
                continue;
            };
            if let (Apart::Large(_), Some(noted)) = (apart, &mut writer.noted) {
                noted.extend(keys);
            }
            let name = apart.name(hash);
            let place = match apart {
                // Their chain is whole, as that of blocks of the index's size is.
                Apart::Large(_) => self.seat(writer, shared, name, last, apart.key(key)),
                Apart::Group(group) => {
                    let is_next = self.step_of(group) * size == blocks.block_size;
                    let before = last.filter(|_| is_next);
                    let before = before.map(|before| writer.tree.key(shared, before.position));
                    self.seat_apart(writer, shared, apart, (hash, key), before)
                }
            };
            let known = apart.key(writer.tree.key(shared, place.position));
            if known != key {
                // What follows, follows the block as it was placed first.
                chain = IndexChain::after(writer.roots.get(open.root), known);
            }
            last = Some(place);
            self.keep_root(writer, shared, Stretch::of(place), open.root);
            self.add(writer, shared, Stretch::of(place), blocks.tier, applied);
            if let Some(copies) = self.orphans.forget(name) {
                self.add_copies(writer, shared, place, &copies, applied);
            }
            if !self.orphans.is_empty() {
                let of_main = matches!(apart, Apart::Large(_)).then_some(place);
                self.settle_apart(writer, shared, (hash, key), of_main, applied);
            }
        }
        writer.roots.release(open.root);
        Ok(())
    }

    /// Places blocks of other groups that waited for the main group's block of the same hash, which may be told.
    pub(super) fn settle_apart(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        (hash, key): (EngineHash, IndexKey),
        of_main: Option<Place>,
        applied: &mut Applied,
    ) {
        let groups: Vec<u32> = self.groups.apart().collect();
        for group in groups {
            let apart = Apart::Group(group);
            if let Some(copies) = self.orphans.forget(apart.name(hash)) {
                let before =
                    of_main.and_then(|place| self.key_before(writer, shared, place, group));
                let at = self.seat_apart(writer, shared, apart, (hash, key), before);
                self.add_copies(writer, shared, at, &copies, applied);
            }
        }
    }
}

/// # Errors
/// [`ErrorKind::Invalid`] when there are more or fewer tokens than the blocks have.
pub(super) fn check_tokens(blocks: &StoredBlocks) -> Result<()> {
    let wanted = blocks.hashes.len() * blocks.block_size as usize;
    if blocks.tokens.len() == wanted {
        return Ok(());
    }
    let told = blocks.tokens.len();
    Err(Error::invalid("stored blocks' tokens", told, wanted))
}
