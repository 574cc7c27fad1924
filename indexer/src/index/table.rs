//! Which block is held by whom: what lookups read and writers change under one short lock.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::mem::size_of;

use kvcache_core::{IndexKey, PodName, Tier};

use super::holders::{Holder, HolderSets, SetId};

/// The blocks are kept in this many tables, so that growing one never stops readers for long.
const SHARDS: usize = 256;

/// A change of one block in one tier of a source, ready to be made.
#[derive(Clone, Copy, Debug)]
pub(in crate::index) struct Change {
    pub(in crate::index) key: IndexKey,
    pub(super) tier: Tier,
    /// Whether the block appeared; else it left.
    pub(super) is_stored: bool,
}

/// A source as lookups see it.
#[derive(Clone, Debug, Default)]
pub(super) struct SourceSlot {
    pub(super) pod: u32,
    /// Lookups skip the entries of a source that is being removed.
    pub(super) is_alive: bool,
    pub(super) entries: u64,
}

/// A pod that has sources.
#[derive(Clone, Debug)]
pub(super) struct PodSlot {
    /// None while the slot is free.
    pub(super) name: Option<PodName>,
    sources: u32,
}

/// Blocks, holders and pods.
pub(super) struct Table {
    shards: Vec<HashMap<IndexKey, SetId, KeyState>>,
    pub(super) sets: HolderSets,
    /// Slot 0 stands for the shared tiers and is nobody's.
    pub(super) sources: Vec<SourceSlot>,
    free_sources: Vec<u32>,
    pub(super) pods: Vec<PodSlot>,
    free_pods: Vec<u32>,
    pod_slots: HashMap<PodName, u32>,
    entries: u64,
}

impl Table {
    pub(super) fn new() -> Self {
        let state = KeyState::random();
        Self {
            shards: (0..SHARDS).map(|_| HashMap::with_hasher(state)).collect(),
            sets: HolderSets::default(),
            sources: vec![SourceSlot::default()],
            free_sources: Vec::new(),
            pods: Vec::new(),
            free_pods: Vec::new(),
            pod_slots: HashMap::new(),
            entries: 0,
        }
    }

    /// Gives a source of `pod` a slot.
    pub(super) fn add_source(&mut self, pod: &PodName) -> u32 {
        let pod = match self.pod_slots.get(pod) {
            Some(&slot) => slot,
            None => {
                let slot = self.free_pods.pop().unwrap_or_else(|| {
                    self.pods.push(PodSlot {
                        name: None,
                        sources: 0,
                    });
                    self.pods.len() as u32 - 1
                });
                self.pods[slot as usize].name = Some(pod.clone());
                self.pod_slots.insert(pod.clone(), slot);
                slot
            }
        };
        self.pods[pod as usize].sources += 1;
        let slot = self.free_sources.pop().unwrap_or_else(|| {
            self.sources.push(SourceSlot::default());
            self.sources.len() as u32 - 1
        });
        self.sources[slot as usize] = SourceSlot {
            pod,
            is_alive: true,
            entries: 0,
        };
        slot
    }

    /// Takes the slot back; the source must hold nothing any more.
    pub(super) fn free_source(&mut self, slot: u32) {
        let source = std::mem::take(&mut self.sources[slot as usize]);
        assert!(
            source.entries == 0,
            "source slot {slot} still holds {} blocks",
            source.entries
        );
        self.free_sources.push(slot);
        let pod = &mut self.pods[source.pod as usize];
        pod.sources -= 1;
        if pod.sources == 0
            && let Some(name) = pod.name.take()
        {
            self.pod_slots.remove(&name);
            self.free_pods.push(source.pod);
        }
    }

    /// How many blocks shared tiers hold.
    pub(super) fn shared_entries(&self) -> u64 {
        self.sources[0].entries
    }

    pub(super) fn pod_slot(&self, pod: &PodName) -> Option<u32> {
        self.pod_slots.get(pod).copied()
    }

    /// The holders of a block; none when nobody holds it.
    pub(super) fn holders(&self, key: IndexKey) -> Option<SetId> {
        self.shards[shard_of(key)].get(&key).copied()
    }

    /// Makes a change of the source in `slot`; false when nothing changes by it.
    pub(super) fn change(&mut self, slot: u32, change: Change) -> bool {
        let holder = Holder::new(slot, change.tier);
        let is_changed = if change.is_stored {
            self.store(change.key, holder)
        } else {
            self.withdraw(change.key, holder)
        };
        if is_changed {
            let entries = &mut self.sources[holder.slot()].entries;
            if change.is_stored {
                *entries += 1;
                self.entries += 1;
            } else {
                *entries -= 1;
                self.entries -= 1;
            }
        }
        is_changed
    }

    fn store(&mut self, key: IndexKey, holder: Holder) -> bool {
        use std::collections::hash_map::Entry;
        match self.shards[shard_of(key)].entry(key) {
            Entry::Vacant(vacant) => {
                vacant.insert(SetId::single(holder));
                true
            }
            Entry::Occupied(mut held) => match self.sets.insert(*held.get(), holder) {
                Some(set) => {
                    held.insert(set);
                    true
                }
                None => false,
            },
        }
    }

    fn withdraw(&mut self, key: IndexKey, holder: Holder) -> bool {
        let shard = &mut self.shards[shard_of(key)];
        let Some(held) = shard.get_mut(&key) else {
            return false;
        };
        match self.sets.remove(*held, holder) {
            Ok(Some(set)) => *held = set,
            Ok(None) => {
                shard.remove(&key);
                shrink(shard);
            }
            Err(()) => return false,
        }
        true
    }

    /// Distinct blocks that somebody holds.
    pub(super) fn blocks(&self) -> u64 {
        self.shards.iter().map(|shard| shard.len() as u64).sum()
    }

    /// Blocks of all sources by tier, and those in shared tiers.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    pub(super) fn bytes(&self) -> usize {
        // Each place of a hash table has a control byte, and one in eight places stays empty.
        let places: usize = self.shards.iter().map(HashMap::capacity).sum();
        places * (size_of::<(IndexKey, SetId)>() + 1) * 8 / 7
            + self.sets.bytes()
            + self.sources.capacity() * size_of::<SourceSlot>()
            + self.pods.capacity() * size_of::<PodSlot>()
    }
}

/// A map smaller than this is not worth shrinking.
const CAPACITY_KEPT: usize = 256;

/// Gives memory back when most of a map is empty.
pub(in crate::index) fn shrink<K: Eq + Hash, V>(map: &mut HashMap<K, V, KeyState>) {
    if map.len() * 8 < map.capacity() && map.capacity() > CAPACITY_KEPT {
        map.shrink_to(map.len() * 2);
    }
}

fn shard_of(key: IndexKey) -> usize {
    (key.0 >> 56) as usize % SHARDS
}

/// Hashes 64-bit keys with one multiplication.
///
/// The keys are hashes already, but some schemes can be computed by anyone who chooses tokens, so the multiplier is
/// secret: nobody can aim keys at one place.
#[derive(Clone, Copy)]
pub(super) struct KeyState {
    mask: u64,
    multiplier: u64,
}

impl KeyState {
    pub(super) fn random() -> Self {
        let random = RandomState::new();
        Self {
            mask: random.hash_one(0_u64),
            multiplier: random.hash_one(1_u64) | 1,
        }
    }
}

impl Default for KeyState {
    fn default() -> Self {
        Self::random()
    }
}

impl BuildHasher for KeyState {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher {
            state: *self,
            hash: 0,
        }
    }
}

pub(super) struct KeyHasher {
    state: KeyState,
    hash: u64,
}

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.hash
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let mixed = self.hash ^ word ^ self.state.mask;
        let product = u128::from(mixed) * u128::from(self.state.multiplier);
        self.hash = (product as u64) ^ ((product >> 64) as u64);
    }
}
