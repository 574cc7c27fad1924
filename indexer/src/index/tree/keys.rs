//! Keys of all blocks, while some source speaks keys without telling where they belong.

use kvcache_core::IndexKey;

use super::super::names::Names;
use super::{Place, Shared, Tree};

impl Tree {
    /// From now on any key is found, wherever it is.
    pub(in crate::index) fn index_keys(&mut self, shared: &Shared) {
        if self.by_key.is_some() {
            return;
        }
        let mut by_key = Names::new(self.names.fit());
        for run in 0..self.slots.end() {
            let Some(header) = shared.runs.get(run) else {
                continue;
            };
            for block in 0..header.blocks() {
                let position = shared.position(run, block);
                by_key.insert(self.key(shared, position).0, position);
            }
        }
        self.by_key = Some(by_key);
    }

    /// Undoes [`Self::index_keys`].
    pub(in crate::index) fn forget_keys(&mut self) {
        self.by_key = None;
    }

    /// The block with this key, wherever it is; only with [`Self::index_keys`].
    pub(in crate::index) fn find_key(&self, shared: &Shared, key: IndexKey) -> Option<Place> {
        let by_key = self.by_key.as_ref()?;
        let found = by_key.find(key.0, |position| shared.keys.get(position) == Some(key.0))?;
        Some(self.place_of(found))
    }
}
