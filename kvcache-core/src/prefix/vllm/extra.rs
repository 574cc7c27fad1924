//! What, besides tokens, enters a block's hash.

use std::ops::Range;

/// How extra keys enter the hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtraKeyStyle {
    /// Tuples that begin with what they are: vLLM 0.31 and later.
    Tagged,
    /// Bare values, the adapter's path left out: vLLM up to 0.30.
    Untagged,
}

/// What, besides tokens and parent, a block's bytes depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// An adapter; on every block of the request.
    Lora {
        /// Its name.
        name: &'a str,
        /// Where it was loaded from.
        path: &'a str,
    },
    /// An image, sound or video that overlaps the block.
    Multimodal {
        /// vLLM's hash of its content.
        identifier: &'a str,
        /// Where it begins, in tokens from the block's first; negative when in an earlier block.
        offset: i64,
    },
    /// The tenant's salt; on the first block only.
    CacheSalt(&'a str),
    /// SHA-256 of the embeddings given in place of tokens.
    PromptEmbeds(&'a [u8]),
}

/// One value of the tuples that are hashed.
pub(super) enum Item<'a> {
    Text(&'a str),
    Bytes(&'a [u8]),
    Int(i64),
}

impl<'a> ExtraKey<'a> {
    /// The items of the key, and whether they are a tuple of their own.
    pub(super) fn items(&self, style: ExtraKeyStyle) -> (Vec<Item<'a>>, bool) {
        use ExtraKeyStyle::{Tagged, Untagged};
        use Item::{Bytes, Int, Text};
        match (style, *self) {
            (Tagged, Self::Lora { name, path }) => {
                (vec![Text("lora"), Text(name), Text(path)], true)
            }
            (Untagged, Self::Lora { name, .. }) => (vec![Text(name)], false),
            (Tagged, Self::Multimodal { identifier, offset }) => {
                (vec![Text("mm"), Text(identifier), Int(offset)], true)
            }
            (Untagged, Self::Multimodal { identifier, offset }) => {
                (vec![Text(identifier), Int(offset)], true)
            }
            (Tagged, Self::CacheSalt(salt)) => (vec![Text("cache_salt"), Text(salt)], true),
            (Untagged, Self::CacheSalt(salt)) => (vec![Text(salt)], false),
            (Tagged, Self::PromptEmbeds(digest)) => {
                (vec![Text("prompt_embeds"), Bytes(digest)], true)
            }
            (Untagged, Self::PromptEmbeds(digest)) => (vec![Bytes(digest)], false),
        }
    }
}

/// A multimodal input's place in a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultimodalSpan<'a> {
    /// vLLM's hash of its content.
    pub identifier: &'a str,
    /// Its first placeholder token.
    pub start: u32,
    /// Placeholder tokens.
    pub len: u32,
}

/// What a whole request adds to its blocks' hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestKeys<'a> {
    /// The adapter's name and path.
    pub lora: Option<(&'a str, &'a str)>,
    /// Multimodal inputs, by their place.
    pub multimodal: &'a [MultimodalSpan<'a>],
    /// The tenant's salt.
    pub cache_salt: Option<&'a str>,
}

impl<'a> RequestKeys<'a> {
    /// The extra keys of the block that has these tokens of the prompt.
    #[must_use]
    pub fn of_block(&self, tokens: Range<u32>) -> Vec<ExtraKey<'a>> {
        let lora = self.lora.map(|(name, path)| ExtraKey::Lora { name, path });
        let spans = self.multimodal.iter().filter(|span| {
            span.start < tokens.end && span.start.saturating_add(span.len) > tokens.start
        });
        let inputs = spans.map(|span| ExtraKey::Multimodal {
            identifier: span.identifier,
            offset: i64::from(span.start) - i64::from(tokens.start),
        });
        let salt = self
            .cache_salt
            .filter(|_| tokens.start == 0)
            .map(ExtraKey::CacheSalt);
        lora.into_iter().chain(inputs).chain(salt).collect()
    }
}
