//! What the world is told of a node's tiers, in one row: by the driver of those that the manager keeps, and by tiers in memory of
//! devices of what is there.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::event::NodeEvent;
use kvcache_core::ports::{EventSink, Position};
use kvcache_core::{BlockInfo, IndexKey, Tier};
use tokio::sync::watch;

/// The way to the sink.
pub(crate) struct Announcer {
    sink: Arc<dyn EventSink>,
    position: watch::Sender<Position>,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    /// In how many slots of devices a block is: it is announced with the first, and withdrawn with the last.
    on_devices: HashMap<IndexKey, u32>,
    /// Nothing follows.
    is_over: bool,
}

impl Announcer {
    /// `position` is where the sink stands.
    pub(super) fn new(sink: Arc<dyn EventSink>, position: watch::Sender<Position>) -> Self {
        Self {
            sink,
            position,
            told: Mutex::default(),
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of the manager's tiers.
    pub(super) fn tell(&self, events: Vec<NodeEvent>) {
        // Under the lock, so that the position never goes back.
        let _told = self.told();
        self.position.send_replace(self.sink.publish(events));
    }

    /// Withdraws everything; nothing is told after it.
    pub(super) fn end(&self) {
        let mut told = self.told();
        told.is_over = true;
        self.position
            .send_replace(self.sink.publish(vec![NodeEvent::Cleared]));
    }

    /// Blocks are in slots of a device.
    pub(crate) fn arrived(&self, blocks: &[BlockInfo]) {
        let mut told = self.told();
        let first = blocks.iter().filter(|info| {
            let count = told.on_devices.entry(info.index_key).or_default();
            *count += 1;
            *count == 1
        });
        let stored = first.map(|info| NodeEvent::Stored {
            key: info.index_key,
            parent: info.index_parent,
            tier: Tier::Device,
        });
        let stored = stored.collect();
        self.tell_of_devices(&told, stored);
    }

    /// Blocks have left slots of a device.
    pub(crate) fn left(&self, blocks: &[BlockInfo]) {
        let mut told = self.told();
        let last = blocks.iter().filter(|info| {
            let count = told.on_devices.get_mut(&info.index_key);
            let is_last = count.is_some_and(|count| {
                *count -= 1;
                *count == 0
            });
            if is_last {
                told.on_devices.remove(&info.index_key);
            }
            is_last
        });
        let removed = last.map(|info| NodeEvent::Removed {
            key: info.index_key,
            tier: Tier::Device,
        });
        let removed = removed.collect();
        self.tell_of_devices(&told, removed);
    }

    fn tell_of_devices(&self, told: &Told, events: Vec<NodeEvent>) {
        if !told.is_over && !events.is_empty() {
            self.position.send_replace(self.sink.publish(events));
        }
    }
}
