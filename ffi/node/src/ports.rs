//! What a node without an index asks and tells: nobody.

use kvcache_core::event::NodeEvent;
use kvcache_core::ports::{Directory, EventSink, LocateFuture, Located, Position};
use kvcache_core::{Epoch, IndexKey, Sequence};

/// A node that knows of no other: every question is answered "nobody", every event is dropped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alone;

impl Directory for Alone {
    fn locate(&self, _chain: Vec<IndexKey>) -> LocateFuture<'_> {
        Box::pin(std::future::ready(Ok(Located::default())))
    }
}

impl EventSink for Alone {
    fn publish(&self, _events: Vec<NodeEvent>) -> Position {
        Position {
            epoch: Epoch(0),
            next: Sequence(0),
        }
    }
}
