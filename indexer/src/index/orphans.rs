//! Blocks that an engine holds, but whose place in the index is not known yet.

use std::collections::HashMap;
use std::mem::size_of;

use kvcache_core::{EngineHash, Tier};

use super::image::{ImageContent, ImageOrphan};
use crate::score::TIERS;

/// Copies of a block by tier.
pub(super) type Copies = [u32; TIERS];

/// How many bytes of tokens and identifiers the waiting blocks of one source may have.
const CONTENT_BYTES_MAX: usize = 64 << 20;

/// What places a block as soon as the block before it is placed.
pub(super) struct Content {
    pub(super) parent: EngineHash,
    pub(super) tokens: Box<[u32]>,
    pub(super) identifiers: Vec<String>,
}

impl Content {
    fn bytes(&self) -> usize {
        content_bytes(&self.tokens, &self.identifiers)
    }
}

/// What tokens and identifiers take beside whatever has them.
pub(super) fn content_bytes(tokens: &[u32], identifiers: &[String]) -> usize {
    let identifiers = identifiers.iter();
    let identifiers: usize = identifiers
        .map(|text| size_of::<String>() + text.len())
        .sum();
    size_of_val(tokens) + identifiers
}

struct Orphan {
    /// None when the block's own tokens have not been told, so that a parent would not help.
    content: Option<Content>,
    copies: Copies,
}

/// The orphans of one source.
pub(super) struct Orphans {
    blocks_max: usize,
    /// No more are taken, whatever the count.
    pub(super) is_closed: bool,
    by_hash: HashMap<EngineHash, Orphan>,
    /// The orphans that wait for a block, by that block.
    waiting: HashMap<EngineHash, Vec<EngineHash>>,
    content_bytes: usize,
}

impl Orphans {
    pub(super) fn new(blocks_max: usize) -> Self {
        Self {
            blocks_max,
            is_closed: false,
            by_hash: HashMap::new(),
            waiting: HashMap::new(),
            content_bytes: 0,
        }
    }

    pub(super) fn blocks_max(&self) -> usize {
        self.blocks_max
    }

    pub(super) fn len(&self) -> usize {
        self.by_hash.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    pub(super) fn contains(&self, hash: EngineHash) -> bool {
        self.by_hash.contains_key(&hash)
    }

    /// Takes a block in; false when there is no room.
    pub(super) fn insert(&mut self, hash: EngineHash) -> bool {
        if self.is_closed || self.by_hash.len() >= self.blocks_max {
            return false;
        }
        self.by_hash.insert(
            hash,
            Orphan {
                content: None,
                copies: Copies::default(),
            },
        );
        true
    }

    pub(super) fn copies_mut(&mut self, hash: EngineHash) -> Option<&mut Copies> {
        self.by_hash.get_mut(&hash).map(|orphan| &mut orphan.copies)
    }

    /// Lets a block wait for the one before it; false when there is no room for its content.
    pub(super) fn attach(&mut self, hash: EngineHash, content: Content) -> bool {
        let Some(orphan) = self
            .by_hash
            .get_mut(&hash)
            .filter(|orphan| orphan.content.is_none())
        else {
            return true;
        };
        let bytes = self.content_bytes + content.bytes();
        if bytes > CONTENT_BYTES_MAX {
            return false;
        }
        self.content_bytes = bytes;
        self.waiting.entry(content.parent).or_default().push(hash);
        orphan.content = Some(content);
        true
    }

    /// Forgets a block; what copies of it there were.
    pub(super) fn forget(&mut self, hash: EngineHash) -> Option<Copies> {
        let orphan = self.by_hash.remove(&hash)?;
        if let Some(content) = &orphan.content {
            self.content_bytes -= content.bytes();
            if let Some(siblings) = self.waiting.get_mut(&content.parent) {
                siblings.retain(|sibling| *sibling != hash);
                if siblings.is_empty() {
                    self.waiting.remove(&content.parent);
                }
            }
        }
        Some(orphan.copies)
    }

    /// The blocks that waited for this one, with what places them.
    pub(super) fn children(
        &mut self,
        hash: EngineHash,
    ) -> impl Iterator<Item = (EngineHash, &Content)> {
        let children = self.waiting.remove(&hash).unwrap_or_default();
        let by_hash = &self.by_hash;
        children.into_iter().filter_map(move |child| {
            by_hash
                .get(&child)?
                .content
                .as_ref()
                .map(|content| (child, content))
        })
    }

    /// All that wait, as an image has them.
    pub(super) fn images(&self) -> impl Iterator<Item = ImageOrphan> + '_ {
        self.by_hash.iter().map(|(hash, orphan)| ImageOrphan {
            hash: *hash,
            copies: orphan.copies,
            content: orphan.content.as_ref().map(|content| ImageContent {
                parent: content.parent,
                tokens: content.tokens.to_vec(),
                identifiers: content.identifiers.clone(),
            }),
        })
    }

    /// Takes all copies in these tiers away.
    pub(super) fn clear(&mut self, tiers: &[Tier]) {
        let mut gone = Vec::new();
        for (hash, orphan) in &mut self.by_hash {
            tiers
                .iter()
                .for_each(|tier| orphan.copies[*tier as usize] = 0);
            if orphan.copies == Copies::default() {
                gone.push(*hash);
            }
        }
        for hash in gone {
            self.forget(hash);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.by_hash.capacity() * (size_of::<(EngineHash, Orphan)>() + 1) * 8 / 7
            + self.waiting.capacity() * (size_of::<(EngineHash, Vec<EngineHash>)>() + 1) * 8 / 7
            + self.by_hash.len() * size_of::<EngineHash>()
            + self.content_bytes
    }
}
