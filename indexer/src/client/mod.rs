//! Asks the global index, and keeps a pod registered with it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvcache_core::ports::{Directory, Holder, LocateFuture, Located};
use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result};
use kvfabric_proto::v1::index_client::IndexClient as Grpc;
use kvfabric_proto::{PROTOCOL_VERSION, v1};
use tonic::transport::{Channel, Endpoint};

use crate::wire;

mod answer;
mod register;

pub use crate::wire::{
    CacheGroup, GroupRule, Registration, SourceKind, SourcePosition, SourceSpec,
};
pub use answer::{Freshness, LookupAnswer, PartDepth, PodDepth, PoolDepth, ScoreTerm};
pub use register::Registered;

/// Calls that may wait for the connection; further ones wait their turn until their deadline.
const CALLS_QUEUED_MAX: usize = 1024;
/// How often an idle connection is probed, and how long the answer may take: a vanished index is noticed within both.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a client reaches the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The index's gRPC address, `host:port` or `http://host:port`.
    pub address: String,
    /// The model of [`Directory`] questions; empty when the index serves only one.
    pub model: String,
    /// How long a call may take that names no deadline of its own.
    pub deadline: Duration,
    /// How long one attempt to connect may take.
    pub connect_timeout: Duration,
}

impl ClientConfig {
    /// One second for a call, two for connecting.
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            model: String::new(),
            deadline: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(2),
        }
    }
}

/// The prompt of a lookup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids; the tail that does not fill a block is ignored.
    Tokens(Vec<u32>),
    /// Index keys of the prompt's blocks, in order, made with the index's scheme.
    Keys(Vec<IndexKey>),
}

/// One question to the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupRequest {
    /// Whose entries to look at, by the name in the indexer's configuration; empty: the tenant that has the model, or the
    /// default one.
    pub tenant: String,
    /// The model as registered; empty when the index serves only one.
    pub model: String,
    /// The adapter; empty for none.
    pub lora: String,
    /// The tenant's cache salt; empty for none.
    pub cache_salt: String,
    /// What to look for.
    pub prompt: Prompt,
    /// At most so many pods, deepest first; 0 means all that hold anything.
    pub pods_max: u32,
    /// Only these pods; empty means all.
    pub pods: Vec<PodName>,
    /// Answer only once these are applied.
    pub min_position: Vec<SourcePosition>,
    /// Bounds everything, the wait for `min_position` too; the client's own deadline if none.
    pub deadline: Option<Duration>,
}

impl LookupRequest {
    /// A question about every pod, as the index stands, in the plain name space of `model`.
    #[must_use]
    pub fn new(model: impl Into<String>, prompt: Prompt) -> Self {
        Self {
            tenant: String::new(),
            model: model.into(),
            lora: String::new(),
            cache_salt: String::new(),
            prompt,
            pods_max: 0,
            pods: Vec::new(),
            min_position: Vec::new(),
            deadline: None,
        }
    }

    fn into_wire(self, options: LookupOptions) -> v1::LookupRequest {
        let prompt = match self.prompt {
            Prompt::Tokens(tokens) => v1::lookup_request::Prompt::Tokens(
                tokens
                    .iter()
                    .flat_map(|token| token.to_le_bytes())
                    .collect(),
            ),
            Prompt::Keys(keys) => v1::lookup_request::Prompt::Keys(v1::BlockKeys {
                keys: keys.into_iter().map(|key| key.0).collect(),
            }),
        };
        v1::LookupRequest {
            tenant: self.tenant,
            model: self.model,
            lora: self.lora,
            cache_salt: self.cache_salt,
            prompt: Some(prompt),
            pods_max: self.pods_max,
            pods: self
                .pods
                .iter()
                .map(|pod| pod.as_str().to_owned())
                .collect(),
            min_position: self
                .min_position
                .iter()
                .map(SourcePosition::to_wire)
                .collect(),
            ranking: match options.ranking {
                Ranking::Depth => v1::Ranking::Depth,
                Ranking::Score => v1::Ranking::Score,
            }
            .into(),
            explain: options.explain,
        }
    }
}

/// How an answer is ordered, and what it tells beside depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LookupOptions {
    /// What "best" means, for the order of the answer and for `pods_max`.
    pub ranking: Ranking,
    /// Say how each score comes about.
    pub explain: bool,
}

/// What makes one pod better than another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ranking {
    /// More blocks; ties by name.
    #[default]
    Depth,
    /// A higher score; ties by depth, then by name.
    Score,
}

/// A connection to the index; clones share it.
///
/// It lives on the tokio runtime of its first call.
#[derive(Clone, Debug)]
pub struct IndexClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ClientConfig,
    endpoint: Endpoint,
    channel: OnceLock<Channel>,
}

impl IndexClient {
    /// Checks the address; connects at the first call, and again whenever the connection was lost.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a malformed address.
    pub fn new(config: ClientConfig) -> Result<Self> {
        let uri = if config.address.contains("://") {
            config.address.clone()
        } else {
            format!("http://{}", config.address)
        };
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|error| {
                let context = format!("index address {:?}", config.address);
                Error::new(ErrorKind::Invalid, context).with_source(error)
            })?
            .connect_timeout(config.connect_timeout)
            .buffer_size(CALLS_QUEUED_MAX)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                endpoint,
                channel: OnceLock::new(),
            }),
        })
    }

    /// How this client reaches the index.
    #[must_use]
    pub fn config(&self) -> &ClientConfig {
        &self.inner.config
    }

    /// Depth per pod and tier of one prompt.
    ///
    /// # Errors
    /// `Timeout` when the deadline passed first (also while waiting for a position), `PeerLost` when the index cannot be
    /// reached, `Invalid` when it refused the question, `Busy` when it is overloaded.
    ///
    /// # Cancel safety
    /// Dropping the future withdraws the question.
    pub async fn lookup(&self, request: LookupRequest) -> Result<LookupAnswer> {
        self.lookup_with(request, LookupOptions::default()).await
    }

    /// As [`IndexClient::lookup`], ordered and explained as asked.
    ///
    /// # Errors
    /// As [`IndexClient::lookup`].
    ///
    /// # Cancel safety
    /// As [`IndexClient::lookup`].
    pub async fn lookup_with(
        &self,
        request: LookupRequest,
        options: LookupOptions,
    ) -> Result<LookupAnswer> {
        let deadline = request.deadline.unwrap_or(self.inner.config.deadline);
        let request = self.request(request.into_wire(options), deadline);
        let answer = self
            .within(deadline, "lookup", self.grpc().lookup(request))
            .await?;
        LookupAnswer::from_wire(answer).map_err(|error| error.at("answer of the index"))
    }

    /// Says that a prompt goes to a pod: its blocks are expected there for `ttl`, or as long as the index is configured
    /// for.
    ///
    /// Of `request` only what names the prompt counts.
    ///
    /// # Errors
    /// As [`IndexClient::lookup`]; `NotFound` when the pod is not registered.
    ///
    /// # Cancel safety
    /// Dropping the future may leave the decision recorded.
    pub async fn record_routing(
        &self,
        pod: &PodName,
        request: LookupRequest,
        ttl: Option<Duration>,
    ) -> Result<v1::RecordRoutingResponse> {
        use v1::lookup_request::Prompt as Asked;
        use v1::record_routing_request::Prompt as Told;
        let deadline = request.deadline.unwrap_or(self.inner.config.deadline);
        let question = request.into_wire(LookupOptions::default());
        let ttl = ttl.map_or(0, |ttl| u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX));
        let decision = v1::RecordRoutingRequest {
            tenant: question.tenant,
            model: question.model,
            lora: question.lora,
            cache_salt: question.cache_salt,
            prompt: question.prompt.map(|prompt| match prompt {
                Asked::Tokens(tokens) => Told::Tokens(tokens),
                Asked::Keys(keys) => Told::Keys(keys),
            }),
            pod: pod.as_str().to_owned(),
            ttl_ms: ttl,
        };
        let decision = self.request(decision, deadline);
        self.within(
            deadline,
            "record a routing",
            self.grpc().record_routing(decision),
        )
        .await
    }

    /// The pods and sources the index knows, with positions and lag.
    ///
    /// # Errors
    /// As [`IndexClient::lookup`].
    pub async fn status(&self) -> Result<v1::StatusResponse> {
        let deadline = self.inner.config.deadline;
        let request = self.request(v1::StatusRequest {}, deadline);
        self.within(deadline, "status", self.grpc().status(request))
            .await
    }

    /// Everything a replica would take up, piece by piece, as the index sends it.
    ///
    /// # Errors
    /// As [`IndexClient::lookup`]; `PeerLost` also while the index has nothing to give. The stream's own errors are
    /// gRPC's.
    pub async fn snapshot(&self) -> Result<tonic::Streaming<v1::SnapshotPiece>> {
        let request = v1::SnapshotRequest {
            protocol_version: PROTOCOL_VERSION,
            format: wire::SNAPSHOT_FORMAT,
        };
        let deadline = self.inner.config.deadline;
        // Without a deadline of its own: the client's is for the first piece only.
        let request = tonic::Request::new(request);
        self.within(deadline, "snapshot", self.grpc().snapshot(request))
            .await
    }

    /// Keeps the pod registered until the answer is dropped: reconnects with back-off and registers again.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    #[must_use]
    pub fn register(&self, registration: Registration) -> Registered {
        Registered::start(self.clone(), registration)
    }

    fn grpc(&self) -> Grpc<Channel> {
        let channel = self
            .inner
            .channel
            .get_or_init(|| self.inner.endpoint.connect_lazy());
        Grpc::new(channel.clone()).max_decoding_message_size(wire::MESSAGE_BYTES_MAX)
    }

    fn request<T>(&self, message: T, deadline: Duration) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(deadline);
        request
    }

    /// The call's answer, or what became of it, with the index's address.
    async fn within<T>(
        &self,
        deadline: Duration,
        call: &str,
        answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T> {
        let place = || format!("{call} at index {}", self.inner.config.address);
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(wire::error_from_status(&status).at(place())),
            Err(_) => {
                let context = format!("no answer within {} ms", deadline.as_millis());
                Err(Error::new(ErrorKind::Timeout, context).at(place()))
            }
        }
    }
}

impl Directory for IndexClient {
    fn locate(&self, chain: Vec<IndexKey>) -> LocateFuture<'_> {
        Box::pin(async {
            let question = LookupRequest::new(&self.inner.config.model, Prompt::Keys(chain));
            let answer = self.lookup(question).await?;
            // What nobody has confirmed can be fetched from nobody.
            let is_held = |pod: &PodDepth| pod.depth > 0 && !pod.is_approximate;
            let holders = answer.pods.into_iter().filter(is_held);
            Ok(Located {
                holders: holders
                    .map(|pod| Holder {
                        pod: pod.pod,
                        depth: pod.depth,
                        peer_address: pod.peer_address,
                    })
                    .collect(),
                shared: answer.shared,
            })
        })
    }
}
