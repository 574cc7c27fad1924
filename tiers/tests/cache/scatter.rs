//! Blocks in several pieces: stored from one layout, fetched into another, byte for byte through every tier.

use std::path::Path;
use std::time::{Duration, Instant};

use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, ErrorKind, Tier};
use kvfabric_tiers::{FetchBlock, Pages, Segment, Source, StoreBlock};
use kvfabric_transfer::backend::sim::{ExchangeConfig, LinkProfile, SimNetwork};
use kvfabric_transfer::{Agent, HostMemory, Region, RegionOptions};

use crate::support::*;

/// What is in an engine's memory where no block is.
const GUARD: u8 = 0xa5;

/// Blocks of each engine.
const BLOCKS: u32 = 12;

/// In one piece; in three; in five of other sizes, from one byte on. Each makes up a block.
const LAYOUTS: [&[u64]; 3] = [&[BLOCK], &[1700, 300, 3000], &[1, 999, 2048, 4, 1948]];

/// An engine's memory: one piece of every block a layer, one layer after the other, in two regions by turns.
struct Engine {
    regions: [Region; 2],
    segments: Vec<(usize, Segment)>,
    pages: Pages,
}

impl Engine {
    fn new(agent: &Agent, lens: &[u64]) -> Self {
        assert_eq!(lens.iter().sum::<u64>(), BLOCK);
        let bytes = BLOCK * u64::from(BLOCKS) * 2;
        let regions = [(); 2].map(|()| {
            let memory = HostMemory::anonymous(bytes).unwrap();
            agent.register(memory, RegionOptions::default()).unwrap()
        });
        let mut starts = [7, 64];
        let segments: Vec<_> = (0..)
            .zip(lens)
            .map(|(layer, &len)| {
                let which = layer % 2;
                // A gap after each block's piece, so that what is written too far shows.
                let stride = len + 3 + layer as u64;
                let segment = Segment {
                    region: regions[which].id(),
                    offset: starts[which],
                    stride,
                    len,
                };
                starts[which] += stride * u64::from(BLOCKS);
                (which, segment)
            })
            .collect();
        let all = segments.iter().map(|(_, segment)| *segment).collect();
        let pages = Pages::new(agent, all, BLOCKS).unwrap();
        let engine = Self {
            regions,
            segments,
            pages,
        };
        engine.wipe();
        engine
    }

    fn wipe(&self) {
        for region in &self.regions {
            region.fill_at(0, region.bytes(), GUARD).unwrap();
        }
    }

    /// Each piece of a block: its region, its place there, and its place in the block.
    fn pieces(&self, number: u32) -> impl Iterator<Item = (&Region, u64, std::ops::Range<usize>)> {
        let mut done = 0;
        self.segments.iter().map(move |(which, segment)| {
            let start = done;
            done += segment.len as usize;
            let offset = segment.offset + u64::from(number) * segment.stride;
            (&self.regions[*which], offset, start..done)
        })
    }

    fn put(&self, number: u32, bytes: &[u8]) {
        for (region, offset, range) in self.pieces(number) {
            region.write_at(offset, &bytes[range]).unwrap();
        }
    }

    /// Takes a block out, leaving guard bytes behind.
    fn take(&self, number: u32) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        for (region, offset, range) in self.pieces(number) {
            let len = range.len() as u64;
            region.read_at(offset, &mut bytes[range]).unwrap();
            region.fill_at(offset, len, GUARD).unwrap();
        }
        bytes
    }

    /// Whether nothing but blocks was written to, once they were taken out.
    fn is_wiped(&self) -> bool {
        self.regions.iter().all(|region| {
            let mut bytes = vec![0; region.bytes() as usize];
            region.read_at(0, &mut bytes).unwrap();
            bytes.iter().all(|byte| *byte == GUARD)
        })
    }

    /// Stores blocks from the engine's last ones on, downwards, so that numbers and positions differ.
    async fn store(&self, node: &Node, blocks: &[BlockInfo]) {
        for batch in blocks.chunks(4) {
            let placed = (0..).zip(batch).map(|(at, info)| {
                let number = BLOCKS - 1 - at;
                self.put(number, &bytes_of(info));
                StoreBlock {
                    info: *info,
                    memory: self.pages.block(number).unwrap(),
                }
            });
            let placed: Vec<_> = placed.collect();
            let deadline = Instant::now() + PATIENCE;
            let report = node.cache.store(placed, deadline).await.unwrap();
            assert_eq!(report.stored as usize, batch.len(), "{report:?}");
        }
    }

    /// Fetches blocks into the engine's first ones and compares every byte of what is said to be there, and around it.
    async fn fetch(&self, node: &Node, blocks: &[BlockInfo], hints: Located) -> Vec<Source> {
        self.wipe();
        let placed = (0..).zip(blocks).map(|(number, info)| FetchBlock {
            info: *info,
            memory: self.pages.block(number).unwrap(),
        });
        let placed: Vec<_> = placed.collect();
        let deadline = Instant::now() + PATIENCE;
        let mut report = node.cache.fetch(placed, hints, deadline).await.unwrap();
        assert!(report.drained().await);
        let depth = report.depth();
        for (number, info) in (0..).zip(blocks) {
            let found = self.take(number);
            if (number as usize) < depth {
                assert!(found == bytes_of(info), "wrong bytes of block {number}");
            }
        }
        assert!(self.is_wiped(), "bytes outside the blocks were written");
        report.sources
    }
}

/// Every layout as the source of every layout, within host memory.
#[tokio::test]
async fn blocks_move_between_any_two_layouts_through_host_memory() {
    let node = Node::open(config("pod", 64), agent("pod", Way::Memcpy, None)).await;
    for (number, from) in (1..).zip(LAYOUTS) {
        let blocks = chain(number, 7);
        Engine::new(&node.agent, from).store(&node, &blocks).await;
        for to in LAYOUTS {
            let engine = Engine::new(&node.agent, to);
            let sources = engine.fetch(&node, &blocks, Located::default()).await;
            assert_eq!(sources, vec![Source::Host; 7], "{from:?} to {to:?}");
        }
    }
    assert_eq!(node.stat("corrupt_blocks").await, 0);
}

/// Twelve blocks through four slots of host memory, so that most come back from below.
async fn through_a_lower_tier(node: &Node, below: &Source, tier: Tier) {
    for (number, from) in (1..).zip(LAYOUTS) {
        let blocks = chain(number, 12);
        Engine::new(&node.agent, from).store(node, &blocks).await;
        node.sink.until_stored(&blocks[..8], tier).await;
        for to in LAYOUTS {
            let engine = Engine::new(&node.agent, to);
            let sources = engine.fetch(node, &blocks, Located::default()).await;
            assert_eq!(count(&sources, &Source::Miss), 0, "{from:?} to {to:?}");
            assert!(count(&sources, below) >= 8, "{sources:?}");
        }
    }
    assert_eq!(node.stat("corrupt_blocks").await, 0);
}

/// Records on disk are contiguous, whatever the layouts on both sides.
#[tokio::test]
async fn blocks_move_between_any_two_layouts_through_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 12);
    let node = Node::open(config, agent("pod", Way::Memcpy, None)).await;
    through_a_lower_tier(&node, &Source::Disk, Tier::Disk).await;
}

/// So are objects.
#[tokio::test]
async fn blocks_move_between_any_two_layouts_through_the_object_store() {
    let store = tempfile::tempdir().unwrap();
    let mut config = config("pod", 4);
    config.object = cold();
    let node = Node::open(config, agent("pod", Way::Memcpy, Some(store.path()))).await;
    through_a_lower_tier(&node, &Source::Object, Tier::Object).await;
}

/// Holder and reader have different layouts; over every way between them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_move_between_any_two_layouts_from_a_peer() {
    for way in [Way::Memcpy, Way::Shm, Way::Tcp] {
        let holder = Node::open(config("holder", 32), agent("holder", way, None)).await;
        let reader = Node::open(config("reader", 4), agent("reader", way, None)).await;
        let held = Source::Peer {
            pod: holder.pod.clone(),
            tier: Tier::Host,
        };
        for (number, from) in (1..).zip(LAYOUTS) {
            let blocks = chain(number, 6);
            Engine::new(&holder.agent, from)
                .store(&holder, &blocks)
                .await;
            for to in LAYOUTS {
                let engine = Engine::new(&reader.agent, to);
                let sources = engine.fetch(&reader, &blocks, holder.hints(6)).await;
                assert_eq!(
                    sources,
                    vec![held.clone(); 6],
                    "{way:?}: {from:?} to {to:?}"
                );
            }
        }
        assert_eq!(reader.stat("corrupt_blocks").await, 0);
    }
}

/// Flips the byte at `offset` of the payload of a block, wherever below `directory` it is; how many places that were.
fn flip_in(directory: &Path, info: &BlockInfo, offset: usize) -> usize {
    let wanted = bytes_of(info);
    let mut found = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found += flip_in(&path, info, offset);
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let at = bytes
            .windows(wanted.len())
            .position(|window| window == wanted);
        if let Some(at) = at {
            flip(&path, (at + offset) as u64);
            found += 1;
        }
    }
    found
}

/// One byte in the last piece, in a record and in an object: that block alone is a miss.
#[tokio::test]
async fn a_flipped_byte_of_any_piece_is_found() {
    for tier in [Tier::Disk, Tier::Object] {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config("pod", 4);
        let agent = agent("pod", Way::Memcpy, Some(directory.path()));
        if tier == Tier::Disk {
            config.disk = disk(directory.path(), 8);
        } else {
            config.object = cold();
        }
        let node = Node::open(config, agent).await;
        let blocks = chain(1, 12);
        let engine = Engine::new(&node.agent, LAYOUTS[1]);
        engine.store(&node, &blocks).await;
        node.sink.until_stored(&blocks[..8], tier).await;
        for (number, offset) in [(2, 0), (4, 1700), (6, BLOCK as usize - 1)] {
            assert_eq!(flip_in(directory.path(), &blocks[number], offset), 1);
        }
        let sources = engine.fetch(&node, &blocks, Located::default()).await;
        assert_eq!(count(&sources[..2], &Source::Miss), 0, "{sources:?}");
        assert_eq!(sources[2], Source::Miss);
        for number in [3, 4, 5, 6, 7] {
            let one = engine.fetch(&node, &blocks[number..=number], Located::default());
            let is_bad = [4, 6].contains(&number);
            assert_eq!(
                one.await == [Source::Miss],
                is_bad,
                "block {number} of {tier}"
            );
        }
        assert_eq!(node.stat("corrupt_blocks").await, 3);
    }
}

/// Blocks of another size, pages of another agent, and memory that was deregistered: refused before anything moves.
#[tokio::test]
async fn pages_that_do_not_fit_are_refused_by_name() {
    let node = Node::open(config("pod", 8), agent("pod", Way::Memcpy, None)).await;
    let other = agent("other", Way::Memcpy, None);
    let good = Engine::new(&node.agent, LAYOUTS[1]);
    let foreign = Engine::new(&other, LAYOUTS[1]);
    let mut segments: Vec<_> = good.segments.iter().map(|(_, segment)| *segment).collect();
    segments[2].len -= 1;
    let small = Pages::new(&node.agent, segments, BLOCKS).unwrap();
    let gone = Engine::new(&node.agent, LAYOUTS[2]);
    gone.regions[1].deregister().await;
    for (pages, reason) in [
        (&small, "bytes of memory is 4999"),
        (&foreign.pages, "region"),
        (&gone.pages, "region"),
    ] {
        let place = |pages: &Pages, number| StoreBlock {
            info: block(1, number),
            memory: pages.block(number.into()).unwrap(),
        };
        let blocks = vec![place(&good.pages, 0), place(pages, 1)];
        let stored = node.cache.store(blocks, Instant::now() + PATIENCE).await;
        let error = stored.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let text = error.to_string();
        assert!(text.contains("block 1") && text.contains(reason), "{error}");
    }
    assert_eq!(node.stat("stored").await, 0);
}

/// The holder is gone between the lease and the last byte, and the reader's blocks are scattered: they are misses, lent out
/// until the read has drained, and nothing is written afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_killed_mid_read_leaves_scattered_memory_lent_until_it_drains() {
    let network = SimNetwork::new(7, ExchangeConfig::over(LinkProfile::perfect())).unwrap();
    let on_network = |name: &str| {
        let builder = Agent::builder(name).memcpy(false).shm(false);
        builder.simulated(&network).build().unwrap()
    };
    let holder = Node::open(config("holder", 16), on_network("holder")).await;
    let reader = Node::open(config("reader", 16), on_network("reader")).await;
    let blocks = chain(1, 6);
    holder.store(&blocks).await;
    network.pause();
    let engine = Engine::new(&reader.agent, LAYOUTS[2]);
    let placed = (0..).zip(&blocks).map(|(number, info)| FetchBlock {
        info: *info,
        memory: engine.pages.block(number).unwrap(),
    });
    let deadline = Instant::now() + Duration::from_secs(2);
    let fetch = reader
        .cache
        .fetch(placed.collect(), holder.hints(6), deadline);
    let killed = async {
        while holder.stat("leases_granted").await == 0 {
            tokio::task::yield_now().await;
        }
        tokio::task::spawn_blocking(move || drop(holder))
            .await
            .unwrap();
    };
    let (report, ()) = tokio::join!(fetch, killed);
    let mut report = report.unwrap();
    assert_eq!(report.sources, vec![Source::Miss; 6]);
    network.resume();
    assert!(
        tokio::time::timeout(PATIENCE, report.drained())
            .await
            .unwrap()
    );
    engine.wipe();
    // Whatever still wrote would write before its agent has ended.
    reader.shutdown().await;
    assert!(engine.is_wiped(), "written to after it was given back");
}

/// The engine takes one of its two regions back between the call and the copies, from host memory, disk and objects: no
/// good copy is blamed for it.
#[tokio::test]
async fn a_region_deregistered_during_a_scattered_fetch_costs_no_copy() {
    let (directory, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut config = config("pod", 4);
    config.disk = disk(directory.path(), 2);
    config.object = cold();
    let node = Node::open(config, agent("pod", Way::Memcpy, Some(store.path()))).await;
    let blocks = chain(1, 12);
    Engine::new(&node.agent, LAYOUTS[1])
        .store(&node, &blocks)
        .await;
    let in_objects = |events: &Vec<_>| {
        let of = blocks.iter();
        of.filter(|info| stored(events, info, Tier::Object)).count() >= 4
    };
    node.sink.until(in_objects).await;
    let whole = Engine::new(&node.agent, LAYOUTS[2]);
    let before = whole.fetch(&node, &blocks, Located::default()).await;
    for source in [Source::Host, Source::Disk, Source::Object] {
        assert!(count(&before, &source) > 0, "{before:?}");
    }
    for info in &blocks {
        let engine = Engine::new(&node.agent, LAYOUTS[2]);
        *node.guide.closes.lock().unwrap() = Some(engine.regions[1].clone());
        // The second is nowhere, so that the directory is asked.
        let wanted = [*info, block(9, 0)].into_iter().zip(0..);
        let wanted = wanted.map(|(info, number)| FetchBlock {
            info,
            memory: engine.pages.block(number).unwrap(),
        });
        let deadline = Instant::now() + PATIENCE;
        let fetch = node
            .cache
            .fetch(wanted.collect(), Located::default(), deadline);
        assert_eq!(fetch.await.unwrap().sources, vec![Source::Miss; 2]);
    }
    assert_eq!(node.stat("corrupt").await, 0);
    assert_eq!(node.stat("corrupt_blocks").await, 0);
    let after = whole.fetch(&node, &blocks, Located::default()).await;
    assert_eq!(count(&after, &Source::Miss), 0, "{after:?}");
}
