//! What the tree takes, and what it gives back.

use super::super::names::Names;
use super::{Shared, Tree};

impl Tree {
    /// Whether there is memory that [`Self::trim`] would give back.
    pub(in crate::index) fn is_loose(&self, shared: &Shared) -> bool {
        self.segments.has_empty_chunks()
            || self.lists.has_empty_chunks()
            || self.slots.has_empty_chunks(&shared.runs)
            || self.doors.is_sparse(&shared.doors)
    }

    /// Gives memory back that nothing is in any more.
    pub(in crate::index) fn trim(&mut self, shared: &mut Shared) {
        self.segments.trim(&mut shared.keys);
        self.lists.trim(&mut shared.words);
        self.slots.trim(&mut shared.runs);
        shared.recency.trim(self.slots.end());
        self.sets.trim();
        self.names.trim();
        self.apart.trim();
        if let Some(by_key) = &mut self.by_key {
            by_key.trim();
        }
        if let Some(leaves) = &mut self.leaves {
            leaves.trim(self.slots.end());
        }
        if self.doors.is_sparse(&shared.doors) {
            shared.doors = self.doors.resized(&shared.doors, 0);
            self.doors.refit(&shared.doors);
        }
    }

    /// Makes tables that grow by steps as small as they can be, which whoever adds to them pays for.
    pub(in crate::index) fn tighten(&mut self) {
        self.names.tighten();
        self.apart.tighten();
        if let Some(by_key) = &mut self.by_key {
            by_key.tighten();
        }
    }

    /// The same of some of them, where nobody adds; true if there may be more.
    pub(in crate::index) fn tighten_some(&mut self) -> bool {
        self.names.tighten_some()
            || self.apart.tighten_some()
            || self.by_key.as_mut().is_some_and(Names::tighten_some)
    }

    pub(in crate::index) fn bytes(&self) -> usize {
        self.segments.bytes()
            + self.slots.bytes()
            + self.lists.bytes()
            + self.sets.bytes()
            + self.doors.bytes()
            + self.names_bytes()
            + self.starts.bytes()
            + self.other_starts.bytes()
            + self.leaves_bytes()
    }

    pub(in crate::index) fn names_bytes(&self) -> usize {
        let by_key = self.by_key.as_ref().map_or(0, Names::bytes);
        self.names.bytes() + self.apart.bytes() + by_key
    }

    pub(in crate::index) fn leaves_bytes(&self) -> usize {
        self.leaves.as_ref().map_or(0, |leaves| leaves.bytes())
    }
}
