//! Blocks smaller than the index's: what the index holds because of their parts.
//!
//! A block goes into the index only when the block before it is there, as with all engines: else it would have no place
//! in the chain. When that comes (back), what follows it is looked at again.

use kvcache_core::prefix::IndexChain;
use kvcache_core::{EngineHash, Error, ErrorKind, Result, Tier};

use super::super::config::Applied;
use super::super::fine::{Fine, Part};
use super::super::groups::Seat;
use super::super::orphans::{Content, Copies};
use super::super::sets::Holder;
use super::super::tree::{Place, Shared, Stretch};
use super::store::push;
use super::{Source, Writer};
use crate::adapter::{RemovedBlocks, StoredBlocks};

/// What places a part: what it comes after, and what shaped it.
struct Told<'a> {
    parent: Option<EngineHash>,
    /// With a reference of its own; of a part at the start only.
    root: Option<u32>,
    tokens: &'a [u32],
    identifiers: &'a [String],
}

impl Source {
    /// Takes blocks of a source in whose blocks are smaller than the index's.
    ///
    /// # Errors
    /// As [`Self::store_fine`]; [`ErrorKind::Invalid`] naming a cache group beside the main one.
    pub(super) fn store_parts(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        seat: Seat,
        applied: &mut Applied,
    ) -> Result<()> {
        let Some(mut fine) = self.fine.take() else {
            return Ok(());
        };
        let stored = match seat {
            Seat::Main => self.store_fine(writer, shared, blocks, &mut fine, applied),
            Seat::Apart(group) => Err(too_small(group, blocks, &fine)),
            Seat::Nowhere => {
                applied.ignored += blocks.hashes.len() as u32;
                Ok(())
            }
        };
        self.fine = Some(fine);
        stored
    }

    /// Takes blocks in that are smaller than the index's.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the sizes when they are not as the first event said, or the tokens do not fit.
    fn store_fine(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &StoredBlocks,
        fine: &mut Fine,
        applied: &mut Applied,
    ) -> Result<()> {
        if blocks.tokens.is_empty() {
            for &hash in &blocks.hashes {
                self.store_part(writer, shared, (hash, None), blocks.tier, fine, applied);
            }
            return Ok(());
        }
        let own = writer.keys.block_size.get();
        if blocks.block_size.checked_mul(fine.parts()) != Some(own) {
            let known = own / fine.parts();
            let told = blocks.block_size;
            let context = format!(
                "an event's blocks have {told} tokens, the source's {known}, the index's {own}"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        super::apart::check_tokens(blocks)?;
        let mut parent = blocks.parent;
        let tokens = blocks.tokens.chunks_exact(blocks.block_size as usize);
        for (position, (&hash, tokens)) in blocks.hashes.iter().zip(tokens).enumerate() {
            let identifiers = blocks.identifiers.get(position);
            let root = parent.is_none().then(|| {
                let (lora, salt) = (blocks.lora.as_deref(), blocks.cache_salt.as_deref());
                writer.roots.acquire(&writer.keys, lora, salt)
            });
            let told = Told {
                parent,
                root,
                tokens,
                identifiers: identifiers.map_or(&[][..], Vec::as_slice),
            };
            let part = (hash, Some(told));
            self.store_part(writer, shared, part, blocks.tier, fine, applied);
            parent = Some(hash);
        }
        Ok(())
    }

    /// Counts a copy of one part in; where its place is unknown it waits.
    fn store_part(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        (hash, told): (EngineHash, Option<Told<'_>>),
        tier: Tier,
        fine: &mut Fine,
        applied: &mut Applied,
    ) {
        if fine.get(hash).is_none() {
            let content = match told {
                Some(told) => place_part(writer, hash, told, fine),
                None => Some(None),
            };
            if let Some(content) = content {
                self.wait(hash, tier, content, applied);
                return;
            }
        } else if let Some(root) = told.and_then(|told| told.root) {
            writer.roots.release(root);
        }
        let mut copies = Copies::default();
        copies[tier as usize] = 1;
        let mut settled = vec![(hash, copies)];
        while let Some((hash, copies)) = settled.pop() {
            // Counted while it waited itself.
            let waited = self.orphans.forget(hash).unwrap_or_default();
            self.count_part(hash, &copies, fine);
            self.count_part(hash, &waited, fine);
            self.refresh(writer, shared, fine.ends_with(hash), fine, applied);
            let children: Vec<_> = self
                .orphans
                .children(hash)
                .map(|(child, content)| {
                    let told = (content.tokens.clone(), content.identifiers.clone());
                    (child, told)
                })
                .collect();
            for (child, (tokens, identifiers)) in children {
                let told = Told {
                    parent: Some(hash),
                    root: None,
                    tokens: &tokens,
                    identifiers: &identifiers,
                };
                if place_part(writer, child, told, fine).is_none() {
                    settled.push((child, Copies::default()));
                }
            }
        }
    }

    /// Counts one more copy of a block that waits, with `content`.
    pub(super) fn wait(
        &mut self,
        hash: EngineHash,
        tier: Tier,
        content: Option<Content>,
        applied: &mut Applied,
    ) {
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

    fn count_part(&self, hash: EngineHash, more: &Copies, fine: &mut Fine) {
        let Some(part) = fine.get_mut(hash) else {
            return;
        };
        for tier in Tier::ALL {
            let (copies, more) = (&mut part.copies[tier as usize], more[tier as usize]);
            *copies = if self.is_counted(tier) {
                copies.saturating_add(more)
            } else {
                (*copies).max(more.min(1))
            };
        }
    }

    /// Takes a copy of each part away.
    pub(super) fn remove_fine(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: &RemovedBlocks,
        fine: &mut Fine,
    ) -> Applied {
        let mut applied = Applied::default();
        for &hash in &blocks.hashes {
            let held = fine.get_mut(hash);
            let held = held.map(|part| &mut part.copies[blocks.tier as usize]);
            match held {
                Some(copies) if *copies > 0 => {
                    *copies -= 1;
                    if *copies == 0 {
                        self.refresh(writer, shared, fine.ends_with(hash), fine, &mut applied);
                        release(writer, fine.prune(hash));
                    }
                }
                _ => self.take_orphan(hash, blocks.tier, &mut applied),
            }
        }
        applied
    }

    /// Makes the index hold what the parts say of these blocks, by their last parts, and of those that follow them.
    pub(super) fn refresh(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        ends: Vec<EngineHash>,
        fine: &Fine,
        applied: &mut Applied,
    ) {
        let mut open = ends;
        while let Some(end) = open.pop() {
            let was_held = self.find_held(writer, shared, end);
            self.refresh_one(writer, shared, end, was_held, fine, applied);
            if was_held.is_none() && self.find_held(writer, shared, end).is_some() {
                open.extend(fine.ends_after(end));
            }
        }
    }

    fn refresh_one(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        end: EngineHash,
        held: Option<Place>,
        fine: &Fine,
        applied: &mut Applied,
    ) {
        let Some((key, root)) = fine
            .get(end)
            .and_then(|part| part.key.map(|key| (key, part.root)))
        else {
            return;
        };
        let wanted = fine.whole(end);
        let is_wanted = |tier: Tier| match tier.is_shared() {
            true => wanted.is_shared,
            false => wanted.own == Some(tier),
        };
        let has = |writer: &Writer, place: Option<Place>, tier: Tier| {
            let holder = Holder::new(self.number, tier);
            place.is_some_and(|place| writer.tree.holds_in(shared, place, holder))
        };
        let more: Vec<Tier> = Tier::ALL
            .into_iter()
            .filter(|tier| is_wanted(*tier) && !has(writer, held, *tier))
            .collect();
        let less: Vec<Tier> = Tier::ALL
            .into_iter()
            .filter(|tier| !is_wanted(*tier) && has(writer, held, *tier))
            .collect();
        if !more.is_empty() {
            let before = fine.before(end).map(|before| {
                let name = fine.end_of(before)?;
                self.find_held(writer, shared, name)
            });
            let place = match (held, before) {
                (Some(place), _) => place,
                // The block before is not there, so this one has no place yet.
                (None, Some(None)) => return,
                (None, before) => self.seat(writer, shared, end, before.flatten(), key),
            };
            self.keep_root(writer, shared, Stretch::of(place), root);
            for tier in more {
                self.add(writer, shared, Stretch::of(place), tier, applied);
            }
        }
        // What is new first: a block that only changes its tier never loses its place.
        if let Some(place) = held {
            for tier in less {
                self.take(writer, shared, Stretch::of(place), tier, &[end], applied);
            }
        }
    }

    /// Forgets all copies in these tiers, which the index holds nothing in any more.
    pub(super) fn clear_fine(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        tiers: &[Tier],
        fine: &mut Fine,
    ) {
        let over = fine.clear(tiers);
        let mut applied = Applied::default();
        self.refresh(writer, shared, fine.ends(), fine, &mut applied);
        for name in over {
            release(writer, fine.prune(name));
        }
    }

    /// Forgets the whole chain.
    pub(in crate::index) fn forget_fine(&mut self, writer: &mut Writer) {
        if let Some(fine) = &mut self.fine {
            let empty = Fine::new(fine.parts());
            let before = std::mem::replace(&mut **fine, empty);
            release(writer, before.roots().collect());
        }
    }

    /// Forgets a part of what the budget took.
    pub(super) fn lose_fine(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        blocks: Stretch,
        tier: Tier,
    ) {
        let Some(fine) = &mut self.fine else {
            return;
        };
        for block in blocks.start..blocks.end {
            let place = writer.tree.block(shared, blocks.run, block);
            let key = writer.tree.key(shared, place.position);
            let roots = fine.lose(key, tier);
            release(writer, roots);
        }
    }
}

/// Gives a part its place; what it is to wait with when that is not known.
#[allow(
    clippy::option_option,
    reason = "it waits, and with nothing where nothing places it"
)]
fn place_part(
    writer: &mut Writer,
    hash: EngineHash,
    told: Told<'_>,
    fine: &mut Fine,
) -> Option<Option<Content>> {
    let (root, place) = match (told.parent, told.root) {
        (None, Some(root)) => (root, 0),
        (None, None) => return Some(None),
        (Some(parent), _) => match fine.get(parent) {
            Some(before) => {
                writer.roots.add(before.root);
                (before.root, (before.place + 1) % fine.parts())
            }
            None => {
                return Some(Some(Content {
                    parent,
                    tokens: told.tokens.into(),
                    identifiers: told.identifiers.to_vec(),
                }));
            }
        },
    };
    let mut part = Part {
        parent: told.parent,
        root,
        place,
        copies: Copies::default(),
        tokens: told.tokens.into(),
        identifiers: told.identifiers.to_vec(),
        key: None,
        children: Vec::new(),
    };
    if place + 1 == fine.parts() {
        let before = told.parent.map(|parent| {
            let parts: Vec<&Part> = match place {
                0 => Vec::new(),
                _ => fine.of_block(parent).collect(),
            };
            let before = match place {
                0 => fine.get(parent).and_then(|parent| parent.key),
                _ => fine.before(parent),
            };
            (before, parts)
        });
        let (before, parts) = before.unwrap_or_default();
        let root = writer.roots.get(root);
        let mut chain = match before {
            Some(before) => IndexChain::after(root, before),
            None => IndexChain::new(root),
        };
        let parts = || parts.iter().rev().copied().chain([&part]);
        let tokens: Vec<u32> = parts()
            .flat_map(|part| part.tokens.iter().copied())
            .collect();
        // An image that lies in several parts is told with each, and once where the block is told as one.
        let mut identifiers: Vec<String> = parts()
            .flat_map(|part| part.identifiers.iter().cloned())
            .collect();
        identifiers.dedup();
        part.key = Some(push(&mut chain, &tokens, &identifiers));
        part.tokens = Box::default();
    }
    fine.insert(hash, part);
    None
}

fn too_small(group: u32, blocks: &StoredBlocks, fine: &Fine) -> Error {
    let context = format!(
        "cache group {group} with blocks of {} tokens, {} of which make one of the index's: only a group that keeps every \
         block may have such",
        blocks.block_size,
        fine.parts()
    );
    Error::new(ErrorKind::Invalid, context)
}

fn release(writer: &mut Writer, roots: Vec<u32>) {
    for root in roots {
        writer.roots.release(root);
    }
}
