//! One request to the transfer agent, bounded by a deadline, and what is left when it fails.

use std::fmt;
use std::time::Instant;

use kvcache_core::manager::MoveFailure;
use kvcache_core::{Error, ErrorKind};
use kvfabric_transfer::{
    Agent, Descriptor, Drained, MemoryFate, Operation, PeerHandle, RequestOptions, Side,
};

use crate::scratch::Buffers;

/// Pairs of local and remote ranges that one block needs.
pub(crate) type Part = Vec<(Descriptor, Descriptor)>;

/// A request that failed. `in_flight` tells when its memory is free, if it is not yet.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) in_flight: Option<Drained>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self {
            error,
            in_flight: None,
        }
    }
}

/// What still has to end before the memory of a command may be used again: transfers, and the
/// buffers they were lent.
#[derive(Default)]
pub(crate) struct Unsettled {
    transfers: Vec<Drained>,
    buffers: Vec<Buffers>,
}

impl fmt::Debug for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unsettled")
            .field("transfers", &self.transfers.len())
            .finish()
    }
}

impl Unsettled {
    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.transfers.is_empty()
    }

    /// Keeps `buffers` until the transfers have ended; gives them back now if there are none.
    pub(crate) fn hold(&mut self, buffers: Buffers) {
        if !self.is_empty() {
            self.buffers.push(buffers);
        }
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.transfers.extend(other.transfers);
        self.buffers.extend(other.buffers);
    }

    /// Notes what became of a failed request; the failure as the manager wants to know it.
    pub(super) fn note(&mut self, failed: Failed) -> MoveFailure {
        let kind = failed.error.kind();
        match failed.in_flight {
            Some(drained) => {
                self.transfers.push(drained);
                MoveFailure::unsettled(kind)
            }
            None => MoveFailure::settled(kind),
        }
    }

    /// Resolves when the last transfer has ended. No deadline bounds this: until then hardware or a
    /// kernel may still use the memory, whatever a clock says.
    pub(crate) async fn drained(self) {
        for transfer in self.transfers {
            transfer.await;
        }
        drop(self.buffers);
    }
}

/// Moves the pairs of one request and waits for its end.
///
/// # Cancel safety
/// A dropped future leaves the transfer running; the agent keeps the memory until it has settled.
pub(super) async fn transfer(
    agent: &Agent,
    operation: Operation,
    pairs: Part,
    peer: Option<&PeerHandle>,
    deadline: Instant,
) -> Result<(), Failed> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::new(ErrorKind::Timeout, "the deadline passed before the copy").into());
    }
    let options = RequestOptions {
        deadline: Some(left),
        ..RequestOptions::default()
    };
    let request = match peer {
        None => agent.transfer(operation, &pairs, Side::Local, options)?,
        Some(peer) => {
            // Choosing a path and connecting may block for a while.
            let (agent, peer) = (agent.clone(), peer.clone());
            let posting = move || agent.transfer(operation, &pairs, Side::Peer(&peer), options);
            tokio::task::spawn_blocking(posting)
                .await
                .map_err(|error| {
                    Error::new(ErrorKind::Internal, "a thread that posts").with_source(error)
                })??
        }
    };
    match request.completion().await {
        Ok(_) => Ok(()),
        Err(failed) => {
            let in_flight = (failed.fate() == MemoryFate::InFlight).then(|| request.drained());
            Err(Failed {
                error: failed.into(),
                in_flight,
            })
        }
    }
}

/// The backend that would move a pair of ranges now.
///
/// # Errors
/// As a request for it; nothing is posted.
pub(super) async fn way(
    agent: &Agent,
    operation: Operation,
    (local, remote): (Descriptor, Descriptor),
    peer: Option<&PeerHandle>,
) -> Result<&'static str, Error> {
    let (agent, peer) = (agent.clone(), peer.cloned());
    let has_peer = peer.is_some();
    let asking = move || {
        let side = peer.as_ref().map_or(Side::Local, Side::Peer);
        let lists = (
            agent.prepare(Side::Local, &[local])?,
            agent.prepare(side, &[remote])?,
        );
        let request = agent.request(operation, &lists.0, &lists.1, RequestOptions::default())?;
        Ok(request.estimate()?.backend)
    };
    if !has_peer {
        return asking();
    }
    // Choosing a path and connecting may block for a while.
    tokio::task::spawn_blocking(asking)
        .await
        .map_err(|error| Error::new(ErrorKind::Internal, "a thread that asks").with_source(error))?
}

/// Moves many blocks' parts as one request; if that fails because of one of them, each by itself, so
/// that a damaged block costs only itself.
pub(crate) async fn transfer_each(
    agent: &Agent,
    operation: Operation,
    parts: Vec<Part>,
    deadline: Instant,
    unsettled: &mut Unsettled,
) -> Vec<Result<(), (MoveFailure, Option<Error>)>> {
    let count = parts.len();
    let all: Part = parts.iter().flatten().copied().collect();
    let Err(failed) = transfer(agent, operation, all, None, deadline).await else {
        return (0..count).map(|_| Ok(())).collect();
    };
    let shared = failed.in_flight.is_some()
        || matches!(
            failed.error.kind(),
            ErrorKind::Timeout | ErrorKind::Cancelled | ErrorKind::NoSpace | ErrorKind::Forked
        );
    if shared || count == 1 {
        let error = Error::new(failed.error.kind(), failed.error.to_string());
        let failure = unsettled.note(failed);
        let mut first = Some(error);
        return (0..count).map(|_| Err((failure, first.take()))).collect();
    }
    let mut results = Vec::with_capacity(count);
    for part in parts {
        let result = transfer(agent, operation, part, None, deadline).await;
        results.push(result.map_err(|failed| {
            let error = Error::new(failed.error.kind(), failed.error.to_string());
            (unsettled.note(failed), Some(error))
        }));
    }
    results
}
