//! What the indexer counts, for Prometheus and for `Status`. The names are documented in `docs/metrics.md`.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result, Tier};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::config::TokenizerConfig;
use crate::index::Applied;
use crate::ingest::{ClearReason, IngestStats};
use crate::score::TIERS;

mod lag;
mod media;
mod names;
mod tenants;

use media::MediaMetrics;
use tenants::TenantMetrics;

pub(crate) use lag::Lag;
pub(crate) use tenants::TenantHoldings;

type Number = Gauge<u64, AtomicU64>;

/// Why a source was cleared, or a call refused.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TokenizerLabel {
    tokenizer: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TierLabel {
    tier: &'static str,
}

/// What the index holds at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub(crate) struct Holdings {
    pub(crate) models: u64,
    pub(crate) blocks: u64,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    pub(crate) orphans: u64,
    pub(crate) pods: u64,
    pub(crate) sources: u64,
    pub(crate) sources_connected: u64,
    pub(crate) is_serving: bool,
    pub(crate) expected_blocks: u64,
    pub(crate) tenants: Vec<TenantHoldings>,
}

/// Every counter of one server.
pub(crate) struct Metrics {
    registry: Registry,
    admissions: Counter,
    evictions: Counter,
    lookups: Counter,
    lookup_hits: Counter,
    hit_blocks: Counter,
    lookup_seconds: Histogram,
    lookup_wait_seconds: Histogram,
    refused: Family<Reason, Counter>,
    tokenization_seconds: Family<TokenizerLabel, Histogram>,
    tokenized_tokens: Family<TokenizerLabel, Counter>,
    batches: Counter,
    events_applied: Counter,
    events_rejected: Counter,
    publishers_refused: Counter,
    removals_unknown: Counter,
    removals_evicted: Counter,
    orphans_refused: Counter,
    gaps: Counter,
    replays: Counter,
    replay_failures: Counter,
    duplicates: Counter,
    dropped: Counter,
    clears: Family<Reason, Counter>,
    lag_seconds: Histogram,
    models: Number,
    models_ended: Counter,
    blocks: Number,
    entries: Number,
    bytes: Number,
    orphans: Number,
    pods: Number,
    sources: Number,
    sources_connected: Number,
    serving: Number,
    expected_blocks: Number,
    routings: Counter,
    hit_blocks_by_tier: Family<TierLabel, Counter>,
    snapshots_written: Counter,
    snapshot_failures: Counter,
    snapshot_bytes: Number,
    sources_resumed: Counter,
    tenants: TenantMetrics,
    media: MediaMetrics,
    /// Publisher's timestamp to applied, over live batches.
    pub(crate) lag: Lag,
}

/// From a microsecond to about ten seconds.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(1e-6, 2.0, 24))
}

impl Metrics {
    /// `tokenizers` are the models that have one: their series are there from the start, as all others are.
    pub(crate) fn new(tokenizers: &[TokenizerConfig]) -> Self {
        let lag_seconds = seconds();
        let mut metrics = Self {
            registry: Registry::default(),
            admissions: Counter::default(),
            evictions: Counter::default(),
            lookups: Counter::default(),
            lookup_hits: Counter::default(),
            hit_blocks: Counter::default(),
            lookup_seconds: seconds(),
            lookup_wait_seconds: seconds(),
            refused: Family::default(),
            tokenization_seconds: Family::new_with_constructor(seconds),
            tokenized_tokens: Family::default(),
            batches: Counter::default(),
            events_applied: Counter::default(),
            events_rejected: Counter::default(),
            publishers_refused: Counter::default(),
            removals_unknown: Counter::default(),
            removals_evicted: Counter::default(),
            orphans_refused: Counter::default(),
            gaps: Counter::default(),
            replays: Counter::default(),
            replay_failures: Counter::default(),
            duplicates: Counter::default(),
            dropped: Counter::default(),
            clears: Family::default(),
            lag_seconds: lag_seconds.clone(),
            models: Number::default(),
            models_ended: Counter::default(),
            blocks: Number::default(),
            entries: Number::default(),
            bytes: Number::default(),
            orphans: Number::default(),
            pods: Number::default(),
            sources: Number::default(),
            sources_connected: Number::default(),
            serving: Number::default(),
            expected_blocks: Number::default(),
            routings: Counter::default(),
            hit_blocks_by_tier: Family::default(),
            snapshots_written: Counter::default(),
            snapshot_failures: Counter::default(),
            snapshot_bytes: Number::default(),
            sources_resumed: Counter::default(),
            tenants: TenantMetrics::default(),
            media: MediaMetrics::default(),
            lag: Lag::new(lag_seconds),
        };
        metrics.register_as_llm_d();
        metrics.register_holdings();
        metrics.tenants.register(&mut metrics.registry);
        metrics.media.register(&mut metrics.registry);
        metrics.register_events();
        metrics.register_snapshots();
        metrics.register_calls();
        metrics.begin_at_zero(tokenizers);
        metrics
    }

    pub(crate) fn event_applied(&self, applied: &Applied) {
        self.events_applied.inc();
        self.admissions.inc_by(applied.stored.into());
        self.evictions.inc_by(applied.removed.into());
        self.removals_unknown.inc_by(applied.unknown.into());
        self.removals_evicted.inc_by(applied.evicted_before.into());
        self.orphans_refused.inc_by(applied.refused.into());
    }

    /// A publisher sent what nobody may send, and was disconnected.
    pub(crate) fn publisher_refused(&self) {
        self.publishers_refused.inc();
    }

    /// A model had no pods and held nothing for long enough to be forgotten.
    pub(crate) fn model_ended(&self) {
        self.models_ended.inc();
    }

    pub(crate) fn events_rejected(&self, count: u64) {
        self.events_rejected.inc_by(count);
    }

    /// Events came about a medium that nobody has told of; true when it is the first time.
    pub(crate) fn unknown_medium(&self, medium: &str, events: u32) -> bool {
        self.media.unknown(medium, events)
    }

    pub(crate) fn batch_applied(&self) {
        self.batches.inc();
    }

    /// Adds what a source's ingestion has counted since `before`.
    pub(crate) fn ingested(&self, before: &IngestStats, now: &IngestStats) {
        self.gaps.inc_by(now.gaps - before.gaps);
        self.replays.inc_by(now.replays - before.replays);
        self.replay_failures
            .inc_by(now.replay_failures - before.replay_failures);
        self.duplicates.inc_by(now.duplicates - before.duplicates);
        self.dropped.inc_by(now.dropped - before.dropped);
    }

    /// A source went on from its publisher's image.
    pub(crate) fn replaced(&self) {
        let reason = "image";
        self.clears.get_or_create(&Reason { reason }).inc();
    }

    pub(crate) fn cleared(&self, reason: ClearReason) {
        self.clears
            .get_or_create(&Reason {
                reason: reason.name(),
            })
            .inc();
    }

    /// A snapshot was written with so many bytes, or could not be.
    pub(crate) fn snapshot_saved(&self, bytes: Option<u64>) {
        match bytes {
            Some(bytes) => {
                self.snapshots_written.inc();
                self.snapshot_bytes.set(bytes);
            }
            None => {
                self.snapshot_failures.inc();
            }
        }
    }

    /// So many sources go on from a snapshot.
    pub(crate) fn bootstrapped(&self, sources: u64) {
        self.sources_resumed.inc_by(sources);
    }

    /// A lookup was answered; `deepest` is 0 when nobody held anything, `by_tier` says where the best pod held it.
    pub(crate) fn looked_up(&self, took: Duration, deepest: u32, by_tier: &[u32; TIERS]) {
        for (tier, blocks) in Tier::ALL.into_iter().zip(*by_tier) {
            if blocks > 0 {
                let label = TierLabel { tier: tier.name() };
                self.hit_blocks_by_tier
                    .get_or_create(&label)
                    .inc_by(blocks.into());
            }
        }
        self.lookups.inc();
        self.lookup_hits.inc_by(u64::from(deepest > 0));
        self.hit_blocks.inc_by(deepest.into());
        self.lookup_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn waited(&self, took: Duration) {
        self.lookup_wait_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn refused(&self, kind: ErrorKind) {
        self.refused
            .get_or_create(&Reason {
                reason: kind.name(),
            })
            .inc();
    }

    pub(crate) fn tokenised(&self, model: &str, took: Duration, tokens: usize) {
        let label = TokenizerLabel {
            tokenizer: model.to_owned(),
        };
        self.tokenization_seconds
            .get_or_create(&label)
            .observe(took.as_secs_f64());
        self.tokenized_tokens
            .get_or_create(&label)
            .inc_by(tokens as u64);
    }

    /// A router said where it sends a prompt.
    pub(crate) fn routed(&self) {
        self.routings.inc();
    }

    pub(crate) fn routings(&self) -> u64 {
        self.routings.get()
    }

    pub(crate) fn lookups(&self) -> u64 {
        self.lookups.get()
    }

    pub(crate) fn events(&self) -> (u64, u64) {
        (self.events_applied.get(), self.events_rejected.get())
    }

    /// Everything in Prometheus' text format (`OpenMetrics`).
    ///
    /// # Errors
    /// `Internal` when a metric cannot be written as text.
    pub(crate) fn render(&self, holdings: &Holdings) -> Result<String> {
        self.models.set(holdings.models);
        self.blocks.set(holdings.blocks);
        self.entries.set(holdings.entries);
        self.bytes.set(holdings.bytes);
        self.orphans.set(holdings.orphans);
        self.pods.set(holdings.pods);
        self.sources.set(holdings.sources);
        self.sources_connected.set(holdings.sources_connected);
        self.serving.set(holdings.is_serving.into());
        self.expected_blocks.set(holdings.expected_blocks);
        for tenant in &holdings.tenants {
            self.evictions.inc_by(self.tenants.show(tenant));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).map_err(|error| {
            Error::new(ErrorKind::Internal, "write metrics as text").with_source(error)
        })?;
        Ok(text)
    }
}
