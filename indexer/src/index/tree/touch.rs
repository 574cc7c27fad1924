//! Memory asked for before it is waited for.

use kvcache_core::{EngineHash, IndexKey};

use super::Tree;

impl Tree {
    /// Reads what searches for the names of several events would; until [`Self::forget_touched`] they are not read again.
    pub(in crate::index) fn touch_ahead(&mut self, names: impl Iterator<Item = EngineHash>) {
        self.touch_names(names);
        self.is_touched = true;
    }

    pub(in crate::index) fn forget_touched(&mut self) {
        self.is_touched = false;
    }

    /// Reads what searches for names would, so that they find it in the cache.
    pub(in crate::index) fn touch_names(&mut self, names: impl Iterator<Item = EngineHash>) {
        if self.is_touched {
            return;
        }
        let hashes = names.map(|name| name.0);
        self.names.touch_all(hashes, &mut self.lines);
    }

    /// The same of keys, wherever they are.
    pub(in crate::index) fn touch_keys(&mut self, keys: impl Iterator<Item = IndexKey>) {
        if let Some(by_key) = &self.by_key {
            by_key.touch_all(keys.map(|key| key.0), &mut self.lines);
        }
    }
}
