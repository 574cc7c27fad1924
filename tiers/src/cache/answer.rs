//! The manager's outcomes as answers to those who asked.

use kvcache_core::OperationId;
use kvcache_core::manager::{BlockSource, Outcome};
use tokio::sync::oneshot;

use super::desk::ReadyLease;
use super::driver::{Driver, give};
use super::types::{FetchReport, Fetched, Source, StoreReport, Stored};

impl Driver {
    pub(super) fn answer(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Stored {
                operation,
                stored,
                already_held,
                refused,
                failed,
            } => {
                if let Some(store) = self.stores.remove(&operation) {
                    let report = StoreReport {
                        stored,
                        already_held,
                        refused,
                        failed,
                    };
                    let corrupt = store.corrupt;
                    give(store.reply, Ok(Stored { report, corrupt }));
                }
            }
            Outcome::Fetched {
                operation,
                sources,
                unsettled,
            } => {
                self.answer_fetch(operation, &sources, unsettled);
            }
            Outcome::Drained { operation } => {
                if let Some(drained) = self.draining.remove(&operation) {
                    // An error means that nobody waits any more.
                    let _ = drained.send(());
                }
            }
            Outcome::Pinned { pin, depth } => self.answer_pin(pin, depth),
            Outcome::Retired { written, left } => self.retired(written, left),
            Outcome::Flushed {
                operation,
                complete,
            } => self.answer_flush(operation, complete),
            Outcome::LeaseReady {
                lease,
                peer,
                blocks,
                ttl,
            } => {
                let Some(reply) = self.grants.take_waiting(lease) else {
                    return;
                };
                let empty = blocks.is_empty();
                let gone = reply.send(Ok(ReadyLease { lease, ttl, blocks })).is_err();
                if gone || empty {
                    self.release(peer, lease);
                }
            }
        }
    }

    fn answer_fetch(
        &mut self,
        operation: OperationId,
        sources: &[BlockSource],
        unsettled: Vec<u32>,
    ) {
        let Some(fetch) = self.fetches.remove(&operation) else {
            return;
        };
        let drained = (!unsettled.is_empty()).then(|| {
            let (ended, drained) = oneshot::channel();
            self.draining.insert(operation, ended);
            drained
        });
        let sources = sources.iter().map(|source| self.source(source)).collect();
        let report = FetchReport {
            sources,
            unsettled,
            drained,
        };
        let sums = fetch.sums;
        give(fetch.reply, Ok(Fetched { report, sums }));
    }

    fn source(&self, source: &BlockSource) -> Source {
        match source {
            BlockSource::Host => Source::Host,
            BlockSource::Disk => Source::Disk,
            BlockSource::Object => Source::Object,
            BlockSource::Miss => Source::Miss,
            BlockSource::Peer { peer, tier } => match self.mover.peers.roster.name(*peer) {
                Some(pod) => Source::Peer { pod, tier: *tier },
                // Only numbers of the roster are ever given to the manager.
                None => Source::Miss,
            },
        }
    }
}
