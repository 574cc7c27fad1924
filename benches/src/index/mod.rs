//! `kv-bench index`: fills and asks the index with a fixed workload.

mod bounded;
mod fill;
mod fleet;
mod goals;
mod grpc;
mod ingest;
mod lookup;
mod memory;
mod process;
mod rivals;
mod warm;
mod workload;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};

use crate::recorder::{OutputArgs, Recorder};

use self::fill::{Calls, Filled, Meter};
use self::workload::{EVENT_BLOCKS, SEQUENCES_FULL, Workload};

pub(crate) use self::grpc::serve_until_told;
pub(crate) use self::ingest::{FillArgs, measure_fill};
pub(crate) use self::memory::{MemoryArgs, measure as measure_memory};

/// Sequences a worker that one may ask for.
const SEQUENCES: RangeInclusive<i64> = 1..=1 << 20;

/// Fills and asks the index with workload KVI-1: 64 workers, shared prompts, long unique tails.
#[derive(Args, Clone, Debug)]
pub(crate) struct IndexArgs {
    /// Sequences of each of the 64 workers.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(SEQUENCES))]
    sequences: u32,
    /// The workload's real size: 500 sequences a worker, 10.5 million blocks.
    #[arg(long, conflicts_with = "sequences")]
    full: bool,
    /// What the events are like.
    #[arg(long, value_enum, default_value_t = Origin::Hashes)]
    origin: Origin,
    /// How often the index is filled anew for the ingest figures.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Lookups in each of the five rounds; over gRPC at most 1,000.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    lookups: u32,
    /// The program of `benches/compare`: the rivals it knows are measured beside ours.
    #[arg(long)]
    rivals: Option<PathBuf>,
    /// Only measure memory: by part, beside the resident size, and with a bound of a quarter of what all would take.
    #[arg(long, conflicts_with_all = ["rivals", "grpc"])]
    memory: bool,
    /// A trace (JSON lines in Mooncake's schema) for the fleet; without one, a stand-in of the same shape is made.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Pods that the trace's conversations are spread over.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pods: u32,
    /// How many pods hold what each of those does, in the larger fleet.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(2..=100))]
    copies: u32,
    /// Also ask over gRPC, beside an echo of the same sizes.
    #[arg(long)]
    grpc: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Who tells of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Origin {
    /// Nodes: the events carry index keys.
    Node,
    /// Engines whose events carry hashes and, for the tokens of a block, their hash of 64 bits: what the rivals are given.
    /// The index still makes the chain of keys.
    Hashes,
    /// Engines as they are: the events carry hashes and 16 tokens a block, which the index hashes.
    Engine,
}

impl IndexArgs {
    fn sequences(&self) -> u32 {
        if self.full {
            SEQUENCES_FULL
        } else {
            self.sequences
        }
    }
}

/// Measures ingestion (of events in one call and in a call each, and of tokens), lookups, removal and memory.
///
/// # Errors
/// `Internal` when the index does not hold or find what it must; `Io` when the memory process cannot be run.
pub(crate) fn run(args: &IndexArgs, recorder: &mut Recorder) -> Result<()> {
    let sequences = args.sequences();
    if args.memory {
        return measure_memory_only(sequences, args.origin, recorder);
    }
    let rivals = rivals::find(args.rivals.as_deref());
    let others = if rivals.is_some() { rivals::STEPS } else { 0 };
    recorder.expect_steps(
        ingest::steps(args, rivals.is_some())
            + (lookup::STEPS + memory::STEPS + fleet::STEPS)
            + (others + u64::from(args.grpc)),
    );
    ingest::measure(args, rivals.as_deref(), recorder)?;
    let workload = Workload::new(sequences, 1, EVENT_BLOCKS);
    let filled = Filled::new(&workload, args.origin)?;
    let mut meter = Meter::default();
    let events = workload.events();
    if filled.ingest(events, Calls::Together, &mut meter, recorder.stop())? {
        lookup::measure(&workload, &filled, args.lookups, recorder)?;
    }
    drop(filled);
    measure_memory_of(sequences, args.origin, recorder)?;
    fleet::measure(args.trace.as_deref(), args.pods, args.copies, recorder)?;
    if let Some(program) = &rivals {
        rivals::measure(program, sequences, args.lookups, recorder)?;
    }
    if args.grpc && !recorder.stop().is_set() {
        recorder.say("gRPC");
        grpc::measure(sequences, args.lookups, recorder)?;
        recorder.step();
    }
    goals::conclude(args.full, recorder)
}

fn measure_memory_of(sequences: u32, origin: Origin, recorder: &mut Recorder) -> Result<()> {
    for replicas in memory::REPLICAS {
        if !recorder.stop().is_set() {
            recorder.say(format!("memory-r{replicas}"));
            let rows = memory::run(sequences, replicas, origin, None, recorder.stop())?;
            recorder.extend(rows);
        }
        recorder.step();
    }
    Ok(())
}

/// Memory alone, and then with a bound that has room for a quarter.
fn measure_memory_only(sequences: u32, origin: Origin, recorder: &mut Recorder) -> Result<()> {
    recorder.expect_steps(memory::STEPS + 1);
    measure_memory_of(sequences, origin, recorder)?;
    if !recorder.stop().is_set() {
        recorder.say("memory-bounded");
        let bytes_max = bounded::quarter_of(&Workload::new(sequences, 1, EVENT_BLOCKS));
        let bounded = memory::run(sequences, 1, origin, Some(bytes_max), recorder.stop())?;
        recorder.extend(bounded);
    }
    recorder.step();
    Ok(())
}

fn wrong(what: String) -> Error {
    Error::new(ErrorKind::Internal, what)
}
