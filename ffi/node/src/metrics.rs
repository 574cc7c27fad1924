//! A node's counters for Prometheus, over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use kvcache_core::{Error, Result};
use kvfabric_tiers::Cache;
use kvfabric_transfer::{Agent, BackendStats};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

/// The content type of the text format that is answered.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `/metrics` until it is dropped.
pub(crate) struct MetricsServer {
    address: SocketAddr,
    task: JoinHandle<()>,
}

/// What is read at each scrape.
struct Sources {
    agent: Agent,
    cache: Cache,
}

impl MetricsServer {
    pub(crate) async fn start(address: SocketAddr, agent: Agent, cache: Cache) -> Result<Self> {
        let listen = |e| Error::io(format!("listen for metrics on {address}"), e);
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let sources = Arc::new(Sources { agent, cache });
        let routes = Router::new()
            .route("/metrics", get(scrape))
            .with_state(sources);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::warn!(%error, "metrics server ended");
            }
        });
        Ok(Self { address, task })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn scrape(State(sources): State<Arc<Sources>>) -> Response {
    let text = match sources.cache.stats().await {
        Ok(stats) => render(&stats.entries(), &sources.agent),
        Err(error) => Err(error),
    };
    match text {
        Ok(text) => ([(CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

/// Gauges throughout: the values are read from counters kept elsewhere, and a gauge takes any value.
fn render(tiers: &[(&'static str, u64)], agent: &Agent) -> Result<String> {
    let mut registry = Registry::with_prefix("kvfabric");
    for (name, value) in tiers {
        let gauge = Gauge::<i64>::default();
        gauge.set(level(*value));
        registry.register(format!("node_{name}"), "See docs/metrics.md", gauge);
    }
    type Read = fn(&BackendStats) -> u64;
    let families: [(&str, &str, Read); 4] = [
        ("transfer_read_bytes", "Bytes read, by backend", |s| {
            s.bytes_read
        }),
        ("transfer_written_bytes", "Bytes written, by backend", |s| {
            s.bytes_written
        }),
        (
            "transfer_requests",
            "Requests that succeeded, by backend",
            |s| s.requests,
        ),
        (
            "transfer_failures",
            "Requests that failed, by backend",
            |s| s.failures,
        ),
    ];
    let stats = agent.stats();
    for (name, help, read) in families {
        let family = Family::<[(&'static str, &'static str); 1], Gauge<i64>>::default();
        for (backend, counted) in &stats.backends {
            family
                .get_or_create(&[("backend", *backend)])
                .set(level(read(counted)));
        }
        registry.register(name, help, family);
    }
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|e| {
        Error::new(kvcache_core::ErrorKind::Internal, "encode metrics").with_source(e)
    })?;
    Ok(text)
}

fn level(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
