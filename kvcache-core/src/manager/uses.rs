//! The order in which blocks and segments are used.

use super::Manager;
use crate::key::BlockKey;

impl Manager {
    /// The number of a use that happens now.
    pub(super) fn tick(&mut self) -> u64 {
        self.uses += 1;
        self.uses
    }

    /// These blocks of one sequence, in its order, are used together: among them the last is the first to go.
    pub(super) fn touch(&mut self, chain: &[BlockKey]) {
        self.evictor.touch(chain);
        for key in chain.iter().rev() {
            let used = self.tick();
            if let Some(block) = self.table.get_mut(key) {
                block.used = used;
            }
        }
    }
}
