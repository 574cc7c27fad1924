//! `kv-bench transfer`: blocks over each backend, beside references that alternate with it.

mod contents;
mod fabric;
mod measure;
mod plan;
mod process;
mod protocol;
mod raw_ucx;
mod references;
mod remote;
mod subject;
mod target;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::DirectMode;

use crate::recorder::{OutputArgs, Recorder};
use crate::sizes::parse_bytes;

pub(crate) use self::plan::BackendKind as PathKind;
use self::plan::{BackendKind, Order, Plan, Shape, Way};
use self::subject::Subject;

pub(crate) use self::target::serve as serve_target;

/// The most samples of one figure: all are kept.
const SAMPLES_MAX: i64 = 1_000_000;

/// Moves blocks over each backend, beside references.
#[derive(Args, Clone, Debug)]
pub(crate) struct TransferArgs {
    /// Which backends.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "memcpy,shm,tcp,file,object"
    )]
    backend: Vec<BackendKind>,
    /// Which way, as the initiator sees it.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "read,write")]
    operation: Vec<Way>,
    /// Sizes of a block, with an optional K, M or G; multiples of 8.
    #[arg(long, value_delimiter = ',', value_parser = parse_bytes, default_value = "4K,64K,1M")]
    block_bytes: Vec<u64>,
    /// Blocks in one request.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    blocks: u32,
    /// Bytes that one iteration moves; a multiple of each block size.
    #[arg(long, value_parser = parse_bytes, default_value = "64M")]
    total_bytes: u64,
    /// Iterations before the measured ones.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=SAMPLES_MAX))]
    warm_up: u32,
    /// Measured iterations.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=SAMPLES_MAX))]
    iterations: u32,
    /// Single blocks in each of the five rounds that latency is measured in.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=SAMPLES_MAX))]
    latency_samples: u32,
    /// Whether blocks lie in random order on both sides.
    #[arg(long, value_enum, default_value_t = Order::Scattered)]
    order: Order,
    /// Requests posted at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    in_flight: u32,
    /// Whether files, ours and the reference's, pass by the page cache.
    #[arg(long, value_enum, default_value_t = Direct::Auto)]
    direct: Direct,
    /// Fixes the order and the content of the blocks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for files and objects; a temporary one by default.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Measure only ours.
    #[arg(long)]
    no_references: bool,
    /// The program that stands beside the ucx backend, built from benches/transfer/raw_ucx.c; `make bench-fabric` does it.
    #[arg(long, value_name = "PROGRAM")]
    raw_ucx: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// How files are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direct {
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

/// Measures every combination that was asked for.
///
/// # Errors
/// `Invalid` naming an option; `Corrupt` when bytes did not arrive as they left; what the backends say.
pub(crate) fn run(args: &TransferArgs, recorder: &mut Recorder) -> Result<()> {
    let mut plans = Vec::new();
    for &backend in &args.backend {
        for &way in &args.operation {
            for &block_bytes in &args.block_bytes {
                plans.push(Plan::new(Shape {
                    backend,
                    way,
                    block_bytes,
                    total_bytes: args.total_bytes,
                    request_blocks: args.blocks,
                    order: args.order,
                    seed: args.seed,
                })?);
            }
        }
    }
    let folder = folder(args)?;
    recorder.expect_steps(plans.len() as u64);
    for plan in plans {
        if recorder.stop().is_set() {
            break;
        }
        recorder.say(plan.shape.name());
        let mut subjects = subjects(args, &plan, folder.path())?;
        measure::measure(args, &plan, &mut subjects, recorder)?;
        recorder.step();
    }
    Ok(())
}

/// Whether a way to another process of this host works: what is told of it.
///
/// # Errors
/// Why it does not.
pub(crate) fn try_path(kind: PathKind) -> Result<String> {
    let shape = Shape {
        backend: kind,
        way: Way::Write,
        block_bytes: 4096,
        total_bytes: 4096,
        request_blocks: 1,
        order: Order::Contiguous,
        seed: 0,
    };
    fabric::path_to_another_process(shape)
}

fn folder(args: &TransferArgs) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("kv-bench-");
    match &args.dir {
        Some(dir) if !dir.is_dir() => {
            let context = format!("--dir {}: no such folder", dir.display());
            Err(Error::new(ErrorKind::Invalid, context))
        }
        Some(dir) => builder
            .tempdir_in(dir)
            .map_err(|error| Error::io(format!("--dir {}", dir.display()), error)),
        None => builder
            .tempdir()
            .map_err(|error| Error::io("make a temporary folder", error)),
    }
}

/// Ours first, then what stands beside it.
fn subjects(
    args: &TransferArgs,
    plan: &Plan,
    folder: &std::path::Path,
) -> Result<Vec<Box<dyn Subject>>> {
    let direct = DirectMode::from(args.direct);
    let ours = fabric::Fabric::open(plan, args.in_flight as usize, direct, folder)?;
    let mut subjects: Vec<Box<dyn Subject>> = vec![Box::new(ours)];
    if args.no_references {
        return Ok(subjects);
    }
    match plan.shape.backend {
        BackendKind::Memcpy => subjects.push(Box::new(references::Memcpy::new(plan))),
        BackendKind::Shm => {
            subjects.push(Box::new(references::Memcpy::new(plan)));
            subjects.push(Box::new(references::MappedLoop::new(plan)?));
        }
        BackendKind::Tcp => {
            subjects.push(Box::new(references::RawTcp::connect(plan)?));
            subjects.push(Box::new(references::Memcpy::new(plan)));
        }
        BackendKind::Ucx => match &args.raw_ucx {
            Some(program) => subjects.push(Box::new(raw_ucx::RawUcx::start(program, plan)?)),
            None => subjects.push(Box::new(references::Memcpy::new(plan))),
        },
        BackendKind::File => {
            subjects.push(Box::new(references::Disk::open(plan, direct, folder)?));
        }
        // Objects in a folder go through the page cache, so what stands beside them does too.
        BackendKind::Object => {
            let cached = references::Disk::open(plan, DirectMode::Off, folder)?;
            subjects.push(Box::new(cached));
        }
    }
    Ok(subjects)
}
