//! What a call to a node costs from Rust: a store and a fetch of blocks in host memory.
//!
//! `overhead.c` and `overhead.py` in `benches/engines` do the same work, call by call, each in a process and with a node of
//! its own. All three wait in the same way, on the condition variable of the node's operation. Three figures are told:
//!
//! - `us_per_call`: from handing the blocks over until the report is read and the operation let go of. Most of it passes in
//!   the node's threads, and in waking them and the caller.
//! - `own_us_per_call`: of that, what the caller's thread does itself: handing over; and, once the operation is over, a wait
//!   that finds it so, reading and letting go. Calls of their own are measured for it, with one more wait between.
//! - `cpu_us_per_call`: CPU time of the whole process meanwhile.

use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::transfer::{HostMemory, Region, RegionOptions};
use kvfabric::{
    AttachedNode, Fetched, Located, Namespace, NodeConfig, Operation, Pages, Prefix, Segment,
    StoreReport,
};

use super::external::Figure;
use crate::clock::process_cpu;
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

/// Measures each time that a line is read from the standard input, until its end: see [`super::external::Conversation`].
///
/// # Errors
/// Whatever the node says, and `Io` when the other side is gone.
pub(crate) fn answer_questions() -> Result<()> {
    let mut caller = Caller::open()?;
    let failed = |error| Error::io("talk to kv-bench", error);
    for question in std::io::stdin().lock().lines() {
        question.map_err(failed)?;
        let mut answer = Vec::new();
        for figure in caller.measure()? {
            serde_json::to_writer(&mut answer, &figure).map_err(|error| failed(error.into()))?;
            answer.push(b'\n');
        }
        answer.push(b'\n');
        let mut output = std::io::stdout().lock();
        output.write_all(&answer).map_err(failed)?;
        output.flush().map_err(failed)?;
    }
    finished(caller.node.shutdown(PATIENCE).wait(PATIENCE)).copied()
}

/// A caller in Rust, with a node of its own.
struct Caller {
    node: AttachedNode,
    pages: Pages,
    /// The pages' memory.
    _region: Region,
    /// Prompts that no call has had yet.
    next: u32,
}

/// What of a call is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    Whole,
    Own,
}

/// The times of one kind of calls.
#[derive(Default)]
struct Times {
    whole: Samples,
    own: Samples,
    cpu: Samples,
}

impl Times {
    /// Makes a call and adds its times.
    fn call<T, R>(
        &mut self,
        measure: Measure,
        begin: impl FnOnce() -> Result<Operation<T>>,
        read: impl FnOnce(&T) -> R,
    ) -> Result<R> {
        let cpu = process_cpu();
        let start = Instant::now();
        let operation = begin()?;
        let begun = Instant::now();
        let mut over = begun;
        if measure == Measure::Own {
            finished(operation.wait(PATIENCE))?;
            over = Instant::now();
        }
        let told = read(finished(operation.wait(PATIENCE))?);
        drop(operation);
        let end = Instant::now();
        match measure {
            Measure::Own => self.own.push_us((begun - start) + (end - over)),
            Measure::Whole => {
                self.whole.push_us(end - start);
                self.cpu.push_us(process_cpu() - cpu);
            }
        }
        Ok(told)
    }

    fn figures(&self, case: &str) -> impl Iterator<Item = Figure> {
        let metrics = [
            ("us_per_call", &self.whole),
            ("own_us_per_call", &self.own),
            ("cpu_us_per_call", &self.cpu),
        ];
        metrics.into_iter().filter_map(move |(metric, samples)| {
            Some(Figure {
                subject: "rust".to_owned(),
                case: case.to_owned(),
                metric: metric.to_owned(),
                unit: "µs".to_owned(),
                samples: vec![samples.summary()?.median],
            })
        })
    }
}

impl Caller {
    /// Opens the node.
    fn open() -> Result<Self> {
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
    fn measure(&mut self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for batch in BATCHES {
            let [stores, fetches] = self.calls(batch)?;
            figures.extend(stores.figures(&format!("store-{batch}")));
            figures.extend(fetches.figures(&format!("fetch-{batch}")));
        }
        Ok(figures)
    }

    /// Times of stores and of fetches of `batch` blocks a call.
    fn calls(&mut self, batch: u32) -> Result<[Times; 2]> {
        let blocks: Vec<u32> = (0..batch).collect();
        for _ in 0..WARM_UP_CALLS {
            self.store_and_fetch(&blocks, Measure::Whole, &mut Default::default())?;
        }
        let mut times = <[Times; 2]>::default();
        for _ in 0..CALLS {
            for measure in [Measure::Whole, Measure::Own] {
                self.store_and_fetch(&blocks, measure, &mut times)?;
            }
        }
        Ok(times)
    }

    /// A store of a prompt that no other call has, so that it is one, and a fetch of it.
    fn store_and_fetch(
        &mut self,
        blocks: &[u32],
        measure: Measure,
        [stores, fetches]: &mut [Times; 2],
    ) -> Result<()> {
        let (node, pages) = (&self.node, &self.pages);
        let mut prefix: Prefix = node.node().prefix(&Namespace::default())?;
        prefix.extend(&vec![self.next; blocks.len() * BLOCK_TOKENS])?;
        self.next += 1;
        let store = || node.store(&prefix, 0, pages, blocks, PATIENCE);
        let stored = stores.call(measure, store, |report: &StoreReport| report.stored)?;
        let fetch = || node.fetch(&prefix, 0, pages, blocks, Located::default(), PATIENCE);
        let depth = fetches.call(measure, fetch, Fetched::depth)?;
        assert_eq!(
            (stored as usize, depth),
            (blocks.len(), blocks.len()),
            "blocks were lost"
        );
        Ok(())
    }
}

fn finished<T>(outcome: Option<Result<T>>) -> Result<T> {
    outcome.unwrap_or_else(|| Err(Error::new(ErrorKind::Timeout, "a call to the node")))
}
