//! A source as it can be written down and taken up elsewhere.

use kvcache_core::{EngineHash, IndexKey};

use super::config::SourceSpec;
use crate::score::TIERS;

/// The most blocks, placed or waiting, in one [`ImagePiece`].
pub const IMAGE_BLOCKS_MAX: usize = 4096;

/// Everything that is needed to go on applying a source's events, as of one moment between two events.
///
/// To take it up: `add_source` with the spec, then `import` every piece in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceImage {
    /// As it was registered.
    pub spec: SourceSpec,
    /// The cache group that the index follows; none before the first event that names one.
    pub group: Option<u32>,
    /// Placed blocks first, then those that wait; each piece has at most [`IMAGE_BLOCKS_MAX`] of both together.
    pub pieces: Vec<ImagePiece>,
}

/// A bounded part of a [`SourceImage`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImagePiece {
    /// The namespaces that blocks of this piece are in.
    pub namespaces: Vec<ImageNamespace>,
    /// Blocks whose place in the index is known.
    pub blocks: Vec<ImageBlock>,
    /// Blocks that wait for the block before them or for their tokens.
    pub orphans: Vec<ImageOrphan>,
}

/// What keeps equal tokens apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ImageNamespace {
    /// The adapter's name.
    pub lora: Option<String>,
    /// The tenant's cache salt.
    pub cache_salt: Option<String>,
}

/// A block whose place is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageBlock {
    /// The source's name for it; of a node, the key.
    pub hash: EngineHash,
    /// Its place in the index.
    pub key: IndexKey,
    /// Whether it comes directly after the block before it in this piece.
    pub follows: bool,
    /// Its place in the piece's namespaces; none where nobody has told it, as nodes do not.
    pub namespace: Option<u32>,
    /// Copies by tier, by `Tier as usize`: of shared tiers 1 when the source has announced it.
    pub copies: [u32; TIERS],
}

/// A block that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageOrphan {
    /// The source's name for it.
    pub hash: EngineHash,
    /// Copies by tier.
    pub copies: [u32; TIERS],
    /// What places it once the block before it is placed; none when its tokens have not been told.
    pub content: Option<ImageContent>,
}

/// What shaped a waiting block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageContent {
    /// The block before it.
    pub parent: EngineHash,
    /// As many as a block has.
    pub tokens: Vec<u32>,
    /// Identifiers of images and the like.
    pub identifiers: Vec<String>,
}
