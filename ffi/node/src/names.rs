//! Names of blocks that an engine has hashed: what one process tells another about a run of blocks.
//!
//! An engine's scheduler knows the engine's hash of each block, but not which rank holds which part of it; a worker knows
//! its part. So the scheduler packs [`Names`] and each worker's node makes its own data keys of them
//! ([`crate::Node::prefix_of`]). Index keys travel along, because they are made from tokens, which nobody else needs.
//!
//! # Packed form, version 1
//!
//! ```text
//! names = u8(1) u8(flags) u16(bytes of a hash) u32(count)      all numbers little-endian
//!         [adapter[32]]                                        flags bit 1: which adapter shapes the bytes
//!         [hash u64(index key)]                                flags bit 0: the block before the first
//!         count * { hash u64(index key) }
//! ```
//!
//! Nothing may follow. Other flags are another version's.
//!
//! # Index keys without tokens
//!
//! Who only has hashes, such as a tier below an engine's own offloading, has no tokens to make index keys of
//! ([`pack_hashes`]). There a block's index key is made of its hash, and `root` stands for whatever else shapes its bytes:
//!
//! ```text
//! index key = the first 8 bytes, little-endian, of BLAKE3("kvfabric/hash-key/v1" NUL u64(bytes of root) root hash)
//! ```

use std::ops::Range;

use kvcache_core::prefix::{self, IndexChain, IndexScheme};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{Error, ErrorKind, IndexKey, Result};

/// The most blocks that one packed run may name.
pub const NAMES_MAX: usize = 1 << 20;
/// The longest engine hash, in bytes.
pub const HASH_BYTES_MAX: usize = 64;

const VERSION: u8 = 1;
const HAS_PARENT: u8 = 1;
const HAS_ADAPTER: u8 = 2;
const HEADER_BYTES: usize = 8;
const ADAPTER_BYTES: usize = 32;
const INDEX_KEY_BYTES: usize = 8;

/// Domain of the digest that makes index keys of hashes.
const HASH_KEY_DOMAIN: &[u8] = b"kvfabric/hash-key/v1\0";

/// Packs blocks of which only the engine's hashes are known, each of them by itself: no block is another one's parent. Those
/// that share a hash but not `root` have different index keys.
///
/// Routers ask by tokens, and so do not find such blocks: give them a model name of their own.
///
/// # Errors
/// [`ErrorKind::Invalid`] for hashes of different or impossible lengths, and for more than [`NAMES_MAX`].
pub fn pack_hashes(root: &[u8], hashes: &[&[u8]]) -> Result<Vec<u8>> {
    if hashes.len() > NAMES_MAX {
        return Err(Error::invalid("blocks", hashes.len(), 0..=NAMES_MAX));
    }
    let hash_bytes = hashes.first().map_or(0, |hash| hash.len());
    if !hashes.is_empty() {
        check_hashes(hashes, hash_bytes)?;
    }
    let mut seeded = blake3::Hasher::new();
    seeded
        .update(HASH_KEY_DOMAIN)
        .update(&(root.len() as u64).to_le_bytes())
        .update(root);
    let mut packed =
        Vec::with_capacity(HEADER_BYTES + hashes.len() * (hash_bytes + INDEX_KEY_BYTES));
    write_header(&mut packed, 0, hash_bytes, hashes.len());
    for hash in hashes {
        let digest = seeded.clone().update(hash).finalize();
        packed.extend_from_slice(hash);
        packed.extend_from_slice(&digest.as_bytes()[..INDEX_KEY_BYTES]);
    }
    Ok(packed)
}

/// The names of a growing sequence's blocks, from its first.
#[derive(Clone, Debug)]
pub struct NameChain {
    index: IndexChain,
    block_tokens: TokensPerBlock,
    adapter: Option<[u8; ADAPTER_BYTES]>,
    hash_bytes: usize,
    /// `hash_bytes` for each block.
    hashes: Vec<u8>,
    index_keys: Vec<IndexKey>,
}

impl NameChain {
    /// A chain without blocks. `scheme` must be the index's; `lora` and `cache_salt` are empty for none.
    #[must_use]
    pub fn new(
        scheme: &IndexScheme,
        model: &str,
        block_tokens: TokensPerBlock,
        lora: &str,
        cache_salt: &str,
    ) -> Self {
        let optional = |text| Some(text).filter(|text: &&str| !text.is_empty());
        let root = scheme.root(&prefix::Namespace {
            model: scheme.model_in_root(model),
            lora: optional(lora),
            cache_salt: optional(cache_salt),
        });
        Self {
            index: IndexChain::new(&root),
            block_tokens,
            adapter: None,
            hash_bytes: 0,
            hashes: Vec::new(),
            index_keys: Vec::new(),
        }
    }

    /// The same with the identity of the adapter's weights, for sequences that use one: two versions of an adapter under
    /// one name then share nothing.
    #[must_use]
    pub fn with_adapter(mut self, identity: [u8; 32]) -> Self {
        self.adapter = Some(identity);
        self
    }

    /// Appends full blocks: `tokens` are theirs, one after the other, `hashes` the engine's hash of each.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the tokens do not fill exactly as many blocks, for hashes of different or impossible
    /// lengths, and past [`NAMES_MAX`] blocks; nothing is appended then.
    pub fn extend(&mut self, tokens: &[u32], hashes: &[&[u8]]) -> Result<()> {
        let block = self.block_tokens.get() as usize;
        if hashes.len().checked_mul(block) != Some(tokens.len()) {
            let blocks = format!("{} for {} hashes of blocks", tokens.len(), hashes.len());
            return Err(Error::invalid(
                "tokens",
                blocks,
                format_args!("{block} each"),
            ));
        }
        if hashes.len() > NAMES_MAX - self.len() {
            return Err(Error::invalid(
                "blocks",
                self.len() + hashes.len(),
                0..=NAMES_MAX,
            ));
        }
        let Some(first) = hashes.first() else {
            return Ok(());
        };
        let expected = if self.is_empty() {
            first.len()
        } else {
            self.hash_bytes
        };
        check_hashes(hashes, expected)?;
        self.hash_bytes = expected;
        for (hash, tokens) in hashes.iter().zip(tokens.chunks_exact(block)) {
            self.hashes.extend_from_slice(hash);
            self.index_keys.push(self.index.push(tokens));
        }
        Ok(())
    }

    /// Blocks named so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index_keys.len()
    }

    /// Whether no block is named yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index_keys.is_empty()
    }

    /// The packed form of these blocks, by position; the block before the first goes along.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a range that is not within the chain.
    pub fn pack(&self, blocks: Range<usize>) -> Result<Vec<u8>> {
        if blocks.start > blocks.end || blocks.end > self.len() {
            let within = 0..self.len();
            return Err(Error::invalid("blocks", format!("{blocks:?}"), within));
        }
        let parent = blocks.start.checked_sub(1);
        let flags = if parent.is_some() { HAS_PARENT } else { 0 }
            | if self.adapter.is_some() {
                HAS_ADAPTER
            } else {
                0
            };
        let entry = self.hash_bytes + INDEX_KEY_BYTES;
        let mut packed =
            Vec::with_capacity(HEADER_BYTES + ADAPTER_BYTES + (blocks.len() + 1) * entry);
        write_header(&mut packed, flags, self.hash_bytes, blocks.len());
        packed.extend_from_slice(self.adapter.as_ref().map_or(&[], |adapter| &adapter[..]));
        for position in parent.unwrap_or(blocks.start)..blocks.end {
            let hash = &self.hashes[position * self.hash_bytes..][..self.hash_bytes];
            packed.extend_from_slice(hash);
            packed.extend_from_slice(&self.index_keys[position].0.to_le_bytes());
        }
        Ok(packed)
    }
}

/// One block's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a> {
    /// The engine's hash.
    pub hash: &'a [u8],
    /// Its place in the global index.
    pub index_key: IndexKey,
}

/// A run of blocks, read from its packed form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    hash_bytes: usize,
    adapter: Option<[u8; ADAPTER_BYTES]>,
    has_parent: bool,
    /// The parent's entry, if there is one, and the blocks'.
    entries: Vec<u8>,
}

impl Names {
    /// Reads a packed form, which may come from anyone.
    ///
    /// # Errors
    /// [`ErrorKind::Version`] for another version, [`ErrorKind::Invalid`] for anything else that is not exactly one run
    /// of names; both say what and where.
    pub fn parse(packed: &[u8]) -> Result<Self> {
        parse(packed).map_err(|error| error.at("names of blocks"))
    }

    /// How many blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len() / self.entry_bytes() - usize::from(self.has_parent)
    }

    /// Whether there is no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The block before the first; none if the first is its sequence's.
    #[must_use]
    pub fn parent(&self) -> Option<Name<'_>> {
        let entry = self.entries.get(..self.entry_bytes());
        entry
            .filter(|_| self.has_parent)
            .map(|entry| self.name(entry))
    }

    /// The identity of the adapter that shapes these blocks' bytes, if one was named.
    #[must_use]
    pub fn adapter(&self) -> Option<[u8; 32]> {
        self.adapter
    }

    /// The blocks, in order.
    pub fn iter(&self) -> impl Iterator<Item = Name<'_>> {
        let entries = self.entries.chunks_exact(self.entry_bytes());
        entries
            .skip(usize::from(self.has_parent))
            .map(|entry| self.name(entry))
    }

    fn entry_bytes(&self) -> usize {
        self.hash_bytes + INDEX_KEY_BYTES
    }

    fn name<'a>(&self, entry: &'a [u8]) -> Name<'a> {
        let (hash, index_key) = entry.split_at(self.hash_bytes);
        let index_key = index_key
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte));
        Name {
            hash,
            index_key: IndexKey(index_key),
        }
    }
}

/// All hashes must have `expected` bytes.
fn check_hashes(hashes: &[&[u8]], expected: usize) -> Result<()> {
    let name = "bytes of a hash";
    if !(1..=HASH_BYTES_MAX).contains(&expected) {
        return Err(Error::invalid(name, expected, 1..=HASH_BYTES_MAX));
    }
    match hashes.iter().find(|hash| hash.len() != expected) {
        Some(other) => Err(Error::invalid(name, other.len(), [expected])),
        None => Ok(()),
    }
}

fn write_header(packed: &mut Vec<u8>, flags: u8, hash_bytes: usize, count: usize) {
    packed.extend_from_slice(&[VERSION, flags]);
    packed.extend_from_slice(&(hash_bytes as u16).to_le_bytes());
    packed.extend_from_slice(&(count as u32).to_le_bytes());
}

fn parse(packed: &[u8]) -> Result<Names> {
    let version = packed.first().copied().unwrap_or_default();
    if version != VERSION && !packed.is_empty() {
        let text = format!("version is {version}, expected {VERSION}");
        return Err(Error::new(ErrorKind::Version, text));
    }
    let Some((&[_, flags, h0, h1, c0, c1, c2, c3], mut rest)) =
        packed.split_first_chunk::<HEADER_BYTES>()
    else {
        return Err(Error::invalid("bytes", packed.len(), HEADER_BYTES..));
    };
    let hash_bytes = usize::from(u16::from_le_bytes([h0, h1]));
    let count = u32::from_le_bytes([c0, c1, c2, c3]) as usize;
    if flags & !(HAS_PARENT | HAS_ADAPTER) != 0 {
        let text = format!("flags are {flags:#x}, of which this version knows 0x3");
        return Err(Error::new(ErrorKind::Version, text));
    }
    let has_parent = flags & HAS_PARENT != 0;
    let entries = count + usize::from(has_parent);
    // No block at all has no hash whose length could be told.
    let shortest = usize::from(entries > 0);
    if !(shortest..=HASH_BYTES_MAX).contains(&hash_bytes) {
        return Err(Error::invalid(
            "bytes of a hash",
            hash_bytes,
            shortest..=HASH_BYTES_MAX,
        ));
    }
    if count > NAMES_MAX {
        return Err(Error::invalid("count of blocks", count, 0..=NAMES_MAX));
    }
    let mut adapter = None;
    if flags & HAS_ADAPTER != 0 {
        let Some((identity, after)) = rest.split_first_chunk::<ADAPTER_BYTES>() else {
            return Err(Error::invalid(
                "bytes after the header",
                rest.len(),
                ADAPTER_BYTES..,
            ));
        };
        (adapter, rest) = (Some(*identity), after);
    }
    let expected = entries * (hash_bytes + INDEX_KEY_BYTES);
    if rest.len() != expected {
        return Err(Error::invalid("bytes of entries", rest.len(), [expected]));
    }
    Ok(Names {
        hash_bytes,
        adapter,
        has_parent,
        entries: rest.to_vec(),
    })
}

#[cfg(test)]
mod tests;
