//! The commands of `kv-indexer`, also `kvfabric indexer`.

use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use kvcache_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::config::ServerConfig;
use crate::server;

#[cfg(feature = "client")]
mod ask;
#[cfg(feature = "client")]
mod dump;
#[cfg(feature = "client")]
mod top;

/// The exit status of a command that failed.
const FAILURE: u8 = 1;
/// The exit status when an argument or a setting made no sense.
const USAGE: u8 = 2;
/// Running calls may take so long after a signal before they are cut off.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

/// The global index of KV-cache blocks: which pods hold a prefix, how deep, in which tier.
#[derive(Debug, Parser)]
#[command(name = "kv-indexer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What `kv-indexer` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Follow publishers of KV events and answer lookups over gRPC until SIGTERM or SIGINT.
    Serve(Serve),
    /// Ask a running index who holds a prompt.
    #[cfg(feature = "client")]
    Query(ask::Query),
    /// List the pods and sources of a running index.
    #[cfg(feature = "client")]
    Pods(ask::Pods),
    /// Write down what a running index knows: sources and blocks, or a file that another index can begin from.
    #[cfg(feature = "client")]
    Dump(dump::Dump),
    /// Show again and again what a running index does: its rates, and the sources that lag most.
    #[cfg(feature = "client")]
    Top(top::Top),
}

/// Settings come from the file, then from `KVFABRIC_INDEXER_*`, then from these flags.
///
/// The bound addresses are printed on standard output as one line of JSON as soon as they listen:
/// `{"event":"listening","grpc":"127.0.0.1:50051","metrics":null}`.
#[derive(Clone, Debug, clap::Args)]
pub struct Serve {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where gRPC listens; port 0 takes any free one.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub grpc_listen: Option<SocketAddr>,
    /// Where Prometheus metrics are served.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// The scheme of index keys: xxh3:SEED, cbor-fnv:SEED or xxh64:SEED.
    #[arg(long, value_name = "SCHEME")]
    pub key_scheme: Option<String>,
    /// Tokens a block.
    #[arg(long, value_name = "TOKENS")]
    pub block_size: Option<u32>,
    /// How long a source may stay disconnected before its entries are dropped, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub source_ttl_ms: Option<u64>,
    /// What the index may take: a number of bytes, or with KiB, MiB or GiB; `unlimited` for no bound.
    #[arg(long, value_name = "BYTES")]
    pub max_bytes: Option<String>,
    /// Where the index keeps a snapshot of itself to begin from after a restart.
    #[arg(long, value_name = "FILE")]
    pub snapshot_path: Option<PathBuf>,
    /// Replicas whose snapshot to begin from, tried in this order before the own one.
    #[arg(long, value_name = "HOST:PORT,…")]
    pub bootstrap_peers: Option<String>,
}

impl Serve {
    /// The settings that result from file, environment and flags.
    ///
    /// # Errors
    /// As [`ServerConfig::load`].
    pub fn settings(&self) -> Result<ServerConfig> {
        let flags = [
            (
                "grpc_listen",
                self.grpc_listen.map(|value| value.to_string()),
            ),
            (
                "metrics_listen",
                self.metrics_listen.map(|value| value.to_string()),
            ),
            ("key_scheme", self.key_scheme.clone()),
            ("block_size", self.block_size.map(|value| value.to_string())),
            (
                "source_ttl_ms",
                self.source_ttl_ms.map(|value| value.to_string()),
            ),
            ("max_bytes", self.max_bytes.clone()),
            (
                "snapshot_path",
                self.snapshot_path
                    .as_ref()
                    .map(|path| path.to_string_lossy().into_owned()),
            ),
            ("bootstrap_peers", self.bootstrap_peers.clone()),
        ];
        let given = flags
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?)));
        ServerConfig::load(self.config.as_deref(), &given.collect::<Vec<_>>())
    }
}

/// Parses the arguments (the program's name first) and executes the command.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match Cli::try_parse_from(args) {
        Ok(cli) => execute(cli.command),
        Err(error) => {
            // Help and version are no failures; clap knows where each belongs.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
        }
    }
}

/// Executes a command, with its own runtime and logs on standard error.
pub fn execute(command: Command) -> ExitCode {
    // A second subscriber is refused: the program that embeds this one has set up its own.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .try_init();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Error::io("start the runtime", error)),
    };
    let done = runtime.block_on(async {
        match command {
            Command::Serve(serve) => serve_until_signal(&serve).await,
            #[cfg(feature = "client")]
            Command::Query(query) => query.run().await,
            #[cfg(feature = "client")]
            Command::Pods(pods) => pods.run().await,
            #[cfg(feature = "client")]
            Command::Dump(dump) => dump.run().await,
            #[cfg(feature = "client")]
            Command::Top(top) => top.run().await,
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &Error) -> ExitCode {
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "error: {error}");
    ExitCode::from(if error.kind() == ErrorKind::Invalid {
        USAGE
    } else {
        FAILURE
    })
}

async fn serve_until_signal(serve: &Serve) -> Result<()> {
    let running = server::serve(serve.settings()?).await?;
    let mut listening = json!({
        "event": "listening",
        "grpc": running.grpc_address().to_string(),
        "events": running.event_endpoints(),
        "metrics": running.metrics_address().map(|address| address.to_string()),
    });
    let tenants = running.tenant_addresses();
    if !tenants.is_empty() {
        let tenants = tenants.iter();
        let tenants = tenants.map(|(tenant, address)| (tenant.clone(), address.to_string().into()));
        listening["tenants"] = serde_json::Value::Object(tenants.collect());
    }
    print_line(&listening.to_string())?;
    stop_signal().await?;
    tracing::info!("shutting down");
    running.shutdown(SHUTDOWN_PATIENCE).await
}

async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| signal(kind).map_err(|error| Error::io("listen for signals", error));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// One line on standard output, flushed: whoever started the program may wait for it.
fn print_line(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}")
        .and_then(|()| output.flush())
        .map_err(|error| Error::io("write to standard output", error))
}
