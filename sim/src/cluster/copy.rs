//! The managers' commands, carried out on real bytes: local copies by the agenda, remote ones by the network.

use std::time::Duration;

use kvcache_core::manager::{Command, CommandId, Move, MoveFailure};
use kvcache_core::place::{HostSlot, Place, SegmentId};
use kvcache_core::{Checksum, ErrorKind, PeerId, Time};
use kvfabric_transfer::backend::sim::{Direction, SimTransfer, SimTransferId};

use super::memory::{Spot, checksum};
use super::pod::{Fate, LocalCopy, RemoteCopy};
use super::{Check, Cluster, Due, Sabotage};

/// A local copy takes up to this long.
const LOCAL_COPY: Duration = Duration::from_micros(200);

/// A local copy that was given up ends within this time.
const LATE_END: Duration = Duration::from_millis(8);

/// Deleting a segment takes up to this long.
const SEGMENT_DROP: Duration = Duration::from_millis(1);

impl Cluster {
    pub(super) fn execute(&mut self, position: usize, command: Command) -> Check {
        match command {
            Command::Copy {
                id,
                moves,
                deadline,
            } => {
                let Some(first) = moves.first() else {
                    return Err(format!("copy {id} has no moves"));
                };
                if matches!(first.from, Place::Peer { .. }) {
                    self.begin_remote_copy(position, id, &moves, deadline)
                } else {
                    self.begin_local_copy(position, id, &moves, deadline)
                }
            }
            Command::Lease {
                id,
                peer,
                keys,
                ttl,
                deadline,
            } => {
                self.ask_lease(position, id, peer, keys, ttl, deadline);
                Ok(())
            }
            Command::Release { peer, lease } => {
                self.give_back(position, peer, lease);
                Ok(())
            }
            Command::DropSegment { id, segment } => {
                let peer = self.pods[position].peer;
                let after = self.some_time(SEGMENT_DROP);
                self.schedule(after, Due::SegmentDropped(peer, id, segment));
                Ok(())
            }
        }
    }

    fn begin_local_copy(
        &mut self,
        position: usize,
        id: CommandId,
        moves: &[Move],
        deadline: Time,
    ) -> Check {
        let fate = self.draw_fate(&moves[0]);
        let duration = self.some_time(LOCAL_COPY);
        let pod = &mut self.pods[position];
        let mut spots = Vec::with_capacity(moves.len());
        for one in moves {
            let (source, target) = (pod.spot(&one.from)?, pod.spot(&one.to)?);
            pod.memory.begin(target);
            spots.push((*one, source, target));
        }
        let peer = pod.peer;
        let (fate, at) = match fate {
            Fate::Stalls => (fate, deadline),
            _ if self.now + duration > deadline => (Fate::Fails(ErrorKind::Timeout), deadline),
            _ => (fate, self.now + duration),
        };
        pod.copies.insert(id, LocalCopy { moves: spots, fate });
        self.schedule_at(at.max(self.now), Due::Copied(peer, id));
        Ok(())
    }

    fn draw_fate(&mut self, one: &Move) -> Fate {
        let faults = &self.config.faults;
        let random = &mut self.random;
        if random.happens(faults.stall) {
            return Fate::Stalls;
        }
        if matches!(one.to, Place::Disk(_)) && random.happens(faults.disk_full) {
            return Fate::Fails(ErrorKind::NoSpace);
        }
        let is_object = matches!(one.from, Place::Object(_)) || matches!(one.to, Place::Object(_));
        if is_object && random.happens(faults.object_failure) {
            return Fate::Fails(ErrorKind::Io);
        }
        Fate::Done
    }

    pub(super) fn local_copy_ended(&mut self, peer: PeerId, id: CommandId) -> Check {
        let Some(position) = self.living(peer) else {
            return Ok(());
        };
        let Some(copy) = self.pods[position].copies.remove(&id) else {
            return Err(format!("local copy {id} ended twice"));
        };
        let results = match copy.fate {
            Fate::Done => self.copy_all(position, &copy)?,
            Fate::Fails(kind) => vec![Err(MoveFailure::settled(kind)); copy.moves.len()],
            Fate::Stalls => {
                let failed =
                    vec![Err(MoveFailure::unsettled(ErrorKind::Timeout)); copy.moves.len()];
                self.pods[position].copies.insert(id, copy);
                let after = self.some_time(LATE_END);
                self.schedule(after, Due::Drained(peer, id));
                failed
            }
        };
        self.pods[position]
            .manager
            .handle_copied(self.now, id, results);
        Ok(())
    }

    /// The bytes of a copy that was given up arrive all the same, and only then nothing is at work any more.
    pub(super) fn local_copy_drained(&mut self, peer: PeerId, id: CommandId) -> Check {
        let Some(position) = self.living(peer) else {
            return Ok(());
        };
        let Some(copy) = self.pods[position].copies.remove(&id) else {
            return Err(format!("local copy {id} drained twice"));
        };
        self.copy_all(position, &copy)?;
        self.pods[position].manager.handle_drained(self.now, id);
        Ok(())
    }

    fn copy_all(
        &mut self,
        position: usize,
        copy: &LocalCopy,
    ) -> Check<Vec<Result<Checksum, MoveFailure>>> {
        copy.moves
            .iter()
            .map(|(one, source, target)| self.copy_one(position, one, *source, *target))
            .collect()
    }

    fn copy_one(
        &mut self,
        position: usize,
        one: &Move,
        source: Spot,
        target: Spot,
    ) -> Check<Result<Checksum, MoveFailure>> {
        self.spoil(position, source);
        let key = &one.info.key;
        let (bytes, kept) = match self.pods[position]
            .memory
            .read(&self.objects, source, key)?
        {
            Ok(read) => read,
            Err(kind) => return Ok(Err(MoveFailure::settled(kind))),
        };
        let computed = checksum(&bytes);
        let expected = one.checksum.or(kept);
        if !self.trusts(expected.unwrap_or(computed), computed)
            || !self.trusts(kept.unwrap_or(computed), computed)
        {
            return Ok(Err(MoveFailure::settled(ErrorKind::Corrupt)));
        }
        self.pods[position]
            .memory
            .write(&mut self.objects, target, one.info, bytes)?;
        Ok(Ok(computed))
    }

    /// Whether a copy with this checksum is taken.
    fn trusts(&self, expected: Checksum, computed: Checksum) -> bool {
        expected == computed || self.config.sabotage == Sabotage::TrustBytes
    }

    /// Inverts a bit on disk, or loses an object, when chance will have it.
    fn spoil(&mut self, position: usize, source: Spot) {
        match source {
            Spot::Disk(slot) if self.random.happens(self.config.faults.disk_flip) => {
                let bit = self.random.position(self.config.block_bytes * 8);
                if let Some(record) = self.pods[position].memory.disk.get_mut(&slot) {
                    record.bytes[bit / 8] ^= 1 << (bit % 8);
                }
            }
            Spot::Object(key) if self.random.happens(self.config.faults.object_loss) => {
                self.objects.remove(&key);
            }
            _ => {}
        }
    }

    pub(super) fn segment_dropped(&mut self, peer: PeerId, id: CommandId, segment: SegmentId) {
        let Some(position) = self.living(peer) else {
            return;
        };
        let failed = self.random.happens(self.config.faults.disk_full);
        let pod = &mut self.pods[position];
        let result = if failed {
            Err(ErrorKind::Io)
        } else {
            pod.drop_segment(segment);
            Ok(())
        };
        pod.manager.handle_segment_dropped(self.now, id, result);
    }

    fn begin_remote_copy(
        &mut self,
        position: usize,
        command: CommandId,
        moves: &[Move],
        deadline: Time,
    ) -> Check {
        let pod = &mut self.pods[position];
        let mut resolved = Vec::with_capacity(moves.len());
        let mut holder = None;
        for one in moves {
            let (peer, slot) = pod.leased(&one.from)?;
            if *holder.get_or_insert(peer) != peer {
                return Err(format!("copy {command} reads from several peers"));
            }
            let target = pod.spot(&one.to)?;
            pod.memory.begin(target);
            resolved.push((*one, slot, target));
        }
        let (initiator, node) = (pod.peer, pod.node);
        let Some(holder) = holder else { return Ok(()) };
        let copy = RemoteCopy {
            initiator,
            command,
            holder,
            moves: resolved,
        };
        let node_of = |peer: PeerId| self.living(peer).map(|position| self.pods[position].node);
        let bytes = (moves.len() * self.config.block_bytes) as u64;
        let started = node_of(holder).map(|peer| {
            let direction = Direction::Read;
            let plan = SimTransfer {
                initiator: node,
                peer,
                direction,
                bytes,
                notify: false,
                deadline,
            };
            self.exchange.handle_transfer(self.now, plan)
        });
        match started {
            Some(Ok(transfer)) => {
                self.transfers.insert(transfer, copy);
            }
            Some(Err(error)) => return Err(format!("start a transfer: {error}")),
            None => {
                self.answer_remote_copy(&copy, Err(MoveFailure::settled(ErrorKind::PeerLost)))?
            }
        }
        Ok(())
    }

    /// Bytes of a remote copy arrive: they are what the holder's memory holds at this very moment.
    pub(super) fn landed(
        &mut self,
        transfer: SimTransferId,
        offset: u64,
        len: u64,
        corruption: Option<u64>,
    ) {
        let Some(copy) = self.transfers.get(&transfer) else {
            return;
        };
        let (Some(holder), Some(reader)) = (self.living(copy.holder), self.living(copy.initiator))
        else {
            return;
        };
        let block_bytes = self.config.block_bytes;
        let wrong_bit = corruption.map(|bit| offset as usize * 8 + (bit % (len * 8)) as usize);
        for at in offset as usize..(offset + len) as usize {
            let (_, slot, target) = &copy.moves[at / block_bytes];
            let mut byte = self.pods[holder].memory.host(*slot)[at % block_bytes];
            if let Some(bit) = wrong_bit.filter(|bit| bit / 8 == at) {
                byte ^= 1 << (bit % 8);
            }
            if let Some(target) = self.pods[reader].memory.target(*target) {
                target[at % block_bytes] = byte;
            }
        }
    }

    pub(super) fn transfer_finished(
        &mut self,
        transfer: SimTransferId,
        failure: Option<ErrorKind>,
        settled: bool,
    ) -> Check {
        let copy = if settled {
            self.transfers.remove(&transfer)
        } else {
            self.transfers.get(&transfer).map(|copy| RemoteCopy {
                moves: copy.moves.clone(),
                ..*copy
            })
        };
        let Some(copy) = copy else {
            return Err(format!("{transfer:?} finished twice"));
        };
        let outcome = match failure {
            None => Ok(()),
            Some(kind) => Err(MoveFailure { kind, settled }),
        };
        self.answer_remote_copy(&copy, outcome)
    }

    pub(super) fn transfer_drained(&mut self, transfer: SimTransferId) {
        let Some(copy) = self.transfers.remove(&transfer) else {
            return;
        };
        if let Some(position) = self.living(copy.initiator) {
            self.pods[position]
                .manager
                .handle_drained(self.now, copy.command);
        }
    }

    fn answer_remote_copy(&mut self, copy: &RemoteCopy, outcome: Result<(), MoveFailure>) -> Check {
        let Some(reader) = self.living(copy.initiator) else {
            return Ok(());
        };
        let results = copy
            .moves
            .iter()
            .map(|(one, slot, target)| {
                outcome.and_then(|()| self.check_remote(reader, copy.holder, one, *slot, *target))
            })
            .collect();
        self.pods[reader]
            .manager
            .handle_copied(self.now, copy.command, results);
        Ok(())
    }

    /// What a reader does after a one-sided read: is the slot still that block's, and are the bytes what they must be?
    fn check_remote(
        &self,
        reader: usize,
        holder: PeerId,
        one: &Move,
        slot: HostSlot,
        target: Spot,
    ) -> Result<Checksum, MoveFailure> {
        let memory = &self.pods[reader].memory;
        let computed = match target {
            Spot::Engine(engine) => checksum(memory.engine(engine)),
            Spot::Host(host) => checksum(memory.host(host)),
            Spot::Disk(_) | Spot::Object(_) => {
                return Err(MoveFailure::settled(ErrorKind::Unsupported));
            }
        };
        let is_current = self
            .living(holder)
            .is_some_and(|at| self.pods[at].memory.is_current(slot));
        if !is_current && self.config.sabotage != Sabotage::TrustBytes {
            return Err(MoveFailure::settled(ErrorKind::NotFound));
        }
        if !self.trusts(one.checksum.unwrap_or(computed), computed) {
            return Err(MoveFailure::settled(ErrorKind::Corrupt));
        }
        Ok(computed)
    }
}
