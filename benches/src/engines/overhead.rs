//! What a call to a node costs from Rust: a store and a fetch of blocks in host memory.
//!
//! `overhead.c` and `overhead.py` in `benches/engines` do the same work, call by call, each in a process and with a node of
//! its own. All three wait in the same way, on the condition variable of the node's operation.

use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::transfer::{HostMemory, Region, RegionOptions};
use kvfabric::{AttachedNode, Located, Namespace, NodeConfig, Pages, Segment};

use super::external::Figure;
use crate::statistics::Samples;

const BLOCK_BYTES: u64 = 4096;
const BLOCK_TOKENS: usize = 16;
/// Calls of each kind that are measured in one go: the three callers take turns, and a disturbance lasts for many turns.
const CALLS: u32 = 50;
/// Calls before them, which find in no cache what the other callers have replaced.
const WARM_UP_CALLS: u32 = 10;
const BATCHES: [u32; 2] = [1, 64];
const PATIENCE: Duration = Duration::from_secs(30);

const CONFIG: &str = r#"
    pod = "overhead"
    model = "overhead"
    model_identity = "0000000000000000000000000000000000000000000000000000000000000000"
    block_bytes = 4096
    block_tokens = 16
    peer_listen = "off"

    [host]
    bytes = 67108864

    [fabric]
    tcp_listen = "off"
"#;

/// A caller in Rust, with a node of its own.
pub(super) struct Calls {
    node: AttachedNode,
    pages: Pages,
    /// The pages' memory.
    _region: Region,
    /// Prompts that no call has had yet.
    next: u32,
}

impl Calls {
    /// Opens the node.
    pub(super) fn open() -> Result<Self> {
        let node = AttachedNode::open(NodeConfig::from_toml(CONFIG, &[])?)?;
        let blocks = BATCHES[BATCHES.len() - 1];
        let memory = HostMemory::anonymous(u64::from(blocks) * BLOCK_BYTES)?;
        let agent = node.node().agent();
        let region = agent.register(memory, RegionOptions::default())?;
        let segment = Segment {
            region: region.id(),
            offset: 0,
            stride: BLOCK_BYTES,
            len: BLOCK_BYTES,
        };
        let pages = Pages::new(agent, vec![segment], blocks)?;
        Ok(Self {
            node,
            pages,
            _region: region,
            next: 0,
        })
    }

    /// The medians of some calls of each kind.
    pub(super) fn measure(&mut self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for batch in BATCHES {
            let [stores, fetches] = self.calls(batch)?;
            figures.extend(figure("store", batch, &stores));
            figures.extend(figure("fetch", batch, &fetches));
        }
        Ok(figures)
    }

    /// Times of stores and of fetches of `batch` blocks a call.
    fn calls(&mut self, batch: u32) -> Result<[Samples; 2]> {
        let blocks: Vec<u32> = (0..batch).collect();
        let [mut stores, mut fetches] = [Samples::default(), Samples::default()];
        let (node, pages) = (&self.node, &self.pages);
        for call in 0..WARM_UP_CALLS + CALLS {
            // A prompt that no other call has, so that every store is one.
            let mut prefix = node.node().prefix(&Namespace::default())?;
            prefix.extend(&vec![self.next; batch as usize * BLOCK_TOKENS])?;
            self.next += 1;
            let begin = Instant::now();
            let storing = node.store(&prefix, 0, pages, &blocks, PATIENCE)?;
            let stored = finished(storing.wait(PATIENCE))?.stored;
            drop(storing);
            let between = Instant::now();
            let fetching = node.fetch(&prefix, 0, pages, &blocks, Located::default(), PATIENCE)?;
            let depth = finished(fetching.wait(PATIENCE))?.depth();
            drop(fetching);
            let end = Instant::now();
            assert_eq!((stored, depth), (batch, blocks.len()), "blocks were lost");
            if call >= WARM_UP_CALLS {
                stores.push_us(between - begin);
                fetches.push_us(end - between);
            }
        }
        Ok([stores, fetches])
    }

    /// Ends the node.
    pub(super) fn end(self) -> Result<()> {
        finished(self.node.shutdown(PATIENCE).wait(PATIENCE)).copied()
    }
}

fn finished<T>(outcome: Option<Result<T>>) -> Result<T> {
    outcome.unwrap_or_else(|| Err(Error::new(ErrorKind::Timeout, "a call to the node")))
}

fn figure(name: &str, batch: u32, samples: &Samples) -> Option<Figure> {
    Some(Figure {
        subject: "rust".to_owned(),
        case: format!("{name}-{batch}"),
        metric: "us_per_call".to_owned(),
        unit: "µs".to_owned(),
        samples: vec![samples.summary()?.median],
    })
}
