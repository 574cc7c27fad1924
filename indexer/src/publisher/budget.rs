//! Counts the bytes that send queues hold, because the ZMQ library bounds its queues by messages only.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

/// What one queued message costs beside its payload: frames, header, queue node.
pub(super) const MESSAGE_OVERHEAD_BYTES: usize = 256;

/// Bytes held by one socket's send queues; a payload counts from [`Budget::take`] until its last copy is dropped.
#[derive(Clone)]
pub(super) struct Budget {
    held: Arc<watch::Sender<usize>>,
    max: usize,
}

/// A payload on its way out; dropping it gives its bytes back.
struct Held {
    payload: Bytes,
    cost: usize,
    held: Arc<watch::Sender<usize>>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.payload
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.held.send_modify(|held| *held -= self.cost);
    }
}

impl Budget {
    pub(super) fn new(max: usize) -> Self {
        Self {
            held: Arc::new(watch::Sender::new(0)),
            max,
        }
    }

    /// Bytes held now.
    pub(super) fn held(&self) -> usize {
        *self.held.borrow()
    }

    /// Counts the payload if it fits; a single one always fits into an empty budget.
    pub(super) fn take(&self, payload: &Bytes) -> Option<Bytes> {
        let cost = payload.len() + MESSAGE_OVERHEAD_BYTES;
        let taken = self.held.send_if_modified(|held| {
            let fits = *held == 0 || *held + cost <= self.max;
            if fits {
                *held += cost;
            }
            fits
        });
        taken.then(|| {
            let held = Held {
                payload: payload.clone(),
                cost,
                held: self.held.clone(),
            };
            Bytes::from_owner(held)
        })
    }

    /// Completes when something was given back, or taken, since `seen`.
    pub(super) fn watch(&self) -> watch::Receiver<usize> {
        self.held.subscribe()
    }
}
