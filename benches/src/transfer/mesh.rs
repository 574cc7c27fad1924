//! `kv-bench transfer mesh`: several targets move blocks among each other, all at once.

use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};

use crate::recorder::{OutputArgs, Recorder};
use crate::report::{Case, OURS};
use crate::sizes::{Sizes, parse_bytes, parse_sizes};
use crate::statistics::{Samples, gb_per_s};

use super::plan::{BackendKind, Calls, Order, PARALLEL_MAX, Shape, Way};
use super::process::{ANSWER_DEADLINE, Target};
use super::protocol::Ask;

mod matrix;
mod peers;

use self::matrix::{Edge, edges};
use self::peers::Peers;

/// How long a peer may take to show that it lives, when something went wrong.
const ROLL_CALL_MAX: Duration = Duration::from_secs(5);

/// Who moves what to whom.
#[derive(Args, Clone, Debug)]
pub(crate) struct MeshArgs {
    /// Targets that listen (`kv-bench transfer target`), with an optional name: a=10.0.0.1:7700,b=10.0.0.2:7700.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "[NAME=]HOST:PORT",
        required_unless_present = "spawn"
    )]
    peers: Vec<String>,
    /// Start so many targets here instead, on loopback.
    #[arg(long, conflicts_with = "peers", value_parser = clap::value_parser!(u32).range(2..=64))]
    spawn: Option<u32>,
    /// Which of them move blocks to which.
    #[arg(long, value_enum, default_value_t = Pattern::Pairwise, conflicts_with = "matrix")]
    pattern: Pattern,
    /// A file with bytes from each (row) to each (column), with an optional K, M or G; # begins a remark.
    #[arg(long, value_name = "FILE")]
    matrix: Option<std::path::PathBuf>,
    /// How they reach each other.
    #[arg(long, value_enum, default_value_t = BackendKind::Tcp)]
    backend: BackendKind,
    /// Whether the source writes or the sink reads.
    #[arg(long, value_enum, default_value_t = Way::Write)]
    operation: Way,
    /// Sizes of a block; a range like 4K..1M doubles.
    #[arg(long, visible_alias = "sizes", value_delimiter = ',', value_parser = parse_sizes, default_value = "64K")]
    block_bytes: Vec<Sizes>,
    /// Bytes that each moves to each in an iteration, unless there is a matrix.
    #[arg(long, value_parser = parse_bytes, default_value = "64M")]
    total_bytes: u64,
    /// Blocks in one request.
    #[arg(long, visible_alias = "batch", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    blocks: u32,
    /// Threads that post requests, for each pair.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(PARALLEL_MAX)))]
    threads: u32,
    /// Requests that each thread keeps in flight.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(PARALLEL_MAX)))]
    in_flight: u32,
    /// Whether requests are made once and posted again, or made each time.
    #[arg(long, value_enum, default_value_t = Calls::Prepared)]
    requests: Calls,
    /// Whether blocks lie in random order on both sides.
    #[arg(long, value_enum, default_value_t = Order::Scattered)]
    order: Order,
    /// Fixes the order and the content of the blocks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Iterations before the measured ones.
    #[arg(long, default_value_t = 1)]
    warm_up: u32,
    /// Measured iterations.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    iterations: u32,
    /// Measure each pair alone too: what it loses to the others.
    #[arg(long)]
    alone: bool,
    /// How long a peer may take to answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = ANSWER_DEADLINE.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
    deadline: u64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Which peers move blocks to which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Pattern {
    /// The first half of the peers to the second, one to one.
    Pairwise,
    /// All others to the last.
    ManyToOne,
    /// The first to all others.
    OneToMany,
    /// Each to each.
    AllToAll,
}

impl Pattern {
    const fn name(self) -> &'static str {
        match self {
            Self::Pairwise => "pairwise",
            Self::ManyToOne => "many-to-one",
            Self::OneToMany => "one-to-many",
            Self::AllToAll => "all-to-all",
        }
    }
}

/// One pair in one case, with a session of its own on both ends.
struct Lane {
    /// `a-to-b`.
    name: String,
    bytes: u64,
    initiator: Target,
    exposer: Target,
    is_read: bool,
    all: Samples,
    alone: Samples,
}

/// Measures the pattern or the matrix with each size of a block.
///
/// # Errors
/// `Invalid` naming an option or a place of the matrix; `Corrupt` when bytes did not arrive as they left; when a peer
/// does not answer in time or ends, its name.
pub(crate) fn run(args: &MeshArgs, recorder: &mut Recorder) -> Result<()> {
    if !args.backend.is_to_a_process() {
        let context = format!(
            "--backend {}: reaches no other process",
            args.backend.name()
        );
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    let deadline = Duration::from_secs(args.deadline);
    let peers = match args.spawn {
        Some(count) => Peers::spawn(count, deadline)?,
        None => Peers::named(&args.peers, deadline)?,
    };
    let edges = edges(
        args.pattern,
        args.matrix.as_deref(),
        peers.count(),
        args.total_bytes,
    )?;
    let sizes: Vec<u64> = args.block_bytes.iter().flat_map(|s| s.0.clone()).collect();
    recorder.expect_steps(sizes.len() as u64 * u64::from(args.iterations));
    for block_bytes in sizes {
        if recorder.stop().is_set() {
            break;
        }
        let outcome = measure(args, &peers, &edges, block_bytes, recorder);
        outcome.map_err(|error| peers.with_the_silent(error, ROLL_CALL_MAX.min(deadline)))?;
    }
    Ok(())
}

fn shape(args: &MeshArgs, edge: &Edge, block_bytes: u64) -> Result<Shape> {
    // What is less than a block goes as one block of its own size.
    let block_bytes = block_bytes.min(edge.bytes);
    if !edge.bytes.is_multiple_of(block_bytes) {
        let context = format!(
            "{}: {} bytes are no multiple of --block-bytes {block_bytes}",
            edge.place, edge.bytes
        );
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(Shape {
        backend: args.backend,
        way: args.operation,
        block_bytes,
        total_bytes: edge.bytes,
        request_blocks: args.blocks,
        order: args.order,
        seed: args.seed,
        threads: args.threads,
        in_flight: args.in_flight,
        calls: args.requests,
        layers: None,
    })
}

/// All lanes of a case: first all memory, then everybody learns where it is, so that nobody's knowledge is older than
/// another's.
fn open(args: &MeshArgs, peers: &Peers, edges: &[Edge], block_bytes: u64) -> Result<Vec<Lane>> {
    let is_read = args.operation == Way::Read;
    let mut shapes = Vec::new();
    let mut exposers = Vec::new();
    for edge in edges {
        let shape = shape(args, edge, block_bytes)?;
        let mut exposer = peers.open(if is_read { edge.from } else { edge.to })?;
        exposer.expose(shape)?;
        shapes.push(shape);
        exposers.push(exposer);
    }
    let mut lanes = Vec::new();
    for ((edge, shape), mut exposer) in edges.iter().zip(shapes).zip(exposers) {
        let (region, metadata) = exposer.whereabouts()?;
        let mut initiator = peers.open(if is_read { edge.to } else { edge.from })?;
        let name = format!("{}-to-{}", peers.name(edge.from), peers.name(edge.to));
        initiator
            .done(&Ask::Initiate {
                shape,
                region,
                metadata,
            })
            .map_err(|error| error.at(name.clone()))?;
        lanes.push(Lane {
            name,
            bytes: edge.bytes,
            initiator,
            exposer,
            is_read,
            all: Samples::default(),
            alone: Samples::default(),
        });
    }
    Ok(lanes)
}

impl Lane {
    fn begin(&mut self) -> Result<()> {
        self.initiator.send(&Ask::Move)
    }

    fn end(&mut self) -> Result<Duration> {
        let moved = self.initiator.moved();
        let (bytes, time) = moved.map_err(|error| error.at(self.name.clone()))?;
        if bytes != self.bytes {
            let context = format!(
                "{}: {bytes} bytes moved instead of {}",
                self.name, self.bytes
            );
            return Err(Error::new(ErrorKind::Corrupt, context));
        }
        Ok(time)
    }

    /// Where the bytes go to.
    fn sink(&mut self) -> &mut Target {
        if self.is_read {
            &mut self.initiator
        } else {
            &mut self.exposer
        }
    }
}

/// Everybody at once: how long it took as seen from here, and each pair as it saw it.
fn move_together(lanes: &mut [Lane]) -> Result<(Duration, Vec<Duration>)> {
    let start = Instant::now();
    for lane in &mut *lanes {
        lane.begin()?;
    }
    let times: Result<Vec<Duration>> = lanes.iter_mut().map(Lane::end).collect();
    Ok((start.elapsed(), times?))
}

fn measure(
    args: &MeshArgs,
    peers: &Peers,
    edges: &[Edge],
    block_bytes: u64,
    recorder: &mut Recorder,
) -> Result<()> {
    let mut lanes = open(args, peers, edges, block_bytes)?;
    let mut clocks: Vec<Target> = peers.open_all()?;
    let bytes: u64 = lanes.iter().map(|lane| lane.bytes).sum();
    let pattern = match &args.matrix {
        Some(_) => "matrix",
        None => args.pattern.name(),
    };
    let family = format!("{}-{}", args.backend.name(), args.operation.name());
    let case = format!("{family}-{pattern}-{block_bytes}");
    let stop = recorder.stop().clone();
    let (mut total, mut cpu) = (Samples::default(), Samples::default());
    for _ in 0..args.warm_up {
        move_together(&mut lanes)?;
    }
    for iteration in 1..=args.iterations {
        if stop.is_set() {
            break;
        }
        recorder.say(format!("{case} {iteration}/{}", args.iterations));
        let before = cpu_of(&mut clocks)?;
        if iteration == args.iterations {
            lanes.iter_mut().try_for_each(|lane| lane.sink().poison())?;
        }
        let (wall, times) = move_together(&mut lanes)?;
        total.push(gb_per_s(bytes, wall));
        let spent = cpu_of(&mut clocks)?.saturating_sub(before);
        cpu.push(spent.as_secs_f64() / (bytes as f64 / 1e9));
        for (lane, time) in lanes.iter_mut().zip(times) {
            lane.all.push(gb_per_s(lane.bytes, time));
        }
        if args.alone {
            for lane in &mut lanes {
                lane.begin()?;
                let time = lane.end()?;
                lane.alone.push(gb_per_s(lane.bytes, time));
            }
        }
        recorder.step();
    }
    let is_complete = !stop.is_set();
    if is_complete {
        for lane in &mut lanes {
            let name = lane.name.clone();
            lane.sink().verify().map_err(|error| error.at(name))?;
        }
    }
    record(
        &case,
        &family,
        block_bytes,
        &lanes,
        (&total, &cpu),
        recorder,
    );
    let verified = if is_complete { bytes } else { 0 };
    let whole = Case {
        subject: OURS,
        name: &case,
    };
    recorder.extend(whole.single("verified_bytes", "bytes", verified as f64));
    Ok(())
}

fn cpu_of(clocks: &mut [Target]) -> Result<Duration> {
    clocks.iter_mut().map(Target::cpu).sum()
}

fn record(
    case: &str,
    family: &str,
    block_bytes: u64,
    lanes: &[Lane],
    (total, cpu): (&Samples, &Samples),
    recorder: &mut Recorder,
) {
    let whole = Case {
        subject: OURS,
        name: case,
    };
    recorder.extend(whole.row("total_gb_per_s", "GB/s", total));
    recorder.extend(whole.row("cpu_s_per_gb", "s/GB", cpu));
    recorder.extend(whole.single("pairs", "", lanes.len() as f64));
    for lane in lanes {
        let name = format!("{family}-{}-{block_bytes}", lane.name);
        let one = Case {
            subject: OURS,
            name: &name,
        };
        recorder.extend(one.row("gb_per_s", "GB/s", &lane.all));
        recorder.extend(one.row("alone_gb_per_s", "GB/s", &lane.alone));
        recorder.extend(one.row("share_of_alone", "ratio", &lane.all.ratio_to(&lane.alone)));
    }
}
