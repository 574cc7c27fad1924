//! The server's process: the index's own server as `kv-indexer` runs it, and the echo beside it.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_indexer::server::{ServerConfig, serve};

use super::super::fill::BLOCK_TOKENS;
use super::echo;

/// How long running calls may take at the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running server; it ends when this is dropped.
pub(super) struct ServerProcess {
    child: Child,
    /// Where the index listens.
    pub(super) index: String,
    /// Where the echo does.
    pub(super) echo: String,
}

impl ServerProcess {
    /// Starts this program again as a server.
    ///
    /// # Errors
    /// `Io` when it cannot be started, `PeerLost` when it does not say where it listens.
    pub(super) fn start() -> Result<Self> {
        let failed = |error| Error::io("start the server's process", error);
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg("index-server")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the client alone, which ends the server when it is done.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout)
                .read_line(&mut line)
                .map_err(failed)?;
        }
        let mut addresses = line.split_whitespace().map(str::to_owned);
        match (addresses.next(), addresses.next()) {
            (Some(index), Some(echo)) => Ok(Self { child, index, echo }),
            _ => Err(Error::new(
                ErrorKind::PeerLost,
                format!("the server's process said {line:?}"),
            )),
        }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // The end of its input tells it; what goes wrong here is over anyway.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Serves until the input ends.
///
/// # Errors
/// `Io` when it cannot listen.
pub(crate) fn serve_until_told() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("start the runtime", error))?;
    runtime.block_on(async {
        let server = serve(ServerConfig {
            grpc_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            metrics_listen: None,
            block_size: BLOCK_TOKENS,
            ..ServerConfig::default()
        })
        .await?;
        say(server.grpc_address(), echo::serve()?);
        let until_end = tokio::task::spawn_blocking(|| {
            // Whether it ends or fails, nobody is there any more.
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
        });
        let _ = until_end.await;
        server.shutdown(PATIENCE).await
    })
}

#[expect(
    clippy::print_stdout,
    reason = "the process that started this one reads it"
)]
fn say(index: SocketAddr, echo: SocketAddr) {
    println!("{index} {echo}");
}
