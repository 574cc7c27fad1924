//! `kv-bench`: measures transfer paths, the index and workloads, beside references in the same run.
//!
//! Every command prints a table and, with `--json`, writes the same figures: see [`report`].
#![forbid(unsafe_code)]

mod clock;
mod compare;
mod doctor;
mod engines;
mod goals;
mod host;
mod html;
mod index;
mod machine;
mod plot;
mod recorder;
mod replay;
mod report;
mod sizes;
mod statistics;
mod stop;
mod topo;
mod transfer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvcache_core::{Error, ErrorKind, Result};

use crate::recorder::{OutputArgs, Recorder};
use crate::transfer::Role;

/// Wrong input, as opposed to a run that failed.
const EXIT_INVALID: u8 = 2;
/// One of our figures is worse than the saved one by more than was allowed.
const EXIT_WORSE: u8 = 3;
/// What shells say of a program that ended by Ctrl-C.
const EXIT_INTERRUPTED: u8 = 130;

/// Measures kvfabric beside references in the same run.
#[derive(Parser)]
#[command(name = "kv-bench", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Move blocks over each backend, beside memcpy, raw TCP and plain disk calls.
    Transfer(Box<transfer::TransferArgs>),
    /// Fill and ask the index with a fixed workload (KVI-1).
    Index(index::IndexArgs),
    /// Replay a workload as the KV events of some pods; or run the demo and take its figures.
    Replay(replay::ReplayArgs),
    /// Measure what an engine pays for kvfabric in calls, idle CPU and handing a prompt over, beside NIXL.
    Engines(engines::EnginesArgs),
    /// Say what this machine offers to transfers, and what could be set better.
    Doctor(doctor::DoctorArgs),
    /// Say how near GPUs, network cards and drives are to each other, and which RDMA port each GPU should use.
    Topo(topo::TopoArgs),
    /// A process that calls a node from Rust, started by `engines`.
    #[command(hide = true)]
    EngineCalls,
    /// The other process of a transfer, started by it.
    #[command(hide = true)]
    TransferTarget,
    /// The process that fills an index once, started by `index`.
    #[command(hide = true)]
    IndexFill(index::FillArgs),
    /// The process whose memory is measured, started by `index`.
    #[command(hide = true)]
    IndexMemory(index::MemoryArgs),
    /// The server that is asked over gRPC, started by `index`.
    #[command(hide = true)]
    IndexServer,
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Transfer(args) => match &args.role {
            None => execute("transfer", &args.output, |recorder| {
                transfer::run(&args, recorder)
            }),
            Some(Role::Target(target)) => status(transfer::listen(target)),
            Some(Role::Mesh(mesh)) => execute("transfer mesh", &mesh.output, |recorder| {
                transfer::run_mesh(mesh, recorder)
            }),
            Some(Role::Goals(goals)) => execute("transfer goals", &goals.output, |recorder| {
                transfer::run_goals(goals, recorder)
            }),
            Some(Role::Models(models)) => status(transfer::list_models(models)),
        },
        Command::Index(args) => execute("index", &args.output, |recorder| {
            index::run(&args, recorder)
        }),
        Command::Replay(args) => execute("replay", &args.output, |recorder| {
            replay::run(&args, recorder)
        }),
        Command::Engines(args) => execute("engines", &args.output, |recorder| {
            engines::run(&args, recorder)
        }),
        Command::Doctor(args) => status(doctor::run(&args)),
        Command::Topo(args) => status(topo::run(&args)),
        Command::EngineCalls => status(engines::answer_questions()),
        Command::TransferTarget => status(transfer::serve_target()),
        Command::IndexServer => status(index::serve_until_told()),
        Command::IndexFill(args) => status(index::measure_fill(&args)),
        Command::IndexMemory(args) => status(index::measure_memory(&args)),
    }
}

fn execute(
    command: &'static str,
    output: &OutputArgs,
    body: impl FnOnce(&mut Recorder) -> Result<()>,
) -> ExitCode {
    let mut recorder = match Recorder::start(command, output) {
        Ok(recorder) => recorder,
        Err(error) => return status(Err(error)),
    };
    let outcome = body(&mut recorder);
    let is_interrupted = recorder.stop().is_set();
    let finished = recorder.finish(outcome.is_ok());
    match outcome.and(finished) {
        Ok(_) if is_interrupted => ExitCode::from(EXIT_INTERRUPTED),
        Ok(verdict) if verdict.regressions > 0 => ExitCode::from(EXIT_WORSE),
        outcome => status(outcome.map(|_| ())),
    }
}

fn status(outcome: Result<()>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    complain(&error);
    match error.kind() {
        ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Denied => {
            ExitCode::from(EXIT_INVALID)
        }
        _ => ExitCode::FAILURE,
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the last word of a program that failed"
)]
fn complain(error: &Error) {
    eprintln!("kv-bench: {error}");
}
