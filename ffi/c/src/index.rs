//! The index: which pods hold a prompt's blocks.

use std::ffi::c_char;
use std::sync::Arc;

use kvfabric::life::Life;
use kvfabric::{
    Error, IndexConnection, IndexKey, LookupAnswer, LookupRequest, POD_NAME_BYTES_MAX, PodDepth,
    Prompt, Result,
};

use crate::boundary::{
    Handle, Out, OutArray, boundary, enter, fixed, into_raw, milliseconds, optional_text, slice,
    take, text,
};
use crate::options::{self, SizePrefixed};
use crate::status::kvf_status;

/// Bytes that a name in an answer has room for, with its terminating NUL.
pub const KVF_NAME_CAPACITY: usize = 328;
const _: () = assert!(POD_NAME_BYTES_MAX < KVF_NAME_CAPACITY);

/// A connection to an index.
pub struct kvf_index {
    connection: IndexConnection,
}

impl Handle for kvf_index {
    const NAME: &'static str = "index";

    fn life(&self) -> &Arc<Life> {
        self.connection.life()
    }
}

/// Whose blocks a lookup asks for, and how long it may take. NULL strings are empty.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_lookup_options {
    /// sizeof(struct kvf_lookup_options).
    pub size: usize,
    /// The model; NULL when the index serves only one.
    pub model: *const c_char,
    /// The adapter; NULL for the base model.
    pub lora: *const c_char,
    /// The tenant's cache salt; NULL for none.
    pub cache_salt: *const c_char,
    /// How long the lookup may take; 0: as long as kvf_index_connect was told.
    pub deadline_ms: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_lookup_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_lookup_options";
}

/// What one pod holds of a prompt.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_pod_depth {
    /// The pod's name, with a terminating NUL.
    pub pod: [c_char; KVF_NAME_CAPACITY],
    /// Where its peer service listens; empty if it has none, or one with a longer name than fits.
    pub peer_address: [c_char; KVF_NAME_CAPACITY],
    /// Blocks from the first, without a hole, in tiers that the pod reaches by itself.
    pub depth: u32,
    /// For how many of those each tier is the fastest: accelerator, host memory, local disk, object store. They add up to
    /// `depth`.
    pub by_tier: [u32; 4],
    /// Zero.
    pub reserved: u32,
    /// The sum of weight times `by_tier`, with the index's weights.
    pub score: f64,
}

/// What is true of a whole answer.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_lookup_summary {
    /// Pods written.
    pub pods: usize,
    /// Full blocks in the prompt.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// How many of the first blocks shared tiers hold.
    pub shared_depth: u32,
    /// Zero.
    pub reserved: u32,
}

/// Connects to the index at `address`, "host:port". `deadline_ms` bounds this call, and each lookup that names no deadline.
///
/// KVF_INVALID for a malformed address or a deadline of 0, KVF_PEER_LOST or KVF_TIMEOUT when no index answers there. A connection
/// that is lost later is made again by the next lookup.
///
/// # Safety
/// Each pointer is null or valid: `address` a string, `index_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_index_connect(
    address: *const c_char,
    deadline_ms: u32,
    index_out: *mut *mut kvf_index,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or a string, by contract.
        let address = unsafe { text(address, "address") }?;
        if deadline_ms == 0 {
            return Err(Error::invalid("deadline_ms", deadline_ms, 1..=u32::MAX));
        }
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(index_out, "index_out") }?;
        let connection = IndexConnection::connect(address, milliseconds(deadline_ms))?;
        out.write(into_raw(kvf_index { connection }));
        Ok(())
    })
}

/// Asks who holds the blocks of a prompt; a tail that does not fill a block is ignored. Writes the deepest pods first, at most
/// `capacity` (not 0); no pod is a success too. `options` may be NULL.
///
/// KVF_TIMEOUT when the deadline passed, KVF_PEER_LOST when the index cannot be reached, KVF_BUSY when it is overloaded.
///
/// # Safety
/// Each pointer is null or valid: `index` live, `tokens` for `token_count` reads, `options` with its strings for reads,
/// `pods` for `capacity` writes, `summary_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_index_lookup(
    index: *const kvf_index,
    tokens: *const u32,
    token_count: usize,
    options: *const kvf_lookup_options,
    pods: *mut kvf_pod_depth,
    capacity: usize,
    summary_out: *mut kvf_lookup_summary,
) -> kvf_status {
    boundary(|| {
        let index = enter(index, "index")?;
        // SAFETY: null or readable for `token_count` values, by contract.
        let tokens = unsafe { slice(tokens, token_count, "tokens") }?;
        let prompt = Prompt::Tokens(tokens.to_vec());
        // SAFETY: each is null or valid, by contract.
        unsafe { lookup(&index, prompt, options, pods, capacity, summary_out) }
    })
}

/// As kvf_index_lookup, by the index keys of the prompt's blocks in order, made with the index's key scheme.
///
/// # Safety
/// Each pointer is null or valid: `index` live, `keys` for `key_count` reads, `options` with its strings for reads, `pods`
/// for `capacity` writes, `summary_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_index_lookup_keys(
    index: *const kvf_index,
    keys: *const u64,
    key_count: usize,
    options: *const kvf_lookup_options,
    pods: *mut kvf_pod_depth,
    capacity: usize,
    summary_out: *mut kvf_lookup_summary,
) -> kvf_status {
    boundary(|| {
        let index = enter(index, "index")?;
        // SAFETY: null or readable for `key_count` values, by contract.
        let keys = unsafe { slice(keys, key_count, "keys") }?;
        let prompt = Prompt::Keys(keys.iter().copied().map(IndexKey).collect());
        // SAFETY: each is null or valid, by contract.
        unsafe { lookup(&index, prompt, options, pods, capacity, summary_out) }
    })
}

/// # Safety
/// Each pointer is null or valid: `options` with its strings for reads, `pods` for `capacity` writes, `summary_out` for a
/// write.
unsafe fn lookup(
    index: &kvf_index,
    prompt: Prompt,
    options: *const kvf_lookup_options,
    pods: *mut kvf_pod_depth,
    capacity: usize,
    summary_out: *mut kvf_lookup_summary,
) -> Result<()> {
    // SAFETY: null or readable for its size, by this function's contract.
    let options = unsafe { options::read_optional(options) }?;
    // SAFETY: null or writable for `capacity` values, by this function's contract.
    let pods = unsafe { OutArray::new(pods, capacity, "pods") }?;
    // SAFETY: null or writable, by this function's contract.
    let summary_out = unsafe { Out::new(summary_out, "summary_out") }?;
    if capacity == 0 {
        return Err(Error::invalid("capacity", capacity, 1..=u32::MAX));
    }
    let mut request = LookupRequest::new("", prompt);
    request.pods_max = u32::try_from(capacity).unwrap_or(u32::MAX);
    if let Some(options) = options {
        // SAFETY: its strings are null or valid, by this function's contract.
        unsafe { apply(&options, &mut request) }?;
    }
    let answer = index.connection.ask(request)?;
    let found: Vec<kvf_pod_depth> = answer.pods.iter().take(capacity).map(pod_depth).collect();
    pods.write(&found);
    summary_out.write(summary(&answer, found.len()));
    Ok(())
}

/// # Safety
/// The strings of `options` are null or valid.
unsafe fn apply(options: &kvf_lookup_options, request: &mut LookupRequest) -> Result<()> {
    options::check_reserved(options.reserved, kvf_lookup_options::NAME)?;
    // SAFETY: null or a string, by this function's contract.
    let model = unsafe { optional_text(options.model, "kvf_lookup_options.model") }?;
    // SAFETY: null or a string, by this function's contract.
    let lora = unsafe { optional_text(options.lora, "kvf_lookup_options.lora") }?;
    let place = "kvf_lookup_options.cache_salt";
    // SAFETY: null or a string, by this function's contract.
    let cache_salt = unsafe { optional_text(options.cache_salt, place) }?;
    model.unwrap_or_default().clone_into(&mut request.model);
    lora.unwrap_or_default().clone_into(&mut request.lora);
    cache_salt
        .unwrap_or_default()
        .clone_into(&mut request.cache_salt);
    request.deadline = Some(milliseconds(options.deadline_ms)).filter(|d| !d.is_zero());
    Ok(())
}

fn pod_depth(pod: &PodDepth) -> kvf_pod_depth {
    kvf_pod_depth {
        pod: fixed(pod.pod.as_str()),
        peer_address: fixed(pod.peer_address.as_deref().unwrap_or_default()),
        depth: pod.depth,
        by_tier: pod.by_tier,
        reserved: 0,
        score: pod.score,
    }
}

fn summary(answer: &LookupAnswer, pods: usize) -> kvf_lookup_summary {
    kvf_lookup_summary {
        pods,
        blocks: answer.blocks,
        block_size: answer.block_size,
        shared_depth: answer.shared_depth,
        reserved: 0,
    }
}

/// Closes a connection.
///
/// # Safety
/// `index` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_index_free(index: *mut kvf_index) -> kvf_status {
    boundary(|| take(index, "index", |_| Ok(())))
}
