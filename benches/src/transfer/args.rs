//! What can be asked of `kv-bench transfer`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::DirectMode;

use crate::recorder::OutputArgs;
use crate::sizes::{Sizes, parse_bytes, parse_sizes};

use super::goals::GoalsArgs;
use super::listen::TargetArgs;
use super::measure::Effort;
use super::mesh::MeshArgs;
use super::models::{ListArgs, ModelArgs};
use super::objects::StoreAt;
use super::plan::{BackendKind, Calls, Memory, Order, PARALLEL_MAX, Plan, Shape, Way};
use super::process::{ANSWER_DEADLINE, TargetAt};

/// The most samples of one figure: all are kept.
const SAMPLES_MAX: i64 = 1_000_000;
/// Bytes of one iteration, unless they are named or a model's.
const TOTAL_BYTES: u64 = 64 << 20;

/// Moves blocks over each backend, beside references.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct TransferArgs {
    #[command(subcommand)]
    pub(crate) role: Option<Role>,
    /// Which backends: memcpy, shm, tcp, file and object by default; cuda, cuda-within and cuda-ipc with --memory cuda.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(super) backend: Vec<BackendKind>,
    /// Where blocks lie: cuda is memory of a GPU, between which and the host, and within which, they are moved; with --backend verbs
    /// or ucx on both sides, the target's being the first GPU that it sees.
    #[arg(long, value_enum, default_value_t = Memory::Host)]
    pub(super) memory: Memory,
    /// The number of the GPU, as this process sees it (`kv-bench doctor`).
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub(super) gpu: u32,
    /// Targets that listen elsewhere (`kv-bench transfer target`), one after the other; one is started here by default.
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT")]
    pub(super) to: Vec<String>,
    /// How long a target of --to may take to answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = ANSWER_DEADLINE.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(super) deadline: u64,
    /// Which way, as the initiator sees it.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "read,write")]
    pub(super) operation: Vec<Way>,
    /// Sizes of a block, with an optional K, M or G, multiples of 8; a range like 4K..1M doubles. By default 4K,64K,1M; of a GPU's 4K..4M.
    #[arg(long, visible_alias = "sizes", value_delimiter = ',', value_parser = parse_sizes, conflicts_with = "model")]
    pub(super) block_bytes: Vec<Sizes>,
    /// Blocks in one request.
    #[arg(long, visible_alias = "batch", value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub(super) blocks: Vec<u32>,
    /// Bytes that one iteration moves, 64M by default; a multiple of each block size.
    #[arg(long, value_parser = parse_bytes, conflicts_with = "model")]
    pub(super) total_bytes: Option<u64>,
    /// Threads that post requests at once; references have as many.
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=i64::from(PARALLEL_MAX)))]
    pub(super) threads: Vec<u32>,
    /// Requests that each thread keeps in flight.
    #[arg(long, value_delimiter = ',', default_value = "4", value_parser = clap::value_parser!(u32).range(1..=i64::from(PARALLEL_MAX)))]
    pub(super) in_flight: Vec<u32>,
    /// Whether requests are made once and posted again, or made each time.
    #[arg(long, value_enum, default_value_t = Calls::Prepared)]
    pub(super) requests: Calls,
    /// Whether blocks lie in random order on both sides, as they do by default; of a GPU both are measured.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(super) order: Vec<Order>,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) effort: EffortArgs,
    /// Whether files, ours and the reference's, pass by the page cache.
    #[arg(long, value_enum, default_value_t = Direct::Auto)]
    pub(super) direct: Direct,
    /// Fixes the order and the content of the blocks.
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Folder for files and objects; a temporary one by default.
    #[arg(long, value_name = "FOLDER")]
    pub(super) dir: Option<PathBuf>,
    /// The store that objects are made in and removed from again, instead of a folder: s3://bucket/prefix, gs://bucket/prefix,
    /// az://container/prefix or file:///folder. Credentials come from the environment.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Accept a store without TLS.
    #[arg(long, requires = "store")]
    store_http: bool,
    /// Measure only ours.
    #[arg(long)]
    pub(super) no_references: bool,
    #[command(flatten)]
    pub(super) rivals: RivalArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What else can be done than to measure from here.
#[derive(Subcommand, Clone, Debug)]
pub(crate) enum Role {
    /// Listen, and be the other side of transfers that other processes or hosts ask for.
    Target(TargetArgs),
    /// Let several targets move blocks among each other, all at once.
    Mesh(MeshArgs),
    /// Measure what this project promises of transfers: target, measured, met or missed.
    Goals(Box<GoalsArgs>),
    /// Show the models that --model knows, and the sizes of their blocks.
    Models(ListArgs),
}

/// How often and how long is measured.
#[derive(Args, Clone, Debug)]
pub(super) struct EffortArgs {
    /// Iterations before the measured ones.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=SAMPLES_MAX))]
    warm_up: u32,
    /// Measured iterations.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=SAMPLES_MAX))]
    iterations: u32,
    /// Single blocks in each of the five rounds that latency is measured in; a round ends after 250 ms all the same.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=SAMPLES_MAX))]
    latency_samples: u32,
}

impl EffortArgs {
    pub(super) fn effort(&self) -> Effort {
        Effort {
            warm_up: self.warm_up,
            iterations: self.iterations,
            latency_samples: self.latency_samples,
        }
    }
}

/// Other programs that move the same blocks, beside ours; `make bench-fabric` installs them.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct RivalArgs {
    /// The program that stands beside the ucx backend, built from benches/transfer/raw_ucx.c.
    #[arg(long, value_name = "PROGRAM")]
    pub(super) raw_ucx: Option<PathBuf>,
    /// The folder that has NIXL's Python package, which stands beside shm and tcp.
    #[arg(long, value_name = "FOLDER")]
    pub(super) nixl: Option<PathBuf>,
    /// The folder that has Mooncake's Python package, which stands beside tcp.
    #[arg(long, value_name = "FOLDER")]
    pub(super) mooncake: Option<PathBuf>,
    /// A Python that has PyTorch with CUDA, whose selection and copies stand beside cuda.
    #[arg(long, value_name = "PROGRAM")]
    pub(super) torch: Option<PathBuf>,
    /// The Python that runs the others; it needs numpy.
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    pub(super) python: PathBuf,
}

/// How files are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Direct {
    /// Pass by the page cache where the file system and the alignment allow it.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl From<Direct> for DirectMode {
    fn from(direct: Direct) -> Self {
        match direct {
            Direct::Auto => Self::Auto,
            Direct::On => Self::On,
            Direct::Off => Self::Off,
        }
    }
}

impl TransferArgs {
    /// Where objects are made, if not in a folder of their own.
    pub(super) fn store_at(&self) -> Option<StoreAt<'_>> {
        let url = self.store.as_deref()?;
        Some(StoreAt {
            url,
            allow_http: self.store_http,
        })
    }

    /// Where the targets are, and what they are called in reports when there are several.
    pub(super) fn targets(&self) -> Vec<(Option<&str>, TargetAt)> {
        if self.to.is_empty() {
            return vec![(None, TargetAt::Spawned)];
        }
        let named = |address: &'_ String| TargetAt::Address {
            name: address.clone(),
            address: address.clone(),
            deadline: Duration::from_secs(self.deadline),
        };
        let name = |address| (self.to.len() > 1).then_some(address);
        let targets = self.to.iter();
        targets
            .map(|address| (name(address.as_str()), named(address)))
            .collect()
    }

    /// The backends that were asked for, or all that need nothing.
    fn backends(&self) -> Result<Vec<BackendKind>> {
        if self.memory == Memory::Cuda && !self.backend.is_empty() {
            let of_gpus = |kind: &BackendKind| {
                match kind.is_on_device() {
                true => Ok(*kind),
                false => kind.between_gpus().ok_or_else(|| {
                    let context = format!(
                        "--memory cuda: {} does not move memory of GPUs: --backend cuda, cuda-within, cuda-ipc, verbs or ucx",
                        kind.name()
                    );
                    Error::new(ErrorKind::Invalid, context)
                }),
            }
            };
            return self.backend.iter().map(of_gpus).collect();
        }
        match self.memory {
            _ if !self.backend.is_empty() => Ok(self.backend.clone()),
            Memory::Cuda => Ok(vec![
                BackendKind::Cuda,
                BackendKind::CudaWithin,
                BackendKind::CudaIpc,
            ]),
            Memory::Host => Ok(vec![
                BackendKind::Memcpy,
                BackendKind::Shm,
                BackendKind::Tcp,
                BackendKind::File,
                BackendKind::Object,
            ]),
        }
    }

    fn sizes(&self, backend: BackendKind) -> Vec<u64> {
        if !self.block_bytes.is_empty() {
            return self
                .block_bytes
                .iter()
                .flat_map(|sizes| sizes.0.clone())
                .collect();
        }
        match backend.is_on_device() {
            true => (12..=22).map(|power| 1 << power).collect(),
            false => vec![4 << 10, 64 << 10, 1 << 20],
        }
    }

    fn orders(&self, backend: BackendKind) -> Vec<Order> {
        match (self.order.is_empty(), backend.is_on_device()) {
            (false, _) => self.order.clone(),
            (true, true) => vec![Order::Scattered, Order::Contiguous],
            (true, false) => vec![Order::Scattered],
        }
    }

    /// Every combination that was asked for.
    ///
    /// # Errors
    /// `Invalid` naming an option.
    pub(super) fn plans(&self) -> Result<Vec<Plan>> {
        let backends = self.backends()?;
        let needs_peer = |kind: &&BackendKind| !kind.is_to_a_process();
        if let (false, Some(kind)) = (self.to.is_empty(), backends.iter().find(needs_peer)) {
            let context = format!(
                "--to: {} reaches no other process: --backend shm, cma, tcp, ucx or verbs",
                kind.name()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let mut plans = Vec::new();
        for &backend in &backends {
            let orders = self.orders(backend);
            let sweep = backend
                .ways(&self.operation)
                .iter()
                .flat_map(|&way| orders.iter().map(move |&order| (way, order)));
            for (way, order) in sweep {
                for &threads in &self.threads {
                    for &in_flight in &self.in_flight {
                        let base = Shape {
                            backend,
                            way,
                            block_bytes: 0,
                            total_bytes: 0,
                            request_blocks: 0,
                            order,
                            seed: self.seed,
                            threads,
                            in_flight,
                            calls: self.requests,
                            layers: None,
                        };
                        plans.append(&mut self.plans_over(base)?);
                    }
                }
            }
        }
        Ok(plans)
    }

    /// The sizes and batches of one way, or its models.
    fn plans_over(&self, base: Shape) -> Result<Vec<Plan>> {
        let mut plans = Vec::new();
        if let Some(layout) = self.model.layout()? {
            let shape = layout.shape(Shape {
                request_blocks: self.blocks.first().copied().unwrap_or(1),
                ..base
            })?;
            let mut plan = Plan::new(shape)?;
            plan.case = format!(
                "{}-{}{}-{}",
                base.path(),
                layout.name,
                self.swept(&base),
                shape.block_bytes
            );
            plans.push(plan);
            return Ok(plans);
        }
        for &request_blocks in &self.blocks {
            for block_bytes in self.sizes(base.backend) {
                let shape = Shape {
                    block_bytes,
                    total_bytes: self.total_bytes.unwrap_or(TOTAL_BYTES),
                    request_blocks,
                    ..base
                };
                let mut plan = Plan::new(shape)?;
                plan.case = format!("{}{}-{block_bytes}", base.path(), self.swept(&shape));
                plans.push(plan);
            }
        }
        Ok(plans)
    }

    /// What tells cases apart beside their backend, way and size: what has several values, and how blocks lie on a GPU.
    fn swept(&self, shape: &Shape) -> String {
        let order = match self.order.len() > 1 || shape.backend.is_on_device() {
            true => format!("-{}", shape.order.name()),
            false => String::new(),
        };
        let parts = [
            ("batch", shape.request_blocks, self.blocks.len()),
            ("threads", shape.threads, self.threads.len()),
            ("depth", shape.in_flight, self.in_flight.len()),
        ];
        let several = parts
            .iter()
            .filter(|(_, value, count)| *count > 1 && *value > 0);
        let several = several.map(|(name, value, _)| format!("-{name}{value}"));
        std::iter::once(order).chain(several).collect()
    }
}
