//! Names of blocks that an engine has hashed, and identities of models: no node is needed for these.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use kvfabric::identity::{self, Model};
use kvfabric::life::Life;
use kvfabric::names::{NameChain, pack_hashes};
use kvfabric::{Error, ErrorKind, IndexScheme, Result, TokensPerBlock};

use crate::boundary::{
    Handle, Listing, Out, boundary, enter, into_raw, optional_text, slice, take, text,
};
use crate::options::{self, SizePrefixed};
use crate::prefix::optional_key;
use crate::status::kvf_status;

/// Bytes of a model identity as text, with its terminating NUL.
pub const KVF_IDENTITY_CAPACITY: usize = 65;

/// The names of a growing sequence's blocks, from its first.
pub struct kvf_names {
    life: Arc<Life>,
    chain: Mutex<NameChain>,
}

impl Handle for kvf_names {
    const NAME: &'static str = "names";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// Which sequences these names are of.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_names_options {
    /// sizeof(struct kvf_names_options).
    pub size: usize,
    /// The key scheme of the nodes and of the index; NULL: "xxh3:1337".
    pub key_scheme: *const c_char,
    /// The model's name, as the nodes are configured.
    pub model: *const c_char,
    /// The adapter; NULL for the base model.
    pub lora: *const c_char,
    /// The tenant's cache salt; NULL for none.
    pub cache_salt: *const c_char,
    /// The 32-byte identity of the adapter's weights; NULL if its name says enough.
    pub adapter: *const u8,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_names_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_names_options";
}

/// Makes a chain of names without blocks.
///
/// # Safety
/// Each pointer is null or valid: `options` with what it points to for reads, `names_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_names_create(
    options: *const kvf_names_options,
    names_out: *mut *mut kvf_names,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        // SAFETY: what it points to is null or valid, by contract.
        let chain = unsafe { parse_names(&options) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(names_out, "names_out") }?;
        out.write(into_raw(kvf_names {
            life: Life::begin(),
            chain: Mutex::new(chain),
        }));
        Ok(())
    })
}

/// # Safety
/// What `options` points to is null or valid.
unsafe fn parse_names(options: &kvf_names_options) -> Result<NameChain> {
    options::check_reserved(options.reserved, kvf_names_options::NAME)?;
    // SAFETY: null or a string, by this function's contract.
    let scheme = unsafe { optional_text(options.key_scheme, "kvf_names_options.key_scheme") }?;
    // SAFETY: null or a string, by this function's contract.
    let model = unsafe { text(options.model, "kvf_names_options.model") }?;
    // SAFETY: null or a string, by this function's contract.
    let lora = unsafe { optional_text(options.lora, "kvf_names_options.lora") }?;
    let place = "kvf_names_options.cache_salt";
    // SAFETY: null or a string, by this function's contract.
    let cache_salt = unsafe { optional_text(options.cache_salt, place) }?;
    // SAFETY: null or readable for 32 bytes, by this function's contract.
    let adapter = unsafe { optional_key(options.adapter, "kvf_names_options.adapter") }?;
    let scheme = scheme.map_or_else(|| Ok(IndexScheme::default()), IndexScheme::parse)?;
    let block_tokens = TokensPerBlock::try_from(options.block_tokens)?;
    let (lora, cache_salt) = (lora.unwrap_or_default(), cache_salt.unwrap_or_default());
    let chain = NameChain::new(&scheme, model, block_tokens, lora, cache_salt);
    Ok(match adapter {
        Some(adapter) => chain.with_adapter(adapter),
        None => chain,
    })
}

/// Appends `count` full blocks: their tokens, one block after the other, and the engine's hash of each, `hash_len` bytes.
///
/// KVF_INVALID when the tokens do not fill exactly as many blocks, or hashes have another length than before; nothing is
/// appended then.
///
/// # Safety
/// Each pointer is null or valid: `names` live, `tokens` for `token_count` reads, `hashes` for `count` * `hash_len` reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_names_extend(
    names: *const kvf_names,
    tokens: *const u32,
    token_count: usize,
    hashes: *const u8,
    hash_len: usize,
    count: usize,
) -> kvf_status {
    boundary(|| {
        let names = enter(names, "names")?;
        // SAFETY: null or readable for `token_count` values, by contract.
        let tokens = unsafe { slice(tokens, token_count, "tokens") }?;
        // SAFETY: null or readable for `count` hashes, by contract.
        let hashes = unsafe { read_hashes(hashes, hash_len, count) }?;
        let mut chain = names.chain.lock().unwrap_or_else(PoisonError::into_inner);
        chain.extend(tokens, &hashes)
    })
}

/// Copies out the names of `count` blocks from position `first` on, for kvf_prefix_create_from_names in any process.
/// Buffers as in kvf_agent_metadata.
///
/// # Safety
/// Each pointer is null or valid: `names` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_names_pack(
    names: *const kvf_names,
    first: usize,
    count: usize,
    buffer: *mut c_void,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let names = enter(names, "names")?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        let chain = names.chain.lock().unwrap_or_else(PoisonError::into_inner);
        let packed = chain.pack(first..first.saturating_add(count))?;
        listing.fill(&packed, "names")
    })
}

/// Names blocks of which only the engine's hashes are known, `hash_len` bytes each, every block by itself: for
/// kvf_prefix_create_from_names in any process. The index finds such a block by its hash and by `root`, which stands for
/// whatever else shapes its bytes; routers, which ask by tokens, do not. Buffers as in kvf_agent_metadata.
///
/// # Safety
/// Each pointer is null or valid: `root` for `root_len` reads, `hashes` for `count` * `hash_len` reads, `buffer` for `capacity`
/// writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_names_pack_hashes(
    root: *const c_void,
    root_len: usize,
    hashes: *const u8,
    hash_len: usize,
    count: usize,
    buffer: *mut c_void,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for `root_len` bytes, by contract.
        let root = unsafe { slice(root.cast::<u8>(), root_len, "root") }?;
        // SAFETY: null or readable for `count` hashes, by contract.
        let hashes = unsafe { read_hashes(hashes, hash_len, count) }?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        listing.fill(&pack_hashes(root, &hashes)?, "names")
    })
}

/// # Safety
/// `hashes` is null, or readable for `count` * `hash_len` bytes for as long as the result is used.
unsafe fn read_hashes<'a>(
    hashes: *const u8,
    hash_len: usize,
    count: usize,
) -> Result<Vec<&'a [u8]>> {
    let bytes = hash_len.checked_mul(count).filter(|_| hash_len > 0);
    let Some(bytes) = bytes else {
        let text = format!("{count} hashes of {hash_len} bytes");
        return Err(Error::new(ErrorKind::Invalid, text));
    };
    // SAFETY: null or readable for as many bytes, by this function's contract.
    let hashes = unsafe { slice(hashes, bytes, "hashes") }?;
    Ok(hashes.chunks_exact(hash_len).collect())
}

/// Gives a chain of names back.
///
/// # Safety
/// `names` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_names_free(names: *mut kvf_names) -> kvf_status {
    boundary(|| take(names, "names", |_| Ok(())))
}

/// What shapes the bytes of a model's cache.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_model_options {
    /// sizeof(struct kvf_model_options).
    pub size: usize,
    /// The folder that the model was loaded from, or its one weight file; NULL if it is not known.
    pub path: *const c_char,
    /// A name that changes whenever the weights do, for when `path` tells nothing; NULL for none.
    pub name: *const c_char,
    /// The cache's element type, like "bf16".
    pub element: *const c_char,
    /// How weights and activations are quantised; NULL for not at all.
    pub quantisation: *const c_char,
    /// The order of bytes within a block, with its version.
    pub layout: *const c_char,
    /// Whatever else changes the bytes, each key once; NULL for nothing.
    pub attributes: *const crate::node::kvf_setting,
    /// How many.
    pub attribute_count: usize,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_model_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_model_options";
}

/// Derives the `model_identity` of a node's configuration: 64 digits and a terminating NUL. Weights are named by the commit
/// of a model hub's snapshot, else by a digest of the weight files (read once, which takes as long as the disk needs), else
/// by `name`.
///
/// KVF_INVALID when nothing names them.
///
/// # Safety
/// Each pointer is null or valid: `options` with what it points to for reads, `identity_out` for KVF_IDENTITY_CAPACITY
/// writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_model_identity(
    options: *const kvf_model_options,
    identity_out: *mut c_char,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        let out = identity_out.cast::<[c_char; KVF_IDENTITY_CAPACITY]>();
        // SAFETY: null or writable for as many bytes, which have no alignment, by contract.
        let out = unsafe { Out::new(out, "identity_out") }?;
        // SAFETY: what it points to is null or valid, by contract.
        let identity = unsafe { identity_of(&options) }?;
        out.write(crate::boundary::fixed(&identity::to_hex(&identity)));
        Ok(())
    })
}

/// # Safety
/// What `options` points to is null or valid.
unsafe fn identity_of(options: &kvf_model_options) -> Result<[u8; 32]> {
    // SAFETY: null or a string, by this function's contract.
    let path = unsafe { optional_text(options.path, "kvf_model_options.path") }?;
    // SAFETY: null or a string, by this function's contract.
    let name = unsafe { optional_text(options.name, "kvf_model_options.name") }?;
    // SAFETY: null or a string, by this function's contract.
    let element = unsafe { text(options.element, "kvf_model_options.element") }?;
    let place = "kvf_model_options.quantisation";
    // SAFETY: null or a string, by this function's contract.
    let quantisation = unsafe { optional_text(options.quantisation, place) }?;
    // SAFETY: null or a string, by this function's contract.
    let layout = unsafe { text(options.layout, "kvf_model_options.layout") }?;
    let (count, place) = (options.attribute_count, "kvf_model_options.attributes");
    // SAFETY: null or readable for its count, by this function's contract.
    let settings = unsafe { slice(options.attributes, count, place) }?;
    let mut attributes = Vec::with_capacity(settings.len());
    for setting in settings {
        // SAFETY: null or a string, by this function's contract.
        let key = unsafe { text(setting.key, place) }?;
        // SAFETY: null or a string, by this function's contract.
        let value = unsafe { text(setting.value, place) }?;
        attributes.push((key, value));
    }
    identity::of_model(&Model {
        path: path.map(Path::new),
        name,
        element,
        quantisation: quantisation.unwrap_or_default(),
        layout,
        attributes: &attributes,
    })
}
