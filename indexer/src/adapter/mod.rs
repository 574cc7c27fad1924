//! The wire format of KV events, and the only place that knows it.
//!
//! Engines of many versions publish the same facts in many shapes: events as arrays or maps, batches with two or three
//! elements, hashes as integers of any width and sign or as whole digests. [`decode_batch`] accepts all of them and
//! yields [`SourceEvent`]s; an event that makes no sense costs only itself. [`encode_engine_batch`] and
//! [`encode_node_batch`] write the shape that vLLM publishes today.

mod decode;
mod encode;
mod event;
mod extra;
mod group;
mod medium;
mod msgpack;
mod topic;

#[cfg(test)]
mod tests;

use kvcache_core::{EngineHash, Result, Tier};

pub use decode::{
    BATCH_BYTES_MAX, EVENTS_MAX, UNKNOWN_MEDIA_MAX, WEIGHED_MEDIA_MAX, decode_batch,
    decode_batch_with,
};
pub use encode::{
    BatchOwner, OWNER_BYTES_MAX, encode_engine_batch, encode_engine_batch_of, encode_node_batch,
};
pub use event::{HASHES_MAX, IDENTIFIER_BYTES_MAX, IDENTIFIERS_MAX, NAME_BYTES_MAX, TOKENS_MAX};
pub use group::{CacheGroup, GroupRule};
pub use medium::{Media, MediumUse, tier_of_medium};
pub use topic::{TOPIC_BYTES_MAX, TOPIC_PREFIX, Topic};

/// What publishes a source's events, and so how they are read and what repeating one means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKind {
    /// vLLM: a block may be announced once per copy, and is gone when as many removals have come.
    Vllm,
    /// vLLM told to report reused prefixes again: repeating an announcement means nothing.
    VllmFull,
    /// SGLang: repeating an announcement means nothing; a clear empties the host's cache too.
    Sglang,
    /// A kvfabric node: hashes are index keys; repeating an announcement means nothing.
    Node,
    /// An engine that publishes nothing: what it holds is estimated by where prompts were routed.
    Approximate,
}

impl SourceKind {
    /// Whether each announcement is one more copy that a removal of its own must take back.
    #[must_use]
    pub const fn is_counted(self) -> bool {
        matches!(self, Self::Vllm)
    }

    /// Whether the events are vLLM's, with all their peculiarities.
    #[must_use]
    pub const fn is_vllm(self) -> bool {
        matches!(self, Self::Vllm | Self::VllmFull)
    }

    /// The name in configuration and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::VllmFull => "vllm-full",
            Self::Sglang => "sglang",
            Self::Node => "node",
            Self::Approximate => "approximate",
        }
    }
}

/// One message of a source: what happened between two of its steps, in order.
#[derive(Debug)]
pub struct Batch {
    /// When the source published it, in seconds since 1970 by its own clock.
    pub timestamp: f64,
    /// The data-parallel rank, where it is told.
    pub rank: Option<u32>,
    /// The events in order; an error stands for one that could not be read or is not understood. Those about media
    /// that are ignored are left out.
    pub events: Vec<Result<SourceEvent>>,
    /// Media that nobody has told of, whatever they are taken for, and how many events named each; at most
    /// [`UNKNOWN_MEDIA_MAX`].
    pub unknown_media: Vec<(String, u32)>,
    /// The media that blocks were stored in, each once, in upper case, as far as any medium of their tiers has a weight
    /// of its own; at most [`WEIGHED_MEDIA_MAX`].
    pub weighed_media: Vec<String>,
}

/// One event of a source, as all encodings tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Blocks appeared in a tier.
    Stored(StoredBlocks),
    /// Blocks left a tier.
    Removed(RemovedBlocks),
    /// The source's cache was emptied.
    Cleared,
}

impl SourceEvent {
    /// The source's hashes of the blocks that it tells of.
    #[must_use]
    pub fn names(&self) -> &[EngineHash] {
        match self {
            Self::Stored(blocks) => &blocks.hashes,
            Self::Removed(blocks) => &blocks.hashes,
            Self::Cleared => &[],
        }
    }
}

/// Blocks that appeared in a tier, in sequence order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlocks {
    /// The source's hashes, one a block; of a node, the index keys.
    pub hashes: Vec<EngineHash>,
    /// The block before the first; none at the start of a sequence.
    pub parent: Option<EngineHash>,
    /// The tokens of all blocks, in order; empty when the source tells only that known blocks are in one more tier.
    pub tokens: Vec<u32>,
    /// Tokens a block; 0 when there are no tokens.
    pub block_size: u32,
    /// Where they are.
    pub tier: Tier,
    /// The KV-cache group, for models that have several.
    pub group: Option<CacheGroup>,
    /// The adapter whose blocks these are.
    pub lora: Option<String>,
    /// The tenant's salt, told with the first block of a sequence only.
    pub cache_salt: Option<String>,
    /// Per block, what else shaped it; as long as `hashes`, or empty when nothing did.
    pub identifiers: Vec<BlockIdentifiers>,
}

/// What shaped a block beside its tokens: identifiers of images and the like, in the order told.
pub type BlockIdentifiers = Vec<String>;

/// Blocks that left a tier: one copy each where the source counts copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemovedBlocks {
    /// The source's hashes; of a node, the index keys.
    pub hashes: Vec<EngineHash>,
    /// Where they were.
    pub tier: Tier,
    /// The number of the KV-cache group, for models that have several.
    pub group: Option<u32>,
}
