//! A panic inside the cache, brought about by its event sink: everybody who waits or asks later hears that it was a fault.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use kvcache_core::event::NodeEvent;
use kvcache_core::ports::{EventSink, Located, Position};
use kvcache_core::{BlockKey, Epoch, Error, ErrorKind, PinId, Sequence, Tier};
use kvfabric_tiers::{Cache, FetchBlock, NameReader, PeerService, StoreBlock};
use kvfabric_transfer::{Agent, HostMemory, Region, RegionOptions};

use crate::support::*;

/// Whether a sink breaks at this event.
type Break = Box<dyn Fn(&NodeEvent) -> bool + Send + Sync>;

/// Panics when it is told of something.
struct BrokenSink(Break);

impl EventSink for BrokenSink {
    fn publish(&self, events: Vec<NodeEvent>) -> Position {
        assert!(!events.iter().any(&self.0), "an event sink that breaks");
        Position {
            epoch: Epoch(1),
            next: Sequence(1),
        }
    }
}

/// A cache of eight slots and a disk, which breaks when its sink does.
struct Fragile {
    cache: Cache,
    engine: Region,
    _agent: Agent,
}

impl Fragile {
    async fn open(directory: &Path, breaks_at: Break) -> Self {
        let agent = agent("pod", Way::Memcpy, None);
        let mut config = config("pod", 8);
        config.disk = disk(directory, 8);
        config.names = Some(NameReader::new(|_| Ok(vec![block(1, 0)])));
        let (sink, guide) = (Arc::new(BrokenSink(breaks_at)), Arc::new(Guide::default()));
        let cache = Cache::open(config, agent.clone(), guide, sink);
        let memory = HostMemory::anonymous(BLOCK).unwrap();
        Self {
            cache: cache.await.unwrap(),
            engine: agent.register(memory, RegionOptions::default()).unwrap(),
            _agent: agent,
        }
    }

    async fn store(&self) -> Result<(), Error> {
        let one = StoreBlock {
            info: block(1, 0),
            memory: self.engine.descriptor(0, BLOCK).into(),
        };
        let deadline = Instant::now() + PATIENCE;
        self.cache.store(vec![one], deadline).await.map(drop)
    }

    async fn fetch(&self) -> Result<(), Error> {
        let one = FetchBlock {
            info: block(1, 0),
            memory: self.engine.descriptor(0, BLOCK).into(),
        };
        let deadline = Instant::now() + PATIENCE;
        let fetch = self.cache.fetch(vec![one], Located::default(), deadline);
        fetch.await.map(drop)
    }

    /// Every call there is, one after the other.
    async fn ask_everything(&self) -> Vec<(&'static str, Result<(), Error>)> {
        let (cache, keys) = (&self.cache, [block(1, 0).key]);
        let deadline = Instant::now() + PATIENCE;
        vec![
            ("store", self.store().await),
            ("fetch", self.fetch().await),
            ("lookup", cache.lookup(&keys).await.map(drop)),
            (
                "locate",
                cache.locate(&[block(1, 0)], deadline).await.map(drop),
            ),
            ("stats", cache.stats().await.map(drop)),
            ("pin", cache.pin(&keys, PATIENCE).await.map(drop)),
            ("release", cache.release(PinId(1)).await),
            ("remove", cache.remove(&keys).await.map(drop)),
            ("clear", cache.clear().await.map(drop)),
            ("flush", cache.flush(deadline).await),
            ("shutdown", cache.shutdown(deadline).await),
        ]
    }
}

fn check_fault(what: &str, answer: Result<(), Error>) {
    let error = answer.expect_err(what);
    assert_eq!(error.kind(), ErrorKind::Internal, "{what}: {error}");
}

/// It breaks at the first block that is sealed, while a store, a pin of that block and a fetch wait; and before it has
/// looked at what was asked next.
#[tokio::test]
async fn after_a_fault_of_its_own_every_waiter_and_every_call_hears_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let is_stored = |event: &NodeEvent| matches!(event, NodeEvent::Stored { .. });
    let fragile = Fragile::open(directory.path(), Box::new(is_stored)).await;
    let keys: [BlockKey; 1] = [block(1, 0).key];
    let (store, pin, fetch) = tokio::join!(
        fragile.store(),
        fragile.cache.pin(&keys, PATIENCE),
        fragile.fetch(),
    );
    check_fault("store", store);
    check_fault("pin", pin.map(drop));
    check_fault("fetch", fetch);
    // For a peer this node is as good as gone.
    let address = fragile.cache.peer_address().unwrap().to_string();
    let service = PeerService::connect(&address).unwrap();
    let located = service.locate(Bytes::from_static(b"one"), PATIENCE).await;
    assert_eq!(located.unwrap_err().kind(), ErrorKind::PeerLost);
    let unpinned = service.unpin(PinId(1), &IDENTITY, PATIENCE).await;
    assert_eq!(unpinned.unwrap_err().kind(), ErrorKind::PeerLost);
    for (what, answer) in fragile.ask_everything().await {
        check_fault(what, answer);
    }
}

/// It breaks in the middle of a shutdown, at a block that has gone down; and at the last event of all.
#[tokio::test]
async fn a_fault_in_a_shutdown_is_no_shutdown() {
    let is_down = |event: &NodeEvent| {
        let NodeEvent::Stored { tier, .. } = event else {
            return false;
        };
        *tier == Tier::Disk
    };
    let told = AtomicUsize::new(0);
    // The first withdrawal is at the start.
    let is_last = move |event: &NodeEvent| {
        *event == NodeEvent::Cleared && told.fetch_add(1, Ordering::Relaxed) == 1
    };
    let breaks: [Break; 2] = [Box::new(is_down), Box::new(is_last)];
    for breaks_at in breaks {
        let directory = tempfile::tempdir().unwrap();
        let fragile = Fragile::open(directory.path(), breaks_at).await;
        fragile.store().await.unwrap();
        let deadline = Instant::now() + PATIENCE;
        check_fault("shutdown", fragile.cache.shutdown(deadline).await);
        check_fault("lookup", fragile.cache.lookup(&[]).await.map(drop));
        check_fault("shutdown again", fragile.cache.shutdown(deadline).await);
    }
}
