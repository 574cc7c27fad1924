//! A node's peer service for whoever has no node: schedulers that ask where blocks are, and let go of pins.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, PinId, Result};
use kvfabric_proto::v1::peer_client::PeerClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::roster::check_address;
use super::wire::{self, LocateQuestion};
use crate::cache::Reach;

/// The longest that one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The way to one node's peer service. Clones share its connection, which is made when it is first needed and again
/// whenever it was lost.
#[derive(Clone, Debug)]
pub struct PeerService {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: String,
    endpoint: Endpoint,
    client: Mutex<PeerClient<Channel>>,
}

impl PeerService {
    /// The way to the service at `address`, a `host:port`. Nothing is connected yet.
    ///
    /// Must be called within a tokio runtime, which then drives the connection.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an address that cannot be one.
    pub fn connect(address: &str) -> Result<Self> {
        check_address(address)?;
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| {
            let context = format!("address {address:?} is not host:port");
            Error::new(ErrorKind::Invalid, context).with_source(error)
        })?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
        Ok(Self {
            inner: Arc::new(Inner {
                address: address.to_owned(),
                client: Mutex::new(client(&endpoint)),
                endpoint,
            }),
        })
    }

    /// Where the service is.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// How much of a chain the node could bring, and from where. `names` say which blocks, in the notation of the
    /// node's [`crate::NameReader`]. The node is given seven eighths of `deadline`, so that what it found by then
    /// arrives in time.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] after `deadline`, [`ErrorKind::PeerLost`] when the node cannot be reached,
    /// [`ErrorKind::Unsupported`] when it cannot read names, [`ErrorKind::Invalid`] for names that it refuses.
    pub async fn locate(&self, names: Bytes, deadline: Duration) -> Result<Reach> {
        let question = LocateQuestion {
            names,
            deadline: deadline - deadline / 8,
        };
        let request = wire::locate_request(&question);
        let mut client = self.client();
        let answer = self
            .within(deadline, client.locate(request))
            .await?
            .into_inner();
        let at = |error: Error| error.at(format_args!("peer {}", self.inner.address));
        wire::check_locate_response(answer).map_err(at)
    }

    /// Lets go of what the node pinned. A pin that has ended is no error; one that the node is not asked for yet ends as
    /// soon as it is, if that is soon enough: see [`Cache::pin_as`](crate::Cache::pin_as).
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] after `deadline`, [`ErrorKind::PeerLost`] when the node cannot be reached,
    /// [`ErrorKind::Denied`] when it serves another model: the pin then ends by its time, if it is there.
    pub async fn unpin(
        &self,
        pin: PinId,
        model_identity: &[u8; 32],
        deadline: Duration,
    ) -> Result<()> {
        let request = wire::unpin_request(pin, model_identity);
        let mut client = self.client();
        self.within(deadline, client.unpin(request)).await.map(drop)
    }

    async fn within<T>(
        &self,
        deadline: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<Response<T>> {
        let address = &self.inner.address;
        match tokio::time::timeout(deadline, call).await {
            Ok(answer) => answer.map_err(|status| wire::error_of(&status, address)),
            Err(_) => {
                // The connection may be dead without having said so: the next call makes another.
                *self.lock() = client(&self.inner.endpoint);
                let context = format!("peer {address} did not answer within {deadline:?}");
                Err(Error::new(ErrorKind::Timeout, context))
            }
        }
    }

    fn client(&self) -> PeerClient<Channel> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PeerClient<Channel>> {
        let client = &self.inner.client;
        client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client(endpoint: &Endpoint) -> PeerClient<Channel> {
    PeerClient::new(endpoint.connect_lazy())
        .max_decoding_message_size(wire::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(wire::MESSAGE_BYTES_MAX)
}
