//! The service `kvfabric.v1.Index`.

use std::sync::Arc;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::v1_encoded::index_server::Index;
use kvfabric_proto::v1_encoded::{LookupBatchResponse, LookupReply};
use kvfabric_proto::{Encoded, PROTOCOL_VERSION, v1};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::access::Access;
use super::hub::{Hub, Pod};
use super::lookup::{Question, deadline};
use super::many::{STREAMS_MAX, answer_stream};
use crate::metrics::TenantHoldings;
use crate::wire::{SourcePosition, registration_from_wire, status_from_error};

/// A stream that registers nothing within so long is closed.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What both services work on.
pub(super) struct Shared {
    pub(super) hub: Arc<Hub>,
    pub(super) lookups: Semaphore,
    pub(super) streams: Arc<Semaphore>,
    pub(super) snapshots: Arc<Semaphore>,
    pub(super) stopping: watch::Sender<bool>,
}

impl Shared {
    /// Room for one more lookup.
    ///
    /// # Errors
    /// `Busy` naming the setting; `PeerLost` with the reason while a snapshot is not verified: other replicas may do.
    pub(super) fn admit(&self) -> Result<SemaphorePermit<'_>> {
        if let Some(reason) = &*self.hub.not_serving.borrow() {
            let context = format!("the indexer does not answer lookups yet: {reason}");
            return Err(Error::new(ErrorKind::PeerLost, context));
        }
        self.lookups.try_acquire().map_err(|_| {
            let most = self.hub.config.lookups_in_flight_max;
            let context = format!("{most} lookups are in flight (lookups_in_flight_max)");
            Error::new(ErrorKind::Busy, context)
        })
    }

    /// Answers one question.
    ///
    /// # Errors
    /// What the question or the state of the index refuses.
    pub(super) async fn answer_one(
        &self,
        mut question: v1::LookupRequest,
        deadline: Instant,
        access: Access,
    ) -> Result<Encoded> {
        let _room = self.admit()?;
        question.tenant = self.hub.named_tenant(access, question.tenant)?;
        let wanted = std::mem::take(&mut question.min_position);
        let wanted: Vec<_> = wanted.into_iter().map(SourcePosition::from_wire).collect();
        let question = Question::parse(&question)?;
        self.hub.wait_for(&wanted, deadline, access).await?;
        self.hub.answer_encoded(&question)
    }

    /// The error as the client gets it, counted.
    pub(super) fn refuse(&self, error: &Error) -> Status {
        self.hub.metrics.refused(error.kind());
        tracing::debug!(%error, "call refused");
        status_from_error(error)
    }
}

/// The service at one address.
pub(super) struct IndexService {
    pub(super) shared: Arc<Shared>,
    pub(super) access: Access,
}

#[tonic::async_trait]
impl Index for IndexService {
    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<Encoded>, Status> {
        let shared = &self.shared;
        let deadline = deadline(request.metadata(), shared.hub.config.lookup_deadline());
        let answer = shared
            .answer_one(request.into_inner(), deadline, self.access)
            .await;
        answer
            .map(Response::new)
            .map_err(|error| shared.refuse(&error))
    }

    async fn lookup_batch(
        &self,
        request: Request<v1::LookupBatchRequest>,
    ) -> Result<Response<LookupBatchResponse>, Status> {
        let shared = &self.shared;
        let deadline = deadline(request.metadata(), shared.hub.config.lookup_deadline());
        let questions = request.into_inner().questions;
        let answer = shared.answer_batch(questions, deadline, self.access).await;
        answer
            .map(Response::new)
            .map_err(|error| shared.refuse(&error))
    }

    async fn record_routing(
        &self,
        request: Request<v1::RecordRoutingRequest>,
    ) -> Result<Response<v1::RecordRoutingResponse>, Status> {
        let shared = &self.shared;
        let recorded = shared.admit().and_then(|_room| {
            let mut request = request.into_inner();
            request.tenant = shared.hub.named_tenant(self.access, request.tenant)?;
            shared.hub.record_routing(request)
        });
        recorded
            .map(Response::new)
            .map_err(|error| shared.refuse(&error))
    }

    type LookupStreamStream = ReceiverStream<Result<LookupReply, Status>>;

    async fn lookup_stream(
        &self,
        request: Request<Streaming<v1::LookupRequest>>,
    ) -> Result<Response<Self::LookupStreamStream>, Status> {
        let shared = self.shared.clone();
        let room = shared.streams.clone().try_acquire_owned().map_err(|_| {
            let context = format!("{STREAMS_MAX} streams of lookups are open");
            shared.refuse(&Error::new(ErrorKind::Busy, context))
        })?;
        // One reply at a time: what the client does not take is not computed either.
        let (replies, stream) = mpsc::channel(1);
        let questions = request.into_inner();
        tokio::spawn(answer_stream(
            (shared, self.access),
            questions,
            replies,
            room,
        ));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type SnapshotStream = ReceiverStream<Result<v1::SnapshotPiece, Status>>;

    async fn snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let shared = &self.shared;
        let allowed = shared.hub.may_see_all(self.access, "a snapshot");
        allowed
            .and_then(|()| shared.send_snapshot(&request.into_inner()))
            .map(|pieces| Response::new(ReceiverStream::new(pieces)))
            .map_err(|error| shared.refuse(&error))
    }

    type RegisterStream = ReceiverStream<Result<v1::RegisterResponse, Status>>;

    async fn register(
        &self,
        request: Request<Streaming<v1::RegisterRequest>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let shared = self.shared.clone();
        let mut messages = request.into_inner();
        let first = match timeout(FIRST_MESSAGE_TIMEOUT, messages.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(Err(status)) => return Err(status),
            Ok(Ok(None)) | Err(_) => {
                let context = "a registration stream without a registration";
                return Err(shared.refuse(&Error::new(ErrorKind::Invalid, context)));
            }
        };
        let registration = registration_from_wire(first);
        let joined = async { shared.hub.join(&registration?, self.access).await };
        let pod = joined.await.map_err(|error| shared.refuse(&error))?;
        let (answers, stream) = mpsc::channel(2);
        tokio::spawn(hold(shared, pod, messages, answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(self.shared.hub.status(self.access)))
    }
}

/// Keeps the pod as long as its stream is open.
async fn hold(
    shared: Arc<Shared>,
    pod: Arc<Pod>,
    mut messages: Streaming<v1::RegisterRequest>,
    answers: mpsc::Sender<Result<v1::RegisterResponse, Status>>,
) {
    let mut stopping = shared.stopping.subscribe();
    let mut ended = pod.ended.subscribe();
    let last_word = tokio::select! {
        () = report_ready(&pod, &answers) => None,
        // Whatever else comes, or the end, ends the registration: a pod says once what it is.
        message = messages.message() => match message {
            Ok(Some(_)) => {
                let context = format!("pod {} registered twice on one stream", pod.name);
                Some(status_from_error(&Error::new(ErrorKind::Invalid, context)))
            }
            Ok(None) | Err(_) => None,
        },
        () = answers.closed() => None,
        _ = ended.wait_for(|ended| *ended) => {
            Some(Status::aborted(format!("pod {} registered anew elsewhere", pod.name)))
        }
        _ = stopping.wait_for(|stopping| *stopping) => {
            let last_word = Status::unavailable("the indexer is shutting down");
            let _ = answers.try_send(Err(last_word));
            // The pod is not gone, the server is; its last snapshot shall have the pod.
            return;
        }
    };
    if let Some(status) = last_word {
        // Full only when the client does not read; then it learns of the end by the end.
        let _ = answers.try_send(Err(status));
    }
    drop(answers);
    shared.hub.leave(&pod).await;
}

/// Says so once every source is connected and replayed; never completes.
async fn report_ready(pod: &Pod, answers: &mpsc::Sender<Result<v1::RegisterResponse, Status>>) {
    let opened = Ok(v1::RegisterResponse { ready: false });
    // A client that is gone is noticed by the others.
    let _ = answers.send(opened).await;
    for source in &pod.sources {
        let mut progress = source.state.subscribe();
        let _ = progress.wait_for(|progress| progress.is_synced).await;
    }
    let _ = answers.send(Ok(v1::RegisterResponse { ready: true })).await;
    std::future::pending().await
}

impl Hub {
    fn status(&self, access: Access) -> v1::StatusResponse {
        let holdings = self.holdings(access);
        let mut pods: Vec<_> = self.pods().values().cloned().collect();
        pods.retain(|pod| self.may_see(access, pod));
        let of_process = match access {
            Access::Any => self.status_of_process(),
            // How busy others are is not this tenant's to know.
            Access::Tenant(_) => v1::StatusResponse::default(),
        };
        v1::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: PROTOCOL_VERSION,
            key_scheme: self.scheme_name(),
            block_size: self.config.block_size,
            pods: pods.iter().map(|pod| self.pod_status(pod)).collect(),
            blocks: holdings.blocks,
            entries: holdings.entries,
            bytes: holdings.bytes,
            serving: self.not_serving.borrow().is_none(),
            not_serving_reason: self.not_serving.borrow().clone().unwrap_or_default(),
            expected_blocks: holdings.expected_blocks,
            tenants: holdings
                .tenants
                .iter()
                .map(TenantHoldings::to_wire)
                .collect(),
            ..of_process
        }
    }

    /// What is counted over all tenants.
    fn status_of_process(&self) -> v1::StatusResponse {
        let (events_applied, events_rejected) = self.metrics.events();
        v1::StatusResponse {
            events_applied,
            events_rejected,
            lookups: self.metrics.lookups(),
            lag_p50_us: self.metrics.lag.quantile_us(0.50),
            lag_p99_us: self.metrics.lag.quantile_us(0.99),
            routings: self.metrics.routings(),
            ..v1::StatusResponse::default()
        }
    }

    fn pod_status(&self, pod: &Pod) -> v1::PodStatus {
        let now = std::time::Instant::now();
        let sources = pod.sources.iter().map(|source| {
            let progress = source.state.progress();
            let position = SourcePosition {
                source: source.name.clone(),
                position: progress.position,
            };
            v1::SourceStatus {
                position: Some(position.to_wire()),
                connected: progress.is_connected,
                gaps: progress.stats.gaps,
                replays: progress.stats.replays,
                resyncs: progress.stats.resyncs,
                orphans: self.orphans_of(pod, source),
                freshness: Some(source.seen(now).freshness),
            }
        });
        v1::PodStatus {
            pod: pod.name.as_str().to_owned(),
            entries: self.entries_of(pod),
            sources: sources.collect(),
            peer_address: pod.registration.peer_address.clone().unwrap_or_default(),
        }
    }
}
