//! Follows publishers of KV events and applies what they say to the index.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvcache_core::ports::Position;
use kvcache_core::{Epoch, Error, Result, Sequence, Time};
use kvfabric_proto::v1;
use tokio::sync::{Mutex, Notify, watch};

use crate::adapter::Media;
use crate::index::{KvIndex, SourceId};
use crate::ingest::{Ingest, IngestConfig, IngestStats, Resume, Room};
use crate::metrics::Metrics;
use crate::snapshot::Mark;
use crate::wire::{SourceKind, SourceSpec};

mod apply;
mod bound;
mod shown;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod withheld;
mod zmq;

use shown::Shown;

pub(crate) use bound::{FED_QUEUED_MAX, Fed};
pub(crate) use zmq::Probes;

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
    /// Whether the index has entries from a snapshot that the publisher has not been asked about.
    pub(crate) is_unverified: bool,
    /// Whether the source was disconnected for so long that its entries are dropped.
    pub(crate) is_given_up: bool,
    /// How long the newest live batch took from its publisher's timestamp until it was applied.
    pub(crate) lag: Duration,
    /// When the publisher was last heard of.
    pub(crate) heard_at: Option<Instant>,
    /// What its ingestion counted.
    pub(crate) stats: IngestStats,
}

/// What answers to lookups say of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) position: Position,
    /// How much that is worth; who knows what was evicted adds it.
    pub(crate) freshness: v1::SourceFreshness,
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
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
            is_unverified: false,
            is_given_up: false,
            lag: Duration::ZERO,
            heard_at: None,
            stats: IngestStats::default(),
        }
    }
}

/// How far the index has what a source said, for whoever wants to go on there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor {
    /// None when nothing is applied.
    pub(crate) mark: Option<Mark>,
    /// Whether all that the publisher could tell up to there is applied.
    pub(crate) is_whole: bool,
}

/// How many words of a source are shown to lookups.
const WORDS: usize = 5;

/// A source as others see it.
#[derive(Debug)]
pub(crate) struct SourceState {
    /// What lookups want of `progress`, times by `begun`; written where that is.
    shown: Shown<WORDS>,
    begun: Instant,
    progress: watch::Sender<Progress>,
    /// Held while a batch is applied: whoever holds it sees the index between two batches.
    pub(crate) cursor: Mutex<Cursor>,
    /// Somebody waits for what the source has not said yet: ask the publisher whether it has been missed.
    poke: Notify,
    /// The furthest that anybody waits for, epoch first.
    wanted: StdMutex<(Epoch, Sequence)>,
}

/// Counts whenever a source among several is further than before, or begins anew: what was read between two equal counts
/// was so at one moment.
#[derive(Debug, Default)]
pub(crate) struct Steps(AtomicU64);

impl Steps {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// The index has what a source's new position promises, which nobody has been told yet.
    pub(crate) fn take(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// What the configuration allows a source.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// How long it may stay disconnected before its entries are dropped.
    pub(crate) ttl: Duration,
    /// The longest message that is taken, in bytes.
    pub(crate) message_bytes_max: usize,
    /// What media are taken for.
    pub(crate) media: Arc<Media>,
    /// What it keeps until it can be applied finds its room here, beside that of all others.
    pub(crate) room: Arc<Room>,
    /// Shared by all sources.
    pub(crate) steps: Arc<Steps>,
    /// When its publisher is asked for the tail.
    pub(crate) probes: Probes,
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
    pub(crate) limits: Limits,
    /// What a snapshot said of the source is dropped if it is not verified until then.
    unverified_until: Option<tokio::time::Instant>,
    /// The data-parallel rank, once told.
    rank: Option<u32>,
    ingest: Ingest,
    reported: IngestStats,
    lag: Duration,
    heard_at: Option<Instant>,
    start: Instant,
}

impl SourceState {
    /// A source of which nothing is known but what a snapshot had.
    pub(crate) fn new(mark: Option<Mark>) -> Self {
        Self {
            shown: Shown::new(),
            begun: Instant::now(),
            progress: watch::Sender::default(),
            cursor: Mutex::new(Cursor {
                mark,
                is_whole: mark.is_some(),
            }),
            poke: Notify::default(),
            wanted: StdMutex::default(),
        }
    }

    /// How it stands.
    pub(crate) fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// The same for who waits for a change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Changes how it stands, and wakes who waits for that if `change` says so.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Progress) -> bool) {
        self.progress.send_if_modified(|progress| {
            let is_modified = change(progress);
            // The lock that is held here lets one write at a time.
            self.shown.set(self.words(progress));
            is_modified
        });
    }

    fn words(&self, progress: &Progress) -> [u64; WORDS] {
        let heard = progress
            .heard_at
            .map(|at| micros(at.saturating_duration_since(self.begun)) + 1);
        let flags = u64::from(progress.is_connected) | u64::from(progress.is_current) << 1;
        [
            progress.position.epoch.0,
            progress.position.next.0,
            micros(progress.lag),
            heard.unwrap_or(0),
            flags,
        ]
    }

    /// What answers say of it at `now`, of one moment.
    pub(crate) fn seen(&self, now: Instant) -> Seen {
        let shown = self.shown.get();
        let [epoch, next, lag_us, heard, flags] =
            shown.unwrap_or_else(|| self.words(&self.progress.borrow()));
        let since_begun = micros(now.saturating_duration_since(self.begun));
        Seen {
            position: Position {
                epoch: Epoch(epoch),
                next: Sequence(next),
            },
            freshness: v1::SourceFreshness {
                lag_us,
                heard_us: heard
                    .checked_sub(1)
                    .map(|at| since_begun.saturating_sub(at)),
                connected: flags & 1 != 0,
                current: flags & 2 != 0,
                evicted: 0,
            },
        }
    }

    /// Somebody waits until the source is as far as that. What has not come by itself after a moment is asked for.
    pub(crate) fn want(&self, position: Position) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        *wanted = (*wanted).max((position.epoch, position.next));
        drop(wanted);
        self.poke.notify_one();
    }

    fn is_wanted_beyond(&self, position: Position) -> bool {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        *wanted > (position.epoch, position.next)
    }
}

impl Follower {
    pub(crate) fn new(
        spec: SourceSpec,
        name: String,
        (index, id): (Arc<KvIndex>, SourceId),
        state: Arc<SourceState>,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> Self {
        let ingest = Ingest::new(ingest_config(&spec)).sharing(&limits.room);
        let (reported, start) = (IngestStats::default(), Instant::now());
        Self {
            spec,
            name,
            id,
            index,
            state,
            metrics,
            limits,
            unverified_until: None,
            rank: None,
            ingest,
            reported,
            lag: Duration::ZERO,
            heard_at: None,
            start,
        }
    }

    /// Goes on where a snapshot ends, whose image the index has: it is believed once the publisher has been asked, and
    /// dropped if that takes longer than until `verify_by`.
    pub(crate) fn resume(&mut self, mark: Mark, verify_by: tokio::time::Instant) {
        let is_node = self.spec.kind == SourceKind::Node;
        let resume = Resume {
            epoch: is_node.then_some(mark.position.epoch),
            last: Sequence(mark.position.next.0 - 1),
            digest: mark.digest,
        };
        let ingest = Ingest::resume(ingest_config(&self.spec), resume);
        self.ingest = ingest.sharing(&self.limits.room);
        self.unverified_until = Some(verify_by);
        self.report();
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Takes the data-parallel rank that a batch is of: one source tells of one.
    fn learn_rank(&mut self, told: Option<u32>) -> Result<()> {
        let (Some(told), true) = (told, self.spec.kind != SourceKind::Node) else {
            return Ok(());
        };
        let known = self.spec.data_parallel_rank.or(self.rank);
        if let Some(known) = known.filter(|known| *known != told) {
            return Err(Error::invalid("data-parallel rank", told, known));
        }
        if known.is_none() {
            self.index.set_rank(self.id, Some(told))?;
            self.rank = Some(told);
        }
        Ok(())
    }

    /// Tells the others how the source stands now.
    fn report(&mut self) {
        let stats = self.ingest.stats();
        self.metrics.ingested(&self.reported, &stats);
        self.reported = stats;
        let position = self.ingest.position();
        let is_current = self.ingest.is_current();
        self.limits.steps.take();
        self.state.change(|progress| {
            let is_synced = progress.is_connected && (progress.is_synced || is_current);
            let new = Progress {
                position,
                is_synced,
                is_current,
                is_unverified: self.unverified_until.is_some(),
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
        self.state.change(|progress| {
            progress.is_connected = is_connected;
            progress.is_given_up &= !is_connected;
            progress.is_synced = false;
            progress.is_current = false;
            true
        });
    }

    /// Notes that the publisher said something that makes sense.
    fn heard(&mut self) {
        self.heard_at = Some(Instant::now());
    }

    fn set_given_up(&self, is_given_up: bool) {
        self.state.change(|progress| {
            let is_modified = progress.is_given_up != is_given_up;
            progress.is_given_up = is_given_up;
            is_modified
        });
    }

    /// Drops everything the source said; it may come back and is then replayed from its start.
    async fn give_up(&mut self) {
        tracing::info!(source = %self.name, "source is gone; its entries are dropped");
        self.clear().await;
        let before = self.ingest.stats();
        self.metrics.ingested(&self.reported, &before);
        self.ingest = Ingest::new(ingest_config(&self.spec)).sharing(&self.limits.room);
        self.reported = IngestStats::default();
        self.set_given_up(true);
        self.report();
    }
}

fn ingest_config(spec: &SourceSpec) -> IngestConfig {
    IngestConfig {
        has_replay: spec.replay_endpoint.is_some(),
        replay_timeout: REPLAY_TIMEOUT,
        ..IngestConfig::default()
    }
}

/// How long ago the publisher wrote the timestamp, by both wall clocks; never negative.
fn age(timestamp: f64) -> Duration {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Duration::try_from_secs_f64(now.as_secs_f64() - timestamp).unwrap_or_default()
}
