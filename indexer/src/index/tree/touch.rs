//! Memory asked for before it is waited for.

use kvcache_core::{EngineHash, IndexKey};

use super::Tree;

impl Tree {
    /// Reads what searches for the names of several events would; until [`Self::forget_touched`] they are not read again.
    pub(in crate::index) fn touch_ahead<'a>(
        &mut self,
        names: impl Iterator<Item = &'a [EngineHash]>,
    ) {
        let hashes = names.map(|names| names.iter().map(|name| name.0));
        self.names.touch_all(hashes, &mut self.starts);
        self.is_touched = true;
        self.first_start = 0;
    }

    /// The next event is the one that so many names were told before.
    pub(in crate::index) fn go_to_touched(&mut self, place: usize) {
        self.first_start = place;
    }

    pub(in crate::index) fn forget_touched(&mut self) {
        self.is_touched = false;
    }

    /// Reads what searches for an event's names would, so that they find it in the cache.
    pub(in crate::index) fn touch_names(&mut self, names: &[EngineHash]) {
        if self.is_touched {
            return;
        }
        self.first_start = 0;
        let hashes = names.iter().map(|name| name.0);
        self.names.touch_all([hashes].into_iter(), &mut self.starts);
    }

    /// The same of keys, wherever they are.
    pub(in crate::index) fn touch_keys(&mut self, keys: impl Iterator<Item = IndexKey>) {
        if let Some(by_key) = &self.by_key {
            let hashes = keys.map(|key| key.0);
            by_key.touch_all([hashes].into_iter(), &mut self.other_starts);
        }
    }
}
