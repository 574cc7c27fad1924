//! The `kvfabric` command.
#![forbid(unsafe_code)]

mod demo;
mod node;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvcache_core::{ErrorKind, Result};
use tracing_subscriber::EnvFilter;

/// Finds, moves and keeps the KV cache of LLM inference engines.
#[derive(Parser)]
#[command(name = "kvfabric", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the global index (as `kv-indexer` does).
    Indexer {
        #[command(subcommand)]
        command: kvfabric_indexer::cli::Command,
    },
    #[command(flatten)]
    Own(OwnCommand),
}

#[derive(Subcommand)]
enum OwnCommand {
    /// Run a small cluster on this machine: find, move and verify blocks.
    Demo(Box<demo::args::DemoArgs>),
    /// Run a node without an engine: it keeps its tiers and serves them to peers.
    Node(node::NodeArgs),
    /// Print the version.
    Version,
    /// One pod of a demo, started by it.
    #[command(hide = true)]
    DemoPod,
    /// The indexer of a demo, started by it.
    #[command(hide = true)]
    DemoIndexer,
}

/// Wrong input, as opposed to a run that failed.
const EXIT_INVALID: u8 = 2;

fn main() -> ExitCode {
    let command = match Cli::parse().command {
        // It has a runtime and exit statuses of its own.
        Command::Indexer { command } => return kvfabric_indexer::cli::execute(command),
        Command::Own(command) => command,
    };
    // Standard output belongs to results; warnings and errors are for people to see.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            match error.kind() {
                ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Denied => {
                    ExitCode::from(EXIT_INVALID)
                }
                _ => ExitCode::FAILURE,
            }
        }
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the last word of a program that failed"
)]
fn complain(error: &kvcache_core::Error) {
    eprintln!("kvfabric: {error}");
}

fn run(command: OwnCommand) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| kvcache_core::Error::io("start the runtime", e))?;
    match command {
        OwnCommand::Demo(args) => runtime.block_on(demo::run(*args)),
        OwnCommand::Node(args) => runtime.block_on(node::run(args)),
        OwnCommand::DemoPod => runtime.block_on(demo::pod::run()),
        OwnCommand::DemoIndexer => runtime.block_on(demo::indexer::run()),
        OwnCommand::Version => {
            print_version();
            Ok(())
        }
    }
}

#[expect(clippy::print_stdout, reason = "it is what was asked for")]
fn print_version() {
    println!("kvfabric {}", env!("CARGO_PKG_VERSION"));
}
