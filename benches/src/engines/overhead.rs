//! What a call to a node costs from Rust: a store and a fetch of blocks in host memory.
//!
//! `overhead.c` and `overhead.py` in `benches/engines` do the same work, call by call.

use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::transfer::{HostMemory, RegionOptions};
use kvfabric::{AttachedNode, Located, Namespace, NodeConfig, Pages, Segment};

use super::external::Figure;
use crate::statistics::Samples;

const BLOCK_BYTES: u64 = 4096;
const BLOCK_TOKENS: usize = 16;
const CALLS: u32 = 2000;
const WARM_UP_CALLS: u32 = 200;
const BATCHES: [u32; 2] = [1, 64];
/// Calls of different batch sizes never share a prompt.
const PROMPTS_MAX: u32 = 1_000_000;
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

/// One round: the medians of all calls.
pub(super) fn measure() -> Result<Vec<Figure>> {
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
    let mut figures = Vec::new();
    for batch in BATCHES {
        let [stores, fetches] = calls(&node, &pages, batch)?;
        figures.extend(figure("store", batch, &stores));
        figures.extend(figure("fetch", batch, &fetches));
    }
    finished(node.shutdown(PATIENCE).wait(PATIENCE))?;
    Ok(figures)
}

/// Times of stores and of fetches of `batch` blocks a call.
fn calls(node: &AttachedNode, pages: &Pages, batch: u32) -> Result<[Samples; 2]> {
    let blocks: Vec<u32> = (0..batch).collect();
    let [mut stores, mut fetches] = [Samples::default(), Samples::default()];
    for call in 0..WARM_UP_CALLS + CALLS {
        // A prompt that no other call has, so that every store is one.
        let token = batch * PROMPTS_MAX + call;
        let mut prefix = node.node().prefix(&Namespace::default())?;
        prefix.extend(&vec![token; batch as usize * BLOCK_TOKENS])?;
        let begin = Instant::now();
        let storing = node.store(&prefix, 0, pages, &blocks, PATIENCE)?;
        let stored = finished(storing.wait(PATIENCE))?.stored;
        let between = Instant::now();
        let fetching = node.fetch(&prefix, 0, pages, &blocks, Located::default(), PATIENCE)?;
        let depth = finished(fetching.wait(PATIENCE))?.depth();
        let end = Instant::now();
        assert_eq!((stored, depth), (batch, blocks.len()), "blocks were lost");
        if call >= WARM_UP_CALLS {
            stores.push_us(between - begin);
            fetches.push_us(end - between);
        }
    }
    Ok([stores, fetches])
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
