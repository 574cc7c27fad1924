//! Blocks that are apart: what comes before one in its group may be missing, so each is found by its key.
//!
//! They stand in runs like others, as long as each comes directly after the one before: then whoever asks for a block asks
//! for those before it too, and enters by the first. Whoever steps through the chain otherwise gets an entry of their own.

use kvcache_core::IndexKey;

use super::super::doors::Door;
use super::{Place, Shared, Tree};

/// The most blocks of such a run. A window leaves holes where it was, which go when a whole run is empty.
const APART_RUN_BLOCKS: u32 = 64;

impl Tree {
    /// The block with this key, held or not, if it is apart.
    fn find_apart(&self, shared: &Shared, key: IndexKey) -> Option<Place> {
        let is_it = |position| shared.keys.get(position) == Some(key.0);
        let found = self.apart.find(key.0, is_it)?;
        Some(self.place_of(found))
    }

    /// The block with this key, which is apart; it is made where it is not there yet.
    ///
    /// `before` is the key that lookups which want this one look for directly before it.
    pub(in crate::index) fn place_apart(
        &mut self,
        shared: &Shared,
        before: Option<IndexKey>,
        key: IndexKey,
    ) -> Place {
        if let Some(found) = self.find_apart(shared, key) {
            return found;
        }
        // An image of an older format does not say which blocks are apart; each has an entry.
        if let Some(Door { run, block }) = self.doors.find(&shared.doors, key) {
            return self.block(shared, run, block);
        }
        let last = before.and_then(|before| self.find_apart(shared, before));
        let last = last.filter(|last| {
            last.block + 1 < APART_RUN_BLOCKS && self.can_append(shared, *last, false)
        });
        let place = match last {
            Some(last) => self.append(shared, last.run, key),
            None => {
                let place = self.begin(shared, None, key, false);
                shared.run(place.run).set_apart();
                place
            }
        };
        self.apart.insert(key.0, place.position);
        place
    }

    /// Sees to it that lookups which come from `before` find a block that is apart.
    pub(in crate::index) fn let_in(
        &mut self,
        shared: &Shared,
        before: Option<IndexKey>,
        found: Place,
    ) {
        let Some(previous) = self.beside(shared, found, false) else {
            return;
        };
        let key = self.key(shared, found.position);
        let is_entered = before == Some(self.key(shared, previous.position));
        if is_entered || self.doors.find(&shared.doors, key).is_some() {
            return;
        }
        self.close(shared, found.run);
        shared.run(found.run).set_doors();
        let door = Door {
            run: found.run,
            block: found.block,
        };
        self.doors.insert(&shared.doors, key, door);
    }

    /// Whether a run's blocks are apart.
    pub(in crate::index) fn is_apart(&self, shared: &Shared, run: u32) -> bool {
        shared.run(run).is_apart()
    }

    /// The key before a block's in its chain; none at the start of a run, and where nobody has hashed the order.
    pub(in crate::index) fn key_before(&self, shared: &Shared, place: Place) -> Option<IndexKey> {
        if shared.run(place.run).is_told() {
            return None;
        }
        let previous = self.beside(shared, place, false)?;
        Some(self.key(shared, previous.position))
    }
}
