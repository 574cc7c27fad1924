//! The `kvfabric` command.

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
#[expect(clippy::large_enum_variant, reason = "made once")]
enum Command {
    /// Run a small cluster on this machine: find, move and verify blocks.
    Demo(demo::args::DemoArgs),
    /// Run a node without an engine: it keeps its tiers and serves them to peers.
    Node(node::NodeArgs),
    /// Run the global index (as `kv-indexer` does).
    #[command(disable_help_flag = true)]
    Indexer {
        /// What `kv-indexer` takes; `kvfabric indexer --help` lists it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Print the version.
    Version,
    /// One pod of a demo, started by it.
    #[command(hide = true)]
    DemoPod,
}

/// Wrong input, as opposed to a run that failed.
const EXIT_INVALID: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Indexer { args } = cli.command {
        return kvfabric_indexer::cli::main(
            std::iter::once("kvfabric indexer".to_owned()).chain(args),
        );
    }
    // Standard output belongs to results; warnings and errors are for people to see.
    let filter = EnvFilter::try_from_env("KVFABRIC_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(cli.command) {
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

#[expect(clippy::print_stderr, reason = "the last word of a program that failed")]
fn complain(error: &kvcache_core::Error) {
    eprintln!("kvfabric: {error}");
}

fn run(command: Command) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| kvcache_core::Error::io("start the runtime", e))?;
    match command {
        Command::Demo(args) => runtime.block_on(demo::run(args)),
        Command::Node(args) => runtime.block_on(node::run(args)),
        Command::DemoPod => runtime.block_on(demo::pod::run()),
        Command::Version => {
            print_version();
            Ok(())
        }
        Command::Indexer { .. } => unreachable!("handled in main"),
    }
}

#[expect(clippy::print_stdout, reason = "it is what was asked for")]
fn print_version() {
    println!("kvfabric {}", env!("CARGO_PKG_VERSION"));
}
