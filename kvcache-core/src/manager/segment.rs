//! The disk tier: segments that are filled once and dropped whole.

use super::command::CommandId;
use crate::key::BlockKey;
use crate::place::{DiskSlot, SegmentId};

/// The bookkeeping of all segments.
#[derive(Debug)]
pub(super) struct Segments {
    segments: Vec<Segment>,
    slots: u32,
    /// The one that is being filled; may have become full.
    open: usize,
    /// How many records could be reserved now.
    room: u64,
    /// The one that is on its way out; one at a time.
    pub(super) leaving: Option<SegmentId>,
}

#[derive(Debug)]
pub(super) struct Segment {
    pub(super) state: SegmentState,
    /// The first record that was never given out.
    next: u32,
    records: Vec<Option<BlockKey>>,
    live: u32,
    /// Copies at work in it.
    pins: u32,
    /// The number of the last use of anything in it.
    used: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentState {
    /// Takes and serves blocks.
    Writable,
    /// Serves blocks.
    Full,
    /// Serves blocks while this many of them are being saved to the object store.
    Rescuing(u32),
    /// Its blocks were forgotten on demand; it leaves when its turn comes. Copies that were on their way to it may still
    /// bring it some.
    Doomed,
    /// Its blocks are forgotten; copies may still be at work in it.
    Draining,
    /// The driver is deleting its records.
    Dropping(CommandId),
}

impl Segments {
    pub(super) fn new(count: u32, slots: u32) -> Self {
        let segment = || Segment {
            state: SegmentState::Writable,
            next: 0,
            records: vec![None; slots as usize],
            live: 0,
            pins: 0,
            used: 0,
        };
        Self {
            segments: (0..count).map(|_| segment()).collect(),
            slots,
            open: 0,
            room: u64::from(count) * u64::from(slots),
            leaving: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    pub(super) fn get(&self, id: SegmentId) -> &Segment {
        &self.segments[id.0 as usize]
    }

    pub(super) fn set_state(&mut self, id: SegmentId, state: SegmentState) {
        self.segments[id.0 as usize].state = state;
    }

    /// A record to write, from the fullest segment that takes any. The segment is pinned for the writer, and `used` then.
    pub(super) fn reserve(&mut self, used: u64) -> Option<DiskSlot> {
        if self.segments.get(self.open)?.state != SegmentState::Writable {
            let segments = self.segments.iter().enumerate();
            let (index, _) = segments
                .filter(|(_, segment)| segment.state == SegmentState::Writable)
                .min_by_key(|(index, segment)| (segment.next == 0, *index))?;
            self.open = index;
        }
        self.room -= 1;
        let segment = &mut self.segments[self.open];
        let slot = DiskSlot {
            segment: SegmentId(self.open as u32),
            position: segment.next,
        };
        segment.next += 1;
        segment.pins += 1;
        segment.used = used;
        if segment.next == self.slots {
            segment.state = SegmentState::Full;
        }
        Some(slot)
    }

    /// How many records could be reserved now.
    pub(super) fn room(&self) -> u64 {
        self.room
    }

    /// Whether a segment will be empty soon: one is on its way out, and not kept by a copy that does not end.
    pub(super) fn is_room_coming(&self) -> bool {
        self.leaving.is_some_and(|id| {
            let segment = self.get(id);
            segment.state != SegmentState::Draining || segment.pins == 0
        })
    }

    /// The record holds this block from now on.
    pub(super) fn occupy(&mut self, slot: DiskSlot, key: BlockKey) {
        let segment = &mut self.segments[slot.segment.0 as usize];
        let record = &mut segment.records[slot.position as usize];
        assert!(record.is_none(), "{slot:?} holds {record:?} already");
        *record = Some(key);
        segment.live += 1;
    }

    /// As [`Segments::occupy`], for a record that was found at the start and `used` before it.
    pub(super) fn occupy_found(&mut self, slot: DiskSlot, key: BlockKey, used: u64) {
        self.segments[slot.segment.0 as usize].used = used;
        self.occupy(slot, key);
    }

    /// Takes over a record that was found at the start: it will not be written to. Whether it fits and holds nothing yet.
    pub(super) fn recover(&mut self, slot: DiskSlot) -> bool {
        let slots = self.slots;
        let Some(segment) = self.segments.get_mut(slot.segment.0 as usize) else {
            return false;
        };
        if !matches!(segment.records.get(slot.position as usize), Some(None)) {
            return false;
        }
        let next = segment.next.max(slot.position + 1);
        self.room -= u64::from(next - segment.next);
        segment.next = next;
        if segment.next == slots {
            segment.state = SegmentState::Full;
        }
        true
    }

    /// The record holds nothing any more.
    pub(super) fn vacate(&mut self, slot: DiskSlot) {
        let segment = &mut self.segments[slot.segment.0 as usize];
        let record = segment.records[slot.position as usize].take();
        assert!(record.is_some(), "{slot:?} held nothing");
        segment.live -= 1;
    }

    /// A copy starts to read from the segment, which is `used` then.
    pub(super) fn pin(&mut self, id: SegmentId, used: u64) {
        let segment = &mut self.segments[id.0 as usize];
        segment.pins += 1;
        segment.used = used;
    }

    /// A copy in the segment has ended.
    pub(super) fn unpin(&mut self, id: SegmentId) {
        let segment = &mut self.segments[id.0 as usize];
        assert!(
            segment.pins > 0,
            "segment {id} released more often than acquired"
        );
        segment.pins -= 1;
    }

    /// The segment to drop next: an empty one, else the least recently used; none while all are in use.
    pub(super) fn victim(&self) -> Option<SegmentId> {
        let (index, _) = self
            .segments
            .iter()
            .enumerate()
            .filter(|(_, segment)| segment.state == SegmentState::Full && segment.pins == 0)
            .min_by_key(|(_, segment)| (segment.live > 0, segment.used))?;
        Some(SegmentId(index as u32))
    }

    /// No segment that has ever been written to takes or keeps blocks any more; one that is on its way out goes on.
    pub(super) fn doom(&mut self) {
        for segment in &mut self.segments {
            let is_settled = matches!(segment.state, SegmentState::Writable | SegmentState::Full);
            if is_settled && segment.next > 0 {
                self.room -= u64::from(self.slots - segment.next);
                segment.next = self.slots;
                segment.state = SegmentState::Doomed;
            }
        }
    }

    /// A doomed segment in which nothing is at work.
    pub(super) fn doomed(&self) -> Option<SegmentId> {
        let (id, _) = self
            .iter()
            .find(|(_, segment)| segment.state == SegmentState::Doomed && segment.pins == 0)?;
        Some(id)
    }

    /// The blocks of a segment, in the order of its records.
    pub(super) fn blocks(&self, id: SegmentId) -> Vec<(DiskSlot, BlockKey)> {
        let records = self.segments[id.0 as usize].records.iter().enumerate();
        records
            .filter_map(|(position, key)| {
                let slot = DiskSlot {
                    segment: id,
                    position: position as u32,
                };
                key.map(|key| (slot, key))
            })
            .collect()
    }

    /// The segment's records were deleted: it can be filled anew.
    pub(super) fn reset(&mut self, id: SegmentId) {
        let segment = &mut self.segments[id.0 as usize];
        assert!(
            segment.live == 0 && segment.pins == 0,
            "segment {id} dropped while in use"
        );
        segment.state = SegmentState::Writable;
        segment.next = 0;
        self.room += u64::from(self.slots);
    }

    /// Whether a block in this record will still be there when its segment has been dropped for room.
    pub(super) fn is_lasting(&self, slot: DiskSlot) -> bool {
        matches!(
            self.get(slot.segment).state,
            SegmentState::Writable | SegmentState::Full
        )
    }

    /// Blocks in all of them.
    pub(super) fn live(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| u64::from(segment.live))
            .sum()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (SegmentId, &Segment)> {
        self.segments
            .iter()
            .enumerate()
            .map(|(index, s)| (SegmentId(index as u32), s))
    }
}

impl Segment {
    pub(super) fn pins(&self) -> u32 {
        self.pins
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    pub(super) fn live(&self) -> u32 {
        self.live
    }
}
