//! From events to the payload that vLLM 0.26 and later would publish for them, byte for byte.

use kvcache_core::event::{EngineEvent, NodeEvent};
use kvcache_core::{EngineHash, IndexKey, Tier};

use super::event::IDENTIFIER_BYTES_MAX;
use super::msgpack::Writer;

/// Whose the blocks of a batch of an engine's events are. The default is the base model's, without a salt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchOwner<'a> {
    /// The adapter.
    pub lora: Option<&'a str>,
    /// The tenant's salt.
    pub cache_salt: Option<&'a str>,
}

/// The longest adapter's name or salt of a [`BatchOwner`], in bytes: what is read back as an extra key.
pub const OWNER_BYTES_MAX: usize = IDENTIFIER_BYTES_MAX;

/// The payload of a batch of an engine's events, published at `timestamp` (seconds since 1970).
///
/// It reads as one group of full attention, without adapters or salts.
#[must_use]
pub fn encode_engine_batch(timestamp: f64, events: &[EngineEvent]) -> Vec<u8> {
    encode_engine_batch_of(timestamp, &BatchOwner::default(), events)
}

/// As [`encode_engine_batch`], for blocks of one adapter and tenant, whose names have at most [`OWNER_BYTES_MAX`] bytes.
///
/// As in vLLM's own events, the salt is told with the first block of a sequence only: whoever reads them knows it of the
/// others by their parent.
#[must_use]
pub fn encode_engine_batch_of(
    timestamp: f64,
    owner: &BatchOwner<'_>,
    events: &[EngineEvent],
) -> Vec<u8> {
    let bytes: usize = events.iter().map(engine_event_bytes).sum();
    let mut writer = open_batch(timestamp, events.len(), bytes);
    for event in events {
        match event {
            EngineEvent::Stored {
                hashes,
                parent,
                tokens,
                block_size,
                tier,
            } => {
                let count = hashes.len();
                let hashes = hashes.iter().map(|hash| hash.0);
                let start = Start {
                    parent: parent.map(|hash: EngineHash| hash.0),
                    lora: owner.lora,
                };
                // Only blocks that the engine computed carry extra keys, and those that something shaped.
                let extra = *tier == Tier::Device || *owner != BatchOwner::default();
                let optional = 2 + usize::from(extra);
                stored(
                    &mut writer,
                    hashes,
                    &start,
                    tokens,
                    *block_size,
                    *tier,
                    optional,
                );
                if extra {
                    let salt = owner.cache_salt.filter(|_| parent.is_none());
                    extra_keys(&mut writer, count, owner.lora, salt);
                }
                writer.text("group_idx");
                writer.unsigned(0);
                writer.text("kv_cache_spec_kind");
                writer.text("full_attention");
            }
            EngineEvent::Removed { hashes, tier } => {
                removed(&mut writer, hashes.iter().map(|hash| hash.0), *tier, 1);
                writer.text("group_idx");
                writer.unsigned(0);
            }
            EngineEvent::Cleared => cleared(&mut writer),
        }
    }
    close_batch(writer)
}

/// What shaped each block beside its tokens, and the first one also if that begins a sequence of a tenant's.
fn extra_keys(writer: &mut Writer, blocks: usize, lora: Option<&str>, salt: Option<&str>) {
    writer.text("extra_keys");
    writer.array(blocks);
    for block in 0..blocks {
        let salt = salt.filter(|_| block == 0);
        if lora.is_none() && salt.is_none() {
            writer.nil();
            continue;
        }
        writer.array(usize::from(lora.is_some()) + usize::from(salt.is_some()));
        lora.into_iter()
            .chain(salt)
            .for_each(|key| writer.text(key));
    }
}

fn engine_event_bytes(event: &EngineEvent) -> usize {
    match event {
        EngineEvent::Stored { hashes, tokens, .. } => 200 + 10 * hashes.len() + 5 * tokens.len(),
        EngineEvent::Removed { hashes, .. } => 60 + 9 * hashes.len(),
        EngineEvent::Cleared => 30,
    }
}

/// The payload of a batch of a node's events, published at `timestamp` (seconds since 1970).
///
/// Hashes are index keys, and there are no tokens. Neighbouring events that say the same of consecutive blocks become
/// one, so a snapshot of a million blocks stays near 9 bytes each.
#[must_use]
pub fn encode_node_batch(timestamp: f64, events: &[NodeEvent]) -> Vec<u8> {
    let runs = || events.chunk_by(is_run);
    let mut writer = open_batch(timestamp, runs().count(), 160 + 9 * events.len());
    for run in runs() {
        match &run[0] {
            NodeEvent::Stored { parent, tier, .. } => {
                let start = Start {
                    parent: parent.map(|key: IndexKey| key.0),
                    lora: None,
                };
                stored(&mut writer, keys(run), &start, &[], 0, *tier, 0);
            }
            NodeEvent::Removed { tier, .. } => removed(&mut writer, keys(run), *tier, 0),
            NodeEvent::Cleared => cleared(&mut writer),
        }
    }
    close_batch(writer)
}

/// Whether the second event can be told in one breath with the first.
fn is_run(first: &NodeEvent, second: &NodeEvent) -> bool {
    match (first, second) {
        (
            NodeEvent::Stored { key, tier, .. },
            NodeEvent::Stored {
                parent: Some(parent),
                tier: second_tier,
                ..
            },
        ) => key == parent && tier == second_tier,
        (
            NodeEvent::Removed { tier, .. },
            NodeEvent::Removed {
                tier: second_tier, ..
            },
        ) => tier == second_tier,
        _ => false,
    }
}

fn keys(run: &[NodeEvent]) -> impl ExactSizeIterator<Item = u64> {
    run.iter().map(|event| match event {
        NodeEvent::Stored { key, .. } | NodeEvent::Removed { key, .. } => key.0,
        NodeEvent::Cleared => 0,
    })
}

fn open_batch(timestamp: f64, events: usize, bytes: usize) -> Writer {
    let mut writer = Writer::with_capacity(16 + bytes);
    writer.array(3);
    writer.float(timestamp);
    writer.array(events);
    writer
}

fn close_batch(mut writer: Writer) -> Vec<u8> {
    // The data-parallel rank: kvfabric runs one publisher per pod.
    writer.unsigned(0);
    writer.finish()
}

/// What a run of stored blocks goes on from, and which adapter's it is.
struct Start<'a> {
    parent: Option<u64>,
    lora: Option<&'a str>,
}

/// The fields that vLLM always writes; `optional` more must follow.
fn stored(
    writer: &mut Writer,
    hashes: impl ExactSizeIterator<Item = u64>,
    start: &Start<'_>,
    tokens: &[u32],
    block_size: u32,
    tier: Tier,
    optional: usize,
) {
    writer.map(8 + optional);
    writer.text("type");
    writer.text("BlockStored");
    block_hashes(writer, hashes);
    writer.text("parent_block_hash");
    match start.parent {
        Some(parent) => writer.unsigned(parent),
        None => writer.nil(),
    }
    writer.text("token_ids");
    writer.array(tokens.len());
    for token in tokens {
        writer.unsigned(u64::from(*token));
    }
    writer.text("block_size");
    writer.unsigned(u64::from(block_size));
    writer.text("lora_id");
    writer.nil();
    writer.text("medium");
    writer.text(tier.medium());
    writer.text("lora_name");
    match start.lora {
        Some(lora) => writer.text(lora),
        None => writer.nil(),
    }
}

fn removed(
    writer: &mut Writer,
    hashes: impl ExactSizeIterator<Item = u64>,
    tier: Tier,
    optional: usize,
) {
    writer.map(3 + optional);
    writer.text("type");
    writer.text("BlockRemoved");
    block_hashes(writer, hashes);
    writer.text("medium");
    writer.text(tier.medium());
}

fn cleared(writer: &mut Writer) {
    writer.map(1);
    writer.text("type");
    writer.text("AllBlocksCleared");
}

fn block_hashes(writer: &mut Writer, hashes: impl ExactSizeIterator<Item = u64>) {
    writer.text("block_hashes");
    writer.array(hashes.len());
    hashes.for_each(|hash| writer.unsigned(hash));
}
