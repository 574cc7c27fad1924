//! The names under which everything is exported; `docs/metrics.md` has them too, and a test compares.

use kvcache_core::{ErrorKind, Tier};
use prometheus_client::registry::{Metric, Registry};

use super::{Metrics, Reason, TierLabel, TokenizerLabel};
use crate::config::TokenizerConfig;
use crate::ingest::ClearReason;

impl Metrics {
    /// Makes the labelled series appear, so that a rate has a beginning.
    pub(super) fn begin_at_zero(&self, tokenizers: &[TokenizerConfig]) {
        use ClearReason::{HistoryLost, NewEpoch, ReplayFailed, Restarted, Unverifiable};
        for reason in [NewEpoch, Restarted, HistoryLost, ReplayFailed, Unverifiable] {
            drop(self.clears.get_or_create(&Reason {
                reason: reason.name(),
            }));
        }
        for kind in [ErrorKind::Invalid, ErrorKind::Busy, ErrorKind::Timeout] {
            drop(self.refused.get_or_create(&Reason {
                reason: kind.name(),
            }));
        }
        for tier in Tier::ALL {
            drop(
                self.hit_blocks_by_tier
                    .get_or_create(&TierLabel { tier: tier.name() }),
            );
        }
        for TokenizerConfig { model, .. } in tokenizers {
            let label = TokenizerLabel {
                tokenizer: model.clone(),
            };
            drop(self.tokenization_seconds.get_or_create(&label));
            drop(self.tokenized_tokens.get_or_create(&label));
        }
    }

    /// The names that dashboards of llm-d's indexer read.
    pub(super) fn register_as_llm_d(&mut self) {
        let to = self.registry.sub_registry_with_prefix("kvcache_index");
        add(
            to,
            "admissions",
            "Entries added to the index",
            &self.admissions,
        );
        add(
            to,
            "evictions",
            "Entries removed from the index",
            &self.evictions,
        );
        add(to, "lookup_requests", "Lookups answered", &self.lookups);
        add(
            to,
            "lookup_hits",
            "Lookups that found at least one block",
            &self.lookup_hits,
        );
        add(
            to,
            "max_pod_hit_count",
            "Blocks the deepest pod of lookups held",
            &self.hit_blocks,
        );
        add(
            to,
            "lookup_latency_seconds",
            "Lookups, waiting left out",
            &self.lookup_seconds,
        );
        let to = self
            .registry
            .sub_registry_with_prefix("kvcache_tokenization");
        add(
            to,
            "tokenization_latency_seconds",
            "Tokenising",
            &self.tokenization_seconds,
        );
        add(
            to,
            "tokenized_tokens",
            "Tokens made from prompts",
            &self.tokenized_tokens,
        );
    }

    pub(super) fn register_holdings(&mut self) {
        let to = self.registry.sub_registry_with_prefix("kvfabric_indexer");
        add(to, "models", "Models known, of all tenants", &self.models);
        let help = "Models that had no pods and held nothing for so long that they were forgotten";
        add(to, "models_ended", help, &self.models_ended);
        add(to, "blocks", "Distinct blocks in the index", &self.blocks);
        add(
            to,
            "entries",
            "Entries: blocks by source and tier",
            &self.entries,
        );
        add(
            to,
            "bytes",
            "Bytes that the index takes, about",
            &self.bytes,
        );
        add(
            to,
            "orphans",
            "Blocks that wait for the block before them",
            &self.orphans,
        );
        add(to, "pods", "Pods known", &self.pods);
        add(to, "sources", "Sources known", &self.sources);
        add(
            to,
            "sources_connected",
            "Sources that are connected",
            &self.sources_connected,
        );
        add(to, "serving", "1 while lookups are answered", &self.serving);
        add(
            to,
            "expected_blocks",
            "Blocks expected of pods because of recorded routings",
            &self.expected_blocks,
        );
        add(
            to,
            "snapshot_bytes",
            "Size of the snapshot written last",
            &self.snapshot_bytes,
        );
    }

    pub(super) fn register_events(&mut self) {
        let to = self.registry.sub_registry_with_prefix("kvfabric_indexer");
        add(
            to,
            "batches_applied",
            "Batches of events applied",
            &self.batches,
        );
        add(
            to,
            "batches_duplicate",
            "Batches that came again",
            &self.duplicates,
        );
        add(
            to,
            "batches_dropped",
            "Batches dropped unread",
            &self.dropped,
        );
        add(to, "events_applied", "Events applied", &self.events_applied);
        add(
            to,
            "events_rejected",
            "Events that made no sense",
            &self.events_rejected,
        );
        add(
            to,
            "removals_unknown",
            "Removals of blocks not held",
            &self.removals_unknown,
        );
        add(
            to,
            "removals_evicted",
            "Removals of blocks that were given up before for lack of room",
            &self.removals_evicted,
        );
        add(
            to,
            "orphans_refused",
            "Blocks without known parent, dropped",
            &self.orphans_refused,
        );
        add(
            to,
            "gaps",
            "Batches that came before an older one",
            &self.gaps,
        );
        add(to, "replays", "Replays asked for", &self.replays);
        add(
            to,
            "replay_failures",
            "Replays that failed",
            &self.replay_failures,
        );
        add(
            to,
            "resyncs",
            "Sources that began anew, by reason",
            &self.clears,
        );
        add(
            to,
            "event_lag_seconds",
            "Published to applied",
            &self.lag_seconds,
        );
    }

    pub(super) fn register_snapshots(&mut self) {
        let to = self.registry.sub_registry_with_prefix("kvfabric_indexer");
        add(
            to,
            "publishers_refused",
            "Connections ended because of what came over them",
            &self.publishers_refused,
        );
        add(
            to,
            "sources_resumed",
            "Sources that went on from a snapshot",
            &self.sources_resumed,
        );
        add(
            to,
            "snapshots_written",
            "Snapshots written to disk",
            &self.snapshots_written,
        );
        add(
            to,
            "snapshot_failures",
            "Snapshots that could not be written",
            &self.snapshot_failures,
        );
    }

    pub(super) fn register_calls(&mut self) {
        let to = self.registry.sub_registry_with_prefix("kvfabric_indexer");
        add(
            to,
            "hit_blocks",
            "Blocks that the best pod of lookups held, by tier",
            &self.hit_blocks_by_tier,
        );
        add(to, "routings", "Recorded routings", &self.routings);
        add(
            to,
            "lookup_wait_seconds",
            "Waiting for positions",
            &self.lookup_wait_seconds,
        );
        add(
            to,
            "calls_refused",
            "Calls not answered, by reason",
            &self.refused,
        );
    }
}

pub(super) fn add(to: &mut Registry, name: &str, help: &str, metric: &(impl Metric + Clone)) {
    to.register(name, help, metric.clone());
}
