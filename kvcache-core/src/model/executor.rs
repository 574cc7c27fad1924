//! How the world carries out commands, and what it forbids them.

use std::time::Duration;

use super::{Bytes, Fault, GARBAGE, World, genuine};
use crate::error::ErrorKind;
use crate::id::{LeaseId, PeerId};
use crate::key::{BlockKey, Checksum};
use crate::manager::{Command, GrantedBlock, GrantedLease, Move, MoveFailure};
use crate::place::{HostSlot, Place, Tier};

impl World {
    /// A command may start: nothing that it writes is in use, and what it reads is complete.
    pub(super) fn accept(&self, command: &Command) {
        match command {
            Command::Copy { moves, .. } => {
                assert!(!moves.is_empty(), "an empty command");
                assert!(
                    moves.len() <= self.limits.batch_blocks_max as usize,
                    "a batch too large"
                );
                let kind = |place: &Place| std::mem::discriminant(place);
                for a_move in moves {
                    assert_eq!(kind(&a_move.from), kind(&moves[0].from), "mixed sources");
                    assert_eq!(kind(&a_move.to), kind(&moves[0].to), "mixed targets");
                    self.accept_move(a_move);
                }
            }
            Command::DropSegment { segment, .. } => {
                let touches =
                    |place: &Place| matches!(place, Place::Disk(slot) if slot.segment == *segment);
                let busy = self.moves().any(|m| touches(&m.from) || touches(&m.to));
                assert!(!busy, "segment {segment} dropped while in use");
            }
            Command::Lease { keys, .. } => assert!(!keys.is_empty(), "a lease of nothing"),
            Command::Release { .. } => {}
        }
    }

    fn accept_move(&self, a_move: &Move) {
        match a_move.from {
            Place::Host(slot) => {
                let (generation, bytes) = self.host.get(&slot.index).copied().unwrap_or_default();
                assert_eq!(
                    generation, slot.generation,
                    "reads a slot of another generation"
                );
                let is_good = a_move.checksum == Some(Checksum::crc32c(bytes));
                let is_rotten = self.rotten.contains(&a_move.info.key);
                assert!(is_good || is_rotten, "reads a slot that is not sealed");
            }
            Place::Disk(slot) => {
                assert!(
                    self.disk.contains_key(&slot),
                    "reads a record that is not there"
                );
            }
            Place::Engine { .. } | Place::Object(_) | Place::Peer { .. } => {}
        }
        match a_move.to {
            Place::Host(slot) => {
                assert!(
                    slot.index.0 < self.limits.host_slots,
                    "a slot outside the arena"
                );
                let is_slot = |place: &Place| matches!(place, Place::Host(other) if other.index == slot.index);
                let busy = self.moves().any(|m| is_slot(&m.from) || is_slot(&m.to));
                assert!(
                    !busy,
                    "slot {} is written while a transfer uses it",
                    slot.index
                );
                let leased = self.leases.values().flat_map(|granted| &granted.blocks);
                let is_leased = leased.into_iter().any(|b| b.slot.index == slot.index);
                assert!(
                    !is_leased,
                    "slot {} is written while it is leased",
                    slot.index
                );
                let (before, _) = self.host.get(&slot.index).copied().unwrap_or_default();
                assert_ne!(
                    before, slot.generation,
                    "a slot reused without a new generation"
                );
            }
            Place::Disk(slot) => {
                let fits = slot.segment.0 < self.limits.disk_segments
                    && slot.position < self.limits.disk_segment_slots;
                assert!(fits, "a record outside the disk tier");
                assert!(!self.disk.contains_key(&slot), "a record written twice");
            }
            Place::Engine { .. } | Place::Object(_) => {}
            Place::Peer { .. } => panic!("a write to a peer"),
        }
    }

    /// Every move that is waiting or has not drained.
    pub(super) fn moves(&self) -> impl Iterator<Item = &Move> {
        let waiting = self.commands.iter().flat_map(|command| match command {
            Command::Copy { moves, .. } => moves.as_slice(),
            _ => &[],
        });
        waiting.chain(
            self.undrained
                .values()
                .flat_map(|undrained| &undrained.moves),
        )
    }

    pub(super) fn carry_out(
        &mut self,
        a_move: &Move,
        fault: Fault,
    ) -> Result<Checksum, MoveFailure> {
        match fault {
            Fault::None => {}
            Fault::Rot => self.rot(a_move),
            Fault::Fails(kind) => {
                self.blame(a_move, kind);
                return Err(MoveFailure::settled(kind));
            }
            Fault::Unsettled(kind) => {
                self.blame(a_move, kind);
                return Err(MoveFailure::unsettled(kind));
            }
        }
        let Some(bytes) = self.read(a_move) else {
            return Err(MoveFailure::settled(ErrorKind::NotFound));
        };
        let checksum = Checksum::crc32c(bytes);
        self.write(a_move, bytes);
        let expected = match a_move.from {
            // Objects carry their own checksum, of the bytes as they were written.
            Place::Object(key) => Some(Checksum::crc32c(genuine(&key))),
            _ => a_move.checksum,
        };
        if expected.is_some_and(|expected| expected != checksum) {
            return Err(MoveFailure::settled(ErrorKind::Corrupt));
        }
        Ok(checksum)
    }

    fn blame(&mut self, a_move: &Move, kind: ErrorKind) {
        let is_source_bad = matches!(kind, ErrorKind::Corrupt | ErrorKind::NotFound);
        if is_source_bad && matches!(a_move.from, Place::Host(_)) {
            self.blamed.insert(a_move.info.key);
        }
    }

    fn rot(&mut self, a_move: &Move) {
        self.rotten.insert(a_move.info.key);
        self.blame(a_move, ErrorKind::Corrupt);
        match a_move.from {
            Place::Host(slot) => {
                self.host.insert(slot.index, (slot.generation, GARBAGE));
            }
            Place::Disk(slot) => {
                if let Some(record) = self.disk.get_mut(&slot) {
                    record.bytes = GARBAGE;
                }
            }
            Place::Object(key) => {
                self.objects.insert(key, GARBAGE);
            }
            Place::Peer { peer, .. } => {
                if let Some(held) = self.peers.get_mut(&peer) {
                    held.remove(&a_move.info.key);
                }
            }
            // An engine's bytes are what it says they are.
            Place::Engine { .. } => {}
        }
    }

    fn read(&self, a_move: &Move) -> Option<Bytes> {
        match a_move.from {
            Place::Engine {
                operation,
                position,
            } => self
                .engines
                .get(&operation)
                .map(|engine| engine.memory[position as usize]),
            Place::Host(slot) => self.host.get(&slot.index).map(|(_, bytes)| *bytes),
            Place::Disk(slot) => self.disk.get(&slot).map(|record| record.bytes),
            Place::Object(key) => self.objects.get(&key).copied(),
            Place::Peer {
                peer,
                lease,
                position,
            } => {
                let (keys, until) = self.peer_leases.get(&(peer, lease))?;
                let key = keys.get(position as usize)?;
                let is_held = *until > self.now && self.peers.get(&peer)?.contains(key);
                Some(if is_held { genuine(key) } else { GARBAGE })
            }
        }
    }

    pub(super) fn write(&mut self, a_move: &Move, bytes: Bytes) {
        match a_move.to {
            Place::Engine {
                operation,
                position,
            } => {
                if let Some(engine) = self.engines.get_mut(&operation) {
                    let is_ours = !engine.ended || engine.unsettled.contains(&position);
                    assert!(
                        is_ours,
                        "engine slot {position} of {operation} written after its end"
                    );
                    engine.memory[position as usize] = bytes;
                }
            }
            Place::Host(HostSlot { index, generation }) => {
                self.host.insert(index, (generation, bytes));
            }
            Place::Disk(_) => self.write_record(a_move, bytes),
            Place::Object(key) => {
                // Whole objects appear at once or not at all.
                if bytes != GARBAGE {
                    self.objects.insert(key, bytes);
                }
            }
            Place::Peer { .. } => {}
        }
    }

    pub(super) fn grant(
        &mut self,
        peer: PeerId,
        keys: &[BlockKey],
        ttl: Duration,
        fault: Fault,
    ) -> Result<GrantedLease, ErrorKind> {
        if let Fault::Fails(kind) | Fault::Unsettled(kind) = fault {
            return Err(kind);
        }
        let Some(held) = self.peers.get(&peer) else {
            return Err(ErrorKind::PeerLost);
        };
        let mut keys: Vec<BlockKey> = keys
            .iter()
            .copied()
            .take_while(|key| held.contains(key))
            .collect();
        if fault == Fault::Rot {
            keys.truncate(keys.len() / 2);
        }
        let lease = LeaseId(self.next_peer_lease);
        self.next_peer_lease += 1;
        let block = |key| GrantedBlock {
            checksum: Checksum::crc32c(genuine(key)),
            tier: Tier::Host,
        };
        let blocks = keys.iter().map(block).collect();
        self.peer_leases
            .insert((peer, lease), (keys, self.now + ttl));
        Ok(GrantedLease { lease, ttl, blocks })
    }
}
