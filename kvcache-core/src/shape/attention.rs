//! What a layer keeps for each token, and in which numbers.

use super::{HEAD_ELEMENTS_MAX, HEADS_MAX};
use crate::error::{Error, ErrorKind};

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

impl Attention {
    /// Bytes a token takes in one layer, when `heads` of the KV heads are held.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for `fp8_ds_mla` without a latent of 512 and a rotary part of 64 elements.
    pub(super) fn token_bytes(&self, element: Element, heads: u32) -> Result<u64, Error> {
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

    pub(super) fn check(&self) -> Result<(), Error> {
        let fields: &[(&str, u32, std::ops::RangeInclusive<u32>)] = match self {
            Self::Heads {
                heads,
                head_elements,
            } => &[
                ("heads", *heads, 1..=HEADS_MAX),
                ("head_elements", *head_elements, 1..=HEAD_ELEMENTS_MAX),
            ],
            Self::Latent {
                latent,
                rotary,
                index_bytes,
            } => &[
                ("latent", *latent, 1..=HEAD_ELEMENTS_MAX),
                ("rotary", *rotary, 0..=HEAD_ELEMENTS_MAX),
                ("index_bytes", *index_bytes, 0..=HEAD_ELEMENTS_MAX),
            ],
        };
        for (field, value, accepted) in fields {
            if !accepted.contains(value) {
                return Err(Error::invalid(field, value, accepted));
            }
        }
        Ok(())
    }
}
