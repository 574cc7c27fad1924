//! The service that peers talk to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, LeaseId, PodName, Result};
use kvfabric_proto::v1;
use kvfabric_proto::v1::peer_server::{Peer, PeerServer as Service};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::wire::{self, Hello, LeaseAnswer, LeasedBlock, LocateQuestion};
use crate::cache::{Desk, Locator, Reach, ReadyLease};
use crate::config::NameReader;
use crate::mover::Mover;
use crate::numbers::Numbers;

/// Calls of one connection answered at a time; more wait.
const CALLS_PER_CONNECTION_MAX: usize = 64;

/// The longest that one call may take; a lease answers well before, within the manager's `stage_wait`.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The peer service of one cache, listening. Stops when dropped.
#[derive(Debug)]
pub struct PeerServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// What the service answers from.
pub(crate) struct Serving {
    pub(crate) desk: Desk,
    pub(crate) mover: Arc<Mover>,
    pub(crate) locator: Arc<Locator>,
    pub(crate) names: Option<NameReader>,
    pub(crate) pod: PodName,
    /// Which run of this node it is: peers find out that it restarted.
    pub(crate) incarnation: u64,
    pub(crate) numbers: Numbers,
}

impl PeerServer {
    /// Starts to listen.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], with the address, when it is in use or not this host's.
    pub(crate) async fn start(listen: SocketAddr, serving: Serving) -> Result<Self> {
        let failed = |error| Error::io(format!("listen for peers on {listen}"), error);
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let service = Service::new(serving)
            .max_decoding_message_size(wire::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(wire::MESSAGE_BYTES_MAX);
        let (stop, stopped) = oneshot::channel::<()>();
        // A lease is one small answer that somebody waits for: it must not linger for the next one.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = Server::builder()
            .concurrency_limit_per_connection(CALLS_PER_CONNECTION_MAX)
            .timeout(CALL_TIMEOUT)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, async {
                // An error means that the handle is gone: the same.
                let _ = stopped.await;
            });
        let task = tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "peer service on {address} ended");
            }
        });
        Ok(Self {
            address,
            stop: Some(stop),
            task,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more calls and ends those in progress, at `deadline` by force.
    pub async fn shutdown(mut self, deadline: Instant) {
        drop(self.stop.take());
        let deadline = tokio::time::Instant::from_std(deadline);
        if tokio::time::timeout_at(deadline, &mut self.task)
            .await
            .is_err()
        {
            tracing::debug!("peer service on {} ended by force", self.address);
            self.task.abort();
            // It ends where it waits next; an error says that it was ended.
            let _ = (&mut self.task).await;
        }
    }
}

impl Drop for PeerServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tonic::async_trait]
impl Peer for Serving {
    async fn hello(
        &self,
        request: Request<v1::HelloRequest>,
    ) -> Result<Response<v1::HelloResponse>, Status> {
        let identity = &self.mover.expected.model_identity;
        let pod = wire::check_hello(request.get_ref(), identity).map_err(|error| {
            tracing::warn!(%error, "peer refused");
            wire::status_of(&error)
        })?;
        tracing::debug!(%pod, "peer greeted");
        Ok(Response::new(wire::hello_response(&Hello {
            pod: self.pod.clone(),
            agent_metadata: self.mover.agent.metadata(),
            incarnation: self.incarnation,
        })))
    }

    async fn lease(
        &self,
        request: Request<v1::LeaseRequest>,
    ) -> Result<Response<v1::LeaseResponse>, Status> {
        let question = wire::check_lease(request.get_ref()).map_err(|e| wire::status_of(&e))?;
        if question.incarnation != self.incarnation {
            return Err(wire::other_incarnation(
                question.incarnation,
                self.incarnation,
            ));
        }
        if question.block_bytes != self.mover.expected.block_bytes {
            let expected = [self.mover.expected.block_bytes];
            let error = Error::invalid("block_bytes", question.block_bytes, expected);
            return Err(wire::status_of(&error));
        }
        let roster = &self.mover.peers.roster;
        let peer = roster
            .id(&question.pod)
            .map_err(|error| wire::status_of(&error))?;
        let leased = self.desk.lease(peer, question.keys, question.ttl).await;
        let ready = leased.map_err(|error| wire::status_of(&error))?;
        Ok(Response::new(wire::lease_response(&self.answer(&ready))))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let request = request.get_ref();
        let peer = PodName::new(&request.pod)
            .and_then(|pod| self.mover.peers.roster.id(&pod))
            .map_err(|error| wire::status_of(&error))?;
        let lease = LeaseId(self.numbers.inside(request.lease));
        match self.desk.release(peer, lease) {
            // A full queue: the lease ends by itself.
            Err(error) if error.kind() != ErrorKind::Busy => Err(wire::status_of(&error)),
            _ => Ok(Response::new(v1::ReleaseResponse {})),
        }
    }

    async fn locate(
        &self,
        request: Request<v1::LocateRequest>,
    ) -> Result<Response<v1::LocateResponse>, Status> {
        let question = wire::check_locate(request.into_inner()).map_err(|e| wire::status_of(&e))?;
        let located = self.reach(question).await;
        let reach = located.map_err(|error| wire::status_of(&error))?;
        Ok(Response::new(wire::locate_response(&reach)))
    }

    async fn unpin(
        &self,
        request: Request<v1::UnpinRequest>,
    ) -> Result<Response<v1::UnpinResponse>, Status> {
        let identity = &self.mover.expected.model_identity;
        let pin = wire::check_unpin(request.get_ref(), identity);
        let pin = pin.map_err(|error| wire::status_of(&error))?;
        match self.desk.unpin(pin) {
            // A full queue: the pin ends by itself.
            Err(error) if error.kind() != ErrorKind::Busy => Err(wire::status_of(&error)),
            _ => Ok(Response::new(v1::UnpinResponse {})),
        }
    }
}

impl Serving {
    async fn reach(&self, question: LocateQuestion) -> Result<Reach> {
        let deadline = Instant::now() + question.deadline;
        let Some(names) = self.names.clone() else {
            let context = format!("pod {} has no way to read names of blocks", self.pod);
            return Err(Error::new(ErrorKind::Unsupported, context));
        };
        // A long prompt's names take milliseconds to hash: elsewhere than where answers are sent.
        let read = tokio::task::spawn_blocking(move || names.read(&question.names)).await;
        let infos = read.map_err(|error| {
            Error::new(ErrorKind::Internal, "a thread that reads names").with_source(error)
        })??;
        self.locator.reach(&infos, deadline).await
    }

    fn answer(&self, ready: &ReadyLease) -> LeaseAnswer {
        let blocks = ready.blocks.iter().map(|block| {
            let bytes = self.mover.arena.block(block.slot);
            let generation = self.mover.arena.generation(block.slot);
            LeasedBlock {
                region: bytes.region.0,
                offset: bytes.offset,
                checksum: block.checksum,
                generation: u64::from(block.slot.generation.0),
                generation_region: generation.region.0,
                generation_offset: generation.offset,
                tier: block.tier,
            }
        });
        LeaseAnswer {
            lease: LeaseId(self.numbers.outside(ready.lease.0)),
            ttl: ready.ttl,
            blocks: blocks.collect(),
        }
    }
}
