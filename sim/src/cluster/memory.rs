//! The bytes of one pod and of the shared store: what the managers' commands really copy.

use std::collections::BTreeMap;

use crc_fast::CrcAlgorithm;
use kvcache_core::place::{DiskSlot, HostSlot};
use kvcache_core::{BlockInfo, BlockKey, Checksum, ErrorKind, Generation, SlotIndex};

/// What a slot holds from the start of a copy until its bytes arrive: reading it then must be noticed.
const POISON: u8 = 0xdd;

/// A place whose bytes are at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    Engine(SlotIndex),
    Host(HostSlot),
    Disk(DiskSlot),
    Object(BlockKey),
}

/// A block with what is written beside it, on disk or in the object store.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) info: BlockInfo,
    pub(super) checksum: Checksum,
    pub(super) bytes: Vec<u8>,
}

/// The object store: one for all pods.
pub(super) type Objects = BTreeMap<BlockKey, Record>;

/// Engine memory, DRAM arena and disk of one pod.
#[derive(Debug)]
pub(super) struct Memory {
    block_bytes: usize,
    engine: Vec<u8>,
    host: Vec<u8>,
    /// Per slot of the arena, which use of it the bytes belong to: what a remote reader looks at after its copy.
    generations: Vec<Option<Generation>>,
    pub(super) disk: BTreeMap<DiskSlot, Record>,
}

/// Bytes, and the checksum that is kept beside them, if there is one.
pub(super) type Found = (Vec<u8>, Option<Checksum>);

/// A copy that cannot have been asked for by a correct manager.
pub(super) type Broken = String;

impl Memory {
    pub(super) fn new(block_bytes: usize, engine_slots: u32, host_slots: u32) -> Self {
        Self {
            block_bytes,
            engine: vec![POISON; block_bytes * engine_slots as usize],
            host: vec![POISON; block_bytes * host_slots as usize],
            generations: vec![None; host_slots as usize],
            disk: BTreeMap::new(),
        }
    }

    pub(super) fn engine(&self, slot: SlotIndex) -> &[u8] {
        let start = slot.0 as usize * self.block_bytes;
        &self.engine[start..start + self.block_bytes]
    }

    pub(super) fn engine_mut(&mut self, slot: SlotIndex) -> &mut [u8] {
        let start = slot.0 as usize * self.block_bytes;
        &mut self.engine[start..start + self.block_bytes]
    }

    /// The bytes of an arena slot, whatever they are by now.
    pub(super) fn host(&self, slot: HostSlot) -> &[u8] {
        let start = slot.index.0 as usize * self.block_bytes;
        &self.host[start..start + self.block_bytes]
    }

    fn host_mut(&mut self, slot: HostSlot) -> &mut [u8] {
        let start = slot.index.0 as usize * self.block_bytes;
        &mut self.host[start..start + self.block_bytes]
    }

    /// Whether an arena slot is still in the use that this reference means.
    pub(super) fn is_current(&self, slot: HostSlot) -> bool {
        self.generations[slot.index.0 as usize] == Some(slot.generation)
    }

    /// A copy to this place begins: what was there is lost.
    pub(super) fn begin(&mut self, target: Spot) {
        match target {
            Spot::Engine(slot) => self.engine_mut(slot).fill(POISON),
            Spot::Host(slot) => {
                self.generations[slot.index.0 as usize] = Some(slot.generation);
                self.host_mut(slot).fill(POISON);
            }
            Spot::Disk(_) | Spot::Object(_) => {}
        }
    }

    /// Where a remote copy may write: none for a slot that has been used again, and for places without memory.
    pub(super) fn target(&mut self, target: Spot) -> Option<&mut [u8]> {
        match target {
            Spot::Engine(slot) => Some(self.engine_mut(slot)),
            Spot::Host(slot) if self.is_current(slot) => Some(self.host_mut(slot)),
            Spot::Host(_) | Spot::Disk(_) | Spot::Object(_) => None,
        }
    }

    /// The bytes at a place.
    pub(super) fn read(
        &self,
        objects: &Objects,
        source: Spot,
        key: &BlockKey,
    ) -> Result<Result<Found, ErrorKind>, Broken> {
        let record = match source {
            Spot::Engine(slot) => return Ok(Ok((self.engine(slot).to_vec(), None))),
            Spot::Host(slot) if self.is_current(slot) => {
                return Ok(Ok((self.host(slot).to_vec(), None)));
            }
            Spot::Host(slot) => return Err(format!("{slot:?} is read, but has been used again")),
            Spot::Disk(slot) => self.disk.get(&slot),
            Spot::Object(key) => objects.get(&key),
        };
        Ok(match record {
            None => Err(ErrorKind::NotFound),
            Some(record) if record.info.key != *key => Err(ErrorKind::Corrupt),
            Some(record) => Ok((record.bytes.clone(), Some(record.checksum))),
        })
    }

    /// Puts bytes at a place that a copy has begun to fill.
    pub(super) fn write(
        &mut self,
        objects: &mut Objects,
        target: Spot,
        info: BlockInfo,
        bytes: Vec<u8>,
    ) -> Result<(), Broken> {
        let checksum = checksum(&bytes);
        match target {
            Spot::Engine(slot) => self.engine_mut(slot).copy_from_slice(&bytes),
            Spot::Host(slot) if self.is_current(slot) => {
                self.host_mut(slot).copy_from_slice(&bytes)
            }
            Spot::Host(slot) => {
                return Err(format!("{slot:?} is written, but has been used again"));
            }
            Spot::Disk(slot) => {
                self.disk.insert(
                    slot,
                    Record {
                        info,
                        checksum,
                        bytes,
                    },
                );
            }
            Spot::Object(key) => {
                objects.insert(
                    key,
                    Record {
                        info,
                        checksum,
                        bytes,
                    },
                );
            }
        }
        Ok(())
    }
}

/// As every tier computes it.
pub(super) fn checksum(bytes: &[u8]) -> Checksum {
    Checksum::crc32c(crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32)
}
