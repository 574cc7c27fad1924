//! Many events in one call.

use std::borrow::Borrow;

use kvcache_core::Result;

use super::config::{Applied, SourceId};
use super::{KvIndex, lock};
use crate::adapter::SourceEvent;

/// So many blocks are applied without a break.
const TOGETHER_BLOCKS: usize = 256;

impl KvIndex {
    /// Applies events in their order, each as [`Self::apply`] does, and calls `done` with what became of each.
    ///
    /// Of many events at once it asks memory for what they need before the first one waits for it: with events of few
    /// blocks that is most of their cost. Other writers wait while 256 blocks are applied.
    pub fn apply_all(
        &self,
        events: &[(SourceId, impl Borrow<SourceEvent>)],
        mut done: impl FnMut(Result<Applied>),
    ) {
        let mut outcomes = Vec::new();
        let mut left = events;
        while !left.is_empty() {
            let mut blocks = 0;
            let few = left.iter().take_while(|(_, event)| {
                blocks += event.borrow().names().len().max(1);
                blocks <= TOGETHER_BLOCKS
            });
            let (now, later) = left.split_at(few.count().max(1));
            let mut state = lock(&self.state);
            let names = now.iter().map(|(_, event)| event.borrow().names());
            state.writer.tree.touch_ahead(names);
            let mut touched = 0;
            for (id, event) in now {
                state.writer.tree.go_to_touched(touched);
                touched += event.borrow().names().len();
                outcomes.push(self.apply_one(&mut state, *id, event.borrow()));
            }
            state.writer.tree.forget_touched();
            drop(state);
            outcomes.drain(..).for_each(&mut done);
            left = later;
        }
    }
}
