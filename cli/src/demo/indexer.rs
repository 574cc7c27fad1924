//! The indexer of a demo: `kv-indexer`'s service in a process of its own, which ends with its parent.

use std::net::SocketAddr;
use std::time::Duration;

use kvcache_core::{Error, Result};
use kvfabric_indexer::config::ServerConfig;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

/// How long running lookups may take once the router is gone.
const SHUTDOWN_PATIENCE: Duration = Duration::from_millis(200);

/// The line that the process reads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct IndexerSetup {
    /// How index keys are made.
    pub(crate) key_scheme: String,
    /// Tokens a block.
    pub(crate) block_tokens: u32,
}

/// The line that it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct IndexerReady {
    /// Where gRPC listens.
    pub(crate) grpc: SocketAddr,
}

/// Serves until standard input ends: then the router is gone, however it went.
pub(crate) async fn run() -> Result<()> {
    let mut input = BufReader::new(tokio::io::stdin());
    let mut line = String::new();
    let read = |e| Error::io("read from the router", e);
    input.read_line(&mut line).await.map_err(read)?;
    let setup: IndexerSetup = super::pod::parse(&line)?;
    let running = kvfabric_indexer::server::serve(ServerConfig {
        grpc_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        key_scheme: setup.key_scheme,
        block_size: setup.block_tokens,
        ..ServerConfig::default()
    })
    .await?;
    let ready = IndexerReady {
        grpc: running.grpc_address(),
    };
    let mut answer = serde_json::to_vec(&ready).map_err(|e| {
        Error::new(kvcache_core::ErrorKind::Internal, "encode an answer").with_source(e)
    })?;
    answer.push(b'\n');
    let mut output = tokio::io::stdout();
    let write = |e| Error::io("write to the router", e);
    output.write_all(&answer).await.map_err(write)?;
    output.flush().await.map_err(write)?;
    let mut rest = [0; 64];
    while input.read(&mut rest).await.map_err(read)? > 0 {}
    running.shutdown(SHUTDOWN_PATIENCE).await
}
