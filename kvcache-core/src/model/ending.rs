//! The end of a node, and its next start on the same disk.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Bytes, GARBAGE, World};
use crate::key::{BlockInfo, BlockKey, Checksum};
use crate::manager::{Move, RecoveredBlock};
use crate::place::{Place, Tier};

/// What a record on disk says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    info: BlockInfo,
    checksum: Checksum,
    pub(super) bytes: Bytes,
}

impl World {
    /// Somebody wants the node to end.
    pub fn retire(&mut self, within: Duration) {
        self.is_ending = true;
        self.manager.handle_retire(self.now, self.now + within);
        self.after();
    }

    /// The process ends here and now, and another starts on its disk: half of what was being written there is torn, and
    /// nothing else that was in memory is left.
    ///
    /// # Panics
    /// If the limits are refused, which were taken before.
    pub fn restart(&mut self) {
        let torn: Vec<Move> = self.moves().copied().collect();
        for a_move in torn.iter().filter(|m| matches!(m.to, Place::Disk(_))) {
            self.write(a_move, GARBAGE);
        }
        let mut next = match Self::new(self.limits.clone(), std::mem::take(&mut self.peers)) {
            Ok(next) => next,
            Err(error) => panic!("{error}"),
        };
        next.now = self.now;
        next.next_pin = self.next_pin;
        next.next_peer_lease = self.next_peer_lease;
        next.peer_leases = std::mem::take(&mut self.peer_leases);
        next.disk = std::mem::take(&mut self.disk);
        next.objects = std::mem::take(&mut self.objects);
        next.rotten = std::mem::take(&mut self.rotten);
        next.torn = std::mem::take(&mut self.torn);
        next.log = std::mem::take(&mut self.log);
        let found = next.disk.iter().map(|(slot, record)| RecoveredBlock {
            info: record.info,
            slot: *slot,
            checksum: record.checksum,
        });
        let found = found.collect();
        next.manager.handle_recovered(next.now, found);
        *self = next;
        self.after();
    }

    /// Blocks that a copy of this node may have wrong or half, wherever it is.
    #[must_use]
    pub fn doubtful(&self) -> BTreeSet<BlockKey> {
        self.rotten.union(&self.torn).copied().collect()
    }

    /// Whether the node is on its way to its end, or there.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.is_ending
    }

    pub(super) fn write_record(&mut self, a_move: &Move, bytes: Bytes) {
        let Place::Disk(slot) = a_move.to else {
            return;
        };
        if bytes == GARBAGE {
            self.torn.insert(a_move.info.key);
        }
        let record = Record {
            info: a_move.info,
            checksum: a_move.checksum.unwrap_or(Checksum::crc32c(bytes)),
            bytes,
        };
        self.disk.insert(slot, record);
    }

    pub(super) fn end_retirement(&mut self, left: u32) {
        assert!(!self.retired, "the end was reached twice");
        self.retired = true;
        let keys = |tier| {
            let contents = self.manager.contents(tier);
            contents.map(|info| info.key).collect::<BTreeSet<_>>()
        };
        let (host, disk, object) = (keys(Tier::Host), keys(Tier::Disk), keys(Tier::Object));
        let elsewhere: BTreeSet<_> = disk.union(&object).collect();
        let alone = host.iter().filter(|key| !elsewhere.contains(key)).count();
        // What is in a segment on its way out may be there still, and stores may have pushed out others since.
        let left = left as usize;
        assert!(
            alone <= left,
            "{left} stayed behind, {alone} are in DRAM alone"
        );
        assert!(
            left <= self.limits.host_slots as usize,
            "{left} stayed behind"
        );
    }
}
