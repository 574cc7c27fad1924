//! What must hold between calls, checked the slow way.

use std::collections::BTreeMap;

use super::Manager;
use super::job::{Holding, Job, PendingWork, Source, Task};
use super::plan::{FetchOperation, FetchStep};
use super::segment::SegmentState;
use super::serve::{Holder, LeaseStep};
use super::store::StoreStep;
use crate::id::SlotIndex;
use crate::key::BlockKey;
use crate::place::SegmentId;
use crate::table::{Block, HostCopy};

/// Everything that jobs, drains and leases keep, counted anew.
#[derive(Debug, Default)]
struct Kept {
    slot_pins: BTreeMap<SlotIndex, u32>,
    segment_pins: BTreeMap<SegmentId, u32>,
    filling: u32,
    leaving: u32,
    quarantined: u32,
    rescues: BTreeMap<SegmentId, u32>,
    granted: u32,
}

impl Manager {
    /// Checks every count against what it counts, and every reference against what it names; O(everything), for tests.
    ///
    /// # Panics
    /// If anything does not hold, with what.
    pub fn check_invariants(&self) {
        let kept = self.count_kept();
        self.check_slots(&kept);
        self.check_segments(&kept);
        self.check_operations();
        assert!(
            self.work.is_empty() && self.to_plan.is_empty(),
            "work left behind"
        );
        assert!(
            self.wanted.is_empty() || self.slots.vacant() == 0,
            "a vacant slot is not given"
        );
        let issued = self.pending.values().filter(|pending| pending.issued);
        assert_eq!(
            issued.count(),
            self.in_flight as usize,
            "commands in flight"
        );
        assert!(self.in_flight <= self.limits.commands_in_flight_max);
        assert!(self.background_in_flight <= self.limits.background_in_flight_max);
        self.check_pins_in_force();
        for (operation, leaving) in &self.flushes {
            assert!(!leaving.is_empty(), "{operation} waits for nothing");
            let is_leaving = |id| self.pending.get(id).is_some_and(|p| p.work.is_background());
            assert!(leaving.iter().all(is_leaving), "{operation} waits in vain");
        }
        if let Some(retirement) = &self.retirement {
            let copies = self.background_open() > 0;
            let waits = copies || !self.stores.is_empty() || self.disk_takes();
            assert!(retirement.is_over || waits, "the end waits in vain");
            assert!(retirement.queue.is_empty() || !retirement.is_over);
        }
        assert!(self.objects.len() <= self.limits.object_known_max as usize);
        for (since, key) in &self.objects {
            let known = self.table.get(key).and_then(|block| block.object);
            assert_eq!(known, Some(*since), "{key:?} in the object store");
        }
    }

    /// How many things are under way or kept for others: 0 when everything asked for has ended and drained.
    #[must_use]
    pub fn open_ends(&self) -> usize {
        self.stores.len()
            + self.fetches.len()
            + self.flushes.len()
            + self.leases.len()
            + self.pending.len()
            + self.draining.len()
            + self.drains.len()
            + self.grants.len()
            + self.wanted.len()
            + self.condemned.len()
            + self.protected.len()
            + self.slots.filling() as usize
            + self.slots.quarantined() as usize
            + self.leaving as usize
            + usize::from(self.retirement.as_ref().is_some_and(|end| !end.is_over))
    }

    fn count_kept(&self) -> Kept {
        let mut kept = Kept::default();
        for pending in self.pending.values() {
            if let PendingWork::Copy { jobs, .. } = &pending.work {
                assert!(!jobs.is_empty(), "a command without moves");
                for job in jobs {
                    kept.count_job(job);
                }
            }
        }
        for holding in self.draining.values().flatten() {
            match holding {
                Holding::Quarantine(_) => kept.quarantined += 1,
                Holding::HostPin(_, place) => {
                    *kept.slot_pins.entry(place.index).or_default() += 1;
                }
                Holding::SegmentPin(id) => *kept.segment_pins.entry(*id).or_default() += 1,
                Holding::Engine { .. } => {}
            }
        }
        for step in self.leases.values().flat_map(|lease| &lease.steps) {
            match step {
                LeaseStep::Pinned(block) => {
                    *kept.slot_pins.entry(block.slot.index).or_default() += 1;
                }
                LeaseStep::Waits { key, .. } => {
                    let waited = self.table.get(key);
                    assert!(
                        waited.is_some_and(|b| b.is_filling() || b.staging),
                        "{key:?} waits"
                    );
                }
            }
        }
        kept
    }

    fn check_slots(&self, kept: &Kept) {
        let slots = &self.slots;
        let used = slots.filling() + slots.sealed() + slots.quarantined();
        assert_eq!(
            slots.vacant() + used,
            slots.capacity(),
            "slots lost or made up"
        );
        assert_eq!(slots.filling(), kept.filling, "slots filled by nobody");
        assert_eq!(
            slots.quarantined(),
            kept.quarantined,
            "slots quarantined for nobody"
        );
        let (mut sealed, mut filling, mut leaving, mut evictable) = (0, 0, 0, 0);
        for block in self.table.iter() {
            match &block.host {
                HostCopy::Absent => {}
                HostCopy::Filling => filling += 1,
                HostCopy::Sealed {
                    slot,
                    leaving: is_leaving,
                } => {
                    sealed += 1;
                    leaving += u32::from(*is_leaving);
                    let pins = slots.pins(slot.place());
                    evictable += usize::from(!is_leaving && pins == 0);
                    self.check_pins(slot.place().index, pins, kept);
                }
            }
            assert!(
                block.checksum.is_some() || block.host_place().is_none() && block.disk.is_none(),
                "{:?} can be read but not verified",
                block.info.key
            );
            self.check_waiters(block);
        }
        for (index, slot) in &self.condemned {
            let pins = slots.pins(slot.place());
            assert!(pins > 0, "slot {index} is kept for nobody");
            self.check_pins(*index, pins, kept);
        }
        assert_eq!(
            sealed + self.condemned.len() as u32,
            slots.sealed(),
            "sealed slots"
        );
        assert_eq!(filling, slots.filling(), "blocks being filled");
        assert_eq!(leaving, self.leaving, "blocks marked as leaving");
        assert!(kept.leaving >= leaving, "blocks leaving without a copy");
        assert_eq!(
            self.evictor.evictable(),
            evictable,
            "blocks that may be evicted"
        );
        let pinned = kept.slot_pins.keys().all(|index| slots.pins_of(*index) > 0);
        assert!(pinned, "a slot that is in use is not pinned");
    }

    fn check_pins_in_force(&self) {
        let of = |wanted: bool| {
            let leases = self.leases.values();
            leases.filter(move |lease| lease.holder.is_pin() == wanted)
        };
        assert!(of(false).count() <= self.limits.leases_max as usize);
        assert_eq!(of(true).count(), self.pins.len(), "pins in force");
        assert!(self.pins.len() <= self.limits.pins_max as usize);
        for (pin, lease) in &self.pins {
            let holder = self.leases.get(lease).map(|lease| lease.holder);
            assert_eq!(holder, Some(Holder::Pin(*pin)), "the lease of pin {pin}");
        }
        assert!(self.early_unpins.len() <= self.limits.early_unpins_max as usize);
        let mut counted: BTreeMap<BlockKey, u32> = BTreeMap::new();
        for step in of(true).flat_map(|lease| &lease.steps) {
            *counted.entry(*step.key()).or_default() += 1;
        }
        let kept = self.pinned.iter().map(|(key, pins)| (*key, *pins));
        assert_eq!(kept.collect::<BTreeMap<_, _>>(), counted, "pinned blocks");
    }

    fn check_pins(&self, index: SlotIndex, pins: u32, kept: &Kept) {
        let counted = kept.slot_pins.get(&index).copied().unwrap_or(0);
        assert_eq!(pins, counted, "pins of slot {index}");
    }

    fn check_waiters(&self, block: &Block) {
        let can_wake = block.is_filling() || block.staging;
        assert!(
            block.waiters.is_empty() || can_wake,
            "{:?} wakes nobody",
            block.info.key
        );
    }

    fn check_segments(&self, kept: &Kept) {
        let mut on_disk = 0;
        for (id, segment) in self.segments.iter() {
            let blocks = self.segments.blocks(id);
            assert_eq!(
                blocks.len(),
                segment.live() as usize,
                "blocks of segment {id}"
            );
            on_disk += blocks.len();
            for (slot, key) in blocks {
                let held = self.table.get(&key).and_then(|block| block.disk);
                assert_eq!(held, Some(slot), "{key:?} on disk");
            }
            let pins = kept.segment_pins.get(&id).copied().unwrap_or(0);
            assert_eq!(segment.pins(), pins, "copies in segment {id}");
            let rescues = kept.rescues.get(&id).copied().unwrap_or(0);
            match segment.state {
                SegmentState::Writable | SegmentState::Full | SegmentState::Doomed => {
                    assert_ne!(self.segments.leaving, Some(id));
                }
                SegmentState::Rescuing(open) => assert_eq!(open, rescues, "rescues of {id}"),
                SegmentState::Draining => assert_eq!(segment.live(), 0),
                SegmentState::Dropping(_) => assert_eq!((segment.live(), pins), (0, 0)),
            }
        }
        let known = self
            .table
            .iter()
            .filter(|block| block.disk.is_some())
            .count();
        assert_eq!(known, on_disk, "blocks on disk");
    }

    fn check_operations(&self) {
        let steps = self.stores.values().flat_map(|store| {
            let open = store.steps.iter().filter(|step| !step.is_final()).count();
            assert_eq!(open, store.open as usize, "open blocks of a store");
            &store.steps
        });
        let waiting = steps
            .filter(|step| **step == StoreStep::WaitsForSlot)
            .count();
        let staging = self.table.iter().filter(|block| block.staging).count();
        assert_eq!(self.wanted.len(), waiting + staging, "slots asked for");
        for (operation, fetch) in &self.fetches {
            assert!(fetch.unplanned.is_empty(), "{operation} was not planned");
            assert!(!fetch.is_done(), "{operation} is done but has not ended");
            fetch.check();
        }
        let open = self.grants.values().map(|grant| grant.open).sum::<u32>();
        assert_eq!(
            open,
            self.count_kept().granted,
            "copies from granted leases"
        );
    }
}

impl Kept {
    fn count_job(&mut self, job: &Job) {
        match &job.task {
            Task::Store { .. } => self.filling += 1,
            Task::Stage { from, .. } => {
                self.filling += 1;
                *self.segment_pins.entry(from.segment).or_default() += 1;
            }
            Task::Fetch { source, .. } => match source {
                Source::Host(place) => *self.slot_pins.entry(place.index).or_default() += 1,
                Source::Disk(slot) => *self.segment_pins.entry(slot.segment).or_default() += 1,
                Source::Peer { .. } => self.granted += 1,
                Source::Object => {}
            },
            Task::DemoteDisk { from, to } => {
                self.leaving += 1;
                *self.slot_pins.entry(from.index).or_default() += 1;
                *self.segment_pins.entry(to.segment).or_default() += 1;
            }
            Task::DemoteObject { from } => {
                self.leaving += 1;
                *self.slot_pins.entry(from.index).or_default() += 1;
            }
            Task::Rescue { from } => {
                *self.segment_pins.entry(from.segment).or_default() += 1;
                *self.rescues.entry(from.segment).or_default() += 1;
            }
        }
    }
}

impl FetchOperation {
    fn check(&self) {
        let moving = self
            .steps
            .iter()
            .filter(|step| **step == FetchStep::Moving)
            .count();
        assert_eq!(
            moving, self.moving as usize,
            "blocks of a fetch being copied"
        );
        let before_cut = &self.steps[..self.cut as usize];
        let open = before_cut
            .iter()
            .filter(|step| !matches!(step, FetchStep::Done(_)))
            .count();
        assert_eq!(open, self.open as usize, "open blocks of a fetch");
        let missed = before_cut.contains(&FetchStep::Missed);
        assert!(!missed, "a miss before the cut of a fetch");
    }
}
