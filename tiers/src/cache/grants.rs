//! The leases that peers asked of this node: who waits for one, and how many each peer has.

use std::collections::{BTreeMap, HashMap};

use kvcache_core::{Error, ErrorKind, LeaseId, PeerId, Result, Time};

use super::desk::{ReadyLease, Reply};

/// Leases by peer, and the callers of those that are being readied.
#[derive(Debug)]
pub(super) struct Grants {
    waiting: HashMap<LeaseId, Reply<ReadyLease>>,
    /// When each ends at the latest; those in the past are forgotten when their peer asks again.
    granted: BTreeMap<PeerId, BTreeMap<LeaseId, Time>>,
    per_peer_max: usize,
}

impl Grants {
    pub(super) fn new(per_peer_max: u32) -> Self {
        let per_peer_max = per_peer_max as usize;
        Self {
            waiting: HashMap::new(),
            granted: BTreeMap::new(),
            per_peer_max,
        }
    }

    /// Whether the peer may have one more.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when it has as many as any peer may.
    pub(super) fn check(&mut self, now: Time, peer: PeerId) -> Result<()> {
        let of_peer = self.granted.entry(peer).or_default();
        of_peer.retain(|_, ends| *ends > now);
        if of_peer.len() < self.per_peer_max {
            return Ok(());
        }
        let context = format!("{} leases are granted to this peer already", of_peer.len());
        Err(Error::new(ErrorKind::Busy, context))
    }

    /// The lease is being readied for the peer, and over at `ends` at the latest.
    pub(super) fn begin(
        &mut self,
        peer: PeerId,
        lease: LeaseId,
        ends: Time,
        reply: Reply<ReadyLease>,
    ) {
        self.granted.entry(peer).or_default().insert(lease, ends);
        self.waiting.insert(lease, reply);
    }

    /// Who waits for the lease.
    pub(super) fn take_waiting(&mut self, lease: LeaseId) -> Option<Reply<ReadyLease>> {
        self.waiting.remove(&lease)
    }

    /// The lease is over.
    pub(super) fn end(&mut self, peer: PeerId, lease: LeaseId) {
        if let Some(of_peer) = self.granted.get_mut(&peer) {
            of_peer.remove(&lease);
        }
    }

    /// All leases of the peer are over.
    pub(super) fn end_all(&mut self, peer: PeerId) {
        self.granted.remove(&peer);
    }
}
