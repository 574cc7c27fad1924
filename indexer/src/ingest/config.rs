//! What goes into and comes out of the state machine.

use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ports::Position;
use kvcache_core::{Epoch, Sequence};

/// How a source is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngestConfig {
    /// Whether the publisher can be asked for what was missed. If not, each connect and each gap clears the source.
    pub has_replay: bool,
    /// A replay has failed when nothing of it came for this long.
    pub replay_timeout: Duration,
    /// After a failed replay another is tried this much later.
    pub replay_retry: Duration,
    /// How many live batches wait while a replay is under way; more are dropped and asked for again.
    pub pending_batches_max: usize,
    /// How many bytes of payload may wait so.
    pub pending_bytes_max: usize,
    /// How many bytes an image of the publisher's may have; a longer one is not taken up.
    pub image_bytes_max: usize,
}

impl Default for IngestConfig {
    /// With replay, 5 s without an answer, another try after 30 s, 65,536 batches, 64 MiB, images of up to 256 MiB.
    fn default() -> Self {
        Self {
            has_replay: true,
            replay_timeout: Duration::from_secs(5),
            replay_retry: Duration::from_secs(30),
            pending_batches_max: 65_536,
            pending_bytes_max: 64 << 20,
            image_bytes_max: 256 << 20,
        }
    }
}

/// XXH3-128 of a batch's bytes: enough to tell a publisher from another that counts alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchDigest(pub u128);

impl BatchDigest {
    /// The digest of a batch as published.
    #[must_use]
    pub fn of(payload: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128(payload))
    }
}

/// Where an earlier follower of the source stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The publisher's incarnation, where it tells one.
    pub epoch: Option<Epoch>,
    /// The number of the batch that was applied last.
    pub last: Sequence,
    /// Its bytes, by which the publisher is recognised.
    pub digest: BatchDigest,
}

/// What the driver is to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Decode the payload and apply its events.
    Apply {
        /// The batch's number.
        sequence: Sequence,
        /// Its bytes, as published.
        payload: Bytes,
        /// How far the source is applied after it.
        position: Position,
        /// What the publisher will be recognised by from here on.
        digest: BatchDigest,
    },
    /// What the source said so far is to be what these batches together store, and nothing else; no reader may see less
    /// than what both have. The batch that follows them comes next.
    Replace {
        /// The pieces of the publisher's image, in order.
        pieces: Vec<Bytes>,
    },
    /// Forget all that the source said.
    Clear {
        /// Why.
        reason: ClearReason,
    },
    /// Ask the publisher for all batches from this one on. At most one request is unanswered at any time, except that a
    /// disconnect calls it off.
    RequestReplay {
        /// The first batch asked for.
        from: Sequence,
    },
}

/// Why what a source said is worth nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClearReason {
    /// The publisher says itself that it began anew.
    NewEpoch,
    /// The publisher's batches are not the ones that were applied.
    Restarted,
    /// The publisher does not keep the missed batches any more.
    HistoryLost,
    /// The publisher did not answer.
    ReplayFailed,
    /// The publisher cannot be asked whether it is still the same, or for what was missed.
    Unverifiable,
}

impl ClearReason {
    /// The name in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NewEpoch => "new_epoch",
            Self::Restarted => "restarted",
            Self::HistoryLost => "history_lost",
            Self::ReplayFailed => "replay_failed",
            Self::Unverifiable => "unverifiable",
        }
    }
}

/// Counts since the source was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IngestStats {
    /// Batches handed out.
    pub applied: u64,
    /// Times that a batch came before an older one had.
    pub gaps: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Replays that failed.
    pub replay_failures: u64,
    /// Times that the source was cleared.
    pub resyncs: u64,
    /// Times that it was replaced by its publisher's image.
    pub images: u64,
    /// Batches that were applied already.
    pub duplicates: u64,
    /// Batches that were dropped: no room, not this publisher's, or no valid number.
    pub dropped: u64,
}
