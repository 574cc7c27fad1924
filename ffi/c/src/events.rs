//! An engine's own cache, as the index is told of it: for engines that do not publish events by themselves.

use kvfabric::{EngineEvent, EngineHash, Error, Namespace, Result, Tier, TokensPerBlock};

use crate::boundary::{boundary, enter, slice};
use crate::node::kvf_node;
use crate::options::{self, SizePrefixed};
use crate::prefix::{kvf_namespace, read_namespace};
use crate::status::kvf_status;

/// Where an engine has blocks of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_tier {
    /// The accelerator's memory.
    KVF_TIER_DEVICE = 0,
    /// Host memory.
    KVF_TIER_HOST = 1,
    /// A local disk.
    KVF_TIER_DISK = 2,
}

/// Blocks that an engine has stored, in sequence order.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_stored_event {
    /// sizeof(struct kvf_stored_event).
    pub size: usize,
    /// The engine's hash of each block, shortened to 64 bits.
    pub hashes: *const u64,
    /// How many blocks; not 0.
    pub count: usize,
    /// The hash of the block before the first; NULL at the start of a sequence.
    pub parent: *const u64,
    /// The tokens of all of them, one block after the other.
    pub tokens: *const u32,
    /// How many tokens: `count` times those of a block.
    pub token_count: usize,
    /// A kvf_tier.
    pub tier: u32,
    /// Zero.
    pub reserved: u32,
    /// Whose blocks; NULL: the base model's, without a salt.
    pub owner: *const kvf_namespace,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_stored_event {
    const SIZE_MIN: usize = std::mem::offset_of!(Self, owner);
    const NAME: &'static str = "kvf_stored_event";
}

fn parse_tier(tier: u32) -> Result<Tier> {
    const DEVICE: u32 = kvf_tier::KVF_TIER_DEVICE as u32;
    const HOST: u32 = kvf_tier::KVF_TIER_HOST as u32;
    const DISK: u32 = kvf_tier::KVF_TIER_DISK as u32;
    match tier {
        DEVICE => Ok(Tier::Device),
        HOST => Ok(Tier::Host),
        DISK => Ok(Tier::Disk),
        _ => Err(Error::invalid("tier", tier, DEVICE..=DISK)),
    }
}

/// What an event says, and whose blocks it is about.
pub(crate) struct Told<'a> {
    pub(crate) owner: Namespace<'a>,
    pub(crate) event: EngineEvent,
}

/// # Safety
/// `event` is null, or readable for its size, and with its arrays and its owner for as long as the result is used.
pub(crate) unsafe fn parse_stored<'a>(
    event: *const kvf_stored_event,
    block_tokens: TokensPerBlock,
) -> Result<Told<'a>> {
    // SAFETY: null or readable for its size, by this function's contract.
    let event = unsafe { options::read(event) }?;
    options::check_reserved(event.reserved, kvf_stored_event::NAME)?;
    // SAFETY: null or readable for `count` values, by this function's contract.
    let hashes = unsafe { slice(event.hashes, event.count, "kvf_stored_event.hashes") }?;
    let parents = usize::from(!event.parent.is_null());
    // SAFETY: null or readable, by this function's contract.
    let parent = unsafe { slice(event.parent, parents, "kvf_stored_event.parent") }?;
    let (count, place) = (event.token_count, "kvf_stored_event.tokens");
    // SAFETY: null or readable for `token_count` values, by this function's contract.
    let tokens = unsafe { slice(event.tokens, count, place) }?;
    // SAFETY: null or readable with its strings, by this function's contract.
    let owner = unsafe { read_namespace(event.owner) }?;
    let block_size = block_tokens.get();
    if hashes.is_empty() || hashes.len().checked_mul(block_size as usize) != Some(count) {
        let tokens = format!("{count} for {} blocks", hashes.len());
        let accepted = format!("{block_size} for each of at least one block");
        return Err(Error::invalid(
            "kvf_stored_event.token_count",
            tokens,
            accepted,
        ));
    }
    let event = EngineEvent::Stored {
        hashes: hashes.iter().copied().map(EngineHash).collect(),
        parent: parent.first().copied().map(EngineHash),
        tokens: tokens.to_vec(),
        block_size,
        tier: parse_tier(event.tier)?,
    };
    Ok(Told { owner, event })
}

/// # Safety
/// `hashes` is null, or readable for `count` values.
pub(crate) unsafe fn parse_removed(
    hashes: *const u64,
    count: usize,
    tier: u32,
) -> Result<EngineEvent> {
    // SAFETY: null or readable for `count` values, by this function's contract.
    let hashes = unsafe { slice(hashes, count, "hashes") }?;
    Ok(EngineEvent::Removed {
        hashes: hashes.iter().copied().map(EngineHash).collect(),
        tier: parse_tier(tier)?,
    })
}

/// Tells the index that the engine has stored blocks.
///
/// KVF_UNSUPPORTED when the node has no index, or when the engine's own publisher is configured; KVF_INVALID for an owner
/// whose names are too long for the index.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `event` with its arrays and its owner for reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_publish_stored(
    node: *const kvf_node,
    event: *const kvf_stored_event,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        let node = node.node.node();
        // SAFETY: null or readable with what it points to, by contract.
        let told = unsafe { parse_stored(event, node.block_tokens()) }?;
        node.publish_engine_of(&told.owner, &[told.event])
    })
}

/// Tells the index that one copy of each of these blocks has left a tier of the engine's, a kvf_tier. As
/// kvf_node_publish_stored.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `hashes` for `count` reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_publish_removed(
    node: *const kvf_node,
    hashes: *const u64,
    count: usize,
    tier: u32,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or readable for `count` values, by contract.
        let removed = unsafe { parse_removed(hashes, count, tier) }?;
        node.node.node().publish_engine(vec![removed])
    })
}

/// Tells the index that the engine has dropped everything from the accelerator's memory. As kvf_node_publish_stored.
///
/// # Safety
/// `node` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_publish_cleared(node: *const kvf_node) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        node.node.node().publish_engine(vec![EngineEvent::Cleared])
    })
}
