//! `kvfabric node`: a node without an engine.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::{Node, NodeConfig};

/// How long a node may take to write down what is in DRAM alone and to withdraw its blocks: less than the 30 s after
/// which orchestrators kill.
const SHUTDOWN_SECONDS: &str = "25";

/// Keeps DRAM, NVMe and object tiers, serves them to peers, and tells the index.
#[derive(Args, Clone, Debug)]
pub(crate) struct NodeArgs {
    /// TOML file; every key can be overridden by `KVFABRIC_NODE_<KEY>` (`__` between table and key) or --set.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key, like --set host.bytes=1073741824. Repeatable.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_override)]
    set: Vec<(String, String)>,
    /// How long the end may take, once asked for by SIGTERM or Ctrl-C: blocks that are in DRAM alone are written to the
    /// disk or object tier meanwhile, those used last first.
    #[arg(long, value_name = "SECONDS", default_value = SHUTDOWN_SECONDS)]
    shutdown_seconds: u32,
}

fn parse_override(text: &str) -> Result<(String, String)> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{text:?} is not KEY=VALUE")))
}

/// Runs until SIGTERM or Ctrl-C, then leaves in order.
pub(crate) async fn run(args: NodeArgs) -> Result<()> {
    let config = NodeConfig::load(args.config.as_deref(), &args.set)?;
    let node = Node::open(config).await?;
    announce(&node);
    wait_for_signal().await?;
    node.shutdown(Duration::from_secs(args.shutdown_seconds.into()))
        .await
}

#[expect(
    clippy::print_stdout,
    reason = "addresses that the system chose are what a caller needs"
)]
fn announce(node: &Node) {
    let text = |address: Option<String>| address.unwrap_or_else(|| "-".to_owned());
    println!(
        "pod {} peers {} metrics {}",
        node.pod(),
        text(node.peer_address().map(|a| a.to_string())),
        text(node.metrics_address().map(|a| a.to_string())),
    );
}

async fn wait_for_signal() -> Result<()> {
    let failed = |e| Error::io("listen for signals", e);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(failed)?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result.map_err(failed),
    }
}
