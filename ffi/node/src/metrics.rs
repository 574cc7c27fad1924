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
use kvfabric_transfer::{Agent, BackendStats, PortStats};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;

use crate::node::Hbm;

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
    hbm: Arc<Hbm>,
}

impl MetricsServer {
    pub(crate) async fn start(
        address: SocketAddr,
        agent: &Agent,
        cache: &Cache,
        hbm: &Arc<Hbm>,
    ) -> Result<Self> {
        let listen = |e| Error::io(format!("listen for metrics on {address}"), e);
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let sources = Arc::new(Sources {
            agent: agent.clone(),
            cache: cache.clone(),
            hbm: hbm.clone(),
        });
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
        Ok(stats) => {
            let mut entries = stats.entries();
            entries.extend(sources.hbm.stats().entries());
            render(&entries, &sources.agent)
        }
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
    register_ports(&mut registry, &stats.ports);
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|e| {
        Error::new(kvcache_core::ErrorKind::Internal, "encode metrics").with_source(e)
    })?;
    Ok(text)
}

/// Of network cards that are used by name; nothing where there are none.
fn register_ports(registry: &mut Registry, ports: &[PortStats]) {
    type Read = fn(&PortStats) -> u64;
    let families: [(&str, &str, Read); 5] = [
        ("transfer_port_up", "Whether the port is up", |s| {
            u64::from(s.is_up)
        }),
        ("transfer_port_read_bytes", "Bytes read, by port", |s| {
            s.bytes_read
        }),
        (
            "transfer_port_written_bytes",
            "Bytes written, by port",
            |s| s.bytes_written,
        ),
        (
            "transfer_port_rails_lost",
            "Rails lost while others went on, by port",
            |s| s.rails_lost,
        ),
        (
            "transfer_port_pieces_repeated",
            "Pieces done again by another port",
            |s| s.pieces_repeated,
        ),
    ];
    for (name, help, read) in families {
        let family = Family::<[(&'static str, String); 1], Gauge<i64>>::default();
        for port in ports {
            let gauge = family.get_or_create(&[("port", port.name.clone())]);
            gauge.set(level(read(port)));
        }
        registry.register(name, help, family);
    }
}

fn level(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
