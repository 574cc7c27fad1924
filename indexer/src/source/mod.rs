//! Follows publishers of KV events and applies what they say to the index.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvcache_core::ports::Position;
use kvcache_core::{Epoch, Sequence, Time};
use kvfabric_proto::v1;
use tokio::sync::{Notify, watch};

use crate::adapter::decode_batch;
use crate::index::{KvIndex, SourceId};
use crate::ingest::{Action, Ingest, IngestConfig, IngestStats};
use crate::metrics::Metrics;
use crate::wire::SourceSpec;

pub(crate) mod zmq;

/// A replay has failed when nothing of it came for so long: an engine serves replays between its steps.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(10);

/// How a source stands, for lookups, registrations and status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// How far it is applied.
    pub(crate) position: Position,
    /// Whether the publisher is connected.
    pub(crate) is_connected: bool,
    /// Whether everything known to be published has been applied at some moment since it was connected.
    pub(crate) is_synced: bool,
    /// Whether everything known to be published is applied now.
    pub(crate) is_current: bool,
    /// How long the newest live batch took from its publisher's timestamp until it was applied.
    pub(crate) lag: Duration,
    /// When the publisher was last heard of.
    pub(crate) heard_at: Option<Instant>,
    /// What its ingestion counted.
    pub(crate) stats: IngestStats,
}

impl Progress {
    /// How much the position is worth, for those who ask.
    pub(crate) fn freshness(&self) -> v1::SourceFreshness {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        v1::SourceFreshness {
            lag_us: micros(self.lag),
            heard_us: self.heard_at.map(|at| micros(at.elapsed())),
            connected: self.is_connected,
            current: self.is_current,
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            position: Position {
                epoch: Epoch(0),
                next: Sequence(0),
            },
            is_connected: false,
            is_synced: false,
            is_current: false,
            lag: Duration::ZERO,
            heard_at: None,
            stats: IngestStats::default(),
        }
    }
}

/// A source as others see it.
#[derive(Debug, Default)]
pub(crate) struct SourceState {
    pub(crate) progress: watch::Sender<Progress>,
    /// Somebody waits for what the source has not said yet: ask the publisher whether it has been missed.
    pub(crate) poke: Notify,
}

/// Everything one source's task works on.
pub(crate) struct Follower {
    pub(crate) spec: SourceSpec,
    /// The full name, for logs.
    pub(crate) name: String,
    pub(crate) id: SourceId,
    pub(crate) index: Arc<KvIndex>,
    pub(crate) state: Arc<SourceState>,
    pub(crate) metrics: Arc<Metrics>,
    /// How long the source may stay disconnected before its entries are dropped.
    pub(crate) ttl: Duration,
    ingest: Ingest,
    reported: IngestStats,
    lag: Duration,
    heard_at: Option<Instant>,
    start: Instant,
}

impl Follower {
    pub(crate) fn new(
        spec: SourceSpec,
        name: String,
        (index, id): (Arc<KvIndex>, SourceId),
        state: Arc<SourceState>,
        metrics: Arc<Metrics>,
        ttl: Duration,
    ) -> Self {
        let ingest = new_ingest(&spec);
        let (reported, start) = (IngestStats::default(), Instant::now());
        Self {
            spec,
            name,
            id,
            index,
            state,
            metrics,
            ttl,
            ingest,
            reported,
            lag: Duration::ZERO,
            heard_at: None,
            start,
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Does what the state machine wants; returns where to replay from, if it wants that.
    fn act(&mut self, is_live: bool) -> Option<u64> {
        let mut replay_from = None;
        while let Some(action) = self.ingest.poll_action() {
            match action {
                Action::Apply { payload, .. } => self.apply(&payload, is_live),
                Action::Clear { reason } => {
                    tracing::info!(source = %self.name, reason = reason.name(), "source begins anew");
                    self.metrics.cleared(reason);
                    self.index.clear_source(self.id);
                }
                Action::RequestReplay { from } => replay_from = Some(from.0),
            }
        }
        self.report();
        replay_from
    }

    fn apply(&mut self, payload: &[u8], is_live: bool) {
        let batch = match decode_batch(payload, self.spec.kind) {
            Ok(batch) => batch,
            Err(error) => {
                tracing::debug!(source = %self.name, %error, "undecodable batch");
                self.metrics.events_rejected(1);
                return;
            }
        };
        for event in &batch.events {
            let applied = match event {
                Ok(event) => self.index.apply(self.id, event),
                Err(error) => {
                    tracing::debug!(source = %self.name, %error, "undecodable event");
                    self.metrics.events_rejected(1);
                    continue;
                }
            };
            match applied {
                Ok(applied) => self.metrics.event_applied(&applied),
                Err(error) => {
                    tracing::debug!(source = %self.name, %error, "event not applied");
                    self.metrics.events_rejected(1);
                }
            }
        }
        self.metrics.batch_applied();
        if is_live {
            self.lag = age(batch.timestamp);
            self.metrics.lag.record(self.lag);
        }
    }

    /// Tells the others how the source stands now.
    fn report(&mut self) {
        let stats = self.ingest.stats();
        self.metrics.ingested(&self.reported, &stats);
        self.reported = stats;
        let position = self.ingest.position();
        let is_current = self.ingest.is_current();
        self.state.progress.send_if_modified(|progress| {
            let is_synced = progress.is_connected && (progress.is_synced || is_current);
            let new = Progress {
                position,
                is_synced,
                is_current,
                lag: self.lag,
                heard_at: self.heard_at,
                stats,
                ..*progress
            };
            let is_modified = *progress != new;
            *progress = new;
            is_modified
        });
    }

    fn set_connected(&mut self, is_connected: bool) {
        self.state.progress.send_modify(|progress| {
            progress.is_connected = is_connected;
            progress.is_synced = false;
            progress.is_current = false;
        });
    }

    /// Drops everything the source said; it may come back and is then replayed from its start.
    fn give_up(&mut self) {
        tracing::info!(source = %self.name, "source is gone; its entries are dropped");
        self.index.clear_source(self.id);
        let before = self.ingest.stats();
        self.metrics.ingested(&self.reported, &before);
        self.ingest = new_ingest(&self.spec);
        self.reported = IngestStats::default();
        self.report();
    }
}

fn new_ingest(spec: &SourceSpec) -> Ingest {
    Ingest::new(IngestConfig {
        has_replay: spec.replay_endpoint.is_some(),
        replay_timeout: REPLAY_TIMEOUT,
        ..IngestConfig::default()
    })
}

/// How long ago the publisher wrote the timestamp, by both wall clocks; never negative.
fn age(timestamp: f64) -> Duration {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Duration::try_from_secs_f64(now.as_secs_f64() - timestamp).unwrap_or_default()
}
