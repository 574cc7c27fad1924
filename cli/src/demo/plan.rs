//! What a demo will do, decided before anything is started: the workload, the sizes, the expected hits.

use std::path::Path;

use kvcache_core::shape::{self, TokensPerBlock};
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::infinite::{Accesses, InfiniteCache};
use kvfabric_sim::report::RunConfig;
use kvfabric_sim::router::Policy;
use kvfabric_sim::workload::trace::Trace;
use kvfabric_sim::workload::{self, REQUESTS_DEFAULT, Request, TRACE_BLOCK_TOKENS, Workload};

use super::args::{DemoArgs, RouterKind, WorkloadKind};

/// Bytes of a block unless the options say otherwise.
const BLOCK_BYTES_DEFAULT: u64 = 32 << 10;

/// Layers of a block whose size was given in bytes: as many as divide it, up to this.
const LAYERS_MAX: u64 = 4;

/// NVMe space comes back in so many pieces.
const DISK_SEGMENTS: u64 = 12;

/// What a block's record takes on disk beside its bytes, at most: header and alignment.
const DISK_RECORD_BYTES: u64 = 2 * 4096;

/// Everything about one run that the router decides on.
pub(crate) struct Plan {
    pub(crate) requests: Vec<Request>,
    /// What a cache without limits would hit.
    pub(crate) infinite: Accesses,
    pub(crate) block_tokens: u32,
    pub(crate) block_bytes: u64,
    pub(crate) layers: u32,
    pub(crate) hbm_bytes: u64,
    pub(crate) dram_bytes: u64,
    /// The NVMe tier and its segments; none when switched off.
    pub(crate) nvme: Option<Nvme>,
    pub(crate) concurrency: u32,
    /// Whether requests wait for their own times.
    pub(crate) paced: bool,
    /// As it goes into the report.
    pub(crate) config: RunConfig,
}

/// Sizes of the NVMe tier.
#[derive(Clone, Copy)]
pub(crate) struct Nvme {
    pub(crate) bytes: u64,
    pub(crate) segment_bytes: u64,
}

impl Plan {
    /// Reads the trace or makes the workload, and checks that it fits.
    ///
    /// # Errors
    /// Whatever is wrong with the options or the trace, by name.
    pub(crate) fn new(args: &DemoArgs) -> Result<Self> {
        let (name, block_tokens, requests) = requests(args)?;
        if requests.is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{name} has no requests"),
            ));
        }
        let mut cache = InfiniteCache::new(block_tokens);
        for request in &requests {
            cache.observe(request);
        }
        let (block_bytes, layers) = block_geometry(args, block_tokens)?;
        let concurrency = if args.unbounded { 1 } else { args.concurrency };
        let (hbm_bytes, dram_bytes) =
            memory(args, &requests, cache.blocks(), block_tokens, block_bytes)?;
        let nvme = (!args.unbounded && args.nvme_bytes > 0).then(|| Nvme {
            bytes: args.nvme_bytes,
            segment_bytes: (args.nvme_bytes / DISK_SEGMENTS)
                .max(2 * (block_bytes + DISK_RECORD_BYTES))
                .min(args.nvme_bytes),
        });
        let config = RunConfig {
            workload: name,
            router: policy(args.router).name().to_owned(),
            transport: args.transport.name().to_owned(),
            prefill_pods: args.pods.prefill,
            decode_pods: args.pods.decode,
            block_tokens,
            block_bytes,
            hbm_bytes,
            dram_bytes,
            nvme_bytes: nvme.map_or(0, |nvme| nvme.bytes),
            object: None,
            concurrency,
            unbounded: args.unbounded,
        };
        Ok(Self {
            requests,
            infinite: cache.total(),
            block_tokens,
            block_bytes,
            layers,
            hbm_bytes,
            dram_bytes,
            nvme,
            concurrency,
            paced: args.paced,
            config,
        })
    }
}

/// Bytes of the HBM and DRAM tiers, large enough for the largest request.
fn memory(
    args: &DemoArgs,
    requests: &[Request],
    prompt_blocks: usize,
    block_tokens: u32,
    block_bytes: u64,
) -> Result<(u64, u64)> {
    let largest = requests
        .iter()
        .map(|r| blocks_of(r, block_tokens))
        .max()
        .unwrap_or(0) as u64;
    if args.unbounded {
        // Room for every block of the workload, answers included, and for one request more while blocks are on their
        // way between two slots. Memory is only taken when it is written.
        let answers = requests
            .iter()
            .map(|r| r.output_blocks(block_tokens) as u64)
            .sum::<u64>();
        let room = (prompt_blocks as u64 + answers + largest + 1) * block_bytes;
        return Ok((room, room));
    }
    let needed = largest * block_bytes;
    if args.hbm_bytes < needed {
        let (hbm_bytes, text) = (args.hbm_bytes, "but the largest request has");
        let text = format!(
            "--hbm-bytes is {hbm_bytes}, {text} {largest} blocks of {block_bytes} bytes: {needed}"
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok((args.hbm_bytes, args.dram_bytes))
}

/// The policy that the command line names.
pub(crate) const fn policy(kind: RouterKind) -> Policy {
    match kind {
        RouterKind::Prefix => Policy::Prefix,
        RouterKind::RoundRobin => Policy::RoundRobin,
        RouterKind::Random => Policy::Random,
        RouterKind::Load => Policy::Load,
    }
}

/// All blocks of a request, prompt and answer.
fn blocks_of(request: &Request, block_tokens: u32) -> usize {
    request.prompt_blocks(block_tokens) + request.output_blocks(block_tokens)
}

/// The workload's name, its block size and its requests.
fn requests(args: &DemoArgs) -> Result<(String, u32, Vec<Request>)> {
    let limit = args.max_requests.unwrap_or(usize::MAX);
    if let Some(path) = &args.trace {
        let trace = Trace::load(path)?;
        let requests = trace.into_requests().take(limit).collect();
        return Ok((file_name(path), TRACE_BLOCK_TOKENS, requests));
    }
    let kind = match args.workload {
        WorkloadKind::Chat => workload::WorkloadKind::Chat,
        WorkloadKind::Agent => workload::WorkloadKind::Agent,
        WorkloadKind::Rag => workload::WorkloadKind::Rag,
    };
    if args.block_tokens == 0 {
        return Err(Error::invalid("--block-tokens", args.block_tokens, 1..));
    }
    let count = u32::try_from(limit)
        .unwrap_or(REQUESTS_DEFAULT)
        .min(REQUESTS_DEFAULT);
    // A larger --max-requests asks for a longer workload.
    let count = args
        .max_requests
        .map_or(count, |n| u32::try_from(n).unwrap_or(u32::MAX));
    let mut workload = Workload::new(kind, args.seed, count);
    for (name, value) in &args.setting {
        workload
            .set(name, value)
            .map_err(|error| error.at("--setting"))?;
    }
    let requests = workload
        .requests()
        .map_err(|error| error.at("--setting"))?
        .collect();
    Ok((kind.name().to_owned(), args.block_tokens, requests))
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |n| n.to_string_lossy().into(),
    )
}

/// Bytes and layers of a block.
fn block_geometry(args: &DemoArgs, block_tokens: u32) -> Result<(u64, u32)> {
    if let Some(name) = &args.model {
        let model = shape::model(name)?;
        let tokens = TokensPerBlock::try_from(block_tokens)?;
        return Ok((model.block_bytes(tokens), model.layers()));
    }
    let bytes = args.block_bytes.unwrap_or(BLOCK_BYTES_DEFAULT);
    if bytes == 0 {
        return Err(Error::invalid("--block-bytes", bytes, 1..));
    }
    let layers = (1..=LAYERS_MAX)
        .rev()
        .find(|n| bytes.is_multiple_of(*n))
        .unwrap_or(1);
    Ok((bytes, u32::try_from(layers).unwrap_or(1)))
}
