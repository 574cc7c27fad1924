//! The geometry of a model's cache: how many bytes a block has, where they lie, and who holds which heads.
//!
//! [`Model`] knows layers and heads, [`Layout`] turns a block's slot into byte ranges, [`reshard`] says which bytes go
//! where when a block moves between engines of different tensor-parallel sizes.

mod layout;
mod models;
pub mod reshard;

use std::num::NonZeroU32;

pub use layout::{Extent, Layout};
pub use models::{model, model_names};

use crate::error::{Error, ErrorKind};

/// The most tokens a block can have.
pub const TOKENS_PER_BLOCK_MAX: u32 = 65_536;
/// The most layers a model can have.
pub const LAYERS_MAX: u32 = 4096;
/// The most KV heads a layer can have.
pub const HEADS_MAX: u32 = 4096;
/// The most elements a head or a latent can have.
pub const HEAD_ELEMENTS_MAX: u32 = 65_536;
/// The most ranks a tensor-parallel group can have.
pub const TENSOR_RANKS_MAX: u32 = crate::prefix::data::TENSOR_RANKS_MAX;

/// Tokens a block: 1 to 65,536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokensPerBlock(NonZeroU32);

impl TokensPerBlock {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl TryFrom<u32> for TokensPerBlock {
    type Error = Error;

    fn try_from(raw: u32) -> Result<Self, Error> {
        match NonZeroU32::new(raw) {
            Some(count) if raw <= TOKENS_PER_BLOCK_MAX => Ok(Self(count)),
            _ => Err(Error::invalid(
                "tokens_per_block",
                raw,
                1..=TOKENS_PER_BLOCK_MAX,
            )),
        }
    }
}

/// How the cache's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 16-bit floats: bfloat16 or IEEE half.
    Bf16,
    /// 8-bit floats, without scales of their own.
    Fp8,
    /// DeepSeek's mixed format, for latent attention only: 8-bit latent with scales, 16-bit rotary part.
    Fp8DsMla,
}

impl Element {
    /// Reads `bf16`, `fp16`, `fp8` or `fp8_ds_mla`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the text and the names.
    pub fn parse(text: &str) -> Result<Self, Error> {
        match text {
            "bf16" | "fp16" => Ok(Self::Bf16),
            "fp8" => Ok(Self::Fp8),
            "fp8_ds_mla" => Ok(Self::Fp8DsMla),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                format!("element type is {text:?}, expected bf16, fp16, fp8 or fp8_ds_mla"),
            )),
        }
    }

    /// The name in configurations.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Fp8DsMla => "fp8_ds_mla",
        }
    }
}

/// What one layer keeps for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attention {
    /// A key and a value for each KV head (multi-head and grouped-query attention).
    Heads {
        /// KV heads of the whole model.
        heads: u32,
        /// Elements of one key; a value has as many.
        head_elements: u32,
    },
    /// One compressed vector that all heads share (DeepSeek's MLA).
    Latent {
        /// Elements of the compressed vector.
        latent: u32,
        /// Elements of its rotary part.
        rotary: u32,
        /// Bytes of the sparse-attention index key with its scale (DSA), in any element type; 0 without.
        index_bytes: u32,
    },
}

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

impl Attention {
    /// Bytes a token takes in one layer, when `heads` of the KV heads are held.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for `fp8_ds_mla` without a latent of 512 and a rotary part of 64 elements.
    fn token_bytes(&self, element: Element, heads: u32) -> Result<u64, Error> {
        let element_bytes = match element {
            Element::Bf16 => 2,
            Element::Fp8 | Element::Fp8DsMla => 1,
        };
        match (*self, element) {
            // 512 one-byte elements, 16 bytes of scales, 64 two-byte elements.
            (
                Self::Latent {
                    latent: 512,
                    rotary: 64,
                    index_bytes,
                },
                Element::Fp8DsMla,
            ) => Ok(656 + u64::from(index_bytes)),
            (_, Element::Fp8DsMla) => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "element type fp8_ds_mla needs a latent of 512 + 64 elements, not {self:?}"
                ),
            )),
            (
                Self::Latent {
                    latent,
                    rotary,
                    index_bytes,
                },
                _,
            ) => Ok(
                (u64::from(latent) + u64::from(rotary)) * element_bytes + u64::from(index_bytes)
            ),
            (Self::Heads { head_elements, .. }, _) => {
                Ok(2 * u64::from(heads) * u64::from(head_elements) * element_bytes)
            }
        }
    }

    /// KV heads that tensor parallelism can divide; a latent counts as one, which every rank holds.
    #[must_use]
    pub const fn heads(&self) -> u32 {
        match self {
            Self::Heads { heads, .. } => *heads,
            Self::Latent { .. } => 1,
        }
    }

    fn check(&self) -> Result<(), Error> {
        let fields: &[(&str, u32, u32)] = match self {
            Self::Heads {
                heads,
                head_elements,
            } => &[
                ("heads", *heads, HEADS_MAX),
                ("head_elements", *head_elements, HEAD_ELEMENTS_MAX),
            ],
            Self::Latent {
                latent,
                rotary,
                index_bytes,
            } => &[
                ("latent", *latent, HEAD_ELEMENTS_MAX),
                // May be absent, so they are checked from one up.
                ("rotary", rotary.saturating_add(1), HEAD_ELEMENTS_MAX),
                (
                    "index_bytes",
                    index_bytes.saturating_add(1),
                    HEAD_ELEMENTS_MAX,
                ),
            ],
        };
        for (field, value, max) in fields {
            if !(1..=*max).contains(value) {
                return Err(Error::invalid(field, value, 1..=*max));
            }
        }
        Ok(())
    }
}

impl Model {
    /// A model with these layers.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a number outside its range, or an element type that its attention does not have.
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
        if !(1..=LAYERS_MAX).contains(&layers) || model.groups.iter().any(|g| g.layers == 0) {
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
    /// [`ErrorKind::Invalid`] when the heads cannot be divided so; see [`Tensor::heads`].
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

/// One rank of a tensor-parallel group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    rank: u32,
    size: u32,
}

impl Tensor {
    /// The only rank of an engine without tensor parallelism.
    pub const SINGLE: Self = Self { rank: 0, size: 1 };

    /// Rank `rank` of `size`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the number and its range.
    pub fn new(rank: u32, size: u32) -> Result<Self, Error> {
        if !(1..=TENSOR_RANKS_MAX).contains(&size) {
            return Err(Error::invalid("tensor_size", size, 1..=TENSOR_RANKS_MAX));
        }
        if rank >= size {
            return Err(Error::invalid("tensor_rank", rank, 0..size));
        }
        Ok(Self { rank, size })
    }

    /// The rank's number.
    #[must_use]
    pub const fn rank(self) -> u32 {
        self.rank
    }

    /// Ranks in the group.
    #[must_use]
    pub const fn size(self) -> u32 {
        self.size
    }

    /// Which of `heads` KV heads this rank holds, as vLLM and SGLang divide them.
    ///
    /// Equal runs in rank order; with more ranks than heads, neighbours hold the same head. A latent is one head, so
    /// every rank holds it whole.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when neither number divides the other.
    pub fn heads(self, heads: u32) -> Result<std::ops::Range<u32>, Error> {
        if heads > 0 && heads.is_multiple_of(self.size) {
            let each = heads / self.size;
            return Ok(self.rank * each..(self.rank + 1) * each);
        }
        if heads > 0 && self.size.is_multiple_of(heads) {
            let head = self.rank / (self.size / heads);
            return Ok(head..head + 1);
        }
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "{heads} KV heads cannot be divided among {} ranks",
                self.size
            ),
        ))
    }
}

#[cfg(test)]
mod tests;
