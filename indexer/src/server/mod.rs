//! The index as a gRPC service, with health, reflection and metrics.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::indexer_v1::indexer_service_server::IndexerServiceServer;
use kvfabric_proto::v1_encoded::index_server::IndexServer;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

pub use crate::config::ServerConfig;
use crate::snapshot::check_replaceable;
use crate::tokenize::Tokenizers;
use crate::wire::MESSAGE_BYTES_MAX;
use crate::zmtp::{Endpoint, Listener};

mod access;
mod admission;
mod bootstrap;
mod bound;
mod export;
mod fields;
mod hub;
mod lookup;
mod many;
mod models;
mod native;
mod pools;
mod positions;
mod routing;
mod scores;
mod tidy;
mod told;

use access::Access;
use bootstrap::bootstrap;
use bound::{Door, listen};
use export::{SNAPSHOTS_MAX, keep_saved};
use hub::Hub;
use many::STREAMS_MAX;
use native::{IndexService, Shared};
use scores::ScoreService;
use tidy::keep_tidy;

/// How often an idle connection is probed, and how long the answer may take: a pod that vanished without closing its
/// connection is noticed within both.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that listens; dropping it stops it without waiting.
#[derive(Debug)]
pub struct Running {
    grpc_address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    tenant_addresses: BTreeMap<String, SocketAddr>,
    event_endpoints: Vec<String>,
    stopping: watch::Sender<bool>,
    tasks: JoinSet<()>,
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

    /// Where gRPC listens for one tenant each, by the tenant's name, with the ports that were really bound.
    #[must_use]
    pub fn tenant_addresses(&self) -> &BTreeMap<String, SocketAddr> {
        &self.tenant_addresses
    }

    /// Where engines connect by themselves, in the order of the configuration, with the ports that were really bound.
    #[must_use]
    pub fn event_endpoints(&self) -> &[String] {
        &self.event_endpoints
    }

    /// Stops taking calls, ends the registrations, and waits for running calls at most for `patience`.
    ///
    /// # Errors
    /// `Timeout` when calls had to be cut off.
    ///
    /// # Cancel safety
    /// Dropping the future cuts off what still runs.
    pub async fn shutdown(mut self, patience: Duration) -> Result<()> {
        self.stopping.send_replace(true);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        timeout(patience, ended).await.map_err(|_| {
            let context = format!("calls were still running after {} ms", patience.as_millis());
            Error::new(ErrorKind::Timeout, context)
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopping.send_replace(true);
    }
}

/// Binds, starts to follow the configured sources, and serves until [`Running::shutdown`].
///
/// # Errors
/// `Invalid` naming the setting; `Io` naming the address when it is in use.
pub async fn serve(config: ServerConfig) -> Result<Running> {
    check(&config)?;
    let tokenizers = Arc::new(Tokenizers::load(&config.tokenizers)?);
    let (grpc, grpc_address) = bind("grpc_listen", config.grpc_listen).await?;
    let metrics = match config.metrics_listen {
        Some(address) => Some(bind("metrics_listen", address).await?),
        None => None,
    };
    let (doors, event_endpoints) = open_doors(&config).await?;
    let (for_tenants, tenant_addresses) = bind_for_tenants(&config).await?;
    let lookups = Semaphore::new(config.lookups_in_flight_max);
    let hub = Arc::new(Hub::new(config)?);
    let configured = hub.configured()?;
    let has_bootstrap =
        !hub.config.bootstrap_peers.is_empty() || hub.config.snapshot_path.is_some();
    if has_bootstrap {
        let reason = "no snapshot is taken up yet".to_owned();
        hub.not_serving.send_replace(Some(reason));
    } else {
        hub.join_configured(&configured)?;
    }
    let stopping = watch::Sender::new(false);
    let shared = Arc::new(Shared {
        hub: hub.clone(),
        lookups,
        snapshots: Arc::new(Semaphore::new(SNAPSHOTS_MAX)),
        streams: Arc::new(Semaphore::new(STREAMS_MAX)),
        stopping: stopping.clone(),
    });
    let metrics_address = metrics.as_ref().map(|(_, address)| *address);
    let mut tasks = JoinSet::new();
    if has_bootstrap {
        let mut stopped = stopping.subscribe();
        let bootstrap = bootstrap(hub.clone(), configured);
        tasks.spawn(async move {
            tokio::select! {
                () = bootstrap => {}
                _ = stopped.wait_for(|stopping| *stopping) => {}
            }
        });
        tasks.spawn(keep_saved(hub.clone(), stopping.subscribe()));
    }
    for door in doors {
        let (hub, mut stopped) = (hub.clone(), stopping.subscribe());
        tasks.spawn(async move {
            tokio::select! {
                () = listen(hub, door) => {}
                _ = stopped.wait_for(|stopping| *stopping) => {}
            }
        });
    }
    tasks.spawn(keep_tidy(hub.clone(), stopping.subscribe()));
    for (listener, access) in with_access(&hub, grpc, for_tenants)? {
        let service = (shared.clone(), access, tokenizers.clone());
        tasks.spawn(serve_grpc(service, listener, stopping.subscribe()));
    }
    if let Some((listener, _)) = metrics {
        tasks.spawn(serve_metrics(hub, listener, stopping.subscribe()));
    }
    Ok(Running {
        grpc_address,
        metrics_address,
        tenant_addresses,
        event_endpoints,
        stopping,
        tasks,
    })
}

/// What the settings say, and what they name.
fn check(config: &ServerConfig) -> Result<()> {
    config.check()?;
    match &config.snapshot_path {
        Some(path) => check_replaceable(path).map_err(|error| error.at("snapshot_path")),
        None => Ok(()),
    }
}

/// Binds the endpoints that engines connect to.
async fn open_doors(config: &ServerConfig) -> Result<(Vec<Door>, Vec<String>)> {
    let (mut doors, mut endpoints) = (Vec::new(), Vec::new());
    for (place, configured) in config.listeners_by_rank()?.iter().enumerate() {
        let endpoint: Endpoint = configured.endpoint.parse()?;
        let bound = Listener::bind(&endpoint).await;
        let listener = bound.map_err(|error| error.at(format_args!("listeners[{place}]")))?;
        endpoints.push(listener.endpoint()?.to_string());
        doors.push(Door { listener, place });
    }
    Ok((doors, endpoints))
}

/// What is bound for tenants, by their names.
type ForTenants = BTreeMap<String, TcpListener>;

/// What may be had at each address.
///
/// # Errors
/// `Denied` for an address of the default tenant where everybody must belong to another one.
fn with_access(
    hub: &Hub,
    grpc: TcpListener,
    for_tenants: ForTenants,
) -> Result<Vec<(TcpListener, Access)>> {
    let for_tenants = for_tenants.into_iter().map(|(name, listener)| {
        let tenant = hub.tenants.of_question(&name, "")?;
        Ok((listener, Access::Tenant(tenant)))
    });
    let all = std::iter::once(Ok((grpc, Access::Any))).chain(for_tenants);
    all.collect()
}

/// Binds the addresses that are tenants' own.
async fn bind_for_tenants(
    config: &ServerConfig,
) -> Result<(ForTenants, BTreeMap<String, SocketAddr>)> {
    let (mut bound, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    for (name, tenant) in &config.tenants {
        if let Some(address) = tenant.grpc_listen {
            let key = format!("tenants.{name}.grpc_listen");
            let (listener, address) = bind(&key, address).await?;
            bound.insert(name.clone(), listener);
            addresses.insert(name.clone(), address);
        }
    }
    Ok((bound, addresses))
}

async fn bind(key: &str, address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = |error: std::io::Error| {
        let context = match error.kind() {
            std::io::ErrorKind::AddrInUse => format!("{key}: the address {address} is in use"),
            _ => format!("{key}: listen on {address}"),
        };
        Error::new(ErrorKind::Io, context).with_source(error)
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

async fn serve_grpc(
    (shared, access, tokenizers): (Arc<Shared>, Access, Arc<Tokenizers>),
    listener: TcpListener,
    stopping: watch::Receiver<bool>,
) {
    let (health, health_service) = tonic_health::server::health_reporter();
    // Before the server listens to anybody.
    let mut not_serving = shared.hub.not_serving.subscribe();
    let is_ready = not_serving.borrow_and_update().is_none();
    report(&health, is_ready).await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(kvfabric_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1();
    let reflection = match reflection {
        Ok(service) => Some(service),
        Err(error) => {
            tracing::error!(%error, "descriptors for reflection; it is left out");
            None
        }
    };
    let index = IndexService {
        shared: shared.clone(),
        access,
    };
    let index = IndexServer::new(index).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let scores = ScoreService {
        shared,
        access,
        tokenizers,
    };
    let scores = IndexerServiceServer::new(scores).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let stopped = async move {
        let stopped = until_stopped(stopping);
        tokio::select! {
            () = stopped => {}
            () = report_changes(&health, not_serving) => {}
        }
        report(&health, false).await;
    };
    let served = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .add_service(health_service)
        .add_optional_service(reflection)
        .add_service(index)
        .add_service(scores)
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stopped,
        )
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "gRPC server");
    }
}

/// The sender lives in `Running`; its end is a stop too.
async fn until_stopped(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

/// What probes learn: of the server as a whole, and of both services.
async fn report(health: &HealthReporter, is_serving: bool) {
    let status = if is_serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    let services = [
        "",
        <IndexServer<IndexService> as NamedService>::NAME,
        <IndexerServiceServer<ScoreService> as NamedService>::NAME,
    ];
    for service in services {
        health.set_service_status(service, status).await;
    }
}

/// Keeps probes told until the hub is gone.
async fn report_changes(health: &HealthReporter, mut not_serving: watch::Receiver<Option<String>>) {
    while not_serving.changed().await.is_ok() {
        let is_serving = not_serving.borrow_and_update().is_none();
        report(health, is_serving).await;
    }
}

async fn serve_metrics(hub: Arc<Hub>, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    let page = async move || match hub.metrics.render(&hub.holdings(Access::Any)) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    };
    let router = Router::new().route("/metrics", get(page));
    let stopped = async move {
        let _ = stopping.wait_for(|stopping| *stopping).await;
    };
    if let Err(error) = axum::serve(listener, router)
        .with_graceful_shutdown(stopped)
        .await
    {
        tracing::error!(%error, "metrics server");
    }
}
