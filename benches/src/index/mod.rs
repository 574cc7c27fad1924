//! `kv-bench index`: fills and asks the index with a fixed workload.

mod bounded;
mod fill;
mod fleet;
mod grpc;
mod lookup;
mod memory;
mod rivals;
mod workload;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};

use crate::recorder::{OutputArgs, Recorder};
use crate::report::{Case, OURS};
use crate::statistics::Samples;

use self::fill::{Calls, Filled, Meter};
use self::workload::{EVENT_BLOCKS, SEQUENCES_FULL, Workload};

pub(crate) use self::grpc::serve_until_told;
pub(crate) use self::memory::{MemoryArgs, measure as measure_memory};

/// How often an index is filled, each several times.
const INGESTIONS: u64 = 5;
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
    /// Lookups in each of the five rounds.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
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
    let workload = Workload::new(sequences, 1, EVENT_BLOCKS);
    let repeats = u64::from(args.repeats);
    recorder.expect_steps(
        INGESTIONS * repeats + lookup::STEPS + memory::STEPS + fleet::STEPS + u64::from(args.grpc),
    );
    let rivals = rivals::find(args.rivals.as_deref());
    if rivals.is_some() {
        recorder.expect_steps(rivals::STEPS);
    }
    let single = Workload::new(sequences, 1, 1);
    let origin = args.origin;
    ingest(
        ("ingest-1", &single),
        origin,
        Calls::Together,
        args,
        recorder,
    )?;
    ingest(
        ("ingest-1-single", &single),
        origin,
        Calls::Single,
        args,
        recorder,
    )?;
    ingest(
        ("ingest-16-tokens", &workload),
        Origin::Engine,
        Calls::Together,
        args,
        recorder,
    )?;
    ingest(
        ("ingest-16-single", &workload),
        origin,
        Calls::Single,
        args,
        recorder,
    )?;
    let filled = ingest(
        ("ingest-16", &workload),
        origin,
        Calls::Together,
        args,
        recorder,
    )?;
    if let Some(filled) = filled {
        lookup::measure(&workload, &filled, args.lookups, recorder)?;
    }
    measure_memory_of(sequences, args.origin, recorder)?;
    fleet::measure(args.trace.as_deref(), args.pods, args.copies, recorder)?;
    if let Some(program) = rivals {
        rivals::measure(&program, sequences, args.lookups, recorder)?;
    }
    if args.grpc && !recorder.stop().is_set() {
        recorder.say("gRPC");
        grpc::measure(sequences, args.lookups, recorder)?;
        recorder.step();
    }
    Ok(())
}

fn measure_memory_of(sequences: u32, origin: Origin, recorder: &mut Recorder) -> Result<()> {
    for replicas in memory::REPLICAS {
        if !recorder.stop().is_set() {
            recorder.say(format!("memory-r{replicas}"));
            recorder.extend(memory::run(sequences, replicas, origin, None)?);
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
        recorder.extend(memory::run(sequences, 1, origin, Some(bytes_max))?);
    }
    recorder.step();
    Ok(())
}

/// Fills an index several times; returns the last one, or none if the run was stopped before it was full.
fn ingest(
    (name, workload): (&str, &Workload),
    origin: Origin,
    calls: Calls,
    args: &IndexArgs,
    recorder: &mut Recorder,
) -> Result<Option<Filled>> {
    let (mut per_s, mut per_cpu_s, mut events) =
        (Samples::default(), Samples::default(), Samples::default());
    let mut last = None;
    for _ in 0..args.repeats {
        recorder.say(name);
        drop(last.take());
        let filled = Filled::new(workload, origin)?;
        let mut meter = Meter::default();
        let is_full = filled.ingest(workload.events(), calls, &mut meter, recorder.stop())?;
        if !is_full {
            break;
        }
        filled.check(workload, &meter)?;
        per_s.push(meter.blocks as f64 / meter.time.as_secs_f64());
        per_cpu_s.push(meter.blocks as f64 / meter.cpu.as_secs_f64());
        events.push(meter.events as f64 / meter.time.as_secs_f64());
        last = Some(filled);
        recorder.step();
    }
    let case = Case {
        subject: OURS,
        name,
    };
    recorder.extend(case.row("blocks_per_s", "blocks/s", &per_s));
    recorder.extend(case.row("blocks_per_cpu_s", "blocks/s", &per_cpu_s));
    recorder.extend(case.row("events_per_s", "events/s", &events));
    recorder.extend(case.single("blocks", "blocks", workload.pairs() as f64));
    recorder.extend(case.single("events", "events", workload.events_count() as f64));
    Ok(last)
}

fn wrong(what: String) -> Error {
    Error::new(ErrorKind::Internal, what)
}
