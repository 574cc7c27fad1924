//! Connections to peers, made on first use, and the leases that peers granted us.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::manager::{GrantedBlock, GrantedLease};
use kvcache_core::{BlockKey, Error, ErrorKind, LeaseId, PeerId, PodName, Result};
use kvfabric_proto::v1::ReleaseRequest;
use kvfabric_proto::v1::peer_client::PeerClient;
use kvfabric_transfer::{Agent, PeerHandle};
use tonic::transport::{Channel, Endpoint};

use super::roster::Roster;
use super::wire::{self, LeaseQuestion, LeasedBlock};
use crate::config::{CacheConfig, PeerLimits};

/// A connection to one run of one peer.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) peer: PeerId,
    pub(crate) pod: PodName,
    pub(crate) handle: PeerHandle,
    incarnation: u64,
    client: PeerClient<Channel>,
    /// Whether it was of use: a peer that greets and then hangs is not one that lives.
    answered: AtomicBool,
}

/// A lease that a peer granted, and through which connection its blocks are read.
#[derive(Debug)]
pub(crate) struct HeldLease {
    pub(crate) link: Arc<Link>,
    pub(crate) blocks: Vec<LeasedBlock>,
    /// Counted from before we asked, so never later than the holder's own clock says.
    pub(crate) expires: Instant,
}

/// All peers of this node.
#[derive(Debug)]
pub(crate) struct Peers {
    agent: Agent,
    pod: PodName,
    model_identity: [u8; 32],
    block_bytes: u64,
    limits: PeerLimits,
    pub(crate) roster: Roster,
    slots: Mutex<BTreeMap<PeerId, Arc<Slot>>>,
    leases: Mutex<BTreeMap<(PeerId, LeaseId), Arc<HeldLease>>>,
}

/// What is known of the way to one peer. The lock is held while connecting, so that many who need
/// the same peer at once wait for one attempt.
#[derive(Debug, Default)]
struct Slot {
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Arc<Link>>,
    /// Attempts in a row of which none was of use.
    failures: u32,
    retry_at: Option<Instant>,
}

impl Peers {
    pub(crate) fn new(agent: &Agent, config: &CacheConfig) -> Self {
        Self {
            agent: agent.clone(),
            pod: config.pod.clone(),
            model_identity: config.model_identity,
            block_bytes: config.block_bytes,
            limits: config.peers.clone(),
            roster: Roster::default(),
            slots: Mutex::default(),
            leases: Mutex::default(),
        }
    }

    /// Asks a peer for a lease; within `deadline`, connection included.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`] when it cannot be reached, was not reachable a moment ago, or has no
    /// known address; otherwise what it answered.
    pub(crate) async fn lease(
        &self,
        peer: PeerId,
        keys: Vec<BlockKey>,
        ttl: Duration,
        deadline: Instant,
    ) -> Result<GrantedLease> {
        let deadline = tokio::time::Instant::from_std(deadline);
        let asked = tokio::time::timeout_at(deadline, self.ask(peer, keys, ttl)).await;
        asked.unwrap_or_else(|_| {
            // A peer that hangs would cost every fetch its time.
            self.hangs(peer);
            let context = format!("pod {} did not answer in time", self.name(peer));
            Err(Error::new(ErrorKind::Timeout, context))
        })
    }

    async fn ask(
        &self,
        peer: PeerId,
        mut keys: Vec<BlockKey>,
        ttl: Duration,
    ) -> Result<GrantedLease> {
        keys.truncate(wire::LEASE_KEYS_MAX);
        let mut link = self.link(peer).await?;
        let mut question = LeaseQuestion {
            pod: self.pod.clone(),
            incarnation: link.incarnation,
            keys,
            block_bytes: self.block_bytes,
            ttl,
        };
        let mut asked_at = Instant::now();
        let mut answer = link
            .client
            .clone()
            .lease(wire::lease_request(&question))
            .await;
        if answer.as_ref().is_err_and(wire::is_other_incarnation) {
            // It restarted since we greeted it: greet the new one, once.
            self.outdated(&link).await;
            link = self.link(peer).await?;
            question.incarnation = link.incarnation;
            asked_at = Instant::now();
            answer = link
                .client
                .clone()
                .lease(wire::lease_request(&question))
                .await;
        }
        let message = match answer {
            Ok(response) => {
                link.answered.store(true, Ordering::Relaxed);
                response.into_inner()
            }
            Err(status) => {
                let error = wire::error_of(&status, link.pod.as_str());
                if error.kind() == ErrorKind::PeerLost {
                    self.lost(&link);
                }
                return Err(error);
            }
        };
        let answer = wire::check_lease_response(&message, &question)
            .map_err(|error| error.at(format_args!("peer {}", link.pod)))?;
        let blocks = answer.blocks.iter().map(|block| GrantedBlock {
            checksum: block.checksum,
            tier: block.tier,
        });
        let granted = GrantedLease {
            lease: answer.lease,
            ttl: answer.ttl,
            blocks: blocks.collect(),
        };
        self.hold(
            HeldLease {
                link,
                blocks: answer.blocks,
                expires: asked_at + answer.ttl,
            },
            answer.lease,
        );
        Ok(granted)
    }

    fn hold(&self, held: HeldLease, lease: LeaseId) {
        let now = Instant::now();
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody gave back have ended by themselves.
        leases.retain(|_, lease| lease.expires > now);
        leases.insert((held.link.peer, lease), Arc::new(held));
    }

    /// A lease that has not ended.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for one that has, or never was.
    pub(crate) fn held(&self, peer: PeerId, lease: LeaseId) -> Result<Arc<HeldLease>> {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.get(&(peer, lease)).cloned().ok_or_else(|| {
            let context = format!("lease {lease} of pod {} has ended", self.name(peer));
            Error::new(ErrorKind::NotFound, context)
        })
    }

    /// Gives a lease back. Failing is harmless: it ends by itself.
    pub(crate) async fn release(&self, peer: PeerId, lease: LeaseId) {
        let held = {
            let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
            leases.remove(&(peer, lease))
        };
        let Some(held) = held else { return };
        let request = ReleaseRequest {
            pod: self.pod.as_str().to_owned(),
            lease: lease.0,
        };
        let mut client = held.link.client.clone();
        let call = client.release(request);
        if let Ok(Err(status)) = tokio::time::timeout(self.limits.call_timeout, call).await {
            tracing::debug!(pod = %held.link.pod, %lease, %status, "lease not given back");
        }
    }

    /// The connection turned out to be dead: the next use makes a new one.
    pub(crate) fn lost(&self, link: &Arc<Link>) {
        let slot = self.slot(link.peer);
        // Whoever holds the lock is connecting anew at this moment.
        let Ok(mut state) = slot.state.try_lock() else {
            return;
        };
        if state
            .link
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, link))
        {
            self.unlink(&mut state);
        }
    }

    /// The peer took too long to answer, or to be connected to.
    fn hangs(&self, peer: PeerId) {
        let slot = self.slot(peer);
        let Ok(mut state) = slot.state.try_lock() else {
            return;
        };
        if state.link.is_some() {
            self.unlink(&mut state);
        } else {
            self.back_off(&mut state);
        }
    }

    /// Gives the connection up. If it was of use, the next one is tried at once: a peer that was halted for a moment, or
    /// restarted, serves again as soon as it can. If it was not, or there will be none, the peer is left alone for a while.
    fn unlink(&self, state: &mut State) {
        let Some(link) = state.link.take() else {
            return;
        };
        if link.answered.load(Ordering::Relaxed) {
            state.failures = 0;
        } else {
            self.back_off(state);
        }
        self.agent.forget_peer(&link.handle);
    }

    /// Ends the connection to a pod that has left, if there is one.
    pub(crate) async fn forget(&self, peer: PeerId) {
        let slot = self.slot(peer);
        let mut state = slot.state.lock().await;
        if let Some(link) = state.link.take() {
            self.agent.forget_peer(&link.handle);
        }
    }

    /// The peer restarted: the next use greets its new run, without waiting.
    async fn outdated(&self, link: &Arc<Link>) {
        let slot = self.slot(link.peer);
        let mut state = slot.state.lock().await;
        if state
            .link
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, link))
        {
            state.link = None;
        }
    }

    async fn link(&self, peer: PeerId) -> Result<Arc<Link>> {
        let slot = self.slot(peer);
        let mut state = slot.state.lock().await;
        if let Some(link) = &state.link {
            return Ok(link.clone());
        }
        if let Some(retry_at) = state.retry_at
            && retry_at > Instant::now()
        {
            let context = format!("pod {} failed a moment ago", self.name(peer));
            return Err(Error::new(ErrorKind::PeerLost, context));
        }
        match self.connect(peer).await {
            Ok(link) => {
                let link = Arc::new(link);
                state.link = Some(link.clone());
                state.retry_at = None;
                Ok(link)
            }
            Err(error) => {
                self.back_off(&mut state);
                tracing::warn!(pod = %self.name(peer), %error, "peer cannot be used");
                Err(error)
            }
        }
    }

    async fn connect(&self, peer: PeerId) -> Result<Link> {
        let pod = self
            .roster
            .name(peer)
            .ok_or_else(|| Error::new(ErrorKind::Internal, format!("no pod has number {peer}")))?;
        let lost = |what: String| Error::new(ErrorKind::PeerLost, format!("pod {pod} {what}"));
        let address = self
            .roster
            .address(peer)
            .ok_or_else(|| lost(String::from("has no known peer address")))?;
        let connecting = async {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| lost(format!("at {address}: {error}")))?;
            let channel = endpoint
                .connect()
                .await
                .map_err(|error| lost(format!("at {address}")).with_source(error))?;
            let mut client = PeerClient::new(channel)
                .max_decoding_message_size(wire::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(wire::MESSAGE_BYTES_MAX);
            let greeting = wire::hello_request(&self.pod, &self.model_identity);
            let response = client
                .hello(greeting)
                .await
                .map_err(|status| wire::error_of(&status, &format!("{pod} at {address}")))?;
            let hello = wire::check_hello_response(response.into_inner())
                .map_err(|error| error.at(format_args!("pod {pod} at {address}")))?;
            if hello.pod != pod {
                return Err(lost(format!("at {address} calls itself {}", hello.pod)));
            }
            Ok((client, hello))
        };
        let (client, hello) = tokio::time::timeout(self.limits.call_timeout, connecting)
            .await
            .unwrap_or_else(|_| Err(lost(format!("at {address} does not answer"))))?;
        let handle = self
            .agent
            .load_peer(&hello.agent_metadata)
            .map_err(|error| error.at(format_args!("agent metadata of pod {pod}")))?;
        Ok(Link {
            peer,
            pod,
            handle,
            incarnation: hello.incarnation,
            client,
            answered: AtomicBool::new(false),
        })
    }

    fn back_off(&self, state: &mut State) {
        let factor = 1_u32 << state.failures.min(16);
        let wait = self
            .limits
            .backoff
            .saturating_mul(factor)
            .min(self.limits.backoff_max);
        state.failures = state.failures.saturating_add(1);
        state.retry_at = Some(Instant::now() + wait);
    }

    fn slot(&self, peer: PeerId) -> Arc<Slot> {
        // As many as the roster has pods at most.
        self.slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(peer)
            .or_default()
            .clone()
    }

    /// The pod's name, for messages.
    fn name(&self, peer: PeerId) -> String {
        self.roster
            .name(peer)
            .map_or_else(|| format!("number {peer}"), |pod| pod.to_string())
    }
}
