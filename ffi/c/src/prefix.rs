//! Prefixes: the blocks of a token sequence, or those that an engine has named.

use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvfabric::life::Life;
use kvfabric::names::Names;
use kvfabric::{AttachedNode, Namespace, Prefix, Result};

use crate::boundary::{Handle, Out, boundary, enter, into_raw, optional_text, slice, take};
use crate::node::kvf_node;
use crate::options::{self, SizePrefixed};
use crate::status::kvf_status;

/// Bytes of a block's key.
pub const KVF_KEY_BYTES: usize = 32;

/// The full blocks of a sequence from its first, or a run of blocks that an engine has named.
pub struct kvf_prefix {
    node: Arc<AttachedNode>,
    prefix: Mutex<Prefix>,
}

impl Handle for kvf_prefix {
    const NAME: &'static str = "prefix";

    fn life(&self) -> &Arc<Life> {
        self.node.life()
    }
}

impl kvf_prefix {
    /// Held for copying and hashing only.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Prefix> {
        self.prefix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this node has made it.
    pub(crate) fn is_of(&self, node: &kvf_node) -> bool {
        Arc::ptr_eq(&self.node, &node.node)
    }
}

/// Whose blocks. Sequences that differ in one of these never share a block.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_namespace {
    /// sizeof(struct kvf_namespace).
    pub size: usize,
    /// The adapter; NULL for the base model.
    pub lora: *const c_char,
    /// The tenant's cache salt; NULL for none.
    pub cache_salt: *const c_char,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_namespace {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_namespace";
}

/// Makes a prefix without tokens. `owner` may be NULL: the base model, no salt.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `owner` with its strings for reads, `prefix_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_create(
    node: *const kvf_node,
    owner: *const kvf_namespace,
    prefix_out: *mut *mut kvf_prefix,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or readable with its strings, by contract.
        let namespace = unsafe { read_namespace(owner) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(prefix_out, "prefix_out") }?;
        let prefix = node.node.node().prefix(&namespace)?;
        out.write(handle(&node, prefix));
        Ok(())
    })
}

/// # Safety
/// `namespace` is null, or readable for its size, and its strings are null or valid for as long as the result is used.
pub(crate) unsafe fn read_namespace<'a>(namespace: *const kvf_namespace) -> Result<Namespace<'a>> {
    // SAFETY: null or readable for its size, by this function's contract.
    let Some(namespace) = unsafe { options::read_optional(namespace) }? else {
        return Ok(Namespace::default());
    };
    // SAFETY: null or a string, by this function's contract.
    let lora = unsafe { optional_text(namespace.lora, "kvf_namespace.lora") }?;
    let place = "kvf_namespace.cache_salt";
    // SAFETY: null or a string, by this function's contract.
    let cache_salt = unsafe { optional_text(namespace.cache_salt, place) }?;
    Ok(Namespace {
        lora: lora.unwrap_or_default(),
        cache_salt: cache_salt.unwrap_or_default(),
    })
}

fn handle(node: &kvf_node, prefix: Prefix) -> *mut kvf_prefix {
    into_raw(kvf_prefix {
        node: node.node.clone(),
        prefix: Mutex::new(prefix),
    })
}

/// Makes a prefix of the blocks that kvf_names_pack has packed, here or in another process. It cannot be extended.
///
/// `adapter` is the 32-byte identity of the adapter's weights if the names do not carry it, or NULL. KVF_UNSUPPORTED when
/// the node has no engine section configured, or when the engine's hashes are too weak to name blocks that outlive it;
/// KVF_INVALID or KVF_VERSION for bytes that are not such names.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `names` for `len` reads, `adapter` for 32 reads, `prefix_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_create_from_names(
    node: *const kvf_node,
    names: *const c_void,
    len: usize,
    adapter: *const u8,
    prefix_out: *mut *mut kvf_prefix,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or readable for `len` bytes, by contract.
        let names = unsafe { slice(names.cast::<u8>(), len, "names") }?;
        // SAFETY: null or readable for 32 bytes, by contract.
        let adapter = unsafe { optional_key(adapter, "adapter") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(prefix_out, "prefix_out") }?;
        let names = Names::parse(names)?;
        let prefix = node.node.node().prefix_of(&names, adapter)?;
        out.write(handle(&node, prefix));
        Ok(())
    })
}

/// # Safety
/// `key` is null or readable for 32 bytes.
pub(crate) unsafe fn optional_key(
    key: *const u8,
    name: &str,
) -> Result<Option<[u8; KVF_KEY_BYTES]>> {
    if key.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, and readable for as many bytes by this function's contract.
    let bytes = unsafe { slice(key, KVF_KEY_BYTES, name) }?;
    Ok(bytes.try_into().ok())
}

/// Appends tokens. `blocks_out` tells how many full blocks there are now, and may be NULL; tokens that fill none wait for the
/// next ones. Threads must not extend one prefix at once if the order of their tokens matters.
///
/// # Safety
/// Each pointer is null or valid: `prefix` live, `tokens` for `count` reads, `blocks_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_extend(
    prefix: *const kvf_prefix,
    tokens: *const u32,
    count: usize,
    blocks_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let prefix = enter(prefix, "prefix")?;
        // SAFETY: null or readable for `count` values, by contract.
        let tokens = unsafe { slice(tokens, count, "tokens") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::optional(blocks_out, "blocks_out") }?;
        let blocks = prefix.lock().extend(tokens)?;
        if let Some(out) = out {
            out.write(blocks);
        }
        Ok(())
    })
}

/// How many blocks a prefix has.
///
/// # Safety
/// Each pointer is null or valid: `prefix` live, `blocks_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_len(
    prefix: *const kvf_prefix,
    blocks_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let prefix = enter(prefix, "prefix")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(blocks_out, "blocks_out") }?;
        out.write(prefix.lock().len());
        Ok(())
    })
}

/// Copies out the 32 bytes that name the block at `position`: equal exactly for blocks whose bytes are interchangeable.
///
/// # Safety
/// Each pointer is null or valid: `prefix` live, `key_out` for 32 writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_key(
    prefix: *const kvf_prefix,
    position: usize,
    key_out: *mut u8,
) -> kvf_status {
    boundary(|| {
        let prefix = enter(prefix, "prefix")?;
        // SAFETY: null or writable for 32 bytes, which have no alignment, by contract.
        let out = unsafe { Out::new(key_out.cast::<[u8; KVF_KEY_BYTES]>(), "key_out") }?;
        out.write(prefix.lock().info(position)?.key.0);
        Ok(())
    })
}

/// The place of the block at `position` in the global index: what kvf_index_lookup_keys takes.
///
/// # Safety
/// Each pointer is null or valid: `prefix` live, `key_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_index_key(
    prefix: *const kvf_prefix,
    position: usize,
    key_out: *mut u64,
) -> kvf_status {
    boundary(|| {
        let prefix = enter(prefix, "prefix")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(key_out, "key_out") }?;
        out.write(prefix.lock().info(position)?.index_key.0);
        Ok(())
    })
}

/// Gives a prefix back. Operations in progress keep what they need.
///
/// # Safety
/// `prefix` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_prefix_free(prefix: *mut kvf_prefix) -> kvf_status {
    boundary(|| take(prefix, "prefix", |_| Ok(())))
}
