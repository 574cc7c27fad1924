//! A simulated engine's paged KV pool: which blocks are there, which slots to fill, what is announced.
//!
//! It decides and keeps no bytes: slot `n` is the `n`-th block of whatever memory the caller lends. A sequence is
//! admitted (its blocks that are here are pinned, the others get slots), sealed block by block as their bytes become
//! complete, and finished. Computing takes modelled time, see [`ComputeModel`].

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kvcache_core::event::EngineEvent;
use kvcache_core::pool::{BlockCache, Filling, Slot};
use kvcache_core::{BlockKey, EngineHash, Error, ErrorKind, Result, SlotIndex, Tier};

use crate::sequence::{Sequence, engine_hash};

/// How long computing takes, at a stated rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeModel {
    /// Prompt tokens a second.
    pub tokens_per_s: u32,
}

impl ComputeModel {
    /// The time that so many tokens take; at least 1 token a second is assumed.
    #[must_use]
    pub fn time(&self, tokens: u64) -> Duration {
        let nanos = u128::from(tokens) * 1_000_000_000 / u128::from(self.tokens_per_s.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// The paged pool of one engine: its HBM tier.
#[derive(Debug)]
pub struct EnginePool {
    cache: BlockCache<BlockKey>,
    events: Vec<EngineEvent>,
    evictions: u64,
}

/// A sequence that the engine works on. Hand it back to [`EnginePool::finish`]: dropped, its slots stay taken.
#[must_use = "a dropped sequence keeps its slots: finish it"]
#[derive(Debug)]
pub struct Running {
    sequence: Arc<Sequence>,
    hits: usize,
    /// The slot of each block from the first; sealed and pinned ones, then those being filled.
    slots: Vec<SlotIndex>,
    /// Those being filled, in order; all before them are sealed.
    filling: VecDeque<Slot<Filling>>,
}

impl Running {
    /// What is worked on.
    #[must_use]
    pub fn sequence(&self) -> &Arc<Sequence> {
        &self.sequence
    }

    /// Blocks, from the first, that were here when it was admitted.
    #[must_use]
    pub fn hits(&self) -> usize {
        self.hits
    }

    /// Blocks, from the first, whose bytes are complete.
    #[must_use]
    pub fn sealed(&self) -> usize {
        self.slots.len() - self.filling.len()
    }

    /// The slots of its blocks, from the first.
    #[must_use]
    pub fn slots(&self) -> &[SlotIndex] {
        &self.slots
    }
}

impl EnginePool {
    /// An empty pool of so many blocks.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        Self {
            cache: BlockCache::new(slots),
            events: Vec::new(),
            evictions: 0,
        }
    }

    /// Blocks there is room for.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.cache.capacity()
    }

    /// Blocks that nobody works on, or slots without one.
    #[must_use]
    pub fn available(&self) -> usize {
        self.cache.available()
    }

    /// Blocks that can be hit.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.cache.len()
    }

    /// Blocks that left to make room, so far.
    #[must_use]
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// How many blocks of a sequence, from the first, are here.
    #[must_use]
    pub fn depth(&self, sequence: &Sequence) -> usize {
        sequence
            .keys()
            .take_while(|key| self.cache.place(key).is_some())
            .count()
    }

    /// Takes in the prompt of a sequence: pins what is here of its first `reusable` blocks, and takes slots for the
    /// rest of its prompt's blocks.
    ///
    /// Who works on the prompt says [`Sequence::reusable_blocks`] and computes later blocks again even if they are here;
    /// who only writes the answer says [`Sequence::prompt_blocks`].
    ///
    /// # Errors
    /// `Invalid` if the pool is too small for it, `Busy` if others hold too much of the pool now; both name the sizes.
    pub fn admit(&mut self, sequence: Arc<Sequence>, reusable: usize) -> Result<Running> {
        let wanted = sequence.prompt_blocks();
        if wanted > self.capacity() as usize {
            return Err(too_large(&sequence, wanted, self.capacity()));
        }
        let hits = self.depth(&sequence).min(reusable).min(wanted);
        let mut running = Running {
            sequence,
            hits,
            slots: Vec::new(),
            filling: VecDeque::new(),
        };
        self.pin_hits(&mut running);
        match self.take_slots(&mut running, wanted) {
            Ok(()) => Ok(running),
            Err(error) => {
                self.finish(running);
                Err(error)
            }
        }
    }

    /// Takes slots for the answer's blocks, too.
    ///
    /// # Errors
    /// As [`admit`](Self::admit); the sequence keeps what it has.
    pub fn extend(&mut self, running: &mut Running) -> Result<()> {
        let wanted = running.sequence.blocks().len();
        if wanted > self.capacity() as usize {
            return Err(too_large(&running.sequence, wanted, self.capacity()));
        }
        self.take_slots(running, wanted)
    }

    /// The next `count` blocks' bytes are complete: they can be hit, and are announced.
    ///
    /// A block that another sequence completed first is not kept twice: this one goes on with that copy.
    ///
    /// # Panics
    /// If fewer are being filled.
    pub fn seal(&mut self, running: &mut Running, count: usize) {
        let sealed = running.sealed();
        assert!(
            count <= running.filling.len(),
            "only {} blocks to seal",
            running.filling.len()
        );
        let mut announced = Vec::new();
        for (position, slot) in (sealed..).zip(running.filling.drain(..count)) {
            let block = &running.sequence.blocks()[position];
            let is_new = self.cache.place(&block.key).is_none();
            let place = self.cache.insert(slot, block.key, block.parent);
            let pinned = self.cache.pin(&block.key);
            assert!(
                pinned == Some(place),
                "{:?} was inserted a moment ago",
                block.key
            );
            running.slots[position] = place.index;
            if is_new {
                announced.push(position);
            }
        }
        for run in announced.chunk_by(|before, after| before + 1 == *after) {
            self.events
                .push(stored(&running.sequence, run[0], run.len()));
        }
    }

    /// Ends the work: what is sealed stays as long as there is room, what is not sealed is given up.
    pub fn finish(&mut self, mut running: Running) {
        let sealed = running.sealed();
        let keys: Vec<BlockKey> = running.sequence.keys().take(sealed).collect();
        self.cache.touch(&keys);
        keys.iter().for_each(|key| self.cache.unpin(key));
        running
            .filling
            .drain(..)
            .for_each(|slot| self.cache.abandon(slot));
    }

    /// Ends the work as [`finish`](Self::finish) does, but keeps the slots of these unsealed blocks out of use: a transfer
    /// may still write there. Hand them to [`readmit`](Self::readmit) when that has ended.
    ///
    /// # Panics
    /// If a position is sealed, or has no slot.
    pub fn abort(&mut self, mut running: Running, positions: &[usize]) -> Vec<Slot<Filling>> {
        let sealed = running.sealed();
        let (mut kept, mut given_up) = (Vec::new(), VecDeque::new());
        for (position, slot) in (sealed..).zip(running.filling.drain(..)) {
            if positions.contains(&position) {
                kept.push(slot);
            } else {
                given_up.push_back(slot);
            }
        }
        assert_eq!(
            kept.len(),
            positions.len(),
            "of {positions:?} not all are being filled"
        );
        running.slots.truncate(sealed);
        given_up
            .into_iter()
            .for_each(|slot| self.cache.abandon(slot));
        self.finish(running);
        kept
    }

    /// Exchanges the slot of an unsealed block: a transfer that was given up may still write to the old one, which the
    /// caller keeps until that has ended, and then hands to [`readmit`](Self::readmit).
    ///
    /// # Errors
    /// `Busy` if there is no other slot now; nothing has changed then.
    ///
    /// # Panics
    /// If the block is sealed, or has no slot.
    pub fn quarantine(&mut self, running: &mut Running, position: usize) -> Result<Slot<Filling>> {
        let sealed = running.sealed();
        assert!(
            (sealed..running.slots.len()).contains(&position),
            "block {position} is not filling"
        );
        let fresh = self.allocate(1)?.pop();
        let Some(fresh) = fresh else {
            return Err(Error::new(
                ErrorKind::Internal,
                "one slot was allocated, and is not there",
            ));
        };
        running.slots[position] = fresh.place().index;
        Ok(std::mem::replace(
            &mut running.filling[position - sealed],
            fresh,
        ))
    }

    /// Nothing writes to a quarantined slot any more.
    pub fn readmit(&mut self, slot: Slot<Filling>) {
        self.cache.abandon(slot);
    }

    /// What happened since the last call, in vLLM's order: a block's removal before the block that displaced it.
    pub fn take_events(&mut self) -> Vec<EngineEvent> {
        std::mem::take(&mut self.events)
    }

    fn pin_hits(&mut self, running: &mut Running) {
        for key in running.sequence.keys().take(running.hits) {
            let place = self.cache.pin(&key);
            assert!(place.is_some(), "{key:?} was here a moment ago");
            running.slots.extend(place.map(|place| place.index));
        }
    }

    fn take_slots(&mut self, running: &mut Running, wanted: usize) -> Result<()> {
        let missing = wanted.saturating_sub(running.slots.len());
        let slots = self.allocate(missing)?;
        running
            .slots
            .extend(slots.iter().map(|slot| slot.place().index));
        running.filling.extend(slots);
        Ok(())
    }

    fn allocate(&mut self, count: usize) -> Result<Vec<Slot<Filling>>> {
        let allocation = self.cache.allocate(count as u32).ok_or_else(|| {
            let (available, capacity) = (self.available(), self.capacity());
            let what = format!("{count} slots are wanted, {available} of {capacity} are free now");
            Error::new(ErrorKind::Busy, what)
        })?;
        self.evictions += allocation.evicted.len() as u64;
        self.events
            .extend(allocation.evicted.iter().map(|key| EngineEvent::Removed {
                hashes: vec![engine_hash(key)],
                tier: Tier::Device,
            }));
        Ok(allocation.slots)
    }
}

fn stored(sequence: &Sequence, start: usize, count: usize) -> EngineEvent {
    let blocks = &sequence.blocks()[start..start + count];
    let block_tokens = sequence.block_tokens() as usize;
    let hashes: Vec<EngineHash> = blocks.iter().map(|block| engine_hash(&block.key)).collect();
    EngineEvent::Stored {
        hashes,
        parent: blocks[0].parent.map(|parent| engine_hash(&parent)),
        tokens: sequence.tokens()[start * block_tokens..(start + count) * block_tokens].to_vec(),
        block_size: sequence.block_tokens(),
        tier: Tier::Device,
    }
}

fn too_large(sequence: &Sequence, wanted: usize, capacity: u32) -> Error {
    let (tokens, block_tokens) = (sequence.tokens().len(), sequence.block_tokens());
    Error::new(
        ErrorKind::Invalid,
        format!(
            "the request of {tokens} tokens takes {wanted} blocks of {block_tokens}, but the engine's pool \
             has {capacity} blocks"
        ),
    )
}
