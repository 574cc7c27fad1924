//! The geometry of one model's cache.

use std::num::NonZeroU32;

use super::{Attention, Element, LAYERS_MAX, Tensor, TokensPerBlock};
use crate::error::Error;

/// For how long a layer needs its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// All of them: the cache grows with the sequence.
    Full,
    /// Only the last so many.
    Window(NonZeroU32),
}

/// Layers of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerGroup {
    /// How many.
    pub layers: u32,
    /// What each keeps for a token.
    pub attention: Attention,
    /// For how long.
    pub reach: Reach,
}

/// The geometry of one model's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    name: String,
    groups: Vec<LayerGroup>,
    element: Element,
    recurrent_bytes: u64,
}

impl Model {
    /// A model with these layers.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a number outside its range, or an element type that
    /// its attention does not have.
    pub fn new(name: &str, groups: Vec<LayerGroup>, element: Element) -> Result<Self, Error> {
        let model = Self {
            name: name.to_owned(),
            groups,
            element,
            recurrent_bytes: 0,
        };
        let layers = model
            .groups
            .iter()
            .fold(0u32, |sum, group| sum.saturating_add(group.layers));
        let empty = model
            .groups
            .iter()
            .map(|group| group.layers)
            .find(|layers| *layers == 0);
        let layers = empty.unwrap_or(layers);
        if !(1..=LAYERS_MAX).contains(&layers) {
            return Err(Error::invalid("layers", layers, 1..=LAYERS_MAX).at(name));
        }
        for group in &model.groups {
            group.attention.check().map_err(|error| error.at(name))?;
            group
                .attention
                .token_bytes(element, 1)
                .map_err(|error| error.at(name))?;
        }
        Ok(model)
    }

    /// The same model with its cache in another element type.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn with_element(&self, element: Element) -> Result<Self, Error> {
        let model = Self::new(&self.name, self.groups.clone(), element)?;
        Ok(model.with_recurrent_bytes(self.recurrent_bytes))
    }

    /// The same model with so many bytes of recurrent state per sequence.
    #[must_use]
    pub fn with_recurrent_bytes(mut self, recurrent_bytes: u64) -> Self {
        self.recurrent_bytes = recurrent_bytes;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How its cache's numbers are stored.
    #[must_use]
    pub const fn element(&self) -> Element {
        self.element
    }

    /// Its layers, by kind. An engine keeps a cache group for each.
    #[must_use]
    pub fn groups(&self) -> &[LayerGroup] {
        &self.groups
    }

    /// Layers that keep something for each token.
    #[must_use]
    pub fn layers(&self) -> u32 {
        self.groups.iter().map(|group| group.layers).sum()
    }

    /// Bytes a token takes in all layers, on one rank that holds everything.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        self.groups
            .iter()
            .map(|group| self.group_bytes(group, group.attention.heads()))
            .sum()
    }

    /// Bytes by which the cache grows with each token of a long sequence: layers with a window no longer grow.
    #[must_use]
    pub fn growing_bytes_per_token(&self) -> u64 {
        let growing = self
            .groups
            .iter()
            .filter(|group| group.reach == Reach::Full);
        growing
            .map(|group| self.group_bytes(group, group.attention.heads()))
            .sum()
    }

    /// Bytes that a long sequence needs once: its windows and its recurrent state.
    #[must_use]
    pub fn fixed_bytes(&self) -> u64 {
        let windows = self.groups.iter().map(|group| match group.reach {
            Reach::Full => 0,
            Reach::Window(tokens) => {
                u64::from(tokens.get()) * self.group_bytes(group, group.attention.heads())
            }
        });
        windows.sum::<u64>() + self.recurrent_bytes
    }

    /// Bytes of one block in all layers, on one rank that holds everything.
    #[must_use]
    pub fn block_bytes(&self, tokens: TokensPerBlock) -> u64 {
        self.bytes_per_token() * u64::from(tokens.get())
    }

    /// Bytes of one block in all layers, on one rank of a tensor-parallel group. All ranks hold equally much.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) when the heads cannot be divided so; see [`Tensor::heads`].
    pub fn rank_block_bytes(&self, tokens: TokensPerBlock, tensor: Tensor) -> Result<u64, Error> {
        let mut bytes = 0;
        for group in &self.groups {
            bytes += self.page_bytes(group, tokens, tensor)? * u64::from(group.layers);
        }
        Ok(bytes)
    }

    /// Bytes of one block in one layer of a group, on one rank.
    ///
    /// # Errors
    /// As for [`Self::rank_block_bytes`].
    pub fn page_bytes(
        &self,
        group: &LayerGroup,
        tokens: TokensPerBlock,
        tensor: Tensor,
    ) -> Result<u64, Error> {
        let heads = tensor
            .heads(group.attention.heads())
            .map_err(|error| error.at(&self.name))?;
        let bytes = group
            .attention
            .token_bytes(self.element, heads.end - heads.start)?;
        Ok(bytes * u64::from(tokens.get()))
    }

    fn group_bytes(&self, group: &LayerGroup, heads: u32) -> u64 {
        let bytes = group.attention.token_bytes(self.element, heads);
        // `new` has checked that every group has this element type.
        bytes.map_or(0, |bytes| bytes * u64::from(group.layers))
    }
}
