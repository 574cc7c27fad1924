//! `kvfabric node`: a node without an engine.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric::{Node, NodeConfig};

/// How long a node may take to withdraw its blocks and flush.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

/// Keeps DRAM, NVMe and object tiers, serves them to peers, and tells the index.
#[derive(Args, Clone, Debug)]
pub(crate) struct NodeArgs {
    /// TOML file; every key can be overridden by `KVFABRIC_NODE_<KEY>` (`__` between table and key) or --set.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Override one key, like --set host.bytes=1073741824. Repeatable.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_override)]
    set: Vec<(String, String)>,
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
    node.shutdown(SHUTDOWN_DEADLINE).await
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
