//! The geometry of a model's cache: how many bytes a block has, where they lie, and who holds which heads.
//!
//! [`Model`] knows layers and heads, [`Layout`] turns a block's slot into byte ranges, [`reshard`] says which bytes go
//! where when a block moves between engines of different tensor-parallel sizes.

mod attention;
mod layout;
mod model;
mod models;
pub mod reshard;
mod tensor;

use std::num::NonZeroU32;

pub use attention::{Attention, Element};
pub use layout::{Extent, Layout};
pub use model::{LayerGroup, Model, Reach};
pub use models::{model, model_names};
pub use tensor::Tensor;

use crate::error::Error;

/// The most tokens a block can have.
pub const TOKENS_PER_BLOCK_MAX: u32 = 65_536;
/// The most layers a model can have.
pub const LAYERS_MAX: u32 = 4096;
/// The most KV heads a layer can have.
pub const HEADS_MAX: u32 = 4096;
/// The most elements a head or a latent can have.
pub const HEAD_ELEMENTS_MAX: u32 = 65_536;
/// The most ranks a tensor-parallel group can have.
pub const TENSOR_RANKS_MAX: u32 = 4096;

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

#[cfg(test)]
mod tests;
